"""Checks of chapter 9: cache bytes, a ceiling, penalty, stop strings, positions, drafts."""

from types import SimpleNamespace

import numpy as np

from utils.course.checks import (
    Mistake,
    array,
    attempted,
    call,
    exercise,
    expect,
    expect_close,
    is_close,
)


@exercise("9.1")
def kv_bytes(learner):
    def config(layers, heads, kv_heads, head_dim, hidden_size):
        return SimpleNamespace(
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            hidden_size=hidden_size,
        )

    right = 18_480
    expect_close(
        call(learner, config(5, 12, 3, 7, 96), 2, 11, 4),
        right,
        "the bytes of the cache",
        unlike={
            "keys-without-values": (
                right / 2,
                "this is half of it",
                "a token leaves a key and a value",
            ),
            "query-heads": (
                right * 4,
                "this counts the query heads",
                "several query heads share one key",
            ),
            "model-width": (
                right * 96 / 21,
                "this stores a vector of the hidden size",
                "what k_proj gives out",
            ),
            "one-layer": (right / 5, "this is one layer's cache", "each layer has its own"),
            "numbers-not-bytes": (right / 4, "these are numbers, not bytes", "itemsize"),
            "one-row": (right / 2, "this is one row's cache", "batch_size"),
        },
    )
    expect_close(
        call(learner, config(1, 1, 1, 3, 9), 1, 1, 2), 12, "the bytes of a cache of one token"
    )
    return "28,672 bytes a token for R1"


@exercise("9.2")
def tokens_per_second(learner):
    expect_close(
        call(learner, 300.0, 20.0, 4, 1000.0),
        10.526316,
        "the tokens per second",
        unlike={
            "cache-left-out": (
                13.333333,
                "the caches are read for nothing",
                "what grows with the rows",
            ),
            "cache-once": (12.5, "all rows read one cache", "whose keys a row looks at"),
            "weights-for-each-row": (
                3.125,
                "each row reads the weights for itself",
                "what a batch shares",
            ),
            "steps-not-tokens": (
                2.631579,
                "these are steps per second",
                "how many tokens a step gives",
            ),
            "seconds-not-rate": (0.095, "this is the time of one token", "tokens per second"),
        },
    )
    large = array(call(learner, 300.0, 20.0, 100_000, 1000.0), "the tokens per second of many rows")
    expect(
        is_close(large, 50, rtol=1e-2),
        "wrong-values",
        f"for very many rows, expected close to 50, found {large:.4g}",
    )
    return "With many rows it tends to bandwidth over cache bytes: 50 in the check's numbers"


@exercise("9.3")
def penalised(learner):
    logits, ids, penalty = np.array([2.0, -2.0, 1.0, 0.0, -1.0]), [0, 1, 0, 0, 3], 1.25
    given = logits.copy()
    answer = call(learner, given, ids, penalty)
    expect(
        np.array_equal(given, logits),
        "changes-its-input",
        "the logits that were given are changed",
        "a copy: the caller still needs them",
    )
    expect_close(
        answer,
        [1.6, -2.5, 1.0, 0.0, -1.0],
        "the penalised logits",
        axes="[V]",
        unlike={
            "divides-negative-logits": (
                [1.6, -1.6, 1.0, 0.0, -1.0],
                "a negative logit divided comes nearer to zero: the token became more likely",
                "the two signs",
            ),
            "once-per-occurrence": (
                [1.024, -2.5, 1.0, 0.0, -1.0],
                "a token that occurred three times is punished three times",
                "whether a token was seen, not how often",
            ),
            "subtracts": (
                [0.75, -3.25, 1.0, -1.25, -1.0],
                "the penalty is subtracted",
                "the formula of the page",
            ),
            "punishes-the-others": (
                [2.0, -2.0, 0.8, 0.0, -1.25],
                "the tokens not seen are punished",
                "which tokens",
            ),
            "rewards": (
                [2.5, -1.6, 1.0, 0.0, -1.0],
                "seen tokens became more likely",
                "divide and multiply, swapped",
            ),
            "zero-treated-as-likely": (
                [1.6, -2.5, 1.0, 1.25, -1.0],
                "a logit of 0 changed",
                "what 0 times a number is",
            ),
        },
    )
    return "Both signs, and a token seen three times is punished once"


def _triple(value):
    attempted(value)
    if not isinstance(value, tuple | list) or len(value) != 3:
        raise Mistake(
            "wrong-type", f"expected three things (send, hold, found), found {value!r:.60}"
        )
    send, hold, stopped = value
    if not isinstance(send, str) or not isinstance(hold, str):
        raise Mistake(
            "wrong-type", f"expected two texts and whether it was found, found {value!r:.60}"
        )
    return send, hold, bool(stopped)


