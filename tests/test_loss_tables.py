"""Every loss by name against float64: dtypes, targets, weights and extreme values.

The oracles are NumPy formulas in float64, of the inputs as their dtype rounds them. The losses of
one dtype are compiled as one program, because a hundred small ones take a minute.
"""

from __future__ import annotations

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import expit, log_softmax, softmax

from jaxloop import errors, losses

EPS = 1e-7
INF, NAN = np.inf, np.nan
DTYPES = [
    "float16",
    pytest.param("bfloat16", marks=pytest.mark.slow),
    pytest.param("float32", marks=pytest.mark.slow),
    "float64",
]

# --- data: rows of two or three numbers, with the extremes of each kind ---------------------------

HOT = np.array([[1, 0], [1, 0], [0, 1], [0, 1], [1, 0], [0, 1]])
DATA = {
    "probabilities": (HOT, [[0, 1], [1, 0], [0.5, 0.5], [0.25, 0.75], [1e-3, 0.999], [1, 0]]),
    "logits": (HOT, [[0, 1], [1e4, -1e4], [1e4, -1e4], [3, -2], [-1e4, 1e4], [-INF, 2]]),
    "scores": (HOT, [[0, 2], [1.5, -1e4], [1e4, -1e4], [3, -2], [-1e4, 1e4], [-0.5, 0.25]]),
    "signs": (2 * HOT - 1, [[0, 2], [1e4, -1e4], [1e4, -1e4], [3, -2], [-1e4, 1e4], [-0.5, 0.25]]),
    "values": (
        np.array([[0, 0], [0, 1], [1e4, 0], [-1e4, 2], [0.5, 0.25], [3, -3]]),
        [[1e-4, 1], [1e-3, 1e-4], [-1e4, 6e4], [1e4, 0.25], [0, 0], [2.5, 3.5]],
    ),
    "counts": (
        np.array([[0, 1], [2, 3], [0, 0], [1, 0], [5, 1], [1, 1]]),
        [[0, 0], [1e-3, 1e4], [0, 1e-4], [2, 6e4], [3, 1], [0.5, 2]],
    ),
}

# --- oracles: (y, p) -> (value of each row, gradient of their sum) --------------------------------


def clip(p):
    return np.clip(p, EPS, 1 - EPS)


def inside(p, high=1.0):
    return (p >= EPS) & (p <= high)


def elementwise(value, gradient):
    return lambda y, p: (value(y, p).mean(1), gradient(y, p) / p.shape[1])


def log_cosh(y, p):
    x = np.abs(y - p)
    return np.where(
        x < 1, np.log1p(np.sinh(np.minimum(x, 1)) ** 2) / 2, np.logaddexp(x, -x) - np.log(2)
    )


def huber(y, p):
    d = np.abs(y - p)
    return np.where(d <= 1, d**2 / 2, d - 0.5)


def bce_gradient(y, p):
    return np.where(inside(p, 1 - EPS), (1 - y) / (1 - p + EPS) - y / (p + EPS), 0)


def bce_logits(y, z):
    return np.where(y == 1, np.logaddexp(0, -z), np.logaddexp(0, z))


def cce(y, p):
    clipped = np.clip(p, EPS, 1)
    return -(y * np.log(clipped)).sum(1), np.where(inside(p), -y / clipped, 0)


def cce_logits(y, z):
    log_p = log_softmax(z, axis=1)
    return -np.where(y == 0, 0, y * log_p).sum(1), softmax(z, axis=1) - y


def kl(y, p):
    y, clipped = np.clip(y, EPS, 1), np.clip(p, EPS, 1)
    return (y * np.log(y / clipped)).sum(1), np.where(inside(p), -y / clipped, 0)


def categorical_hinge(y, p):
    negative = ((1 - y) * p).max(1)
    value = 1 + negative - (y * p).sum(1)
    # The masked zeros take part in the maximum.
    gradient = (1 - y) * ((1 - y) * p == negative[:, None]) - y
    return np.maximum(value, 0), np.where(value[:, None] > 0, gradient, 0)


