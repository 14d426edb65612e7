"""Make a checkpoint of a real model's size with random weights, to try loading, memory and speed without a download.

    python tools/make_random_checkpoint.py --like R1 /somewhere/r1-random     # 3.55 GB of bfloat16

The folder is a Hugging Face model folder without a tokenizer. Weights are normal with the spread that models are
initialised with, the same for the same seed, and written piece by piece: this needs little memory.
"""

import argparse
import json
import os
import struct
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ml_dtypes
import numpy as np

from utils import CourseError, weights
from utils.transformer import Config

R1 = Config(  # deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B
    architecture="qwen2",
    vocab_size=151_936,
    width=1536,
    layers=28,
    heads=12,
    kv_heads=2,
    head_size=128,
    mlp_width=8960,
    context=131_072,
    rope_theta=10_000.0,
    norm_eps=1e-6,
    tied=False,
    qkv_bias=True,
    bos_id=151_643,
    eos_ids=(151_643,),
    dtype="bfloat16",
)
SMOLLM2 = Config(  # HuggingFaceTB/SmolLM2-135M-Instruct
    architecture="llama",
    vocab_size=49_152,
    width=576,
    layers=30,
    heads=9,
    kv_heads=3,
    head_size=64,
    mlp_width=1536,
    context=8192,
    rope_theta=100_000.0,
    norm_eps=1e-5,
    tied=True,
    qkv_bias=False,
    bos_id=1,
    eos_ids=(2,),
    dtype="bfloat16",
)
LIKE = {"R1": R1, "SmolLM2": SMOLLM2}
PIECE = 1 << 22  # numbers drawn at a time


def make(config: Config, directory: Path, seed: int = 0) -> int:
    """Write the folder; returns the bytes of its tensors. Raises CourseError when it exists."""
    if directory.exists():
        raise CourseError(f"{directory}: exists already: name another folder")
    dtype = np.dtype(ml_dtypes.bfloat16)
    shapes = {}
    for name, (path, layer) in weights.names(config).items():
        shape = weights._abstract(config)[path]
        shapes[name] = shape if layer is None else shape[1:]
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * dtype.itemsize
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    rng = np.random.default_rng(seed)
    part = directory.with_name(directory.name + ".part")
    part.mkdir(parents=True)
    with open(part / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name, shape in shapes.items():
            left = int(np.prod(shape))
            while left:
                count = min(left, PIECE)
                if name.endswith("norm.weight"):
                    piece = np.ones(count, np.float32)
                else:
                    piece = 0.02 * rng.standard_normal(count, np.float32)
                file.write(piece.astype(dtype).tobytes())
                left -= count
    (part / "config.json").write_text(json.dumps(config.to_hf(), indent=1) + "\n")
    os.replace(part, directory)
    return offset


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--like", choices=LIKE, default="R1")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        size = make(LIKE[args.like], args.directory, args.seed)
    except CourseError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{args.directory}: {size / 1e9:.2f} GB of random bfloat16 in the shapes of {args.like}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
