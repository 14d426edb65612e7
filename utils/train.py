"""Training: a pure step, and a loop you can read from top to bottom.

A model is split in two: the variables to learn (`wrt`: all parameters by default, only the adapter for LoRA) and the
rest. One step is then a pure function

    (learnt, opt_state), batch  ->  (learnt, opt_state), loss

under `jax.jit`. The learnt part and the optimiser's state are donated, so XLA updates them in place; the rest is an
argument that is never differentiated, so a frozen base costs no gradient and no optimiser memory.

`fit` adds what a run needs around the step: a progress bar, metrics, evaluation, checkpoints that survive a kill, a
deadline. A run that is killed and started again with the same arguments continues from its last complete checkpoint
and ends with the same bits as one that was never killed.
"""

import dataclasses
import hashlib
import json
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float
from tqdm import tqdm

from utils import CourseError


class NonFiniteLoss(CourseError):
    """The loss, or its gradient, became NaN or infinite. The model holds the weights from before that batch."""


@dataclasses.dataclass
class History:
    """What happened: one entry of `steps`, `loss`, `grad_norm` and `tokens_per_s` per logged interval."""

    steps: list[int] = dataclasses.field(default_factory=list)
    loss: list[float] = dataclasses.field(default_factory=list)  # nats per token, mean over the interval
    grad_norm: list[float] = dataclasses.field(default_factory=list)  # at the interval's last step, before clipping
    tokens_per_s: list[float] = dataclasses.field(default_factory=list)
    evaluations: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0  # training alone: no compilation, no evaluation, no saving
    stopped: str = "finished"  # or "deadline", "interrupted"


