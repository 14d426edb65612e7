"""utils.lora and the adapter files: the invariants, to the bit where they hold to the bit, and every bad input."""

from __future__ import annotations

import functools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from utils import CourseError, checkpoints, lora, minigpt, train
from utils.hf import peft

CONFIG = minigpt.Config(
    vocab_size=61,
    max_position_embeddings=12,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=32,
)
TOKENS = jax.random.randint(jax.random.key(1), (3, 12), 0, CONFIG.vocab_size)
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")


def base(seed: int = 0) -> minigpt.MiniGPT:
    return minigpt.MiniGPT(CONFIG, rngs=nnx.Rngs(seed))


def drawn(model, seed: int = 3):
    """B filled with numbers, as after a training: with B at zero most of these tests would test nothing."""
    for i, a in enumerate(lora.adapters(model).values()):
        a.lora_B[...] = 0.3 * jax.random.normal(jax.random.key(seed + i), a.lora_B.shape)
    return model


def adapted(targets=("q_proj", "v_proj", "up_proj"), *, rank=4, seed: int = 0, **options):
    return drawn(
        lora.inject(
            base(seed), rank=rank, alpha=8, target_modules=targets, rngs=nnx.Rngs(7), **options
        )
    )


@functools.partial(jax.jit, static_argnames="graph")  # compiled once for each structure of a model
def _logits(graph, state):
    return nnx.merge(graph, state)(TOKENS)


def logits(model) -> np.ndarray:
    return np.asarray(_logits(*nnx.split(model)))


def arrays(model) -> dict[str, np.ndarray]:
    return checkpoints.named_parameters(model)


def refuses(model, words: str, action) -> str:
    """`action` ends in one clear line with these words in it, and leaves the model as it was."""
    before, graph = arrays(model), nnx.graphdef(model)
    with pytest.raises(CourseError) as caught:
        action()
    message = str(caught.value)
    for word in words.split(" / "):
        assert word in message, f"{word!r} is not in {message!r}"
    assert "\n" not in message
    after = arrays(model)
    assert before.keys() == after.keys() and nnx.graphdef(model) == graph
    assert all(np.array_equal(before[name], after[name]) for name in before)
    return message


# ------------------------------------------------------------------------------------------------------ the invariants


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ALL, (*ALL, "lm_head")])
def test_fresh_adapter_is_the_base_bit_for_bit(targets):
    model = base()
    before = logits(model)
    lora.inject(model, rank=4, alpha=8, target_modules=targets, rngs=nnx.Rngs(1))
    assert np.array_equal(logits(model), before)
    for a in lora.adapters(model).values():
        assert not np.any(a.lora_B[...]) and np.all(np.any(a.lora_A[...], axis=-1))
    assert not np.array_equal(logits(drawn(model)), before)  # and it is the zero that does it


@pytest.mark.parametrize("stabilised", [False, True])
def test_merged_equals_unmerged(stabilised):
    model = adapted(ALL, use_rslora=stabilised)
    unmerged, plain = logits(model), logits(base())
    assert np.abs(unmerged - plain).max() > 1e-2
    merged = logits(lora.merge(model))
    assert np.abs(merged - unmerged).max() < 1e-4


def test_unmerge_within_rounding():
    model = adapted(ALL)
    before = arrays(model)
    lora.unmerge(lora.merge(model))
    for name, after in arrays(model).items():
        np.testing.assert_allclose(
            after, before[name], rtol=0, atol=4e-7 * max(1, np.abs(before[name]).max())
        )
        assert "kernel" in name or np.array_equal(after, before[name])


def test_unmerge_to_the_bit_when_the_weights_are_kept():
    model = adapted(ALL)
    before, out = arrays(model), logits(model)
    lora.merge(model, keep=True)
    assert not np.array_equal(logits(model), logits(base()))
    lora.unmerge(model)
    after = arrays(model)
    assert before.keys() == after.keys() and all(
        np.array_equal(before[n], after[n]) for n in before
    )
    assert np.array_equal(logits(model), out)


