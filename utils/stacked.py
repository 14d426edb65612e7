"""Stacked blocks: one block whose arrays have a leading axis L, for L blocks of one shape.

To train and to read a prompt, the stack is scanned: the compiled program holds one block, however deep the model is. To
decode, it is looped over: slicing layer i out of the stack with a constant index copies nothing, so one copy of the weights
serves both, and each layer's cache is updated in place, where a scan would copy it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from utils.kv_cache import KVCache
from utils.sharding import all_gather


def stack(make: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """`num_layers` blocks, each with random numbers of its own, as one block with stacked arrays."""
    return nnx.split_rngs(splits=num_layers)(nnx.vmap(make, in_axes=0, out_axes=0))(rngs)


def block(layers: nnx.Module, i: int) -> nnx.Module:
    """Block i, of stacked blocks or of a layout that keeps them apart."""
    if hasattr(layers, "block"):
        return layers.block(i)
    graph, state = nnx.split(layers)
    return nnx.merge(graph, jax.tree.map(lambda x: x[i], state))


def forward(
    layers: nnx.Module,
    x: Float[Array, "B T D"],
    call: Callable,
    config,
    *,
    cache: KVCache | None = None,
    output_hidden_states: bool = False,
    gradient_checkpointing: bool = False,
    unroll: int = 1,
):
    """x through all blocks, each called as `call(block, x) -> (x, (k, v))`: (x, the cache with each layer's k and v).

    With `output_hidden_states` the states after each block [L, B, T, D] stand in the cache's place. With
    `gradient_checkpointing` only each block's input is kept for the backward pass, and the rest computed again.
    """

    def output(x, kv):
        return x if output_hidden_states else None if cache is None else kv

    if hasattr(layers, "block"):
        outputs = []
        for i in range(config.num_hidden_layers):
            graph, state = nnx.split(layers.block(i))

            def step(state, x, graph=graph):
                return call(nnx.merge(graph, state), x)

            x, kv = (jax.checkpoint(step) if gradient_checkpointing else step)(state, x)
            outputs.append(output(x, kv))
        outputs = jax.tree.map(lambda *each: jnp.stack(each), *outputs)
    else:
        graph, state = nnx.split(layers)

        def scanned(x, state):
            x, kv = call(nnx.merge(graph, all_gather(state, config)), x)
            return x, output(x, kv)

        if gradient_checkpointing:
            scanned = jax.checkpoint(scanned, prevent_cse=False)
        x, outputs = jax.lax.scan(scanned, x, state, unroll=unroll)
    if output_hidden_states or cache is None:
        return x, outputs
    k, v = outputs
    return x, [layer.prefill(k[i], v[i]) for i, layer in enumerate(cache)]


def decode(layers: nnx.Module, x: Float[Array, "B T D"], call: Callable, cache: KVCache):
    """x through all blocks, each called as `call(block, x, layer_cache) -> (x, layer_cache)`: (x, the new cache)."""
    new_cache = []
    for i, layer_cache in enumerate(cache):
        x, layer_cache = call(block(layers, i), x, layer_cache)
        new_cache.append(layer_cache)
    return x, new_cache
