"""The platform a program is for, and what follows for dtypes: those of activations, and of the operands of a product."""

import contextlib
import contextvars
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

_target = contextvars.ContextVar("platform that is compiled for", default=None)


@contextlib.contextmanager
def compiling_for(platform: str):
    """Within: build models and programs for "tpu" or "gpu" although this machine has none, as `plan` does."""
    token = _target.set(platform)
    try:
        yield
    finally:
        _target.reset(token)


def platform() -> str:
    """Where the model that is being built, or the program that is being traced, will run: "cpu", "gpu" or "tpu"."""
    return _target.get() or jax.default_backend()


def on_cpu() -> bool:
    """Whether `platform` is a CPU."""
    return platform() == "cpu"


def activation_dtype(param_dtype) -> jnp.dtype:
    """The dtype of activations beside weights of this dtype: the same; on a CPU float32.

    A CPU's products of 16-bit floats accumulate in float32, and its other arithmetic is float32 in any case: rounding
    every result and converting it back cost a third of a training step. Memory for activations doubles.
    """
    return jnp.dtype(jnp.float32 if on_cpu() else param_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def mixed_precision_einsum(axes: str, a: Array, b: Array, dtype) -> Array:
    """`jnp.einsum(axes, a, b)`, multiplied in the narrower of the two dtypes, returned in `dtype`: "Ni,oi->No" is x W^T.

    Every axis must be in two of the three terms: then each derivative is such an einsum again, of operands cast to the
    same dtype. It has a derivative of its own because on a CPU XLA multiplies bfloat16 three times faster when the
    result is asked for in float32; asked for bfloat16, it first converts the weights, every time.
    """
    return _einsum(axes, a, b, dtype)


def _narrower(a, b):
    return min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)


def _einsum(axes, a, b, dtype):
    narrow = _narrower(a, b)
    accumulate_in = jnp.float32 if on_cpu() else dtype
    y = jnp.einsum(axes, a.astype(narrow), b.astype(narrow), preferred_element_type=accumulate_in)
    return y.astype(dtype)


def _einsum_forward(axes, a, b, dtype):
    narrow = _narrower(a, b)
    residuals = a.astype(narrow), b.astype(narrow), jnp.zeros(0, a.dtype), jnp.zeros(0, b.dtype)
    return _einsum(axes, a, b, dtype), residuals


def _einsum_backward(axes, dtype, residuals, g):
    (left, right), out = axes.split("->")[0].split(","), axes.split("->")[1]
    a, b, like_a, like_b = residuals
    return (
        _einsum(f"{out},{right}->{left}", g, b, like_a.dtype),
        _einsum(f"{out},{left}->{right}", g, a, like_b.dtype),
    )


mixed_precision_einsum.defvjp(_einsum_forward, _einsum_backward)
