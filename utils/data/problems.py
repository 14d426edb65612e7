r"""Problems to learn from and to be tested on: what is asked, a worked response, and the short answer to compare with.

`load` takes the name of a collection, or a file of your own:

    gsm8k        grade-school word problems with worked answers (Cobbe et al. 2021); train and test
    openr1-math  competition problems with DeepSeek-R1's reasoning (Open R1, 2025), each answer checked by math-verify
    arithmetic   small word problems from the package's own generator; arithmetic-1 and arithmetic-3 are easier and harder
    FILE.jsonl   one JSON object a line: {"prompt": ..., "response": ...} and perhaps "answer", or {"messages": [...]}

A response ends in `\boxed{answer}`, the form in which R1 and its distilled models give answers.
"""

import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from utils import CourseError
from utils.data import arithmetic
from utils.evaluation import answers
from utils.hf import hub

# What DeepSeek recommends to ask R1 with, and what OpenR1's generations were asked with.
MATHS = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
PLAIN = "{problem}"
BUILT_IN = {"train": 4_000, "test": 500}  # how many the generator makes where no limit is given
OPENR1_FILES = 10  # of some 215 MB each
OPENR1_COLUMNS = ("problem", "answer", "generations", "correctness_math_verify", "is_reasoning_complete")
OPENR1_HELD_OUT = 100  # one problem in so many is held out: the collection itself has no test split


@dataclass(frozen=True)
class Problem:
    """`messages` ({role, content}) without the answer's turn, `response` to learn from, `answer` to compare with."""

    messages: list[dict[str, str]]
    response: str
    answer: str | None
    source: str


def load(
    name: str | Path, split: str = "train", limit: int | None = None, template: str | None = None
) -> list[Problem]:
    """The first `limit` problems (all by default) of a collection's split, or of a file; prints which source it was.

    `split` is "train" or "test"; a file of your own is one split and taken whole for either, so test on another file.
    `template` makes the user's message, with `{problem}` in it: by default `MATHS`, and `PLAIN` for a file. Raises
    CourseError for bad arguments, for a damaged source and an empty one, with the line where a file has it wrong;
    `hub.NotAvailable` where a collection cannot be had.
    """
    if split not in BUILT_IN:
        raise CourseError(f"split: expected train or test, found {split!r}")
    if limit is not None and limit < 1:
        raise CourseError(f"limit: expected at least 1 problem, found {limit}")
    if template is not None and "{problem}" not in template:
        raise CourseError(f"template: expected {{problem}} somewhere in it, found {template!r:.60}")
    level = re.fullmatch(r"arithmetic(?:-([123]))?", str(name))
    if level:
        sums = arithmetic.generate(limit or BUILT_IN[split], split, int(level[1] or 2))
        source, rows = "built-in generator", ((s.problem, s.work + " Answer: ", str(s.answer)) for s in sums)
        found = [_problem(template, asked, boxed(work, answer), answer, str(name)) for asked, work, answer in rows]
    elif name in ("gsm8k", "openr1-math"):
        try:
            found, source = (_gsm8k if name == "gsm8k" else _openr1)(split, limit, template)
        except hub.NotAvailable as reason:
            raise hub.NotAvailable(
                f"{name}: {reason}: it takes the hub, or a mirror that holds it; the built-in arithmetic takes neither"
            ) from reason
    elif str(name).endswith(".jsonl"):
        found, source = list(_read_jsonl(Path(name), limit, template or PLAIN)), "own file"
    else:
        raise CourseError(f"data: expected gsm8k, openr1-math, arithmetic or a .jsonl file, found {str(name)!r}")
    hub.used(f"{len(found):,} {split} problems of {name}", source)
    return found


def boxed(work: str, answer: str) -> str:
    r"""The work, and the answer in `\boxed{}` after it."""
    return f"{work}\\boxed{{{answer}}}"


def _problem(template: str | None, asked: str, response: str, answer: str | None, source: str) -> Problem:
    content = (MATHS if template is None else template).replace("{problem}", asked)
    return Problem([{"role": "user", "content": content}], response, answer, source)


