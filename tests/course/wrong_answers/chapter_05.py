"""Wrong answers to the exercises of chapter 5, each with the name under which its check must recognise it."""

WRONG = {
    "5.1": [
        (
            "the-product-not-the-sum",
            """
def adapter_parameters(shapes, rank):
    return sum(rank * i * o for i, o in shapes)
""",
        ),
        (
            "one-factor-only",
            """
def adapter_parameters(shapes, rank):
    return sum(rank * i for i, o in shapes)
""",
        ),
        (
            "counts-the-layers-too",
            """
def adapter_parameters(shapes, rank):
    return sum(i * o + rank * (i + o) for i, o in shapes)
""",
        ),
    ],
    "5.2": [
        (
            "B-not-zero",
            """
def start(key, inside, outside, rank):
    a, b = jax.random.split(key)
    bound = inside ** -0.5
    A = jax.random.uniform(a, (rank, inside), minval=-bound, maxval=bound)
    return A, 0.01 * jax.random.normal(b, (outside, rank))
""",
        ),
        (
            "both-zero",
            """
def start(key, inside, outside, rank):
    return jnp.zeros((rank, inside)), jnp.zeros((outside, rank))
""",
        ),
        (
            "transposed-factors",
            """
def start(key, inside, outside, rank):
    bound = inside ** -0.5
    return jax.random.uniform(key, (inside, rank), minval=-bound, maxval=bound), jnp.zeros((rank, outside))
""",
        ),
        (
            "bound-from-the-rank",
            """
def start(key, inside, outside, rank):
    bound = rank ** -0.5
    return jax.random.uniform(key, (rank, inside), minval=-bound, maxval=bound), jnp.zeros((outside, rank))
""",
        ),
    ],
    "5.3": [
        (
            "scale-forgotten",
            """
def adapted_forward(x, W, A, B, alpha):
    return x @ W.T + (x @ A.T) @ B.T
""",
        ),
        (
            "alpha-times-rank",
            """
def adapted_forward(x, W, A, B, alpha):
    return x @ W.T + alpha * len(A) * (x @ A.T) @ B.T
""",
        ),
        (
            "transposed-factors",
            """
def adapted_forward(x, W, A, B, alpha):
    return x @ W.T + alpha / len(A) * (x @ B) @ A
""",
        ),
        (
            "base-scaled-too",
            """
def adapted_forward(x, W, A, B, alpha):
    return alpha / len(A) * (x @ W.T + (x @ A.T) @ B.T)
""",
        ),
        (
            "alpha-not-divided",
            """
def adapted_forward(x, W, A, B, alpha):
    return x @ W.T + alpha * (x @ A.T) @ B.T
""",
        ),
    ],
    "5.4": [
        ("joined-by-or", "adapter_only = nnx.PathContains('lora_B') or nnx.PathContains('lora_A')"),
        ("base-not-frozen", "adapter_only = nnx.Param"),
        (
            "selects-nothing",
            "adapter_only = nnx.Any(nnx.PathContains('lora_a'), nnx.PathContains('lora_b'))",
        ),
        (
            "chosen-by-name",
            "adapter_only = lambda path, leaf: any(str(part).startswith(('lora_A', 'lora_B')) for part in path)",
        ),
        (
            "chosen-by-name",
            """
adapter_only = nnx.Any(nnx.PathContains("lora_A"), nnx.PathContains("lora_B"))
""",
        ),
    ],
    "5.5": [
        (
            "transposed-delta",
            """
def merged_kernel(kernel, A, B, alpha):
    return kernel + alpha / len(A) * B @ A
""",
        ),
        (
            "scale-forgotten",
            """
def merged_kernel(kernel, A, B, alpha):
    return kernel + (B @ A).T
""",
        ),
        (
            "merged-twice",
            """
def merged_kernel(kernel, A, B, alpha):
    for layer in (A, B):
        kernel = kernel + alpha / len(A) * (B @ A).T
    return kernel
""",
        ),
        (
            "alpha-not-divided",
            """
def merged_kernel(kernel, A, B, alpha):
    return kernel + alpha * (B @ A).T
""",
        ),
    ],
    "5.6": [
        (
            "singular-values-lost",
            """
def factors(delta, rank):
    u, s, v = np.linalg.svd(delta, full_matrices=False)
    return v[:rank], u[:, :rank]
""",
        ),
        (
            "singular-values-squared",
            """
def factors(delta, rank):
    u, s, v = np.linalg.svd(delta, full_matrices=False)
    return s[:rank, None] * v[:rank], u[:, :rank] * s[:rank]
""",
        ),
        (
            "factors-swapped",
            """
def factors(delta, rank):
    u, s, v = np.linalg.svd(delta, full_matrices=False)
    return u[:, :rank] * s[:rank], v[:rank]
""",
        ),
    ],
}
