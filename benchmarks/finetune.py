"""The fine-tuning loop on SmolLM2: this package beside a loop with torch and PEFT, same examples.

    python benchmarks/finetune.py [--rounds 10]     # the peer runs where `make install-peers` was
    run

Prints JSON lines, the summary last. Arithmetic word problems of the built-in generator, a bfloat16
base, rank 16 on all linear layers, AdamW with clipped gradients, loss on the completion. Each side
does it its own way: here whole examples are packed into rows of --max-seq-length tokens; there a
batch is padded to its longest example, the usual way. `tokens_per_s` counts the examples' tokens,
never padding. Each side has a process of its own; all take turns, one update at a time.

`ours_fit` is the loop as it is used, with data, metrics and progress, logging at every step, which
is the worst case; `ours_step` is the compiled step alone. What lies between them is the cost of
data and logging.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import jax
import jax.numpy as jnp
from flax import nnx

from utils import kernels, lora, train
from utils.commands import finetune
from utils.commands.options import Finetune
from utils.data import problems, sft
from utils.hf import hub, weights
from utils.kernels import cpu

STEPS = 10_000  # more than are made


class Gated:
    """Batches handed out singly: `advance` lets the loop have one and returns when it wants the
    next."""

    def __init__(self, batches):
        self.batches = batches
        self.granted, self.requested = threading.Semaphore(0), threading.Semaphore(0)

    def __next__(self):
        self.requested.release()
        self.granted.acquire()
        return next(self.batches)

    def advance(self) -> None:
        self.requested.acquire()
        self.granted.release()
        self.requested.acquire()
        self.requested.release()  # for the next call


def load_examples(tok, limit: int, max_seq_length: int) -> sft.Examples:
    examples = sft.tokenise(problems.load("arithmetic", "train", limit), tok)
    return sft.within(examples, max_seq_length)


def ours(path: str, limit: int, max_seq_length: int, batch_size: int) -> list:
    """[one update of `train.fit`, one compiled step]: both return the tokens of examples they
    saw."""
    cpu.keep_memory()
    options = {"max_seq_length": max_seq_length, "batch_size": batch_size, "dtype": "bfloat16"}
    config = Finetune(model=path, data="arithmetic", output="unused", **options)
    rows = sft.to_rows(load_examples(hub.tokenizer(path), limit, max_seq_length), max_seq_length)
    model = weights.load(path, dtype=config.dtype)
    options = {"rank": config.rank, "alpha": config.alpha, "target_modules": config.target_modules}
    lora.inject(model, **options, rngs=nnx.Rngs(0))
    model = kernels.training_layout(model)
    loss_fn, tx = finetune.loss_fn(config.loss_chunk_size), finetune.optimizer(config, STEPS)
    tokens = {}

    def counting(batches, name):
        while True:
            batch = next(batches)
            tokens[name] = int((batch["segment_ids"] > 0).sum())
            yield batch

    batches = Gated(counting(sft.batches(rows, batch_size), "fit"))
    copy = nnx.clone(model)

    def loop() -> None:
        options = {"steps": STEPS, "wrt": nnx.LoRAParam, "log_every": 1, "progress": True}
        try:
            train.fit(copy, batches, loss_fn, tx, **options)
        except BaseException:  # or `advance` would wait for ever
            traceback.print_exc()
            os._exit(1)

    threading.Thread(target=loop, daemon=True).start()

    graph, trainable, frozen = nnx.split(model, nnx.LoRAParam, ...)
    carry = (jax.tree.map(jnp.copy, trainable), tx.init(trainable), jnp.array(True))
    # Committed to the device, as loaded weights are: or the second step would compile again.
    carry = jax.device_put(carry, jax.devices()[0])
    step_fn, key = train.make_step(graph, loss_fn, tx), jax.random.key(0)
    stream = counting(sft.batches(rows, batch_size), "step")

    def fit() -> int:
        batches.advance()
        return tokens["fit"]

    def step() -> int:
        nonlocal carry
        carry, loss, _ = step_fn(carry, frozen, next(stream), key)
        loss.block_until_ready()
        return tokens["step"]

    return [fit, step]


def start_peer(path, args, folder: str) -> common.Side:
    """The loop with torch and PEFT, given the same examples."""
    tok = hub.tokenizer(path)
    examples = load_examples(tok, args.limit, args.max_seq_length)
    chosen = [examples.example(i) for i in range(len(examples))]
    file = Path(folder) / "examples.json"
    file.write_text(json.dumps([[ids.tolist(), prompt] for ids, prompt in chosen]))
    defaults = Finetune(model="", data="", output="")
    options = {"rank": defaults.rank, "alpha": defaults.alpha, "eos_token_id": tok.eos_token_id}
    options |= {"examples": file, "batch_size": args.peer_batch_size}
    return common.start_peer("finetune", path=path, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--model", default=hub.SMOLLM2)
    parser.add_argument("--max-seq-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4, help="rows of ours in an update")
    parser.add_argument(
        "--peer-batch-size", type=int, default=8, help="examples in the peer's update"
    )
    parser.add_argument("--limit", type=int, default=400, help="examples")
    args = parser.parse_args()
    path = hub.model(args.model)
    shape = {"max_seq_length": args.max_seq_length, "batch_size": args.batch_size}
    mine = common.start_ours(__file__, path=path, limit=args.limit, **shape)
    sides = {"ours_fit": (mine, 0), "ours_step": (mine, 1)}
    if common.has_peers():
        with (
            tempfile.TemporaryDirectory() as folder
        ):  # the peer has read its examples when it is ready
            sides["torch_peft"] = (start_peer(path, args, folder), 0)
    tokens: dict[str, list[int]] = {name: [] for name in sides}

    def turn(name):
        side, number = sides[name]

        def run() -> float:
            answer = side.turn(number)
            tokens[name].append(answer["result"])
            return answer["seconds"]

        return run

    warm_up = 2
    times = common.take_turns({name: turn(name) for name in sides}, args.rounds, warm_up=warm_up)
    shape |= {"peer_batch_size": args.peer_batch_size, "rounds": args.rounds, "dtype": "bfloat16"}
    per_token = {
        name: [seconds / n for seconds, n in zip(times[name], tokens[name][warm_up:])]
        for name in sides
    }
    tokens_per_s = {}
    for name in sides:
        tokens_per_s[name] = round(1 / statistics.median(per_token[name]), 1)
        row = {"tokens_per_s": tokens_per_s[name]}
        row["tokens_per_update"] = round(statistics.mean(tokens[name]), 1)
        row["seconds"] = [round(t, 4) for t in times[name]]
        common.report(benchmark="finetune", side=name, **row, **shape)
    quicker = common.ratio(per_token["ours_fit"], per_token["ours_step"])
    summary = {"tokens_per_s": tokens_per_s, "data_and_logging_share": round(1 - 1 / quicker, 4)}
    if "torch_peft" in sides:
        summary["ours_over_peer"] = common.ratio(per_token["torch_peft"], per_token["ours_fit"])
    common.report(benchmark="summary", **summary)


if __name__ == "__main__" and not common.served(ours):
    main()
