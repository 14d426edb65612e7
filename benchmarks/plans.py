"""What the TPU's compiler says of R1's LoRA step: bytes per chip on every slice of the course, at
several meshes and sizes.

    JAX_PLATFORMS=cpu .venv-tpu/bin/python benchmarks/plans.py [--first 18]

One JSON line a plan (`plan.compile_for`'s) in benchmarks/results/plans.jsonl, with its setting and
where it comes from: versions, seconds, date, and a fingerprint of configuration and code. A test
fails when that is old; then run this again: it records what is missing or old and leaves the rest, so
one that was stopped continues where it was. No weights and no TPU are needed, but libtpu is (`make
install-tpu`). Tests hold chapter 13 and its mesh planner to every line of the file.

Bytes do not depend on the machine that compiles. `compile_seconds` do; other programs ran
meanwhile.
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

from tools import fingerprint as fingerprints
from utils import transformer
from utils.commands import plan

RESULTS = Path(__file__).parent / "results" / "plans.jsonl"
_QWEN = dict(
    model_type="qwen2",
    max_position_embeddings=131_072,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    attention_bias=True,
    head_dim=128,
)
_LLAMA = dict(
    model_type="llama", tie_word_embeddings=False, attention_bias=False, rms_norm_eps=1e-5
)


def _sizes(vocab_size, hidden_size, layers, heads, key_value_heads, intermediate_size) -> dict:
    return dict(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        intermediate_size=intermediate_size,
    )


# From each repository's config.json. Llama 3's scaled RoPE is left out: it changes no size.
MODELS = {
    "DeepSeek-R1-Distill-Qwen-1.5B": transformer.Config(
        **_QWEN, **_sizes(151_936, 1536, 28, 12, 2, 8960)
    ),
    "DeepSeek-R1-Distill-Qwen-7B": transformer.Config(
        **_QWEN, **_sizes(152_064, 3584, 28, 28, 4, 18_944)
    ),
    "DeepSeek-R1-Distill-Llama-8B": transformer.Config(
        **_LLAMA,
        **_sizes(128_256, 4096, 32, 32, 8, 14_336),
        head_dim=128,
        max_position_embeddings=131_072,
        rope_theta=5e5,
    ),
    "DeepSeek-R1-Distill-Qwen-14B": transformer.Config(
        **_QWEN, **_sizes(152_064, 5120, 48, 40, 8, 13_824)
    ),
    "DeepSeek-R1-Distill-Qwen-32B": transformer.Config(
        **_QWEN, **_sizes(152_064, 5120, 64, 40, 8, 27_648)
    ),
    "SmolLM2-135M": transformer.Config(
        **(_LLAMA | {"tie_word_embeddings": True}),
        **_sizes(49_152, 576, 30, 9, 3, 1536),
        head_dim=64,
        max_position_embeddings=8192,
        rope_theta=1e5,
    ),
}
R1, R1_7B, LLAMA, SMOLLM2 = (
    next(name for name in MODELS if name.endswith(end)) for end in ("1.5B", "n-7B", "8B", "135M")
)


def settings() -> list[dict]:
    """All plans, the most important first: one of every slice; without gradient checkpointing;
    other meshes, lengths, ranks and models."""
    rows = [  # topology, tp, batch_size, seq_len
        ("v5e-1", 1, 1, 1024), ("v5e-8", 1, 16, 2048), ("v5e-4", 1, 8, 2048), ("v2-8", 1, 8, 1024),
        ("v6e-8", 1, 16, 2048), ("v5p-8", 1, 16, 2048), ("v5e-8", 2, 16, 2048), ("v5e-8", 4, 16, 2048),
        ("v5e-1", 1, 8, 1024), ("v5e-8", 2, 4, 8192), ("v5e-1", 1, 1, 4096), ("v5e-1", 1, 4, 2048),
        ("v5e-1", 1, 8, 4096), ("v5e-8", 1, 64, 2048), ("v5e-8", 4, 8, 2048),
        ("v5e-8", 1, 64, 1024), ("v5e-8", 1, 8, 4096), ("v2-8", 2, 8, 1024),
        ("v6e-8", 2, 16, 4096), ("v5p-8", 2, 8, 4096), ("v5e-4", 2, 8, 2048), ("v5e-4", 1, 4, 512),
        ("v2-8", 1, 16, 1024),
    ]  # fmt: skip
    names = ("topology", "tp", "batch_size", "seq_len")
    with_checkpointing = [
        dict(model=R1) | dict(zip(names, row)) | dict(rank=16, gradient_checkpointing=True)
        for row in rows
    ]
    one_chip, v5e8 = with_checkpointing[:2]
    without = dict(gradient_checkpointing=False)
    bare = [one_chip | without, one_chip | without | dict(batch_size=8)]
    bare += [v5e8 | without | dict(batch_size=8, seq_len=1024)]
    bare += [v5e8 | without | dict(batch_size=64)]  # far from fitting: the compiler says so at once
    bare += [
        v5e8 | without | dict(model=model, batch_size=64, seq_len=1024) for model in (R1_7B, LLAMA)
    ]
    others = [
        v5e8 | dict(model=R1_7B, batch_size=8),
        v5e8 | dict(model=LLAMA, batch_size=8, seq_len=1024),
        one_chip | dict(model=SMOLLM2),
        one_chip | dict(rank=64),
        one_chip | dict(model=SMOLLM2, batch_size=8, seq_len=2048),
    ]
    first, second, third = (with_checkpointing[a:b] for a, b in ((0, 2), (2, 10), (10, 15)))
    return (
        first
        + bare[:2]
        + second
        + others[:1]
        + third
        + others[1:]
        + with_checkpointing[15:]
        + bare[2:]
    )


def record(setting: dict) -> dict:
    """Compile a plan; its line takes the place of an older one."""
    options = dict(setting)
    config = MODELS[options.pop("model")]
    compiled = plan.compile_for(options.pop("topology"), config, **options)
    row = {"benchmark": "plan", "setting": setting, "fingerprint": fingerprint(setting)}
    row |= compiled.summary()
    packages = ("jax", "jaxlib", "libtpu", "flax", "optax")
    row |= {
        "compile_seconds": round(compiled.compile_seconds, 1),
        "config": dataclasses.asdict(config),
        "device": f"{platform.machine()}, {os.cpu_count()} cores, no TPU",
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in packages},
        "date": time.strftime("%Y-%m-%d"),
    }
    write([*(other for other in recorded() if other["setting"] != setting), row])
    return row


def fingerprint(setting: dict) -> str:
    """Of a setting's configuration, and the code as it is now."""
    return fingerprints.of(MODELS[setting["model"]], **setting)


def recorded() -> list[dict]:
    """The lines of the file."""
    return (
        [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    )


def write(rows: list[dict]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, metavar="N", help="record only the first N settings")
    chosen = settings()[: parser.parse_args().first]
    write([row for row in recorded() if row["setting"] in chosen])
    current = [
        r["setting"] for r in recorded() if r.get("fingerprint") == fingerprint(r["setting"])
    ]
    left = [setting for setting in chosen if setting not in current]
    for number, setting in enumerate(left, start=1):
        row = record(setting)
        peak, seconds = row["bytes_per_chip"]["peak"] / 1e9, row["compile_seconds"]
        print(
            f"{number} of {len(left)}: {setting} {peak:.2f} GB per chip, {seconds:.0f} s",
            flush=True,
        )
    rows = recorded()
    fit = sum(row["fits"] for row in rows)
    print(json.dumps({"benchmark": "summary", "plans": len(rows), "fit": fit}))


if __name__ == "__main__":
    main()
