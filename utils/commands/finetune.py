"""Fine-tuning a real model with LoRA, from one dataclass: `python -m utils finetune --help`.

    problems -> tokens -> rows -> batches          model -> adapter -> mesh          train.fit -> folder

A run is a folder: `config.json` (its options), `metrics.jsonl` and `metrics.png`, `checkpoints/`
(adapter, optimiser, position in the data) and at the end `adapter/`, in PEFT's format. The same
command on the same folder continues a run that was stopped, killed or out of time.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import matplotlib.figure
import numpy as np
from etils import epath
from flax import nnx

from utils import CourseError, first_line, kernels, lora, losses, sharding, train, unexpected
from utils.commands.options import FREE, Finetune
from utils.data import problems, sft
from utils.evaluation import exact_match
from utils.hf import config as hf_config
from utils.hf import gguf, hub, peft, weights
from utils.kernels import cpu

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to; `answers` are base's and adapter's to held-out problems, if asked for."""

    history: train.History
    adapter: Path | None
    answers: exact_match.Paired | None = None

    def summary(self) -> dict:
        """The numbers at the end of the run, by name."""
        h = self.history
        numbers = {"stopped": h.stopped, "step": h.steps[-1], "loss": h.loss[-1]}
        numbers["tokens_per_s"] = h.tokens_per_s[-1]
        if h.evaluations:
            numbers["held_out_loss"] = h.evaluations[-1][1]
        if self.answers is not None:
            numbers["answers"] = self.answers.summary()
        return numbers | {"adapter": None if self.adapter is None else str(self.adapter)}

    def __str__(self) -> str:
        return "\n".join(f"{name}: {value}" for name, value in self.summary().items())


def run(options: Finetune) -> Result:
    """Train, or continue, the run in `options.output`.

    Raises `CourseError`, before anything is written, for what is wrong with data, sequence length,
    mesh or folder. A run that stops early, for any reason but a bad batch, is continued by calling
    this again.
    """
    if options.distributed or options.coordinator:
        _join(options)
    if not options.debug:
        try:
            return _run(options)
        except RuntimeError as error:  # the runtime reports a failed transfer
            if jax.process_count() == 1:
                raise
            what = f"another process was lost ({first_line(error)[:150]})"
            again = "start all of them again, the run continues from its last checkpoint"
            raise CourseError(f"distributed: {what}: {again}") from error
    small = dict(limit=10, held_out=2, steps=6, warmup_steps=2, log_every=2, save_every=3)
    small |= dict(max_seq_length=min(options.max_seq_length, 256), long="cut")
    small |= dict(evaluate_problems=2, max_new_tokens=16)
    with tempfile.TemporaryDirectory() as folder:
        result = _run(dataclasses.replace(options, output=f"{folder}/run", **small))
    logger.info("Debugging: the whole way works; nothing was kept.")
    return dataclasses.replace(result, adapter=None)


