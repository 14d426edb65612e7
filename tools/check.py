"""Everything quick, in under a minute: is what is written here in order? `make check` runs this.

Style of the code, pairs in step, the bootstrap cell and the repository's address as stamped,
Markdown that Colab and GitHub show too, recorded outputs that belong to the code, alt text,
exercises with hint and solution, links that lead somewhere, no paths of anybody's machine. Each
problem is one line: where, what, what to do. Pages recorded with an older `utils` are named in a
note, which is no failure: `make execute` brings them up to date.
"""

import argparse
import html
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools import pairs, provenance, sync
from tools.pairs import PairError

# Paths that exist on somebody's machine only. /content and /kaggle are Colab's and Kaggle's own.
MACHINE_PATH = re.compile(
    r"(?<![\w.:/~$}-])/(?:home/(?!user\b|you\b|jovyan\b)\w|root/|Users/(?!you\b)\w|work/|tmp/\w)[\w./-]*"
)
TEXT_FILES = {
    ".md",
    ".ipynb",
    ".py",
    ".toml",
    ".txt",
    ".yml",
    ".yaml",
    ".cff",
    ".js",
    ".css",
    ".json",
    ".bib",
    ".html",
}
STUDENT_MARK = ".student-edition.json"  # tools/student.py leaves it in an edition without solutions
FENCE = re.compile(r"^( {0,3})(`{3,}|~{3,}|:{3,})(.*)$")


