"""The real TPU compiler on R1's training step: every chip the course names, its bytes and collectives.

Half a minute to a minute each on two quiet cores, so two are compiled every time and the others in the
long run. No weights and no TPU are needed: `make test-tpu`.
"""

import functools
import json

import pytest

from utils import CourseError
from utils.__main__ import main
from utils.commands import plan
from utils.hf import config as hf_config

pytestmark = pytest.mark.tpu

R1 = {  # DeepSeek-R1-Distill-Qwen-1.5B
    "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "intermediate_size": 8960,
    "max_position_embeddings": 131072, "rope_theta": 10000, "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
SMALL = R1 | {"vocab_size": 2048, "hidden_size": 384, "intermediate_size": 512}
SMALL |= {"num_hidden_layers": 2, "head_dim": 32}


@functools.cache
def r1(topology: str, batch_size: int, seq_len: int, tp: int = 1) -> plan.Plan:
    config = hf_config.read(R1)
    return plan.compile_for(topology, config, batch_size=batch_size, seq_len=seq_len, tp=tp)


def small(topology: str, **options) -> plan.Plan:
    options = {"batch_size": 8, "seq_len": 128, "rank": 4} | options
    return plan.compile_for(topology, hf_config.read(SMALL), **options)


# The sizes that the course promises. v5e-8 also as fsdp 4 x tp 2, and as 2 x 4, over which 2 key/value
# heads do not divide.
ONE, FSDP, MIXED = ("v5e-1", 1, 1024), ("v5e-8", 16, 2048), ("v5e-8", 16, 2048, 2)
FOUR = ("v5e-4", 8, 2048)
OTHERS = [
    ONE, MIXED, FOUR, ("v2-8", 8, 1024), ("v5e-8", 8, 2048, 4), ("v5p-8", 16, 2048), ("v6e-8", 16, 2048)
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [FSDP, *(pytest.param(s, marks=pytest.mark.long) for s in OTHERS)]
)
def test_r1_compiles_and_fits(sizes):
    compiled = r1(*sizes)
    b = compiled.bytes_per_chip
    assert compiled.fits and b["peak"] < compiled.memory_per_chip
    assert b["peak"] == b["arguments"] + b["temporaries"] + b["outputs"]
    assert compiled.rematerialised == 0, "an activation is replicated to be resharded: constrain it"
    seconds = compiled.seconds
    assert seconds["bound"] == max(seconds["compute"], seconds["memory"]) > 0
    chips = compiled.fsdp * compiled.tp
    assert chips == {"v5e-1": 1, "v5e-4": 4, "v5p-8": 4}.get(sizes[0], 8)
    # The adapter's 18.5 M parameters three times in float32; those that no axis splits, on every chip.
    adapter = b["arguments"] - compiled.weights_per_chip
    assert 0.99 * 12 * 18.46e6 / chips < adapter < 1.01 * 12 * 18.46e6
    assert bool(compiled.collectives) == (chips > 1)


@pytest.mark.slow
def test_fsdp_gathers_each_weight_twice():
    """28 layers, 7 weights and 7 adapter halves (those that fsdp splits), forward and backward;
    embedding and head once."""
    gathered = r1(*FSDP).collectives["all-gather"]
    assert gathered["count"] == 2 * 28 * 14 + 2
    weights = 2 * (28 * 46.8e6 * 2 + 2 * 151936 * 1536)
    assert gathered["bytes"] == pytest.approx(weights, rel=0.02)


@pytest.mark.long
def test_tp_sums_activations():
    """A block's output is summed twice, in the forward pass and again for the gradient."""
    fsdp, mixed = (r1(*sizes).collectives["all-reduce"]["bytes"] for sizes in (FSDP, MIXED))
    assert mixed - fsdp > 28 * 2 * 2 * (4 * 2048 * 1536 * 2)


@pytest.mark.long
def test_more_fsdp_divides_the_weights():
    """1.777 B parameters in bfloat16, 3.55 GB; norms and biases, on every chip, are a thousandth."""
    one, four, eight = (r1(*sizes) for sizes in (ONE, FOUR, FSDP))
    assert one.weights_per_chip == pytest.approx(2 * 1.777e9, rel=1e-3)
    assert four.weights_per_chip == pytest.approx(one.weights_per_chip / 4, rel=1e-3)
    assert eight.weights_per_chip == pytest.approx(one.weights_per_chip / 8, rel=1e-3)
    assert eight.bytes_per_chip["arguments"] < one.bytes_per_chip["arguments"] / 5


@pytest.mark.long
def test_a_step_that_does_not_fit_is_a_plan_that_says_so():
    sizes = dict(batch_size=8, seq_len=4096, gradient_checkpointing=False)
    refused = plan.compile_for("v5e-1", hf_config.read(R1), **sizes)
    assert not refused.fits and refused.bytes_per_chip["peak"] > refused.memory_per_chip
    assert "DOES NOT FIT" in str(refused)


@pytest.mark.long
def test_accumulation_needs_the_memory_of_a_small_batch():
    whole = small("v5e-4", batch_size=64, seq_len=512)
    parts = small("v5e-4", batch_size=64, seq_len=512, gradient_accumulation_steps=8)
    assert parts.bytes_per_chip["temporaries"] < whole.bytes_per_chip["temporaries"] / 2
    assert parts.flops == whole.flops
    gathered = (p.collectives["all-gather"]["count"] for p in (parts, whole))
    assert next(gathered) > 4 * next(gathered)


@pytest.mark.parametrize("words", [["--json"], pytest.param([], marks=pytest.mark.long)])
def test_the_command(capfd, tmp_path, words):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    command = ["plan", "--model", str(tmp_path), "--topology", "v5e:2x2", "--batch-size", "4"]
    assert main([*command, "--seq-len", "64", "--rank", "4", *words]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    if words:
        summary = json.loads(out)
        assert summary["fits"] is True and summary["bytes_per_chip"]["peak"] > 0
    else:
        assert "fits" in out


@pytest.mark.parametrize(
    "topology, options, message",
    [
        ("v5e-8", {"tp": 8}, "num_attention_heads: 12 does not divide over tp=8"),
        ("v5e-8", {"batch_size": 12}, "batch_size: 12 rows do not divide over fsdp=8"),
        (
            "v5e-8",
            {"batch_size": 8, "gradient_accumulation_steps": 2},
            "batch_size: 8 rows do not divide over fsdp=8 in 2 accumulation steps",
        ),
        ("v5e-8", {"tp": 0}, "tp: expected a whole number of at least 1, found 0"),
        ("v5e-8", {"fsdp": 2, "tp": 2}, "mesh: expected fsdp x tp = 8"),
        ("v5e:3x3", {}, "topology: v5e:3x3 is not one that the compiler has"),
        ("v5e-8", {"seq_len": 200_000}, "seq_len: expected at most 131072"),
        ("v5e-8", {"rank": 1000}, "rank: expected 1 to"),
    ],
)
def test_what_cannot_be_is_refused(topology, options, message):
    with pytest.raises(CourseError, match=message):
        small(topology, **options)
