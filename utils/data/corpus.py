"""A corpus: one text file of stories joined by lines of `<|endoftext|>`, and its step to token ids.

`read_stories` reads a file and refuses one that is not in this format; `encode` turns each story
into token ids.
"""

from pathlib import Path

import numpy as np
import tiktoken
from jaxtyping import Int32

from utils import unexpected

SEPARATOR = "<|endoftext|>"
PIECE = 1 << 22  # bytes read at a time where a limit is given


def split_stories(text: bytes, name: str = "corpus") -> list[str]:
    """The stories of a corpus, stripped, without empty ones; `name` is what errors call it.

    Raises CourseError for an empty file, invalid UTF-8, no separator, or fewer than two stories.
    """
    form = f"stories joined by lines of {SEPARATOR}"
    if not text.strip():
        raise unexpected(name, form, "an empty file", "download or write it again")
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{text[error.start]:02x} at offset {error.start:,}"
        fix = "save the file as UTF-8, or download it again"
        raise unexpected(name, "UTF-8", found, fix) from None
    if SEPARATOR not in decoded:
        found = f"no separator in {len(text):,} bytes"
        raise unexpected(name, form, found, "put one between stories")
    split = [story for part in decoded.split(SEPARATOR) if (story := part.strip())]
    if len(split) < 2:
        raise unexpected(name, f"at least 2 {form}", len(split), "add stories")
    return split


def read_stories(path: Path, limit: int | None = None) -> list[str]:
    """The first `limit` stories of a file (default: all), reading no further: one file has 1.9 GB."""
    if limit is None:
        return split_stories(path.read_bytes(), path.name)
    mark, parts, tail, seen = SEPARATOR.encode(), [], b"", 0
    with open(path, "rb") as file:
        while seen <= limit and (piece := file.read(PIECE)):
            # The tail may end inside a story, a separator, a character: the next piece goes on.
            *complete, tail = (tail + piece).split(mark)
            parts += complete
            seen += sum(bool(part.strip()) for part in complete)
    if seen <= limit:  # the file ended first: its tail is a story too
        parts.append(tail)
    return split_stories(mark.join(parts), path.name)[:limit]


def encode(texts: list[str], tok: tiktoken.Encoding) -> list[Int32[np.ndarray, " T"]]:
    """Token ids of each story, without the end-of-story token. Raises CourseError for no story."""
    if not texts:
        fix = "check the limit and the split"
        raise unexpected("encode", "at least one story", "none", fix)
    return [np.array(ids, np.int32) for ids in tok.encode_ordinary_batch(texts, num_threads=2)]
