"""Checkpoints: a folder of complete states of a training run, one of which is always there to continue from.

orbax writes each step into a folder of its own and gives it its name when it is complete. With the arrays goes the state
of the data's iterator, the history so far, what must agree for the run to be continued, and a checksum of it all.
"""

import contextlib
import hashlib
import os
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Array
from safetensors import SafetensorError

from utils import CourseError


def named(tree) -> dict[str, Array]:
    """A pytree as a flat dict by path, the form in which it is saved: readable names, and no classes to unpickle."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def gathered(tree) -> Any:
    """A pytree as whole NumPy arrays on every host, whichever devices its parts lie on."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


@contextlib.contextmanager
def written_whole(directory: Path):
    """A new neighbour of `directory` to write into, which takes its place at the end: all of it, or nothing.

    Raises `CourseError` for a failed write; what was there before is then there still.
    """
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        old = directory.with_name(f".{directory.name}.{os.getpid()}.old")
        if directory.exists():  # a rename cannot replace a folder that is not empty
            os.replace(directory, old)
        try:
            os.replace(temporary, directory)
        except OSError:
            if old.exists():
                os.replace(old, directory)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise CourseError(
            f"{directory}: could not be written ({error}); what was there before is unchanged: make room, or name "
            "another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class Store:
    """A folder of checkpoints, one per step, written by orbax: a checkpoint is there completely or not at all.

    `directory` may be a path or a bucket (`gs://...`). On several hosts every one makes a Store of the same folder and
    saves at the same steps; each writes the parts that it holds. One run at a time: a second one is refused.
    """

    def __init__(self, directory, fingerprint: dict):
        import orbax.checkpoint as ocp  # takes seconds to import, and is needed by long runs only

        self.ocp, self.fingerprint = ocp, fingerprint
        self.directory = epath.Path(directory)
        self.local = "://" not in str(directory)
        if self.local:
            self.directory = self.directory.absolute()
        if self.directory.exists() and not self.directory.is_dir():
            raise CourseError(f"{directory}: expected a folder for checkpoints, found a file")
        self.lock = _lock(self.directory) if self.local and jax.process_index() == 0 else None
        # Saving in the background would still be reading arrays that the next step overwrites in place.
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self.manager = ocp.CheckpointManager(self.directory, options=options)

    def close(self) -> None:
        """Let other runs use the folder."""
        self.manager.close()
        if self.lock is not None:
            self.lock.close()

    @property
    def latest(self) -> int | None:
        return self.manager.latest_step()

    def save(self, step: int, carry, batches, history: dict) -> None:
        """Write step `step`. Raises `CourseError` when the disk is full; earlier checkpoints are untouched."""
        if self.latest == step:
            return
        arrays = named(carry)
        needed = 2 * sum(leaf.nbytes for leaf in arrays.values())
        free = shutil.disk_usage(self.directory).free if self.local else needed
        if free < needed:
            raise CourseError(
                f"{self.directory}: a checkpoint needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free: make room and "
                f"start again, the run continues from step {self.latest or 0}"
            )
        state = batches.get_state() if hasattr(batches, "get_state") else None
        meta = {
            "fingerprint": self.fingerprint,
            "batches": state.decode() if isinstance(state, bytes) else state,
            "history": history,
        }
        meta["digest"] = _digest(arrays)
        args = self.ocp.args
        try:
            self.manager.save(step, args=args.Composite(arrays=args.StandardSave(arrays), meta=args.JsonSave(meta)))
            self.manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0][:200]
            raise CourseError(
                f"{self.directory}: step {step} could not be saved ({reason}); the checkpoint of step "
                f"{self.latest or 0} is unchanged: make room and start again to continue from there"
            ) from error

    def restore(self, carry, batches):
        """(carry, history, step) of the newest checkpoint that is complete and undamaged.

        Newer ones that are damaged are renamed, or the run could not save its next checkpoint over them.
        """
        arrays, args, damaged = named(carry), self.ocp.args, []
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                meta = self.manager.restore(step, args=args.Composite(meta=args.JsonRestore())).meta
                self._compare(meta["fingerprint"])
                target = jax.tree.map(self.ocp.utils.to_shape_dtype_struct, arrays)
                found = self.manager.restore(step, args=args.Composite(arrays=args.StandardRestore(target))).arrays
                if _digest(found) != meta["digest"]:
                    raise ValueError("contents differ from what was saved")
            except CourseError:
                raise
            except Exception as error:  # orbax and tensorstore raise many types for a damaged file
                reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
                print(f"{self.directory}: step {step} is damaged ({reason}); trying the one before it")
                damaged.append(step)
                continue
            for number in damaged:
                (self.directory / str(number)).rename(self.directory / f"damaged-{number}-{time.time_ns()}")
            if damaged:
                self.manager.reload()
            if meta["batches"] is not None:
                if not hasattr(batches, "set_state"):
                    raise CourseError(
                        "batches: expected an iterator with set_state, to continue where the run stopped, found "
                        f"{type(batches).__name__}: pass data.batches(...), or another directory"
                    )
                state = meta["batches"]
                batches.set_state(state.encode() if isinstance(batches.get_state(), bytes) else state)
            leaves = [found[name] for name in arrays]
            return jax.tree.unflatten(jax.tree.structure(carry), leaves), meta["history"], step
        raise CourseError(
            f"{self.directory}: no checkpoint in it can be read: delete the folder, or name another, to start anew"
        )

    def _compare(self, found: dict) -> None:
        expected = self.fingerprint
        for name in sorted(expected["arrays"].keys() | found["arrays"].keys()):
            a, b = expected["arrays"].get(name, "nothing"), found["arrays"].get(name, "nothing")
            if a != b:
                raise CourseError(
                    f"{self.directory}: its checkpoint is from another configuration: {name}: expected {a}, found {b}: "
                    "use the configuration it was made with, or another directory"
                )
        for name in ("config", "seed", "steps"):
            if expected[name] != found.get(name):
                raise CourseError(
                    f"{self.directory}: its checkpoint was made with {name}={found.get(name)}, this run has "
                    f"{expected[name]}: use the same, or another directory"
                )


def _digest(arrays: dict[str, Array]) -> str:
    """sha256 of all arrays: a bit flipped on disk is found when the checkpoint is read."""
    sha, whole = hashlib.sha256(), gathered(arrays)
    for name in sorted(arrays):
        sha.update(name.encode())
        sha.update(np.ascontiguousarray(whole[name]).tobytes())
    return sha.hexdigest()


def _lock(directory):
    """An open file that marks the folder as in use for as long as this process lives, however it ends."""
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
        raise CourseError(
            f"{directory}: another run is using this folder: wait for it, stop it, or name another"
        ) from None
    except OSError:  # a network drive that has no locks
        pass
    return file
