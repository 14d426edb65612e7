"""Every chapter has its parts and runs from top to bottom, as it is, in profile smoke.

The loss bands a page prints are asserted by its own cells, so a run that leaves its band fails
here.
"""

import pytest

from tests.helpers import exercises


def test_there_are_chapters():
    assert exercises.pages(), "chapters/ holds no page: every test below would run on nothing"


@pytest.fixture(params=exercises.params())
def path(request):
    return request.param


def test_has_all_its_parts(path):
    problems = exercises.problems_of(exercises.read_page(path))
    assert not problems, f"{path.name}:\n" + "\n".join(problems)


def test_runs_from_top_to_bottom(path):
    report = exercises.run_page(path)
    failed = [cell for cell in report.cells if cell["error"]]
    assert not failed, (
        f"{path.name}, cell {failed[0]['number']}:\n{failed[0]['source']}\n\n{failed[0]['error']}"
    )
    assert report.end == "complete", f"{path.name}: {report.end}"
    assert len(report.cells) == len(exercises.read_page(path).code)


def test_figures_have_alt_text(path):
    bare = [
        cell
        for cell in exercises.run_page(path).cells
        if cell["figures"] and not (cell["alt"] or "").strip()
    ]
    assert not bare, f"{path.name}: these cells draw and have no alt text:\n" + "\n".join(
        cell["source"].splitlines()[0] for cell in bare
    )
