"""The command line, for work that outlives a notebook: `python -m utils generate --help`.

Results go to standard output; the log, progress bars and errors to standard error. Bad input ends
with status 2 and one line. Only the command that is run is imported, with all that it needs.
"""

import contextlib
import dataclasses
import difflib
import importlib
import json
import logging
import os
import sys
from typing import Annotated, Union

import tyro

from utils import CourseError
from utils.commands import options

try:  # private, but the only way to an error as data; without it, tyro prints its own, in a box
    from tyro import _errors as errors
except ImportError:
    errors = None

COMMANDS = {
    "generate": options.Generate,
    "finetune": options.Finetune,
    "evaluate": options.Evaluate,
    "plan": options.Plan,
    "mirror": options.Mirror,
}


def parse(args: list[str]) -> tuple[str, object]:
    """(name of the command, its options). Raises `CourseError` for arguments that are wrong."""
    name, *rest = args or ["none"]
    if name in ("-h", "--help"):
        all_of_them = [Annotated[o, tyro.conf.subcommand(n)] for n, o in COMMANDS.items()]
        tyro.cli(Union[*all_of_them], prog="python -m utils", description="LoRA in JAX.", args=args)
    if name not in COMMANDS:
        expected = f"expected one of {', '.join(COMMANDS)}"
        raise CourseError(f"command: {expected}, found {name}: see --help")
    with errors.on_parse_error(_refuse) if errors else contextlib.nullcontext():
        return name, tyro.cli(COMMANDS[name], prog=f"python -m utils {name}", args=rest)


def _refuse(event) -> None:
    """Raise what tyro is about to refuse as a `CourseError` of one line."""
    flag = event.argument.display_name() if getattr(event, "argument", None) else ""
    unknown = getattr(event, "tokens", []) or getattr(event, "unrecognized_tokens", [])
    if unknown:
        known = dataclasses.fields(COMMANDS[event.prog.split()[-1]])
        known = [f.name for f in (*known, *dataclasses.fields(options.Sampling))]
        close = difflib.get_close_matches(unknown[0].strip("-").replace("-", "_"), known, 1)
        guess = f", perhaps --{close[0].replace('_', '-')}" if close else ""
        reason = f"{unknown[0]}: no such argument{guess}"
    elif isinstance(event, errors.MissingArgs):
        missing = ", ".join(argument.arg.display_name() for argument in event.missing_arguments)
        reason = f"{missing}: expected, and not given"
    elif isinstance(event, errors.InvalidChoice):
        choices = ", ".join(sorted(choice for choice in event.choices if choice != "None"))
        reason = f"{flag}: expected one of {choices}, found {event.value}"
    elif isinstance(event, errors.BadValue):
        reason = f"{flag}: expected a value, found {event.offending_value or 'none'}"
    elif isinstance(event, errors.InstantiationFailure):
        reason = f"{flag}: {event.message}" if flag else event.message
    else:
        return
    raise CourseError(f"{reason}: see {event.prog} --help")


@contextlib.contextmanager
def _log_shown():
    """The package's log on standard error."""
    handler, logger = logging.StreamHandler(sys.stderr), logging.getLogger("utils")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def main(args: list[str] | None = None) -> int:
    """Run one command. Returns the process's status: 0, or 2 after one line about what was wrong.

    What the command's `run` returns is printed: as text, or with --json its `summary()`.
    """
    try:
        name, chosen = parse(sys.argv[1:] if args is None else args)
        command = importlib.import_module(f"utils.commands.{name}")
        if name == "finetune":
            command.keep_memory()
        with _log_shown():
            result = command.run(chosen)
        if result is not None:
            as_json = getattr(chosen, "json", False)
            print(json.dumps(result.summary(), ensure_ascii=False, indent=1) if as_json else result)
    except CourseError as error:
        print(f"python -m utils: {error}", file=sys.stderr)
        if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
            sys.stderr.flush()
            os._exit(2)  # the usual end would wait for the other processes, which may be gone
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stderr.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
