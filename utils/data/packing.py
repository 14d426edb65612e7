"""Packing: stories and examples of many lengths as rows of one length, which a model is trained on.

`batches` is what a pretraining run reads: all stories in one line, seen as `Windows`, shuffled anew
each epoch, endless and resumable. `assign_rows` says which examples to fine-tune on share a row.
"""

from collections.abc import Sequence

import grain
import numpy as np
from jaxtyping import Int32

from utils import unexpected


def assign_rows(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which pieces share a row: their numbers, row by row; no length may exceed `room`.

    Longest first, each into the fullest row where it fits.
    """
    # open_rows[r]: rows with r free positions
    open_rows: list[list[int]] = [[] for _ in range(room + 1)]
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
            expected = f"at least {context + 1} tokens in all (one window of context {context})"
            fix = "add stories or shorten the context"
            raise unexpected("stories", expected, len(self.tokens), fix)

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
        expected = f"at most {len(source)} (the windows of context {context} in these stories)"
        fix = "add stories, or make the batch smaller"
        raise unexpected("batch_size", expected, batch_size, fix)
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
