"""Decoding SmolLM2: `generate.generate` beside `transformers.generate`, one row and eight.

    python benchmarks/decode.py [--rounds 5]        # the peer runs where `make install-peers` was
    run

Prints JSON lines, the summary last. Greedy, chat prompts of unequal lengths, no stopping. Each side
writes 1 token and then 1 + `--max-new-tokens` in each round: the difference is decoding alone, the
first is the prefill. Sides take turns, medians are reported; the comparison is between the better
dtype of each side. Nothing else should run.

`of_bandwidth` is the share of what the memory could deliver if each step read every weight once:
the bandwidth is that of summing a large array, measured in the same run.
"""

import argparse
import functools
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import jax
import jax.numpy as jnp
import numpy as np

from utils import generate
from utils.hf import config, hub, weights

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


def ours(path: str, dtype: str, prompts: list[str], max_new_tokens: int) -> list:
    """Two functions, each of which waits for its texts: of 1 token, and of 1 + max_new_tokens."""
    tok = hub.tokenizer(path)
    tok.stop_ids = frozenset()  # both sides write as many tokens
    prepared = generate.prepare(weights.load(path, dtype=dtype))

    def run(count: int):
        def texts() -> list[str]:
            completions = generate.generate(prepared, tok, prompts, count, temperature=0)
            return [completion.text for completion in completions]

        return texts

    return [run(1), run(1 + max_new_tokens)]


def bandwidth():
    """(the seconds of reading a large array once as a function, its bytes)."""
    array = jnp.ones(64 * 2**20, jnp.float32)
    read = jax.jit(jnp.sum)
    return lambda: common.seconds(lambda: read(array).block_until_ready()), array.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default=hub.SMOLLM2)
    parser.add_argument("--max-new-tokens", type=int, default=64, help="decode steps")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args()
    path, with_peers = hub.model(args.model), common.has_peers()
    tok, sizes = hub.tokenizer(path), config.read(path)
    counts = sizes.count_parameters()
    # What each step reads of the weights: one row of an embedding table that is not the head's.
    parameters = counts["total"] - (0 if sizes.tie_word_embeddings else counts["embed_tokens"])
    read, read_bytes = bandwidth()
    summary = {}
    for batch_size in args.batch_sizes:
        questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(batch_size)]
        prompts = [tok.chat([{"role": "user", "content": question}]) for question in questions]
        processes, turns = {}, {("bandwidth", "float32", ""): read}
        for dtype in args.dtypes:
            options = {"path": path, "dtype": dtype, "max_new_tokens": args.max_new_tokens}
            processes["ours", dtype] = common.start_ours(__file__, prompts=prompts, **options)
            if with_peers:
                rows = [tok.encode(prompt) for prompt in prompts]
                processes["transformers", dtype] = common.start_peer("decode", rows=rows, **options)
        for key, side in processes.items():
            turns[*key, "first"] = functools.partial(side.seconds, 0)
            turns[*key, "all"] = functools.partial(side.seconds, 1)
        times = common.take_turns(turns, args.rounds)
        bytes_per_s = read_bytes / statistics.median(times.pop(("bandwidth", "float32", "")))
        new = args.max_new_tokens
        shape = {"batch_size": batch_size, "max_new_tokens": new, "rounds": args.rounds}
        best = {}
        for (side, dtype), running in processes.items():
            running.close()
            first, total = (np.array(times[side, dtype, part]) for part in ("first", "all"))
            rate = batch_size * new / float(np.median(total - first))
            ceiling = batch_size * bytes_per_s / (parameters * jnp.dtype(dtype).itemsize)
            with_prefill = batch_size * (1 + new) / float(np.median(total))
            row = {
                "tokens_per_s": round(rate, 1),
                "with_prefill_tokens_per_s": round(with_prefill, 1),
                "of_bandwidth": round(rate / ceiling, 3),
                "first_token_ms": round(1e3 * float(np.median(first)), 1),
            }
            common.report(benchmark="decode", side=side, dtype=dtype, **row, **shape)
            best[side] = max(best.get(side, (0, "")), (rate, dtype))
        row = {
            side: {"tokens_per_s": round(rate, 1), "dtype": dtype}
            for side, (rate, dtype) in best.items()
        }
        if "transformers" in best:
            row["ours_over_peer"] = round(best["ours"][0] / best["transformers"][0], 3)
        row["bandwidth_gb_per_s"] = round(bytes_per_s / 1e9, 1)
        summary[f"batch_size_{batch_size}"] = row
    common.report(benchmark="summary", **summary)


if __name__ == "__main__" and not common.served(ours):
    main()
