"""No check computes what its exercise asks for: the student edition ships the checks without the solutions.

Code is compared without its names: each one that is not Python's own becomes its number in the
order of first use, docstrings and annotations are dropped. So a solution is recognised in a check
however its variables are called there, and whether it uses np or jnp. And a right value is not
calculated from what the learner's function is given: it is a number, or what a library's or the
package's own function gives.
"""

import ast
import builtins
import copy
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import exercises
from utils.course import checks

LARGE = 12  # syntax nodes: an expression with more of them is no coincidence
RUN = 3  # statements in a row

PLANTED = '''
def learning_rate_of_the_check(at, top, climb, total, low):
    """The rate, to compare with."""
    if at < climb:
        return top * at / climb
    share = (at - climb) / (total - climb)
    down = (1 + jnp.cos(jnp.pi * share)) / 2
    return top * (low + (1 - low) * down)
'''


class _Anonymous(ast.NodeTransformer):
    """Replaces names by their number in the order of first use; drops annotations."""

    def __init__(self):
        self.numbers: dict[str, str] = {}

    def number(self, name: str) -> str:
        if hasattr(builtins, name):
            return name
        return self.numbers.setdefault(name, f"name{len(self.numbers)}")

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(self.number(node.id), node.ctx)

    def visit_arg(self, node: ast.arg) -> ast.arg:
        return ast.arg(self.number(node.arg))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.name, node.returns = self.number(node.name), None
        node.body = _without_docstring(node.body)
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        return self.visit(ast.Assign([node.target], node.value)) if node.value else ast.Pass()


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0] if body else None
    is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return body[1:] if is_text and isinstance(first.value.value, str) else body


def _anonymous(*nodes: ast.AST) -> str:
    rename = _Anonymous()
    return "\n".join(ast.dump(rename.visit(copy.deepcopy(node))) for node in nodes)


def fragments(code: str) -> Iterator[tuple[str, str, int]]:
    """(kind and normal form, the code as it stands there, line) of all that is compared: bodies of
    functions, runs of statements, large expressions."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef):
            body = _without_docstring(node.body)
            yield "body " + _anonymous(*body), ast.unparse(node), node.lineno
        elif isinstance(node, ast.Lambda):
            yield "body " + _anonymous(ast.Return(node.body)), ast.unparse(node), node.lineno
        for block in (getattr(node, field, None) for field in ("body", "orelse", "finalbody")):
            for i in range(len(block) - RUN + 1 if isinstance(block, list) else 0):
                run = _without_docstring(block[i : i + RUN])
                if len(run) == RUN and not any(
                    isinstance(s, ast.Import | ast.ImportFrom) for s in run
                ):
                    yield "run " + _anonymous(*run), "\n".join(map(ast.unparse, run)), run[0].lineno
        if (
            isinstance(node, ast.expr)
            and sum(1 for _ in ast.walk(node)) > LARGE
            and _computes(node)
        ):
            yield "expression " + _anonymous(node), ast.unparse(node), node.lineno


def _computes(expression: ast.expr) -> bool:
    """Whether an expression says how to get a value. Text, numbers, names, one call do not."""
    if isinstance(expression, ast.JoinedStr):
        return False
    kinds = [type(node) for node in ast.walk(expression)]
    return kinds.count(ast.Call) > 1 or any(
        k in kinds for k in (ast.BinOp, ast.Compare, ast.Subscript)
    )


def solutions() -> Iterator[tuple[str, str]]:
    """(exercise, code) of each exercise's solution, as its chapter has it."""
    for path in exercises.pages():
        for exercise in exercises.read_page(path).exercises:
            for code in exercise.solutions:
                yield exercise.id, code


def held(code: str, answers: list[tuple[str, str]]) -> list[str]:
    """What of these solutions stands in this code: a line for each fragment."""
    known = {form: exercise for exercise, answer in answers for form, _, _ in fragments(answer)}
    return [
        f"line {line}: {text} (exercise {known[form]})"
        for form, text, line in fragments(code)
        if form in known
    ]


