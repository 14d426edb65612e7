"""Checks of chapter 2: counting, a stable loss, pytrees, random keys, filters."""

import numpy as np

from utils.course.checks import (
    LearnerError,
    Mistake,
    array,
    call,
    exercise,
    expect,
    expect_close,
    integers,
    is_close,
)


@exercise("2.1")
def count_pairs(learner):
    import jax.numpy as jnp

    line = [0, 1, 0, 1, 0, 1, 2, 2, 2]  # 0→1 three times, 1→0 twice, 1→2 once, 2→2 twice
    counts = np.array([[0, 3, 0, 0], [2, 0, 1, 0], [0, 0, 2, 0], [0, 0, 0, 0]])
    table = call(learner, jnp.asarray(line, jnp.int32), 4)
    expect_close(
        table,
        counts,
        "the table of counts",
        axes="[first, second]",
        unlike={
            "repeated-pairs-counted-once": (
                counts > 0,
                "a pair that comes three times counts as one",
                "what each method after .at[...] does when an index comes up twice",
            ),
            "update-thrown-away": (
                np.zeros((4, 4)),
                "the table is still empty",
                ".at[...] returns a new array and leaves the old one as it was",
            ),
            "first-and-second-swapped": (
                counts.T,
                "the rows are the second characters",
                "[a, b] counts how often b comes after a",
            ),
        },
    )
    expect(
        array(table).dtype.kind in "iu",
        "counts-in-floating-point",
        f"the table is {getattr(table, 'dtype', 'not an array of whole numbers')}, not int32",
        "the dtype of the table that the counts are added to",
    )
    ids = integers(0, 7, 500, seed=2)
    more = array(call(learner, jnp.asarray(ids), 7), "the table of counts")
    expect(
        more.sum() == 499, "wrong-values", "500 ids make 499 pairs, and the table has another sum"
    )
    return "Every pair is counted, however often it comes"


@exercise("2.2")
def stable_loss(learner):
    import jax.numpy as jnp

    p = np.array([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8], [0.25, 0.25, 0.5]])
    targets = np.array([0, 1, 2, 2], np.int32)
    scores = (np.log(p) + np.array([[1.0], [-2.0], [0.5], [0.0]])).astype(np.float32)
    expect_close(
        call(learner, jnp.asarray(scores), jnp.asarray(targets)),
        0.932425,
        "the mean loss of four small rows",
        unlike={
            "sum-not-mean": (
                3.729701,
                "this is the sum over the rows",
                "the batch's loss is a mean",
            ),
            "sign": (
                -0.932425,
                "the loss of a guess is never negative",
                "the logarithm of a share is",
            ),
            "bits-not-nats": (
                1.345206,
                "this is in bits",
                "a nat belongs to the natural logarithm",
            ),
            "every-pair": (
                -np.log(p)[:, targets].mean(),
                "each row was asked about the targets of all rows",
                "an index for the rows beside the one for the columns",
            ),
            "no-normalisation": (
                -scores[np.arange(4), targets].mean(),
                "logits are used as if they were logarithms of probabilities",
                "softmax divides by a sum",
            ),
        },
    )
    large = jnp.asarray([[1000.0, 0.0, -1000.0], [0.0, 1000.0, 0.0]])
    likely = array(call(learner, large, jnp.asarray([0, 1])), "the loss at logits of 1,000")
    expect(
        np.isfinite(likely).all(),
        "exp-overflows",
        "with a logit of 1,000 the loss is not a finite number",
        "the largest number you hand to exp",
    )
    unlikely = array(call(learner, large, jnp.asarray([1, 1])), "the loss of an unlikely target")
    expect(
        np.isfinite(unlikely).all(),
        "log-of-zero",
        "for a target 1,000 logits below the best one the loss is infinite; it is 1,000",
        "a probability that has underflowed to 0 before its logarithm is taken",
    )
    expect_close(likely, 0.0, "the loss at logits of 1,000", atol=1e-4)
    expect_close(unlikely, 500.0, "the mean loss with one target 1,000 logits too low")
    apart = jnp.asarray([[1000.0, 1000.0], [0.0, 0.0]])
    far = array(call(learner, apart, jnp.asarray([0, 0])), "the loss of rows 1,000 logits apart")
    expect(
        np.isfinite(far).all(),
        "one-maximum-for-all-rows",
        "where one row's logits lie 1,000 above another's, the loss is not finite",
        "which maximum is subtracted from each row",
    )
    expect_close(far, 0.693147, "the mean loss of rows 1,000 logits apart")
    return "It survives logits of 1,000, on both sides"


