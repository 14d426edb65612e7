"""`config.json`: Hugging Face's settings of a model, read into `transformer.Config` and written.

`read` refuses by name what this package does not compute: a setting passed over in silence gives a
model that runs and is wrong.
"""

import json
import math
from pathlib import Path
from typing import Any

from utils import CourseError, unexpected
from utils.hf import hub
from utils.rope import Llama3Scaling
from utils.transformer import Config

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
# Fields that have the same name and meaning there and here: these must be there, ...
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("intermediate_size", "max_position_embeddings")
SAME = (*SIZES, "rms_norm_eps")
# ... and these have a default.
ALSO = ("num_key_value_heads", "head_dim", "rope_theta", "tie_word_embeddings", "bos_token_id")
OTHER, INCOMPLETE = "not supported here", "is config.json whole?"
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# What changes the numbers and is not computed here, with the values that switch it off.
REFUSED = {
    "quantization_config": (None,),
    "hidden_act": ("silu", "swish", None),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1, 1.0, None),
    "use_mrope": (False, None),
    "pretraining_tp": (1, 0, None),
    "attention_multiplier": (None,),
    "logit_scale": (None, 1, 1.0),
    "use_qk_norm": (False, None),
    "no_rope_layers": (None, []),
}


def read(source: str | Path | dict) -> Config:
    """The sizes in a `config.json`: its folder, its path, a repository's name, or the dict itself.

    Reads both spellings, before and since transformers 5. Raises `CourseError` with a field's name
    for what is not computed here: another architecture or RoPE, quantised weights, ...
    """
    if isinstance(source, dict):
        return _from_dict(source)
    path = Path(source)
    if not path.exists():
        path = hub.model(str(source), weights=False)
    path = path / "config.json" if path.is_dir() else path
    try:
        return _from_dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise CourseError(f"{path}: not found: expected a Hugging Face model folder") from None
    except CourseError as error:
        raise CourseError(f"{path}: {error}") from None
    except (ValueError, OSError) as error:
        raise CourseError(f"{path}: not JSON ({error}): copy or download it again") from None


def to_dict(config: Config) -> dict[str, Any]:
    """The `config.json` that transformers, before and since 5, reads as this model."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling:
        rope |= {"rope_type": "llama3"} | {n: getattr(config.rope_scaling, n) for n in SCALING}
    eos = list(config.eos_token_id)
    settings = {
        "architectures": [ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        **{name: getattr(config, name) for name in SAME + ALSO},
        "hidden_act": "silu",
        "rope_scaling": rope if config.rope_scaling else None,
        "rope_parameters": rope,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "torch_dtype": config.dtype,
    }
    if config.model_type == "llama":
        return settings | {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    return settings | {"use_sliding_window": False}


def _from_dict(settings: dict) -> Config:
    if not isinstance(settings, dict):
        raise CourseError(f"expected a JSON object, found a {type(settings).__name__}")
    kind, get = settings.get("model_type"), settings.get
    if kind not in ARCHITECTURES:
        fix = "this model is not of that family"
        raise unexpected("model_type", "llama or qwen2", repr(kind), fix)
    for name, off in REFUSED.items():
        if get(name) not in off:
            raise unexpected(name, repr(off[0]), str(get(name))[:60], OTHER)
    if kind == "llama" and (window := get("sliding_window")) is not None:
        raise unexpected("sliding_window", "null", window, OTHER)
    if odd := set(get("layer_types") or []) - {"full_attention"}:
        raise unexpected("layer_types", "full_attention alone", sorted(odd)[0], OTHER)

    def need(name: str, default: Any = None):
        value = default if get(name) is None else get(name)
        if value is None:
            raise unexpected(name, "a value", "nothing", INCOMPLETE)
        return value

    heads, width = need("num_attention_heads"), need("hidden_size")
    if not all(isinstance(n, int) and n > 0 for n in (heads, width)):
        names = "num_attention_heads, hidden_size"
        raise unexpected(names, "whole numbers", f"{heads!r}, {width!r}")
    if get("head_dim") is None and width % heads:
        raise unexpected("hidden_size", f"a multiple of num_attention_heads ({heads})", width)
    rope = {}
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(part := get(name) or {}, dict):
            raise unexpected(name, "an object", repr(str(part)[:60]), INCOMPLETE)
        rope |= part
    eos = get("eos_token_id")
    bias = bool(get("attention_bias", False) if kind == "llama" else True)
    fields = dict(
        model_type=kind,
        **{name: need(name) for name in SAME},
        num_key_value_heads=need("num_key_value_heads", heads),
        head_dim=need("head_dim", width // heads),
        rope_theta=need("rope_theta", rope.get("rope_theta", 10000.0)),
        rope_scaling=_rope_scaling(rope),
        tie_word_embeddings=bool(get("tie_word_embeddings", False)),
        attention_bias=bias,
        o_proj_bias=bias and kind == "llama",
        mlp_bias=bool(get("mlp_bias", False)),
        bos_token_id=get("bos_token_id"),
        eos_token_id=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        dtype=str(get("torch_dtype") or get("dtype") or "float32"),
    )
    _check(fields)
    return Config(**fields)


def _check(fields: dict) -> None:
    """Raise `CourseError` for values that no model can have."""

    def check(name: str, right: bool, expected: str) -> None:
        if not right:
            raise unexpected(name, expected, repr(fields[name]))

    for name in (*SIZES, "num_key_value_heads", "head_dim"):
        check(name, _is_whole(fields[name]), "a whole number of at least 1")
    for name in ("rope_theta", "rms_norm_eps"):
        check(name, _is_positive(fields[name]), "a positive number")
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    expected = f"a multiple of num_key_value_heads ({kv_heads})"
    check("num_attention_heads", heads % kv_heads == 0, expected)
    check("head_dim", fields["head_dim"] % 2 == 0, "an even number (RoPE turns pairs)")
    dtypes = ("float32", "float16", "bfloat16")
    check("dtype", fields["dtype"] in dtypes, "float32, float16 or bfloat16")
    check("bos_token_id", _is_whole(fields["bos_token_id"] or 0, 0), "a token id")
    check("eos_token_id", all(_is_whole(i, 0) for i in fields["eos_token_id"]), "token ids")


def _is_whole(value, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_positive(value) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf


def _rope_scaling(rope: dict) -> Llama3Scaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise unexpected("rope_scaling", "none or llama3", repr(kind), OTHER)
    for name in SCALING:
        if rope.get(name) is None:
            raise unexpected("rope_scaling", name, "nothing", INCOMPLETE)
        if not _is_positive(rope[name]):
            raise unexpected(f"rope_scaling: {name}", "a positive number", repr(rope[name]))
    return Llama3Scaling(**{name: rope[name] for name in SCALING})
