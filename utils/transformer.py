"""Qwen2 and Llama: MiniGPT with four swaps, and Hugging Face's names.

    tokens [B, T] -> embed_tokens -> L blocks -> norm -> lm_head -> logits [B, T, V]
    block:  x = x + self_attn(input_layernorm(x));   x = x + mlp(post_attention_layernorm(x))

The swaps: RMSNorm for LayerNorm, rotary positions (RoPE) for learnt ones, fewer key/value heads than query heads (GQA), and
SwiGLU for GELU. Qwen2 is Llama with biases on q, k and v. DeepSeek-R1-Distill, SmolLM2, Qwen2.5 and DeepSeek-Math are all
of this family; `Config.from_hf` reads their `config.json` and refuses by name what this file does not compute.

Every attribute path is a tensor's name on the hub: `model.layers.self_attn.q_proj.weight` here is
`model.layers.{i}.self_attn.q_proj.weight` there, with the layers stacked along a leading axis L and scanned, so that the
compiled program does not grow with depth. Weights keep Hugging Face's orientation, (out, in): nothing is ever transposed.

Axes: B batch, T tokens, S cache slots, D width, N query heads, K key/value heads, G = N / K, H head size, F MLP width,
V vocabulary, L layers.
"""

import contextlib
import contextvars
import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, BFloat16, Bool, Float, Int, UInt32

from utils import CourseError
from utils.sharding import all_gather, constrain

