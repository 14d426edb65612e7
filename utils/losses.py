"""Cross-entropy in chunks: the loss of a large vocabulary without its logits.

Logits are the largest array of a training step: B x T x V floats, 412 MB for 8 x 256 tokens and 50,257 words, and the
backward pass reads and writes that much again several times. But each token's loss needs its own V logits only. So: take
a chunk of tokens, make its logits, its loss and its gradients at once, keep the gradients (they have the size of the
hidden states and of the head's learnt part), forget the logits, take the next chunk. Nothing is computed twice. And, on
a CPU, nothing for tokens that do not count: where the loss is on answers alone, that may be most of them.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from utils.sharding import all_gather, constrain
from utils.kernels import on_cpu


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(head: Callable, skip: bool, learnt, rest, hidden, targets, weights):
    return _forward(head, skip, learnt, rest, hidden, targets, weights)[0]


def _forward(head, skip, learnt, rest, hidden, targets, weights):
    def chunk_loss(learnt, h, t, w):
        logits = constrain(head(learnt, rest, h).astype(jnp.float32), "fsdp", None, "tp")
        return (w * optax.softmax_cross_entropy_with_integer_labels(logits, t)).sum()

    def graded(h, t, w):
        return jax.value_and_grad(chunk_loss, argnums=(0, 1))(learnt, h, t, w)

    def nothing(h, t, w):
        return jnp.float32(0), jax.tree.map(jnp.zeros_like, (learnt, h))

    def step(carry, chunk):
        total, grads = carry
        if skip:
            loss, (g_learnt, g_hidden) = jax.lax.cond((chunk[2] != 0).any(), graded, nothing, *chunk)
        else:
            loss, (g_learnt, g_hidden) = graded(*chunk)
        return (total + loss, jax.tree.map(jnp.add, grads, g_learnt)), g_hidden

    start = jnp.float32(0), jax.tree.map(jnp.zeros_like, learnt)
    (total, g_learnt), g_hidden = jax.lax.scan(step, start, (hidden, targets, weights))
    return total, (g_learnt, g_hidden)


def _backward(head, skip, grads, g):
    g_learnt, g_hidden = jax.tree.map(lambda x: (g * x).astype(x.dtype), grads)
    return g_learnt, None, g_hidden, None, None


_summed.defvjp(_forward, _backward)


@jax.custom_vjp
def _permuted(x: Float[Array, "B T D"], order: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """x[b, order[b]] for each row b. JAX's own derivative would add up rows one by one; here they are moved back."""
    return jnp.take_along_axis(x, order[..., None], axis=1)


def _permuted_backward(order, g):
    return _permuted(g, jnp.argsort(order, axis=1)), None


_permuted.defvjp(lambda x, order: (_permuted(x, order), order), _permuted_backward)


def chunked_cross_entropy(
    head: nnx.Module,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"] | None = None,
    *,
    wrt: nnx.filterlib.Filter = nnx.Param,
    chunk: int = 128,
) -> Float[Array, ""]:
    """Mean cross-entropy in nats per token, of the logits that `head` makes of `hidden`.

    `head` is a model's output layer: a linear layer, or an embedding table used as one (through its `attend`). `weights`
    say how much each token counts (0: not at all); the mean is over them, and 0 where none counts. `wrt` says which of
    the head's variables are learnt, as in `train.fit`: the others get no gradient, which for a frozen table saves a
    third of the head's work. `chunk` is about how many tokens have logits at one time: as many of each row, on
    a CPU those that count first, and a chunk in which none counts costs nothing. Gradients are made in the forward pass,
    so use this for training; a loss alone is cheaper from the plain logits.
    """
    graph, learnt, rest = nnx.split(head, wrt, ...)

    def logits(learnt, rest, h):
        layer = nnx.merge(graph, learnt, rest)
        return layer.attend(h) if hasattr(layer, "attend") else layer(h)

    # On a CPU alone, where it was measured: the output layer is a fifth of a step on SmolLM2, where a quarter counts.
    skip = weights is not None and on_cpu()
    weights = jnp.ones(targets.shape, jnp.float32) if weights is None else weights.astype(jnp.float32)
    if skip:  # those that count first, so that few chunks have any
        order = jnp.argsort(weights == 0, axis=1, stable=True)
        targets, weights = (jnp.take_along_axis(a, order, axis=1) for a in (targets, weights))
        hidden = _permuted(hidden, order)
    B, T = targets.shape
    columns = max(1, min(chunk, B * T) // B)  # of every row, so that on a mesh each device works on rows of its own
    missing = -T % columns  # the last chunk is filled up with tokens of weight zero

    def chunks(a):  # [B, T, ...] -> [chunks, B, columns, ...]
        a = jnp.pad(a, [(0, 0), (0, missing)] + [(0, 0)] * (a.ndim - 2))
        return jnp.swapaxes(a.reshape(B, -1, columns, *a.shape[2:]), 0, 1)

    # Gathered here, once: inside it would be gathered again for every chunk. And not before there are hidden states, or on a
    # mesh the largest matrix of all would lie whole on every device during all layers.
    rest, hidden = jax.lax.optimization_barrier((rest, hidden))
    learnt, rest = gather(learnt, prefix="lm_head."), gather(rest, prefix="lm_head.")
    counted = weights.sum()
    summed = _summed(logits, skip, learnt, rest, *map(chunks, (hidden, targets, weights)))
    return summed / jnp.where(counted > 0, counted, 1)
