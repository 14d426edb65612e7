"""Generation: one compiled prefill, then compiled chunks of decode steps over a KV cache.

Prefill reads the whole prompt at once and fills the cache; each decode step then reads one new token per row. Sampling
happens on the device, in chunks of `CHUNK` steps, so the host is asked only once per chunk: often enough to stream and
to stop, seldom enough not to slow the device down.

Prompts of different lengths share a batch without left padding: a row's tokens sit in the cache slots of their own
positions, a decode step overwrites whatever padding the prompt left there, and a token looks only at slots up to its
own position. So each row gets the answer it would get alone.

MiniGPT comes with a tiktoken encoding, Qwen2 and Llama with `hub.tokenizer(...)`; both go through here.
"""

import codecs
import dataclasses
import functools
import logging
import math
import os
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tiktoken
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from utils import CourseError
from utils.kernels import cpu

logger = logging.getLogger(__name__)
CHUNK = 16  # decode steps per call of the device
DEFAULT_NEW = 512  # new tokens when nobody says how many, and the context has room for them


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
        # The first of the largest, in two passes: XLA's argmax takes one number at a time on a CPU.
        below = logits < logits.max(axis=-1, keepdims=True)
        return jnp.where(below, logits.shape[-1], jnp.arange(logits.shape[-1])).min(axis=-1).astype(jnp.int32)
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


def penalise(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: float | Array) -> Float[Array, "B V"]:
    """Tokens a row has seen, less likely: positive logits divided, negative ones multiplied (Keskar et al. 2019)."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


@dataclasses.dataclass(frozen=True)
class Options:
    """How the next token is chosen, and what ends an answer. Raises `CourseError` for a value that cannot be meant."""

    temperature: float = 1.0
    """0 is greedy: always the most likely token"""
    top_k: int | None = None
    """keep the k most likely tokens"""
    top_p: float | None = None
    """keep the smallest set of tokens whose probability reaches p"""
    repetition_penalty: float = 1.0
    """above 1 makes tokens less likely that the prompt or the answer has had"""
    stop: tuple[str | int, ...] = ()
    """texts and token ids that end an answer, beside the tokenizer's own; they are not returned"""
    seed: int = 0
    """the same seed gives the same text"""

    def __post_init__(self):
        if not (_real(self.temperature) and 0 <= self.temperature < math.inf):
            raise CourseError(f"temperature: expected 0 (greedy) or more, found {self.temperature!r}")
        if self.top_k is not None and not (_whole(self.top_k) and self.top_k >= 1):
            raise CourseError(f"top_k: expected a whole number of at least 1, found {self.top_k!r}")
        if self.top_p is not None and not (_real(self.top_p) and 0 < self.top_p <= 1):
            raise CourseError(f"top_p: expected a probability above 0 and at most 1, found {self.top_p!r}")
        if not (_real(self.repetition_penalty) and 0 < self.repetition_penalty < math.inf):
            raise CourseError(
                f"repetition_penalty: expected a number above 0 (1 is none), found {self.repetition_penalty!r}"
            )
        listed = isinstance(self.stop, Collection) and not isinstance(self.stop, str | bytes)
        if not listed or not all(_whole(s) or (isinstance(s, str) and s) for s in self.stop):
            raise CourseError(f"stop: expected a list of texts and token ids, found {self.stop!r:.60}")
        if not (_whole(self.seed) and -(2**31) <= self.seed < 2**32):  # of a larger one JAX would keep 32 bits
            raise CourseError(f"seed: expected a whole number of 32 bits, found {self.seed!r}")


def _whole(value) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _real(value) -> bool:
    return _whole(value) or isinstance(value, float | np.floating)


# ------------------------------------------------------------------------------------------------------- on the device


