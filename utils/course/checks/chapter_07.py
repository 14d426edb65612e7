"""Checks of chapter 7: the norm's weight, rotations, shared key heads, cache bytes, MLP width, counting, stretched RoPE."""

import math

import numpy as np

from utils.course.checks import array, call, exercise, expect, expect_close, expect_shape, normal


@exercise("7.1")
def fold(learner):
    import jax.numpy as jnp

    weight, W = 1 + normal(6, seed=1), normal(6, 6, seed=2)
    found = call(learner, jnp.asarray(weight), jnp.asarray(W))
    expect_close(
        found,
        np.einsum("oi,i->oi", W, weight),
        "the folded matrix",
        axes="[out, in]",
        unlike={
            "rows-scaled": (
                np.einsum("oi,o->oi", W, weight),
                "each row is scaled, which changes the outputs and not the inputs",
                "which axis of W the normalised input runs along",
            ),
            "unchanged": (W, "this is W itself", "what the norm's weight multiplies"),
            "divided": (W / weight, "the weight is divided out", "what the norm did with its weight"),
            "already-multiplied": (
                W @ weight,
                "this is W applied to the weight, a vector",
                "the shape: a matrix is wanted, not its product",
            ),
            "transposed": (np.einsum("oi,i->io", W, weight), "the result is [in, out]", "the order of the axes"),
        },
    )
    narrow = call(learner, jnp.asarray(weight), jnp.asarray(W[:2]))
    expect_shape(narrow, (2, 6), "the folded matrix of two rows", "[out, in]")
    return "The norm before it may now have a weight of ones"


