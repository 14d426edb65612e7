"""What the benchmarks share: JSON lines, processes that take turns, and the machine's own matrix
speed."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import process

from utils import kernels

ROOT = Path(__file__).resolve().parents[1]
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"  # `make install-peers`
_peer_versions: dict[str, str] = {}


def has_peers() -> bool:
    """Whether torch, transformers and peft are installed, in their own environment; else a note on
    stderr."""
    if not PEERS_PYTHON.exists():
        print("without the peers' sides: `make install-peers` installs them", file=sys.stderr)
    return PEERS_PYTHON.exists()


def add_versions(versions: dict[str, str]) -> None:
    """Versions of a peer's packages, for the lines that follow."""
    _peer_versions.update(versions)


def report(**row) -> None:
    """One line of JSON, with the device and the versions."""
    versions = {"python": platform.python_version()} | process.versions("jax", "flax")
    device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    # Large pages for malloc spare both sides the page faults of every step's temporary arrays: say
    # whether they were on.
    tunables = os.environ.get("GLIBC_TUNABLES")
    row |= {"device": device, "glibc_tunables": tunables, "versions": versions | _peer_versions}
    print(json.dumps(row), flush=True)


# -------------------------------------------------------------------------------------------- turns


class Side:
    """A process that calls one of its functions at each turn, as `process.serve` does it.

    Sides in one process disturb each other: threads that one library leaves spinning cost JAX a
    fifth of its speed.
    """

    def __init__(self, command: list, **options):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.name = " ".join(map(str, command))[:200]
        self.process = subprocess.Popen([*map(str, command)], **pipes, **options)
        self.about = self._answer()  # everything is loaded

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: ended with status {self.process.wait()}")
        return json.loads(line)

    def turn(self, number: int = 0) -> dict:
        """Call the function of this number there: {"seconds", "result"}."""
        print(number, file=self.process.stdin, flush=True)
        return self._answer()

    def seconds(self, number: int = 0) -> float:
        return self.turn(number)["seconds"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def start_ours(script: str, **options) -> Side:
    """The functions that `ours(**options)` of this script returns, in a process of their own."""
    return Side([sys.executable, script, "--serve", json.dumps(options, default=str)])


def start_peer(name: str, **options) -> Side:
    """The program of that name in benchmarks/peers, in the peers' environment."""
    program = Path(__file__).parent / "peers" / f"{name}.py"
    side = Side([PEERS_PYTHON, program, json.dumps(options, default=str)])
    add_versions(side.about["versions"])
    return side


def served(ours) -> bool:
    """Whether `start_ours` started this process: then this answers its turns, and returns at the
    end."""
    if sys.argv[1:2] != ["--serve"]:
        return False
    process.serve(lambda: (ours(**json.loads(sys.argv[2])), {}))
    return True


def seconds(call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def take_turns(sides: dict, rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each side in each round, in an order that rotates.

    A side is a function that does its work once and returns the seconds it took.
    """
    names = list(sides)
    for _ in range(warm_up):
        for name in names:
            sides[name]()
    times = {name: [] for name in names}
    for i in range(rounds):
        for j in range(len(names)):
            name = names[(i + j) % len(names)]
            time.sleep(0.3)  # until the threads of the side before rest: some spin for a while
            times[name].append(sides[name]())
    return times


def ratio(slow: list[float], fast: list[float]) -> float:
    """How many times quicker: the median over rounds, in each of which the machine was the same."""
    return round(statistics.median(a / b for a, b in zip(slow, fast)), 3)


def matrix_product(dtype, size: int):
    """(the seconds of one size x size product as a function, its floating-point operations).

    Multiplied as the model multiplies (`kernels.mixed_precision_einsum`): for bfloat16 that is the
    faster way on a CPU.
    """
    a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
    out = kernels.activation_dtype(dtype)
    product = jax.jit(lambda a, b: kernels.mixed_precision_einsum("Ni,io->No", a, b, out))
    return lambda: seconds(lambda: product(a, b).block_until_ready()), 2 * size**3
