"""Training throughput of MiniGPT, beside the tutorial that this course starts from, and the data
pipeline's.

    python benchmarks/minigpt.py [--rounds 5]

Prints JSON lines, the summary last. The two models at the tutorial's shape take turns, a few steps
each per round, so that a machine that slows down slows both; medians over rounds are reported.
Nothing else should run meanwhile.

The tutorial is "Using LoRA in JAX" of the JAX AI stack (https://docs.jaxstack.ai); its model is
rebuilt here from its description: post-norm blocks with `nnx.MultiHeadAttention` and biases, ReLU,
a separate output layer, `nnx.LoRALinear` of rank 128 in the feed-forward layers and the output
layer, trained through `nnx.Optimizer` and `nnx.value_and_grad`, with its filter corrected (as
published, it trains nothing: chapter 05). Ours is the package's MiniGPT with adapters of rank 128
in the same layers, its embedding table tied to the output layer, through `train.make_step` and the
chunked loss.
"""

import argparse
import math
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from utils import lora, losses, minigpt, train
from utils.course import row_packing, sources, tokenizer
from utils.data import corpus, packing

VOCAB_SIZE, HIDDEN_SIZE, NUM_LAYERS, NUM_HEADS, RANK = 50_257, 256, 4, 8, 128
BATCH_SIZE, SEQ_LEN = 8, 256


class TutorialBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(NUM_HEADS, HIDDEN_SIZE, decode=False, rngs=rngs)
        D = HIDDEN_SIZE
        self.norm1, self.norm2 = nnx.LayerNorm(D, rngs=rngs), nnx.LayerNorm(D, rngs=rngs)
        self.linear1 = nnx.LoRALinear(D, D, lora_rank=RANK, rngs=rngs)
        self.linear2 = nnx.LoRALinear(D, D, lora_rank=RANK, rngs=rngs)

    def __call__(self, x):
        x = self.norm1(x + self.attention(x, mask=jnp.tril(jnp.ones((x.shape[1], x.shape[1])))))
        return self.norm2(x + self.linear2(nnx.relu(self.linear1(x))))


class TutorialMiniGPT(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(VOCAB_SIZE, HIDDEN_SIZE, rngs=rngs)
        self.positions = nnx.Embed(SEQ_LEN, HIDDEN_SIZE, rngs=rngs)
        for i in range(NUM_LAYERS):
            setattr(self, f"block{i}", TutorialBlock(rngs))
        self.output = nnx.LoRALinear(HIDDEN_SIZE, VOCAB_SIZE, lora_rank=RANK, rngs=rngs)

    def __call__(self, tokens):
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1])[None])
        for i in range(NUM_LAYERS):
            x = getattr(self, f"block{i}")(x)
        return self.output(x)


