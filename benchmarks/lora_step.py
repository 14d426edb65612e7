"""A LoRA training step on SmolLM2: this package beside torch with PEFT.

    python benchmarks/lora_step.py [--rounds 7]     # the peer runs where `make install-peers` was
    run

Prints JSON lines, the summary last. Batch 4 x 128 tokens, rank 8 on q_proj and v_proj, AdamW on the
adapter, the base frozen, in float32 and with a bfloat16 base (adapters stay float32 on both sides:
PEFT's default). Each side has a process of its own; all take turns within a round, some steps in a
row at each turn as in training, and so does one large matrix product of each dtype: the machine's
own speed. Nothing else should run.

`of_matrix_speed` counts the operations that this step cannot avoid: 4 per weight and token in
matrix products (forward, and the gradient of the activations; the frozen weights need none), and
three passes of attention over the whole square.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from utils import kernels, lora, losses, train, transformer
from utils.hf import config, hub, weights
from utils.kernels import cpu

TARGET_MODULES = ("q_proj", "v_proj")


def ours(path: str, dtype: str, rank: int, target_modules: list[str], inputs, targets) -> list:
    """[a function that makes one step and returns its loss]."""
    cpu.keep_memory()  # slower for the peer, so only here: 543 tokens/s instead of 610 in bfloat16
    model = weights.load(path, dtype=dtype)
    options = {"rank": rank, "alpha": 2 * rank, "target_modules": target_modules}
    lora.inject(model, **options, rngs=nnx.Rngs(0))
    model = kernels.training_layout(model)

    def loss_fn(model, batch, key):
        hidden, _ = model.hidden(batch["inputs"])
        targets = batch["targets"]
        return losses.chunked_cross_entropy(model.head, hidden, targets, wrt=nnx.LoRAParam)

    tx = optax.adamw(1e-3)
    graph, trainable, frozen = nnx.split(model, nnx.LoRAParam, ...)
    carry = (jax.tree.map(jnp.copy, trainable), tx.init(trainable), jnp.array(True))
    # Committed to the device, as loaded weights are: or the second step would compile again.
    carry = jax.device_put(carry, jax.devices()[0])
    step_fn, key = train.make_step(graph, loss_fn, tx), jax.random.key(0)
    batch = {"inputs": jnp.array(inputs, jnp.int32), "targets": jnp.array(targets, jnp.int32)}

    def step() -> float:
        nonlocal carry
        carry, loss, _ = step_fn(carry, frozen, batch, key)
        return float(loss)

    return [step]


def necessary_flops(config: transformer.Config, seq_len: int) -> int:
    """Per token: 2 x 2 for each weight in a matrix product; 3 passes of attention's 2 x 2 x seq_len
    for each query feature of a layer."""
    query_features = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    attention = 2 * 2 * seq_len * query_features
    return 2 * (config.flops_per_token(seq_len) - attention) + 3 * attention


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps at each turn")
    parser.add_argument("--model", default=hub.SMOLLM2)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument(
        "--matrix", type=int, default=2048, help="size of the product that measures the machine"
    )
    args = parser.parse_args()
    path, with_peers = hub.model(args.model), common.has_peers()
    sizes = config.read(path)
    shape = (args.batch_size, args.seq_len + 1)
    tokens = np.random.default_rng(0).integers(0, sizes.vocab_size, shape)
    inputs, targets = tokens[:, :-1].tolist(), tokens[:, 1:].tolist()

    processes, products, flops = {}, {}, {}
    for dtype in args.dtypes:
        options = {
            "path": path,
            "dtype": dtype,
            "rank": args.rank,
            "target_modules": TARGET_MODULES,
        }
        options |= {"inputs": inputs, "targets": targets}
        processes["ours", dtype] = common.start_ours(__file__, **options)
        if with_peers:
            processes["torch_peft", dtype] = common.start_peer("lora_step", **options)
        products[dtype], flops[dtype] = common.matrix_product(dtype, args.matrix)
    # The first step compiles, and both sides should start from the same loss.
    first = {key: side.turn()["result"] for key, side in processes.items()}

    def steps(side):
        return lambda: sum(side.seconds() for _ in range(args.steps)) / args.steps

    turns = {key: steps(side) for key, side in processes.items()}
    turns |= {("matrix", dtype): product for dtype, product in products.items()}
    times = common.take_turns(turns, args.rounds)
    last = {key: side.turn()["result"] for key, side in processes.items()}

    flops_per_token = necessary_flops(sizes, args.seq_len)
    shape = {"batch_shape": [args.batch_size, args.seq_len], "rank": args.rank}
    shape |= {"target_modules": TARGET_MODULES, "rounds": args.rounds, "steps": args.steps}
    summary = {dtype: {} for dtype in args.dtypes}
    for dtype in args.dtypes:
        flops_per_s = flops[dtype] / statistics.median(times["matrix", dtype])
        gflops_per_s = round(flops_per_s / 1e9)
        row = {"dtype": dtype, "size": args.matrix, "gflops_per_s": gflops_per_s}
        common.report(benchmark="matrix_product", **row)
        for key in [key for key in processes if key[1] == dtype]:
            rate = args.batch_size * args.seq_len / statistics.median(times[key])
            row = {"tokens_per_s": round(rate, 1)}
            row["of_matrix_speed"] = round(rate * flops_per_token / flops_per_s, 3)
            summary[dtype][key[0]] = row
            seen = {"first_loss": round(first[key], 4), "last_loss": round(last[key], 4)}
            seen["seconds"] = [round(t, 4) for t in times[key]]
            common.report(benchmark="lora_step", side=key[0], dtype=dtype, **row, **seen, **shape)
        if with_peers:
            quicker = common.ratio(times["torch_peft", dtype], times["ours", dtype])
            summary[dtype]["ours_over_peer"] = quicker
    common.report(benchmark="summary", flops_per_token=flops_per_token, **summary)


if __name__ == "__main__" and not common.served(ours):
    main()
