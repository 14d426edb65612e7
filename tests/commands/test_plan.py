"""Planning without the compiler: what is refused, what is counted. tests/tpu runs the compiler itself."""

import dataclasses
import importlib.util
import json
import stat
import sys

import pytest

from tests.helpers.checkpoints import HOME
from utils import CourseError, transformer
from utils.commands import plan
from utils.__main__ import main

MODEL = str(HOME / "qwen2-untied")
CONFIG = transformer.Config.from_hf(MODEL)


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    """As where there is neither libtpu nor .venv-tpu."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(plan, "OWN_PYTHON", tmp_path / "python")
    return tmp_path / "python"


def test_without_the_compiler_one_line_says_what_to_do(no_compiler, capsys):
    assert main(["plan", "--model", MODEL, "--topology", "v5e-8"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "make install-tpu" in err


def test_the_command_goes_over_to_the_environment_that_has_it(no_compiler, capfd):
    no_compiler.write_text(
        f"#!{sys.executable}\nimport sys, os\nprint(os.environ['JAX_PLATFORMS'], *sys.argv[1:])\nsys.exit(2)\n"
    )
    no_compiler.chmod(no_compiler.stat().st_mode | stat.S_IXUSR)
    words = ["plan", "--model", MODEL, "--topology", "v5e-8", "--batch", "16", "--tp", "2", "--no-remat", "--json"]
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    said = capfd.readouterr().out.split()
    assert said[:5] == ["cpu", "-m", "utils", "plan", "--model"] and "--fsdp" not in said
    for name, value in (("--topology", "v5e-8"), ("--batch", "16"), ("--tp", "2"), ("--seq", "2048")):
        assert said[said.index(name) + 1] == value
    assert said[-2:] == ["--json", "--no-remat"]


def test_a_model_that_is_not_there_is_one_line(capsys):
    assert main(["plan", "--model", "/nowhere/at/all", "--topology", "v5e-8"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_operations_of_a_step_are_three_forward_passes_of_the_blocks_and_two_of_the_head():
    """Against the forward count of `transformer`, which chapter 07 derives."""
    whole = dict(batch_size=2, seq_len=64, adapter=0)
    c, tokens = CONFIG, 2 * 64
    head = 2 * c.vocab_size * c.hidden_size
    scores = 2 * c.num_hidden_layers * 2 * 64 * c.num_attention_heads * c.head_dim
    forward = transformer.flops_per_token(c, 64)
    assert plan.step_flops(c, **whole, gradient_checkpointing=True) == tokens * (3 * forward - head + scores)
    assert plan.step_flops(c, **whole, gradient_checkpointing=False) == tokens * (2 * forward + scores)
    more = plan.step_flops(c, batch_size=2, seq_len=64, adapter=1000, gradient_checkpointing=True) - plan.step_flops(c, **whole, gradient_checkpointing=True)
    assert more == tokens * 2 * 1000 * 4


def test_every_slice_has_a_chip_with_a_source():
    for name, topology in plan.SLICES.items():
        assert topology.split(":")[0] == name.split("-")[0]
        chip = plan.CHIPS[topology.split(":")[0]]
        assert chip.memory >= 8 * plan.GiB and chip.source.startswith("https://")


def made(**changes) -> plan.Plan:
    sizes = dict(arguments=2**30, temporaries=2**31, outputs=0, peak=3 * 2**30)
    found = plan.Plan(
        "v5e:2x4", 4, 2, 8, 2048, True, sizes, 2**29, 16 * plan.GiB, 1e15, {"compute": 0.5, "memory": 0.25, "bound": 0.5},
        {"all-gather": {"count": 10, "bytes": 10**9}}, 0, 20.0, ("a peak",),
    )  # fmt: skip
    return dataclasses.replace(found, **changes)


def test_a_plan_is_read_as_text_and_as_json():
    text = str(made())
    assert "fsdp 4 x tp 2" in text and "3.00 GiB of 16 per chip: fits" in text and "32,768 tokens/s at most" in text
    assert "DOES NOT FIT" in str(made(fits=False))
    assert "not compiled so far" in str(made(fits=False, collectives={}))
    assert "3 arrays are made whole" in str(made(rematerialised=3))
    assert json.loads(json.dumps(dataclasses.asdict(made())))["bytes_per_chip"]["peak"] == 3 * 2**30


@pytest.mark.parametrize("changes", [{"batch": 0}, {"seq": 1.5}, {"rank": True}])
def test_sizes_are_refused_by_name(monkeypatch, changes):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(CourseError, match=f"{next(iter(changes))}: expected a whole number of at least 1"):
        plan.compile_for("v5e-8", CONFIG, **({"batch": 8, "seq": 64} | changes))


@pytest.mark.parametrize("name", ["v9-8", "v5e", "v5e:two", "h100", ""])
def test_a_topology_that_is_not_known_is_refused(monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(CourseError, match="topology: expected one of v2-8, "):
        plan.compile_for(name, CONFIG, batch_size=8, seq_len=64)
