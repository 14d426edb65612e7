"""`config.json`: Hugging Face's settings of a model, read into `transformer.Config` and written again.

`read` refuses by name what this package does not compute: a setting that is passed over in silence
gives a model that runs and is wrong.
"""

import json
import math
from pathlib import Path
from typing import Any

from utils import CourseError
from utils.hf import hub
from utils.rope import Llama3Scaling
from utils.transformer import Config

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
# Fields that have the same name and meaning there and here, and must be there.
SAME = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
SAME += ("intermediate_size", "max_position_embeddings", "rms_norm_eps")
OTHER, INCOMPLETE = ": not supported here", ": is config.json whole?"
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

    Reads both spellings, before and since transformers 5. Raises `CourseError` that names the field
    for a model that is not computed here: another architecture, a sliding window, another kind of
    RoPE, quantised weights, ...
    """
    if isinstance(source, dict):
        return _from_dict(source)
    path = Path(source)
    if not path.exists():
        path = hub.model(str(source), weights=False)
    path = path / "config.json" if path.is_dir() else path
    try:
        settings = json.loads(path.read_text())
    except FileNotFoundError:
        raise CourseError(f"{path}: not found: expected a Hugging Face model folder") from None
    except (ValueError, OSError) as error:
        raise CourseError(f"{path}: not JSON ({error}): copy or download it again") from None
    if not isinstance(settings, dict):
        raise CourseError(f"{path}: expected a JSON object, found a {type(settings).__name__}")
    try:
        return _from_dict(settings)
    except CourseError as error:
        raise CourseError(f"{path}: {error}") from None


def to_dict(config: Config) -> dict[str, Any]:
    """The `config.json` that transformers, before and since 5, reads as this model."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling:
        rope |= {"rope_type": "llama3"} | {n: getattr(config.rope_scaling, n) for n in SCALING}
    eos = list(config.eos_token_id)
    settings = {
        "architectures": [ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        **{name: getattr(config, name) for name in SAME},
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.rope_scaling else None,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "torch_dtype": config.dtype,
    }
    if config.model_type == "llama":
        return settings | {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    return settings | {"use_sliding_window": False}


def _refuse(name: str, expected: str, value, hint: str = "") -> None:
    raise CourseError(f"{name}: expected {expected}, found {value}{hint}")


def _from_dict(settings: dict) -> Config:
    kind, get = settings.get("model_type"), settings.get
    if kind not in ARCHITECTURES:
        _refuse("model_type", "llama or qwen2", repr(kind), ": this model is not of that family")
    for name, off in REFUSED.items():
        if get(name) not in off:
            _refuse(name, repr(off[0]), str(get(name))[:60], OTHER)
    if kind == "llama" and get("sliding_window") is not None:
        _refuse("sliding_window", "null", get("sliding_window"), OTHER)
    if odd := set(get("layer_types") or []) - {"full_attention"}:
        _refuse("layer_types", "full_attention alone", sorted(odd)[0], OTHER)

    def need(name: str, default: Any = None):
        value = default if get(name) is None else get(name)
        return _refuse(name, "a value", "nothing", INCOMPLETE) if value is None else value

    heads, width = need("num_attention_heads"), need("hidden_size")
    if not all(isinstance(n, int) and n > 0 for n in (heads, width)):
        names = "num_attention_heads, hidden_size"
        _refuse(names, "whole numbers", f"{heads!r}, {width!r}")
    if get("head_dim") is None and width % heads:
        _refuse("hidden_size", f"a multiple of num_attention_heads ({heads})", width)
    rope = {}
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(part := get(name) or {}, dict):
            _refuse(name, "an object", repr(str(part)[:60]), INCOMPLETE)
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
            _refuse(name, expected, repr(fields[name]))

    def is_whole(value, least: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    for name in (*SAME, "num_key_value_heads", "head_dim"):
        if name != "rms_norm_eps":
            check(name, is_whole(fields[name], 1), "a whole number of at least 1")
    for name in ("rope_theta", "rms_norm_eps"):
        check(name, _is_positive(fields[name]), "a positive number")
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    expected = f"a multiple of num_key_value_heads ({kv_heads})"
    check("num_attention_heads", heads % kv_heads == 0, expected)
    check("head_dim", fields["head_dim"] % 2 == 0, "an even number (RoPE turns pairs)")
    dtypes = ("float32", "float16", "bfloat16")
    check("dtype", fields["dtype"] in dtypes, "float32, float16 or bfloat16")
    check("bos_token_id", is_whole(fields["bos_token_id"] or 0, 0), "a token id")
    check("eos_token_id", all(is_whole(i, 0) for i in fields["eos_token_id"]), "token ids")


def _is_positive(value) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf


def _rope_scaling(rope: dict) -> Llama3Scaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        _refuse("rope_scaling", "none or llama3", repr(kind), OTHER)
    for name in SCALING:
        if rope.get(name) is None:
            _refuse("rope_scaling", name, "nothing", INCOMPLETE)
        if not _is_positive(rope[name]):
            _refuse(f"rope_scaling: {name}", "a positive number", repr(rope[name]))
    return Llama3Scaling(**{name: rope[name] for name in SCALING})
