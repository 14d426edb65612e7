"""Bring each chapter's `.md` and `.ipynb` together, whichever was edited (`make sync`).

The notebook remembers the hash of the content on which the two sides last agreed (`course.synced`
in its metadata):

    only the .md changed since        the .ipynb takes its text; outputs of unchanged cells stay
    only the .ipynb changed since     the .md takes its text; unchanged cells keep the author's formatting
    both changed, and differ          nothing is written, status 2: say which one to take with --take

File times decide nothing: a checkout sets them as it likes. The same command stamps the bootstrap
cell and the repository's address, from pyproject.toml, wherever they stand.

    python tools/sync.py [--check] [--take md|ipynb] [CHAPTER ...]
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools import pairs
from tools.pairs import PairError, Settings

# ----------------------------------------------------------------------------------------- stamping


def bootstrap_source(settings: Settings) -> str:
    """The bootstrap cell for this repository and release, from its one template."""
    template = (Path(__file__).parent / "bootstrap_cell.py").read_text(encoding="utf-8")
    cell = re.split(r"^# -{20,}.*\n", template, maxsplit=1, flags=re.M)[1].strip()
    for word in ("name", "repository", "revision"):
        cell = cell.replace(f"@{word.upper()}@", getattr(settings, word))
    return cell


def stamp_notebook(nb, settings: Settings) -> bool:
    """Write the bootstrap cell into the notebook, before the first code cell when there is none.
    True when changed."""
    source = bootstrap_source(settings)
    cell = next((c for c in nb.cells if pairs.has_tag(c, "bootstrap")), None)
    if cell is None:
        from nbformat.v4 import new_code_cell

        at = next((i for i, c in enumerate(nb.cells) if c.cell_type == "code"), len(nb.cells))
        cell = new_code_cell("", metadata={"tags": ["bootstrap", "hide-input"]})
        nb.cells.insert(at, cell)
    if cell.source == source:
        return False
    cell.source = source
    return True


def stamps(settings: Settings) -> list[tuple[str, str, str]]:
    """(files, pattern, replacement): where the repository's address stands outside the notebooks."""
    owner_name = settings.repository.removeprefix("https://github.com/")
    in_text = [
        # Links that open a file of this repository in Colab, or show it on GitHub.
        (
            r"(colab\.research\.google\.com/github)/[^/\s]+/[^/\s]+/(blob|tree)/[^/\s]+/(?=chapters/)"
        ),
        (r"(github\.com)/[^/\s]+/[^/\s]+/(blob|tree)/[^/\s]+/(?=chapters/)"),
    ]
    rules = []
    for files in ("README.md", "CONTRIBUTING.md", "book/**/*.md", "chapters/*.md"):
        rules += [(files, p, rf"\1/{owner_name}/\2/{settings.revision}/") for p in in_text]
        rules.append(
            (files, r"(git clone )https://github\.com/\S+", rf"\g<1>{settings.repository}")
        )
    rules += [
        ("README.md", r"https://[\w-]+\.github\.io/[\w.-]+", settings.website),
        ("_config.yml", r"(?m)^(  url: ).*$", rf'\g<1>"{settings.repository}"'),
        ("_config.yml", r"(?m)^(  branch: ).*$", rf'\g<1>"{settings.revision}"'),
        ("CITATION.cff", r"(?m)^(repository-code: ).*$", rf'\g<1>"{settings.repository}"'),
        ("CITATION.cff", r"(?m)^(url: ).*$", rf'\g<1>"{settings.website}"'),
    ]
    if re.match(r"v\d", settings.revision):  # a fork or an edition may follow a branch
        rules.append(("CITATION.cff", r"(?m)^(version: ).*$", rf"\g<1>{settings.revision[1:]}"))
    return rules


