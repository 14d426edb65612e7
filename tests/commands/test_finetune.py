"""Fine-tuning: a run is a folder; stopped, killed or resumed, it ends with the same adapter."""

import dataclasses
import json
import os
import random
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers import checkpoints, finetuning
from tests.helpers.folders import ROOT
from utils import CourseError, lora, train
from utils.__main__ import main
from utils.commands import finetune
from utils.commands.arguments import parse
from utils.hf import peft, weights


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return finetuning.write_data(tmp_path_factory.mktemp("data") / "data.jsonl")


@pytest.fixture(scope="module")
def complete(tmp_path_factory, data):
    """(folder, result) of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("complete") / "run"
    return folder, finetune.run(finetuning.options(folder, data))


def adapter(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(a: Path, b: Path) -> bool:
    a, b = adapter(a), adapter(b)
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_a_run_learns_and_leaves_everything_in_its_folder(complete):
    folder, result = complete
    history = result.history
    assert history.stopped == "finished" and history.steps[-1] == finetuning.STEPS
    assert history.loss[-1] < 0.7 * history.loss[0]
    assert [step for step, _ in history.evaluations] == [20, 40] and history.evaluations[-1][
        1
    ] < history.evaluations[0][1]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == history.steps
    assert {row["step"]: row["held_out"] for row in rows if "held_out" in row} == dict(
        history.evaluations
    )
    assert (folder / "metrics.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((folder / "config.json").read_text())["rank"] == 2


def test_the_adapter_is_the_trained_model(complete, data):
    """What PEFT's format holds gives the held-out loss that the run reported."""
    _is_the_trained_model(complete, finetuning.options(complete[0], data), rel=1e-6)


@pytest.mark.slow
def test_the_adapter_is_the_trained_model_in_16_bits_too(data, tmp_path):
    """There, on a CPU, unrolled layers are trained; stacked again, sums are rounded in another order."""
    options = finetuning.options(tmp_path, data, dtype="bfloat16")
    _is_the_trained_model((tmp_path, finetune.run(options)), options, rel=0.01)


def _is_the_trained_model(run, options, rel: float):
    folder, result = run
    model = peft.load(weights.load(options.model, dtype=options.dtype), folder / "adapter")
    _, _, held_rows, _ = finetune.prepare(options)
    reported = result.history.evaluations[-1][1]
    assert finetune.held_out_loss(held_rows, options)(model) == pytest.approx(reported, rel=rel)
    with lora.disabled(model):
        assert finetune.held_out_loss(held_rows, options)(model) > 1.5 * reported


def test_the_base_is_not_touched(data, tmp_path):
    files = sorted((checkpoints.folder_of("qwen2-untied")).iterdir())
    before = [path.read_bytes() for path in files]
    finetune.run(finetuning.options(tmp_path, data, steps=2))
    assert [path.read_bytes() for path in files] == before


def test_out_of_time_and_continued_it_ends_with_the_same_bits(complete, data, tmp_path):
    options = finetuning.options(tmp_path / "run", data)
    first = finetune.run(dataclasses.replace(options, max_hours=1e-9))
    assert first.history.stopped == "deadline" and first.history.steps[-1] < finetuning.STEPS
    assert first.adapter is not None and not same(
        tmp_path / "run", complete[0]
    )  # what there was by then is usable
    second = finetune.run(options)
    assert second.history.stopped == "finished" and same(tmp_path / "run", complete[0])