# ---------------------------------------------------------------------------------------------------------------- sizes


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretch of RoPE: slow rotations are slowed by `factor`, fast ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a model, under our names; `from_hf` and `to_hf` translate Hugging Face's `config.json`."""

    architecture: str  # "llama" or "qwen2": the same computation, told apart by their biases
    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    mlp_width: int
    context: int
    rope_theta: float
    norm_eps: float
    tied: bool  # the output layer is the embedding table
    qkv_bias: bool
    o_bias: bool = False
    mlp_bias: bool = False
    rope_scaling: Llama3Scaling | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    dtype: str = "float32"  # of the checkpoint

    def __post_init__(self):
        sizes = ("vocab_size", "width", "layers", "heads", "num_key_value_heads", "head_dim", "intermediate_size", "context")
        for name in sizes:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise CourseError(f"{name}: expected a whole number of at least 1, found {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise CourseError(f"heads: expected a multiple of kv_heads ({self.num_key_value_heads}), found {self.num_attention_heads}")
        if self.head_dim % 2:
            raise CourseError(f"head_size: expected an even number (RoPE turns pairs), found {self.head_dim}")
        for name in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise CourseError(f"{name}: expected a positive number, found {value!r}")
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise CourseError(f"dtype: expected float32, float16 or bfloat16, found {self.dtype!r}")
        for name, ids in (("bos_token_id", (self.bos_token_id or 0,)), ("eos_token_id", self.eos_token_id)):
            if not all(isinstance(i, int) and i >= 0 for i in ids):
                raise CourseError(f"{name}: expected token ids, found {ids}")

    @classmethod
    def from_hf(cls, source: str | Path | dict) -> "Config":
        """From a `config.json`: its folder, its path, a repository's name, or the dict itself.

        Reads both spellings, before and since transformers 5. Raises `CourseError` that names the field for a model this
        file does not compute: another architecture, a sliding window, another kind of RoPE, quantised weights, ...
        """
        if isinstance(source, dict):
            return _from_hf(source)
        path = Path(source)
        if not path.exists():
            from utils.hf import hub

            path = hub.model(str(source), weights=False)
        path = path / "config.json" if path.is_dir() else path
        try:
            found = json.loads(path.read_text())
        except FileNotFoundError:
            raise CourseError(f"{path}: not found: expected a Hugging Face model folder") from None
        except (ValueError, OSError) as error:
            raise CourseError(f"{path}: not JSON ({error}): copy or download it again") from None
        if not isinstance(found, dict):
            raise CourseError(f"{path}: expected a JSON object, found a {type(found).__name__}")
        try:
            return _from_hf(found)
        except CourseError as error:
            raise CourseError(f"{path}: {error}") from None

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that transformers, before and since 5, reads as this model."""
        rope = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.rope_scaling:
            s = self.rope_scaling
            rope |= {
                "rope_type": "llama3",
                "factor": s.factor,
                "low_freq_factor": s.low_freq_factor,
                "high_freq_factor": s.high_freq_factor,
                "original_max_position_embeddings": s.original_max_position_embeddings,
            }
        out = {
            "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[self.architecture]],
            "model_type": self.architecture,
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.context,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": rope if self.rope_scaling else None,
            "rope_parameters": rope,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id[0] if len(self.eos_token_id) == 1 else list(self.eos_token_id) or None,
            "torch_dtype": self.dtype,
        }
        if self.architecture == "llama":
            out |= {"attention_bias": self.attention_bias, "mlp_bias": self.mlp_bias}
        else:
            out |= {"use_sliding_window": False}
        return out


# What changes the numbers and is not computed here, with the values that switch it off.
_REFUSED = {
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


def _from_hf(hf: dict) -> Config:
    kind = hf.get("model_type")
    if kind not in ("llama", "qwen2"):
        raise CourseError(f"model_type: expected llama or qwen2, found {kind!r}: this model is not of that family")
    for name, off in _REFUSED.items():
        if hf.get(name) not in off:
            raise CourseError(f"{name}: expected {off[0]!r}, found {str(hf[name])[:60]}: not supported here")
    if kind == "llama" and hf.get("sliding_window") is not None:
        raise CourseError(f"sliding_window: expected null, found {hf['sliding_window']}: not supported here")
    if odd := set(hf.get("layer_types") or []) - {"full_attention"}:
        raise CourseError(f"layer_types: expected full_attention alone, found {sorted(odd)[0]}: not supported here")

    def need(name: str, default: Any = None):
        value = hf.get(name)
        if value is None:
            value = default
        if value is None:
            raise CourseError(f"{name}: expected in the configuration, found nothing: is config.json whole?")
        return value

    heads, width = need("num_attention_heads"), need("hidden_size")
    if not all(isinstance(n, int) and n > 0 for n in (heads, width)):
        raise CourseError(f"num_attention_heads, hidden_size: expected whole numbers, found {heads!r}, {width!r}")
    if hf.get("head_dim") is None and width % heads:
        raise CourseError(f"hidden_size: expected a multiple of num_attention_heads ({heads}), found {width}")
    rope = {}
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(part := hf.get(name) or {}, dict):
            raise CourseError(f"{name}: expected an object, found {str(part)[:60]!r}: is config.json whole?")
        rope |= part
    eos = hf.get("eos_token_id")
    bias = hf.get("attention_bias", False) if kind == "llama" else True
    return Config(
        model_type=kind,
        vocab_size=need("vocab_size"),
        hidden_size=width,
        num_hidden_layers=need("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=need("num_key_value_heads", heads),
        head_dim=need("head_dim", width // heads),
        intermediate_size=need("intermediate_size"),
        max_position_embeddings=need("max_position_embeddings"),
        rope_theta=need("rope_theta", rope.get("rope_theta", 10000.0)),
        rope_scaling=_rope_scaling(rope),
        rms_norm_eps=need("rms_norm_eps"),
        tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
        attention_bias=bool(bias),
        o_proj_bias=bool(bias) and kind == "llama",
        mlp_bias=bool(hf.get("mlp_bias", False)),
        bos_token_id=hf.get("bos_token_id"),
        eos_token_id=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        dtype=str(hf.get("torch_dtype") or hf.get("dtype") or "float32"),
    )


def _rope_scaling(rope: dict) -> Llama3Scaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise CourseError(f"rope_scaling: expected none or llama3, found {kind!r}: not supported here")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if missing := [name for name in names if rope.get(name) is None]:
        raise CourseError(f"rope_scaling: expected {missing[0]}, found nothing: is config.json whole?")
    for name in names:
        if not isinstance(rope[name], int | float) or not 0 < rope[name] < math.inf:
            raise CourseError(f"rope_scaling: {name}: expected a positive number, found {rope[name]!r}")
    return Llama3Scaling(*(rope[name] for name in names))


# --------------------------------------------------------------------------------------------------------------- pieces


_target = contextvars.ContextVar("the platform that is compiled for", default=None)


@contextlib.contextmanager
def compiling_for(platform: str):
    """Within: build programs for "tpu" or "gpu" although this machine has none. `plan` compiles for TPUs so."""
    token = _target.set(platform)
    try:
        yield
    finally:
        _target.reset(token)


def on_cpu() -> bool:
    """Whether the program that is being traced will run on a CPU."""
    return (_target.get() or jax.default_backend()) == "cpu"


def working_dtype(weights: Any) -> Any:
    """The dtype of activations beside weights of this dtype: the same; on a CPU float32.

    A CPU's matrix products of 16-bit floats add up in float32, and its other arithmetic is done in float32 in any case:
    rounding every result and converting it back cost a third of a training step. Memory for activations doubles.
    """
    return jnp.float32 if on_cpu() else weights


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(axes: str, a: Array, b: Array) -> Array:
    """`jnp.einsum(axes, a, b)`, multiplied in the narrower of the two dtypes: "Ni,oi->No" is x W^T.

    The result has the `working_dtype` of that dtype. Every axis must be in two of the three terms, so that each derivative
    is such a product again, of factors rounded to the same dtype. The one reason for its being here: XLA multiplies
    bfloat16 three times faster on a CPU when it is asked for a float32 result, and asked for a bfloat16 one it converts the
    weights first, every time. A derivative made by JAX would ask for the slow kind.
    """
    return _multiply(axes, a, b, working_dtype(min(a.dtype, b.dtype, key=_bytes)))


def _bytes(dtype) -> int:
    return dtype.itemsize


def _multiply(axes, a, b, dtype):
    narrow = min(a.dtype, b.dtype, key=_bytes)
    found = jnp.einsum(axes, a.astype(narrow), b.astype(narrow), preferred_element_type=working_dtype(dtype))
    return found.astype(dtype)


def _product_forward(axes, a, b):
    narrow = min(a.dtype, b.dtype, key=_bytes)
    kept = a.astype(narrow), b.astype(narrow), jnp.zeros(0, a.dtype), jnp.zeros(0, b.dtype)
    return product(axes, a, b), kept


def _product_backward(axes, kept, g):
    (left, right), out = axes.split("->")[0].split(","), axes.split("->")[1]
    a, b, like_a, like_b = kept
    return (
        _multiply(f"{out},{right}->{left}", g, b, like_a.dtype),
        _multiply(f"{out},{left}->{right}", g, a, like_b.dtype),
    )


product.defvjp(_product_forward, _product_backward)


def rms_norm(x: Float[Array, "... D"], weight: Float[Array, "D"], eps: float) -> Float[Array, "... D"]:
    """x over its root mean square, times a learnt weight (Zhang and Sennrich 2019). In float32, returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return weight.astype(x.dtype) * (x32 * scale).astype(x.dtype)


def rope_tables(
    positions: Int[Array, "B T"], config: Config
) -> tuple[Float[Array, "B T H/2"], Float[Array, "B T H/2"]]:
    """(cos, sin) of each position's angles, one per pair of dimensions: position * theta ** (-2 i / H), in float32."""
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if s := config.rope_scaling:
        turns = s.original_max_position_embeddings * frequencies / (2 * math.pi)  # full turns within the original context
        keep = jnp.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0, 1)
        frequencies = frequencies * (keep + (1 - keep) / s.factor)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rope(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T H/2"], sin: Float[Array, "B T H/2"]
) -> Float[Array, "B T N H"]:
    """Rotate the first and second half of each head against each other by its position's angles (Su et al. 2021).

    Hugging Face's layout: the partner of dimension i is i + H/2, not i + 1 as in llama.cpp's and Meta's files. In
    float32, returned in x's dtype.
    """
    cos, sin = cos[:, :, None], sin[:, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attend(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], mask: Bool[Array, "... T S"]
) -> Float[Array, "B T N H"]:
    """Grouped-query attention (Ainslie et al. 2023): query head n reads key/value head n // G. Softmax in float32.

    `mask` [T, S] or [B, T, S] says which slots a token may look at. Products in the keys' dtype, returned in that of q. The
    same function as `jax.nn.dot_product_attention`; written out, because on a CPU these products are quicker.
    """
    B, T, N, H = q.shape
    groups = jnp.einsum("BTKGH->BKGTH", q.reshape(B, T, k.shape[2], -1, H)).astype(k.dtype)
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)  # [B, K, S, H]: one matrix product for each row and head
    scores = product("BKGTH,BKSH->BKGTS", groups, k).astype(jnp.float32) * H**-0.5
    mask = mask if mask.ndim == 2 else mask[:, None, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1).astype(v.dtype)
    y = product("BKGTS,BKSH->BKGTH", weights, v)
    return jnp.einsum("BKGTH->BTKGH", y).reshape(B, T, N, H).astype(q.dtype)