def test_bfloat16_merge_rounds_and_keep_does_not():
    layer = nnx.Linear(32, 32, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    holder = nnx.Module()
    holder.q_proj = layer
    original = np.array(layer.kernel[...].astype(jnp.float32))
    drawn(lora.inject(holder, rank=2, alpha=4, target_modules=["q_proj"], rngs=nnx.Rngs(1)))
    lora.unmerge(lora.merge(holder))
    kernel = holder.q_proj.base.kernel
    assert kernel.dtype == jnp.bfloat16
    rounded = np.array(kernel[...].astype(jnp.float32))
    assert not np.array_equal(rounded, original)
    # One rounding of the sum: half of 1 part in 128 of the largest number that was on the way.
    largest = np.abs(original).max() + np.abs(holder.q_proj.delta()).max()
    assert np.abs(rounded - original).max() <= largest / 128
    kernel[...] = jnp.asarray(original, jnp.bfloat16)
    lora.unmerge(lora.merge(holder, keep=True))
    assert np.array_equal(np.array(kernel[...].astype(jnp.float32)), original)


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank": (4, 2, 1)}, {"layers": (0, 2)}]
)
def test_save_and_load_into_a_fresh_base(tmp_path, options):
    model = adapted(
        ("q_proj", "down_proj", "lm_head") if not options else ("q_proj", "down_proj"), **options
    )
    if "rank" in options:  # the padding of smaller ranks is zero in a trained adapter too
        for a in lora.adapters(model).values():
            used = jnp.arange(4) < jnp.array(options["rank"])[:, None]
            a.lora_B[...] = a.lora_B[...] * used[:, None, :]
    folder = peft.save(model, tmp_path / "mine", base="a-minigpt")
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert all(
        p.stat().st_mode & 0o044 == 0o044 for p in folder.iterdir()
    )  # others may read it, as any file
    loaded = peft.load(base(), folder)
    assert np.array_equal(logits(loaded), logits(model))
    small = sum(p.stat().st_size for p in folder.iterdir())
    assert small < 4 * lora.count(model).adapter + 8000  # the adapter, and nothing of the base


def test_a_file_is_peft_s(tmp_path):
    model = adapted(("q_proj", "up_proj"), rank=(4, 4, 2), layers=(0, 2))
    for a in lora.adapters(model).values():
        a.lora_B[...] = a.lora_B[...].at[2, :, 2:].set(0)
    config, tensors, metadata = peft.read(peft.save(model, tmp_path / "x", base="someone/base"))
    name = "base_model.model.layers.{}.{}.lora_{}.weight"
    assert {n: t.shape for n, t in tensors.items()} == {
        name.format(layer, module, letter): shape
        for layer, r in ((0, 4), (2, 2))
        for module, inside, outside in (("self_attn.q_proj", 16, 16), ("mlp.up_proj", 16, 32))
        for letter, shape in (("A", (r, inside)), ("B", (outside, r)))
    }
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == "someone/base"
    assert config["r"] in (4, 2) and set(config["rank_pattern"].values()) == {6 - config["r"]}
    assert all(
        n.startswith("layers.") for n in config["target_modules"]
    )  # layer 1 is not adapted: full names
    assert metadata["format"] == "pt"


def train_100(model, wrt=nnx.LoRAParam, seed=0):
    def batches():
        for i in range(1000):
            tokens = jax.random.randint(jax.random.key(i), (2, 13), 0, CONFIG.vocab_size)
            yield {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}

    tx = train.optimizer(1e-2)
    return train.fit(
        model, batches(), train.next_token_loss, tx, steps=100, wrt=wrt, seed=seed, progress=False
    )


def test_100_steps_change_only_the_adapter():
    model = lora.inject(base(), rank=2, alpha=4, target_modules=ALL, rngs=nnx.Rngs(5))
    before = arrays(model)
    train_100(model)
    after = arrays(model)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(("lora_A", "lora_B"))}
    assert len(changed) == 12
    with lora.disabled(model):
        assert np.array_equal(logits(model), logits(base()))


