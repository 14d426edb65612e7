"""Data for the widgets, made while the site is built.

The tokenizer widget must give exactly the ids that Python gives. Two things decide them: the merges
(the kept file `utils/course/assets/stories2048.tiktoken`) and what counts as a letter, a number or
white space. Browsers differ in the last, by their Unicode version, so both are written here from
the installed tiktoken: the page holds no second copy kept by hand. Numbers that a tool measured lie
beside the scripts as JSON (`port-detective.json`), and are written as `port-detective-data.js`.
"""

from __future__ import annotations

import json
from base64 import b64decode
from itertools import groupby
from pathlib import Path

from sphinx.application import Sphinx

NAME = "stories2048"


def code_points(regex: str) -> list[list[int]]:
    """Ranges [first, last] of the code points that tiktoken's own regex engine puts in a class such
    as `\\p{L}`.

    One encoding knows the 256 bytes alone, and drops what its pattern does not match: what
    comes back is the class.
    """
    import tiktoken

    probe = tiktoken.Encoding(
        name="probe",
        pat_str=regex,
        mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={},
    )
    everything = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF)
    kept = [ord(c) for c in probe.decode(probe.encode_ordinary(everything))]
    ranges = []
    for _, run in groupby(enumerate(kept), key=lambda pair: pair[1] - pair[0]):
        points = [point for _, point in run]
        ranges.append([points[0], points[-1]])
    return ranges


def tokenizer_data(path: Path) -> dict:
    """Everything the page needs: merges as base64 strings in the order of their ids, and the three
    classes."""
    ranks: list[tuple[int, str]] = []
    for line in path.read_text("ascii").splitlines():
        if line.strip():
            token, rank = line.split()
            b64decode(token, validate=True)
            ranks.append((int(rank), token))
    ranks.sort()
    if [rank for rank, _ in ranks] != list(range(len(ranks))):
        raise ValueError(
            f"{path}: expected ranks 0, 1, 2, …, found a gap; save the tokenizer again"
        )
    return {
        "name": NAME,
        "tokens": [token for _, token in ranks],
        "letters": code_points(r"\p{L}"),
        "numbers": code_points(r"\p{N}"),
        "spaces": code_points(r"\s"),
    }


def write_script(folder: Path, name: str, data: dict) -> None:
    """A script, not JSON: a page opened from disk may load scripts, but not fetch files."""
    text = json.dumps(data, separators=(",", ":"))
    (folder / f"{name}.js").write_text(f'Course.data("{name}", {text});\n', "utf8")


def write_data(app: Sphinx, exception: Exception | None) -> None:
    """Put the data beside the widget's script in the finished site."""
    if exception is not None or app.builder.format != "html":
        return
    target = Path(app.outdir) / "_static" / "widgets"
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted((Path(app.srcdir) / "book" / "_static" / "widgets").glob("*.json")):
        write_script(target, f"{file.stem}-data", json.loads(file.read_text("utf8")))
    source = Path(app.srcdir) / "utils" / "course" / "assets" / f"{NAME}.tiktoken"
    if not source.is_file():
        return
    write_script(target, NAME, tokenizer_data(source))


def setup(app: Sphinx) -> dict:
    """Run after the pages are written."""
    app.connect("build-finished", write_data)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
