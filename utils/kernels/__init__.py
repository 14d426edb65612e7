"""What depends on the hardware: in which dtype activations are kept, which kernel multiplies, how a model is laid out.

The models call `linear`, `mixed_precision_einsum` and `activation_dtype`, and contain no word about platforms. Kernels and
layouts of one platform have a file each: `cpu.py`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from utils.kernels import cpu
from utils.kernels.precision import activation_dtype, compiling_for, mixed_precision_einsum, on_cpu

__all__ = ["activation_dtype", "compiling_for", "mixed_precision_einsum", "on_cpu"]


def linear(
    x: Float[Array, "*batch in"], weight: Float[Array, "out in"]
) -> Float[Array, "*batch out"]:
    """W x for every x, multiplied in the narrower of the two dtypes, returned in x's."""
    if on_cpu():
        return cpu.linear(x, weight)
    rows = x.reshape(-1, x.shape[-1])
    return mixed_precision_einsum("Ni,oi->No", rows, weight, x.dtype).reshape(*x.shape[:-1], -1)


def scan_unroll(num_layers: int, param_dtype) -> int:
    """How many layers a scan over stacked weights writes out in one iteration: 1; on a CPU, of 16-bit weights, all.

    There XLA slices and updates a stack of 16-bit floats through a float32 copy of the whole stack, in every iteration.
    Unrolled, the scan has no such slices; it takes longer to compile.
    """
    return num_layers if on_cpu() and jnp.dtype(param_dtype).itemsize == 2 else 1


def decoding_layout(model, batch_size: int):
    """(the model laid out for decode steps of this many rows, options to compile them with): on a CPU `cpu.unrolled` or
    `cpu.packed`, which cost memory beside the model; elsewhere the model itself, one copy of the base for everything."""
    if not on_cpu() or not hasattr(model, "model"):
        return model, None
    if model.param_dtype == jnp.bfloat16 and batch_size <= cpu.SMALL_BATCH:
        return cpu.packed(model), cpu.COMPILER_OPTIONS
    return cpu.unrolled(model), None


def training_layout(model, mesh=None):
    """The model laid out to train quickest: itself; on one CPU, with 16-bit weights, `cpu.unrolled`.

    That is a fifth quicker, for the memory of the blocks again; `lora.stacked` brings its adapter back.
    """
    one_cpu = mesh is None and on_cpu()
    return cpu.unrolled(model) if one_cpu and model.param_dtype.itemsize == 2 else model
