"""Reads a chapter as the tests need it, and runs it as a learner would.

`read_page(path)` finds the cells and the exercises of a chapter's `.md`. `run_page(path)` executes
its code cells from top to bottom in one process of their own: profile smoke, an empty folder, no
display. At each exercise it runs the stub as printed, then each wrong answer, then the solution,
and notes what the check said; after each it puts the stub's names back, because a learner who
presses "Run all" goes on with the stubs.

By hand: `python -m tests.helpers.exercises chapters/04_training.md` prints what went wrong, and
what each check said.
"""

import ast
import contextlib
import functools
import importlib
import io
import json
import linecache
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers.folders import COMPILE_CACHE, ROOT

LEVELS = ("warm-up", "core", "stretch")
TIME_LIMIT = 300  # seconds for a chapter with all its answers, after which something hangs

_EXERCISE = re.compile(r"^> \*\*Exercise (\d+\.\d+)\*\*, ([\w-]+), (\d+) minutes?\.", re.M)
_DETAILS = re.compile(r"<details[^>]*>\s*<summary>(.*?)</summary>(.*?)</details>", re.S)
_PYTHON = re.compile(r"^```python\n(.*?)^```\s*$", re.S | re.M)


@dataclass
class Cell:
    """A cell of the page. `kind` is "code" or "markdown"."""

    number: int
    kind: str
    source: str
    tags: list[str]
    alt: str | None


@dataclass
class Exercise:
    """An exercise of the page. `solutions` holds every python block of its solution; there should
    be one."""

    id: str
    level: str
    minutes: int
    cell: int | None = None
    stub: str = ""
    hint: str = ""
    solution_text: str = ""
    solutions: list[str] = field(default_factory=list)


@dataclass
class Page:
    """A chapter: its cells and exercises, in order."""

    path: Path
    cells: list[Cell]
    exercises: list[Exercise]

    @property
    def chapter(self) -> int:
        return int(self.path.name[:2])

    @property
    def code(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.kind == "code"]

    @property
    def text(self) -> str:
        return "\n\n".join(cell.source for cell in self.cells if cell.kind == "markdown")


def mirror() -> dict[str, str]:
    """The setting for a mirror beside the repository, {} where there is none: then chapters use
    what is built in.

    A COURSE_MIRROR that is set wins, also an empty one, which asks for the built-in data.
    """
    beside = ROOT.parent / "shared" / "mirror"
    there = "COURSE_MIRROR" not in os.environ and (beside / "manifest.json").is_file()
    return {"COURSE_MIRROR": str(beside)} if there else {}


def pages() -> list[Path]:
    """The chapters of the course, in order."""
    return sorted((ROOT / "chapters").glob("[0-9][0-9]_*.md"))


def params() -> list:
    """The chapters as a test's parameters, marked with the chapter's number (tests/conftest.py says
    what for)."""
    import pytest

    return [
        pytest.param(path, id=path.stem, marks=pytest.mark.chapter(int(path.name[:2])))
        for path in pages()
    ]


@functools.lru_cache
def read_page(path: Path) -> Page:
    """Parse a chapter's `.md`."""
    import jupytext  # here, because collecting other tests should not wait for it

    notebook = jupytext.read(path, fmt="md:myst")
    cells = []
    for number, cell in enumerate(notebook.cells):
        image = cell.metadata.get("mystnb", {}).get("image", {})
        kind = "code" if cell.cell_type == "code" else "markdown"
        cells.append(
            Cell(number, kind, cell.source, list(cell.metadata.get("tags", [])), image.get("alt"))
        )
    return Page(Path(path), cells, _find_exercises(cells))


def _find_exercises(cells: list[Cell]) -> list[Exercise]:
    exercises = []
    for cell in cells:
        if (
            cell.kind == "code"
            and "exercise" in cell.tags
            and exercises
            and exercises[-1].cell is None
        ):
            exercises[-1].cell, exercises[-1].stub = cell.number, cell.source
        if cell.kind != "markdown":
            continue
        # A markdown cell may end one exercise (hint, solution) and begin the next one.
        marks = [(match.start(), match) for match in _EXERCISE.finditer(cell.source)]
        blocks = [(match.start(), match) for match in _DETAILS.finditer(cell.source)]
        for _, match in sorted(marks + blocks, key=lambda pair: pair[0]):
            if match.re is _EXERCISE:
                exercises.append(Exercise(match[1], match[2], int(match[3])))
            elif exercises and exercises[-1].cell is not None:
                if match[1].startswith("Hint"):
                    exercises[-1].hint += match[2].strip()
                elif match[1].startswith("Solution"):
                    exercises[-1].solution_text += match[2].strip()
                    exercises[-1].solutions += _PYTHON.findall(match[2])
    return exercises


