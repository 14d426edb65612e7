"""One side of `against.py`: prepares a benchmark with whichever `utils` is on the path and answers
turns.

    PYTHONPATH=SIDE python benchmarks/against_worker.py lora_step '{"model": FOLDER, ...}'

The pieces of work, "units", are written once, on a small set of functions that both layouts of the
package can provide: the present one, with rooms (`Rooms`), and the one before it, all modules on
one floor (`OneFloor`).
"""

import importlib.util
import json
import sys
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import process
from flax import nnx

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROMPTS = (
    "Write a long story about a lighthouse keeper.",
    "Explain in detail how bread is made.",
    "Tell me everything about the history of Rome, from its first day on.",
    "Describe a walk through a forest in autumn.",
    "Write a long letter to a friend who moved to another country, about the year that has passed.",
    "Explain how a computer works, step by step.",
    "What are the planets? Describe each of them.",
    "Write a dialogue between a cat and a dog.",
)
FINETUNE = {"rank": 16, "alpha": 32.0, "limit": 400, "max_seq_length": 256, "batch_size": 4}


class Rooms:
    """The package with rooms: hf/, data/, kernels/, ..."""

    def __init__(self):
        from utils import generate, kernels, lora, losses, minigpt, train
        from utils.commands import finetune, options
        from utils.data import problems, sft
        from utils.hf import hub, weights
        from utils.kernels import cpu

        self.keep_memory, self.load, self.tokenizer = cpu.keep_memory, weights.load, hub.tokenizer
        self.prepare, self.generate = generate.prepare, generate.generate
        self.training_layout, self.make_step = kernels.training_layout, train.make_step
        self.next_token_loss = train.next_token_loss
        self.lora, self.losses, self.minigpt = lora, losses, minigpt
        self.finetune, self.options, self.problems, self.sft = finetune, options, problems, sft

    def inject(self, model, rank: int, alpha: float, target_modules) -> None:
        options = {"rank": rank, "alpha": alpha, "target_modules": target_modules}
        self.lora.inject(model, **options, rngs=nnx.Rngs(0))

    def chunked_loss(self, head, hidden, targets, chunk_size: int = 128):
        options = {"wrt": nnx.LoRAParam, "chunk_size": chunk_size}
        return self.losses.chunked_cross_entropy(head, hidden, targets, **options)

    def mini(self, vocab_size, context, width, layers, heads, mlp_width):
        config = self.minigpt.Config(
            vocab_size=vocab_size,
            max_position_embeddings=context,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=mlp_width,
        )
        return self.minigpt.MiniGPT(config, rngs=nnx.Rngs(0))

    def finetuning(self, rows: int, max_seq_length: int) -> tuple:
        """(loss, optimiser) of `finetune` with its defaults."""
        sizes = {"batch_size": rows, "max_seq_length": max_seq_length}
        config = self.options.Finetune(model="", data="", output="", **sizes)
        return self.finetune.loss_fn(), self.finetune.optimizer(config, 10_000)


class OneFloor:
    """The package before it had rooms, with its words."""

    def __init__(self):
        from utils import (
            finetune,
            generate,
            hub,
            lora,
            losses,
            minigpt,
            problems,
            profile,
            sft,
            train,
            weights,
        )

        self.keep_memory, self.load, self.tokenizer = (
            profile.keep_memory,
            weights.load,
            hub.tokenizer,
        )
        self.prepare, self.generate = generate.prepare, generate.generate
        self.training_layout, self.make_step = finetune.for_training, train.make_step
        self.next_token_loss = train.next_token_loss
        self.lora, self.losses, self.minigpt = lora, losses, minigpt
        self.finetune, self.problems, self.sft = finetune, problems, sft

    def inject(self, model, rank: int, alpha: float, target_modules) -> None:
        self.lora.inject(model, rank=rank, alpha=alpha, targets=target_modules, rngs=nnx.Rngs(0))

    def chunked_loss(self, head, hidden, targets, chunk_size: int = 128):
        options = {"wrt": nnx.LoRAParam, "chunk": chunk_size}
        return self.losses.chunked_cross_entropy(head, hidden, targets, **options)

    def mini(self, vocab_size, context, width, layers, heads, mlp_width):
        sizes = (vocab_size, context, width, layers, heads, mlp_width)
        return self.minigpt.MiniGPT(self.minigpt.Config(*sizes), rngs=nnx.Rngs(0))

    def finetuning(self, rows: int, max_seq_length: int) -> tuple:
        sizes = {"batch": rows, "window": max_seq_length}
        config = self.finetune.Config(model="", data="", output="", **sizes)
        return self.finetune.loss_fn(), self.finetune.optimizer(config, 10_000)


def stepper(package, model, batches, loss_fn, tx, wrt, steps: int = 1):
    """A function that makes training steps on the next batches and returns the last loss."""
    graph, trainable, frozen = nnx.split(model, wrt, ...)
    carry = (jax.tree.map(jnp.copy, trainable), tx.init(trainable), jnp.array(True))
    # Committed to the device, as loaded weights are: or the second step would compile again.
    carry = jax.device_put(carry, jax.devices()[0])
    step_fn, key = package.make_step(graph, loss_fn, tx), jax.random.key(0)

    def run() -> float:
        nonlocal carry
        for _ in range(steps):
            carry, loss, _ = step_fn(carry, frozen, next(batches), key)
        return float(loss)

    return run