@exercise("7.2")
def rope_complex(learner):
    import jax.numpy as jnp

    T, H, base = 5, 12, 100.0
    x, places = normal(T, H, seed=3), np.array([0, 1, 2, 7, 40])

    def variant(*, places=places, base=base, exponent=2 / H, sign=1, read="halves", written="halves"):
        angle = sign * np.outer(places, base ** -(exponent * np.arange(H // 2)))
        a, b = np.split(x, 2, axis=-1) if read == "halves" else (x[:, ::2], x[:, 1::2])
        pair = np.cos(angle) * a - np.sin(angle) * b, np.sin(angle) * a + np.cos(angle) * b
        return np.concatenate(pair, -1) if written == "halves" else np.stack(pair, -1).reshape(T, H)

    found = call(learner, jnp.asarray(x), jnp.asarray(places), base)
    expect(
        not np.iscomplexobj(np.asarray(found)),
        "still-complex",
        "the answer holds complex numbers",
        "the real and the imaginary parts go back to their halves",
    )
    look = "the two halves of x"
    expect_close(
        found,
        variant(),
        "the turned head",
        axes="[T, H]",
        rtol=1e-3,
        atol=1e-4,
        unlike={
            "neighbours-paired": (
                variant(read="pairs", written="pairs"),
                "numbers 2 i and 2 i + 1 form the pairs, Meta's layout",
                look,
            ),
            "written-back-interleaved": (
                variant(written="pairs"),
                "the pairs are read from the halves and written back as neighbours",
                "how the parts are joined at the end",
            ),
            "turned-backwards": (variant(sign=-1), "every pair turns the other way", "the sign of the angle"),
            "half-the-exponent": (
                variant(exponent=1 / H),
                "the speeds fall as base ** (-i / H)",
                "there are H / 2 pairs, and the last is almost base times slower",
            ),
            "parts-exchanged": (
                np.roll(variant(), H // 2, axis=-1),
                "the two halves of the answer have changed places",
                "which part of z was the first half",
            ),
            "counted-from-one": (variant(places=places + 1), "place 0 is turned", "what is given as positions"),
            "positions-ignored": (
                variant(places=np.arange(T)),
                "row t stands at place t",
                "what is given as positions",
            ),
            "base-ignored": (variant(base=10_000.0), "the base is 10,000", "what is given as base"),
            "all-pairs-alike": (variant(exponent=0), "every pair turns at the same speed", "the speed of pair i"),
        },
    )
    return "One complex product is four real ones"


@exercise("7.3")
def expand(learner):
    import jax.numpy as jnp

    k = normal(2, 5, 3, 4, seed=4)
    found = call(learner, jnp.asarray(k), 6)
    readers = [0, 0, 1, 1, 2, 2]
    shape = np.shape(array(found, "the expanded keys"))
    expect(
        shape != (2, 5, 18, 4),
        "repeated-N-times",
        "there are K N heads now",
        "how many query heads share one key head",
    )
    expect(
        shape not in ((2, 10, 3, 4), (4, 5, 3, 4), (2, 5, 3, 8)),
        "wrong-axis-repeated",
        f"the shape is {shape}: another axis than the heads has grown",
        "the axes [B, S, K, H]",
    )
    expect_close(
        found,
        k[:, :, readers],
        "the expanded keys",
        axes="[B, S, N, H]",
        unlike={
            "grouped-n-mod-K": (
                k[:, :, [0, 1, 2, 0, 1, 2]],
                "query head n gets key head n mod K",
                "the order 0, 0, 1, 1, ...: what tile does and what repeat does",
            ),
            "divided-by-K": (
                k[:, :, [0, 0, 0, 1, 1, 1]],
                "query head n gets key head n // K",
                "G = N / K query heads share one",
            ),
        },
    )
    expect_close(call(learner, jnp.asarray(k), 3), k, "the keys when N = K", axes="[B, S, N, H]")
    return "Ordinary attention on it is grouped attention"


@exercise("7.4")
def longest_context(learner):
    from utils.transformer import Config

    config = Config("qwen2", 100, 64, 5, 12, 3, 16, 8, 10**6, 1e4, 1e-6, True, True)
    memory, batch = 10_003_000, 4  # 2604.9 tokens
    found = call(learner, config, memory, batch)

    def fit(both=2, layers=5, heads=3, head_size=16, number=2, rows=batch):
        return memory // (both * layers * heads * head_size * number * rows)

    expect(
        float(array(found)).is_integer(),
        "not-whole",
        f"{float(array(found)):.2f} tokens: there are no parts of tokens",
        "the kind of division",
    )
    expect_close(
        int(array(found)),
        fit(),
        "the tokens that fit",
        rtol=0,
        atol=0.1,
        unlike={
            "query-heads-counted": (
                fit(num_attention_heads=12),
                "this counts the query heads, which keep nothing",
                "which heads have keys",
            ),
            "rounded-up": (fit() + 1, "this is more than fits", "the kind of division"),
            "keys-without-values": (
                fit(both=1),
                "one factor of two is missing: keys and values, and two bytes a number",
                "the two twos",
            ),
            "one-text-only": (fit(rows=1), "the memory is given to one text", "batch"),
            "one-layer-only": (fit(num_hidden_layers=1), "the cache of one layer is counted", "each layer keeps its own keys"),
            "float32-counted": (fit(number=4), "numbers of 4 bytes are counted", "bfloat16"),
            "head-size-guessed": (
                fit(head_dim=64 // 12),
                "a head is taken for D / N numbers",
                "config.head_size, a field of its own",
            ),
            "width-for-heads": (
                memory // (2 * 5 * 64 * 2 * batch),
                "D numbers are counted for a token's keys",
                "K H of them",
            ),
        },
    )
    return "A budget of bytes, in tokens"


@exercise("7.5")
def swiglu_width(learner):
    cases = [(4096, 256), (96, 1), (100, 1), (512, 64), (3072, 8)]
    found = [array(call(learner, *case), "F") for case in cases]

    def widths(ratio, rounding):
        return [rounding(ratio * D / m) * m for D, m in cases]

    # 8 D / 3 is whole or a third away from it: a small amount off keeps rounding errors from deciding
    expect_close(
        found,
        [11008, 256, 267, 1408, 8192],
        "F for five models",
        rtol=0,
        atol=1e-6,
        unlike={
            "rounded-down": (widths(8 / 3 + 1e-9, math.floor), "F is rounded down", "at least as many parameters"),
            "rounded-to-nearest": (widths(8 / 3, round), "F is rounded to the nearest", "at least as many parameters"),
            "rounded-down-first": (
                [math.ceil(8 * D // 3 / m) * m for D, m in cases],
                "8 D / 3 is rounded down before it is rounded up",
                "at least as many parameters",
            ),
            "steps-not-width": (
                [math.ceil((8 * D - 0.5) / 3 / m) for D, m in cases],
                "these are multiples, counted",
                "F itself",
            ),
            "four-D-kept": (widths(4, math.ceil), "this is MiniGPT's width", "three matrices must cost what two cost"),
            "half-of-it": (widths(2, math.ceil), "this F is 2 D", "SwiGLU has three matrices, not four"),
            "not-a-multiple": (
                [math.ceil(8 * D / 3 - 1e-9) for D, _ in cases],
                "the multiple is not used",
                "hardware likes round numbers",
            ),
        },
    )
    return "11,008 is the first Llama's"


@exercise("7.6")
def smollm2(learner):
    D, L, V, F, kv = 576, 30, 49_152, 1536, 192
    expect_close(
        learner,
        134_515_008,
        "SmolLM2's parameters",
        rtol=0,
        atol=0.5,
        unlike={
            "head-counted-too": (134_515_008 + V * D, "the table is counted twice", "tie_word_embeddings"),
            "as-many-key-heads-as-query-heads": (
                134_515_008 + L * 2 * D * (D - kv),
                "k_proj and v_proj are counted as square",
                "num_key_value_heads",
            ),
            "biases-counted": (134_515_008 + L * (D + 2 * kv), "biases are counted", "model_type: a Llama has none"),
            "two-matrices-in-the-mlp": (134_515_008 - L * D * F, "the MLP has two matrices", "swap four"),
            "norms-forgotten": (134_515_008 - (2 * L + 1) * D, "the norms are missing", "two a block, and one"),
            "one-norm-a-block": (
                134_515_008 - L * D,
                "each block has one norm",
                "what stands before attention, and before the MLP",
            ),
            "last-norm-forgotten": (134_515_008 - D, "one norm is missing", "what stands before the output layer"),
            "o-proj-forgotten": (134_515_008 - L * D * D, "a square matrix per layer is missing", "o_proj"),
        },
    )
    return "To the last parameter"


@exercise("7.7")
def stretch(learner):
    import jax.numpy as jnp

    # What transformers computes for these numbers (rope_type "llama3").
    wanted = np.array(
        [1.0, 0.19392276, 0.03760603, 7.2926651e-3, 5.2484602e-4, 3.4281024e-5, 6.6478697e-6, 1.2891732e-6]
    )
    speeds = 500_000.0 ** (-np.arange(8) / 8)
    found = call(learner, jnp.asarray(speeds, jnp.float32), 8192, 8.0, 1.0, 4.0)
    turns = 8192 * speeds / (2 * np.pi)
    between = (turns > 1) & (turns < 4)

    def blend(turns):
        """Slowed below one, kept above four."""
        return speeds / 8 + (speeds - speeds / 8) * np.interp(turns, [1, 4], [0, 1])

    expect_close(
        found,
        wanted,
        "the new speeds",
        axes="[H/2]",
        rtol=1e-4,
        atol=1e-10,
        unlike={
            "nothing-stretched": (speeds, "these are the old speeds", "pairs with fewer than `low` turns"),
            "all-slowed": (speeds / 8, "every pair is slowed down", "fast pairs stay as they are"),
            "fast-ones-slowed": (
                speeds + speeds / 8 - blend(turns),
                "the fast pairs are slowed and the slow ones kept",
                "which ones never came round",
            ),
            "blend-swapped": (
                np.where(between, speeds + speeds / 8 - wanted, wanted),
                "between the two bounds, near `low` is kept and near `high` is slowed",
                "s is 0 at `low` turns",
            ),
            "kept-between-the-bounds": (
                np.where(between, speeds, wanted),
                "between the bounds the speed is kept: the change comes with a jump",
                "the blend",
            ),
            "slowed-between-the-bounds": (
                np.where(between, speeds / 8, wanted),
                "between the bounds the speed is divided: the change comes with a jump",
                "the blend",
            ),
            "not-clipped": (
                speeds / 8 + (speeds - speeds / 8) * (turns - 1) / 3,
                "s leaves the range from 0 to 1",
                "pairs with more than `high` turns",
            ),
            "radians-for-turns": (
                blend(2 * np.pi * turns),
                "a turn is counted for every radian",
                "a full turn is 2 pi radians",
            ),
            "speeded-up": (
                speeds * 8 + (speeds - speeds * 8) * np.interp(turns, [1, 4], [0, 1]),
                "the slow pairs are made faster",
                "divided by factor",
            ),
        },
    )
    return "Equal to what transformers computes for Llama 3.1"
