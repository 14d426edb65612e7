"""The fine-tuning engine: a run is a folder; stopped, killed or resumed, it ends with the same adapter."""

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
from utils import CourseError, lora, train
from utils.commands import finetune
from utils.hf import peft, weights

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return finetuning.write_data(tmp_path_factory.mktemp("data") / "data.jsonl")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """(folder, result) of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, finetune.run(finetuning.config(folder, data))


def adapter(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(a: Path, b: Path) -> bool:
    a, b = adapter(a), adapter(b)
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_a_run_learns_and_leaves_everything_in_its_folder(whole):
    folder, result = whole
    history = result.history
    assert history.stopped == "finished" and history.steps[-1] == finetuning.STEPS
    assert history.loss[-1] < 0.7 * history.loss[0]
    assert [step for step, _ in history.evaluations] == [20, 40] and history.evaluations[-1][1] < history.evaluations[
        0
    ][1]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == history.steps
    assert {row["step"]: row["held_out"] for row in rows if "held_out" in row} == dict(history.evaluations)
    assert (folder / "metrics.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((folder / "config.json").read_text())["rank"] == 2


def test_the_adapter_is_the_trained_model(whole, data):
    """What PEFT's format holds gives the held-out loss that the run reported."""
    _is_the_trained_model(whole, finetuning.config(whole[0], data), rel=1e-6)


def test_the_adapter_is_the_trained_model_in_16_bits_too(data, tmp_path):
    """There, on a CPU, layers are trained apart; products are rounded in another order when they are stacked again."""
    config = finetuning.config(tmp_path, data, dtype="bfloat16")
    _is_the_trained_model((tmp_path, finetune.run(config)), config, rel=0.01)


def _is_the_trained_model(run, config, rel: float):
    folder, result = run
    model = peft.load(weights.load(config.model, dtype=config.dtype), folder / "adapter")
    _, _, held_rows, _ = finetune.prepare(config)
    reported = result.history.evaluations[-1][1]
    assert finetune.held_out_loss(held_rows, config)(model) == pytest.approx(reported, rel=rel)
    with lora.disabled(model):
        assert finetune.held_out_loss(held_rows, config)(model) > 1.5 * reported


def test_the_base_is_not_touched(data, tmp_path):
    files = sorted((checkpoints.HOME / "qwen2-untied").iterdir())
    before = [path.read_bytes() for path in files]
    finetune.run(finetuning.config(tmp_path, data, steps=2))
    assert [path.read_bytes() for path in files] == before


def test_out_of_time_and_continued_it_ends_with_the_same_bits(whole, data, tmp_path):
    config = finetuning.config(tmp_path / "run", data)
    first = finetune.run(dataclasses.replace(config, max_hours=1e-9))
    assert first.history.stopped == "deadline" and first.history.steps[-1] < finetuning.STEPS
    assert first.adapter is not None and not same(tmp_path / "run", whole[0])  # what there was by then is usable
    second = finetune.run(config)
    assert second.history.stopped == "finished" and same(tmp_path / "run", whole[0])


