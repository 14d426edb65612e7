"""A chapter is two files: the `.md` that people edit, the `.ipynb` that people run.

The site shows the notebook. This module says what the two have in common (their *content*: cell
types, sources, tags and other metadata that an author writes), and turns one into the other without
losing what belongs to one side alone: the notebook keeps its outputs, cell ids and the `course`
metadata, the Markdown keeps its header and the author's way of writing cell options. `sync.py`,
`execute.py` and `check.py` stand on it.

The content's hash leaves out the source of the bootstrap cell: that is stamped from a template, not
edited, and a new release must not make every recorded output look stale.
"""

import difflib
import hashlib
import json
import os
import re
import tomllib
import warnings
from dataclasses import dataclass
from pathlib import Path

import jupytext
import nbformat
import yaml
from jupytext.myst import myst_to_notebook
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
HEADER = """---
jupytext:
  formats: ipynb,md:myst
  text_representation: {extension: .md, format_name: myst}
kernelspec: {display_name: Python 3, name: python3}
---
"""
# Without a version: the notebook must not change with the Python that runs it.
LANGUAGE = {
    "name": "python",
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "pygments_lexer": "ipython3",
}
# What editors and runs write into a notebook's cells: never content.
CELL_NOISE = {
    "jupyter",
    "collapsed",
    "execution",
    "editable",
    "scrolled",
    "trusted",
    "slideshow",
    "id",
    "colab",
    "outputId",
    "ExecuteTime",
    "vscode",
}
NOTEBOOK_NOISE = {"jupytext", "kernelspec", "language_info", "course", "widgets", "colab", "vscode"}
NOTEBOOK_NOISE |= {"accelerator", "toc", "source_map"}


class PairError(Exception):
    """A chapter's files cannot be used; the message is one line that says what to do."""


@dataclass(frozen=True)
class Settings:
    """`[tool.course]` of pyproject.toml: the one home of the repository's address."""

    name: str
    repository: str
    website: str
    revision: str


def settings(root: Path = ROOT) -> Settings:
    """Read the course's name, address and release from pyproject.toml."""
    course = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["course"]
    return Settings(**{key: course[key] for key in Settings.__dataclass_fields__})


def chapters(root: Path = ROOT, which: list[str] | None = None) -> list[Path]:
    """The chapters' paths without suffix, in order; `which` chooses by number or name ("05",
    "05_lora.md")."""
    folder = root / "chapters"
    stems = sorted(
        {p.with_suffix("") for p in folder.glob("[0-9]*") if p.suffix in (".md", ".ipynb")}
    )
    if not which:
        return stems
    chosen = []
    for name in which:
        stem = Path(name).stem
        match = [p for p in stems if p.name == stem or p.name.split("_")[0] == stem.zfill(2)]
        if not match:
            names = ", ".join(p.name for p in stems) or "none"
            raise PairError(f"no chapter {name!r}: expected one of {names}")
        chosen += match
    return chosen


# ------------------------------------------------------------------------------------------ reading


def read_md(path: Path) -> NotebookNode:
    """The Markdown side as a notebook without outputs."""
    return parse_md(path.read_text(encoding="utf-8"), path.name)