class Prepared:
    """A model split for generation: one layout for the prefill, another for decoding (`prepare`)."""

    def __init__(self, model: nnx.Module):
        self.config, self.cache_dtype = model.config, getattr(model, "cache_dtype", jnp.float32)
        self.prefill = self._decode = _split(model)
        self._apart = hasattr(model, "unstacked") and jax.default_backend() == "cpu"
        self._few = cpu.SMALL_BATCH if self._apart and model.dtype == jnp.bfloat16 else 0
        self._paired = None

    def decode(self, rows: int) -> tuple[tuple, bool]:
        """((graph, state) for decode steps of so many rows, whether it is `paired`). Made when first asked for, then kept.

        On a CPU the steps of a Transformer get a layout of their own, which costs the memory of its blocks again:
        `unstacked`, and for a few rows of bfloat16 `paired`. They say why.
        """
        paired = rows <= self._few
        if self._apart and paired is not self._paired:
            self._decode = None  # one of the two is in memory, never both
            model = nnx.merge(*self.prefill)
            self._decode, self._paired = _split(model.paired() if paired else model.unstacked()), paired
        return self._decode, paired


def prepare(model: nnx.Module) -> Prepared:
    """What `generate` and `stream` make of a model on every call; make it once to generate many times.

    Later changes to the model do not reach what was prepared.
    """
    return model if isinstance(model, Prepared) else Prepared(model)


def _split(model: nnx.Module) -> tuple:
    """(graph, state), with variables of its own for the model's arrays: those of `nnx.split` would follow the model."""
    graph, state = nnx.split(model)
    return graph, jax.tree.map(lambda x: x, state)


class _State(NamedTuple):
    """What one decode step hands to the next."""

    cache: Any
    tokens: Int[Array, "B"]
    positions: Int[Array, "B"]
    seen: Bool[Array, "B V"] | None  # tokens of each row's text so far, where a penalty asks for them


def _choose(logits, keys, positions, seen, vocabulary: int, numbers: dict, sampling: dict):
    """The next token [B] of each row, standing at `positions`, out of the ids that the tokenizer knows."""
    # Rows of the head beyond the tokenizer's ids are padding: their logits are whatever training left there.
    logits = jnp.where(jnp.arange(logits.shape[-1]) < vocabulary, logits, -jnp.inf)
    if seen is not None:
        logits = penalise(logits, seen, numbers["penalty"])
    # A row's key for one position: what a row draws depends on its seed and its place, not on its neighbours.
    keys = jax.vmap(jax.random.fold_in)(keys, positions)
    return sample(logits, keys, numbers["temperature"], **sampling)


@functools.partial(jax.jit, static_argnames=("graph", "slots", "apart", "vocabulary", "greedy", "top_k", "top_p"))
def _prefill(graph, state, tokens, lengths, keys, seen, numbers, *, slots, apart, vocabulary, **sampling):
    """tokens [B, P], right-padded, lengths [B] -> the first new token [B] and the state from which to decode."""
    model = nnx.merge(graph, state)
    x, cache = model.hidden(tokens, None, model.new_cache(tokens.shape[0], slots))
    # The output layer for the last token of each prompt alone: for all of them it would be the largest array here.
    last = jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)[:, 0]
    new = _choose(model.logits(last), keys, lengths, seen, vocabulary, numbers, sampling)
    if seen is not None:
        seen = seen.at[jnp.arange(len(new)), new].set(True)
    if apart:  # one array per layer, for the unstacked layout
        cache = type(cache)(tuple(cache.k), tuple(cache.v))
    return new, _State(cache, new, lengths, seen)


@functools.cache
def _compiled(paired: bool):
    """`_decode` as it is compiled, for a layout that is `paired` or for others."""
    static = ("graph", "vocabulary", "greedy", "top_k", "top_p")
    options = cpu.compiler_options() if paired else None
    return jax.jit(_decode, static_argnames=static, donate_argnums=2, compiler_options=options)


def _decode(graph, weights, state, keys, numbers, *, vocabulary, **sampling):
    """CHUNK steps -> new tokens [B, CHUNK], and the state after them."""
    model = nnx.merge(graph, weights)

    def step(state, _):
        x, cache = model.hidden(state.tokens[:, None], state.positions[:, None], state.cache)
        new = _choose(model.logits(x[:, 0]), keys, state.positions + 1, state.seen, vocabulary, numbers, sampling)
        seen = state.seen if state.seen is None else state.seen.at[jnp.arange(len(new)), new].set(True)
        return _State(cache, new, state.positions + 1, seen), new

    state, new = jax.lax.scan(step, state, length=CHUNK)
    return new.T, state


