"""The KV cache: keys and values of the tokens already read, so that a new token costs its own work alone.

A cache is a list with an entry for each layer; place s of an entry belongs to the token at position s. Arrays are
never changed in place: `update` returns the new ones, and under `jax.jit` with the cache donated XLA writes them over
the old.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from utils import kernels


class LayerCache(NamedTuple):
    """Keys and values of one layer, laid out so that both products of attention, q k and then weights times v, read a
    head's places in memory order."""

    k: Float[Array, "B K H S"]
    v: Float[Array, "B K S H"]

    def update(
        self,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        positions: Int[ArrayLike, "B T"],
    ) -> "LayerCache":
        """The cache with new keys and values written to their positions, each row to its own."""
        return LayerCache(
            *(
                kernels.write_positions(
                    old, jnp.moveaxis(new, 1, axis).astype(old.dtype), positions, axis
                )
                for old, new, axis in ((self.k, k, 3), (self.v, v, 2))
            )
        )

    def prefill(self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> "LayerCache":
        """An empty cache with a prompt's keys and values in its first T places."""
        k, v = (
            jnp.moveaxis(k, 1, 3).astype(self.k.dtype),
            jnp.moveaxis(v, 1, 2).astype(self.v.dtype),
        )
        return LayerCache(
            *(jax.lax.dynamic_update_slice(old, new, [0] * 4) for old, new in zip(self, (k, v)))
        )

    @property
    def keys_values(self) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Keys and values with the axes that `attention` names: the compiler moves nothing."""
        return jnp.moveaxis(self.k, 3, 1), jnp.moveaxis(self.v, 2, 1)


KVCache = list[LayerCache]


def new_cache(config, batch_size: int, cache_length: int, dtype) -> KVCache:
    """An empty cache for `batch_size` rows of `cache_length` tokens; `generate.cache_bytes` says how large it is."""
    B, K, H, S = batch_size, config.num_key_value_heads, config.head_dim, cache_length
    shapes = (B, K, H, S), (B, K, S, H)
    # Arrays of its own for each layer: one array cannot be donated twice.
    layers = range(config.num_hidden_layers)
    return [LayerCache(*(jnp.zeros(shape, dtype) for shape in shapes)) for _ in layers]
