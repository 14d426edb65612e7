"""Chapters are run for real and recorded; what fails leaves the notebook as it was."""

import nbformat
import pytest

from tests.helpers.folders import course
from tools import execute, pairs, provenance


def page(*cells):
    """A page of these code cells; a cell may begin with its `:tags:` line."""
    fences = "\n".join(f"```{{code-cell}} ipython3\n{cell}\n```\n" for cell in cells)
    header = "---\njupytext:\n  formats: ipynb,md:myst\nkernelspec: {display_name: Python 3, name: python3}\n---"
    return f"{header}\n\n# A\n\n{fences}"


def run(tmp_path, *cells, flags=()):
    """Execute a page of these cells. Returns (status, its code cells after the bootstrap, the
    notebook)."""
    stem = tmp_path / "chapters" / "01_page"
    if not stem.with_suffix(".md").exists():
        course(tmp_path, page(*cells))
    status = execute.main(["--root", str(tmp_path), *flags])
    nb = nbformat.read(stem.with_suffix(".ipynb"), as_version=4)
    return status, [c for c in nb.cells if c.cell_type == "code"][1:], nb


def text(cell):
    return "".join(o.get("text", "") for o in cell.outputs)


def test_outputs_and_provenance_are_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COURSE_PROFILE", "smoke")
    (tmp_path / "utils" / "hf").mkdir(parents=True)
    source = 'SOURCES_USED = []\ndef used():\n    SOURCES_USED.append(("stories", "built in"))\n'
    (tmp_path / "utils" / "hf" / "hub.py").write_text(source)
    (tmp_path / "utils").rename(tmp_path / "aside")
    course(
        tmp_path,
        page(
            "import os\nfrom utils.hf import hub\nhub.used()\nprint(os.environ['COURSE_PROFILE'], os.listdir())",
            ':mystnb: {image: {alt: "A line."}}\nimport matplotlib.pyplot as plt\nplt.plot([1, 2]); plt.show()',
            "open('left.txt', 'w').write('x'); 6 * 7",
        ),
    )
    (tmp_path / "aside" / "hf").rename(tmp_path / "utils" / "hf")
    status, cells, nb = run(tmp_path)
    assert status == 0, capsys.readouterr().err
    assert text(cells[0]) == "smoke []\n"  # an empty folder of its own
    assert any("image/png" in o.get("data", {}) for o in cells[1].outputs)
    assert cells[2].outputs[0].data["text/plain"] == "42"
    assert not list(tmp_path.rglob("left.txt"))
    record = nb.metadata.course.provenance
    assert record.profile == "smoke" and record.sources == ["stories: built in"]
    assert record.code == pairs.code_hash(nb) and 0 < record.seconds < 120
    assert record.device and record.python and record.date
    assert record.utils == provenance.module_hashes(["utils", "utils.hf.hub"], tmp_path)
    assert "01_page" in capsys.readouterr().out
    assert all("hub.py" not in str(c.source) and "_facts" not in c.source for c in nb.cells)

    assert provenance.changed_modules(record, tmp_path) == []
    (tmp_path / "utils" / "hf" / "hub.py").write_text(source + "# more\n")
    assert provenance.changed_modules(record, tmp_path) == ["utils.hf.hub"]

    # The same chapter on another device is recorded beside the outputs shown, not in their place.
    before = [c.outputs for c in nb.cells if c.cell_type == "code"]
    monkeypatch.setenv("COURSE_PROFILE", "large")
    status, _, nb = run(tmp_path, flags=["--timing-only"])
    assert status == 0
    assert [c.outputs for c in nb.cells if c.cell_type == "code"] == before
    assert nb.metadata.course.provenance == record
    assert [r.profile for r in nb.metadata.course.runs] == ["large"]


