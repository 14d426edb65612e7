"""Checks of chapter 11: loss masks, means of parts, cut examples, chunked losses, a worst case."""

import numpy as np

from utils.course.checks import (
    Mistake,
    array,
    call,
    exercise,
    expect,
    expect_close,
    expect_shape,
    integers,
    is_close,
    normal,
)


@exercise("11.1")
def conversation_mask(learner):
    turn = ["template", "user", "user", "template", "answer", "answer", "end"]
    roles = [*turn, "template", "user", "template", "answer", "end"]
    right = np.array([0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1])
    loss_mask = array(call(learner, list(roles)), "the loss mask")
    expect(
        len(np.atleast_1d(loss_mask)) != len(roles),
        "one-entry-too-many",
        "this has an entry for each token",
        "the number of targets: N - 1",
    )
    expect_close(
        loss_mask,
        right,
        "the loss mask",
        axes="[N - 1]",
        unlike={
            "inputs-not-targets": (
                [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1],
                "these are the roles of the inputs",
                "the target at position t, which is token t + 1",
            ),
            "end-never-learned": (
                [0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0],
                "the ends of the answers are not in the loss",
                "the role end",
            ),
            "user-in-the-loss": (
                [1, 1, 0, 1, 1, 1, 0, 1, 0, 1, 1],
                "the user's words are in the loss too",
                "what the model never has to write",
            ),
            "everything": (np.ones(11), "every target is in the loss", "which roles count"),
            "last-answer-only": (
                np.array([0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]),
                "only the last answer is in the loss",
                "the first answer",
            ),
            "upside-down": (
                1 - right,
                "what should be in the loss is not, and the other way round",
                "which roles count",
            ),
        },
    )
    return "All answers and their ends are in the loss, and nothing else"


@exercise("11.2")
def combined(learner):
    means, counts = [2.0, 1.0, 0.0], [10, 90, 0]
    expect_close(
        call(learner, means, counts),
        1.1,
        "the loss of parts with 10, 90 and 0 completion tokens",
        unlike={
            "mean-of-means": (1.0, "each part counts alike, whatever it holds", "the counts"),
            "mean-of-nonempty-means": (
                1.5,
                "each part counts alike, whatever it holds",
                "the counts",
            ),
            "sum-not-mean": (
                110.0,
                "this is the sum of the nats",
                "the number of all completion tokens",
            ),
            "divided-by-parts": (
                110 / 3,
                "the nats are divided by the number of parts",
                "the number of completion tokens",
            ),
        },
    )
    expect_close(call(learner, np.array([3.0]), np.array([7])), 3.0, "the loss of one part alone")


@exercise("11.3")
def cut(learner):
    ids, prompt = list(range(100, 110)) + [2], 4  # 4 tokens of prompt, 6 of answer, and the end

    def of(max_seq_length: int):
        # The first call is one whose answer must not be None, so that a stub is seen as one.
        run = call if max_seq_length == 50 else lambda function, *given: function(*given)
        kept = run(learner, list(ids), prompt, max_seq_length)
        return (
            None
            if kept is None
            else array(kept, f"the tokens for a row of {max_seq_length}").astype(int).tolist()
        )

    expect(
        of(50) == ids,
        "cuts-what-fits",
        "an example that fits comes back as it is",
        "a row of 50",
    )
    short = of(7)
    expect(
        short is not None,
        "skips-what-can-be-cut",
        "with a row of 7 there is an answer left",
        "when it is None",
    )
    expect(
        short[-1] != 2,
        "keeps-the-end",
        "the cut answer ends in an end-of-text",
        "where a cut answer does not end",
    )
    expect(
        short[:4] == ids[:4],
        "front-cut-off",
        "the beginning of the prompt is gone",
        "which end is cut",
    )
    expect(
        short != ids[:7],
        "one-token-too-few",
        "a row of 7 inputs has 7 targets, so 8 tokens fit",
        "inputs and tokens",
    )
    expect(short != ids, "not-cut", "this is longer than the row", "max_seq_length")
    expect(
        len(short) == 8,
        "wrong-length",
        f"expected 8 tokens for a row of 7, found {len(short)}",
        "the slice",
    )
    expect(
        of(10) == ids,
        "cuts-what-fits",
        "11 tokens have 10 inputs: they fit a row of 10",
        "inputs and tokens",
    )
    expect(
        of(3) is None,
        "no-completion-left",
        "a row of 3 holds no token of the answer",
        "when no completion token is left",
    )
    one = of(4)
    expect(
        one == ids[:5],
        "skips-the-last-chance",
        "with a row of 4 the answer's first token is still a target",
        "4",
    )
    return "Cut at the row's end, without an end-of-text, and skipped where no answer is left"


