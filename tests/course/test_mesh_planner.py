"""The formula of chapter 13 against the TPU compiler's recorded plans, and the widget's sizes against the package's."""

import dataclasses
import json
import math

import jax
import pytest
from flax import nnx

from tests.helpers import plans
from tests.helpers.plans import ROWS, config
from utils import CourseError, sharding, transformer
from utils.commands import plan
from utils.course import estimate

R1 = "DeepSeek-R1-Distill-Qwen-1.5B"


def named(row: dict) -> str:
    s = row["setting"]
    sizes = f"tp{s['tp']}-{s['batch_size']}x{s['seq_len']}-rank{s['rank']}"
    return f"{s['model']}-{s['topology']}-{sizes}" + "-bare" * (not s["gradient_checkpointing"])


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_the_formula_is_within_15_percent_of_the_compiler(row):
    terms, compiler = (
        estimate.bytes_per_chip(config(row), **plans.sizes(row)),
        row["bytes_per_chip"],
    )
    assert sum(terms.values()) == pytest.approx(compiler["peak"], rel=0.15)
    assert terms["weights"] == pytest.approx(row["weights_per_chip"], rel=1e-3)
    assert terms["weights"] + terms["adapter"] == pytest.approx(compiler["arguments"], rel=0.01)
    assert row["fits"] == (sum(terms.values()) <= row["memory_per_chip"])


def test_the_record_has_every_slice_and_says_where_it_comes_from():
    assert len({json.dumps(row["setting"]) for row in ROWS}) == len(ROWS) >= 10
    slices = {row["setting"]["topology"] for row in ROWS if row["setting"]["model"] == R1}
    assert slices == {"v2-8", "v5e-1", "v5e-4", "v5e-8", "v5p-8", "v6e-8"}
    assert {row["setting"]["tp"] for row in ROWS} >= {1, 2, 4} and not all(
        row["fits"] for row in ROWS
    )
    for row in ROWS:
        assert row["topology"] == plan.SLICES[row["setting"]["topology"]]
        assert (
            set(row["versions"]) >= {"python", "jax", "libtpu"}
            and row["date"]
            and row["compile_seconds"] > 0
        )
        s = row["setting"]
        assert all(row[name] == s[name] for name in ("tp", "batch_size", "seq_len"))


def test_the_recording_knows_these_settings():
    """A row that no setting asks for would never be recorded again."""
    recording = plans.recording()
    settings = recording.settings()
    assert all(row["setting"] in settings for row in ROWS)
    for row in ROWS:
        assert config(row) == recording.MODELS[row["setting"]["model"]]


def test_weights_are_exact():
    """On one chip every parameter of the model; on a mesh what `sharding.shardings` says."""
    small = dataclasses.replace(
        config(ROWS[0]),
        vocab_size=160,
        hidden_size=192,
        num_hidden_layers=3,
        head_dim=16,
        intermediate_size=1120,
        max_position_embeddings=512,
    )
    whole = estimate.bytes_per_chip(small, batch_size=1, seq_len=64, rank=4)
    assert whole["weights"] == 2 * small.count_parameters()["total"]
    state = nnx.state(nnx.eval_shape(lambda: transformer.Transformer(small, rngs=nnx.Rngs(0))))
    mesh = jax.sharding.AbstractMesh((4, 2), sharding.AXES)
    shardings = sharding.shardings(state, mesh, small)
    sizes = jax.tree.map(lambda x, s: 2 * math.prod(s.shard_shape(x.shape)), state, shardings)
    terms = estimate.bytes_per_chip(small, batch_size=4, seq_len=64, fsdp=4, tp=2)
    assert terms["weights"] == sum(jax.tree.leaves(sizes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tp": 8}, "num_attention_heads: 12 does not divide over tp=8"),
        ({"fsdp": 7, "batch_size": 7}, "hidden_size: 1536 does not divide over fsdp=7"),
        ({"fsdp": 8}, "batch_size: 12 rows do not divide over fsdp=8"),
    ],
)
def test_what_does_not_divide_is_refused(changes, message):
    with pytest.raises(CourseError, match=message):
        estimate.bytes_per_chip(config(ROWS[0]), **({"batch_size": 12, "seq_len": 64} | changes))
