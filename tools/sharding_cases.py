"""Compile every layout of y = x W for the sharding painter: book/_static/widgets/sharding-painter.json.

    python tools/sharding_cases.py

x [256, 64], W [64, 128] and y [256, 128] lie on eight simulated devices in every way that two mesh axes
allow: nine layouts each, on four meshes. XLA compiles each product; what is written down are its
collectives: their kind, what they move (x, W or the product), along which axis, and the bytes of the
result on one device, as `utils.commands.hlo` counts them. Three minutes on two cores;
tests/course/test_sharding_cases.py compiles a sample again.
"""

import datetime
import itertools
import json
import math
import os
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from utils import sharding  # noqa: E402
from utils.commands import hlo  # noqa: E402

OUT = ROOT / "book" / "_static" / "widgets" / "sharding-painter.json"
BATCH, IN, OUTPUTS = 256, 64, 128
MESHES = ((8, 1), (4, 2), (2, 4), (1, 8))
# One letter for each of the two dimensions: "." not split, "f" along fsdp, "t" along tp, "b" along both.
SPECS = ("..", "f.", ".f", "t.", ".t", "b.", ".b", "ft", "tf")
NAMES = {".": None, "f": "fsdp", "t": "tp", "b": ("fsdp", "tp")}


def reduced(spec: str, mesh: tuple[int, int]) -> str:
    """The same layout without the axes that have one device."""
    letters = []
    for letter in spec:
        axes = {".": "", "f": "f", "t": "t", "b": "ft"}[letter]
        kept = "".join(axis for axis in axes if mesh["ft".index(axis)] > 1)
        letters.append({"": ".", "ft": "b"}.get(kept, kept))
    return "".join(letters)


def compiled(mesh, x: str, w: str, y: str) -> str:
    """The compiled program of y = x W with these layouts, as text."""

    def place(spec):
        return NamedSharding(mesh, P(*(NAMES[letter] for letter in spec)))

    arguments = (
        jax.ShapeDtypeStruct((BATCH, IN), jnp.float32, sharding=place(x)),
        jax.ShapeDtypeStruct((IN, OUTPUTS), jnp.float32, sharding=place(w)),
    )
    return jax.jit(jnp.matmul, out_shardings=place(y)).lower(*arguments).compile().as_text()


def collectives(text: str, mesh) -> list[list]:
    """[kind, what is moved, along which axis, bytes] of each collective, in the program's order."""
    entry = text[text.index("\nENTRY ") :].splitlines()[1:]
    lines = {
        match[1]: line
        for line in entry
        if (match := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", line))
    }
    bodies = {
        match[1]: match[2]
        for match in re.finditer(r"\n%?([\w.-]+) \([^\n]*\{\n(.*?)\n\}", text, re.S)
    }

    def operands(line: str) -> list[str]:
        return [
            name for name in re.findall(r"%([\w.-]+)", line.split(" = ", 1)[1]) if name in lines
        ]

    def source(name: str) -> str:
        """What an operation's result is made of: the product, if a dot lies on the way to the arguments."""
        line = lines[name]
        called = "".join(
            bodies.get(other, "") for other in re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", line)
        )
        if " dot(" in line or " dot(" in called or "custom-call" in line or "__onednn" in called:
            return "y"
        if " parameter(" in line:
            return "xW"[int(re.search(r"parameter\((\d)\)", line)[1])]
        sources = {source(other) for other in operands(line)} - {""}
        return "y" if "y" in sources else "".join(sorted(sources))

    results = []
    for line in lines.values():
        kind = re.search(r" ([a-z-]+?)(?:-start)?\(", line.split(" = ", 1)[1])
        if kind is None or kind[1] not in hlo.KINDS:
            continue
        one = hlo.collectives(f"ENTRY %main () -> f32[] {{\n{line}\n}}")
        moved = "".join(sorted({source(other) for other in operands(line)}))
        results.append([kind[1], moved, axis_of(line, mesh), one[kind[1]]["bytes"]])
    return results


def axis_of(line: str, mesh) -> str:
    """The mesh axis along which the devices of a collective differ: "fsdp", "tp" or "both"."""
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", line):
        groups = [list(map(int, pair.split(","))) for pair in re.findall(r"\{([\d,]+)\}", pairs[1])]
    elif iota := re.search(r"replica_groups=\[(\d+),\d+\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line):
        groups = _iota(iota[2]).reshape(int(iota[1]), -1).tolist()
    elif named := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", line
    ):
        groups = _named_groups(*named.groups())
    else:
        listed = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", line)
        groups = [
            list(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed[1])
        ]
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    where = {int(ids[i]): i for i in np.ndindex(ids.shape)}
    rows, columns = (
        max(len({where[d][axis] for d in group}) for group in groups) for axis in (0, 1)
    )
    return "both" if rows > 1 and columns > 1 else "fsdp" if rows > 1 else "tp"


def _iota(text: str) -> np.ndarray:
    """The devices in the order that [4,2]T(1,0) says: 0 to 7 as a matrix of that shape, transposed, read row by row."""
    shape, order = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    shape = tuple(map(int, shape.split(",")))
    order = tuple(map(int, order.split(","))) if order else tuple(range(len(shape)))
    return np.arange(math.prod(shape)).reshape(shape).transpose(order).reshape(-1)


def _named_groups(sizes: str, order: str | None, axes: str) -> list[list[int]]:
    """The groups of mesh['a'=4,'b'=2] {'a'}: devices that differ in 'a' alone.

    'a':(2)2 is the last half of an axis of 4.
    """
    full = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", sizes)}
    parts = {}
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes):
        parts[name] = int(before or 1), int(size or full[name])
    shape, moving = [], []
    for name, size in full.items():
        before, part = parts.get(name, (size, 1))
        shape += [before, part, size // before // part]
        moving += [len(shape) - 2] * (name in parts)
    kept = [i for i in range(len(shape)) if i not in moving]
    devices = _iota(order or f"[{math.prod(shape)}]").reshape(shape)
    return (
        devices.transpose(kept + moving).reshape(-1, math.prod(shape[i] for i in moving)).tolist()
    )


def case(mesh_shape: tuple[int, int], x: str, w: str, y: str) -> list[list]:
    """The collectives of one layout on one mesh."""
    mesh = sharding.make_mesh(fsdp=mesh_shape[0], tp=mesh_shape[1])
    return collectives(compiled(mesh, x, w, y), mesh)


def main() -> None:
    outcomes: list = [[]]
    cases, known = {}, {}
    for mesh in MESHES:
        rows = cases["x".join(map(str, mesh))] = []
        for specs in itertools.product(SPECS, repeat=3):
            key = (mesh, *(reduced(spec, mesh) for spec in specs))
            if key not in known:
                outcome = case(*key)
                if outcome not in outcomes:
                    outcomes.append(outcome)
                known[key] = outcomes.index(outcome)
            rows.append(known[key])
        print(mesh, len(known), "programs,", len(outcomes), "different answers", flush=True)
    data = {
        "provenance": {
            "compiled_by": f"XLA for CPUs, jax {jax.__version__}",
            "devices": "8 simulated",
            "made_by": "tools/sharding_cases.py",
            "date": datetime.date.today().isoformat(),
        },
        "shape": {"batch": BATCH, "in": IN, "out": OUTPUTS, "itemsize": 4},
        "specs": SPECS,
        "outcomes": outcomes,
        "cases": cases,
    }
    OUT.write_text(json.dumps(data, separators=(",", ":")).replace('"cases"', '\n"cases"') + "\n")
    print(f"{OUT.relative_to(ROOT)}: {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # the programs are read, not run
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    main()
