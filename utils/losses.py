"""Cross-entropy in chunks: the loss of a large vocabulary without an array of all its logits.

Logits are the largest array of a training step: B x T x V floats, 412 MB for 8 x 256 tokens and
50,257 words. But the loss of a token needs only its own V logits. So: take a chunk of tokens,
compute their logits, loss and gradients at once, keep the gradients (as large as the hidden states,
and the trainable part of the head), drop the logits, go on. Nothing is computed twice. On a CPU,
chunks without a token that counts are skipped: with a loss on completions alone, perhaps most.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Int

from utils.kernels import on_cpu
from utils.sharding import all_gather, constrain

Hidden = Float[Array, "B T D"]
Targets = Int[ArrayLike, "B T"]
Mask = Float[ArrayLike, "B T"] | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed_loss(head, skip, trainable, frozen, hidden, targets, loss_mask):
    """Sum of loss_mask * cross-entropy of chunks [chunks, B, columns, ...]; `head` makes logits."""
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
            loss, (g, g_hidden) = jax.lax.cond((chunk[2] != 0).any(), computed, skipped, *chunk)
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
def _permuted(x: Hidden, order: Int[Array, "B T"]) -> Hidden:
    """x[b, order[b]] of each row b. Its derivative permutes back; JAX's is a slow scatter-add."""
    return jnp.take_along_axis(x, order[..., None], axis=1)


def _permuted_backward(order, g):
    return _permuted(g, jnp.argsort(order, axis=1)), None


_permuted.defvjp(lambda x, order: (_permuted(x, order), order), _permuted_backward)


def chunked_cross_entropy(
    head, hidden: Hidden, targets: Targets, loss_mask: Mask = None, *, wrt=nnx.Param, chunk_size=128
) -> Float[Array, ""]:
    """Mean cross-entropy in nats per token, of the logits that `head` makes of `hidden`.

    `head` is a model's output layer: a linear layer, or an embedding table used as one (through its
    `attend`). `loss_mask` says how much each token counts (0: not at all); the mean is over what
    counts, and 0 where nothing does. `wrt` selects the trainable variables of the head, as in
    `train.fit`: the others get no gradient, which saves a third of a frozen head's work. About
    `chunk_size` tokens have logits at one time, as many of each row. Gradients are computed in the
    forward pass, so use this for training; the loss alone is cheaper from the plain logits.
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
    columns = max(1, min(chunk_size, B * T) // B)  # of each row: on a mesh, a device has its rows
    missing = -T % columns  # the last chunk is padded with tokens that do not count

    def chunks(a):  # [B, T, ...] -> [chunks, B, columns, ...]
        a = jnp.pad(a, [(0, 0), (0, missing)] + [(0, 0)] * (a.ndim - 2))
        return jnp.swapaxes(a.reshape(B, -1, columns, *a.shape[2:]), 0, 1)

    # All-gathered here, once: inside the scan, every chunk would do it again. The barrier keeps it
    # behind the hidden states, or the largest matrix would be on every device during all layers.
    frozen, hidden = jax.lax.optimization_barrier((frozen, hidden))
    trainable, frozen = (all_gather(tree, prefix="lm_head.") for tree in (trainable, frozen))
    counted = mask.sum()
    total = _summed_loss(logits, skip, trainable, frozen, *map(chunks, (hidden, targets, mask)))
    return total / jnp.where(counted > 0, counted, 1)
