"""The KV cache: keys and values of the tokens already read, so that a new token costs its own work alone.

A cache is a list with an entry for each layer; index s of an entry belongs to the token at position s. Arrays are
never changed in place: `update` returns the new ones, and under `jax.jit` with the cache donated XLA writes them over
the old.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from utils import kernels


class LayerCache(NamedTuple):
    """Keys and values of one layer: both products of attention read a head's positions in memory order."""

    k: Float[Array, "B K H S"]
    v: Float[Array, "B K S H"]

    def update(
        self,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        positions: Int[ArrayLike, "B T"],
    ) -> "LayerCache":
        """The cache with new keys and values written to their positions, each row to its own."""
        k, v = self._as_stored(k, v)
        k = kernels.write_positions(self.k, k, positions, axis=3)
        return LayerCache(k, kernels.write_positions(self.v, v, positions, axis=2))

    def prefill(self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> "LayerCache":
        """An empty cache with a prompt's keys and values at its first T positions."""
        pairs = zip(self, self._as_stored(k, v))
        return LayerCache(*(jax.lax.dynamic_update_slice(old, new, [0] * 4) for old, new in pairs))

    def _as_stored(self, k, v) -> tuple[Array, Array]:
        k, v = jnp.moveaxis(k, 1, 3), jnp.moveaxis(v, 1, 2)
        return k.astype(self.k.dtype), v.astype(self.v.dtype)

    @property
    def keys_values(self) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Keys and values with the axes that `attention` names: the compiler moves nothing."""
        return jnp.moveaxis(self.k, 3, 1), jnp.moveaxis(self.v, 2, 1)


KVCache = list[LayerCache]


def new_cache(config, batch_size: int, cache_length: int, dtype) -> KVCache:
    """An empty cache for `batch_size` rows of `cache_length` tokens (`generate.cache_bytes` large)."""
    B, K, H, S = batch_size, config.num_key_value_heads, config.head_dim, cache_length
    shapes = (B, K, H, S), (B, K, S, H)
    # Arrays of its own for each layer: one array cannot be donated twice.
    layers = range(config.num_hidden_layers)
    return [LayerCache(*(jnp.zeros(shape, dtype) for shape in shapes)) for _ in layers]