def problems_of(page: Page) -> list[str]:
    """What a chapter must have and this page lacks; the exercises' answers are looked at elsewhere."""
    problems, text = [], page.text

    def need(condition: bool, message: str) -> None:
        if not condition:
            problems.append(message)

    need(
        bool(page.code) and "bootstrap" in page.code[0].tags,
        "the first code cell is not the bootstrap",
    )
    need(sum("bootstrap" in cell.tags for cell in page.code) == 1, "expected one bootstrap cell")
    least = 3 if page.chapter < 5 else 4
    need(len(page.exercises) >= least, f"expected {least} exercises, found {len(page.exercises)}")
    named = re.findall(r"\*\*Exercise (\d+\.\d+)", text)
    known = [exercise.id for exercise in page.exercises]
    for one in sorted(set(named) - set(known)):
        problems.append(
            f"exercise {one}: expected it to begin '> **Exercise {one}**, core, 10 minutes.'"
        )
    need(len(set(known)) == len(known), f"two exercises have the same number: {known}")
    stubs = [cell for cell in page.code if "exercise" in cell.tags]
    need(
        len(stubs) == len(known),
        f"{len(stubs)} cells are tagged exercise, {len(known)} exercises are announced",
    )
    for exercise in page.exercises:
        start = f"exercise {exercise.id}: "
        need(
            exercise.id.split(".")[0] == str(page.chapter), start + f"is in chapter {page.chapter}"
        )
        need(
            exercise.level in LEVELS,
            start + f"difficulty {exercise.level!r} is not one of {', '.join(LEVELS)}",
        )
        need(exercise.cell is not None, start + "no cell tagged exercise follows it")
        need(bool(exercise.hint), start + "no hint")
        try:
            call = split_stub(exercise)[1]
            need(
                ast.literal_eval(call.args[0]) == exercise.id,
                start + "its cell calls another exercise's check",
            )
        except ValueError as error:
            problems.append(str(error))

    predictions = [
        cell for cell in page.cells if cell.kind == "markdown" and "> **Predict.**" in cell.source
    ]
    number = sum(cell.source.count("> **Predict.**") for cell in predictions)
    need(number >= 3, f"expected 3 predictions, found {number}")
    for cell in predictions:
        after = next((code for code in page.code if code.number > cell.number), None)
        line = cell.source[cell.source.index("> **Predict.**") :].splitlines()[0][:60]
        need(
            after is not None and "hide-output" in after.tags,
            f"the cell after {line!r} shows its output at once",
        )
    need("> **You should see" in text, "no 'You should see'")
    need("> **Remember" in text, "no 'Remember'")
    need(bool(re.search(r"^(#+ |> \*\*)Go further", text, re.M)), "no 'Go further'")
    need(bool(re.search(r"^(#+ .*|> \*\*)[Qq]uiz", text, re.M)), "no quiz")
    return problems


def split_stub(exercise: Exercise) -> tuple[ast.Module, ast.Call]:
    """The definitions of a stub, and the call of its check, which must be the last statement."""
    tree = ast.parse(exercise.stub or "...")
    last = tree.body[-1]
    is_check = (
        isinstance(last, ast.Expr)
        and isinstance(last.value, ast.Call)
        and isinstance(last.value.func, ast.Name)
        and last.value.func.id == "check"
    )
    if not is_check:
        raise ValueError(
            f'exercise {exercise.id}: the last line of its cell must be check("{exercise.id}", …)'
        )
    return ast.Module(tree.body[:-1], tree.type_ignores), last.value


@functools.lru_cache
def wrong_answers(chapter: int) -> dict[str, list[tuple[str, str]]]:
    """The wrong answers kept for a chapter's exercises: {id: [(mistake, code), …]}."""
    name = f"tests.course.wrong_answers.chapter_{chapter:02d}"
    try:
        return importlib.import_module(name).WRONG
    except ModuleNotFoundError as error:
        if error.name not in (name, "tests.course.wrong_answers"):
            raise
        return {}


