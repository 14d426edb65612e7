"""Loading a checkpoint: seconds and memory of `weights.load`, of transformers, and of one plain
copy.

    python tools/make_random_checkpoint.py --like R1 /somewhere/r1-random
    python benchmarks/load.py /somewhere/r1-random [--rounds 3]

Prints JSON lines, the summary last. Every load happens in a process of its own, in turns, after the
file was read once (so that the disk plays no part). A thread in that process reads RssAnon, the
memory that is the process's own and no view of a file, every 2 ms. `peak_over_bytes` is its peak,
interpreter and libraries included, over the bytes of the tensors; `grown_over_bytes` leaves out
what was there when the load began. "numpy" copies each tensor once out of a memory map.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import process


def headers(folder: Path) -> dict[Path, tuple[int, dict]]:
    """file -> (where its bytes begin, its header), as in chapter 08."""
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        files[path] = (8 + length, header)
    return files


def numpy_copies(folder: Path):
    """A function that copies every tensor out of a memory map."""
    import numpy as np

    def load():
        tensors = {}
        for path, (start, header) in headers(folder).items():
            mapped = np.memmap(path, mode="r")
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                tensors[name] = np.array(mapped[start + begin : start + end])
        return tensors

    return load


def ours(folder: Path, dtype: str | None):
    """A function that loads with this package."""
    import jax
    from flax import nnx

    from utils.hf import weights

    jax.devices()  # starts the runtime

    def load():
        model = weights.load(folder, dtype=dtype)
        jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
        return model

    return load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default=None, help="cast on the way (default: as stored)")
    parser.add_argument("--child", choices=["numpy", "ours"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child == "numpy":
        return process.measure_load(numpy_copies(args.folder))
    if args.child == "ours":
        return process.measure_load(ours(args.folder, args.dtype))
    import common

    size = sum(
        entry["data_offsets"][1] - entry["data_offsets"][0]
        for _, header in headers(args.folder).values()
        for entry in header.values()
    )
    if not size:
        raise SystemExit(f"{args.folder}: expected safetensors files, found none")
    for path in args.folder.glob("*.safetensors"):  # into the page cache
        with open(path, "rb") as file:
            while file.read(1 << 24):
                pass
    child = [sys.executable, __file__, str(args.folder), "--child"]
    dtype = ["--dtype", args.dtype] if args.dtype else []
    commands = {"numpy": [*child, "numpy"], "ours": [*child, "ours", *dtype]}
    if common.has_peers():
        options = json.dumps({"folder": str(args.folder), "dtype": args.dtype})
        program = common.ROOT / "benchmarks" / "peers" / "load.py"
        commands["transformers"] = [common.PEERS_PYTHON, program, options]
    names = list(commands)
    loads = {side: [] for side in names}
    for i in range(args.rounds):
        for j in range(len(names)):
            side = names[(i + j) % len(names)]
            done = subprocess.run(commands[side], stdout=subprocess.PIPE, text=True, check=True)
            loads[side].append(json.loads(done.stdout.splitlines()[-1]))
    summary = {}
    for side, rows in loads.items():
        summary[side] = {
            "seconds": round(statistics.median(row["seconds"] for row in rows), 3),
            "peak_over_bytes": round(max(row["peak"] for row in rows) / size, 3),
            "grown_over_bytes": round(max(row["peak"] - row["before"] for row in rows) / size, 3),
            "kept_over_bytes": round(max(row["after"] - row["before"] for row in rows) / size, 3),
        }
        rounds = [round(row["seconds"], 3) for row in rows]
        common.add_versions(rows[0]["versions"])
        row = {"dtype": args.dtype or "as stored", "bytes": size, **summary[side], "rounds": rounds}
        common.report(benchmark="load", side=side, **row)
    plain = summary["numpy"]["seconds"]
    common.report(
        benchmark="summary",
        bytes=size,
        seconds_over_numpy={s: round(row["seconds"] / plain, 3) for s, row in summary.items()},
        peak_over_bytes={s: row["peak_over_bytes"] for s, row in summary.items()},
    )


if __name__ == "__main__":
    main()