def cosine(y, p):
    norms = np.linalg.norm(y, axis=1) * np.linalg.norm(p, axis=1)
    dot, norm = (y * p).sum(1), np.maximum(norms, 1e-6)
    pull = np.where(norms > 1e-6, dot / np.maximum((p**2).sum(1), 1e-300), 0)
    return dot / norm, (y - pull[:, None] * p) / norm[:, None]


ORACLES = {
    "mean_squared_error": (
        "values",
        elementwise(lambda y, p: (y - p) ** 2, lambda y, p: 2 * (p - y)),
    ),
    "mean_absolute_error": (
        "values",
        elementwise(lambda y, p: np.abs(y - p), lambda y, p: np.sign(p - y)),
    ),
    "huber": ("values", elementwise(huber, lambda y, p: np.clip(p - y, -1, 1))),
    "log_cosh": ("values", elementwise(log_cosh, lambda y, p: np.tanh(p - y))),
    "cosine_similarity": ("values", cosine),
    "hinge": (
        "signs",
        elementwise(lambda y, p: np.maximum(1 - y * p, 0), lambda y, p: np.where(y * p < 1, -y, 0)),
    ),
    "soft_margin": (
        "signs",
        elementwise(lambda y, p: np.logaddexp(0, -y * p), lambda y, p: -y * expit(-y * p)),
    ),
    "poisson": (
        "counts",
        elementwise(lambda y, p: p - y * np.log(p + EPS), lambda y, p: 1 - y / (p + EPS)),
    ),
    "binary_cross_entropy": (
        "probabilities",
        elementwise(
            lambda y, p: -y * np.log(clip(p) + EPS) - (1 - y) * np.log(clip(1 - p) + EPS),
            bce_gradient,
        ),
    ),
    "categorical_cross_entropy": ("probabilities", cce),
    "kl_divergence": ("probabilities", kl),
    "categorical_hinge": ("scores", categorical_hinge),
    "binary_cross_entropy from_logits": (
        "logits",
        elementwise(bce_logits, lambda y, z: expit(z) - y),
    ),
    "categorical_cross_entropy from_logits": ("logits", cce_logits),
    "categorical_cross_entropy sparse": ("probabilities", cce),
    "categorical_cross_entropy sparse from_logits": ("logits", cce_logits),
}


def function_of(title):
    name, *flags = title.split()
    return functools.partial(getattr(losses, name), **dict.fromkeys(flags, True))


def inputs_of(title, dtype, target_dtype=None):
    """Targets and predictions as arrays, and both as float64 after rounding."""
    kind, _ = ORACLES[title]
    y, p = DATA[kind]
    p = jnp.asarray(p, dtype)
    if "sparse" in title:
        return jnp.asarray(np.argmax(y, 1), jnp.int32), p, y, np.asarray(p, np.float64)
    y = jnp.asarray(y, target_dtype or ("float32" if dtype != "float64" else dtype))
    return y, p, np.asarray(y, np.float64), np.asarray(p, np.float64)


def together(titles):
    """One compiled function of all losses: values, and gradients of their sums."""

    def run(targets, predictions):
        out = {}
        for title in titles:
            fn = functools.partial(function_of(title), targets[title])
            values, pull = jax.vjp(fn, predictions[title])
            out[title] = values, *pull(jnp.ones_like(values))
        return out

    return jax.jit(run)


