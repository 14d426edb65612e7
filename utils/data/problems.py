r"""Problems to learn from and to be tested on: a question, a worked response, and its short answer.

`load` takes the name of a collection, or a file of your own:

    gsm8k        grade-school word problems with worked answers (Cobbe et al. 2021); train and test
    openr1-math  competition problems with DeepSeek-R1's reasoning, checked (Open R1, 2025)
    arithmetic   the package's own small word problems; arithmetic-1 are easier, arithmetic-3 harder
    FILE.jsonl   an object a line: {"prompt", "response"}, perhaps "answer", or {"messages": [...]}

A response ends in `\boxed{answer}`, the form in which R1 and its distilled models give answers.
"""

import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow.parquet

from utils import CourseError, first_line, unexpected
from utils.data import arithmetic
from utils.hf import hub

# What DeepSeek recommends to ask R1 with, and what OpenR1's generations were asked with.
MATHS = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
PLAIN = "{problem}"
BUILT_IN = {"train": 4_000, "test": 500}  # problems of the generator where no limit is given
OPENR1_FILES = 10  # of some 215 MB each
VERDICTS = ("correctness_math_verify", "is_reasoning_complete")  # of each of OpenR1's generations
OPENR1_HELD_OUT = 100  # one problem in so many is held out: the collection has no test split
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # \{ and \} are characters of the answer


@dataclass(frozen=True)
class Problem:
    """A question as `messages` ({role, content}), a `response` to learn, an `answer` to compare."""

    messages: list[dict[str, str]]
    response: str
    answer: str | None
    source: str


def load(
    name: str | Path, split: str = "train", limit: int | None = None, template: str | None = None
) -> list[Problem]:
    """The first `limit` problems (or all) of a collection's split, or of a file; logs the source.

    `split` is "train" or "test"; a file of your own is taken whole for either: test on another one.
    `template` makes the user's message, with `{problem}` in it: by default `MATHS`, and `PLAIN` for
    a file. Raises CourseError for bad arguments, and for a source that is damaged (a file: with the
    line) or empty; `hub.NotAvailable` where a collection cannot be had.
    """
    if split not in BUILT_IN:
        raise unexpected("split", "train or test", repr(split))
    if limit is not None and limit < 1:
        raise unexpected("limit", "at least 1 problem", limit)
    if template is not None and "{problem}" not in template:
        raise unexpected("template", "{problem} somewhere in it", f"{template!r:.60}")
    name, asked = str(name), template or MATHS
    if level := re.fullmatch(r"arithmetic(?:-([123]))?", name):
        problems, source = [], "built-in generator"
        for one in arithmetic.generate(limit or BUILT_IN[split], split, int(level[1] or 2)):
            response = f"{one.work} Answer: \\boxed{{{one.answer}}}"
            question = _message(asked, one.problem)
            problems.append(Problem(question, response, str(one.answer), name))
    elif name in ("gsm8k", "openr1-math"):
        read = _gsm8k if name == "gsm8k" else _openr1
        try:
            problems, source = read(split, limit, asked)
        except hub.NotAvailable as reason:
            what = f"{name}: {reason}: it takes the hub, or a mirror that holds it"
            raise hub.NotAvailable(f"{what}; the built-in arithmetic takes neither") from reason
    elif name.endswith(".jsonl"):
        problems, source = _read_jsonl(Path(name), limit, template or PLAIN), "own file"
    else:
        raise unexpected("data", "gsm8k, openr1-math, arithmetic or a .jsonl file", repr(name))
    hub.used(f"{len(problems):,} {split} problems of {name}", source)
    return problems


def boxes(text: str) -> list[str]:
    r"""The contents of each `\boxed{...}` that is closed and not empty; braces inside may nest."""
    contents = []
    for start in BOX.finditer(text):
        depth = 1
        for brace in BRACE.finditer(text, start.end()):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                contents.append(text[start.end() : brace.start()].strip())
                break
    return [inside for inside in contents if inside]


def answer_part(text: str) -> str:
    """What comes after the reasoning: the text behind the last `</think>`, or all of it."""
    return text.rpartition("</think>")[2]


