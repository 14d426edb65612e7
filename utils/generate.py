"""Generation: one compiled prefill, then compiled chunks of decode steps over a KV cache.

Prefill reads the whole prompt at once and fills the cache; each decode step then reads one new
token per row. Sampling happens on the device, in chunks of `CHUNK` steps, so the host is asked once
a chunk: often enough to stream and to stop, seldom enough not to slow the device down.

Prompts of different lengths share a batch without left padding: tokens are cached at their row's own
positions, in place of a prompt's padding, and see the cache only up to theirs. So each row gets the
answer it would get alone.

A tokenizer `tok` is a tiktoken encoding for MiniGPT, `hf.hub.tokenizer(...)` for Qwen2 and Llama.
"""

import codecs
import dataclasses
import functools
import logging
import math
import os
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tiktoken
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from utils import CourseError, kernels, unexpected
from utils.kv_cache import KVCache

logger = logging.getLogger(__name__)
CHUNK = 16  # decode steps per call of the device
DEFAULT_MAX_NEW_TOKENS = 512  # where the context has room for them


class Completion(NamedTuple):
    """The new text of one prompt, its token ids without the one that ended it, and why it ended."""

    text: str
    ids: list[int]  # where a stop string ended the text, they reach to the token that completed it
    # "stop": a stop token or string; "length": max_new_tokens, or the context, was used up
    finish_reason: str


