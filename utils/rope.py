"""Rotary positions (RoPE, Su et al. 2021): a token's position as a rotation of its queries and keys.

A head of H numbers is half pairs, and pair i turns by position * theta^(-2i/H): the first pairs quickly, the last
ones hardly at all. The product of a rotated query with a rotated key then depends on the distance of the two tokens
alone.
"""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretch to longer texts: slow rotations slowed by `factor`, fast ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


def frequencies(config) -> Float[Array, "half"]:
    """The angle in radians by which each pair turns from one position to the next: theta^(-2i/H), scaled."""
    half = config.head_dim // 2
    freqs = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if s := config.rope_scaling:
        # full turns of each pair within the original length
        turns = s.original_max_position_embeddings * freqs / (2 * math.pi)
        keep = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        keep = jnp.clip(keep, 0, 1)
        freqs = freqs * (keep + (1 - keep) / s.factor)
    return freqs


def rope_tables(
    positions: Int[ArrayLike, "B T"], config
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """(cos, sin) of each position's angles, one for each pair, in float32."""
    angles = positions[..., None].astype(jnp.float32) * frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(
    x: Float[Array, "B T N H"], cos: Float[Array, "#B T half"], sin: Float[Array, "#B T half"]
) -> Float[Array, "B T N H"]:
    """Rotate the first and second half of each head against each other by its position's angles.

    Hugging Face's layout: the partner of dimension i is i + half, not i + 1 as in llama.cpp's and Meta's files. In
    float32, returned in x's dtype.
    """
    cos, sin = cos[:, :, None], sin[:, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
