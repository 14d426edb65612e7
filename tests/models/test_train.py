"""Training: what a run may be interrupted by, and what is left of it then."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.helpers import tiny
from utils import CourseError, checkpoints, lora, losses, train
from utils.course import pretrained
from utils.data import packing

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The weights of a run that nothing disturbed, its history, and its folder of checkpoints."""
    folder, model = tmp_path_factory.mktemp("whole"), tiny.model()
    history = tiny.fit(model, folder)
    return tiny.weights(model), history, folder


@pytest.fixture
def folder(uninterrupted, tmp_path):
    """A copy of the uninterrupted run's checkpoints: steps 36 and 40 of 40."""
    return shutil.copytree(uninterrupted[2], tmp_path / "run")


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 600, text
    return text


# ------------------------------------------------------------------------------------------ the parts


def test_loss_is_the_mean_negative_log_probability_of_the_targets():
    model, batch = tiny.wild(), jax.tree.map(jnp.asarray, dict(next(tiny.batches())))
    logits = np.asarray(tiny.forward(model, batch["inputs"]), np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    by_hand = -np.log(np.take_along_axis(p, batch["targets"][..., None], -1)).mean()
    np.testing.assert_allclose(train.next_token_loss(model, batch), by_hand, rtol=1e-5)


def test_schedule_rises_to_its_peak_and_falls_to_its_end():
    rate = train.schedule(2e-3, 1000, warmup_steps=100, end=0.05)
    values = np.array([rate(step) for step in range(0, 1001, 10)])
    assert values[0] == 0 and values.argmax() == 10
    np.testing.assert_allclose([values[5], values[10], values[-1]], [1e-3, 2e-3, 1e-4], rtol=1e-5)
    assert (np.diff(values)[:10] > 0).all() and (np.diff(values)[10:] < 0).all()


@pytest.mark.parametrize("steps", [1, 2, 9, 50])
def test_schedule_of_few_steps_still_warms_up_and_stays_finite(steps):
    values = np.array([train.schedule(1.0, steps)(step) for step in range(steps + 1)])
    assert np.isfinite(values).all() and values.max() <= 1


def test_matrices_decay_and_norms_do_not():
    params = nnx.state(tiny.model(), nnx.Param)
    tx = train.optimizer(1.0, weight_decay=0.1)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    for path, leaf in nnx.to_flat_state(updates):
        moved = bool(np.any(leaf[...]))
        assert moved == ("norm" not in ".".join(map(str, path))), path


def test_clipping_limits_the_gradient_that_the_optimiser_sees():
    params, grads = {"w": jnp.zeros((3, 4))}, {"w": jnp.full((3, 4), 1e6)}
    clip = optax.chain(optax.clip_by_global_norm(1.0))
    clipped, _ = clip.update(grads, clip.init(params))
    np.testing.assert_allclose(optax.tree.norm(clipped), 1.0, rtol=1e-5)
    tx = train.optimizer(1e-3, max_grad_norm=1.0)
    _, state = tx.update(grads, tx.init(params), params)
    first_moments = [x for x in jax.tree.leaves(state) if x.shape == (3, 4)][0]
    np.testing.assert_allclose(
        optax.tree.norm({"w": first_moments}), 0.1, rtol=1e-4
    )  # (1 - b1) times 1


def test_fit_equals_the_same_steps_written_out():
    model, by_hand = tiny.model(), tiny.model()
    history = tiny.fit(model, steps=6, log_every=3)
    stream, tx = tiny.batches(), train.optimizer(train.schedule(3e-3, 6))
    graph, params = nnx.split(by_hand)
    state, losses = tx.init(params), []

    @jax.jit
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(
            lambda p: train.next_token_loss(nnx.merge(graph, p), batch)
        )(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    for _ in range(6):
        params, state, loss = step(params, state, next(stream))
        losses.append(float(loss))
    np.testing.assert_allclose(history.loss, [np.mean(losses[:3]), np.mean(losses[3:])], rtol=1e-5)
    nnx.update(by_hand, params)
    for name, array in tiny.weights(by_hand).items():
        np.testing.assert_allclose(tiny.weights(model)[name], array, atol=1e-6, err_msg=name)


def test_training_lowers_the_loss_and_logs_every_interval(uninterrupted):
    _, history, _ = uninterrupted
    assert history.steps == sorted(set(range(4, 41, 4)) | set(range(10, 41, 10)))
    assert history.loss[-1] < history.loss[0] - 0.3
    assert (
        len(history.loss)
        == len(history.grad_norm)
        == len(history.tokens_per_s)
        == len(history.steps)
    )
    assert history.stopped == "finished" and history.seconds > 0


def test_evaluations_are_made_on_the_weights_of_their_step():
    seen = []
    tiny.fit(
        model := tiny.model(), steps=6, evaluate_every=2,
        evaluate=lambda m: seen.append(tiny.weights(m)) or len(seen),
    )  # fmt: skip
    shorter = tiny.model()
    tx = train.optimizer(train.schedule(3e-3, 6))
    train.fit(shorter, tiny.batches(), train.next_token_loss, tx, steps=2, progress=False)
    assert (
        len(seen) == 3
        and tiny.same(seen[0], tiny.weights(shorter))
        and tiny.same(seen[-1], tiny.weights(model))
    )


def test_only_what_is_selected_is_trained():
    model = tiny.model()
    before = tiny.weights(model)
    tiny.fit(model, steps=3, wrt=nnx.PathContains("mlp"))
    after = tiny.weights(model)
    assert {name for name in before if not np.array_equal(before[name], after[name])} == {
        name for name in before if "mlp" in name
    }


def test_a_frozen_base_committed_to_a_device_is_compiled_once(monkeypatch):
    """As `weights.load` returns one; the adapter beside it is new, and so not committed."""
    model, steps = tiny.model(), []
    nnx.update(model, jax.device_put(nnx.state(model), jax.devices()[0]))
    lora.inject(model, rank=2, alpha=4, target_modules=("q_proj",), rngs=nnx.Rngs(0))
    make_step = train.make_step
    monkeypatch.setattr(
        train, "make_step", lambda *args: steps.append(make_step(*args)) or steps[-1]
    )
    tiny.fit(model, steps=3, wrt=nnx.LoRAParam)
    assert steps[0]._cache_size() == 1


def test_nothing_selected_is_an_error():
    with pytest.raises(CourseError, match="selects no variable") as error:
        tiny.fit(tiny.model(), wrt=nnx.LoRAParam)
    one_line(error)


@pytest.mark.parametrize("steps", [0, -3])
def test_no_steps_is_an_error(steps):
    with pytest.raises(CourseError, match="steps: expected at least 1"):
        train.fit(tiny.model(), tiny.batches(), train.next_token_loss, optax.sgd(0.1), steps=steps)


def test_batches_that_end_early_are_an_error_and_keep_what_was_trained():
    model = tiny.model()
    with pytest.raises(CourseError, match="ended after 3 of 5 batches") as error:
        tiny.fit(model, stream=(b for b, _ in zip(tiny.batches(), range(3))), steps=5)
    one_line(error)
    assert not tiny.same(tiny.weights(model), tiny.weights(tiny.model()))


# ---------------------------------------------------------------------------------- donated arrays


def test_the_callers_arrays_survive_and_the_model_ends_with_new_ones():
    model = tiny.model()
    held = jax.tree.leaves(nnx.state(model, nnx.Param))
    tiny.fit(model, steps=3)
    assert not any(leaf.is_deleted() for leaf in held)
    assert all(np.isfinite(array).all() for array in tiny.weights(model).values())


@pytest.mark.parametrize("where", ["batches", "evaluate"])
def test_an_error_in_the_middle_leaves_a_whole_model_with_the_newest_weights(where):
    """After an evaluation the model shares no array with the step, which would delete it."""

    def failing_evaluate(m):
        failing_evaluate.calls += 1
        if where == "evaluate" and failing_evaluate.calls == 3:
            raise OSError("evaluation failed")
        return 0.0

    def failing_batches():
        for number, batch in enumerate(tiny.batches(), start=1):
            if where == "batches" and number == 7:
                raise OSError("batch 7 failed")
            yield batch

    failing_evaluate.calls = 0
    model, expected = tiny.model(), tiny.model()
    with pytest.raises(OSError):
        tiny.fit(
            model, stream=failing_batches(), steps=20, evaluate=failing_evaluate, evaluate_every=2
        )
    tx = train.optimizer(train.schedule(3e-3, 20))
    train.fit(expected, tiny.batches(), train.next_token_loss, tx, steps=6, progress=False)
    assert tiny.same(tiny.weights(model), tiny.weights(expected))


# -------------------------------------------------------------------------------------- NaN losses


def poisoned(at: int):
    """Batches of which number `at` carries a NaN (a float that the loss below adds to itself)."""
    for number, batch in enumerate(tiny.batches(), start=1):
        yield batch | {"poison": np.float32(np.nan if number == at else 0)}


def poisoned_loss(model, batch, key):
    return train.next_token_loss(model, batch, key) + batch["poison"]


def infinite_gradient(model, batch, key):
    """A finite loss whose gradient is not: the slope of a square root at zero."""
    total = model.norm.scale[...].sum()
    flag = jnp.where(jnp.isnan(batch["poison"]), 1.0, 0.0)
    root = jnp.sqrt(flag * (total - jax.lax.stop_gradient(total)) + (1 - flag))
    return train.next_token_loss(model, batch, key) + root


@pytest.mark.parametrize(
    "loss, what", [(poisoned_loss, "the loss"), (infinite_gradient, "the gradient")]
)
def test_a_bad_batch_stops_the_run_names_itself_and_changes_nothing(tmp_path, loss, what):
    model, before_it = tiny.model(), tiny.model()
    with pytest.raises(
        train.NonFiniteLoss, match=f"step 19: {what} is not finite \\(batch 19"
    ) as error:
        tiny.fit(model, tmp_path / "run", stream=poisoned(at=19), loss=loss)
    assert "checkpoint is step 16" in one_line(error)
    tx = train.optimizer(train.schedule(3e-3, tiny.STEPS))
    train.fit(before_it, tiny.batches(), train.next_token_loss, tx, steps=18, progress=False)
    for name, array in tiny.weights(model).items():
        assert np.isfinite(array).all()
        np.testing.assert_allclose(array, tiny.weights(before_it)[name], atol=1e-6, err_msg=name)
    # The checkpoint of step 16 is there and good: the run goes on from it with batches that are.
    rest = (
        b | {"poison": np.float32(0)} for _, b in zip(range(tiny.STEPS), skip(tiny.batches(), 16))
    )
    history = tiny.fit(tiny.model(), tmp_path / "run", stream=rest, loss=loss)
    assert history.steps[-1] == tiny.STEPS and np.isfinite(history.loss).all()


def skip(stream, n):
    for _ in range(n):
        next(stream)
    return stream


# ------------------------------------------------------------------------- killed, and started again


def spawn(folder, *seconds) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.helpers.tiny", str(folder), *map(str, seconds)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def steps_in(folder) -> list[int]:
    return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit())


@pytest.mark.slow
@pytest.mark.serial
@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.long)])
def test_killed_at_random_points_it_ends_with_the_same_bits(tmp_path, kills):
    """SIGKILL, in turn at any moment and inside a save; each restart is a new process."""
    complete = tiny.model()
    tiny.fit(complete, steps=tiny.LONG)
    weights = tiny.weights(complete)
    seed = random.randrange(10**6)
    chance, reached = random.Random(seed), []
    for kill in range(kills):
        before, inside_a_save = steps_in(tmp_path), kill % 2 == 1
        process = spawn(tmp_path, *([chance.uniform(0, 0.12)] if inside_a_save else []))
        if not inside_a_save:
            process.stdout.readline()  # "started": imports are over
            # Until this process has got somewhere, so that the kills meet different places.
            limit = time.monotonic() + 120
            while steps_in(tmp_path) == before and process.poll() is None:
                assert time.monotonic() < limit
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.1))
            process.kill()
        output, errors = process.communicate(timeout=120)
        reached.append(steps_in(tmp_path))
        where = f"kill {kill} of seed {seed}, checkpoints {reached}: {output}{errors[-2000:]}"
        assert process.returncode == -signal.SIGKILL, where
    process = spawn(tmp_path)
    output, errors = process.communicate(timeout=120)
    where = f"seed {seed}, checkpoints {reached}"
    assert process.returncode == 0, f"{where}: {output}{errors[-2000:]}"
    final = pretrained.load(tmp_path / "final")
    assert tiny.same(tiny.weights(final), weights), where
    assert any(reached) and max(max(steps, default=0) for steps in reached) < tiny.LONG, where


