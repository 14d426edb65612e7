"""Logits, hidden states and saved folders against transformers itself."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from tests import test_gguf
from tests.helpers import checkpoints
from tests.helpers.checkpoints import HOME, NAMES, model, reference, run
from tests.peers import originals
from utils.hf import weights

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("name", NAMES)
def test_fixtures_live(name):
    theirs = originals.load(HOME / name)
    tokens = np.random.default_rng(1).integers(0, theirs.config.vocab_size, (3, 40))
    ours = model(name)
    np.testing.assert_allclose(run(ours, tokens), originals.logits(theirs, tokens), rtol=0, atol=2e-5)
    found = run(ours, tokens, method="hidden_states")
    np.testing.assert_allclose(found, originals.hidden_states(theirs, tokens), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_references_are_what_transformers_says_today(name):
    wanted = reference(name)
    theirs = originals.load(HOME / name)
    np.testing.assert_allclose(originals.logits(theirs, wanted["tokens"]), wanted["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("shard_bytes", [5e9, 30_000])
@pytest.mark.parametrize("name", NAMES)
def test_what_we_save_loads_in_transformers_bit_for_bit(name, shard_bytes, tmp_path):
    weights.save(weights.load(HOME / name), tmp_path / "out", shard_bytes=shard_bytes)
    theirs, before = (originals.load(folder, dtype="auto") for folder in (tmp_path / "out", HOME / name))
    assert theirs.config.dtype == before.config.dtype
    after, wanted = theirs.state_dict(), before.state_dict()
    assert after.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert after[key].dtype == tensor.dtype, key
        assert torch.equal(after[key].view(torch.uint8), tensor.view(torch.uint8)), key
    tokens = reference(name)["tokens"]
    np.testing.assert_array_equal(originals.logits(theirs, tokens), originals.logits(before, tokens))
    assert theirs.generation_config.eos_token_id == before.generation_config.eos_token_id


def test_a_saved_folder_has_a_tokenizer_that_transformers_reads(tmp_path):
    from utils.hf import chat

    tok = chat.Tokenizer.from_folder(HOME / "llama-tied")
    weights.save(weights.load(HOME / "llama-tied"), tmp_path / "out", tokenizer=tok)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("The cat").input_ids == tok.encode("The cat")


def test_bfloat16_errs_as_little_as_transformers_does():
    name = "qwen2-untied"
    wanted = reference(name)
    ours = np.abs(run(model(name, jnp.bfloat16), wanted["tokens"]) - wanted["logits"])
    theirs = originals.load(HOME / name, dtype=torch.bfloat16)
    theirs = np.abs(originals.logits(theirs, wanted["tokens"]) - wanted["logits"])
    assert ours.mean() < 1.3 * theirs.mean()


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
def test_small_gguf_files_give_the_logits_of_transformers(arch, kind, tmp_path):
    scaled = {name: 0.1 * value for name, value in test_gguf.hf_tensors(arch).items()}
    test_gguf.write(tmp_path / "m.gguf", arch, kind, tensors=scaled)
    theirs = originals.load(tmp_path, gguf_file="m.gguf")
    ours = weights.load(tmp_path / "m.gguf", dtype=jnp.float32)
    tokens = np.random.default_rng(0).integers(0, ours.config.vocab_size, (2, 20))
    wanted = originals.logits(theirs, tokens)
    assert np.abs(wanted).max() > 0.01
    np.testing.assert_allclose(run(ours, tokens), wanted, rtol=0, atol=2e-5 * max(1, np.abs(wanted).max()))


def test_checkpoints_are_named_in_the_readme():
    text = (HOME / "README.md").read_text()
    assert all(f"`{name}`" in text for name in (*checkpoints.NAMES, *checkpoints.ADAPTERS))
