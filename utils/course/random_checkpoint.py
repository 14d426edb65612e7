"""Checkpoints of random numbers in a real model's shapes, where there is no network for real ones."""

import json
import math
import shutil
import struct
from pathlib import Path

import numpy as np

from utils import CourseError, checkpoints
from utils.hf import weights
from utils.transformer import Config


def save(config: Config, directory: str | Path, *, dtype="bfloat16", seed: int = 0) -> Path:
    """Write a checkpoint of `config`'s size with random numbers, to try loading, memory and speed.

    Written tensor by tensor; norms are 1, everything else repeats one block of numbers drawn from
    N(0, 0.02). Raises `CourseError` when the folder exists or the disk is too small.
    """
    directory, dtype = Path(directory), np.dtype(dtype)
    if directory.exists():
        raise CourseError(f"{directory}: exists already: name another folder")
    code = next(code for code, known in weights.DTYPES.items() if known == dtype)
    header, end = {"__metadata__": {"format": "pt"}}, 0  # as `weights.save` writes it
    for name, shape in weights.tensor_shapes(config).items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    normal = np.random.default_rng(seed).standard_normal((1 << 22) + 7, np.float32)
    block = (0.02 * normal).astype(dtype)
    with checkpoints.atomic_dir(directory) as temporary:
        if shutil.disk_usage(temporary).free < end:
            what = f"needs {end / 1e9:.1f} GB of disk: make room, or name another folder"
            raise CourseError(f"{directory}: {what}")
        with open(temporary / "model.safetensors", "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name, shape in weights.tensor_shapes(config).items():
                count = math.prod(shape)
                if name.endswith("norm.weight"):
                    file.write(np.ones(count, dtype).tobytes())
                    continue
                for start in range(0, count, block.size):
                    file.write(block[: count - start].tobytes())
        weights.write_config(temporary, config, dtype)
    return directory