def test_a_finished_run_is_not_trained_further(folder, uninterrupted):
    model = tiny.model(seed=5)
    history = tiny.fit(model, folder)
    assert (
        tiny.same(tiny.weights(model), uninterrupted[0]) and history.loss == uninterrupted[1].loss
    )


def test_a_resumed_history_is_the_whole_history(tmp_path, uninterrupted):
    first = tiny.fit(tiny.model(), tmp_path / "run", stream=interrupting(tiny.batches(), at=13))
    assert first.stopped == "interrupted"
    second = tiny.fit(tiny.model(), tmp_path / "run")
    assert second.stopped == "finished" and second.steps[-1] == tiny.STEPS
    assert set(uninterrupted[1].steps) <= set(second.steps)


class interrupting:
    """Batches that send this process a signal when they hand out number `at`."""

    def __init__(self, stream, at, number=signal.SIGINT):
        self.stream, self.at, self.number, self.count = stream, at, number, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), self.number)
        return next(self.stream)

    def get_state(self):
        return self.stream.get_state()

    def set_state(self, state):
        self.stream.set_state(state)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_finish_the_step_save_and_return(
    tmp_path, uninterrupted, caplog, number
):
    caplog.set_level("INFO", "utils")
    handler, model = signal.getsignal(number), tiny.model()
    history = tiny.fit(model, tmp_path / "run", stream=interrupting(tiny.batches(), 13, number))
    assert history.stopped == "interrupted" and history.steps[-1] == 13
    assert "step 13 of 40 (interrupted)" in caplog.text
    assert signal.getsignal(number) == handler
    resumed = tiny.model(seed=9)
    tiny.fit(resumed, tmp_path / "run")
    assert tiny.same(tiny.weights(resumed), uninterrupted[0])


