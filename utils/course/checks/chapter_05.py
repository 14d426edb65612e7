"""Checks of chapter 5: size, start, forward pass and filter of an adapter, merging, factors."""

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
    normal,
)


@exercise("5.1")
def adapter_parameters(learner):
    answer = call(learner, [(3, 5), (7, 2)], 4)
    expect_close(
        answer,
        68,
        "the parameters of an adapter",
        unlike={
            "the-product-not-the-sum": (
                116,
                "this is R times in times out",
                "A has R rows of length in; what has B",
            ),
            "one-factor-only": (
                (40, "this counts A and not B", "there are two factors")
                if is_close(answer, 40)
                else (28, "this counts B and not A", "there are two factors")
            ),
            "counts-the-layers-too": (
                97,
                "the frozen weights are counted too",
                "what the optimiser is given",
            ),
        },
    )
    return "Two layers, and the sum is over both"


@exercise("5.2")
def start(learner):
    import jax

    R, inside, outside = 16, 400, 60
    pair = call(learner, jax.random.key(0), inside, outside, R)
    expect(
        isinstance(pair, tuple | list) and len(pair) == 2,
        "wrong-type",
        "expected the pair (A, B)",
        "what the function returns",
    )
    shapes = [np.shape(part) for part in pair]
    expect(
        shapes != [(inside, R), (R, outside)],
        "transposed-factors",
        f"A is {shapes[0]} and B is {shapes[1]}: flax's order, in before out",
        "the shapes A [R, in] and B [out, R]",
    )
    A = expect_shape(pair[0], (R, inside), "A", "[R, in]")
    B = expect_shape(pair[1], (outside, R), "B", "[out, R]")
    expect(
        A.any() or B.any(),
        "both-zero",
        "A and B are both zero, so that each one's gradient is zero: nothing would ever train",
        "which of the two may be zero",
    )
    expect(
        A.any(),
        "A-zero-not-B",
        "A is zero and B is drawn: it starts at the base, but not as PEFT does",
        "which is which",
    )
    expect(
        not B.any(),
        "B-not-zero",
        "B is not zero, so the adapted model does not start at its base",
        "the start of B",
    )
    widest = float(np.abs(A).max())
    expect(
        A.min() < 0,
        "never-negative",
        "no entry of A is negative",
        "the interval that is drawn from",
    )
    expect(
        not 0.225 < widest < 0.275,
        "bound-from-the-rank",
        "the bound is 1 / sqrt(R): it must come from how many inputs are added up",
        "the number of inputs",
    )
    expect(
        0.0475 < widest <= 0.05 + 1e-7,
        "wrong-bound",
        f"the largest entry of A is {widest:.3f}, expected just under 1 / sqrt({inside}) = 0.050",
        "the width of the interval",
    )
    other, _ = call(learner, jax.random.key(1), inside, outside, R)
    expect(
        not np.array_equal(A, array(other)),
        "key-ignored",
        "two keys give the same A",
        "where the key goes",
    )
    return "It starts at the base, and can leave it"


@exercise("5.3")
def forward(learner):
    import jax.numpy as jnp

    x, W = [[1.0, 0, 2], [0, 1, -1]], [[1.0, 2, 0], [0, 1, 3], [-1, 0, 1]]
    A, B = [[1.0, 0, 1], [2, -1, 0]], [[1.0, 0], [0, 1], [1, -1]]
    # By hand: what the layer gives for the two rows, what the factors add before any scaling, and
    # the same for a matrix that is used transposed.
    base, change = np.array([[1, 6, 1], [2, -2, -1]]), np.array([[3, 2, 1], [-1, -1, 0]])
    turned_base, turned_change = (
        np.array([[-1, 2, 2], [1, 1, 2]]),
        np.array([[-1, 2, 3], [3, -2, -1]]),
    )
    expect_close(
        call(learner, *map(jnp.asarray, (x, W, A, B)), 6.0),
        [[10, 12, 4], [-1, -5, -1]],
        "the output",
        axes="[batch, out]",
        rtol=1e-4,
        atol=1e-4,
        unlike={
            "scale-forgotten": (
                base + change,
                "the change is added unscaled",
                "alpha and the rank",
            ),
            "alpha-times-rank": (
                base + 12 * change,
                "the change is scaled by alpha times R",
                "which way the rank enters",
            ),
            "alpha-not-divided": (
                base + 6 * change,
                "the change is scaled by alpha alone",
                "what the rank is for",
            ),
            "base-scaled-too": (
                3 * (base + change),
                "the frozen layer's output is scaled too",
                "where the bracket ends",
            ),
            "base-forgotten": (
                3 * change,
                "this is the change without the layer",
                "what the change is added to",
            ),
            "transposed-factors": (
                base + 3 * turned_change,
                "the change is multiplied from the wrong side",
                "x holds rows: which transposes does a row need",
            ),
            "transposed-weight": (
                turned_base + 3 * change,
                "W is used transposed",
                "W is [out, in], and x holds rows",
            ),
        },
    )
    return "Frozen layer, change and scale agree"


