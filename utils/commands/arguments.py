"""The words after `python -m utils`, as one of the dataclasses of `options`.

tyro parses them. Its errors reach us as data and become one line each: a box has no place in a log.
"""

import contextlib
import dataclasses
import difflib
from typing import Annotated, Union

import tyro

from utils import CourseError, unexpected
from utils.commands.options import Evaluate, Finetune, Generate, Mirror, Plan, Sampling

try:  # private, but the only way to an error as data; without it, tyro prints its own, in a box
    from tyro import _errors as errors
except ImportError:
    errors = None

COMMANDS = {o.__name__.lower(): o for o in (Generate, Finetune, Evaluate, Plan, Mirror)}


def parse(words: list[str]) -> tuple[str, object]:
    """(name of the command, its options). Raises `CourseError` for what is not understood."""
    name, *rest = words or ["none"]
    if name in ("-h", "--help"):
        commands = Union[*(Annotated[o, tyro.conf.subcommand(n)] for n, o in COMMANDS.items())]
        tyro.cli(commands, prog="python -m utils", description="LoRA in JAX.", args=words)
    if name not in COMMANDS:
        raise unexpected("command", f"one of {', '.join(COMMANDS)}", name, "see --help")
    with errors.on_parse_error(_refuse) if errors else contextlib.nullcontext():
        return name, tyro.cli(COMMANDS[name], prog=f"python -m utils {name}", args=rest)


def _refuse(event) -> None:
    """Raise what tyro is about to refuse as a `CourseError` of one line."""
    flag = event.argument.display_name() if getattr(event, "argument", None) else ""
    if unknown := getattr(event, "tokens", []) or getattr(event, "unrecognized_tokens", []):
        command = COMMANDS[event.prog.split()[-1]]
        known = [f.name for f in (*dataclasses.fields(command), *dataclasses.fields(Sampling))]
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
        return  # an event of a later version: tyro says it in its own way
    raise CourseError(f"{reason}: see {event.prog} --help")
