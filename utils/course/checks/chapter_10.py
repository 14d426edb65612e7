"""Checks of chapter 10: intervals, memory of training, label words, a paired test, scales, DoRA."""

import numpy as np

from utils.course.checks import Mistake, array, call, exercise, expect, expect_close, is_close


@exercise("10.1")
def needed_right(learner):
    expect_close(
        call(learner, 100, 0.5),
        60,
        "the right answers needed of 100, for a floor of 0.5",
        rtol=0,
        atol=1e-6,
        unlike={
            "no-interval": (
                51,
                "this compares the accuracy itself with the floor",
                "the interval's lower end",
            ),
            "upper-end": (
                41,
                "the upper end lies above the floor for bad classifiers too",
                "which end of the two",
            ),
            "one-too-many": (61, "one answer fewer is enough", "where the count stops"),
            "one-too-few": (
                59,
                "the interval of this count still holds the floor",
                "where the count stops",
            ),
            "share-not-count": (0.6, "this is an accuracy", "how many answers that is"),
        },
    )
    expect_close(
        call(learner, 400, 0.8), 336, "the right answers needed of 400, for 0.8", rtol=0, atol=1e-6
    )
    return "The interval lies above the floor, and with one answer fewer it does not"


@exercise("10.2")
def training_bytes(learner):
    expect_close(
        call(learner, 1000, 70_000),
        156_000,
        "the bytes of 1,000 trained and 70,000 frozen numbers",
        unlike={
            "one-mean": (
                152_000,
                "one of the four numbers is missing",
                "gradients, and Adam's two means",
            ),
            "no-weights": (148_000, "half of the four numbers is missing", "weights and gradients"),
            "frozen-in-float32": (296_000, "the frozen base is bfloat16", "bytes of a bfloat16"),
            "frozen-has-a-state": (
                1_136_000,
                "frozen numbers have no gradient and no means",
                "frozen",
            ),
            "frozen-forgotten": (16_000, "the frozen base is in memory as well", "frozen"),
        },
    )
    expect_close(call(learner, 0, 10), 20, "the bytes of a frozen model alone")


@exercise("10.3")
def read_labels(learner):
    # The answer stands elsewhere in each row; the position before it and the padding behind it say
    # something else.
    lengths = np.array([2, 5, 3, 6])
    truth, before, behind = np.array([1, 0, 1, 0]), np.array([0, 0, 1, 1]), np.array([1, 1, 1, 0])
    negative, positive = 7, 3
    logits = np.zeros((4, 7, 11), np.float32)
    for i, length in enumerate(lengths):
        says = np.repeat([before[i], behind[i]], [length, 7 - length])
        says[length - 1] = truth[i]
        logits[i, :, negative], logits[i, :, positive] = 1 - says, says
    logits[:, :, 9] = 5.0  # a third word that is likelier than both
    labels = array(call(learner, logits, lengths, negative, positive), "the labels")
    expect_close(
        labels,
        truth,
        "the labels",
        axes="[B]",
        unlike={
            "reads-the-padding": (
                behind,
                "this reads the padding behind the answer",
                "the index in each row",
            ),
            "words-swapped": (1 - truth, "every label is the opposite", "which word makes a 1"),
            "third-word": (
                np.zeros(4),
                "the likeliest word of all is neither of the two",
                "the two logits alone",
            ),
            "reads-too-early": (
                before,
                "this reads a position before the answer",
                "the index in each row",
            ),
            "ids-not-labels": (
                np.where(truth, positive, negative),
                "these are the words' ids",
                "1 and 0",
            ),
        },
    )
    expect(
        labels.dtype.kind in "biu",
        "not-a-label",
        "expected whole numbers 0 and 1, found floats",
        "what you return",
    )


@exercise("10.4")
def mcnemar(learner):
    def arrays(both, one, other, none):
        first = np.array([1] * both + [1] * one + [0] * other + [0] * none, bool)
        second = np.array([1] * both + [0] * one + [1] * other + [0] * none, bool)
        return first, second

    p_value = call(learner, *arrays(50, 5, 15, 30))
    expect_close(
        p_value,
        0.0413895,
        "the p-value of 5 to 15",
        rtol=1e-4,
        unlike={
            "one-sided": (
                0.0206947,
                "this is the chance of one side alone",
                "splits that are as uneven the other way",
            ),
            "all-sentences": (
                0.368202,
                "sentences on which both agree say nothing",
                "the number of coins",
            ),
            "only-this-split": (0.0295715, "more uneven splits count as well", "the sum"),
            "only-half-of-this-split": (0.0147858, "more uneven splits count as well", "the sum"),
            "this-split-left-out": (
                0.0118179,
                "the split itself counts as well",
                "where the sum ends",
            ),
            "normal-approximation": (
                0.0253473,
                "this is a normal approximation",
                "sums of math.comb",
            ),
        },
    )
    more = call(learner, *arrays(5000, 5, 15, 3000))
    expect(
        is_close(more, p_value),
        "all-sentences",
        "sentences on which both agree change the result",
        "the coins",
    )
    turned = call(learner, *arrays(50, 15, 5, 30))
    expect(
        not is_close(turned, 1.0),
        "one-order-only",
        "15 to 5 is as uneven as 5 to 15",
        "the smaller of the two",
    )
    expect_close(turned, 0.0413895, "the p-value of 15 to 5", rtol=1e-4)
    even = call(learner, *arrays(10, 4, 4, 2))
    expect(
        not (array(even) > 1.0 + 1e-9),
        "above-one",
        "a p-value of an even split came out above 1",
        "the doubling",
    )
    expect_close(even, 1.0, "the p-value of 4 to 4")
    expect_close(call(learner, *arrays(10, 0, 0, 2)), 1.0, "the p-value without a disagreement")


