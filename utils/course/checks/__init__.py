"""Checks: a second pair of eyes on your answer to an exercise.

Every exercise ends with a line such as `check("4.1", my_function)`. It tries what you wrote on a
few small inputs and prints one line: pass, not attempted yet, or which well-known mistake your
answer looks like and where to look next. A check holds no solution: it knows properties of a
right answer (a shape, a known value, a sum of one) and what the usual wrong answers give. So two
very different answers may both pass, and reading this folder spoils little.

The checks of chapter 4 are in `chapter_04.py`, loaded when the first of them is called. To write
one:

    from utils.course.checks import call, exercise, expect_close

    @exercise("4.1")
    def bits_per_character(learner):
        answer = call(learner, 100.0, 50)  # runs the learner's function, never trusts it
        expect_close(answer, 2.885390, "the bits per character", unlike={
            "nats-not-bits": (2.0, "this is nats per character", "one bit is ln 2 nats"),
        })
        return "It is the number the chapter prints"  # optional: printed after "Pass"

The right value is a number computed beforehand, what a library's or the package's function gives,
or a property of the answer. It is never computed as the exercise asks the learner to do it;
`tests/course/test_checks_hold_no_solution.py` compares every check with every solution.
"""

import ast
import dis
import functools
import importlib
import inspect
import linecache
import re
import reprlib
import sys
import sysconfig
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import ArrayLike, Float, Int

from utils import CourseError

PASS, NOT_ATTEMPTED, FAIL = "pass", "not attempted", "fail"

# Mistakes the helpers below find by themselves. For those it expects, a check has better names.
GENERIC = ("error", "wrong-type", "wrong-shape", "wrong-values", "not-finite", "returns-nothing")


@dataclass(frozen=True)
class Result:
    """A check's verdict: `status` is "pass", "not attempted" or "fail", `mistake` the name of the
    mistake (None unless "fail")."""

    status: str
    mistake: str | None
    message: str

    def _ipython_display_(self) -> None:
        """`check(...)` is a cell's last line and has printed already: show nothing more."""


class NotAttempted(Exception):
    """The stub is still as it was on the page."""


class Mistake(Exception):
    """Raised by a check that recognised a mistake: its name, why it is one, and what to look at."""

    def __init__(self, name: str, why: str, look_at: str = ""):
        super().__init__(name, why, look_at)
        self.name, self.why, self.look_at = name, why, look_at


class LearnerError(Exception):
    """The learner's own code raised `error`."""

    def __init__(self, error: BaseException):
        super().__init__(error)
        self.error = error


# ------------------------------------------------------------------------------------- for learners

_registry: dict[str, Callable] = {}


def check(exercise_id: str, *answers: Any, **named: Any) -> Result:
    """Check the answers to an exercise, print one line about them and return the same as a
    `Result`.

    Whatever the answers are or do, this does not raise; it raises `CourseError` for an exercise
    that does not exist.
    """
    function = find(exercise_id)
    try:
        result = _judge(function, answers, named)
    except RecursionError as error:  # an answer so deep that even describing it runs out of stack
        result = Result(FAIL, "error", f"your code raised {_one_line(error)}")
    words = {PASS: "pass", NOT_ATTEMPTED: "not attempted yet", FAIL: "not right yet"}[result.status]
    line = ". ".join(part[:1].upper() + part[1:] for part in (words, result.message) if part)
    print(f"Exercise {exercise_id}. {line}" + ("" if line.endswith((".", "?", "!")) else "."))
    return result


def find(exercise_id: str) -> Callable:
    """The check registered for an exercise; `CourseError` if there is none."""
    match = (
        re.fullmatch(r"(\d{1,2})\.(\d{1,2})", exercise_id) if isinstance(exercise_id, str) else None
    )
    if match is None:
        raise CourseError(
            f'exercise {exercise_id!r}: expected a name such as "4.1", chapter and number'
        )
    known = ids(int(match[1]))
    if exercise_id not in known:
        there_are = f"it has {', '.join(known)}" if known else "that chapter has none"
        raise CourseError(
            f"exercise {exercise_id}: chapter {int(match[1])} has no such exercise; {there_are}"
        )
    return _registry[exercise_id]


