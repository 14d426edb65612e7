"""Make nbgrader's course folder from the graded assignments (`make assignments`).

    python tools/assignments.py [FOLDER] [--repository ADDRESS] [--revision BRANCH]

An assignment is one MyST file in `book/instructor/assignments/`, written with its solutions and
hidden tests; nbgrader's own cell metadata stand in the cells' options. From each this makes
`FOLDER/source/NAME/NAME.ipynb`, and lets nbgrader make `FOLDER/release/NAME/NAME.ipynb` from that:
what learners get. `FOLDER/nbgrader_config.py` lets nbgrader's commands, called inside the folder,
run submissions with the course's package and without the network. A folder with submissions and
grades in it keeps them. Nothing is released that is not consistent: `problems` says what that
means.
"""

import argparse
import logging
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from nbformat import NotebookNode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools import pairs, sync
from tools.pairs import PairError, Settings

HOME = Path("book/instructor/assignments")
BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
BEGIN_HIDDEN, END_HIDDEN = "### BEGIN HIDDEN TESTS", "### END HIDDEN TESTS"
FIRST_LINE = (
    "# nbgrader's settings for the assignments of this course. Made by tools/assignments.py."
)
CONFIG = """{first}
# Submissions are run by nbgrader, with the course's package, small sizes, no network and no accelerator.
import os

os.environ["PYTHONPATH"] = os.pathsep.join([{root!r}, *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ.update(COURSE_PROFILE="smoke", HF_HUB_OFFLINE="1", JAX_PLATFORMS="cpu")

c = get_config()
c.CourseDirectory.course_id = {course!r}
c.CourseDirectory.root = {folder!r}
c.ExecutePreprocessor.timeout = 120  # seconds for one cell; a loop without end gets no points, and stops nothing else
c.ExecutePreprocessor.interrupt_on_timeout = True
"""


class AssignmentError(Exception):
    """The assignments cannot be made; the message is one line that says what to do."""


@dataclass(frozen=True)
class Grade:
    """What nbgrader found: points per test cell, as (reached, possible)."""

    cells: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def score(self) -> float:
        return sum(reached for reached, _ in self.cells.values())

    @property
    def possible(self) -> float:
        return sum(possible for _, possible in self.cells.values())


# ------------------------------------------------------------------------------------------ reading


def sources(root: Path = pairs.ROOT) -> list[Path]:
    """The assignments of a course, in order. Raises AssignmentError when there are none, as in a
    student edition."""
    paths = sorted((root / HOME).glob("assignment_*.md"))
    if not paths:
        raise AssignmentError(
            f"no assignments in {root / HOME}: a student edition has none, run this in the course"
        )
    return paths


def read(path: Path, address: Settings) -> NotebookNode:
    """An assignment as nbgrader's source notebook, the bootstrap cell of `address` in front. Raises
    AssignmentError."""
    notebook = pairs.read_md(path)
    # Parallel text formats stay with the source: what learners get is a plain notebook.
    notebook.metadata = NotebookNode(
        kernelspec=notebook.metadata["kernelspec"], language_info=dict(pairs.LANGUAGE)
    )
    sync.stamp_notebook(notebook, address)
    faults = problems(notebook)
    if faults:
        raise AssignmentError(f"{path.name}: {faults[0]}")
    for number, cell in enumerate(notebook.cells):
        cell["id"] = (
            f"cell-{number}"  # the same ids each time, or every build would look like a change
        )
    return notebook


def problems(notebook: NotebookNode) -> list[str]:
    """What would be graded wrongly: each fault of the cells' metadata or markers, in one line."""
    faults, seen, open_solution = [], Counter(), None
    for cell in notebook.cells:
        settings = cell.metadata.get("nbgrader")
        marked = [mark for mark in (BEGIN, END, BEGIN_HIDDEN, END_HIDDEN) if mark in cell.source]
        if settings is None:
            faults += [f"{mark!r} in a cell without nbgrader's metadata" for mark in marked]
            continue
        name = settings.get("grade_id", "a cell without grade_id")
        seen[name] += 1
        if settings.get("schema_version") != 3:
            faults.append(
                f"{name}: expected schema_version 3, found {settings.get('schema_version')}"
            )
        if settings.get("solution"):
            if not cell.source.count(BEGIN) == cell.source.count(END) > 0:
                faults.append(
                    f"{name}: expected {BEGIN!r} and {END!r} in pairs: without them the answer is released"
                )
            open_solution = name
        elif BEGIN in cell.source:
            faults.append(f"{name}: holds a solution, but solution is false: it would be released")
        if settings.get("grade"):
            if open_solution is None:
                faults.append(
                    f"{name}: a test before the first solution cell would give its points to everybody"
                )
            if not settings.get("points", 0) > 0:
                faults.append(f"{name}: expected points above 0, found {settings.get('points')}")
            if cell.source.count(BEGIN_HIDDEN) != cell.source.count(END_HIDDEN):
                faults.append(f"{name}: expected {BEGIN_HIDDEN!r} and {END_HIDDEN!r} in pairs")
        elif BEGIN_HIDDEN in cell.source:
            faults.append(f"{name}: holds hidden tests, but grade is false: they would be released")
    faults += [
        f"{name}: this grade_id stands on {n} cells: give each its own"
        for name, n in seen.items()
        if n > 1
    ]
    return faults


