"""Qwen2 and Llama: equal to transformers on the fixtures, and to themselves however they are run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers import checkpoints
from tests.helpers.checkpoints import NAMES, model, reference, run
from utils import CourseError, attention, kernels, lora, rope, transformer
from utils.hf import config as hf_config
from utils.kernels import cpu


def grown(made, tokens, steps, known=None):
    """Greedy tokens [B, steps] by running the whole text anew each time: slow, and nothing can hide in a cache."""
    tokens = np.asarray(tokens)
    start, total = tokens.shape[1], tokens.shape[1] + steps
    tokens = np.pad(
        tokens, ((0, 0), (0, steps))
    )  # causal: what comes later does not change what was before
    for t in range(start, total):
        logits = np.asarray(run(made, tokens))[:, t - 1, :known]
        tokens[:, t] = logits.argmax(-1)
    return tokens[:, start:]


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_those_of_transformers(name):
    wanted = reference(name)
    found = run(model(name), wanted["tokens"])
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_equal_those_of_transformers(name):
    wanted = reference(name)
    found = np.asarray(run(model(name), wanted["tokens"], method="hidden_states"))
    assert found.shape == wanted["hidden_states"].shape
    for layer, (ours, theirs) in enumerate(zip(found, wanted["hidden_states"])):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5, err_msg=f"hidden state {layer}")


@pytest.mark.parametrize("name", NAMES)
def test_greedy_continuation_equals_that_of_transformers(name):
    wanted = reference(name)
    known = 150 if name in checkpoints.SPOKEN else None
    np.testing.assert_array_equal(grown(model(name), wanted["tokens"], 12, known), wanted["greedy"])


def test_the_spare_rows_of_the_padded_vocabulary_would_win():
    """So the fixture tests that nobody looks at them."""
    logits = reference("qwen2-untied")["logits"]
    assert (logits.argmax(-1) >= 150).any()


def test_hidden_states_begin_with_the_embedding_and_end_normalised():
    made, wanted = model("qwen2-untied"), reference("qwen2-untied")
    states = run(made, wanted["tokens"], method="hidden_states")
    np.testing.assert_array_equal(states[0], made.model.embed_tokens.weight[...][wanted["tokens"]])
    x, _ = run(made, wanted["tokens"], method="hidden")
    np.testing.assert_allclose(states[-1], x, atol=1e-6)
    np.testing.assert_allclose(run(made, x, method="logits"), wanted["logits"], atol=1e-5)


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("name", ["qwen2-untied", "llama-untied-sharded"])
def test_packed_sequences_equal_separate_ones(name, restart):
    made, tokens = model(name), reference(name)["tokens"]
    a, b, c = tokens[:1, :5], tokens[1:, :4], tokens[1:, 4:11]
    packed = np.concatenate([a, b, c, np.zeros((1, 2), np.int32)], 1)
    segments = np.repeat([1, 2, 3, 0], [5, 4, 7, 2])[None]
    positions = (
        np.concatenate([np.arange(5), np.arange(4), np.arange(7), np.arange(2)])[None]
        if restart
        else None
    )
    found = run(made, packed, positions, segment_ids=segments)
    assert np.isfinite(np.asarray(found)).all()
    for part, where in ((a, slice(0, 5)), (b, slice(5, 9)), (c, slice(9, 16))):
        np.testing.assert_allclose(found[:, where], run(made, part), atol=1e-5)
    # and it matters: the same text as one sequence is something else
    assert np.abs(found - run(made, packed))[:, 5:16].max() > 0.1


@pytest.mark.parametrize("options", [None, "quick"])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 9, 17])
def test_small_batch_matvec_multiplies_as_the_library_does(rows, options):
    keys = jax.random.split(jax.random.key(rows))
    x, weight = (
        jax.random.normal(keys[0], (rows, 96)),
        jax.random.normal(keys[1], (40, 96), jnp.bfloat16),
    )
    multiply = jax.jit(cpu.linear, compiler_options=options and cpu.COMPILER_OPTIONS)
    found = multiply(x, cpu.pack_bfloat16(weight))
    wanted = np.asarray(x.astype(jnp.bfloat16), np.float64) @ np.asarray(weight, np.float64).T
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    np.testing.assert_allclose(multiply(x[None], cpu.pack_bfloat16(weight))[0], wanted, atol=2e-5)


def test_packed_words_hold_every_number_once_infinite_ones_too():
    numbers = jnp.array([[1.5, -0.0, jnp.inf, -2.25, 3e38, 1e-39]], jnp.bfloat16)
    words = np.asarray(cpu.pack_bfloat16(numbers))
    halves = np.concatenate([words << 16, words & 0xFFFF0000], axis=-1).view(np.float32)
    np.testing.assert_array_equal(halves, np.asarray(numbers, np.float32))


@pytest.mark.parametrize("name", NAMES)
def test_the_packed_layout_decodes_as_the_unrolled_one(name):
    made, tokens = model(name, "bfloat16"), reference(name)["tokens"]
    # An adapter stays beside what is packed.
    lora.inject(made, rank=2, target_modules=("q_proj", "down_proj"), rngs=nnx.Rngs(0))
    found = {}
    for layout in ("unrolled", "packed"):
        each = getattr(cpu, layout)(made)
        cache = each.new_cache(2, 16)
        assert each.param_dtype == jnp.bfloat16
        for t in range(3):
            logits, cache = run(each, tokens[:, t : t + 1], np.full((2, 1), t), cache)
        found[layout] = np.asarray(logits)
    kinds = [leaf.dtype for leaf in jax.tree.leaves(nnx.state(each))]
    assert kinds.count(np.uint32) >= 3 * made.config.num_hidden_layers
    np.testing.assert_allclose(
        found["packed"], found["unrolled"], atol=0.02 * np.abs(found["unrolled"]).max()
    )


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_unrolled_equals_training_stacked(dtype, gradient_checkpointing):
    """The loss and every layer's gradient, whichever way the layers lie."""
    made = lora.inject(
        model("qwen2-untied", dtype),
        rank=2,
        target_modules=("q_proj", "down_proj"),
        rngs=nnx.Rngs(0),
    )
    for a in lora.adapters(made).values():  # B away from zero, so that A has a gradient too
        a.lora_B[...] = 0.1 * jax.random.normal(jax.random.key(1), a.lora_B.shape)
    tokens = reference("qwen2-untied")["tokens"]
    found = {}
    for name, each in (("stacked", made), ("unrolled", cpu.unrolled(made))):
        each.model.gradient_checkpointing = gradient_checkpointing
        graph, trainable, frozen = nnx.split(each, nnx.LoRAParam, ...)

        def loss(trainable, graph=graph, frozen=frozen):
            x, _ = nnx.merge(graph, trainable, frozen).hidden(tokens)
            return jnp.square(x).mean()

        value, grads = jax.jit(jax.value_and_grad(loss))(trainable)
        flat = {
            ".".join(map(str, path)): np.asarray(leaf[...])
            for path, leaf in nnx.to_flat_state(grads)
        }
        found[name] = float(value), flat
    close = 1e-4 if dtype == "float32" else 0.05
    assert found["unrolled"][0] == pytest.approx(found["stacked"][0], rel=close)
    for name, whole in found["stacked"][1].items():
        for i, layer in enumerate(whole):
            apart = found["unrolled"][1][name.replace("layers.", f"layers.{i}.")]
            assert np.abs(apart - layer).max() < close * np.abs(layer).max(), f"{name} of layer {i}"


