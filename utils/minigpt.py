"""MiniGPT: a decoder-only transformer, small enough to train on two CPU cores.

    tokens [B, T] -> embed -> L blocks -> norm -> logits [B, T, V]
    block:  x = x + attention(norm(x));   x = x + mlp(norm(x))

GPT-2's architecture (Radford et al. 2019): learnt positions, LayerNorm before each sublayer, GELU,
and an output layer that is the embedding table read backwards (tied). Attributes have Hugging
Face's names (`q_proj`, `o_proj`, `up_proj`, ...), so they are the same in Llama and Qwen2. The L
blocks are equal in shape: they are kept as ONE block whose arrays have a leading axis L, and the
model scans over that axis (`stacked.py`), so XLA compiles one block however deep the model is.

Axes: B batch, T tokens, D hidden size, N heads, H head dimension, F intermediate size, L layers,
V vocabulary.
"""

import dataclasses
import math

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Int

from utils import kv_cache, stacked, unexpected
from utils.attention import attention
from utils.kv_cache import KVCache, LayerCache

# Up to this many blocks are written out in the compiled program, not looped over: without the loop,
# a step of two blocks with D = 128 takes half as long on two cores.
UNROLL = 4


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a MiniGPT. `hidden_size` must be a multiple of `num_attention_heads`."""

    vocab_size: int = 2048
    max_position_embeddings: int = 128  # the longest text, in tokens
    hidden_size: int = 128  # D, the width of the residual stream
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 512  # F, the width inside the MLP

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not isinstance(value, int) or value < 1:
                raise unexpected(name, "a whole number of at least 1", repr(value))
        if self.hidden_size % self.num_attention_heads:
            expected = f"a multiple of num_attention_heads ({self.num_attention_heads})"
            raise unexpected("hidden_size", expected, self.hidden_size)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """Every head has keys and values of its own."""
        return self.num_attention_heads

    def count_parameters(self) -> dict[str, int]:
        """Parameters by place, without allocating any. The output layer is tied: it costs none."""
        D, L = self.hidden_size, self.num_hidden_layers
        counts = {
            "embed_tokens": self.vocab_size * D,
            "embed_positions": self.max_position_embeddings * D,
            "attention": L * 4 * D**2,
            "mlp": L * 2 * D * self.intermediate_size,
            "norms": (2 * L + 1) * D,
        }
        return counts | {"total": sum(counts.values())}

    def flops_per_token(self, seq_len: int | None = None) -> int:
        """Operations of one forward pass, per token, in matrix products (a multiply-add is two).

        Training costs three times this: a product forward has two backward. Attention is counted
        over the whole T x T square, although half of it is masked away.
        """
        counts = self.count_parameters()
        T = seq_len or self.max_position_embeddings
        scores = 2 * self.num_hidden_layers * T * self.hidden_size
        return 2 * (counts["attention"] + counts["mlp"] + counts["embed_tokens"] + scores)


class Attention(nnx.Module):
    """Causal: each token takes a weighted average of the values of the tokens up to itself."""

    def __init__(self, config: Config, *, dtype=jnp.float32, rngs: nnx.Rngs):
        D, small = config.hidden_size, _residual_init(config)
        self.num_heads = config.num_attention_heads
        self.q_proj = nnx.Linear(D, D, use_bias=False, dtype=dtype, rngs=rngs)
        self.k_proj = nnx.Linear(D, D, use_bias=False, dtype=dtype, rngs=rngs)
        self.v_proj = nnx.Linear(D, D, use_bias=False, dtype=dtype, rngs=rngs)
        self.o_proj = nnx.Linear(D, D, use_bias=False, kernel_init=small, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], cache: LayerCache | None = None, positions=None):
        """(y [B, T, D], the updated cache; without one the keys and values [B, T, N, H] for it)."""
        B, T, D = x.shape
        heads = B, T, self.num_heads, D // self.num_heads
        q, k, v = (proj(x).reshape(heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if cache is None:
            return self.o_proj(attention(q, k, v).reshape(B, T, D)), (k, v)
        cache = cache.update(k, v, positions)
        y = attention(q, *cache.keys_values, positions=positions)
        return self.o_proj(y.reshape(B, T, D)), cache


class MLP(nnx.Module):
    """Widen, bend, narrow: D -> F -> D, for each token alone."""

    def __init__(self, config: Config, *, dtype=jnp.float32, rngs: nnx.Rngs):
        D, F, small = config.hidden_size, config.intermediate_size, _residual_init(config)
        self.up_proj = nnx.Linear(D, F, use_bias=False, dtype=dtype, rngs=rngs)
        self.down_proj = nnx.Linear(F, D, use_bias=False, kernel_init=small, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down_proj(nnx.gelu(self.up_proj(x)))


class Block(nnx.Module):
    """Each of the two sublayers reads a normalised copy of x and adds its answer to x."""

    def __init__(self, config: Config, *, dtype=jnp.float32, rngs: nnx.Rngs):
        D = config.hidden_size
        self.input_layernorm = nnx.LayerNorm(D, use_bias=False, dtype=dtype, rngs=rngs)
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = nnx.LayerNorm(D, use_bias=False, dtype=dtype, rngs=rngs)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], cache: LayerCache | None = None, positions=None):
        """(x [B, T, D], keys and values): but for x, inputs and outputs are `Attention`'s."""
        y, kept = self.self_attn(self.input_layernorm(x), cache, positions)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), kept


