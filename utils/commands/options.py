"""What each command can be told, as dataclasses: `python -m utils finetune --help` shows this file.

Nothing here needs jax or numpy, so help and a mistyped flag cost a tenth of a second. A field's comment
is its help. Values that cannot be meant are refused when an object is made, here or on a page.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import OmitArgPrefixes, UseAppendAction

from utils import CourseError, unexpected

Dtype = Literal["float32", "bfloat16", "float16"]
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _check(options, *, at_least_1: str = "", at_least_0: str = "", positive: str = "") -> None:
    """Raise `CourseError` for the first of these fields that is too small; None is always allowed."""
    for names, expected, allowed in (
        (at_least_1, "at least 1", lambda value: value >= 1),
        (at_least_0, "0 or more", lambda value: value >= 0),
        (positive, "a positive number", lambda value: 0 < value < math.inf),
    ):
        for name in names.split():
            value = getattr(options, name)
            if value is not None and not allowed(value):
                raise unexpected(name, expected, value)


@dataclass(frozen=True)
class Sampling:
    """How each next token is chosen, and what ends an answer (`utils.generate.Options`)."""

    temperature: float = 1.0  # 0: always the likeliest token (greedy); DeepSeek advises 0.6 for R1
    top_k: int | None = None  # choose among the k most likely tokens; default: among all
    top_p: float | None = None  # among the smallest set whose probability reaches p; 0.95 for R1
    repetition_penalty: float = 1.0  # above 1: tokens that the text already has become less likely
    stop: tuple[str, ...] = ()  # texts that end an answer and are left out of it
    seed: int = 0  # of the sampling: the same seed gives the same text


@dataclass(frozen=True)
class Generate:
    """Continue a prompt, or answer it, with a model and perhaps an adapter."""

    model: str  # a Hugging Face folder, a .gguf file, or a repository: Qwen/Qwen2.5-0.5B-Instruct
    # the text to continue; repeat the flag for several prompts in one batch
    prompt: UseAppendAction[tuple[str, ...]]
    sampling: OmitArgPrefixes[Sampling] = field(default_factory=Sampling)
    max_new_tokens: int = 256  # new tokens of each answer, at most
    adapter: str | None = None  # folder of a LoRA adapter in PEFT's format, merged into the weights
    chat: bool = False  # wrap the prompt into the model's chat template, as a user's message
    system: str | None = None  # a system message before it (with --chat)
    stream: bool = False  # print the text as it is generated (one prompt)
    dtype: Dtype | None = None  # of the weights; default: as they are stored
    json: bool = False  # print a JSON list of {prompt, text, finish_reason}

    def __post_init__(self):
        _check(self, at_least_1="max_new_tokens")
        if not self.prompt:
            raise unexpected("prompt", "at least one text", "none")
        if self.stream and (self.json or len(self.prompt) != 1):
            found = "--json" if self.json else f"{len(self.prompt)} prompts"
            raise unexpected("stream", "one prompt and no --json", found)
        if self.system is not None and not self.chat:
            raise CourseError("system: expected --chat too: a plain prompt has no system message")


@dataclass(frozen=True)
class Finetune:
    """Fine-tune a model with LoRA; the same command again continues a run that was stopped."""

    model: str  # a Hugging Face folder, a .gguf file, or a repository: Qwen/Qwen2.5-0.5B-Instruct
    data: str  # gsm8k, openr1-math, arithmetic, or .jsonl: {prompt, response, answer} or {messages}
    output: str  # the run's folder: a path, or gs://... for a bucket

    limit: int | None = None  # train on the first so many problems; default: on all
    held_out: int = 64  # problems to evaluate on: of the test split, or kept back from a .jsonl
    # the user's message, with {problem} where the problem goes: "Translate: {problem}". Default: the
    # problem and a request to put the answer into a box; of a .jsonl file, its prompt as it is
    template: str | None = None
    chat: bool = True  # wrap the message into the model's chat template; --no-chat for base models
    max_seq_length: int = 1024  # tokens in a row
    long: Literal["skip", "cut"] = "skip"  # what happens to an example with more (the log counts)
    packing: bool = True  # several examples in a row, each blind to the others; --no-packing: one
    # the tokens that the loss is computed on: those of the response, or the prompt's too
    loss_on: Literal["completion", "everything"] = "completion"

    rank: int = 16  # of the adapter's matrices: a higher one can learn more; usual: 8 to 64
    alpha: float = 32.0  # the adapter's output is multiplied by alpha / rank; usual: twice the rank
    target_modules: tuple[str, ...] = ALL_LINEAR  # layers with an adapter, by their last name
    dropout: float = 0.0  # share of the adapter's inputs that is set to zero in training

    batch_size: int = 8  # rows in an update, on all devices and in all accumulation steps together
    gradient_accumulation_steps: int = 1  # small batches, in turn, for an update: less memory
    steps: int | None = None  # updates; default: as many as --epochs take
    epochs: float = 1.0  # passes over the data, where --steps does not say
    learning_rate: float = 2e-4  # the highest; usual: 1e-4 to 5e-4, 10 x full fine-tuning's
    warmup_steps: int = 20  # updates until then; afterwards it falls to a tenth, along a cosine
    weight_decay: float = 0.0  # AdamW's, of the adapter's matrices
    max_grad_norm: float = 1.0  # a gradient whose norm is larger is scaled down to it
    dtype: Dtype | None = None  # of the frozen weights; default: as stored. The adapter is float32
    gradient_checkpointing: bool = False  # recompute activations instead of keeping them (remat)
    loss_chunk_size: int | None = None  # tokens with logits at a time; 128 on a CPU, else 1024
    seed: int = 0  # of the adapter's first values, the order of the data, and dropout

    fsdp: int | None = None  # devices that share the weights; default: all that --tp leaves
    tp: int = 1  # devices that share each layer's work
    distributed: bool = False  # several hosts, each with this command; enough on TPUs and SLURM
    coordinator: str | None = None  # elsewhere: address:port of the first process
    processes: int | None = None  # how many processes there are (with --coordinator)
    process: int | None = None  # which of them this one is, counted from 0 (with --coordinator)

    evaluate_every: int | None = None  # updates between evaluations; default: ten in a run
    evaluate_problems: int = 0  # at the end, compare base and adapter on so many held-out problems
    max_new_tokens: int = 512  # of each answer to these, at most
    log_every: int = 10  # updates between two lines of metrics.jsonl
    save_every: int | None = None  # updates between checkpoints; default: by --save-minutes alone
    save_minutes: float = 10.0  # a checkpoint at least so often, and at the end
    max_hours: float | None = None  # stop after so long, with a checkpoint
    debug: bool = False  # ten problems, six updates: the whole way in a minute, before the long run
    json: bool = False  # print the result as JSON

    def __post_init__(self):
        sizes = "max_seq_length rank batch_size gradient_accumulation_steps tp fsdp loss_chunk_size"
        counts = "limit steps log_every max_new_tokens evaluate_every save_every"
        at_least_0 = "held_out warmup_steps evaluate_problems weight_decay"
        positive = "alpha epochs learning_rate max_grad_norm save_minutes max_hours"
        _check(self, at_least_1=f"{sizes} {counts}", at_least_0=at_least_0, positive=positive)
        if not 0 <= self.dropout < 1:
            raise unexpected("dropout", "0 or more and less than 1", self.dropout)
        if self.batch_size % (steps := self.gradient_accumulation_steps):
            expected = f"a multiple of gradient_accumulation_steps ({steps})"
            raise unexpected("batch_size", expected, self.batch_size)


# Fields that may differ when a run is continued: they change when and where it is done, not the result.
FREE = (
    "output", "fsdp", "tp", "distributed", "coordinator", "processes", "process", "evaluate_every",
    "evaluate_problems", "max_new_tokens", "log_every", "save_every", "save_minutes", "max_hours",
    "loss_chunk_size", "gradient_checkpointing", "json",
)  # fmt: skip


@dataclass(frozen=True)
class Evaluate:
    """Let a model answer problems; with an adapter, base against adapter on the same ones."""

    model: str  # a Hugging Face folder, a .gguf file, or a repository
    data: str  # gsm8k, openr1-math, arithmetic (-1 is easier, -3 harder), or .jsonl with answers
    adapter: str | None = None  # folder of a LoRA adapter in PEFT's format
    split: Literal["train", "test"] = "test"  # of the data
    limit: int | None = None  # the first so many problems; default: all
    template: str | None = None  # the user's message, with {problem} in it; default: as in finetune
    chat: bool = True  # wrap the message into the model's chat template; --no-chat for base models
    max_new_tokens: int = 512  # of each answer, at most
    batch_size: int = 16  # problems answered at a time
    sampling: OmitArgPrefixes[Sampling] = field(default_factory=lambda: Sampling(temperature=0.0))
    dtype: Dtype | None = None  # of the weights; default: as they are stored
    save: str | None = None  # write every answer into this file, a JSON object a line
    json: bool = False  # print the numbers as JSON

    def __post_init__(self):
        _check(self, at_least_1="limit max_new_tokens batch_size")
        if self.save is not None and not Path(self.save).absolute().parent.is_dir():
            raise unexpected("save", "a file in a folder that exists", self.save)


@dataclass(frozen=True)
class Plan:
    """What fine-tuning a model takes on TPUs, asked of their compiler: bytes per chip, time at least."""

    model: str  # a Hugging Face folder, or a repository: only its config.json is read
    topology: str  # a slice such as v5e-8, or a topology such as v5e:2x4
    batch_size: int = 8  # rows in an update, on all chips and in all accumulation steps together
    seq_len: int = 2048  # tokens in a row
    rank: int = 16  # of the adapter, which is on all linear layers
    fsdp: int | None = None  # chips that share the weights; default: all that --tp leaves
    tp: int = 1  # chips that share each layer's work
    gradient_accumulation_steps: int = 1  # small batches, in turn, for an update
    gradient_checkpointing: bool = True  # recompute activations instead of keeping them (remat)
    loss_chunk_size: int = 1024  # tokens that have logits at one time
    json: bool = False  # print the numbers as JSON

    def __post_init__(self):
        sizes = "batch_size seq_len rank fsdp tp gradient_accumulation_steps loss_chunk_size"
        _check(self, at_least_1=sizes)


@dataclass(frozen=True)
class Mirror:
    """Fill a folder with everything the course downloads, for COURSE_MIRROR."""

    to: str  # the folder to fill
    small: bool = False  # only what the profiles smoke and cpu read (about 300 MB)