@pytest.mark.parametrize("layout", ["stacked", "unrolled"])
@pytest.mark.parametrize("name", ["qwen2-untied", "llama-untied-sharded", "llama-bf16"])
def test_decoding_through_the_cache_equals_the_whole(name, layout):
    made, wanted = model(name), reference(name)
    made = cpu.unrolled(made) if layout == "unrolled" else made
    tokens, prompt = wanted["tokens"], 5
    logits, cache = run(made, tokens[:, :prompt], None, made.new_cache(2, 16))
    parts = [logits]
    for t in range(prompt, tokens.shape[1]):
        logits, cache = run(made, tokens[:, t : t + 1], np.full((2, 1), t), cache)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, 1), wanted["logits"], atol=2e-5)


def test_prompts_of_different_lengths_share_a_batch():
    made, wanted = model("qwen2-untied"), reference("qwen2-untied")
    tokens, short = wanted["tokens"].copy(), 7
    tokens[1, short:] = 9  # padding, of any kind
    logits, cache = run(made, tokens, None, made.new_cache(2, 16))
    np.testing.assert_allclose(logits[1, short - 1], wanted["logits"][1, short - 1], atol=1e-5)
    after = np.array([[5], [wanted["tokens"][1, short]]])
    logits, _ = run(made, after, np.array([[12], [short]]), cache)
    np.testing.assert_allclose(logits[1, 0], wanted["logits"][1, short], atol=1e-5)


