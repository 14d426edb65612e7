"""A fine-tuning run of a second, for tests.

`python -m tests.helpers.finetuning FOLDER KILLS SEED` is killed so often, and resumes. The killed
process is a fork of one that has imported everything and started nothing: many kills cost little.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from tests.helpers import checkpoints
from utils.commands import finetune
from utils.commands.options import Finetune

STEPS, SAVE_EVERY = 40, 2
LONG = 240  # room for twenty kills, each of which may let a dozen steps pass


def write_data(path: Path, count: int = 40) -> Path:
    rows = []
    for a, b in ((i, i % 7) for i in range(count)):
        row = {"prompt": f"What is {a} + {b}?", "response": f"It is {a + b}.", "answer": str(a + b)}
        rows.append(json.dumps(row) + "\n")
    path.write_text("".join(rows))
    return path


def options(folder: Path, file: Path, **changes) -> Finetune:
    return Finetune(**(_sizes(folder, file) | changes))


def _sizes(folder: Path, file: Path) -> dict:
    return dict(
        model=str(checkpoints.folder_of("qwen2-untied")), data=str(file), output=str(folder),
        max_seq_length=64, batch_size=4, rank=2, loss_chunk_size=64, steps=STEPS, learning_rate=1e-2,
        warmup_steps=4, held_out=4, save_every=SAVE_EVERY, log_every=10, evaluate_every=20,
    )  # fmt: skip


GIVEN = tuple(_sizes(Path(), Path()))


def killed(folder: Path, data: Path, kills: int, seed: int) -> list[list[int]]:
    """Run in forked processes, each killed at a random moment; the steps saved after each of them."""
    chance, saved = random.Random(seed), []

    def steps() -> list[int]:
        names = (folder / "checkpoints").iterdir() if (folder / "checkpoints").exists() else ()
        return sorted(int(path.name) for path in names if path.name.isdigit())

    for kill in range(kills):
        before = steps()
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            finetune.run(options(folder, data, steps=LONG))
            os._exit(0)
        after_a_save = kill % 4 > 0  # three in four; the others at any moment from the start
        limit = time.monotonic() + 120
        while after_a_save and steps() == before and time.monotonic() < limit:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.15 if after_a_save else 3))
        os.kill(child, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != -signal.SIGKILL:
            raise SystemExit(f"the run was over before kill {kill} of seed {seed}: {steps()}")
        saved.append(steps())
    return saved


if __name__ == "__main__":
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    print(killed(folder / "run", folder / "data.jsonl", kills, seed))
    finetune.run(options(folder / "run", folder / "data.jsonl", steps=LONG))