# ----------------------------------------------------------------------------------- running a page


@dataclass
class Report:
    """What happened: one dict a cell, and for each exercise's answers what the check said.

    `answers[id]` maps "stub", "solution" and each wrong answer's "wrong 0", "wrong 1" … to status,
    mistake, message.
    """

    cells: list[dict]
    answers: dict[str, dict[str, dict]]
    end: str  # "complete", or why it stopped

    @property
    def seconds(self) -> float:
        """Time of the page's own cells: the smaller of wall clock and CPU time, which a busy
        machine disturbs least."""
        return min(
            sum(cell["seconds"] for cell in self.cells),
            sum(cell["cpu_seconds"] for cell in self.cells),
        )


@functools.lru_cache
def run_page(path: Path) -> Report:
    """Run a chapter in a process of its own, once however many tests ask."""
    return run_answers(path, wrong_answers(read_page(path).chapter))


def run_answers(
    path: Path, wrong: dict[str, list[tuple[str, str]]], extra_path: Path | None = None
) -> Report:
    """Run a chapter with these wrong answers. `extra_path` goes in front of `sys.path` (for the
    harness's own tests)."""
    with tempfile.TemporaryDirectory(prefix="chapter-") as folder:
        folder = Path(folder)
        (folder / "empty").mkdir()
        (folder / "wrong.json").write_text(json.dumps(wrong))
        paths = [str(part) for part in (extra_path, ROOT) if part] + [
            os.environ.get("PYTHONPATH", "")
        ]
        settings = {
            "COURSE_PROFILE": "smoke",
            # At these sizes a chapter compiles for longer than it computes.
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "MPLBACKEND": "agg",
            "HF_HUB_OFFLINE": "1",  # the mirror where there is one, else the built-in data
            "PYTHONPATH": os.pathsep.join(part for part in paths if part),
            "PYTHONUNBUFFERED": "1",
        }
        command = [
            sys.executable,
            "-m",
            "tests.helpers.exercises",
            "--events",
            str(folder),
            str(Path(path).resolve()),
        ]
        try:
            done = subprocess.run(
                command,
                cwd=folder / "empty",
                env=COMPILE_CACHE | os.environ | mirror() | settings,
                timeout=TIME_LIMIT,
                capture_output=True,
                text=True,
            )
            end = (
                "complete"
                if done.returncode == 0
                else f"status {done.returncode}: {done.stderr[-2000:]}"
            )
        except subprocess.TimeoutExpired:
            end = f"stopped after {TIME_LIMIT} s"
        log = folder / "events.jsonl"
        events = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    cells = [event for event in events if event["kind"] == "cell"]
    answers: dict[str, dict[str, dict]] = {}
    for event in events:
        if event["kind"] == "answer":
            answers.setdefault(event["exercise"], {})[event["which"]] = event
    return Report(cells, answers, end)


def _run_here(path: Path, wrong: dict[str, list], note) -> None:
    """The child's work: run every cell in a fresh `__main__`, as a notebook's kernel has it."""
    page = read_page(path)
    exercises = {exercise.cell: exercise for exercise in page.exercises}
    main = type(sys)("__main__")
    sys.modules["__main__"] = main
    names = main.__dict__
    with contextlib.suppress(ImportError):
        from IPython.display import display

        names["display"] = display
    from matplotlib import pyplot

    for cell in page.code:
        start, cpu = time.perf_counter(), time.process_time()
        exercise = exercises.get(cell.number)
        output = io.StringIO()
        error = figures = None
        result = None
        with contextlib.redirect_stdout(output):
            try:
                if exercise is None:
                    _execute(cell.source, f"<cell {cell.number}>", names)
                else:
                    result = _answer(exercise, None, f"<exercise {exercise.id}>", names)
            except BaseException:
                error = traceback.format_exc(limit=-6) + output.getvalue()[-500:]
            figures = len(pyplot.get_fignums())
            pyplot.close("all")
        note(
            kind="cell",
            number=cell.number,
            source=cell.source[:300],
            error=error,
            figures=figures,
            alt=cell.alt,
            seconds=time.perf_counter() - start,
            cpu_seconds=time.process_time() - cpu,
        )
        if error is not None:
            return
        if exercise is None:
            continue
        note(kind="answer", exercise=exercise.id, which="stub", **result)
        answers = [(f"wrong {i}", code) for i, (_, code) in enumerate(wrong.get(exercise.id, []))]
        answers += [("solution", exercise.solutions[0])] if exercise.solutions else []
        stub_state = dict(names)
        for which, code in answers:
            with contextlib.redirect_stdout(output):
                try:
                    result = _answer(exercise, code, f"<exercise {exercise.id} {which}>", names)
                except BaseException:  # the answer does not even run as a cell
                    result = {
                        "status": "raised",
                        "mistake": None,
                        "message": traceback.format_exc(limit=-3),
                    }
                pyplot.close("all")
            names.clear()
            names.update(stub_state)
            note(kind="answer", exercise=exercise.id, which=which, **result)


