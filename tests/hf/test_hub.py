"""Where files come from: mirror, hub, built in. The hub is a server on this machine that answers as the real one."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiktoken

from utils import CourseError
from utils.data import corpus, stories, tokenizer
from utils.hf import hub, mirror

VALID = "datasets/roneneldan/TinyStories/TinyStories-valid.txt"
TRAIN = "datasets/roneneldan/TinyStories/TinyStories-train.txt"
REPO = hub.TINYSTORIES
REVISION = hub.PINNED["datasets", REPO].revision
REAL_MIRROR = Path(os.environ.get("COURSE_MIRROR") or Path(__file__).resolve().parents[3] / "shared" / "mirror")


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No mirror, no settings, no network, and nothing remembered from another test."""
    for name in ("COURSE_MIRROR", "HF_HUB_OFFLINE", "TIKTOKEN_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COURSE_PROFILE", "cpu")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DATA_GYM_CACHE_DIR", str(tmp_path / "tiktoken"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(hub, "GPT2_URL", "http://127.0.0.1:9/")
    monkeypatch.setattr(hub, "PROBE_SECONDS", 1.0)
    monkeypatch.setattr(hub, "_answers", {})
    monkeypatch.setattr(hub, "SOURCES_USED", [])
    monkeypatch.setattr(mirror, "_verified", set())
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2", raising=False)


def corpus(n: int, seed: int) -> bytes:
    return "\n<|endoftext|>\n".join(stories.generate(n, seed)).encode()


