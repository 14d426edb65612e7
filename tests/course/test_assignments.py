"""The graded assignments, as nbgrader sees them: what is released, and how many points an answer gets.

A perfect submission of each goes through nbgrader itself, kernel and all, and one with mistakes and
edited tests; an empty one through its command line. Everything else is run in this process, cell by
cell, which is the same but for the kernel.
"""

import contextlib
import io
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pytest

from tests.helpers.assignment_answers import WRONG
from tools import assignments, pairs, student
from utils.evaluation.intervals import newcombe

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")  # nbgrader's own

ROOT = pairs.ROOT
STUDENT_EDITION = replace(
    pairs.settings(ROOT), repository="https://example.org/school/course", revision="main"
)
NAMES = [path.stem for path in assignments.sources(ROOT)]
POINTS = {"assignment_1": 20, "assignment_2": 20, "assignment_3": 100, "assignment_4": 100}
# One mistake in several parts; the first of each list in tests/helpers/assignment_answers.py but
# for the numbers given.
MIXED = {
    "assignment_1": {"best_pair": 2, "masked_loss": 0, "attention": 0, "make_step": 0},
    "assignment_2": {"rank_for": 0, "gradients": 1, "swapped": 1, "adapt": 0},
    "assignment_3": {
        "header": 0,
        "config_of": 0,
        "split_qkv": 0,
        "convert": 1,
        "first_difference": 1,
    },
    "assignment_4": {
        "conversation": 2,
        "accumulate": 0,
        "setting": 1,
        "message": 1,
        "judged": 0,
    },
}


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course folder as `make assignments` makes it. nbgrader's settings set the environment: it
    is put back."""
    import huggingface_hub.constants  # noqa: F401, it reads HF_HUB_OFFLINE when imported

    before = dict(os.environ)
    folder = tmp_path_factory.mktemp("nbgrader") / "course"
    os.environ["JUPYTER_CONFIG_DIR"] = str(
        folder.parent / "config"
    )  # not the user's own nbgrader settings
    totals = assignments.build(ROOT, folder, STUDENT_EDITION)
    assert list(totals) == NAMES
    yield folder
    os.environ.clear()
    os.environ.update(before)


def source(name: str) -> nbformat.NotebookNode:
    path = ROOT / assignments.HOME / f"{name}.md"
    return assignments.read(path, STUDENT_EDITION)


def released(course: Path, name: str) -> nbformat.NotebookNode:
    return nbformat.read(course / "release" / name / f"{name}.ipynb", as_version=4)


def solved(cell_source: str) -> str:
    return re.sub(r"(?m)^ *### (BEGIN|END) SOLUTION\n?", "", cell_source)


def answers(name: str) -> dict[str, str]:
    """The right answers by grade_id."""
    cells = [
        cell for cell in source(name).cells if cell.metadata.get("nbgrader", {}).get("solution")
    ]
    return {cell.metadata.nbgrader.grade_id: solved(cell.source) for cell in cells}


def wrong_answer(name: str, part: str, code: str | tuple[str, str]) -> str:
    """The code, or the right answer with one edit (old, new)."""
    if isinstance(code, str):
        return code
    right = answers(name)[part]
    assert right.count(code[0]) == 1, f"{part}: {code[0]!r} does not stand there once"
    return right.replace(*code)


def submit(course: Path, name: str, who: str, given: dict[str, str]) -> None:
    """Hand in what was released, with some of the solution cells filled in."""
    notebook = released(course, name)
    for cell in notebook.cells:
        cell.source = given.get(cell.metadata.get("nbgrader", {}).get("grade_id"), cell.source)
    place = course / "submitted" / who / name / f"{name}.ipynb"
    place.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, place)


# -------------------------------------------------------------------------------------- the release


@pytest.mark.parametrize("name", NAMES)
def test_points_and_no_answer_in_the_release(course, name):
    notebook = released(course, name)
    assert (
        sum(assignments.points(source(name)).values())
        == sum(assignments.points(notebook).values())
        == POINTS[name]
    )
    text = nbformat.writes(notebook)
    assert "BEGIN SOLUTION" not in text and "BEGIN HIDDEN" not in text
    code = "\n".join(cell.source for cell in notebook.cells)
    left = [line for line in assignments.secret_lines(ROOT) if line in code]
    assert not left, left
    assert STUDENT_EDITION.repository in code and pairs.settings(ROOT).repository + '"' not in code
    stubs = [cell for cell in notebook.cells if cell.metadata.get("nbgrader", {}).get("solution")]
    assert stubs and all("raise NotImplementedError()" in cell.source for cell in stubs)


def test_the_student_edition_holds_no_assignment():
    """Neither the sources, nor the tests with their wrong answers, nor a line of either anywhere
    else."""
    kept = list(student.course_files(ROOT))
    assert not [path for path in kept if "instructor" in path.parts or "assignment_" in path.name]
    secrets = assignments.secret_lines(ROOT)
    public = "".join(
        p.read_text()
        for folder in ("chapters", "utils", "benchmarks")
        for p in (ROOT / folder).rglob("*.[mp][dy]")
    )
    for path in kept:
        if path.suffix in (".md", ".py", ".ipynb", ".txt", ".yml"):
            text = (ROOT / path).read_text()
            leaks = [line for line in secrets if line in text and line not in public]
            assert len(leaks) < 3, (path, leaks)  # one line or two may be the same by chance


# -------------------------------------------------------------------------------- nbgrader's points


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_perfect_submission(course, name):
    """Every point, by nbgrader itself: a warning on stderr, for one, would cost a cell."""
    submit(course, name, "perfect", answers(name))
    begun = time.monotonic()
    perfect = assignments.grade(course, name, "perfect")
    assert (perfect.score, perfect.possible) == (POINTS[name], POINTS[name]), perfect.cells
    print(f"{name}: graded in {time.monotonic() - begun:.1f} s")


@pytest.mark.slow
def test_a_submission_with_mistakes_and_edited_tests(course):
    """Each mistake costs its points and no more, a cell that cannot run costs its part, edited
    tests are put back."""
    name = "assignment_1"
    given, lost = mixed(name)
    notebook = released(course, name)
    tests = [
        c.metadata.nbgrader.grade_id
        for c in notebook.cells
        if "points" in c.metadata.get("nbgrader", {})
    ]
    given |= dict.fromkeys(tests, "assert True")
    given["momentum"] = (
        "import no_such_module\n\ndef momentum(*everything):\n    return everything[:2]"
    )
    lost |= {"momentum_one": 1, "momentum_two": 1, "momentum_pure": 1}
    submit(course, name, "wrong", given)
    grade = assignments.grade(course, name, "wrong")
    assert {cell: most - got for cell, (got, most) in grade.cells.items() if got < most} == lost
    assert grade.score == POINTS[name] - sum(lost.values())


# ------------------------------------------------------------------- every mistake, in this process


def mixed(name: str) -> tuple[dict[str, str], dict[str, float]]:
    """The right answers but for a mistake in several parts, and the points lost by test cell."""
    given, lost = answers(name), {}
    for part, number in MIXED[name].items():
        _, code, costs = WRONG[name][part][number]
        given[part] = wrong_answer(name, part, code)
        lost |= costs
    return given, lost


def score(name: str, given: dict[str, str], only: str | None = None) -> dict[str, float]:
    """Points lost by test cell. `only` runs one part: its solution cell and the tests after it, and
    what all are given."""
    namespace, lost, part = {"__name__": "__main__"}, {}, None
    with contextlib.redirect_stdout(io.StringIO()):
        for cell in source(name).cells:
            about = cell.metadata.get("nbgrader", {})
            if cell.cell_type != "code" or not about:
                continue  # the bootstrap cell: the package is here already
            if about.get("solution"):
                part = about["grade_id"]
            if only not in (None, part) and (about.get("solution") or about.get("grade")):
                continue
            try:
                exec(
                    compile(given.get(about["grade_id"], cell.source), about["grade_id"], "exec"),
                    namespace,
                )
            except Exception as error:
                assert about.get("grade"), f"{about['grade_id']}: {error!r}"
                lost[about["grade_id"]] = about["points"]
    return lost


MISTAKES = [
    (name, part, *one)
    for name, parts in WRONG.items()
    for part, those in parts.items()
    for one in those
]


@pytest.mark.parametrize(
    "name, part, what, code, costs", MISTAKES, ids=[f"{m[1]}: {m[2]}" for m in MISTAKES]
)
def test_each_mistake_costs_its_points(name, part, what, code, costs):
    assert score(name, answers(name) | {part: wrong_answer(name, part, code)}, only=part) == costs


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_submission_has_no_points(course, name):
    stubs = [
        cell
        for cell in released(course, name).cells
        if cell.metadata.get("nbgrader", {}).get("solution")
    ]
    lost = score(name, {cell.metadata.nbgrader.grade_id: cell.source for cell in stubs})
    assert lost == assignments.points(source(name))


@pytest.mark.parametrize("name", NAMES[1:])  # the first goes through nbgrader itself, above
def test_mistakes_in_several_parts(name):
    given, lost = mixed(name)
    assert score(name, given) == lost


@pytest.mark.parametrize("name", NAMES)
def test_the_right_answers_cost_nothing(name):
    assert score(name, answers(name)) == {}
    assert set(WRONG[name]) == set(answers(name))


# ----------------------------------------------------------------------------------------- the tool


PAGE = """---
kernelspec: {display_name: Python 3, name: python3}
---

