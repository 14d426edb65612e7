"""Packing: no token lost, none twice, and a stream that resumes where it was."""

from collections import Counter

import numpy as np
import pytest

from tests.helpers import tiny
from utils import CourseError
from utils.course import row_packing
from utils.data import packing

EOT = 399


def odd_rows(seed=0, n=40, longest=90):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, longest, n)
    return [rng.integers(0, 399, length).astype(np.int32) for length in lengths]


def pieces(packed):
    """The parts of stories in each row, in order."""
    for tokens, segments in zip(packed.tokens, packed.segment_ids):
        for number in range(1, segments.max(initial=0) + 1):
            yield tokens[segments == number]


@pytest.mark.parametrize("context", [1, 5, 16, 32, 100])
def test_concatenate_and_split_loses_and_repeats_nothing(context):
    rows = odd_rows()
    packed = row_packing.concat_then_split(rows, context, eot=EOT)
    line = np.concatenate([part for row in rows for part in ([EOT], row)])
    np.testing.assert_array_equal(np.concatenate(list(pieces(packed))), line)
    assert packed.tokens.shape == packed.segment_ids.shape and packed.tokens.shape[1] == context
    assert (packed.segment_ids[:-1] > 0).all() and packed.dropped == 0
    assert packed.wasted == pytest.approx(1 - len(line) / packed.tokens.size)


@pytest.mark.parametrize("context", [5, 16, 32, 100])
def test_best_fit_loses_and_repeats_nothing(context):
    rows = odd_rows()
    packed = row_packing.best_fit(rows, context, eot=EOT)
    found = Counter(np.concatenate(list(pieces(packed))).tolist())
    line = [part for row in rows for part in ([EOT], row)]
    assert found == Counter(np.concatenate(line).tolist())
    whole = Counter(tuple(np.concatenate([[EOT], row])) for row in rows if len(row) < context)
    assert not whole - Counter(map(tuple, pieces(packed))), "a story that fits was cut"


def test_best_fit_of_no_more_than_a_row_wastes_less_than_padding():
    rows = odd_rows(longest=30)
    assert (
        row_packing.best_fit(rows, 32, eot=EOT).wasted
        < row_packing.pad_rows(rows, 32, eot=EOT).wasted / 2
    )


def test_padding_keeps_one_story_a_row_and_says_what_it_dropped():
    rows = odd_rows()
    packed = row_packing.pad_rows(rows, 32, eot=EOT)
    assert len(packed.tokens) == len(rows) and set(np.unique(packed.segment_ids)) == {0, 1}
    for row, piece in zip(rows, pieces(packed)):
        np.testing.assert_array_equal(piece, np.concatenate([[EOT], row])[:32])
    total, kept = sum(len(row) + 1 for row in rows), sum(min(len(row) + 1, 32) for row in rows)
    assert packed.dropped == pytest.approx(1 - kept / total)
    assert packed.wasted == pytest.approx(1 - kept / packed.tokens.size)


def test_windows_cut_the_line_of_all_stories_once():
    rows = odd_rows()
    windows = packing.Windows(rows, 16, eot=EOT, seed=3)
    inputs = np.concatenate([windows[i]["inputs"] for i in range(len(windows))])
    targets = np.concatenate([windows[i]["targets"] for i in range(len(windows))])
    np.testing.assert_array_equal(targets[:-1], inputs[1:])  # no gap and no overlap
    np.testing.assert_array_equal(inputs, windows.tokens[: len(inputs)])
    assert len(windows.tokens) - 1 - len(inputs) < 16  # less than one window is left out
    # The line holds every story once, whole.
    marks = np.flatnonzero(windows.tokens == EOT)
    found = Counter(tuple(windows.tokens[a + 1 : b]) for a, b in zip(marks, marks[1:]))
    assert found == Counter(map(tuple, rows))


def test_an_epoch_has_every_window_once_and_the_next_has_another_order():
    rows = odd_rows(n=60)
    source = packing.Windows(rows, 16, eot=EOT)
    every = Counter(tuple(source[i]["inputs"]) for i in range(len(source)))
    stream = packing.batches(rows, 16, 1, eot=EOT)
    first, second = (
        [tuple(next(stream)["inputs"][0]) for _ in range(len(source))] for _ in range(2)
    )
    assert Counter(first) == Counter(second) == every and first != second


def test_the_batch_size_does_not_change_the_order():
    one, four = (packing.batches(odd_rows(), 16, size, eot=EOT) for size in (1, 4))
    for _ in range(
        100
    ):  # several epochs: a batch may hold the end of one and the start of the next
        batch = next(four)["inputs"]
        assert np.array_equal(batch, np.concatenate([next(one)["inputs"] for _ in range(4)]))


def test_the_seed_decides_the_order():
    first = [
        next(packing.batches(odd_rows(), 16, 4, eot=EOT, seed=seed))["inputs"] for seed in (0, 0, 1)
    ]
    assert np.array_equal(first[0], first[1]) and not np.array_equal(first[0], first[2])


@pytest.mark.parametrize("before", [0, 1, 17, 200])
def test_a_resumed_stream_gives_the_very_next_batch(before):
    stream, other = (packing.batches(odd_rows(), 16, 4, eot=EOT) for _ in range(2))
    for _ in range(before):
        next(stream)
    state = stream.get_state()
    expected = [next(stream) for _ in range(60)]
    next(other)  # wherever the other one was
    other.set_state(state)
    for batch in expected:
        found = next(other)
        assert all(np.array_equal(batch[name], found[name]) for name in ("inputs", "targets"))


def test_batches_are_int32_and_shifted_by_one():
    batch = next(packing.batches(tiny.rows(), 32, 4, eot=EOT))
    assert batch["inputs"].shape == batch["targets"].shape == (4, 32)
    assert batch["inputs"].dtype == batch["targets"].dtype == np.int32
    np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])


def test_too_few_tokens_for_a_window_or_a_batch_is_an_error():
    with pytest.raises(CourseError, match="expected at least 33 tokens in all .*, found 5"):
        packing.batches([np.arange(3, dtype=np.int32)], 32, 1, eot=EOT)
    with pytest.raises(CourseError, match="batch_size: expected at most 1 .*, found 4"):
        packing.batches([np.arange(40, dtype=np.int32)], 32, 4, eot=EOT)
