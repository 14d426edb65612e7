"""A real browser on the finished site: served from a local port, driven by Playwright.

The browser is the system's Chromium (`apt install chromium`), or the one named by the environment variable
CHROMIUM. Without it these tests are skipped on a laptop, and fail where CI is set: there a missing browser is a
broken machine.
"""

from __future__ import annotations

import functools
import http.server
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
    return named or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def give_up(reason: str) -> None:
    """Skip on a laptop, fail in CI."""
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A file server that does not print every request."""

    def log_message(self, *args: object) -> None:
        """Say nothing."""


def serve(folder: Path) -> tuple[http.server.ThreadingHTTPServer, str]:
    """Serve a folder on a free port. Returns the server and its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_address[1]}"


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
    server, url = serve(site)
    yield url
    server.shutdown()


@pytest.fixture(scope="session")
def browser(site: Path):
    """A headless Chromium."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: run `make install`")
    path = find_chromium()
    if path is None or not Path(path).exists():
        give_up("no Chromium found: install the package `chromium`, or set CHROMIUM to its path")
    with sync_api.sync_playwright() as playwright:
        instance = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield instance
        instance.close()


def pages_of(folder: Path) -> list[str]:
    """Every page of the site, as a path relative to its root."""
    if not folder.is_dir():
        return []
    found = [p.relative_to(folder).as_posix() for p in folder.rglob("*.html")]
    return sorted(p for p in found if not p.startswith(("_static/", "_sources/")) and p != "index.html")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per page for the tests that take `page_path`."""
    if "page_path" in metafunc.fixturenames:
        pages = pages_of(site_folder()) or ["index.html"]
        metafunc.parametrize("page_path", pages)
