"""How many problems does a model answer right? One model, or the base against its adapter.

A share of right answers comes from a sample: 30 of 100 says that the model would answer 22% to 40%
of all such problems. Two models that answer the same problems are compared problem by problem
(`paired`), which tells smaller differences from luck than two shares side by side do.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flax import nnx
from jaxtyping import Bool

from utils import generate, lora, train, unexpected
from utils.data import sft
from utils.data.problems import Problem
from utils.evaluation import answers
from utils.evaluation.intervals import newcombe, wilson

JUDGEMENTS = {"exact_match": "correct", "format_rate": "formatted"}
ROW = "{:14}{:>12}  {:18}{:>8}  {}"  # of a table


@dataclasses.dataclass(frozen=True)
class ExactMatch:
    """A model's completions of N problems, the answer in each, and two judgements of it."""

    completions: list[generate.Completion]
    answers: list[str | None]
    references: list[str]
    correct: Bool[np.ndarray, "N"]
    formatted: Bool[np.ndarray, "N"]

    @property
    def texts(self) -> list[str]:
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
        """Each model's numbers, and the adapter's less the base's with 95% intervals (Newcombe)."""
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
    """Two models' answers, to compare one by one. Raises CourseError for different problems."""
    if base.references != adapter.references:
        found = f"{len(base.references)} and {len(adapter.references)} of different ones"
        same = "answers to the same problems"
        raise unexpected("paired", same, found, "evaluate both models on one list")
    return Paired(base, adapter)


def evaluate(
    model, tok, problems, *, max_new_tokens=512, batch_size=16, chat=True, progress=True, **options
) -> ExactMatch:
    """Let a model (or what `generate.prepare` made of it) answer `Problem`s, and judge its answers.

    Greedily, unless `options` (of `generate`) differ. Prompts are those of training: through the
    model's chat template, or as they are (not `chat`), for base models. Answers in another form
    than asked for count too (`answers.extract`). Raises `CourseError` without problems, and before
    the first is answered for one without an answer, or one that the context is too short for.
    """
    if not problems:
        raise unexpected("problems", "at least one", "none", "there is nothing to answer")
    if batch_size < 1:
        raise unexpected("batch_size", "at least 1", batch_size)
    for number, problem in enumerate(problems, start=1):
        if not problem.answer:
            where = f"problem {number} ({problem.source})"
            raise unexpected(where, "an answer to compare with", "none", "add one")
    prompts = [sft.render(problem, tok, chat)[0] for problem in problems]
    # The longest first: what does not fit is refused at once. Of one size: one shape to compile.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    size = math.ceil(len(prompts) / math.ceil(len(prompts) / batch_size))
    prepared, options = generate.prepare(model), {"temperature": 0.0} | options
    completions, seed = [None] * len(prompts), options.pop("seed", 0)
    with train.progress_bar(len(prompts), "answer", shown=progress) as bar:
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            batch = [prompts[i] for i in rows] + [prompts[rows[-1]]] * (size - len(rows))
            options["seed"] = seed + start
            made = generate.generate(prepared, tok, batch, max_new_tokens, **options)
            for i, completion in zip(rows, made):
                completions[i] = completion
            bar.update(len(rows))
    extracted = [answers.extract(completion.text) for completion in completions]
    references = [problem.answer for problem in problems]
    correct = np.array([answers.equal(*pair) for pair in zip(extracted, references)])
    formatted = np.array([answers.formatted(completion.text) for completion in completions])
    return ExactMatch(completions, extracted, references, correct, formatted)


def compare(model: nnx.Module, tok, problems: Sequence[Problem], **options) -> Paired:
    """One model with its adapter switched off and on; `options` are those of `evaluate`.

    Raises CourseError for a model without an adapter, or with a merged one.
    """
    with lora.disabled(model):
        base = evaluate(model, tok, problems, **options)
    return paired(base, evaluate(model, tok, problems, **options))


def save(path: str | Path, problems: Sequence[Problem], result: ExactMatch | Paired) -> None:
    """Every problem with its answer and what each model wrote, a JSON object a line."""
    models = vars(result) if isinstance(result, Paired) else {"base": result}
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
    numbers = result.summary()
    count = numbers.get("base", numbers)["problems"]
    heads = ["exact match", "95% interval", "format", "95% interval"]
    lines = [ROW.format(f"{count} problems", *heads)]
    if not isinstance(result, Paired):
        return "\n".join([*lines, _line("", numbers, ".1%")])
    lines += [_line(name, numbers[name], ".1%") for name in ("base", "adapter")]
    lines.append(_line("difference", numbers, "+.1%"))
    gained, lost = numbers["gained"], numbers["lost"]
    lines.append(f"The adapter answers {gained} that the base does not, and loses {lost}.")
    return "\n".join(lines)


def _line(name: str, numbers: dict, form: str) -> str:
    cells = []
    for key in JUDGEMENTS:
        low, high = numbers[f"{key}_interval"]
        cells += [f"{numbers[key]:{form}}", f"{low:{form}} to {high:{form}}"]
    return ROW.format(name, *cells)
