"""SST-2 by the label word, on SmolLM2-135M-Instruct: LoRA in many settings beside full fine-tuning.

    python benchmarks/sst2_sweep.py            # appends to benchmarks/results/sst2_sweep.jsonl

One JSON line a run, with its setting, what came out, and where it comes from: versions, device, sources of model and data,
seed, seconds. A run that is in the file already is skipped, so a sweep that was stopped goes on where it was. Chapter 10
plots the file. `correct` says of each held-out sentence, in the data's own order, whether it was classified right: one
bit each, in hexadecimal, so that any two runs can be compared sentence by sentence.

Every run has the same batches for the same seed, 8 sentences of at most 24 tokens with the prompt, 60 steps, bfloat16
products, and is asked about the same 400 sentences of the validation split. LoRA keeps its frozen base in bfloat16 and
its adapter in float32; full fine-tuning keeps float32 weights, as it must: an update of a few 1e-5 is lost when it is
added to a bfloat16 weight. Times in the file were taken on a machine that did other things beside (`machine_shared`):
they say what a run costs, and must not be compared.
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
from utils.data import corpus
from utils.hf import hub, weights

RESULTS = Path(__file__).parent / "results" / "sst2_sweep.jsonl"
PROMPT, WORDS = "Review: {}\nSentiment:", (" negative", " positive")
CONTEXT, BATCH, STEPS, SHORTEST, HELD_OUT = 24, 8, 60, 8, 400  # SHORTEST: words of a training sentence
QV, ATTENTION = ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]

LORA = dict(method="lora", rank=8, alpha=16, target_modules=QV, num_hidden_layers="all", variant="plain", learning_rate=3e-3, seed=0)
FULL = dict(method="full", learning_rate=3e-5, seed=0)
ZERO_SHOT = dict(method="zero-shot")


def settings() -> list[dict]:
    """All runs, the most important first; each difference from `LORA` and `FULL` is named."""
    rates = [LORA | dict(learning_rate=rate) for rate in (1e-3, 1e-2, 1e-4, 3e-4)]
    rates += [FULL | dict(learning_rate=rate) for rate in (1e-4, 1e-5, 3e-4)]
    # alpha grows with the rank, so that the scale stays 2 and the rank alone differs; but for the last of these
    changes = [dict(rank=rank, alpha=2 * rank) for rank in (1, 64, 2, 4, 16)] + [dict(rank=64)]
    changes += [dict(target_modules=targets) for targets in (ATTENTION + MLP, MLP, ATTENTION)]
    changes += [dict(num_hidden_layers=layers) for layers in ("first", "last")]
    # LoRA+ multiplies B's rate by 16: A's has to come down for it, or B's is far beyond what any run here survives.
    changes += [dict(variant="rslora"), dict(variant="lora+", learning_rate=3e-4), dict(variant="dora")]
    pairs = [setting | dict(seed=seed) for seed in (0, 1) for setting in (LORA, FULL)]
    # Mixed, so that a sweep which is stopped early has something of everything.
    grid = [ZERO_SHOT, *pairs[:2], *rates[:2], rates[4], rates[5], *pairs[2:], *(LORA | change for change in changes)]
    grid += rates + [LORA | change | dict(seed=1) for change in changes] + [LORA | dict(seed=2), FULL | dict(seed=2)]
    return [row for i, row in enumerate(grid) if row not in grid[:i]]


# ------------------------------------------------------------------------------------------------------------- the data


def encode(tok, rows: list[tuple[str, int]]) -> list[tuple[list[int], int]]:
    """(token ids of the prompt, label) of each (sentence, label)."""
    return [(tok.encode(PROMPT.format(sentence)), label) for sentence, label in rows]


def pack(rows: list[tuple[list[int], int]], width: int, words: list[int]) -> dict[str, np.ndarray]:
    """Rows padded on the right: inputs [B, T], last [B] (where the answer is asked for), targets [B] (its token)."""
    inputs = np.zeros((len(rows), width), np.int32)
    for i, (ids, _) in enumerate(rows):
        inputs[i, : len(ids)] = ids
    last = np.array([len(ids) - 1 for ids, _ in rows], np.int32)
    return {"inputs": inputs, "last": last, "targets": np.array([words[label] for _, label in rows], np.int32)}


def batches(rows: list[tuple[list[int], int]], words: list[int], seed: int):
    """Endless batches in an order that follows from the seed; every row once before any row twice."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(rows))
        for i in range(0, len(rows) - BATCH + 1, BATCH):
            yield pack([rows[j] for j in order[i : i + BATCH]], CONTEXT, words)


# ------------------------------------------------------------------------------------------------------------ the model


def in_bfloat16(model: nnx.Module) -> nnx.Module:
    """The model with its weights cast, for the products; the gradient passes through the cast. Adapters cast themselves."""
    graph, adapter, rest = nnx.split(model, nnx.LoRAParam, ...)
    return nnx.merge(graph, adapter, jax.tree.map(lambda x: x.astype(jnp.bfloat16), rest))


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


