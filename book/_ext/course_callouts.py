"""Callouts: quotes that begin with a bold word become cards on the site.

Chapters are read in three places (site, Colab, GitHub), so a callout is written as plain Markdown:

    > **Predict.** What does the loss do?

GitHub and Colab show a quote; here the quote is turned into a card with a title row. An exercise
carries its difficulty and its minutes in the same line: `> **Exercise 4.1**, core, 10 minutes.
Write …`. A quote that begins otherwise stays a quote.
"""

from __future__ import annotations

import re
from html import escape

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

# First word -> kind of card. "You should see" is the start of a sentence, so its words stay in the text.
KINDS = {
    "predict": "predict",
    "note": "note",
    "tip": "tip",
    "warning": "warning",
    "you should see": "see",
    "remember": "remember",
    "quiz": "quiz",
    "exercise": "exercise",
}
TITLE = re.compile(
    r"^(predict|note|tip|warning|you should see|remember|quiz|exercise(?= \d))\b(.*)$", re.I | re.S
)
LEVEL = re.compile(r"^,\s*(warm-up|core|stretch)\s*,\s*([^.]*?minutes?)\s*\.?\s*", re.I)


class callout(nodes.General, nodes.Element):
    """A card: `kind`, `title` and a list of `badges`."""


def first_strong(quote: nodes.block_quote) -> tuple[nodes.paragraph, nodes.strong] | None:
    """The bold word that opens a quote. MyST leaves an empty text node before it: skip that."""
    if not quote.children or not isinstance(quote[0], nodes.paragraph):
        return None
    for child in quote[0].children:
        if isinstance(child, nodes.Text) and not child.astext().strip():
            continue
        return (quote[0], child) if isinstance(child, nodes.strong) else None
    return None


def to_callout(quote: nodes.block_quote) -> callout | None:
    """The card for a quote, or None when it is an ordinary quote."""
    first = first_strong(quote)
    if first is None:
        return None
    paragraph, strong = first
    words = strong.astext().strip()
    match = TITLE.match(words)
    if match is None:
        return None
    kind = KINDS[match[1].lower()]
    badges: list[str] = []
    title = words.rstrip(" .:")
    children = list(paragraph.children)
    after = children[children.index(strong) + 1 :]
    if kind == "see":
        # "**You should see** a falling line" reads as one sentence: name the card, keep the sentence.
        title = "Checkpoint"
    else:
        paragraph.remove(strong)
        if after and isinstance(after[0], nodes.Text):
            text = after[0].astext()
            level = LEVEL.match(text) if kind == "exercise" else None
            if level:
                badges = [level[1].lower(), level[2]]
                text = text[level.end() :]
            text = text.lstrip(" .,:") if kind != "exercise" else text.lstrip(" .,")
            paragraph.replace(after[0], nodes.Text(text))
        if not paragraph.astext().strip() and not any(
            isinstance(n, nodes.Element) for n in paragraph.children
        ):
            quote.remove(paragraph)
    card = callout("", *quote.children, kind=kind, title=title, badges=badges)
    card.source, card.line = quote.source, quote.line
    return card


class Callouts(SphinxTransform):
    """Replace the quotes of a page."""

    default_priority = 500

    def apply(self, **kwargs: object) -> None:
        """Called by Sphinx once per page."""
        for quote in list(self.document.findall(nodes.block_quote)):
            card = to_callout(quote)
            if card is not None:
                quote.replace_self(card)


def visit_callout(self, node: callout) -> None:
    """The card's HTML."""
    kind, title = node["kind"], escape(node["title"])
    badges = "".join(
        f'<span class="callout-badge">{escape(badge)}</span>' for badge in node["badges"]
    )
    self.body.append(
        f'<div class="callout callout-{kind}" role="note" aria-label="{title}">'
        f'<p class="callout-title"><span class="callout-name">{title}</span>{badges}</p>\n'
    )


def depart_callout(self, node: callout) -> None:
    """Close the card."""
    self.body.append("</div>\n")


def _plain(self, node: callout) -> None:
    """Other builders (search, text) read the children alone."""


def setup(app: Sphinx) -> dict:
    """Register the transform and the card."""
    app.add_node(
        callout, html=(visit_callout, depart_callout), text=(_plain, _plain), latex=(_plain, _plain)
    )
    app.add_transform(Callouts)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
