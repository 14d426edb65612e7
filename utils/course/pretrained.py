"""The MiniGPT that this course trained (`tools/train_minigpt.py`) and keeps in its repository."""

from pathlib import Path

import jax.numpy as jnp

from utils import checkpoints, minigpt

MINIGPT = Path(__file__).parent / "assets" / "minigpt"


def load(directory: str | Path | None = None, *, dtype=jnp.float32) -> minigpt.MiniGPT:
    """The pretrained MiniGPT, or the one saved in `directory`; `dtype` is the activations'.

    Raises `CourseError` as `checkpoints.load_weights` does.
    """
    files = MINIGPT if directory is None else directory
    return checkpoints.load_weights(files, minigpt.MiniGPT, minigpt.Config, dtype=dtype)
