"""MiniGPT: a decoder-only transformer, small enough to train on two CPU cores.

    tokens [B, T] -> embed -> L blocks -> norm -> logits [B, T, V]
    block:  x = x + attention(norm(x));   x = x + mlp(norm(x))

This is GPT-2's architecture (Radford et al. 2019): learnt positions, LayerNorm before each sublayer, GELU, and an
output layer that is the embedding table read backwards (tied). Attribute names are Hugging Face's (`q_proj`, `o_proj`,
`up_proj`, ...), so that what you learn to point at here has the same name in Llama and Qwen2.

The L blocks are equal in shape, so they are kept as ONE block whose arrays have a leading axis L, and the model scans
over that axis: XLA compiles one block however deep the model is.

Axes: B batch, T tokens, S cache slots, D width, N heads, H head size, F MLP width, V vocabulary, L layers.
"""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from utils import CourseError

# Up to this many blocks are written out in the compiled program instead of being looped over. On a CPU the loop costs
# more than small blocks do: a step of two blocks of width 128 takes half as long without it.
UNROLL = 4
KEPT = Path(__file__).parent / "assets" / "minigpt"  # the weights trained by this course, kept in the repository


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a MiniGPT. `width` must be a multiple of `heads`."""

    vocab_size: int = 2048
    context: int = 128
    width: int = 128
    layers: int = 2
    heads: int = 4
    mlp_width: int = 512

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not isinstance(value, int) or value < 1:
                raise CourseError(f"{name}: expected a whole number of at least 1, found {value!r}")
        if self.width % self.num_attention_heads:
            raise CourseError(f"width: expected a multiple of heads ({self.num_attention_heads}), found {self.width}")

    @property
    def head_size(self) -> int:
        return self.width // self.num_attention_heads


class Cache(NamedTuple):
    """Keys and values of the tokens already seen; slot s holds the token at position s."""

    k: Float[Array, "L B S N H"]
    v: Float[Array, "L B S N H"]


def attend(
    q: Float[Array, "B T N H"], k: Float[Array, "B S N H"], v: Float[Array, "B S N H"], mask: Bool[Array, "... T S"]
) -> Float[Array, "B T N H"]:
    """The average of v, weighted by softmax(q k / sqrt(H)) over the slots that `mask` allows; softmax in float32.

    The same function as `jax.nn.dot_product_attention`. Written out, because on a CPU the training step is a quarter
    quicker with these two einsums.
    """
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1).astype(q.dtype)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, v)


class Attention(nnx.Module):
    """Causal self-attention: each token takes a weighted average of the values of the tokens up to itself."""

    def __init__(self, config: Config, *, dtype=jnp.float32, rngs: nnx.Rngs):
        D = config.hidden_size
        self.num_attention_heads = config.num_attention_heads
        self.q_proj = nnx.Linear(D, D, use_bias=False, dtype=dtype, rngs=rngs)
        self.k_proj = nnx.Linear(D, D, use_bias=False, dtype=dtype, rngs=rngs)
        self.v_proj = nnx.Linear(D, D, use_bias=False, dtype=dtype, rngs=rngs)
        self.o_proj = nnx.Linear(D, D, use_bias=False, kernel_init=_residual_init(config), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], positions=None, cache=None):
        """Returns [B, T, D], and the layer's cache (k, v) [B, S, N, H] when one was given."""
        B, T, D = x.shape
        q, k, v = (
            proj(x).reshape(B, T, self.num_attention_heads, D // self.num_attention_heads) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is None:
            mask = jnp.tril(jnp.ones((T, T), bool))
        else:
            row = jnp.arange(B)[:, None]
            k = cache[0].at[row, positions].set(k.astype(cache[0].dtype))
            v = cache[1].at[row, positions].set(v.astype(cache[1].dtype))
            # A token sees the slots up to its own position: later ones are empty, or a longer prompt's padding.
            mask = jnp.arange(k.shape[1]) <= positions[:, None, :, None]  # [B, 1, T, S]
            cache = (k, v)
        return self.o_proj(attend(q, k, v, mask).reshape(B, T, D)), cache


class MLP(nnx.Module):
    """Widen, bend, narrow: D -> F -> D, for each token alone."""

    def __init__(self, config: Config, *, dtype=jnp.float32, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.intermediate_size
        self.up_proj = nnx.Linear(D, F, use_bias=False, dtype=dtype, rngs=rngs)
        self.down_proj = nnx.Linear(F, D, use_bias=False, kernel_init=_residual_init(config), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down_proj(nnx.gelu(self.up_proj(x)))


class Block(nnx.Module):
    """One transformer block: each sublayer reads a normalised copy of x and adds its answer to x."""

    def __init__(self, config: Config, *, dtype=jnp.float32, rngs: nnx.Rngs):
        D = config.hidden_size
        self.input_layernorm = nnx.LayerNorm(D, use_bias=False, dtype=dtype, rngs=rngs)
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = nnx.LayerNorm(D, use_bias=False, dtype=dtype, rngs=rngs)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], positions=None, cache=None):
        y, cache = self.self_attn(self.input_layernorm(x), positions, cache)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class MiniGPT(nnx.Module):
    """tokens [B, T] int32 -> logits [B, T, V] float32; T is at most `config.context`."""

    def __init__(self, config: Config, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        # Small embeddings make small logits, hence an almost uniform first guess: a loss of ln V.
        small = nnx.initializers.normal(0.02)
        V, T, D = config.vocab_size, config.max_position_embeddings, config.hidden_size
        self.embed_tokens = nnx.Embed(V, D, embedding_init=small, dtype=dtype, rngs=rngs)
        self.embed_positions = nnx.Embed(T, D, embedding_init=small, dtype=dtype, rngs=rngs)

        @nnx.split_rngs(splits=config.num_hidden_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, dtype=dtype, rngs=rngs)

        self.layers = stack(rngs)
        self.norm = nnx.LayerNorm(D, use_bias=False, dtype=dtype, rngs=rngs)

    def hidden(self, tokens: Int[Array, "B T"], positions=None, cache: Cache | None = None):
        """Everything but the output layer: [B, T, D], and the cache when one was given."""
        if tokens.shape[1] > self.config.max_position_embeddings:
            raise CourseError(
                f"tokens: expected at most {self.config.max_position_embeddings} a row (the model's context), "
                f"found {tokens.shape[1]}: shorten the text, or train a model with a longer context"
            )
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = self.embed_tokens(tokens) + self.embed_positions(positions)
        graph, layers = nnx.split(self.layers)

        def block(x, layer_and_cache):
            layer, layer_cache = layer_and_cache
            return nnx.merge(graph, layer)(x, positions, layer_cache)

        x, cache = jax.lax.scan(block, x, (layers, cache), unroll=min(UNROLL, self.config.num_hidden_layers))
        return self.norm(x), cache if cache is None else Cache(*cache)

    def __call__(self, tokens: Int[Array, "B T"], positions=None, cache: Cache | None = None):
        """Logits [B, T, V]; with a cache (and positions [B, T]), the pair (logits, updated cache)."""
        x, cache = self.hidden(tokens, positions, cache)
        return self.logits(x) if cache is None else (self.logits(x), cache)

    def logits(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """The output layer: the embedding table read backwards, in float32."""
        return self.embed_tokens.attend(x).astype(jnp.float32)

    def new_cache(self, batch_size: int, slots: int | None = None) -> Cache:
        """An empty KV cache for `batch_size` rows of `slots` tokens (the whole context by default)."""
        c = self.config
        shape = (c.num_hidden_layers, batch_size, slots or c.max_position_embeddings, c.num_attention_heads, c.head_dim)
        dtype = self.embed_tokens.dtype or jnp.float32
        return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def _residual_init(config: Config):
    """What 2 L sublayers add to the residual stream should stay small: GPT-2 shrinks it by sqrt(2 L)."""
    return nnx.initializers.normal(0.04 / math.sqrt(2 * config.num_hidden_layers))


def count_parameters(config: Config) -> dict[str, int]:
    """Parameters by place, from the sizes alone: nothing is allocated. The output layer is tied, so it costs none."""
    c = config
    counts = {
        "embed_tokens": c.vocab_size * c.hidden_size,
        "embed_positions": c.max_position_embeddings * c.hidden_size,
        "attention": c.num_hidden_layers * 4 * c.hidden_size**2,
        "mlp": c.num_hidden_layers * 2 * c.hidden_size * c.intermediate_size,
        "norms": (2 * c.num_hidden_layers + 1) * c.hidden_size,
    }
    return counts | {"total": sum(counts.values())}


def flops_per_token(config: Config, context: int | None = None) -> int:
    """Floating-point operations of one forward pass, per token, in matrix products (a multiply-add is two).

    Training costs three times this: one forward, and two products backward for each forward one. Attention is counted
    as computed, over the whole T x T square (half of it is masked away).
    """
    c, T = config, context or config.max_position_embeddings
    weights = c.num_hidden_layers * (4 * c.hidden_size**2 + 2 * c.hidden_size * c.intermediate_size) + c.vocab_size * c.hidden_size
    attention = c.num_hidden_layers * 2 * T * c.hidden_size  # scores and weighted average
    return 2 * (weights + attention)


def named_arrays(model: nnx.Module) -> dict[str, np.ndarray]:
    """A copy of every parameter by dotted path, as NumPy arrays."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.array(leaf[...]) for path, leaf in flat}


def save(model: MiniGPT, directory: str | Path, *, dtype=np.float32, provenance: dict | None = None) -> Path:
    """Write `model.safetensors` and `config.json` (and `provenance.json`) into a folder: all of them or none.

    `dtype=np.float16` halves the file; the weights of a MiniGPT lose nothing that shows in its loss.
    """
    directory = Path(directory)
    arrays = {name: np.ascontiguousarray(a.astype(dtype)) for name, a in named_arrays(model).items()}
    texts = {"config.json": dataclasses.asdict(model.config)}
    if provenance is not None:
        texts["provenance.json"] = provenance
    # Write all to neighbours, then rename all: a full disk leaves the old files as they were.
    names = {name: directory / f".{name}.{os.getpid()}" for name in ["model.safetensors", *texts]}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(arrays, names["model.safetensors"])
        names["model.safetensors"].chmod(0o644)  # safetensors makes files that only their owner may read
        for name, content in texts.items():
            names[name].write_text(json.dumps(content, indent=1) + "\n")
        for name, temporary in names.items():
            os.replace(temporary, directory / name)
    except (OSError, SafetensorError) as error:
        raise CourseError(
            f"{directory}: could not be written ({error}): what was there before is unchanged: make room, or name "
            "another folder"
        ) from error
    finally:
        if directory.is_dir():
            for temporary in names.values():
                temporary.unlink(missing_ok=True)
    return directory


def load(directory: str | Path | None = None, *, dtype=jnp.float32) -> MiniGPT:
    """The MiniGPT saved in a folder; without one, the trained weights kept in this repository.

    Raises `CourseError` when a file is missing or damaged, or when names or shapes are not those of its config.
    """
    directory = Path(directory or KEPT)
    try:
        config = Config(**json.loads((directory / "config.json").read_text()))
        arrays = load_file(directory / "model.safetensors")
    except FileNotFoundError as error:
        missing = error.filename or directory / "model.safetensors"  # safetensors gives no filename
        raise CourseError(f"{missing}: not found: is {directory} a folder that minigpt.save wrote?") from None
    except CourseError as error:  # a size that no MiniGPT has
        raise CourseError(f"{directory / 'config.json'}: {error}") from None
    except (ValueError, TypeError) as error:
        raise CourseError(f"{directory / 'config.json'}: not the configuration of a MiniGPT ({error})") from None
    except SafetensorError as error:
        raise CourseError(
            f"{directory / 'model.safetensors'}: damaged or cut short ({error}): copy or train it again"
        ) from None
    model = nnx.eval_shape(lambda: MiniGPT(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model, nnx.Param)
    flat = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    for name in sorted(flat.keys() | arrays.keys()):
        expected = tuple(flat[name].shape) if name in flat else "nothing of that name"
        found = arrays[name].shape if name in arrays else "nothing of that name"
        if expected != found:
            raise CourseError(f"{name}: expected {expected}, found {found}: config.json and weights do not fit")
    pure = nnx.to_pure_dict(state)
    pure = jax.tree_util.tree_map_with_path(
        lambda path, _: jnp.asarray(arrays[".".join(str(key.key) for key in path)], jnp.float32), pure
    )
    nnx.replace_by_pure_dict(state, pure)
    return nnx.merge(graph, state)