# --------------------------------------------------------------------------------------------------------- on the host


class _Codec:
    """What generation asks of a tokenizer, the same for a tiktoken encoding and for a model's own (`utils/chat.py`)."""

    def __init__(self, tok, vocab_size: int):
        self.tok, self.own = tok, isinstance(tok, tiktoken.Encoding)
        fits = tok.n_vocab == vocab_size if self.own else tok.n_vocab <= vocab_size
        if not fits:
            raise CourseError(
                f"tokenizer {tok.name}: has {tok.n_vocab:,} ids, the model's vocabulary has {vocab_size:,}: "
                "use the tokenizer that the model was trained with"
            )
        self.ends = {tok.eot_token} if self.own else set(tok.stop_ids)

    def encode(self, prompt: str) -> list[int]:
        # A story begins after the end of the one before it: MiniGPT has learnt to start from that token.
        return [self.tok.eot_token, *self.tok.encode_ordinary(prompt)] if self.own else self.tok.encode(prompt)

    def decoder(self):
        return _Bytes(self.tok) if self.own else self.tok.stream()


class _Bytes:
    """Tokens of a tiktoken encoding to text: whole characters only, a token may end inside one."""

    def __init__(self, tok: tiktoken.Encoding):
        self.tok, self.utf8 = tok, codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Sequence[int]) -> str:
        return self.utf8.decode(b"".join(self.tok.decode_tokens_bytes(list(ids))))

    def flush(self) -> str:
        return self.utf8.decode(b"", final=True)