@exercise("9.4")
def cut(learner):
    stop = "<end>"

    def ask(held, stop=stop):
        return _triple(call(learner, held, stop))

    send, hold, stopped = ask("one two<end>three")
    expect(
        stopped,
        "misses-the-stop",
        "the stop string is in the text, and was not found",
        "a search before the rest",
    )
    expect(
        stop not in send,
        "stop-string-sent",
        f"sent {send!r}: the stop string is no part of the answer",
        "the cut",
    )
    expect(
        send == "one two",
        "wrong-cut",
        f"before the stop stands 'one two', sent {send!r}",
        "what comes before",
    )
    expect(
        hold == "",
        "holds-after-the-stop",
        f"after the stop nothing is needed, held {hold!r}",
        "the second result",
    )
    send, hold, stopped = ask("one two<en")
    expect(
        not stopped,
        "half-a-stop-is-a-stop",
        "'<en' is not yet the stop string",
        "when the third result is true",
    )
    expect(
        hold != "" or send != "one two<en",
        "half-a-stop-sent",
        "'<en' was sent, and could not be taken back when 'd>' came",
        "ends that are a beginning of the stop string",
    )
    expect(
        send + hold == "one two<en",
        "loses-text",
        f"sent {send!r} and held {hold!r}: together not the text",
        "slices",
    )
    expect(
        len(hold) >= 3,
        "holds-too-little",
        f"held {hold!r}: the longest end that begins the stop string is '<en'",
        "which of several ends to try first",
    )
    send, hold, stopped = ask("no stop here")
    expect(
        hold == "",
        "holds-too-much",
        f"held {hold!r}, which can be no part of a stop string: the reader waits for nothing",
        "hold back an end only if the stop string begins with it",
    )
    expect(
        (send, stopped) == ("no stop here", False),
        "loses-text",
        f"sent {send!r} of 'no stop here'",
        "the last case",
    )
    for held, word, right in (
        ("a b aab", "aabb", ("a b ", "aab", False)),
        ("xx", "x", ("", "", True)),
        ("aaa", "aab", ("a", "aa", False)),
        ("", "ab", ("", "", False)),
        ("ab", "b!", ("a", "b", False)),
    ):
        got = ask(held, word)
        expect(
            got[0] + got[1] != held or len(got[1]) >= len(right[1]),
            "holds-too-little",
            f"for {held!r} and stop {word!r} held {got[1]!r}: a longer end begins the stop string too",
            "which of several ends to try first",
        )
        expect(
            got == right,
            "wrong-values",
            f"for {held!r} and stop {word!r} expected {right}, found {got}",
        )
    return "Nothing is sent that must be taken back, and nothing is held for nothing"


@exercise("9.5")
def positions(read_positions, min_cache_length):
    lengths = np.array([3, 7, 4])
    expect_close(
        call(read_positions, lengths.copy(), 1),
        [3, 7, 4],
        "the positions of the first new token",
        axes="[B]",
        unlike={
            "one-too-far": (
                [4, 8, 5],
                "this is where the token after it will stand",
                "where the prompt's last token is",
            ),
            "one-too-early": (
                [2, 6, 3],
                "the prompt's last token stands there",
                "positions count from 0",
            ),
            "the-longest-for-all": (
                [7, 7, 7],
                "a short row skips the slots of its padding",
                "each row's own length",
            ),
        },
    )
    expect_close(
        call(read_positions, lengths.copy(), 5),
        [7, 11, 8],
        "the positions after five new tokens",
        axes="[B]",
        unlike={"stands-still": ([3, 7, 4], "the position does not move on", "generated")},
    )
    expect_close(
        call(min_cache_length, lengths.copy(), 5),
        11,
        "the cache length",
        unlike={
            "slot-for-the-last": (
                12,
                "one more than needed",
                "whether anybody reads the last new token",
            ),
            "shortest-row": (7, "the longest row does not fit", "the row that needs most"),
            "all-rows-together": (26, "rows have slots of their own", "slots per row"),
            "rows-multiplied": (33, "these are the slots of all rows", "slots per row"),
        },
    )
    expect_close(
        call(min_cache_length, np.array([1]), 1),
        1,
        "the cache length for one token after a prompt of one",
    )
    return "Token and slot agree in every row"


@exercise("9.6")
def accepted(learner):
    def ask(draft, choices):
        tokens = array(call(learner, list(draft), list(choices)), "the accepted tokens")
        return [int(token) for token in tokens.ravel()]

    tokens = ask([5, 6, 7, 8], [5, 6, 9, 8, 2])
    expect(
        tokens != [5, 6],
        "throws-the-correction-away",
        "at the first wrong position the large model has said the right token",
        "choices at that position: it answers a right text",
    )
    expect(
        tokens not in ([5, 6, 8], [5, 6, 8, 2], [5, 6, 9, 8], [5, 6, 9, 8, 2]),
        "accepts-after-a-mistake",
        f"{tokens}: after the first wrong token the choices answer a text that nobody wrote",
        "where to stop",
    )
    expect(
        tokens[:3] != [5, 6, 7],
        "keeps-the-wrong-draft",
        "7 is the draft's, the large model said 9",
        "whose token it is",
    )
    expect(tokens == [5, 6, 9], "wrong-values", f"expected [5, 6, 9], found {tokens}")
    tokens = ask([5, 6], [5, 6, 7])
    expect(
        tokens != [5, 6],
        "forgets-the-last-choice",
        "a perfect draft of 2 gives 3 tokens: the large model also said what comes after it",
        "why choices is one longer than draft",
    )
    expect(
        tokens == [5, 6, 7],
        "wrong-values",
        f"for a perfect draft expected [5, 6, 7], found {tokens}",
    )
    tokens = ask([5, 6], [1, 6, 7])
    expect(
        tokens == [1],
        "wrong-values",
        f"when the first guess is wrong, expected [1], found {tokens}",
    )
    return "At least one token a pass, and always the large model's own"