@exercise("11.4")
def by_example(learner):
    segment_ids = np.array([1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 0, 0], np.int32)
    loss_mask = np.array([0, 0, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0], np.float32)
    nats = np.array([2.0, 5, 1, 4, 8, 3, 6, 2, 1, 9, 7, 7])
    losses = array(call(learner, nats.copy(), segment_ids.copy(), loss_mask.copy()), "the losses")
    if losses.shape == (4,):
        raise Mistake(
            "padding-as-an-example", "there are four losses, for three examples", "segment 0"
        )
    expect_shape(losses, (3,), "the losses", axes="[examples]")
    expect_close(
        losses,
        [2.5, 4.5, 1.5],
        "the losses of the three examples",
        unlike={
            "prompt-counted": (
                [3, 5.666667, 4],
                "positions that are not in the loss count too",
                "the loss mask",
            ),
            "divided-by-all-positions": (
                [1.25, 3, 1],
                "the nats are divided by all positions of the example",
                "the number of positions in the loss",
            ),
            "sum-not-mean": (
                [5, 9, 3],
                "these are sums",
                "the number of positions in the loss",
            ),
        },
    )


@exercise("11.5")
def loss_in_chunks(learner):
    import jax
    import jax.numpy as jnp

    T, D, V, chunk = 10, 6, 17, 4
    hidden, table = jnp.asarray(normal(T, D)), jnp.asarray(normal(V, D, seed=1))
    targets, loss_mask = (
        jnp.asarray(integers(0, V, T)),
        jnp.asarray([0, 0, 1, 1, 1, 0, 1, 1, 1, 1.0]),
    )
    # The numbers were computed beforehand, in float64.
    expect_close(
        call(learner, hidden, table, targets, loss_mask, chunk),
        4.1117588,
        "the mean loss",
        rtol=1e-4,
        unlike={
            "mean-of-means": (
                4.2047750,
                "each chunk counts alike, however many of its tokens are in the loss",
                "where you divide",
            ),
            "mask-forgotten": (4.6747327, "every position counts", "the loss mask"),
            "divided-by-all-positions": (
                2.8782311,
                "the nats are divided by all positions",
                "the sum of the loss mask",
            ),
            "last-chunk-lost": (3.5006402, "the last, shorter chunk is missing", "T = 10"),
            "last-chunk-half-lost": (2.5004573, "the last, shorter chunk is missing", "T = 10"),
            "sum-not-mean": (28.782311, "this is the sum of the nats", "the sum of the loss mask"),
        },
    )
    traced = jax.make_jaxpr(lambda h: learner(h, table, targets, loss_mask, chunk))(hidden)
    largest = max(_sizes(traced.jaxpr, V), default=0)
    expect(
        largest <= chunk * V,
        "whole-logits",
        f"the value is right, but {largest // V} rows of logits exist at once, for chunks of {chunk}",
        "what is multiplied with the table",
    )
    return "The right loss, with no more logits than asked for"


def _sizes(jaxpr, V: int):
    """Sizes of all arrays in a jaxpr, inner jaxprs included, that have an axis of V."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            shape = getattr(variable.aval, "shape", ())
            if (
                V in shape and len(shape) > 1 and 6 not in shape
            ):  # the table itself, turned, has D = 6
                yield int(np.prod(shape))
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _sizes(inner, V)


@exercise("11.6")
def worst_case(learner):
    base = np.array([1] * 6 + [0] * 34, bool)
    adapter = np.array([1] * 3 + [0] * 3 + [1] * 24 + [0] * 10, bool)
    cut = np.array([1] * 2 + [0] * 4 + [1] * 4 + [0] * 20 + [1] * 2 + [0] * 8, bool)
    # The numbers were computed beforehand. 27 of the adapter's answers are right, 6 of the base's.
    expect_close(
        call(learner, base.copy(), adapter.copy(), cut.copy()),
        0.1428361,
        "the lower end of the interval",
        rtol=1e-3,
        atol=1e-5,
        unlike={
            "nothing-assumed": (0.3000281, "this is the interval as it was measured", "cut"),
            "upper-end": (0.5578368, "this is the upper end", "which of the two numbers"),
            "wrong-way-round": (
                -0.5578368,
                "this is the base less the adapter",
                "first and second",
            ),
            "not-paired": (
                0.0658773,
                "these are two intervals side by side",
                "newcombe, of both arrays",
            ),
            "no-interval": (0.375, "this is the difference itself", "the interval"),
            "cut-counts-as-wrong": (
                0.3442864,
                "this is the best case for the claim: cut off counts as wrong",
                "the base's right answers",
            ),
            "only-cut-ones-right": (
                0.2625428,
                "what the base had right is gone",
                "the base's right answers",
            ),
            "both-favoured": (
                0.2074577,
                "the adapter's answers were not cut off",
                "whose answers are assumed right",
            ),
        },
    )
    expect(
        is_close(call(learner, base, adapter, np.zeros(40, bool)), 0.3000281, rtol=1e-3, atol=1e-5),
        "cut-not-used",
        "without any cut answer this is not the measured interval",
        "cut",
    )
    return "The claim holds or falls with this number"
