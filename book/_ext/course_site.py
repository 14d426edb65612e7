"""What the theme needs to be told, and mends.

Three things: theme options (they cannot stand in _config.yml, where they would wipe the launch
buttons), scripts of other extensions that this site does not use, and accessibility repairs of the
finished page (a box that scrolls must be reachable by keyboard, an image link needs a name).
"""

from __future__ import annotations

import re

from docutils import nodes
from sphinx.application import Sphinx

THEME = {
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
    "navigation_with_keys": False,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "home_page_in_toc": True,
    # The bar above the sidebars would hold a second search box and nothing else.
    "navbar_start": [],
    "navbar_center": [],
    "navbar_end": [],
    "navbar_persistent": [],
    "logo": {"alt_text": "LoRA in JAX: home", "text": "LoRA in JAX"},
}
# sphinx-thebe and sphinx-comments would prepare live code and comment threads from other hosts;
# nothing here uses them.
UNUSED = ("thebe", "comments", "hypothesis", "utterances")


def theme_options(app: Sphinx) -> None:
    """Add ours to the options that Jupyter Book made of _config.yml."""
    app.config.html_theme_options.update(THEME)
    app.config.html_context.setdefault("default_mode", "auto")


def mend_body(html: str) -> str:
    """Boxes that scroll sideways (code, printed output, tables) are reachable by keyboard."""
    html = re.sub(r"<pre(?![^>]*tabindex)", '<pre tabindex="0"', html)
    box = '<div class="table-box" role="region" aria-label="Table" tabindex="0">'
    html = html.replace(
        '<div class="pst-scrollable-table-container">', box
    )  # the theme's own box has no name
    html = re.sub(r'(?<!tabindex="0">)(<table\b.*?</table>)', box + r"\1</div>", html, flags=re.S)
    # docutils calls the bibliography a list without giving it list items; each entry is named by
    # its own label.
    html = html.replace('<div role="list" class="citation-list">', '<div class="citation-list">')
    html = re.sub(r'(<div class="citation"[^>]*?) role="doc-biblioentry"', r"\1", html)
    # The theme prepares live code on a foreign server, also where it is switched off.
    html = re.sub(
        r'<script type="text/x-thebe-config">.*?</script>\s*<script>kernelName.*?</script>',
        "",
        html,
        flags=re.S,
    )
    return html


def mend_page(
    app: Sphinx, pagename: str, templatename: str, context: dict, doctree: nodes.document | None
) -> None:
    """Called for every page before it is written."""
    if context.get("body"):
        context["body"] = mend_body(context["body"])
    for key in ("script_files", "css_files"):
        context[key] = [
            f for f in context.get(key, []) if not any(word in str(f).lower() for word in UNUSED)
        ]


def setup(app: Sphinx) -> dict:
    """Register the hooks."""
    app.connect("builder-inited", theme_options, priority=100)
    app.connect("html-page-context", mend_page, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
