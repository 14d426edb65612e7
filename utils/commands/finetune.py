"""Fine-tuning a real model with LoRA, from one dataclass: `python -m utils finetune --help`.

    problems -> tokens -> rows -> batches          model -> adapter -> mesh          train.fit -> folder

A run is a folder. In it: `config.json` (what was asked for), `metrics.jsonl` and `metrics.png`, `checkpoints/` (adapter,
optimiser, place in the data, random numbers), and at the end `adapter/`, which PEFT and everything behind it loads. The
same command on the same folder continues a run that was stopped, killed or out of time.
"""

import contextlib
import dataclasses
import json
import logging
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from utils import CourseError
from utils.kernels import cpu

if TYPE_CHECKING:
    from utils import train
    from utils.evaluation import exact_match

logger = logging.getLogger(__name__)
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train, on what, and how. Numbers of steps count updates."""

    model: str
    """a Hugging Face folder, a .gguf file, or a repository"""
    data: str
    """gsm8k, openr1-math, arithmetic, or a .jsonl file of {prompt, response[, answer]} or {messages}"""
    output: str
    """the run's folder: a path, or gs://... for a bucket"""

    limit: int | None = None
    """train on only so many problems"""
    held_out: int = 64
    """problems to evaluate on, which are not trained on: from the test split, or kept back from a file"""
    template: str | None = None
    """the user's message, with {problem} in it; default: the problem, and how to give the answer"""
    chat: bool = True
    """wrap the message into the model's chat template; not for base models"""
    window: int = 1024
    """tokens in a row"""
    long: Literal["skip", "cut"] = "skip"
    """what happens to examples longer than the window; counted and said in either case"""
    packing: bool = True
    """several examples in a row where they fit"""
    loss_on: Literal["answer", "everything"] = "answer"
    """the tokens that are graded"""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ALL_LINEAR
    """the layers that get an adapter, by the last part of their names"""
    dropout: float = 0.0
    """of the adapter's inputs"""

    batch: int = 8
    """rows in an update, on all devices and in all parts together"""
    accumulate: int = 1
    """cut each batch into so many parts, one after another"""
    steps: int | None = None
    """updates; default: as many as `epochs` take"""
    epochs: float = 1.0
    learning_rate: float = 2e-4
    warmup: int = 20
    """steps until the full learning rate; then a cosine down to a tenth"""
    weight_decay: float = 0.0
    clip: float = 1.0
    """of the gradient's norm"""
    dtype: Literal["bfloat16", "float32", "float16"] | None = None
    """of the frozen weights; default: as stored. Adapter and optimiser are float32"""
    remat: bool = False
    """keep only each block's input for the backward pass, and compute the rest again"""
    chunk: int | None = None
    """tokens that have logits at one time; default: 128 on a CPU, whose caches they should fit, else 1024"""
    seed: int = 0

    fsdp: int | None = None
    """devices that share the weights; default: all that `tp` leaves"""
    tp: int = 1
    """devices that share each layer's work"""
    distributed: bool = False
    """several hosts: start this on each; found out by itself on TPU slices and SLURM, else from --coordinator"""
    coordinator: str | None = None
    """address:port of the first process"""
    processes: int | None = None
    process: int | None = None
    """how many processes there are, and which one this is"""

    evaluate_every: int | None = None
    """steps between two evaluations on held-out problems; default: ten in a run"""
    evaluate_problems: int = 0
    """at the end, let base and adapter answer so many held-out problems, and compare"""
    max_new_tokens: int = 512
    """of each such answer"""
    log_every: int = 10
    save_every: int | None = None
    save_minutes: float = 10.0
    """a checkpoint at least so often, and at the end"""
    max_hours: float | None = None
    """stop then, saved"""
    debug: bool = False
    """ten problems, six steps: the whole way in a minute, before the long run"""

    def __post_init__(self):
        whole = ("max_seq_length", "rank", "batch", "gradient_accumulation_steps", "tp", "log_every", "max_new_tokens")
        for name in whole + tuple(
            n
            for n in ("limit", "steps", "fsdp", "chunk", "evaluate_every", "save_every")
            if getattr(self, n) is not None
        ):
            if getattr(self, name) < 1:
                raise CourseError(f"{name}: expected at least 1, found {getattr(self, name)}")
        for name in ("held_out", "warmup_steps", "evaluate_problems", "weight_decay"):
            if getattr(self, name) < 0:
                raise CourseError(f"{name}: expected 0 or more, found {getattr(self, name)}")
        for name in ("alpha", "epochs", "learning_rate", "clip", "save_minutes", "max_hours"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise CourseError(f"{name}: expected a positive number, found {value}")
        if not 0 <= self.dropout < 1:
            raise CourseError(f"dropout: expected at least 0 and less than 1, found {self.dropout}")
        if self.batch_size % self.gradient_accumulation_steps:
            raise CourseError(f"batch: expected a multiple of accumulate ({self.gradient_accumulation_steps}), found {self.batch_size}")


# What may differ when a run is continued: it changes when something is done, not what comes out.
FREE = (
    "output",
    "fsdp",
    "tp",
    "distributed",
    "coordinator",
    "processes",
    "process",
    "evaluate_every",
    "evaluate_problems",
)
FREE += ("max_new_tokens", "log_every", "save_every", "save_minutes", "max_hours", "chunk", "gradient_checkpointing")


def loss_fn(chunk: int | None = None) -> Callable:
    """The loss of a batch {inputs, targets, segments, weights} [B, T]: mean cross-entropy of the graded tokens, in nats."""
    from flax import nnx

    from utils import kernels, lora, losses, transformer
    from utils.hf import peft

    chunk = chunk or (128 if kernels.on_cpu() else 1024)

    def loss(model, batch, key):
        with lora.dropout(model, key) if key is not None else contextlib.nullcontext():
            x, _ = model.hidden(batch["inputs"], segment_ids=batch["segment_ids"])
        weights, head = batch["loss_mask"], model.head
        return losses.chunked_cross_entropy(head, x, batch["targets"], weights, wrt=nnx.LoRAParam, chunk=chunk)

    return loss


def optimizer(config: Config, steps: int):
    """AdamW on the adapter behind a clipped gradient; warm-up, then a cosine down to a tenth of the learning rate."""
    from utils import train

    rate = train.schedule(config.learning_rate, steps, warmup_steps=config.warmup_steps, end=0.1)
    return train.optimizer(rate, weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm, b2=0.999)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to; `answers` are base and adapter on held-out problems, where they were asked for."""

    history: "train.History"
    adapter: Path | None
    answers: "evaluate.Paired | None" = None

    def summary(self) -> dict:
        """The numbers at the end of the run, by name."""
        h = self.history
        found = {"stopped": h.stopped, "step": h.steps[-1], "loss": h.loss[-1], "tokens_per_s": h.tokens_per_s[-1]}
        if h.evaluations:
            found["held_out_loss"] = h.evaluations[-1][1]
        if self.answers is not None:
            found["answers"] = self.answers.summary()
        return found | {"adapter": None if self.adapter is None else str(self.adapter)}


def run(config: Config) -> Result:
    """Train, or continue, the run in `config.output`.

    Raises `CourseError` before anything is written for everything that can be known by then: data, window, mesh, memory
    of the folder. A run that stops early, for any reason but a bad batch, is continued by calling this again.
    """
    cpu.keep_memory()
    if config.distributed or config.coordinator:
        _join(config)
    if not config.debug:
        with _alone():
            return _run(config)
    with tempfile.TemporaryDirectory() as folder:
        small = dict(limit=10, held_out=2, steps=6, warmup_steps=2, max_seq_length=min(config.max_seq_length, 256), long="cut", log_every=2)
        small |= dict(save_every=3, evaluate_problems=2, max_new_tokens=16, output=f"{folder}/run")
        result = _run(dataclasses.replace(config, **small))
        logger.info("Debugging: the whole way works; nothing was kept.")
    return dataclasses.replace(result, adapter=None)


def _join(config: Config) -> None:
    import jax

    if (config.processes is None) != (config.process is None):
        raise CourseError("processes, process: expected both or neither, found one: say how many, and which this is")
    try:
        jax.distributed.initialize(config.coordinator, config.processes, config.process)
    except (ValueError, RuntimeError) as error:
        said = str(error).splitlines()[0][:200]
        raise CourseError(f"distributed: {said}: give --coordinator, --processes and --process on each host") from error


@contextlib.contextmanager
def _alone():
    """Say in one line that another process is gone, which the runtime tells as a failed transfer."""
    import jax

    try:
        yield
    except CourseError:
        raise
    except RuntimeError as error:
        if jax.process_count() == 1:
            raise
        said = str(error).splitlines()[0][:150]
        raise CourseError(
            f"distributed: another process was lost ({said}): start all of them again, the run continues from its last "
            "checkpoint"
        ) from error


def prepare(config: Config):
    """(tokenizer, training rows, held-out rows, held-out problems) of a run."""
    from utils.data import problems, sft
    from utils.hf import hub, models

    tok = hub.tokenizer(hub.model(config.model, weights=False))
    training, held = problems.load(config.data, "train", config.limit, config.template), []
    if str(config.data).endswith(".jsonl"):  # one split: keep some back, of a small file not more than a fifth
        keep = min(config.held_out, len(training) // 5)
        training, held = training[keep:], training[:keep]
    elif config.held_out:
        held = problems.load(config.data, "test", config.held_out, config.template)
    examples = sft.tokenise(training, tok, config.chat, models.cache_folder())
    fits = ", ".join(f"{n:,} of {window:,}" for window, n in sft.fitting(examples, (2048, 4096, 8192)).items())
    logger.info(f"{len(examples):,} examples, {int(examples.lengths.sum()):,} tokens; they fit a window: {fits} tokens")
    options = dict(packing=config.packing, answer_only=config.loss_on == "answer")
    rows = sft.to_rows(sft.within(examples, config.max_seq_length, cut=config.long == "cut"), config.max_seq_length, **options)
    held_rows = None
    if held:
        with contextlib.suppress(CourseError):  # none of them fits: nothing to measure the loss on
            some = sft.within(sft.tokenise(held, tok, config.chat), config.max_seq_length, cut=config.long == "cut")
            held_rows = sft.to_rows(some, config.max_seq_length, **options)
    used = float((rows["segment_ids"] > 0).mean())
    graded = float(rows["loss_mask"].mean())
    logger.info(f"{len(rows['inputs']):,} rows of {config.max_seq_length:,}: {used:.0%} used, {graded:.0%} graded")
    return tok, rows, held_rows, held


def _run(config: Config) -> Result:
    import jax
    from etils import epath
    from flax import nnx

    from utils import kernels, lora, sharding, train, transformer
    from utils.data import sft
    from utils.evaluation import exact_match
    from utils.hf import hub, peft, weights

    first = jax.process_index() == 0
    folder = epath.Path(config.output)
    _same_run(folder, config)
    path = hub.model(config.model)
    sizes = transformer.Config.from_hf(path) if path.is_dir() else weights.Gguf(path).config
    if config.max_seq_length > sizes.max_position_embeddings:
        raise CourseError(f"window: expected at most {sizes.max_position_embeddings} (the model's context), found {config.max_seq_length}")
    tok, rows, held_rows, held = prepare(config)
    steps = config.steps or max(1, round(config.epochs * len(rows["inputs"]) / config.batch_size))
    stream = sft.batches(rows, config.batch_size, seed=config.seed)

    mesh = None
    if (devices := jax.device_count()) > 1:
        fsdp = config.fsdp or max(1, devices // config.tp)
        sharding.check(sizes, fsdp=fsdp, tp=config.tp)
        mesh = sharding.make_mesh(fsdp=fsdp, tp=config.tp)
        if config.batch_size // config.gradient_accumulation_steps % fsdp:
            raise CourseError(
                f"batch: {config.batch_size // config.gradient_accumulation_steps} rows at a time do not divide over fsdp={fsdp}: choose a "
                "multiple, or fewer parts"
            )
    elif (config.fsdp or 1) * config.tp > 1:
        raise CourseError("mesh: expected as many devices as fsdp x tp, found 1: leave --fsdp and --tp out here")
    model = weights.load(path, dtype=config.dtype, mesh=mesh)
    model.model.gradient_checkpointing = config.gradient_checkpointing
    options = dict(rank=config.rank, alpha=config.alpha, target_modules=config.target_modules, dropout=config.dropout)
    lora.inject(model, **options, rngs=nnx.Rngs(config.seed))
    if mesh is not None:
        sharding.shard(model, mesh)
    loss, tx = loss_fn(config.loss_chunk_size), optimizer(config, steps)
    cost = lora.count(model)
    logger.info(
        f"{steps:,} steps of {config.batch_size} rows; adapter: {cost.adapter:,} parameters, {cost.share:.2%} of the base"
    )

    trained = for_training(model, mesh)
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n")
    history = train.fit(
        trained, stream, loss, tx, steps=steps, wrt=nnx.LoRAParam, seed=config.seed, mesh=mesh, gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_every=config.log_every, directory=str(folder / "checkpoints"), save_every=config.save_every,
        save_seconds=60 * config.save_minutes, max_seconds=None if config.max_hours is None else 3600 * config.max_hours,
        evaluate=None if held_rows is None else held_out_loss(held_rows, config, mesh),
        evaluate_every=config.evaluate_every or max(1, steps // 10),
        report=lambda history: train.write_metrics(folder / "metrics.jsonl", history),
    )  # fmt: skip
    if trained is not model:
        lora.set_adapter(model, lora.stacked(lora.adapter(trained)))
    answers = None
    asked = [problem for problem in held if problem.answer][: config.evaluate_problems]
    if asked and history.stopped == "finished":
        if jax.process_count() == 1:
            answers = exact_match.compare(model, tok, asked, chat=config.chat, max_new_tokens=config.max_new_tokens)
            logger.info(exact_match.table(answers))
        else:
            logger.info("Held-out problems are not answered by several processes: run `evaluate` with the adapter.")
    adapter = _save_adapter(model, folder / "adapter", config.model)
    if first:
        _plot(history, folder / "metrics.png")
        logger.info(f"The adapter is in {adapter}.")
    return Result(history, adapter, answers)


def for_training(model, mesh=None):
    """The model in the layout that trains quickest: itself; on one CPU, with 16-bit weights, `unstacked`.

    That one is a fifth quicker, for the memory of the blocks again; `lora.stacked` brings its adapter back.
    """
    from utils import kernels, transformer

    return model.unstacked() if mesh is None and kernels.on_cpu() and model.dtype.itemsize == 2 else model


def held_out_loss(rows: dict, config: Config, mesh=None) -> Callable:
    """A function of the model: its mean loss in nats over the graded tokens of these rows, without dropout."""
    import functools

    import jax
    import numpy as np
    from flax import nnx

    from utils import train

    size, hosts = config.batch_size // config.gradient_accumulation_steps, jax.process_count()
    missing = -len(rows["inputs"]) % size  # rows that count nothing, so that one shape is compiled
    rows = {name: np.pad(array, ((0, missing), (0, 0))) for name, array in rows.items()}
    mine = slice(jax.process_index() * size // hosts, (jax.process_index() + 1) * size // hosts)
    loss = loss_fn(config.loss_chunk_size)

    @functools.partial(jax.jit, static_argnums=0)
    def measure(graph, state, batch):
        return loss(nnx.merge(graph, state), batch, None), batch["loss_mask"].sum()

    def evaluate(model) -> float:
        graph, state = nnx.split(model)
        total = tokens = 0.0
        for start in range(0, len(rows["inputs"]), size):
            batch = {name: array[start : start + size][mine] for name, array in rows.items()}
            mean, counted = (float(x) for x in measure(graph, state, train.placed(batch, 1, mesh)))
            total, tokens = total + mean * counted, tokens + counted
        return total / tokens

    return evaluate


def _same_run(folder, config: Config) -> None:
    """Raise `CourseError` if the folder holds something else than the beginning of this very run."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CourseError(f"output: expected a folder, found the file {folder}: name another")
    if not (folder / "config.json").exists():
        if others := sorted(path.name for path in folder.iterdir()):
            raise CourseError(f"output: {folder} holds {others[0]} and is no run's folder: name another")
        return
    try:
        found = json.loads((folder / "config.json").read_text())
        differing = [
            (name, found[name], value)
            for name, value in json.loads(json.dumps(dataclasses.asdict(config))).items()
            if name not in FREE and found[name] != value
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise CourseError(f"{folder}/config.json: cannot be read ({error}): name another folder") from None
    if differing:
        name, theirs, ours = differing[0]
        raise CourseError(
            f"output: {folder} holds a run with {name}={theirs}, this one has {ours}: continue it with the same, or "
            "name another folder"
        )


def _save_adapter(model, folder, base: str):
    """In PEFT's format, in place of an earlier one; into a bucket by way of a local folder."""
    from utils import lora
    from utils.hf import peft

    if "://" not in str(folder):
        return peft.save(model, Path(folder), base=base, overwrite=True)
    with tempfile.TemporaryDirectory() as local:
        written = peft.save(model, Path(local) / "adapter", base=base)
        for file in written.iterdir() if written.exists() else ():  # on the first host alone
            folder.mkdir(parents=True, exist_ok=True)
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def _plot(history, path) -> None:
    import io

    import matplotlib

    matplotlib.use("agg", force=False)
    from utils.course import plot

    figure, axes = plot.figure()
    axes.plot(history.steps, history.loss, label="training")
    if history.evaluations:
        axes.plot(*zip(*history.evaluations), label="held out", marker="o")
    axes.set(xlabel="step", ylabel="loss (nats per graded token)", title="Loss of the fine-tuning run")
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    path.write_bytes(picture.getvalue())
    matplotlib.pyplot.close(figure)