FEW = 8  # rows up to which `few_rows` was quicker than `product`, on two cores with AVX-512: at 12 it was slower


def few_rows_options() -> dict | None:
    """`compiler_options` for a `jax.jit` with `few_rows` in it; None where they are not needed.

    Without the first, the compiler must add one number at a time, in the written order: a tenth of the speed.
    """
    return {"xla_cpu_enable_fast_math": True, "xla_cpu_prefer_vector_width": 512} if on_cpu() else None


def pairs(numbers: BFloat16[Array, "... in"]) -> UInt32[Array, "... in/2"]:
    """bfloat16 numbers two by two in 32-bit words: number i is the lower half of word i, number i + in/2 the upper."""
    low, high = jnp.split(jax.lax.bitcast_convert_type(numbers, jnp.uint16).astype(jnp.uint32), 2, axis=-1)
    return low | high << 16


def _halves(words: UInt32[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Both numbers of each pair, in float32: a bfloat16 is the upper half of a float32."""
    numbers = words << 16, words & jnp.uint32(0xFFFF0000)
    return tuple(jax.lax.bitcast_convert_type(each, jnp.float32) for each in numbers)


def few_rows(x: Float[Array, "N in"], weight: UInt32[Array, "out in/2"]) -> Float[Array, "N out"]:
    """W x for each of a few rows, with the `pairs` of W: what `product` computes, at the speed of a CPU's memory.

    XLA's library for matrix products (YNNPACK) rearranges the whole of W before it multiplies, every time: three quarters
    of the time when there are few rows to multiply with. This is one loop over W in the order in which it lies: each word
    is read once, and serves all rows, which should be at most `FEW`. For programs compiled with `few_rows_options()`.
    """
    # Tied together, so that in a loop of steps the halves of W are not taken apart, as float32, before the loop.
    words, weight = jax.lax.optimization_barrier((pairs(x.astype(jnp.bfloat16)), weight))
    low, high = _halves(weight)
    rows = [_halves(row) for row in words]
    # All sums in one reduction over several operands: the compiler makes one loop of it. Of one operand it makes a slow one.
    terms = [a * low + b * high for a, b in rows] if len(rows) > 1 else [rows[0][0] * low, rows[0][1] * high]
    zeros = (jnp.float32(0),) * len(terms)
    sums = jax.lax.reduce(tuple(terms), zeros, lambda a, b: tuple(map(jnp.add, a, b)), (1,))
    return jnp.stack(sums) if len(rows) > 1 else (sums[0] + sums[1])[None]


def linear(x: Float[Array, "... in"], weight: Array) -> Float[Array, "... out"]:
    """W x for every x, with W [out, in] or its `pairs`. See `product` for the dtypes."""
    rows = x.reshape(-1, x.shape[-1])
    n = len(rows)
    if weight.dtype == jnp.uint32:
        if n <= FEW:
            return few_rows(rows, weight).reshape(*x.shape[:-1], -1)
        weight = jnp.concatenate(_halves(weight), axis=-1).astype(jnp.bfloat16)
    if n == 1 and weight.dtype == jnp.bfloat16 and on_cpu():
        # XLA has no bfloat16 routine for a matrix and one vector, and would make a float32 copy of the matrix at each step.
        rows = jnp.concatenate([rows, rows])
    return product("Ni,oi->No", rows, weight)[:n].reshape(*x.shape[:-1], -1)


class Linear(nnx.Module):
    """y = W x (+ b) with W [out, in], the way Hugging Face and PyTorch store it."""

    def __init__(self, inside: int, outside: int, *, bias: bool = False, dtype=jnp.float32, rngs: nnx.Rngs):
        self.weight = nnx.Param(0.02 * jax.random.normal(rngs.params(), (outside, inside), dtype))
        if bias:
            self.bias = nnx.Param(jnp.zeros(outside, dtype))

    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        y = linear(x, self.weight[...])
        return y + self.bias[...].astype(y.dtype) if hasattr(self, "bias") else y


class Bits(nnx.Variable):
    """16-bit floats, seen as whole numbers."""


class Embed(nnx.Module):
    """A table [V, D]: looked up by token id, and read backwards as a tied output layer."""

    def __init__(self, vocab_size: int, width: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.weight = nnx.Param(0.02 * jax.random.normal(rngs.params(), (vocab_size, width), dtype))

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        if hasattr(self, "bits"):  # see `Transformer.unstacked`
            return jax.lax.bitcast_convert_type(self.bits[...][tokens], self.weight.dtype)
        # On a mesh each device looks up its own rows of the batch, in a table that is whole along the other dimension.
        return constrain(constrain(self.weight[...], "tp", None)[tokens], "fsdp", None, None)

    def attend(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """The table as output layer."""
        return linear(x, self.pairs[...] if hasattr(self, "pairs") else self.weight[...])


class RMSNorm(nnx.Module):
    """`rms_norm` with its weight [D]."""

    def __init__(self, width: int, eps: float, *, dtype=jnp.float32):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones(width, dtype))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return rms_norm(x, self.weight[...], self.eps)


class Cache(NamedTuple):
    """Keys and values of the tokens already seen; slot s holds the token at position s.

    `k` is [L, B, K, H, S], `v` is [L, B, K, S, H], or tuples of L such arrays where the layers are unstacked. So each of
    attention's two products, q k and then weights times v, reads a head's slots in the order in which they lie.
    """

    k: Float[Array, "L B K H S"] | tuple
    v: Float[Array, "L B K S H"] | tuple


class Attention(nnx.Module):
    """Causal self-attention with rotary positions and shared key/value heads."""

    def __init__(self, config: Config, *, dtype=jnp.float32, rngs: nnx.Rngs):
        c = config
        self.num_attention_heads, self.num_key_value_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        options = dict(dtype=dtype, rngs=rngs)
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.attention_bias, **options)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.attention_bias, **options)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.attention_bias, **options)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.o_proj_bias, **options)

    def project(self, x: Float[Array, "B T D"]) -> list[Float[Array, "B T _ H"]]:
        """q [B, T, N, H], k and v [B, T, K, H], before the rotation."""
        if hasattr(self, "qkv_proj"):  # one product instead of three: see `unstacked`
            q, k = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
            parts = jnp.split(self.qkv_proj(x), [q, q + k], axis=-1)
        else:
            parts = [proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj)]
        return [constrain(y.reshape(*y.shape[:2], -1, self.head_dim), "fsdp", None, "tp", None) for y in parts]

    def __call__(self, x: Float[Array, "B T D"], cos, sin, mask, store=None):
        """[B, T, D]. `store(k, v)` keeps the new keys and values and returns those to look at."""
        q, k, v = self.project(x)
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        if store is not None:
            k, v = store(k, v)
        y = attend(q, k, v, mask)
        return self.o_proj(y.reshape(*y.shape[:2], -1))


@jax.custom_vjp
def swiglu(gate_up: Float[Array, "... 2*F"]) -> Float[Array, "... F"]:
    """silu(gate) * up of the two side by side, in fewer passes over memory than JAX's own derivative makes of it."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


def _swiglu_backward(gate_up, g):
    gate, up = jnp.split(gate_up, 2, axis=-1)
    s = jax.nn.sigmoid(gate)
    return (jnp.concatenate([g * up * s * (1 + gate * (1 - s)), g * gate * s], axis=-1),)


swiglu.defvjp(lambda gate_up: (swiglu(gate_up), gate_up), _swiglu_backward)


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020): the gate decides, feature by feature, how much of `up` goes on to `down`."""

    def __init__(self, config: Config, *, dtype=jnp.float32, rngs: nnx.Rngs):
        D, F, options = config.hidden_size, config.intermediate_size, dict(bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.gate_proj = Linear(D, F, **options)
        self.up_proj = Linear(D, F, **options)
        self.down_proj = Linear(F, D, **options)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        if hasattr(self, "gate_up_proj"):
            return self.down_proj(swiglu(self.gate_up_proj(x)))
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(constrain(jax.nn.silu(gate) * up, "fsdp", None, "tp"))


class Block(nnx.Module):
    """One transformer block: each sublayer reads a normalised copy of x and adds its answer to x."""

    def __init__(self, config: Config, *, dtype=jnp.float32, rngs: nnx.Rngs):
        D, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(D, eps, dtype=dtype)
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(D, eps, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], cos, sin, mask, store=None) -> Float[Array, "B T D"]:
        x = constrain(x + self.self_attn(self.input_layernorm(x), cos, sin, mask, store), "fsdp", None, None)
        return constrain(x + self.mlp(self.post_attention_layernorm(x)), "fsdp", None, None)


class Unstacked(nnx.Module):
    """Blocks one by one, named "0", "1", ...: what decoding prefers (see `Transformer.unstacked`)."""

    def __init__(self, blocks: list[Block]):
        self.depth = len(blocks)
        for i, block in enumerate(blocks):
            setattr(self, str(i), block)


# ---------------------------------------------------------------------------------------------------------------- models


class Decoder(nnx.Module):
    """Everything but the output layer: tokens [B, T] -> hidden states [B, T, D]."""

    def __init__(self, config: Config, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = Embed(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)

        @nnx.split_rngs(splits=config.num_hidden_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, dtype=dtype, rngs=rngs)

        self.layers = stack(rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.gradient_checkpointing = False  # True: keep only each block's input for the backward pass and compute the rest again

    def __call__(self, tokens, positions=None, cache: Cache | None = None, segments=None, collect: bool = False):
        """(hidden states [B, T, D], cache), or with `collect` the states after each block [L, B, T, D] in its place."""
        B, T = tokens.shape
        step = positions is not None and cache is not None  # else the tokens stand at 0 ... T - 1 of an empty cache
        if positions is None:
            # As constants: left to itself, XLA fuses the cosine into its uses and computes it again in every layer.
            with jax.ensure_compile_time_eval():
                cos, sin = rope_tables(jnp.arange(T)[None], self.config)
        elif not step:
            cos, sin = rope_tables(positions, self.config)
        if step:
            slots = (cache.k[0] if isinstance(cache.k, tuple) else cache.k).shape[-1]
            # Looked up, for the same reason: what is computed from `positions` is computed again in every layer.
            cos, sin = (
                table[0].at[positions].get(mode="clip") for table in rope_tables(jnp.arange(slots)[None], self.config)
            )
            # A token sees the slots up to its own position: later ones are empty, or a longer prompt's padding.
            mask = jnp.arange(slots) <= positions[:, :, None]
        else:
            mask = jnp.tril(jnp.ones((T, T), bool))
            if segments is not None:
                mask = mask & (segments[:, :, None] == segments[:, None, :])
        x = self.embed_tokens(tokens)
        weights_dtype = x.dtype
        x = x.astype(working_dtype(weights_dtype))

        def put(old, new, slot_axis, *at):
            """`new` [B, T, K, H] into the slots of the cache; `at` is (layer,) where layers are stacked."""
            new = new.astype(old.dtype)
            if step:
                rows, slots = jnp.arange(B)[:, None], positions
                if new.shape[:2] == (1, 1):
                    # The same, written twice: as one slice, XLA would fuse it with its reader, and copy the cache for that.
                    new, rows, slots = (jnp.concatenate([a, a]) for a in (new, rows, slots))
                before = [slice(None)] * (slot_axis - 1)  # the axes of heads, and for keys that of a head's numbers
                # Slots beyond the last belong to rows that have ended: where those are written does not matter.
                return old.at[(*at, rows, *before, slots)].set(new, mode="clip")
            new = jnp.moveaxis(new, 1, slot_axis)
            return jax.lax.dynamic_update_slice(old, new[None] if at else new, (*at, *[0] * 4))

        def put_both(keys, values, k, v, *at):
            return put(keys, k, 3, *at), put(values, v, 2, *at)

        def narrow(k, v):
            return k.astype(weights_dtype), v.astype(weights_dtype)

        def whole(keys, values):
            """[B, S, K, H] both, as `attend` names its axes: the compiler moves nothing."""
            return jnp.moveaxis(keys, 3, 1), jnp.moveaxis(values, 2, 1)

        if isinstance(self.layers, Unstacked):
            keys, values = ([], []) if cache is None else (list(cache.k), list(cache.v))
            for i in range(self.layers.depth):

                def store(k, v, i=i):
                    keys[i], values[i] = put_both(keys[i], values[i], k, v)
                    return whole(keys[i], values[i]) if step else narrow(k, v)

                layer = getattr(self.layers, str(i))
                if self.gradient_checkpointing and cache is None:
                    graph, state = nnx.split(layer)
                    again = jax.checkpoint(lambda s, x, graph=graph: nnx.merge(graph, s)(x, cos, sin, mask, narrow))
                    x = again(state, x)
                else:
                    x = layer(x, cos, sin, mask, narrow if cache is None else store)
            return self.norm(x), None if cache is None else Cache(tuple(keys), tuple(values))

        graph, layers = nnx.split(self.layers)

        def block(carry, layer_and_index):
            x, cache = carry
            layer, i = layer_and_index

            def store(k, v):
                nonlocal cache
                cache = Cache(*put_both(*cache, k, v, i))
                return whole(cache.k[i], cache.v[i]) if step else narrow(k, v)

            x = nnx.merge(graph, gather(layer, self.config))(x, cos, sin, mask, narrow if cache is None else store)
            return (x, cache), x if collect else None

        if self.gradient_checkpointing:
            block = jax.checkpoint(block, prevent_cse=False)
        # On a CPU, XLA slices and updates a stack of 16-bit floats by way of a float32 copy of the whole stack, in every
        # iteration. Written out, the loop has no such slices; it takes longer to compile.
        written_out = weights_dtype.itemsize == 2 and on_cpu()
        (x, cache), states = jax.lax.scan(
            block,
            (x, cache),
            (layers, jnp.arange(self.config.num_hidden_layers)),
            unroll=self.config.num_hidden_layers if written_out else 1,
        )
        return self.norm(x), states if collect else cache


class Transformer(nnx.Module):
    """tokens [B, T] int32 -> logits [B, T, V] float32. Made random here, with real weights by `weights.load`."""

    def __init__(self, config: Config, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.model = Decoder(config, dtype=dtype, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype=dtype, rngs=rngs)

    @property
    def dtype(self):
        """The dtype of the weights, in which the matrix products are computed."""
        return self.model.embed_tokens.weight.dtype

    @property
    def cache_dtype(self):
        """The dtype of a KV cache."""
        return working_dtype(self.dtype)

    @property
    def head(self) -> nnx.Module:
        """The output layer: `lm_head`, or the embedding table where they are tied."""
        return self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head

    def hidden(self, tokens: Int[Array, "B T"], positions=None, cache: Cache | None = None, segments=None):
        """(hidden states [B, T, D], cache).

        Without a cache: `segments` [B, T] keeps packed sequences apart; positions need not restart in each, as RoPE sees
        their differences alone. With one: no positions means "a prompt, from slot 0 on"; with positions the tokens look
        at the slots up to their own.
        """
        if tokens.shape[1] > self.config.max_position_embeddings:
            raise CourseError(
                f"tokens: expected at most {self.config.max_position_embeddings} a row (the model's context), "
                f"found {tokens.shape[1]}: shorten the text"
            )
        return self.model(tokens, positions, cache, segments)

    def logits(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """The output layer, in float32."""
        head = self.head
        return (head.attend(x) if self.config.tie_word_embeddings else head(x)).astype(jnp.float32)

    def __call__(self, tokens: Int[Array, "B T"], positions=None, cache: Cache | None = None, segments=None):
        """Logits [B, T, V]; with a cache, the pair (logits, updated cache)."""
        x, cache = self.hidden(tokens, positions, cache, segments)
        return self.logits(x) if cache is None else (self.logits(x), cache)

    def hidden_states(self, tokens: Int[Array, "B T"]) -> Float[Array, "L+1 B T D"]:
        """What transformers calls `output_hidden_states`: the embedding, and x after each block, the last normalised."""
        last, states = self.model(tokens, output_hidden_states=True)
        return jnp.concatenate([self.model.embed_tokens(tokens)[None], states[:-1], last[None]])

    def new_cache(self, batch_size: int, slots: int) -> Cache:
        """An empty KV cache for `batch_size` rows of `slots` tokens; `generate.cache_bytes` says how large it is."""
        c, layers, dtype = self.config, self.model.layers, self.cache_dtype
        shapes = [(batch_size, c.num_key_value_heads, *each) for each in ((c.head_dim, slots), (slots, c.head_dim))]
        if isinstance(layers, Unstacked):
            return Cache(*(tuple(jnp.zeros(shape, dtype) for _ in range(c.num_hidden_layers)) for shape in shapes))
        return Cache(*(jnp.zeros((c.num_hidden_layers, *shape), dtype) for shape in shapes))

    def unstacked(self) -> "Transformer":
        """A copy laid out for decoding: layers apart, q-k-v and gate-up each in one matrix.

        Costs the memory of the blocks again, and that of an embedding table in 16 bits. A decode step reads every weight
        once and computes next to nothing: slicing a layer out of the stack, or calling three small products instead of one,
        is then most of its time on a CPU. Layers with an adapter are not joined; an adapter that is merged or disabled is
        left out. Training on 16-bit weights on a CPU is quicker in this layout too: there the slices are copies.
        """
        graph, stacked = nnx.split(self.model.layers)
        blocks = []
        for i in range(self.config.num_hidden_layers):
            block = nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], stacked))
            for parent in (block.self_attn, block.mlp):
                for name, layer in list(vars(parent).items()):
                    if getattr(layer, "merged", False) or not getattr(layer, "active", True):
                        setattr(parent, name, layer.base)
            _fuse(block.self_attn, ("q_proj", "k_proj", "v_proj"), "qkv_proj")
            _fuse(block.mlp, ("gate_proj", "up_proj"), "gate_up_proj")
            blocks.append(block)
        copy = nnx.merge(*nnx.split(self))  # shares the arrays of embedding, norm and head
        copy.model.layers = Unstacked(blocks)
        table = getattr(copy.model.embed_tokens, "base", copy.model.embed_tokens)
        if table.weight.dtype.itemsize == 2:
            # To look up a few rows, XLA's CPU backend turns a table of 16-bit floats into float32; of whole numbers, not.
            table.bits = Bits(jax.lax.bitcast_convert_type(table.weight[...], jnp.uint16))
        return copy

    def paired(self) -> "Transformer":
        """`unstacked`, with bfloat16 matrices as `pairs`: laid out for steps of up to `FEW` rows on a CPU.

        Costs the memory of the output layer again, too.
        """
        copy = self.unstacked()
        for _, module in nnx.iter_modules(copy):
            weight = getattr(module, "weight", None)
            if getattr(weight, "dtype", None) != jnp.bfloat16 or weight.shape[-1] % 2:
                continue
            if isinstance(module, Linear):
                module.weight = Bits(pairs(weight[...]))
            elif isinstance(module, Embed) and self.config.tie_word_embeddings:  # tokens are still looked up in `bits`
                module.pairs = Bits(pairs(weight[...]))
        return copy


def _fuse(parent: nnx.Module, names: tuple[str, ...], fused: str) -> None:
    """Replace several linear layers that read the same input by one with their rows below each other."""
    parts = [getattr(parent, name) for name in names]
    if not all(type(part) is Linear for part in parts):
        return
    new = parts[0]
    new.weight = nnx.Param(jnp.concatenate([part.weight[...] for part in parts]))
    if hasattr(new, "bias"):
        new.bias = nnx.Param(jnp.concatenate([part.bias[...] for part in parts]))
    for name in names:
        delattr(parent, name)
    setattr(parent, fused, new)


# ----------------------------------------------------------------------------------------------------------- arithmetic


def count_parameters(config: Config) -> dict[str, int]:
    """Parameters by place, from the sizes alone: nothing is allocated."""
    c = config
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    counts = {
        "embed_tokens": c.vocab_size * c.hidden_size,
        "attention": c.num_hidden_layers * (2 * c.hidden_size * (q + kv) + c.attention_bias * (q + 2 * kv) + c.o_proj_bias * c.hidden_size),
        "mlp": c.num_hidden_layers * (3 * c.hidden_size * c.intermediate_size + c.mlp_bias * (2 * c.intermediate_size + c.hidden_size)),
        "norms": (2 * c.num_hidden_layers + 1) * c.hidden_size,
        "lm_head": 0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size,
    }
    return counts | {"total": sum(counts.values())}


def flops_per_token(config: Config, context: int) -> int:
    """Floating-point operations in matrix products of one forward pass, per token (a multiply-add is two).

    Attention is counted as computed, over the whole T x T square of a `context` of T tokens.
    """
    c, counts = config, count_parameters(config)
    weights = counts["attention"] + counts["mlp"] + c.vocab_size * c.hidden_size
    return 2 * (weights + c.num_hidden_layers * 2 * context * c.num_attention_heads * c.head_dim)
