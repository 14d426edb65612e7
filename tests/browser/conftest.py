"""A real browser on the finished site: served from a local port, driven by Playwright.

The browser is the system's Chromium (`apt install chromium`), or the one named by the environment variable
CHROMIUM. Without it these tests are skipped on a laptop, and fail where CI is set: there a missing browser is a
broken machine.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import shutil
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [
    "--no-sandbox",
    "--headless",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-gpu",
    "--disable-quic",
]


def site_folder() -> Path:
    """The built site: _build/html, or the folder named by COURSE_SITE."""
    return Path(os.environ.get("COURSE_SITE", ROOT / "_build" / "html"))


def find_chromium() -> str | None:
    """CHROMIUM, else the system's."""
    named = os.environ.get("CHROMIUM")
    return (
        named
        or shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )


def give_up(reason: str) -> None:
    """Skip on a laptop, fail in CI."""
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A file server that does not print every request."""

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def served(folder: Path):
    """The address of a folder that is served on a free port meanwhile."""
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def site() -> Path:
    """The folder of the built site."""
    folder = site_folder()
    if not (folder / "index.html").is_file():
        give_up(f"no built site at {folder}: run `make book` first")
    return folder


@pytest.fixture(scope="session")
def address(site: Path):
    """Where the site is served."""
    with served(site) as url:
        yield url


@pytest.fixture(scope="session")
def browser(site: Path):
    """A headless Chromium."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: run `make install`"
    )
    path = find_chromium()
    if path is None or not Path(path).exists():
        give_up("no Chromium found: install the package `chromium`, or set CHROMIUM to its path")
    with sync_api.sync_playwright() as playwright:
        instance = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield instance
        instance.close()


PAGE = """<!doctype html><html lang="en" data-theme="light"><head><meta charset="utf-8"><title>bench</title>
    <meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">
    <link rel="stylesheet" href="_static/course.css"><script defer src="_static/course.js"></script></head>
    <body><main class="bd-article"><h1>x</h1>%s</main></body></html>"""


def bench_page(folder: Path, site: Path, body: str, **data: object) -> Path:
    """The folder, made a site of one page that holds `body`, with scripts and styles of this checkout.

    `data`: what widgets read from files of their own, by the file's name with "_" for "-".
    """
    shutil.copytree(site / "_static", folder / "_static")
    shutil.copytree(ROOT / "book" / "_static", folder / "_static", dirs_exist_ok=True)
    for name, values in data.items():
        name = name.replace("_", "-")
        script = f'Course.data("{name}", {json.dumps(values)});'
        (folder / "_static" / "widgets" / f"{name}.js").write_text(script, "utf8")
    (folder / "index.html").write_text(PAGE % body, "utf8")
    return folder


@pytest.fixture(scope="module")
def bench_address(bench: Path):
    """Where the page of a module's `bench` is served."""
    with served(bench) as url:
        yield url


def opened(browser, address: str, scheme: str = "light"):
    """A page at phone width, its widgets alive; what it asks for and what its console says are kept on it."""
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(5000)
    page.said, page.asked = [], []
    page.on(
        "console", lambda m: page.said.append(m.text) if m.type in ("error", "warning") else None
    )
    page.on("request", lambda r: page.asked.append(r.url))
    page.goto(address)
    page.wait_for_function(
        "[...document.querySelectorAll('div.widget')].every((w) => w.dataset.state === 'ready')"
    )
    return context, page


@pytest.fixture
def page(browser, bench_address: str):
    """The bench page; it may ask for nothing elsewhere, and its console stays silent."""
    context, page = opened(browser, bench_address)
    yield page
    assert page.said == []
    assert all(url.startswith((bench_address, "data:")) for url in page.asked)
    context.close()


def pages_of(folder: Path) -> list[str]:
    """Every page of the site, as a path relative to its root."""
    if not folder.is_dir():
        return []
    found = [p.relative_to(folder).as_posix() for p in folder.rglob("*.html")]
    return sorted(
        p for p in found if not p.startswith(("_static/", "_sources/")) and p != "index.html"
    )


SAMPLE = (
    "12_mesh",
    "13_r1",
)  # chapters whose accessibility is checked in every run, at a phone's width


def pytest_itemcollected(item) -> None:
    """axe takes 20 s for a chapter: all of them, at both widths, are checked in `make test-long`."""
    if item.name.startswith("test_accessible_in_both_themes[chapters/"):
        sampled = item.name.endswith("-390]") and any(name in item.name for name in SAMPLE)
        if not sampled:
            item.add_marker(pytest.mark.long)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per page for the tests that take `page_path`."""
    if "page_path" in metafunc.fixturenames:
        pages = pages_of(site_folder()) or ["index.html"]
        metafunc.parametrize("page_path", pages)
