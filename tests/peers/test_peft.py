"""Adapters to and from the real peft library."""

import json

import numpy as np
import pytest
from flax import nnx

from tests.helpers.checkpoints import ADAPTERS, folder_of, model, reference, run
from utils import lora
from utils.hf import peft, weights

pytestmark = pytest.mark.peers


def with_adapter(model, seed=0, size=0.1, **options):
    """The model with an adapter whose B is not zero, as after training."""
    lora.inject(model, rngs=nnx.Rngs(seed), **options)
    rng, state = np.random.default_rng(seed), lora.adapter(model)
    for arrays in state.values():
        arrays["lora_B"] = rng.normal(0, size, arrays["lora_B"].shape).astype(np.float32)
    lora.set_adapter(model, state)
    return model


CASES = {
    "q and v": ("qwen2-untied", dict(rank=4, alpha=8, target_modules=("q_proj", "v_proj"))),
    "all seven, rank-stabilised": (
        "qwen2-untied",
        dict(rank=3, alpha=5, target_modules=lora.ALL_LINEAR, use_rslora=True),
    ),
    "a layer without, ranks that differ": (
        "llama-bf16",
        dict(rank=[2, 5, 3], alpha=[4, 4, 9], target_modules=lora.ALL_LINEAR, layers=[0, 2]),
    ),
    "a tied model": ("llama-tied", dict(rank=4, alpha=8, target_modules=lora.ALL_LINEAR)),
    "the output layer": (
        "llama-untied-sharded",
        dict(rank=4, alpha=8, target_modules=("q_proj", "lm_head")),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_our_adapter_in_peft(case, tmp_path, peer):
    name, options = CASES[case]
    ours = with_adapter(model(name), **options)
    peft.save(ours, tmp_path / "adapter", base=name)
    tokens = reference(name)["tokens"]
    expected = peer.logits(folder=folder_of(name), adapter=tmp_path / "adapter", tokens=tokens)
    np.testing.assert_allclose(run(ours, tokens), expected, rtol=0, atol=1e-4)
    assert (
        np.abs(expected - reference(name)["logits"]).max() > 0.05
    )  # and it is not simply the base
    lora.merge(ours)
    np.testing.assert_allclose(run(ours, tokens), expected, rtol=0, atol=1e-4)
    weights.save(ours, tmp_path / "merged")
    np.testing.assert_allclose(
        peer.logits(folder=tmp_path / "merged", tokens=tokens), expected, atol=1e-4
    )


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_of_the_fixtures(name, peer):
    tokens = np.random.default_rng(2).integers(0, 150, (2, 30))
    expected = peer.logits(folder=folder_of("qwen2-untied"), adapter=folder_of(name), tokens=tokens)
    ours = peft.load(model("qwen2-untied"), folder_of(name))
    np.testing.assert_allclose(run(ours, tokens), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        dict(r=3, lora_alpha=7, target_modules=["k_proj", "o_proj", "gate_proj"]),
        dict(r=2, lora_alpha=4, target_modules="all-linear"),
        dict(r=4, lora_alpha=8, target_modules=["up_proj"], layers_to_transform=[1]),
        dict(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj"],
            rank_pattern={"layers.0.self_attn.q_proj": 2},
        ),
        dict(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj"],
            alpha_pattern={"layers.0.self_attn.q_proj": 2},
        ),
        dict(r=4, lora_alpha=8, target_modules=r".*layers\.[02]\.mlp\.(up|down)_proj"),
    ],
)
def test_adapters_that_peft_makes_now(options, tmp_path, peer):
    base, tokens = folder_of("qwen2-untied"), reference("qwen2-untied")["tokens"]
    expected = peer.make_adapter(
        folder=base, output=tmp_path / "adapter", tokens=tokens, options=options
    )
    ours = peft.load(model("qwen2-untied"), tmp_path / "adapter")
    np.testing.assert_allclose(run(ours, tokens), expected, rtol=0, atol=1e-4)
    assert np.abs(expected - reference("qwen2-untied")["logits"]).max() > 0.05
    # there and back: what we write of it, peft reads as the same
    peft.save(ours, tmp_path / "again")
    logits = peer.logits(folder=base, adapter=tmp_path / "again", tokens=tokens)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    assert json.loads((tmp_path / "again/adapter_config.json").read_text())["peft_type"] == "LORA"
