"""`check` prints one line and never raises; the helpers for authors say what they promise."""

import functools
import linecache
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.folders import ROOT
from utils import CourseError
from utils.course import checks
from utils.course.checks import attribute, call, check, exercise, expect, expect_close, expect_shape

# Chapter 98, which there is not, has two exercises: a function of two numbers, and a matrix of ones.


@exercise("98.1")
def divide(learner):
    wrong = (2.0, "this multiplies", "the order of the operations")
    expect_close(call(learner, 4.0, 0.5), 8.0, "the ratio", unlike={"multiplied": wrong})
    return "Both agree"


@exercise("98.2")
def ones(learner):
    expect_close(learner, np.ones((2, 3)), "the mask", axes="[T, S]")


def define(source: str, **names):
    """Define something as a notebook's cell does: in `__main__`, with source that can be read."""
    linecache.cache["<cell>"] = (len(source), None, source.splitlines(True), "<cell>")
    names |= {"__name__": "__main__", "np": np, "jax": jax, "nnx": nnx, "functools": functools}
    exec(compile(source, "<cell>", "exec"), names)
    return names["f"]


STUBS = {
    "empty": "def f(a, b):\n    ...",
    "docstring": 'def f(a, b):\n    """Divide."""',
    "docstring and dots": 'def f(a, b):\n    """Divide."""\n    ...',
    "pass": "def f(a, b):\n    pass",
    "given half": "def f(a, b):\n    c = a + b\n    ...",
    "hole in the middle": "def f(a, b):\n    c = ...\n    return c * 2",
    "returns dots": "def f(a, b):\n    return ...",
    "not implemented": "def f(a, b):\n    raise NotImplementedError",
    "lambda": "f = lambda a, b: ...",
    "jitted": "@jax.jit\ndef f(a, b):\n    c = ...\n    return c + a",
    "nnx jitted": "@nnx.jit\ndef f(a, b):\n    ...",
    "partial": "def g(x, a, b):\n    ...\nf = functools.partial(g, 1)",
    "class": "class f:\n    def __init__(self, a, b):\n        self.c = ...",
    "module": "class f(nnx.Module):\n    def __init__(self, a, b):\n        ...",
    "none": "f = None",
    "dots": "f = ...",
    "tuple": "def f(a, b):\n    return 1, ...",
}


@pytest.mark.parametrize("source", STUBS.values(), ids=STUBS.keys())
def test_a_stub_is_not_attempted(source, capsys):
    result = check("98.1", define(source))
    assert (result.status, result.mistake) == ("not attempted", None)
    assert capsys.readouterr().out == (
        "Exercise 98.1. Not attempted yet. Replace each ... with your answer, then run the cell again.\n"
    )


ANSWERS = {
    "def f(a, b):\n    return a / b": ("pass", None, "Pass. Both agree."),
    "def f(a, b):\n    return jax.numpy.divide(a, b)": ("pass", None, "Pass"),
    "def f(a, b):\n    return np.array([a / b])[..., 0]": ("pass", None, "Pass"),
    "def f(a, b):\n    return a * b": (
        "fail",
        "multiplied",
        "Not right yet. This looks like multiplied: this multiplies. Look at this: the order of",
    ),
    "def f(a, b):\n    c = a / b": ("fail", "returns-nothing", "is a return missing?"),
    "def f(a, b):\n    return a - b": (
        "fail",
        "wrong-values",
        "expected 8 in the ratio, found 3.5",
    ),
    "def f(a, b):\n    return float('nan')": ("fail", "not-finite", "NaN or infinite"),
    "def f(a, b):\n    return np.full((2, 3), 8.0)": ("fail", "wrong-shape", "found (2, 3)"),
    "def f(a, b):\n    return 'eight'": ("fail", "wrong-type", "found str 'eight'"),
    "def f(a, b):\n    return f(a, b)": ("fail", "error", "RecursionError"),
    "def f(a, b):\n    x = 0\n    return a / x": (
        "fail",
        "error",
        "ZeroDivisionError: float division by zero (line 3: return a / x)",
    ),
    "def f(a):\n    return a": ("fail", "error", "TypeError"),
    "def f(a, b):\n    exit(3)": ("fail", "error", "raised"),
    "def f(a, b):\n    raise ValueError('two\\nlines')": ("fail", "error", "ValueError: two lines"),
    "f = 3": ("fail", "wrong-type", "expected a function, found int 3"),
}


@pytest.mark.parametrize("source", ANSWERS)
def test_an_answer_gets_one_line(source, capsys):
    status, mistake, words = ANSWERS[source]
    result = check("98.1", define(source))
    printed = capsys.readouterr().out
    assert (result.status, result.mistake) == (status, mistake)
    assert printed.count("\n") == 1
    assert words.lower() in printed.lower()


