"""Packing: stories of many lengths into rows of one length, the form in which a model is trained.

Three ways, which a page compares: `pad_rows` gives each story a row of its own and wastes the rest
of it; `concat_then_split` puts all stories in one line and cuts it every T tokens; `best_fit` keeps
stories whole where it can. `batches` is what a pretraining run reads: the line of `Windows`,
shuffled anew each epoch, endless and resumable.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import grain
import numpy as np
from jaxtyping import Int, Int32

from utils import CourseError


@dataclass(frozen=True)
class Packed:
    """Rows of equal length. `segment_ids` numbers the stories in a row from 1; 0 marks padding."""

    tokens: Int[np.ndarray, "N T"]
    segment_ids: Int[np.ndarray, "N T"]
    dropped: float = 0.0  # the share of the stories' tokens that no row holds

    @property
    def wasted(self) -> float:
        """The share of positions that hold padding: computed, paid for, and thrown away."""
        return float((self.segment_ids == 0).mean())


def pad_rows(rows: Sequence[np.ndarray], context: int, *, eot: int) -> Packed:
    """One story a row, after its start token; cut at `context` (the rest is dropped) or padded to it."""
    packed = _fill([[np.concatenate([[eot], row])[:context]] for row in rows], context, eot)
    total = sum(len(row) + 1 for row in rows)
    kept = float((packed.segment_ids > 0).sum()) / total
    return Packed(packed.tokens, packed.segment_ids, 1 - kept)


def concat_then_split(rows: Sequence[np.ndarray], context: int, *, eot: int) -> Packed:
    """All stories in one line, each after its start token, cut every `context` tokens.

    Only the last row has padding.
    """
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

    A story longer than `context` is cut into pieces first. Longest pieces are assigned first.
    """
    stories = [np.concatenate([[eot], row]) for row in rows]
    pieces = [s[i : i + context] for s in stories for i in range(0, len(s), context)]
    assigned = assign_rows([len(piece) for piece in pieces], context)
    return _fill([[pieces[i] for i in row] for row in assigned], context, eot)


def assign_rows(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which pieces share a row: their numbers, row by row; no length may exceed `room`.

    Longest first, each into the fullest row where it fits.
    """
    open_rows: list[list[int]] = [
        [] for _ in range(room + 1)
    ]  # open_rows[r]: rows with r free positions
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
    segment_ids = np.zeros((len(parts), context), np.int32)
    for row, pieces in enumerate(parts):
        start = 0
        for number, piece in enumerate(pieces, start=1):
            tokens[row, start : start + len(piece)] = piece
            segment_ids[row, start : start + len(piece)] = number
            start += len(piece)
    return Packed(tokens, segment_ids)


class Windows:
    """All stories in one line, seen as windows of `context` inputs and their next tokens as targets.

    A source for grain: it has a length and can be indexed in any order, which makes a shuffle
    possible without moving data, and a resume without replaying it.
    """

    def __init__(self, rows: Sequence[np.ndarray], context: int, *, eot: int, seed: int = 0):
        order = np.random.default_rng(seed).permutation(len(rows))
        line = [part for i in order for part in ([eot], rows[i])]
        self.tokens = np.concatenate([*line, [eot]]).astype(np.int32)
        self.context = context
        if len(self) < 1:
            raise CourseError(
                f"stories: expected at least {context + 1} tokens in all (one window of context"
                f" {context}), found {len(self.tokens)}: add stories or shorten the context"
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

    The iterator's `get_state()` is a small dictionary; `set_state` of it continues with the very
    next batch.
    """
    source = Windows(rows, context, eot=eot, seed=seed)
    if len(source) < batch_size:
        raise CourseError(
            f"batch_size: expected at most {len(source)} (the windows of context {context} in these"
            f" stories), found {batch_size}: add stories, or make the batch smaller"
        )
    return endless(grain.MapDataset.source(source).seed(seed).shuffle().repeat(), batch_size)


def endless(dataset: grain.MapDataset, batch_size: int, finish=None) -> grain.DatasetIterator:
    """An iterator over full batches of an endless data set, each through `finish` if one is given."""
    # An endless data set has a length all the same (the largest integer), and rounding it up, for a
    # last batch that is not full, would overflow.
    dataset = dataset.batch(batch_size, drop_remainder=True)
    dataset = dataset if finish is None else dataset.map(finish)
    # No reader threads: slicing an array in memory is quicker than handing it from one thread to
    # another.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(dataset.to_iter_dataset(options))
