"""Mathematics as SVG, made while the site is built.

Sphinx would load MathJax in the reader's browser, from another host. Here the same MathJax runs
once, at build time, and the page receives finished drawings: nothing to download, nothing that
jumps while the page loads, and the same look everywhere. Each formula also carries MathML, hidden
from sight, for screen readers.

Where the parts come from: MathJax from the Python package `sphinx-mathjax-offline`, and a
JavaScript engine (node) from `playwright`, which the tests need anyway. A `node` on the PATH serves
too.

Glyphs are shared: every outline ("the letter B") is stored once per page, however many formulas use it.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number

logger = logging.getLogger(__name__)

GLYPH = re.compile(r'<path id="(MJX-\d+-([^"]+))" d="([^"]*)"></path>')


def find_node() -> str:
    """A JavaScript engine: the one inside the playwright package, else `node` on the PATH."""
    spec = importlib.util.find_spec("playwright")
    if spec and spec.submodule_search_locations:
        driver = Path(spec.submodule_search_locations[0]) / "driver"
        for name in ("node", "node.exe"):
            if (driver / name).is_file():
                return str(driver / name)
    node = shutil.which("node")
    if node:
        return node
    raise ExtensionError(
        "formulas need node: expected it in the playwright package, found none; run `make install`"
    )


def find_mathjax() -> Path:
    """The folder with MathJax's files. The package's name holds hyphens, so it is found on disk,
    not imported."""
    spec = importlib.util.find_spec("sphinx-mathjax-offline")
    if spec is None or spec.origin is None:
        raise ExtensionError(
            "formulas need the package sphinx-mathjax-offline, found none; run `make install`"
        )
    return Path(spec.origin).parent / "static" / "mathjax"


class Renderer:
    """One MathJax process for the whole build, one JSON line per formula."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None
        self.cache: dict[tuple[str, bool], str] = {}

    def render(self, tex: str, display: bool) -> str:
        """SVG markup of a formula. Raises ValueError with MathJax's own message on bad TeX."""
        key = (tex, display)
        if key not in self.cache:
            if self.process is None:
                script = Path(__file__).with_name("mathjax_svg.js")
                self.process = subprocess.Popen(
                    [find_node(), str(script), str(find_mathjax())],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    encoding="utf-8",
                )
            self.process.stdin.write(json.dumps({"tex": tex, "display": display}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
            if not line:
                raise ExtensionError("MathJax ended unexpectedly: its own message is above")
            answer = json.loads(line)
            if "error" in answer:
                raise ValueError(answer["error"])
            self.cache[key] = answer["svg"]
        return self.cache[key]

    def close(self) -> None:
        """End the process, if one was started."""
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait(timeout=10)
            self.process = None


RENDERER = Renderer()


def _svg(node: nodes.Element, tex: str, display: bool) -> str:
    try:
        return RENDERER.render(tex, display)
    except ValueError as error:
        logger.warning("formula %r: %s", tex, error, location=node)
        return f"<code>{nodes.unescape(tex)}</code>"


def visit_inline(self, node: nodes.math) -> None:
    """`$x$` in a sentence."""
    self.body.append(f'<span class="math notranslate">{_svg(node, node.astext(), False)}</span>')
    raise nodes.SkipNode


def visit_display(self, node: nodes.math_block) -> None:
    """A formula on lines of its own; it scrolls inside its box when it is wider than the page."""
    tex = node.astext().strip()
    self.body.append(
        self.starttag(
            node,
            "div",
            CLASS="math-display notranslate",
            tabindex="0",
            role="group",
            **{"aria-label": "Formula"},
        )
    )
    if node["number"]:
        number = get_node_equation_number(self, node)
        self.body.append(f'<span class="eqno">({number})')
        self.add_permalink_ref(node, "Link to this equation")
        self.body.append("</span>")
    self.body.append(_svg(node, tex, True) + "</div>\n")
    raise nodes.SkipNode


def share_glyphs(
    app: Sphinx, pagename: str, templatename: str, context: dict, doctree: nodes.document | None
) -> None:
    """Store every glyph outline once per page."""
    body = context.get("body")
    if not body or "MJX-" not in body:
        return
    outlines: dict[str, str] = {}
    rename: dict[str, str] = {}

    def collect(match: re.Match) -> str:
        full, short, path = match.groups()
        outlines[short] = path
        rename[full] = f"g-{short}"
        return ""

    body = GLYPH.sub(collect, body).replace("<defs></defs>", "")
    body = re.sub(r'xlink:href="#(MJX-[^"]+)"', lambda m: f'href="#{rename.get(m[1], m[1])}"', body)
    glyphs = "".join(f'<path id="g-{name}" d="{path}"></path>' for name, path in outlines.items())
    sheet = f'<svg class="glyphs" width="0" height="0" aria-hidden="true" focusable="false"><defs>{glyphs}</defs></svg>'
    context["body"] = body + sheet


def finish(app: Sphinx, exception: Exception | None) -> None:
    """End MathJax with the build."""
    RENDERER.close()


def setup(app: Sphinx) -> dict:
    """Register the renderer under the name that _config.yml selects."""
    app.add_html_math_renderer("mathjax-svg", (visit_inline, None), (visit_display, None))
    app.connect("html-page-context", share_glyphs)
    app.connect("build-finished", finish)
    return {"parallel_read_safe": True, "parallel_write_safe": False}