@exercise("2.3")
def sgd(learner):
    import jax
    import jax.numpy as jnp

    p, g = jnp.asarray([1.0, -2.0, 0.5]), jnp.asarray([0.5, 1.0, -3.0])
    flat = {"a": p, "b": 2 * p}
    before = dict(flat)
    stepped = call(learner, flat, {"a": g, "b": g}, 0.1)
    expect(
        all(flat[name] is before[name] for name in before),
        "changed-its-input",
        "the caller's dict of parameters holds other arrays than before",
        "arrays cannot change, but the dict around them can: build a new one",
    )
    expect(
        isinstance(stepped, dict) and set(stepped) == {"a", "b"},
        "another-form",
        "the result is not a dict with the names of the parameters",
        "jax.tree.map keeps the form",
    )
    expect_close(
        stepped["a"],
        [0.95, -2.1, 0.8],
        "the new parameters",
        unlike={
            "climbs": ([1.05, -1.9, 0.2], "the step goes uphill", "the sign of the gradient"),
            "no-learning-rate": (
                [0.5, -3.0, 3.5],
                "the step is a whole gradient",
                "where learning_rate is used",
            ),
            "gradient-only": (
                [-0.05, -0.1, 0.3],
                "this is the update alone",
                "what it is added to",
            ),
        },
    )
    nested = {"bias": p, "layers": [{"w": p}, ({"w": p},)]}
    slopes = jax.tree.map(lambda _: g, nested)
    try:
        deep = call(learner, nested, slopes, 0.5)
    except LearnerError as raised:
        raise Mistake(
            "one-level-only",
            f"a flat dict works, a nested one raises {type(raised.error).__name__}",
            "a function that walks a pytree of any depth",
        ) from raised
    expect(
        jax.tree.structure(deep) == jax.tree.structure(nested),
        "another-form",
        "the nested parameters came back in another form",
        "jax.tree.map keeps the form",
    )
    for leaf in jax.tree.leaves(deep):
        expect_close(
            leaf,
            [0.75, -2.5, 2.0],
            "a parameter deep in the tree",
            unlike={
                "fixed-rate": (
                    [0.95, -2.1, 0.8],
                    "the step is the same at every rate",
                    "where learning_rate is used",
                ),
            },
        )
    return "Any form of tree, and the old parameters are as they were"


@exercise("2.4")
def noise_like(learner):
    import jax
    import jax.numpy as jnp

    shape = (40, 50)
    tree = {"a": jnp.zeros(shape), "deeper": [jnp.ones(shape), (jnp.zeros(7),)]}
    noise = call(learner, jax.random.key(3), tree)
    expect(
        jax.tree.structure(noise) == jax.tree.structure(tree),
        "another-form",
        "the noise does not have the form of the tree",
        "jax.tree.unflatten, with the structure that flatten gave",
    )
    leaves = [array(leaf, "a leaf of the noise") for leaf in jax.tree.leaves(noise)]
    for leaf, like in zip(leaves, jax.tree.leaves(tree)):
        expect(
            leaf.shape == like.shape,
            "wrong-shape",
            f"expected shape {like.shape} for a leaf, found {leaf.shape}",
        )
    again = [array(leaf) for leaf in jax.tree.leaves(call(learner, jax.random.key(3), tree))]
    other = [array(leaf) for leaf in jax.tree.leaves(call(learner, jax.random.key(4), tree))]
    expect(
        all(is_close(one, two) for one, two in zip(leaves, again)),
        "not-a-function-of-its-key",
        "the same key gave other numbers the second time",
        "a source of randomness that is not the key, such as np.random",
    )
    expect(
        not any(is_close(one, two) for one, two in zip(leaves, other)),
        "ignores-the-key",
        "another key gives the same numbers",
        "a key made inside the function",
    )
    expect(
        not is_close(leaves[0], leaves[1]),
        "one-key-for-all",
        "two leaves of one shape hold the same numbers",
        "how many keys are drawn with",
    )
    related = abs(np.corrcoef(leaves[0].ravel(), leaves[1].ravel())[0, 1])
    expect(
        related < 0.15,
        "leaves-depend-on-each-other",
        f"the numbers of two leaves are correlated ({related:.2f})",
        "one leaf computed from another",
    )
    for leaf, like in zip(leaves[:2], jax.tree.leaves(tree)):
        mean, spread = leaf.mean(), leaf.std()
        added = abs(mean - float(like[0, 0])) < 0.15 < abs(mean)
        expect(
            not added,
            "added-to-the-tree",
            f"the noise for a leaf of ones has mean {mean:.2f}: the old values are still in it",
            "of the tree, only form and shapes are needed",
        )
        expect(
            abs(mean) < 0.15 and abs(spread - 1) < 0.1,
            "not-standard-normal",
            f"the numbers have mean {mean:.2f} and standard deviation {spread:.2f}, not 0 and 1",
            "the names in jax.random",
        )
    return "Independent leaves, from the key alone"


@exercise("2.5")
def trainable(learner, frozen):
    import jax.numpy as jnp
    from flax import nnx

    class Count(nnx.Variable):
        pass

    class Model(nnx.Module):
        def __init__(self):
            self.adapter = nnx.Param(jnp.zeros(2))
            self.base = frozen(jnp.zeros(3))
            self.count = Count(jnp.zeros(()))

    try:
        selected = nnx.state(Model(), learner)
    except Exception as error:
        raise Mistake(
            "wrong-type",
            f"nnx.state does not take it as a filter ({type(error).__name__})",
            "a type of variable, or nnx.Any, nnx.All and nnx.Not of filters",
        ) from error
    names = {str(path[-1]) for path, _ in nnx.to_flat_state(selected)}
    expect(
        names, "selects-nothing", "no variable passes this filter", "what would be trained with it"
    )
    expect(
        not {"base", "count"} <= names,
        "selects-everything",
        "parameters, frozen ones and a counter all pass",
        "nnx.Any asks for one of the two, nnx.All for both",
    )
    expect(
        "base" not in names,
        "subclass-slips-in",
        "a frozen parameter passes",
        "a type filter asks isinstance, and Frozen is a Param",
    )
    expect(
        "count" not in names,
        "not-only-parameters",
        "a counter passes, which is no parameter at all",
        "whether both conditions are there: Python's `and` keeps only its last operand",
    )
    return "The adapter trains, base and counter stay"
