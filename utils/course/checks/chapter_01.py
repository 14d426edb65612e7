"""Checks of chapter 1: merges, characters per token, embedding share, padding, masks, streaming."""

import numpy as np

from utils.course.checks import Mistake, array, attempted, call, exercise, expect, expect_close


@exercise("1.1")
def first_three_merges(learner):
    attempted(learner)
    if not isinstance(learner, (list, tuple)) or len(learner) != 3:
        raise Mistake(
            "wrong-type", "expected a list of three strings", 'a list such as ["si", "sin", "sing"]'
        )
    attempted(*learner)
    tokens = [t.decode(errors="replace") if isinstance(t, bytes) else str(t) for t in learner]
    first, second, third = (token.replace(" ", "").replace("+", "") for token in tokens)
    expect(
        (second, third) != ("ng", "nk"),
        "not-recounted",
        "these are the three commonest pairs of the first count, and joining one changes the others",
        "how many of the pair n g are left once i n has become one token",
    )
    expect(
        third not in ("sing", "ring", "ings"),
        "words-counted-once",
        "a pair counts as often as its words occur, not once for each distinct word",
        "the counts beside the words: ink alone occurs 7 times",
    )
    shapes = zip((first, second, third), ((2, "in"), (3, "in"), (3, "in")))
    expect(
        all(len(token) == n and token.startswith(start) for token, (n, start) in shapes)
        and {second[-1], third[-1]} == {"g", "k"},
        "wrong-values",
        f"these are not the first three tokens: {first}, {second}, {third}",
        "the count of every pair, with a fresh count after each join",
    )
    expect(
        second[-1] == "g",
        "order-swapped",
        "the tokens are right and their order is not",
        "which of the two pairs is commoner once i n is joined",
    )


