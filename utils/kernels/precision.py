"""The platform a program is for, and the dtypes that follow for activations and products."""

import contextlib
import contextvars
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

_target = contextvars.ContextVar("platform that is compiled for", default=None)


@contextlib.contextmanager
def compiling_for(platform: str):
    """Within: build models and programs for a "tpu" or "gpu" that this machine lacks (`plan`)."""
    token = _target.set(platform)
    try:
        yield
    finally:
        _target.reset(token)


def platform() -> str:
    """Where the model or program that is being built will run: "cpu", "gpu" or "tpu"."""
    return _target.get() or jax.default_backend()


def on_cpu() -> bool:
    """Whether `platform` is a CPU."""
    return platform() == "cpu"


def activation_dtype(param_dtype) -> jnp.dtype:
    """The dtype of activations beside weights of this dtype: the same; on a CPU float32.

    A CPU computes in float32 in any case: rounding every result to 16 bits and back took a third of
    a training step. Memory for activations doubles.
    """
    return jnp.dtype(jnp.float32 if on_cpu() else param_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def mixed_precision_einsum(axes: str, a: Array, b: Array, dtype) -> Array:
    """`jnp.einsum(axes, a, b)`, multiplied in the narrower of the dtypes, returned in `dtype`.

    "Ni,oi->No" is x W^T. Every axis must be in two of the three terms: then each derivative is such
    an einsum again, of operands cast to the same dtype. It is written out because on a CPU XLA
    multiplies bfloat16 three times faster into float32: else it converts the weights, every time.
    """
    return _einsum(axes, a, b, dtype)


def _narrow(a, b):
    """Both in the narrower of their dtypes."""
    dtype = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    return a.astype(dtype), b.astype(dtype)


def _einsum(axes, a, b, dtype):
    accumulate_in = jnp.float32 if on_cpu() else dtype
    return jnp.einsum(axes, *_narrow(a, b), preferred_element_type=accumulate_in).astype(dtype)


def _einsum_forward(axes, a, b, dtype):
    residuals = (*_narrow(a, b), jnp.zeros(0, a.dtype), jnp.zeros(0, b.dtype))
    return _einsum(axes, a, b, dtype), residuals


def _einsum_backward(axes, dtype, residuals, g):
    left, right, out = axes.replace("->", ",").split(",")
    a, b, like_a, like_b = residuals
    to_a = _einsum(f"{out},{right}->{left}", g, b, like_a.dtype)
    return to_a, _einsum(f"{out},{left}->{right}", g, a, like_b.dtype)


mixed_precision_einsum.defvjp(_einsum_forward, _einsum_backward)
