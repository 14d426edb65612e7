"""What a page hands to its widgets: parses again as JSON, and cannot end its element early."""

import json
import re

import IPython.display
import pytest

from utils import CourseError
from utils.course import plot


@pytest.fixture
def shown(monkeypatch):
    found = []
    monkeypatch.setattr(IPython.display, "display", lambda html: found.append(html.data))
    return found


def test_widget_data(shown, capsys):
    content = {"title": "a </script><b> c", "numbers": [1.5, 2, None]}
    plot.widget_data("rank-slider", "ch05", content)
    text = re.fullmatch(
        r'<script type="application/json" data-rank-slider="ch05">([^<]*)</script>', shown[0]
    )[1]
    assert json.loads(text) == content
    assert capsys.readouterr().out.startswith('recorded numbers for the widget rank-slider "ch05"')


def test_guess_data(shown):
    plot.guess_data("loss", range(1000), range(1000))
    found = json.loads(re.search(r">([^<]*)<", shown[0])[1])
    assert len(found["x"]) == 400 and found["x"][0] == 0 and found["y"][-1] == 999


@pytest.mark.parametrize(
    "action",
    [
        lambda: plot.widget_data("rank slider", "x", {}),
        lambda: plot.widget_data("rank-slider", 'x">', {}),
        lambda: plot.guess_data("x", [1, 2], [1]),
        lambda: plot.guess_data("x", [1], [float("nan")]),
    ],
)
def test_bad_names_and_numbers(action, shown):
    with pytest.raises(CourseError):
        action()
    assert not shown


def test_widget_data_refuses_what_is_not_json(shown):
    with pytest.raises(ValueError):
        plot.widget_data("rank-slider", "x", {"loss": float("nan")})
    assert not shown