def parse_md(text: str, name: str = "text") -> NotebookNode:
    """MyST Markdown as a notebook. Raises PairError with the file's name when a cell's options are
    not YAML."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return jupytext.reads(text, fmt="md:myst")
    except Exception as error:
        raise PairError(f"{name}: {' '.join(str(error).split())}") from None


def read_ipynb(path: Path) -> NotebookNode:
    """The notebook side. Raises PairError when it is no notebook (a merge conflict, a truncated
    file)."""
    try:
        nb = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
        nb.cells  # noqa: B018
        return nb
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise PairError(
            f"{path.name}: expected a notebook, found: {reason}: restore it from git, or delete it "
            "and run `make sync`, which makes it again from the .md, without outputs"
        ) from None


def has_tag(cell: NotebookNode, tag: str) -> bool:
    """Whether a cell carries this tag."""
    return tag in cell.metadata.get("tags", [])


def _plain(value):
    """Nested NotebookNodes as dicts and lists, for comparing and hashing."""
    return json.loads(json.dumps(value, sort_keys=True))


def cell_content(cell: NotebookNode, bootstrap: bool = False) -> tuple:
    """What an author wrote in one cell: (type, source, metadata)."""
    source = cell.source.strip("\n").rstrip()
    if has_tag(cell, "bootstrap") and not bootstrap:
        source = "bootstrap"
    meta = {k: _plain(v) for k, v in cell.metadata.items() if k not in CELL_NOISE and v != []}
    return cell.cell_type, source, meta


def content(nb: NotebookNode) -> list:
    """Everything an author wrote, in a form that is the same for both sides."""
    head = {k: _plain(v) for k, v in nb.metadata.items() if k not in NOTEBOOK_NOISE}
    return [head] + [list(cell_content(c)) for c in nb.cells if c.source.strip() or c.metadata]


def _digest(value) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def content_hash(nb: NotebookNode) -> str:
    """A hash of the content, equal for the two sides of a pair that agree."""
    return _digest(content(nb))


def code_hash(nb: NotebookNode) -> str:
    """A hash of the code cells alone: what recorded outputs depend on."""
    return _digest(
        [cell_content(c)[1] for c in nb.cells if c.cell_type == "code" and c.source.strip()]
    )


# ----------------------------------------------------------------------------- Markdown to notebook


def _new_id(cell: NotebookNode, taken: set[str]) -> str:
    """An id made from the content, so that two people who sync the same text get the same notebook."""
    base = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:8]
    name, n = base, 1
    while name in taken:
        n += 1
        name = f"{base}-{n}"
    taken.add(name)
    return name


def merge(new: NotebookNode, old: NotebookNode | None) -> NotebookNode:
    """`new`'s content with `old`'s outputs where the code is unchanged, and `old`'s ids where a
    cell lived on."""
    old_cells = list(old.cells) if old else []
    partner: dict[int, NotebookNode] = {}
    matcher = difflib.SequenceMatcher(
        None,
        [(c.cell_type, cell_content(c)[1]) for c in old_cells],
        [(c.cell_type, cell_content(c)[1]) for c in new.cells],
        autojunk=False,
    )
    for kind, a1, a2, b1, b2 in matcher.get_opcodes():
        if kind == "equal":
            partner.update(zip(range(b1, b2), old_cells[a1:a2]))
        elif kind == "replace":  # edited cells: pair them in order, type by type, to keep their ids
            left = old_cells[a1:a2]
            for b in range(b1, b2):
                match = next((c for c in left if c.cell_type == new.cells[b].cell_type), None)
                if match is not None:
                    partner[b] = match
                    left = left[left.index(match) + 1 :]
    taken = {c.id for c in partner.values() if "id" in c}
    for i, cell in enumerate(new.cells):
        was = partner.get(i)
        cell["id"] = was.id if was is not None and "id" in was else _new_id(cell, taken)
        if cell.cell_type != "code":
            continue
        same = was is not None and cell_content(was)[1] == cell_content(cell)[1]
        cell.outputs = was.outputs if same else []
        cell.execution_count = was.execution_count if same else None
        fold(cell)
    new.metadata["language_info"] = dict(LANGUAGE)
    if old and "course" in old.metadata:
        new.metadata["course"] = old.metadata["course"]
    new.nbformat, new.nbformat_minor = 4, 5
    return new


def fold(cell: NotebookNode) -> None:
    """Make JupyterLab and Colab fold what the tags ask the site to fold."""
    view = {
        key: True
        for key, tag in (("outputs_hidden", "hide-output"), ("source_hidden", "hide-input"))
        if has_tag(cell, tag)
    }
    for key in ("jupyter", "collapsed"):
        cell.metadata.pop(key, None)
    if view:
        cell.metadata["jupyter"] = view
    if "outputs_hidden" in view:
        cell.metadata["collapsed"] = True


def write_ipynb(path: Path, nb: NotebookNode) -> bool:
    """Write the notebook when it differs from the file; never leave half a file. Returns whether it
    was written."""
    text = nbformat.writes(nb, version=4).rstrip("\n") + "\n"
    return write_text(path, text)


def write_text(path: Path, text: str) -> bool:
    """Write the file at once or not at all, and only when it differs."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", newline="\n")
    os.replace(part, path)
    return True


# ----------------------------------------------------------------------------- notebook to Markdown


def _raw_cells(text: str) -> dict[tuple, list[str]]:
    """The author's own text of each code cell, by content: how options were written is theirs to
    choose."""
    nb = myst_to_notebook(text, add_source_map=True)
    lines = text.splitlines()
    raw: dict[tuple, list[str]] = {}
    for cell, start in zip(nb.cells, nb.metadata["source_map"]):
        if cell.cell_type == "markdown":
            continue
        first = start - 1
        fence = re.match(r"`{3,}", lines[first]).group()
        last = next(
            (i for i in range(start, len(lines)) if lines[i].rstrip() == fence), len(lines) - 1
        )
        key = json.dumps(cell_content(cell, bootstrap=True), sort_keys=True)
        raw.setdefault(key, []).append("\n".join(lines[first : last + 1]))
    return raw


def _options(cell: NotebookNode) -> str:
    """A code cell's metadata as `:key: value` lines."""
    lines = []
    for key, value in cell_content(cell)[2].items():
        flow = yaml.safe_dump(
            value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False
        )
        lines.append(f":{key}: {flow.removesuffix('...' + chr(10)).strip()}\n")
    return "".join(lines)


def to_md(nb: NotebookNode, before: str = "") -> str:
    """The notebook as MyST Markdown, leaving every unchanged cell of the text `before` as its
    author wrote it.

    Raises PairError when the text would not read back as the same cells.
    """
    header = re.match(r"---\n.*?\n---\n", before, re.DOTALL)
    raw = _raw_cells(before) if before else {}
    parts, previous = [], None
    for cell in nb.cells:
        source = cell.source.strip("\n").rstrip()
        kind, _, meta = cell_content(cell)
        if kind == "markdown":
            if not source:
                continue
            if meta:
                parts.append(f"+++ {json.dumps(meta, ensure_ascii=False)}")
            elif previous == "markdown":
                parts.append("+++")
            parts.append(source)
        else:
            same = raw.get(json.dumps(cell_content(cell, bootstrap=True), sort_keys=True))
            if same:
                parts.append(same[0])
            else:
                fence = "`" * max([3] + [len(m) + 1 for m in re.findall(r"^`{3,}", source, re.M)])
                name = "{code-cell} ipython3" if kind == "code" else "{raw-cell}"
                options = _options(cell)
                # A body that opens with a colon or a blank line would be read as options without this.
                gap = "\n" if re.match(r"\s*:|---", source) else ""
                parts.append(f"{fence}{name}\n{options}{gap}{source}\n{fence}")
        previous = kind
    text = (header.group() if header else HEADER) + "\n" + "\n\n".join(parts) + "\n"
    if content(parse_md(text))[1:] != content(nb)[1:]:
        raise PairError(
            "a cell cannot be written as Markdown (a ```{code-cell} fence or a +++ line inside a text cell?)"
        )
    return text
