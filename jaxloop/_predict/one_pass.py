"""One pass over the data: batches to the device, predictions to the host.

    for prediction in Pass(predict, whole_state, None, data, model_state, False).predictions(): ...

Invariant: the device has work while the host copies, and the number of batches between them is
bounded by count and size.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, Final, NamedTuple, TypeAlias

import jax
import numpy as np

from jaxloop._core.arrays import size_bytes
from jaxloop._core.batch import Batch, Signature, as_batch
from jaxloop._core.checks import in_words
from jaxloop._core.placement import check_processes, devices_of, placement
from jaxloop._core.state import State
from jaxloop._core.types import PyTree
from jaxloop._data.in_memory import Batches
from jaxloop._data.mixture import Mixture
from jaxloop._data.source import no_batch
from jaxloop._engine.signatures import Signatures
from jaxloop._predict.progress import Progress, reporter
from jaxloop._supervised.fields import Field, read
from jaxloop._supervised.steps import PredictionSteps
from jaxloop.errors import ArgumentTypeError, DataError, ShapeError

PredictData: TypeAlias = Iterable[PyTree] | Callable[[int], Iterable[PyTree]]
"""Batches, or a function that returns them for epoch 0."""

_IN_FLIGHT = 32
"""How many batches the device has, at most, while the host copies the predictions of another. On a
CPU, a thread that waits for each batch in turn takes longer than a small model."""
_IN_FLIGHT_BYTES = 64 * 2**20
"""The maximum size of these batches and their predictions, but for two of any size."""

_END: Final = object()


class _Pending(NamedTuple):
    """The prediction for a batch, which the device may not have made yet.

    Attributes:
        prediction: A pytree of arrays on the device.
        keep: Which examples are no padding, booleans of shape ``(batch,)``, or None if all are.
        number: The number of the batch.
    """

    prediction: PyTree
    keep: np.ndarray[Any, Any] | None
    number: int


class Pass:
    """One pass over the data. The first batch is dispatched at once.

    Args:
        steps: How to predict, with a ``predict`` that is compiled.
        mask: Which examples exist, or None.
        data: The data that the user passed.
        given: The model state that the user passed.
        progress: See `Predictor.run`.
        joins: Whether the predictions will be joined, so that each example must have one.
    """

    def __init__(
        self,
        steps: PredictionSteps,
        mask: Field,
        data: PredictData,
        given: Any,
        progress: Progress,
        *,
        joins: bool,
    ) -> None:
        check_processes()
        self._report = reporter(progress)
        self._steps, self._mask, self._data, self._joins = steps, mask, data, joins
        _check_state(given)
        self._values = _opened(data)
        self._length: int | None = None
        with contextlib.suppress(TypeError):  # some loaders have no length
            self._length = len(data) if isinstance(data, Sized) else None
        self._keeps_arrays = isinstance(data, Batches | list | tuple)
        self._like: Signature | None = None
        self._signatures = Signatures()
        first = self._next(0)
        if first is None:
            raise no_batch("predictor: data")
        with jax.transfer_guard_host_to_device("allow"):
            self._model_state = steps.whole_state(first.signature, given)
        self._place = placement(self._model_state)
        self._on_cpu = all(x.platform == "cpu" for x in devices_of(self._model_state))
        self._rows = steps.num_examples(first.signature) if joins else None
        pending = self._dispatch(first, 0)
        self._pending = collections.deque([pending])
        size = size_bytes((first.value, pending.prediction))
        self._most = min(_IN_FLIGHT, max(2, _IN_FLIGHT_BYTES // max(1, size)))

    def predictions(self) -> Iterator[PyTree]:
        """Yields the predictions of each batch as NumPy arrays, without padding."""
        pending = self._pending
        error: Exception | None = None
        for index in itertools.count(1):
            try:
                batch = self._next(index)
                if batch is not None:
                    pending.append(self._dispatch(batch, index))
            except Exception as found:
                found.add_note(f"jaxloop: while predicting batch {index} of the data")
                batch, error = None, found
            if batch is None:
                break
            if len(pending) > self._most:
                yield self._fetched(pending.popleft())
        while pending:
            yield self._fetched(pending.popleft())
        if error is not None:
            raise error

    def _next(self, index: int) -> Batch | None:
        value = next(self._values, _END)
        if value is _END:
            return None
        batch = as_batch(value, f"batch {index} of the data", self._like)
        if self._like is None:
            self._like = batch.signature
        elif batch.signature is not self._like:
            self._signatures.add(self._like, batch.signature)
        if self._keeps_arrays:
            return batch
        # The data may reuse the memory for the next batch, and a device may read it later.
        return Batch(jax.tree.map(_copied, batch.value), batch.signature)

    def _dispatch(self, batch: Batch, index: int) -> _Pending:
        value, keep = batch.value, self._kept(batch.value, index)
        if not all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(value)):
            value = self._moved(value)
        with jax.transfer_guard_host_to_device("allow"):  # the transfer is meant
            prediction = self._steps.predict(value, self._model_state, np.uint32(index))
        rows = self._rows if keep is None else keep.size
        if keep is None and self._joins and batch.signature is not self._like:
            rows = self._steps.num_examples(batch.signature)
        for leaf in jax.tree.leaves(prediction):
            if leaf.shape[:1] != (rows,) and (rows is not None or (self._joins and not leaf.ndim)):
                raise _without_rows(prediction, rows, index)
            if not self._on_cpu:
                leaf.copy_to_host_async()
        return _Pending(prediction, keep, index)

    def _moved(self, value: PyTree) -> PyTree:
        """Returns a batch on the devices of the model. Arrays of JAX may be elsewhere."""
        where = self._place.sharding or self._place.device
        return value if where is None else jax.device_put(value, where)

    def _kept(self, batch: PyTree, index: int) -> np.ndarray[Any, Any] | None:
        field, data = self._mask, self._data
        keep = None if field is None else _as_mask(read(batch, field, "mask"), index)
        if (
            isinstance(data, Batches)
            and data.pad
            and (index + 1) * data.batch_size > data.num_examples
        ):
            # Counted, because the mask in a batch is the product with the user's own weights.
            places = np.arange(index * data.batch_size, (index + 1) * data.batch_size)
            real = places < data.num_examples
            keep = real if keep is None else keep & real
        return keep

    def _fetched(self, pending: _Pending) -> PyTree:
        with jax.transfer_guard_device_to_host("allow"):  # `jax.device_get` takes far longer
            host, keep = jax.tree.map(np.asarray, pending.prediction), pending.keep
        self._report(pending.number + 1, self._length)
        return host if keep is None else jax.tree.map(lambda x: x[keep], host)


def _without_rows(prediction: PyTree, rows: int | None, index: int) -> ShapeError:
    paths = jax.tree_util.tree_leaves_with_path(prediction)
    path, leaf = next((p, x) for p, x in paths if not x.ndim or rows not in (None, x.shape[0]))
    examples = "example" if rows is None else f"of the {rows} examples"
    return ShapeError(
        f"predictor: prediction{jax.tree_util.keystr(path)} must have one row for each {examples} "
        f"of batch {index}, got shape {leaf.shape}",
        fix="pass batches, whose first axis is that of the examples, to a model that keeps it; "
        "without padding, stream takes predictions of any shape",
    )


def _opened(data: Any) -> Iterator[PyTree]:
    """Returns the batches of data, in the order of their examples.

    Raises:
        ArgumentTypeError: ``data`` are no batches.
        DataError: The data have another order, or leave out examples.
    """
    if isinstance(data, Batches | Mixture):
        _check_order(data)
    elif callable(data) and not hasattr(data, "__iter__"):
        data = data(0)
    # An array or a dict is an iterable of something else than batches.
    if hasattr(data, "shape") or isinstance(data, str | bytes | dict):
        found = f"an array of shape {data.shape}" if hasattr(data, "shape") else in_words(data)
    elif hasattr(data, "__iter__"):
        return iter(data)
    else:
        found = in_words(data)
    raise ArgumentTypeError(
        f"predictor: data must be an iterable of batches, got {found}",
        fix="pass batches; for arrays in memory, use jl.batches(x, batch_size)",
    )


def _check_order(data: Batches | Mixture) -> None:
    wrong = None
    if isinstance(data, Mixture):
        wrong = "a mixture", "of one data set"
    elif data.shuffle:
        wrong = "data in a random order", "without shuffle"
    elif data.drop_remainder and data.num_examples % data.batch_size:
        wrong = "data that drop their remainder", "without drop_remainder"
    if wrong is not None:
        raise DataError(
            f"predictor: data must be all examples in their own order, got {wrong[0]}",
            fix=f"make the batches {wrong[1]}",
        )


def _check_state(given: object) -> None:
    if isinstance(given, State):
        raise ArgumentTypeError(
            "predictor: model_state must be the state of a model, got the State of a loop",
            fix="pass loop.output(state), which is what loop.run returns",
        )


def _as_mask(mask: Any, index: int) -> np.ndarray[Any, Any]:
    array = np.asarray(mask)
    if array.dtype != bool or array.ndim != 1:
        raise DataError(
            "predictor: mask must give booleans of shape (batch,), got "
            f"{array.dtype}{list(array.shape)} for batch {index}",
            fix="say which examples exist, such as mask=lambda batch: batch['weight'] > 0",
        )
    return array


def _copied(leaf: Any) -> Any:
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf
