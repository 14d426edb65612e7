"""Byte-pair encoding: learnt from texts as in chapter 01, quick enough for a whole vocabulary.

A tokenizer turns text into integers. Byte-pair encoding (Sennrich et al. 2016; on bytes since
GPT-2) starts from the 256 bytes and adds one token at a time: count every adjacent pair of tokens
inside words, join the most frequent pair into a new token, repeat. The list of tokens in the order
in which they were added *is* the tokenizer: to encode, join the pair that was learnt first, until
no known pair is left. That last part is done by `tiktoken`, in Rust; this module learns the list,
and keeps it in tiktoken's own file format (one line per token: its bytes in base64, its id).

    ranks = train_bpe(texts, vocab_size=2048)      # bytes of token 0, 1, 2, ...
    tok = encoding(ranks, "stories2048")           # tok.encode_ordinary(text), tok.decode(ids)
    tok = get("stories2048")                       # the same, kept in the package

The last id belongs to `<|endoftext|>`, the token that ends every story and that starts the next one.
"""

import base64
import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import regex
import tiktoken

from utils import CourseError, unexpected

# GPT-2's rule for cutting text into words (Radford et al. 2019): no token ever crosses a word, and
# a space belongs to the word after it. \p{L} is any letter, \p{N} any digit, of any script.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
END_OF_TEXT = "<|endoftext|>"


def get(name: str) -> tiktoken.Encoding:
    """The tokenizer kept in the package, "stories2048"; CourseError for another name."""
    if name != "stories2048":
        fix = "a model's own comes from hf.hub.tokenizer"
        raise unexpected("tokenizer", "stories2048", repr(name), fix)
    return encoding(load(Path(__file__).parent / "assets" / "stories2048.tiktoken"), name)


def train_bpe(texts: Iterable[str], vocab_size: int) -> list[bytes]:
    """Learn a byte-level BPE: the bytes of each token, by id, 256 bytes and then the merges in order.

    `vocab_size` counts the end-of-text token, which has no bytes: the list has `vocab_size - 1`
    entries, or fewer when the texts have no pair left to join. Ties go to the pair whose bytes come
    first, so the result depends on the counts alone.
    """
    if vocab_size < 257:
        expected = f"at least 257 (256 bytes and {END_OF_TEXT})"
        raise unexpected("vocab_size", expected, vocab_size)
    counts = Counter(word for text in texts for word in regex.findall(PATTERN, text))
    words = [[bytes([byte]) for byte in word.encode()] for word in counts]
    weights = list(counts.values())

    # How often each pair occurs, and in which words: a merge touches only the words that have its pair.
    pairs: Counter[tuple[bytes, bytes]] = Counter()
    places: defaultdict[tuple[bytes, bytes], set[int]] = defaultdict(set)
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += weights[i]
            places[pair].add(i)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)

    ranks = [bytes([byte]) for byte in range(256)]
    known = set(ranks)
    while len(ranks) < vocab_size - 1 and heap:
        count, pair = heapq.heappop(heap)
        if -count != pairs[pair]:  # out of date: put the true count back, if any is left
            if pairs[pair] > 0:
                heapq.heappush(heap, (-pairs[pair], pair))
            continue
        joined = pair[0] + pair[1]
        if joined not in known:  # (a, bc) and (ab, c) spell one token
            ranks.append(joined)
            known.add(joined)
        changed = set()
        for i in places.pop(pair):
            old, new = words[i], merge(words[i], pair)
            for before in zip(old, old[1:]):
                pairs[before] -= weights[i]
            for after in zip(new, new[1:]):
                pairs[after] += weights[i]
                places[after].add(i)
                changed.add(after)
            words[i] = new
        for after in changed:
            heapq.heappush(heap, (-pairs[after], after))
    return ranks


def merge(word: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    """Join every occurrence of `pair` in a word, left to right."""
    out, i = [], 0
    while i < len(word):
        if i + 1 < len(word) and (word[i], word[i + 1]) == pair:
            out.append(word[i] + word[i + 1])
            i += 2
        else:
            out.append(word[i])
            i += 1
    return out


def encoding(ranks: list[bytes], name: str) -> tiktoken.Encoding:
    """A tiktoken encoder for these tokens; `<|endoftext|>` gets the id after the last of them."""
    return tiktoken.Encoding(
        name,
        pat_str=PATTERN,
        mergeable_ranks={token: i for i, token in enumerate(ranks)},
        special_tokens={END_OF_TEXT: len(ranks)},
    )


def save(path: str | Path, ranks: list[bytes]) -> None:
    """Write the tokens in tiktoken's file format: `base64(bytes) id`, one token a line."""
    lines = (f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(ranks))
    Path(path).write_text("".join(lines), encoding="ascii")


def load(path: str | Path) -> list[bytes]:
    """Read a file that `save` wrote. Raises `CourseError` that names the first line that is wrong."""
    ranks: list[bytes] = []
    try:
        lines = Path(path).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError as error:
        how = f"could not be read ({error.strerror}): name a .tiktoken file"
        raise CourseError(f"{path}: {how}") from None
    for number, line in enumerate(lines, start=1):
        try:
            token, rank = line.split()
            if int(rank) != len(ranks):
                raise ValueError
            ranks.append(base64.b64decode(token, validate=True))
        except ValueError:
            expected, fix = f"'base64 {len(ranks)}'", "is this a .tiktoken file, and whole?"
            raise unexpected(f"{path}, line {number}", expected, repr(line[:40]), fix) from None
    if len(ranks) < 256 or len(set(ranks)) != len(ranks):
        found = f"{len(set(ranks))} different tokens"
        raise unexpected(path, "256 bytes and more, each once", found)
    return ranks
