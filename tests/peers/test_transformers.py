"""Logits, hidden states and saved folders against transformers itself."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import checkpoints
from tests.helpers.checkpoints import NAMES, folder_of, model, reference, run
from tests.hf import test_gguf
from utils.hf import chat, gguf, weights

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_hidden_states_of_other_tokens(name, peer):
    ours = model(name)
    tokens = np.random.default_rng(1).integers(0, ours.config.vocab_size, (3, 40))
    expected = peer.logits(folder=folder_of(name), tokens=tokens)
    np.testing.assert_allclose(run(ours, tokens), expected, rtol=0, atol=2e-5)
    hidden_states = run(ours, tokens, method="hidden_states")
    expected = peer.hidden_states(folder=folder_of(name), tokens=tokens)
    np.testing.assert_allclose(hidden_states, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_references_are_what_transformers_computes_today(name, peer):
    expected = reference(name)
    logits = peer.logits(folder=folder_of(name), tokens=expected["tokens"])
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("shard_bytes", [5e9, 30_000])
@pytest.mark.parametrize("name", NAMES)
def test_what_we_save_loads_in_transformers_bit_for_bit(name, shard_bytes, tmp_path, peer):
    weights.save(weights.load(folder_of(name)), tmp_path / "out", shard_bytes=shard_bytes)
    saved, original = (
        peer.checkpoint(folder=folder) for folder in (tmp_path / "out", folder_of(name))
    )
    assert saved["dtype"] == original["dtype"]
    assert saved["dtypes"] == original["dtypes"]  # by name, so no tensor is missing and none is new
    for key, stored in original["bytes"].items():
        np.testing.assert_array_equal(saved["bytes"][key], stored, err_msg=key)
    tokens = reference(name)["tokens"]
    logits = [
        peer.logits(folder=folder, tokens=tokens, dtype="auto")
        for folder in (tmp_path / "out", folder_of(name))
    ]
    np.testing.assert_array_equal(*logits)
    assert saved["eos_token_id"] == original["eos_token_id"]


def test_a_saved_folder_has_a_tokenizer_that_transformers_reads(tmp_path, peer):
    tok = chat.Tokenizer.from_folder(folder_of("llama-tied"))
    weights.save(weights.load(folder_of("llama-tied")), tmp_path / "out", tokenizer=tok)
    assert peer.encode(folder=tmp_path / "out", texts=["The cat"]) == [tok.encode("The cat")]


def test_bfloat16_errs_as_little_as_transformers_does(peer):
    name = "qwen2-untied"
    expected = reference(name)
    ours = np.abs(run(model(name, jnp.bfloat16), expected["tokens"]) - expected["logits"])
    logits = peer.logits(folder=folder_of(name), tokens=expected["tokens"], dtype="bfloat16")
    assert ours.mean() < 1.3 * np.abs(logits - expected["logits"]).mean()


# --------------------------------------------------------------------------------------------- GGUF


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
def test_small_gguf_files_give_the_logits_of_transformers(arch, kind, tmp_path, peer):
    scaled = {name: 0.1 * value for name, value in test_gguf.hf_tensors(arch).items()}
    test_gguf.write(tmp_path / "m.gguf", arch, kind, tensors=scaled)
    ours = weights.load(tmp_path / "m.gguf", dtype=jnp.float32)
    tokens = np.random.default_rng(0).integers(0, ours.config.vocab_size, (2, 20))
    expected = peer.logits(folder=tmp_path, gguf_file="m.gguf", tokens=tokens)
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(
        run(ours, tokens), expected, rtol=0, atol=2e-5 * max(1, np.abs(expected).max())
    )


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_the_same_weights_from_a_gguf_file(arch, tied, tmp_path, peer):
    test_gguf.write(tmp_path / "m.gguf", arch, "Q8_0", tied)
    ours = gguf.read(tmp_path / "m.gguf")
    stored = peer.checkpoint(folder=tmp_path, gguf_file="m.gguf", dtype="float32")["bytes"]
    for name in ours.shapes():
        expected = stored[name].view(np.float32)
        np.testing.assert_array_equal(ours.tensor(name), expected, err_msg=name)
    assert set(stored) - set(ours.shapes()) <= ({"lm_head.weight"} if tied else set())


def test_checkpoints_are_named_in_the_readme():
    text = "".join(
        (home / "README.md").read_text() for home in (checkpoints.HOME, checkpoints.MODELS)
    )
    assert all(f"`{name}`" in text for name in (*checkpoints.NAMES, *checkpoints.ADAPTERS))