class _Row:
    """The text of one row as it grows: ends at a stop token or string, and holds back what may become a stop string."""

    def __init__(self, decoder, stops: Sequence[str], ends: set[int]):
        self.decoder, self.stops, self.ends = decoder, stops, ends
        self.held, self.done = "", False

    def push(self, ids: Sequence[int]) -> str:
        """The text that is certain after these tokens."""
        if self.done:
            return ""
        cut = next((i for i, token in enumerate(ids) if token in self.ends), None)
        self.held += self.decoder.push([int(i) for i in ids[:cut]])
        if cut is not None:
            return self.close()
        if (found := self._find()) is not None:
            return found
        keep = max((n for s in self.stops for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0)
        out, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return out

    def close(self) -> str:
        """The rest: no more tokens will come."""
        if self.done:
            return ""
        self.held += self.decoder.flush()
        if (found := self._find()) is not None:
            return found
        self.done = True
        return self.held

    def _find(self) -> str | None:
        places = [place for s in self.stops if (place := self.held.find(s)) >= 0]
        if not places:
            return None
        self.done = True
        return self.held[: min(places)]


def cache_bytes(config, batch: int, slots: int, dtype=jnp.bfloat16) -> int:
    """Bytes of a KV cache: keys and values, for each layer, row, slot, key/value head and number of a head.

    Generation states it before the cache is made, at level INFO of the logger `utils.generate`.
    """
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    return 2 * config.num_hidden_layers * batch * slots * heads * config.head_dim * jnp.dtype(dtype).itemsize


def _up(n: int, context: int) -> int:
    """Prompt lengths and cache sizes are rounded up, so that few shapes are compiled."""
    step = 32 if n <= 256 else 256
    return min(context, -(-n // step) * step)


def _free_memory() -> int:
    """Bytes a new array may take: what the accelerator has left, or the memory of this machine."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 62


def _chunks(model, tok, prompts, max_new_tokens, options: Options) -> Iterator[list[str]]:
    """Yields each row's new text, chunk by chunk; a row that has ended yields nothing more."""
    if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise CourseError(f"prompts: expected a list of at least one text, found {prompts!r:.60}")
    config = model.config
    context, codec = config.max_position_embeddings, _Codec(tok, config.vocab_size)
    rows = [codec.encode(prompt) for prompt in prompts]
    if not all(rows):
        raise CourseError(f"prompts: expected some text in each, found {prompts[rows.index([])]!r}: it has no token")
    longest = max(map(len, rows))
    if longest > context:
        worst = prompts[int(np.argmax([len(row) for row in rows]))]
        raise CourseError(
            f"prompt {worst[:30]!r}...: {longest} tokens with its start token, the model's context is {context}: "
            "shorten the prompt, or use a model with a longer context"
        )
    room = context - longest + 1  # the last new token need not be read again, so it needs no slot
    if max_new_tokens is None:
        max_new_tokens = min(room, DEFAULT_NEW)
    if not (_whole(max_new_tokens) and 1 <= max_new_tokens <= room):
        raise CourseError(
            f"max_new_tokens: expected 1 to {room} (a context of {context} less the longest prompt), "
            f"found {max_new_tokens!r}"
        )
    slots = _up(longest + max_new_tokens - 1, context)
    needed, free = cache_bytes(config, len(rows), slots, getattr(model, "cache_dtype", jnp.float32)), _free_memory()
    size = f"KV cache: {len(rows)} row{'s'[: len(rows) > 1]} of {slots} tokens: {needed / 1e6:,.1f} MB"
    if needed > free:
        raise CourseError(f"{size}, but {free / 1e6:,.1f} MB are free: give fewer prompts at once, or fewer new tokens")
    logger.info(size)
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), _up(longest, context)), np.int32)
    seen = None if options.repetition_penalty == 1 else np.zeros((len(rows), config.vocab_size), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        if seen is not None:
            seen[i, row] = True
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(options.seed), jnp.arange(len(rows)))
    numbers = {"temperature": np.float32(options.temperature or 1), "penalty": np.float32(options.repetition_penalty)}
    static = {"greedy": options.temperature == 0, "top_k": options.top_k, "top_p": options.top_p}
    static["vocabulary"] = tok.n_vocab
    prepared = prepare(model)
    layout, paired = prepared.decode(len(rows))
    apart = layout is not prepared.prefill
    new, state = _prefill(*prepared.prefill, tokens, lengths, keys, seen, numbers, slots=slots, apart=apart, **static)
    ends = codec.ends | {int(s) for s in options.stop if _whole(s)}
    texts = [_Row(codec.decoder(), [s for s in options.stop if isinstance(s, str)], ends) for _ in rows]
    chunk, made = np.array(new)[:, None], 0
    while True:
        chunk = chunk[:, : max_new_tokens - made]
        made += chunk.shape[1]
        pieces = [text.push(ids) for text, ids in zip(texts, chunk.tolist())]
        if made >= max_new_tokens:
            pieces = [piece + text.close() for piece, text in zip(pieces, texts)]
        yield pieces
        if made >= max_new_tokens or all(text.done for text in texts):
            return
        new, state = _compiled(paired)(*layout, state, keys, numbers, **static)
        chunk = np.array(new)


def generate(
    model: nnx.Module | Prepared, tok, prompts: Sequence[str], max_new_tokens: int | None = None, **options
) -> list[str]:
    """Continue each prompt until a stop token or string, `max_new_tokens` (default: 512), or the model's context is full.

    Returns the new text alone, one string per prompt. `options` are the fields of `Options`: temperature, top_k, top_p,
    repetition_penalty, stop, seed. `tok` is the model's tokenizer: a tiktoken encoding or `hub.tokenizer(...)`. Raises
    `CourseError` for a prompt or a length that does not fit, or a tokenizer that is not the model's.
    """
    chunks = _chunks(model, tok, prompts, max_new_tokens, Options(**options))
    return ["".join(pieces) for pieces in zip(*chunks)]


def stream(
    model: nnx.Module | Prepared, tok, prompt: str, max_new_tokens: int | None = None, **options
) -> Iterator[str]:
    """The same text as `generate` gives for one prompt, with the same options, piece by piece, as it is made."""
    for (piece,) in _chunks(model, tok, [prompt], max_new_tokens, Options(**options)):
        if piece:
            yield piece
