"""Checkpoints: a small model's weights as files, and states from which a training run continues.

`save_weights` and `load_weights` keep a model as two files, weights and configuration. `Store`
keeps a run: orbax writes each step into a folder of its own, which gets its name when it is
complete. With the arrays (parameters, optimiser) go the state of the data iterator, the history so
far, what must agree for the run to continue, and a checksum.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jaxtyping import Array
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from utils import CourseError

logger = logging.getLogger(__name__)
FILES = ("config.json", "model.safetensors", "provenance.json")  # of a small model


def by_path(tree) -> dict[str, Array]:
    """A pytree as a flat dict: saved so, its names can be read and no classes are unpickled."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def gathered(tree) -> Any:
    """A pytree as NumPy arrays, complete on every host whichever devices hold their shards."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


@contextlib.contextmanager
def atomic_dir(directory: str | Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `directory` at the end: all of it, or nothing.

    A folder of that name may exist; it is replaced when the new one is complete. Raises
    `CourseError` for a failed write, after which the old folder is still there, unchanged.
    """
    directory = Path(directory)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}")
    replaced = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    try:
        if directory.is_file():
            raise NotADirectoryError("there is a file of that name")
        temporary.mkdir(parents=True)
        yield temporary
        if directory.exists():  # a rename cannot replace a folder that is not empty
            os.replace(directory, replaced)
        try:
            os.replace(temporary, directory)
        except OSError:
            if replaced.exists():
                os.replace(replaced, directory)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        what = f"could not be written ({error}); what was there before is unchanged"
        raise CourseError(f"{directory}: {what}: make room, or name another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def named_parameters(model: nnx.Module) -> dict[str, np.ndarray]:
    """A copy of every parameter, as NumPy arrays by dotted path."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.array(leaf[...]) for path, leaf in flat}


def save_weights(
    model: nnx.Module, directory: str | Path, *, dtype=np.float32, provenance: dict | None = None
) -> Path:
    """Write `model.safetensors`, `config.json` and perhaps `provenance.json`: all of them, or none.

    `dtype=np.float16` halves the file; a MiniGPT's loss does not show the difference. A folder that
    was written before is replaced. Raises `CourseError` for one that holds anything else, and for a
    failed write.
    """
    directory = Path(directory)
    present = directory.iterdir() if directory.is_dir() else ()
    if others := sorted(path.name for path in present if path.name not in FILES):
        what = f"expected a new folder, or one with a saved model alone, found {others[0]}"
        raise CourseError(f"{directory}: {what}: name another")
    arrays = {name: array.astype(dtype) for name, array in named_parameters(model).items()}
    texts = {"config.json": dataclasses.asdict(model.config), "provenance.json": provenance}
    with atomic_dir(directory) as temporary:
        weights = temporary / "model.safetensors"
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, weights)
        weights.chmod(0o644)  # safetensors makes files that only their owner may read
        for name, content in texts.items():
            if content is not None:
                (temporary / name).write_text(json.dumps(content, indent=1) + "\n")
    return directory


def load_weights(
    directory: str | Path, Model: type, Config: type, *, dtype=jnp.float32
) -> nnx.Module:
    """The model that `save_weights` wrote, as `Model(Config(...), dtype=dtype)`.

    Its parameters are float32, however they are stored. Raises `CourseError` when a file is missing
    or damaged, or when names or shapes are not those of its configuration.
    """
    config_file, weights_file = (Path(directory) / name for name in FILES[:2])
    try:
        config = Config(**json.loads(config_file.read_text()))
        arrays = load_file(weights_file)
    except FileNotFoundError as error:
        missing = error.filename or weights_file  # safetensors gives no filename
        what = f"not found: is {directory} a folder that checkpoints.save_weights wrote?"
        raise CourseError(f"{missing}: {what}") from None
    except CourseError as error:  # a size that no such model has
        raise CourseError(f"{config_file}: {error}") from None
    except (ValueError, TypeError) as error:
        what = f"not the configuration of a {Model.__name__} ({error})"
        raise CourseError(f"{config_file}: {what}") from None
    except SafetensorError as error:
        what = f"damaged or cut short ({error}): copy or train it again"
        raise CourseError(f"{weights_file}: {what}") from None
    model = nnx.eval_shape(lambda: Model(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model, nnx.Param)
    flat = nnx.to_flat_state(state)
    shapes = {".".join(map(str, path)): tuple(leaf.shape) for path, leaf in flat}
    stored = {name: array.shape for name, array in arrays.items()}
    for name in sorted(shapes.keys() | stored.keys()):
        a, b = (side.get(name, "nothing of that name") for side in (shapes, stored))
        if a != b:
            raise CourseError(
                f"{name}: expected {a}, found {b}: config.json and weights do not fit"
            )

    def loaded(path, _):
        return jnp.asarray(arrays[".".join(str(key.key) for key in path)], jnp.float32)

    pure = jax.tree_util.tree_map_with_path(loaded, nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, pure)
    return nnx.merge(graph, state)


class Store:
    """A folder of checkpoints, one per step: each is there completely, or not at all.

    `directory` may be a path or a bucket (`gs://...`). On several hosts each one makes a Store of
    the same folder and saves at the same steps; each writes its own shards. One run at a time: a
    second one is refused. The iterator's state is kept here and not by grain's own handler, which
    writes a file per process: a run may continue on more or fewer hosts than it began on.
    """

    def __init__(self, directory, fingerprint: dict):
        import orbax.checkpoint as ocp  # takes seconds, and only runs with checkpoints need it

        self.ocp, self.fingerprint = ocp, fingerprint
        self.directory = epath.Path(directory)
        self.local = "://" not in str(directory)
        if self.local:
            self.directory = self.directory.absolute()
        if self.directory.exists() and not self.directory.is_dir():
            raise CourseError(f"{directory}: expected a folder for checkpoints, found a file")
        self.lock = _lock(self.directory) if self.local and jax.process_index() == 0 else None
        # Not in the background: the next step overwrites the arrays, which are donated to it.
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self.manager = ocp.CheckpointManager(self.directory, options=options)

    def close(self) -> None:
        """Let other runs use the folder."""
        self.manager.close()
        if self.lock is not None:
            self.lock.close()

    @property
    def latest(self) -> int | None:
        """The newest step that was saved."""
        return self.manager.latest_step()

    def save(self, step: int, carry, batches, history: dict) -> None:
        """Write step `step`. Raises `CourseError` for a full disk; earlier steps are untouched."""
        if self.latest == step:
            return
        arrays, args = by_path(carry), self.ocp.args
        needed = 2 * sum(leaf.nbytes for leaf in arrays.values())
        free = shutil.disk_usage(self.directory).free if self.local else needed
        if free < needed:
            what = f"a checkpoint needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free"
            how = f"make room and start again, the run continues from step {self.latest or 0}"
            raise CourseError(f"{self.directory}: {what}: {how}")
        state = batches.get_state() if hasattr(batches, "get_state") else None
        state = state.decode() if isinstance(state, bytes) else state
        meta = {"fingerprint": self.fingerprint, "batches": state, "history": history}
        meta["digest"] = _digest(arrays)
        items = args.Composite(arrays=args.StandardSave(arrays), meta=args.JsonSave(meta))
        try:
            self.manager.save(step, args=items)
            self.manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            what = f"step {step} could not be saved ({str(error).splitlines()[0][:200]})"
            how = "make room and start again to continue from there"
            kept = f"the checkpoint of step {self.latest or 0} is unchanged"
            raise CourseError(f"{self.directory}: {what}; {kept}: {how}") from error

    def restore(self, carry, batches):
        """(carry, history, step) of the newest checkpoint that is complete and undamaged.

        Damaged newer ones are renamed, or the run could not save those steps again.
        """
        arrays, args, damaged = by_path(carry), self.ocp.args, []
        target = args.StandardRestore(jax.tree.map(self.ocp.utils.to_shape_dtype_struct, arrays))
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                items = args.Composite(meta=args.JsonRestore())
                meta = self.manager.restore(step, args=items).meta
                self._compare(meta["fingerprint"])
                stored = self.manager.restore(step, args=args.Composite(arrays=target)).arrays
                if _digest(stored) != meta["digest"]:
                    raise ValueError("contents differ from what was saved")
                break
            except CourseError:
                raise
            except Exception as error:  # orbax and tensorstore raise many types for a damaged file
                reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
                where = f"{self.directory}: step {step}"
                logger.warning(f"{where} is damaged ({reason}); trying the one before it")
                damaged.append(step)
        else:
            how = "delete the folder, or name another, to start anew"
            raise CourseError(f"{self.directory}: no checkpoint in it can be read: {how}")
        for number in damaged:
            aside = self.directory / f"damaged-{number}-{time.time_ns()}"
            (self.directory / str(number)).rename(aside)
        if damaged:
            self.manager.reload()
        if (state := meta["batches"]) is not None:
            if not hasattr(batches, "set_state"):
                what = "expected an iterator with set_state, to continue where the run stopped"
                how = "pass packing.batches(...), or another directory"
                raise CourseError(f"batches: {what}, found {type(batches).__name__}: {how}")
            batches.set_state(state.encode() if isinstance(batches.get_state(), bytes) else state)
        leaves = [stored[name] for name in arrays]
        return jax.tree.unflatten(jax.tree.structure(carry), leaves), meta["history"], step

    def _compare(self, stored: dict) -> None:
        expected, again = self.fingerprint, "use the same, or another directory"
        for name in sorted(expected["arrays"].keys() | stored["arrays"].keys()):
            a, b = (side["arrays"].get(name, "nothing") for side in (expected, stored))
            if a != b:
                what = f"its checkpoint is from another configuration: {name}"
                raise CourseError(f"{self.directory}: {what}: expected {a}, found {b}: {again}")
        for name in ("config", "seed", "steps"):
            if expected[name] != (before := stored.get(name)):
                what = (
                    f"its checkpoint was made with {name}={before}, this run has {expected[name]}"
                )
                raise CourseError(f"{self.directory}: {what}: {again}")


def _digest(arrays: dict[str, Array]) -> str:
    """sha256 of all arrays, so that a bit flipped on disk is noticed when they are read."""
    sha, complete = hashlib.sha256(), gathered(arrays)
    for name in sorted(arrays):
        sha.update(name.encode())
        sha.update(np.ascontiguousarray(complete[name]).tobytes())
    return sha.hexdigest()


def _lock(directory):
    """An open file that marks the folder as in use while this process lives, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    directory.mkdir(parents=True, exist_ok=True)
    file = open(directory / ".lock", "w")  # noqa: SIM115, it stays open
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        what = "another run is using this folder: wait for it, stop it, or name another"
        raise CourseError(f"{directory}: {what}") from None
    except OSError:  # a network drive that has no locks
        pass
    return file
