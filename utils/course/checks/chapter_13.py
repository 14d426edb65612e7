"""Checks of chapter 13: batches that fit, saved inputs, heads on a mesh, all-gathers, hiding them."""

from utils.course.checks import LearnerError, Mistake, call, exercise, expect, expect_close


@exercise("13.1")
def largest_batch(learner):
    # 16 of memory, 6 of it taken, 0.75 a row: 13 rows a chip (13.33), 104 on 8 chips.
    expect_close(
        call(learner, 16.0, 6.0, 0.75, 8),
        104,
        "the rows of a batch on 8 chips of 16, with 6 taken and 0.75 a row",
        rtol=0,
        atol=1e-6,
        unlike={
            "one-chip": (
                13,
                "these are the rows of one chip",
                "how many chips share the batch's rows",
            ),
            "does-not-divide": (
                106,
                "106 rows do not divide over 8 chips",
                "where to round down: per chip, or at the end",
            ),
            "rounded-up": (
                112,
                "one of the 14 rows on each chip does not fit",
                "the direction of the rounding",
            ),
            "nothing-else-there": (
                168,
                "the chip holds other things than rows",
                "what is there without any row",
            ),
            "fraction": (106.66667, "a third of a row cannot be placed", "whole rows on each chip"),
        },
    )
    expect_close(
        call(learner, 16.0, 15.9, 0.75, 4), 0, "the rows where not even one fits", rtol=0, atol=1e-6
    )
    return "Whole rows on each chip, and as many on all"


@exercise("13.2")
def saved_inputs(learner):
    # 3 layers, hidden size 50, 8 rows of 100 tokens over fsdp 4, 2 bytes a number
    right = 60_000
    expect_close(
        call(learner, 3, 50, 8, 100, 4),
        right,
        "the bytes of the saved inputs on one chip",
        rtol=0,
        atol=0.5,
        unlike={
            "whole-batch": (
                4 * right,
                "these are the rows of the whole batch",
                "which axis splits the rows",
            ),
            "in-float32": (2 * right, "activations are bfloat16 here", "the bytes of a bfloat16"),
            "one-layer": (
                right // 3,
                "this is the input of a single layer",
                "how many layers keep theirs",
            ),
            "numbers-not-bytes": (
                right // 2,
                "these are numbers, not bytes",
                "the bytes of a bfloat16",
            ),
        },
    )
    expect_close(
        call(learner, 28, 1536, 16, 2048, 8), 352_321_536, "R1's on a v5e-8", rtol=0, atol=0.5
    )


@exercise("13.3")
def heads_on_a_chip(learner):
    for heads, kv_heads, tp, right in (
        (12, 2, 1, (12, 2)),
        (12, 2, 2, (6, 1)),
        (12, 2, 4, (3, 2)),
        (32, 8, 4, (8, 2)),
    ):
        pair = call(learner, heads, kv_heads, tp)
        try:
            pair = tuple(pair)
        except TypeError:
            raise Mistake(
                "one-number",
                "a pair was asked for",
                "query heads and key/value heads, in that order",
            ) from None
        if tp == 4 and kv_heads == 2:
            expect(
                pair not in ((3, 0), (3, 0.5)),
                "half-a-head",
                "2 key/value heads over 4 chips leave no whole head for any of them",
                "what the mesh does with heads that do not divide",
            )
            expect(
                pair != (3, 1),
                "one-each",
                "a chip's 3 query heads would need one of the two, but the package keeps both whole on every chip",
                "`Rules.sharding`, where num_key_value_heads is asked about",
            )
        expect(
            pair == right,
            "other-heads",
            f"of {heads} query and {kv_heads} key/value heads over tp={tp} a chip has {right}, this says {pair}",
            "which of the two are split, and when",
        )
    try:
        refused = call(learner, 12, 2, 8)
    except LearnerError as raised:
        expect(
            isinstance(raised.error, ValueError),
            "crash-not-refusal",
            f"12 query heads over 8 chips end in a {type(raised.error).__name__}",
            "a CourseError that says what does not divide",
        )
        return "And 12 heads over 8 chips are refused"
    raise Mistake(
        "not-refused",
        f"12 query heads do not go over 8 chips, and this says {refused}",
        "what to raise when the query heads do not divide",
    )


@exercise("13.4")
def gathered(learner):
    # 10 layers of 1,000 numbers, tables of 7,000 each
    right = 68_000
    expect_close(
        call(learner, 10, 1000, 7000, 1),
        right,
        "the gathered bytes of a step",
        rtol=0,
        atol=0.5,
        unlike={
            "one-pass": (48_000, "the layers are gathered once here", "the second pass, backward"),
            "tables-twice": (
                96_000,
                "the tables are gathered once each",
                "what the backward pass reads",
            ),
            "three-passes": (
                88_000,
                "gradient checkpointing computes a layer again with the same gathered weights",
                "how often a layer's weights are put together",
            ),
            "numbers-not-bytes": (
                right // 2,
                "these are numbers, not bytes",
                "the bytes of a bfloat16",
            ),
            "no-tables": (
                40_000,
                "embedding and output layer are gathered as well",
                "the two tables",
            ),
        },
    )
    expect_close(
        call(learner, 10, 1000, 7000, 2),
        34_000,
        "the gathered bytes with tp=2",
        rtol=0,
        atol=0.5,
        unlike={
            "tp-forgotten": (
                right,
                "with tp=2 a chip puts together half of each weight",
                "what tp does to a weight",
            )
        },
    )


@exercise("13.5")
def tokens_to_hide(learner):
    # 8 GB at 4 GB/s are 2 s; a token's 3 operations at 6 a second half a second
    expect_close(
        call(learner, 8e9, 4e9, 3.0, 6.0),
        4.0,
        "the tokens on each chip",
        rtol=1e-6,
        unlike={
            "upside-down": (
                0.25,
                "this is the inverse",
                "which of the two times grows with the tokens",
            ),
            "seconds": (
                2.0,
                "these are the seconds of the collectives",
                "how many tokens fill them",
            ),
            "bits": (32.0, "the bandwidth is in bytes per second already", "bits and bytes"),
        },
    )
    expect_close(call(learner, 6.19e9, 100e9, 1e10, 197e12), 1219.43, "another chip's", rtol=1e-6)
