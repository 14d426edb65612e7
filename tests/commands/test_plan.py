"""Planning without the compiler: what is refused, what is counted, which records are old."""

import dataclasses
import importlib.util
import json
import shutil
import stat
import sys

import pytest

from tests.helpers import plans
from tests.helpers.checkpoints import folder_of
from tools import fingerprint
from utils import CourseError
from utils.__main__ import main
from utils.commands import plan
from utils.hf import config as hf_config

MODEL = str(folder_of("qwen2-untied"))
CONFIG = hf_config.read(MODEL)


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    """As where there is neither libtpu nor .venv-tpu."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(plan, "TPU_PYTHON", tmp_path / "python")
    return tmp_path / "python"


def test_without_the_compiler_one_line_says_what_to_do(no_compiler, capsys):
    assert main(["plan", "--model", MODEL, "--topology", "v5e-8"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "make install-tpu" in err


def test_the_command_goes_over_to_the_environment_that_has_it(no_compiler, capfd):
    no_compiler.write_text(
        f"#!{sys.executable}\nimport sys, os\n"
        "print(os.environ['JAX_PLATFORMS'], *sys.argv[1:])\nsys.exit(2)\n"
    )
    no_compiler.chmod(no_compiler.stat().st_mode | stat.S_IXUSR)
    words = ["plan", "--model", MODEL, "--topology", "v5e-8", "--batch-size", "16", "--tp", "2"]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--no-gradient-checkpointing", "--json"])
    assert stop.value.code == 2
    given = capfd.readouterr().out.split()
    assert given[:5] == ["cpu", "-m", "utils", "plan", "--model"] and "--fsdp" not in given
    flags = {"--topology": "v5e-8", "--batch-size": "16", "--tp": "2", "--seq-len": "2048"}
    for flag, value in flags.items():
        assert given[given.index(flag) + 1] == value
    assert "--no-gradient-checkpointing" in given and "--json" in given


def test_a_model_that_is_not_there_is_one_line(capsys):
    assert main(["plan", "--model", "/nowhere/at/all", "--topology", "v5e-8"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_operations_of_a_step_are_three_forward_passes_of_the_blocks_and_two_of_the_head():
    """Against the forward count of `transformer`, which chapter 07 derives."""
    c, tokens = CONFIG, 2 * 64

    def flops(adapter: int, gradient_checkpointing: bool) -> float:
        sizes = dict(batch_size=2, seq_len=64, adapter=adapter)
        return plan.step_flops(c, **sizes, gradient_checkpointing=gradient_checkpointing)

    head = 2 * c.vocab_size * c.hidden_size
    scores = 2 * c.num_hidden_layers * 2 * 64 * c.num_attention_heads * c.head_dim
    forward = c.flops_per_token(64)
    assert flops(0, True) == tokens * (3 * forward - head + scores)
    assert flops(0, False) == tokens * (2 * forward + scores)
    assert flops(1000, True) - flops(0, True) == tokens * 2 * 1000 * 4


def test_every_slice_has_a_chip_with_a_source():
    for name, topology in plan.SLICES.items():
        assert topology.split(":")[0] == name.split("-")[0]
        chip = plan.CHIPS[topology.split(":")[0]]
        assert chip.memory >= 8 * plan.GiB and chip.source.startswith("https://")


PLAN = plan.Plan(
    "v5e:2x4", 4, 2, 8, 2048,
    fits=True,
    bytes_per_chip=dict(arguments=2**30, temporaries=2**31, outputs=0, peak=3 * 2**30),
    weights_per_chip=2**29,
    memory_per_chip=16 * plan.GiB,
    flops=1e15,
    seconds={"compute": 0.5, "memory": 0.25, "bound": 0.5},
    collectives={"all-gather": {"count": 10, "bytes": 10**9}},
    rematerialised=0,
    compile_seconds=20.0,
    assumptions=("a peak",),
)  # fmt: skip


def test_a_plan_is_read_as_text_and_as_json():
    text = str(PLAN)
    assert "fsdp 4 x tp 2" in text and "3.00 GiB of 16 per chip: fits" in text
    assert "32,768 tokens/s at most" in text and "collectives of a step, per chip:" in text
    assert "DOES NOT FIT" in str(dataclasses.replace(PLAN, fits=False))
    refused = dataclasses.replace(PLAN, fits=False, collectives={})
    assert "collectives not compiled so far" in str(refused)
    assert "3 arrays are replicated" in str(dataclasses.replace(PLAN, rematerialised=3))
    assert json.loads(json.dumps(PLAN.summary()))["bytes_per_chip"]["peak"] == 3 * 2**30


@pytest.mark.parametrize(
    "changes", [{"batch_size": 0}, {"seq_len": 1.5}, {"rank": True}, {"fsdp": 0}]
)
def test_sizes_are_refused_by_name(monkeypatch, changes):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    name = next(iter(changes))
    # 1.5 is refused earlier where signatures are checked, as in these tests.
    expected = CourseError if not isinstance(changes[name], float) else Exception
    with pytest.raises(expected, match=name):
        plan.compile_for("v5e-8", CONFIG, **({"batch_size": 8, "seq_len": 64} | changes))


@pytest.mark.parametrize("name", ["v9-8", "v5e", "v5e:two", "h100", ""])
def test_a_topology_that_is_not_known_is_refused(monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(CourseError, match="topology: expected one of v2-8, "):
        plan.compile_for(name, CONFIG, batch_size=8, seq_len=64)


# ---------------------------------------------------------------------------------------- fingerprints


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The package's source as a copy that a test may change: (folder, its fingerprint)."""
    skip = shutil.ignore_patterns("__pycache__", "assets")
    shutil.copytree(fingerprint.ROOT / "utils", tmp_path / "utils", ignore=skip)
    before = fingerprint.of(CONFIG, rank=4)
    monkeypatch.setattr(fingerprint, "ROOT", tmp_path)
    assert fingerprint.of(CONFIG, rank=4) == before
    return tmp_path / "utils", before


