"""Every exercise: the stub is not attempted, the solution passes, wrong answers are named.

`pytest tests/course/test_exercises.py -k 4.1` tries one exercise. The second half of the file tests
the harness on a chapter in miniature.
"""

import pytest

from tests.helpers import exercises, synthetic
from utils.course import checks


def _answers():
    for path in exercises.pages():
        page = exercises.read_page(path)
        wrong = exercises.wrong_answers(page.chapter)
        marks = pytest.mark.chapter(page.chapter)
        for one in page.exercises:
            answers = [("stub", "stub", ("not attempted", None))]
            answers += [
                (f"wrong {i}", mistake, ("fail", mistake))
                for i, (mistake, _) in enumerate(wrong.get(one.id, []))
            ]
            answers += [("solution", "solution", ("pass", None))]
            for which, name, expected in answers:
                yield pytest.param(
                    path, one.id, which, expected, id=f"{one.id}-{name}", marks=marks
                )


@pytest.mark.parametrize("path, exercise, which, expected", list(_answers()))
def test_exercise(path, exercise, which, expected):
    report = exercises.run_page(path)
    answer = report.answers.get(exercise, {}).get(which)
    if answer is None:
        errors = [cell["error"] for cell in report.cells if cell["error"]]
        pytest.fail(f"never reached: {errors[0] if errors else report.end}")
    assert (answer["status"], answer["mistake"]) == expected, answer["message"]


@pytest.mark.parametrize("path", exercises.params())
def test_answers_are_complete(path):
    page = exercises.read_page(path)
    assert _incomplete(page, exercises.wrong_answers(page.chapter), checks.ids(page.chapter)) == []


def _incomplete(page, wrong, known) -> list[str]:
    """What is missing from a chapter's answers: one solution, a check, two different wrong answers
    for each exercise."""
    missing = []
    for one in page.exercises:
        if len(one.solutions) != 1:
            missing.append(
                f"{one.id}: expected one python block in the solution, found {len(one.solutions)}"
            )
        if any("check(" in solution for solution in one.solutions):
            missing.append(f"{one.id}: the solution calls the check, which the stub does already")
        names = {mistake for mistake, _ in wrong.get(one.id, [])} - set(checks.GENERIC)
        if len(names) < 2:
            missing.append(
                f"{one.id}: expected two wrong answers with own names, found {sorted(names)}"
            )
    ids = {one.id for one in page.exercises}
    missing += [f"{one}: has a check and is not on the page" for one in known if one not in ids]
    missing += [f"{one}: is on the page and has no check" for one in ids if one not in known]
    missing += [
        f"{one}: has wrong answers and is not on the page" for one in wrong if one not in ids
    ]
    return missing


# ------------------------------------------------------------------ the harness, on a small chapter


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    path = synthetic.write(folder)
    return exercises.read_page(path), exercises.run_answers(path, synthetic.WRONG, folder)


def test_harness_reads_the_exercises(small):
    page, _ = small
    first, second = page.exercises
    assert (first.id, first.level, first.minutes) == ("99.1", "warm-up", 5)
    assert first.stub.endswith('check("99.1", bits)') and "ln 2" in first.hint
    assert len(first.solutions) == 1 and "shrunk_by_ln_two" in first.solutions[0]
    assert (second.id, second.level, second.minutes) == ("99.2", "core", 10)
    assert _incomplete(page, synthetic.WRONG, ["99.1", "99.2"]) == []


def test_harness_tells_the_answers_apart(small):
    _, report = small
    assert report.end == "complete" and not any(cell["error"] for cell in report.cells)
    results = {
        (one, which): (result["status"], result["mistake"])
        for one, answers in report.answers.items()
        for which, result in answers.items()
    }
    assert results == {
        ("99.1", "stub"): ("not attempted", None),
        ("99.1", "wrong 0"): ("fail", "nats-not-bits"),
        ("99.1", "wrong 1"): ("fail", "multiplied"),
        ("99.1", "solution"): ("pass", None),
        ("99.2", "stub"): ("not attempted", None),
        ("99.2", "wrong 0"): ("fail", "every-pair"),
        ("99.2", "wrong 1"): ("fail", "own-position-left-out"),
        ("99.2", "solution"): ("pass", None),
    }


def test_harness_sees_figures(small):
    _, report = small
    assert [(cell["figures"], cell["alt"]) for cell in report.cells if cell["figures"]] == [
        (1, "A line that rises.")
    ]


def test_harness_notices_what_is_wrong(tmp_path):
    """A solution that fails, an answer that cannot run, and a cell that needs the answer to an
    exercise."""
    chapter = synthetic.CHAPTER.replace("nats / np.log(2)", "nats * 2").replace(
        "range(4)", "range(undefined)"
    )
    path = synthetic.write(tmp_path, chapter.replace("bits(1.0) is None", "bits(1.0) > 1"))
    report = exercises.run_answers(path, {"99.1": [("multiplied", "def bits(nats:")]}, tmp_path)
    assert report.answers["99.1"]["solution"]["mistake"] == "wrong-values"
    assert report.answers["99.1"]["wrong 0"]["status"] == "raised"
    assert "SyntaxError" in report.answers["99.1"]["wrong 0"]["message"]
    assert "NameError" in report.answers["99.2"]["solution"]["message"]
    assert "TypeError" in report.cells[-1]["error"]


def test_harness_survives_a_chapter_that_kills_its_process(tmp_path):
    chapter = synthetic.CHAPTER.replace("print(1 + 1)", "import os; os._exit(3)")
    report = exercises.run_answers(synthetic.write(tmp_path, chapter), {}, tmp_path)
    assert report.end.startswith("status 3") and report.answers == {}


@pytest.mark.parametrize(
    "old, new, complaint",
    [
        (":tags: [bootstrap]", ":tags: [other]", "bootstrap"),
        (", core, 10 minutes.", ", hard, 10 minutes.", "difficulty 'hard'"),
        (", core, 10 minutes.", ". ", "expected it to begin"),
        ("<summary>Hint</summary>\n\nPos", "<summary>Help</summary>\n\nPos", "99.2: no hint"),
        ('check("99.2", pairs)', 'check("99.1", pairs)', "another exercise's check"),
        (
            'check("99.2", pairs)',
            'done = check("99.2", pairs)',
            "the last line of its cell must be check",
        ),
        (":tags: [hide-output]", ":tags: [other]", "shows its output at once"),
        ("# A small chapter", "# A small chapter", "expected 4 exercises, found 2"),
        ("# A small chapter", "# A small chapter", "no quiz"),
    ],
)
def test_structure_complaints(tmp_path, old, new, complaint):
    assert old in synthetic.CHAPTER
    page = exercises.read_page(synthetic.write(tmp_path, synthetic.CHAPTER.replace(old, new)))
    assert any(complaint in problem for problem in exercises.problems_of(page)), (
        exercises.problems_of(page)
    )
