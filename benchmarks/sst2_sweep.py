"""SST-2 by the label word, on SmolLM2-135M-Instruct: LoRA in many settings beside full fine-tuning.

    python benchmarks/sst2_sweep.py            # appends to benchmarks/results/sst2_sweep.jsonl

One JSON line a run, with its setting, its results, and where it comes from: versions, device,
sources of model and data, seed, seconds. A run that the file already has is skipped: a sweep that
was stopped continues where it was. Chapter 10 plots the file. `correct` says of each held-out
sentence, in the data's own order, whether it was classified right: one bit each, in hexadecimal, so
that any two runs can be compared sentence by sentence.

Every run has the same batches for the same seed, 8 sentences of at most 24 tokens with the prompt,
60 steps, bfloat16 matrix products, and classifies the same 400 sentences of the validation split.
LoRA keeps its frozen base in bfloat16 and its adapter in float32; full fine-tuning keeps float32
weights, as it must: an update of a few 1e-5 is lost when it is added to a bfloat16 weight. Times in
the file were measured while other programs ran (`machine_shared`): they say what a run costs, and
must not be compared.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from utils import lora, train
from utils.course import sources
from utils.hf import hub, weights

RESULTS = Path(__file__).parent / "results" / "sst2_sweep.jsonl"
PROMPT, WORDS = "Review: {}\nSentiment:", (" negative", " positive")
SEQ_LEN, BATCH_SIZE, STEPS, HELD_OUT = 24, 8, 60, 400
SHORTEST = 8  # words of a training sentence
QV, ATTENTION = ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]

LORA = dict(method="lora", rank=8, alpha=16, target_modules=QV, layers="all", variant="plain")
LORA |= dict(learning_rate=3e-3, seed=0)
FULL = dict(method="full", learning_rate=3e-5, seed=0)
ZERO_SHOT = dict(method="zero-shot")


def settings() -> list[dict]:
    """All runs, the most important first; each difference from `LORA` and `FULL` is named."""
    rates = [LORA | dict(learning_rate=rate) for rate in (1e-3, 1e-2, 1e-4, 3e-4)]
    rates += [FULL | dict(learning_rate=rate) for rate in (1e-4, 1e-5, 3e-4)]
    # alpha grows with the rank, so that the scale stays 2 and the rank alone differs; but for the
    # last of these
    changes = [dict(rank=rank, alpha=2 * rank) for rank in (1, 64, 2, 4, 16)] + [dict(rank=64)]
    changes += [dict(target_modules=names) for names in (ATTENTION + MLP, MLP, ATTENTION)]
    changes += [dict(layers=layers) for layers in ("first", "last")]
    # LoRA+ multiplies B's rate by 16: A's has to come down for it, or B's is far beyond what any
    # run here survives.
    changes += [
        dict(variant="rslora"),
        dict(variant="lora+", learning_rate=3e-4),
        dict(variant="dora"),
    ]
    pairs = [setting | dict(seed=seed) for seed in (0, 1) for setting in (LORA, FULL)]
    # Mixed, so that a sweep which is stopped early has something of everything.
    grid = [
        ZERO_SHOT,
        *pairs[:2],
        *rates[:2],
        rates[4],
        rates[5],
        *pairs[2:],
        *(LORA | change for change in changes),
    ]
    grid += (
        rates
        + [LORA | change | dict(seed=1) for change in changes]
        + [LORA | dict(seed=2), FULL | dict(seed=2)]
    )
    return [row for i, row in enumerate(grid) if row not in grid[:i]]


# ----------------------------------------------------------------------------------------- the data


def encode(tok, rows: list[tuple[str, int]]) -> list[tuple[list[int], int]]:
    """(token ids of the prompt, label) of each (sentence, label)."""
    return [(tok.encode(PROMPT.format(sentence)), label) for sentence, label in rows]


def pad(rows: list[tuple[list[int], int]], seq_len: int, words: list[int]) -> dict[str, np.ndarray]:
    """Rows padded on the right: inputs [B, T], last [B] (the prompt's last position), targets
    [B]."""
    inputs = np.zeros((len(rows), seq_len), np.int32)
    for i, (ids, _) in enumerate(rows):
        inputs[i, : len(ids)] = ids
    last = np.array([len(ids) - 1 for ids, _ in rows], np.int32)
    targets = np.array([words[label] for _, label in rows], np.int32)
    return {"inputs": inputs, "last": last, "targets": targets}


def batches(rows: list[tuple[list[int], int]], words: list[int], seed: int):
    """Endless batches in an order that follows from the seed; every row once before any row
    twice."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(rows))
        for i in range(0, len(rows) - BATCH_SIZE + 1, BATCH_SIZE):
            yield pad([rows[j] for j in order[i : i + BATCH_SIZE]], SEQ_LEN, words)


# ---------------------------------------------------------------------------------------- the model


def in_bfloat16(model: nnx.Module) -> nnx.Module:
    """The model with its weights cast for matrix products; gradients pass through the cast.
    Adapters cast themselves."""
    graph, adapter, others = nnx.split(model, nnx.LoRAParam, ...)
    return nnx.merge(graph, adapter, jax.tree.map(lambda x: x.astype(jnp.bfloat16), others))


def answer_logits(model: nnx.Module, inputs, last):
    """Logits [B, V] at the position `last` of each row: the output layer sees one token a row."""
    x, _ = model.hidden(inputs)
    return model.logits(jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0])