def ruff(root: Path) -> Iterator[str]:
    """The code follows the style: `make format` repairs most of it."""
    env = os.environ | {"RUFF_OUTPUT_FORMAT": "concise"}
    for command in (["check", "--quiet"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."],
            cwd=root,
            env=env,
            capture_output=True,
            text=True,
        )
        lines = (done.stdout + done.stderr).splitlines()
        for line in lines if done.returncode else []:
            if line.strip() and not re.match(r"\d+ files? |Found \d+|\[\*\]", line):
                yield f"ruff {command[0]}: {line}"


def in_step(root: Path) -> Iterator[str]:
    """Each .md and its .ipynb agree, carry this repository's bootstrap cell, and nothing waits for
    a stamp."""
    settings = pairs.settings(root)
    for name in sync.stamp_files(root, settings, write=False):
        yield f"{name}: its addresses or recorded minutes are not up to date: run `make sync`"
    for stem in pairs.chapters(root):
        try:
            done = sync.sync_pair(stem, settings, write=False)
        except PairError as error:
            yield str(error)
            continue
        if done:
            yield f"chapters/{stem.name}: the .md and the .ipynb are not in step: run `make sync`"
        for side in (".md", ".ipynb"):
            path = stem.with_suffix(side)
            if not path.exists():
                continue
            nb = pairs.read_md(path) if side == ".md" else pairs.read_ipynb(path)
            code = [c for c in nb.cells if c.cell_type == "code"]
            if not code or not pairs.has_tag(code[0], "bootstrap"):
                yield f"chapters/{path.name}: the first code cell is not the bootstrap cell: move it to the top"
            elif code[0].source.strip() != sync.bootstrap_source(settings):
                yield f"chapters/{path.name}: the bootstrap cell differs from its template: run `make sync`"


def directives(root: Path) -> Iterator[str]:
    """Chapters hold no `{directive}` fence but {code-cell}: Colab and GitHub would show it as code."""
    for stem in pairs.chapters(root):
        path = stem.with_suffix(".md")
        fence = None
        for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
            match = FENCE.match(line)
            if not match:
                continue
            mark, info = match[2], match[3].strip()
            if fence:
                if mark[0] == fence[0] and len(mark) >= len(fence) and not info:
                    fence = None
                continue
            if mark[0] == ":" and not info.startswith("{"):
                continue
            fence = mark
            if info.startswith("{") and not info.startswith("{code-cell}"):
                yield f"chapters/{path.name}:{number}: {info.split()[0]} shows as code in Colab: use a blockquote"


def outputs_current(root: Path) -> Iterator[str]:
    """The outputs that a page shows come from the code that it shows."""
    for stem in pairs.chapters(root):
        path = stem.with_suffix(".ipynb")
        if not path.exists():
            continue
        nb = pairs.read_ipynb(path)
        record = nb.metadata.get("course", {}).get("provenance")
        again = f"run `make execute CHAPTER={stem.name.split('_')[0]}`"
        if record is None:
            yield f"chapters/{path.name}: has no recorded outputs: {again}"
        elif pairs.code_hash(nb) not in (record.get("code"), record.get("renamed")):
            yield f"chapters/{path.name}: the code changed since its outputs were recorded: {again}"


def figures(root: Path) -> Iterator[str]:
    """Every picture says in words what it shows."""
    for stem in pairs.chapters(root):
        path = stem.with_suffix(".ipynb")
        for number, cell in enumerate(pairs.read_ipynb(path).cells if path.exists() else [], 1):
            if cell.cell_type == "code":
                drawn = any(
                    "image/png" in o.get("data", {}) or "image/svg+xml" in o.get("data", {})
                    for o in cell.outputs
                )
                alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
                if drawn and not str(alt).strip():
                    yield (
                        f"chapters/{path.name} cell {number}: draws a figure without alt text: add "
                        ':mystnb: {image: {alt: "..."}}'
                    )
            for match in re.finditer(
                r"!\[\s*\]\(([^)]*)\)", cell.source if cell.cell_type == "markdown" else ""
            ):
                yield f"chapters/{path.name} cell {number}: the picture {match[1]} has no alt text"


def exercises(root: Path) -> Iterator[str]:
    """Every exercise has a stub that ends in its check, then a hint, then a solution."""
    for stem in pairs.chapters(root):
        path = stem.with_suffix(".md")
        cells = pairs.read_md(path).cells if path.exists() else []
        marked = [
            i for i, c in enumerate(cells) if c.cell_type == "code" and pairs.has_tag(c, "exercise")
        ]
        for i, end in zip(marked, [*marked[1:], len(cells)]):
            last = cells[i].source.strip().splitlines()[-1:]
            number = re.match(r'check\("(\d+\.\d+)"', last[0]) if last else None
            where = f"chapters/{path.name}: exercise {number[1] if number else f'in cell {i + 1}'}"
            if not number:
                yield f'{where}: its last line is not check("N.M", ...)'
            after = "\n".join(c.source for c in cells[i + 1 : end] if c.cell_type == "markdown")
            for part in ("Hint",) if (root / STUDENT_MARK).exists() else ("Hint", "Solution"):
                if not re.search(rf"<summary>\s*(<\w+>)?{part}", after):
                    yield f"{where}: has no {part.lower()}: add <details><summary>{part}</summary>"


# -------------------------------------------------------------------------------------------- links


def prose(text: str) -> str:
    """Markdown without fenced code, code spans and comments, lines kept."""
    text = re.sub(
        r"(?ms)^( {0,3})(`{3,}|~{3,}).*?^\1\2[`~]*\s*$", lambda m: "\n" * m[0].count("\n"), text
    )
    text = re.sub(r"(?s)<!--.*?-->", lambda m: "\n" * m[0].count("\n"), text)
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", text)


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub and MyST make it."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    plain = re.sub(r"<[^>]+>|[`*]", "", html.unescape(plain)).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


@cache
def anchors(path: Path) -> frozenset[str]:
    """Every anchor of a page: headings, (labels)= and ids."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n\n".join(
            c.source for c in pairs.read_ipynb(path).cells if c.cell_type == "markdown"
        )
    names: set[str] = set()
    without_code = re.sub(r"(?ms)^( {0,3})(`{3,}|~{3,}).*?^\1\2[`~]*\s*$", "", text)
    for heading in re.findall(r"(?m)^#{1,6}\s+(.+?)\s*#*$", without_code):
        name, n = slug(heading), 0
        while (name if not n else f"{name}-{n}") in names:
            n += 1
        names.add(name if not n else f"{name}-{n}")
    names.update(re.findall(r"(?m)^\(([\w-]+)\)=", text))
    names.update(re.findall(r"\b(?:id|name)=[\"']([\w-]+)[\"']", text))
    if "{glossary}" in text:
        names.update(f"term-{slug(t)}" for t in re.findall(r"(?m)^([^\s:`].*)\n\s+:", text))
    return frozenset(names)


