"""A LoRA training step on SmolLM2: this package beside torch with PEFT.

    python benchmarks/lora_step.py [--rounds 7]      # the peer runs where torch, transformers and peft are installed

Prints JSON lines, the summary last. Batch 4 x 128 tokens, rank 8 on q_proj and v_proj, AdamW on the adapter, the base
frozen, in float32 and with a bfloat16 base (adapters stay float32 on both sides: PEFT's default). Each side has a process of
its own; all take turns within a round, some steps in a row at each turn as in training, and so does one large matrix
product of each dtype: the machine's own speed. Nothing else should run.

`of_matrix_speed` counts the operations that this step cannot avoid: 4 per weight and token in matrix products (forward,
and the gradient of the activations; the frozen weights need none), and three passes of attention over the whole square.
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
import optax
from common import Apart, has, matrix_product, ratio, report, take_turns
from flax import nnx

from utils import lora, losses, train, transformer
from utils.hf import hub, weights
from utils.kernels import cpu

TARGETS = ("q_proj", "v_proj")
DTYPES = ("float32", "bfloat16")


def ours(path, dtype: str, rank: int, inputs, targets):
    """[a function that makes one step and returns its loss]."""
    cpu.keep_memory()  # slower for the peer, so only here: 543 tokens/s instead of 610 in bfloat16
    model = weights.load(path, dtype=dtype)
    lora.inject(model, rank=rank, alpha=2 * rank, target_modules=TARGETS, rngs=nnx.Rngs(0))
    if dtype == "bfloat16":
        model = model.unstacked()

    def loss_fn(model, batch, key):
        hidden, _ = model.hidden(batch["inputs"])
        return losses.chunked_cross_entropy(model.head, hidden, batch["targets"], wrt=nnx.LoRAParam)

    tx = optax.adamw(1e-3)
    graph, learnt, rest = nnx.split(model, nnx.LoRAParam, ...)
    carry = (jax.tree.map(jnp.copy, learnt), tx.init(learnt), jnp.array(True))
    step_fn, key = train.make_step(graph, loss_fn, tx), jax.random.key(0)
    batch = {"inputs": jnp.asarray(inputs), "targets": jnp.asarray(targets)}

    def step() -> float:
        nonlocal carry
        carry, loss, _ = step_fn(carry, rest, batch, key)
        return float(loss)

    return [step]


def peers(path, dtype: str, rank: int, inputs, targets):
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    inputs, targets = torch.as_tensor(inputs).long(), torch.as_tensor(targets).long()

    def step() -> float:
        logits = model(inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return [step]


def necessary_flops(config: transformer.Config, context: int) -> int:
    """Per token: 2 x 2 for each weight in a matrix product, 3 x 2 x 2 x context for each query feature of a layer."""
    attention = 2 * 2 * context * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return 2 * (transformer.flops_per_token(config, context) - attention) + 3 * attention


def repeat(run, times: int) -> None:
    for _ in range(times):
        run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps at each turn")
    parser.add_argument("--model", default=hub.SMOLLM2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--matrix", type=int, default=2048, help="size of the matrix product that measures the machine")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES)
    args = parser.parse_args()
    path = hub.model(args.model)
    config = transformer.Config.from_hf(path)
    text = np.random.default_rng(0).integers(0, config.vocab_size, (args.batch_size, args.context + 1))
    inputs, targets = text[:, :-1].astype(np.int32), text[:, 1:].astype(np.int32)

    sides, first, flops, last = {}, {}, {}, {}
    for dtype in args.dtypes:
        given = (path, dtype, args.rank, inputs, targets)
        sides["ours", dtype] = Apart(ours, *given).run
        if has("torch", "transformers", "peft"):
            sides["torch_peft", dtype] = Apart(peers, *given).run
        sides["matrix", dtype], flops[dtype] = matrix_product(dtype, args.matrix)
    for key, step in sides.items():
        if key[0] != "matrix":
            first[key] = step()  # compiles, and both sides should start from the same loss
    found = take_turns({key: functools.partial(repeat, run, args.steps) for key, run in sides.items()}, args.rounds)
    for key in first:
        last[key] = sides[key]()

    tokens, needed = args.batch_size * args.context, necessary_flops(config, args.context)
    found = {key: [t / args.steps for t in times] for key, times in found.items()}
    speed = {dtype: flops[dtype] / statistics.median(found["matrix", dtype]) for dtype in args.dtypes}
    shape = {
        "batch": [args.batch_size, args.context],
        "rank": args.rank,
        "targets": TARGETS,
        "rounds": args.rounds,
        "steps": args.steps,
    }
    summary = {}
    for (side, dtype), times in found.items():
        if side == "matrix":
            report(benchmark="matrix_product", dtype=dtype, size=args.matrix, gflops_per_s=round(speed[dtype] / 1e9))
            continue
        rate = tokens / statistics.median(times)
        row = {"tokens_per_s": round(rate, 1), "of_matrix_speed": round(rate * needed / speed[dtype], 3)}
        summary.setdefault(dtype, {})[side] = row
        losses_seen = {"first_loss": round(first[side, dtype], 4), "last_loss": round(last[side, dtype], 4)}
        rounds = [round(t, 4) for t in times]
        report(benchmark="lora_step", side=side, dtype=dtype, **row, **losses_seen, seconds=rounds, **shape)
    for dtype in args.dtypes:
        if ("torch_peft", dtype) in found:
            summary[dtype]["ours_over_peer"] = ratio(found["torch_peft", dtype], found["ours", dtype])
    report(benchmark="summary", flops_per_token=needed, **summary)


if __name__ == "__main__":
    main()
