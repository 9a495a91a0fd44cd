"""Predictions for a whole data set: `predictor`.

    y_pred = predictor(model).run(batches(x, 256), model_state)
    for y_pred in predictor(model).stream(data, model_state): ...

Invariant: predictions come in the order of the data, one for each example. The host copies one
batch while the device works on the next ones, and `stream` holds a few batches at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from jaxloop._core.types import PyTree
from jaxloop._predict.joining import joined, owned
from jaxloop._predict.one_pass import Pass, PredictData
from jaxloop._predict.progress import Progress
from jaxloop._supervised.fields import Field, InputFields, check_field
from jaxloop._supervised.models import ModelLike
from jaxloop._supervised.steps import PredictionSteps, make_prediction


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
        >>> import numpy as np
        >>> model = (lambda key, x: np.ones(2), lambda w, x: x @ w)
        >>> data = jl.batches(np.arange(10.0).reshape(5, 2), 2)
        >>> jl.predictor(model).run(data, np.array([1.0, 10.0])).tolist()
        [10.0, 32.0, 54.0, 76.0, 98.0]
    """
    check_field("mask", mask)
    made = make_prediction(model, inputs, rngs)
    return Predictor(made, mask)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Predictor:
    """Predicts for whole data sets; made by `predictor`. It holds no data and no model state."""

    _steps: PredictionSteps
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
            ShapeError: A prediction has not one row for each example, or those of two batches
                differ in another axis.

        Example:
            >>> import jaxloop as jl
            >>> import numpy as np
            >>> model = (lambda key, x: 1.0, lambda w, x: {"twice": 2 * w * x})
            >>> jl.predictor(model).run([np.ones(2), np.ones(1)], 1.0)
            {'twice': array([2., 2., 2.], dtype=float32)}
        """
        one_pass = Pass(self._steps, self._mask, data, model_state, progress, joins=True)
        return joined(one_pass.predictions())

    def stream(
        self, data: PredictData, model_state: Any = None, *, progress: Progress = False
    ) -> Iterator[PyTree]:
        """Yields the predictions of one batch after the other, in constant memory.

        The arguments are those of `run`. The first batch is read and checked at once. The device
        works ahead while you use what you got, so up to 32 batches (of at most 64 MiB together, or
        two) are read ahead.

        Returns:
            An iterator of pytrees of NumPy arrays that belong to you. A batch of padding alone
            gives empty arrays. Where nothing is padded, predictions may have any shapes.

        Raises:
            JaxloopError: See `run`. If the data raise an error, the iterator first yields the
                predictions for the batches before it.

        Example:
            >>> import jaxloop as jl
            >>> import numpy as np
            >>> stream = jl.predictor((lambda key, x: 1.0, lambda w, x: w * x)).stream
            >>> [y.tolist() for y in stream(iter([np.ones(2), np.zeros(1)]), 3.0)]
            [[3.0, 3.0], [0.0]]
        """
        one_pass = Pass(self._steps, self._mask, data, model_state, progress, joins=False)
        return (jax.tree.map(owned, one) for one in one_pass.predictions())
