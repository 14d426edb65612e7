"""Which chapters a change can have broken, so that a pull request runs those pages and no others.

    python tools/changed_chapters.py BASE [--shards 3]        prints a JSON list of shards, such as ["05 09", "06"]

A chapter is chosen when a file of its own changed (the page, its checks, its wrong answers) or a
module of the package that one of them imports, directly or through another. What all chapters stand
on chooses all of them. `BASE` is what `git diff BASE...HEAD` compares with. The shards take about
equally long, going by the times that the notebooks recorded.
"""

import argparse
import json
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools import imports

# A change in one of these may reach any page.
EVERYWHERE = (
    "constraints.txt",
    "requirements*.txt",
    "pyproject.toml",
    "tests/conftest.py",
    "tests/course/test_chapters.py",
    "tests/course/test_exercises.py",
    "tests/helpers/exercises.py",
    "utils/*/assets/*",
    "utils/__init__.py",
    "utils/course/checks/__init__.py",
)
CODE = re.compile(r"^```+(?:\{code-cell\}[^\n]*|python)\n(.*?)^```+\s*$", re.S | re.M)
USUAL_SECONDS = 60  # of a chapter that was never recorded


def own_files(number: str) -> tuple[str, ...]:
    """Patterns of the files that belong to one chapter."""
    return (
        f"chapters/{number}_*",
        f"utils/course/checks/chapter_{number}.py",
        f"tests/course/wrong_answers/chapter_{number}.py",
    )


def dependencies(root: Path) -> dict[str, set[str]]:
    """Chapter number -> the files of the package that its page and its checks import, by any path."""
    files, edges = imports.modules(root), imports.graph(root)
    needs = {}
    for page in sorted((root / "chapters").glob("[0-9][0-9]_*.md")):
        start = {f"utils.course.checks.chapter_{page.name[:2]}"}
        for cell in CODE.findall(page.read_text("utf-8")):
            code = re.sub(
                r"\A(---\n.*?^---\n|(:[^\n]*\n)+)", "", cell, flags=re.S | re.M
            )  # the cell's options
            try:
                start |= imports.imported(code, set(files))
            except (
                SyntaxError
            ):  # IPython's own lines: whatever they import, another cell imports too
                start |= {name for name in files if re.search(rf"\b{re.escape(name)}\b", code)}
        reached = imports.reached(start, edges)
        needs[page.name[:2]] = {files[name].relative_to(root).as_posix() for name in reached}
    return needs


def chosen(changed: list[str], root: Path = imports.ROOT) -> list[str]:
    """The numbers of the chapters that these files may have changed."""
    needs = dependencies(root)
    if any(fnmatch(path, pattern) for path in changed for pattern in EVERYWHERE):
        return list(needs)
    return [
        number
        for number, files in needs.items()
        if any(
            path in files or any(fnmatch(path, own) for own in own_files(number))
            for path in changed
        )
    ]


def seconds(number: str, root: Path) -> float:
    """What the chapter took when its notebook was recorded."""
    for path in (root / "chapters").glob(f"{number}_*.ipynb"):
        record = (
            json.loads(path.read_text("utf-8"))["metadata"].get("course", {}).get("provenance", {})
        )
        return record.get("seconds", USUAL_SECONDS)
    return USUAL_SECONDS


def shards(numbers: list[str], count: int, root: Path = imports.ROOT) -> list[str]:
    """The chapters in at most `count` groups, the longest first, each into the group that has least
    to do."""
    groups: list[tuple[float, list[str]]] = [(0.0, []) for _ in range(min(count, len(numbers)))]
    for number in sorted(numbers, key=lambda n: -seconds(n, root)):
        total, group = min(groups, key=lambda pair: pair[0])
        groups.remove((total, group))
        groups.append((total + seconds(number, root), [*group, number]))
    return sorted(" ".join(sorted(group)) for _, group in groups)


def main(argv: list[str] | None = None) -> int:
    """The command line. Where git cannot compare with the base, as on a branch's first push, every
    chapter is chosen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="a commit or branch; what changed since then is looked at")
    parser.add_argument("--shards", type=int, default=3)
    args = parser.parse_args(argv)
    command = ["git", "diff", "--name-only", f"{args.base}...HEAD"]
    done = subprocess.run(command, cwd=imports.ROOT, capture_output=True, text=True)
    if done.returncode:
        print(
            f"changed_chapters: all of them: {done.stderr.strip().splitlines()[-1]}",
            file=sys.stderr,
        )
    changed = list(EVERYWHERE) if done.returncode else done.stdout.splitlines()
    print(json.dumps(shards(chosen(changed), args.shards)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
