"""Ask the reference implementations, which live in an environment of their own: see programs/reference.py."""

import itertools
import json
import subprocess
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-peers" / "bin" / "python"
MISSING = "no .venv-peers here: run `make install-peers`, or `make test-peers`, which installs it and runs these tests"


class Peer:
    """A process that imported torch, transformers and peft once (five seconds) and answers until it is closed.

    peer.logits(folder=..., tokens=...)     # any function of programs/reference.py: JSON, paths and arrays in and out
    """

    def __init__(self, folder: Path):
        """`folder` is where the arrays are exchanged."""
        self.folder, self.numbers = folder, itertools.count()
        self.log = open(
            folder / "log.txt", "w"
        )  # what the libraries say: shown when the process dies
        program = Path(__file__).parent / "programs" / "reference.py"
        pipes = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": self.log,
            "text": True,
        }
        self.process = subprocess.Popen([PYTHON, program], cwd=ROOT, **pipes)
        self._answer()  # ready

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
            log = Path(self.log.name).read_text()
            raise RuntimeError(
                f"the peers' process ended with status {self.process.wait()}:\n{log[-3000:]}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"in the peers' process:\n{answer['error']}")
        return answer["result"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.log.close()


def _with_arrays(value, stored):
    if isinstance(value, dict):
        return (
            stored[value["array"]]
            if value.keys() == {"array"}
            else {k: _with_arrays(v, stored) for k, v in value.items()}
        )
    return value
