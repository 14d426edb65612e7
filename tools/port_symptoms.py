"""Measure the port detective's readings: book/_static/widgets/port-detective.json, from chapter 08's own cells.

    python tools/port_symptoms.py

Runs the chapter's cells that carry the tag `gallery` in profile cpu, which break SmolLM2 in every way of
the gallery and examine each broken port with every probe (two minutes on two cores). What this file adds
is words: a probe's question and price, a bug's explanation and repair, and a sentence for each reading.
The chapter asserts that the file agrees with what it has just measured.
"""

import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHAPTER = ROOT / "chapters" / "08_porting_weights.md"
OUT = ROOT / "book" / "_static" / "widgets" / "port-detective.json"

PROBES = [
    ("text", "Read its text", 1,
     "What does it write, greedily, after “The lighthouse keeper climbed the stairs and”?"),
    ("loss", "Loss on a paragraph", 1, "How surprised is it by ordinary English, in nats per token?"),
    ("weights-stats", "Statistics of the weights", 1,
     "Have all tensors the file's names, means and standard deviations?"),
    ("logit-diff", "Logits against a reference", 2, "By how much, at most, does a logit differ from the reference's?"),
    ("top1", "Favourite token", 2, "At what share of positions is the most likely token the reference's?"),
    ("position-0", "Position 0 alone", 2, "By how much do the logits of the very first token differ?"),
    ("norm-small", "RMSNorm of a small vector", 2,
     "What is the rms of a vector of rms 0.0001 after a norm without weight?"),
    ("position-curve", "Error along the text", 3, "How much larger is the error at positions 96–127 than at 1–4?"),
    ("hidden-layer", "Hidden states, block by block", 3, "Which is the first block whose output differs?"),
    ("rotation-off", "Rotation off", 3, "With every position set to 0, in both: how far apart are the logits?"),
    ("rotation-back", "Rotation backwards", 3,
     "Negative positions here, the usual ones in the reference: how far apart?"),
    ("first-part", "Inside the first block", 4, "Which is the first part of block 0 whose output differs?"),
]  # fmt: skip

# Probes whose values a person tells apart by their kind alone ("noise", "rounding", "grows"), not by their exact value.
BY_READING = (
    "text",
    "logit-diff",
    "top1",
    "position-0",
    "position-curve",
    "rotation-off",
    "rotation-back",
)

BUGS = {
    "transposed": (
        "Square kernel transposed",
        "q_proj is 576 × 576, stored (out, in), and was loaded as (in, out). No shape complains.",
        "Do not transpose, or transpose everything; compare one matrix entry by entry, q_proj above all.",
    ),
    "halves-swapped": (
        "RoPE halves swapped",
        "The two halves of every q and k head have changed places, so each pair turns backwards.",
        "Rotate (a, b) to (a cos − b sin, b cos + a sin), with a the first half.",
    ),
    "interleaved": (
        "llama.cpp's row order kept",
        "llama.cpp pairs rows 2i and 2i + 1 of a head, Hugging Face rows i and i + H/2; "
        "q and k were not put back in order.",
        "Undo the permutation of q_proj and k_proj when reading a Llama GGUF (Qwen2's has none).",
    ),
    "rope-base": (
        "Wrong RoPE base",
        "The angles use the customary base of 10,000; this model was trained with 100,000.",
        "Take rope_theta from config.json, in both of its spellings.",
    ),
    "kv-grouping": (
        "KV heads grouped wrong",
        "Query head n reads key/value head n mod 3 in place of n div 3: tile where repeat was meant.",
        "Repeat each key/value head G times in a row: a a a b b b c c c.",
    ),
    "head-forgotten": (
        "Tied head forgotten",
        "The output layer is the embedding table; the port made a layer of its own, and nothing in the file filled it.",
        "Read tie_word_embeddings, and use the table as the output layer.",
    ),
    "eps-value": (
        "Another eps",
        "RMSNorm uses eps = 1e-6; config.json says 1e-5.",
        "Take rms_norm_eps from config.json.",
    ),
    "eps-outside": (
        "eps outside the root",
        "RMSNorm divides by rms + eps in place of sqrt(rms² + eps).",
        "Add eps to the mean square, then take the root.",
    ),
    "norm-off-by-one": (
        "Norms off by one block",
        "Each block has the input_layernorm of the block before it.",
        "Make the layer's number part of the table, and compare a tensor of the last layer.",
    ),
    "gate-up-swapped": (
        "gate and up swapped",
        "gate_proj and up_proj have one shape, and each was loaded into the other's place.",
        "Map by name, never by order or shape.",
    ),
    "layers-sorted": (
        "Blocks sorted as text",
        "The blocks were stacked in the order of their names: 0, 1, 10, 11, …, 2, 20, …",
        "Sort by the number, or let the table say which layer a tensor is.",
    ),
}


