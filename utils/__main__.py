"""The command line, for work that outlives a notebook: `python -m utils generate --help`.

Results go to the standard output, everything else to the standard error. Bad input ends with status 2 and one line.
"""

import contextlib
import dataclasses
import io
import json
import logging
import re
import sys
from typing import Annotated, Literal

import tyro

from utils import CourseError
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
        from utils import generate, hub, lora, weights

        with contextlib.redirect_stdout(sys.stderr):
            path = hub.model(self.model)
            tok = hub.tokenizer(path)
            model = weights.load(path, dtype=self.dtype)
            if self.adapter is not None:
                lora.merge(lora.load_adapter(model, self.adapter))
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
class Mirror:
    """Fill a folder with everything the course downloads, for COURSE_MIRROR."""

    to: str
    """the folder to fill"""
    small: bool = False
    """only what the profiles smoke and cpu read (about 300 MB)"""

    def run(self) -> None:
        from utils import mirror

        if status := mirror.main(["--mirror", self.to, *["--small"] * self.small]):
            raise SystemExit(status)


Command = Annotated[Generate, tyro.conf.subcommand("generate")] | Annotated[Mirror, tyro.conf.subcommand("mirror")]


def _parse(args: list[str] | None) -> Generate | Mirror:
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
        words = " ".join(re.sub(r"\x1b\[[0-9;]*m|[\u2500-\u257f]", " ", said.getvalue()).split())
        words = re.sub(r"^Value error |Error parsing __tyro\S*: | For full helptext.*", "", words)
        raise CourseError(words or "expected a command: generate or mirror; see --help") from None


def main(args: list[str] | None = None) -> int:
    """Run one command. Returns the process's status: 0, or 2 after one line about what was wrong."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("utils.generate").setLevel(logging.INFO)
    try:
        _parse(args).run()
    except CourseError as error:
        print(f"python -m utils: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stderr.close()
        return 0
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
