"""Stories: where they come from, the file format, and the way from text to batches.

A corpus is one text file of stories joined by lines of `<|endoftext|>`. `load_stories` finds one (mirror, hub, built
in) and prints which; `split_stories` reads the format and refuses a file that is not in it; `encode` turns each story
into token ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grain
import numpy as np
import tiktoken
from jaxtyping import Int, Int32

from utils import CourseError
from utils.course import profile
from utils.data import reviews, stories
from utils.hf import hub

SEPARATOR = "<|endoftext|>"
TRAIN, VALID = "TinyStories-train.txt", "TinyStories-valid.txt"
PIECE = 1 << 22  # bytes read at a time where the whole file is not needed
HELD_OUT = 500  # stories kept for validation where one file has to serve for both
BUILT_IN = {"train": (10_000, 0), "validation": (500, 1)}  # stories, seed
BUILT_IN_REVIEWS = {"train": (4_000, 0), "validation": (500, 1)}


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
        raise CourseError(f"{name}: expected {form}, found an empty file: download or write it again")
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CourseError(
            f"{name}: expected UTF-8, found byte 0x{text[error.start]:02x} at offset {error.start:,}:"
            " save the file as UTF-8, or download it again"
        ) from None
    if SEPARATOR not in decoded:
        raise CourseError(
            f"{name}: expected {form}, found no separator in {len(text):,} bytes: put one between stories"
        )
    found = [story for part in decoded.split(SEPARATOR) if (story := part.strip())]
    if len(found) < 2:
        raise CourseError(f"{name}: expected at least 2 {form}, found {len(found)}: add stories")
    return found


def read_stories(path: Path, limit: int | None = None) -> list[str]:
    """The first `limit` stories of a file (all by default), reading no further than needed: one file has 1.9 GB."""
    if limit is None:
        return split_stories(path.read_bytes(), path.name)
    mark, parts, tail, seen = SEPARATOR.encode(), [], b"", 0
    with open(path, "rb") as file:
        while seen <= limit and (piece := file.read(PIECE)):
            *whole, tail = (tail + piece).split(mark)  # the tail may end inside a story, a separator, a character
            parts += whole
            seen += sum(bool(part.strip()) for part in whole)
    if seen <= limit:  # the file ended first: its tail is a story too
        parts.append(tail)
    return split_stories(mark.join(parts), path.name)[:limit]


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
            part = f"all but the last {HELD_OUT} stories of" if train else f"the last {HELD_OUT} stories of"
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


def load_sst2(split: str = "train") -> list[tuple[str, int]]:
    """SST-2 (Socher et al. 2013) as (sentence, label), 1 positive and 0 negative, from the mirror or the hub.

    `split` is "train" (67,349 sentences, most of them phrases) or "validation" (872). Without either source, built-in
    reviews, which are easier; prints which. Raises CourseError for another split and for a damaged file.
    """
    if split not in BUILT_IN_REVIEWS:
        raise CourseError(f"split: expected train or validation, found {split!r}")
    try:
        found = hub.fetch("datasets", hub.SST2, f"data/{split}-00000-of-00001.parquet")
    except hub.NotAvailable as reason:
        n, seed = BUILT_IN_REVIEWS[split]
        rows = reviews.generate(n, seed)
        if split == "validation":  # a sentence may come out of both seeds
            seen = {sentence for sentence, _ in reviews.generate(*BUILT_IN_REVIEWS["train"])}
            rows = [row for row in rows if row[0] not in seen]
        hub.used(f"{len(rows):,} {split} reviews", f"built-in generator, seed {seed} ({reason})")
        return rows
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(found.path, columns=["sentence", "label"])
        rows = [(row["sentence"].strip(), int(row["label"])) for row in table.to_pylist()]
    except (pyarrow.ArrowException, AttributeError, TypeError, ValueError, OSError) as error:
        said = str(error).splitlines()[0]
        raise CourseError(f"{found.path.name}: expected a table of sentence and label, found {said}") from error
    if not rows or {label for _, label in rows} - {0, 1}:
        raise CourseError(f"{found.path.name}: expected sentences labelled 0 or 1, found {len(rows)} rows of others")
    hub.used(f"{len(rows):,} {split} reviews of SST-2", found.source)
    return rows


def encode(texts: list[str], tok: tiktoken.Encoding) -> list[Int32[np.ndarray, " T"]]:
    """Token ids of each story, without the end-of-story token. Raises CourseError when there is no story."""
    if not texts:
        raise CourseError("encode: expected at least one story, found none: check the limit and the split")
    return [np.array(ids, np.int32) for ids in tok.encode_ordinary_batch(texts, num_threads=2)]


@dataclass(frozen=True)
class Packed:
    """Rows of equal length. `segments` numbers the stories in a row from 1; 0 marks padding."""

    tokens: Int[np.ndarray, "N T"]
    segments: Int[np.ndarray, "N T"]
    dropped: float = 0.0  # the share of the stories' tokens that no row holds

    @property
    def wasted(self) -> float:
        """The share of positions that hold padding: computed, paid for, and thrown away."""
        return float((self.segment_ids == 0).mean())


def pad_rows(rows: Sequence[np.ndarray], context: int, *, eot: int) -> Packed:
    """One story a row (after its start token), cut at `context`, padded to it; what was cut off is dropped."""
    packed = _fill([[np.concatenate([[eot], row])[:context]] for row in rows], context, eot)
    whole = sum(len(row) + 1 for row in rows)
    return Packed(packed.tokens, packed.segment_ids, 1 - float((packed.segment_ids > 0).sum()) / whole)


def concat_then_split(rows: Sequence[np.ndarray], context: int, *, eot: int) -> Packed:
    """All stories in one line, each after its start token, cut every `context` tokens: only the last row has padding."""
    parts: list[list[np.ndarray]] = [[]]
    room = context
    for row in rows:
        story = np.concatenate([[eot], row])
        while len(story):
            if room == 0:
                parts.append([])
                room = context
            parts[-1].append(story[:room])
            story, room = story[room:], room - len(parts[-1][-1])
    return _fill(parts, context, eot)


def best_fit(rows: Sequence[np.ndarray], context: int, *, eot: int) -> Packed:
    """Whole stories where they fit: each piece goes into the fullest row that still has room for it.

    A story longer than `context` is cut into pieces first. Longest pieces are placed first.
    """
    stories_ = [np.concatenate([[eot], row]) for row in rows]
    pieces = [s[i : i + context] for s in stories_ for i in range(0, len(s), context)]
    return _fill([[pieces[i] for i in row] for row in place([len(p) for p in pieces], context)], context, eot)


def place(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which pieces share a row: their numbers, row by row. Longest first, each into the fullest row where it fits.

    No length may exceed `room`.
    """
    open_rows: list[list[int]] = [[] for _ in range(room + 1)]  # open_rows[r]: rows with r free places
    rows: list[list[int]] = []
    for piece in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        free = next((r for r in range(lengths[piece], room + 1) if open_rows[r]), None)
        if free is None:
            rows.append([])
            row, free = len(rows) - 1, room
        else:
            row = open_rows[free].pop()
        rows[row].append(piece)
        open_rows[free - lengths[piece]].append(row)
    return rows


