"""Where the numbers on a page come from.

`make execute` writes into each notebook on which device, with which versions, in how many seconds
and from which data it was run (`metadata.course.provenance`). This extension prints that at the
foot of every chapter, and all of it in one table wherever a page says

    ```{course-status}
    ```

A notebook without the record says "not executed yet"; one whose `utils` modules have changed since
says so.
"""

from __future__ import annotations

import json
import sys
from html import escape
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


def chapters(srcdir: Path) -> list[Path]:
    """The notebooks, in reading order."""
    return sorted((srcdir / "chapters").glob("[0-9]*.ipynb"))


def read(path: Path) -> dict | None:
    """The record of a notebook, or None."""
    notebook = json.loads(path.read_text("utf8"))
    return notebook.get("metadata", {}).get("course", {}).get("provenance")


def title_of(path: Path) -> str:
    """The first heading of a notebook."""
    for cell in json.loads(path.read_text("utf8"))["cells"]:
        if cell["cell_type"] == "markdown":
            for line in "".join(cell["source"]).splitlines():
                if line.startswith("# "):
                    return line[2:].strip()
    return path.stem


def other_runs(path: Path) -> list[dict]:
    """Records of the same chapter on other devices, whose outputs are not the ones shown."""
    notebook = json.loads(path.read_text("utf8"))
    return list(notebook.get("metadata", {}).get("course", {}).get("runs") or [])


def changed_modules(record: dict, srcdir: Path) -> list[str]:
    """Names of the `utils` modules that differ from those the notebook ran with."""
    if str(srcdir) not in sys.path:
        sys.path.insert(0, str(srcdir))
    try:
        from tools import provenance as recorder  # the same function that recorded them
    except ImportError:  # an edition without the tools
        return []
    return recorder.changed_modules(record, srcdir)


def duration(seconds: float) -> str:
    """`95` -> `1 min 35 s`."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"


def facts(record: dict) -> dict[str, str]:
    """The record as words, in the order in which a reader asks."""
    device = record.get("device", "unknown device")
    if record.get("cores"):
        device += f", {record['cores']} cores"
    versions = [f"{name} {record[name]}" for name in ("jax", "flax", "python") if record.get(name)]
    return {
        "device": device,
        "profile": str(record.get("profile", "–")),
        "time": duration(record["seconds"]) if "seconds" in record else "–",
        "data": "; ".join(record.get("sources") or []) or "none",
        "origin": "; ".join(
            dict.fromkeys(source.split(";")[0] for source in record.get("sources") or [])
        )
        or "none",
        "versions": ", ".join(versions).replace("python", "Python") or "–",
        "date": str(record.get("date", "–")),
    }


class provenance(nodes.General, nodes.Element):
    """The foot of a chapter."""


def foot(record: dict | None, changed: list[str], runs: list[dict]) -> provenance:
    """The foot as a node."""
    node = provenance()
    node["missing"], node["changed"] = record is None, changed
    node["facts"] = facts(record) if record else {}
    node["renamed"] = bool(record and record.get("renamed"))
    node["runs"] = [facts(run) for run in runs]
    return node


def add_foot(app: Sphinx, doctree: nodes.document) -> None:
    """Append the foot to a chapter as it is read."""
    docname = app.env.docname
    path = Path(app.srcdir) / f"{docname}.ipynb"
    if not docname.startswith("chapters/") or not path.is_file():
        return
    record = read(path)
    node = foot(
        record, changed_modules(record, Path(app.srcdir)) if record else [], other_runs(path)
    )
    sections = [child for child in doctree.children if isinstance(child, nodes.section)]
    (sections[-1] if sections else doctree).append(node)


def visit_provenance(self, node: provenance) -> None:
    """One quiet line, and a warning when the package has moved on."""
    if node["missing"]:
        self.body.append(
            '<p class="provenance">Not executed yet: this page shows no recorded outputs.</p>'
        )
        raise nodes.SkipNode
    f = {key: escape(value) for key, value in node["facts"].items()}
    stale = ""
    if node["changed"]:
        names = ", ".join(f"<code>{escape(name)}</code>" for name in node["changed"])
        stale = f' <strong class="provenance-stale">Older than the package:</strong> {names} changed since.'
    if node["renamed"]:
        stale += " The code moved to the package's new names after this run; at this size it has not run again since."
    self.body.append(
        f'<p class="provenance">Recorded on {f["date"]}: {f["device"]}, profile <code>{f["profile"]}</code>, '
        f"{f['time']}. "
        f"Data: {f['data']}. {f['versions']}.{stale}</p>"
    )
    for run in node["runs"]:
        f = {key: escape(value) for key, value in run.items()}
        self.body.append(
            f'<p class="provenance provenance-other">Also run on {f["date"]} (outputs not shown): {f["device"]}, '
            f"profile <code>{f['profile']}</code>, {f['time']}. Data: {f['data']}. {f['versions']}.</p>"
        )
    raise nodes.SkipNode


def text(words: str) -> nodes.paragraph:
    """A table cell."""
    return nodes.paragraph("", words)


class Status(SphinxDirective):
    """The table of all recorded runs."""

    def run(self) -> list[nodes.Node]:
        """Called where a page holds the directive."""
        srcdir = Path(self.env.srcdir)
        rows = []
        for path in chapters(srcdir):
            self.env.note_dependency(str(path))
            record = read(path)
            if record is None:
                rows.append([title_of(path), "not executed yet", "", "", "", ""])
                continue
            f = facts(record)
            changed = changed_modules(record, srcdir)
            state = (
                f["date"] if not changed else f"{f['date']}, older than the package"
            )  # its foot says which modules
            rows.append([title_of(path), f["device"], f["profile"], f["time"], state, f["origin"]])
            for run in other_runs(path):
                f = facts(run)
                rows.append(
                    ["(also)", f["device"], f["profile"], f["time"], f["date"], f["origin"]]
                )
        if not rows:
            return [nodes.paragraph("", "No chapter has been recorded yet.")]
        return [table(["chapter", "device", "profile", "time", "recorded", "data"], rows)]


def table(head: list[str], rows: list[list[str]]) -> nodes.table:
    """A docutils table of plain text."""
    group = nodes.tgroup(cols=len(head))
    group += [nodes.colspec(colwidth=1) for _ in head]
    group += nodes.thead("", nodes.row("", *[nodes.entry("", text(word)) for word in head]))
    group += nodes.tbody(
        "", *[nodes.row("", *[nodes.entry("", text(cell)) for cell in row]) for row in rows]
    )
    return nodes.table("", group, classes=["status"])


def outdated(app: Sphinx, env: object, added: set, changed: set, removed: set) -> list[str]:
    """A change in `utils/` must show on pages whose own file did not change."""
    return [
        name
        for name in env.found_docs
        if name.startswith("chapters/") or name.endswith("reference/status")
    ]


def _skip(self, node: provenance) -> None:
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict:
    """Register the foot and the table."""
    app.add_node(provenance, html=(visit_provenance, None), text=(_skip, None), latex=(_skip, None))
    app.add_directive("course-status", Status)
    app.connect("doctree-read", add_foot)
    app.connect("env-get-outdated", outdated)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
