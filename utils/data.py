"""Stories: where they come from, the file format, and the way from text to batches.

A corpus is one text file of stories joined by lines of `<|endoftext|>`. `load_stories` finds one (mirror, hub, built in)
and prints which; `split_stories` reads the format and refuses a file that is not in it; `encode` turns each story into
token ids.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
from jaxtyping import Int32

from utils import CourseError, hub, profile, stories

SEPARATOR = "<|endoftext|>"
TRAIN, VALID = "TinyStories-train.txt", "TinyStories-valid.txt"
HELD_OUT = 500  # stories kept for validation where one file has to serve for both
BUILT_IN = {"train": (10_000, 0), "validation": (500, 1)}  # stories, seed


@dataclass(frozen=True)
class Stories:
    """Stories as text, and in words where they came from."""

    texts: list[str]
    source: str


def split_stories(text: bytes) -> list[str]:
    """The stories of a corpus, stripped, without empty ones.

    Raises CourseError for an empty file, invalid UTF-8, no separator, or fewer than two stories.
    """
    form = f"stories joined by lines of {SEPARATOR}"
    if not text.strip():
        raise CourseError(
            f"corpus: expected {form}, found an empty file: download or write it again"
        )
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CourseError(
            f"corpus: expected UTF-8, found byte 0x{text[error.start]:02x} at offset {error.start:,}:"
            " save the file as UTF-8, or download it again"
        ) from None
    if SEPARATOR not in decoded:
        raise CourseError(
            f"corpus: expected {form}, found no separator in {len(text):,} bytes: put one between stories"
        )
    found = [story for part in decoded.split(SEPARATOR) if (story := part.strip())]
    if len(found) < 2:
        raise CourseError(f"corpus: expected at least 2 {form}, found {len(found)}: add stories")
    return found


def read_stories(path: Path, limit: int | None = None) -> list[str]:
    """The first `limit` stories of a file (all by default), reading no further than needed: one file has 1.9 GB."""
    if limit is None:
        return split_stories(path.read_bytes())
    mark, pieces, seen = SEPARATOR.encode(), [], 0
    with open(path, "rb") as file:
        # A separator cut in two by a piece's end is counted late, so at worst one more piece is read.
        while seen <= limit and (piece := file.read(1 << 22)):
            pieces.append(piece)
            seen += piece.count(mark)
        text = b"".join(pieces)
        if file.read(1):  # stopped early: the last story may be cut, even inside a character
            text = text[: text.rindex(mark) + len(mark)]
    return split_stories(text)[:limit]


def load_stories(split: str = "train", limit: int | None = None) -> Stories:
    """TinyStories from the mirror or the hub, else built-in stories; prints one line that says which.

    `split` is "train" or "validation". The hub's training file has 1.9 GB, so the profiles smoke and cpu take its
    validation file (19 MB) for both and hold out its last 500 stories; a mirror's files are taken as they are.
    Raises CourseError for another split, a limit below 1, and a source that is there but damaged.
    """
    if split not in BUILT_IN:
        raise CourseError(f"split: expected train or validation, found {split!r}")
    if limit is not None and limit < 1:
        raise CourseError(f"limit: expected at least 1 story, found {limit}")
    small = profile.current() in ("smoke", "cpu")
    try:
        if small and hub.from_mirror("datasets", hub.TINYSTORIES, TRAIN) is None:
            found = hub.fetch("datasets", hub.TINYSTORIES, VALID)
            every = read_stories(found.path)
            train = split == "train"
            texts = (every[:-HELD_OUT] if train else every[-HELD_OUT:])[:limit]
            part = (
                f"all but the last {HELD_OUT} stories of"
                if train
                else f"the last {HELD_OUT} stories of"
            )
            source = f"{found.source}, {part} {VALID}"
        else:
            name = TRAIN if split == "train" else VALID
            found = hub.fetch("datasets", hub.TINYSTORIES, name)
            texts = read_stories(found.path, limit)
            source = f"{found.source}, {name}"
    except hub.NotAvailable as reason:
        n, seed = BUILT_IN[split]
        texts = stories.generate(limit or n, seed=seed)
        source = f"built-in generator, seed {seed} ({reason})"
    hub.used(f"{len(texts):,} {split} stories", source)
    return Stories(texts, source)


def encode(texts: list[str], tok: tiktoken.Encoding) -> list[Int32[np.ndarray, " T"]]:
    """Token ids of each story, without the end-of-story token. Raises CourseError when there is no story."""
    if not texts:
        raise CourseError(
            "encode: expected at least one story, found none: check the limit and the split"
        )
    return [np.array(ids, np.int32) for ids in tok.encode_ordinary_batch(texts, num_threads=2)]