def test_progress_bars_and_colours_are_cleaned(tmp_path, capsys):
    status, cells, _ = run(
        tmp_path,
        "import sys, time\nfrom tqdm import tqdm\nfor i in tqdm(range(3), desc='steps'):\n    time.sleep(.15)",
        "print('\\x1b[31mred\\x1b[0m'); print('10%\\r50%\\rdone')",
    )
    assert status == 0, capsys.readouterr().err
    assert text(cells[0]).count("steps:") == 1 and "100%" in text(cells[0])
    assert text(cells[1]) == "red\ndone\n"


@pytest.mark.parametrize(
    "cell, words",
    [
        ("import warnings\nwarnings.warn('beware of this')", "beware of this"),
        ("import os\nprint('saved to', os.getcwd())", "a path of this machine"),
        ("import os\nos.path.expanduser('~') + '/x'", "a path of this machine"),
        ("print('/home/someone/course')", "/home/someone"),
        ("object()", "address in memory"),
        ("raise ValueError('wrong shape\\nand more')", "ValueError: wrong shape"),
        ("import os\nos._exit(1)", "kernel died"),
    ],
)
def test_what_cannot_be_shown_is_refused_and_nothing_is_written(tmp_path, capsys, cell, words):
    course(tmp_path, page("print(1)", cell))
    stem = tmp_path / "chapters" / "01_page"
    from tools import sync

    assert sync.main(["--root", str(tmp_path)]) == 0
    before = stem.with_suffix(".ipynb").read_bytes()
    capsys.readouterr()
    assert execute.main(["--root", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert words in err and "cell 4" in err and "01_page" in err
    assert "Traceback" not in err
    assert stem.with_suffix(".ipynb").read_bytes() == before


def test_a_cell_that_hangs_is_named(tmp_path, capsys):
    status, _, _ = run(tmp_path, "import time\ntime.sleep(60)", flags=["--timeout", "2"])
    assert status == 1
    assert "--timeout" in capsys.readouterr().err


def test_a_cell_may_be_meant_to_fail_or_to_warn(tmp_path, capsys):
    status, cells, _ = run(
        tmp_path,
        ":tags: [raises-exception]\n1 / 0",
        ":tags: [allow-stderr]\nimport sys\nprint('a warning to talk about', file=sys.stderr)",
    )
    assert status == 0, capsys.readouterr().err
    assert cells[0].outputs[0].traceback == ["ZeroDivisionError: division by zero"]
    assert "talk about" in text(cells[1])


def test_a_failure_in_one_chapter_does_not_stop_the_next(tmp_path, capsys):
    course(tmp_path, page("1 / 0"))
    (tmp_path / "chapters" / "02_next.md").write_text(page("print('fine')"))
    assert execute.main(["--root", str(tmp_path)]) == 1
    nb = nbformat.read(tmp_path / "chapters" / "02_next.ipynb", as_version=4)
    assert "provenance" in nb.metadata.course
    out = capsys.readouterr().out
    assert "failed" in out and "02_next" in out


def test_a_chapter_edited_while_it_runs_is_not_recorded(tmp_path, capsys, monkeypatch):
    stem = course(tmp_path, page("print(1)"))
    really = execute.run

    def run_and_edit(*args):
        record = really(*args)
        path = stem.with_suffix(".md")
        path.write_text(path.read_text().replace("print(1)", "print(2)"))
        return record

    monkeypatch.setattr(execute, "run", run_and_edit)
    assert execute.main(["--root", str(tmp_path)]) == 1
    assert "edited while it ran" in capsys.readouterr().err
    nb = pairs.read_ipynb(stem.with_suffix(".ipynb"))
    assert "provenance" not in nb.metadata.course


def test_final_state_of_a_terminal():
    assert execute.final_state("a\rb\rc") == "c"
    assert execute.final_state("a\r\nb\n") == "a\nb\n"
    assert execute.final_state("  0%|  | 0/3\r100%|██| 3/3\n") == "100%|██| 3/3\n"
    assert execute.final_state("\x1b[1mbold\x1b[0m") == "bold"
