r"""How good is a model? Of stories: its loss, in bits per character. Of problems: how many it answers right.

The loss in nats per token cannot be compared across tokenizers: a tokenizer with longer tokens has fewer, harder
guesses to make. Per character of text the guesses add up to the same story, so bits per character can be compared
across vocabularies. It is also a file size: a model of 1.0 bits per character, used as a compressor, would store each
character of 8 bits in 1.

Answers to problems are right or wrong (`exact_match`), and a share of right ones comes from a sample: 30 of 100 says that
the model would answer 22% to 40% of all such problems. Two models that answer the same problems are compared problem by
problem (`paired`), which tells smaller differences from luck than two shares side by side do.
"""

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tiktoken
from flax import nnx
from jaxtyping import Bool
from tqdm import tqdm

from utils import CourseError, generate, lora
from utils.data import sft
from utils.evaluation import answers
from utils.evaluation.intervals import newcombe, wilson
from utils.data.problems import Problem


@dataclasses.dataclass(frozen=True)
class Score:
    """What `bits_per_character` found, and what it counted."""

    bits_per_character: float
    nats_per_token: float
    tokens: int
    characters: int


@functools.partial(jax.jit, static_argnames="graph")
def _nats(graph, state, tokens, targets, counted):
    logits = nnx.merge(graph, state)(tokens)
    logp = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(chosen * counted)


