"""Compile time of the LoRA training step against depth, and the first token after a cold start.

    python benchmarks/compile.py [--rounds 3]       # the peer runs where `make install-peers` was
    run

Prints JSON lines, the summary last. Compiling: R1-Distill-1.5B's shape, rank 16 on all linear
layers, with gradient checkpointing and the chunked loss, for 4 and 28 layers; nothing is allocated,
since shapes are enough for a compiler. In float32 the layers are scanned, as on every accelerator;
`--dtype bfloat16` on a CPU unrolls them, which runs faster and compiles slower. Each measurement is
a process of its own, in turns. Cold start: seconds from starting `python -m utils generate` until
its first character, beside the same with transformers; files are in the page cache, no compilation
cache is used.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the script's own folder is there already

PROMPT = "The capital of France is"


def compile_step(
    num_hidden_layers: int, like: str, batch_size: int, seq_len: int, dtype: str
) -> dict:
    """Seconds to trace and to compile the step, in this process."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from tools.make_random_checkpoint import LIKE
    from utils import lora, losses, train, transformer

    config = dataclasses.replace(LIKE[like], num_hidden_layers=num_hidden_layers)

    def make():
        model = transformer.Transformer(config, param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
        options = {"rank": 16, "alpha": 32, "target_modules": lora.ALL_LINEAR}
        return lora.inject(model, **options, rngs=nnx.Rngs(1))

    model = nnx.eval_shape(make)
    model.model.gradient_checkpointing = True

    def loss_fn(model, batch, key):
        hidden, _ = model.hidden(batch["inputs"])
        targets = batch["targets"]
        return losses.chunked_cross_entropy(model.head, hidden, targets, wrt=nnx.LoRAParam)

    tx = optax.adamw(1e-3)
    graph, trainable, frozen = nnx.split(model, nnx.LoRAParam, ...)
    carry = (trainable, jax.eval_shape(tx.init, trainable), jax.ShapeDtypeStruct((), bool))
    tokens = jax.ShapeDtypeStruct((batch_size, seq_len), jnp.int32)
    step = train.make_step(graph, loss_fn, tx)
    key = jax.eval_shape(lambda: jax.random.key(0))
    started = time.perf_counter()
    lowered = step.lower(carry, frozen, {"inputs": tokens, "targets": tokens}, key)
    traced = time.perf_counter()
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    return {
        "trace_seconds": traced - started,
        "compile_seconds": time.perf_counter() - traced,
        "temporary_bytes": getattr(memory, "temp_size_in_bytes", None),
    }


def first_token(command: list) -> float:
    """Seconds from the start of a process to its first character."""
    started = time.perf_counter()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        character = process.stdout.read(1)
        seconds = time.perf_counter() - started
        process.stdout.read()
    if not character or process.returncode:
        raise SystemExit(f"{command[:4]}: ended with status {process.returncode} and no text")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--model", default=None, help="for the cold start (default: SmolLM2-135M-Instruct)"
    )
    parser.add_argument("--like", default="R1")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 28], help="depths to compile")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        step = compile_step(args.child, args.like, args.batch_size, args.seq_len, args.dtype)
        print(json.dumps(step))
        return
    import common

    from utils.hf import hub

    shape = {"like": args.like, "batch_size": args.batch_size, "seq_len": args.seq_len}
    shape |= {"dtype": args.dtype}
    flags = [
        word
        for name, value in shape.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    compiled = {layers: [] for layers in args.layers}
    for _ in range(args.rounds):
        for layers, rows in compiled.items():
            command = [sys.executable, __file__, "--child", str(layers), *flags]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    total = {}
    for layers, rows in compiled.items():
        row = {
            name: round(statistics.median(r[name] for r in rows), 3)
            for name in ("trace_seconds", "compile_seconds")
        }
        total[layers] = sum(row.values())
        row |= {"temporary_bytes": rows[0]["temporary_bytes"], "rounds": args.rounds}
        common.report(benchmark="compile", num_hidden_layers=layers, **row, **shape)

    folder = str(hub.model(args.model or hub.SMOLLM2))
    flags = ["--model", folder, "--prompt", PROMPT, "--max-new-tokens", "1", "--temperature", "0"]
    commands = {"ours": [sys.executable, "-m", "utils", "generate", *flags, "--stream"]}
    if common.has_peers():
        program = ROOT / "benchmarks" / "peers" / "first_token.py"
        commands["transformers"] = [common.PEERS_PYTHON, program, folder, PROMPT]
    seconds = {side: [] for side in commands}
    for i in range(args.rounds + 1):  # the first round warms the page cache
        for side, command in commands.items():
            taken = first_token(command)
            if i:
                seconds[side].append(taken)
    medians = {side: round(statistics.median(times), 3) for side, times in seconds.items()}
    for side, median in medians.items():
        common.report(benchmark="first_token", side=side, seconds=median, model=Path(folder).name)
    most, least = max(args.layers), min(args.layers)
    common.report(
        benchmark="summary",
        num_hidden_layers=[least, most],
        seconds=[round(total[least], 3), round(total[most], 3)],
        ratio=round(total[most] / total[least], 3),
        first_token_seconds=medians,
        cores=os.cpu_count(),
    )


if __name__ == "__main__":
    main()