def test_several_tokens_at_once_onto_a_cache():
    made, wanted = model("llama-tied"), reference("llama-tied")
    _, cache = run(made, wanted["tokens"][:, :4], None, made.new_cache(2, 16))
    positions = np.broadcast_to(np.arange(4, 12), (2, 8))
    logits, _ = run(made, wanted["tokens"][:, 4:], positions, cache)
    np.testing.assert_allclose(logits, wanted["logits"][:, 4:], atol=1e-5)


def test_a_token_sees_nothing_after_it():
    made, tokens = model("llama-tied"), reference("llama-tied")["tokens"].copy()
    before = np.asarray(run(made, tokens))
    tokens[:, 8] = (tokens[:, 8] + 1) % 100
    after = np.asarray(run(made, tokens))
    np.testing.assert_array_equal(before[:, :8], after[:, :8])
    assert np.abs(before - after)[:, 8].max() > 0.1


def gradients(made, tokens):
    graph, params, rest = nnx.split(made, nnx.Param, ...)

    @jax.jit
    def run(params):
        def loss(params):
            logits = nnx.merge(graph, params, rest)(tokens[:, :-1])
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1).mean()

        return jax.value_and_grad(loss)(params)

    loss, grads = run(params)
    return float(loss), {
        jax.tree_util.keystr(path): np.asarray(g) for path, g in jax.tree.leaves_with_path(grads)
    }


@pytest.mark.parametrize("name", ["qwen2-untied", "llama-tied"])
def test_gradient_checkpointing_changes_no_number(name):
    tokens = reference(name)["tokens"]
    plain, again = model(name), model(name)
    again.model.gradient_checkpointing = True
    (loss_a, a), (loss_b, b) = gradients(plain, tokens), gradients(again, tokens)
    assert loss_a == pytest.approx(loss_b, abs=1e-6) and a.keys() == b.keys() and len(a) > 8
    for key in a:
        np.testing.assert_allclose(a[key], b[key], atol=1e-5, err_msg=key)
        assert np.abs(a[key]).max() > 0, key


@pytest.mark.parametrize("name", ["qwen2-untied", "llama-bf16"])
def test_bfloat16_is_close(name):
    wanted = reference(name)
    found = run(model(name, jnp.bfloat16), wanted["tokens"])
    assert found.dtype == jnp.float32
    error = np.abs(np.asarray(found) - wanted["logits"])
    scale = wanted["logits"].std()
    assert error.mean() < 0.05 * scale and error.max() < 0.5 * scale


