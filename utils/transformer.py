"""Qwen2 and Llama: MiniGPT with four swaps, and Hugging Face's names.

    tokens [B, T] -> embed_tokens -> L blocks -> norm -> lm_head -> logits [B, T, V]
    block:  x = x + self_attn(input_layernorm(x));   x = x + mlp(post_attention_layernorm(x))

The swaps: RMSNorm for LayerNorm, rotary positions (`rope.py`) for learnt ones, fewer key/value
heads than query heads (`attention.py`), and SwiGLU for GELU. Qwen2 is Llama with biases on q, k and
v. DeepSeek-R1-Distill, SmolLM2, Qwen2.5 and DeepSeek-Math are of this family.

Every attribute path is a tensor's name on the hub: `model.layers.self_attn.q_proj.weight` here is
`model.layers.{i}.self_attn.q_proj.weight` there, with the layers stacked along a leading axis L
(`stacked.py`). Weights keep Hugging Face's orientation, (out, in): nothing is ever transposed.

Axes: B batch, T tokens, D hidden size, N query heads, K key/value heads, H head dimension,
F intermediate size, V vocabulary, L layers.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Int

from utils import kernels, kv_cache, rope, stacked, unexpected
from utils.attention import attention
from utils.kv_cache import KVCache
from utils.sharding import constrain

Tokens = Int[ArrayLike, "B T"]
Vectors = Float[Array, "*batch D"]
Hidden = Float[Array, "B T D"]


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a model, under Hugging Face's names; `hf.config.read` checks those of a file."""

    model_type: str  # "llama" or "qwen2": the same computation, told apart by their biases
    vocab_size: int
    hidden_size: int  # D, the width of the residual stream
    num_hidden_layers: int
    num_attention_heads: int  # N query heads
    num_key_value_heads: int  # K, each read by N / K query heads
    head_dim: int
    intermediate_size: int  # F, the width inside the MLP
    max_position_embeddings: int  # the longest text, in tokens
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool  # the output layer is the embedding table
    attention_bias: bool  # of q_proj, k_proj and v_proj
    o_proj_bias: bool = False
    mlp_bias: bool = False
    rope_scaling: rope.Llama3Scaling | None = None
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    dtype: str = "float32"  # of the checkpoint

    def __post_init__(self):
        assert self.num_attention_heads % self.num_key_value_heads == 0, self
        assert self.head_dim % 2 == 0, self

    def count_parameters(self) -> dict[str, int]:
        """Parameters by place, from the sizes alone: nothing is allocated."""
        D, F, L = self.hidden_size, self.intermediate_size, self.num_hidden_layers
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        attention = 2 * D * (q + kv) + self.attention_bias * (q + 2 * kv) + self.o_proj_bias * D
        counts = {
            "embed_tokens": self.vocab_size * D,
            "attention": L * attention,
            "mlp": L * (3 * D * F + self.mlp_bias * (2 * F + D)),
            "norms": (2 * L + 1) * D,
            "lm_head": 0 if self.tie_word_embeddings else self.vocab_size * D,
        }
        return counts | {"total": sum(counts.values())}

    def flops_per_token(self, seq_len: int) -> int:
        """Operations of one forward pass, per token, in matrix products (a multiply-add is two).

        Attention is counted over the whole T x T square of a row of `seq_len` tokens.
        """
        counts = self.count_parameters()
        weights = counts["attention"] + counts["mlp"] + self.vocab_size * self.hidden_size
        scores = self.num_hidden_layers * 2 * seq_len * self.num_attention_heads * self.head_dim
        return 2 * (weights + scores)


class Linear(nnx.Module):
    """y = W x (+ b) with W [out, in], the way Hugging Face and PyTorch store it."""

    def __init__(self, inputs: int, outputs: int, *, bias=False, param_dtype=jnp.float32, rngs):
        normal = jax.random.normal(rngs.params(), (outputs, inputs), param_dtype)
        self.weight = nnx.Param(0.02 * normal)
        if bias:
            self.bias = nnx.Param(jnp.zeros(outputs, param_dtype))

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        y = kernels.linear(x, self.weight[...])
        return y + self.bias[...].astype(y.dtype) if hasattr(self, "bias") else y


class Embed(nnx.Module):
    """A table [V, D]: looked up by token id, and read backwards as a tied output layer."""

    def __init__(self, vocab_size: int, hidden_size: int, *, param_dtype=jnp.float32, rngs):
        normal = jax.random.normal(rngs.params(), (vocab_size, hidden_size), param_dtype)
        self.weight = nnx.Param(0.02 * normal)

    def __call__(self, tokens: Tokens) -> Hidden:
        # On a mesh each device looks up its own rows of the batch, in a table replicated along D.
        return constrain(constrain(self.weight[...], "tp", None)[tokens], "fsdp", None, None)

    def attend(self, x: Vectors) -> Float[Array, "*batch V"]:
        """The table as output layer."""
        return kernels.linear(x, self.weight[...])