def duration(seconds: float) -> str:
    """`95` -> `1 min 35 s`."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"


def stamp_map(root: Path, readme: str) -> str:
    """The README's map of chapters: its links, and the minutes that were recorded in place of those
    expected."""

    def row(match: re.Match) -> str:
        cells = [cell.strip() for cell in match.group().strip().strip("|").split("|")]
        stem = next(iter((root / "chapters").glob(f"{match[1]}_*.ipynb")), None)
        if stem is None or len(cells) != 5:
            return match.group()
        title = re.sub(r"\[(.*)\]\(.*\)", r"\1", cells[0][3:])
        cells[0] = f"{match[1]} [{title}](chapters/{stem.name})"
        course = pairs.read_ipynb(stem).metadata.get("course", {})
        records = [r for r in [course.get("provenance"), *course.get("runs", [])] if r]
        for column, profiles in ((3, ("cpu",)), (4, ("colab", "large"))):
            told = [
                duration(r["seconds"])
                + ("" if column == 3 else f" ({r['device']}, `{r['profile']}`)")
                for r in records
                if r.get("profile") in profiles
            ]
            if told:
                cells[column] = ", ".join(told)
        return "| " + " | ".join(cells) + " |"

    table = re.search(r"<!-- chapters: begin -->\n(.*?)<!-- chapters: end -->", readme, re.DOTALL)
    if not table:
        return readme
    rows = re.sub(r"(?m)^\| (\d\d) .*\|$", row, table[1])
    return readme[: table.start(1)] + rows + readme[table.end(1) :]


def stamp_files(root: Path, settings: Settings, write: bool) -> list[str]:
    """Stamp the address everywhere else. Returns the names of the files that were, or would be,
    changed."""
    changed = []
    rules = stamps(settings)
    for path in sorted({p for files, _, _ in rules for p in root.glob(files)}):
        before = text = path.read_text(encoding="utf-8")
        for files, pattern, replacement in rules:
            if path in root.glob(files):
                text = re.sub(pattern, replacement, text)
        if path == root / "README.md":
            text = stamp_map(root, text)
        if text != before:
            changed.append(str(path.relative_to(root)))
            if write:
                pairs.write_text(path, text)
    return changed


# ------------------------------------------------------------------------------------------ pairing


def sync_pair(stem: Path, settings: Settings, write: bool = True, take: str | None = None) -> str:
    """Bring one pair together. Returns what was (or would be) done, "" when nothing; raises
    PairError on a conflict."""
    md_path, nb_path = stem.with_suffix(".md"), stem.with_suffix(".ipynb")
    name = f"{stem.parent.name}/{stem.name}"
    md_text = md_path.read_text(encoding="utf-8") if md_path.exists() else ""
    md = pairs.parse_md(md_text, md_path.name) if md_text else None
    nb = pairs.read_ipynb(nb_path) if nb_path.exists() else None
    synced = nb.metadata.get("course", {}).get("synced") if nb else None
    stamped = any([stamp_notebook(side, settings) for side in (md, nb) if side is not None])
    md_hash = pairs.content_hash(md) if md else None
    nb_hash = pairs.content_hash(nb) if nb else None

    if md is None or nb is None:
        source, done = (
            ("ipynb", "the .md was made") if md is None else ("md", "the .ipynb was made")
        )
    elif md_hash == nb_hash:
        source, done = "md", ""
    elif take:
        source, done = take, f"the .{take} was taken"
    elif synced == nb_hash:
        source, done = "md", "the .ipynb took the text of the .md"
    elif synced == md_hash:
        source, done = "ipynb", "the .md took the text of the .ipynb"
    else:
        raise PairError(
            f"{name}: the .md and the .ipynb both changed since they last agreed: nothing was written; compare them, "
            f"then `python tools/sync.py --take md {stem.name}` (or --take ipynb), which drops the other side's edits"
        )
    if not done and stamped:
        done = "the bootstrap cell was stamped"
    if source == "md":
        result, text = pairs.merge(md, nb), pairs.to_md(md, md_text) if done or stamped else md_text
    else:
        text = pairs.to_md(nb, md_text)
        result = pairs.merge(pairs.parse_md(text, md_path.name), nb)
    course = dict(result.metadata.get("course", {}))
    if not done and course.get("synced") != md_hash:
        done = "the agreement was recorded"
    result.metadata["course"] = course | {"synced": pairs.content_hash(result)}
    if write:
        # The notebook last: until it is written the pair still says that only one side changed.
        wrote_md = pairs.write_text(md_path, text) if source == "ipynb" or stamped else False
        if pairs.write_ipynb(nb_path, result) and not done:
            done = "cell ids and folds were brought up to date"
        return done or ("the .md was stamped" if wrote_md else "")
    return done


def main(argv: list[str] | None = None) -> int:
    """The command line. Status 0: in step; 1: --check found work to do; 2: a conflict or an
    unreadable file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "chapter", nargs="*", help="a number (05) or a file; all of them when none is given"
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing, status 1 when something would change"
    )
    parser.add_argument(
        "--take", choices=["md", "ipynb"], help="which side wins where both changed"
    )
    parser.add_argument("--root", type=Path, default=pairs.ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        settings = pairs.settings(args.root)
        stems = pairs.chapters(args.root, args.chapter)
    except PairError as error:
        print(f"sync: {error}", file=sys.stderr)
        return 2
    status = 0
    for stem in stems:
        try:
            done = sync_pair(stem, settings, write=not args.check, take=args.take)
        except PairError as error:
            print(f"sync: {error}", file=sys.stderr)
            status = 2
            continue
        if done:
            print(f"chapters/{stem.name}: {'make sync is needed' if args.check else done}")
            status = max(status, int(args.check))
    try:  # last: the README's map reads the notebooks
        stamped = stamp_files(args.root, settings, write=not args.check)
    except PairError as error:
        print(f"sync: {error}", file=sys.stderr)
        return 2
    for name in stamped:
        print(
            f"{name}: {'make sync is needed' if args.check else 'addresses and recorded minutes were stamped'}"
        )
        status = max(status, int(args.check))
    return status


if __name__ == "__main__":
    sys.exit(main())