@pytest.mark.parametrize(
    "left, right", [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "float32")]
)
def test_mixed_precision_einsum_and_its_derivatives(left, right):
    """Multiplied in the narrower dtype, added up in float32; each factor's gradient comes in that factor's dtype."""
    rng = np.random.default_rng(0)
    x, w, g = (rng.normal(size=shape).astype(np.float32) for shape in ((7, 5), (3, 5), (7, 3)))
    found, back = jax.vjp(lambda x, w: kernels.linear(x, w), x.astype(left), w.astype(right))
    dx, dw = back(jnp.asarray(g, found.dtype))
    narrow = "bfloat16" if "bfloat16" in (left, right) else "float32"
    x, w, g = (np.asarray(jnp.asarray(a).astype(narrow).astype(jnp.float32)) for a in (x, w, g))
    assert found.dtype == left
    assert (dx.dtype, dw.dtype) == (left, right)
    for value, wanted in ((found, x @ w.T), (dx, g @ w), (dw, g.T @ x)):
        rounding = 1e-2 if value.dtype == jnp.bfloat16 else 1e-6
        np.testing.assert_allclose(
            np.asarray(value, np.float32), wanted, rtol=rounding, atol=rounding
        )


def test_the_program_does_not_grow_with_depth():
    def lines(layers):
        config = hf_config.read(
            json.loads((checkpoints.folder_of("llama-tied") / "config.json").read_text())
        )
        made = nnx.eval_shape(
            lambda: transformer.Transformer(
                transformer.dataclasses.replace(config, num_hidden_layers=layers), rngs=nnx.Rngs(0)
            )
        )
        graph, state = nnx.split(made)
        run = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))
        return len(run.lower(state, jax.ShapeDtypeStruct((1, 8), jnp.int32)).as_text().splitlines())

    assert lines(2) == lines(12)


def test_paths_are_hugging_faces_names_without_the_layer():
    made = model("llama-bf16")
    found = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(made, nnx.Param))}
    names = checkpoints.stored(checkpoints.folder_of("llama-bf16"))
    assert found == {
        name.replace(".0.", ".") for name in names if ".1." not in name and ".2." not in name
    }


# ------------------------------------------------------------------------------------------------------------- pieces


def test_rms_norm_by_hand():
    x, weight = jnp.array([3.0, 4.0]), jnp.array([1.0, 2.0])
    root = np.sqrt(12.5 + 0.5)
    np.testing.assert_allclose(
        transformer.rms_norm(x, weight, 0.5), [3 / root, 8 / root], rtol=1e-6
    )


def test_rope_keeps_lengths_and_sees_distances_alone():
    config = hf_config.read(checkpoints.folder_of("llama-untied-sharded"))
    rng = np.random.default_rng(0)
    q, k = jnp.asarray(rng.normal(size=(2, 1, 1, 1, config.head_dim)), jnp.float32)

    def score(i, j):
        turned = [
            rope.apply_rope(x, *rope.rope_tables(jnp.array([[at]]), config))
            for x, at in ((q, i), (k, j))
        ]
        np.testing.assert_allclose(jnp.linalg.norm(turned[0]), np.linalg.norm(q), rtol=1e-6)
        return float((turned[0] * turned[1]).sum())

    assert score(0, 0) == pytest.approx(float((q * k).sum()), rel=1e-5)
    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-2


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (5, 1)])
def test_attend_equals_jax(heads, kv_heads):
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(2, 5, n, 8)), jnp.float32) for n in (heads, kv_heads, kv_heads)
    )
    wanted = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    np.testing.assert_allclose(attention.attention(q, k, v), wanted, atol=1e-6)


def test_more_tokens_than_the_context():
    with pytest.raises(CourseError, match="at most 128"):
        model("qwen2-untied")(np.zeros((1, 129), np.int32))


def test_counts_are_those_of_the_arrays():
    for name in NAMES:
        config = hf_config.read(checkpoints.folder_of(name))
        counted = sum(a.size for a in checkpoints.stored(checkpoints.folder_of(name)).values())
        assert config.count_parameters()["total"] == counted