def sample(
    logits: Float[Array, "B V"],
    keys: Key[Array, "B"] | None,
    temperature: float | Array = 1.0,
    *,
    top_k: int | Array | None = None,
    top_p: float | Array | None = None,
    greedy: bool = False,
    max_top_k: int | None = None,
) -> Int[Array, "B"]:
    """One token id per row, with one key per row [B].

    `top_k` keeps the k most likely tokens, `top_p` the smallest set whose probability reaches p
    (Holtzman et al. 2020), both of the distribution after the temperature. They may be traced, so that
    one program serves all values; `max_top_k` is then a static bound of k (V by default).
    """
    V = logits.shape[-1]
    if greedy:
        # The first of the largest, in two passes: XLA's argmax takes one number at a time on a CPU.
        below = logits < logits.max(axis=-1, keepdims=True)
        return jnp.where(below, V, jnp.arange(V)).min(axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32) / temperature
    if top_k is not None:
        bound = max_top_k or (top_k if isinstance(top_k, int) else V)
        largest = jax.lax.top_k(logits, min(bound, V))[0]
        kth = jnp.take(largest, jnp.minimum(top_k, V) - 1, axis=-1)[:, None]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if top_p is not None:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        p = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(p, axis=-1) - p  # of all likelier tokens; below top_p: needed too
        least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def penalise(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: float | Array
) -> Float[Array, "B V"]:
    """Seen tokens less likely: positive logits divided, negative multiplied (Keskar et al. 2019)."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


@dataclasses.dataclass(frozen=True)
class Options:
    """How the next token is chosen, and what ends an answer. Raises `CourseError` for bad values."""

    temperature: float = 1.0  # 0 is greedy: always the most likely token
    top_k: int | None = None  # keep the k most likely tokens
    top_p: float | None = None  # keep the smallest set of tokens whose probability reaches p
    repetition_penalty: float = 1.0  # above 1: less likely are tokens of the prompt or the answer
    # texts and token ids that end an answer, beside the tokenizer's own; they are not returned
    stop: tuple[str | int, ...] = ()
    seed: int = 0  # the same seed gives the same text

    def __post_init__(self):
        k, p, stop, penalty = self.top_k, self.top_p, self.stop, self.repetition_penalty
        listed = isinstance(stop, Collection) and not isinstance(stop, str | bytes)
        stops = listed and all(_whole(s) or (isinstance(s, str) and s) for s in stop)
        good = {  # JAX would keep 32 bits of a larger seed
            "temperature": (_real(self.temperature, 0), "0 (greedy) or more"),
            "top_k": (k is None or _whole(k, 1), "a whole number of at least 1"),
            "top_p": (p is None or _real(p, 1e-30, 1), "a probability above 0 and at most 1"),
            "repetition_penalty": (_real(penalty, 1e-30), "a number above 0 (1 is none)"),
            "stop": (stops, "a list of texts and token ids"),
            "seed": (_whole(self.seed, -(2**31), 2**32 - 1), "a whole number of 32 bits"),
        }
        for name, (fits, expected) in good.items():
            if not fits:
                raise unexpected(name, expected, f"{getattr(self, name)!r:.60}")


def _whole(value, least: float = -math.inf, most: float = math.inf) -> bool:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return whole and least <= value <= most


def _real(value, least: float, most: float = 3e38) -> bool:
    return (_whole(value) or isinstance(value, float | np.floating)) and least <= value <= most


# ------------------------------------------------------------------------------------ on the device


class Prepared:
    """A model split for generation: its state for prefill, and the layout in which it decodes."""

    def __init__(self, model: nnx.Module):
        self.config, self.cache_dtype = model.config, model.dtype
        self.prefill = self._decode = _split(model)
        self._layout = "stacked"

    def decode(self, batch_size: int) -> tuple[tuple, str]:
        """((graph, state) for decode steps of so many rows, their layout's name), made once and kept.

        On a CPU a Transformer decodes in a layout of its own (`kernels.decoding_layout`), whose memory
        beside the model is logged. Elsewhere prefill and decoding share one copy of the weights.
        """
        model = nnx.merge(*self.prefill)
        layout = kernels.decoding_layout(model, batch_size)
        if layout != self._layout:
            self._decode = None  # one of a CPU's layouts is in memory, never both
            self._decode, self._layout = _split(kernels.lay_out(model, layout)), layout
            shared, leaves = jax.tree.leaves(self.prefill[1]), jax.tree.leaves(self._decode[1])
            own = {id(leaf): leaf.nbytes for leaf in leaves} | {id(leaf): 0 for leaf in shared}
            size = sum(own.values()) / 1e6
            logger.info(f"decoding on a CPU, {layout} layout: {size:,.1f} MB beside the model")
        return self._decode, self._layout


def prepare(model: nnx.Module | Prepared) -> Prepared:
    """What each call of `generate` makes of a model, to make once: later changes do not reach it."""
    return model if isinstance(model, Prepared) else Prepared(model)


def _split(model: nnx.Module) -> tuple:
    """(graph, state); state has variables of its own: those of `nnx.split` would follow the model."""
    graph, state = nnx.split(model)
    return graph, jax.tree.map(lambda x: x, state)


class _State(NamedTuple):
    """What one decode step hands to the next."""

    cache: KVCache
    tokens: Int[Array, "B"]
    positions: Int[Array, "B"]
    seen: Bool[Array, "B V"] | None  # of each row's text, where there is a repetition penalty


STATIC = ("graph", "n_vocab", "greedy", "max_top_k")


def _choose(logits, keys, positions, seen, sampling: dict, *, n_vocab, greedy, max_top_k):
    """The next token [B] of each row, standing at `positions`, of the ids that the tokenizer knows."""
    # Rows of the head beyond the tokenizer's ids are padding, with whatever training left there.
    logits = jnp.where(jnp.arange(logits.shape[-1]) < n_vocab, logits, -jnp.inf)
    if seen is not None:
        logits = penalise(logits, seen, sampling["penalty"])
    # A key for each row and position: what a row samples does not depend on its neighbours.
    keys = jax.vmap(jax.random.fold_in)(keys, positions)
    options = {name: sampling[name] for name in ("temperature", "top_k", "top_p")}
    return sample(logits, keys, **options, greedy=greedy, max_top_k=max_top_k)


def _mark(seen, tokens):
    return None if seen is None else seen.at[jnp.arange(len(tokens)), tokens].set(True)


@functools.partial(jax.jit, static_argnames=(*STATIC, "cache_length"))
def _prefill(graph, state, tokens, lengths, keys, seen, sampling, *, cache_length, **static):
    """tokens [B, P], right-padded, lengths [B] -> first new token [B], state from which to decode."""
    model = nnx.merge(graph, state)
    x, cache = model.hidden(tokens, None, model.new_cache(tokens.shape[0], cache_length))
    # The output layer for each prompt's last token alone: for all, it would be the largest array.
    last = jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)[:, 0]
    new = _choose(model.logits(last), keys, lengths, seen, sampling, **static)
    return new, _State(cache, new, lengths, _mark(seen, new))


@functools.cache
def jitted_decode(layout: str):
    """`_decode`, jitted for a layout."""
    options = kernels.compiler_options(layout)
    return jax.jit(_decode, static_argnames=STATIC, donate_argnums=2, compiler_options=options)


def _decode(graph, weights, state, keys, sampling, **static):
    """CHUNK steps -> new tokens [B, CHUNK], and the state after them."""
    model = nnx.merge(graph, weights)

    def step(state, _):
        x, cache = model.hidden(state.tokens[:, None], state.positions[:, None], state.cache)
        positions = state.positions + 1
        new = _choose(model.logits(x[:, 0]), keys, positions, state.seen, sampling, **static)
        return _State(cache, new, positions, _mark(state.seen, new)), new

    state, new = jax.lax.scan(step, state, length=CHUNK)
    return new.T, state


class TiktokenStream:
    """Tokens of a tiktoken encoding to text: whole characters only, a token may end inside one."""

    def __init__(self, tok: tiktoken.Encoding):
        self.tok, self.utf8 = tok, codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Sequence[int]) -> str:
        return self.utf8.decode(b"".join(self.tok.decode_tokens_bytes(list(ids))))

    def flush(self) -> str:
        return self.utf8.decode(b"", final=True)


class Row:
    """One completion as it grows, to a stop token or string; what may become one is held back."""

    def __init__(self, decoder, stop_strings: Sequence[str], stop_ids: set[int]):
        self.decoder, self.stop_strings, self.stop_ids = decoder, stop_strings, stop_ids
        self.text, self.certain = "", 0  # the first `certain` characters will not be taken back
        self.ids, self.finish_reason = [], None

    def push(self, ids: Sequence[int]) -> str:
        """The text that these tokens make certain."""
        start = self.certain
        for token in ids:
            if token in self.stop_ids:
                self.close("stop")
            if self.finish_reason is not None:
                break
            self.ids.append(int(token))
            self._append(self.decoder.push([int(token)]), None)
        return self.text[start : self.certain]

    def close(self, finish_reason: str) -> str:
        """The rest of the text: no more tokens will come."""
        start = self.certain
        if self.finish_reason is None:
            self._append(self.decoder.flush(), finish_reason)
        return self.text[start : self.certain]

    def _append(self, new: str, finish_reason: str | None) -> None:
        self.text += new
        ends = [at for s in self.stop_strings if (at := self.text.find(s, self.certain)) >= 0]
        if ends:
            self.text, finish_reason = self.text[: min(ends)], "stop"
        self.finish_reason, self.certain = finish_reason, len(self.text)
        if finish_reason is None:
            prefixes = (s[:n] for s in self.stop_strings for n in range(1, len(s)))
            self.certain -= max((len(p) for p in prefixes if self.text.endswith(p)), default=0)


def cache_bytes(config, batch_size: int, cache_length: int, dtype=jnp.bfloat16) -> int:
    """Bytes of a KV cache: keys and values of each layer, row, position and key/value head."""
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return token * batch_size * cache_length * jnp.dtype(dtype).itemsize


def _round_up(n: int, context: int) -> int:
    """Prompt lengths and cache lengths are rounded up, so that few shapes are compiled."""
    step = 32 if n <= 256 else 256
    return min(context, -(-n // step) * step)


def _free_memory() -> int:
    """Bytes a new array may take: what the accelerator has left, or the memory of this machine."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 50
    return pages * (os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 1 << 12)


def _encode(tok, prompts: Sequence[str], max_new_tokens: int | None, config):
    """(token ids of each prompt, how many new tokens to make at most), or one clear error."""
    V, context = config.vocab_size, config.max_position_embeddings
    is_tiktoken = isinstance(tok, tiktoken.Encoding)
    if tok.n_vocab > V or (is_tiktoken and tok.n_vocab < V):
        what = f"has {tok.n_vocab:,} ids, the model's vocabulary has {V:,}"
        fix = "use the tokenizer that the model was trained with"
        raise CourseError(f"tokenizer {tok.name}: {what}: {fix}")
    texts = not isinstance(prompts, str) and all(isinstance(prompt, str) for prompt in prompts)
    if not prompts or not texts:
        raise unexpected("prompts", "a list of at least one text", f"{prompts!r:.60}")
    if is_tiktoken:  # MiniGPT has learnt to start from the token that ends the story before
        rows = [[tok.eot_token, *tok.encode_ordinary(prompt)] for prompt in prompts]
    else:
        rows = [tok.encode(prompt) for prompt in prompts]
    if not all(rows):
        empty = prompts[rows.index([])]
        raise unexpected("prompts", "some text in each", repr(empty), "it has no token")
    longest = max(map(len, rows))
    if longest > context:
        worst = prompts[[len(row) for row in rows].index(longest)]
        what = f"{longest} tokens with its start token, the model's context is {context}"
        fix = "shorten the prompt, or use a model with a longer context"
        raise CourseError(f"prompt {worst[:30]!r}...: {what}: {fix}")
    room = context - longest + 1  # the last new token is not read again: it needs no position
    if max_new_tokens is None:
        max_new_tokens = min(room, DEFAULT_MAX_NEW_TOKENS)
    if not _whole(max_new_tokens, 1, room):
        expected = f"1 to {room} (a context of {context} less the longest prompt)"
        raise unexpected("max_new_tokens", expected, repr(max_new_tokens))
    return rows, max_new_tokens


def _run(model, tok, prompts, max_new_tokens, options) -> Iterator[tuple[list[str], list[Row]]]:
    """Yields, chunk by chunk, each row's new text (none once it has ended) and the rows so far."""
    prepared, config, context = prepare(model), model.config, model.config.max_position_embeddings
    prompt_ids, max_new_tokens = _encode(tok, prompts, max_new_tokens, config)
    lengths = np.array([len(ids) for ids in prompt_ids], np.int32)
    B, longest = len(lengths), int(lengths.max())
    cache_length = _round_up(longest + max_new_tokens - 1, context)
    needed, free = cache_bytes(config, B, cache_length, prepared.cache_dtype), _free_memory()
    size = f"KV cache: {B} row{'s'[: B > 1]} of {cache_length} tokens: {needed / 1e6:,.1f} MB"
    if needed > free:
        what = f"{free / 1e6:,.1f} MB are free: give fewer prompts at once, or fewer new tokens"
        raise CourseError(f"{size}, but {what}")
    logger.info(size)
    tokens = np.zeros((B, _round_up(longest, context)), np.int32)
    seen = None if options.repetition_penalty == 1 else np.zeros((B, config.vocab_size), bool)
    for i, ids in enumerate(prompt_ids):
        tokens[i, : len(ids)] = ids
        if seen is not None:
            seen[i, ids] = True
    key = jax.random.key(options.seed)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B))
    # Traced: other values are no other program. Of top_k, the next power of two is compiled in.
    top_k = options.top_k and min(options.top_k, config.vocab_size)
    sampling = {
        "temperature": np.float32(options.temperature or 1),
        "penalty": np.float32(options.repetition_penalty),
        "top_k": top_k and np.int32(top_k),
        "top_p": options.top_p and np.float32(options.top_p),
    }
    max_top_k = top_k and 1 << (top_k - 1).bit_length()
    static = {"greedy": options.temperature == 0, "max_top_k": max_top_k, "n_vocab": tok.n_vocab}
    inputs = (tokens, lengths, keys, seen, sampling)
    new, state = _prefill(*prepared.prefill, *inputs, cache_length=cache_length, **static)
    weights, layout = prepared.decode(B)
    is_tiktoken = isinstance(tok, tiktoken.Encoding)
    stop_ids = {tok.eot_token} if is_tiktoken else set(tok.stop_ids)
    stop_ids |= {int(s) for s in options.stop if _whole(s)}
    stop_strings = [s for s in options.stop if isinstance(s, str)]
    decoders = [TiktokenStream(tok) if is_tiktoken else tok.stream() for _ in prompt_ids]
    rows = [Row(decoder, stop_strings, stop_ids) for decoder in decoders]
    chunk, generated = np.array(new)[:, None], 0
    while True:
        chunk = chunk[:, : max_new_tokens - generated]
        generated += chunk.shape[1]
        pieces = [row.push(ids) for row, ids in zip(rows, chunk.tolist())]
        if generated >= max_new_tokens:
            pieces = [piece + row.close("length") for piece, row in zip(pieces, rows)]
        yield pieces, rows
        if all(row.finish_reason for row in rows):
            return
        new, state = jitted_decode(layout)(*weights, state, keys, sampling, **static)
        chunk = np.array(new)


def generate(
    model, tok, prompts: Sequence[str], max_new_tokens: int | None = None, **options
) -> list[Completion]:
    """Continue each prompt to a stop token or string, `max_new_tokens` (512), or a full context.

    Returns a `Completion` for each prompt. `options` are the fields of `Options`: temperature, top_k,
    top_p, repetition_penalty, stop, seed. Raises `CourseError` for a prompt or a length that does not
    fit, or a tokenizer `tok` that is not the model's.
    """
    *_, (_, rows) = _run(model, tok, prompts, max_new_tokens, Options(**options))
    return [Completion(row.text, row.ids, row.finish_reason) for row in rows]


def stream(model, tok, prompt: str, max_new_tokens: int | None = None, **options) -> Iterator[str]:
    """The text that `generate` gives for one prompt, piece by piece, as it is made."""
    for (piece,), _ in _run(model, tok, [prompt], max_new_tokens, Options(**options)):
        if piece:
            yield piece