def test_smaller_ranks_and_switched_off_layers_stay_what_they_are():
    model = lora.inject(
        base(), rank=(4, 2, 1), alpha=4, target_modules=["q_proj"], layers=(0, 1), rngs=nnx.Rngs(5)
    )
    train_100(model)
    a = lora.adapters(model)["layers.self_attn.q_proj"]
    A, B = a.lora_A[...], a.lora_B[...]
    assert not A[1, 2:].any() and not B[1, :, 2:].any() and A[1, :2].any() and B[1, :, :2].any()
    assert not B[2].any()
    assert [np.linalg.matrix_rank(d) for d in np.asarray(a.delta())] == [4, 2, 0]


def compiled(model, wrt):
    """Memory of one compiled training step, in bytes: arguments, outputs, temporaries."""
    graph, learnt, rest = nnx.split(model, wrt, ...)
    tx = optax.adamw(1e-3)
    step = train.make_step(graph, train.next_token_loss, tx)
    carry = (learnt, tx.init(learnt), jnp.array(True))
    tokens = jnp.zeros((1, 8), jnp.int32)
    lowered = step.lower(carry, rest, {"inputs": tokens, "targets": tokens}, jax.random.key(0))
    return lowered.compile().memory_analysis()


def test_the_adapter_step_has_no_gradient_and_no_optimiser_memory_for_the_base(monkeypatch):
    # Written out, the blocks' slices of the stacked weights are temporaries too, and would hide what is looked for.
    monkeypatch.setattr(minigpt, "UNROLL", 1)
    # Few tokens, a wide model: activations are small beside the weights, so what remains is weights and gradients.
    config = minigpt.Config(
        vocab_size=256,
        max_position_embeddings=8,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=512,
    )

    def model():
        return lora.inject(
            minigpt.MiniGPT(config, rngs=nnx.Rngs(0)), rank=2, alpha=4, rngs=nnx.Rngs(1)
        )

    counts = lora.count(model())
    base_bytes, adapter_bytes = 4 * counts.base, counts.adapter_bytes
    small, full = compiled(model(), nnx.LoRAParam), compiled(model(), nnx.Param)
    slack = 4096  # tokens, keys, counters
    # In: the base once, the adapter and Adam's two moments of it. Full training holds three times the base.
    assert small.argument_size_in_bytes <= base_bytes + 3 * adapter_bytes + slack
    assert full.argument_size_in_bytes >= 3 * base_bytes
    # Out: what a step changes. No array of the base is among it.
    assert small.output_size_in_bytes <= 3 * adapter_bytes + slack
    assert full.output_size_in_bytes >= 3 * base_bytes
    # Between: where a gradient would lie.
    assert small.temp_size_in_bytes < base_bytes / 2
    assert full.temp_size_in_bytes > base_bytes


# ------------------------------------------------------------------------------------------------- the layer, the maths


def test_the_formula():
    linear = nnx.Linear(5, 7, rngs=nnx.Rngs(0))
    layer = lora.LoRALinear(linear, rank=3, alpha=6, rngs=nnx.Rngs(1))
    x = jax.random.normal(jax.random.key(2), (4, 5))
    assert (
        layer.lora_A.shape == (3, 5)
        and layer.lora_B.shape == (7, 3)
        and layer.stack is None
        and layer.rank == 3
    )
    assert np.array_equal(layer(x), linear(x))
    layer.lora_B[...] = jax.random.normal(jax.random.key(3), (7, 3))
    W = np.array(linear.kernel[...]).T + 6 / 3 * np.array(layer.lora_B[...]) @ np.array(
        layer.lora_A[...]
    )
    np.testing.assert_allclose(layer(x), np.array(x) @ W.T + np.array(linear.bias[...]), atol=1e-5)
    np.testing.assert_allclose(layer.delta(), W - np.array(linear.kernel[...]).T, atol=1e-5)


def test_a_stacked_layer_is_its_layers_one_by_one():
    model = adapted(("q_proj",), rank=(1, 2, 3))
    a = lora.adapters(model)["layers.self_attn.q_proj"]
    kernel, deltas = a.base.kernel[...], np.asarray(a.delta())
    assert a.stack == 3 and a.rank == 3
    np.testing.assert_allclose(np.asarray(a.scale[...]), [8.0, 4.0, 8 / 3], rtol=1e-6)
    by_hand = base()
    by_hand.layers.self_attn.q_proj.kernel[...] = kernel + deltas.swapaxes(1, 2)
    assert np.abs(logits(by_hand) - logits(model)).max() < 1e-4