# ------------------------------------------------------------------------------------------------- from the hub


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[dict]:
    """The rows of a parquet file, a few at a time: one generation can have 100 kB."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if missing := [name for name in columns if name not in file.schema_arrow.names]:
                raise CourseError(f"{path.name}: expected the columns {', '.join(columns)}, found no {missing[0]}")
            for batch in file.iter_batches(batch_size=256, columns=list(columns)):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise CourseError(f"{path.name}: expected a parquet file, found {hub.first_line(error)}") from error


def _gsm8k(split: str, limit: int | None, template: str | None) -> tuple[list[Problem], str]:
    file = hub.fetch("datasets", hub.GSM8K, f"main/{split}-00000-of-00001.parquet")
    found = []
    for number, row in enumerate(_rows(file.path, ("question", "answer"))):
        if len(found) == limit:
            break
        work, mark, answer = (row["answer"] or "").rpartition("####")
        if not (mark and answer.strip() and row["question"]):
            raise CourseError(f"{file.path.name}: row {number}: expected a question and an answer with ####")
        work = re.sub(r"<<.*?>>", "", work).strip()  # the calculator's marks: <<48/2=24>>
        answer = answer.strip().replace(",", "")
        found.append(_problem(template, row["question"].strip(), boxed(work + "\n", answer), answer, "gsm8k"))
    return _some(found, file.path.name), file.source


def _openr1(split: str, limit: int | None, template: str | None) -> tuple[list[Problem], str]:
    """Each generation that is complete and verified is an example to train on; a test has each problem once."""
    found, sources = [], []
    for number in range(OPENR1_FILES):
        file = hub.fetch("datasets", hub.OPENR1, f"data/train-{number:05d}-of-{OPENR1_FILES:05d}.parquet")
        sources.append(file.source)
        for row in _rows(file.path, OPENR1_COLUMNS):
            if not row["problem"] or not row["problem"].strip():
                continue
            held_out = zlib.crc32(row["problem"].encode()) % OPENR1_HELD_OUT == 0  # its repetitions with it
            if held_out != (split == "test"):
                continue
            for response in verified(row)[: 1 if held_out else None]:
                found.append(_problem(template, row["problem"].strip(), response, row["answer"] or None, "openr1-math"))
            if limit is not None and len(found) >= limit:
                return found[:limit], f"{sources[-1]}, {len(sources)} of {OPENR1_FILES} files"
    return _some(found, "openr1-math"), f"{sources[-1]}, {len(sources)} of {OPENR1_FILES} files"


def verified(row: dict) -> list[str]:
    """The generations of one row of OpenR1 that math-verify found correct and that were not cut off.

    A judgement that is missing counts as no. What only a language model judged correct (12%) is left out too.
    """
    judged = zip(row["generations"] or [], row["correctness_math_verify"] or [], row["is_reasoning_complete"] or [])
    return [text.strip() for text, correct, complete in judged if correct is True and complete is True]


def _some(found: list[Problem], name: str) -> list[Problem]:
    if not found:
        raise CourseError(f"{name}: expected at least one problem, found none")
    return found


# ------------------------------------------------------------------------------------------------- a file of your own


def _read_jsonl(path: Path, limit: int | None, template: str) -> Iterator[Problem]:
    if not path.is_file():
        raise CourseError(f"{path}: expected a file of JSON lines, found none: is the path right?")
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
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise CourseError(f"{where}: expected UTF-8, found other bytes: save the file as UTF-8") from None
    except (ValueError, RecursionError):
        raise CourseError(
            f"{where}: expected one JSON object, found {line.decode('utf-8-sig').strip()!r:.40}"
        ) from None
    if not isinstance(row, dict):
        raise CourseError(f"{where}: expected a JSON object, found a {type(row).__name__}")
    if "messages" in row:
        messages = _messages(row["messages"], where, "messages")
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            raise CourseError(f"{where}: messages: expected an assistant's turn last, after another, found none")
        *asked, last = messages
        response = last["content"]
    else:
        for field in ("prompt", "response"):
            if field not in row:
                raise CourseError(f"{where}: expected prompt and response, or messages; found no {field}")
        response = _text(row["response"], where, "response")
        if isinstance(row["prompt"], list):
            asked = _messages(row["prompt"], where, "prompt")
        else:
            asked = _problem(template, _text(row["prompt"], where, "prompt"), "", None, "").messages
    answer = row.get("answer")
    if answer is None:  # then the one that the response gives in a box, if it does
        answer = (answers.boxes(answers.answer_part(response)) or [None])[-1]
    elif isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    else:
        answer = _text(answer, where, "answer")
    return Problem(asked, response, answer, where)


def _text(value, where: str, field: str) -> str:
    if not isinstance(value, str) or not value.strip():
        found = "an empty text" if isinstance(value, str) else f"a {type(value).__name__}"
        raise CourseError(f"{where}: {field}: expected some text, found {found}")
    return value


def _messages(value, where: str, field: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise CourseError(f"{where}: {field}: expected a list of {{role, content}}, found {value!r:.40}")
    for message in value:
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
            raise CourseError(
                f"{where}: {field}: expected {{role, content}} of system, user or assistant, found {message!r:.60}"
            )
        _text(message.get("content"), where, f"{field}, content")
    return [{"role": message["role"], "content": message["content"]} for message in value]
