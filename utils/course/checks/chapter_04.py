"""Checks of chapter 4: bits per character, the learning rate's schedule, clipping, top-p."""

import numpy as np

from utils.course.checks import array, call, exercise, expect, expect_close, is_close


@exercise("4.1")
def bits_per_character(learner):
    expect_close(
        call(learner, 2.0, 250, 1000),
        0.7213475,
        "the bits per character",
        unlike={
            "nats-not-bits": (0.5, "this is nats per character", "one bit is ln 2 nats"),
            "per-token": (
                2.8853901,
                "this is bits per token",
                "how many tokens and characters the text has",
            ),
            "multiplied-by-ln-2": (
                0.3465736,
                "a bit is smaller than a nat, so there are more of them",
                "whether to divide or multiply by ln 2",
            ),
            "ratio-upside-down": (
                11.5415603,
                "the text has fewer tokens than characters, so the number per character is smaller",
                "tokens over characters, or characters over tokens",
            ),
        },
    )
    expect_close(call(learner, 7.0, 30, 60), 5.0494326, "the bits per character of another text")


@exercise("4.2")
def learning_rate(learner):
    peak, warmup_steps, steps, end = 2e-3, 100, 1100, 0.1

    def at(step):
        return float(array(call(learner, step, peak, warmup_steps, steps, end), "the rate"))

    rising = np.array([at(step) for step in (0, 25, 50, 100)])
    expect(
        not is_close(rising[:3], [2e-3, 2e-3, 2e-3]),
        "no-warmup",
        "the rate is at its peak from the first step on",
        "what happens before step `warmup_steps`",
    )
    expect_close(rising[:3], [0, 5e-4, 1e-3], "the rate at steps 0, 25, 50", axes="[3]")
    last, middle = at(steps), at(600)
    expect(
        not (is_close(last, 0.0) and middle <= last),
        "rises-again",
        "the rate comes back up at the end",
        "the angle goes from 0 to pi, not to 2 pi",
    )
    expect(
        not is_close(last, peak),
        "rises-again",
        "the rate is back at its peak at the last step",
        "the angle goes from 0 to pi, not to 2 pi",
    )
    expect(
        rising[3] > peak * 0.999,
        "cosine-from-step-zero",
        f"at step {warmup_steps} the rate is {rising[3]:.3g}, not the peak {peak:.3g}: the cosine has already begun",
        "measure the way from the end of the warmup",
    )
    expect(
        abs(last) > peak * 1e-3,
        "falls-to-zero",
        "the rate at the last step is 0, not peak * end",
        "the range that the cosine is stretched to",
    )
    expect(
        middle > peak * 0.502 or middle < peak * 0.3,
        "end-added-too-late",
        "half-way down the rate is half the peak, not half-way between the peak and the end",
        "stretch the cosine between the two values instead of cutting it off",
    )
    expect_close(last, 2e-4, "the rate at the last step")
    expect_close(middle, 1.1e-3, "the rate half-way down")
    expect_close(at(350), 1.736396e-3, "the rate at a quarter of the way down")


@exercise("4.3")
def clip_gradients(learner):
    large = {"a": np.array([3.0]), "b": np.array([[0.0, 4.0]]), "c": np.array([12.0, 0.0])}
    small = {"a": np.array([0.03]), "b": np.array([[0.0, 0.04]]), "c": np.array([0.12, 0.0])}

    def flat(grads):
        clipped = call(learner, {name: g.copy() for name, g in grads.items()}, 1.0)
        expect(
            isinstance(clipped, dict) and set(clipped) == set(grads),
            "not-a-dictionary",
            "expected a dictionary with the names of the gradients",
            "what the function returns",
        )
        return np.concatenate([array(clipped[name], name).ravel() for name in "abc"])

    expect_close(
        flat(large),
        np.array([3, 0, 4, 12, 0]) / 13,
        "the clipped gradients",
        axes="[all entries]",
        unlike={
            "each-array-alone": (
                np.array([1.0, 0, 1, 1, 0]),
                "each array was clipped on its own, which changes the direction",
                "one norm over all arrays",
            ),
            "norms-added": (
                np.array([3, 0, 4, 12, 0]) / 19,
                "the norms of the arrays were added, but it is their squares that add up",
                "the length of one long vector",
            ),
            "square-root-forgotten": (
                np.array([3, 0, 4, 12, 0]) / 169,
                "this divides by the square of the norm",
                "the square root",
            ),
            "not-clipped": (
                np.array([3.0, 0, 4, 12, 0]),
                "nothing was scaled",
                "the factor for a norm above the limit",
            ),
        },
    )
    expect_close(
        flat(small),
        np.array([0.03, 0, 0.04, 0.12, 0]),
        "gradients below the limit",
        axes="[all entries]",
        unlike={
            "small-ones-blown-up": (
                np.array([3, 0, 4, 12, 0]) / 13,
                "gradients below the limit were scaled up to it",
                "the factor when the norm is below the limit",
            )
        },
    )
    expect_close(
        flat({name: 0 * g for name, g in large.items()}),
        np.zeros(5),
        "a gradient of zero",
        axes="[all entries]",
    )


@exercise("4.4")
def nucleus(learner):
    p = np.array([0.15, 0.5, 0.1, 0.25])
    expect_close(
        call(learner, p.copy(), 0.7),
        np.array([0, 2 / 3, 0, 1 / 3]),
        "the probabilities at top_p 0.7",
        axes="[V]",
        unlike={
            "drops-the-one-that-crosses": (
                np.array([0, 1.0, 0, 0]),
                "the kept tokens have 0.5 in all and do not reach 0.7",
                "a token is needed while the sum before it is below top_p",
            ),
            "not-summing-to-one": (
                np.array([0, 0.5, 0, 0.25]),
                "the kept probabilities sum to 0.75",
                "divide by what is left",
            ),
            "order-of-tokens-lost": (
                np.array([2 / 3, 1 / 3, 0, 0]),
                "the probabilities came back sorted, so they belong to other tokens",
                "the way back from the sorted order",
            ),
            "not-sorted": (
                np.array([0.15, 0.5, 0.1, 0]) / 0.75,
                "tokens were taken in the order of their ids, not from the most likely down",
                "sort first",
            ),
            "threshold-on-each": (
                np.array([0, 0, 0, 0.0]),
                "no single token has 0.7, so nothing was kept",
                "top_p is about the sum, not about each probability",
            ),
        },
    )
    sure = array(call(learner, np.array([0.05, 0.9, 0.05]), 0.5), "the probabilities")
    expect(
        np.isfinite(sure).all() and sure.sum() > 0,
        "drops-the-one-that-crosses",
        "where one token has 0.9 and top_p is 0.5, nothing was kept",
        "a token is needed while the sum before it is below top_p",
    )
    expect_close(
        sure, np.array([0.0, 1, 0]), "the probabilities where one token is enough", axes="[V]"
    )
    expect_close(call(learner, p.copy(), 1.0), p, "the probabilities at top_p 1", axes="[V]")