def _message(template: str, question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": template.replace("{problem}", question)}]


# ------------------------------------------------------------------------------------ from the hub


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[dict]:
    """The rows of a parquet file, a few at a time: one generation can have 100 kB."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if missing := [name for name in columns if name not in file.schema_arrow.names]:
                raise unexpected(path.name, f"the columns {', '.join(columns)}", f"no {missing[0]}")
            for batch in file.iter_batches(batch_size=256, columns=list(columns)):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise unexpected(path.name, "a parquet file", first_line(error)) from error


def _gsm8k(split: str, limit: int | None, template: str) -> tuple[list[Problem], str]:
    file = hub.fetch("datasets", hub.GSM8K, f"main/{split}-00000-of-00001.parquet")
    problems, where = [], file.path.name
    for number, row in enumerate(islice(_rows(file.path, ("question", "answer")), limit)):
        work, mark, answer = (row["answer"] or "").rpartition("####")
        if not (mark and answer.strip() and row["question"]):
            raise CourseError(f"{where}: row {number}: expected a question and an answer with ####")
        work = re.sub(r"<<.*?>>", "", work).strip()  # the calculator's marks: <<48/2=24>>
        answer = answer.strip().replace(",", "")
        question = _message(template, row["question"].strip())
        problems.append(Problem(question, f"{work}\n\\boxed{{{answer}}}", answer, "gsm8k"))
    if not problems:
        raise unexpected(where, "at least one problem", "none")
    return problems, file.source


def _openr1(split: str, limit: int | None, template: str) -> tuple[list[Problem], str]:
    """Each generation that is complete and verified is an example; a test has each problem once.

    What only a language model judged correct (12%), or nobody judged, is left out.
    """
    problems = []
    for number in range(OPENR1_FILES):
        name = f"data/train-{number:05d}-of-{OPENR1_FILES:05d}.parquet"
        file = hub.fetch("datasets", hub.OPENR1, name)
        source = f"{file.source}, {number + 1} of {OPENR1_FILES} files"
        for row in _rows(file.path, ("problem", "answer", "generations", *VERDICTS)):
            text, answer = row["problem"] or "", row["answer"] or None
            # By its text, so that a problem that is repeated is held out everywhere.
            held_out = zlib.crc32(text.encode()) % OPENR1_HELD_OUT == 0
            if not text.strip() or held_out != (split == "test"):
                continue
            judged = zip(*(row[name] or [] for name in ("generations", *VERDICTS)))
            verified = [made.strip() for made, *passed in judged if all(v is True for v in passed)]
            for response in verified[: 1 if held_out else None]:
                question = _message(template, text.strip())
                problems.append(Problem(question, response, answer, "openr1-math"))
            if limit is not None and len(problems) >= limit:
                return problems[:limit], source
    if not problems:
        raise unexpected("openr1-math", "at least one problem", "none")
    return problems, source


# ------------------------------------------------------------------------------ a file of your own


def _read_jsonl(path: Path, limit: int | None, template: str) -> list[Problem]:
    if not path.is_file():
        raise unexpected(str(path), "a file of JSON lines", "none", "is the path right?")
    with open(path, "rb") as file:
        lines = ((f"{path.name}, line {i}", line) for i, line in enumerate(file, 1) if line.strip())
        problems = [_from_json(line, where, template) for where, line in islice(lines, limit)]
    if not problems:
        raise unexpected(str(path), "at least one JSON object", "an empty file")
    return problems


def _from_json(line: bytes, where: str, template: str) -> Problem:
    try:
        text = line.decode("utf-8-sig").strip()
        row = json.loads(text)
    except UnicodeDecodeError:
        raise unexpected(where, "UTF-8", "other bytes", "save the file as UTF-8") from None
    except (ValueError, RecursionError):
        raise unexpected(where, "one JSON object", f"{text!r:.40}") from None
    if not isinstance(row, dict):
        raise unexpected(where, "a JSON object", f"a {type(row).__name__}")
    if "messages" in row:
        *question, last = _messages(row["messages"], f"{where}: messages")
        if last["role"] != "assistant" or not question:
            wanted = "an assistant's turn last, after another"
            raise unexpected(f"{where}: messages", wanted, "none")
        response = last["content"]
    elif missing := [field for field in ("prompt", "response") if field not in row]:
        what = f"expected prompt and response, or messages; found no {missing[0]}"
        raise CourseError(f"{where}: {what}")
    else:
        response = _text(row["response"], f"{where}: response")
        if isinstance(row["prompt"], list):
            question = _messages(row["prompt"], f"{where}: prompt")
        else:
            question = _message(template, _text(row["prompt"], f"{where}: prompt"))
    answer = row.get("answer")
    if answer is None:  # then the one that the response gives in a box, if it does
        answer = (boxes(answer_part(response)) or [None])[-1]
    elif type(answer) in (int, float):  # a bool is neither
        answer = str(answer)
    else:
        _text(answer, f"{where}: answer")
    return Problem(question, response, answer, where)


def _text(value, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        kind = "an empty text" if isinstance(value, str) else f"a {type(value).__name__}"
        raise unexpected(where, "some text", kind)
    return value


def _messages(value, where: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise unexpected(where, "a list of {role, content}", f"{value!r:.40}")
    for message in value:
        roles = ("system", "user", "assistant")
        if not isinstance(message, dict) or message.get("role") not in roles:
            wanted = "{role, content} of system, user or assistant"
            raise unexpected(where, wanted, f"{message!r:.60}")
        _text(message.get("content"), f"{where}, content")
    return [{"role": message["role"], "content": message["content"]} for message in value]
