"""Checks of chapter 8: a header, the table, llama.cpp's rows, a hidden bug, a shard, a cast."""

import json
import struct
import zlib

import ml_dtypes
import numpy as np

from utils.course.checks import (
    LearnerError,
    Mistake,
    array,
    attempted,
    call,
    exercise,
    expect,
    expect_close,
    is_close,
    normal,
)


def _file(entries: dict[str, tuple[str, list[int], int]]) -> bytes:
    """A safetensors file of zeros. `entries`: name -> (dtype, shape, bytes of one number)."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, itemsize) in entries.items():
        start, end = end, end + itemsize * int(np.prod(shape, dtype=int))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


@exercise("8.1")
def count(learner):
    file = _file(
        {"a.weight": ("BF16", [5, 7], 2), "a.bias": ("F32", [5], 4), "scale": ("F32", [], 4)}
    )
    try:
        numbers = call(learner, file)
    except LearnerError as raised:
        if not isinstance(raised.error, KeyError):
            raise
        raise Mistake(
            "counts-the-metadata",
            f"__metadata__ is read as a tensor, and has no {raised.error}",
            "which entries are no tensors",
        ) from raised
    expect_close(
        numbers,
        41,
        "the numbers in a file with a 5 x 7 matrix, a bias of 5 and a scalar",
        unlike={
            "bytes-not-numbers": (94, "these are bytes", "how many numbers they hold"),
            "the-whole-file": (len(file), "this is the length of the file", "the header's shapes"),
            "sums-the-shape": (
                17,
                "the sizes of a shape are added",
                "how many numbers a 5 x 7 matrix has",
            ),
            "scalar-lost": (
                40,
                "the tensor of shape [] is not counted",
                "the product of no sizes is one, not zero",
            ),
            "all-two-bytes": (
                47,
                "every number is taken for two bytes",
                "the dtype of each entry, or better its shape",
            ),
            "counts-the-metadata": (
                42,
                "__metadata__ is counted as a tensor",
                "which entries are no tensors",
            ),
            "counts-the-tensors": (3, "this is the number of tensors", "the shapes"),
            "counts-the-entries": (4, "this is the number of entries", "the shapes"),
        },
    )
    return "Scalars and mixed dtypes too"


@exercise("8.2")
def place(learner):
    from utils.hf import weights
    from utils.transformer import Config

    config = Config(
        "qwen2", 16, 8, 12, 2, 1, 4, 8, 8, 1e4, 1e-6, tie_word_embeddings=False, attention_bias=True
    )
    for name, expected in weights.names(config).items():
        answer = call(learner, name)
        expect(
            isinstance(answer, tuple | list) and len(answer) == 2,
            "wrong-type",
            f"expected a pair for {name}",
            "the last line",
        )
        path, layer = answer
        row = expected[1]
        expect(
            isinstance(path, str),
            "pair-turned-round",
            f"the pair for {name} is {(path, layer)}",
            "the order: first the path, then the row",
        )
        expect(
            not isinstance(layer, str),
            "row-is-text",
            f"the row of {name} is the text {layer!r}",
            "in a stack sorted by text, 10 comes before 2",
        )
        expect(
            not (row is not None and layer is not None and layer == row % 10 != row),
            "one-digit-only",
            f"{name} is sent to row {layer}",
            "layers with two digits",
        )
        expect(
            not (row is None and layer is not None),
            "row-for-everything",
            f"{name} is in no layer and is sent to row {layer}",
            "which names have no number",
        )
        expect(
            not (row is not None and layer is None),
            "no-row",
            f"{name} is sent to no row",
            "what the number in the name says",
        )
        expect(
            not (row is not None and layer == row + 1),
            "counted-from-one",
            f"{name} is sent to row {layer}",
            "the first block's number",
        )
        expect(
            not any(part.isdigit() for part in str(path).split(".")),
            "number-left-in-the-path",
            f"{name} is sent to {path}",
            "the stack's path has no number in it",
        )
        expect(
            (path, layer) == expected,
            "wrong-values",
            f"expected {expected} for {name}, found {(path, layer)}",
        )
    return "All names of a Qwen2 with 12 layers"


@exercise("8.3")
def undo(learner):
    right = normal(24, 5, seed=8)

    def reordered(weight, order):
        """Every head's rows in this order, as row numbers within the head."""
        return np.concatenate([head[order] for head in np.split(weight, len(weight) // len(order))])

    stored = reordered(right, [0, 4, 1, 5, 2, 6, 3, 7])
    given = stored.copy()
    answer = call(learner, given, 3)
    expect(
        np.array_equal(given, stored),
        "changes-its-input",
        "the array that was given has other rows than before",
        "a new array: the caller still needs the file's rows",
    )
    expect_close(
        answer,
        right,
        "the rows",
        axes="[heads * H, D]",
        unlike={
            "nothing-undone": (
                stored,
                "the rows are where llama.cpp has them",
                "what changes place with what",
            ),
            "permuted-again": (
                reordered(stored, [0, 4, 1, 5, 2, 6, 3, 7]),
                "the permutation is applied a second time, not undone",
                "which of the two axes of a head is the pair, and which its half",
            ),
            "across-heads": (
                reordered(stored, [*range(0, 24, 2), *range(1, 24, 2)]),
                "rows of different heads are mixed",
                "every head is put in order for itself",
            ),
            "halves-swapped": (
                reordered(stored, [1, 3, 5, 7, 0, 2, 4, 6]),
                "each head's second half comes first",
                "which of a pair is the first",
            ),
        },
    )
    short = np.arange(24.0).reshape(12, 2)
    try:
        answer = call(learner, reordered(short, [0, 3, 1, 4, 2, 5]), 2)
    except LearnerError as raised:
        raise Mistake(
            "heads-of-8-only",
            f"three heads of 8 are right, two heads of 6 raise {type(raised.error).__name__}",
            "where H comes from",
        ) from raised
    expect(
        is_close(answer, short),
        "heads-of-8-only",
        "three heads of 8 are right, two of 6 not",
        "where H comes from",
    )
    return "Three heads of 8, two of 6"


# What tells the bugs of the gallery apart, cheapest first: each probe, and the bugs that it shows.
_ROTATION = {"halves-swapped", "interleaved", "rope-base"}
_EPS = {"eps-value", "eps-outside"}
_IN_THE_WEIGHTS = {"head-forgotten", "norm-off-by-one", "gate-up-swapped", "layers-sorted"}
_SEEN = {
    "the statistics of the weights": _IN_THE_WEIGHTS,
    "a small vector after the norm": _EPS,
    "the logits of position 0": _IN_THE_WEIGHTS | {"kv-grouping"},
    "the logits with the rotation off": _IN_THE_WEIGHTS | {"kv-grouping", "transposed"},
    "the hidden state after block 0": {"norm-off-by-one", "gate-up-swapped"},
    "the hidden states of all blocks": {"norm-off-by-one", "gate-up-swapped", "layers-sorted"},
}
_BY_HAND = {
    frozenset(
        {"halves-swapped", "interleaved"}
    ): "the port with negative positions: one of the two is a mirror image",
    frozenset(
        {"halves-swapped", "rope-base"}
    ): "the port with negative positions: one of the two is a mirror image",
    frozenset(
        {"interleaved", "rope-base"}
    ): "positions 1 to 4: with one of the two, neighbours are nearly right",
    frozenset(_EPS): "the size of a small vector after the norm: what would each of the two give?",
}
_NAMES = sorted(_ROTATION | set.union(*_SEEN.values()))


@exercise("8.4")
def find_the_bug(answer, case):
    attempted(answer)
    expect(
        isinstance(answer, str),
        "wrong-type",
        "expected the bug's name as a text",
        "the names of the gallery",
    )
    named = answer.strip().lower().replace("_", "-").replace(" ", "-")
    expect(
        named in _NAMES,
        "unknown-name",
        f"the gallery has no bug called {answer!r}",
        "the keys of BUGS",
    )
    hidden = _NAMES[zlib.crc32(f"case {case}".encode()) % len(_NAMES)]
    if named == hidden:
        return f"Case {case} is solved"
    look = _BY_HAND.get(frozenset({named, hidden}), "the first part of block 0 that differs")
    for probe, seen in _SEEN.items():
        if (named in seen) != (hidden in seen):
            look = f"{probe}: with {named} it would be {'wrong' if named in seen else 'right'}"
            break
    if {named, hidden} <= _ROTATION:
        raise Mistake("another-rotation-bug", "the rotation is at fault, and this is not how", look)
    if {named, hidden} <= _EPS:
        raise Mistake("the-other-eps", "eps is at fault, and this is not how", look)
    if named in _ROTATION:
        raise Mistake("not-the-rotation", "the rotation is innocent", look)
    if hidden in _ROTATION:
        raise Mistake("the-rotation-overlooked", "this part is innocent", look)
    raise Mistake("another-part", "this part is innocent", look)


@exercise("8.5")
def piece(learner):
    mesh = {"fsdp": 2, "tp": 4}
    # Shape, spec, the device, and where its piece begins and how long it is along each dimension.
    cases = [
        ((12, 6), ("tp", None), {"fsdp": 0, "tp": 2}, (6, 0), (3, 6)),
        ((8, 6), ("tp", "fsdp"), {"fsdp": 1, "tp": 2}, (4, 3), (2, 3)),
        ((3, 4, 8), (None, "fsdp", "tp"), {"fsdp": 1, "tp": 1}, (0, 2, 2), (3, 2, 2)),
        ((5,), (None,), {"fsdp": 1, "tp": 3}, (0,), (5,)),
    ]
    for shape, spec, where, begins, lengths in cases:
        slices = call(learner, shape, spec, dict(mesh), dict(where))
        what = f"{shape} cut by {spec} at {where}"
        expect(
            isinstance(slices, tuple | list)
            and len(slices) == len(shape)
            and all(isinstance(s, slice) for s in slices),
            "wrong-type",
            f"expected one slice for each dimension of {shape}, found {slices!r:.60}",
            "dimensions that are not cut",
        )
        expect(
            not any(isinstance(end, float) for s in slices for end in (s.start, s.stop)),
            "not-whole",
            f"{what}: found {slices!r:.60}",
            "the kind of division",
        )
        spans = [range(n)[s] for s, n in zip(slices, shape)]
        starts, sizes = (
            tuple(s.indices(n)[0] for s, n in zip(slices, shape)),
            tuple(map(len, spans)),
        )
        if sizes == lengths and all(span[0] == first for span, first in zip(spans, begins)):
            continue
        cut = [axis for axis, name in enumerate(spec) if name]
        expect(
            all(sizes),
            "empty-piece",
            f"{what}: this piece has no numbers",
            "a device's place counts pieces, not rows",
        )
        expect(
            sizes != shape,
            "nothing-cut",
            f"{what}: this is the whole array",
            "which axis of the mesh cuts which dimension",
        )
        expect(
            sizes == lengths or any(starts[axis] != begins[axis] for axis in cut),
            "wrong-end",
            f"{what}: expected a piece of {lengths}, found {sizes}",
            "slice(a, b) stops before b",
        )
        expect(
            sizes == lengths,
            "wrong-size",
            f"{what}: expected a piece of {lengths}, found {sizes}",
            "the axis that the spec names, and how many pieces it makes",
        )
        expect(
            not all(starts[axis] == where[spec[axis]] for axis in cut),
            "place-not-scaled",
            f"{what}: the piece begins at {list(starts)}",
            "how many rows lie before piece number 2",
        )
        expect(
            not all(starts[axis] + sizes[axis] == shape[axis] - begins[axis] for axis in cut),
            "counted-from-the-end",
            f"{what}: the piece begins at {list(starts)}",
            "place 0 has the first rows",
        )
        expect(
            any(starts),
            "first-piece-for-all",
            f"{what}: every device gets the first piece",
            "where the device is",
        )
        raise Mistake(
            "wrong-place",
            f"{what}: the piece has the right shape and begins at {list(starts)}",
            "whose place along which axis",
        )
    return "Cut along one axis, two, and none"


@exercise("8.6")
def to_float16(learner):
    bf16 = ml_dtypes.bfloat16
    small = np.array([[1e-6, -2e-7, 1e-30], [0.0, 3e-9, 60000.0]], bf16)
    pair = call(learner, small.copy())
    expect(
        isinstance(pair, tuple | list) and len(pair) == 2,
        "returns-one",
        "expected a pair",
        "the count of vanished numbers goes with it",
    )
    half, vanished = pair
    expect(
        getattr(half, "dtype", None) == np.float16,
        "not-float16",
        f"the array's dtype is {getattr(half, 'dtype', None)}",
        "the cast",
    )
    expect_close(array(half), small.astype(np.float16), "the float16 array")
    expect_close(
        vanished,
        2,
        "the number of nonzero numbers that became zero",
        unlike={
            "zeros-counted-too": (
                3,
                "a number that was zero before is counted",
                "the numbers that became zero",
            ),
            "small-numbers-counted": (
                4,
                "a number that is small, and still there, is counted",
                "1e-6 in float16",
            ),
            "vanishing-not-noticed": (0, "nothing is counted", "1e-30 in float16"),
        },
    )
    for bad, word, name, why in (
        (
            [1.0, 1e30],
            "overflow",
            "overflow-passed",
            "1e30 became infinite, and nothing was raised",
        ),
        ([-7e4, 1.0], "overflow", "overflow-passed", "-70,000 passed without an error"),
        ([np.nan, 1.0], "not finite", "nan-passed", "a NaN went through"),
        (
            [np.inf, 1.0],
            "not finite",
            "infinity-blamed-on-the-cast",
            "an infinity that was there before is not reported as such",
        ),
    ):
        try:
            passed = learner(np.array(bad, bf16))
        except ValueError as error:
            words = [w for w in ("overflow", "not finite") if w in str(error).lower()]
            expect(
                word in words,
                name if word == "not finite" else "wrong-words",
                f"{bad} raised {str(error)!r:.60}",
                f'the words "{word}"',
            )
            expect(
                len(words) == 1,
                "one-message-for-both",
                f"{bad} raised {str(error)!r:.60}",
                "which of the two it is",
            )
            continue
        except Exception as error:
            raise Mistake(
                "wrong-type",
                f"expected ValueError for {bad}, found {type(error).__name__}",
                "what is raised",
            ) from None
        clipped = array(passed[0] if isinstance(passed, tuple | list) else passed)
        expect(
            not (np.isfinite(clipped).all() and word == "overflow"),
            "clipped",
            f"{bad} was cut down to {np.abs(clipped).max():,.0f}",
            "a wrong number is worse than an error",
        )
        raise Mistake(name, why, f'raise ValueError with "{word}"')
    return "Casts what fits, refuses what does not"