def ids(chapter: int) -> list[str]:
    """The exercises of a chapter that have a check, in order."""
    name = f"{__name__}.chapter_{chapter:02d}"
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:  # the chapter's checks exist, something they import does not
            raise
    mine = [key for key in _registry if key.split(".")[0] == str(chapter)]
    return sorted(mine, key=lambda key: int(key.split(".")[1]))


# ------------------------------------------------------------------------ for the authors of checks


def exercise(exercise_id: str) -> Callable[[Callable], Callable]:
    """Register the decorated function as the check of an exercise.

    It gets what the learner gave to `check`, raises `Mistake` (or calls helpers that do), and may
    return a sentence to print after "pass".
    """

    def register(function: Callable) -> Callable:
        home = re.search(r"\.chapter_(\d\d)$", function.__module__)
        if home and int(home[1]) != int(exercise_id.split(".")[0]):
            raise CourseError(
                f"check of exercise {exercise_id}: expected in the file of its own chapter, "
                f"found in chapter_{home[1]}.py"
            )
        other = _registry.get(exercise_id)
        if other is not None and (other.__module__, other.__name__) != (
            function.__module__,
            function.__name__,
        ):
            raise CourseError(
                f"exercise {exercise_id} has two checks, {other.__name__} and {function.__name__}"
            )
        _registry[exercise_id] = function
        return function

    return register


def expect(condition: Any, mistake: str, why: str, look_at: str = "") -> None:
    """Raise the named mistake unless the condition holds."""
    if not bool(condition):
        raise Mistake(mistake, why, look_at)


def attempted(*values: Any) -> None:
    """Raise `NotAttempted` if any value is still None, `...`, or a container with a `...` in it."""
    for value in values:
        inside = (
            value.values()
            if isinstance(value, dict)
            else value
            if isinstance(value, (tuple, list))
            else ()
        )
        if value is None or value is Ellipsis or any(item is Ellipsis for item in inside):
            raise NotAttempted


