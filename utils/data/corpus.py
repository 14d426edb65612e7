"""Stories and labelled reviews: where they come from, the file format, and the step to token ids.

A corpus is one text file of stories joined by lines of `<|endoftext|>`. `load_stories` takes one
from the mirror or the hub; `split_stories` reads the format and refuses a file that is not in it;
`encode` turns each story into token ids. Real data are never replaced in silence: built-in texts
take their place only where `fallback=True` says so.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet
import tiktoken
from jaxtyping import Int32

from utils import CourseError, first_line
from utils.data import reviews, stories
from utils.hf import hub

SEPARATOR = "<|endoftext|>"
TRAIN, VALID = "TinyStories-train.txt", "TinyStories-valid.txt"
PIECE = 1 << 22  # bytes read at a time where a limit is given
HELD_OUT = 500  # stories kept for validation where one file has to serve for both splits
BUILT_IN = {"train": (10_000, 0), "validation": (500, 1)}  # stories, seed
BUILT_IN_REVIEWS = {"train": (4_000, 0), "validation": (500, 1)}
BUILT_IN_HINT = (
    "connect to the network, set COURSE_MIRROR, or pass fallback=True for built-in texts"
)


@dataclass(frozen=True)
class Stories:
    """Stories as text, and in words where they came from."""

    texts: list[str]
    source: str


def split_stories(text: bytes, name: str = "corpus") -> list[str]:
    """The stories of a corpus, stripped, without empty ones; `name` is what errors call it.

    Raises CourseError for an empty file, invalid UTF-8, no separator, or fewer than two stories.
    """
    form = f"stories joined by lines of {SEPARATOR}"
    if not text.strip():
        raise CourseError(
            f"{name}: expected {form}, found an empty file: download or write it again"
        )
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CourseError(
            f"{name}: expected UTF-8, found byte 0x{text[error.start]:02x} at offset {error.start:,}:"
            " save the file as UTF-8, or download it again"
        ) from None
    if SEPARATOR not in decoded:
        raise CourseError(
            f"{name}: expected {form}, found no separator in {len(text):,} bytes:"
            " put one between stories"
        )
    split = [story for part in decoded.split(SEPARATOR) if (story := part.strip())]
    if len(split) < 2:
        raise CourseError(f"{name}: expected at least 2 {form}, found {len(split)}: add stories")
    return split


def read_stories(path: Path, limit: int | None = None) -> list[str]:
    """The first `limit` stories of a file (default: all), reading no further: one file has 1.9 GB."""
    if limit is None:
        return split_stories(path.read_bytes(), path.name)
    mark, parts, tail, seen = SEPARATOR.encode(), [], b"", 0
    with open(path, "rb") as file:
        while seen <= limit and (piece := file.read(PIECE)):
            # The tail may end inside a story, a separator, a character: the next piece goes on.
            *complete, tail = (tail + piece).split(mark)
            parts += complete
            seen += sum(bool(part.strip()) for part in complete)
    if seen <= limit:  # the file ended first: its tail is a story too
        parts.append(tail)
    return split_stories(mark.join(parts), path.name)[:limit]


def load_stories(
    split: str = "train", limit: int | None = None, *, small: bool = False, fallback: bool = False
) -> Stories:
    """TinyStories (Eldan and Li 2023) from the mirror or the hub; logs one line that says which.

    `split` is "train" or "validation". The hub's training file has 1.9 GB: `small` takes the
    validation file (19 MB) for both splits and holds out its last 500 stories, unless a mirror has
    the training file. Where no source has the file, raises `hub.NotAvailable`, or with `fallback`
    returns built-in stories. Raises CourseError for another split, a limit below 1, and a source
    that is there but damaged.
    """
    if split not in BUILT_IN:
        raise CourseError(f"split: expected train or validation, found {split!r}")
    if limit is not None and limit < 1:
        raise CourseError(f"limit: expected at least 1 story, found {limit}")
    train = split == "train"
    try:
        if small and hub.from_mirror("datasets", hub.TINYSTORIES, TRAIN) is None:
            file = hub.fetch("datasets", hub.TINYSTORIES, VALID)
            every = read_stories(file.path)
            texts = (every[:-HELD_OUT] if train else every[-HELD_OUT:])[:limit]
            part = f"{'all but ' * train}the last {HELD_OUT} stories of {VALID}"
        else:
            part = TRAIN if train else VALID
            file = hub.fetch("datasets", hub.TINYSTORIES, part)
            texts = read_stories(file.path, limit)
        source = f"{file.source}, {part}"
    except hub.NotAvailable as reason:
        if not fallback:
            raise hub.NotAvailable(f"{reason}: {BUILT_IN_HINT}") from reason
        n, seed = BUILT_IN[split]
        texts = stories.generate(limit or n, seed=seed)
        source = f"built-in generator, seed {seed} ({reason})"
    hub.used(f"{len(texts):,} {split} stories", source)
    return Stories(texts, source)


def load_sst2(split: str = "train", *, fallback: bool = False) -> list[tuple[str, int]]:
    """SST-2 (Socher et al. 2013) from the mirror or the hub: (sentence, 1 positive or 0 negative).

    `split` is "train" (67,349 sentences, most of them phrases) or "validation" (872). Where no
    source has it, raises `hub.NotAvailable`, or with `fallback` returns built-in reviews, which are
    easier. Logs which. Raises CourseError for another split and for a damaged file.
    """
    if split not in BUILT_IN_REVIEWS:
        raise CourseError(f"split: expected train or validation, found {split!r}")
    try:
        file = hub.fetch("datasets", hub.SST2, f"data/{split}-00000-of-00001.parquet")
    except hub.NotAvailable as reason:
        if not fallback:
            raise hub.NotAvailable(f"{reason}: {BUILT_IN_HINT}") from reason
        n, seed = BUILT_IN_REVIEWS[split]
        rows = reviews.generate(n, seed)
        if split == "validation":  # a sentence may come out of both seeds
            seen = {sentence for sentence, _ in reviews.generate(*BUILT_IN_REVIEWS["train"])}
            rows = [row for row in rows if row[0] not in seen]
        hub.used(f"{len(rows):,} {split} reviews", f"built-in generator, seed {seed} ({reason})")
        return rows
    try:
        table = pyarrow.parquet.read_table(file.path, columns=["sentence", "label"])
        rows = [(row["sentence"].strip(), int(row["label"])) for row in table.to_pylist()]
    except (pyarrow.ArrowException, AttributeError, TypeError, ValueError, OSError) as error:
        raise CourseError(
            f"{file.path.name}: expected a table of sentence and label, found {first_line(error)}"
        ) from error
    if not rows or {label for _, label in rows} - {0, 1}:
        raise CourseError(
            f"{file.path.name}: expected sentences labelled 0 or 1, found {len(rows)} rows of others"
        )
    hub.used(f"{len(rows):,} {split} reviews of SST-2", file.source)
    return rows


def encode(texts: list[str], tok: tiktoken.Encoding) -> list[Int32[np.ndarray, " T"]]:
    """Token ids of each story, without the end-of-story token. Raises CourseError for no story."""
    if not texts:
        raise CourseError(
            "encode: expected at least one story, found none: check the limit and the split"
        )
    return [np.array(ids, np.int32) for ids in tok.encode_ordinary_batch(texts, num_threads=2)]
