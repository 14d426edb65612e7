"""Make the student edition: the course without its answers, ready to be a repository.

    python tools/student.py [FOLDER] [--repository ADDRESS] [--revision BRANCH]

It copies what git tracks and leaves out the solutions on the pages, the instructor's pages and the
tests that hold answers. Hints, checks and recorded outputs stay. The notebooks' first cell fetches
the edition's own address, never this repository's, where the solutions are. Before anything is
written to FOLDER, the new edition is searched for every line of every solution (`leaks`); one found
line stops it. An earlier edition in FOLDER is brought up to date, its `.git` and whatever was added
to it stay; any other folder with something in it is refused.
"""

import argparse
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools import pairs, sync
from tools.pairs import PairError, Settings

MARKER = ".student-edition.json"
# Instructor's material and the tests that hold answers, as patterns of paths below the root.
LEFT_OUT = (
    "book/instructor/**",
    "instructor/**",
    "assignments/**",
    "tests/course/wrong_answers/**",
    "tests/helpers/synthetic.py",
    "tests/helpers/*assignment*",
    "tests/course/test_exercises.py",
    "tests/course/test_checks_hold_no_solution.py",
    "tests/course/*assignment*",
    "tests/course/*instructor*",
    "tests/tools/test_student.py",
    ".student-edition.json",
)
# Folders that are never part of the course, for a copy that is not under git.
NEVER = {
    ".git",
    ".venv",
    "_build",
    "__pycache__",
    ".pytest_cache",
    ".ruff_cache",
    ".hypothesis",
    "student",
}
SHORTEST = (
    20  # characters without blanks and quotes; a shorter line ("return loss") is nobody's secret
)

_SOLUTION = re.compile(r"<details[^>]*>\s*<summary>\s*Solution.*?</details>\n?", re.S)
IN_ITS_PLACE = "*Your instructor has the solution.*\n"


class StudentError(Exception):
    """The edition cannot be made; the message is one line that says what to do."""


# --------------------------------------------------------------------------------- the text of solutions


@dataclass(frozen=True)
class Secret:
    """A line of a solution that stands nowhere else in the course. `text` is normalised, `line` as
    written."""

    chapter: str
    line: str
    text: str


def normalise(text: str) -> str:
    """Text without what formats change about it: blanks, quotes and the backslashes that escape them."""
    text = text.replace("\\n", "").replace("\\u003c", "<").replace("\\u003e", ">")
    return re.sub(r"[\s\"'`\\]+", "", text)


def without_solutions(text: str) -> str:
    """A page's Markdown with each solution replaced by one sentence."""
    return _SOLUTION.sub(IN_ITS_PLACE, text)


def secrets(root: Path) -> list[Secret]:
    """Every line of every solution of the course, but for those its pages or its package print
    anyway."""
    pages = sorted((root / "chapters").glob("*.md"))
    package = [p for p in sorted((root / "utils").rglob("*.py")) if "checks" not in p.parts]
    public = "".join(without_solutions(p.read_text(encoding="utf-8")) for p in pages)
    public = normalise(public + "".join(p.read_text(encoding="utf-8") for p in package))
    lines = {}
    for page in pages:
        for block in _SOLUTION.findall(page.read_text(encoding="utf-8")):
            for line in block.splitlines():
                text = normalise(line)
                markup = line.lstrip().startswith(("<details", "<summary", "</", "```"))
                if len(text) >= SHORTEST and not markup and text not in public:
                    lines.setdefault(text, Secret(page.stem, line.strip(), text))
    return list(lines.values())


def names(known: list[Secret], root: Path) -> set[str]:
    """Names that only solutions use. A search index holds words, not lines: these would show there."""
    sources = [p for folder in ("chapters", "utils", "book") for p in (root / folder).rglob("*")]
    kept = [p for p in sources if p.suffix in (".md", ".py") and p.is_file()]
    public = "".join(without_solutions(p.read_text(encoding="utf-8")) for p in kept).lower()
    words = {word.lower() for one in known for word in re.findall(r"[A-Za-z]+_\w{4,}", one.line)}
    # Without its last two letters, as the index may hold it: a public word that begins so would be
    # taken for it.
    return {word for word in words if word[:-2] not in public}