```{code-cell} ipython3
:nbgrader: {schema_version: 3, grade_id: f, grade: false, solution: true, locked: false, task: false}
def f():
    ### BEGIN SOLUTION
    return 1
    ### END SOLUTION
```

```{code-cell} ipython3
:nbgrader: {schema_version: 3, grade_id: f_test, grade: true, solution: false, locked: true, task: false, points: 1}
assert f() == 1
```
"""
FAULTS = {
    "a solution that is not marked": (
        "    ### BEGIN SOLUTION\n",
        "",
        "without them the answer is released",
    ),
    "an id twice": ("grade_id: f_test", "grade_id: f", "stands on 2 cells"),
    "no points": (", points: 1", "", "expected points above 0"),
    "hidden tests that are not closed": ("assert", "### BEGIN HIDDEN TESTS\nassert", "in pairs"),
    "a solution in a cell of tests": (
        "assert",
        "### BEGIN SOLUTION\nassert",
        "it would be released",
    ),
    "an old schema": ("schema_version: 3", "schema_version: 1", "expected schema_version 3"),
    "no metadata": (
        ":nbgrader: {schema_version: 3, grade_id: f, ",
        ":other: {",
        "without nbgrader's metadata",
    ),
}


@pytest.fixture
def small(tmp_path):
    root = tmp_path / "root"
    (root / assignments.HOME).mkdir(parents=True)
    (root / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    (root / assignments.HOME / "assignment_1.md").write_text(PAGE)
    return root


@pytest.mark.parametrize("old, new, expected", FAULTS.values(), ids=FAULTS.keys())
def test_faults_are_named_and_nothing_is_written(small, tmp_path, capsys, old, new, expected):
    path = small / assignments.HOME / "assignment_1.md"
    assert old in PAGE
    path.write_text(PAGE.replace(old, new))
    assert assignments.main([str(tmp_path / "out"), "--root", str(small)]) == 2
    message = capsys.readouterr().err
    assert (
        message.startswith("assignments: assignment_1.md: ")
        and expected in message
        and message.count("\n") == 1
    )
    assert not (tmp_path / "out").exists()


def test_refusals(small, tmp_path, capsys):
    """A folder of somebody else's, this repository's own address, and a student edition."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    own = pairs.settings(ROOT).repository
    cases = [
        ([str(folder), "--root", str(small)], "was not made by this tool"),
        ([str(tmp_path / "out"), "--root", str(small), "--repository", own], "holds the solutions"),
        ([str(tmp_path / "out"), "--root", str(tmp_path)], "pyproject.toml"),
    ]
    for arguments, expected in cases:
        assert assignments.main(arguments) == 2
        message = capsys.readouterr().err
        assert (
            message.startswith("assignments: ") and expected in message and message.count("\n") == 1
        )
    (small / assignments.HOME / "assignment_1.md").unlink()
    assert assignments.main([str(tmp_path / "out"), "--root", str(small)]) == 2
    assert "a student edition has none" in capsys.readouterr().err
    assert [p.name for p in folder.iterdir()] == ["thesis.txt"] and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_commands_of_the_instructors_page(course):
    """Those that the page on grading names, as they are written there, inside the course folder."""
    page = (ROOT / "book" / "instructor" / "grading.md").read_text()
    block = re.search(r"<!-- tested -->\n\n```bash\n(.*?)```", page, flags=re.S)[1]
    submit(course, "assignment_2", "ada", {})
    commands = [line for line in block.splitlines() if line.startswith("nbgrader")]
    assert len(commands) >= 3
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    }
    for command in commands:
        done = subprocess.run(
            command, shell=True, cwd=course, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}{done.stderr[-2000:]}"
    rows = (course / "grades.csv").read_text().splitlines()
    head, *rows = [row.split(",") for row in rows]
    (ada,) = (dict(zip(head, row)) for row in rows if "ada" in row and "assignment_2" in row)
    assert (float(ada["score"]), float(ada["max_score"])) == (0, 20)
    assert list((course / "feedback" / "ada").rglob("*.html"))