@exercise("5.4")
def choose(learner):
    from flax import nnx

    from utils import lora, minigpt

    attempted(learner)
    config = minigpt.Config(
        17, 4, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    model = lora.inject(
        minigpt.MiniGPT(config, rngs=nnx.Rngs(0)), rank=2, alpha=4, rngs=nnx.Rngs(1)
    )
    # A layer of the *base* that somebody named like this: a filter on names takes it, too.
    model.lora_A = nnx.Linear(2, 2, rngs=nnx.Rngs(2))
    try:
        _, chosen, _ = nnx.split(model, learner, ...)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:80]
        raise Mistake(
            "wrong-type",
            f"nnx.split does not take this as a filter ({reason})",
            "what a filter may be",
        ) from None
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(chosen)}
    misnamed = {path for path in paths if path.startswith("lora_A")}
    last = {path.split(".")[-1] for path in paths - misnamed}
    expect(
        paths,
        "selects-nothing",
        "it selects no variable: a misspelt path looks just so",
        "the spelling",
    )
    expect(
        not {"kernel", "scale", "embedding"} & last,
        "base-not-frozen",
        "arrays of the base (or fixed scales) are selected and would be trained",
        "LoRAParam is a kind of Param, and not the other way round",
    )
    expect(
        {"lora_A", "lora_B"} <= last,
        "joined-by-or",
        f"only {', '.join(sorted(last & {'lora_A', 'lora_B'}))} is selected",
        "what Python makes of `a or b`",
    )
    expect(
        not misnamed,
        "chosen-by-name",
        "a layer of the base called lora_A is selected too",
        "what no name can imitate: the type",
    )
    return "A and B of every adapted layer, and nothing else"


@exercise("5.5")
def merged_kernel(learner):
    import jax.numpy as jnp

    kernel = np.arange(16.0).reshape(4, 4)
    A, B = (
        [[1.0, 0, 2, 0], [0, 1, 0, -1], [0, 0, 1, 1]],
        [[1.0, 0, 0], [0, 2, 0], [0, 1, 1], [0, 0, -1]],
    )
    # By hand: the product of the factors as [in, out]. The rank is 3 and alpha 6.
    change = np.array([[1, 0, 0, 0], [0, 2, 1, 0], [2, 0, 1, -1], [0, -2, 0, -1]])
    expect_close(
        call(learner, *map(jnp.asarray, (kernel, A, B)), 6.0),
        [[2, 1, 2, 3], [4, 9, 8, 7], [12, 9, 12, 9], [12, 9, 14, 13]],
        "the merged kernel",
        axes="[in, out]",
        rtol=1e-4,
        atol=1e-4,
        unlike={
            "transposed-delta": (
                kernel + 2 * change.T,
                "the change is added transposed, which a square layer does not notice",
                "the kernel is [in, out], B A is [out, in]",
            ),
            "scale-forgotten": (
                kernel + change,
                "the change is added unscaled",
                "alpha and the rank",
            ),
            "alpha-times-rank": (
                kernel + 18 * change,
                "the change is scaled by alpha times R",
                "alpha over the rank",
            ),
            "alpha-not-divided": (
                kernel + 6 * change,
                "the change is scaled by alpha alone",
                "what the rank is for",
            ),
            "merged-twice": (
                kernel + 4 * change,
                "the change is added twice",
                "how often it is added",
            ),
            "base-forgotten": (2 * change, "this is the change alone", "what it is added to"),
        },
    )
    wide = call(learner, *map(jnp.asarray, (normal(3, 7), normal(2, 3), normal(7, 2))), 1.0)
    expect_shape(wide, (3, 7), "the merged kernel of a 3 x 7 layer", "[in, out]")
    return "Square and wide layers both"


@exercise("5.6")
def factors(learner):
    # A matrix that is put together from singular values known beforehand, and random directions.
    left, right = np.linalg.qr(normal(6, 6, seed=5))[0], np.linalg.qr(normal(9, 6, seed=6))[0].T

    def matrix(*singular_values):
        return left * np.float32(singular_values) @ right

    pair = call(learner, matrix(7, 5, 3, 2, 1, 0.5), 2)
    expect(
        isinstance(pair, tuple | list) and len(pair) == 2,
        "wrong-type",
        "expected the pair (A, B)",
        "the last line",
    )
    shapes = [np.shape(part) for part in pair]
    expect(
        shapes != [(6, 2), (2, 9)],
        "factors-swapped",
        "the pair is in the order B, A",
        "A [R, in] comes first",
    )
    A, B = (
        expect_shape(pair[0], (2, 9), "A", "[R, in]"),
        expect_shape(pair[1], (6, 2), "B", "[out, R]"),
    )
    expect_close(
        B @ A,
        matrix(7, 5, 0, 0, 0, 0),
        "the product B A",
        axes="[out, in]",
        rtol=1e-4,
        atol=1e-4,
        unlike={
            "singular-values-lost": (
                matrix(1, 1, 0, 0, 0, 0),
                "the directions are right and their sizes are gone",
                "where s goes",
            ),
            "singular-values-squared": (
                matrix(49, 25, 0, 0, 0, 0),
                "the singular values are in both factors in full",
                "their square root",
            ),
            "smallest-kept": (
                matrix(0, 0, 0, 0, 1, 0.5),
                "the smallest two are kept",
                "the order of singular values",
            ),
        },
    )
    return "No matrix of rank 2 comes closer"
