"""The real TPU compiler on R1's training step: every chip the course names, the bytes it promises, the messages it explains.

Half a minute to a minute each on two quiet cores. No weights and no TPU are needed: `make test-tpu`.
"""

import functools
import json

import pytest

from utils import CourseError, transformer
from utils.commands import plan
from utils.__main__ import main

pytestmark = pytest.mark.tpu

R1 = {  # DeepSeek-R1-Distill-Qwen-1.5B
    "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "intermediate_size": 8960, "max_position_embeddings": 131072, "rope_theta": 10000,
    "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
SMALL = R1 | {"vocab_size": 2048, "hidden_size": 384, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 32}


@functools.cache
def made(topology: str, batch: int, seq: int, tp: int = 1) -> plan.Plan:
    return plan.compile_for(topology, transformer.Config.from_hf(R1), batch_size=batch, seq_len=seq, tp=tp)


def small(topology: str, **options) -> plan.Plan:
    return plan.compile_for(
        topology, transformer.Config.from_hf(SMALL), **({"batch": 8, "seq": 128, "rank": 4} | options)
    )


# Where the promise names a batch, that batch. v5e-8 also as fsdp 4 x tp 2, and as 2 x 4, over which 2 key/value heads do not
# divide.
SIZES = [
    ("v2-8", 8, 1024, 1),
    ("v5e-1", 1, 1024, 1),
    ("v5e-4", 8, 2048, 1),
    ("v5e-8", 16, 2048, 1),
    ("v5e-8", 16, 2048, 2),
    ("v5e-8", 8, 2048, 4),
    ("v5p-8", 16, 2048, 1),
    ("v6e-8", 16, 2048, 1),
]


@pytest.mark.parametrize("topology, batch, seq, tp", SIZES)
def test_r1_compiles_and_fits(topology, batch, seq, tp):
    found = made(topology, batch, seq, tp)
    b = found.bytes_per_chip
    assert found.fits and b["peak"] == b["arguments"] + b["temporaries"] + b["outputs"] < found.memory_per_chip
    assert found.rematerialised == 0, "an activation is copied whole to every chip: constrain it"
    assert found.seconds["bound"] == max(found.seconds["compute"], found.seconds["memory"]) > 0
    chips = found.fsdp * found.tp
    assert chips == {"v5e-1": 1, "v5e-4": 4, "v5p-8": 4}.get(topology, 8)
    # 18.5 M numbers of the adapter three times in float32; those along neither axis of the mesh are on every chip.
    adapter = b["arguments"] - found.weights_per_chip
    assert 0.99 * 12 * 18.46e6 / chips < adapter < 1.01 * 12 * 18.46e6
    assert bool(found.collectives) == (chips > 1)


def test_more_fsdp_divides_the_weights():
    """1.777 B numbers in bfloat16, 3.55 GB; norms and biases, which are on every chip, are a thousandth of them."""
    one, four, eight = (made(*size) for size in (SIZES[1], SIZES[2], SIZES[3]))
    assert one.weights_per_chip == pytest.approx(2 * 1.777e9, rel=1e-3)
    assert four.weights_per_chip == pytest.approx(one.weights_per_chip / 4, rel=1e-3)
    assert eight.weights_per_chip == pytest.approx(one.weights_per_chip / 8, rel=1e-3)
    assert eight.bytes_per_chip["arguments"] < one.bytes_per_chip["arguments"] / 5


def test_fsdp_gathers_each_weight_twice_and_tp_sums_activations():
    """28 layers, 7 weights and 7 halves of adapters (those along fsdp), forward and backward; embedding and head once."""
    fsdp, mixed = made(*SIZES[3]), made(*SIZES[4])
    assert fsdp.collectives["all-gather"]["count"] == 2 * 28 * 14 + 2
    weights = 2 * (28 * 46.8e6 * 2 + 2 * 151936 * 1536)
    assert fsdp.collectives["all-gather"]["bytes"] == pytest.approx(weights, rel=0.02)
    sums = mixed.collectives["all-reduce"]["bytes"] - fsdp.collectives["all-reduce"]["bytes"]
    assert sums > 28 * 2 * 2 * (4 * 2048 * 1536 * 2), "two sums of a block's output, forward and again for the gradient"


def test_a_step_that_does_not_fit_is_a_plan_that_says_so():
    found = plan.compile_for("v5e-1", transformer.Config.from_hf(R1), batch_size=8, seq_len=4096, gradient_checkpointing=False)
    assert not found.fits and found.bytes_per_chip["peak"] > found.memory_per_chip
    assert "DOES NOT FIT" in str(found)


def test_accumulation_needs_the_memory_of_a_part():
    whole, parts = small("v5e-4", batch_size=64, seq_len=512), small("v5e-4", batch_size=64, seq_len=512, gradient_accumulation_steps=8)
    assert parts.bytes_per_chip["temporaries"] < whole.bytes_per_chip["temporaries"] / 2
    assert parts.flops == whole.flops
    assert parts.collectives["all-gather"]["count"] > 4 * whole.collectives["all-gather"]["count"]


def test_the_command(capfd, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    words = ["plan", "--model", str(tmp_path), "--topology", "v5e:2x2", "--batch", "4", "--seq", "64", "--rank", "4"]
    assert main([*words, "--json"]) == 0
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert found["fits"] is True and found["bytes_per_chip"]["peak"] > 0 and err == ""
    assert main(words) == 0
    assert "fits" in capfd.readouterr().out


@pytest.mark.parametrize(
    "topology, options, message",
    [
        ("v5e-8", {"tp": 8}, "heads: 12 does not divide over tp=8"),
        ("v5e-8", {"batch": 12}, "batch: 12 rows do not divide over fsdp=8"),
        ("v5e-8", {"batch": 8, "gradient_accumulation_steps": 2}, "batch: 8 rows do not divide over fsdp=8 in 2 parts"),
        ("v5e-8", {"tp": 0}, "tp: expected a whole number of at least 1, found 0"),
        ("v5e-8", {"fsdp": 2, "tp": 2}, "mesh: expected fsdp x tp = 8"),
        ("v5e:3x3", {}, "topology: v5e:3x3 is not one that the compiler has"),
        ("v5e-8", {"seq": 200_000}, "seq: expected at most 131072"),
        ("v5e-8", {"rank": 1000}, "rank: expected 1 to"),
    ],
)
def test_what_cannot_be_is_refused(topology, options, message):
    with pytest.raises(CourseError, match=message):
        small(topology, **options)
