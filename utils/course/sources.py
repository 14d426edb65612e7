"""The texts that pages learn from: TinyStories and SST-2, or built-in ones where no source has them.

A page must run without a network, so here, and nowhere else in the package, generated texts take
the place of real ones. A line on the page says which they are.
"""

from dataclasses import dataclass

import pyarrow.parquet

from utils import first_line, unexpected
from utils.course import reviews, stories
from utils.data import corpus
from utils.hf import hub

TRAIN, VALID = "TinyStories-train.txt", "TinyStories-valid.txt"
HELD_OUT = 500  # stories kept for validation where one file has to serve for both splits
STORIES = {"train": (10_000, 0), "validation": (500, 1)}  # built-in ones: how many, seed
REVIEWS = {"train": (4_000, 0), "validation": (500, 1)}


@dataclass(frozen=True)
class Stories:
    """Stories as text, and in words where they came from."""

    texts: list[str]
    source: str


def _fetch(name: str) -> hub.File:
    try:
        return hub.fetch("datasets", hub.TINYSTORIES, name)
    except hub.NotAvailable as reason:
        fix = "connect to the network, or set COURSE_MIRROR"
        raise hub.NotAvailable(f"{reason}: {fix}") from reason


def tinystories(split: str = "train", limit: int | None = None, *, small: bool = False) -> Stories:
    """TinyStories (Eldan and Li 2023) from the mirror or the hub; logs one line that says which.

    `split` is "train" or "validation". The hub's training file has 1.9 GB: `small` takes the
    validation file (19 MB) for both splits and holds out its last 500 stories, unless a mirror has
    the training file. Raises `hub.NotAvailable` where no source has the file, CourseError for
    another split, a limit below 1, and a source that is there but damaged.
    """
    if split not in STORIES:
        raise unexpected("split", "train or validation", repr(split))
    if limit is not None and limit < 1:
        raise unexpected("limit", "at least 1 story", limit)
    train = split == "train"
    if small and hub.from_mirror("datasets", hub.TINYSTORIES, TRAIN) is None:
        file = _fetch(VALID)
        every = corpus.read_stories(file.path)
        texts = (every[:-HELD_OUT] if train else every[-HELD_OUT:])[:limit]
        part = f"{'all but ' * train}the last {HELD_OUT} stories of {VALID}"
    else:
        part = TRAIN if train else VALID
        file = _fetch(part)
        texts = corpus.read_stories(file.path, limit)
    hub.used(f"{len(texts):,} {split} stories", f"{file.source}, {part}")
    return Stories(texts, f"{file.source}, {part}")


def load_stories(split: str = "train", limit: int | None = None, *, small: bool = False) -> Stories:
    """`tinystories`, or as many built-in stories (by default 10,000, or 500 to validate)."""
    try:
        return tinystories(split, limit, small=small)
    except hub.NotAvailable as reason:
        n, seed = STORIES[split]
        built_in = stories.generate(limit or n, seed=seed)
        source = f"built-in generator, seed {seed} ({reason})"
    hub.used(f"{len(built_in):,} {split} stories", source)
    return Stories(built_in, source)


def load_sst2(split: str = "train") -> list[tuple[str, int]]:
    """SST-2 (Socher et al. 2013) from the mirror or the hub: (sentence, 1 positive or 0 negative).

    `split` is "train" (67,349 sentences, most of them phrases) or "validation" (872). Where no
    source has it: built-in reviews, which are easier, 4,000 or up to 500 others. Raises CourseError
    for another split and for a damaged file.
    """
    if split not in REVIEWS:
        raise unexpected("split", "train or validation", repr(split))
    try:
        file = hub.fetch("datasets", hub.SST2, f"data/{split}-00000-of-00001.parquet")
    except hub.NotAvailable as reason:
        n, seed = REVIEWS[split]
        rows = reviews.generate(n, seed)
        if split == "validation":  # a sentence may come out of both seeds
            seen = {sentence for sentence, _ in reviews.generate(*REVIEWS["train"])}
            rows = [row for row in rows if row[0] not in seen]
        hub.used(f"{len(rows):,} {split} reviews", f"built-in generator, seed {seed} ({reason})")
        return rows
    try:
        table = pyarrow.parquet.read_table(file.path, columns=["sentence", "label"])
        rows = [(row["sentence"].strip(), int(row["label"])) for row in table.to_pylist()]
    except (pyarrow.ArrowException, AttributeError, TypeError, ValueError, OSError) as error:
        expected, found = "a table of sentence and label", first_line(error)
        raise unexpected(file.path.name, expected, found) from error
    if not rows or {label for _, label in rows} - {0, 1}:
        found = f"{len(rows)} rows of others"
        raise unexpected(file.path.name, "sentences labelled 0 or 1", found)
    hub.used(f"{len(rows):,} {split} reviews of SST-2", file.source)
    return rows