class Hostile:
    """Raises whatever is done to it."""

    def _no(self, *args, **kwargs):
        raise RuntimeError("two\nlines")

    __call__ = __array__ = __len__ = __iter__ = __eq__ = __bool__ = __repr__ = __str__ = (
        __float__
    ) = _no
    __getitem__ = __hash__ = _no


class Endless:
    """Every attribute is itself, calling it gives it back."""

    def __getattr__(self, name):
        return self

    def __call__(self, *args):
        return self


class Raises(Exception):
    def __str__(self):
        raise ValueError("no text")


def raises_badly(a, b):
    raise Raises


ODD = [
    Hostile(),
    Endless(),
    Hostile,
    Endless,
    raises_badly,
    object(),
    type,
    1j,
    b"x",
    {},
    set(),
    iter(()),
    np.array([]),
    np.array(["a"]),
    np.array(None),
    jnp.ones((2, 3), jnp.bfloat16),
    [[1], [1, 2]],
    [1, [2, [...]]],
    range(3),
    10**400,
    nnx.Linear(2, 3, rngs=nnx.Rngs(0)),
    jax.ShapeDtypeStruct((2, 3), np.float32),
    jax.random.key(0),
    {"a": ...},
    ...,
]


@pytest.mark.parametrize("number", range(len(ODD)))
@pytest.mark.parametrize("which", ["98.1", "98.2"])
def test_never_raises(number, which, capsys):
    result = check(which, ODD[number])
    assert result.status in ("pass", "not attempted", "fail")
    assert capsys.readouterr().out.count("\n") == 1


simple = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(...)


@settings(max_examples=150, deadline=None)
@given(
    st.recursive(
        simple, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
    )
)
def test_never_raises_on_any_value(value):
    check("98.1", lambda a, b: value)
    check("98.2", value)


def test_a_leaked_tracer_is_a_failed_answer():
    leaked = []
    jax.jit(lambda x: leaked.append(x) or x)(1.0)
    assert check("98.2", leaked[0]).status == "fail"


def test_a_changed_check_line(capsys):
    assert (
        check("98.2").status
        == check("98.2", 1, 2).status
        == check("98.2", other=1).status
        == "fail"
    )
    assert "the line that calls the check was changed" in capsys.readouterr().out.lower()


@pytest.mark.parametrize("name", ["98.9", "97.1", "four", "4", 4.1, None])
def test_an_unknown_exercise_is_an_error(name):
    with pytest.raises(CourseError, match="exercise"):
        check(name, 1)


def test_a_fault_in_a_check_is_reported_not_raised(capsys):
    @exercise("98.3")
    def broken(learner):
        return learner + 1

    assert check("98.3", "text").mistake == "error"
    assert "could not use this answer: TypeError" in capsys.readouterr().out


def test_bfloat16_and_lists_are_numbers():
    assert check("98.2", jnp.ones((2, 3), jnp.bfloat16)).status == "pass"
    assert check("98.2", [[1, 1, 1], [1, 1, 1]]).status == "pass"


def test_two_checks_for_one_exercise_are_refused():
    with pytest.raises(CourseError, match="two checks"):

        @exercise("98.1")
        def another(learner): ...


def test_helpers():
    with pytest.raises(checks.Mistake) as caught:
        expect(False, "upside-down", "it stands on its head")
    assert caught.value.name == "upside-down"
    assert attribute(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), "kernel").shape == (2, 3)
    with pytest.raises(checks.Mistake, match="has no attribute lora_a"):
        attribute(1, "lora_a.kernel")
    with pytest.raises(checks.Mistake, match=r"expected shape \(3,\) \(\[B\]\)"):
        expect_shape(np.ones(2), (3,), "the losses", "[B]")
    np.testing.assert_array_equal(checks.normal(2, 3, seed=1), checks.normal(2, 3, seed=1))
    assert checks.integers(0, 5, 100).max() == 4
    assert not checks.is_close(Hostile(), 1)


def test_a_notebook_shows_the_line_once():
    """The check is a cell's last line: its result must not be shown below what it printed."""
    import nbclient
    import nbformat

    setup = (
        "import os, sys\nsys.path.insert(0, os.environ['COURSE_ROOT'])\n"
        "from utils.course import checks\n@checks.exercise('98.4')\ndef one(learner): ..."
    )
    cells = map(nbformat.v4.new_code_cell, [setup, 'checks.check("98.4", ...)'])
    notebook = nbformat.v4.new_notebook(cells=list(cells))
    environment = os.environ | {"COURSE_ROOT": str(ROOT)}
    nbclient.NotebookClient(notebook, timeout=60).execute(env=environment)
    (output,) = notebook.cells[1].outputs
    assert output.output_type == "stream" and output.text.startswith("Exercise 98.4. Not attempted")
