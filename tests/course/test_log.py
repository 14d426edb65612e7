"""What the package logs, a page shows: as plain lines, once, on whatever standard output is."""

import contextlib
import importlib
import io
import logging

import pytest

from utils import course


@pytest.fixture
def logger(monkeypatch):
    """The package's logger, whatever other tests did to it."""
    logger = logging.getLogger("utils")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    return logger


def test_without_a_page_nothing_is_shown(logger, capsys):
    logging.getLogger("utils.hf.hub").info("a source")
    assert capsys.readouterr() == ("", "")


def test_a_page_shows_each_line_once_however_often_it_imports(logger, capsys):
    for _ in range(3):
        importlib.reload(course)
    logging.getLogger("utils.hf.hub").info("stories: mirror")
    logging.getLogger("utils.evaluation.answers").warning("counted as wrong")
    logging.getLogger("utils.train").debug("not for a page")
    assert capsys.readouterr().out == "stories: mirror\ncounted as wrong\n"


def test_lines_go_to_what_standard_output_is_at_that_moment(logger, capsys):
    importlib.reload(course)
    with contextlib.redirect_stdout(io.StringIO()) as cell:
        logging.getLogger("utils.data").info("in the cell")
    assert cell.getvalue() == "in the cell\n" and capsys.readouterr().out == ""
