"""Floating-point operations of a traced step: those of its matrix multiplications.

    count = count_flops(jaxpr)
    count.flops, count.dtype, count.is_exact

XLA's own cost analysis counts the body of a loop once, however often it runs. Here a `jax.lax.scan`
counts as often as it runs, so that the layers of a scanned model and the parts of a split batch do
too. As is usual for the utilization of a model, only matrix multiplications and convolutions count.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

from jaxloop._core.jaxprs import is_jaxpr, parts_of


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """The operations of a step.

    Attributes:
        flops: Their number. A multiplication and an addition are two.
        dtype: The dtype of the operands of most of them, or "" if there are none.
        is_exact: Whether each of them was counted as often as it runs. A loop of unknown length and
            a kernel of one's own count once, and of several branches the most expensive one.
    """

    flops: int
    dtype: str
    is_exact: bool


def count_flops(jaxpr: Any) -> FlopCount:
    """Counts the operations of a jaxpr, open or closed."""
    counter = _Counter()
    by_dtype = counter.count(jaxpr)
    dtype = max(by_dtype, key=lambda name: by_dtype[name]) if by_dtype else ""
    return FlopCount(sum(by_dtype.values()), dtype, counter.is_exact)


class _Counter:
    """Counts operations by dtype, and notes whether a count is a guess."""

    def __init__(self) -> None:
        self.is_exact = True

    def count(self, jaxpr: Any) -> Counter[str]:
        total: Counter[str] = Counter()
        for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
            name = equation.primitive.name
            if name in _FLOPS:
                flops = _FLOPS[name](equation)
                if flops:
                    total[str(equation.invars[1].aval.dtype)] += flops
                continue
            inner = [part for part in parts_of(equation) if is_jaxpr(part)]
            counts = [self.count(part) for part in inner]
            if name == "cond" and counts:
                most = max(counts, key=lambda one: sum(one.values()))
                self.is_exact &= all(one == most for one in counts)
                total += most
                continue
            times = equation.params["length"] if name == "scan" else 1
            for one in counts:
                self.is_exact &= name not in ("while", "pallas_call") or not one
                total += Counter({dtype: times * flops for dtype, flops in one.items()})
        return total


def _dot_flops(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _conv_flops(equation: Any) -> int:
    """Returns the operations of a convolution, without those on padding and between dilations."""
    params, (left, kernel) = equation.params, (one.aval.shape for one in equation.invars[:2])
    numbers = params["dimension_numbers"]
    out = equation.outvars[0].aval.shape
    positions = 1
    for i, padding in enumerate(params["padding"]):
        positions *= _positions(
            left[numbers.lhs_spec[2 + i]],
            kernel[numbers.rhs_spec[2 + i]],
            out[numbers.out_spec[2 + i]],
            params["window_strides"][i],
            padding[0],
            params["lhs_dilation"][i],
            params["rhs_dilation"][i],
        )
    out_features, in_features = (kernel[numbers.rhs_spec[i]] for i in range(2))
    batch = left[numbers.lhs_spec[0]] // params["batch_group_count"]
    return 2 * batch * out_features * in_features * positions


def _positions(
    size: int, kernel: int, out: int, stride: int, low: int, dilation: int, kernel_dilation: int
) -> int:
    """Returns how many pairs of an output and a tap of the kernel meet an element of the input."""
    found = 0
    for tap in range(kernel):
        # The outputs o for which o * stride + offset is 0, dilation, ..., (size - 1) * dilation.
        offset = tap * kernel_dilation - low
        first = max(0, -(offset // stride))
        last = min(out - 1, ((size - 1) * dilation - offset) // stride)
        if dilation == 1:
            found += max(0, last - first + 1)
        else:
            found += sum((o * stride + offset) % dilation == 0 for o in range(first, last + 1))
    return found


_FLOPS = {"dot_general": _dot_flops, "conv_general_dilated": _conv_flops}
