"""The tiny models as the tests use them: their folders, their references, themselves."""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from utils.hf import weights

HOME = Path(__file__).parents[1] / "fixtures"
MODELS = Path(__file__).parents[2] / "utils/course/assets/models"  # those that pages read too
NAMES = (
    "qwen2-untied",
    "qwen2-tied-sharded",
    "qwen2-fp16",
    "llama-tied",
    "llama-untied-sharded",
    "llama-bf16",
)
ADAPTERS = ("peft-adapter", "peft-adapter-rslora")  # both for qwen2-untied
SPOKEN = ("qwen2-untied", "llama-tied")  # those with a tokenizer


def folder_of(name: str) -> Path:
    """Where a model or an adapter is kept."""
    return MODELS / name if (MODELS / name).is_dir() else HOME / name


@functools.cache
def reference(name: str) -> dict[str, np.ndarray]:
    """tokens [2, 12], logits [2, 12, V], hidden_states [L+1, 2, 12, D], greedy [2, 12], as transformers computed them."""
    return load_file(folder_of(name) / "reference.safetensors")


def texts(name: str) -> dict[str, list[str]]:
    """ "prompts" and their "greedy" continuations."""
    with safe_open(folder_of(name) / "reference.safetensors", "numpy") as file:
        return json.loads(file.metadata()["texts"])


@functools.cache
def _loaded(name: str, dtype):
    return weights.load(folder_of(name), dtype=dtype)


def model(name: str, dtype=jnp.float32):
    """A copy of its own for each caller."""
    return nnx.clone(_loaded(name, dtype))


def copy(name: str, to: Path) -> Path:
    """The fixture as a folder that a test may damage; without its reference."""
    shutil.copytree(folder_of(name), to, ignore=shutil.ignore_patterns("reference.safetensors"))
    return to


def edit_config(folder: Path, **changes) -> Path:
    """Change fields of config.json; a field that is set to `...` is removed."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))
    return folder


def edit_tensors(folder: Path, change, file: str = "model.safetensors") -> Path:
    """Rewrite a weights file through `change(tensors)`, which changes the dict in place."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / file)
    return folder


def stored(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder's safetensors files, as it is stored."""
    found = {}
    for path in sorted(Path(folder).glob("model*.safetensors")):
        found |= load_file(path)
    return found


@functools.partial(jax.jit, static_argnames=("graph", "method"))
def _run(graph, state, method, *inputs, **options):
    return getattr(nnx.merge(graph, state), method)(*inputs, **options)


def run(made, *inputs, method: str = "__call__", **options):
    """`made(*inputs)` or another method of it, compiled once per shape."""
    return _run(*nnx.split(made), method, *inputs, **options)
