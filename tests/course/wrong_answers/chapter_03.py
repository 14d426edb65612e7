"""Wrong answers to the exercises of chapter 3, each with the name under which its check must recognise it."""

WRONG = {
    "3.1": [
        (
            "one-too-many",
            """
def windowed_mask(T, window):
    distance = jnp.arange(T)[:, None] - jnp.arange(T)
    return (distance >= 0) & (distance <= window)
""",
        ),
        (
            "sees-the-future",
            """
def windowed_mask(T, window):
    distance = jnp.arange(T)[:, None] - jnp.arange(T)
    return jnp.abs(distance) < window
""",
        ),
        (
            "own-position-left-out",
            """
def windowed_mask(T, window):
    distance = jnp.arange(T)[:, None] - jnp.arange(T)
    return (distance > 0) & (distance <= window)
""",
        ),
        (
            "rows-and-columns-swapped",
            """
def windowed_mask(T, window):
    distance = jnp.arange(T) - jnp.arange(T)[:, None]
    return (distance >= 0) & (distance < window)
""",
        ),
        (
            "no-window",
            """
def windowed_mask(T, window):
    return jnp.tril(jnp.ones((T, T), bool))
""",
        ),
    ],
    "3.2": [
        (
            "not-scaled",
            """
def attend(q, k, v, mask):
    return jax.nn.softmax(jnp.where(mask, q @ k.T, -jnp.inf), axis=-1) @ v
""",
        ),
        (
            "divided-by-head-size",
            """
def attend(q, k, v, mask):
    return jax.nn.softmax(jnp.where(mask, q @ k.T / q.shape[-1], -jnp.inf), axis=-1) @ v
""",
        ),
        (
            "mask-after-softmax",
            """
def attend(q, k, v, mask):
    return jnp.where(mask, jax.nn.softmax(q @ k.T / q.shape[-1] ** 0.5, axis=-1), 0) @ v
""",
        ),
        (
            "softmax-over-queries",
            """
def attend(q, k, v, mask):
    return jax.nn.softmax(jnp.where(mask, q @ k.T / q.shape[-1] ** 0.5, -1e30), axis=0) @ v
""",
        ),
        (
            "mask-left-out",
            """
def attend(q, k, v, mask):
    return jax.nn.softmax(q @ k.T / q.shape[-1] ** 0.5, axis=-1) @ v
""",
        ),
        (
            "zero-is-not-masked",
            """
def attend(q, k, v, mask):
    return jax.nn.softmax(q @ k.T / q.shape[-1] ** 0.5 * mask, axis=-1) @ v
""",
        ),
    ],
    "3.3": [
        (
            "tokens-mixed-with-heads",
            """
def split_heads(x, num_heads):
    B, T, D = x.shape
    return x.reshape(B, num_heads, T, D // num_heads)
""",
        ),
        (
            "numbers-interleaved",
            """
def split_heads(x, num_heads):
    B, T, D = x.shape
    return x.reshape(B, T, D // num_heads, num_heads).transpose(0, 3, 1, 2)
""",
        ),
        (
            "axis-not-moved",
            """
def split_heads(x, num_heads):
    return x.reshape(*x.shape[:2], num_heads, -1)
""",
        ),
    ],
    "3.4": [
        (
            "head-counted-again",
            """
gpt2_small = 2 * 50_257 * 768 + 1_024 * 768 + 12 * (4 * 768**2 + 2 * 768 * 3_072 + 2 * 768) + 768
""",
        ),
        (
            "o-proj-forgotten",
            """
gpt2_small = 50_257 * 768 + 1_024 * 768 + 12 * (3 * 768**2 + 2 * 768 * 3_072 + 2 * 768) + 768
""",
        ),
        (
            "biases-included",
            """
gpt2_small = 124_439_808
""",
        ),
        (
            "norms-forgotten",
            """
gpt2_small = 50_257 * 768 + 1_024 * 768 + 12 * (4 * 768**2 + 2 * 768 * 3_072)
""",
        ),
    ],
    "3.5": [
        (
            "only-the-last-token",
            """
def is_causal(forward, tokens):
    other = forward(tokens.at[0, -1].add(1))
    return bool(jnp.all(other[:, :-1] == forward(tokens)[:, :-1]))
""",
        ),
        (
            "calls-a-causal-model-leaky",
            """
def is_causal(forward, tokens):
    reference = forward(tokens)
    return all(bool(jnp.all(forward(tokens.at[0, t].add(1))[:, : t + 1] == reference[:, : t + 1]))
               for t in range(tokens.shape[1]))
""",
        ),
        (
            "finds-no-leak",
            """
def is_causal(forward, tokens):
    for t in range(1, tokens.shape[1]):
        tokens.at[0, t].add(1)  # arrays do not change: the result is thrown away
        if not jnp.array_equal(forward(tokens)[:, :t], forward(tokens)[:, :t]):
            return False
    return True
""",
        ),
        (
            "one-position-only",
            """
def is_causal(forward, tokens):
    t = tokens.shape[1] // 2
    other = forward(tokens.at[0, t].add(1))
    return bool(jnp.all(other[:, :t] == forward(tokens)[:, :t]))
""",
        ),
    ],
}
