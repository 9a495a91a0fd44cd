"""The parts of a batch: what the model gets, the targets, and the weights.

    fields = BatchFields()                                          # (x, y) or (x, y, weight)
    fields = BatchFields(inputs="image", targets="label", weights="mask")
    parts = fields.read(batch)
    prediction = bound.predict(*parts.args, **parts.kwargs)

Invariant: a part that is named must exist. A missing name is an error that lists the names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeAlias

from jax.typing import ArrayLike

from jaxloop._core.types import PyTree
from jaxloop.errors import ArgumentError, ArgumentTypeError, DataError, unknown_name

Field: TypeAlias = str | Callable[[PyTree], PyTree] | None
"""A part of a batch: a name in it, a function of it, or None."""

InputFields: TypeAlias = Field | tuple[Field, ...] | Mapping[str, Field]
"""The inputs of a model: one, several positional ones, or keyword arguments."""


@dataclasses.dataclass(frozen=True)
class BatchParts:
    """The parts of one batch.

    Attributes:
        args: The positional inputs of the model.
        kwargs: Its keyword inputs.
        targets: The targets, a pytree or None.
        weight: The weights, or None.
    """

    args: tuple[PyTree, ...]
    kwargs: dict[str, PyTree]
    targets: PyTree
    weight: ArrayLike | None


@dataclasses.dataclass(frozen=True)
class BatchFields:
    """Where the parts of a batch are.

    Without names, a batch is ``(x, y)`` or ``(x, y, weight)``. A part of such a batch that has no
    name stays where it is.

    Attributes:
        inputs: The inputs of the model.
        targets: The targets.
        weights: The weights of the examples.
    """

    inputs: InputFields = None
    targets: Field = None
    weights: Field = None

    def __post_init__(self) -> None:
        inputs = self.inputs
        named = inputs if isinstance(inputs, tuple) else (inputs,)
        if isinstance(inputs, Mapping):
            named = tuple(inputs.values())
        if not named or (isinstance(inputs, tuple | Mapping) and None in named):
            raise ArgumentError(
                f"inputs must name the parts of the batch that the model gets, got {inputs!r}",
                fix="pass a name, a function of the batch, or a tuple or dict of them",
            )
        for one in named:
            check_field("inputs", one)
        check_field("targets", self.targets)
        check_field("weights", self.weights)

    def read(self, batch: PyTree) -> BatchParts:
        """Returns the parts of a batch.

        Raises:
            DataError: The batch is neither a pair nor a triple, and the inputs have no name.
            UnknownNameError: The batch has no part of a name.
        """
        parts = BatchParts((), {}, None, None)
        if self.inputs is None or (_is_pair(batch) and not _names(batch)):
            x, y, weight = unpack(batch)
            parts = BatchParts((x,), {}, y, weight)
        if isinstance(self.inputs, Mapping):
            kwargs = {name: read(batch, one, "inputs") for name, one in self.inputs.items()}
            parts = dataclasses.replace(parts, args=(), kwargs=kwargs)
        elif self.inputs is not None:
            fields = self.inputs if isinstance(self.inputs, tuple) else (self.inputs,)
            parts = dataclasses.replace(
                parts, args=tuple(read(batch, one, "inputs") for one in fields)
            )
        if self.targets is not None:
            parts = dataclasses.replace(parts, targets=read(batch, self.targets, "targets"))
        if self.weights is not None:
            parts = dataclasses.replace(parts, weight=read(batch, self.weights, "weights"))
        return parts


def read(batch: PyTree, field: Field, what: str) -> PyTree:
    """Returns a part of a batch.

    Args:
        batch: The batch.
        field: A name, or a function of the batch.
        what: The argument that says so, for the error message.

    Raises:
        UnknownNameError: The batch has no part of this name.

    Example:
        >>> read({"image": 1, "label": 2}, "label", "targets")
        2
    """
    if callable(field):
        return field(batch)
    assert field is not None
    names = _names(batch)
    if field in names:
        return batch[field] if isinstance(batch, Mapping) else getattr(batch, field)
    if not names:
        raise DataError(
            f"{what}={field!r} must be a name in the batch, got a batch without names, "
            f"{_kind(batch)}",
            fix="pass a function of the batch, such as lambda batch: batch[0]",
        )
    raise unknown_name(f"part of the batch for {what}=", field, names)


def unpack(batch: PyTree) -> tuple[PyTree, PyTree, ArrayLike | None]:
    """Returns a supervised batch as ``(x, y, sample_weight)``, where the weight may be None.

    Raises:
        DataError: The batch is neither a pair nor a triple.

    Example:
        >>> unpack((1, 2))
        (1, 2, None)
    """
    if _is_pair(batch):
        return batch[0], batch[1], batch[2] if len(batch) == 3 else None
    raise DataError(
        f"a supervised batch must be (x, y) or (x, y, sample_weight), got {_kind(batch)}",
        fix="pass batches (x, y), for arrays in memory jl.batches((x, y), batch_size); or say what "
        "the batch holds with inputs=, targets= and weights=",
    )


def _is_pair(batch: PyTree) -> bool:
    return isinstance(batch, tuple | list) and len(batch) in (2, 3)


def _names(batch: PyTree) -> list[str]:
    """Returns the names of the parts of a dict, a named tuple or a dataclass."""
    if isinstance(batch, Mapping):
        return [name for name in batch if isinstance(name, str)]
    return list(getattr(batch, "_fields", getattr(batch, "__dataclass_fields__", ())))


def _kind(batch: PyTree) -> str:
    if isinstance(batch, tuple | list):
        return f"a {type(batch).__name__} of {len(batch)}"
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} with {', '.join(map(repr, batch)) or 'nothing'}"
    shape = getattr(batch, "shape", None)
    return f"a {type(batch).__name__}" if shape is None else f"an array of shape {shape}"


def check_field(name: str, field: object) -> None:
    """Raises if an argument does not say which part of a batch is meant.

    Raises:
        ArgumentTypeError: It is no name, function or None.
    """
    if field is None or isinstance(field, str) or callable(field):
        return
    raise ArgumentTypeError(
        f"{name} must be a name in the batch, a function of the batch or None, got {field!r}",
        fix=f"pass {name}='...', or {name}=lambda batch: ...",
    )