@pytest.mark.slow
@pytest.mark.serial
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path, kills):
    data = finetuning.write_data(tmp_path / "data.jsonl")
    undisturbed = dict(steps=finetuning.LONG, save_every=None)
    finetune.run(finetuning.options(tmp_path / "complete", data, **undisturbed))
    seed = random.randrange(10**6)
    command = [
        sys.executable,
        "-m",
        "tests.helpers.finetuning",
        str(tmp_path),
        str(kills),
        str(seed),
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    where = f"seed {seed}: {run.stdout[-2000:]}{run.stderr[-2000:]}"
    assert run.returncode == 0, where
    # No checkpoint is unreadable, however the process ended.
    assert "damaged" not in run.stdout + run.stderr, where
    assert same(tmp_path / "run", tmp_path / "complete"), where


def test_a_finished_run_is_left_as_it_is(complete, data):
    before = adapter(complete[0])
    result = finetune.run(finetuning.options(complete[0], data))
    assert result.history.steps[-1] == finetuning.STEPS
    after = adapter(complete[0])
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [{"gradient_accumulation_steps": 4}, {"gradient_checkpointing": True}]
)
def test_what_saves_memory_changes_nothing_that_is_trained(complete, data, tmp_path, change):
    result = finetune.run(finetuning.options(tmp_path / "run", data, **change))
    # 40 steps of rounding in another order
    np.testing.assert_allclose(result.history.loss, complete[1].history.loss, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [{"packing": False}, {"loss_on": "everything"}, {"dropout": 0.5}, {"seed": 1}]
)
def test_what_should_change_the_training_does(complete, data, tmp_path, change):
    result = finetune.run(
        finetuning.options(tmp_path / "run", data, **change, max_hours=1e-9)
    )  # one step
    first = finetune.run(finetuning.options(tmp_path / "as usual", data, max_hours=1e-9))
    assert result.history.grad_norm[0] != pytest.approx(first.history.grad_norm[0], rel=1e-3)


@pytest.mark.slow
def test_debugging_goes_all_the_way_and_keeps_nothing(data, tmp_path, caplog):
    result = finetune.run(finetuning.options(tmp_path / "run", data, steps=10_000, debug=True))
    assert (
        result.history.steps[-1] == 6 and result.adapter is None and not (tmp_path / "run").exists()
    )
    assert len(result.answers.adapter.correct) == 2


def test_a_bad_batch_stops_at_the_last_good_checkpoint(data, tmp_path):
    with pytest.raises(
        train.NonFiniteLoss, match=r"step \d+: the .* is not finite .* last good checkpoint is step"
    ):
        finetune.run(finetuning.options(tmp_path / "run", data, learning_rate=1e30))


NEW = {"output": "new"}
REFUSED = {  # changes in the finished run's folder, or in a new one
    "another rank": ({"rank": 4}, "holds a run with rank=2, this one has 4"),
    "another rate": (
        {"learning_rate": 1.0},
        "holds a run with learning_rate=0.01, this one has 1.0",
    ),
    "rows too long": (NEW | {"max_seq_length": 4096}, "max_seq_length: expected at most 128"),
    "rows too short": (NEW | {"max_seq_length": 8}, "max_seq_length: 8 tokens are too few"),
    "batch larger than the data": (NEW | {"batch_size": 400}, "batch_size: expected at most"),
    "unknown target": (NEW | {"target_modules": ("q_prj",)}, "'q_prj' matches no linear layer"),
    "no such model": (NEW | {"model": "{}/none"}, "none"),
    "no such data": (NEW | {"data": "{}/none.jsonl"}, "none.jsonl"),
    "unknown data": (NEW | {"data": "gsm9k"}, "data: expected gsm8k"),
    "a mesh without devices": (NEW | {"tp": 2}, "expected as many devices as fsdp x tp, found 1"),
    "a folder of other things": ({"output": str(checkpoints.HOME)}, "is no run's folder"),
    "a file": ({"output": __file__}, "output: expected a folder, found the file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_and_writes_nothing(case, complete, data, tmp_path):
    changes, words = REFUSED[case]
    changes = changes | {n: v.format(tmp_path) for n, v in changes.items() if isinstance(v, str)}
    if changes.get("output") == "new":
        changes["output"] = str(tmp_path / "new")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(CourseError, match=words) as error:
        finetune.run(finetuning.options(complete[0], data, **changes))
    assert "\n" not in str(error.value)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"batch_size": 3, "gradient_accumulation_steps": 2},
            "batch_size: expected a multiple of grad",
        ),
        ({"rank": 0}, "rank: expected at least 1, found 0"),
        ({"steps": 0}, "steps: expected at least 1, found 0"),
        ({"dropout": 1.0}, "dropout: expected 0 or more and less than 1"),
        ({"learning_rate": 0.0}, "learning_rate: expected a positive number"),
        ({"max_hours": -1.0}, "max_hours: expected a positive number"),
        ({"held_out": -1}, "held_out: expected 0 or more"),
    ],
)
def test_bad_settings_are_refused_at_once(changes, words, tmp_path):
    with pytest.raises(CourseError, match=words):
        finetuning.options(tmp_path, tmp_path, **changes)


