"""Losses: Axon's numbers, Optax's functions, shapes that must not broadcast, exact reduction."""

from __future__ import annotations

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxloop import errors, losses


@pytest.fixture(autouse=True)
def _strict():
    with (
        warnings.catch_warnings(),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        warnings.simplefilter("error")
        yield


# The numbers of the examples in Axon's own documentation.
AXON = [
    (
        "binary_cross_entropy",
        [[0, 1], [1, 0], [1, 0]],
        [[0.6811, 0.5565], [0.6551, 0.4551], [0.5422, 0.2648]],
        [0.8644826, 0.5150600, 0.4598663],
    ),
    (
        "categorical_cross_entropy",
        [[0, 1, 0], [0, 0, 1]],
        [[0.05, 0.95, 0], [0.1, 0.8, 0.1]],
        [0.0512933, 2.3025851],
    ),
    (
        "categorical_hinge",
        [[1, 0, 0], [0, 0, 1]],
        [[0.05300799, 0.21617081, 0.68642382], [0.3754382, 0.08494169, 0.13442067]],
        [1.6334158, 1.2410176],
    ),
    (
        "hinge",
        [[1, 1, -1], [1, 1, -1]],
        [[0.45440044, 0.31470688, 0.67920924], [0.24311459, 0.93466766, 0.10914676]],
        [0.9700339, 0.6437881],
    ),
    ("kl_divergence", [[0, 1], [0, 0]], [[0.6, 0.4], [0.4, 0.6]], [0.9162892, -3.0809e-6]),
    ("log_cosh", [[0.0, 1.0], [0.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]], [0.2168904, 0.0]),
    ("soft_margin", [-1.0, 1.0, 1.0], [0.2953, -0.1709, 0.9486], [0.8516580, 0.7822436, 0.3273470]),
    ("mean_absolute_error", [[0.0, 1.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 0.0]], [0.5, 0.5]),
    ("mean_squared_error", [[0.0, 1.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 0.0]], [0.5, 0.5]),
    ("cosine_similarity", [[0.0, 1.0], [1.0, 1.0]], [[1.0, 0.0], [1.0, 1.0]], [0.0, 1.0]),
    ("poisson", [[0.0, 1.0], [0.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]], [1.0, 0.0]),
    ("huber", [[1], [1.5], [2.0]], [[0.8], [1.8], [2.1]], [0.02, 0.045, 0.005]),
]


@pytest.mark.parametrize(("name", "y_true", "y_pred", "expected"), AXON, ids=[a[0] for a in AXON])
def test_axon_numbers(name, y_true, y_pred, expected):
    value = losses.get(name).fn(jnp.array(y_true), jnp.array(y_pred))
    np.testing.assert_allclose(value, expected, atol=2e-7, rtol=2e-6)


def test_margin_ranking():
    first, second = jnp.array([0.6934, -0.7239, 1.1954]), jnp.array([-0.4691, 0.2670, -1.7452])
    value = losses.margin_ranking(jnp.ones(3), (first, second))
    np.testing.assert_allclose(value, [0.0, 0.9909, 0.0], rtol=1e-6)
    with pytest.raises(errors.ShapeError, match="pair"):
        losses.margin_ranking(jnp.ones(3), first)


def test_ctc_is_the_sum_over_alignments():
    log_p = jnp.log(jnp.array([[[0.6, 0.4], [0.3, 0.7]]]))
    # One label 1 in two steps: (1, blank), (blank, 1), (1, 1).
    expected = -np.log(0.4 * 0.3 + 0.6 * 0.7 + 0.4 * 0.7)
    labels = (jnp.array([1]), jnp.array([[1, 0]]))
    value = losses.connectionist_temporal_classification(labels, log_p)
    np.testing.assert_allclose(value, [expected], rtol=1e-5)


def test_sparse_and_from_logits_agree():
    logits = jnp.array([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0]])
    labels = jnp.array([0, 2])
    dense = jax.nn.one_hot(labels, 3)
    cce = losses.categorical_cross_entropy
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    for value in (
        cce(labels, logits, sparse=True, from_logits=True),
        cce(labels[:, None], logits, sparse=True, from_logits=True),
        cce(dense, logits, from_logits=True),
        cce(labels, jax.nn.softmax(logits), sparse=True),
    ):
        np.testing.assert_allclose(value, expected, rtol=1e-5)
    binary = losses.binary_cross_entropy(dense, logits, from_logits=True)
    np.testing.assert_allclose(
        binary, jnp.mean(optax.sigmoid_binary_cross_entropy(logits, dense), axis=1), rtol=1e-5
    )


def test_integer_labels_without_sparse():
    with pytest.raises(errors.ShapeError, match="sparse=True"):
        losses.categorical_cross_entropy(jnp.array([0, 1]), jnp.ones((2, 3)))


