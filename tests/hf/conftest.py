"""What the tests of sources share: this machine without any, and small ones to put in their place."""

import hashlib
import http.server
import logging
import threading
from pathlib import Path

import pytest
import tiktoken

from tests.helpers.sources import (
    REPO,
    REVISION,
    TRAIN,
    VALID,
    FakeHub,
    as_file,
    gpt2_files,
    write_mirror,
)
from utils.course import gpt2 as gpt2_module
from utils.hf import hub


@pytest.fixture
def isolated(monkeypatch, tmp_path):
    """No mirror, no settings, no network, and nothing remembered from another test."""
    for name in ("COURSE_MIRROR", "HF_HUB_OFFLINE", "TIKTOKEN_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DATA_GYM_CACHE_DIR", str(tmp_path / "tiktoken"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(gpt2_module, "URL", "http://127.0.0.1:9/")
    monkeypatch.setattr(hub, "PROBE_SECONDS", 1.0)
    monkeypatch.setattr(hub, "SOURCES_USED", [])
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2", raising=False)
    hub.answers.cache_clear()


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, "utils")
    return caplog


@pytest.fixture
def small_mirror(tmp_path, monkeypatch) -> Path:
    root = tmp_path / "mirror"
    write_mirror(root, {TRAIN: as_file(20, 5), VALID: as_file(4, 6)})
    monkeypatch.setenv("COURSE_MIRROR", str(root))
    return root


@pytest.fixture
def fake_hub(monkeypatch):
    handler = type("Handler", (FakeHub,), {"asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    digest = hashlib.sha256(handler.content).hexdigest()
    pin = hub.Pin(REVISION, {"TinyStories-valid.txt": digest})
    monkeypatch.setitem(hub.PINNED, ("datasets", REPO), pin)
    yield handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def tiny_gpt2(monkeypatch):
    """tiktoken and the hub module believe that GPT-2 is the stand-in; returns its files under their cache names."""
    files = gpt2_files()
    urls = {
        name: f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        for name in files
    }
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}

    def gpt2():
        return {
            "name": "gpt2",
            "pat_str": r"\S+|\s",
            "special_tokens": {"<|endoftext|>": 257},
            "mergeable_ranks": tiktoken.load.data_gym_to_mergeable_bpe_ranks(
                urls["vocab.bpe"],
                urls["encoder.json"],
                digests["vocab.bpe"],
                digests["encoder.json"],
            ),
        }

    tiktoken.list_encoding_names()
    monkeypatch.setitem(tiktoken.registry.ENCODING_CONSTRUCTORS, "gpt2", gpt2)
    names = {name: hashlib.sha1(url.encode()).hexdigest() for name, url in urls.items()}
    monkeypatch.setattr(gpt2_module, "SHA256", {names[name]: digests[name] for name in files})
    by_url = {urls[name]: content for name, content in files.items()}
    monkeypatch.setattr(tiktoken.load, "read_file", lambda url: by_url[url])
    yield {names[name]: content for name, content in files.items()}
    tiktoken.registry.ENCODINGS.pop("gpt2", None)
