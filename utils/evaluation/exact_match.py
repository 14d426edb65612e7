"""How many problems does a model answer right? One model, or the base against its adapter.

An answer is right or wrong, and a share of right ones comes from a sample: 30 of 100 says that the
model would answer 22% to 40% of all such problems. Two models that answer the same problems are
compared problem by problem (`paired`), which tells smaller differences from luck than two shares
side by side do.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flax import nnx
from jaxtyping import Bool

from utils import CourseError, generate, lora, train
from utils.data import sft
from utils.data.problems import Problem
from utils.evaluation import answers
from utils.evaluation.intervals import newcombe, wilson

JUDGEMENTS = {"exact_match": "correct", "format_rate": "formatted"}


@dataclasses.dataclass(frozen=True)
class ExactMatch:
    """A model's completions of N problems, the answer extracted from each, and two judgements of it."""

    completions: list[generate.Completion]
    answers: list[str | None]
    references: list[str]
    correct: Bool[np.ndarray, "N"]
    formatted: Bool[np.ndarray, "N"]

    @property
    def texts(self) -> list[str]:
        """The completions' texts."""
        return [completion.text for completion in self.completions]

    @property
    def rate(self) -> float:
        """The share of correct answers."""
        return float(self.correct.mean())

    @property
    def format_rate(self) -> float:
        """The share of answers in the form that the prompt asks for, right or wrong."""
        return float(self.formatted.mean())

    def summary(self) -> dict:
        """The numbers, with their 95% intervals (Wilson)."""
        numbers = {"problems": len(self.correct)}
        for name, judgement in JUDGEMENTS.items():
            verdicts = getattr(self, judgement)
            numbers[name] = float(verdicts.mean())
            numbers[f"{name}_interval"] = wilson(int(verdicts.sum()), len(verdicts))
        return numbers

    def __str__(self) -> str:
        return table(self)


@dataclasses.dataclass(frozen=True)
class Paired:
    """Two models' answers to the same problems."""

    base: ExactMatch
    adapter: ExactMatch

    def summary(self) -> dict:
        """Each model's numbers, and the adapter's less the base's with 95% intervals (paired,
        Newcombe)."""
        numbers = {"base": self.base.summary(), "adapter": self.adapter.summary()}
        for name, judgement in JUDGEMENTS.items():
            first, second = getattr(self.base, judgement), getattr(self.adapter, judgement)
            numbers[name] = float(second.mean() - first.mean())
            numbers[f"{name}_interval"] = newcombe(first, second)
        numbers["gained"] = int((self.adapter.correct & ~self.base.correct).sum())
        numbers["lost"] = int((self.base.correct & ~self.adapter.correct).sum())
        return numbers

    def __str__(self) -> str:
        return table(self)


def paired(base: ExactMatch, adapter: ExactMatch) -> Paired:
    """Two models' answers, to compare problem by problem. Raises CourseError for different problems."""
    if base.references != adapter.references:
        sizes = f"{len(base.references)} and {len(adapter.references)}"
        raise CourseError(
            f"paired: expected answers to the same problems, found {sizes} of different ones:"
            " evaluate both models on one list"
        )
    return Paired(base, adapter)


def evaluate(
    model: nnx.Module | generate.Prepared,
    tok,
    problems: Sequence[Problem],
    *,
    max_new_tokens: int = 512,
    batch_size: int = 16,
    chat: bool = True,
    progress: bool = True,
    **options,
) -> ExactMatch:
    """Let a model answer problems, and compare with their answers: greedily, unless `options` (of
    `generate`) differ.

    Prompts are those of training: through the model's chat template, or as they are (not `chat`),
    for base models. Every model's answers are extracted alike and leniently (`answers.extract`);
    `formatted` says which had the form. Raises `CourseError` without problems, for one without an
    answer to compare with, and for one that the context is too short for, before the first is
    answered.
    """
    if not problems:
        raise CourseError("problems: expected at least one, found none: there is nothing to answer")
    if batch_size < 1:
        raise CourseError(f"batch_size: expected at least 1, found {batch_size}")
    for number, problem in enumerate(problems, start=1):
        if not problem.answer:
            what = "expected an answer to compare with, found none: add one"
            raise CourseError(f"problem {number} ({problem.source}): {what}")
    prompts = [sft.render(problem, tok, chat)[0] for problem in problems]
    # The longest first: what does not fit is refused at once. Batches of one size: fewer shapes to
    # compile.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    size = math.ceil(len(prompts) / math.ceil(len(prompts) / batch_size))
    prepared, options = generate.prepare(model), {"temperature": 0.0} | options
    completions, seed = [None] * len(prompts), options.pop("seed", 0)
    with train.progress_bar(len(prompts), "answer", shown=progress) as bar:
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            batch = [prompts[i] for i in rows] + [prompts[rows[-1]]] * (size - len(rows))
            options["seed"] = seed + start
            batch = generate.generate(prepared, tok, batch, max_new_tokens, **options)
            for i, completion in zip(rows, batch):
                completions[i] = completion
            bar.update(len(rows))
    extracted = [answers.extract(completion.text) for completion in completions]
    references = [problem.answer for problem in problems]
    correct = np.array([answers.equal(*pair) for pair in zip(extracted, references)])
    formatted = np.array([answers.formatted(completion.text) for completion in completions])
    return ExactMatch(completions, extracted, references, correct, formatted)


def compare(model: nnx.Module, tok, problems: Sequence[Problem], **options) -> Paired:
    """The base and its adapter on the same problems: one model, whose adapter is switched off and on.

    `options` are those of `evaluate`. Raises CourseError for a model without an adapter, or with a
    merged one.
    """
    with lora.disabled(model):
        base = evaluate(model, tok, problems, **options)
    return paired(base, evaluate(model, tok, problems, **options))


def save(path: str | Path, problems: Sequence[Problem], result: ExactMatch | Paired) -> None:
    """Every problem with its answer and what each model wrote, a JSON object a line."""
    models = {"base": result}
    if isinstance(result, Paired):
        models = {"base": result.base, "adapter": result.adapter}
    with open(path, "w", encoding="utf-8") as file:
        for i, problem in enumerate(problems):
            row = {"messages": problem.messages, "answer": problem.answer}
            for name, one in models.items():
                text, _, finish_reason = one.completions[i]
                row[name] = {"text": text, "finish_reason": finish_reason, "answer": one.answers[i]}
                row[name] |= {"correct": bool(one.correct[i]), "formatted": bool(one.formatted[i])}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def table(result: ExactMatch | Paired) -> str:
    """The numbers for people: a line for each model, and one for the difference."""
    numbers, both = result.summary(), isinstance(result, Paired)
    models = {name: numbers[name] for name in ("base", "adapter")} if both else {"": numbers}
    count = (numbers["base"] if both else numbers)["problems"]
    header = f"{f'{count} problems':14}{'exact match':>12}  {'95% interval':18}{'format':>8}"
    lines = [f"{header}  95% interval"]

    def line(name: str, values: dict, form: str) -> str:
        cells = []
        for key in JUDGEMENTS:
            low, high = values[f"{key}_interval"]
            cells += [f"{values[key]:{form}}", f"{low:{form}} to {high:{form}}"]
        return "{:14}{:>12}  {:18}{:>8}  {}".format(name, *cells)

    lines += [line(name, values, ".1%") for name, values in models.items()]
    if both:
        lines.append(line("difference", numbers, "+.1%"))
        gained, lost = numbers["gained"], numbers["lost"]
        lines.append(f"The adapter answers {gained} that the base does not, and loses {lost}.")
    return "\n".join(lines)
