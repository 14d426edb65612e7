"""The site's own Sphinx extensions, on a book of two small notebooks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

pytest.importorskip("jupyter_book", reason="the book's packages are not installed")
from tools.provenance import module_hashes  # noqa: E402

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TEXT = """# A chapter

> **Predict.** Does it *fall*?

> **You should see** a line.

> **Exercise 1.1**, warm-up, 5 minutes. Write `f`.

> **Warning.**
>
> - a list
> - of $x^2$

> **Noted** is no callout.

> An ordinary quote with a **Tip** in it.

Inline $a_1$ and

$$
\\sum_i a_i
$$

| a | b |
|---|--:|
| `x` | 1 |
"""


def notebook(provenance: dict | None, runs: list[dict] | None = None):
    """A chapter with one folded output."""
    cell = new_code_cell("print(1)", metadata={"tags": ["hide-output"]}, execution_count=1)
    cell.outputs = [new_output("stream", name="stdout", text="1\n")]
    page = new_notebook(cells=[new_markdown_cell(TEXT), cell])
    page.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    page.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    if provenance:
        page.metadata["course"] = {"provenance": provenance, "runs": runs or []}
    return page


RECORD = {
    "device": "AMD <EPYC>",
    "cores": 2,
    "python": "3.12.1",
    "jax": "0.10.2",
    "flax": "0.12.8",
    "seconds": 95.4,
    "profile": "cpu",
    "sources": ["TinyStories train: mirror"],
    "date": "2026-11-22",
    "utils": {},
}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The book, built as `make book` does, warnings being errors."""
    book = tmp_path_factory.mktemp("book")
    shutil.copytree(ROOT / "book", book / "book", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tools", book / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "utils", book / "utils", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "_config.yml", book)
    (book / "_toc.yml").write_text(
        "format: jb-book\nroot: book/reference/status\nchapters:\n"
        "- file: chapters/01_fresh\n- file: chapters/02_stale\n- file: chapters/03_new\n"
    )
    (book / "chapters").mkdir()
    fresh = RECORD | {"utils": module_hashes(["utils", "utils.course.checks", "utils.lora"])}
    stale = RECORD | {"utils": {"utils.lora": "0" * 16}}
    other = RECORD | {"device": "NVIDIA H200", "profile": "large", "cores": None}
    nbformat.write(notebook(fresh, [other]), book / "chapters" / "01_fresh.ipynb")
    nbformat.write(notebook(stale), book / "chapters" / "02_stale.ipynb")
    nbformat.write(notebook(None), book / "chapters" / "03_new.ipynb")
    command = [
        sys.executable,
        "-c",
        "from jupyter_book.cli.main import main; main()",
        "build",
        "-W",
        "--keep-going",
        str(book),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return book / "_build" / "html"


def article(built: Path, name: str) -> str:
    """The text part of a page, as HTML."""
    html = (built / f"{name}.html").read_text("utf8")
    return html[html.index('<article class="bd-article">') : html.index("</article>")]


def test_callouts_become_cards(built):
    html = article(built, "chapters/01_fresh")
    for kind in ("predict", "see", "exercise", "warning"):
        assert html.count(f'class="callout callout-{kind}"') == 1
    assert (
        '<span class="callout-badge">warm-up</span><span class="callout-badge">5 minutes</span>'
        in html
    )
    assert "<p>Does it <em>fall</em>?</p>" in html
    assert "<strong>You should see</strong> a line." in html
    assert html.count("<blockquote>") == 2, "an ordinary quote stays a quote"
    assert "<strong>Predict" not in html


def test_formulas_are_drawn_once_per_glyph(built):
    html = article(built, "chapters/01_fresh")
    assert html.count("<mjx-container") == 3
    assert html.count('id="g-TEX-I-1D44E"') == 1, "the letter a occurs twice, its outline once"
    assert "MathJax.js" not in html and "cdn" not in html.lower()


def test_provenance_at_the_foot(built):
    html = article(built, "chapters/01_fresh")
    assert "Recorded on 2026-11-22: AMD &lt;EPYC&gt;, 2 cores" in html
    assert "1 min 35 s" in html and "TinyStories train: mirror" in html and "jax 0.10.2" in html
    assert (
        "Also run on 2026-11-22 (outputs not shown): NVIDIA H200, profile <code>large</code>"
        in html
    )
    assert "Older than the package" not in html


def test_provenance_says_when_the_package_moved_on(built):
    html = article(built, "chapters/02_stale")
    assert "Older than the package:</strong> <code>utils.lora</code>" in html


def test_provenance_of_a_chapter_never_run(built):
    assert "Not executed yet" in article(built, "chapters/03_new")


def test_status_table(built):
    html = article(built, "book/reference/status")
    for words in ("AMD &lt;EPYC&gt;", "NVIDIA H200", "not executed yet", "older than the package"):
        assert words in html


def test_folded_output_is_closed(built):
    html = article(built, "chapters/01_fresh")
    assert html.count("<details") == 1 and "<details open" not in html


def test_tables_scroll_in_their_own_box(built):
    assert 'role="region" aria-label="Table"' in article(built, "chapters/01_fresh")


def test_vocabulary_of_the_widget(built):
    """The merges are the kept file's; the classes are ranges that do not overlap."""
    text = (built / "_static" / "widgets" / "stories2048.js").read_text("utf8")
    data = json.loads(text[text.index("{") : text.rindex("}") + 1])
    kept = (
        (ROOT / "utils" / "course" / "assets" / "stories2048.tiktoken").read_text("ascii").split()
    )
    assert data["tokens"] == kept[0::2]
    for name in ("letters", "numbers", "spaces"):
        flat = [point for pair in data[name] for point in pair]
        assert flat == sorted(flat)
    assert [0x85, 0x85] in data["spaces"] and not any(a <= 0xFEFF <= b for a, b in data["spaces"])


def test_nothing_comes_from_elsewhere(built):
    """No script, style, font or picture has a foreign address."""
    import re

    for page in built.rglob("*.html"):
        html = page.read_text("utf8")
        loaded = re.findall(r'<(?:script|img|iframe|source)[^>]+src="(https?:[^"]+)"', html)
        loaded += re.findall(r'<link[^>]+href="(https?:[^"]+)"', html)
        assert loaded == [], page.name