def _execute(source: str | ast.Module, filename: str, names: dict) -> None:
    if isinstance(source, str):  # so that inspect.getsource works, as it does in a notebook
        linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    exec(compile(source, filename, "exec"), names)


def _answer(exercise: Exercise, code: str | None, filename: str, names: dict) -> dict:
    """Run the stub's definitions, over them the answer's, then the check. Returns its result as a
    dict."""
    definitions, call = split_stub(exercise)
    stub_file = f"<exercise {exercise.id}>"
    linecache.cache[stub_file] = (
        len(exercise.stub),
        None,
        exercise.stub.splitlines(True),
        stub_file,
    )
    _execute(definitions, stub_file, names)
    if code is not None:
        _execute(code, filename, names)
    result = eval(compile(ast.fix_missing_locations(ast.Expression(call)), filename, "eval"), names)
    return {"status": result.status, "mistake": result.mistake, "message": result.message}


def _main(arguments: list[str]) -> int:
    if arguments[:1] == ["--events"]:
        folder, path = Path(arguments[1]), Path(arguments[2])
        wrong = json.loads((folder / "wrong.json").read_text())
        with open(folder / "events.jsonl", "w") as log:

            def note(**event) -> None:
                log.write(json.dumps(event) + "\n")
                log.flush()

            _run_here(path, wrong, note)
        return 0
    failed = 0
    for name in arguments:
        page = read_page(Path(name))
        report = run_page(Path(name))
        for message in problems_of(page):
            print("page:", message)
            failed += 1
        for cell in report.cells:
            if cell["error"]:
                print(f"cell {cell['number']}: {cell['error']}\n{cell['source']}")
                failed += 1
            if cell["figures"] and not cell["alt"]:
                print(f"cell {cell['number']} draws and has no alt text: {cell['source'][:60]!r}")
                failed += 1
        for exercise in page.exercises:
            wrong = wrong_answers(page.chapter).get(exercise.id, [])
            answers_given = report.answers.get(exercise.id, {})
            expected = {"stub": ("not attempted", None), "solution": ("pass", None)}
            expected |= {f"wrong {i}": ("fail", mistake) for i, (mistake, _) in enumerate(wrong)}
            for which, (status, mistake) in expected.items():
                answer = answers_given.get(
                    which, {"status": "never reached", "mistake": None, "message": ""}
                )
                good = (answer["status"], answer["mistake"]) == (status, mistake)
                failed += not good
                shown = " ".join(str(answer[key] or "") for key in ("status", "mistake", "message"))
                print(f"{'ok ' if good else 'BAD'} {exercise.id} {which}: {shown}")
                if not good:
                    print(f"    expected {status} {mistake or ''}")
            if len({mistake for mistake, _ in wrong}) < 2:
                print(f"BAD {exercise.id}: needs two wrong answers of different names")
                failed += 1
        slow = sorted(report.cells, key=lambda cell: -cell["seconds"])[:3]
        print(
            f"{name}: {report.end}, {report.seconds:.1f} s; slowest cells",
            ", ".join(f"{cell['number']} ({cell['seconds']:.1f} s)" for cell in slow),
        )
    return 1 if failed else 0


if __name__ == "__main__":
    # Run the importable copy, not this one: `__main__` will belong to the chapter.
    from tests.helpers import exercises

    sys.exit(exercises._main(sys.argv[1:]))