def test_pefts_initialisation():
    """torch's kaiming_uniform_(a=sqrt(5)): uniform within 1 / sqrt(in), so a standard deviation of 1 / sqrt(3 in)."""
    linear = nnx.Linear(64, 400, rngs=nnx.Rngs(0))
    A = np.array(lora.LoRALinear(linear, rank=64, alpha=1, rngs=nnx.Rngs(1)).lora_A[...])
    bound = 1 / math.sqrt(64)
    assert np.abs(A).max() <= bound and np.abs(A).max() > 0.99 * bound
    assert (
        A.std() == pytest.approx(bound / math.sqrt(3), rel=0.03)
        and abs(A.mean()) < 0.01 * bound * 3
    )


def test_scales():
    def scale(**options):
        linear = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
        return float(lora.LoRALinear(linear, rngs=nnx.Rngs(1), **options).scale[...])

    assert scale(rank=4, alpha=16) == 4
    assert scale(rank=16, alpha=16) == 1
    assert scale(rank=4, alpha=16, use_rslora=True) == 8
    assert scale(rank=16, alpha=16, use_rslora=True) == 4


def test_layers_and_scale_per_layer():
    model = adapted(("up_proj",), layers=(1,))
    a = lora.adapters(model)["layers.mlp.up_proj"]
    assert list(np.asarray(a.scale[...])) == [0, 2, 0]
    assert [bool(np.any(d)) for d in np.asarray(a.delta())] == [False, True, False]
    model = lora.inject(
        base(), rank=2, alpha=(2, 4, 8), target_modules=["up_proj"], rngs=nnx.Rngs(0)
    )
    assert list(np.asarray(lora.adapters(model)["layers.mlp.up_proj"].scale[...])) == [1, 2, 4]
    off = adapted(("up_proj",), layers=())
    assert np.array_equal(logits(off), logits(base()))


def test_numbers_from_numpy_are_numbers():
    model = lora.inject(
        base(), rank=np.array([4, 2, 1]), alpha=np.float32(8), layers=np.arange(2), rngs=nnx.Rngs(0)
    )
    assert list(np.asarray(lora.adapters(model)["layers.self_attn.q_proj"].scale[...])) == [2, 4, 0]


def test_counts():
    model = adapted(ALL)
    found = lora.count(model)
    by_hand = CONFIG.num_hidden_layers * (
        4 * lora.parameters((16, 16), 4) + 2 * lora.parameters((16, 32), 4)
    )
    assert found.adapter == by_hand == 3 * (4 * 4 * 32 + 2 * 4 * 48)
    assert found.base == CONFIG.count_parameters()["total"]
    assert found.share == by_hand / found.base
    assert (found.adapter_bytes, found.optimizer_bytes) == (4 * by_hand, 8 * by_hand)
    assert found.flops_per_token == 2 * by_hand
    assert lora.count(base()).adapter == 0


def test_targets_by_name_path_and_expression():
    def paths(targets):
        return sorted(
            lora.adapters(lora.inject(base(), rank=1, target_modules=targets, rngs=nnx.Rngs(0)))
        )

    assert paths(("q_proj",)) == ["layers.self_attn.q_proj"]
    assert paths(("self_attn.q_proj", "down_proj")) == [
        "layers.mlp.down_proj",
        "layers.self_attn.q_proj",
    ]
    assert paths(r".*\.(k|v)_proj") == ["layers.self_attn.k_proj", "layers.self_attn.v_proj"]
    assert paths(("lm_head",)) == ["embed_tokens"]


