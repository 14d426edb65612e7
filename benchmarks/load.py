"""Loading a checkpoint: seconds and memory of `weights.load`, of transformers, and of copying the bytes once.

    python tools/make_random_checkpoint.py --like R1 /somewhere/r1-random
    python benchmarks/load.py /somewhere/r1-random [--rounds 3]

Prints JSON lines, the summary last. Every load happens in a process of its own, in turns, after the file was read once (so
that the disk plays no part). A thread in that process reads RssAnon, the memory that is the process's own and no view of
a file, every 2 ms. `peak_over_bytes` is its peak, interpreter and libraries included, over the bytes of the tensors;
`grown_over_bytes` leaves out what was there when the load began. "numpy" copies each tensor once out of a memory map.
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # and the script's own folder is there already

DTYPES = {"F32": 4, "F16": 2, "BF16": 2}


def rss_anon() -> int:
    """Bytes of this process that are no view of a file (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    raise SystemExit("RssAnon: this benchmark needs Linux")


class Peak(threading.Thread):
    """The largest RssAnon seen until `stop`."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most, self.over = 0, threading.Event()

    def run(self):
        while not self.over.wait(0.002):
            self.most = max(self.most, rss_anon())

    def stop(self) -> int:
        self.over.set()
        self.join()
        return max(self.most, rss_anon())


def headers(folder: Path) -> dict[Path, tuple[int, dict]]:
    """file -> (where its bytes begin, its header), as in chapter 08."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found[path] = (8 + length, header)
    return found


def prepare(side: str, folder: Path, dtype: str | None):
    """Imports what the side needs; returns the function that loads."""
    if side == "numpy":
        import numpy as np

        def load():
            kept = {}
            for path, (start, header) in headers(folder).items():
                mapped = np.memmap(path, mode="r")
                for name, entry in header.items():
                    begin, end = entry["data_offsets"]
                    kept[name] = np.array(mapped[start + begin : start + end])
            return kept

    elif side == "ours":
        import jax

        from utils.hf import weights

        jax.devices()  # starts the runtime

        def load():
            from flax import nnx

            model = weights.load(folder, dtype=dtype)
            jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
            return model

    else:
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        auto = transformers.AutoModelForCausalLM
        auto  # noqa: B018 (the lazy import happens here and not within the measurement)

        def load():
            model = auto.from_pretrained(folder, dtype=getattr(torch, dtype) if dtype else "auto")
            # from_pretrained may leave weights as views of the file: look at every page of them
            for parameter in model.parameters():
                parameter.detach().view(torch.uint8).view(-1)[::4096].sum()
            return model

    return load


def child(side: str, folder: Path, dtype: str | None) -> None:
    load = prepare(side, folder, dtype)
    before, peak = rss_anon(), Peak()
    peak.start()
    begun = time.perf_counter()
    kept = load()
    taken = time.perf_counter() - begun
    print(json.dumps({"seconds": taken, "peak": peak.stop(), "before": before, "after": rss_anon()}))
    del kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default=None, help="cast on the way (default: as stored)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.folder, args.dtype)
    from common import has, report

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
    sides = ["numpy", "ours"] + ["transformers"] * has("torch", "transformers")
    found = {side: [] for side in sides}
    for i in range(args.rounds):
        for j in range(len(sides)):
            side = sides[(i + j) % len(sides)]
            command = [sys.executable, __file__, str(args.folder), "--child", side]
            command += ["--dtype", args.dtype] * bool(args.dtype)
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
    summary = {}
    for side, rows in found.items():
        summary[side] = {
            "seconds": round(statistics.median(row["seconds"] for row in rows), 3),
            "peak_over_bytes": round(max(row["peak"] for row in rows) / size, 3),
            "grown_over_bytes": round(max(row["peak"] - row["before"] for row in rows) / size, 3),
            "kept_over_bytes": round(max(row["after"] - row["before"] for row in rows) / size, 3),
        }
        rounds = [round(row["seconds"], 3) for row in rows]
        report(benchmark="load", side=side, dtype=args.dtype or "as stored", bytes=size, **summary[side], rounds=rounds)
    report(
        benchmark="summary",
        bytes=size,
        seconds_over_numpy={s: round(row["seconds"] / summary["numpy"]["seconds"], 3) for s, row in summary.items()},
        peak_over_bytes={s: row["peak_over_bytes"] for s, row in summary.items()},
    )


if __name__ == "__main__":
    main()