def leaks(folder: Path, known: list[Secret], words: set[str] = frozenset()) -> list[str]:
    """Where a folder holds a line of a solution, in any of its files: sources, notebooks, a built
    site."""
    places = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or ".git" in path.relative_to(folder).parts:
            continue
        raw = path.read_bytes().decode("utf-8", errors="ignore")
        versions = [normalise(raw)]
        if path.suffix in (
            ".html",
            ".ipynb",
            ".js",
            ".xml",
        ):  # highlighted code has a tag around each word
            versions.append(normalise(html.unescape(re.sub(r"<[^>]*>", "", raw))))
        for one in known:
            if any(one.text in version for version in versions):
                places.append(
                    f"{path.relative_to(folder)}: a solution of {one.chapter}: {one.line}"
                )
        if path.name == "searchindex.js":
            # The index cuts endings off: the last two letters may be gone.
            index = raw.lower()
            places += [
                f"{path.relative_to(folder)}: {word}"
                for word in sorted(words)
                if word[:-2] in index
            ]
    return places


# --------------------------------------------------------------------------------------- making it


def course_files(root: Path) -> Iterator[Path]:
    """The files of the course, relative to its root, without what an edition leaves out."""
    top = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--show-toplevel"], capture_output=True, text=True
    )
    if top.returncode == 0 and Path(top.stdout.strip()).resolve() == root.resolve():
        listed = subprocess.run(
            ["git", "-C", str(root), "ls-files", "-z"], capture_output=True, text=True, check=True
        )
        files = [Path(name) for name in listed.stdout.split("\0") if name]
    else:
        files = [p.relative_to(root) for p in root.rglob("*")]
        files = [p for p in files if not NEVER & set(p.parts)]
    for path in sorted(files):
        if (root / path).is_file() and not any(_matches(path, pattern) for pattern in LEFT_OUT):
            yield path


def _matches(path: Path, pattern: str) -> bool:
    if pattern.endswith("/**"):
        return any(parent.match(pattern[:-3]) and len(parent.parts) == pattern.count("/")
                   for parent in path.parents)  # fmt: skip
    return path.match(pattern) and len(path.parts) == pattern.count("/") + 1