def write_mirror(root: Path, files: dict[str, bytes]) -> None:
    manifest = {}
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
        manifest[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (root / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def small_mirror(tmp_path, monkeypatch) -> Path:
    root = tmp_path / "mirror"
    write_mirror(root, {TRAIN: corpus(20, 5), VALID: corpus(4, 6)})
    monkeypatch.setenv("COURSE_MIRROR", str(root))
    return root


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 300
    return message


# --------------------------------------------------------------------------------------------------------- the mirror


def test_mirror_comes_first_and_is_said(small_mirror, capsys):
    train, valid = corpus.load_stories(), corpus.load_stories("validation")
    assert train.texts == stories.generate(20, 5) and valid.texts == stories.generate(4, 6)
    assert "mirror, TinyStories-train.txt" in capsys.readouterr().out
    assert hub.SOURCES_USED == [
        ("20 train stories", "mirror, TinyStories-train.txt"),
        ("4 validation stories", "mirror, TinyStories-valid.txt"),
    ]
    assert corpus.load_stories(limit=3).texts == stories.generate(3, 5)


def damage_remove(root):
    (root / VALID).unlink()
    return "found no file"


def damage_empty(root):
    (root / VALID).write_bytes(b"")
    return "found 0"


def damage_truncate(root):
    content = (root / VALID).read_bytes()
    (root / VALID).write_bytes(content[:-7])
    return f"expected {len(content):,} bytes, found {len(content) - 7:,}"


def damage_alter(root):
    content = bytearray((root / VALID).read_bytes())
    content[100] ^= 1
    (root / VALID).write_bytes(content)
    return "expected sha256"


def damage_unlisted(root):
    manifest = json.loads((root / "manifest.json").read_text())
    del manifest[VALID]
    (root / "manifest.json").write_text(json.dumps(manifest))
    return "expected an entry in manifest.json"


def damage_manifest_removed(root):
    (root / "manifest.json").unlink()
    return "manifest.json: expected the mirror's list of files, found none"


def damage_manifest_cut(root):
    text = (root / "manifest.json").read_text()
    (root / "manifest.json").write_text(text[:-9])
    return "manifest.json: expected file -> {bytes, sha256} in JSON"


def damage_manifest_shape(root):
    (root / "manifest.json").write_text(json.dumps({VALID: 401012}))
    return "manifest.json: expected file -> {bytes, sha256} in JSON"


def damage_manifest_list(root):
    (root / "manifest.json").write_text("[]")
    return "manifest.json: expected file -> {bytes, sha256} in JSON"


DAMAGES = [value for name, value in list(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_mirror_is_an_error_not_a_fallback(small_mirror, damage):
    expected = damage(small_mirror)
    with pytest.raises(CourseError) as error:
        corpus.load_stories("validation")
    assert not isinstance(error.value, hub.NotAvailable)
    assert expected in one_line(error) and "make mirror" in one_line(error)


def test_damage_after_the_first_use_is_noticed(small_mirror):
    corpus.load_stories("validation")
    damage_alter(small_mirror)
    os.utime(small_mirror / VALID, ns=(1, 1))
    with pytest.raises(CourseError, match="sha256"):
        corpus.load_stories("validation")


def test_mirror_is_read_for_its_checksum_once(small_mirror, monkeypatch):
    calls = []
    digest = mirror.sha256
    monkeypatch.setattr(mirror, "sha256", lambda path: calls.append(path) or digest(path))
    for _ in range(3):
        hub.fetch("datasets", REPO, "TinyStories-valid.txt")
    assert len(calls) == 1


def test_mirror_that_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_MIRROR", str(tmp_path / "nowhere"))
    with pytest.raises(CourseError) as error:
        corpus.load_stories()
    assert "COURSE_MIRROR: expected a folder" in one_line(error) and "unset it" in one_line(error)


def test_a_file_the_mirror_never_had_comes_from_the_next_source(small_mirror):
    with pytest.raises(hub.NotAvailable, match="no answer from http://127.0.0.1:9"):
        hub.fetch("datasets", REPO, "README.md")


def test_a_mirror_with_only_the_small_file_serves_both_splits(tmp_path, monkeypatch):
    write_mirror(tmp_path / "m", {VALID: corpus(530, 8)})
    monkeypatch.setenv("COURSE_MIRROR", str(tmp_path / "m"))
    train, valid = corpus.load_stories(), corpus.load_stories("validation")
    assert train.texts + valid.texts == stories.generate(530, 8) and len(valid.texts) == 500
    assert "all but the last 500 stories of TinyStories-valid.txt" in train.source


def test_real_mirror(monkeypatch):
    if not (REAL_MIRROR / "manifest.json").is_file():
        pytest.skip("no mirror with real data: set COURSE_MIRROR")
    monkeypatch.setenv("COURSE_MIRROR", str(REAL_MIRROR))
    for name in mirror.read_manifest(REAL_MIRROR):
        kind, _, rest = name.partition("/")
        assert hub.fetch(kind, "", rest).source == "mirror"
    tok = tokenizer.get("gpt2")
    assert tok.decode(tok.encode_ordinary("Once upon a time")) == "Once upon a time"
    assert tok.n_vocab == 50_257 and tok.eot_token == 50_256
    assert "TIKTOKEN_CACHE_DIR" not in os.environ
    assert len(corpus.load_stories().texts) > 10_000


# ------------------------------------------------------------------------------------------------------------ the hub


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Answers `resolve` requests as the hub does for a large file: its sha256 in a header, then the bytes."""

    content = corpus(520, 9)
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
            return self.headers_only(404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "no such entry"})
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


def test_hub_serves_small_profiles_from_the_small_file(fake_hub, capsys):
    train, valid = corpus.load_stories(limit=10), corpus.load_stories("validation")
    assert train.texts == stories.generate(10, 9) and valid.texts == stories.generate(520, 9)[20:]
    assert "hub, the last 500 stories of TinyStories-valid.txt" in capsys.readouterr().out
    assert sum("GET /datasets" in line for line in fake_hub.asked) == 1  # the second time from the cache


def test_hub_cache_serves_without_network(fake_hub, monkeypatch):
    corpus.load_stories()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "_answers", {})
    assert hub.fetch("datasets", REPO, "TinyStories-valid.txt").source == "hub"


def test_large_profiles_ask_for_the_training_file(fake_hub, monkeypatch):
    monkeypatch.setenv("COURSE_PROFILE", "large")
    assert "built-in" in corpus.load_stories().source  # this hub does not have the large file
    assert any("TinyStories-train.txt" in line for line in fake_hub.asked)
    assert corpus.load_stories("validation").texts == stories.generate(520, 9)


@pytest.mark.parametrize("mood", ["truncates", "absent", "broken"])
def test_hub_that_does_not_deliver(fake_hub, mood, capsys):
    fake_hub.mood = mood
    begin = time.monotonic()
    with pytest.raises(hub.NotAvailable) as error:
        hub.fetch("datasets", REPO, "TinyStories-valid.txt")
    assert ("no answer" if mood == "broken" else "not delivered") in one_line(error)
    built_in = corpus.load_stories(limit=5)
    assert built_in.texts == stories.generate(5, 0) and "built-in generator" in built_in.source
    assert time.monotonic() - begin < 30
    fake_hub.mood = "well"  # what failed leaves nothing behind that would be taken for the file
    hub._answers.clear()
    assert hub.fetch("datasets", REPO, "TinyStories-valid.txt").path.read_bytes() == fake_hub.content


def test_wrong_bytes_from_the_hub_are_refused_and_forgotten(fake_hub):
    fake_hub.mood = "lies"
    with pytest.raises(CourseError) as error:
        corpus.load_stories()
    assert "from the hub: expected sha256" in one_line(error) and "run it again" in one_line(error)
    assert not isinstance(error.value, hub.NotAvailable)
    fake_hub.mood = "well"
    assert len(corpus.load_stories("validation").texts) == 500


def test_wrong_bytes_are_noticed_without_a_pinned_checksum(fake_hub, monkeypatch):
    monkeypatch.setitem(hub.PINNED, ("datasets", REPO), hub.Pin(REVISION))
    fake_hub.mood = "lies"
    with pytest.raises(CourseError, match="expected sha256"):
        hub.fetch("datasets", REPO, "TinyStories-valid.txt")


def test_no_network_is_found_quickly_once_and_said(monkeypatch, capsys):
    begin = time.monotonic()
    for split in ("train", "validation"):
        corpus.load_stories(split, limit=2)
    assert time.monotonic() - begin < 10
    out = capsys.readouterr().out
    assert out.count("built-in generator") == 2 and "no answer from http://127.0.0.1:9" in out
    probes = []
    monkeypatch.setattr(hub.urllib.request, "urlopen", lambda *_, **__: probes.append(1))
    assert not set(corpus.load_stories(limit=50).texts) & set(corpus.load_stories("validation").texts)
    assert not probes


def test_a_network_that_swallows_everything_is_given_up_on(monkeypatch):
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.1)
    monkeypatch.setattr(hub.urllib.request, "urlopen", lambda *_, **__: time.sleep(30))
    begin = time.monotonic()
    assert hub.unreachable("http://example.invalid") and time.monotonic() - begin < 5


def test_offline_setting_is_respected(fake_hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(hub.NotAvailable, match="HF_HUB_OFFLINE is set"):
        hub.fetch("datasets", REPO, "TinyStories-valid.txt")
    assert fake_hub.asked == []


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl", "epoch/last.ckpt", "a.pth"])
def test_pickles_are_refused(fake_hub, name):
    with pytest.raises(CourseError, match="expected safetensors, found a pickle"):
        hub.fetch("models", "someone/model", name)
    assert fake_hub.asked == []


def test_unpinned_repository(fake_hub):
    with pytest.raises(hub.NotAvailable, match="pins no revision"):
        hub.fetch("models", "someone/model", "model.safetensors")


# --------------------------------------------------------------------------------------------------------- tokenizers


def gpt2_files() -> dict[str, bytes]:
    """Stand-ins with the shape of GPT-2's two files: 256 single bytes and one merge."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    order = printable + [b for b in range(256) if b not in printable]
    letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(order[len(printable) :])}
    vocabulary = {letters[b]: i for i, b in enumerate(order)} | {"th": 256, "<|endoftext|>": 257}
    return {"encoder.json": json.dumps(vocabulary).encode(), "vocab.bpe": b"#version: 0.2\nt h\n"}


@pytest.fixture
def tiny_gpt2(monkeypatch):
    """tiktoken and the hub module believe that GPT-2 is the stand-in; returns its files under their cache names."""
    files = gpt2_files()
    urls = {name: f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}" for name in files}
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
    monkeypatch.setattr(hub, "GPT2_SHA256", {names[name]: digests[name] for name in files})
    by_url = {urls[name]: content for name, content in files.items()}
    monkeypatch.setattr(tiktoken.load, "read_file", lambda url: by_url[url])
    yield {names[name]: content for name, content in files.items()}
    tiktoken.registry.ENCODINGS.pop("gpt2", None)


def test_gpt2_from_the_mirror(tiny_gpt2, tmp_path, monkeypatch, capsys):
    write_mirror(tmp_path / "m", {f"tiktoken/{name}": content for name, content in tiny_gpt2.items()})
    monkeypatch.setenv("COURSE_MIRROR", str(tmp_path / "m"))
    monkeypatch.setattr(tiktoken.load, "read_file", None)  # no download
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "elsewhere")
    assert tokenizer.get("gpt2").encode("th") == [256]
    assert capsys.readouterr().out == "tokenizer gpt2: mirror\n"
    assert os.environ["TIKTOKEN_CACHE_DIR"] == "elsewhere"


def test_a_tokenizer_that_is_not_gpt2s_is_refused_and_kept(tiny_gpt2, tmp_path, monkeypatch):
    files = {f"tiktoken/{name}": content + b"\n" for name, content in tiny_gpt2.items()}
    write_mirror(tmp_path / "m", files)  # the manifest agrees with them
    monkeypatch.setenv("COURSE_MIRROR", str(tmp_path / "m"))
    with pytest.raises(CourseError, match="is not GPT-2's"):
        tokenizer.get("gpt2")
    assert all((tmp_path / "m" / name).exists() for name in files)  # tiktoken would have deleted them


def test_gpt2_from_the_network_then_from_its_cache(tiny_gpt2, monkeypatch):
    monkeypatch.setattr(hub, "unreachable", lambda url: None)
    assert tokenizer.get("gpt2").encode("th") == [256]
    assert hub.SOURCES_USED == [("tokenizer gpt2", "OpenAI's file server, through tiktoken")]
    tiktoken.registry.ENCODINGS.pop("gpt2")
    monkeypatch.setattr(hub, "unreachable", lambda url: "no network now")
    assert tokenizer.get("gpt2").encode("th") == [256]


def test_gpt2_from_nowhere():
    with pytest.raises(hub.NotAvailable, match="no answer from"):
        tokenizer.get("gpt2")


def test_unknown_tokenizer():
    with pytest.raises(CourseError, match="expected stories2048, gpt2, a model.* found 'gpt5'"):
        hub.tokenizer("gpt5")


# --------------------------------------------------------------------------------------------------- filling a mirror


def fill(target: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "utils.hub", "--mirror", str(target), *flags],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, **environment},
    )


