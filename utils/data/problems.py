r"""Problems to learn from and to be tested on: a question, a worked response, and the short answer to compare with.

`load` takes the name of a collection, or a file of your own:

    gsm8k        grade-school word problems with worked answers (Cobbe et al. 2021); train and test
    openr1-math  competition problems with DeepSeek-R1's reasoning (Open R1, 2025), checked by math-verify
    arithmetic   the package's own small word problems; arithmetic-1 and arithmetic-3 are easier and harder
    FILE.jsonl   a JSON object a line: {"prompt", "response"} and perhaps "answer", or {"messages": [...]}

A response ends in `\boxed{answer}`, the form in which R1 and its distilled models give answers.
"""

import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet

from utils import CourseError, first_line
from utils.data import arithmetic
from utils.hf import hub

# What DeepSeek recommends to ask R1 with, and what OpenR1's generations were asked with.
MATHS = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
PLAIN = "{problem}"
BUILT_IN = {"train": 4_000, "test": 500}  # problems of the generator where no limit is given
OPENR1_FILES = 10  # of some 215 MB each
OPENR1_COLUMNS = ("problem", "answer")
OPENR1_COLUMNS += ("generations", "correctness_math_verify", "is_reasoning_complete")
OPENR1_HELD_OUT = 100  # one problem in so many is held out: the collection has no test split
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


@dataclass(frozen=True)
class Problem:
    """A question as `messages` ({role, content}), a `response` to learn from, an `answer` to compare."""

    messages: list[dict[str, str]]
    response: str
    answer: str | None
    source: str


def load(
    name: str | Path, split: str = "train", limit: int | None = None, template: str | None = None
) -> list[Problem]:
    """The first `limit` problems (all by default) of a collection's split, or of a file; logs the
    source.

    `split` is "train" or "test"; a file of your own is one split and taken whole for either, so
    test on another file. `template` makes the user's message, with `{problem}` in it: by default
    `MATHS`, and `PLAIN` for a file. Raises CourseError for bad arguments, for a damaged source and
    an empty one, with the line where a file has it wrong; `hub.NotAvailable` where a collection
    cannot be had.
    """
    if split not in BUILT_IN:
        raise CourseError(f"split: expected train or test, found {split!r}")
    if limit is not None and limit < 1:
        raise CourseError(f"limit: expected at least 1 problem, found {limit}")
    if template is not None and "{problem}" not in template:
        what = f"expected {{problem}} somewhere in it, found {template!r:.60}"
        raise CourseError(f"template: {what}")
    if level := re.fullmatch(r"arithmetic(?:-([123]))?", str(name)):
        sums = arithmetic.generate(limit or BUILT_IN[split], split, int(level[1] or 2))
        rows = (
            (s.problem, boxed(s.work + " Answer: ", str(s.answer)), str(s.answer)) for s in sums
        )
        problems = [_problem(template, *row, str(name)) for row in rows]
        source = "built-in generator"
    elif name in ("gsm8k", "openr1-math"):
        try:
            read = _gsm8k if name == "gsm8k" else _openr1
            problems, source = read(split, limit, template)
        except hub.NotAvailable as reason:
            hint = (
                "it takes the hub, or a mirror that holds it; the built-in arithmetic takes neither"
            )
            raise hub.NotAvailable(f"{name}: {reason}: {hint}") from reason
    elif str(name).endswith(".jsonl"):
        problems, source = list(_read_jsonl(Path(name), limit, template or PLAIN)), "own file"
    else:
        what = "expected gsm8k, openr1-math, arithmetic or a .jsonl file"
        raise CourseError(f"data: {what}, found {str(name)!r}")
    hub.used(f"{len(problems):,} {split} problems of {name}", source)
    return problems


def boxed(work: str, answer: str) -> str:
    r"""The work, and the answer in `\boxed{}` after it."""
    return f"{work}\\boxed{{{answer}}}"


def boxes(text: str) -> list[str]:
    r"""The contents of each `\boxed{...}` that is closed and not empty, in order; braces inside may nest."""
    contents = []
    for start in BOX.finditer(text):
        depth, end = 1, start.end()
        while end < len(text) and depth:
            if text[end] == "\\":  # \{ and \} are characters of the answer
                end += 1
            else:
                depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if not depth and (inside := text[start.end() : end - 1].strip()):
            contents.append(inside)
    return contents


def answer_part(text: str) -> str:
    """What comes after the reasoning: the text behind the last `</think>`, or all of it."""
    return text.rpartition("</think>")[2]


def _problem(
    template: str | None, question: str, response: str, answer: str | None, source: str
) -> Problem:
    content = (MATHS if template is None else template).replace("{problem}", question)
    return Problem([{"role": "user", "content": content}], response, answer, source)


