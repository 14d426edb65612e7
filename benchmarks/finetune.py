"""The fine-tuning loop on SmolLM2: this package beside a training loop with torch and PEFT, on the same examples.

    python benchmarks/finetune.py [--rounds 10]      # the peer runs where torch, transformers and peft are installed

Prints JSON lines, the summary last. Arithmetic word problems of the built-in generator, a bfloat16 base, rank 16 on all
linear layers, AdamW behind a clipped gradient, loss on the answer. Each side does it its own way: here whole examples are
packed into rows of --window tokens; there a batch is padded to its longest example, the usual way. `tokens_per_s` counts
the examples' tokens, never padding. Each side has a process of its own; all take turns, one update at a time.

`ours_fit` is the loop as it is used, with data, metrics and progress, logging at every step, which is the worst case;
`ours_step` is the compiled step alone. What lies between them is the cost of data and logging.
"""

import argparse
import statistics
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # and the script's own folder is there already

import numpy as np
from common import Apart, has, ratio, report, take_turns

from utils.commands import finetune
from utils.commands.options import Finetune
from utils.data import problems, sft
from utils.hf import hub
from utils.kernels import cpu


class Gated:
    """Batches handed out one at a time: `advance` lets the loop take one, and returns when it asks for the next."""

    def __init__(self, batches):
        self.batches, self.go, self.asked = batches, threading.Semaphore(0), threading.Semaphore(0)

    def __next__(self):
        self.asked.release()
        self.go.acquire()
        return next(self.batches)

    def advance(self) -> None:
        self.asked.acquire()
        self.go.release()
        self.asked.acquire()
        self.asked.release()  # for the next call


def ours(path, options: dict):
    """[one update of `train.fit`, one compiled step]; each returns how many tokens of examples it saw."""
    cpu.keep_memory()
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from utils import lora, train
    from utils.hf import weights

    config = Finetune(model=str(path), data="arithmetic", output="unused", dtype="bfloat16", **options)
    _, rows, _, _ = finetune.prepare(config)
    model = weights.load(path, dtype=config.dtype)
    lora.inject(model, rank=config.rank, alpha=config.alpha, target_modules=config.target_modules, rngs=nnx.Rngs(0))
    model = finetune.for_training(model)
    loss, tx, steps = finetune.loss_fn(config.loss_chunk_size), finetune.optimizer(config, 10_000), 10_000
    seen = {}

    def noting(batches, name):
        while True:
            batch = next(batches)
            seen[name] = int((batch["segment_ids"] > 0).sum())
            yield batch

    gate = Gated(noting(sft.batches(rows, config.batch_size), "fit"))
    how = dict(steps=steps, wrt=nnx.LoRAParam, log_every=1, progress=True)
    threading.Thread(target=lambda: train.fit(nnx.clone(model), gate, loss, tx, **how), daemon=True).start()

    graph, learnt, rest = nnx.split(model, nnx.LoRAParam, ...)
    carry = (jax.tree.map(jnp.copy, learnt), tx.init(learnt), jnp.array(True))
    step_fn, key, stream = (
        train.make_step(graph, loss, tx),
        jax.random.key(0),
        noting(sft.batches(rows, config.batch_size), "step"),
    )

    def fit() -> int:
        gate.advance()
        return seen["fit"]

    def step() -> int:
        nonlocal carry
        carry, value, _ = step_fn(carry, rest, next(stream), key)
        value.block_until_ready()
        return seen["step"]

    return [fit, step]


def peers(path, options: dict):
    import peft
    import torch
    import transformers

    tok = hub.tokenizer(path)
    examples = sft.within(sft.tokenise(problems.load("arithmetic", "train", options["limit"]), tok), options["max_seq_length"])
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    linear = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, linear).train()
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=2e-4, weight_decay=0.0)
    rng, size = np.random.default_rng(0), options["examples"]

    def step() -> int:
        chosen = [examples.example(i) for i in rng.integers(0, len(examples), size)]
        longest = max(len(ids) for ids, _ in chosen)
        ids, labels = np.full((size, longest), tok.eos_token_id), np.full((size, longest), -100)
        mask = np.zeros((size, longest), np.int64)
        for row, (tokens, prompt) in enumerate(chosen):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
            labels[row, prompt : len(tokens)] = tokens[prompt:]
        given = (torch.as_tensor(a) for a in (ids, mask, labels))
        model(**dict(zip(("input_ids", "attention_mask", "labels"), given))).loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return sum(len(tokens) - 1 for tokens, _ in chosen)

    return [step]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--model", default=hub.SMOLLM2)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4, help="rows of ours in an update")
    parser.add_argument("--examples", type=int, default=8, help="examples of the peer's in an update")
    parser.add_argument("--limit", type=int, default=400)
    args = parser.parse_args()
    path = hub.model(args.model)
    options = dict(max_seq_length=args.max_seq_length, batch_size=args.batch_size, limit=args.limit, held_out=0)
    mine = Apart(ours, path, options)
    tokens: dict[str, list[int]] = {}

    def counting(name, run, number=0):
        return lambda: tokens.setdefault(name, []).append(run(number))

    sides = {"ours_fit": counting("ours_fit", mine.run, 0), "ours_step": counting("ours_step", mine.run, 1)}
    if has("torch", "transformers", "peft"):
        sides["torch_peft"] = counting("torch_peft", Apart(peers, path, options | {"examples": args.examples}).run)
    found = take_turns(sides, args.rounds, warm_up=2)
    shape = {
        "max_seq_length": args.max_seq_length,
        "batch": args.batch_size,
        "peer_examples": args.examples,
        "rounds": args.rounds,
        "dtype": "bfloat16",
    }
    per_token = {name: [s / n for s, n in zip(times, tokens[name][2:])] for name, times in found.items()}
    summary = {}
    for name, times in per_token.items():
        summary[name] = round(1 / statistics.median(times), 1)
        seen = round(statistics.mean(tokens[name]), 1)
        seconds = [round(t, 4) for t in found[name]]
        report(
            benchmark="finetune",
            side=name,
            tokens_per_s=summary[name],
            tokens_per_update=seen,
            seconds=seconds,
            **shape,
        )
    overhead = round(1 - 1 / ratio(per_token["ours_fit"], per_token["ours_step"]), 4)
    compared = {}
    if "torch_peft" in per_token:
        compared["ours_over_peer"] = ratio(per_token["torch_peft"], per_token["ours_fit"])
    report(benchmark="summary", tokens_per_s=summary, data_and_logging_share=overhead, **compared)


if __name__ == "__main__":
    main()
