"""The sharding painter's answers are what XLA compiles: the layouts that have names, and others drawn by chance.

The compiler that recorded them is the one that is asked again, where it is installed; another version may choose another way
where several lead to the same result, and is asked about the named layouts alone.
"""

import itertools
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tools import sharding_cases

ROOT = Path(__file__).resolve().parents[2]
DATA = json.loads(sharding_cases.OUT.read_text())
SPECS = DATA["specs"]
SAMPLE = 60


def recorded(mesh: str, x: str, w: str, y: str) -> list:
    n = len(SPECS)
    number = (SPECS.index(x) * n + SPECS.index(w)) * n + SPECS.index(y)
    return DATA["outcomes"][DATA["cases"][mesh][number]]


def named() -> list[tuple]:
    """The layouts that the widget has buttons for."""
    text = (ROOT / "book" / "_static" / "widgets" / "sharding-painter.js").read_text()
    block = text[text.index("const LAYOUTS") : text.index("];", text.index("const LAYOUTS"))]
    return [tuple(found) for found in re.findall(r"\['[^']+', '(..)', '(..)', '(..)'\]", block)]


def compiled(cases: list[tuple]) -> list:
    code = (
        "import json, sys, jax; jax.config.update('jax_platforms', 'cpu'); jax.config.update('jax_num_cpu_devices', 8)\n"
        "from tools import sharding_cases as s\n"
        "cases = json.loads(sys.stdin.read())\n"
        "print(json.dumps([s.case(tuple(map(int, m.split('x'))), x, w, y) for m, x, w, y in cases]))"
    )
    env = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(cases),
        env=env,
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_combination_is_there():
    assert set(DATA["cases"]) == {f"{a}x{b}" for a, b in sharding_cases.MESHES}
    for cases in DATA["cases"].values():
        assert len(cases) == len(SPECS) ** 3 and max(cases) < len(DATA["outcomes"])
    assert recorded("4x2", "f.", "..", "f.") == []
    assert recorded("4x2", "f.", "f.", "f.") == [["all-gather", "W", "fsdp", 32768]]
    assert recorded("4x2", "ft", "t.", "f.") == [["all-reduce", "y", "tp", 32768]]
    assert recorded("8x1", ".t", "t.", "..") == [], "along an axis of one device nothing is cut"


@pytest.mark.slow
def test_the_compiler_says_so():
    cases = [(mesh, *specs) for mesh, specs in itertools.product(DATA["cases"], named())]
    if f"jax {jax.__version__}" in DATA["provenance"]["compiled_by"]:
        chance = random.Random(12)
        cases += [
            (chance.choice(list(DATA["cases"])), *chance.choices(SPECS, k=3)) for _ in range(SAMPLE)
        ]
    for case, found in zip(cases, compiled(cases), strict=True):
        assert found == recorded(*case), case


@pytest.mark.parametrize(
    "line, axis",
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}, use_global_device_ids=true", "tp"),
        ("replica_groups=[2,4]<=[4,2]T(1,0), use_global_device_ids=true", "fsdp"),
        ("replica_groups=[1,8]<=[8], use_global_device_ids=true", "both"),
        (
            "replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=2] {'axis_1'}, use_global_device_ids=true",
            "fsdp",
        ),
        (
            "replica_groups=mesh['axis_0'=1,'axis_1'=2,'axis_2'=4], device_ids=([4,2]T(1,0)) {'axis_1'}, x",
            "tp",
        ),
        ("replica_groups=mesh['a'=8] {'a':(4)2}, use_global_device_ids=true", "tp"),
        ("source_target_pairs={{0,2},{2,0}}", "fsdp"),
    ],
)
def test_groups_of_devices_are_read_in_every_notation(line, axis):
    import numpy as np

    class Mesh:
        devices = np.array(
            [[type("Device", (), {"id": 2 * i + j})() for j in range(2)] for i in range(4)]
        )

    assert sharding_cases.axis_of(line, Mesh) == axis
