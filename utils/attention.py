"""Causal attention: each token takes a weighted average of the values of the tokens up to itself.

    weights = softmax(q k^T / sqrt(H));   y = weights v

`attention` is the one entrance, for training, prefill and decoding, on every backend, and the place to
dispatch kernels from. So far there is the reference: an einsum that makes a [T, S] array of scores a head.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from utils.kernels import mixed_precision_einsum


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    positions: Int[ArrayLike, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention (Ainslie et al. 2023): query head n reads key/value head n // G, with G = N / K.

    Without `positions` the T queries belong to the S = T keys; `segment_ids` keeps packed sequences apart. With them,
    keys are a cache, and the query at position p sees the first p + 1 of them. Multiplied in k's dtype, softmax in
    float32, returned in q's dtype.
    """
    if positions is not None:
        # Later positions of the cache are empty, or hold the padding of a longer prompt.
        mask = jnp.arange(k.shape[1]) <= positions[:, :, None]
    else:
        mask = jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool))
        if segment_ids is not None:
            mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return einsum_attention(q, k, v, mask)


def einsum_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "*B T S"],
) -> Float[Array, "B T N H"]:
    """The reference: scores written out. `mask` [T, S] or [B, T, S] is True where a query may look at a key."""
    B, T, N, H = q.shape
    if k.shape[2] == N:  # every head has keys of its own: nothing to group, and quicker so
        scores = mixed_precision_einsum("BTNH,BSNH->BNTS", q.astype(k.dtype), k, q.dtype)
        mask = mask if mask.ndim == 2 else mask[:, None]
        weights = _softmax(scores, H, mask).astype(v.dtype)
        return mixed_precision_einsum("BNTS,BSNH->BTNH", weights, v, q.dtype)
    groups = jnp.einsum("BTKGH->BKGTH", q.reshape(B, T, k.shape[2], -1, H)).astype(k.dtype)
    # [B, K, S, H]: one matrix product for each row and head
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    scores = mixed_precision_einsum("BKGTH,BKSH->BKGTS", groups, k, q.dtype)
    mask = mask if mask.ndim == 2 else mask[:, None, None]
    weights = _softmax(scores, H, mask).astype(v.dtype)
    y = mixed_precision_einsum("BKGTS,BKSH->BKGTH", weights, v, q.dtype)
    return jnp.einsum("BKGTH->BTKGH", y).reshape(B, T, N, H)


def _softmax(scores: Array, head_dim: int, mask: Array) -> Array:
    """softmax(scores / sqrt(H)) over the keys that the mask allows, in float32."""
    scores = scores.astype(jnp.float32) * head_dim**-0.5
    return jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
