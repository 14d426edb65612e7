"""The hardware dial: set by hand, or found by the accelerators' memory without starting jax."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils import CourseError
from utils.course import profile

SIZES = {name: {"steps": 10 * (i + 1), "rate": 3e-4} for i, name in enumerate(profile.PROFILES)}


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    """A machine with nothing in it: no GPU tool, no TPU device, no settings."""
    for name in ("COURSE_PROFILE", "CUDA_VISIBLE_DEVICES", "JAX_PLATFORMS", "TPU_ACCELERATOR_TYPE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(profile.glob, "glob", lambda pattern: [])
    real = importlib.util.find_spec
    hidden = ("jax_cuda12_plugin", "jax_cuda13_plugin", "libtpu")
    monkeypatch.setattr(
        profile.importlib.util, "find_spec", lambda name: None if name in hidden else real(name)
    )


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    """Install a stand-in for nvidia-smi that reports these (MiB) cards, and a jax that can use them."""

    def install(*mebibytes: str, code: int = 0) -> None:
        lines = "\n".join(f"{i}, GPU-{i}{i}{i}{i}, {size}" for i, size in enumerate(mebibytes))
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n/bin/cat <<'E'\n{lines}\nE\nexit {code}\n")
        tool.chmod(0o755)
        monkeypatch.setattr(
            profile.importlib.util, "find_spec", lambda name: object() if "cuda12" in name else None
        )

    return install


@pytest.mark.parametrize("name", profile.PROFILES)
def test_set_by_hand(monkeypatch, capsys, name):
    monkeypatch.setenv("COURSE_PROFILE", name)
    size = profile.choose(SIZES)
    assert profile.current() == name and size.steps == SIZES[name]["steps"] and size.rate == 3e-4
    assert profile.small() == (name in ("smoke", "cpu"))
    out = capsys.readouterr().out
    assert out == f"profile {name} (set by COURSE_PROFILE): steps {size.steps}, rate 0.0003\n"


def test_unknown_name(monkeypatch):
    monkeypatch.setenv("COURSE_PROFILE", "gpu")
    with pytest.raises(CourseError) as error:
        profile.choose(SIZES)
    assert str(error.value) == (
        "COURSE_PROFILE: expected one of smoke, cpu, colab, large, found 'gpu': set one of the four, or unset it"
    )


def test_nothing_found(capsys):
    profile.choose(SIZES)
    assert capsys.readouterr().out.startswith("profile cpu (no accelerator found): steps 20")


@pytest.mark.parametrize(
    ("cards", "expected"),
    [
        (["15360"], "colab"),  # T4
        (["24576"], "colab"),  # L4
        (["40960"], "large"),  # A100
        (["81559"], "large"),  # H100
        (["143771"], "large"),  # H200
        (["15360"] * 4, "large"),
        (["8192"], "cpu"),  # a laptop
        (["11264"], "cpu"),
        (["12288"], "colab"),
        (["[N/A]"], "cpu"),
        ([], "cpu"),
    ],
)
def test_by_gpu_memory(gpus, cards, expected):
    gpus(*cards)
    assert profile.current() == expected


@pytest.mark.parametrize(
    ("visible", "expected"),
    [("0", 1), ("0,2", 2), ("GPU-1111", 1), ("GPU-1", 1), ("", 0), ("-1", 0), ("7", 0)],
)
def test_only_visible_gpus_count(gpus, monkeypatch, visible, expected):
    gpus("15360", "15360", "15360")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert profile.gpu_memory() == expected * 15360 * 2**20


def test_a_gpu_jax_can_not_use(gpus, monkeypatch, capsys):
    gpus("81559")
    monkeypatch.setattr(profile.importlib.util, "find_spec", lambda name: None)
    profile.choose(SIZES)
    assert "profile cpu (jax has no CUDA plugin" in capsys.readouterr().out


def test_a_driver_that_fails(gpus):
    gpus("81559", code=9)
    assert profile.current() == "cpu"


def test_jax_told_to_use_the_cpu(gpus, monkeypatch):
    gpus("81559")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert profile.current() == "cpu"


@pytest.mark.parametrize(
    ("name", "gigabytes", "expected"),
    [
        ("v5e-1", 16, "colab"),
        ("v5litepod-1", 16, "colab"),
        ("v5litepod-8", 128, "large"),
        ("v5e-8", 128, "large"),
        ("v2-8", 64, "large"),
        ("v3-8", 128, "large"),
        ("v4-8", 128, "large"),
        ("v6e-1", 32, "colab"),
        ("v6e-8", 256, "large"),
    ],
)
def test_by_tpu_name(monkeypatch, name, gigabytes, expected):
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", name)
    assert profile.tpu_memory() == gigabytes * 1e9 and profile.current() == expected


def test_tpu_by_device_files(monkeypatch):
    monkeypatch.setattr(
        profile.glob, "glob", lambda pattern: ["/dev/accel0"] if "accel" in pattern else []
    )
    assert profile.current() == "colab"
    found = [f"/dev/vfio/{i}" for i in range(8)]
    monkeypatch.setattr(profile.glob, "glob", lambda pattern: found if "vfio" in pattern else [])
    assert profile.current() == "cpu"  # without libtpu these are some other device
    monkeypatch.setattr(profile.importlib.util, "find_spec", lambda name: object())
    assert profile.current() == "large"


def test_rows_must_match():
    with pytest.raises(
        CourseError, match="expected rows smoke, cpu, colab, large, found cpu: write all four"
    ):
        profile.choose({"cpu": {}})
    with pytest.raises(CourseError, match="rows cpu and large differ in rate"):
        profile.choose({**SIZES, "large": {"steps": 1}})


def test_detection_does_not_start_jax():
    # Once jax has a backend, the number of simulated devices can no longer be set.
    code = "import sys; from utils.course import profile; profile.current(); assert 'jax' not in sys.modules"
    environment = {name: value for name, value in os.environ.items() if name != "COURSE_PROFILE"}
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], env=environment
    )
