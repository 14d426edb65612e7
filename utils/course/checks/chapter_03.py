"""Checks of chapter 3: masks, attention of one head, splitting heads, counting, causality."""

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
    integers,
    is_close,
    normal,
)


@exercise("3.1")
def windowed_mask(learner):
    T, window = 6, 3
    rows = ("100000", "110000", "111000", "011100", "001110", "000111")
    expected = np.array([[mark == "1" for mark in row] for row in rows])
    mask = expect_shape(call(learner, T, window), (T, T), "the mask", "[T, T]").astype(bool)
    if not np.array_equal(mask, expected):
        expect(
            not np.array_equal(mask.T, expected),
            "rows-and-columns-swapped",
            "each token may look at later tokens and at no earlier one",
            "rows look, columns are looked at",
        )
        expect(
            not np.triu(mask, 1).any(),
            "sees-the-future",
            "some tokens may look at later ones",
            "row 0 must be True in column 0 alone",
        )
        expect(
            mask.diagonal().all(),
            "own-position-left-out",
            "a token may not look at itself, so with window 1 it sees nothing at all",
            "is the distance 0 allowed?",
        )
        expect(
            not np.array_equal(mask, np.tri(T, dtype=bool)),
            "no-window",
            "every earlier token is allowed, however far away",
            "the upper limit of the distance",
        )
        expect(
            not mask.diagonal(-window).any(),
            "one-too-many",
            f"with window {window} a token should see {window} tokens, itself included, and sees more",
            "< or <=",
        )
        raise Mistake("wrong-values", "some entries of the mask are not what was asked for")
    one = array(call(learner, 4, 1)).astype(bool)
    expect(
        np.array_equal(one, np.eye(4, dtype=bool)),
        "wrong-values",
        "with window=1 each token should see itself alone",
    )
    return "It holds for windows of 3 and of 1"


@exercise("3.2")
def attend(learner):
    import jax
    import jax.numpy as jnp

    # Scores 2, 4, 0 and 2, 3, 7 before any scaling. The values are unit vectors, so that an output
    # is a row of attention weights; the numbers were computed beforehand.
    q, k = [[2.0, 0, 0, 0], [0, 0, 3, 1]], [[1.0, 0, 0, 2], [2, 0, 1, 0], [0, 1, 2, 1]]
    v, mask = np.eye(3, 4, dtype=np.float32), np.array([[True, True, False], [True, False, True]])
    expect_close(
        call(learner, *map(jnp.asarray, (q, k, v, mask))),
        [[0.268941, 0.731059, 0, 0], [0.075858, 0, 0.924142, 0]],
        "the output",
        axes="[T, H]",
        rtol=1e-3,
        atol=1e-4,
        unlike={
            "not-scaled": (
                [[0.119203, 0.880797, 0, 0], [0.006693, 0, 0.993307, 0]],
                "the scores were not divided by anything",
                "their spread grows like the square root of H",
            ),
            "divided-by-head-size": (
                [[0.377541, 0.622459, 0, 0], [0.2227, 0, 0.7773, 0]],
                "the scores were divided by H",
                "it is their variance that is H, not their spread",
            ),
            "mask-after-softmax": (
                [[0.244728, 0.665241, 0, 0], [0.067425, 0, 0.821409, 0]],
                "the weights are set to zero after the softmax, so rows no longer sum to one",
                "what must a score be for its weight to become zero?",
            ),
            "mask-left-out": (
                [[0.244728, 0.665241, 0.090031, 0], [0.067425, 0.111166, 0.821409, 0]],
                "every token looks at every other",
                "is mask used at all?",
            ),
            "softmax-over-queries": (
                [[0.5, 1, 0, 0], [0.5, 0, 1, 0]],
                "the weights of a column sum to one, not those of a row",
                "the axis of the softmax: each row shares out one unit of attention",
            ),
            "zero-is-not-masked": (
                [[0.244728, 0.665241, 0.090031, 0], [0.073799, 0.027149, 0.899052, 0]],
                "a masked score was set to 0, which is a weight like any other",
                "what does softmax make of 0?",
            ),
        },
    )
    q, k, v = normal(4, 9, seed=1), normal(5, 9, seed=2), normal(5, 9, seed=3)
    mask = np.tri(4, 5, k=1).astype(bool)
    one_head = (jnp.asarray(part)[None, :, None] for part in (q, k, v))
    library = jax.nn.dot_product_attention(*one_head, mask=jnp.asarray(mask)[None, None])
    expect_close(
        call(learner, *map(jnp.asarray, (q, k, v, mask))),
        library[0, :, 0],
        "the output for 4 queries and 5 keys",
        axes="[T, H]",
        rtol=1e-3,
        atol=1e-4,
    )
    return "Scale, mask and axis are right, also with more tokens looked at than looking"