def test_tied_head():
    """The adapter is on the table's use as output layer: reading the table gives what it gave."""
    model = adapted(("lm_head",))
    assert isinstance(model.embed_tokens, lora.LoRATiedHead)
    assert np.array_equal(model.embed_tokens(TOKENS), base().embed_tokens(TOKENS))
    assert np.abs(logits(model) - logits(base())).max() > 1e-2
    x, _ = model.hidden(TOKENS)
    W = np.array(base().embed_tokens.embedding[...]) + np.asarray(model.embed_tokens.delta())
    np.testing.assert_allclose(logits(model), np.asarray(x) @ W.T, atol=1e-4)
    assert (
        model.new_cache(1)[0].k.dtype == jnp.float32
    )  # the model still asks its table for the dtype
    refuses(model, "embed_tokens / merge", lambda: lora.merge(model))
    refuses(
        base(),
        "embed_tokens / lm_head",
        lambda: lora.inject(base(), target_modules=["embed_tokens"], rngs=nnx.Rngs(0)),
    )


def test_disabled_is_the_base_and_comes_back():
    model = adapted()
    out = logits(model)
    with lora.disabled(model):
        assert np.array_equal(logits(model), logits(base()))
        with lora.disabled(model):
            pass
        assert np.array_equal(logits(model), logits(base()))
    with pytest.raises(KeyError), lora.disabled(model):
        raise KeyError
    assert np.array_equal(logits(model), out)


def test_dropout():
    model = adapted(dropout=0.5)
    without = logits(adapted())
    assert np.array_equal(logits(model), without)  # off by default

    def with_key(seed):
        with lora.dropout(model, jax.random.key(seed)):
            return logits(model)

    assert np.array_equal(with_key(0), with_key(0)) and not np.array_equal(with_key(0), with_key(1))
    assert not np.array_equal(with_key(0), without)
    assert np.array_equal(logits(model), without)  # and off again

    graph, state = nnx.split(model)

    @jax.jit
    def pure(
        state, key
    ):  # in a pure step, where a random state inside the model would repeat one mask for ever
        made = nnx.merge(graph, state)
        with lora.dropout(made, key):
            return made(TOKENS)

    a, b = (np.asarray(pure(state, jax.random.key(i))) for i in (0, 1))
    assert not np.array_equal(a, b)
    np.testing.assert_allclose(a, with_key(0), atol=1e-5)


def test_dropout_keeps_the_mean_and_differs_between_layers():
    linear = nnx.Linear(8, 8, use_bias=False, rngs=nnx.Rngs(0))
    layer = lora.LoRALinear(linear, rank=8, alpha=8, dropout=0.25, rngs=nnx.Rngs(1))
    layer.lora_A[...], layer.lora_B[...] = jnp.eye(8), jnp.eye(8)
    layer.key = lora.DropoutKey(jax.random.key(0))
    change = np.asarray(layer.lora_delta(jnp.ones((4000, 8))))
    assert set(np.unique(change.round(5))) == {0.0, np.float32(4 / 3).round(5)}
    assert change.mean() == pytest.approx(1, abs=0.02)
    model = adapted(dropout=0.5)
    with lora.dropout(model, jax.random.key(0)):
        keys = [jax.random.key_data(a.key[...]) for a in lora.adapters(model).values()]
    assert (
        len(np.unique(np.concatenate([np.asarray(k) for k in keys]), axis=0))
        == 3 * CONFIG.num_hidden_layers
    )


# ------------------------------------------------------------------------------------------------- adapters as states


def test_swap_there_and_back():
    model, other = adapted(), drawn(adapted(rank=2), seed=50)
    mine, theirs = logits(model), logits(other)
    kept = lora.set_adapter(model, lora.adapter(other))
    assert np.array_equal(logits(model), theirs)
    lora.set_adapter(model, kept)
    assert np.array_equal(logits(model), mine)


def test_adapter_is_a_copy():
    model = adapted()
    state = lora.adapter(model)
    before = {path: {n: a.copy() for n, a in parts.items()} for path, parts in state.items()}
    train_100(model)
    for path in state:
        assert all(np.array_equal(state[path][n], before[path][n]) for n in state[path])
        assert not np.array_equal(state[path]["lora_B"], lora.adapter(model)[path]["lora_B"])


