"""Real weights: SmolLM2-135M-Instruct against transformers. Takes minutes on two cores."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from tests.helpers.checkpoints import run
from tests.peers import originals
from tests.peers.test_peft import theirs_with, trained
from utils import generate, lora
from utils.hf import hub, peft, weights

pytestmark = [pytest.mark.parity, pytest.mark.slow]

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
NEW = 128


@pytest.fixture(scope="module")
def ours(smollm2):
    return weights.load(smollm2, dtype=jnp.float32)


@pytest.fixture(scope="module")
def theirs(smollm2):
    return originals.load(smollm2)


@pytest.fixture(scope="module")
def tok(smollm2):
    return hub.tokenizer(smollm2)


def test_logits(ours, theirs, tok):
    for text in TEXTS:
        ids = np.array([tok.encode(text)])
        wanted = originals.logits(theirs, ids)
        found = np.asarray(run(ours, ids))
        assert np.abs(wanted).max() > 10
        np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-4, err_msg=text)


def test_hidden_states(ours, theirs, tok):
    ids = np.array([tok.encode(TEXTS[0])])
    found, wanted = run(ours, ids, method="hidden_states"), originals.hidden_states(theirs, ids)
    for layer, (a, b) in enumerate(zip(np.asarray(found), wanted)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3, err_msg=f"hidden state {layer}")


def greedy_ids(model, tok, prompts):
    """The tokens behind `generate`'s texts; an answer that ends early stops there."""
    rows = [[] for _ in prompts]
    decoders = iter(rows)

    class Noting:
        def __init__(self, inner, row):
            self.inner, self.row = inner, row

        def push(self, ids):
            self.row.extend(ids)
            return self.inner.push(ids)

        def flush(self):
            return self.inner.flush()

    class Watched:
        def __getattr__(self, name):
            return getattr(tok, name)

        def stream(self):
            return Noting(tok.stream(), next(decoders))

    texts = generate.generate(model, Watched(), prompts, NEW, temperature=0)
    return rows, texts


def test_128_greedy_tokens_on_10_prompts(ours, theirs, tok):
    """Ours are made in one batch of prompts of unequal lengths. A text is greedy when each token of it is the likeliest
    after those before it: so transformers needs one pass over each text, where it would need 128 to write it itself."""
    prompts = [tok.chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    rows, texts = greedy_ids(ours, tok, prompts)
    long = 0
    for prompt, row, text in zip(prompts, rows, texts):
        start = tok.encode(prompt)
        logits = originals.logits(theirs, [start + row])[0]
        after = logits[len(start) - 1 : len(start) + len(row)]
        np.testing.assert_array_equal(after[: len(row)].argmax(-1), row, err_msg=prompt)
        long += len(row) == NEW
        if len(row) < NEW:  # it ended because the likeliest token ends an answer
            assert int(after[len(row)].argmax()) in tok.stop_ids, prompt
        assert text == tok.decode(row)
    assert long >= 4


def test_transformers_own_generate_writes_the_same(ours, theirs, tok):
    prompt = tok.chat([{"role": "user", "content": QUESTIONS[1]}])
    ids = torch.tensor([tok.encode(prompt)])
    wanted = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    (row,), _ = greedy_ids(ours, tok, [prompt])
    wanted = wanted[0, ids.shape[1] :].tolist()
    assert [i for i in wanted if i not in tok.stop_ids] == row


def test_the_gguf_file_gives_the_logits_of_transformers_reading_it(smollm2_gguf, tok):
    theirs = originals.load(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    made = weights.load(smollm2_gguf)
    for text in TEXTS[:2]:
        ids = np.array([tok.encode(text)])
        np.testing.assert_allclose(run(made, ids), originals.logits(theirs, ids), rtol=0, atol=5e-4, err_msg=text)


def test_saved_again_transformers_reads_every_bit(ours, theirs, tok, tmp_path):
    weights.save(ours, tmp_path / "out", tokenizer=tok, shard_bytes=2e8)
    assert len(list(tmp_path.glob("out/*.safetensors"))) > 2
    again = originals.load(tmp_path / "out").state_dict()
    wanted = theirs.state_dict()
    assert again.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(again[key].view(torch.uint8), tensor.view(torch.uint8)), key
    their_tok = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert their_tok(TEXTS[0]).input_ids == tok.encode(TEXTS[0])


def test_an_adapter_of_the_real_model_in_peft(ours, theirs, smollm2, tok, tmp_path):
    made = trained(nnx.clone(ours), size=0.02, rank=8, alpha=16, target_modules=("q_proj", "v_proj", "down_proj"))
    peft.save(made, tmp_path / "adapter", base=hub.SMOLLM2)
    ids = np.array([tok.encode(TEXTS[0])])
    base = originals.logits(theirs, ids)
    wanted = originals.logits(theirs_with(smollm2, tmp_path / "adapter"), ids)
    assert np.abs(wanted - base).max() > 0.5
    lora.merge(made)
    found = np.asarray(run(made, ids))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == hub.SMOLLM2