@pytest.mark.slow
def test_killed_at_twenty_random_moments_it_ends_with_the_same_bits(tmp_path):
    data = finetuning.write_data(tmp_path / "data.jsonl")
    finetune.run(finetuning.config(tmp_path / "whole", data, steps=finetuning.LONG, save_every=None))
    seed = random.randrange(10**6)
    command = [sys.executable, "-m", "tests.helpers.finetuning", str(tmp_path), "20", str(seed)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, f"seed {seed}: {run.stdout[-2000:]}{run.stderr[-2000:]}"
    assert "damaged" not in run.stdout, run.stdout  # no checkpoint is unreadable, however the process ended
    assert same(tmp_path / "run", tmp_path / "whole"), f"seed {seed}: {run.stdout[-2000:]}"


def test_a_finished_run_is_left_as_it_is(whole, data):
    before = adapter(whole[0])
    result = finetune.run(finetuning.config(whole[0], data))
    assert result.history.steps[-1] == finetuning.STEPS
    after = adapter(whole[0])
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("change", [{"gradient_accumulation_steps": 4}, {"gradient_checkpointing": True}])
def test_what_saves_memory_changes_nothing_that_is_learnt(whole, data, tmp_path, change):
    result = finetune.run(finetuning.config(tmp_path / "run", data, **change))
    np.testing.assert_allclose(result.history.loss, whole[1].history.loss, rtol=1e-3)  # 40 steps of rounding


@pytest.mark.parametrize("change", [{"packing": False}, {"loss_on": "everything"}, {"dropout": 0.5}, {"seed": 1}])
def test_what_should_change_the_training_does(whole, data, tmp_path, change):
    result = finetune.run(finetuning.config(tmp_path / "run", data, **change, max_hours=1e-9))  # one step
    first = finetune.run(finetuning.config(tmp_path / "as usual", data, max_hours=1e-9))
    assert result.history.grad_norm[0] != pytest.approx(first.history.grad_norm[0], rel=1e-3)


def test_debugging_goes_all_the_way_and_keeps_nothing(data, tmp_path, caplog):
    result = finetune.run(finetuning.config(tmp_path / "run", data, steps=10_000, debug=True))
    assert result.history.steps[-1] == 6 and result.adapter is None and not (tmp_path / "run").exists()
    assert len(result.answers.adapter.correct) == 2


def test_a_bad_batch_stops_at_the_last_good_checkpoint(data, tmp_path):
    with pytest.raises(train.NonFiniteLoss, match=r"step \d+: the .* is not finite .* last good checkpoint is step"):
        finetune.run(finetuning.config(tmp_path / "run", data, learning_rate=1e30))


REFUSED = {
    "another rank in the folder": (lambda d: {"rank": 4}, "holds a run with rank=2, this one has 4"),
    "another learning rate": (lambda d: {"learning_rate": 1.0}, "holds a run with learning_rate=0.01, this one has 1.0"),
    "window beyond the context": (lambda d: {"max_seq_length": 4096, "output": f"{d}/new"}, "window: expected at most 128"),
    "window too small": (lambda d: {"max_seq_length": 8, "output": f"{d}/new"}, "window: 8 tokens are too few"),
    "batch larger than the data": (lambda d: {"batch": 400, "output": f"{d}/new"}, "batch: expected at most"),
    "unknown target": (lambda d: {"targets": ("q_prj",), "output": f"{d}/new"}, "'q_prj' matches no linear layer"),
    "no such model": (lambda d: {"model": f"{d}/none", "output": f"{d}/new"}, "none"),
    "no such data": (lambda d: {"data": f"{d}/none.jsonl", "output": f"{d}/new"}, "none.jsonl"),
    "unknown data": (lambda d: {"data": "gsm9k", "output": f"{d}/new"}, "data: expected gsm8k"),
    "a mesh without devices": (lambda d: {"tp": 2, "output": f"{d}/new"}, "expected as many devices as fsdp x tp, found 1"),
    "a folder of other things": (lambda d: {"output": str(checkpoints.HOME)}, "is no run's folder"),
    "a file": (lambda d: {"output": __file__}, "output: expected a folder, found the file"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_and_writes_nothing(case, whole, data, tmp_path):
    changes, words = REFUSED[case]
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(CourseError, match=words) as error:
        finetune.run(finetuning.config(whole[0], data, **changes(tmp_path)))
    assert "\n" not in str(error.value)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch": 3, "gradient_accumulation_steps": 2}, "batch: expected a multiple of accumulate"),
        ({"rank": 0}, "rank: expected at least 1, found 0"),
        ({"steps": 0}, "steps: expected at least 1, found 0"),
        ({"dropout": 1.0}, "dropout: expected at least 0 and less than 1"),
        ({"learning_rate": 0.0}, "learning_rate: expected a positive number"),
        ({"max_hours": -1.0}, "max_hours: expected a positive number"),
        ({"held_out": -1}, "held_out: expected 0 or more"),
    ],
)
def test_bad_settings_are_refused_at_once(changes, words, tmp_path):
    with pytest.raises(CourseError, match=words):
        finetuning.config(tmp_path, tmp_path, **changes)


def test_the_command_line(data, tmp_path, capsys):
    from utils.__main__ import main

    words = [
        "finetune",
        "--model",
        str(checkpoints.HOME / "qwen2-untied"),
        "--data",
        str(data),
        "--output",
        str(tmp_path / "run"),
    ]
    words += ["--window", "64", "--batch", "4", "--rank", "2", "--steps", "2"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 2 and found["stopped"] == "finished" and Path(found["adapter"]).is_dir()
    assert main([*words, "--rank", "3"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("python -m utils: output:") and "holds a run with rank=2" in said


# ------------------------------------------------------------------------------------------------- devices and processes


def started(folder: Path, data: Path, devices: int, **changes) -> subprocess.Popen:
    """A run in a process of its own that sees so many devices."""
    code = """
import json, sys
from pathlib import Path
from tests.helpers import finetuning
from utils.commands import finetune
changes = json.loads(sys.argv[3])
print(json.dumps(finetune.run(finetuning.config(Path(sys.argv[1]), Path(sys.argv[2]), **changes)).summary()))
"""
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, str(folder), str(data), json.dumps(changes)]
    return subprocess.Popen(command, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finished(process: subprocess.Popen) -> dict:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    return json.loads(output.splitlines()[-1]) if output.strip() else {}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_on_a_mesh_it_learns_the_same(whole, data, tmp_path):
    finished(started(tmp_path / "run", data, 8, fsdp=4, tp=2, steps=20))
    finished(started(tmp_path / "one", data, 1, steps=20))
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "one"), rtol=1e-5)


@pytest.mark.slow
def test_a_run_moves_to_another_mesh(data, tmp_path):
    """Stopped on (2, 2), continued on one device: as if it had been one device all the time."""
    finished(started(tmp_path / "run", data, 4, fsdp=2, tp=2, max_hours=1e-9))
    assert len(losses(tmp_path / "run")) == 1
    finished(started(tmp_path / "run", data, 1))
    finished(started(tmp_path / "one", data, 1))
    np.testing.assert_allclose(losses(tmp_path / "run")[-1], losses(tmp_path / "one")[-1], rtol=1e-3)


@pytest.mark.slow
def test_two_processes_are_one_run(data, tmp_path):
    """2 processes x 4 devices, each with its own half of every batch: the losses of one process with 8."""
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
def test_a_process_whose_peer_is_lost_says_so_and_loses_nothing(data, tmp_path):
    config = finetuning.config(tmp_path / "run", data, steps=5000)
    words = [f"--{name.replace('_', '-')}={getattr(config, name)}" for name in finetuning.GIVEN if name != "steps"]
    words += ["--steps=5000", "--fsdp=2", f"--coordinator=127.0.0.1:{free_port()}", "--processes=2"]
    command = [sys.executable, "-m", "utils", "finetune", *words]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    env.pop("XLA_FLAGS", None)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    both = [subprocess.Popen([*command, f"--process={i}"], env=env, cwd=ROOT, text=True, **pipes) for i in (0, 1)]
    limit = time.monotonic() + 240
    while not any(path.name.isdigit() for path in (tmp_path / "run" / "checkpoints").glob("*")):
        assert time.monotonic() < limit and both[0].poll() is None, both[0].communicate()
        time.sleep(0.05)
    both[1].kill()
    both[1].communicate()
    _, errors = both[0].communicate(timeout=240)
    assert both[0].returncode == 2 and "distributed: another process was lost" in errors.splitlines()[-1], errors[
        -2000:
    ]
    finished(started(tmp_path / "run", data, 1, steps=5000, max_hours=1e-9))  # what was saved is continued
    assert len(losses(tmp_path / "run")) > 1


def commands() -> list[str]:
    """Every `python -m utils ...` on the pages that a reader may copy."""
    found = []
    pages = ("book/finetuning.md", "README.md", "book/setup.md", "chapters/13_r1_on_a_tpu_mesh.md")
    for page in pages:
        text = (ROOT / page).read_text().replace("\\\n", " ")
        found += [f"{page}: {words}" for words in re.findall(r"python -m utils (\w+ +(?:--|\.\.\.)[^\n#]*)", text)]
    return found


@pytest.mark.parametrize("command", commands())
def test_every_command_on_the_pages_is_understood(command):
    from utils.__main__ import _parse

    line = command.split(": ", 1)[1].strip()
    words = shlex.split(line[:-1] if line.count('"') % 2 else line)  # the end of a command within a command
    if words[1] == "...":  # "as above, and this"
        words[1:2] = ["--model", "m", "--data", "gsm8k", "--output", "o"]
    _parse(words)


def test_the_page_has_commands():
    assert len(commands()) >= 9
