"""`kernels.cpu.keep_memory`: what a process has freed stays with it, where the C library can be told so."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from utils.kernels import cpu


@pytest.mark.serial
@pytest.mark.parametrize("size", [100_000_000, pytest.param(2_200_000_000, marks=pytest.mark.slow)])
def test_kept_memory_is_not_given_back(size):
    """Without it, each round would touch fresh pages, 25,000 for 100 MB; above 2 GB too. glibc alone can be told."""
    code = """
import json, resource, sys
from utils.kernels import cpu
kept = sys.argv[1] == "keep" and cpu.keep_memory()
import numpy as np
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
size = int(sys.argv[2])
for _ in range(2):
    np.ones(size, np.uint8)
before = faults()
for _ in range(3):
    np.ones(size, np.uint8)
print(json.dumps([kept, faults() - before]))
"""
    env = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}

    def run(how: str) -> list:
        command = [sys.executable, "-c", code, how, str(size)]
        return json.loads(
            subprocess.check_output(command, text=True, cwd=Path(__file__).parents[2], env=env)
        )

    (kept, faults), (_, usual) = run("keep"), run("as usual")
    assert kept == (platform.libc_ver()[0] == "glibc")
    assert faults < 1000 < usual if kept else faults > usual / 2


def test_where_nothing_can_be_told_nothing_happens(monkeypatch):
    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda name: object())
    assert cpu.keep_memory() is False
