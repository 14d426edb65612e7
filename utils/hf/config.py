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


def _from_dict(settings: dict) -> Config:
    kind, get = settings.get("model_type"), settings.get
    if kind not in ARCHITECTURES:
        raise CourseError(
            f"model_type: expected llama or qwen2, found {kind!r}: this model is not of that family"
        )
    for name, off in REFUSED.items():
        if get(name) not in off:
            value = str(get(name))[:60]
            raise CourseError(f"{name}: expected {off[0]!r}, found {value}: not supported here")
    if kind == "llama" and (window := get("sliding_window")) is not None:
        raise CourseError(f"sliding_window: expected null, found {window}: not supported here")
    if odd := set(get("layer_types") or []) - {"full_attention"}:
        what = f"expected full_attention alone, found {sorted(odd)[0]}: not supported here"
        raise CourseError(f"layer_types: {what}")

    def need(name: str, default: Any = None):
        value = default if get(name) is None else get(name)
        if value is None:
            what = "expected in the configuration, found nothing: is config.json whole?"
            raise CourseError(f"{name}: {what}")
        return value

    heads, width = need("num_attention_heads"), need("hidden_size")
    if not all(isinstance(n, int) and n > 0 for n in (heads, width)):
        raise CourseError(
            f"num_attention_heads, hidden_size: expected whole numbers, found {heads!r}, {width!r}"
        )
    if get("head_dim") is None and width % heads:
        raise CourseError(
            f"hidden_size: expected a multiple of num_attention_heads ({heads}), found {width}"
        )
    rope = {}
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(part := get(name) or {}, dict):
            what = f"expected an object, found {str(part)[:60]!r}: is config.json whole?"
            raise CourseError(f"{name}: {what}")
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

    def fail(name: str, expected: str):
        raise CourseError(f"{name}: expected {expected}, found {fields[name]!r}")

    for name in (*SAME, "num_key_value_heads", "head_dim"):
        value, whole = fields[name], name != "rms_norm_eps"
        if whole and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            fail(name, "a whole number of at least 1")
    for name in ("rope_theta", "rms_norm_eps"):
        if not isinstance(fields[name], int | float) or not 0 < fields[name] < math.inf:
            fail(name, "a positive number")
    if fields["num_attention_heads"] % (kv := fields["num_key_value_heads"]):
        fail("num_attention_heads", f"a multiple of num_key_value_heads ({kv})")
    if fields["head_dim"] % 2:
        fail("head_dim", "an even number (RoPE turns pairs)")
    if fields["dtype"] not in ("float32", "float16", "bfloat16"):
        fail("dtype", "float32, float16 or bfloat16")
    for name in ("bos_token_id", "eos_token_id"):
        ids = fields[name] if name == "eos_token_id" else (fields[name] or 0,)
        if not all(isinstance(i, int) and i >= 0 for i in ids):
            fail(name, "token ids")


def _rope_scaling(rope: dict) -> Llama3Scaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise CourseError(
            f"rope_scaling: expected none or llama3, found {kind!r}: not supported here"
        )
    for name in SCALING:
        value = rope.get(name)
        if value is None:
            what = f"expected {name}, found nothing: is config.json whole?"
            raise CourseError(f"rope_scaling: {what}")
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise CourseError(f"rope_scaling: {name}: expected a positive number, found {value!r}")
    return Llama3Scaling(**{name: rope[name] for name in SCALING})