def rms_norm(x: Vectors, weight: Float[Array, "D"], eps: float) -> Vectors:
    """x over its root mean square, in float32, times a learnt weight (Zhang and Sennrich 2019)."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return weight.astype(x.dtype) * (x32 * scale).astype(x.dtype)


class RMSNorm(nnx.Module):
    """`rms_norm` with its weight [D]."""

    def __init__(self, hidden_size: int, eps: float, *, param_dtype=jnp.float32):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones(hidden_size, param_dtype))

    def __call__(self, x: Vectors) -> Vectors:
        return rms_norm(x, self.weight[...], self.eps)


class Attention(nnx.Module):
    """Causal self-attention with rotary positions and shared key/value heads."""

    def __init__(self, config: Config, *, param_dtype=jnp.float32, rngs: nnx.Rngs):
        c, D, options = config, config.hidden_size, dict(param_dtype=param_dtype, rngs=rngs)
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.head_dim, self.param_dtype = c.head_dim, param_dtype
        self.q_proj = Linear(D, q, bias=c.attention_bias, **options)
        self.k_proj = Linear(D, kv, bias=c.attention_bias, **options)
        self.v_proj = Linear(D, kv, bias=c.attention_bias, **options)
        self.o_proj = Linear(q, D, bias=c.o_proj_bias, **options)

    def project(self, x: Hidden) -> list[Float[Array, "B T _"]]:
        """q [B, T, N * H], k and v [B, T, K * H]."""
        return [self.q_proj(x), self.k_proj(x), self.v_proj(x)]

    def __call__(self, x, cos, sin, segment_ids=None, positions=None, cache=None):
        """(y [B, T, D], the updated cache; without one the keys and values [B, T, K, H] for it)."""
        B, T, _ = x.shape
        heads = [y.reshape(B, T, -1, self.head_dim) for y in self.project(x)]
        q, k, v = (constrain(y, "fsdp", None, "tp", None) for y in heads)
        q, k = rope.apply_rope(q, cos, sin), rope.apply_rope(k, cos, sin)
        if cache is None:
            kept = k, v
            keys, values = k.astype(self.param_dtype), v.astype(self.param_dtype)
        else:
            kept = cache.update(k, v, positions)
            keys, values = kept.keys_values
        y = attention(q, keys, values, segment_ids=segment_ids, positions=positions)
        return self.o_proj(y.reshape(B, T, -1)), kept


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020): a gate decides, for each feature, how much of `up` goes to `down`."""

    def __init__(self, config: Config, *, param_dtype=jnp.float32, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.intermediate_size
        options = dict(bias=config.mlp_bias, param_dtype=param_dtype, rngs=rngs)
        self.gate_proj = Linear(D, F, **options)
        self.up_proj = Linear(D, F, **options)
        self.down_proj = Linear(F, D, **options)

    def gated(self, x: Hidden) -> Float[Array, "B T F"]:
        return jax.nn.silu(self.gate_proj(x)) * self.up_proj(x)

    def __call__(self, x: Hidden) -> Hidden:
        return self.down_proj(constrain(self.gated(x), "fsdp", None, "tp"))


class Block(nnx.Module):
    """Each of the two sublayers reads a normalised copy of x and adds its answer to x."""

    def __init__(self, config: Config, *, param_dtype=jnp.float32, rngs: nnx.Rngs):
        D, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(D, eps, param_dtype=param_dtype)
        self.self_attn = Attention(config, param_dtype=param_dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(D, eps, param_dtype=param_dtype)
        self.mlp = MLP(config, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Hidden, *inputs):
        """(x [B, T, D], keys and values): but for x, inputs and outputs are `Attention`'s."""
        y, kept = self.self_attn(self.input_layernorm(x), *inputs)
        x = constrain(x + y, "fsdp", None, None)
        return constrain(x + self.mlp(self.post_attention_layernorm(x)), "fsdp", None, None), kept


class Decoder(nnx.Module):
    """Everything but the output layer: tokens [B, T] -> hidden states [B, T, D]."""

    def __init__(self, config: Config, *, param_dtype, dtype, rngs: nnx.Rngs):
        self.config, self.param_dtype, self.dtype = config, param_dtype, dtype
        V, D = config.vocab_size, config.hidden_size
        self.embed_tokens = Embed(V, D, param_dtype=param_dtype, rngs=rngs)

        def make(rngs: nnx.Rngs) -> Block:
            return Block(config, param_dtype=param_dtype, rngs=rngs)

        self.layers = stacked.stack(make, config.num_hidden_layers, rngs)
        self.norm = RMSNorm(D, config.rms_norm_eps, param_dtype=param_dtype)
        self.gradient_checkpointing = False  # see `stacked.forward`

    def __call__(
        self, tokens, positions=None, cache=None, segment_ids=None, output_hidden_states=False
    ):
        """(hidden states [B, T, D], the updated cache, or every layer's states if asked for)."""
        # Constants, or behind a barrier: else XLA computes the cosine again in every layer.
        if positions is None:
            with jax.ensure_compile_time_eval():
                cos, sin = rope.rope_tables(jnp.arange(tokens.shape[1])[None], self.config)
        else:
            cos, sin = jax.lax.optimization_barrier(rope.rope_tables(positions, self.config))
        x = self.embed_tokens(tokens).astype(self.dtype)
        decoding = cache is not None and positions is not None
        inputs = (None, positions) if decoding else (segment_ids, None)

        def call(block, x, layer_cache=None):
            return block(x, cos, sin, *inputs, layer_cache)

        if decoding:
            x, cache = stacked.decode(self.layers, x, call, cache)
            return self.norm(x), cache
        unroll = kernels.scan_unroll(self.config.num_hidden_layers, self.param_dtype)
        options = dict(unroll=unroll, gradient_checkpointing=self.gradient_checkpointing)
        options |= dict(cache=cache, output_hidden_states=output_hidden_states)
        x, outputs = stacked.forward(self.layers, x, call, self.config, **options)
        return self.norm(x), outputs


class Transformer(nnx.Module):
    """tokens [B, T] int32 -> logits [B, T, V] float32; `hf.weights.load` makes one of real weights.

    `param_dtype` is the weights', in which matrix products multiply; `dtype` is that of activations
    and KV caches (by default what is quickest beside such weights, `kernels.activation_dtype`).
    """

    def __init__(self, config: Config, *, param_dtype=jnp.float32, dtype=None, rngs: nnx.Rngs):
        self.config = config
        dtype = kernels.activation_dtype(param_dtype) if dtype is None else jnp.dtype(dtype)
        self.model = Decoder(config, param_dtype=jnp.dtype(param_dtype), dtype=dtype, rngs=rngs)
        if not config.tie_word_embeddings:
            D, V = config.hidden_size, config.vocab_size
            self.lm_head = Linear(D, V, param_dtype=param_dtype, rngs=rngs)

    @property
    def param_dtype(self) -> jnp.dtype:
        return self.model.param_dtype

    @property
    def dtype(self) -> jnp.dtype:
        return self.model.dtype

    @property
    def head(self) -> nnx.Module:
        """The output layer: `lm_head`, or the embedding table where they are tied."""
        return self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head

    def hidden(self, tokens: Tokens, positions=None, cache=None, segment_ids=None):
        """(hidden states [B, T, D], cache).

        Without a cache: `segment_ids` [B, T] keeps packed sequences apart; positions need not
        restart in each, as RoPE sees their differences alone. With one: no positions means "a
        prompt, from position 0 on"; with positions [B, T] the tokens see the cache up to their own.
        Raises `CourseError` for more tokens than the model's context.
        """
        length, most = tokens.shape[1], self.config.max_position_embeddings
        if length > most:
            expected = f"at most {most} a row (the model's context)"
            raise unexpected("tokens", expected, length, "shorten the text")
        return self.model(tokens, positions, cache, segment_ids)

    def logits(self, x: Vectors) -> Float[Array, "*batch V"]:
        """The output layer, in float32."""
        head = self.head.attend if self.config.tie_word_embeddings else self.lm_head
        return head(x).astype(jnp.float32)

    def __call__(self, tokens: Tokens, positions=None, cache=None, segment_ids=None):
        """Logits [B, T, V]; with a cache, the pair (logits, updated cache)."""
        x, cache = self.hidden(tokens, positions, cache, segment_ids)
        return self.logits(x) if cache is None else (self.logits(x), cache)

    def hidden_states(self, tokens: Tokens) -> Float[Array, "_ B T D"]:
        """As in transformers: the embedding, then x after each block, the last one normalised."""
        last, states = self.model(tokens, output_hidden_states=True)
        embedded = self.model.embed_tokens(tokens).astype(states.dtype)
        return jnp.concatenate([embedded[None], states[:-1], last[None]])

    def new_cache(self, batch_size: int, cache_length: int) -> KVCache:
        """An empty KV cache for `batch_size` rows of `cache_length` tokens."""
        return kv_cache.new_cache(self.config, batch_size, cache_length, self.dtype)