def pages(root: Path) -> list[Path]:
    """Everything with links: chapters (the .md), the book's pages, the files at the top."""
    top = [p for p in root.glob("*.md")]
    return sorted([*top, *root.glob("chapters/*.md"), *root.glob("book/**/*.md")])


def links(root: Path) -> Iterator[str]:
    """Links inside the repository lead to a file, and to a heading that exists."""
    for page in pages(root):
        text = prose(page.read_text(encoding="utf-8"))
        name = page.relative_to(root)
        targets = re.finditer(
            r"(?<!\\)\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)>?[^)]*\)|\b(?:href|src)=\"([^\"]+)\"",
            text,
        )
        for match in targets:
            target = match[1] or match[2]
            line = text.count("\n", 0, match.start()) + 1
            if re.match(r"[a-z][a-z0-9+.-]*:|//", target, re.I):
                continue
            where, _, anchor = target.partition("#")
            path = page if not where else (page.parent / where).resolve()
            if where.endswith(".html"):  # a page of the built site
                path = next(
                    (p for s in (".md", ".ipynb") if (p := path.with_suffix(s)).exists()), path
                )
            if not path.exists():
                yield f"{name}:{line}: link to {target}: no such file"
            elif not where and page.suffix == ".md" and anchor and anchor not in anchors(page):
                yield f"{name}:{line}: link to {target}: no such heading on this page"
            elif (
                where
                and anchor
                and path.suffix in (".md", ".ipynb")
                and anchor not in anchors(path)
            ):
                yield f"{name}:{line}: link to {target}: no such heading there"
            elif (
                page.parent.name == "chapters"
                and where.endswith(".md")
                and path.parent.name == "chapters"
            ):
                yield f"{name}:{line}: link to {target}: link to the .ipynb, the page that the site and Colab show"


def machine_paths(root: Path) -> Iterator[str]:
    """No path that exists on one person's machine only."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
    )
    names = listed.stdout.decode().split("\0") if listed.returncode == 0 else []
    for name in sorted(filter(None, names)):
        path = root / name
        # Tests and the tools that look for such paths must be able to name them.
        if (
            path.suffix not in TEXT_FILES
            or name.startswith(("tests/", "tools/"))
            or not path.is_file()
        ):
            continue
        for number, line in enumerate(
            path.read_text(encoding="utf-8", errors="replace").splitlines(), 1
        ):
            if len(line) < 20_000 and (match := MACHINE_PATH.search(line)):
                yield f"{name}:{number}: a path of one machine: {match.group()[:80]}"


def older_than_package(root: Path) -> Iterator[str]:
    """Notes, not problems: pages whose `utils` modules changed after they were recorded."""
    for stem in pairs.chapters(root):
        path = stem.with_suffix(".ipynb")
        if path.exists():
            record = pairs.read_ipynb(path).metadata.get("course", {}).get("provenance", {})
            if changed := provenance.changed_modules(record, root):
                yield f"chapters/{path.name}: older than the package ({', '.join(changed)} changed since)"


CHECKS = (ruff, in_step, directives, outputs_current, figures, exercises, links, machine_paths)


def main(argv: list[str] | None = None) -> int:
    """The command line. Status 0: in order; 1: problems, one a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=pairs.ROOT, help=argparse.SUPPRESS)
    root = parser.parse_args(argv).root.resolve()
    started, count = time.perf_counter(), 0
    for check in CHECKS:
        try:
            problems = list(check(root))
        except PairError as error:
            problems = [str(error)]
        count += len(problems)
        print(f"{'ok  ' if not problems else 'FAIL'} {check.__doc__.splitlines()[0]}")
        for problem in problems:
            print(f"     {problem}")
    try:
        notes = list(older_than_package(root))
    except PairError:
        notes = []
    for note in notes:
        print(f"note {note}")
    print(f"{count} problems, {len(notes)} notes, {time.perf_counter() - started:.1f} s")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