def points(notebook: NotebookNode) -> dict[str, float]:
    """Possible points by grade_id."""
    cells = [cell.metadata.get("nbgrader", {}) for cell in notebook.cells]
    return {cell["grade_id"]: cell["points"] for cell in cells if cell.get("grade")}


def secret_lines(root: Path = pairs.ROOT) -> dict[str, str]:
    """Every line of the assignments' solutions and hidden tests that is long enough to know, and
    where it stands."""
    found = {}
    for path in sources(root):
        text = path.read_text(encoding="utf-8")
        for begin, end in ((BEGIN, END), (BEGIN_HIDDEN, END_HIDDEN)):
            for block in re.findall(rf"{begin}\n(.*?){end}", text, flags=re.S):
                found |= {
                    line.strip(): path.name
                    for line in block.splitlines()
                    if len(line.strip()) >= 30
                }
    return found


# ------------------------------------------------------------------------------ nbgrader's own work


def api(folder: Path):
    """nbgrader's Python interface on a folder that `build` made."""
    from nbgrader.apps import NbGraderAPI
    from traitlets.config import Config, PyFileConfigLoader

    logging.getLogger("alembic").setLevel(logging.WARNING)
    # For a new gradebook nbgrader starts the program alembic, which lies beside this Python.
    os.environ["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    )
    config = PyFileConfigLoader("nbgrader_config.py", path=str(folder)).load_config()
    return NbGraderAPI(config=Config(config))


def build(root: Path, folder: Path, address: Settings) -> dict[str, float]:
    """Write and release all assignments; returns their points. Raises AssignmentError, the folder
    unchanged."""
    notebooks = {path.stem: read(path, address) for path in sources(root)}
    folder = folder.resolve()
    config = folder / "nbgrader_config.py"
    ours = config.is_file() and config.read_text(encoding="utf-8").startswith(FIRST_LINE)
    if folder.exists() and any(folder.iterdir()) and not ours:
        raise AssignmentError(
            f"{folder}: is not empty and was not made by this tool: choose another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    settings = dict(
        first=FIRST_LINE, root=str(root.resolve()), course=address.name, folder=str(folder)
    )
    config.write_text(CONFIG.format(**settings), encoding="utf-8")
    interface = api(folder)
    for name, notebook in notebooks.items():
        place = folder / "source" / name / f"{name}.ipynb"
        place.parent.mkdir(parents=True, exist_ok=True)
        pairs.write_ipynb(place, notebook)
        _check(
            interface.generate_assignment(name, force=True, create=True),
            f"{name} could not be released",
        )
    return {name: sum(points(notebook).values()) for name, notebook in notebooks.items()}


def grade(folder: Path, name: str, student: str) -> Grade:
    """Run one submission (`FOLDER/submitted/STUDENT/NAME/`) and return its points, as nbgrader
    keeps them."""
    interface = api(folder)
    _check(
        interface.autograde(name, student, force=True, create=True),
        f"{name} of {student} could not be graded",
    )
    with interface.gradebook as book:
        notebook = book.find_submission_notebook(name, name, student)
        return Grade({one.cell.name: (one.score, one.max_score) for one in notebook.grades})


def _check(result: dict, what: str) -> None:
    if not result["success"]:
        last = (
            (result.get("error") or result.get("log") or "no reason given").strip().splitlines()[-1]
        )
        raise AssignmentError(f"{what}: {last}")


def main(argv: list[str] | None = None) -> int:
    """The command line. Status 0, or 2 with one clear message."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", nargs="?", type=Path, help="nbgrader's course folder (_build/assignments)"
    )
    parser.add_argument(
        "--repository", help="what the notebooks fetch on Colab (the student edition)"
    )
    parser.add_argument("--revision", default="main", help="the branch or tag they fetch (main)")
    parser.add_argument("--root", type=Path, default=pairs.ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    folder = args.folder or args.root / "_build" / "assignments"
    try:
        own = pairs.settings(args.root)
        # Never this repository: the solutions are in it.
        address = replace(
            own, repository=args.repository or own.repository + "-student", revision=args.revision
        )
        if address.repository.rstrip("/").removesuffix(".git") == own.repository:
            raise AssignmentError(
                f"--repository {address.repository}: holds the solutions: give the student edition's"
            )
        totals = build(args.root, folder, address)
    except (AssignmentError, PairError) as error:
        print(f"assignments: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"assignments: {error.filename or folder}: {error.strerror}", file=sys.stderr)
        return 2
    for name, total in totals.items():
        print(
            f"{os.path.relpath(folder / 'release' / name / name)}.ipynb: {total:g} points, for learners"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
