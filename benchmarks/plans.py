"""What the TPU's compiler says of R1's LoRA step: bytes per chip on every slice of the course, at several meshes and sizes.

    JAX_PLATFORMS=cpu .venv-tpu/bin/python benchmarks/plans.py     # appends to benchmarks/results/plans.jsonl

One JSON line a plan (`plan.compile_for`'s), with its setting and where it comes from: versions, seconds, date. A setting
that is in the file already is skipped, so a recording that was stopped goes on where it was. No weights and no TPU are
needed, but libtpu is (`make install-tpu`). Chapter 13 and its mesh planner are held to every line of the file.

Bytes do not depend on the machine that compiles. `compile_seconds` do, and were taken on one that did other things beside.
"""

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import transformer
from utils.commands import plan

RESULTS = Path(__file__).parent / "results" / "plans.jsonl"
_QWEN = dict(model_type="qwen2", max_position_embeddings=131072, rope_theta=1e4, rms_norm_eps=1e-6, tie_word_embeddings=False, attention_bias=True)
_LLAMA = dict(model_type="llama", head_dim=128, max_position_embeddings=131072, rope_theta=5e5, rms_norm_eps=1e-5, tie_word_embeddings=False)
# From each repository's config.json. Llama 3's stretched RoPE is left out: it changes no size.
MODELS = {
    "DeepSeek-R1-Distill-Qwen-1.5B": transformer.Config(
        **_QWEN, vocab_size=151936, hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, head_dim=128, intermediate_size=8960
    ),
    "DeepSeek-R1-Distill-Qwen-7B": transformer.Config(
        **_QWEN, vocab_size=152064, hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, head_dim=128, intermediate_size=18944
    ),
    "DeepSeek-R1-Distill-Llama-8B": transformer.Config(
        **_LLAMA, vocab_size=128256, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336, attention_bias=False
    ),
    "DeepSeek-R1-Distill-Qwen-14B": transformer.Config(
        **_QWEN, vocab_size=152064, hidden_size=5120, num_hidden_layers=48, num_attention_heads=40, num_key_value_heads=8, head_dim=128, intermediate_size=13824
    ),
    "DeepSeek-R1-Distill-Qwen-32B": transformer.Config(
        **_QWEN, vocab_size=152064, hidden_size=5120, num_hidden_layers=64, num_attention_heads=40, num_key_value_heads=8, head_dim=128, intermediate_size=27648
    ),
    "SmolLM2-135M": transformer.Config(
        "llama", vocab_size=49152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64, intermediate_size=1536,
        max_position_embeddings=8192, rope_theta=1e5, rms_norm_eps=1e-5, tie_word_embeddings=True, attention_bias=False,
    ),
}  # fmt: skip
R1, R1_7B, LLAMA, SMOLLM2 = (next(n for n in MODELS if n.endswith(end)) for end in ("1.5B", "n-7B", "8B", "135M"))


def settings() -> list[dict]:
    """All plans, the most important first: one of every slice; without remat; other meshes, lengths, ranks and models."""
    rows = [
        ("v5e-1", 1, 1, 1024), ("v5e-8", 1, 16, 2048), ("v5e-4", 1, 8, 2048), ("v2-8", 1, 8, 1024),
        ("v6e-8", 1, 16, 2048), ("v5p-8", 1, 16, 2048), ("v5e-8", 2, 16, 2048), ("v5e-8", 4, 16, 2048),
        ("v5e-1", 1, 8, 1024), ("v5e-8", 2, 4, 8192), ("v5e-1", 1, 1, 4096), ("v5e-1", 1, 4, 2048),
        ("v5e-1", 1, 8, 4096), ("v5e-8", 1, 64, 2048), ("v5e-8", 4, 8, 2048),
        ("v5e-8", 1, 64, 1024), ("v5e-8", 1, 8, 4096), ("v2-8", 2, 8, 1024),
        ("v6e-8", 2, 16, 4096), ("v5p-8", 2, 8, 4096), ("v5e-4", 2, 8, 2048), ("v5e-4", 1, 4, 512), ("v2-8", 1, 16, 1024),
    ]  # fmt: skip
    made = [
        dict(model=R1, topology=name, tp=tp, batch_size=batch, seq_len=seq, rank=16, gradient_checkpointing=True) for name, tp, batch, seq in rows
    ]
    plain, v5e8 = made[0], made[1]
    bare = [plain | dict(gradient_checkpointing=False), plain | dict(batch_size=8, gradient_checkpointing=False), v5e8 | dict(batch_size=8, seq_len=1024, gradient_checkpointing=False)]
    bare += [v5e8 | dict(batch_size=64, gradient_checkpointing=False)]  # far from fitting: said at once
    bare += [v5e8 | dict(model=model, batch_size=64, seq_len=1024, gradient_checkpointing=False) for model in (R1_7B, LLAMA)]
    others = [
        v5e8 | dict(model=R1_7B, batch_size=8),
        v5e8 | dict(model=LLAMA, batch_size=8, seq_len=1024),
        plain | dict(model=SMOLLM2),
    ]
    others += [plain | dict(rank=64), plain | dict(model=SMOLLM2, batch_size=8, seq_len=2048)]
    return made[:2] + bare[:2] + made[2:10] + others[:1] + made[10:15] + others[1:] + made[15:] + bare[2:]


def record(setting: dict) -> dict:
    """One line of the file."""
    asked = dict(setting)
    config = MODELS[asked.pop("model")]
    found = plan.compile_for(asked.pop("topology"), config, **asked)
    row = {"benchmark": "plan", "setting": setting} | dataclasses.asdict(found)
    packages = ("jax", "jaxlib", "libtpu", "flax", "optax")
    row |= {
        "compile_seconds": round(found.compile_seconds, 1),
        "config": dataclasses.asdict(config),
        "device": f"{platform.machine()}, {os.cpu_count()} cores, no TPU",
        "versions": {"python": platform.python_version()} | {package: version(package) for package in packages},
        "date": time.strftime("%Y-%m-%d"),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    return row


def recorded() -> list[dict]:
    """The lines of the file."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    done = [row["setting"] for row in recorded()]
    left = [setting for setting in settings() if setting not in done]
    for number, setting in enumerate(left, start=1):
        row = record(setting)
        peak, seconds = row["bytes_per_chip"]["peak"] / 1e9, row["compile_seconds"]
        print(f"{number} of {len(left)}: {setting} {peak:.2f} GB per chip, {seconds:.0f} s", flush=True)
    rows = recorded()
    fit = sum(row["fits"] for row in rows)
    print(json.dumps({"benchmark": "summary", "plans": len(rows), "fit": fit}))


if __name__ == "__main__":
    main()
