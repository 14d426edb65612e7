"""A CPU's kernels and layouts: matrices read once, in order; layers unrolled, projections fused.

Decoding reads every weight once a step and computes next to nothing. On a CPU, slicing layers out of
stacked weights, three small products in place of one, and the matrix library's packing of the weights
then take most of the time. So `unrolled` and `packed` copy a model into another layout, which costs
memory. SmolLM2-135M in bfloat16, one row, two cores with AVX-512: 63 tokens/s unrolled, 94 packed.
"""

import ctypes

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, BFloat16, Float, Int, UInt32

from utils.kernels.precision import mixed_precision_einsum

SMALL_BATCH = 8  # rows up to which `small_batch_matvec` beats the matrix library; at 12 it did not
# For programs with `small_batch_matvec`, which has a tenth of the speed if it must add in order.
COMPILER_OPTIONS = {"xla_cpu_enable_fast_math": True, "xla_cpu_prefer_vector_width": 512}


# ------------------------------------------------------------------------------------------ kernels


def pack_bfloat16(x: BFloat16[Array, "*out in"]) -> UInt32[Array, "*out words"]:
    """bfloat16 numbers two by two in 32-bit words: i in word i's lower half, i + in/2 in its upper."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
    low, high = jnp.split(bits, 2, axis=-1)
    return low | high << 16


def _unpack(words: UInt32[Array, "*any"]) -> tuple[Float[Array, "*any"], Float[Array, "*any"]]:
    """Both numbers of each word as float32, of which a bfloat16 is the upper half."""
    halves = words << 16, words & jnp.uint32(0xFFFF0000)
    return tuple(jax.lax.bitcast_convert_type(half, jnp.float32) for half in halves)


def unpack_bfloat16(words: UInt32[Array, "*out words"]) -> BFloat16[Array, "*out in"]:
    """What `pack_bfloat16` packed."""
    return jnp.concatenate(_unpack(words), axis=-1).astype(jnp.bfloat16)


def small_batch_matvec(
    x: Float[Array, "N in"], weight: UInt32[Array, "out words"]
) -> Float[Array, "N out"]:
    """W x in float32, for at most `SMALL_BATCH` rows and a packed W, at the speed of a CPU's memory.

    XLA's matrix library (YNNPACK) repacks W before every product: for few rows, three quarters of the
    time. This is one loop over W in memory order: each word is read once and serves all rows. For
    programs compiled with `COMPILER_OPTIONS`.
    """
    # Without the barrier XLA unpacks W to float32 in front of a loop of decode steps: twice the bytes.
    words, weight = jax.lax.optimization_barrier((pack_bfloat16(x.astype(jnp.bfloat16)), weight))
    low, high = _unpack(weight)
    rows = [_unpack(row) for row in words]
    # One reduction with an operand a row becomes one vectorised loop over W. With a single operand it
    # does not: so one row is two operands, its lower and its upper halves.
    if len(rows) == 1:
        terms = rows[0][0] * low, rows[0][1] * high
    else:
        terms = tuple(a * low + b * high for a, b in rows)
    zeros = (jnp.float32(0),) * len(terms)
    sums = jax.lax.reduce(terms, zeros, lambda a, b: tuple(map(jnp.add, a, b)), (1,))
    return (sums[0] + sums[1])[None] if len(rows) == 1 else jnp.stack(sums)


def linear(x: Float[Array, "*batch in"], weight: Array) -> Float[Array, "*batch out"]:
    """W x for every x, in x's dtype, with W [out, in], or packed as `pack_bfloat16` packs it."""
    rows = x.reshape(-1, x.shape[-1])
    n = len(rows)
    if weight.dtype == jnp.uint32:
        if n <= SMALL_BATCH:
            return small_batch_matvec(rows, weight).astype(x.dtype).reshape(*x.shape[:-1], -1)
        weight = unpack_bfloat16(weight)
    if n == 1 and weight.dtype == jnp.bfloat16:
        # XLA has no bfloat16 kernel for one vector: it would convert the matrix in every step.
        rows = jnp.concatenate([rows, rows])
    y = mixed_precision_einsum("Ni,oi->No", rows, weight, x.dtype)
    return y[:n].reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def swiglu(gate_up: Float[Array, "*batch two_F"]) -> Float[Array, "*batch F"]:
    """silu(gate) * up of the two side by side; its derivative passes over memory less than JAX's."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


def _swiglu_backward(gate_up, g):
    gate, up = jnp.split(gate_up, 2, axis=-1)
    s = jax.nn.sigmoid(gate)
    return (jnp.concatenate([g * up * s * (1 + gate * (1 - s)), g * gate * s], axis=-1),)


swiglu.defvjp(lambda gate_up: (swiglu(gate_up), gate_up), _swiglu_backward)


# ------------------------------------------------------------------------------------------ layouts


class Packed(nnx.Variable):
    """Weights as whole numbers: bfloat16 two by two in 32-bit words, or bit cast one by one."""


class Unrolled(nnx.Module):
    """Blocks one by one, named "0", "1", ..., in place of one block with stacked arrays."""

    def __init__(self, blocks: list[nnx.Module]):
        for i, block in enumerate(blocks):
            setattr(self, str(i), block)

    def block(self, i: int) -> nnx.Module:
        return getattr(self, str(i))


class Fused(nnx.Module):
    """Linear layers that read the same input as one, with their rows below each other."""

    def __init__(self, layers: list[nnx.Module], then=None):
        self.then = then
        ends = [layer.weight.shape[0] for layer in layers]
        self.split_at = tuple(sum(ends[: i + 1]) for i in range(len(ends) - 1))
        self.weight = nnx.Param(jnp.concatenate([layer.weight[...] for layer in layers]))
        if hasattr(layers[0], "bias"):
            self.bias = nnx.Param(jnp.concatenate([layer.bias[...] for layer in layers]))

    def __call__(self, x: Float[Array, "*batch in"]):
        y = linear(x, self.weight[...])
        y = y + self.bias[...].astype(y.dtype) if hasattr(self, "bias") else y
        return jnp.split(y, self.split_at, axis=-1) if self.then is None else self.then(y)


class BitcastEmbed(nnx.Module):
    """An embedding table [V, D] of 16-bit floats, looked up as whole numbers.

    Of floats, XLA's CPU backend converts the whole table to float32 to look up a few rows.
    """

    def __init__(self, table: nnx.Module):
        self.weight = table.weight
        self.bits = Packed(jax.lax.bitcast_convert_type(table.weight[...], jnp.uint16))

    def __call__(self, tokens: Int[ArrayLike, "B T"]) -> Float[Array, "B T D"]:
        return jax.lax.bitcast_convert_type(self.bits[...][tokens], self.weight.dtype)

    def attend(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        return linear(x, self.head[...] if hasattr(self, "head") else self.weight[...])


def unrolled(model: nnx.Module) -> nnx.Module:
    """A copy of a Transformer with its layers unrolled, q-k-v and gate-up fused into one matrix each.

    Costs the memory of the blocks again, and of an embedding table in 16 bits. Layers with an adapter
    are not fused; an adapter that is merged or disabled is left out. Training on 16-bit weights is
    quicker in this layout too: in the stacked one, each slice of a layer is a copy.
    """
    graph, stacked = nnx.split(model.model.layers)
    blocks = []
    for i in range(model.config.num_hidden_layers):
        block = nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], stacked))
        for parent in (block.self_attn, block.mlp):
            for name, layer in list(vars(parent).items()):
                if getattr(layer, "merged", False) or not getattr(layer, "active", True):
                    setattr(parent, name, layer.base)
        _fuse(block.self_attn, ("q_proj", "k_proj", "v_proj"), "project")
        _fuse(block.mlp, ("gate_proj", "up_proj"), "gated", swiglu)
        blocks.append(block)
    copy = nnx.merge(*nnx.split(model))  # shares the arrays of embedding, norm and head
    copy.model.layers = Unrolled(blocks)
    if model.param_dtype.itemsize == 2:
        embed = copy.model.embed_tokens
        if hasattr(embed, "base"):  # an adapter on the tied head
            embed.base = BitcastEmbed(embed.base)
        else:
            copy.model.embed_tokens = BitcastEmbed(embed)
    return copy


def packed(model: nnx.Module) -> nnx.Module:
    """`unrolled` with packed bfloat16 matrices, for decode steps of up to `SMALL_BATCH` rows.

    Costs the memory of the output layer again, too.
    """
    copy = unrolled(model)
    for _, module in nnx.iter_modules(copy):
        weight = getattr(module, "weight", None)
        if getattr(weight, "ndim", 0) != 2 or weight.dtype != jnp.bfloat16 or weight.shape[-1] % 2:
            continue
        if not isinstance(module, BitcastEmbed):
            module.weight = Packed(pack_bfloat16(weight[...]))
        elif model.config.tie_word_embeddings:  # tokens are still looked up in `bits`
            module.head = Packed(pack_bfloat16(weight[...]))
    return copy


def _fuse(parent: nnx.Module, names: tuple[str, ...], method: str, then=None) -> None:
    """Put one `Fused` layer in the place of the parent's method that calls these layers."""
    layers = [getattr(parent, name) for name in names]
    if not any(hasattr(layer, "base") for layer in layers):  # an adapter reads its layer's input
        setattr(parent, method, Fused(layers, then))
        for name in names:
            delattr(parent, name)


def keep_memory() -> bool:
    """Let this process keep the memory it frees; says whether it does. For training, before jax starts.

    Each run of a compiled program allocates and frees hundreds of megabytes of temporary arrays. glibc
    gives those back to the kernel, which fills each page with zeros when it is next touched: 240,000
    page faults in a LoRA step on SmolLM2, a fifth of its time. The price: memory once used stays with
    the process. Only glibc (Linux) can be told so; elsewhere nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no such function: musl, macOS, Windows
        return False
    # Numbers from malloc.h. Never trim (-1); one arena, as other threads' are unmapped in any case.
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8
    settings = {arena_max: 1, mmap_max: 0, trim_threshold: -1, top_pad: 64 * 2**20}
    return all([mallopt(name, value) for name, value in settings.items()])