# ---------------------------------------------------------------------------------------- the pages


def test_the_quiz_is_whole_and_its_numbers_are_right():
    page = (ROOT / "book" / "instructor" / "diagnostic_quiz.md").read_text()
    questions = re.split(r"(?m)^\*\*\d+\.\*\* ", page)[1:]
    assert len(questions) == 12
    for question in questions:
        assert all(f"{letter}. " in question for letter in "ABCD"), question[:60]
        assert len(re.findall(r"<summary>Answer</summary>\n\n\*\*[ABCD]\b", question)) == 1, (
            question[:60]
        )
    assert np.broadcast_shapes((4, 1, 3), (5, 3)) == (4, 5, 3)
    assert f"{2048 * 128 / 1e6:.2f} to {50_257 * 128 / 1e6:.1f} million" in page
    assert f"= {np.log(2048):.2f}$" in page and f"2,048 is\n{np.log10(2048):.1f}" in page
    assert next(r for r in range(1, 257) if 512 * r >= 65_536) == 128


def test_the_capstones_numbers_are_right():
    page = " ".join((ROOT / "book" / "instructor" / "capstone.md").read_text().split())

    def points(problems: int, both: int, gained: int, lost: int) -> list[str]:
        """Difference and interval in points, as the page writes them."""
        kinds = [(1, 1)] * both + [(0, 1)] * gained + [(1, 0)] * lost
        base, adapter = np.array(kinds + [(0, 0)] * (problems - len(kinds)), bool).T
        numbers = adapter.mean() - base.mean(), *newcombe(base, adapter)
        return [f"{100 * number:.1f}".replace("-", "−") for number in numbers]

    gain, low, high = points(400, 168, 80, 26)
    assert f"{gain} points more, 95% interval {low} to {high}, paired (80 gained, 26 lost)" in page
    assert f"{gain} points has an interval from {low} to {high} on 400" in page
    assert "from {1} to {2} on 200".format(*points(200, 84, 40, 13)) in page
    assert (
        "8 gained and 3 lost are {} points, with an interval from {} to {}".format(
            *points(40, 17, 8, 3)
        )
        in page
    )
    rubric = page.split("## Rubric")[1]
    assert len(re.findall(r"\| \*\*\w", rubric)) * 4 == 40 and "40 points" in page


