"""The link checker, asked about a server of its own on this machine."""

import http.server
import threading

import pytest

from tests.helpers.folders import PAGE, course
from tools import linkcheck


@pytest.fixture(scope="module")
def server():
    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(int(self.path.strip("/")))
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "status, dead",
    [(200, False), (403, False), (429, False), (404, True), (410, True), (503, True)],
)
def test_verdict(server, status, dead):
    assert bool(linkcheck.verdict(f"{server}/{status}", tries=2, pause=0)) == dead


def test_no_server():
    assert linkcheck.verdict("http://127.0.0.1:9/", tries=1, timeout=2)


def test_links_are_found_with_their_places(tmp_path):
    text = "See [a](https://arxiv.org/abs/2106.09685) and <https://docs.jax.dev/en/latest/#top>, (https://a.b/c_(d)).\n"
    own = "[b](https://github.com/lora-in-jax/lora-in-jax/issues) `https://not.a/link`\n"
    course(tmp_path, PAGE.replace("Between.", text + own))
    links = linkcheck.external_links(tmp_path)
    assert set(links) == {
        "https://arxiv.org/abs/2106.09685",
        "https://docs.jax.dev/en/latest/",
        "https://a.b/c_(d)",
    }
    assert links["https://arxiv.org/abs/2106.09685"][0].startswith("chapters/01_page.md:")