def check(title, result, y, p, dtype):
    value, gradient = result
    assert value.dtype == ("float64" if dtype == "float64" else "float32"), title
    assert gradient.dtype == dtype, title
    rtol = {"float64": 1e-9, "float32": 3e-6, "bfloat16": 3e-6, "float16": 3e-6}[dtype]
    with np.errstate(all="ignore"):
        expected, expected_gradient = ORACLES[title][1](y, p)
        rounded = np.asarray(jnp.asarray(expected_gradient, dtype), np.float64)
    np.testing.assert_allclose(value, expected, rtol=rtol, atol=rtol, err_msg=title)
    grtol = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}[dtype]
    np.testing.assert_allclose(
        np.asarray(gradient, np.float64), rounded, rtol=grtol, atol=grtol / 10, err_msg=title
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype):
    with jax.enable_x64(dtype == "float64"):
        made = {title: inputs_of(title, dtype) for title in ORACLES}
        results = together(ORACLES)(
            {title: one[0] for title, one in made.items()},
            {title: one[1] for title, one in made.items()},
        )
        for title, (_, _, y, p) in made.items():
            check(title, results[title], y, p, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["int32", "bool"])
def test_integer_and_bool_targets_are_the_same_numbers(target):
    titles = [t for t, (kind, _) in ORACLES.items() if kind in ("probabilities", "logits")]
    titles = [t for t in titles if "sparse" not in t]
    as_float = {t: inputs_of(t, "float32") for t in titles}
    as_other = {t: inputs_of(t, "float32", target) for t in titles}
    run = together(titles)
    predictions = {t: one[1] for t, one in as_float.items()}
    same = [run({t: one[0] for t, one in m.items()}, predictions) for m in (as_float, as_other)]
    jax.tree.map(np.testing.assert_array_equal, *same)


# --- weights --------------------------------------------------------------------------------------

WEIGHTS = {
    "bool": np.array([True, True, False, True, False, True]),
    "int32": np.array([1, 3, 0, 2, 0, 1]),
    "float32": np.array([0.5, 2.0, 0.0, 1.0, 0.0, 0.25]),
    "float16": np.array([0.5, 2.0, 0.0, 1.0, 0.0, 0.25]),
    "zeros": np.zeros(6),
}


def averages(titles, weight):
    """Weighted averages and their gradients, of all losses in one program."""

    def run(targets, predictions):
        return {
            t: jax.value_and_grad(
                lambda p, t=t: losses.average(
                    losses.get(function_of(t)), targets[t], p, weight, len(weight)
                )
            )(predictions[t])
            for t in titles
        }

    return jax.jit(run)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("float32", "float16")]
    + [
        pytest.param(kind, dtype, marks=pytest.mark.slow)
        for kind in WEIGHTS
        for dtype in ("float16", "bfloat16", "float32", "float64")
        if (kind, dtype) != ("float32", "float16")
    ],
)
def test_an_example_of_weight_0_is_not_there(kind, dtype):
    """Its target and prediction may be NaN, infinite or no class: no bit of the rest changes."""
    weight = WEIGHTS[kind].astype("float32" if kind == "zeros" else kind)
    absent = weight.astype(bool) == 0
    with jax.enable_x64(dtype == "float64"):
        clean, dirty, truth = {}, {}, {}
        for title in ORACLES:
            y, p, y64, p64 = inputs_of(title, dtype)
            garbage = {"f": NAN, "i": -1}[y.dtype.kind]
            for row in np.flatnonzero(absent):
                y = y.at[row].set(garbage)
                p = p.at[row].set(NAN if row % 2 else INF)
            clean[title], dirty[title] = inputs_of(title, dtype)[:2], (y, p)
            truth[title] = y64, p64
        run = averages(ORACLES, weight)
        of_clean, of_dirty = (
            run({t: m[t][0] for t in m}, {t: m[t][1] for t in m}) for m in (clean, dirty)
        )
        for title in ORACLES:
            jax.tree.map(np.testing.assert_array_equal, of_clean[title], of_dirty[title])
            value, gradient = of_dirty[title]
            assert not np.any(np.asarray(gradient)[absent]), title
            with np.errstate(all="ignore"):
                rows, _ = ORACLES[title][1](*truth[title])
            expected = np.average(rows[~absent], weights=weight[~absent]) if weight.any() else 0
            rtol = 1e-9 if dtype == "float64" else 1e-5
            np.testing.assert_allclose(value, expected, rtol=rtol, atol=rtol, err_msg=title)