def test_the_notes_name_mistakes_that_the_checks_know():
    page = (ROOT / "book" / "instructor" / "teaching_notes.md").read_text()
    sections = re.split(r"(?m)^## (?=\d\d · )", page)[1:]
    assert [section[:2] for section in sections] == sorted(
        p.name[:2] for p in (ROOT / "chapters").glob("*.md")
    )
    for section in sections:
        answers = (
            ROOT / "tests" / "course" / "wrong_answers" / f"chapter_{section[:2]}.py"
        ).read_text()
        for name in re.findall(r"`([a-z]+(?:-[a-z0-9]+)+)`", section):
            assert f'"{name}"' in answers, f"chapter {section[:2]}: {name}"


@pytest.mark.parametrize("name", NAMES)
def test_the_grading_page_names_the_points(name):
    page = (ROOT / "book" / "instructor" / "grading.md").read_text()
    number = name.split("_")[1]
    table = re.search(rf"## Assignment {number}\n.*?(?=\n## )", page, flags=re.S)[0]
    rows = [int(n) for n in re.findall(r"(?m)^\| [^|]+ \| (\d+) \|", table)]
    titles = re.findall(
        r"## Part \d+ · .*\((\d+) points\)", (ROOT / assignments.HOME / f"{name}.md").read_text()
    )
    assert rows == [int(n) for n in titles] and sum(rows) == POINTS[name]
