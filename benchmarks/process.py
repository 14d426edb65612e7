"""What runs inside a measured process, ours or a peer's: the standard library alone, so that it
runs in any environment."""

import json
import os
import sys
import threading
import time
from importlib import metadata
from pathlib import Path


def versions(*packages: str) -> dict[str, str]:
    """Those of the packages that are installed here."""
    installed = {}
    for package in packages:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


def serve(prepare) -> None:
    """Answer turns until standard input is closed: each line is the number of a function to call.

    `prepare()` returns (functions, a dict for the first line of output). Then, for each turn, a
    line {"seconds", "result"}. A function returns when its work is done, with something JSON knows.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand between the answers
    functions, about = prepare()
    print(json.dumps(about), file=answers, flush=True)
    for line in sys.stdin:
        function = functions[int(line)]
        started = time.perf_counter()
        result = function()
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "result": result}), file=answers, flush=True)


def rss_anon() -> int:
    """Bytes of this process that are no view of a file (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    raise SystemExit("RssAnon: this benchmark needs Linux")


class Peak(threading.Thread):
    """The largest RssAnon seen until `stop`, looked at every 2 ms."""

    def __init__(self):
        super().__init__(daemon=True)
        self.largest, self.stopped = 0, threading.Event()

    def run(self):
        while not self.stopped.wait(0.002):
            self.largest = max(self.largest, rss_anon())

    def stop(self) -> int:
        self.stopped.set()
        self.join()
        return max(self.largest, rss_anon())


def measure_load(load) -> None:
    """Print as JSON the seconds of a load and the process's own memory: before, at its peak, and
    after."""
    before, peak = rss_anon(), Peak()
    peak.start()
    started = time.perf_counter()
    loaded = load()
    seconds = time.perf_counter() - started
    memory = {"peak": peak.stop(), "before": before, "after": rss_anon()}
    del loaded
    print(
        json.dumps({"seconds": seconds} | memory | {"versions": versions("torch", "transformers")})
    )