def call(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the learner's function (or class, or module) and return what it returns.

    A stub becomes `NotAttempted`, an exception `LearnerError`, a forgotten `return` the mistake
    "returns-nothing".
    """
    attempted(function)
    if not callable(function):
        raise Mistake("wrong-type", f"expected a function, found {_describe(function)}")
    if any(_is_empty(code) for code in _functions(function)[:1]) and not isinstance(function, type):
        raise NotAttempted
    try:
        value = function(*args, **kwargs)
    except NotImplementedError as error:
        raise NotAttempted from error
    except (Exception, SystemExit) as error:
        raise LearnerError(error) from error
    if value is None and not _has_placeholder(function):
        raise Mistake(
            "returns-nothing", "the function ran, and returned None", "is a return missing?"
        )
    attempted(value)
    return value


def attribute(thing: Any, name: str) -> Any:
    """`thing.name` for a dotted name; a clear mistake ("wrong-type") where it is missing."""
    for part in name.split("."):
        attempted(thing)
        try:
            thing = getattr(thing, part)
        except AttributeError as error:
            raise Mistake("wrong-type", f"{_describe(thing)} has no attribute {part}") from error
        except Exception as error:
            raise LearnerError(error) from error
    return thing


def array(answer: Any, what: str = "the result") -> np.ndarray:
    """The learner's value as a NumPy array; a clear mistake ("wrong-type") where it is no array of
    numbers.

    Floating point comes back as float64 (bfloat16 too), integers and booleans as they are.
    """
    attempted(answer)
    try:
        value = np.asarray(answer)
        if value.dtype.kind not in "biufc":
            value = value.astype(np.float64)  # bfloat16 has kind "V"; objects and text fail here
    except Exception as error:
        raise Mistake(
            "wrong-type", f"expected numbers for {what}, found {_describe(answer)}"
        ) from error
    return value.astype(np.float64) if value.dtype.kind == "f" else value


def expect_shape(
    answer: Any, shape: tuple[int, ...], what: str = "the result", axes: str = ""
) -> np.ndarray:
    """Require a shape. `axes` names it for the reader, as in "[B, T, V]". Returns the value as a
    NumPy array."""
    value = array(answer, what)
    if value.shape != tuple(shape):
        names = f" ({axes})" if axes else ""
        raise Mistake(
            "wrong-shape", f"expected shape {tuple(shape)}{names} for {what}, found {value.shape}"
        )
    return value


def is_close(answer: Any, expected: ArrayLike, rtol: float = 1e-4, atol: float = 1e-6) -> bool:
    """Same shape and same values within the tolerance. False for anything that cannot be
    compared."""
    try:
        value, target = array(answer), array(expected)
        return value.shape == target.shape and bool(
            np.allclose(value, target, rtol=rtol, atol=atol)
        )
    except Exception:
        return False


def expect_close(
    answer: Any,
    expected: ArrayLike,
    what: str = "the result",
    *,
    axes: str = "",
    rtol: float = 1e-4,
    atol: float = 1e-6,
    unlike: Mapping[str, tuple] | None = None,
) -> np.ndarray:
    """Require values, shapes first, within `atol + rtol * |expected|`. Returns the value as a NumPy
    array.

    `unlike` maps the name of a likely mistake to (the values it gives, why, what to look at): when
    the answer is wrong and equals one of them, that mistake is reported instead of a plain
    difference.
    """
    attempted(answer)
    if is_close(answer, expected, rtol, atol):
        return array(answer, what)
    for name, (wrong, *explanation) in (unlike or {}).items():
        if is_close(answer, wrong, rtol, atol):
            raise Mistake(name, *explanation)
    target = array(expected)
    value = expect_shape(answer, target.shape, what, axes)
    if value.dtype.kind == "f" and not np.isfinite(value).all() and np.isfinite(target).all():
        bad = int((~np.isfinite(value)).sum())
        raise Mistake(
            "not-finite",
            f"{bad} of {value.size} numbers in {what} are NaN or infinite",
            "look for a division by zero, a log of zero, or a row that is masked everywhere",
        )
    difference = np.abs(value.astype(np.complex128) - target.astype(np.complex128))
    worst = np.unravel_index(np.argmax(difference), value.shape) if value.shape else ()
    place = f" at [{', '.join(map(str, worst))}]" if worst else ""
    raise Mistake(
        "wrong-values", f"expected {target[worst]:.6g}{place} in {what}, found {value[worst]:.6g}"
    )


def normal(*shape: int, seed: int = 0) -> Float[np.ndarray, "..."]:
    """Standard normal numbers in float32, the same on every machine."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Int[np.ndarray, "..."]:
    """Whole numbers from `low` up to and without `high` in int32, the same on every machine."""
    return np.random.default_rng(seed).integers(low, high, shape, dtype=np.int32)


# ------------------------------------------------------------------------------------- how it works


def _judge(function: Callable, answers: tuple, named: dict) -> Result:
    """Run a check and turn whatever happens into a `Result`."""
    learners = (*answers, *named.values())
    try:
        inspect.signature(function).bind(*answers, **named)
    except TypeError as error:
        return Result(
            FAIL, "wrong-type", f"the line that calls the check was changed: {_one_line(error)}"
        )
    try:
        attempted(*learners)
        praise = function(*answers, **named)
        return Result(PASS, None, praise if isinstance(praise, str) else "")
    except NotAttempted:
        pass
    except Mistake as mistake:
        if not (mistake.name in GENERIC and _still_a_stub(learners)):
            # Named mistakes read as words; generic ones say no more than their explanation.
            name = mistake.name.replace("-", " ")
            start = (
                mistake.why if mistake.name in GENERIC else f"this looks like {name}: {mistake.why}"
            )
            text = _tidy(start) + (
                f". Look at this: {_tidy(mistake.look_at)}" if mistake.look_at else ""
            )
            return Result(FAIL, mistake.name, text)
    except LearnerError as raised:
        if not _still_a_stub(learners):
            return Result(
                FAIL, "error", f"your code raised {_one_line(raised.error)}{_place(raised.error)}"
            )
    except (Exception, SystemExit) as error:
        if not _still_a_stub(learners):
            return Result(
                FAIL,
                "error",
                f"the check could not use this answer: {_one_line(error)}{_place(error)}",
            )
    return Result(NOT_ATTEMPTED, None, "Replace each ... with your answer, then run the cell again")


def _still_a_stub(values: tuple) -> bool:
    return any(_has_placeholder(value) for value in values)


def _functions(thing: Any) -> list:
    """The plain Python functions behind a function, method, partial, jitted function, class or
    instance."""
    for _ in range(20):  # unwrapping ends long before this, unless an object wraps itself
        if isinstance(thing, functools.partial):
            thing = thing.func
        elif inspect.ismethod(thing):
            thing = thing.__func__
        elif (
            not isinstance(thing, type)
            and inspect.getattr_static(thing, "__wrapped__", None) is not None
        ) or (
            callable(thing) and not isinstance(thing, type) and hasattr(type(thing), "__wrapped__")
        ):
            thing = thing.__wrapped__
        else:
            break
    if inspect.isfunction(thing):
        return [thing]
    owner = thing if isinstance(thing, type) else type(thing)
    # Only what the notebook defines: a library's classes have placeholders of their own.
    if owner.__module__ != "__main__":
        return []
    return [value for value in vars(owner).values() if inspect.isfunction(value)]


def _is_empty(function: Any) -> bool:
    """Whether a function's body is nothing but `...`, `pass` or a docstring: it loads one constant
    and returns it."""
    quiet = {
        "RESUME",
        "NOP",
        "POP_TOP",
        "RETURN_VALUE",
        "RETURN_CONST",
        "LOAD_CONST",
        "CACHE",
        "COPY_FREE_VARS",
    }
    steps = list(dis.get_instructions(function))
    loads = [step.argval for step in steps if step.opname in ("LOAD_CONST", "RETURN_CONST")]
    return all(step.opname in quiet for step in steps) and all(
        v is None or v is Ellipsis for v in loads
    )


def _has_placeholder(thing: Any) -> bool:
    """Whether the code of a function or class still holds a `...` where an answer belongs.

    `x[..., None]` and `nnx.split(model, nnx.Param, ...)` are ordinary code: only a `...` that
    stands alone, is assigned or is returned counts.
    """
    try:
        for function in _functions(thing):
            if _is_empty(function):
                return True
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
            for node in ast.walk(tree):
                value = getattr(node, "value", None)
                stands = isinstance(node, (ast.Expr, ast.Assign, ast.AnnAssign, ast.Return))
                if stands and isinstance(value, ast.Constant) and value.value is Ellipsis:
                    return True
    except (
        Exception,
        RecursionError,
    ):  # no source to read (typed at a bare prompt): then we cannot tell
        return False
    return False


def _tidy(text: str) -> str:
    return " ".join(str(text).split()).rstrip(".")


def _one_line(error: BaseException) -> str:
    """`TypeError: the message`, on one line and not too long, also when the message itself is
    broken."""
    try:
        text = " ".join(str(error).split())
    except BaseException:
        text = ""
    text = text if len(text) <= 240 else text[:237] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _describe(value: Any) -> str:
    try:
        shown = reprlib.repr(value)
        shown = " ".join(shown.split())
    except BaseException:
        shown = "without a readable form"
    return f"{type(value).__name__} {shown if len(shown) <= 80 else shown[:77] + '...'}"


def _place(error: BaseException) -> str:
    """Where in the learner's own code an error rose: the deepest line that is in no library and not
    in the course."""
    libraries = [
        str(Path(__file__).resolve().parents[1]),
        *sysconfig.get_paths().values(),
        sys.prefix,
    ]
    place, trace = "", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if "site-packages" not in name and not name.startswith(("<frozen", *libraries)):
            line = linecache.getline(name, trace.tb_lineno).strip()
            place = f" (line {trace.tb_lineno}: {line})" if line else f" (line {trace.tb_lineno})"
        trace = trace.tb_next
    return place
