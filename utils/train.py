"""Training: a pure step, and a loop you can read from top to bottom.

A model is split in two: the trainable variables (`wrt`: all parameters by default, the adapter alone
for LoRA) and the frozen rest. One step is then a pure function

    (trainable, opt_state), batch  ->  (trainable, opt_state), loss

under `jax.jit`. Trainable variables and optimiser state are donated: XLA updates them in place. The
frozen ones are an argument that is never differentiated, without gradient and optimiser state.

`fit` adds what a run needs around the step. A run that is killed and started again with the same
arguments continues from its last complete checkpoint, and ends with the bits of an undisturbed one.
"""

import contextlib
import dataclasses
import functools
import logging
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
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float
from tqdm import tqdm

from utils import CourseError, checkpoints, sharding, unexpected
from utils.checkpoints import Store

logger = logging.getLogger(__name__)


class NonFiniteLoss(CourseError):
    """Loss or gradient became NaN or infinite. The model holds the weights from before that batch."""


@dataclasses.dataclass
class History:
    """What happened: an entry of steps, loss, grad_norm and tokens_per_s for every logged interval."""

    steps: list[int] = dataclasses.field(default_factory=list)
    loss: list[float] = dataclasses.field(default_factory=list)  # nats per token, interval's mean
    grad_norm: list[float] = dataclasses.field(default_factory=list)  # of its last step, unclipped
    tokens_per_s: list[float] = dataclasses.field(default_factory=list)
    evaluations: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0  # training alone: no compilation, no evaluation, no saving
    stopped: str = "finished"  # or "deadline", "interrupted"


