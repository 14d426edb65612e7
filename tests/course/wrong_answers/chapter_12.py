"""Wrong answers to the exercises of chapter 12, each with the name under which its check must recognise it."""

WRONG = {
    "12.1": [
        (
            "nothing-is-cut",
            """
def held(shape, itemsize, spec, sizes):
    return math.prod(shape) * itemsize
""",
        ),
        (
            "first-axis-only",
            """
def held(shape, itemsize, spec, sizes):
    parts = [sizes[entry[0] if isinstance(entry, tuple) else entry] for entry in spec if entry]
    return math.prod(shape) * itemsize // math.prod(parts)
""",
        ),
        (
            "every-axis-cuts",
            """
def held(shape, itemsize, spec, sizes):
    return math.prod(shape) * itemsize // math.prod(sizes.values())
""",
        ),
        (
            "numbers-not-bytes",
            """
def held(shape, itemsize, spec, sizes):
    axes = [a for entry in spec for a in (entry if isinstance(entry, tuple) else (entry,)) if a]
    return math.prod(shape) // math.prod(sizes[a] for a in axes)
""",
        ),
        (
            "float32-always",
            """
def held(shape, itemsize, spec, sizes):
    axes = [a for entry in spec for a in (entry if isinstance(entry, tuple) else (entry,)) if a]
    return 4 * math.prod(shape) // math.prod(sizes[a] for a in axes)
""",
        ),
    ],
    "12.2": [
        (
            "own-part-too",
            """
def sent(kind, array_bytes, n):
    return array_bytes * (2 if kind == "all-reduce" else 1)
""",
        ),
        (
            "one-round",
            """
def sent(kind, array_bytes, n):
    return array_bytes / n
""",
        ),
        (
            "part-not-whole",
            """
def sent(kind, array_bytes, n):
    return array_bytes * (n - 1) * (2 if kind == "all-reduce" else 1)
""",
        ),
        (
            "all-reduce-like-gather",
            """
def sent(kind, array_bytes, n):
    return (n - 1) * array_bytes / n
""",
        ),
        (
            "scatter-like-all-reduce",
            """
def sent(kind, array_bytes, n):
    return (1 if kind == "all-gather" else 2) * array_bytes * (n - 1) / n
""",
        ),
        (
            "everybody-to-everybody",
            """
def sent(kind, array_bytes, n):
    return array_bytes * (n - 1) if kind == "all-reduce" else (n - 1) * array_bytes / n
""",
        ),
    ],
    "12.3": [
        (
            "pair-swapped",
            """
def adapter_specs(weight):
    return (weight[0], None), (None, weight[1])
""",
        ),
        (
            "kernels-in-out",
            """
def adapter_specs(weight):
    return (weight[1], None), (None, weight[0])
""",
        ),
        (
            "the-rank-is-cut",
            """
def adapter_specs(weight):
    return weight, weight
""",
        ),
        (
            "ends-swapped",
            """
def adapter_specs(weight):
    return (None, weight[0]), (weight[1], None)
""",
        ),
        (
            "copied-everywhere",
            """
def adapter_specs(weight):
    return (None, None), (None, None)
""",
        ),
    ],
    "12.4": [
        (
            "heads-cut",
            """
def fitting(config, devices):
    return [(devices // tp, tp) for tp in range(1, devices + 1) if devices % tp == 0]
""",
        ),
        (
            "kv-heads-refused",
            """
def fitting(config, devices):
    return [(devices // tp, tp) for tp in range(1, devices + 1)
            if devices % tp == 0 and config.num_attention_heads % tp == 0 and config.num_key_value_heads % tp == 0]
""",
        ),
        (
            "width-forgotten",
            """
def fitting(config, devices):
    split = (config.num_attention_heads, config.intermediate_size, config.vocab_size)
    return [(devices // tp, tp) for tp in range(1, devices + 1) if devices % tp == 0 and not any(n % tp for n in split)]
""",
        ),
        (
            "features-forgotten",
            """
def fitting(config, devices):
    return [(devices // tp, tp) for tp in range(1, devices + 1)
            if devices % tp == 0 and config.num_attention_heads % tp == 0 and config.hidden_size % (devices // tp) == 0]
""",
        ),
        (
            "devices-left-over",
            """
def fitting(config, devices):
    found = []
    for fsdp in range(1, devices + 1):
        for tp in range(1, devices // fsdp + 1):
            with contextlib.suppress(CourseError):
                sharding.check(config, fsdp=fsdp, tp=tp)
                found.append((fsdp, tp))
    return found
""",
        ),
        (
            "pair-swapped",
            """
def fitting(config, devices):
    return [(tp, devices // tp) for tp in range(1, devices + 1) if devices % tp == 0 and config.num_attention_heads % tp == 0]
""",
        ),
        (
            "powers-of-two-only",
            """
def fitting(config, devices):
    meshes, tp = [], 1
    split = (config.num_attention_heads, config.intermediate_size, config.vocab_size)
    while tp <= devices:
        fsdp = devices // tp
        if fsdp * tp == devices and config.hidden_size % fsdp == 0 and not any(n % tp for n in split):
            meshes.append((fsdp, tp))
        tp *= 2
    return meshes
""",
        ),
    ],
    "12.5": [
        (
            "half-a-sum",
            """
def device(x, up, down):
    return jax.nn.silu(x @ up) @ down
""",
        ),
        (
            "mean-not-sum",
            """
def device(x, up, down):
    return jax.lax.pmean(jax.nn.silu(x @ up) @ down, "tp")
""",
        ),
        (
            "rows-added-up",
            """
def device(x, up, down):
    return jax.lax.psum(jax.nn.silu(x @ up) @ down, "fsdp")
""",
        ),
        (
            "everything-added-up",
            """
def device(x, up, down):
    return jax.lax.psum(jax.nn.silu(x @ up) @ down, ("fsdp", "tp"))
""",
        ),
        (
            "summed-too-early",
            """
def device(x, up, down):
    return jax.nn.silu(jax.lax.psum(x @ up, "tp")) @ down
""",
        ),
        (
            "more-than-needed",
            """
def device(x, up, down):
    features = jax.lax.all_gather(jax.nn.silu(x @ up), "tp", axis=1, tiled=True)
    return features @ jax.lax.all_gather(down, "tp", axis=0, tiled=True)
""",
        ),
        (
            "more-than-needed",
            """
def device(x, up, down):
    part = jax.nn.silu(x @ up) @ down
    return (jax.lax.psum(part[:, :1], "tp") * jnp.eye(1, 2)) + jax.lax.psum(part * jnp.array([0, 1]), "tp")
""",
        ),
    ],
}
