"""The student edition holds no line of a solution, and the search that says so finds one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_output

from tests.helpers import exercises, synthetic
from tools import pairs, student, sync

ROOT = pairs.ROOT
OWN = "https://github.com/some-school/lora-course"


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course in miniature, with everything that an edition must treat."""
    root = tmp_path_factory.mktemp("course")
    files = {
        "pyproject.toml": (ROOT / "pyproject.toml").read_text(),
        "README.md": "# The course\n\nTeachers: see [the notes](book/instructor/notes.md).\n",
        "_toc.yml": "format: jb-book\nroot: book/intro\nparts:\n"
        "- caption: Part\n  chapters:\n  - file: chapters/99_small\n"
        "- caption: Teach\n  chapters:\n  - file: book/instructor/notes\n",
        "_config.yml": 'title: "Course"\nauthor: us\nonly_build_toc_files: true\n'
        'execute:\n  execute_notebooks: "off"\nexclude_patterns: ["chapters/*.md"]\n'
        'repository:\n  url: "x"\n  branch: "y"\n',
        "book/intro.md": '# Welcome\n\n[Teach](instructor/notes.md), <a href="instructor/notes.html">teach</a>.\n',
        "book/instructor/notes.md": "# Notes\n\nEveryone forgets ln 2.\n",
        "utils/__init__.py": 'COURSE = "lora-in-jax"\n',
        "utils/course/checks/__init__.py": "",
        "utils/course/checks/chapter_99.py": synthetic.CHECKS,
        "tests/course/wrong_answers/chapter_99.py": f"WRONG = {synthetic.WRONG!r}\n",
        "tests/course/test_exercises.py": "",
        "tests/models/test_lora.py": "",
        "chapters/99_small.md": synthetic.CHAPTER,
        "_build/html/old.html": "shrunk_by_ln_two = nats / np.log(2)",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    stem = root / "chapters" / "99_small"
    sync.sync_pair(stem, pairs.settings(root))
    notebook = pairs.read_ipynb(stem.with_suffix(".ipynb"))
    for cell in notebook.cells:
        if pairs.has_tag(cell, "hide-output"):
            cell.outputs = [new_output("stream", name="stdout", text="2\n")]
    notebook.metadata["course"]["recorded"] = {"device": "cpu"}
    pairs.write_ipynb(stem.with_suffix(".ipynb"), notebook)
    return root


@pytest.fixture
def edition(course, tmp_path):
    folder = tmp_path / "edition"
    student.make(course, folder, OWN)
    return folder


def test_secrets_are_the_lines_of_solutions(course):
    lines = {one.line for one in student.secrets(course)}
    assert "shrunk_by_ln_two = nats / np.log(2)" in lines
    assert "A bit is smaller than a nat, so there are more of them." in lines
    assert not any("def bits" in line for line in lines)
    assert student.names(student.secrets(course), course) == {"shrunk_by_ln_two"}


def test_edition_has_no_answers(course, edition):
    assert student.leaks(edition, student.secrets(course)) == []
    text = (edition / "chapters" / "99_small.md").read_text()
    page = exercises.read_page(edition / "chapters" / "99_small.md")
    assert "<summary>Solution" not in text and text.count("Your instructor has the solution") == 2
    assert [(one.id, bool(one.hint), one.solutions) for one in page.exercises] == [
        ("99.1", True, []),
        ("99.2", True, []),
    ]
    assert "The chapter goes on with the stub." in text
    left_out = [
        "tests/course/wrong_answers",
        "tests/course/test_exercises.py",
        "book/instructor",
        "_build",
    ]
    assert not [name for name in left_out if (edition / name).exists()]
    kept = [
        "tests/models/test_lora.py",
        "utils/course/checks/chapter_99.py",
        "_config.yml",
        "README.md",
    ]
    assert all((edition / name).exists() for name in kept)


def test_pairs_agree_and_recorded_outputs_stay(edition):
    stem = edition / "chapters" / "99_small"
    notebook = pairs.read_ipynb(stem.with_suffix(".ipynb"))
    assert pairs.content_hash(notebook) == pairs.content_hash(
        pairs.read_md(stem.with_suffix(".md"))
    )
    assert [cell.outputs[0].text for cell in notebook.cells if cell.get("outputs")] == ["2\n"]
    assert notebook.metadata["course"]["recorded"] == {"device": "cpu"}
    assert sync.sync_pair(stem, pairs.settings(edition), write=False) == ""


def test_edition_has_its_own_address(edition):
    settings = pairs.settings(edition)
    assert (settings.repository, settings.revision) == (OWN, "main")
    assert settings.website == "https://some-school.github.io/lora-course"
    for suffix in (".md", ".ipynb"):
        text = (edition / "chapters" / f"99_small{suffix}").read_text()
        assert OWN in text and "github.com/lora-in-jax" not in text
    config = yaml.safe_load((edition / "_config.yml").read_text())
    assert config["repository"] == {"url": OWN, "branch": "main"}


def test_instructor_pages_are_not_linked(edition):
    toc = yaml.safe_load((edition / "_toc.yml").read_text())
    assert toc["parts"] == [{"caption": "Part", "chapters": [{"file": "chapters/99_small"}]}]
    assert (edition / "book" / "intro.md").read_text() == "# Welcome\n\nTeach, teach.\n"
    assert "instructor/" not in (edition / "README.md").read_text()


def test_a_missing_repository_gets_a_name_of_its_own(course, tmp_path):
    student.make(course, tmp_path / "edition")
    here, there = pairs.settings(course), pairs.settings(tmp_path / "edition")
    assert there.repository == here.repository + "-student"


# ------------------------------------------------------------------------------------------ the search


LINE = "shrunk_by_ln_two = nats / np.log(2)"
LEAKS = {
    "page": ("chapters/99_small.md", f"```python\n    {LINE}\n```"),
    "prose": ("README.md", "A bit is smaller than a nat, so\nthere are more of them."),
    "notebook": ("chapters/99_small.ipynb", json.dumps({"source": ["x\n", f"    {LINE}\n"]})),
    "escaped": ("book/_static/answers.js", json.dumps({"code": f'print("a")\n{LINE}'})),
    "site source": ("_build/html/_sources/99_small.md.txt", LINE),
    "highlighted": (
        "_build/html/99_small.html",
        '<pre><span class="n">shrunk_by_ln_two</span> <span class="o">=</span> <span>nats</span>'
        '<span> / </span><span>np</span><span>.</span>log(<span class="mi">2</span>)</pre>',
    ),
    "check": ("utils/course/checks/chapter_99.py", LINE),
    "bytes": ("book/_static/blob.bin", "\0\0" + LINE),
}


@pytest.mark.parametrize("name, text", LEAKS.values(), ids=LEAKS.keys())
def test_a_leak_is_found(course, edition, name, text):
    secrets = student.secrets(course)
    assert student.leaks(edition, secrets) == []
    path = edition / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write("\n" + text)
    leaks = student.leaks(edition, secrets)
    assert len(leaks) == 1 and leaks[0].startswith(f"{name}: a solution of 99_small")


def test_a_leak_in_the_search_index_is_found(course, edition):
    secrets = student.secrets(course)
    words = student.names(secrets, course)
    (edition / "searchindex.js").write_text('Search.setIndex({"terms": {"shrunk_by_ln_tw": [1]}})')
    assert student.leaks(edition, secrets) == []
    assert student.leaks(edition, secrets, words) == ["searchindex.js: shrunk_by_ln_two"]


def test_an_edition_that_would_leak_is_not_written(course, tmp_path):
    root = tmp_path / "course"
    shutil.copytree(course, root)
    (root / "utils" / "course" / "checks" / "chapter_99.py").write_text(f"# {LINE}\n")
    with pytest.raises(student.StudentError, match="utils/course/checks/chapter_99.py: a solution"):
        student.make(root, tmp_path / "edition", OWN)
    assert not (tmp_path / "edition").exists()


# ------------------------------------------------------------------------------- where it may be written


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_earlier_edition_is_brought_up_to_date(course, edition):
    (edition / ".git").mkdir()
    (edition / ".git" / "HEAD").write_text("ref")
    (edition / "own_notes.md").write_text("added by the teacher")
    (edition / "README.md").write_text("changed")
    marker = json.loads((edition / student.MARKER).read_text())
    (edition / "gone.md").write_text("was part of the last edition")
    marker["files"].append("gone.md")
    (edition / student.MARKER).write_text(json.dumps(marker))
    student.make(course, edition, OWN)
    assert (edition / ".git" / "HEAD").exists() and (edition / "own_notes.md").exists()
    assert "student edition" in (edition / "README.md").read_text()
    assert not (edition / "gone.md").exists()
    once = tree(edition)
    student.make(course, edition, OWN)
    assert tree(edition) == once


@pytest.mark.parametrize(
    "case", ["other files", "broken marker", "marker points outside", "a file"]
)
def test_other_folders_are_refused(course, tmp_path, case, capsys):
    folder = tmp_path / "mine"
    (tmp_path / "precious").write_text("x")
    if case == "a file":
        folder.write_text("x")
    else:
        folder.mkdir()
        (folder / "thesis.txt").write_text("years of work")
    if case == "broken marker":
        (folder / student.MARKER).write_text("{")
    if case == "marker points outside":
        (folder / student.MARKER).write_text(json.dumps({"files": ["../precious"]}))
    before = tree(tmp_path)
    assert student.main([str(folder), "--root", str(course)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("student: ") and message.count("\n") == 1
    assert tree(tmp_path) == before


def test_the_course_itself_is_refused(course):
    for folder in (course, course.parent):
        with pytest.raises(student.StudentError, match="course itself"):
            student.make(course, folder, OWN)


@pytest.mark.parametrize("ending", ["", "/", ".git"])
def test_an_address_with_solutions_is_refused(course, tmp_path, ending):
    with pytest.raises(student.StudentError, match="holds the solutions"):
        student.make(course, tmp_path / "edition", pairs.settings(course).repository + ending)


def test_an_edition_of_an_edition_is_refused(edition, tmp_path):
    with pytest.raises(student.StudentError, match="already"):
        student.make(edition, tmp_path / "again", OWN)


# ------------------------------------------------------------------------------------- the real course


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    assert exercises.pages(), "there are no chapters to make an edition of"
    folder = tmp_path_factory.mktemp("real") / "edition"
    student.make(ROOT, folder)
    return folder


def test_the_real_edition_has_no_answers(real):
    secrets = student.secrets(ROOT)
    assert {one.chapter for one in secrets} == {path.stem for path in exercises.pages()}
    assert student.leaks(real, secrets) == []
    for path in real.glob("chapters/*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        assert not any("<summary>Solution" in cell.source for cell in notebook.cells)


@pytest.mark.slow
def test_the_real_edition_is_consistent(real):
    """Its own `make sync` has nothing to do, and its chapters can be collected by its own tests."""
    environment = os.environ | {"PYTHONPATH": str(real)}
    for command in (["tools/sync.py", "--check"], ["-m", "pytest", "--collect-only", "-q"]):
        done = subprocess.run(
            [sys.executable, *command], cwd=real, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_the_real_editions_site_has_no_answers(real):
    """Pages, copied sources and search index of the built site."""
    jupyter_book = str(Path(sys.executable).with_name("jupyter-book"))
    book = [jupyter_book, "build", ".", "--warningiserror", "--keep-going"]
    environment = os.environ | {"PYTHONPATH": str(real)}
    done = subprocess.run(book, cwd=real, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    secrets = student.secrets(ROOT)
    site = real / "_build" / "html"
    assert (site / "searchindex.js").exists()
    assert student.leaks(site, secrets, student.names(secrets, ROOT)) == []
    page = next(site.glob("chapters/*.html"))
    page.write_text(page.read_text() + f"<p>{secrets[0].line}</p>")
    assert student.leaks(site, secrets) != []