def test_a_second_ctrl_c_stops_at_once_with_a_whole_model():
    class pressed_twice(interrupting):
        def __next__(self):
            self.count += 1
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            return next(self.stream)

    model = tiny.model()
    with pytest.raises(KeyboardInterrupt):
        tiny.fit(model, stream=pressed_twice(tiny.batches(), 5))
    assert all(np.isfinite(array).all() for array in tiny.weights(model).values())


def test_a_deadline_saves_and_returns_and_the_run_can_go_on(tmp_path, uninterrupted, caplog):
    caplog.set_level("INFO", "utils")

    class slow(interrupting):
        def __next__(self):
            time.sleep(0.25 if self.count > 5 else 0)
            self.count += 1
            return next(self.stream)

    begun = time.monotonic()
    history = tiny.fit(
        tiny.model(),
        tmp_path / "run",
        stream=slow(tiny.batches(), -1),
        max_seconds=1.0,
        log_every=1,
    )
    assert history.stopped == "deadline" and 0 < history.steps[-1] < tiny.STEPS
    assert time.monotonic() - begun < 30 and "(deadline)" in caplog.text
    resumed = tiny.model(seed=9)
    tiny.fit(resumed, tmp_path / "run")
    assert tiny.same(tiny.weights(resumed), uninterrupted[0])


