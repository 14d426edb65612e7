"""Cross-entropy in chunks: the loss of a large vocabulary without an array of all its logits.

Logits are the largest array of a training step: B x T x V floats, 412 MB for 8 x 256 tokens and 50,257
words, which the backward pass reads and writes several times. But the loss of a token needs only its
own V logits. So: take a chunk of tokens, compute their logits, loss and gradients at once, keep the
gradients (as large as the hidden states, and the trainable part of the head), drop the logits, go on.
Nothing is computed twice. On a CPU, chunks without a token that counts are skipped: where the loss is
on completions alone, those may be most.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Int

from utils.kernels import on_cpu
from utils.sharding import all_gather, constrain


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed_loss(head: Callable, skip: bool, trainable, frozen, hidden, targets, loss_mask):
    """Sum of loss_mask * cross-entropy over chunks [chunks, B, columns, ...]; `head` makes logits."""
    return _forward(head, skip, trainable, frozen, hidden, targets, loss_mask)[0]


def _forward(head, skip, trainable, frozen, hidden, targets, loss_mask):
    def chunk_loss(trainable, h, t, mask):
        logits = constrain(head(trainable, frozen, h).astype(jnp.float32), "fsdp", None, "tp")
        return (mask * optax.softmax_cross_entropy_with_integer_labels(logits, t)).sum()

    def computed(h, t, mask):
        return jax.value_and_grad(chunk_loss, argnums=(0, 1))(trainable, h, t, mask)

    def skipped(h, t, mask):
        return jnp.float32(0), jax.tree.map(jnp.zeros_like, (trainable, h))

    def step(carry, chunk):
        total, grads = carry
        if skip:
            any_counts = (chunk[2] != 0).any()
            loss, (g, g_hidden) = jax.lax.cond(any_counts, computed, skipped, *chunk)
        else:
            loss, (g, g_hidden) = computed(*chunk)
        return (total + loss, jax.tree.map(jnp.add, grads, g)), g_hidden

    start = jnp.float32(0), jax.tree.map(jnp.zeros_like, trainable)
    (total, grads), g_hidden = jax.lax.scan(step, start, (hidden, targets, loss_mask))
    return total, (grads, g_hidden)


def _backward(head, skip, grads, g):
    g_trainable, g_hidden = jax.tree.map(lambda x: (g * x).astype(x.dtype), grads)
    return g_trainable, None, g_hidden, None, None


_summed_loss.defvjp(_forward, _backward)


@jax.custom_vjp
def _permuted(x: Float[Array, "B T D"], order: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """x[b, order[b]] for each row b. Its derivative is the inverse permutation; JAX's own would be a
    scatter-add, one token at a time."""
    return jnp.take_along_axis(x, order[..., None], axis=1)


def _permuted_backward(order, g):
    return _permuted(g, jnp.argsort(order, axis=1)), None


_permuted.defvjp(lambda x, order: (_permuted(x, order), order), _permuted_backward)


def chunked_cross_entropy(
    head: nnx.Module,
    hidden: Float[Array, "B T D"],
    targets: Int[ArrayLike, "B T"],
    loss_mask: Float[ArrayLike, "B T"] | None = None,
    *,
    wrt: nnx.filterlib.Filter = nnx.Param,
    chunk_size: int = 128,
) -> Float[Array, ""]:
    """Mean cross-entropy in nats per token, of the logits that `head` makes of `hidden`.

    `head` is a model's output layer: a linear layer, or an embedding table used as one (through its
    `attend`). `loss_mask` says how much each token counts (0: not at all); the mean is over what
    counts, and 0 where nothing does. `wrt` selects the trainable variables of the head, as in
    `train.fit`: the others get no gradient, which saves a third of a frozen head's work. `chunk_size`
    is about how many tokens have logits at one time, the same number of each row; on a CPU the tokens
    that count come first. Gradients are computed in the forward pass, so use this for training; the
    loss alone is cheaper from the plain logits.
    """
    graph, trainable, frozen = nnx.split(head, wrt, ...)

    def logits(trainable, frozen, h):
        layer = nnx.merge(graph, trainable, frozen)
        return layer.attend(h) if hasattr(layer, "attend") else layer(h)

    # Measured on a CPU only: a fifth of a step on SmolLM2, where a quarter of the tokens count.
    skip = loss_mask is not None and on_cpu()
    mask = jnp.ones(targets.shape, jnp.float32) if loss_mask is None else loss_mask
    mask = mask.astype(jnp.float32)
    if skip:  # tokens that count first, so that few chunks have any
        order = jnp.argsort(mask == 0, axis=1, stable=True)
        targets, mask = (jnp.take_along_axis(a, order, axis=1) for a in (targets, mask))
        hidden = _permuted(hidden, order)
    B, T = targets.shape
    columns = max(
        1, min(chunk_size, B * T) // B
    )  # of each row: on a mesh, each device has its rows
    missing = -T % columns  # the last chunk is padded with tokens that do not count

    def chunks(a):  # [B, T, ...] -> [chunks, B, columns, ...]
        a = jnp.pad(a, [(0, 0), (0, missing)] + [(0, 0)] * (a.ndim - 2))
        return jnp.swapaxes(a.reshape(B, -1, columns, *a.shape[2:]), 0, 1)

    # All-gathered here, once: inside the scan, every chunk would do it again. The barrier keeps it
    # behind the hidden states: earlier, the largest matrix would be on every device during all layers.
    frozen, hidden = jax.lax.optimization_barrier((frozen, hidden))
    trainable, frozen = (all_gather(tree, prefix="lm_head.") for tree in (trainable, frozen))
    counted = mask.sum()
    total = _summed_loss(logits, skip, trainable, frozen, *map(chunks, (hidden, targets, mask)))
    return total / jnp.where(counted > 0, counted, 1)
