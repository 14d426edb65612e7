"""Generation: the cache changes the speed and nothing else, and a row is never disturbed by its neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from utils import CourseError, generate, tokenizer

PROMPTS = ["One day", "The little dog was happy and", "", "Once upon a time there was a"]


def alone(model, prompt: str, new: int) -> str:
    """Greedy, without a cache: the whole text is read again for each token."""
    tok = tiny.tok()
    row = [tok.eot_token, *tok.encode_ordinary(prompt)]
    start = len(row)
    for _ in range(new):
        padded = np.full((1, model.config.context), tok.eot_token, np.int32)
        padded[0, : len(row)] = row
        row.append(int(jnp.argmax(tiny.forward(model, padded)[0, len(row) - 1])))
        if row[-1] == tok.eot_token:
            row.pop()
            break
    return tok.decode(row[start:])


@pytest.fixture(scope="module")
def model():
    return tiny.wild(context=64)


def run(model, prompts=PROMPTS, **options):
    return generate.generate(model, tiny.tok(), prompts, **(dict(max_new_tokens=24, seed=1) | options))


def test_the_cache_gives_the_logits_of_a_whole_pass(model):
    tokens = np.random.default_rng(0).integers(0, 400, (3, 20)).astype(np.int32)
    positions = np.broadcast_to(np.arange(20), tokens.shape)
    logits, cache = tiny.forward(model, tokens[:, :11], positions[:, :11], model.new_cache(3, 32))
    parts = [logits]
    for t in range(11, 20):
        logits, cache = tiny.forward(model, tokens[:, t : t + 1], positions[:, t : t + 1], cache)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), tiny.forward(model, tokens), atol=2e-4)


def test_greedy_with_the_cache_equals_greedy_without(model):
    assert run(model, temperature=0) == [alone(model, prompt, 24) for prompt in PROMPTS]


def test_greedy_looks_at_no_seed(model):
    assert run(model, temperature=0, seed=1) == run(model, temperature=0, seed=2)


def test_a_batch_of_unequal_prompts_equals_each_alone(model):
    together = run(model, temperature=0)
    assert together == [run(model, [prompt], temperature=0)[0] for prompt in PROMPTS]
    # Sampled too: a row's draws depend on the seed and its own place in the list, not on what stands beside it.
    sampled = run(model, seed=5)
    assert run(model, [PROMPTS[0], "A", "", "The dog and the cat"], seed=5)[0] == sampled[0]
    assert run(model, ["", PROMPTS[1]], seed=5)[1] == sampled[1]


def test_the_seed_decides(model):
    assert run(model, seed=3) == run(model, seed=3)
    assert run(model, seed=3) != run(model, seed=4)
    same = run(model, ["The"] * 3, seed=3)
    assert len(set(same)) == 3, "three rows with one prompt must draw differently"


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0}, {"top_k": 7}, {"max_new_tokens": 3}, {"max_new_tokens": None}]
)
def test_the_stream_is_the_text_in_pieces(model, options):
    for prompt in PROMPTS[:2]:
        options = dict(max_new_tokens=30, seed=2) | options
        pieces = list(generate.stream(model, tiny.tok(), prompt, **options))
        assert "".join(pieces) == generate.generate(model, tiny.tok(), [prompt], **options)[0]
        assert all(pieces)


def test_a_character_cut_between_tokens_is_streamed_whole():
    tok = tokenizer.encoding([bytes([i]) for i in range(256)], "bytes")
    text = "naïve 🎈 día"
    row = generate._Row(generate._Bytes(tok), [], {tok.eot_token})
    pieces = [row.push([i]) for i in tok.encode_ordinary(text)]
    assert "".join(pieces) + row.close() == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


def test_top_k_of_one_is_greedy(model):
    assert run(model, top_k=1) == run(model, temperature=0)


def test_a_tiny_top_p_is_greedy_and_a_full_one_changes_nothing(model):
    assert run(model, top_p=1e-6) == run(model, temperature=0)
    assert run(model, top_p=1.0) == run(model)


def draws(n=4000, **options):
    logits = jnp.log(jnp.array([0.5, 0.25, 0.15, 0.1]))
    keys = jax.random.split(jax.random.key(0), n)
    found = generate.sample(jnp.broadcast_to(logits, (n, 4)), keys, **options)
    return np.bincount(found, minlength=4) / n


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [0.5, 0.25, 0.15, 0.1]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_k": 99}, [0.5, 0.25, 0.15, 0.1]),
        ({"top_p": 0.7}, [2 / 3, 1 / 3, 0, 0]),  # 0.5 is not enough, 0.75 is
        ({"top_p": 0.76}, [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0]),
        ({"temperature": 0.5}, np.array([0.25, 0.0625, 0.0225, 0.01]) / 0.345),
        ({"temperature": 0.5, "top_p": 0.7}, [1, 0, 0, 0]),  # 0.72 after the temperature
    ],
)
def test_sampling_follows_the_distribution_it_says(options, expected):
    np.testing.assert_allclose(draws(**options), expected, atol=0.03)


def test_text_ends_at_the_end_of_text_token():
    model = tiny.wild()
    # The token after "end of text" is made the most likely one everywhere, so every story is empty.
    model.norm.scale[...] = jnp.zeros_like(model.norm.scale[...])
    assert len(set(run(model, ["One day"], temperature=0, max_new_tokens=4)[0])) <= 2
    table = model.embed_tokens.embedding[...]
    model.norm.scale[...] = jnp.ones_like(model.norm.scale[...])
    model.embed_tokens.embedding[...] = table.at[tiny.tok().eot_token].set(0)
    row = generate._Row(generate._Bytes(tiny.tok()), [], {tiny.tok().eot_token})
    assert row.push([5, 6, tiny.tok().eot_token, 7]).encode() == tiny.tok().decode_bytes([5, 6])
    assert row.done and row.push([8]) == row.close() == ""


def test_generation_fills_the_context_and_no_more(model):
    tok = tiny.tok()
    prompt = "The little dog was happy"
    used = 1 + len(tok.encode_ordinary(prompt))
    room = model.config.context - used + 1
    assert run(model, [prompt], max_new_tokens=room, seed=1) == run(model, [prompt], max_new_tokens=None, seed=1)
    with pytest.raises(CourseError, match=f"max_new_tokens: expected 1 to {room} "):
        run(model, [prompt], max_new_tokens=room + 1)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(prompts=["the " * 200]), "the model's context is 64: shorten the prompt"),
        (dict(prompts="One day"), "prompts: expected a list"),
        (dict(prompts=[]), "prompts: expected a list"),
        (dict(temperature=-1.0), "temperature: expected 0"),
        (dict(temperature=float("nan")), "temperature: expected 0"),
        (dict(top_k=0), "top_k: expected at least 1"),
        (dict(top_p=0.0), "top_p: expected a probability"),
        (dict(top_p=1.5), "top_p: expected a probability"),
        (dict(max_new_tokens=0), "max_new_tokens: expected 1 to"),
    ],
)
def test_bad_input_is_one_clear_line(model, change, message):
    with pytest.raises(CourseError, match=message) as error:
        run(model, **change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [300, 500])
def test_a_tokenizer_of_another_size_is_refused(model, size):
    ranks = tokenizer.train_bpe(tiny.texts(), size)
    other = tokenizer.encoding(ranks, "other")
    with pytest.raises(CourseError, match=f"tokenizer other: has {len(ranks) + 1} ids, the model's vocabulary has 400"):
        generate.generate(model, other, ["One day"])
