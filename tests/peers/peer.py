"""Ask the reference implementations, which live in an environment of their own."""

import itertools
import json
import subprocess
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-peers" / "bin" / "python"
MISSING = (
    "no .venv-peers here: `make install-peers` makes it, `make test-peers` also runs these tests"
)


class Peer:
    """A process that imports torch, transformers and peft once and answers until it is closed.

    `peer.logits(folder=..., tokens=...)` calls the function of that name in programs/reference.py:
    arguments and results are what JSON knows, paths, and NumPy arrays.
    """

    def __init__(self, folder: Path):
        """`folder` is where arrays are exchanged."""
        self.folder, self.numbers = folder, itertools.count()
        self.log = folder / "log.txt"  # what the libraries print: shown when the process dies
        command = [PYTHON, Path(__file__).parent / "programs" / "reference.py"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stderr=log, **pipes)
        self._answer()  # it is ready

    def __getattr__(self, function: str):
        return lambda **arguments: self.call(function, **arguments)

    def call(self, function: str, **arguments):
        number = next(self.numbers)
        inputs, outputs = (self.folder / f"{number}-{name}.npz" for name in ("inputs", "outputs"))
        arrays = {name: value for name, value in arguments.items() if isinstance(value, np.ndarray)}
        np.savez(inputs, **arrays)
        rest = {name: value for name, value in arguments.items() if name not in arrays}
        request = {"function": function, "arguments": rest, "inputs": inputs, "outputs": outputs}
        print(json.dumps(request, default=str), file=self.process.stdin, flush=True)
        result = self._answer()
        with np.load(outputs) as stored:
            result = _with_arrays(result, stored)
        inputs.unlink()
        outputs.unlink()
        return result

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            status, log = self.process.wait(), self.log.read_text()[-3000:]
            raise RuntimeError(f"the peers' process ended with status {status}:\n{log}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"in the peers' process:\n{answer['error']}")
        return answer["result"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


def _with_arrays(value, stored):
    if not isinstance(value, dict):
        return value
    if value.keys() == {"array"}:
        return stored[value["array"]]
    return {name: _with_arrays(item, stored) for name, item in value.items()}