class _Halves:
    """A tokenizer in miniature with tiktoken's methods: a token for every two bytes begun."""

    eot_token, n_vocab = 2047, 2048

    def encode_ordinary(self, text):
        return [0] * -(-len(text.encode()) // 2)

    def encode(self, text, **kwargs):
        return self.encode_ordinary(text)

    def encode_ordinary_batch(self, texts, **kwargs):
        return [self.encode_ordinary(text) for text in texts]

    encode_batch = encode_ordinary_batch


@exercise("1.2")
def characters_per_token(learner):
    # 20 + 5 + 1 characters, 20 + 10 + 1 bytes, 10 + 5 + 1 tokens
    expect_close(
        call(learner, _Halves(), ["a" * 20, "äöüéß", "I"]),
        1.625,
        "the characters per token",
        unlike={
            "mean-of-ratios": (
                4 / 3,
                "this is the mean over texts of each text's own ratio, "
                "so a text of one letter counts as much as a story",
                "sum first, divide once",
            ),
            "bytes-not-characters": (
                31 / 16,
                "this counts the bytes of the text, and ä has two",
                "what len counts for a string, and what it counts after encode()",
            ),
            "upside-down": (
                16 / 26,
                "this is tokens per character",
                "which of the two sums is divided by the other",
            ),
        },
    )


@exercise("1.3")
def largest_vocabulary(learner):
    # The three arguments; the answer, the embedding's numbers, and the share of the rest alone.
    cases = (
        ((128, 410_000, 0.5), (3203, 410_000, 1601.6)),
        ((256, 3_000_000, 0.1), (1302, 333_333.3, 1171.9)),
        ((64, 50_001, 0.8), (3125, 200_004, 625.0)),
    )
    for (hidden_size, rest, share), (largest, numbers, of_the_rest) in cases:
        value = float(array(call(learner, hidden_size, rest, share), "the vocabulary size"))
        what = f"hidden_size {hidden_size}, rest {rest:,}, share {share}"
        expect(
            abs(value - numbers) > 2,
            "parameters-not-rows",
            f"this is the embedding's number of parameters ({what}), not its number of rows",
            "how many parameters one token of the vocabulary costs",
        )
        expect(
            abs(value - of_the_rest) > 2,
            "share-of-the-rest",
            f"this makes the embedding a share of the other parameters, not of all ({what})",
            "the embedding is part of the whole too: it stands on both sides of the inequality",
        )
        expect(
            not largest < value < largest + 1.5,
            "over-the-limit",
            f"with {value:g} tokens the embedding is more than {share:.0%} of the model ({what})",
            "which way the last step rounds",
        )
        expect_close(value, largest, f"the vocabulary ({what})", rtol=0, atol=1e-9)


@exercise("1.4")
def padding_cost(learner):
    # kept at context 10: 4 + 10 + 10 = 24 of 44 tokens and of 30 positions
    expect_close(
        call(learner, np.array([4, 30, 10]), 10),
        (0.2, 20 / 44),
        "(wasted, dropped)",
        unlike={
            "long-stories-not-cut": (
                (1 - 44 / 30, 0.0),
                "a story longer than the context counts with its full length, so the waste comes out below zero",
                "how many tokens of a story of 30 a row of 10 can hold",
            ),
            "dropped-over-positions": (
                (0.2, 20 / 30),
                "the dropped tokens are divided by the positions of the rows",
                "dropped is a share of the text",
            ),
            "mean-over-stories": (
                (0.2, 2 / 9),
                "this is the mean of each story's own share, so a short story counts as much as a long one",
                "all dropped tokens over all tokens",
            ),
            "swapped": (
                (20 / 44, 0.2),
                "the two numbers are in the other order",
                "wasted comes first",
            ),
        },
    )
    expect_close(call(learner, [5, 5], 10), (0.5, 0.0), "(wasted, dropped) for two short stories")


@exercise("1.5")
def training_row(learner):
    E = 9
    tokens = np.array([E, 5, 6, E, 7, 8, E, E, E], np.int32)
    segment_ids = np.array([1, 1, 1, 2, 2, 2, 0, 0, 0], np.int32)
    result = call(learner, tokens.copy(), segment_ids.copy())
    if not isinstance(result, (tuple, list)) or len(result) != 3:
        raise Mistake(
            "wrong-type", "expected three arrays: inputs, targets, mask", "the return line"
        )
    names = ("the inputs", "the targets", "the mask")
    inputs, targets, mask = (array(part, name) for part, name in zip(result, names))
    expect(
        not (inputs.shape == targets.shape and np.array_equal(inputs, targets)),
        "targets-not-shifted",
        "the targets are the inputs: a model learns to copy, with a loss of zero",
        "which end of the row each of the two loses",
    )
    expect_close(inputs, [E, 5, 6, E, 7, 8, E, E], "the inputs", axes="[T - 1]")
    expect_close(targets, [5, 6, E, 7, 8, E, E, E], "the targets", axes="[T - 1]")
    expect_close(
        np.asarray(mask, float),
        [1, 1, 1, 1, 1, 1, 0, 0],
        "the mask",
        axes="[T - 1]",
        unlike={
            "end-never-learned": (
                [1, 1, 0, 1, 1, 0, 0, 0],
                "the end of a story is masked out wherever it occurs, so the model would never stop",
                "the target after the last word of a story",
            ),
            "last-end-lost": (
                [1, 1, 1, 1, 1, 0, 0, 0],
                "the end of the row's last story is not learned, because its target stands in the padding",
                "whether the segment of the input or of the target decides",
            ),
            "padding-learned": (
                [1, 1, 1, 1, 1, 1, 1, 1],
                "the padding is learned: after an end of a story, the model would say the end for ever",
                "the positions whose input is padding",
            ),
        },
    )


class _Bytes:
    """A tokenizer with tiktoken's decoding methods; token i has the bytes of entry i."""

    def __init__(self, *tokens):
        self.tokens = tokens

    def decode_single_token_bytes(self, i):
        return self.tokens[i]

    def decode_bytes(self, ids):
        return b"".join(self.tokens[i] for i in ids)

    def decode(self, ids, errors="replace"):
        return self.decode_bytes(ids).decode("utf-8", errors=errors)


@exercise("1.6")
def stream(learner):
    # "Hi 🙂, née": the smile in three tokens, é in two, and then a text that stops in a character
    tok = _Bytes(b"Hi ", b"\xf0", b"\x9f\x99", b"\x82,", b" n\xc3", b"\xa9e", b"!\xf0\x9f")
    ids = list(range(6))
    pieces = call(list, call(learner, tok, list(ids)))
    if not all(isinstance(piece, str) for piece in pieces):
        raise Mistake("wrong-type", "expected pieces of text (str)", "what decode gives for bytes")
    whole, marks = tok.decode(ids), "\ufffd"
    expect(
        marks not in "".join(pieces),
        "half-characters",
        "a replacement mark came out where a character was cut by a token's border",
        "the bytes of a token that do not make a whole character yet: where do they wait",
    )
    expect(
        sum(bool(piece) for piece in pieces) > 1,
        "waits-for-the-end",
        "all text came in one piece, so nothing was streamed",
        "what can be shown after the first token already",
    )
    joined = "".join(pieces)
    expect(
        len(joined) >= len(whole),
        "characters-lost",
        f"{len(whole) - len(joined)} characters never came out: {joined!r} for {whole!r}",
        "where the bytes go that cannot be decoded yet",
    )
    expect(joined == whole, "wrong-values", f"the pieces joined are {joined!r}, expected {whole!r}")
    for n in range(1, len(ids) + 1 if len(pieces) >= len(ids) else 1):
        complete = tok.decode_bytes(ids[:n]).decode("utf-8", errors="ignore")
        given = "".join(pieces[:n])
        expect(
            len(given) >= len(complete),
            "late",
            f"after {n} tokens {complete!r} is complete, and only {given!r} was given",
            "hold back the unfinished character alone, not the token it came with",
        )
    cut = "".join(call(list, call(learner, tok, [0, 6])))
    expect(
        cut.startswith("Hi !"),
        "characters-lost",
        f"a text that stops inside a character lost more than that character: {cut!r}",
        "what is still held back when the tokens end",
    )
    expect(
        marks in cut,
        "end-forgotten",
        f"the text stopped inside a character, and nothing shows it: {cut!r} for {tok.decode([0, 6])!r}",
        "what the decoder still holds after the last token",
    )
    return "Also for a text that stops inside a character"
