"""What the benchmarks share: one JSON line per result, sides that take turns, and the machine's own matrix speed."""

import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import time
from importlib import metadata

import jax

from utils import kernels


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def has(*packages: str) -> bool:
    """Whether the peer is installed."""
    return all(version(package) for package in packages)


def report(**row) -> None:
    packages = ("jax", "flax", "torch", "transformers", "peft")
    versions = {"python": platform.python_version()} | {p: v for p in packages if (v := version(p))}
    device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    # Large pages for malloc spare both sides the page faults of every step's temporary arrays: say whether they were on.
    tunables = os.environ.get("GLIBC_TUNABLES")
    print(json.dumps(row | {"device": device, "glibc_tunables": tunables, "versions": versions}), flush=True)


def seconds(call) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


class Apart:
    """Functions in a process of their own: `make(*args)` gives a list of them there, `run(i)` calls one and waits.

    Sides in one process disturb each other: threads that one library leaves spinning cost JAX a fifth of its speed.
    """

    def __init__(self, make, *args):
        context = multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe()
        context.Process(target=_serve, args=(there, make, args), daemon=True).start()
        there.close()
        self.pipe.recv()  # made

    def run(self, number: int = 0):
        self.pipe.send(number)
        return self.pipe.recv()


def _serve(pipe, make, args) -> None:
    functions = make(*args)
    pipe.send("made")
    with contextlib.suppress(EOFError):  # the benchmark has ended
        while True:
            pipe.send(functions[pipe.recv()]())


def take_turns(sides: dict, rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each side (a function that waits for its result) in each round, in an order that rotates."""
    names = list(sides)
    for _ in range(warm_up):
        for name in names:
            sides[name]()
    found = {name: [] for name in names}
    for i in range(rounds):
        for j in range(len(names)):
            name = names[(i + j) % len(names)]
            time.sleep(0.3)  # until the threads of the side before have come to rest: some spin for a while
            found[name].append(seconds(sides[name]))
    return found


def ratio(slow: list[float], fast: list[float]) -> float:
    """How many times quicker: the median of the ratios within a round, which a slow spell of the machine leaves alone."""
    return round(statistics.median(a / b for a, b in zip(slow, fast)), 3)


def matrix_product(dtype, size: int):
    """(a function that makes one size x size product and waits for it, its floating-point operations).

    Asked for as the model asks (`transformer.product`): for bfloat16 that is the faster way on a CPU.
    """
    a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
    run = jax.jit(lambda a, b: kernels.mixed_precision_einsum("Ni,io->No", a, b))
    return lambda: run(a, b).block_until_ready(), 2 * size**3