class MiniGPT(nnx.Module):
    """tokens [B, T] int32 -> logits [B, T, V] float32, T at most `config.max_position_embeddings`.

    Weights are float32; `dtype` is that of the computation.
    """

    def __init__(self, config: Config, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config, self.dtype = config, jnp.dtype(dtype)
        # Small embeddings make small logits, hence an almost uniform first guess: a loss of ln V.
        small = nnx.initializers.normal(0.02)
        V, T, D = config.vocab_size, config.max_position_embeddings, config.hidden_size
        self.embed_tokens = nnx.Embed(V, D, embedding_init=small, dtype=dtype, rngs=rngs)
        self.embed_positions = nnx.Embed(T, D, embedding_init=small, dtype=dtype, rngs=rngs)

        def make(rngs: nnx.Rngs) -> Block:
            return Block(config, dtype=dtype, rngs=rngs)

        self.layers = stacked.stack(make, config.num_hidden_layers, rngs)
        self.norm = nnx.LayerNorm(D, use_bias=False, dtype=dtype, rngs=rngs)

    def hidden(self, tokens: Int[ArrayLike, "B T"], positions=None, cache: KVCache | None = None):
        """All but the output layer: (hidden states [B, T, D], the updated cache or None)."""
        c, length = self.config, tokens.shape[1]
        if length > c.max_position_embeddings:
            expected = f"at most {c.max_position_embeddings} a row (the model's context)"
            fix = "shorten the text, or train a model with a longer context"
            raise unexpected("tokens", expected, length, fix)
        at = jnp.broadcast_to(jnp.arange(length), tokens.shape) if positions is None else positions
        x = self.embed_tokens(tokens) + self.embed_positions(at)

        def call(block, x, layer_cache=None):
            return block(x, layer_cache, positions)

        if cache is None or positions is None:
            unroll = min(UNROLL, c.num_hidden_layers)
            x, cache = stacked.forward(self.layers, x, call, c, cache=cache, unroll=unroll)
        else:
            x, cache = stacked.decode(self.layers, x, call, cache)
        return self.norm(x), cache

    def __call__(self, tokens: Int[ArrayLike, "B T"], positions=None, cache: KVCache | None = None):
        """Logits [B, T, V]; with a cache, the pair (logits, updated cache)."""
        x, cache = self.hidden(tokens, positions, cache)
        return self.logits(x) if cache is None else (self.logits(x), cache)

    def logits(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """The output layer: the embedding table read backwards, in float32."""
        return self.embed_tokens.attend(x).astype(jnp.float32)

    def new_cache(self, batch_size: int, cache_length: int | None = None) -> KVCache:
        """An empty KV cache for `batch_size` rows of `cache_length` tokens (or a whole context)."""
        length = cache_length or self.config.max_position_embeddings
        return kv_cache.new_cache(self.config, batch_size, length, self.dtype)


def _residual_init(config: Config):
    """2 L sublayers add to one stream: GPT-2 starts each smaller by sqrt(2 L), or it would grow."""
    return nnx.initializers.normal(0.04 / math.sqrt(2 * config.num_hidden_layers))
