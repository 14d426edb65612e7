"""A decode step, compiled for a TPU: it reads weights and cache once, and updates the cache in place."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from utils import kernels, transformer

pytestmark = [pytest.mark.tpu, pytest.mark.slow]

R1 = transformer.Config(
    "qwen2", vocab_size=151936, hidden_size=1536, num_hidden_layers=28, num_attention_heads=12,
    num_key_value_heads=2, head_dim=128, intermediate_size=8960, max_position_embeddings=131072,
    rope_theta=1e4, rms_norm_eps=1e-6, tie_word_embeddings=False, attention_bias=True, dtype="bfloat16",
)  # fmt: skip


def compiled_step(cache_length: int, batch_size: int = 1):
    """(program of a decode step on a v5e chip, bytes of weights without the embedding, of the cache)."""
    bounds = {"chips_per_host_bounds": [1, 1, 1]}
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:1x1", **bounds)
    place = SingleDeviceSharding(topology.devices[0])

    def abstract(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    with kernels.compiling_for("tpu"):
        model = nnx.eval_shape(
            lambda: transformer.Transformer(R1, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        )
        graph, state = nnx.split(model)
        cache = jax.eval_shape(lambda: model.new_cache(batch_size, cache_length))

        def step(state, cache, tokens, positions):
            x, cache = nnx.merge(graph, state).hidden(tokens, positions, cache)
            return nnx.merge(graph, state).logits(x[:, 0]), cache

        token = jax.ShapeDtypeStruct((batch_size, 1), jnp.int32, sharding=place)
        lowered = jax.jit(step, donate_argnums=1).lower(
            abstract(state), abstract(cache), token, token
        )
        program = lowered.compile(compiler_options=kernels.tpu.DECODE_OPTIONS)
    weights, cached = (
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) for tree in (state, cache)
    )
    return program, weights - 2 * R1.vocab_size * R1.hidden_size, cached


@pytest.mark.parametrize("cache_length", [pytest.param(4096, marks=pytest.mark.long), 32_768])
def test_a_step_reads_weights_and_cache_once_and_writes_in_place(cache_length):
    program, weights, cache = compiled_step(cache_length)
    assert program.cost_analysis()["bytes accessed"] <= 1.05 * (weights + cache)
    assert program.memory_analysis().alias_size_in_bytes == cache
    text, shapes = program.as_text(), (f"2,128,{cache_length}", f"2,{cache_length},128")
    for line in text.splitlines():
        if moved := re.search(r" = \(?(\S+?),? .*?\b(copy|copy-start|transpose|convert)\(", line):
            dims = re.search(r"\[([\d,]+)\]", moved[1])
            # Into fast memory, S(1), ahead of its use: a prefetch, which counts among the bytes above.
            prefetch = moved[2] == "copy-start" and "S(1)" in moved[1]
            a_cache = dims is not None and dims[1].removeprefix("1,") in shapes
            assert prefetch or not a_cache, line.strip()[:200]
    aliased = re.search(r"input_output_alias=\{(.*?)\}, entry", text)[1]
    assert aliased.count("may-alias") + aliased.count("must-alias") == 2 * R1.num_hidden_layers