def _run(options: Finetune) -> Result:
    first_process, folder = jax.process_index() == 0, epath.Path(options.output)
    _check_folder(folder, options)
    path = hub.model(options.model)
    config = hf_config.read(gguf.read(path).config if path.suffix == ".gguf" else path)
    if options.max_seq_length > (most := config.max_position_embeddings):
        expected = f"at most {most}, the model's max_position_embeddings"
        raise unexpected("max_seq_length", expected, options.max_seq_length)
    tok, rows, held_rows, held_out = prepare(options)
    epoch = len(rows["inputs"]) / options.batch_size
    steps = options.steps or max(1, round(options.epochs * epoch))
    batches = sft.batches(rows, options.batch_size, seed=options.seed)

    mesh = _mesh(options, config)
    model = weights.load(path, dtype=options.dtype, mesh=mesh)
    model.model.gradient_checkpointing = options.gradient_checkpointing
    sizes = dict(rank=options.rank, alpha=options.alpha, target_modules=options.target_modules)
    lora.inject(model, **sizes, dropout=options.dropout, rngs=nnx.Rngs(options.seed))
    if mesh is not None:
        sharding.shard(model, mesh)
    cost = lora.count(model)
    size = f"{cost.adapter:,} parameters, {cost.share:.2%} of the base"
    logger.info(f"{steps:,} steps of {options.batch_size} rows; adapter: {size}")

    trained = kernels.training_layout(model, mesh)
    if first_process:
        folder.mkdir(parents=True, exist_ok=True)
        settings = json.dumps(dataclasses.asdict(options), indent=1)
        (folder / "config.json").write_text(settings + "\n")
    history = train.fit(
        trained, batches, loss_fn(options.loss_chunk_size), optimizer(options, steps), steps=steps,
        wrt=nnx.LoRAParam, seed=options.seed, mesh=mesh, log_every=options.log_every,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        evaluate=None if held_rows is None else held_out_loss(held_rows, options, mesh),
        evaluate_every=options.evaluate_every or max(1, steps // 10),
        directory=str(folder / "checkpoints"),
        save_every=options.save_every, save_seconds=60 * options.save_minutes,
        max_seconds=None if options.max_hours is None else 3600 * options.max_hours,
        report=lambda history: write_metrics(folder / "metrics.jsonl", history),
    )  # fmt: skip
    if trained is not model:
        lora.set_adapter(model, lora.stacked(lora.adapter(trained)))
    answers = None
    with_answer = [problem for problem in held_out if problem.answer][: options.evaluate_problems]
    if with_answer and history.stopped == "finished":
        if jax.process_count() == 1:
            limits = dict(chat=options.chat, max_new_tokens=options.max_new_tokens)
            answers = exact_match.compare(model, tok, with_answer, **limits)
            logger.info(exact_match.table(answers))
        else:
            logger.info("Several processes answer no problems: run `evaluate` with the adapter.")
    adapter = _save_adapter(model, folder / "adapter", options.model)
    if first_process:
        _plot(history, folder / "metrics.png")
        logger.info(f"The adapter is in {folder.name}/adapter.")
    return Result(history, adapter, answers)


# ------------------------------------------------------------------------------- what a run is made of


def prepare(options: Finetune):
    """(tokenizer, training rows, held-out rows or None, held-out problems) of a run."""
    tok = hub.tokenizer(hub.model(options.model, weights=False))
    training = problems.load(options.data, "train", options.limit, options.template)
    held_out = []
    if str(options.data).endswith(".jsonl"):  # it is one split: hold back at most a fifth
        count = min(options.held_out, len(training) // 5)
        training, held_out = training[count:], training[:count]
    elif options.held_out:
        held_out = problems.load(options.data, "test", options.held_out, options.template)

    def to_rows(examples):
        length, cut = options.max_seq_length, options.long == "cut"
        how = dict(packing=options.packing, completion_only=options.loss_on == "completion")
        return sft.to_rows(sft.within(examples, length, cut=cut), length, **how)

    examples = sft.tokenise(training, tok, options.chat, hub.cache_folder())
    fitting = sft.fitting(examples, (2048, 4096, 8192)).items()
    fitting = ", ".join(f"{length:,}: {count:,}" for length, count in fitting)
    tokens = int(examples.lengths.sum())
    logger.info(f"{len(examples):,} examples, {tokens:,} tokens; that fit rows of {fitting}")
    rows, held_rows = to_rows(examples), None
    if held_out:
        with contextlib.suppress(CourseError):  # none of them fits: nothing to measure the loss on
            held_rows = to_rows(sft.tokenise(held_out, tok, options.chat))
    used, counted = (float(x.mean()) for x in (rows["segment_ids"] > 0, rows["loss_mask"]))
    shape = f"{len(rows['inputs']):,} rows of {options.max_seq_length:,} tokens"
    logger.info(f"{shape}: {used:.0%} used, the loss is on {counted:.0%}")
    return tok, rows, held_rows, held_out


def loss_fn(chunk_size: int | None = None) -> Callable:
    """The mean cross-entropy of a batch's counted tokens, in nats; logits of `chunk_size` at a time.

    Of a batch {inputs, targets, segment_ids, loss_mask} [B, T], loss_mask says which tokens count.
    """
    chunk_size = chunk_size or (128 if kernels.on_cpu() else 1024)

    def loss(model, batch, key):
        with lora.dropout(model, key) if key is not None else contextlib.nullcontext():
            hidden, _ = model.hidden(batch["inputs"], segment_ids=batch["segment_ids"])
        return losses.chunked_cross_entropy(
            model.head, hidden, batch["targets"], batch["loss_mask"], wrt=nnx.LoRAParam,
            chunk_size=chunk_size,
        )  # fmt: skip

    return loss


def optimizer(options: Finetune, steps: int):
    """AdamW with clipped gradients; warm-up, then a cosine down to a tenth of the learning rate."""
    rate = train.schedule(options.learning_rate, steps, warmup_steps=options.warmup_steps, end=0.1)
    decay, norm = options.weight_decay, options.max_grad_norm
    return train.optimizer(rate, weight_decay=decay, max_grad_norm=norm, b2=0.999)


def held_out_loss(rows: dict, options: Finetune, mesh=None) -> Callable:
    """A function of the model: its mean loss in nats over these rows, without dropout."""
    size, hosts = options.batch_size // options.gradient_accumulation_steps, jax.process_count()
    missing = -len(rows["inputs"]) % size  # rows that do not count, so that one shape is compiled
    rows = {name: np.pad(array, ((0, missing), (0, 0))) for name, array in rows.items()}
    own = slice(*(i * size // hosts for i in (jax.process_index(), jax.process_index() + 1)))
    loss = loss_fn(options.loss_chunk_size)

    @functools.partial(jax.jit, static_argnums=0)
    def measure(graph, state, batch):
        return loss(nnx.merge(graph, state), batch, None), batch["loss_mask"].sum()

    def evaluate(model) -> float:
        graph, state = nnx.split(model)
        total = tokens = 0.0
        for start in range(0, len(rows["inputs"]), size):
            batch = {name: array[start : start + size][own] for name, array in rows.items()}
            batch = train.device_put_batch(batch, mesh=mesh)
            mean, counted = (float(x) for x in measure(graph, state, batch))
            total, tokens = total + mean * counted, tokens + counted
        return total / tokens

    return evaluate


def _mesh(options: Finetune, config):
    """The mesh of all devices, None for a single one. Raises `CourseError` if sizes do not divide."""
    if (devices := jax.device_count()) == 1:
        if (options.fsdp or 1) * options.tp > 1:
            fix = "leave --fsdp and --tp out here"
            raise unexpected("mesh", "as many devices as fsdp x tp", 1, fix)
        return None
    fsdp = options.fsdp or max(1, devices // options.tp)
    sharding.check(config, fsdp=fsdp, tp=options.tp)
    mesh = sharding.make_mesh(fsdp=fsdp, tp=options.tp)
    rows = options.batch_size // options.gradient_accumulation_steps
    if rows % fsdp:
        what = f"{rows} rows at a time do not divide over fsdp={fsdp}"
        raise CourseError(f"batch_size: {what}: choose a multiple, or fewer accumulation steps")
    return mesh


def keep_memory() -> None:
    """Where jax will run on the CPU, keep freed memory (`kernels.cpu.keep_memory`): before it starts."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    plugins = [*importlib.metadata.entry_points(group="jax_plugins")]
    accelerator = plugins or importlib.util.find_spec("libtpu")
    if platforms.startswith("cpu") or not (platforms or accelerator):
        cpu.keep_memory()


def _join(options: Finetune) -> None:
    if (options.processes is None) != (options.process is None):
        fix = "say how many there are, and which this is"
        raise unexpected("processes, process", "both or neither", "one", fix)
    try:
        jax.distributed.initialize(options.coordinator, options.processes, options.process)
    except (ValueError, RuntimeError) as error:
        flags = "give --coordinator, --processes and --process on each host"
        raise CourseError(f"distributed: {first_line(error)[:200]}: {flags}") from error


def _check_folder(folder, options: Finetune) -> None:
    """Raise `CourseError` if the folder holds anything but the beginning of this very run."""
    if folder.exists() and not folder.is_dir():
        raise unexpected("output", "a folder", f"the file {folder}", "name another")
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if not names:
        return
    if "config.json" not in names:
        what = f"{folder} holds {names[0]} and is no run's folder"
        raise CourseError(f"output: {what}: name another")
    try:
        stored = json.loads((folder / "config.json").read_text())
        given = json.loads(json.dumps(dataclasses.asdict(options)))
        differing = [n for n in given if n not in FREE and stored[n] != given[n]]
    except (ValueError, KeyError, TypeError) as error:
        what = f"cannot be read ({error}): name another folder"
        raise CourseError(f"{folder}/config.json: {what}") from None
    if differing:
        name = differing[0]
        what = f"{folder} holds a run with {name}={stored[name]}, this one has {given[name]}"
        raise CourseError(f"output: {what}: continue it with the same, or name another folder")


def write_metrics(path, history: train.History) -> None:
    """A JSON line per logged interval, with `held_out` after an evaluation."""
    names, held_out = ("step", "loss", "grad_norm", "tokens_per_s"), dict(history.evaluations)
    lines = []
    for row in zip(history.steps, history.loss, history.grad_norm, history.tokens_per_s):
        evaluation = {"held_out": held_out[row[0]]} if row[0] in held_out else {}
        lines.append(json.dumps(dict(zip(names, row)) | evaluation) + "\n")
    epath.Path(path).write_text("".join(lines))


def _save_adapter(model, folder, base: str):
    """In PEFT's format, in place of an earlier one; into a bucket by way of a local folder."""
    if "://" not in str(folder):
        return peft.save(model, Path(folder), base=base, overwrite=True)
    with tempfile.TemporaryDirectory() as local:
        written = peft.save(model, Path(local) / "adapter", base=base)
        for file in written.iterdir() if written.exists() else ():  # on the first host alone
            folder.mkdir(parents=True, exist_ok=True)
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def _plot(history: train.History, path) -> None:
    figure = matplotlib.figure.Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(history.steps, history.loss, label="training")
    if history.evaluations:
        axes.plot(*zip(*history.evaluations), label="held out", marker="o")
    axes.set(xlabel="step", ylabel="loss (nats per counted token)", title="Loss of the run")
    axes.legend()
    with path.open("wb") as file:
        figure.savefig(file, format="png")
