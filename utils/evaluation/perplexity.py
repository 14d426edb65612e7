"""How well does a model know stories? Its loss, in bits per character.

The loss in nats per token cannot be compared across tokenizers: a tokenizer with longer tokens has
fewer, harder guesses to make. Per character of text the guesses add up to the same story, so bits
per character can be compared across vocabularies. It is also a file size: a model of 1.0 bits per
character, used as a compressor, would store each character of 8 bits in 1.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tiktoken
from flax import nnx

from utils import CourseError


@dataclasses.dataclass(frozen=True)
class Score:
    """A model's loss on texts, in both units, and how many tokens and characters it is over."""

    bits_per_character: float
    nats_per_token: float
    tokens: int
    characters: int


@functools.partial(jax.jit, static_argnames="graph")
def _nats(graph, state, tokens, targets, loss_mask):
    logits = nnx.merge(graph, state)(tokens)
    logp = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(chosen * loss_mask)


def windows(
    row: Sequence[int] | np.ndarray, context: int
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Cut one story into (inputs, targets, loss_mask), each [context], that count each target once.

    The first window covers the start; every later one moves on by half a context and counts only
    what is new, so that every later guess sees at least half a context of its own story. `row` is
    start token, story, end token.
    """
    row, cuts, done, start = np.asarray(row, np.int32), [], 0, 0
    while done < len(row) - 1:
        start = max(0, min(start, len(row) - 1 - context))
        inputs, targets = row[start : start + context], row[start + 1 : start + context + 1]
        inputs = inputs[: len(targets)]
        loss_mask = (np.arange(start, start + len(targets)) >= done).astype(np.float32)
        done = start + len(targets)
        padding = (0, context - len(targets))
        cuts.append(tuple(np.pad(part, padding) for part in (inputs, targets, loss_mask)))
        start += max(1, context // 2)
    return cuts


def bits_per_character(
    model: nnx.Module, tok: tiktoken.Encoding, stories: Sequence[str], *, batch_size: int = 32
) -> Score:
    """The loss of every token of whole stories, their end-of-text included, over the stories'
    characters.

    Stories longer than the model's context are read through overlapping windows (see `windows`).
    """
    if isinstance(stories, str) or not any(stories):
        what = f"expected a list of at least one text, found {stories!r:.40}"
        raise CourseError(f"stories: {what}: nothing to evaluate on")
    context, eot = model.config.max_position_embeddings, tok.eot_token
    if tok.n_vocab != model.config.vocab_size:
        raise CourseError(
            f"tokenizer {tok.name}: has {tok.n_vocab:,} ids, the model's vocabulary has "
            f"{model.config.vocab_size:,}: use the tokenizer that the model was trained with"
        )
    rows = [[eot, *tok.encode_ordinary(story), eot] for story in stories]
    cuts = [np.stack(part) for part in zip(*(cut for row in rows for cut in windows(row, context)))]
    # Full batches only, so that one shape is compiled: empty windows count nothing.
    missing = -len(cuts[0]) % batch_size
    cuts = [np.pad(part, ((0, missing), (0, 0))) for part in cuts]
    graph, state = nnx.split(model)
    nats = math.fsum(
        float(_nats(graph, state, *(part[i : i + batch_size] for part in cuts)))
        for i in range(0, len(cuts[0]), batch_size)
    )
    tokens, characters = sum(len(row) - 1 for row in rows), sum(map(len, stories))
    return Score(nats / math.log(2) / characters, nats / tokens, tokens, characters)