def random_batches(vocab_size: int, batch_size: int, seq_len: int):
    """The same batch again and again: uniformly random tokens."""
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, vocab_size, (batch_size, seq_len + 1)), jnp.int32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    while True:
        yield batch


# -------------------------------------------------------------------------------------------- units


def decode(package, model: str, max_new_tokens: int) -> dict:
    """Greedy texts of chat prompts, prefill included; their checksum is the result."""
    tok = package.tokenizer(model)
    tok.stop_ids = frozenset()  # every unit writes as many tokens
    prompts = [tok.chat([{"role": "user", "content": prompt}]) for prompt in PROMPTS]

    def unit(prepared, rows: int):
        def run() -> int:
            completions = package.generate(
                prepared, tok, prompts[:rows], max_new_tokens, temperature=0
            )
            texts = [getattr(completion, "text", completion) for completion in completions]
            return zlib.crc32("".join(texts).encode())

        return run

    bfloat16, float32 = (
        package.prepare(package.load(model, dtype=dtype)) for dtype in ("bfloat16", "float32")
    )
    return {
        "bfloat16, 1 row": unit(bfloat16, 1),
        "bfloat16, 8 rows": unit(bfloat16, 8),
        "float32, 1 row": unit(float32, 1),
    }


def lora_step(package, model: str, **_) -> dict:
    """A LoRA step on 4 x 128 tokens, rank 8 on q_proj and v_proj."""
    package.keep_memory()

    def loss_fn(model, batch, key):
        hidden, _ = model.hidden(batch["inputs"])
        return package.chunked_loss(model.head, hidden, batch["targets"])

    def unit(dtype: str):
        adapted = package.load(model, dtype=dtype)
        package.inject(adapted, rank=8, alpha=16, target_modules=("q_proj", "v_proj"))
        batches = random_batches(adapted.config.vocab_size, 4, 128)
        laid_out = package.training_layout(adapted)
        return stepper(package, laid_out, batches, loss_fn, optax.adamw(1e-3), nnx.LoRAParam)

    return {dtype: unit(dtype) for dtype in ("bfloat16", "float32")}


def minigpt(package, **_) -> dict:
    """A LoRA step at the tutorial's shape, and training steps of the course's largest MiniGPT."""
    sizes = {"vocab_size": 50_257, "context": 256, "width": 256, "layers": 4, "heads": 8}
    adapted = package.mini(**sizes, mlp_width=256)
    package.inject(adapted, rank=128, alpha=128, target_modules=("up_proj", "down_proj", "lm_head"))

    def loss_fn(model, batch, key):
        hidden, _ = model.hidden(batch["inputs"])
        return package.chunked_loss(model.embed_tokens, hidden, batch["targets"], 512)

    batches, tx = random_batches(50_257, 8, 256), optax.adam(1e-3)
    sizes = {"vocab_size": 2048, "context": 256, "width": 144, "layers": 4, "heads": 4}
    course, course_batches = package.mini(**sizes, mlp_width=576), random_batches(2048, 4, 256)
    loss = package.next_token_loss
    return {
        "LoRA, 256 x 4": stepper(package, adapted, batches, loss_fn, tx, nnx.LoRAParam),
        "training, 144 x 4": stepper(
            package, course, course_batches, loss, tx, nnx.Param, steps=10
        ),
    }


def finetune(package, model: str, **_) -> dict:
    """finetune's step: packed rows of arithmetic problems, rank 16 on all linear layers,
    bfloat16."""
    package.keep_memory()
    rows, length = FINETUNE["batch_size"], FINETUNE["max_seq_length"]
    problems = package.problems.load("arithmetic", "train", FINETUNE["limit"])
    examples = package.sft.within(package.sft.tokenise(problems, package.tokenizer(model)), length)
    batches = iter(package.sft.batches(package.sft.to_rows(examples, length), rows))
    adapted = package.load(model, dtype="bfloat16")
    package.inject(adapted, FINETUNE["rank"], FINETUNE["alpha"], ALL_LINEAR)
    loss_fn, tx = package.finetuning(rows, length)
    laid_out = package.training_layout(adapted)
    unit = stepper(package, laid_out, batches, loss_fn, tx, nnx.LoRAParam)
    return {f"bfloat16, {rows} x {length}": unit}


def load(package, model: str, **_) -> dict:
    """The call of `weights.load`, with the file in the page cache."""

    def run() -> None:
        loaded = package.load(model, dtype="bfloat16")
        jax.block_until_ready(jax.tree.leaves(nnx.state(loaded)))

    return {"bfloat16": run}


BENCHMARKS = (decode, lora_step, minigpt, finetune, load)


def prepare(name: str, options: str) -> tuple[list, dict]:
    package = Rooms() if importlib.util.find_spec("utils.kernels") else OneFloor()
    import utils

    benchmark = {function.__name__: function for function in BENCHMARKS}[name]
    units = benchmark(package, **json.loads(options))
    about = {"utils": str(Path(utils.__file__).resolve()), "units": list(units)}
    return list(units.values()), about


if __name__ == "__main__":
    process.serve(lambda: prepare(*sys.argv[1:]))
