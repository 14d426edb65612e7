"""Where files come from: mirror, hub, built in. The hub is a server on this machine that answers as the real one."""

import json
import os
import time
from pathlib import Path

import pytest
import tiktoken

from tests.helpers.sources import REPO, REVISION, VALID, as_file, write_mirror
from utils import CourseError
from utils.course import gpt2, sources, stories
from utils.hf import hub, mirror

pytestmark = pytest.mark.usefixtures("isolated")
REAL_MIRROR = Path(
    os.environ.get("COURSE_MIRROR") or Path(__file__).resolve().parents[3] / "shared" / "mirror"
)


def small():
    """Both splits, as the profiles of a CPU ask for them."""
    return [sources.tinystories(split, small=True) for split in ("train", "validation")]


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 300
    return message


# --------------------------------------------------------------------------------------------------------- the mirror


def test_mirror_comes_first_and_is_logged(small_mirror, log, capsys):
    train, valid = small()
    assert train.texts == stories.generate(20, 5) and valid.texts == stories.generate(4, 6)
    assert log.messages[0] == "20 train stories: mirror, TinyStories-train.txt"
    assert capsys.readouterr() == ("", "")
    assert hub.SOURCES_USED == [
        ("20 train stories", "mirror, TinyStories-train.txt"),
        ("4 validation stories", "mirror, TinyStories-valid.txt"),
    ]
    assert sources.tinystories(limit=3).texts == stories.generate(3, 5)


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
        sources.tinystories("validation")
    assert not isinstance(error.value, hub.NotAvailable)
    assert expected in one_line(error) and "make mirror" in one_line(error)


def test_damage_after_the_first_use_is_noticed(small_mirror):
    sources.tinystories("validation")
    damage_alter(small_mirror)
    os.utime(small_mirror / VALID, ns=(1, 1))
    with pytest.raises(CourseError, match="sha256"):
        sources.tinystories("validation")


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
        sources.tinystories()
    assert "COURSE_MIRROR: expected a folder" in one_line(error) and "unset it" in one_line(error)


def test_a_file_the_mirror_never_had_comes_from_the_next_source(small_mirror):
    with pytest.raises(hub.NotAvailable, match="no answer from http://127.0.0.1:9"):
        hub.fetch("datasets", REPO, "README.md")


def test_a_mirror_with_only_the_small_file_serves_both_splits(tmp_path, monkeypatch):
    write_mirror(tmp_path / "m", {VALID: as_file(530, 8)})
    monkeypatch.setenv("COURSE_MIRROR", str(tmp_path / "m"))
    train, valid = small()
    assert train.texts + valid.texts == stories.generate(530, 8) and len(valid.texts) == 500
    assert "all but the last 500 stories of TinyStories-valid.txt" in train.source


def test_real_mirror(monkeypatch):
    if not (REAL_MIRROR / "manifest.json").is_file():
        pytest.skip("no mirror with real data: set COURSE_MIRROR")
    monkeypatch.setenv("COURSE_MIRROR", str(REAL_MIRROR))
    for name in mirror.read_manifest(REAL_MIRROR):
        kind, _, rest = name.partition("/")
        assert hub.fetch(kind, "", rest).source == "mirror"
    tok = gpt2.tokenizer()
    assert tok.decode(tok.encode_ordinary("Once upon a time")) == "Once upon a time"
    assert tok.n_vocab == 50_257 and tok.eot_token == 50_256
    assert "TIKTOKEN_CACHE_DIR" not in os.environ
    assert len(sources.tinystories(small=True).texts) > 10_000


# ------------------------------------------------------------------------------------------------------------ the hub


def test_small_takes_both_splits_from_the_small_file(fake_hub, log):
    train, valid = small()
    assert train.texts == stories.generate(20, 9) and valid.texts == stories.generate(520, 9)[20:]
    assert sources.tinystories(limit=10, small=True).texts == stories.generate(10, 9)
    assert "hub, the last 500 stories of TinyStories-valid.txt" in log.text
    assert (
        sum("GET /datasets" in line for line in fake_hub.asked) == 1
    )  # the second time from the cache


def test_hub_cache_serves_without_network(fake_hub, monkeypatch):
    sources.tinystories(small=True)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert hub.fetch("datasets", REPO, "TinyStories-valid.txt").source == "hub"


def test_without_small_the_training_file_is_asked_for(fake_hub):
    with pytest.raises(hub.NotAvailable):  # this hub does not have the large file
        sources.tinystories()
    assert any("TinyStories-train.txt" in line for line in fake_hub.asked)
    assert sources.tinystories("validation").texts == stories.generate(520, 9)


