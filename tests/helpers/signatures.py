"""What checks the package's signatures in the tests: those that name arrays, with their shapes and dtypes.

Other signatures are left to the functions themselves: what a user passes is refused by a sentence, and tests look for it.
"""

import typing

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

_beartype = beartype(
    conf=BeartypeConf(is_pep484_tower=True)
)  # an int may stand for a float (PEP 484)


def _names_an_array(annotation) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return True
    return any(map(_names_an_array, typing.get_args(annotation)))


def checked(function):
    """`function`, checked at every call if its signature names an array."""
    annotations = getattr(function, "__annotations__", {})
    return _beartype(function) if any(map(_names_an_array, annotations.values())) else function