def measure() -> dict:
    """Run the chapter's `gallery` cells; the names they define."""
    import jupytext

    os.environ["COURSE_PROFILE"] = "cpu"
    sys.path.insert(0, str(ROOT))
    space = {"__name__": "__main__"}
    for cell in jupytext.read(CHAPTER, fmt="md:myst").cells:
        if cell.cell_type == "code" and "gallery" in cell.metadata.get("tags", []):
            exec(compile(cell.source, str(CHAPTER), "exec"), space)
    return space


def reading(probe: str, value, healthy) -> str:
    """What a number says, in a short sentence; it names no bug."""
    if probe == "text":
        return (
            "The text a healthy port writes."
            if value == healthy
            else "Not the text a healthy port writes."
        )
    if probe == "loss":
        gap = value - healthy
        if abs(gap) < 0.005:
            return "As healthy: this probe sees nothing."
        if gap < 0.5:
            return f"{gap:+.2f} nats: easily taken for noise."
        return f"{gap:+.1f} nats" + (
            ": worse than guessing blindly, ln V = 10.8." if value > 10.8 else "."
        )
    if probe == "weights-stats":
        blind = "Blind to order inside a tensor, to code and to settings."
        return blind if value == "all agree" else "The weights are not the file's."
    if probe == "top1":
        kinds = {0.999: "Always", 0.5: "Mostly", 0.2: "Sometimes", -1: "Hardly ever"}
        return next(
            f"{word} the reference's favourite." for least, word in kinds.items() if value > least
        )
    if probe == "norm-small":
        agrees = abs(value - healthy) < 0.001
        return (
            "As it should be."
            if agrees
            else f"Expected {healthy:.3g}: eps does not do what it should."
        )
    if probe == "position-curve":
        if value == 0:
            return "No error to follow."
        if 0.5 <= value <= 2:
            return "It is there at once, in full."
        return f"It {'grows' if value > 2 else 'shrinks'} along the text."
    if probe == "hidden-layer":
        words = {"none": "All blocks agree.", "block 0": "Wrong from the first block on."}
        return words.get(value, "The blocks before it agree.")
    if probe == "first-part":
        return "Block 0 is in order." if value == "none" else "What comes before it agrees."
    if probe == "rotation-back":
        return (
            "A perfect match, in a mirror."
            if value == 0
            else "As different as a healthy port would be, or more."
        )
    if value == 0:
        return "No more than rounding."
    return (
        "Far too much for rounding, too little to read in the text."
        if value < 0.1
        else "Completely different."
    )


def main() -> None:
    space = measure()
    symptoms, hub = space["symptoms"], space["hub"]

    def results(name: str) -> dict:
        readings = {}
        for probe, *_ in PROBES:
            value, healthy = (
                x if isinstance(x, str) else float(f"{x:.3g}")
                for x in (symptoms[name][probe], symptoms["healthy"][probe])
            )
            readings[probe] = {"value": value, "reading": reading(probe, value, healthy)}
        readings["position-curve"]["curve"] = [float(f"{x:.3g}") for x in symptoms[name]["curve"]]
        return readings

    if set(BUGS) != set(space["BUGS"]):
        raise SystemExit(
            f"bugs: expected those of the chapter, found {sorted(set(BUGS) ^ set(space['BUGS']))}"
        )
    source = next(where for what, where in hub.SOURCES_USED if what == hub.SMOLLM2).split(";")[0]
    content = {
        "provenance": {
            "model": hub.SMOLLM2,
            "source": source,
            "dtype": "float32",
            "tokens": int(space["tokens"].shape[1]),
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("jax", "flax")},
            "made_by": "tools/port_symptoms.py",
        },
        "prompt": space["PROMPT"],
        "paragraph": space["PARAGRAPH"],
        "probes": [
            dict(zip(("id", "name", "cost", "question"), probe))
            | {"told_apart_by": "reading" if probe[0] in BY_READING else "value"}
            for probe in PROBES
        ],
        "bugs": [
            {"id": name, "name": title, "explanation": why, "fix": fix, "results": results(name)}
            for name, (title, why, fix) in BUGS.items()
        ],
        "healthy": results("healthy"),
    }
    OUT.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(
        f"{OUT.relative_to(ROOT)}: {len(BUGS)} bugs, {len(PROBES)} probes, {OUT.stat().st_size:,} bytes"
    )


if __name__ == "__main__":
    main()