def next_token_loss(model: nnx.Module, batch: dict[str, Array], key: Array | None = None) -> Float[Array, ""]:
    """Mean cross-entropy in nats of batch["targets"] [B, T] given batch["inputs"] [B, T]; `key` is for dropout."""
    del key
    logits = model(batch["inputs"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()


def schedule(peak: float, steps: int, warmup: int = 100, end: float = 0.05) -> optax.Schedule:
    """Learning rate: a straight line up to `peak`, then a half cosine down to `end` times the peak."""
    warmup = min(warmup, max(1, steps // 10))
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1), peak * end)


def optimizer(
    learning_rate: float | optax.Schedule, *, weight_decay: float = 0.1, clip: float = 1.0, b2: float = 0.98
) -> optax.GradientTransformation:
    """AdamW behind a clip of the gradient's global norm. Matrices decay; norm scales, being vectors per layer, do not."""

    def matrices(params):
        def decays(path, leaf):
            return leaf.ndim > 1 and "norm" not in jax.tree_util.keystr(path)

        return jax.tree_util.tree_map_with_path(decays, params)

    adamw = optax.adamw(learning_rate, b1=0.9, b2=b2, weight_decay=weight_decay, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(clip), adamw)


def make_step(graph, loss_fn: Callable, tx: optax.GradientTransformation):
    """The compiled training step: (carry, rest, batch, key) -> (carry, loss, gradient norm), carry donated.

    carry = (learnt, opt_state, healthy). Once a loss or gradient is not finite, `healthy` turns false, and from there
    on no step changes anything: the weights stay what they were before the bad batch, whenever the host looks.
    """

    def step(carry, rest, batch, key):
        learnt, opt_state, healthy = carry
        loss, grads = jax.value_and_grad(lambda p: loss_fn(nnx.merge(graph, p, rest), batch, key))(learnt)
        norm = optax.tree.norm(grads)
        updates, new_opt_state = tx.update(grads, opt_state, learnt)
        new = (optax.apply_updates(learnt, updates), new_opt_state)
        healthy &= jnp.isfinite(loss) & jnp.isfinite(norm)
        kept = jax.tree.map(lambda a, b: jnp.where(healthy, a, b), new, (learnt, opt_state))
        return (*kept, healthy), loss, norm

    return jax.jit(step, donate_argnums=0)


def fit(
    model: nnx.Module,
    batches: Iterator,
    loss_fn: Callable,
    tx: optax.GradientTransformation,
    *,
    steps: int,
    wrt: nnx.filterlib.Filter = nnx.Param,
    seed: int = 0,
    log_every: int = 50,
    evaluate: Callable[[nnx.Module], float] | None = None,
    evaluate_every: int | None = None,
    directory: str | Path | None = None,
    save_every: int | None = None,
    max_seconds: float | None = None,
    progress: bool = True,
) -> History:
    """Train `model` in place for `steps` steps, or until `max_seconds` of wall clock are over.

    `batches` yields dicts of arrays. `loss_fn(model, batch, key)` is a scalar. `evaluate(model)` is called every
    `evaluate_every` steps and at the end. With a `directory`, a checkpoint is written every `save_every` steps and at
    the end, and a run found there is continued: `batches` then needs `get_state` and `set_state` (grain's have them).
    Ctrl-C and SIGTERM finish the step under way, save, and return; a second Ctrl-C stops at once. Raises
    `NonFiniteLoss`, naming the batch. However `fit` ends, the model holds whole weights: the newest it can have.
    """
    if steps < 1:
        raise CourseError(f"steps: expected at least 1, found {steps}")
    graph, learnt, rest = nnx.split(model, wrt, ...)
    if not jax.tree.leaves(learnt):
        raise CourseError(f"wrt={wrt}: selects no variable of {type(model).__name__}: nothing would be trained")
    # Copies: the step donates its arguments, and the caller's model must not lose its arrays if the run fails.
    learnt = jax.tree.map(jnp.copy, learnt)
    carry = (learnt, tx.init(learnt), jnp.array(True))
    history, start = History(), 0
    store = None
    if directory is not None:
        store = Store(directory, fingerprint=_fingerprint(model, carry, seed, steps))
        if store.latest is not None:
            carry, history, start = store.restore(carry, batches)
    step_fn, key = make_step(graph, loss_fn, tx), jax.random.key(seed)

    def write_back():
        # Copies again: the next step will donate these arrays while the model is still in the caller's hands.
        nnx.update(model, jax.tree.map(jnp.copy, carry[0]))

    def checkpoint(step):
        if store is not None:
            store.save(step, carry, batches, history)

    begun = time.perf_counter()
    pending, clock, saved = [], None, start
    bar = tqdm(total=steps, initial=start, disable=not progress, file=sys.stdout, unit="step", mininterval=1.0)
    try:
        with _Signals() as signals:
            for step in range(start, steps):
                batch = next(batches, None)
                if batch is None:
                    raise CourseError(
                        f"batches: ended after {step - start} of {steps - start} batches: give an endless iterator "
                        "(data.batches is one), or fewer steps"
                    )
                carry, loss, norm = step_fn(carry, rest, batch, jax.random.fold_in(key, step))
                pending.append((loss, norm))
                if clock is None:  # the first step compiles: the clock starts after it
                    loss.block_until_ready()
                    clock, timed = time.perf_counter(), 0
                else:
                    timed += 1
                done = step + 1
                if done < steps and signals.caught:
                    history.stopped = "interrupted"
                elif done < steps and max_seconds is not None and time.perf_counter() - begun > max_seconds:
                    history.stopped = "deadline"
                last = done == steps or history.stopped != "finished"
                saving = store is not None and (last or (save_every and done % save_every == 0))
                evaluating = evaluate is not None and (last or (evaluate_every and done % evaluate_every == 0))
                if not (last or saving or evaluating or done % log_every == 0):
                    continue
                losses, norms = np.array(jax.device_get(pending)).T  # waits for the device
                elapsed = time.perf_counter() - clock
                if not bool(carry[2]):
                    bad = int(np.argmin(np.isfinite(losses) & np.isfinite(norms)))
                    what = "the gradient" if np.isfinite(losses[bad]) else "the loss"
                    raise NonFiniteLoss(_stopped_message(what, done - len(losses) + bad + 1, store))
                tokens = batch["inputs"].size if isinstance(batch, dict) and "inputs" in batch else 0
                history.steps.append(done)
                history.loss.append(float(losses.mean()))
                history.grad_norm.append(float(norm))
                history.tokens_per_s.append(tokens * timed / elapsed if timed else 0.0)
                history.seconds += elapsed
                pending = []
                if evaluating:
                    write_back()
                    history.evaluations.append((done, float(evaluate(model))))
                if saving:
                    checkpoint(done)
                    saved = done
                shown = {"loss": f"{history.loss[-1]:.3f}", "tokens/s": f"{history.tokens_per_s[-1]:,.0f}"}
                bar.set_postfix(shown, refresh=False)
                bar.update(done - bar.n)
                clock, timed = time.perf_counter(), 0
                if last:
                    break
    finally:
        bar.close()
        if not any(leaf.is_deleted() for leaf in jax.tree.leaves(carry[0])):  # a step that failed half-way ate them
            write_back()
    if history.stopped != "finished":
        where = f"saved in {directory}" if store is not None and saved else "not saved: no directory was given"
        print(f"Stopped at step {done} of {steps} ({history.stopped}); the model holds that step's weights, {where}.")
    return history


def _stopped_message(what: str, bad: int, store: "Store | None") -> str:
    after = "the model holds the weights from before that batch"
    if store is not None and store.latest is not None:
        after += f"; the last good checkpoint is step {store.latest} in {store.directory}"
    return (
        f"step {bad}: {what} is not finite (batch {bad} of this run); {after}: lower the learning rate, or look at "
        "that batch"
    )


class _Signals:
    """Remember Ctrl-C and SIGTERM instead of dying in the middle of a step (where donated arrays would be lost)."""

    def __enter__(self):
        self.caught, self.previous = False, {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._catch)
        return self

    def _catch(self, number, frame):
        if self.caught and number == signal.SIGINT:  # asked twice: do not wait for the step
            raise KeyboardInterrupt
        self.caught = True

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def _named(tree) -> dict[str, Array]:
    """A pytree as a flat dict by path, the form in which it is saved: readable names, and no classes to unpickle."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _fingerprint(model, carry, seed: int, steps: int) -> dict:
    """What must agree for a checkpoint to be continued: all that is learnt by name and shape, the config, seed, length.

    The config too, because shapes do not tell everything: 2 heads of 64 have the arrays of 4 heads of 32.
    """
    arrays = {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in _named(carry).items()}
    return {"arrays": arrays, "config": repr(getattr(model, "config", None)), "seed": seed, "steps": steps}


class Store:
    """A folder of checkpoints, one per step, written by orbax: a checkpoint is there completely or not at all."""

    def __init__(self, directory: str | Path, fingerprint: dict):
        import orbax.checkpoint as ocp  # takes seconds to import, and is needed by long runs only

        self.ocp, self.fingerprint = ocp, fingerprint
        self.directory = Path(directory).absolute()
        if self.directory.exists() and not self.directory.is_dir():
            raise CourseError(f"{directory}: expected a folder for checkpoints, found a file")
        # Saving in the background would still be reading arrays that the next step overwrites in place.
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self.manager = ocp.CheckpointManager(self.directory, options=options)

    @property
    def latest(self) -> int | None:
        return self.manager.latest_step()

    def save(self, step: int, carry, batches, history: History) -> None:
        """Write step `step`. Raises `CourseError` when the disk is full; earlier checkpoints are untouched."""
        if self.latest == step:
            return
        arrays = _named(carry)
        needed = 2 * sum(leaf.nbytes for leaf in arrays.values())
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise CourseError(
                f"{self.directory}: a checkpoint needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free: make room and "
                f"start again, the run continues from step {self.latest or 0}"
            )
        state = batches.get_state() if hasattr(batches, "get_state") else None
        meta = {
            "fingerprint": self.fingerprint,
            "batches": state.decode() if isinstance(state, bytes) else state,
            "history": dataclasses.asdict(history),
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
        arrays, args, damaged = _named(carry), self.ocp.args, []
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
            history = History(**meta["history"])
            history.evaluations = [tuple(pair) for pair in history.evaluations]
            history.stopped = "finished"
            return jax.tree.unflatten(jax.tree.structure(carry), leaves), history, step
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
    sha = hashlib.sha256()
    for name in sorted(arrays):
        sha.update(name.encode())
        sha.update(np.ascontiguousarray(jax.device_get(arrays[name])).tobytes())
    return sha.hexdigest()


def write_metrics(path: str | Path, history: History) -> None:
    """One JSON line per logged interval."""
    rows = zip(history.steps, history.loss, history.grad_norm, history.tokens_per_s)
    keys = ("step", "loss", "grad_norm", "tokens_per_s")
    Path(path).write_text("".join(json.dumps(dict(zip(keys, row))) + "\n" for row in rows))
