"""In tests, a function of the package refuses arrays that its signature does not allow."""

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from utils.attention import attention

Q, K = jnp.ones((2, 5, 4, 8)), jnp.ones((2, 5, 2, 8))  # [B, T, N, H], [B, S, K, H]


@pytest.mark.parametrize(
    "arrays",
    [(Q[0], K, K), (Q, K[:1], K), (Q, K, K[..., :4]), (Q, K[:, :4], K), (Q.astype(int), K, K)],
    ids=["an axis too few", "another B", "another H", "another S", "whole numbers"],
)
def test_shapes_and_dtypes_are_checked(arrays):
    assert attention(Q, K, K).shape == Q.shape
    with pytest.raises(TypeCheckError):
        attention(*arrays)
