"""MiniGPTs as files, and the one that this course trained (`tools/train_minigpt.py`) and keeps here."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from utils import CourseError, checkpoints, minigpt, unexpected

MINIGPT = Path(__file__).parent / "assets" / "minigpt"
FILES = ("config.json", "model.safetensors", "provenance.json")


def save(model: minigpt.MiniGPT, directory, *, dtype=np.float32, provenance=None) -> Path:
    """Write `model.safetensors`, `config.json` and perhaps `provenance.json`: all of them, or none.

    `dtype=np.float16` halves the file; a MiniGPT's loss does not show the difference. An older save
    is replaced. Raises `CourseError` for a folder that holds anything else, and for a failed write.
    """
    directory = Path(directory)
    present = directory.iterdir() if directory.is_dir() else ()
    if others := sorted(path.name for path in present if path.name not in FILES):
        expected = "a new folder, or one with a saved model alone"
        raise unexpected(directory, expected, others[0], "name another")
    named = checkpoints.named_parameters(model)
    arrays = {name: np.ascontiguousarray(array, dtype) for name, array in named.items()}
    texts = {"config.json": dataclasses.asdict(model.config), "provenance.json": provenance}
    with checkpoints.atomic_dir(directory) as temporary:
        weights = temporary / "model.safetensors"
        save_file(arrays, weights)
        weights.chmod(0o644)  # safetensors makes files that only their owner may read
        for name, content in texts.items():
            if content is not None:
                (temporary / name).write_text(json.dumps(content, indent=1) + "\n")
    return directory


def load(directory: str | Path = MINIGPT, *, dtype=jnp.float32) -> minigpt.MiniGPT:
    """The pretrained MiniGPT, or the one saved in `directory`; `dtype` is the activations'.

    Its parameters are float32, however stored. Raises `CourseError` when a file is missing or
    damaged, or when names or shapes are not those of its configuration.
    """
    config_file, weights_file = (Path(directory) / name for name in FILES[:2])
    try:
        config = minigpt.Config(**json.loads(config_file.read_text()))
        arrays = load_file(weights_file)
    except FileNotFoundError as error:
        missing = error.filename or weights_file  # safetensors gives no filename
        what = f"not found: is {directory} a folder that pretrained.save wrote?"
        raise CourseError(f"{missing}: {what}") from None
    except CourseError as error:  # a size that no such model has
        raise CourseError(f"{config_file}: {error}") from None
    except (ValueError, TypeError) as error:
        what = f"not the configuration of a MiniGPT ({error})"
        raise CourseError(f"{config_file}: {what}") from None
    except SafetensorError as error:
        what = f"damaged or cut short ({error}): copy or train it again"
        raise CourseError(f"{weights_file}: {what}") from None
    model = nnx.eval_shape(lambda: minigpt.MiniGPT(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model, nnx.Param)
    flat = nnx.to_flat_state(state)
    shapes = {".".join(map(str, path)): tuple(leaf.shape) for path, leaf in flat}
    stored = {name: array.shape for name, array in arrays.items()}
    for name in sorted(shapes.keys() | stored.keys()):
        expected, found = (side.get(name, "nothing of that name") for side in (shapes, stored))
        if expected != found:
            raise unexpected(name, expected, found, "config.json and weights do not fit")
    loaded = {path: jnp.asarray(arrays[name], jnp.float32) for name, (path, _) in zip(shapes, flat)}
    nnx.replace_by_pure_dict(state, nnx.traversals.unflatten_mapping(loaded))
    return nnx.merge(graph, state)