def test_a_fingerprint_is_of_configuration_and_settings():
    prints = [
        fingerprint.of(CONFIG, rank=4, tp=1),
        fingerprint.of(CONFIG, rank=8, tp=1),
        fingerprint.of(dataclasses.replace(CONFIG, num_hidden_layers=7), rank=4, tp=1),
    ]
    assert len(set(prints)) == 3 and all(len(text) == 64 for text in prints)
    assert fingerprint.of(CONFIG, tp=1, rank=4) == prints[0]


def test_a_fingerprint_does_not_see_comments_docstrings_or_layout(copied):
    folder, before = copied
    path = folder / "attention.py"
    code = path.read_text()
    path.write_text(
        '"""Other words."""\n' + code.split('"""', 2)[2].replace("\n\n", "\n\n# why\n\n")
    )
    train = folder / "train.py"
    train.write_text(train.read_text().replace("log_every: int = 50", "log_every: int = 60"))
    assert fingerprint.of(CONFIG, rank=4) == before


@pytest.mark.parametrize(
    "file, old, new",
    [
        ("attention.py", "jnp.float32", "jnp.bfloat16"),
        ("sharding.py", 'P("tp", "fsdp")', 'P("fsdp", "tp")'),
        ("train.py", "jnp.isfinite(loss)", "jnp.isnan(loss)"),
        ("commands/finetune.py", "128 if", "256 if"),
    ],
)
def test_a_fingerprint_sees_the_code_of_the_step(copied, file, old, new):
    folder, before = copied
    code = (folder / file).read_text()
    assert old in code
    (folder / file).write_text(code.replace(old, new))
    assert fingerprint.of(CONFIG, rank=4) != before


def test_every_definition_that_is_fingerprinted_exists():
    for name, definitions in fingerprint.SOURCES.items():
        text = (fingerprint.ROOT / "utils" / name).read_text()
        assert all(f"def {definition}(" in text for definition in definitions), name


def test_no_recorded_plan_is_old():
    """Recorded by `benchmarks/plans.py`, again after a change of the step."""
    old = [row["setting"] for row in plans.ROWS if not plans.is_current(row)]
    names = ("model", "topology", "tp", "batch_size", "seq_len")
    named = "; ".join(" ".join(str(setting[name]) for name in names) for setting in old)
    assert not old, f"{len(old)} of {len(plans.ROWS)} are old, run benchmarks/plans.py: {named}"
