"""Decoding SmolLM2: `generate.generate` beside `transformers.generate`, one sequence and eight.

    python benchmarks/decode.py [--rounds 5]         # the peer runs where torch and transformers are installed

Prints JSON lines, the summary last. Greedy, chat prompts of unequal lengths, no stopping. Each side writes 1 token and then
1 + `--new` tokens in each round: the difference is decoding alone, the first is the prefill. Sides take turns, medians are
reported; the comparison is between the better dtype of each side. Nothing else should run.

`of_bandwidth` is the share of what the memory could deliver if each step read every weight once: the bandwidth is that of
summing a large array, measured in the same run.
"""

import argparse
import functools
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # and the script's own folder is there already

import jax
import jax.numpy as jnp
import numpy as np
from common import Apart, has, report, take_turns

from utils import generate, transformer
from utils.hf import hub, weights

DTYPES = ("float32", "bfloat16")
QUESTIONS = (
    "Write a long story about a lighthouse keeper.",
    "Explain in detail how bread is made.",
    "Tell me everything about the history of Rome, from its first day on.",
    "Describe a walk through a forest in autumn.",
    "Write a long letter to a friend who moved to another country, about the year that has passed.",
    "Explain how a computer works, step by step.",
    "What are the planets? Describe each of them.",
    "Write a dialogue between a cat and a dog.",
)


def tokenizer(path):
    tok = hub.tokenizer(path)
    tok.stop_ids = frozenset()  # everybody writes as many tokens
    return tok


def ours(path, dtype: str, prompts: list[str], new: int):
    """Two functions, each of which waits for its text: 1 token, and 1 + new."""
    tok = tokenizer(path)
    prepared = generate.prepare(weights.load(path, dtype=dtype))

    def run(count: int):
        return lambda: generate.generate(prepared, tok, prompts, count, temperature=0)

    return run(1), run(1 + new)


def peers(path, dtype: str, prompts: list[str], new: int):
    import torch
    import transformers

    tok = tokenizer(path)

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    rows = [tok.encode(prompt) for prompt in prompts]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])

    def run(count: int):
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        return lambda: tok.decode(model.generate(ids, attention_mask=mask, **options)[0].tolist())

    return run(1), run(1 + new)


def bandwidth():
    """(a function that reads a large array once and waits, its bytes)."""
    array = jnp.ones(64 * 2**20, jnp.float32)
    read = jax.jit(jnp.sum)
    return lambda: read(array).block_until_ready(), array.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default=hub.SMOLLM2)
    parser.add_argument("--new", type=int, default=64, help="decode steps")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", default=DTYPES)
    args = parser.parse_args()
    path = hub.model(args.model)
    tok = hub.tokenizer(path)
    config = transformer.Config.from_hf(path)
    counts = transformer.count_parameters(config)
    size = counts["total"] - (0 if config.tie_word_embeddings else counts["embed_tokens"])  # what each step reads of the weights
    read, read_bytes = bandwidth()
    summary = {}
    for batch in args.batches:
        questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(batch)]
        prompts = [tok.chat([{"role": "user", "content": question}]) for question in questions]
        sides = {("bandwidth", "float32", ""): read}
        for dtype in args.dtypes:
            for side, make in (("ours", ours), ("transformers", peers)):
                if side == "ours" or has("torch", "transformers"):
                    run = Apart(make, path, dtype, prompts, args.new).run  # in a process of its own
                    sides[side, dtype, "first"] = functools.partial(run, 0)
                    sides[side, dtype, "all"] = functools.partial(run, 1)
        found = take_turns(sides, args.rounds)
        per_second = read_bytes / statistics.median(found.pop(("bandwidth", "float32", "")))
        shape = {"batch": batch, "new": args.new, "rounds": args.rounds}
        best = {}
        for side, dtype, what in found:
            if what == "all":
                first, whole = (np.array(found[side, dtype, w]) for w in ("first", "all"))
                rate = batch * args.new / float(np.median(whole - first))
                ceiling = batch * per_second / (size * jnp.dtype(dtype).itemsize)
                row = {
                    "tokens_per_s": round(rate, 1),
                    "with_prefill_tokens_per_s": round(batch * (1 + args.new) / float(np.median(whole)), 1),
                    "of_bandwidth": round(rate / ceiling, 3),
                    "first_token_ms": round(1e3 * float(np.median(first)), 1),
                }
                report(benchmark="decode", side=side, dtype=dtype, **row, **shape)
                best[side] = max(best.get(side, (0, "")), (rate, dtype))
        row = {side: {"tokens_per_s": round(rate, 1), "dtype": dtype} for side, (rate, dtype) in best.items()}
        if "transformers" in best:
            row["ours_over_peer"] = round(best["ours"][0] / best["transformers"][0], 3)
        summary[f"batch_{batch}"] = row | {"bandwidth_gb_per_s": round(per_second / 1e9, 1)}
    report(benchmark="summary", **summary)


if __name__ == "__main__":
    main()
