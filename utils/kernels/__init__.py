"""What depends on the hardware: dtypes of activations, kernels that multiply, layouts of a model.

Models call what is here and say no word about platforms; each of those has a file, as `cpu.py`.
"""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from utils.kernels import cpu, tpu
from utils.kernels.precision import (
    activation_dtype,
    compiling_for,
    mixed_precision_einsum,
    on_cpu,
    platform,
)

__all__ = ["activation_dtype", "compiling_for", "mixed_precision_einsum", "on_cpu", "platform"]


def linear(x: Float[Array, "*batch in"], weight: Array) -> Float[Array, "*batch out"]:
    """W x for every x, multiplied in the narrower of the two dtypes, returned in x's."""
    if on_cpu():
        return cpu.linear(x, weight)
    rows = x.reshape(-1, x.shape[-1])
    return mixed_precision_einsum("Ni,oi->No", rows, weight, x.dtype).reshape(*x.shape[:-1], -1)


def write_positions(
    cache: Float[Array, "B *dims"],
    new: Float[Array, "B *entries"],
    positions: Int[ArrayLike, "B T"],
    axis: int,
) -> Float[Array, "B *dims"]:
    """`cache` with T new entries of each row written at `positions` along `axis`.

    Positions beyond the cache belong to rows that have ended: those are written over its last one.
    """
    if platform() == "tpu" and positions.shape[1] == 1:
        return tpu.write_rows(cache, new, positions[:, 0], axis)
    rows = jnp.arange(len(positions))[:, None]
    new = jnp.moveaxis(new, axis, 1)  # as the indices below want it: [B, T, the other axes]
    if positions.size == 1 and on_cpu():
        # Written twice: a scatter of one entry becomes a slice update, which XLA on a CPU fuses with
        # its reader, and for that copies the cache.
        new, rows, positions = (jnp.concatenate([a, a]) for a in (new, rows, positions))
    between = [slice(None)] * (axis - 1)
    return cache.at[(rows, *between, positions)].set(new, mode="clip")


def scan_unroll(num_layers: int, param_dtype) -> int:
    """How many layers a scan writes out in one iteration: 1; on a CPU, of 16-bit weights, all.

    There XLA slices and updates a stack of 16-bit floats through a float32 copy of the whole stack,
    in every iteration. Unrolled, the scan has no such slices; it takes longer to compile.
    """
    return num_layers if on_cpu() and jnp.dtype(param_dtype).itemsize == 2 else 1


def decoding_layout(model, batch_size: int) -> str:
    """The layout to decode this many rows in: "stacked", the model as it is, with no second copy.

    On a CPU a Transformer gets one: "unrolled" or, for a few rows of bfloat16, "packed".
    """
    if not on_cpu() or not hasattr(model, "model"):
        return "stacked"
    few = batch_size <= cpu.SMALL_BATCH and model.param_dtype == jnp.bfloat16
    return "packed" if few else "unrolled"


def lay_out(model, layout: str):
    """The model in this layout."""
    layouts = {"unrolled": cpu.unrolled, "packed": cpu.packed}
    return model if layout == "stacked" else layouts[layout](model)


def compiler_options(layout: str) -> dict | None:
    """What decode steps in this layout are compiled with."""
    if platform() == "tpu":
        return tpu.decode_options()
    return cpu.COMPILER_OPTIONS if layout == "packed" else None


def training_layout(model, mesh=None):
    """The model laid out to train quickest: itself; on one CPU, of 16-bit weights, unrolled.

    That is a fifth quicker, for the blocks' memory again; `lora.stacked` brings its adapter back.
    """
    one_cpu = mesh is None and on_cpu()
    return cpu.unrolled(model) if one_cpu and model.param_dtype.itemsize == 2 else model