@pytest.fixture
def few_files(monkeypatch):
    """A course that reads the stories and GPT-2's tokenizer only."""
    every = hub.course_files
    monkeypatch.setattr(
        hub, "course_files", lambda small=False: [f for f in every(small) if f[0] == "tiktoken" or f[1] == REPO]
    )


def test_fill_from_a_mirror_resume_and_repair(few_files, small_mirror, tiny_gpt2, tmp_path, monkeypatch, capsys):
    source = {name: (small_mirror / name).read_bytes() for name in (TRAIN, VALID)}
    write_mirror(small_mirror, source | {f"tiktoken/{name}": content for name, content in tiny_gpt2.items()})
    target = tmp_path / "filled"
    assert mirror.fill(target) == []
    assert mirror.read_manifest(target) == mirror.read_manifest(small_mirror)
    assert capsys.readouterr().out.count("copied") == 4
    (target / VALID).write_bytes(b"cut")
    assert mirror.fill(target) == []
    out = capsys.readouterr().out
    assert out.count("kept") == 3 and out.count("copied") == 1 and (target / VALID).read_bytes() == source[VALID]
    assert not list(target.rglob("*.part"))
    monkeypatch.setenv("COURSE_MIRROR", str(target))
    assert corpus.load_stories().texts == stories.generate(20, 5)