def classify(model: nnx.Module, rows: list[tuple[list[int], int]], words: tuple[int, int], batch: int = 32):
    """Is the label word's logit the larger one? bool [n]. Rows of like length share a batch."""
    graph, state = nnx.split(model)
    correct = np.zeros(len(rows), bool)
    groups: dict[int, list[int]] = {}
    for i, (ids, _) in enumerate(rows):
        groups.setdefault(-(-len(ids) // 16) * 16, []).append(i)
    for width, members in groups.items():
        for start in range(0, len(members), batch):
            chosen = members[start : start + batch]
            packed = pack([rows[i] for i in chosen + [chosen[0]] * (batch - len(chosen))], width, list(words))
            logits = np.asarray(_two_logits(graph, state, packed["inputs"], packed["last"], words))
            for i, (negative, positive) in zip(chosen, logits):
                correct[i] = (positive > negative) == rows[i][1]
    return correct


class DoRALinear(lora.LoRALinear):
    """Weight-decomposed LoRA (Liu et al. 2024): y = m / |W + s B A| * (W + s B A) x, a learnt length m for each row of W.

    As in PEFT, the norm takes part in the value and not in the gradient (section 4.3 of the paper): it is a constant of
    the step. m starts at the rows' own norms, so a fresh one is the base.
    """

    def __init__(self, base, **options):
        super().__init__(base, **options)
        self.magnitude = nnx.LoRAParam(jnp.linalg.norm(base.weight[...].astype(jnp.float32), axis=-1))

    def __call__(self, x):
        changed = self.base.weight[...].astype(jnp.float32) + self.delta()
        norm = jax.lax.stop_gradient(jnp.linalg.norm(changed, axis=-1))
        y = self.base(x)
        return (self.magnitude[...] / norm).astype(y.dtype) * (y + self.lora_delta(x).astype(y.dtype))


def build(setting: dict) -> tuple[nnx.Module, optax.GradientTransformation, object]:
    """(model, optimiser, which variables are trained) of a setting."""
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
        target_modules=setting["targets"],
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
    if setting["variant"] == "lora+":  # Hayou et al. 2024: B learns 16 times as fast as A

        def labels(params):
            def of(path, _):
                return "B" if "lora_B" in jax.tree_util.keystr(path) else "A"

            return jax.tree_util.tree_map_with_path(of, params)

        faster = train.schedule(16 * setting["learning_rate"], STEPS)
        adam = {name: optax.adam(r, b1=0.9, b2=0.98) for name, r in (("A", rate), ("B", faster))}
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.multi_transform(adam, labels))
    return model, tx, nnx.LoRAParam


# -------------------------------------------------------------------------------------------------------------- one run


def run(setting: dict, training: list, held_out: list, words: tuple[int, int]) -> dict:
    """Train and classify; what came out, ready for JSON."""
    begun = time.perf_counter()
    out: dict = {}
    if setting["method"] == "zero-shot":
        model = weights.load(hub.SMOLLM2, dtype=jnp.bfloat16)
    else:
        model, tx, wrt = build(setting)
        out["trained_numbers"] = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, wrt)))
        stream = batches(training, list(words), setting["seed"])
        history = train.fit(model, stream, loss_fn, tx, steps=STEPS, wrt=wrt, log_every=5, progress=False)
        if history.stopped != "finished":
            raise SystemExit("stopped in the middle of a run, which is not recorded: start again to go on")
        out["loss"] = [round(loss, 4) for loss in history.loss]
        out["seconds_per_step"] = round(history.seconds / (STEPS - 1), 3)
    trained = time.perf_counter()
    correct = classify(model, held_out, words)
    return out | {
        "accuracy": round(float(correct.mean()), 4),
        "held_out": len(correct),
        "correct": np.packbits(correct).tobytes().hex(),
        "seconds": {"training": round(trained - begun, 1), "evaluation": round(time.perf_counter() - trained, 1)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quiet-machine", action="store_true", help="nothing else runs: the times may be compared")
    args = parser.parse_args()
    tok = hub.tokenizer(hub.SMOLLM2)
    words = tuple(tok.encode(word)[0] for word in WORDS)
    if any(len(tok.encode(word)) != 1 for word in WORDS):
        raise SystemExit(f"{WORDS}: expected words of one token each in this vocabulary")
    long_enough = [row for row in corpus.load_sst2("train") if len(row[0].split()) >= SHORTEST]
    order = np.random.default_rng(0).permutation(len(long_enough))[:6000]  # more than any run reads
    training = [row for row in encode(tok, [long_enough[i] for i in order]) if len(row[0]) <= CONTEXT]
    held_out = encode(tok, corpus.load_sst2("validation")[:HELD_OUT])
    done = [json.loads(line)["setting"] for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    left = [setting for setting in settings() if setting not in done]
    for number, setting in enumerate(left, start=1):
        found = run(setting, training, held_out, words)
        row = {"benchmark": "sst2", "setting": setting} | found
        row |= {
            "prompt": PROMPT,
            "words": WORDS,
            "batch": [BATCH, CONTEXT],
            "steps": STEPS,
            "dtype": "bfloat16 products",
            "model": hub.SMOLLM2,
            "sources": [f"{what}: {source}" for what, source in hub.SOURCES_USED],
            "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
            "machine_shared": not args.quiet_machine,
            "versions": {"python": platform.python_version()} | {p: version(p) for p in ("jax", "flax", "optax")},
            "date": time.strftime("%Y-%m-%d"),
        }
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        del found
        seconds = sum(row["seconds"].values())
        print(f"{number} of {len(left)}: {setting} accuracy {row['accuracy']:.3f}, {seconds:.0f} s", flush=True)
    accuracies = [json.loads(line)["accuracy"] for line in RESULTS.read_text().splitlines()]
    best, middle = max(accuracies), statistics.median(accuracies)
    print(
        json.dumps({"benchmark": "summary", "runs": len(accuracies), "best_accuracy": best, "median_accuracy": middle})
    )


if __name__ == "__main__":
    main()
