"""Generation: one compiled prefill, then compiled chunks of decode steps over a KV cache.

Prefill reads the whole prompt at once and fills the cache; each decode step then reads one new token per row. Sampling
happens on the device, in chunks of `CHUNK` steps, so the host is asked only once per chunk: often enough to stream and
to stop, seldom enough not to slow the device down.

Prompts of different lengths share a batch without left padding: a row's tokens sit in the cache slots of their own
positions, a decode step overwrites whatever padding the prompt left there, and a token looks only at slots up to its
own position. So each row gets the answer it would get alone.
"""

import codecs
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tiktoken
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from utils import CourseError

CHUNK = 16  # decode steps per call of the device
BUCKET = 32  # prompt lengths and cache sizes are rounded up to this, so that few shapes are compiled


def sample(
    logits: Float[Array, "B V"],
    keys: PRNGKeyArray,
    temperature: float | Array = 1.0,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    greedy: bool = False,
) -> Int[Array, "B"]:
    """One token id per row, with one key per row [B].

    `top_k` keeps the k most likely tokens, `top_p` the smallest set whose probability reaches p (Holtzman et al. 2020);
    both look at the distribution after the temperature.
    """
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32) / temperature
    if top_k is not None:
        kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if top_p is not None:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        p = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(p, axis=-1) - p  # probability of all that is more likely: below p means "still needed"
        least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("graph", "slots", "greedy", "top_k", "top_p"))
def _prefill(graph, state, tokens, lengths, keys, temperature, *, slots, **sampling):
    """tokens [B, P], right-padded, lengths [B] -> the first new token [B] and the filled cache."""
    model = nnx.merge(graph, state)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    logits, cache = model(tokens, positions, model.new_cache(tokens.shape[0], slots))
    last = jnp.take_along_axis(logits, lengths[:, None, None] - 1, axis=1)[:, 0]
    return sample(last, _at(keys, lengths), temperature, **sampling), cache


@functools.partial(jax.jit, static_argnames=("graph", "greedy", "top_k", "top_p"), donate_argnums=2)
def _decode(graph, state, cache, tokens, positions, keys, temperature, **sampling):
    """CHUNK steps from tokens [B] standing at positions [B] -> new tokens [B, CHUNK], and the cache."""
    model = nnx.merge(graph, state)

    def step(carry, _):
        cache, tokens, positions = carry
        logits, cache = model(tokens[:, None], positions[:, None], cache)
        tokens = sample(logits[:, 0], _at(keys, positions + 1), temperature, **sampling)
        return (cache, tokens, positions + 1), tokens

    (cache, _, _), new = jax.lax.scan(step, (cache, tokens, positions), length=CHUNK)
    return new.T, cache


def _at(keys, positions):
    """A row's key for one position: what a row draws depends on its seed and its place, not on its neighbours."""
    return jax.vmap(jax.random.fold_in)(keys, positions)


def _chunks(model, tok, prompts, max_new_tokens, temperature, top_k, top_p, seed) -> Iterator[np.ndarray]:
    """Yields new tokens [B, n], chunk by chunk; rows that ended hold end-of-text from then on."""
    context, vocab = model.config.context, model.config.vocab_size
    if tok.n_vocab != vocab:
        raise CourseError(
            f"tokenizer {tok.name}: has {tok.n_vocab:,} ids, the model's vocabulary has {vocab:,}: "
            "use the tokenizer that the model was trained with"
        )
    if not temperature >= 0:
        raise CourseError(f"temperature: expected 0 (greedy) or more, found {temperature}")
    if top_k is not None and top_k < 1:
        raise CourseError(f"top_k: expected at least 1, found {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise CourseError(f"top_p: expected a probability above 0 and at most 1, found {top_p}")
    if isinstance(prompts, str) or not prompts:
        raise CourseError(f"prompts: expected a list of at least one text, found {prompts!r}")
    # A story begins after the end of the one before it: the model has learnt to start from that token.
    rows = [[tok.eot_token, *tok.encode_ordinary(prompt)] for prompt in prompts]
    longest = max(map(len, rows))
    if longest > context:
        worst = prompts[int(np.argmax([len(row) for row in rows]))]
        raise CourseError(
            f"prompt {worst[:30]!r}...: {longest} tokens with its start token, the model's context is {context}: "
            "shorten the prompt, or use a model with a longer context"
        )
    room = context - longest + 1  # the last new token need not be read again, so it needs no slot
    if max_new_tokens is None:
        max_new_tokens = room
    if not 1 <= max_new_tokens <= room:
        raise CourseError(
            f"max_new_tokens: expected 1 to {room} (a context of {context} less the longest prompt), "
            f"found {max_new_tokens}"
        )

    def up(n):
        return min(context, -(-n // BUCKET) * BUCKET)

    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.full((len(rows), up(longest)), tok.eot_token, np.int32)
    for row, filled in zip(rows, tokens):
        filled[: len(row)] = row
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(len(rows)))
    sampling = {"greedy": temperature == 0, "top_k": top_k, "top_p": top_p}
    graph, state = nnx.split(model)
    slots = up(longest + max_new_tokens - 1)
    new, cache = _prefill(graph, state, tokens, lengths, keys, temperature, slots=slots, **sampling)
    chunk, made, ended = np.array(new)[:, None], 0, np.zeros(len(rows), bool)
    positions = lengths.copy()  # where the token just made will stand
    while True:
        chunk = chunk[:, : max_new_tokens - made]
        for column in range(chunk.shape[1]):
            chunk[ended, column] = tok.eot_token
            ended |= chunk[:, column] == tok.eot_token
        made += chunk.shape[1]
        yield chunk
        if ended.all() or made >= max_new_tokens:
            return
        new, cache = _decode(graph, state, cache, chunk[:, -1], positions, keys, temperature, **sampling)
        chunk, positions = np.array(new), positions + CHUNK


def _text(tok, row) -> bytes:
    end = np.flatnonzero(row == tok.eot_token)
    return b"".join(tok.decode_tokens_bytes([int(t) for t in row[: end[0] if end.size else None]]))


def generate(
    model: nnx.Module,
    tok: tiktoken.Encoding,
    prompts: Sequence[str],
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> list[str]:
    """Continue each prompt until its end-of-text token, `max_new_tokens`, or the model's context is full.

    Returns the new text alone, one string per prompt. `temperature=0` is greedy. The same seed gives the same texts.
    Raises `CourseError` for a prompt or a length that does not fit, or a tokenizer that is not the model's.
    """
    chunks = list(_chunks(model, tok, prompts, max_new_tokens, temperature, top_k, top_p, seed))
    return [_text(tok, row).decode("utf-8", errors="replace") for row in np.concatenate(chunks, axis=1)]


def stream(
    model: nnx.Module,
    tok: tiktoken.Encoding,
    prompt: str,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """The same text as `generate` gives for one prompt, piece by piece, as it is made."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a token may end inside a character
    for chunk in _chunks(model, tok, [prompt], max_new_tokens, temperature, top_k, top_p, seed):
        if piece := decoder.decode(_text(tok, chunk[0])):
            yield piece
    if piece := decoder.decode(b"", final=True):
        yield piece
