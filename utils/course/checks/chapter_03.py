"""Checks of chapter 3: masks, attention of one head, splitting heads, counting, causality."""

import numpy as np

from utils.course.checks import Mistake, array, attempted, call, exercise, expect, expect_close, expect_shape, integers, is_close, normal


@exercise("3.1")
def windowed_mask(learner):
    T, window = 6, 3
    found = expect_shape(call(learner, T, window), (T, T), "the mask", "[T, T]").astype(bool)
    allowed = {(t, s) for t in range(T) for s in range(T) if found[t, s]}
    wanted = {(t, s) for t in range(T) for s in range(T) if 0 <= t - s <= window - 1}
    if allowed != wanted:
        mirrored = {(s, t) for t, s in allowed} == wanted
        expect(
            not mirrored,
            "rows-and-columns-swapped",
            "each token may look at later tokens and at no earlier one",
            "rows look, columns are looked at",
        )
        expect(
            all(s <= t for t, s in allowed),
            "sees-the-future",
            "some tokens may look at later ones",
            "row 0 must be True in column 0 alone",
        )
        expect(
            all((t, t) in allowed for t in range(T)),
            "own-position-left-out",
            "a token may not look at itself, so with window 1 it sees nothing at all",
            "is the distance 0 allowed?",
        )
        expect(
            allowed != _past(T),
            "no-window",
            "every earlier token is allowed, however far away",
            "the upper limit of the distance",
        )
        expect(
            max(t - s for t, s in allowed) < window,
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


def _past(T: int) -> set[tuple[int, int]]:
    return {(t, s) for t in range(T) for s in range(t + 1)}


def _softmax(scores, axis):
    top = np.exp(scores - scores.max(axis, keepdims=True))
    return top / top.sum(axis, keepdims=True)


@exercise("3.2")
def attend(learner):
    import jax.numpy as jnp

    T, S, H = 4, 5, 9
    q, k, v = 2 * normal(T, H, seed=1), normal(S, H, seed=2), normal(S, H, seed=3)
    mask = np.tri(T, S, k=1).astype(bool)
    mask[:, 0] = True
    raw = np.asarray(q, np.float64) @ k.T
    big = np.where(mask, 0.0, -1e30)

    def weigh(scores, axis=1):
        return _softmax(scores, axis) @ v

    found = call(learner, *map(jnp.asarray, (q, k, v, mask)))
    expect_close(
        found,
        weigh(raw / 3 + big),
        "the output",
        axes="[T, H]",
        rtol=1e-3,
        atol=1e-4,
        unlike={
            "not-scaled": (
                weigh(raw + big),
                "the scores were not divided by anything",
                "their spread grows like the square root of H",
            ),
            "divided-by-head-size": (
                weigh(raw / 9 + big),
                "the scores were divided by H",
                "it is their variance that is H, not their spread",
            ),
            "mask-after-softmax": (
                (_softmax(raw / 3, 1) * mask) @ v,
                "the weights are set to zero after the softmax, so rows no longer sum to one",
                "what must a score be for its weight to become zero?",
            ),
            "mask-left-out": (
                weigh(raw / 3),
                "every token looks at every other",
                "is mask used at all?",
            ),
            "softmax-over-queries": (
                weigh(raw / 3 + big, axis=0),
                "the weights of a column sum to one, not those of a row",
                "the axis of the softmax: each row shares out one unit of attention",
            ),
            "zero-is-not-masked": (
                weigh(np.where(mask, raw / 3, 0.0)),
                "a masked score was set to 0, which is a weight like any other",
                "what does softmax make of 0?",
            ),
        },
    )
    return "Scale, mask and axis are right, also with more tokens looked at than looking"


@exercise("3.3")
def split_heads(learner):
    import jax.numpy as jnp

    B, T, N, H = 2, 3, 4, 5
    x = np.arange(B * T * N * H, dtype=np.float32).reshape(B, T, N * H)
    index = np.indices((B, N, T, H))
    wanted = x[index[0], index[2], index[1] * H + index[3]]
    found = call(learner, jnp.asarray(x), N)
    expect_close(
        found,
        wanted,
        "the split array",
        axes="[B, N, T, H]",
        unlike={
            "tokens-mixed-with-heads": (
                x.reshape(B, N, T, H),
                "one reshape to [B, N, T, H] deals out whole tokens to heads",
                "cut D where it stands, at the end; then move the axis",
            ),
            "numbers-interleaved": (
                x[index[0], index[2], index[3] * N + index[1]],
                "head n got every N-th number of the token",
                "which of N and H comes first when D is cut?",
            ),
            "axis-not-moved": (
                x.reshape(B, T, N, H),
                "the cut is right, and the heads stand after the tokens",
                "the order of the axes asked for: [B, N, T, H]",
            ),
        },
    )
    return "Head n of token t holds numbers n*H to (n+1)*H"


@exercise("3.4")
def gpt2_small(learner):
    from utils.minigpt import Config, count_parameters

    attempted(learner)
    if callable(learner):
        raise Mistake("wrong-type", "expected a number, found a function", "call it")
    counts = count_parameters(Config(50_257, 1_024, 768, 12, 12, 3_072))
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

    def peeks(*places):
        """The running sum, to which the token after each of these places is added."""
        chosen = jnp.asarray([place in places for place in range(T)])

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
        "which outputs may move when token t changes? Place t itself may",
    )
    expect(
        not says(peeks(*range(T - 1))),
        "finds-no-leak",
        "a model whose every place sees the next token was called causal",
        "is the changed row really passed to forward, and compared with the first answer?",
    )
    found = [not says(peeks(place)) for place in range(T - 1)]
    expect(
        found != [False] * (T - 2) + [True],
        "only-the-last-token",
        "a leak is found only when it comes from the last token",
        "each token has to be changed once",
    )
    expect(
        found != [True] + [False] * (T - 2),
        "only-the-first-places",
        "a leak is found only at the first place",
        "compare every place before the changed one",
    )
    expect(
        sum(found) != 1,
        "one-place-only",
        f"a leak is found only at place {found.index(True) if True in found else 0}",
        "each token has to be changed once",
    )
    expect(
        all(found),
        "misses-some-places",
        f"a leak at place {found.index(False) if False in found else 0} was not found",
        "which tokens are changed, and which outputs compared?",
    )
    expect(
        not says(denominator),
        "misses-a-small-leak",
        "a leak through the softmax's denominator was called causal",
        "how large may a difference be?",
    )
    return "It finds a leak at any place, and one through the denominator"
