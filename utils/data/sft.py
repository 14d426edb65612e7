"""Supervised fine-tuning data: from problems with answers to rows of tokens, and which of them are graded.

    problem -> prompt, answer (text, by the chat template) -> tokens -> rows {inputs, targets, weights, segments} [R, T]

The loss is taken on the answer only: `weights` is 1 where the target is a token of the answer, its end included, and 0
elsewhere. Trained on everything, a model also learns to write questions. Several examples share a row (packing), numbered
by `segments`, which keep attention apart. An example that is longer than the window is skipped, or cut: a cut answer ends
where the window ends, and never in an end-of-text, or the model would learn to stop in mid-sentence.
"""

import dataclasses
import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import grain
import jax
import numpy as np
from jaxtyping import Int32, Int64

from utils import CourseError
from utils.data import packing
from utils.hf.chat import Tokenizer
from utils.data.problems import Problem

logger = logging.getLogger(__name__)
VERSION = 1  # of what `tokenise` makes: a new number leaves old caches behind


@dataclasses.dataclass(frozen=True)
class Examples:
    """Tokenised examples in one line: example i is `ids[starts[i]:starts[i + 1]]`, its first `prompts[i]` are the prompt."""

    ids: Int32[np.ndarray, "N"]
    starts: Int64[np.ndarray, "E+1"]
    prompts: Int32[np.ndarray, "E"]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> Int64[np.ndarray, "E"]:
        """Tokens of each example, prompt and answer."""
        return np.diff(self.starts)

    def example(self, i: int) -> tuple[np.ndarray, int]:
        """(token ids, how many of them are the prompt)."""
        return self.ids[self.starts[i] : self.starts[i + 1]], int(self.prompts[i])


def render(problem: Problem, tok: Tokenizer, chat: bool = True) -> tuple[str, str]:
    """(prompt, answer) as text; joined, they are the text to learn from, without the end-of-text.

    By the model's chat template, with the answer's reasoning kept; not `chat`, for base models: the message as it is.
    The prompt is to the letter what the model will be asked with later.
    """
    if not chat:
        return problem.messages[-1]["content"], problem.response
    prompt = tok.chat(problem.messages)
    opened = prompt[len(tok.chat(problem.messages, add_generation_prompt=False)) :]
    answer = problem.response
    if opened.rstrip().endswith("<think>"):  # R1's prompt opens the reasoning: an answer must not open it again
        answer = answer.strip().removeprefix("<think>").lstrip("\n")
    return prompt, answer


