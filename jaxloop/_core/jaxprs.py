"""The equations of a traced function.

names = {equation.primitive.name for equation in equations(jaxpr)}
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yields the equations of a jaxpr, open or closed, and of all jaxprs in their parameters."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for part in parts_of(equation):
            if is_jaxpr(part):
                yield from equations(part)


def is_jaxpr(part: Any) -> bool:
    """Returns whether a part of an equation is a jaxpr, open or closed."""
    return hasattr(getattr(part, "jaxpr", part), "eqns")


def parts_of(equation: Any) -> Iterator[Any]:
    """Yields the parameters of an equation, and the items of those that are tuples or lists."""
    for value in equation.params.values():
        yield from value if isinstance(value, tuple | list) else (value,)
