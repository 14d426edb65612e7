"""The first cell of every chapter, run as a learner's: in an empty folder, in its own process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.folders import ROOT, course
from tools import pairs, sync

NAME = pairs.settings().name
CELL = sync.bootstrap_source(pairs.settings())


@pytest.fixture
def repository(tmp_path):
    """A small repository with two releases: v1 (a tag) and the newest state of its branch."""
    root = tmp_path / "repository"
    course(root)
    git(root, "init", "--quiet", "--initial-branch", "main")
    for release in ("v1", "newest"):
        (root / "utils" / "release.py").write_text(f"RELEASE = {release!r}\n")
        git(root, "add", "-A")
        git(root, "commit", "--quiet", "-m", release)
        if release == "v1":
            git(root, "tag", "v1")
    return root


def git(root, *args):
    who = [
        "-c",
        "user.name=Test",
        "-c",
        "user.email=test@example.org",
        "-c",
        "commit.gpgsign=false",
    ]
    subprocess.run(["git", *who, *args], cwd=root, check=True, capture_output=True)


def run(folder, after="", before="", cell=CELL, **env):
    """Run the cell in `folder`; nothing of this repository is on the path."""
    folder.mkdir(exist_ok=True)
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith(("COURSE_", "PYTHONPATH", "KAGGLE"))
    }
    code = "\n".join([before, cell, after])
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=clean | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def one_line(done):
    """The process ended with one clear line and no stack trace."""
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1, (
        done.stderr
    )
    return done.stderr


def test_from_an_empty_folder_it_clones_and_imports(tmp_path, repository):
    after = "import utils.release; print(utils.COURSE, utils.release.RELEASE, utils.__file__)"
    done = run(tmp_path / "empty", after, COURSE_REPOSITORY=str(repository))
    assert done.returncode == 0, done.stderr
    name, release, file = done.stdout.split()
    assert (name, release) == (NAME, "newest")  # a fork's newest state, unless a revision is named
    assert Path(file).is_relative_to(tmp_path / "empty" / NAME)


def test_a_revision_can_be_chosen(tmp_path, repository):
    after = "import utils.release; print(utils.release.RELEASE)"
    env = {"COURSE_REPOSITORY": str(repository), "COURSE_REVISION": "v1"}
    assert run(tmp_path / "empty", after, **env).stdout.split() == ["v1"]


def test_run_twice_it_clones_once(tmp_path, repository):
    first = run(tmp_path / "empty", COURSE_REPOSITORY=str(repository))
    assert first.returncode == 0, first.stderr
    (tmp_path / "empty" / NAME / "mark").touch()
    assert run(tmp_path / "empty", COURSE_REPOSITORY=str(repository)).returncode == 0
    assert (tmp_path / "empty" / NAME / "mark").exists()


def test_a_repository_that_is_not_there(tmp_path):
    message = one_line(run(tmp_path / "empty", COURSE_REPOSITORY=str(tmp_path / "nothing")))
    assert "could not be fetched" in message and "nothing" in message


def test_a_revision_that_is_not_there(tmp_path, repository):
    env = {"COURSE_REPOSITORY": str(repository), "COURSE_REVISION": "v77"}
    assert "v77" in one_line(run(tmp_path / "empty", **env))


def test_on_colab_it_fetches_the_release(tmp_path, repository):
    """Colab is known by its module; the course's own address stands in the cell, so here a folder
    takes its place."""
    settings = pairs.settings()
    cell = CELL.replace(settings.repository, str(repository)).replace(settings.revision, "v1")
    before = "import sys, types; sys.modules['google.colab'] = types.ModuleType('google.colab')"
    done = run(
        tmp_path / "empty", "import utils.release; print(utils.release.RELEASE)", before, cell
    )
    assert done.stdout.split() == ["v1"], done
    done = run(
        tmp_path / "other",
        "import utils.release; print(utils.release.RELEASE)",
        "",
        cell,
        KAGGLE_KERNEL_RUN_TYPE="x",
    )
    assert done.stdout.split() == ["v1"], done


def test_inside_a_copy_of_the_course_nothing_is_fetched(tmp_path, repository):
    done = run(repository / "chapters", "print(root)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(repository)
    assert not list((repository / "chapters").glob(f"{NAME}*"))


def test_elsewhere_without_the_course(tmp_path):
    assert "was not found" in one_line(run(tmp_path / "empty"))


def test_a_foreign_utils_earlier_on_the_path_is_passed_over(tmp_path, repository):
    foreign = tmp_path / "foreign" / "utils"
    foreign.mkdir(parents=True)
    (foreign / "__init__.py").write_text("x = 1\n")
    done = run(repository / "chapters", "print(utils.COURSE)", PYTHONPATH=str(foreign.parent))
    assert done.stdout.split() == [NAME], done
    (repository / "chapters" / "utils.py").write_text("x = 1\n")  # and one beside the notebook
    done = run(repository / "chapters", "print(utils.COURSE)")
    assert done.stdout.split() == [NAME], done


def test_a_foreign_utils_already_imported_is_named(tmp_path, repository):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "utils.py").write_text("x = 1\n")
    message = one_line(
        run(repository / "chapters", "", "import utils", PYTHONPATH=str(tmp_path / "foreign"))
    )
    assert "Another package named utils" in message and "restart" in message


def test_every_chapter_holds_the_same_cell():
    for stem in pairs.chapters(ROOT):
        assert stem.with_suffix(".ipynb").exists(), f"{stem.name}: run `make sync`"
        for nb in (
            pairs.read_md(stem.with_suffix(".md")),
            pairs.read_ipynb(stem.with_suffix(".ipynb")),
        ):
            first = next(c for c in nb.cells if c.cell_type == "code")
            assert first.source == CELL, f"{stem.name}: run `make sync`"
