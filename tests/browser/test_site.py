"""Every page of the built site, as a reader's browser sees it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser

LIMIT = 1_750_000  # bytes of one page, uncompressed; the longest has 0.5 MB of highlighted code, 77 kB compressed
PHONE, WIDE = {"width": 390, "height": 844}, {"width": 1440, "height": 900}


class Visit:
    """One page opened, with everything that went over the wire and everything the console said."""

    def __init__(self, browser, address: str, path: str, viewport: dict, theme: str = "light"):
        self.context = browser.new_context(viewport=viewport, color_scheme=theme)
        self.page = self.context.new_page()
        self.messages: list[str] = []
        self.failed: list[str] = []
        self.foreign: list[str] = []
        self.bytes = 0
        self.address = address
        self.page.on(
            "console",
            lambda m: self.messages.append(m.text) if m.type in ("error", "warning") else None,
        )
        self.page.on("pageerror", lambda e: self.messages.append(str(e)))
        self.page.on("requestfailed", lambda r: self.failed.append(r.url))
        self.page.on("request", self._request)
        self.page.on("response", self._response)
        self.page.goto(f"{address}/{path}", wait_until="load")
        self.page.wait_for_function(
            "[...document.querySelectorAll('div.widget')].every((w) => w.dataset.state)"
        )

    def _request(self, request) -> None:
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.foreign.append(request.url)

    def _response(self, response) -> None:
        if response.status >= 400:
            self.failed.append(f"{response.status} {response.url}")
        self.bytes += int(response.headers.get("content-length", 0))

    def __enter__(self):
        return self

    def __exit__(self, *error: object) -> None:
        self.context.close()


@pytest.fixture(scope="session")
def axe() -> str:
    """The axe-core script, from the package that bundles it."""
    spec = importlib.util.find_spec("axe_playwright_python")
    if spec is None:
        pytest.skip("axe-playwright-python is not installed: run `make install`")
    return (Path(spec.origin).parent / "axe.min.js").read_text("utf8")


def test_page_on_a_phone(browser, address, page_path):
    """No console message, no missing file, no other host, not heavy, no sideways scroll; blocks closed, cards drawn."""
    words = "predict|note|tip|warning|you should see|remember|quiz|exercise \\\\d"
    with Visit(browser, address, page_path, PHONE) as visit:
        page = visit.page
        assert visit.messages == []
        assert visit.failed == []
        assert visit.foreign == []
        assert 0 < visit.bytes < LIMIT, f"{visit.bytes} bytes"
        widths = "[document.documentElement.scrollWidth, document.body.scrollWidth]"
        assert max(page.evaluate(widths)) <= PHONE["width"]
        assert page.locator("div.widget:not([data-state=ready])").count() == 0
        assert page.locator("article details[open]").count() == 0, "a folded block is open at load"
        left = page.evaluate(
            f"""[...document.querySelectorAll('article blockquote > p:first-child > strong:first-child')]
                .map((s) => s.textContent).filter((t) => new RegExp('^({words})', 'i').test(t))"""
        )
        assert left == [], "a callout is not drawn as a card"
        for card in page.query_selector_all(".callout"):
            assert card.query_selector(".callout-title").inner_text().strip()
            assert card.evaluate("c => getComputedStyle(c).borderLeftWidth") == "4px"


# What axe calls "incomplete" is not counted: it means that a person must look.
RUN_AXE = """async () => {
  const found = await axe.run(document, {resultTypes: ['violations']});
  const say = (n) => `${n.target} ${n.any.map((a) => a.message)}`;
  return found.violations.filter((v) => ['serious', 'critical'].includes(v.impact))
    .map((v) => `${v.id} (${v.impact}): ${v.nodes.slice(0, 4).map(say).join(' | ')}`);
}"""


@pytest.mark.parametrize("viewport", [PHONE, WIDE], ids=["390", "1440"])
def test_accessible_in_both_themes(browser, address, page_path, axe, viewport):
    """axe-core finds nothing serious or critical, with folded blocks open."""
    with Visit(browser, address, page_path, viewport) as visit:
        page = visit.page
        page.add_style_tag(content="* { transition: none !important; animation: none !important; }")
        page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        page.evaluate(axe)
        problems = []
        for theme in ("light", "dark"):
            page.emulate_media(color_scheme=theme)
            page.wait_for_function(f"document.documentElement.dataset.theme === '{theme}'")
            problems += [f"{theme}: {line}" for line in page.evaluate(RUN_AXE)]
        assert problems == [], "\n".join(problems)


def test_launch_buttons(site, page_path):
    """A chapter opens in Colab as a notebook at the release tag; every page links the repository."""
    import tomllib

    from conftest import ROOT

    course = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["tool"]["course"]
    html = (site / page_path).read_text("utf8")
    assert f'href="{course["repository"]}"' in html
    if page_path.startswith("chapters/"):
        owner = course["repository"].removeprefix("https://github.com/")
        notebook = page_path.removesuffix(".html") + ".ipynb"
        link = (
            f"https://colab.research.google.com/github/{owner}/blob/{course['revision']}/{notebook}"
        )
        assert link in html
        assert 'class="provenance' in html


def test_formulas_are_drawn(site, page_path):
    """Formulas are SVG in the page, none is left as TeX for a script to find."""
    html = (site / page_path).read_text("utf8")
    assert "mathjax@" not in html.lower()
    assert html.count('class="math notranslate"') <= html.count("<mjx-container")
