"""Checks of chapter 7: norms, rotations, shared key heads, cache bytes, sizes, stretched RoPE."""

import numpy as np

from utils.course.checks import array, call, exercise, expect, expect_close, expect_shape, normal


@exercise("7.1")
def fold(learner):
    import jax.numpy as jnp

    weight, W = np.array([2.0, 10, 0.5]), np.array([[1.0, 2, 4], [3, -1, 6], [5, 7, -2]])
    folded = np.array([[2.0, 20, 2], [6, -10, 3], [10, 70, -1]])
    expect_close(
        call(learner, jnp.asarray(weight), jnp.asarray(W)),
        folded,
        "the folded matrix",
        axes="[out, in]",
        unlike={
            "rows-scaled": (
                [[2, 4, 8], [30, -10, 60], [2.5, 3.5, -1]],
                "each row is scaled, which changes the outputs and not the inputs",
                "which axis of W the normalised input runs along",
            ),
            "unchanged": (W, "this is W itself", "what the norm's weight multiplies"),
            "divided": (
                [[0.5, 0.2, 8], [1.5, -0.1, 12], [2.5, 0.7, -4]],
                "the weight is divided out",
                "what the norm did with its weight",
            ),
            "already-multiplied": (
                [24, -1, 79],
                "this is W applied to the weight, a vector",
                "the shape: a matrix is wanted, not its product",
            ),
            "transposed": (folded.T, "the result is [in, out]", "the order of the axes"),
        },
    )
    narrow = call(learner, jnp.asarray(weight), jnp.asarray(W[:2]))
    expect_shape(narrow, (2, 3), "the folded matrix of two rows", "[out, in]")
    return "The norm before it may now have a weight of ones"


