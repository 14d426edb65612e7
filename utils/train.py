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

import contextlib
import dataclasses
import functools
import json
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
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float
from tqdm import tqdm

from utils import CourseError, checkpoints, sharding
from utils.checkpoints import Store


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


def make_step(graph, loss_fn: Callable, tx: optax.GradientTransformation, accumulate: int = 1):
    """The compiled training step: (carry, rest, batch, key) -> (carry, loss, gradient norm), carry donated.

    With `accumulate` > 1 the batch's arrays are [accumulate, B, ...]: gradients of that many small batches are added up
    before the one update, which is that of the large batch in the memory of a small one.

    carry = (learnt, opt_state, healthy). Once a loss or gradient is not finite, `healthy` turns false, and from there
    on no step changes anything: the weights stay what they were before the bad batch, whenever the host looks.
    """

    def step(carry, rest, batch, key):
        learnt, opt_state, healthy = carry
        grad = jax.value_and_grad(lambda p, batch, key: loss_fn(nnx.merge(graph, p, rest), batch, key))
        loss, grads = (grad if accumulate == 1 else functools.partial(_accumulated, grad))(learnt, batch, key)
        norm = optax.tree.norm(grads)
        updates, new_opt_state = tx.update(grads, opt_state, learnt)
        new = (optax.apply_updates(learnt, updates), new_opt_state)
        healthy &= jnp.isfinite(loss) & jnp.isfinite(norm)
        kept = jax.tree.map(lambda a, b: jnp.where(healthy, a, b), new, (learnt, opt_state))
        return (*kept, healthy), loss, norm

    return jax.jit(step, donate_argnums=0)


