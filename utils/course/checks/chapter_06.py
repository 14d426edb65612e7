"""Checks of chapter 6: break-even rank, sample sizes, adding adapters, a style's rule, scales."""

import numpy as np

from utils.course.checks import (
    Mistake,
    array,
    attempted,
    call,
    exercise,
    expect,
    expect_close,
    expect_shape,
    is_close,
)


@exercise("6.1")
def break_even(learner):
    answer = call(learner, 100, 300)
    expect_close(
        answer,
        75,
        "the break-even rank of 100 x 300",
        unlike={
            "half-the-smaller-side": (
                50,
                "this is half the smaller side, right for squares only",
                "r (in + out)",
            ),
            "only-one-factor": (
                [100, 300],
                "this counts one of the two factors",
                "the numbers in A and in B",
            )
            if np.ndim(answer)
            else (100, "this counts one of the two factors", "the numbers in A and in B"),
        },
    )
    narrow = call(learner, 3, 4)  # 12 numbers; rank 1 has 7, rank 2 has 14
    expect(
        not is_close(narrow, 2),
        "rounded-up",
        "at this rank the adapter is larger than the matrix",
        "the rounding",
    )
    expect(
        not is_close(narrow, 1.7142857),
        "not-a-whole-number",
        "a rank is a whole number",
        "the rounding",
    )
    expect_close(narrow, 1, "the break-even rank of 3 x 4")
    expect_close(call(learner, 256, 256), 128, "the break-even rank of 256 x 256")


@exercise("6.2")
def samples_needed(learner):
    expect_close(
        call(learner, 0.9, 0.05),
        139,
        "the stories needed at p = 0.9, half = 0.05",
        rtol=0,
        atol=0.001,
        unlike={
            "rounded-down": (138, "with so few, the interval is a little too wide", "the rounding"),
            "not-squared": (
                4,
                "half the width must cost four times the stories",
                "the square root, when you solve for n",
            ),
            "worst-case-rate": (385, "this takes p as one half, whatever it is", "p (1 - p)"),
            "whole-width": (
                35,
                "this makes the whole interval 2 x 1.96 standard errors too wide",
                "half, on each side",
            ),
        },
    )
    expect_close(
        call(learner, 0.5, 0.1), 97, "the stories needed at p = 0.5, half = 0.1", rtol=0, atol=0.001
    )


@exercise("6.3")
def add_adapters(learner):
    def adapter(A, B, scale):
        return np.array(A, np.float32), np.array(B, np.float32), scale

    # Their changes, scale included, are [[2, 0, 4], [4, 2, 6]] and [[0.5, 0.5, 0], [-0.5, 0, 0.5]].
    one = adapter([[1, 0, 2], [0, 1, -1]], [[1, 0], [2, 1]], 2.0)
    two = adapter([[0, 1, 1], [1, 1, 0]], [[0, 1], [1, -1]], 0.5)
    result = call(learner, one, two)
    attempted(result)
    if not (isinstance(result, tuple | list) and len(result) == 3):
        raise Mistake("wrong-type", "expected three things, A, B and a scale", "what you return")
    A, B, scale = (array(x, name) for x, name in zip(result, ("A", "B", "the scale"), strict=True))
    if A.shape == (2, 3) and B.shape == (2, 2):
        raise Mistake(
            "factors-added",
            "a sum of factors has cross terms that nobody trained",
            "(B1 + B2)(A1 + A2)",
        )
    expect_shape(A, (4, 3), "A", axes="[R, in]")
    expect_shape(B, (2, 4), "B", axes="[out, R]")
    expect_close(
        scale * (B @ A),
        [[2.5, 0.5, 4], [3.5, 2, 6.5]],
        "the joint change",
        axes="[out, in]",
        rtol=1e-4,
        atol=1e-5,
        unlike={
            "scale-forgotten": (
                [[2, 1, 2], [1, 1, 4]],
                "the scales are lost",
                "scale of each adapter",
            ),
            "one-scale-for-both": (
                [[4, 2, 4], [2, 2, 8]],
                "the first adapter's scale is used for both",
                "the second one's scale",
            ),
            "scale-twice": (
                [[4.25, 0.25, 8], [7.75, 4, 12.25]],
                "each scale counts twice",
                "scales that were put into A as well as into B",
            ),
            "paired-with-the-wrong-factor": (
                [[0, 2.5, 1.5], [2.5, 5.5, 5.5]],
                "each B meets the other adapter's A",
                "the order in both concatenations",
            ),
        },
    )
    three = adapter([[1, 0, 0], [0, 1, 0], [0, 0, 2]], [[1, 1, 0], [0, 1, -1]], 1.0)
    A, B, scale = (array(x, "the result") for x in call(learner, one, three))
    expect_close(
        scale * (B @ A),
        [[3, 1, 4], [4, 3, 4]],
        "ranks 2 and 3 joined",
        rtol=1e-4,
        atol=1e-5,
    )


@exercise("6.4")
def ends_with_question(learner):
    def says(text):
        return bool(call(learner, text))

    expect(
        says("Tom sat down. What would you do?"),
        "plain-question-missed",
        "a story that ends with ? is missed",
        "?",
    )
    expect(
        not says('"Why?" asked Tom. He went home.'),
        "any-question",
        "a question in the middle counts",
        "where the question mark stands",
    )
    expect(
        says('Mom smiled. "Who is hungry?"'),
        "closing-quote-missed",
        "a spoken question is missed",
        "what follows ?",
    )
    expect(
        says("What would you do? \n"),
        "white-space-missed",
        "white space at the end hides the question",
        "the end",
    )
    expect(not says(""), "empty-text", "an empty text counts as a question", "the empty string")
    expect(
        not says("What a day! He slept."),
        "wrong-values",
        "a story without a question counts",
        "the last character",
    )


@exercise("6.5")
def same_scale_alpha(learner):
    plain = call(learner, 8, 16.0, 64, False)
    expect_close(
        plain,
        128.0,
        "alpha for rank 64, plain",
        unlike={
            "alpha-kept": (
                16.0,
                "with alpha fixed the scale falls to an eighth",
                "alpha / r before and after",
            ),
            "inverted": (2.0, "the ratio of the ranks is upside down", "which rank is larger"),
            "ranks-confused": (45.254834, "this is the rank-stabilised answer", "the two cases"),
        },
    )
    stable = call(learner, 8, 16.0, 64, True)
    expect_close(
        stable,
        45.254834,
        "alpha for rank 64, rank-stabilised",
        rtol=1e-4,
        unlike={
            "no-square-root": (
                128.0,
                "alpha / sqrt(r) grows more slowly",
                "the square root of the ratio",
            ),
        },
    )
