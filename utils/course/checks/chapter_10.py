"""Checks of chapter 10: intervals, memory of training, label words, a paired test, scales, DoRA."""

import math

import numpy as np

from utils.course.checks import Mistake, array, call, exercise, expect, expect_close, is_close, normal


@exercise("10.1")
def needed_right(learner):
    found = call(learner, 100, 0.5)
    expect_close(
        found,
        60,
        "the right answers needed of 100, for a floor of 0.5",
        rtol=0,
        atol=1e-6,
        unlike={
            "no-interval": (51, "this compares the accuracy itself with the floor", "the interval's lower end"),
            "upper-end": (41, "the upper end lies above the floor for bad classifiers too", "which end of the two"),
            "one-too-many": (61, "one answer fewer is enough", "where the count stops"),
            "one-too-few": (59, "the interval of this count still holds the floor", "where the count stops"),
            "share-not-count": (0.6, "this is an accuracy", "how many answers that is"),
        },
    )
    expect_close(call(learner, 400, 0.8), 336, "the right answers needed of 400, for 0.8", rtol=0, atol=1e-6)
    return "The interval lies above the floor, and with one answer fewer it does not"


@exercise("10.2")
def training_bytes(learner):
    trained, frozen = 1000, 70_000
    found = call(learner, trained, frozen)
    expect_close(
        found,
        16 * trained + 2 * frozen,
        "the bytes of 1,000 trained and 70,000 frozen numbers",
        unlike={
            "one-mean": (
                12 * trained + 2 * frozen,
                "one of the four numbers is missing",
                "gradients, and Adam's two means",
            ),
            "no-weights": (8 * trained + 2 * frozen, "half of the four numbers is missing", "weights and gradients"),
            "frozen-in-float32": (16 * trained + 4 * frozen, "the frozen base is bfloat16", "bytes of a bfloat16"),
            "frozen-has-a-state": (16 * (trained + frozen), "frozen numbers have no gradient and no means", "frozen"),
            "frozen-forgotten": (16 * trained, "the frozen base is in memory as well", "frozen"),
        },
    )
    expect_close(call(learner, 0, 10), 20, "the bytes of a frozen model alone")


@exercise("10.3")
def read_labels(learner):
    # The answer stands elsewhere in each row; the position before it and the padding behind it say something else.
    lengths = np.array([2, 5, 3, 6])
    truth, before, behind = np.array([1, 0, 1, 0]), np.array([0, 0, 1, 1]), np.array([1, 1, 1, 0])
    negative, positive = 7, 3
    logits = np.zeros((4, 7, 11), np.float32)
    for i, length in enumerate(lengths):
        says = np.repeat([before[i], behind[i]], [length, 7 - length])
        says[length - 1] = truth[i]
        logits[i, :, negative], logits[i, :, positive] = 1 - says, says
    logits[:, :, 9] = 5.0  # a third word that is likelier than both
    found = array(call(learner, logits, lengths, negative, positive), "the labels")
    expect_close(
        found,
        truth,
        "the labels",
        axes="[B]",
        unlike={
            "reads-the-padding": (behind, "this reads the padding behind the answer", "the index in each row"),
            "words-swapped": (1 - truth, "every label is the opposite", "which word makes a 1"),
            "third-word": (np.zeros(4), "the likeliest word of all is neither of the two", "the two logits alone"),
            "reads-too-early": (before, "this reads a position before the answer", "the index in each row"),
            "ids-not-labels": (np.where(truth, positive, negative), "these are the words' ids", "1 and 0"),
        },
    )
    expect(found.dtype.kind in "biu", "not-a-label", "expected whole numbers 0 and 1, found floats", "what you return")


@exercise("10.4")
def mcnemar(learner):
    def arrays(both, one, other, none):
        first = np.array([1] * both + [1] * one + [0] * other + [0] * none, bool)
        second = np.array([1] * both + [0] * one + [1] * other + [0] * none, bool)
        return first, second

    found = call(learner, *arrays(50, 5, 15, 30))
    expect_close(
        found,
        0.0413895,
        "the p-value of 5 to 15",
        rtol=1e-4,
        unlike={
            "one-sided": (0.0206947, "this is the chance of one side alone", "splits that are as uneven the other way"),
            "all-sentences": (0.368202, "sentences on which both agree say nothing", "the number of coins"),
            "only-this-split": (0.0295715, "more uneven splits count as well", "the sum"),
            "only-half-of-this-split": (0.0147858, "more uneven splits count as well", "the sum"),
            "this-split-left-out": (0.0118179, "the split itself counts as well", "where the sum ends"),
            "normal-approximation": (0.0253473, "this is a normal approximation", "sums of math.comb"),
        },
    )
    more = call(learner, *arrays(5000, 5, 15, 3000))
    expect(is_close(more, found), "all-sentences", "sentences on which both agree change the result", "the coins")
    turned = call(learner, *arrays(50, 15, 5, 30))
    expect(not is_close(turned, 1.0), "one-order-only", "15 to 5 is as uneven as 5 to 15", "the smaller of the two")
    expect_close(turned, 0.0413895, "the p-value of 15 to 5", rtol=1e-4)
    even = call(learner, *arrays(10, 4, 4, 2))
    expect(not (array(even) > 1.0 + 1e-9), "above-one", "a p-value of an even split came out above 1", "the doubling")
    expect_close(even, 1.0, "the p-value of 4 to 4")
    expect_close(call(learner, *arrays(10, 0, 0, 2)), 1.0, "the p-value without a disagreement")


