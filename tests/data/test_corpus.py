"""From a file to stories to token ids, and what is said when the file is not a corpus."""

import logging

import numpy as np
import pytest
import tiktoken

from utils import CourseError
from utils.course import sources, stories
from utils.data import corpus
from utils.hf import hub

MARK = b"<|endoftext|>"


def bytes_of(texts: list[str]) -> bytes:
    return "\n<|endoftext|>\n".join(texts).encode()


@pytest.fixture
def byte_tokenizer() -> tiktoken.Encoding:
    """One token per byte, and an end-of-story token."""
    ranks = {bytes([b]): b for b in range(256)}
    special = {"<|endoftext|>": 256}
    return tiktoken.Encoding(
        "bytes", pat_str=r"\S+|\s", mergeable_ranks=ranks, special_tokens=special
    )


def test_split_strips_and_drops_empty_ones():
    text = (
        b"\n One. \n"
        + MARK
        + b"\n"
        + MARK
        + b"\n  \n"
        + MARK
        + "Zwei, größer.\nTwo lines.".encode()
        + MARK
    )
    assert corpus.split_stories(text) == ["One.", "Zwei, größer.\nTwo lines."]


@pytest.mark.parametrize(
    ("text", "expected", "advice"),
    [
        (b"", "found an empty file", "download or write it again"),
        (b" \n\n ", "found an empty file", "download or write it again"),
        (b"Once there was a cat.", "found no separator in 21 bytes", "put one between stories"),
        (b"Once there was a cat." + MARK, "at least 2 stories joined by lines", "add stories"),
        (MARK + b"\n" + MARK, "found 0", "add stories"),
        (b"A cat." + MARK + b"A d\xffg.", "found byte 0xff at offset 22", "save the file as UTF-8"),
        (
            b"A cat." + MARK + "é".encode("utf-16-le"),
            "found byte 0xe9 at offset 19",
            "save the file as UTF-8",
        ),
        (
            b"A cat." + MARK + "é".encode()[:1],
            "found byte 0xc3 at offset 19",
            "save the file as UTF-8",
        ),
    ],
    ids=[
        "empty",
        "blank",
        "no separator",
        "one story",
        "only separators",
        "not UTF-8",
        "UTF-16",
        "cut",
    ],
)
def test_what_is_not_a_corpus(text, expected, advice):
    with pytest.raises(CourseError) as error:
        corpus.split_stories(text)
    message = str(error.value)
    assert expected in message and advice in message and "\n" not in message and len(message) < 200


@pytest.mark.parametrize("limit", [1, 2, 7, 39, 40, 41, 1000])
def test_limit_reads_whole_stories_only(tmp_path, monkeypatch, limit):
    texts = [f"{text} ñandú" for text in stories.generate(40)]
    (tmp_path / "corpus").write_bytes(bytes_of(texts))
    assert corpus.read_stories(tmp_path / "corpus") == texts
    for piece in (100, 1_000, 1 << 22):  # pieces end inside stories, separators and characters
        monkeypatch.setattr(corpus, "PIECE", piece)
        assert corpus.read_stories(tmp_path / "corpus", limit) == texts[:limit]


def test_empty_stories_do_not_count_towards_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE", 10)
    (tmp_path / "corpus").write_bytes(MARK.join([b"", b"A", b"", b"\n", b"B", b"", b"C", b"D"]))
    assert [corpus.read_stories(tmp_path / "corpus", n) for n in (1, 2, 3)] == [
        ["A"],
        ["A", "B"],
        ["A", "B", "C"],
    ]


def test_a_limit_does_not_read_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE", 1_000)
    texts = stories.generate(10)
    (tmp_path / "corpus").write_bytes(bytes_of(texts) + b"\n" + MARK + b"\xff" * 5_000)
    assert corpus.read_stories(tmp_path / "corpus", 5) == texts[:5]
    with pytest.raises(CourseError, match="0xff"):
        corpus.read_stories(tmp_path / "corpus")


@pytest.mark.parametrize("limit", [None, 3])
def test_bad_files_with_and_without_a_limit(tmp_path, limit):
    for content, expected in (
        (b"", "empty file"),
        (b"A cat.", "no separator"),
        (b"A" + MARK, "found 1"),
        (b"\xff", "0xff"),
    ):
        (tmp_path / "corpus").write_bytes(content)
        with pytest.raises(CourseError, match=f"corpus: .*{expected}"):
            corpus.read_stories(tmp_path / "corpus", limit)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"split": "test"}, "split: expected train or validation, found 'test'"),
        ({"limit": 0}, "limit: expected at least 1 story, found 0"),
        ({"limit": -5}, "limit: expected at least 1 story, found -5"),
    ],
)
def test_bad_arguments(arguments, expected):
    with pytest.raises(CourseError, match=expected):
        sources.tinystories(**arguments)


@pytest.fixture
def nowhere(monkeypatch):
    """No mirror, and no network."""
    monkeypatch.delenv("COURSE_MIRROR", raising=False)

    def fetch(kind, repo, filename):
        raise hub.NotAvailable("no network in this test")

    monkeypatch.setattr(hub, "fetch", fetch)


def test_texts_of_the_package_are_never_replaced(nowhere):
    expected = "^no network in this test: connect to the network, or set COURSE_MIRROR$"
    with pytest.raises(hub.NotAvailable, match=expected):
        sources.tinystories("validation")


def test_the_pages_sources_put_built_in_texts_in_their_place(nowhere, caplog, capsys):
    caplog.set_level(logging.INFO, "utils")
    train = sources.load_stories(limit=100)
    valid = sources.load_stories("validation")
    assert train.texts == stories.generate(100, seed=0) and len(valid.texts) == 500
    assert not set(train.texts) & set(valid.texts)
    reviews = [sources.load_sst2(split) for split in ("train", "validation")]
    assert len(reviews[0]) == 4_000 and len(reviews[1]) > 400
    assert not {sentence for sentence, _ in reviews[0]} & {sentence for sentence, _ in reviews[1]}
    hint = "connect to the network, or set COURSE_MIRROR"
    reason = f"built-in generator, seed 0 (no network in this test: {hint})"
    assert (
        caplog.messages[0] == f"100 train stories: {reason}" == f"100 train stories: {train.source}"
    )
    reason = reason.replace(f": {hint}", "")
    assert caplog.messages[2] == f"4,000 train reviews: {reason}" and len(caplog.messages) == 4
    assert capsys.readouterr() == ("", "")


def test_encode(byte_tokenizer):
    rows = corpus.encode(["ab", "é <|endoftext|>"], byte_tokenizer)
    assert [row.dtype for row in rows] == [np.int32, np.int32]
    assert rows[0].tolist() == [97, 98]
    # Text that looks like the end-of-story token is text: only the packing puts the token itself.
    assert rows[1].tolist() == list("é <|endoftext|>".encode())
    assert all(byte_tokenizer.eot_token not in row for row in rows)


def test_encode_nothing(byte_tokenizer):
    with pytest.raises(CourseError, match="expected at least one story, found none"):
        corpus.encode([], byte_tokenizer)
