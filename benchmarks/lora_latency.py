"""Latency of an adapter: the base, the base with its adapter beside it, and the adapter merged.

    python benchmarks/lora_latency.py [--rounds 15] [--rank 8] python benchmarks/lora_latency.py
    --model HuggingFaceTB/SmolLM2-135M-Instruct --target-modules q_proj v_proj

Prints JSON lines, the summary last. Two measures: one forward pass of a batch, and one decode step
per token over a full KV cache. The three models take turns within each round, in an order that
rotates, so that a machine that slows down slows all three; the medians over rounds are reported,
and the ratios are medians of the ratios within a round. Nothing else should run meanwhile.

The weights are the pretrained MiniGPT's, or a checkpoint's in its own dtype, with adapters on every
linear layer of the blocks unless `--target-modules` says otherwise; their B is set to small random
numbers, as a trained one would have. Decoding uses the layout that `generate` uses. "merged_same"
is a second merged model: its distance to the first is the noise.
"""

import argparse
import functools
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from utils import generate, kernels, lora, minigpt
from utils.course import pretrained
from utils.hf import hub, weights

TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def load(model: str | None) -> nnx.Module:
    """The pretrained MiniGPT, or a checkpoint by its path or repository."""
    return pretrained.load() if model is None else weights.load(hub.model(model))


def adapted(model: nnx.Module, rank: int, target_modules: list[str]) -> nnx.Module:
    """The model with an adapter that changes something."""
    lora.inject(model, rank=rank, alpha=2 * rank, target_modules=target_modules, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    state = lora.adapter(model)
    for arrays in state.values():
        arrays["lora_B"] = rng.normal(0, 0.01, arrays["lora_B"].shape).astype(np.float32)
    lora.set_adapter(model, state)
    return model


def forward(model, tokens, repeats: int):
    """(a function that makes `repeats` forward passes and returns the seconds of one, logits)."""
    graph, state = nnx.split(model)
    run = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))

    def timed() -> float:
        started = time.perf_counter()
        for _ in range(repeats):
            out = run(state, tokens)
        out.block_until_ready()
        return (time.perf_counter() - started) / repeats

    return timed, run(state, tokens)


def decode(model, batch_size: int, cache_length: int, steps: int):
    """A function that makes the last `steps` greedy decode steps of a full cache, in one program,
    and returns the seconds of one."""
    (graph, state), layout = generate.prepare(model).decode(batch_size)
    start = cache_length - steps

    @functools.partial(jax.jit, compiler_options=kernels.compiler_options(layout))
    def run(state, cache, first):
        model = nnx.merge(graph, state)

        def step(carry, position):
            cache, tokens = carry
            logits, cache = model(tokens[:, None], jnp.full((batch_size, 1), position), cache)
            return (cache, logits[:, 0].argmax(axis=-1).astype(jnp.int32)), ()

        (_, tokens), _ = jax.lax.scan(step, (cache, first), start + jnp.arange(steps))
        return tokens

    cache = nnx.merge(graph, state).new_cache(batch_size, cache_length)
    first = jnp.zeros(batch_size, jnp.int32)
    run(state, cache, first).block_until_ready()  # compiles

    def timed() -> float:
        started = time.perf_counter()
        run(state, cache, first).block_until_ready()
        return (time.perf_counter() - started) / steps

    return timed


def compare(sides: dict, rounds: int) -> dict[str, dict]:
    """Seconds of each side in each round, taking turns; medians, and medians of the ratios to the
    base."""
    seconds = {name: [] for name in sides}
    names = list(sides)
    for _ in range(2):  # warm up
        for name in names:
            sides[name]()
    for i in range(rounds):
        for j in range(len(names)):
            name = names[(i + j) % len(names)]
            seconds[name].append(sides[name]())
    base = seconds["base"]
    return {
        name: {
            "milliseconds": round(1e3 * statistics.median(values), 4),
            "over_base": round(statistics.median(v / b for v, b in zip(values, base)), 4),
        }
        for name, values in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument(
        "--model", help="a checkpoint's folder or repository (default: the pretrained MiniGPT)"
    )
    parser.add_argument("--target-modules", nargs="+", default=TARGET_MODULES)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument(
        "--seq-len", type=int, default=256, help="tokens in a row, and the cache length"
    )
    parser.add_argument("--repeats", type=int, default=3, help="forward passes per turn")
    parser.add_argument("--steps", type=int, default=64, help="decode steps per turn")
    args = parser.parse_args()
    base, *others = (load(args.model) for _ in range(4))
    unmerged, merged, same = (adapted(model, args.rank, args.target_modules) for model in others)
    lora.merge(merged)
    lora.merge(same)
    models = {"base": base, "unmerged": unmerged, "merged": merged, "merged_same": same}
    T = args.seq_len
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, base.config.vocab_size, (args.batch_size, T)), jnp.int32)

    runs = {name: forward(model, tokens, args.repeats) for name, model in models.items()}
    gap = float(jnp.abs(runs["merged"][1] - runs["unmerged"][1]).max())
    change = float(jnp.abs(runs["unmerged"][1] - runs["base"][1]).max())
    results = {"forward": compare({name: timed for name, (timed, _) in runs.items()}, args.rounds)}
    dtype = base.dtype if isinstance(base, minigpt.MiniGPT) else base.param_dtype
    shape = {"batch_size": args.batch_size, "seq_len": T, "rank": args.rank, "rounds": args.rounds}
    shape |= {"hidden_size": base.config.hidden_size, "target_modules": args.target_modules}
    shape |= {"model": args.model or "minigpt", "dtype": str(dtype)}
    for name, row in results["forward"].items():
        tokens_per_s = round(args.batch_size * T / (row["milliseconds"] / 1e3))
        common.report(benchmark="forward", side=name, tokens_per_s=tokens_per_s, **row, **shape)
    for batch_size in (1, args.batch_size):
        sides = {name: decode(model, batch_size, T, args.steps) for name, model in models.items()}
        rows = results[f"decode_batch_size_{batch_size}"] = compare(sides, args.rounds)
        for name, row in rows.items():
            row = row | {"tokens_per_s": round(batch_size / (row["milliseconds"] / 1e3))}
            row |= shape | {"batch_size": batch_size}
            common.report(benchmark="decode", side=name, **row)
    common.report(
        benchmark="summary",
        merged_over_base={name: rows["merged"]["over_base"] for name, rows in results.items()},
        unmerged_over_base={name: rows["unmerged"]["over_base"] for name, rows in results.items()},
        noise={
            name: round(rows["merged_same"]["over_base"] - rows["merged"]["over_base"], 4)
            for name, rows in results.items()
        },
        merged_minus_unmerged_logits=gap,
        unmerged_minus_base_logits=change,
        **shape,
    )


if __name__ == "__main__":
    main()
