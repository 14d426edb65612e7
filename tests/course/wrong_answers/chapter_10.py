"""Wrong answers to the exercises of chapter 10, each with the name under which its check must recognise it."""

WRONG = {
    "10.1": [
        (
            "no-interval",
            """
def needed_right(n, floor):
    return math.floor(n * floor) + 1
""",
        ),
        (
            "upper-end",
            """
def needed_right(n, floor):
    return next(k for k in range(n + 1) if wilson(k, n)[1] > floor)
""",
        ),
        (
            "one-too-few",
            """
def needed_right(n, floor):
    return max(k for k in range(n + 1) if wilson(k, n)[0] <= floor)
""",
        ),
        (
            "one-too-many",
            """
def needed_right(n, floor):
    return 1 + min(k for k in range(n + 1) if wilson(k, n)[0] > floor)
""",
        ),
    ],
    "10.2": [
        (
            "one-mean",
            """
def training_bytes(trainable, frozen):
    return 3 * 4 * trainable + 2 * frozen
""",
        ),
        (
            "frozen-in-float32",
            """
def training_bytes(trainable, frozen):
    return 16 * trainable + 4 * frozen
""",
        ),
        (
            "frozen-has-a-state",
            """
def training_bytes(trainable, frozen):
    return 16 * (trainable + frozen)
""",
        ),
        (
            "no-weights",
            """
def training_bytes(trainable, frozen):
    return 8 * trainable + 2 * frozen
""",
        ),
        (
            "frozen-forgotten",
            """
def training_bytes(trainable, frozen):
    return 16 * trainable
""",
        ),
    ],
    "10.3": [
        (
            "reads-the-padding",
            """
def read_labels(logits, lengths, negative, positive):
    return (logits[:, -1, positive] > logits[:, -1, negative]).astype(int)
""",
        ),
        (
            "words-swapped",
            """
def read_labels(logits, lengths, negative, positive):
    answer = logits[np.arange(len(lengths)), lengths - 1]
    return (answer[:, positive] < answer[:, negative]).astype(int)
""",
        ),
        (
            "reads-too-early",
            """
def read_labels(logits, lengths, negative, positive):
    answer = logits[np.arange(len(lengths)), lengths - 2]
    return (answer[:, positive] > answer[:, negative]).astype(int)
""",
        ),
        (
            "third-word",
            """
def read_labels(logits, lengths, negative, positive):
    answer = logits[np.arange(len(lengths)), lengths - 1]
    return (answer.argmax(axis=-1) == positive).astype(int)
""",
        ),
    ],
    "10.4": [
        (
            "one-sided",
            """
def mcnemar(first, second):
    b, c = int((first & ~second).sum()), int((~first & second).sum())
    return sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
""",
        ),
        (
            "only-this-split",
            """
def mcnemar(first, second):
    b, c = int((first & ~second).sum()), int((~first & second).sum())
    return min(1.0, 2 * math.comb(b + c, b) / 2 ** (b + c))
""",
        ),
        (
            "above-one",
            """
def mcnemar(first, second):
    b, c = int((first & ~second).sum()), int((~first & second).sum())
    return 2 * sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
""",
        ),
        (
            "one-order-only",
            """
def mcnemar(first, second):
    b, c = int((first & ~second).sum()), int((~first & second).sum())
    return min(1.0, 2 * sum(math.comb(b + c, k) for k in range(b + 1)) / 2 ** (b + c))
""",
        ),
        (
            "this-split-left-out",
            """
def mcnemar(first, second):
    b, c = int((first & ~second).sum()), int((~first & second).sum())
    return min(1.0, 2 * sum(math.comb(b + c, k) for k in range(min(b, c))) / 2 ** (b + c))
""",
        ),
        (
            "all-sentences",
            """
def mcnemar(first, second):
    b, c = int((first & ~second).sum()), int((~first & second).sum())
    n = len(first)
    low = (n - abs(b - c)) // 2
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(low + 1)) / 2**n)
""",
        ),
    ],
    "10.5": [
        (
            "no-third",
            """
def first_change(rank, alpha, inside, rate, use_rslora):
    s = alpha / (math.sqrt(rank) if use_rslora else rank)
    return s * rate * math.sqrt(rank / inside)
""",
        ),
        (
            "signs-agree",
            """
def first_change(rank, alpha, inside, rate, use_rslora):
    s = alpha / (math.sqrt(rank) if use_rslora else rank)
    return s * rate * rank / math.sqrt(3 * inside)
""",
        ),
        (
            "rank-forgotten",
            """
def first_change(rank, alpha, inside, rate, use_rslora):
    s = alpha / (math.sqrt(rank) if use_rslora else rank)
    return s * rate / math.sqrt(3 * inside)
""",
        ),
        (
            "cases-swapped",
            """
def first_change(rank, alpha, inside, rate, use_rslora):
    s = alpha / (rank if use_rslora else math.sqrt(rank))
    return s * rate * math.sqrt(rank / (3 * inside))
""",
        ),
        (
            "no-square-root",
            """
def first_change(rank, alpha, inside, rate, use_rslora):
    return alpha / rank * rate * math.sqrt(rank / (3 * inside))
""",
        ),
    ],
    "10.6": [
        (
            "norm-of-the-base",
            """
def dora(x, W, A, B, s, m):
    length = jax.lax.stop_gradient(jnp.linalg.norm(W, axis=1))
    return (x @ (W + s * B @ A).T) * (m / length)
""",
        ),
        (
            "gradient-through-the-norm",
            """
def dora(x, W, A, B, s, m):
    rows = W + s * B @ A
    return (x @ rows.T) * (m / jnp.linalg.norm(rows, axis=1))
""",
        ),
        (
            "one-norm-for-all",
            """
def dora(x, W, A, B, s, m):
    rows = W + s * B @ A
    return (x @ rows.T) * (m / jax.lax.stop_gradient(jnp.linalg.norm(rows)))
""",
        ),
        (
            "too-much-detached",
            """
def dora(x, W, A, B, s, m):
    rows = jax.lax.stop_gradient(W + s * B @ A)
    return (x @ rows.T) * (m / jnp.linalg.norm(rows, axis=1))
""",
        ),
        (
            "columns-not-rows",
            """
def dora(x, W, A, B, s, m):
    rows = W + s * B @ A
    return x @ (rows / jax.lax.stop_gradient(jnp.linalg.norm(rows, axis=0))).T * m
""",
        ),
        (
            "lengths-do-not-learn",
            """
def dora(x, W, A, B, s, m):
    rows = W + s * B @ A
    return (x @ rows.T) * jax.lax.stop_gradient(m / jnp.linalg.norm(rows, axis=1))
""",
        ),
        (
            "scale-forgotten",
            """
def dora(x, W, A, B, s, m):
    rows = W + B @ A
    return (x @ rows.T) * (m / jax.lax.stop_gradient(jnp.linalg.norm(rows, axis=1)))
""",
        ),
    ],
}
