"""Compile time of the LoRA training step against depth, and the first token after a cold start.

    python benchmarks/compile.py [--rounds 3]        # the peer runs where torch and transformers are installed

Prints JSON lines, the summary last. Compiling: R1-Distill-1.5B's shape, rank 16 on all projections, with remat and the
chunked loss, for 4 and 28 layers; nothing is allocated, since shapes are enough for a compiler. In float32 the layers are
scanned, as on every accelerator; `--dtype bfloat16` on a CPU writes them out, which runs faster and compiles slower. Each
measurement is a process of its own, in turns. Cold start: seconds from starting `python -m utils generate` until its first
character, beside the same with transformers; files are in the page cache, no compilation cache is used.
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
sys.path.insert(0, str(ROOT))

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROMPT = "The capital of France is"
PEER = """
import sys, torch, transformers
folder, prompt = sys.argv[1:]
tok = transformers.AutoTokenizer.from_pretrained(folder)
model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
ids = tok(prompt, return_tensors="pt")
out = model.generate(**ids, max_new_tokens=1, do_sample=False)
print(tok.decode(out[0, ids.input_ids.shape[1]:]), flush=True)
"""


def compile_step(layers: int, like: str, batch: int, context: int, dtype: str) -> dict:
    """Seconds to trace and to compile the step, in this process."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from tools.make_random_checkpoint import LIKE
    from utils import lora, losses, train, transformer

    config = dataclasses.replace(LIKE[like], num_hidden_layers=layers)

    def made():
        model = transformer.Transformer(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
        return lora.inject(model, rank=16, alpha=32, target_modules=TARGETS, rngs=nnx.Rngs(1))

    model = nnx.eval_shape(made)
    model.model.gradient_checkpointing = True

    def loss_fn(model, batch, key):
        hidden, _ = model.hidden(batch["inputs"])
        return losses.chunked_cross_entropy(model.head, hidden, batch["targets"], wrt=nnx.LoRAParam)

    tx = optax.adamw(1e-3)
    graph, learnt, rest = nnx.split(model, nnx.LoRAParam, ...)
    carry = (learnt, jax.eval_shape(tx.init, learnt), jax.ShapeDtypeStruct((), bool))
    tokens = jax.ShapeDtypeStruct((batch, context), jnp.int32)
    step = train.make_step(graph, loss_fn, tx)
    key = jax.eval_shape(lambda: jax.random.key(0))
    begun = time.perf_counter()
    lowered = step.lower(carry, rest, {"inputs": tokens, "targets": tokens}, key)
    traced = time.perf_counter()
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    return {
        "trace_seconds": traced - begun,
        "compile_seconds": time.perf_counter() - traced,
        "temporary_bytes": getattr(memory, "temp_size_in_bytes", None),
    }


def first_token(command: list[str]) -> float:
    """Seconds from the start of a process to its first character."""
    begun = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        said = process.stdout.read(1)
        taken = time.perf_counter() - begun
        process.stdout.read()
    if not said or process.returncode:
        raise SystemExit(f"{command[:4]}: ended with status {process.returncode} and no text")
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default=None, help="for the cold start (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--like", default="R1")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 28])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(compile_step(args.child, args.like, args.batch_size, args.context, args.dtype)))
        return
    from common import has, report

    from utils.hf import hub

    found = {layers: [] for layers in args.num_hidden_layers}
    options = ["--like", args.like, "--batch", str(args.batch_size), "--context", str(args.context), "--dtype", args.dtype]
    for _ in range(args.rounds):
        for layers, rows in found.items():
            command = [sys.executable, __file__, "--child", str(layers), *options]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    total = {}
    shape = {"like": args.like, "batch": [args.batch_size, args.context], "dtype": args.dtype, "rounds": args.rounds}
    for layers, rows in found.items():
        row = {
            name: round(statistics.median(r[name] for r in rows), 3) for name in ("trace_seconds", "compile_seconds")
        }
        total[layers] = sum(row.values())
        report(benchmark="compile", num_hidden_layers=layers, **row, temporary_bytes=rows[0]["temporary_bytes"], **shape)

    folder = str(hub.model(args.model or hub.SMOLLM2))
    ours = [
        "generate",
        "--model",
        folder,
        "--prompt",
        PROMPT,
        "--max-new-tokens",
        "1",
        "--temperature",
        "0",
        "--stream",
    ]
    sides = {"ours": [sys.executable, "-m", "utils", *ours]}
    if has("torch", "transformers"):
        sides["transformers"] = [sys.executable, "-c", PEER, folder, PROMPT]
    seconds = {side: [] for side in sides}
    for i in range(args.rounds + 1):  # the first round warms the page cache
        for side, command in sides.items():
            taken = first_token(command)
            if i:
                seconds[side].append(taken)
    for side, times in seconds.items():
        report(benchmark="first_token", side=side, seconds=round(statistics.median(times), 3), model=Path(folder).name)
    most, least = max(args.num_hidden_layers), min(args.num_hidden_layers)
    report(
        benchmark="summary",
        num_hidden_layers=[least, most],
        seconds=[round(total[least], 3), round(total[most], 3)],
        ratio=round(total[most] / total[least], 3),
        first_token_seconds={side: round(statistics.median(times), 3) for side, times in seconds.items()},
        cores=os.cpu_count(),
    )


if __name__ == "__main__":
    main()
