"""How well does a model know stories? Its loss, in bits per character.

Nats per token cannot be compared across tokenizers: one with longer tokens has fewer, harder
guesses to make. Bits per character can. They are also a file size: a model of 1.0, used as a
compressor, would store each character of 8 bits in 1.
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

from utils import CourseError, unexpected


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


def windows(row: Sequence[int] | np.ndarray, context: int) -> list[tuple[np.ndarray, ...]]:
    """Cut one story into (inputs, targets, loss_mask), each [context], that count each target once.

    Every window after the first moves on by half a context and counts only what is new: a guess
    sees at least half a context of its own story. `row` is start token, story, end token.
    """
    row, last, cuts = np.asarray(row, np.int32), len(row) - 1, []
    start = counted = 0
    while counted < last:
        start = max(0, min(start, last - context))
        end = min(start + context, last)
        loss_mask = (np.arange(start, end) >= counted).astype(np.float32)
        parts = row[start:end], row[start + 1 : end + 1], loss_mask
        cuts.append(tuple(np.pad(part, (0, start + context - end)) for part in parts))
        counted = end
        start += max(1, context // 2)
    return cuts


def bits_per_character(
    model: nnx.Module, tok: tiktoken.Encoding, stories: Sequence[str], *, batch_size: int = 32
) -> Score:
    """The loss of every token of whole stories, with their end-of-text, over their characters.

    Stories longer than the model's context are read through overlapping `windows`.
    """
    if isinstance(stories, str) or not any(stories):
        found = f"{stories!r:.40}"
        raise unexpected("stories", "a list of at least one text", found, "nothing to evaluate on")
    context, eot = model.config.max_position_embeddings, tok.eot_token
    if tok.n_vocab != model.config.vocab_size:
        what = f"has {tok.n_vocab:,} ids, the model's vocabulary has {model.config.vocab_size:,}"
        fix = "use the tokenizer that the model was trained with"
        raise CourseError(f"tokenizer {tok.name}: {what}: {fix}")
    rows = [[eot, *tok.encode_ordinary(story), eot] for story in stories]
    cuts = [np.stack(part) for part in zip(*(cut for row in rows for cut in windows(row, context)))]
    # Full batches only, so that one shape is compiled: empty windows count nothing.
    padding = (0, -len(cuts[0]) % batch_size), (0, 0)
    batches = zip(*(np.pad(part, padding).reshape(-1, batch_size, context) for part in cuts))
    graph, state = nnx.split(model)
    nats = math.fsum(float(_nats(graph, state, *batch)) for batch in batches)
    tokens, characters = sum(len(row) - 1 for row in rows), sum(map(len, stories))
    return Score(nats / math.log(2) / characters, nats / tokens, tokens, characters)
