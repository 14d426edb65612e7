"""Wrong answers to the exercises of chapter 2, each with the name under which its check must recognise it."""

WRONG = {
    "2.1": [
        (
            "repeated-pairs-counted-once",
            """
def count_pairs(ids, size):
    table = jnp.zeros((size, size), jnp.int32)
    a, b = ids[:-1], ids[1:]
    return table.at[a, b].set(table[a, b] + 1)
""",
        ),
        (
            "update-thrown-away",
            """
def count_pairs(ids, size):
    table = jnp.zeros((size, size), jnp.int32)
    table.at[ids[:-1], ids[1:]].add(1)
    return table
""",
        ),
        (
            "first-and-second-swapped",
            """
def count_pairs(ids, size):
    return jnp.zeros((size, size), jnp.int32).at[ids[1:], ids[:-1]].add(1)
""",
        ),
        (
            "counts-in-floating-point",
            """
def count_pairs(ids, size):
    return jnp.zeros((size, size)).at[ids[:-1], ids[1:]].add(1)
""",
        ),
    ],
    "2.2": [
        (
            "exp-overflows",
            """
def stable_loss(logits, targets):
    own = logits[jnp.arange(len(targets)), targets]
    return (jnp.log(jnp.exp(logits).sum(axis=1)) - own).mean()
""",
        ),
        (
            "log-of-zero",
            """
def stable_loss(logits, targets):
    e = jnp.exp(logits - logits.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)
    return -jnp.log(p[jnp.arange(len(targets)), targets]).mean()
""",
        ),
        (
            "every-pair",
            """
def stable_loss(logits, targets):
    z = logits - logits.max(axis=1, keepdims=True)
    log_p = z - jnp.log(jnp.exp(z).sum(axis=1, keepdims=True))
    return -log_p[:, targets].mean()
""",
        ),
        (
            "sum-not-mean",
            """
def stable_loss(logits, targets):
    z = logits - logits.max(axis=1, keepdims=True)
    own = z[jnp.arange(len(targets)), targets]
    return (jnp.log(jnp.exp(z).sum(axis=1)) - own).sum()
""",
        ),
        (
            "no-normalisation",
            """
def stable_loss(logits, targets):
    return -logits[jnp.arange(len(targets)), targets].mean()
""",
        ),
        (
            "one-maximum-for-all-rows",
            """
def stable_loss(logits, targets):
    z = logits - logits.max()
    own = z[jnp.arange(len(targets)), targets]
    return (jnp.log(jnp.exp(z).sum(axis=1)) - own).mean()
""",
        ),
    ],
    "2.3": [
        (
            "climbs",
            """
def sgd(params, grads, learning_rate):
    return jax.tree.map(lambda p, g: p + learning_rate * g, params, grads)
""",
        ),
        (
            "changed-its-input",
            """
def sgd(params, grads, learning_rate):
    for name in params:
        params[name] -= learning_rate * grads[name]
    return params
""",
        ),
        (
            "one-level-only",
            """
def sgd(params, grads, learning_rate):
    return {name: params[name] - learning_rate * grads[name] for name in params}
""",
        ),
        (
            "no-learning-rate",
            """
def sgd(params, grads, learning_rate):
    return jax.tree.map(lambda p, g: p - g, params, grads)
""",
        ),
        (
            "fixed-rate",
            """
def sgd(params, grads, learning_rate):
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
""",
        ),
    ],
    "2.4": [
        (
            "one-key-for-all",
            """
def noise_like(key, tree):
    return jax.tree.map(lambda leaf: jax.random.normal(key, leaf.shape), tree)
""",
        ),
        (
            "ignores-the-key",
            """
def noise_like(key, tree):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return jax.tree.unflatten(structure, [jax.random.normal(k, l.shape) for k, l in zip(keys, leaves)])
""",
        ),
        (
            "not-a-function-of-its-key",
            """
def noise_like(key, tree):
    return jax.tree.map(lambda leaf: jnp.asarray(np.random.normal(size=leaf.shape)), tree)
""",
        ),
        (
            "not-standard-normal",
            """
def noise_like(key, tree):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(structure, [jax.random.uniform(k, l.shape) for k, l in zip(keys, leaves)])
""",
        ),
        (
            "added-to-the-tree",
            """
def noise_like(key, tree):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    noise = [leaf + jax.random.normal(one, leaf.shape) for one, leaf in zip(keys, leaves)]
    return jax.tree.unflatten(structure, noise)
""",
        ),
    ],
    "2.5": [
        (
            "subclass-slips-in",
            """
trainable_filter = nnx.Param
""",
        ),
        (
            "not-only-parameters",
            """
trainable_filter = nnx.Param and nnx.Not(Frozen)
""",
        ),
        (
            "selects-everything",
            """
trainable_filter = nnx.Any(nnx.Param, nnx.Not(Frozen))
""",
        ),
    ],
}
