"""This tree beside another commit: is anything slower than it was?

    python benchmarks/against.py --commit HEAD~1 decode lora_step minigpt finetune load

Each side has its own code (the commit's comes out of git into a temporary folder) and, per
benchmark, one long-lived process, `against_worker.py`, which prepares the same work on either and
has compiled before the first turn. Then the sides alternate, a timed unit at each turn, and who
begins changes from pair to pair. Nothing else should run.

Prints a JSON line per piece of work: the seconds of both sides, the ratio of each pair (old seconds
over new seconds: more than 1 means that this tree is quicker), the median ratio, and an interval
that holds the true median with at least 95% probability (binomial order statistics, which assume
nothing about the distribution). A piece of work is slower when the whole interval lies below 0.97:
then the status is 1. The five benchmarks take about twelve minutes on two cores.
"""

import argparse
import io
import json
import math
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
from common import ROOT

from utils.hf import hub

BENCHMARKS = ("decode", "lora_step", "minigpt", "finetune", "load")
SLOWER = 0.97  # a ratio below this counts
CONFIDENCE = 0.95


def check_out(commit: str, folder: str) -> str:
    """Put the commit's files into the folder; returns its full name."""
    git = ["git", "-C", str(ROOT)]
    name = subprocess.run(
        [*git, "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"],
        stdout=subprocess.PIPE,
        text=True,
    )
    if name.returncode:
        raise SystemExit(f"--commit {commit}: expected a commit of this repository")
    commit = name.stdout.strip()
    # Not a worktree: that would leave an entry in .git when this process is killed.
    archive = subprocess.run([*git, "archive", commit], stdout=subprocess.PIPE, check=True)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return commit


def median_interval(values: list[float]) -> tuple[float, float, float] | None:
    """(low, high, confidence) of the median; None when there are too few values for `CONFIDENCE`.

    Each value lies below the true median with probability 1/2, so the k-th smallest and the k-th
    largest enclose it unless fewer than k of n values lie on one side.
    """
    n = len(values)

    def coverage(k: int) -> float:
        return 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n

    k = max((k for k in range(1, n // 2 + 1) if coverage(k) >= CONFIDENCE), default=None)
    return None if k is None else (sorted(values)[k - 1], sorted(values)[n - k], coverage(k))


def start(benchmark: str, root: Path, options: dict) -> common.Side:
    """The worker of one side: `utils` is the one of that side's folder."""
    env = os.environ | {"PYTHONPATH": str(root)}
    worker = Path(__file__).with_name("against_worker.py")
    side = common.Side([sys.executable, worker, benchmark, json.dumps(options)], cwd=root, env=env)
    if not Path(side.about["utils"]).is_relative_to(root.resolve()):
        raise SystemExit(f"{benchmark}: expected utils of {root}, found {side.about['utils']}")
    return side


def compare(benchmark: str, roots: dict[str, Path], pairs: int, options: dict) -> list[dict]:
    """The lines of a benchmark."""
    sides = {name: start(benchmark, root, options) for name, root in roots.items()}
    rows = []
    for number, unit in enumerate(sides["new"].about["units"]):
        for side in sides.values():
            for _ in range(2):  # compiles, and warms up
                side.turn(number)
        seconds, last = {name: [] for name in sides}, {}
        for pair in range(pairs):
            for name in ("old", "new") if pair % 2 == 0 else ("new", "old"):
                time.sleep(0.2)  # until the threads of the side before rest: some spin for a while
                turn = sides[name].turn(number)
                seconds[name].append(turn["seconds"])
                last[name] = turn["result"]
        ratios = [old / new for old, new in zip(seconds["old"], seconds["new"])]
        # A loss after as many steps, or a checksum of the texts: equal, where the work is the same.
        row = {"benchmark": benchmark, "unit": unit, "results": last}
        row |= {f"{name}_seconds": [round(t, 4) for t in times] for name, times in seconds.items()}
        row |= {
            "ratios": [round(r, 3) for r in ratios],
            "median": round(statistics.median(ratios), 3),
        }
        interval = median_interval(ratios)
        row["verdict"] = f"too few pairs for {CONFIDENCE:.0%}"
        if interval is not None:
            low, high, confidence = interval
            row["interval"], row["confidence"] = (
                [round(low, 3), round(high, 3)],
                round(confidence, 3),
            )
            row["verdict"] = "slower" if high < SLOWER else "not slower"
        common.report(**row)
        rows.append(row)
    for side in sides.values():
        side.close()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmarks", nargs="+", choices=BENCHMARKS)
    parser.add_argument("--commit", required=True, help="the one to compare with")
    parser.add_argument(
        "--pairs", type=int, default=15, help="turns of each side; at least 9 for a verdict"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of decode's units")
    args = parser.parse_args()
    options = {"model": str(hub.model(hub.SMOLLM2)), "max_new_tokens": args.max_new_tokens}
    with tempfile.TemporaryDirectory(prefix="against-") as folder:
        commit = check_out(args.commit, folder)
        roots = {"old": Path(folder), "new": ROOT}
        rows = [
            row
            for benchmark in args.benchmarks
            for row in compare(benchmark, roots, args.pairs, options)
        ]
    slower = [f"{row['benchmark']}: {row['unit']}" for row in rows if row["verdict"] == "slower"]
    medians = {f"{row['benchmark']}: {row['unit']}": row["median"] for row in rows}
    common.report(
        benchmark="summary", commit=commit, pairs=args.pairs, medians=medians, slower=slower
    )
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
