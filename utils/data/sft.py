"""Data for supervised fine-tuning: from problems to rows of tokens, and which count in the loss.

    problem -> prompt, completion (text, by the chat template) -> tokens
            -> rows {inputs, targets, loss_mask, segment_ids} [R, T]

`loss_mask` is 1 where the target is a completion token, its end-of-text included: trained on
everything, a model also learns to write questions. Several examples share a row (packing), numbered
by `segment_ids`, which keep attention apart. An example longer than a row is skipped, or cut. A cut
completion has no end-of-text, or the model would learn to stop in mid-sentence.
"""

import dataclasses
import hashlib
import json
import logging
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

import grain
import jax
import numpy as np
from jaxtyping import Int32, Int64

from utils import CourseError, checkpoints, unexpected
from utils.data.packing import assign_rows, endless
from utils.data.problems import Problem
from utils.hf.chat import Tokenizer

logger = logging.getLogger(__name__)
VERSION = 1  # of what `tokenise` returns: a new number leaves old caches behind


@dataclasses.dataclass(frozen=True)
class Examples:
    """Example i is `ids[starts[i]:starts[i + 1]]`; the first `prompts[i]` tokens are its prompt."""

    ids: Int32[np.ndarray, "N"]
    starts: Int64[np.ndarray, "_"]  # E + 1 of them
    prompts: Int32[np.ndarray, "E"]

    @classmethod
    def of(cls, rows: Sequence[np.ndarray], prompts: Sequence[int]) -> "Examples":
        """From the tokens of each example, and how many of them are the prompt."""
        starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        return cls(np.concatenate(rows), starts, np.array(prompts, np.int32))

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> Int64[np.ndarray, "E"]:
        """Tokens of each example, prompt and completion."""
        return np.diff(self.starts)

    def example(self, i: int) -> tuple[np.ndarray, int]:
        """(token ids, how many of them are the prompt)."""
        return self.ids[self.starts[i] : self.starts[i + 1]], int(self.prompts[i])


def render(problem: Problem, tok: Tokenizer, chat: bool = True) -> tuple[str, str]:
    """(prompt, completion): the text to learn from, without the end-of-text.

    By the model's chat template, with the answer's reasoning kept; not `chat`, for base models: the
    message as it is. The prompt is to the letter what the model will be asked with later.
    """
    if not chat:
        return problem.messages[-1]["content"], problem.response
    prompt = tok.chat(problem.messages)
    opening = prompt[len(tok.chat(problem.messages, add_generation_prompt=False)) :]
    completion = problem.response
    if opening.rstrip().endswith("<think>"):  # R1's prompt opens the reasoning: not twice
        completion = completion.strip().removeprefix("<think>").lstrip("\n")
    return prompt, completion


def tokenise(
    problems: Sequence[Problem], tok: Tokenizer, chat: bool = True, cache: Path | None = None
) -> Examples:
    """Every problem as tokens, with the end-of-text after its completion.

    Prompt and completion are encoded apart and joined: a model reads the prompt, and then goes on.
    In a `cache` folder the result is kept under the checksum of everything that it depends on.
    """
    if not problems:
        raise unexpected("problems", "at least one", "none", "there is nothing to learn")
    if tok.eos_token_id is None:
        raise unexpected(tok.name, "a tokenizer with an end-of-text token", "none")
    key = hashlib.sha256(f"{VERSION} {tok.digest} {chat}".encode())
    for problem in problems:
        key.update(json.dumps([problem.messages, problem.response]).encode())
    kept = None if cache is None else cache / "tokens" / key.hexdigest()[:32]
    if kept is not None and kept.exists():
        try:
            with open(kept / "examples.npz", "rb") as file, np.load(file) as arrays:
                return Examples(**arrays)
        except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
            shutil.rmtree(kept, ignore_errors=True)  # damaged: tokenised again
    rows, prompts = [], []
    for problem in problems:
        prompt, completion = render(problem, tok, chat)
        ids = tok.encode(prompt)
        prompts.append(len(ids))
        ids += [*tok.encode(completion, begin=False), tok.eos_token_id]
        rows.append(np.array(ids, np.int32))
    examples = Examples.of(rows, prompts)
    if kept is not None:
        try:
            with checkpoints.atomic_dir(kept) as temporary:
                np.savez(temporary / "examples.npz", **vars(examples))
        except CourseError as error:  # a full disk, or another process was first
            logger.warning(f"tokens not cached: {error}")
    return examples