@pytest.mark.parametrize("loss", ["mean_squared_error", optax.l2_loss, "huber_loss", "hinge"])
def test_column_against_vector(loss):
    with pytest.raises(errors.ShapeError, match=r"\(4, 1\).*\(4,\)[\s\S]*fix"):
        losses.get(loss).fn(jnp.ones((4, 1)), jnp.ones(4))


def test_optax_is_called_in_its_own_order():
    logits, labels = jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([0, 0])
    fn = optax.softmax_cross_entropy_with_integer_labels
    for loss in (fn, "softmax_cross_entropy_with_integer_labels", functools.partial(fn, axis=-1)):
        np.testing.assert_allclose(losses.get(loss).fn(labels, logits), fn(logits, labels))
    delta = functools.partial(optax.huber_loss, delta=0.5)
    value = losses.get(delta).fn(jnp.array([0, 3]), jnp.array([1.0, 1.0]))
    np.testing.assert_allclose(value, optax.huber_loss(jnp.array([1.0, -2.0]), delta=0.5))
    # Where both have a name, Axon's meaning wins; the function itself is Optax's.
    assert losses.get("kl_divergence").fn is losses.kl_divergence
    log_p, p = jnp.log(jnp.array([[0.5, 0.5]])), jnp.array([[0.2, 0.8]])
    np.testing.assert_allclose(
        losses.get(optax.losses.kl_divergence).fn(p, log_p), optax.losses.kl_divergence(log_p, p)
    )


def test_every_optax_name_runs():
    integer = {
        "softmax_cross_entropy_with_integer_labels",
        "multiclass_hinge_loss",
        "multiclass_perceptron_loss",
        "multiclass_sparsemax_loss",
        "ntxent",
    }
    for name in losses.names():
        if hasattr(losses, name):
            continue
        y_true = jnp.array([0, 1, 1, 0]) if name in integer else jnp.ones((4, 3)) / 3
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optax deprecates some of its own.
            # Traced and not compiled: there are many.
            value = jax.eval_shape(losses.get(name).fn, y_true, jnp.full((4, 3), 0.3))
        assert value.shape in ((), (4,), (4, 3)), name


def test_probabilities():
    get = losses.get
    assert get("categorical_cross_entropy").probabilities
    assert get(losses.binary_cross_entropy).probabilities
    assert not get(functools.partial(losses.binary_cross_entropy, from_logits=True)).probabilities
    assert not get("kl_divergence").probabilities
    assert not get(optax.softmax_cross_entropy).probabilities
    assert get([("binary_cross_entropy", 1.0), ("hinge", 1.0)]).probabilities


def test_several_outputs():
    loss = losses.get([("mean_squared_error", 2.0), (optax.l2_loss, 1)])
    y_true = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(2)}
    y_pred = {"a": jnp.ones((2, 3)), "b": jnp.array([2.0, 4.0])}
    np.testing.assert_allclose(loss.fn(y_true, y_pred), [2 + 2, 2 + 8])
    with pytest.raises(errors.ShapeError, match="2 losses for 1 predictions"):
        loss.fn(jnp.zeros(2), jnp.zeros(2))
    scalar = losses.get([("mean_squared_error", 1.0), (lambda t, p: jnp.mean(p), 1.0)])
    assert scalar.fn(y_true, y_pred).shape == ()


def test_wrong_losses():
    with pytest.raises(errors.UnknownNameError, match="mean_squared_error"):
        losses.get("mean_squared_eror")
    with pytest.raises(errors.ArgumentTypeError):
        losses.get(3)
    with pytest.raises(errors.ArgumentTypeError, match=r"\(loss, weight\)"):
        losses.get(["hinge", "huber"])
    with pytest.raises(errors.ArgumentTypeError, match="number"):
        losses.get([(1.0, "hinge")])
    with pytest.raises(errors.ArgumentTypeError, match="ctc_loss"):
        losses.get(optax.ctc_loss)


def test_reduce():
    values = jnp.array([[1.0, 3.0], [jnp.nan, 1.0]])
    assert float(losses.reduce(values, jnp.array([True, False]), 2)) == 2.0
    assert float(losses.reduce(values, jnp.array([0, 0]), 2)) == 0.0
    assert np.isnan(losses.reduce(values, None, 2))
    np.testing.assert_allclose(losses.reduce(jnp.array([1.0, 2.0]), jnp.array([1.0, 3.0]), 2), 1.75)
    assert losses.reduce(jnp.ones(2, jnp.bfloat16), None, 2).dtype == jnp.float32
    assert float(losses.reduce(jnp.array(2.5), None, 7)) == 2.5
    with pytest.raises(errors.ShapeError, match="one value per example"):
        losses.reduce(jnp.array(1.0), jnp.ones(2), 2)
    with pytest.raises(errors.ShapeError, match="sample_weight"):
        losses.reduce(jnp.ones(2), jnp.ones((2, 1)), 2)
    with pytest.raises(errors.ShapeError):
        losses.per_example(jnp.ones(3), 2)
