"""The course's byte-pair encoding: the counts alone decide, and every text comes back."""

import random
from collections import Counter

import pytest
import regex

from tests.helpers import tiny
from utils import CourseError
from utils.course import tokenizer


def naive(texts, vocab_size):
    """Count all pairs again before each merge; ties to the pair whose bytes come first."""
    counts = Counter(word for text in texts for word in regex.findall(tokenizer.PATTERN, text))
    words = {word: [bytes([b]) for b in word.encode()] for word in counts}
    ranks = [bytes([b]) for b in range(256)]
    while len(ranks) < vocab_size - 1:
        pairs = Counter()
        for word, parts in words.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if b"".join(best) not in ranks:
            ranks.append(b"".join(best))
        words = {word: tokenizer.merge(parts, best) for word, parts in words.items()}
    return ranks


@pytest.mark.parametrize("seed", range(6))
def test_it_equals_the_naive_way_on_random_words(seed):
    rng = random.Random(seed)
    texts = ["".join(rng.choice("aabbc ") for _ in range(rng.randrange(1, 60))) for _ in range(20)]
    assert tokenizer.train_bpe(texts, 300) == naive(texts, 300)


def test_it_equals_the_naive_way_on_stories():
    texts = tiny.texts()[:12]
    assert tokenizer.train_bpe(texts, 360) == naive(texts, 360)


def test_the_order_of_the_texts_does_not_matter():
    texts = list(tiny.texts())
    assert tokenizer.train_bpe(texts, 380) == tokenizer.train_bpe(texts[::-1], 380)


def test_a_small_case_by_hand():
    # "aaab" twice: the pair (a, a) occurs 4 times, then (aa, a) and (a, b) twice each: (a, b) comes first.
    assert tokenizer.train_bpe(["aaab aaab"], 259)[256:] == [b"aa", b"ab"]


def test_it_stops_when_no_pair_is_left():
    ranks = tokenizer.train_bpe(["ab"], 1000)
    assert ranks[256:] == [b"ab"] and tokenizer.encoding(ranks, "x").n_vocab == 258


@pytest.mark.parametrize(
    "tok", [tiny.tok(), tokenizer.get("stories2048")], ids=["tiny", "stories2048"]
)
def test_every_text_comes_back(tok):
    rng = random.Random(0)
    alphabet = (
        [chr(c) for c in range(0x20, 0x3000)]
        + list("\n\t\r\0 🎈é中")
        + [chr(rng.randrange(0x10000, 0x10FFFF)) for _ in range(50)]
    )
    texts = ["", " ", "\n\n", "don't", "<|endoftext|>"] + [
        "".join(rng.choice(alphabet) for _ in range(rng.randrange(80))) for _ in range(300)
    ]
    for text in texts:
        ids = tok.encode_ordinary(text)
        assert tok.decode(ids) == text and tok.eot_token not in ids


def test_a_token_of_the_list_is_encoded_as_itself():
    ranks = tokenizer.train_bpe(tiny.texts(), 400)
    for i, token in enumerate(ranks[256:], start=256):
        assert tiny.tok().encode_single_token(token) == i
    assert tiny.tok().eot_token == len(ranks) == tiny.tok().n_vocab - 1


def test_saved_and_loaded_is_the_same(tmp_path):
    ranks = tokenizer.train_bpe(tiny.texts(), 400)
    tokenizer.save(tmp_path / "x.tiktoken", ranks)
    assert tokenizer.load(tmp_path / "x.tiktoken") == ranks


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda b: b[: len(b) // 2 - 1], "expected"),
        (lambda b: b[:100], "expected"),
        (lambda b: b"", "expected 256 bytes and more"),
        (lambda b: b.replace(b"\n", b" 5\n", 1), "line 1: expected 'base64 0'"),
        (lambda b: b.replace(b" 300\n", b" 301\n"), "line 301: expected 'base64 300'"),
        (lambda b: b"\xff\xfe" + b, "line 1: expected"),
        (lambda b: b.split(b"\n", 1)[1], "line 1: expected 'base64 0'"),
        (
            lambda b: b.replace(
                b.split(b"\n")[70].split()[0] + b" ", b.split(b"\n")[71].split()[0] + b" "
            ),
            "different tokens",
        ),
    ],
)
def test_a_damaged_file_is_one_clear_error(tmp_path, harm, message):
    path = tmp_path / "x.tiktoken"
    tokenizer.save(path, tokenizer.train_bpe(tiny.texts(), 400))
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(CourseError, match=message) as error:
        tokenizer.load(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_one_clear_error(tmp_path):
    with pytest.raises(CourseError, match="could not be read"):
        tokenizer.load(tmp_path / "none.tiktoken")


def test_a_vocabulary_without_room_for_the_bytes_is_an_error():
    with pytest.raises(CourseError, match="expected at least 257"):
        tokenizer.train_bpe(["x"], 256)


def test_an_unknown_name_is_one_clear_error():
    with pytest.raises(
        CourseError, match="expected stories2048, found 'gpt5': .*hf.hub.tokenizer"
    ) as error:
        tokenizer.get("gpt5")
    assert "\n" not in str(error.value)