PRODUCTS = ("dot", "einsum", "inner", "matmul", "outer", "tensordot")


def calculated(check: ast.FunctionDef) -> list[str]:
    """Right values, second arguments of `expect_close` and `is_close`, with arithmetic on what the
    check gives to the learner's function: a line for each."""
    learners = {arg.arg for arg in check.args.args}
    given, values = set(), {}
    for node in ast.walk(check):
        if isinstance(node, ast.Call):
            names = [arg.id for arg in node.args if isinstance(arg, ast.Name)]
            if isinstance(node.func, ast.Name) and {node.func.id, *names[:1]} & learners:
                functions = {n.func for n in ast.walk(node) if isinstance(n, ast.Call)}
                parts = {n for n in ast.walk(node) if isinstance(n, ast.Name)} - functions
                given |= {n.id for n in parts}
        elif isinstance(node, ast.FunctionDef) and node is not check:
            values.setdefault(node.name, []).extend(node.body)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple):
                    apart = isinstance(node.value, ast.Tuple) and len(node.value.elts) == len(
                        target.elts
                    )
                    pairs = zip(
                        target.elts, node.value.elts if apart else [node.value] * len(target.elts)
                    )
                for one, value in pairs:
                    if isinstance(one, ast.Name):
                        values.setdefault(one.id, []).append(value)
    given -= learners

    def reads(node: ast.AST, seen: frozenset) -> bool:
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} - seen
        return bool(names & given) or any(
            reads(value, seen | names) for name in names for value in values.get(name, ())
        )

    def computes(node: ast.AST, seen: frozenset) -> bool:
        for part in ast.walk(node):
            product = isinstance(part, ast.Call) and getattr(part.func, "attr", "") in PRODUCTS
            if (product or isinstance(part, ast.BinOp)) and reads(part, frozenset()):
                return True
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} - seen - given
        return any(
            computes(value, seen | names) for name in names for value in values.get(name, ())
        )

    return [
        f"line {node.lineno}: {ast.unparse(node.args[1])}"
        for node in ast.walk(check)
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") in ("expect_close", "is_close")
        if computes(node.args[1], frozenset())
    ]


CHECKS = sorted(Path(checks.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", CHECKS, ids=lambda path: path.stem)
def test_a_check_holds_no_solution(path):
    answers = list(solutions())
    assert len(answers) > 60
    assert held(path.read_text(), answers) == []


@pytest.mark.parametrize("path", CHECKS, ids=lambda path: path.stem)
def test_right_values_are_not_calculated_from_the_arguments(path):
    tree = ast.parse(path.read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert [line for f in functions if f.decorator_list for line in calculated(f)] == []


def test_a_planted_solution_is_found():
    """Exercise 4.2's, under other names, as a function, and its last statements alone."""
    source = (CHECKS[0].parent / "chapter_04.py").read_text()
    answers = list(solutions())
    assert any("exercise 4.2" in line for line in held(source + PLANTED, answers))
    lines = [line.removeprefix("    ") for line in PLANTED.splitlines()[3:]]
    body = "\n".join(line for line in lines if not line.strip().startswith("return"))
    tail = body.replace("if at < climb:", "total = 7") + "\nprint(top * (low + (1 - low) * down))\n"
    assert any("exercise 4.2" in line for line in held(source + tail, answers))
    assert held("def f(x):\n    return x + 1\n", answers) == []


@pytest.mark.parametrize(
    "right, is_calculated",
    [
        ("[2, 4]", False),
        ("library(x)", False),
        ("2 * x", True),
        ("base + 3 * y", True),
        ("jnp.dot(x, x)", True),
    ],
)
def test_a_calculated_value_is_found(right, is_calculated):
    code = (
        f"def check(learner):\n    base, y = 7, 2 * x\n    expect_close(call(learner, x), {right})"
    )
    assert bool(calculated(ast.parse(code).body[0])) == is_calculated