@exercise("10.5")
def first_change(learner):
    plain, stable = (call(learner, 16, 8.0, 300, 0.01, use_rslora) for use_rslora in (False, True))
    right = 6.666667e-4
    swapped = is_close(plain, 4 * right, rtol=1e-3) and is_close(stable, right, rtol=1e-3)
    expect(
        not swapped,
        "cases-swapped",
        "each case has the other's scale",
        "which scale divides by the root",
    )
    expect_close(
        plain,
        right,
        "the first change at rank 16, plain",
        rtol=1e-3,
        atol=0,
        unlike={
            "no-third": (
                1.154701e-3,
                "A is uniform: its variance is a third of a squared",
                "the variance of A",
            ),
            "signs-agree": (
                right * 4,
                "the terms have random signs: variances add, not sizes",
                "the sum over the rank",
            ),
            "rank-forgotten": (
                right / 4,
                "an entry is a sum over the rank",
                "the sum over the rank",
            ),
            "scale-forgotten": (right * 2, "the scale s is missing", "alpha"),
            "variance": (4.444444e-7, "this is the mean square", "the root"),
        },
    )
    expect_close(
        stable,
        4 * right,
        "the first change at rank 16, rank-stabilised",
        rtol=1e-3,
        atol=0,
        unlike={"no-square-root": (right, "alpha / sqrt(r) is larger than alpha / r", "the scale")},
    )


@exercise("10.6")
def dora(learner):
    import jax
    import jax.numpy as jnp

    # With this adapter of rank 1 the changed rows are (3, 4), (5, 12) and (8, 6), of lengths 5, 13
    # and 10. `plain` is what plain LoRA gives for the three inputs.
    x, W = [[1.0, 0], [0, 1], [1, -1]], [[2.0, 2], [6, 14], [6, 2]]
    A, B, s, m = [[2.0, 4]], [[1.0], [-1], [2]], 0.5, [10.0, 26, 5]
    plain = np.array([[3, 5, 8], [4, 12, 6], [-1, -7, 2]])
    x, W, A, B, m = (jnp.asarray(part) for part in (x, W, A, B, m))
    expect_close(
        call(learner, x, W, A, B, s, m),
        [[6, 10, 4], [8, 24, 3], [-2, -14, 1]],
        "the output",
        axes="[n, out]",
        rtol=1e-3,
        atol=1e-5,
        unlike={
            "norm-of-the-base": (
                plain * [3.535534, 1.706984, 0.790569],
                "the length is that of W alone",
                "what is divided",
            ),
            "one-norm-for-all": (
                plain * [0.583212, 1.516351, 0.291606],
                "every row has a length of its own",
                "the norm's axis",
            ),
            "columns-not-rows": (
                [
                    [3.030458, 13.131983, 4.040610],
                    [2.857143, 22.285714, 2.142857],
                    [0.173315, -9.153731, 1.897753],
                ],
                "the columns are divided by their lengths",
                "the norm's axis",
            ),
            "m-not-used": (plain / [5, 13, 10], "every row has length 1", "m"),
            "no-division": (plain * [10, 26, 5], "the rows' own lengths are still in", "the norm"),
            "lengths-not-used": (plain, "this is plain LoRA", "m and the norm"),
            "scale-forgotten": (
                [
                    [5.547002, 9.656158, 3.535534],
                    [8.320503, 24.140394, 3.535534],
                    [-2.773501, -14.484236, 0],
                ],
                "the change is not scaled",
                "s",
            ),
        },
    )

    def slope(argument):
        """The gradient of the sum of the squared outputs in argument 3 (B) or 5 (m)."""
        total = jax.grad(lambda *given: (learner(*given) ** 2).sum(), argnums=argument)
        return np.asarray(total(x, W, A, B, s, m))

    try:
        of_B = slope(3)
    except Exception as error:
        raise Mistake(
            "not-differentiable", "jax.grad does not go through your function", "use jnp, not np"
        ) from error
    if is_close(of_B, [[4.480003], [-11.266273], [-1.4]], rtol=1e-3, atol=1e-4):
        raise Mistake(
            "gradient-through-the-norm",
            "the norm takes part in the gradient",
            "jax.lax.stop_gradient",
        )
    if not is_close(of_B, [[96], [288], [9]], rtol=1e-3, atol=1e-4):
        raise Mistake(
            "too-much-detached",
            "B's gradient is not the one of a constant norm",
            "what stop_gradient holds",
        )
    if not slope(5).any():
        raise Mistake("lengths-do-not-learn", "m has no gradient", "what stop_gradient holds")