def make(
    root: Path, folder: Path, repository: str | None = None, revision: str = "main"
) -> list[str]:
    """Write the edition into `folder`; returns its files. Raises StudentError and writes nothing
    where it cannot."""
    root, folder = root.resolve(), folder.resolve()
    course = pairs.settings(root)
    if (root / MARKER).exists():
        raise StudentError("this is a student edition already: it holds no answers to leave out")
    repository = repository or course.repository + "-student"
    if repository.rstrip("/").removesuffix(".git") == course.repository:
        raise StudentError(
            f"--repository {repository}: this address holds the solutions, and the notebooks would fetch it: "
            "give the address the student edition will have"
        )
    before = _earlier(root, folder)
    own = replace(course, repository=repository, revision=revision, website=_website(repository))
    known = secrets(root)
    with tempfile.TemporaryDirectory(prefix="student-") as temporary:
        new = Path(temporary)
        for path in course_files(root):
            (new / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / path, new / path)
        _take_out_answers(new, own)
        _take_out_instructor(new)
        _address(new, own)
        seen = leaks(new, known)
        if seen:
            raise StudentError(
                "nothing was written, these would hold solutions:\n  " + "\n  ".join(seen)
            )
        files = sorted(str(p.relative_to(new)) for p in new.rglob("*") if p.is_file())
        marker = {
            "course": course.name,
            "repository": repository,
            "revision": revision,
            "files": files,
        }
        (new / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
        folder.mkdir(parents=True, exist_ok=True)
        # The marker first: an interrupted update can then be repeated.
        for name in [MARKER, *files]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(new / name, folder / name)
    for name in set(before) - set(files):
        (folder / name).unlink(missing_ok=True)
    return files


def _earlier(root: Path, folder: Path) -> list[str]:
    """The files of an earlier edition in this folder, [] for a new one. Refuses any other folder."""
    if folder == root or folder in root.parents:
        raise StudentError(f"{folder}: this is, or holds, the course itself: choose another folder")
    if folder.exists() and not folder.is_dir():
        raise StudentError(f"{folder}: expected a folder, found a file: choose another name")
    if not folder.exists() or not any(p.name != ".git" for p in folder.iterdir()):
        return []
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        files = [str(name) for name in marker["files"]]
        # A marker edited by hand must not make us delete outside the folder.
        if all((folder / name).resolve().is_relative_to(folder) for name in files):
            return files
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise StudentError(f"{folder}: is not empty and is no earlier student edition: nothing was written; "
                       "choose another folder or empty it")  # fmt: skip


def _website(repository: str) -> str:
    """Where GitHub would publish the edition's site; the repository itself when it is elsewhere."""
    match = re.fullmatch(r"https://github\.com/([\w.-]+)/([\w.-]+?)(\.git)?/?", repository)
    return f"https://{match[1].lower()}.github.io/{match[2]}" if match else repository


def _take_out_answers(new: Path, own: Settings) -> None:
    for page in sorted((new / "chapters").glob("*.md")):
        page.write_text(without_solutions(page.read_text(encoding="utf-8")), encoding="utf-8")
        # The notebook takes the page's text; outputs stay, since no code changed.
        sync.sync_pair(page.with_suffix(""), own, take="md")


def _take_out_instructor(new: Path) -> None:
    """Remove the instructor's pages from the table of contents, and links to them from the text."""
    toc = new / "_toc.yml"
    if toc.exists():
        text = toc.read_text(encoding="utf-8")
        tree = _prune(yaml.safe_load(text))
        if tree != yaml.safe_load(text):
            toc.write_text(
                yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8"
            )
    for path in [
        *new.glob("*.md"),
        *(new / "book").rglob("*.md"),
        *(new / "chapters").glob("*.md"),
    ]:
        text = path.read_text(encoding="utf-8")
        kept = re.sub(r"\[([^\]]*)\]\([^)]*\binstructor/[^)]*\)", r"\1", text)
        kept = re.sub(r"<a [^>]*href=\"[^\"]*\binstructor/[^>]*>(.*?)</a>", r"\1", kept, flags=re.S)
        if kept != text:
            path.write_text(kept, encoding="utf-8")


def _prune(tree):
    """The table of contents without instructor pages and without parts that became empty."""
    if isinstance(tree, list):
        kept = [_prune(item) for item in tree]
        return [item for item in kept if item]
    if isinstance(tree, dict):
        if str(tree.get("file", "")).startswith("book/instructor/"):
            return None
        kept = {key: _prune(value) for key, value in tree.items()}
        if any(key in kept and not kept[key] for key in ("chapters", "sections", "parts")):
            if "file" not in kept:
                return None
            kept = {key: value for key, value in kept.items() if value}
        return kept
    return tree


def _address(new: Path, own: Settings) -> None:
    """Stamp the edition's own address: its one home first, then wherever `make sync` writes it."""
    project = new / "pyproject.toml"
    text = project.read_text(encoding="utf-8")
    for key in ("repository", "website", "revision"):
        text = re.sub(
            rf"(?m)^{key} = .*$",
            lambda _, k=key: f"{k} = {json.dumps(getattr(own, k))}",
            text,
            count=1,
        )
    project.write_text(text, encoding="utf-8")
    assert pairs.settings(new) == own
    sync.stamp_files(new, own, write=True)
    for stem in pairs.chapters(new):
        sync.sync_pair(stem, own, take="md")
    readme = new / "README.md"
    if readme.exists():
        note = "\n\nThis is the student edition: exercises have hints and checks; solutions are with your instructor.\n"
        text = readme.read_text(encoding="utf-8")
        readme.write_text(re.sub(r"\A(# [^\n]*)\n", lambda m: m[1] + note, text), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """The command line. Status 0, or 2 with one clear message."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="where to write it (_build/student)")
    parser.add_argument("--out", type=Path, help="the same, as a flag")
    parser.add_argument("--repository", help="the edition's address (this one's with -student)")
    parser.add_argument(
        "--revision", default="main", help="the branch or tag notebooks fetch (main)"
    )
    parser.add_argument("--root", type=Path, default=pairs.ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    folder = args.out or args.folder or args.root / "_build" / "student"
    try:
        files = make(args.root, folder, args.repository, args.revision)
    except (StudentError, PairError) as error:
        print(f"student: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"student: {error.filename or folder}: {error.strerror}", file=sys.stderr)
        return 2
    address = pairs.settings(folder).repository
    print(f"{folder}: {len(files)} files, no line of a solution among them")
    print(
        f"Its notebooks fetch {address} at {args.revision}: push this folder there (git init, add, commit, push)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