def _fill(parts: list[list[np.ndarray]], context: int, eot: int) -> Packed:
    tokens = np.full((len(parts), context), eot, np.int32)
    segments = np.zeros((len(parts), context), np.int32)
    for row, pieces in enumerate(parts):
        at = 0
        for number, piece in enumerate(pieces, start=1):
            tokens[row, at : at + len(piece)] = piece
            segments[row, at : at + len(piece)] = number
            at += len(piece)
    return Packed(tokens, segments)


class Windows:
    """All stories in one line, seen as windows of `context` inputs and the same places one token later as targets.

    A source for grain: it has a length and can be indexed in any order, which is what makes a shuffle possible without
    moving data, and a resume possible without replaying it.
    """

    def __init__(self, rows: Sequence[np.ndarray], context: int, *, eot: int, seed: int = 0):
        order = np.random.default_rng(seed).permutation(len(rows))
        line = [part for i in order for part in ([eot], rows[i])]
        self.tokens = np.concatenate([*line, [eot]]).astype(np.int32)
        self.context = context
        if len(self) < 1:
            raise CourseError(
                f"stories: expected at least {context + 1} tokens in all (one window of context {context}), "
                f"found {len(self.tokens)}: add stories or shorten the context"
            )

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.context

    def __getitem__(self, i: int) -> dict[str, Int32[np.ndarray, " T"]]:
        window = self.tokens[i * self.context : (i + 1) * self.context + 1]
        return {"inputs": window[:-1], "targets": window[1:]}


def batches(
    rows: Sequence[np.ndarray], context: int, batch_size: int, *, eot: int, seed: int = 0
) -> grain.DatasetIterator:
    """Endless batches {"inputs", "targets"} [B, T] int32: shuffled, packed, in a new order each epoch.

    The iterator's `get_state()` is a small dictionary; `set_state` of it continues with the very next batch.
    """
    source = Windows(rows, context, eot=eot, seed=seed)
    if len(source) < batch_size:
        raise CourseError(
            f"batch_size: expected at most {len(source)} (the windows of context {context} in these stories), "
            f"found {batch_size}: add stories, or make the batch smaller"
        )
    shuffled = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    # An endless data set has a length all the same (the largest integer): rounding it up, for a last batch that is
    # not full, would overflow.
    dataset = shuffled.batch(batch_size, drop_remainder=True)
    # No reader threads: slicing an array in memory is quicker than handing it from one thread to another.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(dataset.to_iter_dataset(options))