def test_combine_is_the_weighted_sum_of_changes():
    one, two = adapted(rank=2), drawn(adapted(rank=3, use_rslora=True), seed=20)
    deltas = [{p: np.asarray(a.delta()) for p, a in lora.adapters(m).items()} for m in (one, two)]
    lora.set_adapter(
        one, lora.add_weighted_adapter((lora.adapter(one), 0.7), (lora.adapter(two), -0.4))
    )
    for path, a in lora.adapters(one).items():
        assert a.rank == 5
        np.testing.assert_allclose(
            a.delta(), 0.7 * deltas[0][path] - 0.4 * deltas[1][path], atol=1e-5
        )


def test_combine_refuses_what_does_not_fit():
    model = adapted()
    state = lora.adapter(model)
    refuses(
        model,
        "target modules",
        lambda: lora.add_weighted_adapter((state, 1), (lora.adapter(adapted(("q_proj",))), 1)),
    )
    refuses(model, "at least one", lambda: lora.add_weighted_adapter())
    wide = {path: parts | {"lora_A": parts["lora_A"][..., :-1]} for path, parts in state.items()}
    refuses(model, "layers.", lambda: lora.add_weighted_adapter((state, 1), (wide, 1)))


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["q_porj"], "q_porj / closest / q_proj"),
        (["layers.self_attn.q_prj"], "layers.self_attn.q_proj"),
        (["q_proj", "wv"], "'wv' / matches no linear layer / closest"),
        ("q_proj", "'q_proj' / closest"),  # a single string is an expression for the whole path
        ([], "expected at least one name"),
        ("(q_proj", "not a regular expression"),
        (["norm"], "matches no linear layer"),
    ],
)
def test_targets_that_match_nothing(targets, words):
    model = base()
    refuses(model, words, lambda: lora.inject(model, target_modules=targets, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(rank=0), "layers.self_attn.q_proj / expected 1 to 16 / found 0"),
        (dict(rank=-3), "found -3"),
        (dict(rank=17), "expected 1 to 16 / 16 x 16 / found 17"),
        (dict(rank=2.5), "found 2.5"),
        (dict(rank=True), "found True"),
        (dict(rank=(4, 4)), "one for each of 3 layers / found 2"),
        (dict(rank=(4, 4, 0)), "found 0"),
        (dict(alpha=(1, 2, 3, 4)), "alpha / found 4"),
        (dict(alpha=float("nan")), "alpha / nan"),
        (dict(layers=(0, 3)), "layers / from 0 to 2"),
        (dict(layers=(-1,)), "layers / from 0 to 2"),
        (dict(dropout=1.0), "dropout / 1.0"),
        (dict(dropout=-0.1), "dropout"),
    ],
)
def test_options_that_cannot_be(options, words):
    model = base()
    refuses(model, words, lambda: lora.inject(model, rngs=nnx.Rngs(0), **options))


def test_an_error_at_the_last_target_leaves_the_first_alone():
    model = (
        base()
    )  # rank 20 fits the head (16 x 61)? no layer here takes it, and the first is named
    refuses(
        model,
        "rank",
        lambda: lora.inject(
            model, rank=20, target_modules=["up_proj", "lm_head"], rngs=nnx.Rngs(0)
        ),
    )
    refuses(
        model,
        "nothing_here",
        lambda: lora.inject(model, target_modules=["q_proj", "nothing_here"], rngs=nnx.Rngs(0)),
    )


def test_twice_and_out_of_order(tmp_path):
    model = adapted()
    refuses(
        model,
        "already has adapters",
        lambda: lora.inject(model, target_modules=["k_proj"], rngs=nnx.Rngs(0)),
    )
    refuses(model, "not merged", lambda: lora.unmerge(model))
    other = lora.adapter(drawn(adapted(), seed=9))
    peft.save(model, tmp_path / "there")
    lora.merge(model)
    refuses(model, "merged already", lambda: lora.merge(model))
    refuses(model, "merged already", lambda: lora.merge(model, keep=True))
    refuses(model, "lora.unmerge", lambda: lora.set_adapter(model, other))
    refuses(model, "lora.unmerge", lambda: peft.save(model, tmp_path / "merged"))
    refuses(model, "is merged into the base", lambda: peft.load(model, tmp_path / "there"))
    refuses(model, "lora.unmerge", lambda: lora.disabled(model).__enter__())
    assert not (tmp_path / "merged").exists()
    lora.unmerge(model)
    refuses(model, "not merged", lambda: lora.unmerge(model))


