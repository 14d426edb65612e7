"""Checkpoints: states from which a training run continues.

A `Store` keeps a run: orbax writes each step into a folder, which gets its name when it is complete.
With the arrays (parameters, optimiser) go the state of the data iterator, the history so far, what
must agree for the run to continue, and a checksum.
"""

import contextlib
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jaxtyping import Array
from safetensors import SafetensorError

from utils import CourseError, first_line, unexpected

logger = logging.getLogger(__name__)


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

    Raises `CourseError` for a failed write, after which an older folder is still there, unchanged.
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


class Store:
    """A folder of checkpoints, one per step: each is there completely, or not at all.

    `directory` is a path or a bucket (`gs://...`). On several hosts each makes a Store of the same
    folder and saves its own shards at the same steps. A second run at the same time is refused. The
    iterator's state is kept here: grain's own handler writes a file per process, and a run may
    continue on more or fewer hosts than it began on.
    """

    def __init__(self, directory, fingerprint: dict):
        import orbax.checkpoint as ocp  # takes seconds, and only runs with checkpoints need it

        self.ocp, self.fingerprint = ocp, fingerprint
        self.local = "://" not in str(directory)
        path = epath.Path(directory)
        self.directory = path.absolute() if self.local else path
        if self.directory.exists() and not self.directory.is_dir():
            raise unexpected(directory, "a folder for checkpoints", "a file")
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
        """Write `step`. Raises `CourseError` for a full disk; earlier steps are untouched."""
        if self.latest == step:
            return
        arrays, args = by_path(carry), self.ocp.args
        needed = 2 * sum(leaf.nbytes for leaf in arrays.values())
        if self.local and (free := shutil.disk_usage(self.directory).free) < needed:
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
            what = f"step {step} could not be saved ({first_line(error)[:200]})"
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
                meta = self.manager.restore(step, args=args.Composite(meta=args.JsonRestore())).meta
                self._compare(meta["fingerprint"])
                stored = self.manager.restore(step, args=args.Composite(arrays=target)).arrays
                if _digest(stored) != meta["digest"]:
                    raise ValueError("contents differ from what was saved")
                break
            except CourseError:
                raise
            except Exception as error:  # orbax and tensorstore raise many types for a damaged file
                what = f"step {step} is damaged ({first_line(error)[:120]})"
                logger.warning(f"{self.directory}: {what}; trying the one before it")
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
                expected = "an iterator with set_state, to continue where the run stopped"
                how = "pass packing.batches(...), or another directory"
                raise unexpected("batches", expected, type(batches).__name__, how)
            batches.set_state(state.encode() if isinstance(batches.get_state(), bytes) else state)
        leaves = [stored[name] for name in arrays]
        return jax.tree.unflatten(jax.tree.structure(carry), leaves), meta["history"], step

    def _compare(self, stored: dict) -> None:
        expected, again = self.fingerprint, "use the same, or another directory"
        for name in sorted(expected["arrays"].keys() | stored["arrays"].keys()):
            a, b = (side["arrays"].get(name, "nothing") for side in (expected, stored))
            if a != b:
                what = f"its checkpoint is from another configuration: {name}"
                raise unexpected(f"{self.directory}: {what}", a, b, again)
        for name in ("config", "seed", "steps"):
            if expected[name] != (before := stored.get(name)):
                made = f"made with {name}={before}, this run has {expected[name]}"
                raise CourseError(f"{self.directory}: its checkpoint was {made}: {again}")


def _digest(arrays: dict[str, Array]) -> str:
    """sha256 of all arrays, so that a bit flipped on disk is noticed when they are read."""
    sha, complete = hashlib.sha256(), gathered(arrays)
    for name in sorted(arrays):
        sha.update(name.encode())
        sha.update(complete[name].tobytes())
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