def test_weight_0_of_an_infinite_loss_by_hand():
    def log(y_true, y_pred):
        return -y_true * jnp.log(y_pred)

    y, p, weight = jnp.ones(2), jnp.array([0.5, 0.0]), jnp.array([1.0, 0.0])
    value, gradient = jax.value_and_grad(
        lambda p: losses.average(losses.get(log), y, p, weight, 2)
    )(p)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(gradient, [-2, 0])
    assert np.isinf(losses.average(losses.get(log), y, p, jnp.array([1.0, 0.5]), 2))


def test_weight_0_in_a_list_of_losses():
    loss = losses.get([("mean_squared_error", 2.0), (lambda t, p: jnp.full(2, jnp.inf), 0.0)])
    y, p = (jnp.zeros(2), jnp.zeros(2)), (jnp.ones(2), jnp.ones(2))
    assert float(losses.average(loss, y, p, None, 2)) == 2.0
    for wrong in (NAN, INF, "1", None):
        with pytest.raises(errors.ArgumentTypeError, match="finite number"):
            losses.get([("mean_squared_error", wrong)])


# --- precision ------------------------------------------------------------------------------------


def test_targets_are_not_rounded_to_the_predictions():
    y, p = jnp.array([1.001, 3.0]), jnp.array([1.0, 3.0], jnp.bfloat16)
    own = losses.get(lambda y_true, y_pred: jnp.square(y_true - y_pred))

    @jax.jit
    def run():
        named = [losses.get(n).fn(y, p) for n in ("mean_squared_error", "squared_error")]
        return named, losses.average(own, y, p, None, 2)

    named, averaged = run()
    expected = (np.float64(np.float32(1.001)) - 1) ** 2
    for value in named:
        np.testing.assert_allclose(value, [expected, 0], rtol=1e-5)
        assert value.dtype == jnp.float32
    np.testing.assert_allclose(averaged, expected / 2, rtol=1e-5)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        y, p = jnp.array([1 + 1e-12]), jnp.ones(1, jnp.float32)
        value = losses.mean_absolute_error(y, p)
        assert value.dtype == jnp.float64 and float(value[0]) > 0
        weight = jnp.array([1 / 3, 1.0])
        averaged = losses.reduce(jnp.array([1.0, 2.0], jnp.float32), weight, 2)
        np.testing.assert_allclose(averaged, (1 / 3 + 2) / (4 / 3), rtol=1e-15)


def test_a_bfloat16_loss_of_the_user_is_averaged_in_float32():
    values = jnp.full((1, 1000), 1.0, jnp.bfloat16).at[0, 0].set(3)
    np.testing.assert_allclose(losses.reduce(values, None, 1), 1.002, rtol=1e-6)


def test_huge_and_tiny_vectors_have_an_angle():
    y = jnp.array([[3e20, 4e20], [0, 0], [3e30, 0], [1, 1]])
    p = jnp.array([[3e20, 4e20], [1, 2], [1e-30, 0], [0, 0]])
    values, pull = jax.vjp(functools.partial(losses.cosine_similarity, y), p)
    np.testing.assert_allclose(values, [1, 0, 1, 0], rtol=1e-6)
    assert np.all(np.isfinite(*pull(jnp.ones(4))))


def test_complex_predictions_are_an_error():
    for name in ("mean_squared_error", "l2_loss"):
        with pytest.raises(errors.ArgumentTypeError, match="real"):
            losses.get(name).fn(jnp.zeros(2), jnp.zeros(2, jnp.complex64))


# --- labels ---------------------------------------------------------------------------------------

INTEGER = {
    "softmax_cross_entropy_with_integer_labels": optax.softmax_cross_entropy_with_integer_labels,
    "multiclass_hinge_loss": optax.losses.multiclass_hinge_loss,
    "multiclass_perceptron_loss": optax.losses.multiclass_perceptron_loss,
    "multiclass_sparsemax_loss": optax.losses.multiclass_sparsemax_loss,
}


