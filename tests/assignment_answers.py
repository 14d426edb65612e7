"""Wrong answers to the graded assignments, each with the points that it must cost, test cell by test cell.

`WRONG[assignment][grade_id of the solution cell]` is a list of (what is wrong, the code, {test cell: points lost}). The
other parts of a submission are right. A mistake that costs nothing would be a hole in the tests.
"""

WRONG = {
    "assignment_1": {
        "best_pair": [
            (
                "counts words, not occurrences",
                """
def best_pair(words):
    counts = {}
    for word in words:
        for pair in zip(word, word[1:]):
            counts[pair] = counts.get(pair, 0) + 1
    return max(sorted(counts.items()), key=lambda item: item[1])
""",
                {"best_pair_weighted": 1, "best_pair_repeated": 1, "best_pair_ties": 1},
            ),
            (
                "a pair that stands twice in a word counts once",
                """
def best_pair(words):
    counts = {}
    for word, times in words.items():
        for pair in set(zip(word, word[1:])):
            counts[pair] = counts.get(pair, 0) + times
    return max(sorted(counts.items()), key=lambda item: item[1])
""",
                {"best_pair_repeated": 1},
            ),
            (
                "ties go to the pair seen first",
                """
def best_pair(words):
    counts = {}
    for word, times in words.items():
        for pair in zip(word, word[1:]):
            counts[pair] = counts.get(pair, 0) + times
    return max(counts.items(), key=lambda item: item[1])
""",
                {"best_pair_ties": 1},
            ),
        ],
        "masked_loss": [
            (
                "divides by all places",
                """
def masked_loss(logits, targets, counted):
    return (optax.softmax_cross_entropy_with_integer_labels(logits, targets) * counted).mean()
""",
                {"masked_loss_uneven": 1},
            ),
            (
                "a mean of the rows' means",
                """
def masked_loss(logits, targets, counted):
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets) * counted
    return (nats.sum(1) / counted.sum(1)).mean()
""",
                {"masked_loss_uneven": 1},
            ),
            (
                "chooses by a boolean index, which does not compile, and the logarithm of a softmax",
                """
def masked_loss(logits, targets, counted):
    p = jax.nn.softmax(logits)
    nats = -jnp.log(jnp.take_along_axis(p, targets[..., None], axis=-1)[..., 0])
    return nats[counted].mean()
""",
                {"masked_loss_jit": 1},
            ),
        ],
        "momentum": [
            (
                "moves with the old velocity",
                """
def momentum(params, velocity, grads, rate, beta):
    moved = jax.tree.map(lambda p, v: p - rate * v, params, velocity)
    return moved, jax.tree.map(lambda v, g: beta * v + g, velocity, grads)
""",
                {"momentum_one": 1, "momentum_two": 1, "momentum_pure": 1},
            ),
            (
                "writes into the dictionaries, one level deep",
                """
def momentum(params, velocity, grads, rate, beta):
    for name in params:
        velocity[name] = beta * velocity[name] + grads[name]
        params[name] = params[name] - rate * velocity[name]
    return params, velocity
""",
                {"momentum_two": 1, "momentum_pure": 1},
            ),
        ],
        "attention": [
            (
                "no window",
                """
def window_attention(q, k, v, window):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)
""",
                {"attention_window": 2},
            ),
            (
                "one place too many",
                """
def window_attention(q, k, v, window):
    T = q.shape[1]
    seen = jnp.tri(T, dtype=bool) & ~jnp.tri(T, k=-window - 1, dtype=bool)
    return jax.nn.dot_product_attention(q, k, v, mask=seen)
""",
                {"attention_window": 2},
            ),
            (
                "not scaled",
                """
def window_attention(q, k, v, window):
    T = q.shape[1]
    seen = jnp.tri(T, dtype=bool) & ~jnp.tri(T, k=-window, dtype=bool)
    return jax.nn.dot_product_attention(q, k, v, mask=seen, scale=1.0)
""",
                {"attention_full": 2, "attention_window": 2},
            ),
            (
                "masked after the softmax",
                """
def window_attention(q, k, v, window):
    T = q.shape[1]
    seen = jnp.tri(T, dtype=bool) & ~jnp.tri(T, k=-window, dtype=bool)
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) / jnp.sqrt(q.shape[-1])
    return jnp.einsum("BNTS,BSNH->BTNH", jnp.where(seen, jax.nn.softmax(scores, axis=-1), 0), v)
""",
                {"attention_full": 2, "attention_window": 2, "attention_average": 1},
            ),
        ],
        "bytes": [
            (
                "counts the output layer again",
                """
def training_bytes(config):
    counts = minigpt.count_parameters(config)
    return 16 * (counts["total"] + config.vocab_size * config.width)
""",
                {"bytes_small": 1, "bytes_any": 2},
            ),
            (
                "one layer only",
                """
def training_bytes(config):
    c = config
    return 16 * ((c.vocab_size + c.context + 4 * c.width + 2 * c.mlp_width + 3) * c.width)
""",
                {"bytes_any": 2},
            ),
        ],
        "make_step": [
            (
                "the optimiser's state is thrown away",
                """
def make_step(graph, tx):
    @jax.jit
    def step(params, opt_state, batch):
        def loss_of(p):
            logits = nnx.merge(graph, p)(batch["inputs"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, _ = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss
    return step
""",
                {"make_step_state": 1},
            ),
            (
                "the updates are never applied",
                """
def make_step(graph, tx):
    @jax.jit
    def step(params, opt_state, batch):
        def loss_of(p):
            logits = nnx.merge(graph, p)(batch["inputs"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        optax.apply_updates(params, updates)
        return params, opt_state, loss
    return step
""",
                {"make_step_learns": 1},
            ),
        ],
    },
    "assignment_2": {
        "rank_for": [
            (
                "the share of the singular values, not of their squares",
                """
def rank_for(delta, share):
    S = np.linalg.svd(np.asarray(delta, np.float64), compute_uv=False)
    return int(np.argmax(np.cumsum(S) / S.sum() >= min(share, 0.99999))) + 1
""",
                {"rank_for_squared": 1, "rank_for_any": 1},
            ),
            (
                "one too few",
                """
def rank_for(delta, share):
    S = np.linalg.svd(np.asarray(delta, np.float64), compute_uv=False) ** 2
    return int(np.argmax(np.cumsum(S) / S.sum() >= min(share, 0.99999)))
""",
                {"rank_for_thin": 1, "rank_for_squared": 1, "rank_for_any": 1},
            ),
            (
                "more than the share, not at least the share",
                """
def rank_for(delta, share):
    S = np.linalg.svd(np.asarray(delta, np.float64), compute_uv=False) ** 2
    return int(np.searchsorted(np.cumsum(S) / S.sum(), share, side="right")) + 1
""",
                {"rank_for_any": 1},
            ),
        ],
        "adapted": [
            (
                "alpha without the rank",
                """
def adapted(x, kernels, A, B, alpha, ranks):
    return x @ kernels + alpha * (x @ A.swapaxes(1, 2)) @ B.swapaxes(1, 2)
""",
                {"adapted_value": 1, "adapted_rank": 1},
            ),
            (
                "the largest rank for every layer",
                """
def adapted(x, kernels, A, B, alpha, ranks):
    return x @ kernels + alpha / A.shape[1] * (x @ A.swapaxes(1, 2)) @ B.swapaxes(1, 2)
""",
                {"adapted_rank": 1},
            ),
            (
                "divides by a rank of zero",
                """
def adapted(x, kernels, A, B, alpha, ranks):
    scale = alpha / jnp.array(ranks, jnp.float32)[:, None, None]
    return x @ kernels + scale * ((x @ A.swapaxes(1, 2)) @ B.swapaxes(1, 2))
""",
                {"adapted_rank": 1},
            ),
        ],
        "combined": [
            (
                "A and B are added one by one",
                """
def combined(adapters, weights):
    A = sum(A for A, _, _ in adapters)
    return A, sum(w * alpha / A.shape[0] * B for (A, B, alpha), w in zip(adapters, weights))
""",
                {"combined_many": 1},
            ),
            (
                "the weight on both factors",
                """
def combined(adapters, weights):
    A = jnp.concatenate([w * A for (A, _, _), w in zip(adapters, weights)])
    return A, jnp.concatenate([w * a / A.shape[0] * B for (A, B, a), w in zip(adapters, weights)], axis=1)
""",
                {"combined_one": 1, "combined_many": 1},
            ),
        ],
        "gradients": [
            (
                "the scale is forgotten",
                """
def gradients(x, g, A, B, alpha):
    return (g @ B).T @ x, g.T @ (x @ A.T)
""",
                {"gradients_first": 1, "gradients_later": 2},
            ),
            (
                "only right while B is zero",
                """
def gradients(x, g, A, B, alpha):
    return jnp.zeros_like(A), alpha / A.shape[0] * g.T @ (x @ A.T)
""",
                {"gradients_later": 2},
            ),
        ],
        "swapped": [
            (
                "the old one stays in",
                """
def swapped(kernel, old, new):
    A, B, alpha = new
    return (kernel.astype(jnp.float32) + alpha / A.shape[0] * (B @ A).T).astype(kernel.dtype)
""",
                {"swapped_back": 1},
            ),
            (
                "added in the dtype of the kernel",
                """
def swapped(kernel, old, new):
    def delta(A, B, alpha):
        return (alpha / A.shape[0] * (B @ A).T).astype(kernel.dtype)
    return kernel - delta(*old) + delta(*new)
""",
                {"swapped_bf16": 1},
            ),
        ],
        "small": [
            (
                "half the smaller side, whatever the other is",
                """
def break_even(inside, outside):
    return min(inside, outside) // 2

def adapter_bytes(config, rank):
    return 4 * config.layers * rank * (5 * config.width + config.mlp_width)
""",
                {"small_rank": 1},
            ),
            (
                "one layer",
                """
def break_even(inside, outside):
    return -(-inside * outside // (inside + outside))

def adapter_bytes(config, rank):
    return 4 * rank * (5 * config.width + config.mlp_width)
""",
                {"small_bytes": 1},
            ),
        ],
        "adapt": [
            (
                "Python's `or` between two filters",
                """
def adapt(model, batch, steps):
    wrt = nnx.PathContains("lora_A") or nnx.PathContains("lora_B")
    graph, learnt, rest = nnx.split(model, wrt, ...)
    tx = optax.adam(0.02)
    def loss_of(p):
        logits = nnx.merge(graph, p, rest)(batch["inputs"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()
    losses, state = [], tx.init(learnt)
    slope = jax.jit(jax.value_and_grad(loss_of))
    for _ in range(steps):
        loss, grads = slope(learnt)
        updates, state = tx.update(grads, state)
        learnt = optax.apply_updates(learnt, updates)
        losses.append(float(loss))
    nnx.update(model, learnt)
    return losses
""",
                {"adapt_learns": 1, "adapt_both": 2, "adapt_frozen": 1},
            ),
            (
                "the base learns too",
                """
def adapt(model, batch, steps):
    from utils import train
    class Same:
        def __next__(self):
            return batch
    history = train.fit(model, Same(), train.next_token_loss, optax.adam(0.02), steps=steps, log_every=1, progress=False)
    return history.loss
""",
                {"adapt_frozen": 1},
            ),
            (
                "only B learns",
                """
def adapt(model, batch, steps):
    from utils import train
    class Same:
        def __next__(self):
            return batch
    history = train.fit(model, Same(), train.next_token_loss, optax.adam(0.02), steps=steps, log_every=1, progress=False,
                        wrt=nnx.PathContains("lora_B"))
    return history.loss
""",
                {"adapt_both": 2},
            ),
        ],
    },
}
