"""Checks of chapter 5: counting an adapter, its start, its forward pass, its filter, merging, factors of a change."""

import math

import numpy as np

from utils.course.checks import Mistake, array, attempted, call, exercise, expect, expect_close, expect_shape, is_close, normal


@exercise("5.1")
def adapter_parameters(learner):
    shapes, rank = [(3, 5), (7, 2)], 4
    found = call(learner, shapes, rank)
    expect_close(
        found,
        68,
        "the parameters of an adapter",
        unlike={
            "the-product-not-the-sum": (116, "this is R times in times out", "A has R rows of length in; what has B"),
            "one-factor-only": (
                (40, "this counts A and not B", "there are two factors")
                if is_close(found, 40)
                else (28, "this counts B and not A", "there are two factors")
            ),
            "counts-the-layers-too": (97, "the frozen weights are counted too", "what the optimiser is given"),
        },
    )
    return "Two layers, and the sum is over both"


@exercise("5.2")
def start(learner):
    import jax

    R, inside, outside = 16, 400, 60
    made = call(learner, jax.random.key(0), inside, outside, R)
    expect(
        isinstance(made, tuple | list) and len(made) == 2,
        "wrong-type",
        "expected the pair (A, B)",
        "what the function returns",
    )
    shapes = [np.shape(part) for part in made]
    expect(
        shapes != [(inside, R), (R, outside)],
        "transposed-factors",
        f"A is {shapes[0]} and B is {shapes[1]}: flax's order, in before out",
        "the shapes A [R, in] and B [out, R]",
    )
    A = expect_shape(made[0], (R, inside), "A", "[R, in]")
    B = expect_shape(made[1], (outside, R), "B", "[out, R]")
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
        not B.any(), "B-not-zero", "B is not zero, so the adapted model does not start at its base", "the start of B"
    )
    bound = 1 / math.sqrt(inside)
    widest = float(np.abs(A).max())
    expect(
        A.min() < 0,
        "never-negative",
        "no entry of A is negative",
        "the interval that is drawn from",
    )
    expect(
        not 0.9 < widest * math.sqrt(R) < 1.1,
        "bound-from-the-rank",
        "the bound is 1 / sqrt(R): it must come from how many inputs are added up",
        "the number of inputs",
    )
    expect(
        0.95 * bound < widest <= bound,
        "wrong-bound",
        f"the largest entry of A is {widest:.3f}, expected just under 1 / sqrt({inside}) = {bound:.3f}",
        "the width of the interval",
    )
    other, _ = call(learner, jax.random.key(1), inside, outside, R)
    expect(not np.array_equal(A, array(other)), "key-ignored", "two keys give the same A", "where the key goes")
    return "It starts at the base, and can leave it"


@exercise("5.3")
def forward(learner):
    import jax.numpy as jnp

    x, W = normal(4, 6, seed=1), normal(6, 6, seed=2)
    A, B, alpha = normal(2, 6, seed=3), normal(6, 2, seed=4), 6.0
    found = call(learner, *map(jnp.asarray, (x, W, A, B)), alpha)
    base, change = x @ W.T, x @ (B @ A).T
    expect_close(
        found,
        base + 3 * change,
        "the output",
        axes="[batch, out]",
        rtol=1e-4,
        atol=1e-4,
        unlike={
            "scale-forgotten": (base + change, "the change is added unscaled", "alpha and the rank"),
            "alpha-times-rank": (
                base + 12 * change,
                "the change is scaled by alpha times R",
                "which way the rank enters",
            ),
            "alpha-not-divided": (base + 6 * change, "the change is scaled by alpha alone", "what the rank is for"),
            "base-scaled-too": (
                3 * (base + change),
                "the frozen layer's output is scaled too",
                "where the bracket ends",
            ),
            "base-forgotten": (3 * change, "this is the change without the layer", "what the change is added to"),
            "transposed-factors": (
                base + 3 * x @ (B @ A),
                "the change is multiplied from the wrong side",
                "x holds rows: which transposes does a row need",
            ),
            "transposed-weight": (x @ W + 3 * change, "W is used transposed", "W is [out, in], and x holds rows"),
        },
    )
    return "Frozen layer, change and scale agree"


