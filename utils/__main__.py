"""The command line, for work that outlives a notebook: `python -m utils generate --help`.

Results go to the standard output, everything else to the standard error. Bad input ends with status 2 and one line.
"""

import contextlib
import dataclasses
import io
import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from utils import CourseError
from utils.commands import finetune
from utils.commands.options import Finetune
from utils.generate import Options


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue a prompt, or answer it, with a model and perhaps an adapter."""

    model: str
    """a Hugging Face folder, a .gguf file, or a repository such as HuggingFaceTB/SmolLM2-135M-Instruct"""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]]
    """the text to continue; give it several times for a batch"""
    options: tyro.conf.OmitArgPrefixes[Options] = dataclasses.field(default_factory=Options)
    max_new_tokens: int = 256
    """at most so many tokens for each prompt"""
    adapter: str | None = None
    """a LoRA adapter's folder, in PEFT's format; merged into the weights"""
    chat: bool = False
    """wrap the prompt into the model's chat template, as a user's message"""
    system: str | None = None
    """a system message to go before it (with --chat)"""
    stream: bool = False
    """print the text as it is made (one prompt)"""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """of the weights; default: as they are stored"""
    json: bool = False
    """print a JSON list of {prompt, text}"""

    def run(self) -> None:
        if self.stream and (self.json or len(self.prompt) != 1):
            raise CourseError("--stream: expected one prompt and no --json, found otherwise: leave one of them out")
        if self.system is not None and not self.chat:
            raise CourseError("--system: expected --chat with it, found none: a plain prompt has no system message")
        if self.max_new_tokens < 1:
            raise CourseError(f"--max-new-tokens: expected at least 1, found {self.max_new_tokens}")
        # Imported late: `--help` and a wrong flag should not wait for jax.
        from utils import generate, lora
        from utils.hf import hub, peft, weights

        with contextlib.redirect_stdout(sys.stderr):
            path = hub.model(self.model)
            tok = hub.tokenizer(path)
            model = weights.load(path, dtype=self.dtype)
            if self.adapter is not None:
                lora.merge(peft.load(model, self.adapter))
        prompts = list(self.prompt)
        if self.chat:
            system = [] if self.system is None else [{"role": "system", "content": self.system}]
            prompts = [tok.chat([*system, {"role": "user", "content": prompt}]) for prompt in prompts]
        options = vars(self.options)
        if self.stream:
            for piece in generate.stream(model, tok, prompts[0], self.max_new_tokens, **options):
                print(piece, end="", flush=True)
            print()
            return
        texts = generate.generate(model, tok, prompts, self.max_new_tokens, **options)
        if self.json:
            rows = [{"prompt": prompt, "text": text} for prompt, text in zip(self.prompt, texts)]
            print(json.dumps(rows, ensure_ascii=False, indent=1))
        else:
            print("\n\n".join(texts))


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Fine-tune a model with LoRA; the same command continues a run that was stopped."""

    config: tyro.conf.OmitArgPrefixes[Finetune]
    json: bool = False
    """print what came out as JSON"""

    def run(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            result = finetune.run(self.config)
        found = result.summary()
        print(json.dumps(found) if self.json else "\n".join(f"{name}: {value}" for name, value in found.items()))


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Let a model answer problems; with an adapter, base against adapter on the same ones."""

    model: str
    """a Hugging Face folder, a .gguf file, or a repository"""
    data: str
    """gsm8k, openr1-math, arithmetic (or arithmetic-1, arithmetic-3), or a .jsonl file with answers"""
    adapter: str | None = None
    """a LoRA adapter's folder, in PEFT's format"""
    split: str = "test"
    """of the data: train or test"""
    limit: int | None = None
    """only the first so many problems"""
    template: str | None = None
    """the user's message, with {problem} in it; default: the problem, and how to give the answer"""
    chat: bool = True
    """wrap the message into the model's chat template; not for base models"""
    max_new_tokens: int = 512
    """of each answer"""
    batch_size: int = 16
    """problems answered at a time"""
    temperature: float = 0.0
    """0 is greedy; R1's makers advise 0.6 (and a top_p of 0.95)"""
    top_p: float | None = None
    """keep the smallest set of tokens whose probability reaches p"""
    seed: int = 0
    """of the sampling"""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """of the weights; default: as they are stored"""
    save: str | None = None
    """write every answer into this file, a JSON object a line"""
    json: bool = False
    """print the numbers as JSON"""

    def run(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise CourseError(f"--{name.replace('_', '-')}: expected at least 1, found {getattr(self, name)}")
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        Options(**sampling)
        if self.save is not None and not Path(self.save).absolute().parent.is_dir():
            raise CourseError(f"--save: expected a file in a folder that is there, found {self.save}")
        from utils import lora
        from utils.data import problems
        from utils.evaluation import exact_match
        from utils.hf import hub, peft, weights

        with contextlib.redirect_stdout(sys.stderr):
            if self.adapter is not None:
                peft.read(
                    self.adapter
                )  # what is wrong with it should be said before the model is loaded
            asked = problems.load(self.data, self.split, self.limit, self.template)
            path = hub.model(self.model)
            tok, model = hub.tokenizer(path), weights.load(path, dtype=self.dtype)
            options = {
                "max_new_tokens": self.max_new_tokens,
                "batch_size": self.batch_size,
                "chat": self.chat,
            } | sampling
            if self.adapter is None:
                result = exact_match.evaluate(model, tok, asked, **options)
            else:
                result = exact_match.compare(peft.load(model, self.adapter), tok, asked, **options)
            if self.save is not None:
                exact_match.save(self.save, asked, result)
        print(json.dumps(result.summary(), indent=1) if self.json else exact_match.table(result))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What fine-tuning a model would take on TPUs, from their own compiler: bytes per chip, messages, time at least."""

    model: str
    """a Hugging Face folder, or a repository: only its config.json is read"""
    topology: str
    """a slice such as v5e-8, or a topology such as v5e:2x4"""
    batch: int = 8
    """rows in an update, on all chips and in all parts together"""
    seq: int = 2048
    """tokens in a row"""
    rank: int = 16
    fsdp: int | None = None
    """chips that share the weights; default: all that `tp` leaves"""
    tp: int = 1
    """chips that share each layer's work"""
    accumulate: int = 1
    """cut each batch into so many parts, one after another"""
    remat: bool = True
    """keep only each block's input for the backward pass, and compute the rest again"""
    chunk: int = 1024
    """tokens that have logits at one time"""
    json: bool = False
    """print the numbers as JSON"""

    def run(self) -> None:
        from utils import transformer
        from utils.commands import plan

        config = transformer.Config.from_hf(self.model)
        asked = dataclasses.asdict(self)
        if status := plan.elsewhere(asked):
            raise SystemExit(status)
        if status is None:
            del asked["model"], asked["json"]
            made = plan.compile_for(asked.pop("topology"), config, **asked)
            print(json.dumps(dataclasses.asdict(made), indent=1) if self.json else made)


@dataclasses.dataclass(frozen=True)
class Mirror:
    """Fill a folder with everything the course downloads, for COURSE_MIRROR."""

    to: str
    """the folder to fill"""
    small: bool = False
    """only what the profiles smoke and cpu read (about 300 MB)"""

    def run(self) -> None:
        from utils.hf import mirror

        if status := mirror.main(["--mirror", self.to, *["--small"] * self.small]):
            raise SystemExit(status)


Command = (
    Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Finetune, tyro.conf.subcommand("finetune")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Mirror, tyro.conf.subcommand("mirror")]
)


def _parse(args: list[str] | None) -> Generate | Finetune | Evaluate | Plan | Mirror:
    """The command; a wrong one is a CourseError of one line instead of tyro's box."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                Command,
                prog="python -m utils",
                description="LoRA in JAX.",
                args=args,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        words = " ".join(re.sub(r"\x1b\[[0-9;]*m|[\u2500-\u257f]|-{5,}", " ", said.getvalue()).split())
        words = re.sub(r"(Perhaps you meant: --\S+).*", r"\1", words)  # the first guess of many
        words = re.sub(r"^Value error |Error parsing __tyro\S*: | For full helptext.*", "", words)
        raise CourseError(
            words or "expected a command: generate, finetune, evaluate, plan or mirror; see --help"
        ) from None


def main(args: list[str] | None = None) -> int:
    """Run one command. Returns the process's status: 0, or 2 after one line about what was wrong."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    for name in ("generate", "finetune", "sft"):
        logging.getLogger(f"utils.{name}").setLevel(logging.INFO)
    try:
        _parse(args).run()
    except CourseError as error:
        print(f"python -m utils: {error}", file=sys.stderr)
        if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
            sys.stderr.flush()
            os._exit(2)  # the usual end would wait for the other processes, which may be gone
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stderr.close()
        return 0
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
