"""Latency of an adapter: the base, the base with its adapter beside it, and the adapter merged.

    python benchmarks/lora_latency.py [--rounds 15] [--rank 8]
    python benchmarks/lora_latency.py --model HuggingFaceTB/SmolLM2-135M-Instruct --targets q_proj v_proj

Prints JSON lines, the summary last. Two measures: one forward pass of a batch, and one decode step per token over a full
KV cache. The three models take turns within each round, in an order that rotates, so that a machine that slows down slows
all three; the medians over rounds are reported, and the ratios are medians of the ratios within a round. Nothing else
should run meanwhile.

The weights are those kept in the repository, or a checkpoint's in its own dtype, with adapters on every matrix of the
blocks unless `--targets` says otherwise; their B is set to small random numbers, as a trained one would have. Decoding
uses the layout that `generate` uses. "merged_same" is a second merged model: how far it lies from the first is the noise.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from utils import generate, lora, minigpt
from utils.course import pretrained
from utils.hf import hub, weights
from utils.kernels import cpu

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def load(model: str | None) -> nnx.Module:
    """The kept MiniGPT, or a checkpoint by its path or repository."""
    return pretrained.load() if model is None else weights.load(hub.model(model))


def adapted(model: nnx.Module, rank: int, targets: list[str]) -> nnx.Module:
    """The model with an adapter that changes something."""
    lora.inject(model, rank=rank, alpha=2 * rank, target_modules=targets, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    state = lora.adapter(model)
    for arrays in state.values():
        arrays["lora_B"] = rng.normal(0, 0.01, arrays["lora_B"].shape).astype(np.float32)
    lora.set_adapter(model, state)
    return model


def forward(model, tokens, repeats: int):
    """A function that makes `repeats` forward passes and returns the seconds of one."""
    graph, state = nnx.split(model)
    run = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))

    def timed() -> float:
        begun = time.perf_counter()
        for _ in range(repeats):
            out = run(state, tokens)
        out.block_until_ready()
        return (time.perf_counter() - begun) / repeats

    return timed, run(state, tokens)


def decode(model, context: int, batch: int, steps: int):
    """A function that makes `steps` decode steps on the device, greedily, and returns the seconds of one."""
    (graph, state), paired = generate.prepare(model).decode(batch)
    start = context - steps

    @functools.partial(jax.jit, compiler_options=cpu.compiler_options() if paired else None)
    def run(state, cache, first):
        model = nnx.merge(graph, state)

        def step(carry, position):
            cache, tokens = carry
            logits, cache = model(tokens[:, None], jnp.full((batch, 1), position), cache)
            return (cache, logits[:, 0].argmax(axis=-1).astype(jnp.int32)), ()

        (_, tokens), _ = jax.lax.scan(step, (cache, first), start + jnp.arange(steps))
        return tokens

    cache, first = nnx.merge(graph, state).new_cache(batch, context), jnp.zeros(batch, jnp.int32)
    run(state, cache, first).block_until_ready()  # compiles

    def timed() -> float:
        begun = time.perf_counter()
        run(state, cache, first).block_until_ready()
        return (time.perf_counter() - begun) / steps

    return timed


def compare(sides: dict, rounds: int) -> dict[str, dict]:
    """Seconds of each side in each round, taking turns; medians, and medians of the ratios to the base."""
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


def report(**row):
    versions = {"python": platform.python_version(), "jax": jax.__version__, "flax": flax.__version__}
    device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    print(json.dumps(row | {"device": device, "versions": versions}), flush=True)


def _dtype(model: nnx.Module):
    return model.embed_tokens.embedding.dtype if isinstance(model, minigpt.MiniGPT) else model.dtype


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--model", help="a checkpoint's folder or repository; the kept MiniGPT when left out")
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=256, help="tokens of a forward row, and slots of the cache")
    parser.add_argument("--repeats", type=int, default=3, help="forward passes per turn")
    parser.add_argument("--steps", type=int, default=64, help="decode steps per turn")
    args = parser.parse_args()
    base, *others = (load(args.model) for _ in range(4))
    unmerged, merged, same = (adapted(model, args.rank, args.target_modules) for model in others)
    lora.merge(merged)
    lora.merge(same)
    models = {"base": base, "unmerged": unmerged, "merged": merged, "merged_same": same}
    T = args.context
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, base.config.vocab_size, (args.batch_size, T)), jnp.int32)

    runs = {name: forward(model, tokens, args.repeats) for name, model in models.items()}
    gap = float(jnp.abs(runs["merged"][1] - runs["unmerged"][1]).max())
    change = float(jnp.abs(runs["unmerged"][1] - runs["base"][1]).max())
    found = {"forward": compare({name: timed for name, (timed, _) in runs.items()}, args.rounds)}
    shape = {"batch": args.batch_size, "context": T, "rank": args.rank, "width": base.config.hidden_size, "rounds": args.rounds}
    shape |= {"model": args.model or "minigpt", "targets": args.target_modules, "dtype": str(_dtype(base))}
    for name, row in found["forward"].items():
        tokens_per_s = round(args.batch_size * T / (row["milliseconds"] / 1e3))
        report(benchmark="forward", side=name, tokens_per_s=tokens_per_s, **row, **shape)
    for batch in (1, args.batch_size):
        key = f"decode_batch_{batch}"
        found[key] = compare({name: decode(model, T, batch, args.steps) for name, model in models.items()}, args.rounds)
        for name, row in found[key].items():
            tokens_per_s = round(batch / (row["milliseconds"] / 1e3))
            report(benchmark="decode", side=name, tokens_per_s=tokens_per_s, **row, **(shape | {"batch": batch}))
    report(
        benchmark="summary",
        merged_over_base={name: sides["merged"]["over_base"] for name, sides in found.items()},
        unmerged_over_base={name: sides["unmerged"]["over_base"] for name, sides in found.items()},
        noise={
            name: round(sides["merged_same"]["over_base"] - sides["merged"]["over_base"], 4)
            for name, sides in found.items()
        },
        merged_minus_unmerged_logits=gap,
        unmerged_minus_base_logits=change,
        **shape,
    )


if __name__ == "__main__":
    main()