def fitting(examples: Examples, lengths: Sequence[int]) -> dict[int, int]:
    """How many examples fit a row of so many tokens, for each length."""
    return {length: int((examples.lengths - 1 <= length).sum()) for length in lengths}


def within(examples: Examples, max_seq_length: int, *, cut: bool = False) -> Examples:
    """The examples that fit a row; with `cut` the longer ones too, cut off. Logs how many.

    An example has one input less than tokens. One whose prompt alone fills the row is skipped in
    either case. Raises CourseError when none is left.
    """
    T, sizes = max_seq_length, examples.lengths - 1
    if T < 2:
        raise unexpected("max_seq_length", "at least 2 tokens", T)
    too_long, no_room = sizes > T, examples.prompts > T
    kept = np.flatnonzero(~no_room if cut else ~too_long)
    if not len(kept):
        what = f"{T} tokens are too few: the shortest of {len(sizes)} examples has {sizes.min()}"
        fix = f"give at least {int(np.quantile(sizes, 0.9))}, which nine in ten fit"
        raise CourseError(f"max_seq_length: {what}: {fix}")
    if too_long.any():
        cuts = (too_long & ~no_room).sum()
        done = f"{cuts} cut, {no_room.sum()} skipped" if cut else "skipped"
        longer = f"{too_long.sum()} of {len(sizes)} examples are longer than {T} tokens"
        logger.info(f"{longer}: {done}")
    rows = [examples.example(i)[0][: T + 1] for i in kept]
    return Examples.of(rows, examples.prompts[kept])


def to_rows(
    examples: Examples, max_seq_length: int, *, packing: bool = True, completion_only: bool = True
) -> dict[str, np.ndarray]:
    """Rows of T tokens: inputs, targets, segment_ids [R, T] int32 and loss_mask [R, T] float32.

    With `packing`, examples share a row where they fit, longest first (best fit). Segment 0 is
    padding: not in the loss, and no example sees it. `examples` come from `within`.
    """
    sizes = examples.lengths - 1
    assigned = assign_rows(sizes, max_seq_length) if packing else [[i] for i in range(len(sizes))]
    shape = len(assigned), max_seq_length
    rows = {name: np.zeros(shape, np.int32) for name in ("inputs", "targets", "segment_ids")}
    rows["loss_mask"] = np.zeros(shape, np.float32)
    for row, members in enumerate(assigned):
        start = 0
        for number, i in enumerate(members, start=1):
            ids, prompt = examples.example(i)
            here = row, slice(start, start + len(ids) - 1)
            rows["inputs"][here], rows["targets"][here] = ids[:-1], ids[1:]
            rows["segment_ids"][here] = number
            # Target t is token t + 1: the prompt's last token has the completion's first as target.
            first = prompt if completion_only else 1
            rows["loss_mask"][here] = np.arange(1, len(ids)) >= first
            start += len(ids) - 1
    return rows


def batches(rows: dict[str, np.ndarray], batch_size: int, *, seed=0) -> grain.DatasetIterator:
    """Endless batches of rows, in a new order each epoch; `get_state`, `set_state` resume exactly.

    `batch_size` is that of all processes together; each gets its own part, out of the same order.
    So a run may be continued with another number of processes.
    """
    count, hosts, host = len(rows["inputs"]), jax.process_count(), jax.process_index()
    if batch_size % hosts:
        raise unexpected("batch_size", f"a multiple of the {hosts} processes", batch_size)
    if count < batch_size:
        most = f"at most {count} (the rows of this data)"
        raise unexpected("batch_size", most, batch_size, "add examples, or make the batch smaller")
    mine = slice(host * batch_size // hosts, (host + 1) * batch_size // hosts)

    def take(numbers) -> dict[str, np.ndarray]:
        return {name: array[np.asarray(numbers)[mine]] for name, array in rows.items()}

    return endless(grain.MapDataset.range(count).seed(seed).shuffle().repeat(), batch_size, take)