@exercise("3.3")
def split_heads(learner):
    import jax.numpy as jnp

    # Two texts of two tokens of three heads of two numbers; the second text holds 12 more each.
    x = np.arange(24, dtype=np.float32).reshape(2, 2, 6)
    heads = np.array([[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]])
    interleaved = np.array([[[0, 3], [6, 9]], [[1, 4], [7, 10]], [[2, 5], [8, 11]]])
    expect_close(
        call(learner, jnp.asarray(x), 3),
        [heads, heads + 12],
        "the split array",
        axes="[B, N, T, H]",
        unlike={
            "tokens-mixed-with-heads": (
                x.reshape(2, 3, 2, 2),
                "one reshape to [B, N, T, H] deals out whole tokens to heads",
                "cut D where it stands, at the end; then move the axis",
            ),
            "numbers-interleaved": (
                [interleaved, interleaved + 12],
                "head n got every N-th number of the token",
                "which of N and H comes first when D is cut?",
            ),
            "axis-not-moved": (
                x.reshape(2, 2, 3, 2),
                "the cut is right, and the heads stand after the tokens",
                "the order of the axes asked for: [B, N, T, H]",
            ),
        },
    )
    return "Head n of token t holds numbers n*H to (n+1)*H"


@exercise("3.4")
def gpt2_small(learner):
    from utils.minigpt import Config

    attempted(learner)
    if callable(learner):
        raise Mistake("wrong-type", "expected a number, found a function", "call it")
    counts = Config(50_257, 1_024, 768, 12, 12, 3_072).count_parameters()
    total = counts["total"]
    unlike = {
        "head-counted-again": (
            total + counts["embed_tokens"],
            "the output layer is tied to the token table and costs nothing more",
            "what tied means",
        ),
        "biases-included": (
            124_439_808,
            "this is the released GPT-2 small, with its biases",
            "the exercise asks for this chapter's architecture: no biases",
        ),
        "o-proj-forgotten": (
            total - counts["attention"] // 4,
            "each block has three square matrices in your count",
            "what happens to the heads' answers before they are added to the stream?",
        ),
        "one-mlp-matrix": (
            total - counts["mlp"] // 2,
            "the MLP widens, and narrows again",
            "down_proj",
        ),
        "norms-forgotten": (
            total - counts["norms"],
            "the scales of the norms are missing",
            "two norms a block, and one at the end",
        ),
        "last-norm-forgotten": (
            total - 768,
            "768 are missing",
            "the norm after the last block",
        ),
        "positions-forgotten": (
            total - counts["embed_positions"],
            "the table of positions is missing",
            "the model has two tables",
        ),
    }
    value = array(learner, "the count")
    for name, (wrong, *explanation) in unlike.items():
        if is_close(value, wrong, rtol=0, atol=0.5):
            raise Mistake(name, *explanation)
    expect_close(value, total, "the count", rtol=0, atol=0.5)
    return "And 102,144 biases make it the released GPT-2"


@exercise("3.5")
def is_causal(learner):
    import jax.numpy as jnp

    T = 6
    tokens = jnp.asarray(integers(0, 40, 1, T, seed=4))

    def running(tokens):  # [1, T, 1]: a sum of all tokens so far
        return jnp.cumsum(tokens, axis=1)[..., None]

    def peeks(*positions):
        """The running sum, to which the token after each of these positions is added."""
        chosen = jnp.asarray([position in positions for position in range(T)])

        def forward(tokens):
            ahead = jnp.roll(tokens, -1, axis=1).at[:, -1].set(0)
            return (jnp.cumsum(tokens, axis=1) + jnp.where(chosen, ahead, 0))[..., None]

        return forward

    def denominator(tokens):  # masked after a softmax: no future value, but the future's share
        weights = tokens / tokens.sum()
        return (jnp.cumsum(weights, axis=1))[..., None]

    def says(forward):
        value = call(learner, forward, tokens)
        expect(
            isinstance(value, (bool, np.bool_)) or getattr(value, "shape", None) == (),
            "wrong-type",
            f"expected True or False, found {type(value).__name__}",
        )
        return bool(value)

    expect(
        says(running),
        "calls-a-causal-model-leaky",
        "a running sum depends on no later token, and was called leaky",
        "which outputs may move when token t changes? Position t itself may",
    )
    expect(
        not says(peeks(*range(T - 1))),
        "finds-no-leak",
        "a model whose every position sees the next token was called causal",
        "is the changed row really passed to forward, and compared with the first answer?",
    )
    caught = [not says(peeks(position)) for position in range(T - 1)]
    expect(
        caught != [False] * (T - 2) + [True],
        "only-the-last-token",
        "a leak is found only when it comes from the last token",
        "each token has to be changed once",
    )
    expect(
        caught != [True] + [False] * (T - 2),
        "only-the-first-positions",
        "a leak is found only at the first position",
        "compare every position before the changed one",
    )
    expect(
        sum(caught) != 1,
        "one-position-only",
        f"a leak is found only at position {caught.index(True) if True in caught else 0}",
        "each token has to be changed once",
    )
    expect(
        all(caught),
        "misses-some-positions",
        f"a leak at position {caught.index(False) if False in caught else 0} was not found",
        "which tokens are changed, and which outputs compared?",
    )
    expect(
        not says(denominator),
        "misses-a-small-leak",
        "a leak through the softmax's denominator was called causal",
        "how large may a difference be?",
    )
    return "It finds a leak at any position, and one through the denominator"