def next_token_loss(model: nnx.Module, batch: dict, key: Array | None = None) -> Float[Array, ""]:
    """Mean cross-entropy in nats of batch["targets"] [B, T] given batch["inputs"] [B, T]."""
    del key  # `fit` passes it for dropout, which this loss does without
    logits = model(batch["inputs"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()


def schedule(peak: float, steps: int, warmup_steps: int = 100, end: float = 0.05) -> optax.Schedule:
    """Learning rate: a straight line up to `peak`, then a half cosine down to `end` times `peak`."""
    warmup = min(warmup_steps, max(1, steps // 10))
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1), peak * end)


def optimizer(
    learning_rate: float | optax.Schedule, *, weight_decay: float = 0.1, max_grad_norm: float = 1.0,
    b2: float = 0.98,
) -> optax.GradientTransformation:  # fmt: skip
    """AdamW on gradients whose global norm is clipped. Matrices decay; norm scales do not."""

    def matrices(params):
        def decays(path, leaf):
            return leaf.ndim > 1 and "norm" not in jax.tree_util.keystr(path)

        return jax.tree_util.tree_map_with_path(decays, params)

    adamw = optax.adamw(learning_rate, b1=0.9, b2=b2, weight_decay=weight_decay, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), adamw)


# ----------------------------------------------------------------------------------------- the step


def make_step(graph, loss_fn: Callable, tx, gradient_accumulation_steps: int = 1):
    """The compiled step: (carry, frozen, batch, key) -> (carry, loss, gradient norm), carry donated.

    carry = (trainable, opt_state, healthy). Once a loss or gradient is not finite, `healthy` is false
    and no later step changes anything: the weights stay those from before the bad batch. With
    `gradient_accumulation_steps` > 1 the batch's arrays are [steps, B, ...] (`device_put_batch`): the
    gradients of so many small batches make one update, that of the large batch in a small one's memory.
    """

    def step(carry, frozen, batch, key):
        trainable, opt_state, healthy = carry

        def loss_of(trainable, batch, key):
            return loss_fn(nnx.merge(graph, trainable, frozen), batch, key)

        grad = jax.value_and_grad(loss_of)
        if gradient_accumulation_steps > 1:
            grad = functools.partial(_accumulated, grad)
        loss, grads = grad(trainable, batch, key)
        norm = optax.tree.norm(grads)
        updates, new_opt_state = tx.update(grads, opt_state, trainable)
        new = (optax.apply_updates(trainable, updates), new_opt_state)
        healthy &= jnp.isfinite(loss) & jnp.isfinite(norm)
        kept = jax.tree.map(lambda a, b: jnp.where(healthy, a, b), new, (trainable, opt_state))
        return (*kept, healthy), loss, norm

    return jax.jit(step, donate_argnums=0)


def _accumulated(grad: Callable, trainable, batches, key):
    """(loss, gradients) of several small batches, as of all their tokens at once.

    Each mean is weighted by its tokens in `loss_mask` (equally without one): in a plain average,
    those of a batch with few would weigh more.
    """

    def add(total, numbered):
        i, batch = numbered
        tokens = batch["loss_mask"].sum() if "loss_mask" in batch else jnp.float32(1)
        loss, grads = grad(trainable, batch, jax.random.fold_in(key, i))
        terms = loss, grads, jnp.float32(1)
        return jax.tree.map(lambda t, x: t + (tokens * x).astype(t.dtype), total, terms), None

    start = jnp.float32(0), jax.tree.map(jnp.zeros_like, trainable), jnp.float32(0)
    numbers = jnp.arange(len(jax.tree.leaves(batches)[0]))
    (loss, grads, tokens), _ = jax.lax.scan(add, start, (numbers, batches))
    return jax.tree.map(lambda x: (x / tokens).astype(x.dtype), (loss, grads))


def device_put_batch(batch, gradient_accumulation_steps: int = 1, mesh: Mesh | None = None):
    """A host's batch cut into small ones, split over a mesh; `CourseError` if rows do not divide."""
    steps = gradient_accumulation_steps
    if steps > 1:
        if (rows := len(jax.tree.leaves(batch)[0])) % steps:
            expected = f"a divisor of the batch's {rows} rows"
            raise unexpected("gradient_accumulation_steps", expected, steps)
        batch = jax.tree.map(lambda x: np.asarray(x).reshape(steps, -1, *x.shape[1:]), batch)
    return batch if mesh is None else sharding.shard_batch(batch, mesh, axis=int(steps > 1))


# ----------------------------------------------------------------------------------------- the loop


def fit(
    model: nnx.Module, batches: Iterator, loss_fn: Callable, tx: optax.GradientTransformation, *,
    steps: int, wrt: nnx.filterlib.Filter = nnx.Param, seed: int = 0, log_every: int = 50,
    evaluate: Callable[[nnx.Module], float] | None = None, evaluate_every: int | None = None,
    directory: str | Path | None = None, save_every: int | None = None,
    save_seconds: float | None = None, max_seconds: float | None = None,
    gradient_accumulation_steps: int = 1, mesh: Mesh | None = None,
    report: Callable[[History], None] | None = None, progress: bool = True,
) -> History:  # fmt: skip
    """Train `model` in place for `steps` steps, or until `max_seconds` of wall clock are over.

    `batches` yields dicts of arrays; `loss_fn(model, batch, key)` is a scalar. `evaluate(model)` is
    called every `evaluate_every` steps and at the end; `report(history)` whenever the history has grown.
    With a `directory`, a checkpoint is written every `save_every` steps, `save_seconds` after the last
    one, and at the end, and a run in that folder is continued: `batches` then needs `get_state` and
    `set_state`, as grain's iterators have them. On a `mesh` the model must be sharded over it. Several
    processes pass their own rows each and stop at one step; the first shows progress and reports.

    Ctrl-C and SIGTERM finish the step under way, save, and return; a second Ctrl-C stops at once. Raises
    `NonFiniteLoss`, naming the batch. However `fit` ends, the model has the newest valid arrays.
    """
    if steps < 1:
        raise unexpected("steps", "at least 1", steps)
    graph, trainable, frozen = nnx.split(model, wrt, ...)
    if not jax.tree.leaves(trainable):
        what = f"selects no variable of {type(model).__name__}: nothing would be trained"
        raise CourseError(f"wrt={wrt}: {what}")
    # Copies, because the step donates them: the caller's model keeps its arrays if the run fails.
    trainable = jax.tree.map(jnp.copy, trainable)
    carry = (trainable, tx.init(trainable), jnp.array(True))
    if mesh is not None:  # the optimiser's state is sharded as the parameters that it belongs to
        carry = (trainable, *sharding.device_put(carry[1:], mesh, model.config))
    elif len(devices := jax.tree.leaves(trainable)[0].devices()) == 1:
        # Committed to its device, as a loaded base is: or the second step would compile again.
        carry = jax.device_put(carry, *devices)
    save_every, evaluate_every = save_every or np.inf, evaluate_every or np.inf
    save_seconds = np.inf if save_seconds is None else save_seconds
    max_seconds = np.inf if max_seconds is None else max_seconds
    history, start, store = History(), 0, None
    if directory is not None:
        store = Store(directory, fingerprint=_fingerprint(model, carry, seed, steps))
        if store.latest is not None:
            try:
                carry, past, start = store.restore(carry, batches)
            except CourseError:
                store.close()
                raise
            evaluations = [tuple(pair) for pair in past["evaluations"]]
            history = History(**past | {"evaluations": evaluations, "stopped": "finished"})
    step_fn = make_step(graph, loss_fn, tx, gradient_accumulation_steps)
    key, first_process = jax.random.key(seed), jax.process_index() == 0

    def write_back():
        # Copies again: the caller may keep the model's arrays, and the next step is donated ours.
        nnx.update(model, jax.tree.map(jnp.copy, carry[0]))

    in_mesh = contextlib.nullcontext if mesh is None else functools.partial(jax.set_mesh, mesh)
    begun = saved_at = time.perf_counter()
    pending, timed, saved = [], -1, start  # the first step compiles, and is not timed
    bar = progress_bar(steps, "step", initial=start, shown=progress and first_process)
    try:
        with _Signals() as signals, in_mesh():
            for done in range(start + 1, steps + 1):
                batch = next(batches, None)
                if batch is None:
                    what = f"ended after {done - 1 - start} of {steps - start} batches"
                    fix = "give an endless iterator (packing.batches is one), or fewer steps"
                    raise CourseError(f"batches: {what}: {fix}")
                batch = device_put_batch(batch, gradient_accumulation_steps, mesh)
                carry, loss, norm = step_fn(carry, frozen, batch, jax.random.fold_in(key, done - 1))
                pending.append((loss, norm))
                timed += 1
                if timed == 0:
                    loss.block_until_ready()
                    clock = time.perf_counter()

                now, logging_step = time.perf_counter(), done % log_every == 0
                late, due = now - begun > max_seconds, now - saved_at > save_seconds
                caught, late, due = _agreed(signals.caught, late, due, waits=logging_step)
                if done < steps and (caught or late):
                    history.stopped = "interrupted" if caught else "deadline"
                last = done == steps or history.stopped != "finished"
                saving = store is not None and (last or due or done % save_every == 0)
                evaluating = evaluate is not None and (last or done % evaluate_every == 0)
                if not (last or saving or evaluating or logging_step):
                    continue

                losses, norms = np.array(jax.device_get(pending)).T  # waits for the device
                elapsed = time.perf_counter() - clock
                if not bool(carry[2]):
                    raise _non_finite(losses, norms, done - len(losses) + 1, store)
                tokens = batch["inputs"].size if "inputs" in batch else 0
                history.steps.append(done)
                history.loss.append(float(losses.mean()))
                history.grad_norm.append(float(norm))
                history.tokens_per_s.append(tokens * timed / elapsed if timed else 0.0)
                history.seconds += elapsed
                pending = []
                if evaluating:
                    write_back()
                    history.evaluations.append((done, float(evaluate(model))))
                if report is not None and first_process:
                    report(history)
                if saving:
                    store.save(done, carry, batches, dataclasses.asdict(history))
                    saved, saved_at = done, time.perf_counter()
                newest = f"loss={history.loss[-1]:.3f}, tokens/s={history.tokens_per_s[-1]:,.0f}"
                bar.set_postfix_str(newest, refresh=False)
                bar.update(done - bar.n)
                clock, timed = time.perf_counter(), 0
                if last:
                    break
    finally:
        bar.close()
        if store is not None:
            store.close()
        # A step that failed half-way has deleted what was donated to it.
        if not any(leaf.is_deleted() for leaf in jax.tree.leaves(carry[0])):
            write_back()
    if history.stopped != "finished" and first_process:
        where = f"saved in {directory}" if saved and store else "not saved: no directory was given"
        how = f"step {done} of {steps} ({history.stopped})"
        logger.info(f"Stopped at {how}; the model holds that step's weights, {where}.")
    return history


def progress_bar(total: int, unit: str, *, initial: int = 0, shown: bool = True) -> tqdm:
    """tqdm's bar: in a notebook among the cell's output, else on stderr, apart from the results."""
    app = sys.modules.get("ipykernel.kernelapp")
    file = sys.stdout if app and app.IPKernelApp.initialized() else sys.stderr
    look = dict(unit=unit, file=file, disable=not shown, mininterval=1.0)
    return tqdm(total=total, initial=initial, **look)


def _agreed(*flags: bool, waits: bool) -> tuple[bool, ...]:
    """Each flag, true if it is so in any process: all must stop, and save, at the same step.

    Asking the others waits for the device. Where the loop would not wait, all are false instead.
    """
    if jax.process_count() == 1:
        return flags
    if not waits:
        return (False,) * len(flags)
    return tuple(multihost_utils.process_allgather(np.array(flags)).any(axis=0).tolist())


def _non_finite(losses, norms, first_step: int, store: Store | None) -> NonFiniteLoss:
    """The error for the first bad one of several steps, of which the first is `first_step`."""
    bad = int(np.argmin(np.isfinite(losses) & np.isfinite(norms)))
    step, what = first_step + bad, "the gradient" if np.isfinite(losses[bad]) else "the loss"
    after = "the model holds the weights from before that batch"
    if store is not None and store.latest is not None:
        after += f"; the last good checkpoint is step {store.latest} in {store.directory}"
    where = f"step {step}: {what} is not finite (batch {step} of this run)"
    return NonFiniteLoss(f"{where}; {after}: lower the learning rate, or look at that batch")


def _fingerprint(model, carry, seed: int, steps: int) -> dict:
    """What must agree for a run to continue. Shapes do not tell 2 heads of 64 from 4 of 32."""
    leaves = checkpoints.by_path(carry).items()
    arrays = {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in leaves}
    config = repr(getattr(model, "config", None))
    return {"arrays": arrays, "config": config, "seed": seed, "steps": steps}


class _Signals:
    """Remember Ctrl-C and SIGTERM, which in the middle of a step would lose the donated arrays."""

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
