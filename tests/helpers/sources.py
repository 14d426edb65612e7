"""Where files come from, in miniature: a mirror, a hub on this machine, GPT-2's tokenizer with one merge."""

import hashlib
import http.server
import json
from pathlib import Path

from utils.course import stories
from utils.hf import hub

VALID = "datasets/roneneldan/TinyStories/TinyStories-valid.txt"
TRAIN = "datasets/roneneldan/TinyStories/TinyStories-train.txt"
REPO = hub.TINYSTORIES
REVISION = hub.PINNED["datasets", REPO].revision


def as_file(n: int, seed: int) -> bytes:
    return "\n<|endoftext|>\n".join(stories.generate(n, seed)).encode()


def write_mirror(root: Path, files: dict[str, bytes]) -> None:
    manifest = {}
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
        manifest[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (root / "manifest.json").write_text(json.dumps(manifest))


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Answers `resolve` requests as the hub does for a large file: its sha256 in a header, then the bytes."""

    content = as_file(520, 9)
    mood = "well"  # or "truncates", "lies", "absent", "broken"
    asked: list[str] = []

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.asked.append(f"{self.command} {self.path}")
        wanted = f"/datasets/{REPO}/resolve/{REVISION}/TinyStories-valid.txt"
        if self.mood == "broken":
            return self.headers_only(503)
        if self.path == "/":
            return self.headers_only(200)
        if self.path != wanted or self.mood == "absent":
            return self.headers_only(
                404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "no such entry"}
            )
        digest = hashlib.sha256(self.content).hexdigest()
        content = self.content[:-1] + b"!" if self.mood == "lies" else self.content
        self.send_response(200)
        for name, value in {
            "X-Repo-Commit": REVISION,
            "ETag": f'"{digest}"',
            "X-Linked-Etag": f'"{digest}"',
            "X-Linked-Size": str(len(content)),
            "Content-Length": str(len(content)),
            "Accept-Ranges": "bytes",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) // 2] if self.mood == "truncates" else content)

    def headers_only(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": "0", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *arguments) -> None:
        pass


def gpt2_files() -> dict[str, bytes]:
    """Stand-ins with the shape of GPT-2's two files: 256 single bytes and one merge."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    order = printable + [b for b in range(256) if b not in printable]
    letters = {b: chr(b) for b in printable} | {
        b: chr(256 + i) for i, b in enumerate(order[len(printable) :])
    }
    vocabulary = {letters[b]: i for i, b in enumerate(order)} | {"th": 256, "<|endoftext|>": 257}
    return {"encoder.json": json.dumps(vocabulary).encode(), "vocab.bpe": b"#version: 0.2\nt h\n"}