def test_a_deadline_met_at_the_last_step_is_a_finish():
    assert tiny.fit(tiny.model(), steps=1, max_seconds=0.0).stopped == "finished"


def test_outside_the_main_thread_it_trains_without_touching_signals():
    stopped = []
    thread = threading.Thread(
        target=lambda: stopped.append(tiny.fit(tiny.model(), steps=2).stopped)
    )
    thread.start()
    thread.join()
    assert stopped == ["finished"]


# -------------------------------------------------------------------------- damaged and foreign folders


def files_of(step: Path) -> list[Path]:
    return sorted(path for path in step.rglob("*") if path.is_file())


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "flip":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
    else:
        path.unlink()


def largest(step: Path) -> Path:
    return max(files_of(step), key=lambda path: path.stat().st_size)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["truncate", "empty", "flip", "delete"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    folder, uninterrupted, caplog, how
):
    damage(largest(folder / "40"), how)
    model = tiny.model(seed=9)
    history = tiny.fit(model, folder)
    assert "step 40 is damaged" in caplog.text
    assert tiny.same(tiny.weights(model), uninterrupted[0]) and history.steps[-1] == 40
    # The step was saved again in its place, and is good now.
    caplog.clear()
    tiny.fit(tiny.model(), folder)
    assert "is damaged" not in caplog.text and steps_in(folder)[-1] == 40


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # orbax's readers, cut off
def test_a_half_written_checkpoint_of_any_kind_falls_back(folder, uninterrupted, tmp_path):
    """Any file of the newest step cut in half: either it is not needed, or the step before serves."""
    for number, path in enumerate(files_of(folder / "40")):
        copy = shutil.copytree(folder, tmp_path / f"copy{number}")
        damage(copy / path.relative_to(folder), "truncate")
        model = tiny.model(seed=9)
        tiny.fit(model, copy)
        assert tiny.same(tiny.weights(model), uninterrupted[0]), path