def tokenise(problems: Sequence[Problem], tok: Tokenizer, chat: bool = True, cache: Path | None = None) -> Examples:
    """Every problem as tokens, with the end-of-text after its answer.

    Prompt and answer are encoded apart and joined, as a model meets them: it reads the prompt, and then goes on. With a
    `cache` folder the result is kept there, under the checksum of everything that it depends on.
    """
    if not problems:
        raise CourseError("problems: expected at least one, found none: there is nothing to learn")
    if tok.eos_token_id is None:
        raise CourseError(f"{tok.name}: expected a tokenizer with an end-of-text token, found none")
    key = hashlib.sha256(f"{VERSION} {tok.digest} {chat}".encode())
    for problem in problems:
        key.update(json.dumps([problem.messages, problem.response]).encode())
    path = None if cache is None else cache / "tokens" / f"{key.hexdigest()[:32]}.npz"
    if path is not None and path.exists():
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as found:
                return Examples(found["ids"], found["starts"], found["prompts"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # a damaged cache is made again
            path.unlink(missing_ok=True)
    rows, prompts = [], []
    for problem in problems:
        prompt, answer = (tok.encode(text, begin=not i) for i, text in enumerate(render(problem, tok, chat)))
        rows.append(np.array([*prompt, *answer, tok.eos_token_id], np.int32))
        prompts.append(len(prompt))
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    examples = Examples(np.concatenate(rows), starts, np.array(prompts, np.int32))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(unfinished, **vars(examples))
        os.replace(unfinished, path)
    return examples


def fitting(examples: Examples, windows: Sequence[int]) -> dict[int, int]:
    """How many examples fit a window of so many tokens, for each."""
    return {window: int((examples.lengths - 1 <= window).sum()) for window in windows}


def within(examples: Examples, window: int, *, cut: bool = False) -> Examples:
    """The examples that fit `window`; with `cut` the longer ones too, their answers cut off. Says how many.

    An example has one input less than tokens. One whose prompt alone fills the window has no answer left, and is
    skipped in either case. Raises CourseError when none is left.
    """
    if window < 2:
        raise CourseError(f"window: expected at least 2 tokens, found {window}")
    lengths = examples.lengths
    long, hopeless = lengths - 1 > window, examples.prompts > window
    kept = np.flatnonzero(~hopeless if cut else ~long)
    if not len(kept):
        raise CourseError(
            f"window: {window} tokens are too few: the shortest of {len(lengths)} examples has {lengths.min() - 1}: "
            f"give at least {int(np.quantile(lengths - 1, 0.9))}, which nine in ten fit"
        )
    if long.any():
        was = f"{int((long & ~hopeless).sum())} cut, {int(hopeless.sum())} skipped" if cut else "skipped"
        logger.info(
            f"{int(long.sum())} of {len(lengths)} examples are longer than the window of {window} tokens: {was}"
        )
    rows = [examples.example(i)[0][: window + 1] for i in kept]
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return Examples(np.concatenate(rows), starts, examples.prompts[kept])


def to_rows(
    examples: Examples, window: int, *, packing: bool = True, answer_only: bool = True
) -> dict[str, np.ndarray]:
    """Rows of `window` places: inputs, targets, segments [R, T] int32 and weights [R, T] float32.

    With `packing`, whole examples share a row where they fit, longest first (best fit); without, one a row. Segment 0 is
    padding: no weight, and no example sees it. `examples` come from `within`.
    """
    sizes = examples.lengths - 1
    placed = packing.assign_rows(sizes, window) if packing else [[i] for i in range(len(examples))]
    shape = len(placed), window
    rows = {name: np.zeros(shape, np.int32) for name in ("inputs", "targets", "segment_ids")}
    rows["loss_mask"] = np.zeros(shape, np.float32)
    for row, members in enumerate(placed):
        at = 0
        for number, i in enumerate(members, start=1):
            ids, prompt = examples.example(i)
            place = slice(at, at + len(ids) - 1)
            rows["inputs"][row, place], rows["targets"][row, place] = ids[:-1], ids[1:]
            rows["segment_ids"][row, place] = number
            # The target at place t is token t + 1: the answer's first token is the target at the prompt's last place.
            rows["loss_mask"][row, place] = np.arange(1, len(ids)) >= (prompt if answer_only else 1)
            at += len(ids) - 1
    return rows


def batches(rows: dict[str, np.ndarray], batch_size: int, *, seed: int = 0) -> grain.DatasetIterator:
    """Endless batches of rows, in a new order each epoch. `get_state` and `set_state` continue exactly.

    `batch_size` is that of all processes together; each gets its own part, out of the same order. So a run may be
    continued with another number of processes.
    """
    count, hosts, host = len(rows["inputs"]), jax.process_count(), jax.process_index()
    if batch_size % hosts:
        raise CourseError(f"batch: expected a multiple of the {hosts} processes, found {batch_size}")
    if count < batch_size:
        raise CourseError(
            f"batch: expected at most {count} (the rows of this data), found {batch_size}: add examples, or shorten it"
        )
    mine = slice(host * batch_size // hosts, (host + 1) * batch_size // hosts)
    order = grain.MapDataset.range(count).seed(seed).shuffle().repeat().batch(batch_size, drop_remainder=True)
    dataset = order.map(lambda numbers: {name: array[np.asarray(numbers)[mine]] for name, array in rows.items()})
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