def test_a_label_that_is_no_class_is_nan():
    sparse = functools.partial(losses.categorical_cross_entropy, sparse=True, from_logits=True)
    named = {name: losses.get(name).fn for name in INTEGER}
    given = {f"function {name}": losses.get(fn).fn for name, fn in INTEGER.items()}
    logits = jnp.array([[0.5, 2.0, -1.0]] * 5)

    @jax.jit
    def run(labels):
        out = {}
        for name, fn in {**named, **given, "sparse": sparse}.items():
            values, pull = jax.vjp(functools.partial(fn, labels), logits)
            out[name] = values, *pull(jnp.ones(5))
        return out

    dirty, clean = run(jnp.array([0, -1, 2, 3, 1])), run(jnp.array([0, 0, 2, 0, 1]))
    for name, (values, gradient) in dirty.items():
        expected = [False, True, False, True, False]
        assert np.isnan(values).tolist() == expected, name
        assert np.isnan(gradient).any(1).tolist() == expected, name
        np.testing.assert_array_equal(values[::2], clean[name][0][::2])


def test_labels_of_any_integer_dtype():
    loss = losses.get("softmax_cross_entropy_with_integer_labels")
    logits = jnp.linspace(-1, 1, 600).reshape(2, 300)
    labels = [jnp.array([0, 1], dtype) for dtype in ("int32", "uint8", "int8", "uint32", "bool")]
    first, *others = jax.jit(lambda labels: [loss.fn(one, logits) for one in labels])(labels)
    np.testing.assert_allclose(first, [7.0, 6.0], atol=1)
    for other in others:
        np.testing.assert_array_equal(first, other)
    with pytest.raises(errors.ArgumentTypeError, match="integer class numbers"):
        loss.fn(jnp.array([0.0, 1.0]), logits)


def test_binary_labels_that_are_no_class_are_nan():
    names = ("binary_cross_entropy", "sigmoid_binary_cross_entropy", "sparsemax_loss")
    run = jax.jit(lambda y: {n: losses.get(n).fn(y, jnp.full(4, 0.25)) for n in names})
    for name, values in run(jnp.array([0, 1, -1, 2])).items():
        assert np.isnan(values).tolist() == [False, False, True, True], name
    soft = run(jnp.array([0.1, 0.9, -0.01, 1.01]))
    assert all(np.all(np.isfinite(soft[name])) for name in names[:2])


def test_ctc_labels_and_lengths():
    log_p = jnp.log(jnp.full((5, 4, 3), 1 / 3))
    labels = jnp.array([[1, 2], [1, -1], [-1, 2], [1, 3], [1, 2]])
    lengths = jnp.array([2, 1, 1, 2, 3])
    values = jax.jit(losses.connectionist_temporal_classification)((lengths, labels), log_p)
    assert np.isnan(values).tolist() == [False, False, True, True, True]


# --- Optax's losses -------------------------------------------------------------------------------

OPTAX = sorted(set(losses.names()) - set(losses.__all__) - set(INTEGER) - {"ntxent"})


@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_optax_by_name_is_optax_in_float32(dtype):
    rng = np.random.default_rng(0)
    y = np.float32(rng.dirichlet(np.ones(3), 4))
    p = jnp.asarray(rng.normal(size=(4, 3)), dtype)

    def both(y, p):
        out = {}
        for name in OPTAX:
            direct = getattr(optax.losses, name)(jnp.float32(p), y)
            out[name] = losses.get(name).fn(y, p), direct
        return out

    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
        warnings.simplefilter("ignore")  # Optax deprecates some of its own.
        for name, (mine, direct) in jax.jit(both)(y, p).items():
            if name == "sparsemax_loss":
                assert np.isnan(mine).all()  # Soft labels are not classes.
                continue
            if name == "ranking_softmax_loss":
                mine = jnp.mean(mine)
            assert mine.dtype == jnp.float32, name
            np.testing.assert_allclose(mine, direct, rtol=1e-6, err_msg=name)
