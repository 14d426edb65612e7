"""Generation: the cache changes the speed and nothing else, and a row is never disturbed by its neighbours."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import checkpoints, tiny
from utils import CourseError, generate, lora
from utils.course import tokenizer
from utils.hf import chat, peft
from utils.kernels import cpu

PROMPTS = ["One day", "The little dog was happy and", "", "Once upon a time there was a"]


def alone(model, prompt: str, new: int) -> str:
    """Greedy, without a cache: the whole text is read again for each token."""
    tok = tiny.tok()
    row = [tok.eot_token, *tok.encode_ordinary(prompt)]
    start = len(row)
    for _ in range(new):
        padded = np.full((1, model.config.max_position_embeddings), tok.eot_token, np.int32)
        padded[0, : len(row)] = row
        row.append(int(jnp.argmax(tiny.forward(model, padded)[0, len(row) - 1])))
        if row[-1] == tok.eot_token:
            row.pop()
            break
    return tok.decode(row[start:])


@pytest.fixture(scope="module")
def model():
    return tiny.wild(max_position_embeddings=64)


def run(model, prompts=PROMPTS, **options):
    """The texts alone."""
    options = dict(max_new_tokens=24, seed=1) | options
    return [one.text for one in generate.generate(model, tiny.tok(), prompts, **options)]


def test_the_cache_gives_the_logits_of_a_whole_pass(model):
    tokens = np.random.default_rng(0).integers(0, 400, (3, 20)).astype(np.int32)
    positions = np.broadcast_to(np.arange(20), tokens.shape)
    logits, cache = tiny.forward(model, tokens[:, :11], positions[:, :11], model.new_cache(3, 32))
    parts = [logits]
    for t in range(11, 20):
        logits, cache = tiny.forward(model, tokens[:, t : t + 1], positions[:, t : t + 1], cache)
        parts.append(logits)
    np.testing.assert_allclose(
        np.concatenate(parts, axis=1), tiny.forward(model, tokens), atol=2e-4
    )


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
    "options",
    [{}, {"temperature": 0}, {"top_k": 7}, {"max_new_tokens": 3}, {"max_new_tokens": None}],
)
def test_the_stream_is_the_text_in_pieces(model, options):
    for prompt in PROMPTS[:2]:
        options = dict(max_new_tokens=30, seed=2) | options
        pieces = list(generate.stream(model, tiny.tok(), prompt, **options))
        assert "".join(pieces) == generate.generate(model, tiny.tok(), [prompt], **options)[0].text
        assert all(pieces)


def test_a_character_cut_between_tokens_is_streamed_whole():
    tok = tokenizer.encoding([bytes([i]) for i in range(256)], "bytes")
    text = "naïve 🎈 día"
    row = generate.Row(generate.TiktokenStream(tok), [], {tok.eot_token})
    pieces = [row.push([i]) for i in tok.encode_ordinary(text)]
    assert "".join(pieces) + row.close("length") == text
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
    row = generate.Row(generate.TiktokenStream(tiny.tok()), [], {tiny.tok().eot_token})
    assert row.push([5, 6, tiny.tok().eot_token, 7]).encode() == tiny.tok().decode_bytes([5, 6])
    assert row.finish_reason == "stop" and row.push([8]) == row.close("length") == ""
    assert row.ids == [5, 6]


def test_generation_fills_the_context_and_no_more(model):
    tok = tiny.tok()
    prompt = "The little dog was happy"
    used = 1 + len(tok.encode_ordinary(prompt))
    room = model.config.max_position_embeddings - used + 1
    assert run(model, [prompt], max_new_tokens=room, seed=1) == run(
        model, [prompt], max_new_tokens=None, seed=1
    )
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
        (dict(top_k=0), "top_k: expected a whole number of at least 1"),
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
    with pytest.raises(
        CourseError,
        match=f"tokenizer other: has {len(ranks) + 1} ids, the model's vocabulary has 400",
    ):
        generate.generate(model, other, ["One day"])


# ------------------------------------------------------------------------------------------------- Qwen2 and Llama


ASKED = {
    "qwen2-untied": ["The cat sat on the mat", "One day a red bird came to see", "A dog"],
    "llama-tied": [
        "The cat sat on the mat",
        "One day a red bird came to see",
        "",
    ],  # its tokenizer begins each text with bos
}


@functools.cache
def spoken(name: str):
    return checkpoints.model(name), chat.Tokenizer.from_folder(checkpoints.folder_of(name))


def speak(name: str, prompts=None, *, model=None, tok=None, **options):
    made, its_tok = spoken(name)
    options = dict(max_new_tokens=20, temperature=0) | options
    return [
        one.text
        for one in generate.generate(
            model or made, tok or its_tok, prompts or ASKED[name], **options
        )
    ]


class Recorder:
    """A tokenizer that keeps the ids which generation decodes, row by row."""

    def __init__(self, tok):
        self.tok, self.rows = tok, []
        self.name, self.n_vocab, self.stop_ids, self.encode = (
            tok.name,
            tok.n_vocab,
            frozenset(),
            tok.encode,
        )

    def stream(self):
        self.rows.append([])
        return RecordedStream(self.tok.stream(), self.rows[-1])


class RecordedStream:
    def __init__(self, stream, ids):
        self.stream, self.ids, self.flush = stream, ids, stream.flush

    def push(self, ids):
        self.ids += ids
        return self.stream.push(ids)


def ids_of(name: str, prompts=None, *, model=None, **options) -> list[list[int]]:
    """The new token ids of each row; nothing ends a row before its time."""
    tok = Recorder(spoken(name)[1])
    speak(name, prompts, model=model, tok=tok, **options)
    return tok.rows


def read_again(name: str, ids: list[int], new: int, penalty: float = 1.0) -> list[int]:
    """Greedy without a cache, the whole text read for each token; the penalty in NumPy."""
    made, tok = spoken(name)
    ids, start = list(ids), len(ids)
    for _ in range(new):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(ids)] = ids
        logits = np.array(checkpoints.run(made, padded)[0, len(ids) - 1])[: tok.n_vocab]
        for token in set(ids):
            logits[token] = (
                logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
            )
        ids.append(int(np.argmax(logits)))
    return ids[start:]


@pytest.mark.parametrize("name", checkpoints.SPOKEN)
def test_greedy_is_what_transformers_says(name):
    texts, reference = checkpoints.texts(name), checkpoints.reference(name)
    _, tok = spoken(name)
    assert [tok.encode(prompt) for prompt in texts["prompts"]] == reference["tokens"].tolist()
    assert ids_of(name, texts["prompts"], max_new_tokens=12) == reference["greedy"].tolist()
    assert speak(name, texts["prompts"], max_new_tokens=12) == texts["greedy"]


@pytest.mark.parametrize("name", checkpoints.SPOKEN)
def test_a_batch_of_unequal_prompts_equals_each_alone_and_without_a_cache(name):
    together = ids_of(name)
    assert len({len(spoken(name)[1].encode(prompt)) for prompt in ASKED[name]}) == 3
    assert together == [ids_of(name, [prompt])[0] for prompt in ASKED[name]]
    assert together == [
        read_again(name, spoken(name)[1].encode(prompt), 20) for prompt in ASKED[name]
    ]


@pytest.mark.parametrize("penalty", [1.3, 0.7])
@pytest.mark.parametrize("name", checkpoints.SPOKEN)
def test_the_repetition_penalty_is_the_one_of_numpy(name, penalty):
    found = ids_of(name, repetition_penalty=penalty)
    assert found == [
        read_again(name, spoken(name)[1].encode(prompt), 20, penalty) for prompt in ASKED[name]
    ]
    assert found != ids_of(name)


def test_a_penalty_makes_seen_tokens_less_likely_whatever_their_sign():
    logits = jnp.array([[3.0, -3.0, 0.5]])
    found = generate.penalise(logits, jnp.array([[True, True, False]]), 1.5)
    np.testing.assert_allclose(found, [[2.0, -4.5, 0.5]])


@pytest.mark.parametrize(
    "options",
    [dict(temperature=0), dict(temperature=3.0), dict(temperature=1.0, top_p=0.5), dict(top_k=3)],
)
def test_padded_rows_of_the_vocabulary_are_never_sampled(options):
    name = "qwen2-untied"
    made, tok = checkpoints.model(name), spoken(name)[1]
    assert tok.n_vocab < made.config.vocab_size
    weight = made.lm_head.weight[...]
    made.lm_head.weight[...] = weight.at[tok.n_vocab :].set(1e4 * weight[tok.n_vocab :])
    prompt = jnp.array([tok.encode(ASKED[name][0])])
    assert int(jnp.argmax(checkpoints.run(made, prompt)[0], axis=-1).max()) >= tok.n_vocab, (
        "they would win"
    )
    rows = ids_of(name, model=made, max_new_tokens=40, **(dict(temperature=1.0, seed=7) | options))
    assert all(len(row) == 40 and max(row) < tok.n_vocab for row in rows)


@pytest.mark.parametrize("name", checkpoints.SPOKEN)
def test_a_stop_string_that_lies_across_tokens(name):
    full = speak(name, tok=Recorder(spoken(name)[1]))[0]
    pieces = [spoken(name)[1].decode([i]) for i in ids_of(name)[0]]
    stop = next(
        s
        for i in range(3, len(full) - 3)
        if not any((s := full[i : i + 3]) in piece for piece in pieces)
    )
    assert speak(name, [ASKED[name][0]], stop=[stop])[0] == full[: full.index(stop)]
    streamed = list(
        generate.stream(
            *spoken(name), ASKED[name][0], 20, temperature=0, stop=[stop, "never in it \N{SNOWMAN}"]
        )
    )
    assert "".join(streamed) == full[: full.index(stop)]
    earlier = full[1:3]
    assert (
        speak(name, [ASKED[name][0]], stop=(stop, earlier))[0]
        == full[: min(full.index(stop), full.index(earlier))]
    )


def test_a_stop_token_ends_its_own_row_alone():
    name = "qwen2-untied"
    rows, tok = ids_of(name), spoken(name)[1]
    end = rows[0][5]
    found = speak(name, stop=[end, "never in it \N{SNOWMAN}"])
    assert found[0] == tok.decode(rows[0][: rows[0].index(end)])
    for text, row in zip(found[1:], rows[1:]):
        assert text == tok.decode(row[: row.index(end)] if end in row else row)
    assert speak(name, [ASKED[name][0]], stop=[rows[0][0]]) == [""], "at the first token already"


def test_the_tokenizers_own_end_is_not_returned():
    name = "qwen2-untied"
    rows, tok = ids_of(name), spoken(name)[1]
    ending = Recorder(tok)
    ending.stop_ids = frozenset({rows[0][4]})
    assert speak(name, [ASKED[name][0]], tok=ending) == [
        tok.decode(rows[0][: rows[0].index(rows[0][4])])
    ]


@pytest.mark.parametrize("name", checkpoints.SPOKEN)
def test_seeds_of_a_real_model(name):
    dials = dict(temperature=1.0, top_p=0.95)
    first = speak(name, seed=11, **dials)
    assert first == speak(name, seed=11, **dials) != speak(name, seed=12, **dials)
    prompts = [ASKED[name][0], "another neighbour", "and one more"]
    assert speak(name, prompts, seed=11, **dials)[0] == first[0]
    assert len(set(speak(name, [prompts[0]] * 3, seed=11, **dials))) == 3


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(repetition_penalty=1.2),
        dict(temperature=0.9, top_k=20, seed=4),
        dict(max_new_tokens=None),
    ],
)
def test_the_stream_of_a_real_model_is_the_text_in_pieces(options):
    name = "llama-tied"
    options = dict(max_new_tokens=40, temperature=0) | options
    pieces = list(generate.stream(*spoken(name), ASKED[name][1], **options))
    assert all(pieces) and "".join(pieces) == speak(name, [ASKED[name][1]], **options)[0]


@pytest.mark.parametrize("name", checkpoints.SPOKEN)
def test_prepared_equals_not_prepared_and_does_not_follow_the_model(name):
    made = checkpoints.model(name)
    ready = generate.prepare(made)
    assert generate.prepare(ready) is ready
    expected = speak(name)
    assert speak(name, model=ready) == expected
    made.model.norm.weight[...] = -made.model.norm.weight[...]
    assert speak(name, model=ready) == expected != speak(name, model=made)


def test_a_few_rows_of_bfloat16_are_decoded_packed_many_are_not_and_one_layout_is_kept():
    ready = generate.prepare(checkpoints.model("llama-tied", "bfloat16"))
    few, layout = ready.decode(1)
    assert layout == "packed" and ready.decode(8)[0] is few
    many, layout = ready.decode(9)
    assert layout == "unrolled" and ready.decode(100)[0] is many
    kinds = [{leaf.dtype.name for leaf in jax.tree.leaves(state)} for _, state in (few, many)]
    assert "uint32" in kinds[0] and "uint32" not in kinds[1]
    assert (
        generate.prepare(checkpoints.model("llama-tied")).decode(1)[1] == "unrolled"
    )  # float32: XLA's own products
    assert generate.prepare(tiny.model()).decode(1)[1] == "stacked"
    # And back: the same text as from a model that was prepared anew.
    anew = generate.prepare(checkpoints.model("llama-tied", "bfloat16"))
    assert speak("llama-tied", model=ready) == speak("llama-tied", model=anew)


@pytest.mark.parametrize("rows", [1, 8])
def test_packed_weights_are_not_unpacked_in_front_of_the_loop_of_steps(rows):
    """XLA would make float32 copies of all of them in front of the loop: twice the bytes to read, in each step."""
    (graph, state), layout = generate.prepare(checkpoints.model("llama-tied", "bfloat16")).decode(
        rows
    )
    cache = generate.nnx.merge(graph, state).new_cache(rows, 8)
    zeros = jnp.zeros(rows, jnp.int32)
    keys = jax.random.split(jax.random.key(0), rows)
    sampling = {
        "temperature": np.float32(1),
        "penalty": np.float32(1),
        "top_k": None,
        "top_p": None,
    }
    options = dict(n_vocab=150, greedy=True, max_top_k=None)
    first = generate._State(cache, zeros, zeros, None)
    program = (
        generate.jitted_decode(layout)
        .lower(graph, state, first, keys, sampling, **options)
        .compile()
    )
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.uint32)
    assert program.memory_analysis().temp_size_in_bytes < weights


def test_greedy_takes_the_first_of_the_largest():
    logits = jnp.array(
        [[0, 3, 3, 1], [-jnp.inf, -jnp.inf, -2, -jnp.inf], [5, 1, 5, 5]], jnp.float32
    )
    assert (
        generate.sample(logits, None, greedy=True).tolist()
        == [1, 2, 0]
        == logits.argmax(-1).tolist()
    )


@pytest.mark.parametrize("name", checkpoints.NAMES)
def test_the_layout_for_decoding_gives_the_same_logits(name):
    made = checkpoints.model(name)
    unrolled = cpu.unrolled(made)
    tokens = checkpoints.reference(name)["tokens"]
    positions = np.broadcast_to(np.arange(12), tokens.shape)
    expected = checkpoints.reference(name)["logits"]
    for each in (made, unrolled):
        logits, cache = checkpoints.run(each, tokens[:, :7], None, each.new_cache(2, 16))
        parts = [logits]
        for t in range(7, 12):
            logits, cache = checkpoints.run(
                each, tokens[:, t : t + 1], positions[:, t : t + 1], cache
            )
            parts.append(logits)
        np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", checkpoints.NAMES)
def test_the_bytes_of_a_cache_are_those_of_the_cache(name):
    made = checkpoints.model(name)
    for each in (made, cpu.unrolled(made)):
        leaves = jax.tree.leaves(each.new_cache(3, 40))
        expected = generate.cache_bytes(made.config, 3, 40, leaves[0].dtype)
        assert sum(leaf.nbytes for leaf in leaves) == expected


def test_a_cache_that_cannot_fit_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(generate, "_free_memory", lambda: 1000)
    with pytest.raises(
        CourseError,
        match=r"^KV cache: 3 rows of \d+ tokens.*fewer prompts at once, or fewer new tokens",
    ) as error:
        speak("llama-tied")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("stop", [(), ("stop token",), ("stop string",)])
def test_a_completion_says_its_ids_and_why_it_ended(stop):
    name = "qwen2-untied"
    made, tok = spoken(name)
    prompt, options = [ASKED[name][0]], dict(temperature=0, max_new_tokens=20)
    free = generate.generate(made, Recorder(tok), prompt, **options)[0]
    assert (
        free.finish_reason == "length" and len(free.ids) == 20 and free.text == tok.decode(free.ids)
    )
    if stop == ("stop token",):
        end = free.ids[5]
        one = generate.generate(made, tok, prompt, stop=[end], **options)[0]
        assert one.finish_reason == "stop" and one.ids == free.ids[: free.ids.index(end)]
    elif stop:
        text = free.text[4:7]
        one = generate.generate(made, tok, prompt, stop=[text], **options)[0]
        assert one.finish_reason == "stop" and one.text == free.text[: free.text.index(text)]
        assert one.ids == free.ids[: len(one.ids)] and text in tok.decode(one.ids)


def test_another_temperature_top_k_or_top_p_compiles_nothing_anew(model):
    run(model, temperature=0.7, top_k=5, top_p=0.9)
    decode = generate.jitted_decode("stacked")
    before = decode._cache_size()
    for options in (dict(temperature=0.9), dict(top_k=6), dict(top_k=8), dict(top_p=0.5)):
        run(model, **(dict(temperature=0.7, top_k=5, top_p=0.9) | options))
    assert decode._cache_size() == before


def test_traced_sampling_equals_static_sampling():
    logits = jax.random.normal(jax.random.key(3), (4, 50))
    keys = jax.random.split(jax.random.key(4), 4)
    traced = jax.jit(generate.sample, static_argnames="max_top_k")
    for top_k, top_p in ((1, 0.9), (5, 0.3), (7, 1.0), (50, 0.01)):
        expected = generate.sample(logits, keys, 0.8, top_k=top_k, top_p=top_p)
        for bound in (None, 64):
            assert (
                traced(logits, keys, 0.8, top_k=top_k, top_p=top_p, max_top_k=bound).tolist()
                == expected.tolist()
            )


def test_an_adapter_speaks_and_merged_says_the_same():
    name = "qwen2-untied"
    made = peft.load(checkpoints.model(name), checkpoints.folder_of("peft-adapter"))
    adapted = speak(name, model=made)
    assert adapted != speak(name)
    assert speak(name, model=lora.merge(made)) == adapted


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(temperature=-0.1), "temperature: expected 0"),
        (dict(temperature="hot"), "temperature: expected 0"),
        (dict(temperature=float("inf")), "temperature: expected 0"),
        (dict(top_k=0), "top_k: expected a whole number of at least 1"),
        (dict(top_k=2.5), "top_k: expected a whole number of at least 1"),
        (dict(top_p=0), "top_p: expected a probability"),
        (dict(top_p="0.9"), "top_p: expected a probability"),
        (dict(top_p=float("nan")), "top_p: expected a probability"),
        (dict(repetition_penalty=0), "repetition_penalty: expected a number above 0"),
        (dict(repetition_penalty=float("nan")), "repetition_penalty: expected a number above 0"),
        (dict(repetition_penalty="1.1"), "repetition_penalty: expected a number above 0"),
        (dict(stop="</s>"), "stop: expected a list"),
        (dict(stop=[""]), "stop: expected a list"),
        (dict(stop=[1.5]), "stop: expected a list"),
        (dict(stop=5), "stop: expected a list"),
        (dict(stop=None), "stop: expected a list"),
        (dict(seed=1.5), "seed: expected a whole number of 32 bits"),
        (dict(seed=2**32), "seed: expected a whole number of 32 bits"),
        (dict(max_new_tokens=0), "max_new_tokens: expected 1 to"),
        (dict(max_new_tokens=2.5), "max_new_tokens: expected 1 to"),
        (dict(max_new_tokens=129), "max_new_tokens: expected 1 to"),
        (dict(prompts=["A dog", ""]), "prompts: expected some text in each, found ''"),
        (dict(prompts=["bird " * 200]), "the model's context is 128: shorten the prompt"),
        (dict(prompts=["A dog", 7]), "prompts: expected a list"),
    ],
)
def test_bad_options_for_a_real_model_are_one_clear_line(change, message):
    with pytest.raises(CourseError, match=message) as error:
        speak("qwen2-untied", **change)
    assert "\n" not in str(error.value)


def test_a_tokenizer_with_more_words_than_the_model_is_refused():
    made, tok = spoken("llama-tied")
    larger = Recorder(tok)
    larger.n_vocab = made.config.vocab_size + 1
    with pytest.raises(CourseError, match="use the tokenizer that the model was trained with"):
        speak("llama-tied", tok=larger)