def loss_fn(model, batch, key):
    """Cross-entropy of the label word among all words, in nats."""
    del key
    logits = answer_logits(in_bfloat16(model), batch["inputs"], batch["last"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()


@functools.partial(jax.jit, static_argnames=("graph", "words"))
def _two_logits(graph, state, inputs, last, words):
    return answer_logits(in_bfloat16(nnx.merge(graph, state)), inputs, last)[:, jnp.array(words)]


def classify(model: nnx.Module, rows: list[tuple[list[int], int]], words: tuple[int, int]):
    """Is the label word's logit the larger one? bool [n]. Rows of like length share a batch."""
    graph, state = nnx.split(model)
    batch_size = 32
    correct = np.zeros(len(rows), bool)
    groups: dict[int, list[int]] = {}
    for i, (ids, _) in enumerate(rows):
        groups.setdefault(-(-len(ids) // 16) * 16, []).append(i)
    for seq_len, members in groups.items():
        for start in range(0, len(members), batch_size):
            chosen = members[start : start + batch_size]
            full = chosen + [chosen[0]] * (
                batch_size - len(chosen)
            )  # so that one shape is compiled
            batch = pad([rows[i] for i in full], seq_len, list(words))
            logits = np.asarray(_two_logits(graph, state, batch["inputs"], batch["last"], words))
            for i, (negative, positive) in zip(chosen, logits):
                correct[i] = (positive > negative) == rows[i][1]
    return correct


class DoRALinear(lora.LoRALinear):
    """Weight-decomposed LoRA (Liu et al. 2024): y = m / |W + s B A| * (W + s B A) x.

    m [out] is trained too: the length of each row. As in PEFT, no gradient passes through the norm
    (section 4.3 of the paper). m starts at the norms of W's rows, so a new adapter changes nothing.
    """

    def __init__(self, base, **options):
        super().__init__(base, **options)
        self.magnitude = nnx.LoRAParam(
            jnp.linalg.norm(base.weight[...].astype(jnp.float32), axis=-1)
        )

    def __call__(self, x):
        adapted = self.base.weight[...].astype(jnp.float32) + self.delta()
        norm = jax.lax.stop_gradient(jnp.linalg.norm(adapted, axis=-1))
        y = self.base(x)
        return (self.magnitude[...] / norm).astype(y.dtype) * (
            y + self.lora_delta(x).astype(y.dtype)
        )


def build(setting: dict) -> tuple[nnx.Module, optax.GradientTransformation, object]:
    """(model, optimiser, filter of the trainable variables) of a setting."""
    if setting["method"] == "full":
        model = weights.load(hub.SMOLLM2, dtype=jnp.float32)
        rate = train.schedule(setting["learning_rate"], STEPS)
        return model, train.optimizer(rate, weight_decay=0.0), nnx.Param
    model = weights.load(hub.SMOLLM2, dtype=jnp.bfloat16)
    depth = model.config.num_hidden_layers
    layers = {"all": None, "first": list(range(depth // 2)), "last": list(range(depth // 2, depth))}
    lora.inject(
        model,
        rank=setting["rank"],
        alpha=setting["alpha"],
        target_modules=setting["target_modules"],
        layers=layers[setting["layers"]],
        use_rslora=setting["variant"] == "rslora",
        rngs=nnx.Rngs(setting["seed"]),
    )
    if setting["variant"] == "dora":
        options = dict(rank=setting["rank"], alpha=setting["alpha"], rngs=nnx.Rngs(setting["seed"]))
        for _, parent, name, module in list(lora.modules(model)):
            if isinstance(module, lora.LoRALinear):
                setattr(parent, name, DoRALinear.from_linear(module.base, **options))
    rate = train.schedule(setting["learning_rate"], STEPS)
    tx = train.optimizer(rate, weight_decay=0.0)
    if setting["variant"] == "lora+":  # Hayou et al. 2024: B has 16 times A's learning rate

        def labels(params):
            def of(path, _):
                return "B" if "lora_B" in jax.tree_util.keystr(path) else "A"

            return jax.tree_util.tree_map_with_path(of, params)

        faster = train.schedule(16 * setting["learning_rate"], STEPS)
        adam = {name: optax.adam(r, b1=0.9, b2=0.98) for name, r in (("A", rate), ("B", faster))}
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.multi_transform(adam, labels))
    return model, tx, nnx.LoRAParam


# ------------------------------------------------------------------------------------------ one run


def run(setting: dict, training: list, held_out: list, words: tuple[int, int]) -> dict:
    """Train and classify; the results, ready for JSON."""
    started = time.perf_counter()
    out: dict = {}
    if setting["method"] == "zero-shot":
        model = weights.load(hub.SMOLLM2, dtype=jnp.bfloat16)
    else:
        model, tx, wrt = build(setting)
        out["trainable_parameters"] = sum(
            leaf.size for leaf in jax.tree.leaves(nnx.state(model, wrt))
        )
        stream = batches(training, list(words), setting["seed"])
        history = train.fit(
            model, stream, loss_fn, tx, steps=STEPS, wrt=wrt, log_every=5, progress=False
        )
        if history.stopped != "finished":
            raise SystemExit("stopped during a run, which is not recorded: start again to go on")
        out["loss"] = [round(loss, 4) for loss in history.loss]
        out["seconds_per_step"] = round(history.seconds / (STEPS - 1), 3)
    trained = time.perf_counter()
    correct = classify(model, held_out, words)
    return out | {
        "accuracy": round(float(correct.mean()), 4),
        "held_out": len(correct),
        "correct": np.packbits(correct).tobytes().hex(),
        "seconds": {
            "training": round(trained - started, 1),
            "evaluation": round(time.perf_counter() - trained, 1),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quiet-machine", action="store_true", help="nothing else runs: the times may be compared"
    )
    args = parser.parse_args()
    tok = hub.tokenizer(hub.SMOLLM2)
    words = tuple(tok.encode(word)[0] for word in WORDS)
    if any(len(tok.encode(word)) != 1 for word in WORDS):
        raise SystemExit(f"{WORDS}: expected words of one token each in this vocabulary")
    long_enough = [row for row in sources.load_sst2("train") if len(row[0].split()) >= SHORTEST]
    order = np.random.default_rng(0).permutation(len(long_enough))[:6000]  # more than any run reads
    training = encode(tok, [long_enough[i] for i in order])
    training = [row for row in training if len(row[0]) <= SEQ_LEN]
    held_out = encode(tok, sources.load_sst2("validation")[:HELD_OUT])
    done = (
        [json.loads(line)["setting"] for line in RESULTS.read_text().splitlines()]
        if RESULTS.exists()
        else []
    )
    left = [setting for setting in settings() if setting not in done]
    for number, setting in enumerate(left, start=1):
        row = {"benchmark": "sst2", "setting": setting}
        row |= run(setting, training, held_out, words)
        row |= {
            "prompt": PROMPT,
            "words": WORDS,
            "batch_shape": [BATCH_SIZE, SEQ_LEN],
            "steps": STEPS,
            "dtype": "bfloat16 products",
            "model": hub.SMOLLM2,
            "sources": [f"{what}: {source}" for what, source in hub.SOURCES_USED],
            "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
            "machine_shared": not args.quiet_machine,
            "versions": {"python": platform.python_version()}
            | {p: version(p) for p in ("jax", "flax", "optax")},
            "date": time.strftime("%Y-%m-%d"),
        }
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        seconds = sum(row["seconds"].values())
        print(
            f"{number} of {len(left)}: {setting} accuracy {row['accuracy']:.3f}, {seconds:.0f} s",
            flush=True,
        )
    accuracies = [json.loads(line)["accuracy"] for line in RESULTS.read_text().splitlines()]
    best, middle = max(accuracies), statistics.median(accuracies)
    print(
        json.dumps(
            {
                "benchmark": "summary",
                "runs": len(accuracies),
                "best_accuracy": best,
                "median_accuracy": middle,
            }
        )
    )


if __name__ == "__main__":
    main()