def test_a_model_without_adapters():
    model = base()
    for action in (lora.merge, lora.unmerge, lora.adapter, lambda m: lora.disabled(m).__enter__()):
        refuses(model, "lora.inject", lambda action=action: action(model))


def test_a_quantised_base_takes_no_change():
    holder = nnx.Module()
    holder.q_proj, holder.v_proj = (nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(2))
    holder.v_proj.kernel = nnx.Param((holder.v_proj.kernel[...] * 127).astype(jnp.int8))
    drawn(lora.inject(holder, rank=2, rngs=nnx.Rngs(0)))
    refuses(holder, "v_proj / quantised / int8", lambda: lora.merge(holder))
    assert not any(a.merged for a in lora.adapters(holder).values())


def test_an_adapter_of_another_shape_is_not_swapped_in():
    model = adapted()
    state = lora.adapter(model)
    path = "layers.self_attn.q_proj"
    refuses(
        model,
        "layers.mlp.up_proj",
        lambda: lora.set_adapter(model, lora.adapter(adapted(("q_proj", "v_proj")))),
    )

    def with_(name, array):
        return state | {path: state[path] | {name: array}}

    A, B, scale = (state[path][n] for n in ("lora_A", "lora_B", "scale"))
    for broken in (
        with_("lora_A", A[..., :-1]),
        with_("lora_A", A[:2]),
        with_("lora_B", B[:, :-1]),
        with_("lora_B", B[..., :-1]),  # its rank is not A's
        with_("scale", scale[:-1]),
        with_("lora_A", A.swapaxes(1, 2)),
    ):
        refuses(model, path, lambda broken=broken: lora.set_adapter(model, broken))


def test_saving_over_something(tmp_path):
    folder = tmp_path / "mine"
    one, two = adapted(), drawn(adapted(), seed=30)
    peft.save(one, folder)
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    refuses(two, "exists already / overwrite=True", lambda: peft.save(two, folder))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == files
    peft.save(two, folder, overwrite=True)
    assert np.array_equal(logits(peft.load(base(), folder)), logits(two))
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]  # nothing half-written is left
    (folder / "notes.txt").write_text(
        "mine"
    )  # a folder that holds more than an adapter is not replaced
    refuses(one, "notes.txt", lambda: peft.save(one, folder, overwrite=True))
    assert (folder / "notes.txt").read_text() == "mine"
    file = tmp_path / "file"
    file.write_text("x")
    refuses(one, "file", lambda: peft.save(one, file, overwrite=True))
    assert file.read_text() == "x"


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    one, two = adapted(), drawn(adapted(), seed=30)
    peft.save(one, folder)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    replace = checkpoints.os.replace

    def replace_but_not_the_new_one(source, target):
        if source.name.startswith(".") and not source.name.endswith(".old"):
            full()
        replace(source, target)

    with monkeypatch.context() as patch:  # the last moment at which it can fail
        patch.setattr(checkpoints.os, "replace", replace_but_not_the_new_one)
        refuses(two, "No space left / unchanged", lambda: peft.save(two, folder, overwrite=True))
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    monkeypatch.setattr(peft, "save_file", full)
    refuses(two, "No space left / unchanged", lambda: peft.save(two, folder, overwrite=True))
    refuses(two, "No space left", lambda: peft.save(two, tmp_path / "new"))
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    assert np.array_equal(logits(peft.load(base(), folder)), logits(one))