def test_an_empty_folder_of_the_newest_step_falls_back(folder, uninterrupted):
    shutil.rmtree(folder / "40")
    (folder / "40").mkdir()
    model = tiny.model(seed=9)
    tiny.fit(model, folder)
    assert tiny.same(tiny.weights(model), uninterrupted[0])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_all_checkpoints_damaged_is_one_clear_error_and_nothing_is_deleted(folder):
    for step in ("36", "40"):
        damage(largest(folder / step), "truncate")
    before = {path: path.read_bytes() for path in files_of(folder)}
    model = tiny.model()
    with pytest.raises(
        CourseError, match="no checkpoint in it can be read: delete the folder"
    ) as error:
        tiny.fit(model, folder)
    one_line(error)
    assert before == {path: path.read_bytes() for path in files_of(folder)}
    assert tiny.same(tiny.weights(model), tiny.weights(tiny.model()))


@pytest.mark.parametrize(
    "changes, options, named",
    [
        (dict(hidden_size=32), {}, "embed_positions"),
        (dict(num_hidden_layers=3), {}, "layers"),
        (dict(num_attention_heads=4), {}, "config"),  # the same arrays: only the config tells
        ({}, dict(seed=1), "seed=0"),
        ({}, dict(steps=50), "steps=40"),
        ({}, dict(wrt=nnx.PathContains("mlp")), "embed_positions"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(folder, changes, options, named):
    before = {path: path.read_bytes() for path in files_of(folder)}
    with pytest.raises(CourseError, match="expected|made with") as error:
        tiny.fit(tiny.model(**changes), folder, **options)
    assert named in one_line(error) and "another directory" in str(error.value)
    assert before == {path: path.read_bytes() for path in files_of(folder)}


def test_a_resume_needs_batches_that_can_be_wound_forward(folder):
    shutil.rmtree(folder / "40")
    with pytest.raises(CourseError, match="set_state") as error:
        tiny.fit(tiny.model(), folder, stream=iter([next(tiny.batches())] * 40))
    one_line(error)


def test_a_file_where_the_folder_should_be_is_an_error(tmp_path):
    (tmp_path / "run").write_text("notes")
    with pytest.raises(CourseError, match="expected a folder for checkpoints, found a file"):
        tiny.fit(tiny.model(), tmp_path / "run")
    assert (tmp_path / "run").read_text() == "notes"


# -------------------------------------------------------------------------------------------- full disk


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch, uninterrupted):
    real, usage = train.Store.save, shutil.disk_usage

    def nearly_full(store, step, *args):
        if step == 12:
            monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=1000))
        real(store, step, *args)

    monkeypatch.setattr(train.Store, "save", nearly_full)
    model = tiny.model()
    with pytest.raises(CourseError, match="continues from step 8") as error:
        tiny.fit(model, tmp_path / "run")
    one_line(error)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(nnx.state(model)))
    monkeypatch.undo()
    tiny.fit(model := tiny.model(), tmp_path / "run")
    assert tiny.same(tiny.weights(model), uninterrupted[0])


