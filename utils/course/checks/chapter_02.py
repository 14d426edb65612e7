"""Checks of chapter 2: pure updates, a loss that survives large logits, pytrees, random keys, filters."""

import numpy as np

from utils.course.checks import LearnerError, Mistake, array, call, exercise, expect, expect_close, integers, is_close, normal


@exercise("2.1")
def count_pairs(learner):
    import jax.numpy as jnp

    line = [0, 1, 0, 1, 0, 1, 2, 2, 2]  # 0→1 three times, 1→0 twice, 1→2 once, 2→2 twice
    wanted = np.array([[0, 3, 0, 0], [2, 0, 1, 0], [0, 0, 2, 0], [0, 0, 0, 0]])
    found = call(learner, jnp.asarray(line, jnp.int32), 4)
    expect_close(
        found,
        wanted,
        "the table of counts",
        axes="[first, second]",
        unlike={
            "repeated-pairs-counted-once": (
                wanted > 0,
                "a pair that comes three times counts as one",
                "what each method after .at[...] does when a place comes up twice",
            ),
            "update-thrown-away": (
                np.zeros((4, 4)),
                "the table is still empty",
                ".at[...] returns a new array and leaves the old one as it was",
            ),
            "first-and-second-swapped": (
                wanted.T,
                "the rows are the second characters",
                "[a, b] counts how often b comes after a",
            ),
        },
    )
    ids = integers(0, 7, 500, seed=2)
    more = array(call(learner, jnp.asarray(ids), 7), "the table of counts")
    expect(more.sum() == 499, "wrong-values", "500 ids make 499 pairs, and the table has another sum")
    return "Every pair is counted, however often it comes"


@exercise("2.2")
def stable_loss(learner):
    import jax.numpy as jnp

    p = np.array([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8], [0.25, 0.25, 0.5]])
    targets = np.array([0, 1, 2, 2], np.int32)
    scores = (np.log(p) + np.array([[1.0], [-2.0], [0.5], [0.0]])).astype(np.float32)
    found = call(learner, jnp.asarray(scores), jnp.asarray(targets))
    expect_close(
        found,
        0.932425,
        "the mean loss of four small rows",
        unlike={
            "sum-not-mean": (3.729701, "this is the sum over the rows", "the batch's loss is a mean"),
            "sign": (-0.932425, "the loss of a guess is never negative", "the logarithm of a share is"),
            "bits-not-nats": (1.345206, "this is in bits", "a nat belongs to the natural logarithm"),
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
    return "It survives logits of 1,000, on both sides"


@exercise("2.3")
def sgd(learner):
    import jax
    import jax.numpy as jnp

    p, g = normal(3, seed=1), normal(3, seed=2)
    wanted = p - np.float32(0.1) * g
    flat = {"a": jnp.asarray(p), "b": jnp.asarray(2 * p)}
    held = dict(flat)
    found = call(learner, flat, {"a": jnp.asarray(g), "b": jnp.asarray(g)}, 0.1)
    expect(
        all(flat[name] is held[name] for name in held),
        "changed-its-input",
        "the caller's dict of parameters holds other arrays than before",
        "arrays cannot change, but the dict around them can: build a new one",
    )
    expect(
        isinstance(found, dict) and set(found) == {"a", "b"},
        "another-form",
        "the result is not a dict with the names of the parameters",
        "jax.tree.map keeps the form",
    )
    expect_close(
        found["a"],
        wanted,
        "the new parameters",
        unlike={
            "climbs": (p + np.float32(0.1) * g, "the step goes uphill", "the sign of the gradient"),
            "no-learning-rate": (p - g, "the step is a whole gradient", "where learning_rate is used"),
            "gradient-only": (-np.float32(0.1) * g, "this is the update alone", "what it is added to"),
        },
    )
    nested = {"bias": jnp.asarray(p), "layers": [{"w": jnp.asarray(p)}, ({"w": jnp.asarray(p)},)]}
    slopes = jax.tree.map(lambda _: jnp.asarray(g), nested)
    try:
        deep = call(learner, nested, slopes, 0.1)
    except LearnerError as found:
        raise Mistake(
            "one-level-only",
            f"a flat dict works, a nested one raises {type(found.error).__name__}",
            "a function that walks a pytree of any depth",
        ) from found
    expect(
        jax.tree.structure(deep) == jax.tree.structure(nested),
        "another-form",
        "the nested parameters came back in another form",
        "jax.tree.map keeps the form",
    )
    for leaf in jax.tree.leaves(deep):
        expect_close(leaf, wanted, "a parameter deep in the tree")
    return "Any form of tree, and the old parameters are as they were"


@exercise("2.4")
def noise_like(learner):
    import jax
    import jax.numpy as jnp

    shape = (40, 50)
    tree = {"a": jnp.zeros(shape), "deeper": [jnp.ones(shape), (jnp.zeros(7),)]}
    found = call(learner, jax.random.key(3), tree)
    expect(
        jax.tree.structure(found) == jax.tree.structure(tree),
        "another-form",
        "the noise does not have the form of the tree",
        "jax.tree.unflatten, with the structure that flatten gave",
    )
    leaves = [array(leaf, "a leaf of the noise") for leaf in jax.tree.leaves(found)]
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
    mean, spread = leaves[0].mean(), leaves[0].std()
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
        found = nnx.state(Model(), learner)
    except Exception as error:
        raise Mistake(
            "wrong-type",
            f"nnx.state does not take it as a filter ({type(error).__name__})",
            "a type of variable, or nnx.Any, nnx.All and nnx.Not of filters",
        ) from error
    names = {str(path[-1]) for path, _ in nnx.to_flat_state(found)}
    expect(names, "selects-nothing", "no variable passes this filter", "what would be trained with it")
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
