"""A TPU's kernels and compiler options. Checked with its compiler alone: no chip was at hand."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Without it the compiler copies some layers' whole caches into its fast memory (VMEM) and back to write
# one token: decoding R1 with a cache of 32,768 accesses 1.18 times its weights and cache, with it 1.04.
DECODE_OPTIONS = {"xla_tpu_msa_inefficient_use_to_copy_ratio": 0.6}


@functools.cache
def decode_options() -> dict | None:
    """Compiler options for decode steps; None where this compiler does not know them."""
    try:
        jax.jit(lambda: jnp.zeros(()), compiler_options=DECODE_OPTIONS)()
    except Exception:  # an unknown option, in another version: an error of several types
        return None
    return DECODE_OPTIONS


def write_rows(
    cache: Float[Array, "B *dims"],
    new: Float[Array, "B *one"],
    positions: Int[Array, "B"],
    axis: int,
) -> Float[Array, "B *dims"]:
    """`cache` with one token of each row written at its own position along `axis`, in place.

    For one scatter the compiler would convert the whole cache to another layout and back: 3.7 times
    the bytes at 8 rows.
    """
    for row, position in enumerate(positions):
        start = [jnp.int32(0)] * cache.ndim
        start[0], start[axis] = jnp.int32(row), position
        cache = jax.lax.dynamic_update_slice(cache, new[row : row + 1], start)
    return cache