def test_a_folder_of_another_version_is_refused(complete, data, tmp_path):
    """Its config.json lacks fields of this one: the run cannot be continued, and says so."""
    (tmp_path / "config.json").write_text('{"model": "m"}')
    with pytest.raises(
        CourseError, match=r"config.json: cannot be read \('data'\): name another folder"
    ):
        finetune.run(finetuning.options(tmp_path, data))


def test_metrics_are_json_lines(complete, tmp_path):
    history = complete[1].history
    finetune.write_metrics(tmp_path / "m.jsonl", history)
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == history.steps and rows[0]["loss"] == history.loss[0]


def test_the_command_line(data, tmp_path, capsys):
    sizes = {
        "model": checkpoints.folder_of("qwen2-untied"),
        "data": data,
        "output": tmp_path / "run",
    }
    sizes |= {"max-seq-length": 64, "batch-size": 4, "rank": 2, "steps": 2}
    words = [
        "finetune",
        *(word for name, value in sizes.items() for word in (f"--{name}", str(value))),
    ]
    assert main([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert (
        result["step"] == 2 and result["stopped"] == "finished" and Path(result["adapter"]).is_dir()
    )
    assert "32 examples" in err and "2 steps of 4 rows; adapter:" in err  # the log
    assert main([*words, "--rank", "3"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("python -m utils: output:") and "holds a run with rank=2" in last


def test_only_on_a_cpu_does_the_command_keep_memory(monkeypatch):
    calls = []
    monkeypatch.setattr(finetune.cpu, "keep_memory", lambda: calls.append(1))
    monkeypatch.setattr(finetune.importlib.metadata, "entry_points", lambda group: [])
    monkeypatch.setattr(finetune.importlib.util, "find_spec", lambda name: None)
    for platforms, kept in (("cpu", True), ("", True), ("cuda", False), ("tpu,cpu", False)):
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
        calls.clear()
        finetune.keep_memory()
        assert bool(calls) is kept, platforms
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setattr(finetune.importlib.metadata, "entry_points", lambda group: ["cuda13"])
    calls.clear()
    finetune.keep_memory()
    assert not calls


# ----------------------------------------------------------------------------- devices and processes


def started(folder: Path, data: Path, devices: int, **changes) -> subprocess.Popen:
    """A run in a process of its own that sees so many devices."""
    code = """
import json, sys
from pathlib import Path
from tests.helpers import finetuning
from utils.commands import finetune
from utils.commands.arguments import parse
changes = json.loads(sys.argv[3])
options = finetuning.options(Path(sys.argv[1]), Path(sys.argv[2]), **changes)
print(json.dumps(finetune.run(options).summary()))
"""
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, str(folder), str(data), json.dumps(changes)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, env=env, cwd=ROOT, text=True, **pipes)


def finished(process: subprocess.Popen) -> dict:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    return json.loads(output.splitlines()[-1]) if output.strip() else {}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def losses(folder: Path) -> list[float]:
    return [
        json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.slow
@pytest.mark.serial
def test_on_a_mesh_it_learns_the_same(complete, data, tmp_path):
    finished(started(tmp_path / "run", data, 8, fsdp=4, tp=2, steps=20))
    finished(started(tmp_path / "one", data, 1, steps=20))
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "one"), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.serial
def test_a_run_moves_to_another_mesh(data, tmp_path):
    """Stopped on (2, 2), continued on one device: as if it had been one device all the time."""
    finished(started(tmp_path / "run", data, 4, fsdp=2, tp=2, max_hours=1e-9))
    assert len(losses(tmp_path / "run")) == 1
    finished(started(tmp_path / "run", data, 1))
    finished(started(tmp_path / "one", data, 1))
    np.testing.assert_allclose(
        losses(tmp_path / "run")[-1], losses(tmp_path / "one")[-1], rtol=1e-3
    )


@pytest.mark.slow
@pytest.mark.serial
def test_two_processes_are_one_run(data, tmp_path):
    """2 processes x 4 devices, each with half of every batch: the losses of one process with 8."""
    together = dict(coordinator=f"127.0.0.1:{free_port()}", processes=2, fsdp=4, tp=2, steps=20)
    both = [started(tmp_path / "two", data, 4, process=i, **together) for i in (0, 1)]
    for process in both:
        finished(process)
    finished(started(tmp_path / "one", data, 8, fsdp=4, tp=2, steps=20))
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    two, one = adapter(tmp_path / "two"), adapter(tmp_path / "one")
    for name in one:
        np.testing.assert_allclose(two[name], one[name], atol=1e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.serial
def test_a_process_whose_peer_is_lost_says_so_and_loses_nothing(data, tmp_path):
    options = finetuning.options(tmp_path / "run", data, steps=5000)
    words = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in finetuning.GIVEN]
    words += ["--fsdp=2", f"--coordinator=127.0.0.1:{free_port()}", "--processes=2"]
    command = [sys.executable, "-m", "utils", "finetune", *words]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    env.pop("XLA_FLAGS", None)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    pipes |= dict(env=env, cwd=ROOT, text=True)
    both = [subprocess.Popen([*command, f"--process={i}"], **pipes) for i in (0, 1)]
    limit, saved = time.monotonic() + 240, tmp_path / "run" / "checkpoints"
    while not any(path.name.isdigit() for path in saved.glob("*")):
        assert time.monotonic() < limit and both[0].poll() is None, both[0].communicate()
        time.sleep(0.05)
    both[1].kill()
    both[1].communicate()
    _, errors = both[0].communicate(timeout=240)
    assert both[0].returncode == 2, errors[-2000:]
    assert "distributed: another process was lost" in errors.splitlines()[-1], errors[-2000:]
    # What was saved is continued.
    finished(started(tmp_path / "run", data, 1, steps=5000, max_hours=1e-9))
    assert len(losses(tmp_path / "run")) > 1


PAGES = ("book/finetuning.md", "README.md", "book/setup.md", "chapters/13_r1_on_a_tpu_mesh.md")


def commands() -> list[str]:
    """Every `python -m utils ...` on the pages that a reader may copy."""
    lines = []
    for page in PAGES:
        text = (ROOT / page).read_text().replace("\\\n", " ")
        on_page = re.findall(r"python -m utils (\w+ +(?:--|\.\.\.)[^\n#]*)", text)
        lines += [f"{page}: {words}" for words in on_page]
    return lines


@pytest.mark.parametrize("command", commands())
def test_every_command_on_the_pages_is_understood(command):
    line = command.split(": ", 1)[1].strip()
    words = shlex.split(
        line[:-1] if line.count('"') % 2 else line
    )  # the end of a command in a command
    if words[1] == "...":  # "as above, and this"
        words[1:2] = ["--model", "m", "--data", "gsm8k", "--output", "o"]
    parse(words)


def test_the_page_has_commands():
    assert len(commands()) >= 9
