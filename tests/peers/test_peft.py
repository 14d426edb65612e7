"""Adapters to and from the real peft library."""

import json

import numpy as np
import peft
import pytest
import torch
from flax import nnx

from tests.helpers.checkpoints import ADAPTERS, HOME, model, reference, run
from tests.peers import originals
from utils import lora
from utils.hf import peft, weights

pytestmark = pytest.mark.parity

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def trained(made, seed=0, size=0.1, **options):
    """`made` with an adapter whose B is not zero, as after training."""
    lora.inject(made, rngs=nnx.Rngs(seed), **options)
    rng, state = np.random.default_rng(seed), lora.adapter(made)
    for arrays in state.values():
        arrays["lora_B"] = rng.normal(0, size, arrays["lora_B"].shape).astype(np.float32)
    lora.set_adapter(made, state)
    return made


def theirs_with(base, adapter):
    return peft.PeftModel.from_pretrained(originals.load(base), adapter).eval()


CASES = {
    "q and v": ("qwen2-untied", dict(rank=4, alpha=8, target_modules=("q_proj", "v_proj"))),
    "all seven, rank-stabilised": ("qwen2-untied", dict(rank=3, alpha=5, target_modules=TARGETS, use_rslora=True)),
    "a layer without, ranks that differ": (
        "llama-bf16",
        dict(rank=[2, 5, 3], alpha=[4, 4, 9], target_modules=TARGETS, num_hidden_layers=[0, 2]),
    ),
    "a tied model": ("llama-tied", dict(rank=4, alpha=8, target_modules=TARGETS)),
    "the output layer": ("llama-untied-sharded", dict(rank=4, alpha=8, target_modules=("q_proj", "lm_head"))),
}


@pytest.mark.parametrize("case", CASES)
def test_our_adapter_in_peft(case, tmp_path):
    name, options = CASES[case]
    made = trained(model(name), **options)
    peft.save(made, tmp_path / "adapter", base=name)
    tokens = reference(name)["tokens"]
    found = originals.logits(theirs_with(HOME / name, tmp_path / "adapter"), tokens)
    np.testing.assert_allclose(run(made, tokens), found, rtol=0, atol=1e-4)
    assert np.abs(found - reference(name)["logits"]).max() > 0.05  # and it is not simply the base
    lora.merge(made)
    np.testing.assert_allclose(run(made, tokens), found, rtol=0, atol=1e-4)
    weights.save(made, tmp_path / "merged")
    np.testing.assert_allclose(originals.logits(originals.load(tmp_path / "merged"), tokens), found, atol=1e-4)


@pytest.mark.parametrize("name", ADAPTERS)
def test_pefts_adapter_live(name):
    tokens = np.random.default_rng(2).integers(0, 150, (2, 30))
    found = originals.logits(theirs_with(HOME / "qwen2-untied", HOME / name), tokens)
    made = peft.load(model("qwen2-untied"), HOME / name)
    np.testing.assert_allclose(run(made, tokens), found, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        dict(r=3, lora_alpha=7, target_modules=["k_proj", "o_proj", "gate_proj"]),
        dict(r=2, lora_alpha=4, target_modules="all-linear"),
        dict(r=4, lora_alpha=8, target_modules=["up_proj"], layers_to_transform=[1]),
        dict(r=4, lora_alpha=8, target_modules=["q_proj"], rank_pattern={"layers.0.self_attn.q_proj": 2}),
        dict(r=4, lora_alpha=8, target_modules=["q_proj"], alpha_pattern={"layers.0.self_attn.q_proj": 2}),
        dict(r=4, lora_alpha=8, target_modules=r".*layers\.[02]\.mlp\.(up|down)_proj"),
    ],
)
def test_adapters_that_peft_makes_now(options, tmp_path):
    torch.manual_seed(0)
    theirs = peft.get_peft_model(
        originals.load(HOME / "qwen2-untied"), peft.LoraConfig(task_type="CAUSAL_LM", **options)
    ).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    tokens = reference("qwen2-untied")["tokens"]
    made = peft.load(model("qwen2-untied"), tmp_path / "adapter")
    found = originals.logits(theirs, tokens)
    np.testing.assert_allclose(run(made, tokens), found, rtol=0, atol=1e-4)
    assert np.abs(found - reference("qwen2-untied")["logits"]).max() > 0.05
    # there and back: what we write of it, peft reads as the same
    peft.save(made, tmp_path / "again")
    np.testing.assert_allclose(
        originals.logits(theirs_with(HOME / "qwen2-untied", tmp_path / "again"), tokens), found, rtol=0, atol=1e-4
    )
    assert json.loads((tmp_path / "again/adapter_config.json").read_text())["peft_type"] == "LORA"