@exercise("5.4")
def choose(learner):
    from flax import nnx

    from utils import lora, minigpt

    attempted(learner)
    config = minigpt.Config(vocab_size=17, max_position_embeddings=4, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    model = lora.inject(minigpt.MiniGPT(config, rngs=nnx.Rngs(0)), rank=2, alpha=4, rngs=nnx.Rngs(1))
    # A layer of the *base* that somebody named like this: a filter on names takes it, too.
    model.lora_A_report = nnx.Linear(2, 2, rngs=nnx.Rngs(2))
    try:
        _, chosen, _ = nnx.split(model, learner, ...)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:80]
        raise Mistake(
            "wrong-type", f"nnx.split does not take this as a filter ({reason})", "what a filter may be"
        ) from None
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(chosen)}
    last = {path.split(".")[-1] for path in paths}
    named = any("report" in path for path in paths)
    expect(paths, "selects-nothing", "it selects no variable: a misspelt path looks just so", "the spelling")
    expect(
        not {"kernel", "scale", "embedding"} & {p.split(".")[-1] for p in paths if "report" not in p},
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
        not named,
        "chosen-by-name",
        "a layer of the base called lora_A_report is selected too",
        "what no name can imitate: the type",
    )
    return "A and B of every adapted layer, and nothing else"


@exercise("5.5")
def merged_kernel(learner):
    import jax.numpy as jnp

    kernel, A, B, alpha = normal(5, 5, seed=1), normal(2, 5, seed=2), normal(5, 2, seed=3), 8.0
    found = call(learner, *map(jnp.asarray, (kernel, A, B)), alpha)
    change = (B @ A).T
    expect_close(
        found,
        kernel + 4 * change,
        "the merged kernel",
        axes="[in, out]",
        rtol=1e-4,
        atol=1e-4,
        unlike={
            "transposed-delta": (
                kernel + 4 * change.T,
                "the change is added transposed, which a square layer does not notice",
                "the kernel is [in, out], B A is [out, in]",
            ),
            "scale-forgotten": (kernel + change, "the change is added unscaled", "alpha and the rank"),
            "alpha-times-rank": (kernel + 16 * change, "the change is scaled by alpha times R", "alpha over the rank"),
            "merged-twice": (kernel + 8 * change, "the change is added twice", "how often it is added"),
            "base-forgotten": (4 * change, "this is the change alone", "what it is added to"),
        },
    )
    wide = call(learner, *map(jnp.asarray, (normal(3, 7), normal(2, 3), normal(7, 2))), 1.0)
    expect_shape(wide, (3, 7), "the merged kernel of a 3 x 7 layer", "[in, out]")
    return "Square and wide layers both"


@exercise("5.6")
def factors(learner):
    W = normal(6, 9, seed=5)
    u, s, v = np.linalg.svd(W.astype(np.float64), full_matrices=False)
    made = call(learner, W.copy(), 2)
    expect(isinstance(made, tuple | list) and len(made) == 2, "wrong-type", "expected the pair (A, B)", "the last line")
    shapes = [np.shape(part) for part in made]
    expect(
        shapes != [(6, 2), (2, 9)],
        "factors-swapped",
        "the pair is in the order B, A",
        "A [R, in] comes first",
    )
    A, B = (
        expect_shape(made[0], (2, 9), "A", "[R, in]"),
        expect_shape(made[1], (6, 2), "B", "[out, R]"),
    )

    def product(power, which=slice(2)):
        return u[:, which] * s[which] ** power @ v[which]

    expect_close(
        B @ A,
        product(1),
        "the product B A",
        axes="[out, in]",
        rtol=1e-4,
        atol=1e-4,
        unlike={
            "singular-values-lost": (product(0), "the directions are right and their sizes are gone", "where s goes"),
            "singular-values-squared": (
                product(2),
                "the singular values are in both factors in full",
                "their square root",
            ),
            "smallest-kept": (product(1, slice(-2, None)), "the smallest two are kept", "the order of singular values"),
        },
    )
    return "No matrix of rank 2 comes closer"