@pytest.mark.parametrize("mood", ["truncates", "absent", "broken"])
def test_hub_that_does_not_deliver(fake_hub, mood):
    fake_hub.mood = mood
    begin = time.monotonic()
    with pytest.raises(hub.NotAvailable) as error:
        hub.fetch("datasets", REPO, "TinyStories-valid.txt")
    assert ("no answer" if mood == "broken" else "not delivered") in one_line(error)
    built_in = sources.load_stories(limit=5, small=True)
    assert built_in.texts == stories.generate(5, 0) and "built-in generator" in built_in.source
    assert time.monotonic() - begin < 30
    fake_hub.mood = "well"  # what failed leaves nothing behind that would be taken for the file
    hub.answers.cache_clear()
    assert (
        hub.fetch("datasets", REPO, "TinyStories-valid.txt").path.read_bytes() == fake_hub.content
    )


def test_wrong_bytes_from_the_hub_are_refused_and_forgotten(fake_hub):
    fake_hub.mood = "lies"
    with pytest.raises(CourseError) as error:
        sources.load_stories(small=True)
    assert "from the hub: expected sha256" in one_line(error) and "run it again" in one_line(error)
    assert not isinstance(error.value, hub.NotAvailable)
    fake_hub.mood = "well"
    assert len(sources.tinystories("validation", small=True).texts) == 500


def test_wrong_bytes_are_noticed_without_a_pinned_checksum(fake_hub, monkeypatch):
    monkeypatch.setitem(hub.PINNED, ("datasets", REPO), hub.Pin(REVISION))
    fake_hub.mood = "lies"
    with pytest.raises(CourseError, match="expected sha256"):
        hub.fetch("datasets", REPO, "TinyStories-valid.txt")


def test_no_network_is_noticed_quickly_once_and_logged(monkeypatch, log):
    begin = time.monotonic()
    for split in ("train", "validation"):
        sources.load_stories(split, limit=2)
    assert time.monotonic() - begin < 10
    assert (
        log.text.count("built-in generator") == 2
        and "no answer from http://127.0.0.1:9" in log.text
    )
    probes = []
    monkeypatch.setattr(hub.urllib.request, "urlopen", lambda *_, **__: probes.append(1))
    with pytest.raises(hub.NotAvailable, match="no answer from"):
        sources.tinystories()
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


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "weights.pkl", "epoch/last.ckpt", "a.pth"]
)
def test_pickles_are_refused(fake_hub, name):
    with pytest.raises(CourseError, match="expected safetensors, found a pickle"):
        hub.fetch("models", "someone/model", name)
    assert fake_hub.asked == []


def test_unpinned_repository(fake_hub):
    with pytest.raises(hub.NotAvailable, match="pins no revision"):
        hub.fetch("models", "someone/model", "model.safetensors")


# --------------------------------------------------------------------------------------------------------- tokenizers


def test_gpt2_from_the_mirror(tiny_gpt2, tmp_path, monkeypatch, log):
    write_mirror(
        tmp_path / "m", {f"tiktoken/{name}": content for name, content in tiny_gpt2.items()}
    )
    monkeypatch.setenv("COURSE_MIRROR", str(tmp_path / "m"))
    monkeypatch.setattr(tiktoken.load, "read_file", None)  # no download
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "elsewhere")
    assert gpt2.tokenizer().encode("th") == [256]
    assert log.messages == ["tokenizer gpt2: mirror"]
    assert os.environ["TIKTOKEN_CACHE_DIR"] == "elsewhere"


def test_a_tokenizer_that_is_not_gpt2s_is_refused_and_kept(tiny_gpt2, tmp_path, monkeypatch):
    files = {f"tiktoken/{name}": content + b"\n" for name, content in tiny_gpt2.items()}
    write_mirror(tmp_path / "m", files)  # the manifest agrees with them
    monkeypatch.setenv("COURSE_MIRROR", str(tmp_path / "m"))
    with pytest.raises(CourseError, match="is not GPT-2's"):
        gpt2.tokenizer()
    assert all(
        (tmp_path / "m" / name).exists() for name in files
    )  # tiktoken would have deleted them


def test_gpt2_from_the_network_then_from_its_cache(tiny_gpt2, monkeypatch):
    monkeypatch.setattr(hub, "unreachable", lambda url: None)
    assert gpt2.tokenizer().encode("th") == [256]
    assert hub.SOURCES_USED == [("tokenizer gpt2", "OpenAI's file server, through tiktoken")]
    tiktoken.registry.ENCODINGS.pop("gpt2")
    monkeypatch.setattr(hub, "unreachable", lambda url: "no network now")
    assert gpt2.tokenizer().encode("th") == [256]


def test_gpt2_from_nowhere():
    with pytest.raises(hub.NotAvailable, match="no answer from"):
        gpt2.tokenizer()


def test_unknown_tokenizer():
    with pytest.raises(CourseError, match="gpt2: expected a folder, a .gguf file, or a repository"):
        hub.tokenizer("gpt2")  # that one is data.tokenizer's