def _accumulated(grad: Callable, learnt, batches, key):
    """(loss, gradients) of several small batches, as of all their tokens at once.

    Each small batch's mean counts as often as tokens are counted in it (`weights`, else all of them): a plain average
    would let the tokens of a batch with few answers weigh more.
    """

    def add(total, numbered):
        i, batch = numbered
        tokens = batch["loss_mask"].sum() if "loss_mask" in batch else jnp.float32(1)
        loss, grads = grad(learnt, batch, jax.random.fold_in(key, i))
        return jax.tree.map(
            lambda t, new: t + (tokens * new).astype(t.dtype), total, (loss, grads, jnp.float32(1))
        ), None

    start = jnp.float32(0), jax.tree.map(jnp.zeros_like, learnt), jnp.float32(0)
    numbers = jnp.arange(len(jax.tree.leaves(batches)[0]))
    (loss, grads, tokens), _ = jax.lax.scan(add, start, (numbers, batches))
    return jax.tree.map(lambda x: (x / tokens).astype(x.dtype), (loss, grads))


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
    save_seconds: float | None = None,
    max_seconds: float | None = None,
    accumulate: int = 1,
    mesh: Mesh | None = None,
    report: Callable[[History], None] | None = None,
    progress: bool = True,
) -> History:
    """Train `model` in place for `steps` steps, or until `max_seconds` of wall clock are over.

    `batches` yields dicts of arrays. `loss_fn(model, batch, key)` is a scalar. `evaluate(model)` is called every
    `evaluate_every` steps and at the end. With a `directory`, a checkpoint is written every `save_every` steps, when
    `save_seconds` have passed since the last, and at the end, and a run found there is continued: `batches` then needs
    `get_state` and `set_state` (grain's have them). `accumulate` cuts each batch into that many parts (see `make_step`).
    On a `mesh`, for a model that is sharded over it, batches are split over its fsdp axis; with several processes, each
    gives its own rows, all stop at the same step, and only the first one prints. `report(history)` is called, there,
    whenever the history has grown.
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
    if mesh is not None:  # the optimiser's state goes where the parameters are that it belongs to
        carry = (learnt, *sharding.device_put(carry[1:], mesh, model.config))
    history, start = History(), 0
    store = None
    if directory is not None:
        store = Store(directory, fingerprint=_fingerprint(model, carry, seed, steps))
        if store.latest is not None:
            try:
                carry, found, start = store.restore(carry, batches)
            except CourseError:
                store.close()
                raise
            history = History(**found | {"stopped": "finished"})
            history.evaluations = [tuple(pair) for pair in history.evaluations]
    step_fn, key = make_step(graph, loss_fn, tx, accumulate), jax.random.key(seed)
    first = jax.process_index() == 0

    def write_back():
        # Copies again: the next step will donate these arrays while the model is still in the caller's hands.
        nnx.update(model, jax.tree.map(jnp.copy, carry[0]))

    def checkpoint(step):
        if store is not None:
            store.save(step, carry, batches, dataclasses.asdict(history))

    begun = saved_at = time.perf_counter()
    pending, clock, saved = [], None, start
    bar = tqdm(
        total=steps, initial=start, disable=not (progress and first), file=sys.stdout, unit="step", mininterval=1.0
    )
    try:
        with _Signals() as signals, contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            for step in range(start, steps):
                batch = next(batches, None)
                if batch is None:
                    raise CourseError(
                        f"batches: ended after {step - start} of {steps - start} batches: give an endless iterator "
                        "(data.batches is one), or fewer steps"
                    )
                batch = placed(batch, accumulate, mesh)
                carry, loss, norm = step_fn(carry, rest, batch, jax.random.fold_in(key, step))
                pending.append((loss, norm))
                if clock is None:  # the first step compiles: the clock starts after it
                    loss.block_until_ready()
                    clock, timed = time.perf_counter(), 0
                else:
                    timed += 1
                done = step + 1
                now = time.perf_counter()
                late = max_seconds is not None and now - begun > max_seconds
                due = save_seconds is not None and now - saved_at > save_seconds
                caught, late, due = _agreed(signals.caught, late, due, ask=done % log_every == 0)
                if done < steps and (caught or late):
                    history.stopped = "interrupted" if caught else "deadline"
                last = done == steps or history.stopped != "finished"
                saving = store is not None and (last or due or (save_every and done % save_every == 0))
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
                if report is not None and first:
                    report(history)
                if saving:
                    checkpoint(done)
                    saved, saved_at = done, time.perf_counter()
                shown = {"loss": f"{history.loss[-1]:.3f}", "tokens/s": f"{history.tokens_per_s[-1]:,.0f}"}
                bar.set_postfix(shown, refresh=False)
                bar.update(done - bar.n)
                clock, timed = time.perf_counter(), 0
                if last:
                    break
    finally:
        bar.close()
        if store is not None:
            store.close()
        if not any(leaf.is_deleted() for leaf in jax.tree.leaves(carry[0])):  # a step that failed half-way ate them
            write_back()
    if history.stopped != "finished" and first:
        where = f"saved in {directory}" if store is not None and saved else "not saved: no directory was given"
        print(f"Stopped at step {done} of {steps} ({history.stopped}); the model holds that step's weights, {where}.")
    return history


def placed(batch, accumulate: int, mesh: Mesh | None):
    """A host's batch on the devices: cut into `accumulate` parts, rows split over the mesh's fsdp axis."""
    if accumulate > 1:
        rows = len(jax.tree.leaves(batch)[0])
        if rows % accumulate:
            raise CourseError(f"accumulate: expected a divisor of the batch's {rows} rows, found {accumulate}")
        batch = jax.tree.map(lambda x: np.asarray(x).reshape(accumulate, -1, *x.shape[1:]), batch)
    return batch if mesh is None else sharding.shard_batch(batch, mesh, axis=int(accumulate > 1))


def _agreed(*flags: bool, ask: bool) -> tuple[bool, ...]:
    """The flags, if one process is all there is. Of several, each flag that any has, looked at only when `ask`.

    All must stop, and save, at the same step, or the others would wait for ever. Asking waits for the device, so it is
    done where the loop waits in any case.
    """
    if jax.process_count() == 1:
        return flags
    if not ask:
        return (False,) * len(flags)
    from jax.experimental import multihost_utils

    return tuple(multihost_utils.process_allgather(np.array(flags)).any(axis=0).tolist())


def _stopped_message(what: str, bad: int, store: "Store | None") -> str:
    after = "the model holds the weights from before that batch"
    if store is not None and store.latest is not None:
        after += f"; the last good checkpoint is step {store.latest} in {store.directory}"
    return (
        f"step {bad}: {what} is not finite (batch {bad} of this run); {after}: lower the learning rate, or look at "
        "that batch"
    )


def _fingerprint(model, carry, seed: int, steps: int) -> dict:
    """What must agree for a checkpoint to be continued: all that is learnt by name and shape, the config, seed, length.

    The config too, because shapes do not tell everything: 2 heads of 64 have the arrays of 4 heads of 32.
    """
    arrays = {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in checkpoints.named(carry).items()}
    return {"arrays": arrays, "config": repr(getattr(model, "config", None)), "seed": seed, "steps": steps}


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


def write_metrics(path, history: History) -> None:
    """One JSON line per logged interval; `held_out` where there was an evaluation. `path` may lie in a bucket."""
    rows = zip(history.steps, history.loss, history.grad_norm, history.tokens_per_s)
    keys, held_out = ("step", "loss", "grad_norm", "tokens_per_s"), dict(history.evaluations)
    lines = []
    for row in rows:
        more = {"held_out": held_out[row[0]]} if row[0] in held_out else {}
        lines.append(json.dumps(dict(zip(keys, row)) | more) + "\n")
    epath.Path(path).write_text("".join(lines))