# ------------------------------------------------------------------------------------ from the hub


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[dict]:
    """The rows of a parquet file, a few at a time: one generation can have 100 kB."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if missing := [name for name in columns if name not in file.schema_arrow.names]:
                what = f"expected the columns {', '.join(columns)}, found no {missing[0]}"
                raise CourseError(f"{path.name}: {what}")
            for batch in file.iter_batches(batch_size=256, columns=list(columns)):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        what = f"expected a parquet file, found {first_line(error)}"
        raise CourseError(f"{path.name}: {what}") from error


def _gsm8k(split: str, limit: int | None, template: str | None) -> tuple[list[Problem], str]:
    file = hub.fetch("datasets", hub.GSM8K, f"main/{split}-00000-of-00001.parquet")
    problems, name = [], file.path.name
    for number, row in enumerate(_rows(file.path, ("question", "answer"))):
        if len(problems) == limit:
            break
        work, mark, answer = (row["answer"] or "").rpartition("####")
        if not (mark and answer.strip() and row["question"]):
            what = "expected a question and an answer with ####"
            raise CourseError(f"{name}: row {number}: {what}")
        work = re.sub(r"<<.*?>>", "", work).strip()  # the calculator's marks: <<48/2=24>>
        answer = answer.strip().replace(",", "")
        response, question = boxed(work + "\n", answer), row["question"].strip()
        problems.append(_problem(template, question, response, answer, "gsm8k"))
    return _not_empty(problems, name), file.source


def _openr1(split: str, limit: int | None, template: str | None) -> tuple[list[Problem], str]:
    """Each generation that is complete and verified is an example to train on; a test has each
    problem once."""
    problems = []
    for number in range(OPENR1_FILES):
        name = f"data/train-{number:05d}-of-{OPENR1_FILES:05d}.parquet"
        file = hub.fetch("datasets", hub.OPENR1, name)
        source = f"{file.source}, {number + 1} of {OPENR1_FILES} files"
        for row in _rows(file.path, OPENR1_COLUMNS):
            if not row["problem"] or not row["problem"].strip():
                continue
            # By its text, so that a problem that is repeated is held out everywhere.
            held_out = zlib.crc32(row["problem"].encode()) % OPENR1_HELD_OUT == 0
            if held_out != (split == "test"):
                continue
            question, answer = row["problem"].strip(), row["answer"] or None
            for response in verified(row)[: 1 if held_out else None]:
                problems.append(_problem(template, question, response, answer, "openr1-math"))
            if limit is not None and len(problems) >= limit:
                return problems[:limit], source
    return _not_empty(problems, "openr1-math"), source


def verified(row: dict) -> list[str]:
    """The generations of one row of OpenR1 that math-verify found correct and that were not cut off.

    A judgement that is missing counts as no. What only a language model judged correct (12%) is
    left out too.
    """
    judged = zip(*(row[column] or [] for column in OPENR1_COLUMNS[2:]))
    return [text.strip() for text, *verdicts in judged if all(v is True for v in verdicts)]


def _not_empty(problems: list[Problem], name: str) -> list[Problem]:
    if not problems:
        raise CourseError(f"{name}: expected at least one problem, found none")
    return problems


# ------------------------------------------------------------------------------ a file of your own


def _read_jsonl(path: Path, limit: int | None, template: str) -> Iterator[Problem]:
    if not path.is_file():
        what = "expected a file of JSON lines, found none: is the path right?"
        raise CourseError(f"{path}: {what}")
    count = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if count == limit:
                break
            if line.strip():
                count += 1
                yield _from_json(line, f"{path.name}, line {number}", template)
    if not count:
        raise CourseError(f"{path}: expected at least one JSON object, found an empty file")


def _from_json(line: bytes, where: str, template: str) -> Problem:
    try:
        text = line.decode("utf-8-sig").strip()
        row = json.loads(text)
    except UnicodeDecodeError:
        what = "expected UTF-8, found other bytes: save the file as UTF-8"
        raise CourseError(f"{where}: {what}") from None
    except (ValueError, RecursionError):
        raise CourseError(f"{where}: expected one JSON object, found {text!r:.40}") from None
    if not isinstance(row, dict):
        raise CourseError(f"{where}: expected a JSON object, found a {type(row).__name__}")
    if "messages" in row:
        *question, last = _messages(row["messages"], where, "messages")
        if last["role"] != "assistant" or not question:
            what = "expected an assistant's turn last, after another, found none"
            raise CourseError(f"{where}: messages: {what}")
        response = last["content"]
    else:
        for field in ("prompt", "response"):
            if field not in row:
                what = f"expected prompt and response, or messages; found no {field}"
                raise CourseError(f"{where}: {what}")
        response = _text(row["response"], where, "response")
        if isinstance(row["prompt"], list):
            question = _messages(row["prompt"], where, "prompt")
        else:
            prompt = _text(row["prompt"], where, "prompt")
            question = _problem(template, prompt, "", None, "").messages
    answer = row.get("answer")
    if answer is None:  # then the one that the response gives in a box, if it does
        answer = (boxes(answer_part(response)) or [None])[-1]
    elif isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    else:
        answer = _text(answer, where, "answer")
    return Problem(question, response, answer, where)


def _text(value, where: str, field: str) -> str:
    if not isinstance(value, str) or not value.strip():
        kind = "an empty text" if isinstance(value, str) else f"a {type(value).__name__}"
        raise CourseError(f"{where}: {field}: expected some text, found {kind}")
    return value


def _messages(value, where: str, field: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        what = f"expected a list of {{role, content}}, found {value!r:.40}"
        raise CourseError(f"{where}: {field}: {what}")
    for message in value:
        roles = ("system", "user", "assistant")
        if not isinstance(message, dict) or message.get("role") not in roles:
            what = f"expected {{role, content}} of system, user or assistant, found {message!r:.60}"
            raise CourseError(f"{where}: {field}: {what}")
        _text(message.get("content"), where, f"{field}, content")
    return [{"role": message["role"], "content": message["content"]} for message in value]
