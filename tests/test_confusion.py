"""The confusion matrix: exact counts for every kind of labels, predictions and weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import confusion_matrix as reference

import jaxloop as jl
from jaxloop.metrics import confusion_matrix

pytestmark = pytest.mark.slow  # CI counts their coverage all the same


def value(metric, *args, **kwargs):
    update = jax.jit(metric.update)  # compiles once, not each operation
    return np.asarray(metric.compute(update(metric.init(), *args, **kwargs)))


def some(num=200, classes=5, seed=0):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(num, classes)).astype(np.float32)
    return rng.integers(0, classes, num).astype(np.int32), scores


def test_it_is_that_of_scikit_learn():
    labels, scores = some()
    expected = reference(labels, scores.argmax(-1), labels=range(5))
    found = value(confusion_matrix(5), labels, scores)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, expected)
    one_hot = jax.nn.one_hot(labels, 5)
    np.testing.assert_array_equal(value(confusion_matrix(5), one_hot, scores), expected)
    classes = scores.argmax(-1).astype(np.uint8)
    np.testing.assert_array_equal(value(confusion_matrix(5), labels, classes), expected)


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint32, np.float32])
def test_weights(dtype):
    labels, scores = some()
    weight = np.random.default_rng(1).integers(0, 4, 200).astype(dtype)
    metric = confusion_matrix(5)
    if dtype == np.float32:
        metric = metric.weighted
        weight = weight / np.float32(8)  # exact in binary
    expected = reference(labels, scores.argmax(-1), labels=range(5), sample_weight=weight)
    np.testing.assert_array_equal(value(metric, labels, scores, weight=weight), expected)


def test_large_weights_do_not_wrap():
    num = 70_000  # more than the halves of one piece
    weight = np.full(num, 2**31 - 1, np.int32)
    labels = np.zeros(num, np.int32)
    found = value(confusion_matrix(2), labels, labels, weight=weight)
    assert found.tolist() == [[num * (2**31 - 1), 0], [0, 0]]
    negative = value(confusion_matrix(2), labels, labels, weight=-weight)
    assert negative.tolist() == [[-num * (2**31 - 1), 0], [0, 0]]


def test_float_weights_lose_no_small_number():
    weight = np.array([2.0**24] + [1.0] * 1000, np.float32)
    labels = np.zeros(len(weight), np.int32)
    metric = confusion_matrix(2).weighted
    assert value(metric, labels, labels, weight=weight)[0, 0] == 2**24 + 1000


def test_what_is_no_class_does_not_count():
    scores = np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1]]
    scores[2, 1] = np.nan
    labels = np.array([0, -1, 2, 3, 1], np.int32)
    assert value(confusion_matrix(3), labels, scores).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]
    fractions = np.array([0, 0.5, 2, np.nan, 1], np.float32)
    assert value(confusion_matrix(3), fractions, scores).sum() == 2


def test_one_column_is_a_probability():
    labels, probabilities = np.array([0, 1, 1, 0]), np.array([0.2, 0.4, 0.9, np.nan], np.float32)
    assert value(confusion_matrix(2), labels, probabilities).tolist() == [[1, 0], [1, 1]]
    assert value(confusion_matrix(2, threshold=0.3), labels, probabilities).tolist() == [
        [1, 0],
        [0, 2],
    ]


def test_more_axes_count_each_element_with_the_weight_of_its_example():
    labels = np.array([[0, 1], [1, 1]], np.int32)
    scores = np.eye(2, dtype=np.float32)[np.array([[0, 0], [1, 1]])]
    weight = np.array([1, 3], np.int32)
    assert value(confusion_matrix(2), labels, scores, weight=weight).tolist() == [[1, 0], [1, 6]]


def test_more_classes_than_the_dtype_of_the_labels_holds():
    labels = np.array([255, 3], np.uint8)
    scores = np.zeros((2, 300), np.float32)
    scores[:, 299] = 1
    found = value(confusion_matrix(300), labels, scores)
    assert found[255, 299] == found[3, 299] == 1 and found.sum() == 2


def test_a_loop_accumulates_it_for_any_split():
    labels, scores = some(103)
    expected = reference(labels, scores.argmax(-1), labels=range(5))

    def step(batch, state):
        return jl.emit(state, y_true=batch[0], y_pred=batch[1], sample_weight=batch[2])

    for size in (103, 10):
        data = jl.batches((labels, scores), size, pad=True)
        loop = jl.loop(step).metric(confusion_matrix(5))
        found = loop.run(data).history[0]["confusion_matrix"]
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, expected)


def test_float_weights_in_a_loop():
    labels, scores = some(40)
    weight = np.linspace(0, 1, 40, dtype=np.float32)

    def step(batch, state):
        return jl.emit(state, y_true=batch[0], y_pred=batch[1], sample_weight=batch[2])

    data = jl.batches((labels, scores, weight), 10)
    found = jl.loop(step).metric(confusion_matrix(5)).run(data).history[0]["confusion_matrix"]
    expected = reference(labels, scores.argmax(-1), labels=range(5), sample_weight=weight)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_wrong_arguments():
    with pytest.raises(jl.errors.ArgumentError, match="at least 2"):
        confusion_matrix(1)
    with pytest.raises(jl.errors.ArgumentTypeError, match="whole number"):
        confusion_matrix(2.5)
    labels, scores = some()
    with pytest.raises(jl.errors.ShapeError, match="num_classes=5"):
        value(confusion_matrix(4), labels, scores)
    with pytest.raises(jl.errors.ArgumentTypeError, match="bool or integer"):
        value(confusion_matrix(5), labels, scores, weight=jnp.ones(200))