def test_another_base_or_rank(tmp_path):
    folder = peft.save(adapted(), tmp_path / "mine")
    stranger = base(seed=1)
    refuses(stranger, "another base", lambda: peft.load(stranger, folder))
    peft.load(stranger, folder, check_base=False)  # on the learner's own word
    wide = minigpt.MiniGPT(
        minigpt.Config(**{**CONFIG.__dict__, "hidden_size": 32}), rngs=nnx.Rngs(0)
    )
    refuses(wide, "another base", lambda: peft.load(wide, folder))
    refuses(wide, "expected A [R, 32]", lambda: peft.load(wide, folder, check_base=False))
    shallow = minigpt.MiniGPT(
        minigpt.Config(**{**CONFIG.__dict__, "num_hidden_layers": 2}), rngs=nnx.Rngs(0)
    )
    refuses(
        shallow, "layers.2 / fits no layer", lambda: peft.load(shallow, folder, check_base=False)
    )
    other_rank = adapted(rank=2)
    refuses(other_rank, "rank 2 / found 4", lambda: peft.load(other_rank, folder))
    other_targets = adapted(("q_proj",))
    refuses(other_targets, "fits no layer", lambda: peft.load(other_targets, folder))
    more_targets = adapted(ALL)
    refuses(more_targets, "in the model only", lambda: peft.load(more_targets, folder))


def test_damaged_folders(tmp_path):
    folder = peft.save(adapted(), tmp_path / "mine")
    model = base()
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"

    def damaged(words, change):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        change(copy)
        refuses(model, words, lambda: peft.load(model, copy))

    def rewrite(**changes):
        def change(copy):
            found = json.loads(config.read_text()) | changes
            (copy / config.name).write_text(
                json.dumps({k: v for k, v in found.items() if v != "gone"})
            )

        return change

    whole = weights.read_bytes()
    for cut in (0, 5, 200, len(whole) // 2, len(whole) - 1):
        damaged(
            "adapter_model.safetensors / damaged or cut short",
            lambda c, n=cut: (c / weights.name).write_bytes(whole[:n]),
        )
    damaged("missing", lambda c: (c / weights.name).unlink())
    damaged("missing", lambda c: (c / config.name).unlink())
    damaged("adapter_config.json", lambda c: (c / config.name).write_text(config.read_text()[:-30]))
    damaged("adapter_config.json", lambda c: (c / config.name).write_bytes(b"\xff\xfe\x00"))
    damaged("adapter_config.json", lambda c: (c / config.name).write_text("[]"))
    damaged("lora_alpha", rewrite(lora_alpha="gone"))
    damaged("lora_alpha", rewrite(lora_alpha="much"))
    damaged("rank r", rewrite(r="gone"))
    damaged("says rank 3", rewrite(r=3))
    damaged("use_dora", rewrite(use_dora=True))
    damaged("LORA", rewrite(peft_type="IA3"))
    refuses(model, "missing", lambda: peft.load(model, tmp_path / "nowhere"))
    peft.load(model, folder)  # and the folder itself is whole


def test_patterns_may_be_null_as_peft_writes_them(tmp_path):
    folder = peft.save(adapted(), tmp_path / "mine")
    config = folder / "adapter_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"rank_pattern": None, "alpha_pattern": None})
    )
    assert np.array_equal(logits(peft.load(base(), folder)), logits(adapted()))


def test_tensors_that_are_half_there_or_not_numbers(tmp_path):
    from safetensors.numpy import save_file

    folder = peft.save(adapted(), tmp_path / "mine")
    config, tensors, metadata = peft.read(folder)
    name = "base_model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    file, model = folder / "adapter_model.safetensors", base()
    save_file({n: t for n, t in tensors.items() if n != name.format("B")}, file, metadata=metadata)
    refuses(model, "layers.1.self_attn.q_proj / only one", lambda: peft.load(model, folder))
    save_file(
        tensors | {name.format("A"): tensors[name.format("A")] * np.float32("nan")},
        file,
        metadata=metadata,
    )
    refuses(model, "layers.1.self_attn.q_proj / NaN", lambda: peft.load(model, folder))
    save_file(tensors | {"other": np.zeros(2, np.float32)}, file, metadata=metadata)
    refuses(model, "other / fits no layer", lambda: peft.load(model, folder))
    save_file({}, file, metadata=metadata)
    refuses(model, "expected tensors", lambda: peft.load(model, folder))
