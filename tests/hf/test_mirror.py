"""Filling a mirror: from another one or from the hub, stopped and started again, and what is missing."""

from pathlib import Path

import pytest

from tests.helpers.sources import REPO, TRAIN, VALID, write_mirror
from utils.__main__ import main
from utils.course import mirror as mirror_command
from utils.course import sources, stories
from utils.hf import hub, mirror

pytestmark = pytest.mark.usefixtures("isolated")


@pytest.fixture
def few_files(monkeypatch):
    """A course that reads the stories and GPT-2's tokenizer only."""
    every = mirror_command.course_files

    def files(small=False):
        return [file for file in every(small) if file[0] == "tiktoken" or file[1] == REPO]

    monkeypatch.setattr(mirror_command, "course_files", files)


def test_fill_from_a_mirror_resume_and_repair(
    few_files, small_mirror, tiny_gpt2, tmp_path, monkeypatch, log
):
    source = {name: (small_mirror / name).read_bytes() for name in (TRAIN, VALID)}
    write_mirror(
        small_mirror, source | {f"tiktoken/{name}": content for name, content in tiny_gpt2.items()}
    )
    target = tmp_path / "filled"
    assert mirror_command.fill(target) == []
    assert mirror.read_manifest(target) == mirror.read_manifest(small_mirror)
    assert log.text.count("copied") == 4
    log.clear()
    (target / VALID).write_bytes(b"cut")
    assert mirror_command.fill(target) == []
    assert log.text.count("kept") == 3 and log.text.count("copied") == 1
    assert (target / VALID).read_bytes() == source[VALID]
    assert not list(target.rglob("*.part"))
    monkeypatch.setenv("COURSE_MIRROR", str(target))
    assert sources.tinystories().texts == stories.generate(20, 5)


def test_fill_stopped_in_the_middle_goes_on(
    few_files, small_mirror, tiny_gpt2, tmp_path, monkeypatch
):
    source = {name: (small_mirror / name).read_bytes() for name in (TRAIN, VALID)}
    write_mirror(
        small_mirror, source | {f"tiktoken/{name}": content for name, content in tiny_gpt2.items()}
    )
    target, copies = tmp_path / "filled", []
    copyfile = mirror_command.shutil.copyfile

    def full_disk(source, part):
        copies.append(part)
        if len(copies) == 3:
            Path(part).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return copyfile(source, part)

    monkeypatch.setattr(mirror_command.shutil, "copyfile", full_disk)
    with pytest.raises(OSError, match="No space left"):
        mirror_command.fill(target)
    assert len(mirror.read_manifest(target)) == 2 and not list(target.rglob("*.part"))
    assert mirror_command.fill(target) == [] and len(copies) == 5
    assert mirror.read_manifest(target) == mirror.read_manifest(small_mirror)


def test_fill_from_the_hub(few_files, fake_hub, tiny_gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "unreachable", lambda url: None)
    assert mirror_command.fill(tmp_path / "filled", small=True) == []
    assert (tmp_path / "filled" / VALID).read_bytes() == fake_hub.content
    assert len(mirror.read_manifest(tmp_path / "filled")) == 3


def test_what_a_complete_mirror_holds():
    every, few = mirror_command.course_files(), mirror_command.course_files(small=True)
    assert len(every) == 18 and len(few) == 16 and set(few) < set(every)
    assert {file for _, _, file in set(every) - set(few)} == {
        "TinyStories-train.txt",
        "model.safetensors",
    }
    assert ("datasets", hub.GSM8K, "main/test-00000-of-00001.parquet") in few


def test_the_command_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "file").write_text("")
    for target, reason in (
        ("filled", "HF_HUB_OFFLINE is set"),
        ("file", "expected a folder to fill"),
    ):
        assert main(["mirror", "--to", str(tmp_path / target)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and reason in err and err.count("\n") == 1


def test_the_command_says_how_to_use_it(
    few_files, fake_hub, tiny_gpt2, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(hub, "unreachable", lambda url: None)
    assert main(["mirror", "--to", str(tmp_path / "filled"), "--small"]) == 0
    assert capsys.readouterr().out == f"complete: export COURSE_MIRROR={tmp_path / 'filled'}\n"