def windows(row: Sequence[int], context: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Cut one story into (inputs, targets, counted), each [context], that count each target once.

    The first window covers the start; every later one moves on by half a context and counts only what is new, so that
    every later guess sees at least half a context of its own story. `row` is start token, story, end token.
    """
    row, cuts, done, start = np.asarray(row, np.int32), [], 0, 0
    while done < len(row) - 1:
        start = max(0, min(start, len(row) - 1 - context))
        inputs, targets = row[start : start + context], row[start + 1 : start + context + 1]
        inputs = inputs[: len(targets)]
        counted = (np.arange(start, start + len(targets)) >= done).astype(np.float32)
        done = start + len(targets)
        pad = (0, context - len(targets))
        cuts.append((np.pad(inputs, pad), np.pad(targets, pad), np.pad(counted, pad)))
        start += max(1, context // 2)
    return cuts


def bits_per_character(
    model: nnx.Module, tok: tiktoken.Encoding, stories: Sequence[str], *, batch_size: int = 32
) -> Score:
    """The loss of every token of whole stories, the end-of-story token included, over the stories' characters.

    Stories longer than the model's context are read through overlapping windows (see `windows`).
    """
    if isinstance(stories, str) or not any(stories):
        raise CourseError(
            f"stories: expected a list of at least one text, found {stories!r:.40}: nothing to evaluate on"
        )
    context, eot = model.config.max_position_embeddings, tok.eot_token
    if tok.n_vocab != model.config.vocab_size:
        raise CourseError(
            f"tokenizer {tok.name}: has {tok.n_vocab:,} ids, the model's vocabulary has "
            f"{model.config.vocab_size:,}: use the tokenizer that the model was trained with"
        )
    rows = [[eot, *tok.encode_ordinary(story), eot] for story in stories]
    cuts = [np.stack(part) for part in zip(*(cut for row in rows for cut in windows(row, context)))]
    # Whole batches only, so that one shape is compiled: empty windows count nothing.
    missing = -len(cuts[0]) % batch_size
    cuts = [np.pad(part, ((0, missing), (0, 0))) for part in cuts]
    graph, state = nnx.split(model)
    nats = math.fsum(
        float(_nats(graph, state, *(part[i : i + batch_size] for part in cuts)))
        for i in range(0, len(cuts[0]), batch_size)
    )
    tokens, characters = sum(len(row) - 1 for row in rows), sum(map(len, stories))
    return Score(nats / math.log(2) / characters, nats / tokens, tokens, characters)


# ------------------------------------------------------------------------------------------------- answers to problems


@dataclasses.dataclass(frozen=True)
class ExactMatch:
    """A model's answers to N problems: the texts, what was extracted, what was wanted, and the two judgements."""

    texts: list[str]
    found: list[str | None]
    wanted: list[str]
    correct: Bool[np.ndarray, "N"]
    formatted: Bool[np.ndarray, "N"]

    @property
    def rate(self) -> float:
        """The share of correct answers."""
        return float(self.correct.mean())

    @property
    def format_rate(self) -> float:
        """The share of answers in the form asked for, right or wrong."""
        return float(self.formatted.mean())

    def summary(self) -> dict:
        """The numbers, with their 95% intervals (Wilson)."""
        n = len(self.correct)
        return {
            "problems": n,
            "exact_match": self.rate,
            "exact_match_interval": wilson(int(self.correct.sum()), n),
            "format_rate": self.format_rate,
            "format_rate_interval": wilson(int(self.formatted.sum()), n),
        }


@dataclasses.dataclass(frozen=True)
class Paired:
    """Two models' answers to the same problems."""

    base: ExactMatch
    adapter: ExactMatch

    def summary(self) -> dict:
        """Each model's numbers, and the adapter's less the base's with their 95% intervals (paired, Newcombe)."""
        found = {"base": self.base.summary(), "adapter": self.adapter.summary()}
        for name, judgement in (("exact_match", "correct"), ("format_rate", "formatted")):
            first, second = getattr(self.base, judgement), getattr(self.adapter, judgement)
            found |= {name: float(second.mean() - first.mean()), f"{name}_interval": newcombe(first, second)}
        found["gained"] = int((self.adapter.correct & ~self.base.correct).sum())
        found["lost"] = int((self.base.correct & ~self.adapter.correct).sum())
        return found


def paired(base: ExactMatch, adapter: ExactMatch) -> Paired:
    """Two models' answers, to be compared problem by problem. Raises CourseError for answers to different problems."""
    if base.wanted != adapter.wanted:
        raise CourseError(
            f"paired: expected answers to the same problems, found {len(base.wanted)} and {len(adapter.wanted)} of"
            " different ones: evaluate both models on one list"
        )
    return Paired(base, adapter)


def exact_match(
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
    """Let a model answer problems, and compare with their answers: greedily, unless `options` (of `generate`) say else.

    Problems are put as in training: through the model's chat template, or as they are (not `chat`), for base models.
    Every model's answers are extracted alike and leniently (`answers.extract`); `formatted` says which had the form.
    Raises `CourseError` without problems, for one without an answer to compare with, and one that the context is too
    short for, before the first is answered.
    """
    if not problems:
        raise CourseError("problems: expected at least one, found none: there is nothing to answer")
    if batch_size < 1:
        raise CourseError(f"batch_size: expected at least 1, found {batch_size}")
    for number, problem in enumerate(problems, start=1):
        if not problem.answer:
            raise CourseError(
                f"problem {number} ({problem.source}): expected an answer to compare with, found none: add one"
            )
    prompts = [sft.render(problem, tok, chat)[0] for problem in problems]
    # The longest first: what does not fit is refused at once. Batches of one size: fewer shapes to compile.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    size = math.ceil(len(prompts) / math.ceil(len(prompts) / batch_size))
    prepared, texts, options = generate.prepare(model), [""] * len(prompts), {"temperature": 0.0} | options
    seed = options.pop("seed", 0)
    with tqdm(total=len(prompts), disable=not progress, file=sys.stdout, unit="answer", mininterval=1.0) as bar:
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            asked = [prompts[i] for i in batch] + [prompts[batch[-1]]] * (size - len(batch))
            made = generate.generate(prepared, tok, asked, max_new_tokens, seed=seed + start, **options)
            for i, text in zip(batch, made):
                texts[i] = text
            bar.update(len(batch))
    found, wanted = [answers.extract(text) for text in texts], [problem.answer for problem in problems]
    correct = np.array([answers.equal(*pair) for pair in zip(found, wanted)])
    return ExactMatch(texts, found, wanted, correct, np.array([answers.formatted(text) for text in texts]))


def compare(model: nnx.Module, tok, problems: Sequence[Problem], **options) -> Paired:
    """The base and its adapter on the same problems: one model, whose adapter is switched off and on.

    `options` are those of `exact_match`. Raises CourseError for a model without an adapter, or with a merged one.
    """
    with lora.disabled(model):
        base = exact_match(model, tok, problems, **options)
    return paired(base, exact_match(model, tok, problems, **options))


def save(path: str | Path, problems: Sequence[Problem], result: ExactMatch | Paired) -> None:
    """Every problem with its answer and what each model said, a JSON object a line."""
    models = {"base": result.base, "adapter": result.adapter} if isinstance(result, Paired) else {"base": result}
    with open(path, "w", encoding="utf-8") as file:
        for i, problem in enumerate(problems):
            row = {"messages": problem.messages, "answer": problem.answer}
            for name, one in models.items():
                row[name] = {"text": one.texts[i], "found": one.found[i]}
                row[name] |= {"correct": bool(one.correct[i]), "formatted": bool(one.formatted[i])}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def table(result: ExactMatch | Paired) -> str:
    """The numbers for people: a line for each model, and one for the difference."""
    found = result.summary()
    rows = [("base", found["base"]), ("adapter", found["adapter"])] if isinstance(result, Paired) else [("", found)]
    number = (found["base"] if isinstance(result, Paired) else found)["problems"]
    lines = [f"{f'{number} problems':14}{'exact match':>12}  {'95% interval':18}{'format':>8}  95% interval"]

    def line(name: str, values: dict, form: str) -> str:
        def cell(key: str) -> tuple[str, str]:
            low, high = values[f"{key}_interval"]
            return f"{values[key]:{form}}", f"{low:{form}} to {high:{form}}"

        return "{:14}{:>12}  {:18}{:>8}  {}".format(name, *cell("exact_match"), *cell("format_rate"))

    lines += [line(name, values, ".1%") for name, values in rows]
    if isinstance(result, Paired):
        lines.append(line("difference", found, "+.1%"))
        lines.append(f"The adapter answers {found['gained']} that the base does not, and loses {found['lost']}.")
    return "\n".join(lines)