def test_a_write_that_fails_half_way_leaves_the_earlier_checkpoints(
    tmp_path, uninterrupted, monkeypatch
):
    """The kernel refuses files above a size, from the third save on: as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    real, calls = train.Store.save, []

    def limited(store, *args):
        calls.append(args)
        if len(calls) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            real(store, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(train.Store, "save", limited)
    model = tiny.model()
    with pytest.raises(
        CourseError, match="step 12 could not be saved .* step 8 is unchanged"
    ) as error:
        tiny.fit(model, tmp_path / "run")
    one_line(error)
    monkeypatch.undo()
    assert steps_in(tmp_path / "run") == [4, 8]
    tiny.fit(model := tiny.model(), tmp_path / "run")
    assert tiny.same(tiny.weights(model), uninterrupted[0])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 800 kB. Needs root; elsewhere the two tests above stand for it."""
    command = ["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", str(tmp_path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("asks_first", [True, False])
def test_a_disk_that_is_really_full(small_disk, uninterrupted, monkeypatch, asks_first):
    if not asks_first:  # the space went between the question and the write
        usage = shutil.disk_usage("/")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    model, run = tiny.model(), small_disk / "run"
    filler = small_disk / "filler"
    real = train.Store.save

    def filling(store, step, *args):
        if step == 12:
            with (
                open(filler, "wb", buffering=0) as file,
                pytest.raises(OSError, match="No space left"),
            ):
                while True:
                    file.write(bytes(1000))
        real(store, step, *args)

    monkeypatch.setattr(train.Store, "save", filling)
    with pytest.raises(CourseError, match="make room") as error:
        tiny.fit(model, run)
    assert "step 8" in one_line(error)
    monkeypatch.undo()
    filler.unlink()
    tiny.fit(model := tiny.model(), run)
    assert tiny.same(tiny.weights(model), uninterrupted[0])


def test_the_stream_of_batches_continues_where_it_stopped():
    stream = tiny.batches()
    skip(stream, 7)
    state = stream.get_state()
    expected = [next(stream)["inputs"] for _ in range(40)]
    other = packing.batches(tiny.rows(), 32, 4, eot=tiny.tok().eot_token)
    other.set_state(state)
    assert all(np.array_equal(a, next(other)["inputs"]) for a in expected)


# -------------------------------------------------------- gradient accumulation; one run a folder


def weighted_loss(model, batch, key):
    hidden, _ = model.hidden(batch["inputs"])
    return losses.chunked_cross_entropy(
        model.embed_tokens, hidden, batch["targets"], batch.get("loss_mask"), chunk_size=16
    )


@pytest.mark.parametrize("weighted", [True, False])
def test_eight_small_batches_equal_one_large_one(weighted):
    """1 x 8 equals 8 x 1, though the rows count different numbers of tokens, and one of them none."""
    batch = dict(next(packing.batches(tiny.rows(), 32, 8, eot=tiny.tok().eot_token)))
    if weighted:
        counted = (
            np.arange(batch["inputs"].shape[1]) < np.array([0, 1, 2, 5, 9, 20, 30, 32])[:, None]
        )
        batch["loss_mask"] = counted.astype(np.float32)
    found = []
    for parts in (1, 8):
        model = tiny.model()
        history = train.fit(
            model,
            iter([batch] * 3),
            weighted_loss,
            optax.adam(1e-2),
            steps=3,
            gradient_accumulation_steps=parts,
            log_every=1,
            progress=False,
        )
        found.append((tiny.weights(model), history.loss, history.grad_norm))
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-5)
    np.testing.assert_allclose(found[0][2], found[1][2], rtol=1e-4)
    for a, b in zip(jax.tree.leaves(found[0][0]), jax.tree.leaves(found[1][0])):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(CourseError, match="divisor of the batch's 4 rows, found 3") as error:
        train.fit(
            tiny.model(),
            tiny.batches(),
            weighted_loss,
            optax.sgd(1.0),
            steps=1,
            gradient_accumulation_steps=3,
            progress=False,
        )
    one_line(error)


def test_two_runs_in_one_folder_are_refused(tmp_path):
    first = checkpoints.Store(tmp_path / "run", {})
    with pytest.raises(CourseError, match="another run is using this folder") as error:
        tiny.fit(tiny.model(), tmp_path / "run")
    one_line(error)
    first.close()
    tiny.fit(tiny.model(), tmp_path / "run")


def test_checkpoints_by_time(tmp_path):
    train.fit(
        tiny.model(), tiny.batches(), train.next_token_loss, optax.sgd(0.1), steps=6,
        directory=tmp_path / "run", save_seconds=0.0, progress=False,
    )  # fmt: skip
    assert steps_in(tmp_path / "run") == [5, 6]  # the newest two are kept
