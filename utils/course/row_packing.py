"""Three ways to put stories of many lengths into rows of one length, which chapter 01 compares.

`pad_rows` gives each story a row of its own and wastes the rest of it; `concat_then_split` puts all
stories in one line and cuts it every T tokens; `best_fit` keeps stories whole where it can.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from utils.data.packing import assign_rows


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