def tutorial(batch):
    """(a function that makes one training step of the tutorial and returns its loss,
    parameters)."""
    model = TutorialMiniGPT(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.LoRAParam)

    def loss_fn(model, batch):
        logits = model(batch["inputs"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(
            model, batch
        )
        optimizer.update(model, grads)
        return loss

    return lambda: step(model, optimizer), parameters(model)


def ours(batch, loss_chunk_size: int):
    """The same of this package's MiniGPT at the tutorial's shape."""
    config = minigpt.Config(
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=SEQ_LEN,
        hidden_size=HIDDEN_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        intermediate_size=HIDDEN_SIZE,
    )
    model = minigpt.MiniGPT(config, rngs=nnx.Rngs(0))
    target_modules = ("up_proj", "down_proj", "lm_head")
    lora.inject(model, rank=RANK, alpha=RANK, target_modules=target_modules, rngs=nnx.Rngs(1))

    def loss_fn(model, batch, key):
        hidden, _ = model.hidden(batch["inputs"])
        options = {"wrt": nnx.LoRAParam, "chunk_size": loss_chunk_size}
        return losses.chunked_cross_entropy(model.embed_tokens, hidden, batch["targets"], **options)

    return stepper(model, batch, loss_fn, optax.adam(1e-3), nnx.LoRAParam), parameters(model)


def stepper(model, batch, loss_fn, tx, wrt):
    """A function that makes one training step on the batch and returns its loss."""
    graph, trainable, frozen = nnx.split(model, wrt, ...)
    trainable = jax.tree.map(jnp.copy, trainable)
    step_fn, key = train.make_step(graph, loss_fn, tx), jax.random.key(0)
    carry = (trainable, tx.init(trainable), jnp.array(True))

    def step():
        nonlocal carry
        carry, loss, _ = step_fn(carry, frozen, batch, key)
        return loss

    return step


def parameters(model) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def timed(step, count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        loss = step()
    jax.block_until_ready(loss)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--loss-chunk-size", type=int, default=512, help="tokens that have logits at one time"
    )
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    shape = (BATCH_SIZE, SEQ_LEN)
    batch = {
        name: jnp.asarray(rng.integers(0, VOCAB_SIZE, shape), jnp.int32)
        for name in ("inputs", "targets")
    }

    sides = {"tutorial": tutorial(batch), "ours": ours(batch, args.loss_chunk_size)}
    for step, _ in sides.values():
        timed(step, 1)  # compiles
    seconds = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, (step, _) in sides.items():
            seconds[name].append(timed(step, 2))
    speed = {name: 2 * math.prod(shape) / statistics.median(s) for name, s in seconds.items()}
    sizes = {"batch_shape": shape, "hidden_size": HIDDEN_SIZE, "num_hidden_layers": NUM_LAYERS}
    sizes |= {"vocab_size": VOCAB_SIZE, "rank": RANK}
    for name, (_, size) in sides.items():
        rounds = [round(s, 3) for s in seconds[name]]
        row = {"tokens_per_s": round(speed[name]), "rounds": rounds, "parameters": size}
        common.report(benchmark="tutorial_shape", side=name, **row, dtype="float32", **sizes)

    tok = tokenizer.get("stories2048")
    rows = corpus.encode(sources.load_stories("train", limit=5000).texts, tok)
    course = {}
    for config, size in (
        (minigpt.Config(), 4),
        (minigpt.Config(max_position_embeddings=256), 2),
        (
            minigpt.Config(
                max_position_embeddings=256,
                hidden_size=144,
                num_hidden_layers=4,
                intermediate_size=576,
            ),
            4,
        ),
    ):
        length = config.max_position_embeddings
        batches = packing.batches(rows, length, size, eot=tok.eot_token)
        model = minigpt.MiniGPT(config, rngs=nnx.Rngs(0))
        tx = train.optimizer(train.schedule(2e-3, 1000))
        step = stepper(model, next(batches), train.next_token_loss, tx, nnx.Param)
        timed(step, 20)
        per_step = statistics.median(timed(step, 20) / 20 for _ in range(args.rounds))
        many = 3000
        started = time.perf_counter()
        for _ in range(many):
            next(batches)
        pipeline = many * size * length / (time.perf_counter() - started)
        training = size * length / per_step
        name = f"{config.hidden_size}x{config.num_hidden_layers} context {length} batch {size}"
        course[name] = {
            "tokens_per_s": round(training),
            "pipeline_tokens_per_s": round(pipeline),
            "pipeline_over_training": round(pipeline / training, 1),
        }
        common.report(benchmark="course_shape", shape=name, dtype="float32", **course[name])

    for seq_len in (128, 256):
        for pack in (row_packing.pad_rows, row_packing.concat_then_split, row_packing.best_fit):
            packed = pack(rows, seq_len, eot=tok.eot_token)
            row = {"packing": pack.__name__, "seq_len": seq_len}
            row |= {"wasted": round(packed.wasted, 5), "dropped": round(packed.dropped, 5)}
            common.report(benchmark="packing", **row)
    common.report(
        benchmark="summary",
        tutorial_tokens_per_s=round(speed["tutorial"]),
        ours_tokens_per_s=round(speed["ours"]),
        ratio=round(speed["ours"] / speed["tutorial"], 3),
        course=course,
    )


if __name__ == "__main__":
    main()