@exercise("10.5")
def first_change(learner):
    rank, alpha, inside, rate = 16, 8.0, 300, 0.01
    plain, stable = (call(learner, rank, alpha, inside, rate, stabilised) for stabilised in (False, True))
    right = 0.5 * rate * math.sqrt(16 / 900)
    swapped = is_close(plain, 4 * right, rtol=1e-3) and is_close(stable, right, rtol=1e-3)
    expect(not swapped, "cases-swapped", "each case has the other's scale", "which scale divides by the root")
    expect_close(
        plain,
        right,
        "the first change at rank 16, plain",
        rtol=1e-3,
        atol=0,
        unlike={
            "no-third": (
                right * math.sqrt(3),
                "A is uniform: its variance is a third of a squared",
                "the variance of A",
            ),
            "signs-agree": (
                right * 4,
                "the terms have random signs: variances add, not sizes",
                "the sum over the rank",
            ),
            "rank-forgotten": (right / 4, "an entry is a sum over the rank", "the sum over the rank"),
            "scale-forgotten": (right * 2, "the scale s is missing", "alpha"),
            "variance": (right**2, "this is the mean square", "the root"),
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

    x, W, A, B = (jnp.asarray(normal(*shape, seed=i)) for i, shape in enumerate([(4, 6), (5, 6), (2, 6), (5, 2)]))
    m = jnp.asarray(np.abs(normal(5, seed=4)) + 0.5)
    s = 0.5
    changed = np.asarray(W) + s * np.asarray(B) @ np.asarray(A)

    def over(norm):
        return np.asarray(x) @ changed.T * (np.asarray(m) / norm)

    found = call(learner, x, W, A, B, s, m)
    plain = np.asarray(x) @ changed.T
    unscaled = np.asarray(W) + np.asarray(B) @ np.asarray(A)
    expect_close(
        found,
        over(np.sqrt((changed**2).sum(1))),
        "the output",
        axes="[n, out]",
        rtol=1e-3,
        atol=1e-5,
        unlike={
            "norm-of-the-base": (
                over(np.linalg.norm(np.asarray(W), axis=1)),
                "the length is that of W alone",
                "what is divided",
            ),
            "one-norm-for-all": (over(np.linalg.norm(changed)), "every row has a length of its own", "the norm's axis"),
            "columns-not-rows": (
                np.asarray(x) @ (changed / np.linalg.norm(changed, axis=0)).T * np.asarray(m),
                "the columns are divided by their lengths",
                "the norm's axis",
            ),
            "m-not-used": (over(np.linalg.norm(changed, axis=1)) / np.asarray(m), "every row has length 1", "m"),
            "no-division": (plain * np.asarray(m), "the rows' own lengths are still in", "the norm"),
            "lengths-not-used": (plain, "this is plain LoRA", "m and the norm"),
            "scale-forgotten": (
                np.asarray(x) @ unscaled.T * (np.asarray(m) / np.linalg.norm(unscaled, axis=1)),
                "the change is not scaled",
                "s",
            ),
        },
    )

    def gradient(f):
        return np.asarray(jax.grad(lambda b: (f(x, W, A, b, s, m) ** 2).sum())(B))

    def through(x, W, A, B, s, m):
        rows = W + s * B @ A
        return (x @ rows.T) * (m / jnp.sqrt((rows * rows).sum(1)))

    try:
        slope = gradient(learner)
    except Exception as error:
        raise Mistake("not-differentiable", "jax.grad does not go through your function", "use jnp, not np") from error
    if is_close(slope, gradient(through), rtol=1e-3, atol=1e-4):
        raise Mistake("gradient-through-the-norm", "the norm takes part in the gradient", "jax.lax.stop_gradient")
    factor = jnp.asarray(np.asarray(m) / np.sqrt((changed**2).sum(1)))
    wanted = gradient(lambda x, W, A, b, s, m: (x @ W.T + s * (x @ A.T) @ b.T) * factor)
    if not is_close(slope, wanted, rtol=1e-3, atol=1e-4):
        raise Mistake("too-much-detached", "B's gradient is not the one of a constant norm", "what stop_gradient holds")
    if not np.abs(jax.grad(lambda lengths: (learner(x, W, A, B, s, lengths) ** 2).sum())(m)).any():
        raise Mistake("lengths-do-not-learn", "m has no gradient", "what stop_gradient holds")
