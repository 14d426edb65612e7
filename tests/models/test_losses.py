"""The chunked loss is the plain loss: same value, same gradients, no array of logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from utils import lora, losses, minigpt, train

CONFIG = minigpt.Config(
    vocab_size=300,
    max_position_embeddings=16,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
)


def batch():
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(rng.integers(0, 300, (4, 16)), jnp.int32)
        for name in ("inputs", "targets")
    }


def chunked(wrt, chunk_size):
    def loss(model, batch, key):
        hidden, _ = model.hidden(batch["inputs"])
        return losses.chunked_cross_entropy(
            model.embed_tokens, hidden, batch["targets"], wrt=wrt, chunk_size=chunk_size
        )

    return loss


def adapted():
    model = minigpt.MiniGPT(CONFIG, rngs=nnx.Rngs(0))
    lora.inject(model, rank=4, alpha=8, target_modules=("q_proj", "lm_head"), rngs=nnx.Rngs(1))
    for i, a in enumerate(lora.adapters(model).values()):
        a.lora_B[...] = 0.1 * jax.random.normal(jax.random.key(i), a.lora_B.shape)
    return model


def value_and_grad(model, loss, wrt):
    graph, trainable, frozen = nnx.split(model, wrt, ...)
    return jax.jit(jax.value_and_grad(lambda p: loss(nnx.merge(graph, p, frozen), batch(), None)))(
        trainable
    )


@pytest.mark.parametrize("chunk_size", [8, 64])
@pytest.mark.parametrize("case", ["all parameters, tied table", "adapter alone"])
def test_equals_the_plain_loss_and_its_gradients(case, chunk_size):
    if case == "adapter alone":
        model, wrt = adapted(), nnx.LoRAParam
    else:
        model, wrt = minigpt.MiniGPT(CONFIG, rngs=nnx.Rngs(0)), nnx.Param
    expected, expected_grads = value_and_grad(model, train.next_token_loss, wrt)
    loss, grads = value_and_grad(model, chunked(wrt, chunk_size), wrt)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True)
    for ours, plain in pairs:
        np.testing.assert_allclose(ours, plain, rtol=2e-4, atol=1e-7)
    assert any(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(grads))


def test_no_array_of_all_logits():
    """Logits of 64 tokens and 300 words would have 19,200 entries: no such array is in the program."""
    model = adapted()
    graph, trainable, frozen = nnx.split(model, nnx.LoRAParam, ...)

    def program(loss):
        step = jax.value_and_grad(lambda p: loss(nnx.merge(graph, p, frozen), batch(), None))
        return jax.jit(step).lower(trainable).as_text()

    sizes = ("4x16x300x", "64x300x")
    assert any(size in program(train.next_token_loss) for size in sizes)
    assert not any(size in program(chunked(nnx.LoRAParam, 8)) for size in sizes)


def counted_by(loss_mask, hidden, chunk_size):
    """(loss, its gradient by the hidden states) of a head with 300 words."""
    head = nnx.Linear(8, 300, use_bias=False, rngs=nnx.Rngs(0))
    targets = batch()["targets"]

    def loss(hidden):
        return losses.chunked_cross_entropy(
            head, hidden, targets, loss_mask, wrt=nnx.LoRAParam, chunk_size=chunk_size
        )

    def plain(hidden):
        each = -jnp.take_along_axis(jax.nn.log_softmax(head(hidden)), targets[..., None], -1)[
            ..., 0
        ]
        return jnp.where(loss_mask > 0, loss_mask * each, 0).sum() / loss_mask.sum()

    return jax.value_and_grad(loss)(hidden), jax.value_and_grad(plain)(hidden)


@pytest.mark.parametrize("chunk_size", [8, 20, 64])
def test_tokens_count_as_the_loss_mask_says(chunk_size):
    """Some not at all, others half: wherever they stand in a row, and however many a row has."""
    rng = np.random.default_rng(1)
    loss_mask = jnp.asarray(
        rng.choice([0, 0, 0.5, 1], (4, 16)) * (np.arange(4) > 0)[:, None], jnp.float32
    )
    ours, plain = counted_by(
        loss_mask, jax.random.normal(jax.random.key(0), (4, 16, 8)), chunk_size
    )
    np.testing.assert_allclose(ours[0], plain[0], rtol=1e-6)
    np.testing.assert_allclose(ours[1], plain[1], atol=1e-7)


def test_chunks_in_which_no_token_counts_are_not_computed():
    """Their hidden states may be anything: an answer of 4 tokens in a row of 16 costs a chunk of 4."""
    loss_mask = jnp.zeros((4, 16)).at[:, 7:11].set(1)
    hidden = jnp.where(
        loss_mask[..., None] > 0, jax.random.normal(jax.random.key(0), (4, 16, 8)), jnp.nan
    )
    (loss, grad), _ = counted_by(loss_mask, hidden, chunk_size=16)
    assert jnp.isfinite(loss) and jnp.isfinite(grad).all()
    assert (grad[:, :7] == 0).all() and (grad[:, 11:] == 0).all() and (grad[:, 7:11] != 0).any()