def test_fill_stopped_in_the_middle_goes_on(few_files, small_mirror, tiny_gpt2, tmp_path, monkeypatch):
    source = {name: (small_mirror / name).read_bytes() for name in (TRAIN, VALID)}
    write_mirror(small_mirror, source | {f"tiktoken/{name}": content for name, content in tiny_gpt2.items()})
    target, copies = tmp_path / "filled", []
    copyfile = mirror.shutil.copyfile

    def full_disk(source, part):
        copies.append(part)
        if len(copies) == 3:
            Path(part).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return copyfile(source, part)

    monkeypatch.setattr(mirror.shutil, "copyfile", full_disk)
    with pytest.raises(OSError, match="No space left"):
        mirror.fill(target)
    assert len(mirror.read_manifest(target)) == 2 and not list(target.rglob("*.part"))
    assert mirror.fill(target) == [] and len(copies) == 5
    assert mirror.read_manifest(target) == mirror.read_manifest(small_mirror)


def test_fill_from_the_hub(few_files, fake_hub, tiny_gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "unreachable", lambda url: None)
    assert mirror.fill(tmp_path / "filled", small=True) == []
    assert (tmp_path / "filled" / VALID).read_bytes() == fake_hub.content
    assert len(mirror.read_manifest(tmp_path / "filled")) == 3


def test_fill_command_says_what_is_missing(tmp_path):
    run = fill(tmp_path / "filled", HF_HUB_OFFLINE="1")
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "HF_HUB_OFFLINE is set" in run.stderr
    (tmp_path / "file").write_text("")
    run = fill(tmp_path / "file")
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "expected a folder to fill" in run.stderr