@exercise("7.2")
def rope_complex(learner):
    import jax.numpy as jnp

    from utils import rope
    from utils.transformer import Config

    T, H, base = 5, 12, 100.0
    x, positions = normal(T, H, seed=3), np.array([0, 1, 2, 7, 40])

    def package(x=x, positions=positions, base=base):
        """The package's own rotation of one head, in Hugging Face's layout."""
        config = Config("llama", 8, H, 1, 1, 1, H, 8, 64, base, 1e-6, True, False)
        cos, sin = rope.rope_tables(jnp.asarray(positions)[None], config)
        return np.asarray(rope.apply_rope(jnp.asarray(x)[None, :, None], cos, sin)[0, :, 0])

    # Number 2 i of the pairs side by side is number i of the halves, number 2 i + 1 is i + H/2.
    to_halves = [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]
    to_neighbours = [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]
    answer = call(learner, jnp.asarray(x), jnp.asarray(positions), base)
    expect(
        not np.iscomplexobj(np.asarray(answer)),
        "still-complex",
        "the answer holds complex numbers",
        "the real and the imaginary parts go back to their halves",
    )
    look = "the two halves of x"
    expect_close(
        answer,
        package(),
        "the turned head",
        axes="[T, H]",
        rtol=1e-3,
        atol=1e-4,
        unlike={
            "neighbours-paired": (
                package(x[:, to_halves])[:, to_neighbours],
                "numbers 2 i and 2 i + 1 form the pairs, Meta's layout",
                look,
            ),
            "written-back-interleaved": (
                package()[:, to_neighbours],
                "the pairs are read from the halves and written back as neighbours",
                "how the parts are joined at the end",
            ),
            "turned-backwards": (
                package(positions=-positions),
                "every pair turns the other way",
                "the sign of the angle",
            ),
            "half-the-exponent": (
                package(base=10.0),
                "the speeds fall as base ** (-i / H)",
                "there are H / 2 pairs, and the last is almost base times slower",
            ),
            "parts-exchanged": (
                np.roll(package(), H // 2, axis=-1),
                "the two halves of the answer have changed places",
                "which part of z was the first half",
            ),
            "counted-from-one": (
                package(positions=positions + 1),
                "position 0 is turned",
                "what is given as positions",
            ),
            "positions-ignored": (
                package(positions=np.arange(T)),
                "row t stands at position t",
                "what is given as positions",
            ),
            "base-ignored": (package(base=10_000.0), "the base is 10,000", "what is given as base"),
            "all-pairs-alike": (
                package(base=1.0),
                "every pair turns at the same speed",
                "the speed of pair i",
            ),
        },
    )
    return "One complex product is four real ones"


@exercise("7.3")
def expand(learner):
    import jax.numpy as jnp

    k = normal(2, 5, 3, 4, seed=4)
    expanded = call(learner, jnp.asarray(k), 6)
    shape = np.shape(array(expanded, "the expanded keys"))
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
        expanded,
        k[:, :, [0, 0, 1, 1, 2, 2]],
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

    # 5 layers, 3 key/value heads of 16 numbers, 4 texts: 2604.9 tokens
    config = Config("qwen2", 100, 64, 5, 12, 3, 16, 8, 10**6, 1e4, 1e-6, True, True)
    tokens = float(array(call(learner, config, 10_003_000, 4), "the tokens that fit"))
    expect(
        tokens.is_integer(),
        "not-whole",
        f"{tokens:.2f} tokens: there are no parts of tokens",
        "the kind of division",
    )
    expect_close(
        tokens,
        2604,
        "the tokens that fit",
        rtol=0,
        atol=0.1,
        unlike={
            "query-heads-counted": (
                651,
                "this counts the query heads, which keep nothing",
                "which heads have keys",
            ),
            "rounded-up": (2605, "this is more than fits", "the kind of division"),
            "keys-without-values": (
                5209,
                "one factor of two is missing: keys and values, and two bytes a number",
                "the two twos",
            ),
            "one-text-only": (10419, "the memory is given to one text", "batch_size"),
            "one-layer-only": (
                13024,
                "the cache of one layer is counted",
                "each layer keeps its own keys",
            ),
            "float32-counted": (1302, "numbers of 4 bytes are counted", "bfloat16"),
            "head-size-guessed": (
                8335,
                "a head is taken for D / N numbers",
                "config.head_dim, a field of its own",
            ),
            "width-for-heads": (
                1953,
                "D numbers are counted for a token's keys",
                "K H of them",
            ),
        },
    )
    return "A budget of bytes, in tokens"


@exercise("7.5")
def swiglu_width(learner):
    cases = [(4096, 256), (96, 1), (100, 1), (512, 64), (3072, 8)]
    expect_close(
        [array(call(learner, *case), "F") for case in cases],
        [11008, 256, 267, 1408, 8192],
        "F for five models",
        rtol=0,
        atol=1e-6,
        unlike={
            "rounded-down": (
                [10752, 256, 266, 1344, 8192],
                "F is rounded down",
                "at least as many parameters",
            ),
            "rounded-to-nearest": (
                [11008, 256, 267, 1344, 8192],
                "F is rounded to the nearest",
                "at least as many parameters",
            ),
            "rounded-down-first": (
                [11008, 256, 266, 1408, 8192],
                "8 D / 3 is rounded down before it is rounded up",
                "at least as many parameters",
            ),
            "steps-not-width": (
                [43, 256, 267, 22, 1024],
                "these are multiples, counted",
                "F itself",
            ),
            "four-D-kept": (
                [16384, 384, 400, 2048, 12288],
                "this is MiniGPT's intermediate size",
                "three matrices must cost what two cost",
            ),
            "half-of-it": (
                [8192, 192, 200, 1024, 6144],
                "this F is 2 D",
                "SwiGLU has three matrices, not four",
            ),
            "not-a-multiple": (
                [10923, 256, 267, 1366, 8192],
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
            "head-counted-too": (
                134_515_008 + V * D,
                "the table is counted twice",
                "tie_word_embeddings",
            ),
            "as-many-key-heads-as-query-heads": (
                134_515_008 + L * 2 * D * (D - kv),
                "k_proj and v_proj are counted as square",
                "num_key_value_heads",
            ),
            "biases-counted": (
                134_515_008 + L * (D + 2 * kv),
                "biases are counted",
                "model_type: a Llama has none",
            ),
            "two-matrices-in-the-mlp": (
                134_515_008 - L * D * F,
                "the MLP has two matrices",
                "swap four",
            ),
            "norms-forgotten": (
                134_515_008 - (2 * L + 1) * D,
                "the norms are missing",
                "two a block, and one",
            ),
            "one-norm-a-block": (
                134_515_008 - L * D,
                "each block has one norm",
                "what stands before attention, and before the MLP",
            ),
            "last-norm-forgotten": (
                134_515_008 - D,
                "one norm is missing",
                "what stands before the output layer",
            ),
            "o-proj-forgotten": (
                134_515_008 - L * D * D,
                "a square matrix per layer is missing",
                "o_proj",
            ),
        },
    )
    return "To the last parameter"


@exercise("7.7")
def stretch(learner):
    import jax.numpy as jnp

    # What transformers computes for these numbers (rope_type "llama3").
    stretched = np.array(
        [
            1.0,
            0.19392276,
            0.03760603,
            7.2926651e-3,
            5.2484602e-4,
            3.4281024e-5,
            6.6478697e-6,
            1.2891732e-6,
        ]
    )
    speeds = 500_000.0 ** (-np.arange(8) / 8)

    def but_for(pairs, value):
        """The right speeds, with others for some pairs. Pair 4, with 1.8 turns, is blended."""
        return np.where(np.isin(np.arange(8), pairs), value, stretched)

    expect_close(
        call(learner, jnp.asarray(speeds, jnp.float32), 8192, 8.0, 1.0, 4.0),
        stretched,
        "the new speeds",
        axes="[H/2]",
        rtol=1e-4,
        atol=1e-10,
        unlike={
            "nothing-stretched": (
                speeds,
                "these are the old speeds",
                "pairs with fewer than `low` turns",
            ),
            "all-slowed": (speeds / 8, "every pair is slowed down", "fast pairs stay as they are"),
            "fast-ones-slowed": (
                speeds + speeds / 8 - stretched,
                "the fast pairs are slowed and the slow ones kept",
                "which ones never came round",
            ),
            "blend-swapped": (
                but_for(4, speeds + speeds / 8 - stretched),
                "between the two bounds, near `low` is kept and near `high` is slowed",
                "s is 0 at `low` turns",
            ),
            "kept-between-the-bounds": (
                but_for(4, speeds),
                "between the bounds the speed is kept: the change comes with a jump",
                "the blend",
            ),
            "slowed-between-the-bounds": (
                but_for(4, speeds / 8),
                "between the bounds the speed is divided: the change comes with a jump",
                "the blend",
            ),
            "not-clipped": (
                [
                    380.1075,
                    14.26828,
                    0.5315213,
                    1.900866e-2,
                    5.248462e-4,
                    -1.710682e-5,
                    -7.788249e-6,
                    -1.678449e-6,
                ],
                "s leaves the range from 0 to 1",
                "pairs with more than `high` turns",
            ),
            "radians-for-turns": (
                but_for([4, 5], [0, 0, 0, 0, 1.414214e-3, 1.339987e-4, 0, 0]),
                "a turn is counted for every radian",
                "a full turn is 2 pi radians",
            ),
            "speeded-up": (
                but_for(
                    [4, 5, 6, 7], [0, 0, 0, 0, 8.529153e-3, 2.193985e-3, 4.254637e-4, 8.250708e-5]
                ),
                "the slow pairs are made faster",
                "divided by factor",
            ),
        },
    )
    return "Equal to what transformers computes for Llama 3.1"
