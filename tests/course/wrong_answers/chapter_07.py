"""Wrong answers to the exercises of chapter 7, each with the name under which its check must recognise it."""

WRONG = {
    "7.1": [
        (
            "rows-scaled",
            """
def fold(weight, W):
    return weight[:, None] * W
""",
        ),
        (
            "divided",
            """
def fold(weight, W):
    return W / weight
""",
        ),
        (
            "already-multiplied",
            """
def fold(weight, W):
    return W @ weight
""",
        ),
    ],
    "7.2": [
        (
            "neighbours-paired",
            """
def rope_complex(x, positions, base):
    T, H = x.shape
    z = x[:, 0::2] + 1j * x[:, 1::2]
    z = z * jnp.exp(1j * positions[:, None] * base ** (-2 * jnp.arange(H // 2) / H))
    return jnp.stack([z.real, z.imag], axis=-1).reshape(T, H)
""",
        ),
        (
            "written-back-interleaved",
            """
def rope_complex(x, positions, base):
    T, H = x.shape
    z = x[:, : H // 2] + 1j * x[:, H // 2 :]
    z = z * jnp.exp(1j * positions[:, None] * base ** (-2 * jnp.arange(H // 2) / H))
    return jnp.stack([z.real, z.imag], axis=-1).reshape(T, H)
""",
        ),
        (
            "turned-backwards",
            """
def rope_complex(x, positions, base):
    T, H = x.shape
    z = x[:, : H // 2] + 1j * x[:, H // 2 :]
    z = z * jnp.exp(-1j * positions[:, None] * base ** (-2 * jnp.arange(H // 2) / H))
    return jnp.concatenate([z.real, z.imag], axis=-1)
""",
        ),
        (
            "half-the-exponent",
            """
def rope_complex(x, positions, base):
    T, H = x.shape
    z = x[:, : H // 2] + 1j * x[:, H // 2 :]
    z = z * jnp.exp(1j * positions[:, None] * base ** (-jnp.arange(H // 2) / H))
    return jnp.concatenate([z.real, z.imag], axis=-1)
""",
        ),
        (
            "still-complex",
            """
def rope_complex(x, positions, base):
    T, H = x.shape
    z = x[:, : H // 2] + 1j * x[:, H // 2 :]
    return z * jnp.exp(1j * positions[:, None] * base ** (-2 * jnp.arange(H // 2) / H))
""",
        ),
        (
            "parts-exchanged",
            """
def rope_complex(x, positions, base):
    half = x.shape[-1] // 2
    z = (x[:, :half] + 1j * x[:, half:]) * jnp.exp(1j * positions[:, None] * base ** (-jnp.arange(half) / half))
    return jnp.concatenate([z.imag, z.real], axis=-1)
""",
        ),
    ],
    "7.3": [
        (
            "grouped-n-mod-K",
            """
def expand(k, heads):
    return jnp.tile(k, (1, 1, heads // k.shape[2], 1))
""",
        ),
        (
            "wrong-axis-repeated",
            """
def expand(k, heads):
    return jnp.repeat(k, heads // k.shape[2], axis=1)
""",
        ),
        (
            "repeated-N-times",
            """
def expand(k, heads):
    return jnp.repeat(k, heads, axis=2)
""",
        ),
        (
            "divided-by-K",
            """
def expand(k, heads):
    return k[:, :, jnp.arange(heads) // k.shape[2]]
""",
        ),
    ],
    "7.4": [
        (
            "query-heads-counted",
            """
def longest_context(config, memory, batch_size):
    return memory // (2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * 2 * batch_size)
""",
        ),
        (
            "keys-without-values",
            """
def longest_context(config, memory, batch_size):
    return memory // (config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2 * batch_size)
""",
        ),
        (
            "one-text-only",
            """
def longest_context(config, memory, batch_size):
    return memory // generate.cache_bytes(config, 1, 1)
""",
        ),
        (
            "not-whole",
            """
def longest_context(config, memory, batch_size):
    return memory / (4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * batch_size)
""",
        ),
        (
            "rounded-up",
            """
def longest_context(config, memory, batch_size):
    return round(memory / (4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * batch_size))
""",
        ),
    ],
    "7.5": [
        (
            "rounded-down",
            """
def swiglu_width(D, multiple):
    return 8 * D // 3 // multiple * multiple
""",
        ),
        (
            "four-D-kept",
            """
def swiglu_width(D, multiple):
    return math.ceil(4 * D / multiple) * multiple
""",
        ),
        (
            "not-a-multiple",
            """
def swiglu_width(D, multiple):
    return -(-8 * D // 3)
""",
        ),
        (
            "rounded-down-first",
            """
def swiglu_width(D, multiple):
    return -(-(8 * D // 3) // multiple) * multiple
""",
        ),
    ],
    "7.6": [
        (
            "head-counted-too",
            """
smollm2 = hf_config.read(SMOLLM2 | {"tie_word_embeddings": False}).count_parameters()["total"]
""",
        ),
        (
            "as-many-key-heads-as-query-heads",
            """
smollm2 = 49152 * 576 + 30 * (4 * 576**2 + 3 * 576 * 1536 + 2 * 576) + 576
""",
        ),
        (
            "last-norm-forgotten",
            """
smollm2 = 49152 * 576 + 30 * (2 * 576**2 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576)
""",
        ),
        (
            "biases-counted",
            """
smollm2 = hf_config.read(SMOLLM2 | {"model_type": "qwen2"}).count_parameters()["total"]
""",
        ),
        (
            "one-norm-a-block",
            """
smollm2 = 49152 * 576 + 30 * (2 * 576**2 + 2 * 576 * 192 + 3 * 576 * 1536 + 576) + 576
""",
        ),
    ],
    "7.7": [
        (
            "all-slowed",
            """
def stretch(speeds, original, factor, low, high):
    return speeds / factor
""",
        ),
        (
            "blend-swapped",
            """
def stretch(speeds, original, factor, low, high):
    turns = original * speeds / (2 * math.pi)
    s = jnp.clip((high - turns) / (high - low), 0, 1)
    between = (turns >= low) & (turns <= high)
    s = jnp.where(between, s, 1 - s)
    return s * speeds + (1 - s) * speeds / factor
""",
        ),
        (
            "slowed-between-the-bounds",
            """
def stretch(speeds, original, factor, low, high):
    turns = original * speeds / (2 * math.pi)
    return jnp.where(turns > high, speeds, speeds / factor)
""",
        ),
        (
            "radians-for-turns",
            """
def stretch(speeds, original, factor, low, high):
    turns = original * speeds
    s = jnp.clip((turns - low) / (high - low), 0, 1)
    return s * speeds + (1 - s) * speeds / factor
""",
        ),
        (
            "fast-ones-slowed",
            """
def stretch(speeds, original, factor, low, high):
    s = 1 - jnp.clip((original * speeds / (2 * math.pi) - low) / (high - low), 0, 1)
    return s * speeds + (1 - s) * speeds / factor
""",
        ),
        (
            "not-clipped",
            """
def stretch(speeds, original, factor, low, high):
    s = (original * speeds / (2 * math.pi) - low) / (high - low)
    return s * speeds + (1 - s) * speeds / factor
""",
        ),
    ],
}
