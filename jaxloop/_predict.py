"""Predictions for a whole data set: `predictor`.

    y_pred = predictor(model).run(batches(x, 256), model_state)
    for y_pred in predictor(model).stream(data, model_state): ...

Invariant: predictions come in the order of the data, one for each example. The host copies one
batch while the device works on the next ones, and `stream` holds a few batches at a time.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, Final, NamedTuple, TypeAlias

import jax
import numpy as np

from jaxloop._core.arrays import size_bytes
from jaxloop._core.batch import Batch, Signature, as_batch, describe_leaves
from jaxloop._core.checks import check_callable, in_words
from jaxloop._core.placement import check_processes, devices_of, placement
from jaxloop._core.state import State
from jaxloop._core.types import PyTree
from jaxloop._data.in_memory import Batches
from jaxloop._data.source import no_batch
from jaxloop._engine.signatures import Signatures
from jaxloop._supervised.fields import Field, InputFields, check_field, read
from jaxloop._supervised.models import ModelLike
from jaxloop._supervised.steps import make_prediction
from jaxloop.errors import ArgumentTypeError, DataError, ShapeError

Progress: TypeAlias = bool | Callable[[int, int | None], None]
"""Whether to print progress, or a function of the number of batches done and of all batches."""

PredictData: TypeAlias = Iterable[PyTree] | Callable[[int], Iterable[PyTree]]
"""Batches, or a function that returns them for epoch 0."""

_IN_FLIGHT = 32
"""How many batches the device has, at most, while the host copies the predictions of another. On a
CPU, a thread that waits for each batch in turn takes longer than a small model."""
_IN_FLIGHT_BYTES = 64 * 2**20
"""The maximum size of these batches and their predictions, but for two of any size."""

_END: Final = object()


def predictor(
    model: ModelLike,
    *,
    inputs: InputFields = None,
    mask: Field = None,
    rngs: Sequence[str] = (),
) -> Predictor:
    """Makes a value that predicts for whole data sets.

    Args:
        model: See `trainer`.
        inputs: What the model gets; see `trainer`. Without ``inputs``, a batch is ``x``, ``(x,)``,
            ``(x, y)`` or ``(x, y, weight)``, and the model gets ``x``.
        mask: Which examples exist, if your data are padded by something else than `batches`: a
            name in the batch or a function of it, that gives booleans of shape ``(batch,)``. The
            predictions where it is False are dropped, in every batch. Padding of
            ``batches(..., pad=True)`` is dropped without it. An example of weight 0 is no padding,
            so its prediction is kept.
        rngs: See `trainer`.

    Returns:
        A `Predictor`. Its programs are compiled once and used by all of its runs.

    Raises:
        ModelError: The model is of an unknown kind.
        ArgumentTypeError: An argument has the wrong type.

    Example:
        >>> import jaxloop as jl
        >>> model = (lambda key, x: np.ones(2), lambda w, x: x @ w)
        >>> data = jl.batches(np.arange(10.0).reshape(5, 2), 2)
        >>> jl.predictor(model).run(data, np.array([1.0, 10.0])).tolist()
        [10.0, 32.0, 54.0, 76.0, 98.0]
    """
    check_field("mask", mask)
    made = make_prediction(model, inputs, rngs)
    return Predictor(made.whole_state, jax.jit(made.predict), mask)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Predictor:
    """Predicts for whole data sets; made by `predictor`. It holds no data and no model state."""

    _whole_state: Callable[[Signature, Any], PyTree]
    _predict: Callable[..., PyTree]
    _mask: Field

    def __repr__(self) -> str:
        return "Predictor()"

    def run(
        self, data: PredictData, model_state: Any = None, *, progress: Progress = False
    ) -> PyTree:
        """Returns the predictions for all examples, in the order of the data.

        Args:
            data: Batches: an iterable, an iterator, or a function ``epoch -> iterable``. Only the
                inputs are used. For arrays in memory, use `batches` without ``shuffle``.
            model_state: The whole of what the trainer returns. You may omit it for an NNX or
                Equinox module, which holds its state.
            progress: True prints how many batches are done. A function is called with the number
                of batches done and that of all batches, which is None if the data have no length.

        Returns:
            A pytree like the model's prediction for a batch, with NumPy arrays of shape
            ``(num_examples, *rest)``, in the dtypes of the model. They are in memory once, with a
            few batches.

        Raises:
            DataError: The data are empty, shuffled, sampled, or lack their remainder.
            ModelError: The model state lacks a part, or does not fit the model.
            ArgumentError: There is no model state.
            ShapeError: The predictions of two batches cannot be joined along their first axis.

        Example:
            >>> import jaxloop as jl
            >>> model = (lambda key, x: 1.0, lambda w, x: {"twice": 2 * w * x})
            >>> jl.predictor(model).run([np.ones(2), np.ones(1)], 1.0)
            {'twice': array([2., 2., 2.], dtype=float32)}
        """
        return _joined(_Pass(self, data, model_state, progress).predictions())

    def stream(
        self, data: PredictData, model_state: Any = None, *, progress: Progress = False
    ) -> Iterator[PyTree]:
        """Yields the predictions of one batch after the other, in constant memory.

        The arguments are those of `run`. The first batch is read and checked at once. The device
        works ahead while you use what you got, so up to 32 batches (of at most 64 MiB together, or
        two) are read ahead.

        Returns:
            An iterator of pytrees of NumPy arrays that belong to you. A batch of padding alone
            gives empty arrays.

        Raises:
            JaxloopError: See `run`. If the data raise an error, the iterator first yields the
                predictions for the batches before it.

        Example:
            >>> import jaxloop as jl
            >>> stream = jl.predictor((lambda key, x: 1.0, lambda w, x: w * x)).stream
            >>> [y.tolist() for y in stream(iter([np.ones(2), np.zeros(1)]), 3.0)]
            [[3.0, 3.0], [0.0]]
        """
        predictions = _Pass(self, data, model_state, progress).predictions()
        return (jax.tree.map(_owned, one) for one in predictions)


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


class _Pass:
    """One pass over the data. The first batch is dispatched at once.

    Args:
        predictor: The predictor.
        data: The data that the user passed.
        given: The model state that the user passed.
        progress: See `Predictor.run`.
    """

    def __init__(
        self, predictor: Predictor, data: PredictData, given: Any, progress: Progress
    ) -> None:
        check_processes()
        self._report = _reporter(progress)
        self._predictor, self._data = predictor, data
        _check_state(given)
        self._values = _opened(data)
        self._length = len(data) if isinstance(data, Sized) else None
        self._keeps_arrays = isinstance(data, Batches | list | tuple)
        self._like: Signature | None = None
        self._signatures = Signatures()
        first = self._next(0)
        if first is None:
            raise no_batch("predictor: data")
        with jax.transfer_guard_host_to_device("allow"):
            self._model_state = predictor._whole_state(first.signature, given)
        self._place = placement(self._model_state)
        self._on_cpu = all(x.platform == "cpu" for x in devices_of(self._model_state))
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
            prediction = self._predictor._predict(value, self._model_state, np.uint32(index))
        for leaf in jax.tree.leaves(prediction):
            if not leaf.ndim or (keep is not None and leaf.shape[:1] != keep.shape):
                raise _without_rows(prediction, keep, index)
            if not self._on_cpu:
                leaf.copy_to_host_async()
        return _Pending(prediction, keep, index)

    def _moved(self, value: PyTree) -> PyTree:
        """Returns a batch on the devices of the model. Arrays of JAX may be elsewhere."""
        where = self._place.sharding or self._place.device
        return value if where is None else jax.device_put(value, where)

    def _kept(self, batch: PyTree, index: int) -> np.ndarray[Any, Any] | None:
        field, data = self._predictor._mask, self._data
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


def _without_rows(prediction: PyTree, keep: Any, index: int) -> ShapeError:
    paths = jax.tree_util.tree_leaves_with_path(prediction)
    rows = keep.shape if keep is not None else None
    path, leaf = next((p, x) for p, x in paths if not x.ndim or rows not in (None, x.shape[:1]))
    expected = "one row for each example" if keep is None else f"{keep.size} rows"
    return ShapeError(
        f"predictor: prediction{jax.tree_util.keystr(path)} must have {expected}, got shape "
        f"{leaf.shape} for batch {index}",
        fix="return predictions of shape (batch, *rest), or pass a jl.Model whose apply leaves out "
        "this part",
    )


def _opened(data: Any) -> Iterator[PyTree]:
    """Returns the batches of data, in the order of their examples.

    Raises:
        ArgumentTypeError: ``data`` are no batches.
        DataError: The data have another order, or leave out examples.
    """
    if isinstance(data, Batches):
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


def _check_order(data: Batches) -> None:
    wrong = None
    if data.order(0) is not None:
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


def _joined(predictions: Iterable[PyTree]) -> PyTree:
    """Returns the predictions of all batches as one pytree, joined along the first axis."""
    parts: list[list[np.ndarray[Any, Any]]] = []
    known: Signature | None = None
    for index, prediction in enumerate(predictions):
        leaves, tree = jax.tree.flatten(prediction)
        rests = Signature(tree, tuple((leaf.shape[1:], leaf.dtype) for leaf in leaves))
        if known is None:
            known, parts = rests, [[] for _ in leaves]
        elif rests != known:
            raise ShapeError(
                "predictor: the predictions of all batches must agree but for their first axis, "
                f"got {describe_leaves(*known).replace('batch', 'prediction')} and, for batch "
                f"{index}, {describe_leaves(*rests).replace('batch', 'prediction')}",
                fix="pad the inputs to one shape, or use stream instead of run",
            )
        for so_far, leaf in zip(parts, leaves, strict=True):
            so_far.append(leaf)
    assert known is not None
    return jax.tree.unflatten(known.tree, map(_concatenated, parts))


def _concatenated(parts: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Joins arrays, and drops each when it is copied, so that memory holds them once."""
    size = sum(map(len, parts))
    joined = np.empty((size, *parts[0].shape[1:]), parts[0].dtype)
    parts.reverse()
    filled = 0
    while parts:
        part = parts.pop()
        joined[filled : filled + len(part)] = part
        filled += len(part)
    return joined


def _copied(leaf: Any) -> Any:
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf


def _owned(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Returns an array that may be written. The memory of a device may not."""
    return array if array.flags.writeable else array.copy()


def _reporter(progress: Progress) -> Callable[[int, int | None], None]:
    if progress is True:
        return _Line()
    if progress is False:
        return lambda done, total: None
    check_callable("predictor", "progress", progress)
    return progress


class _Line:
    """Prints progress: in a terminal one line that changes, elsewhere a line each tenth."""

    def __init__(self) -> None:
        self._last = -1
        self._live = sys.stdout.isatty()

    def __call__(self, done: int, total: int | None) -> None:
        # Without a clock: each hundredth or tenth of the data, or powers of two.
        part = done.bit_length() if total is None else done * (100 if self._live else 10) // total
        if part == self._last:
            return
        self._last = part
        text = f"predicted {done}{'' if total is None else f' of {total}'} batches"
        ended = done == total or total is None
        if self._live:
            print(f"\r{text}", end="\n" if ended else "", flush=True)
        else:
            print(text, flush=True)
