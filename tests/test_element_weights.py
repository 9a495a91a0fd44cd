"""Weights with more axes than the batch: each element that has a weight counts as one example."""

import dataclasses

import clu.metrics
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxloop as jl
from jaxloop import errors, losses, metrics
from jaxloop.metrics.binding import bind
from jaxloop.metrics.declare import declare, declare_batch_mean

TIME, CLASSES = 3, 4


def batch(num, kind, seed=0):
    """Labels and scores of tokens. What has weight 0 is NaN, and is no class."""
    rng = np.random.default_rng(seed)
    weight = rng.integers(0, 3, (num, TIME)).astype(kind)
    y_true = np.where(weight == 0, -1, rng.integers(0, CLASSES, (num, TIME))).astype(np.int32)
    scores = rng.standard_normal((num, TIME, CLASSES)).astype(np.float32)
    scores[weight == 0] = np.nan
    return {"y_true": y_true, "y_pred": scores, "sample_weight": weight}


def flat(values):
    return {name: value.reshape(-1, *value.shape[2:]) for name, value in values.items()}


def evaluate(batches, *specs, prepare=lambda values: values):
    def step(values, state):
        return jl.emit(state, **prepare(values))

    loop = jl.loop(step)
    for spec in specs:
        loop = loop.replace(metrics=(*loop.metrics, spec))
    return loop.run(batches).history[0]


def entropy(y_true, y_pred):
    return optax.softmax_cross_entropy_with_integer_labels(y_pred, jnp.maximum(y_true, 0))


def binary(named):
    return [named["y_true"] == 1, named["y_pred"][..., 0]]


SPECS = {
    "by name": declare("accuracy"),
    "of a loss": declare(optax.losses.softmax_cross_entropy_with_integer_labels, "loss"),
    "a Metric": declare(metrics.mean(entropy, name="mean")),
    "a function": declare(entropy),
    "a function of a transform": declare(
        lambda y, p: jnp.abs(p), "p", None, lambda named: [*binary(named)]
    ),
    "per example": declare(entropy, per="example"),
    "a sum": declare(entropy, "sum", "running_sum"),
    "a maximum": declare(entropy, "max", "running_max"),
    "the last": declare(entropy, "last", "last"),
    "a name, observed": declare("accuracy", "lowest", "running_min"),
    "a count": declare("true_positives", "count", None, binary),
    "a ratio of counts": declare("precision", "precision", None, binary),
    "a CLU class": declare(clu.metrics.Accuracy, "clu"),
    "a CLU class of fields": declare(clu.metrics.Accuracy, "clu", None, ["y_true", "y_pred"]),
}


@pytest.mark.parametrize(
    "kind", ["bool", *(pytest.param(one, marks=pytest.mark.slow) for one in ("int32", "float32"))]
)
def test_a_metric_of_elements_is_that_of_as_many_examples(kind):
    """The last batch is smaller. The results are equal to the last bit."""
    batches = [batch(5, kind), batch(2, kind, seed=1)]
    specs = [
        dataclasses.replace(spec, name=name)
        for name, spec in SPECS.items()
        # clu takes a mask and no weights.
        if kind == "bool" or not isinstance(spec.metric, type)
    ]
    got = evaluate(batches, *specs)
    expected = evaluate(batches, *specs, prepare=flat)
    assert len(got) == len(specs) and not any(np.isnan(value) for value in got.values())
    assert got == expected


@pytest.mark.slow
def test_where_may_have_more_axes_than_the_weights_or_fewer():
    values = batch(4, "float32")
    y_true, weight = values["y_true"], values["sample_weight"]
    rows = np.array([1.0, 2.0, 0.0, 1.0], np.float32)

    def value(weight, where, name="accuracy"):
        outputs = {**values, "sample_weight": weight}
        if weight is None:
            del outputs["sample_weight"]
        return evaluate([outputs], declare(name, where=where))["accuracy"]

    correct = np.nan_to_num(values["y_pred"]).argmax(-1) == y_true
    present = y_true >= 0
    by_token, by_row = weight * present, rows[:, None] * present
    assert value(None, lambda named: named["y_true"] >= 0) == pytest.approx(correct[present].mean())
    for got, expected in (
        (value(rows, lambda named: named["y_true"] >= 0), by_row),
        (
            value(weight, lambda named: jnp.array([True, True, False, True])),
            by_token * [[1], [1], [0], [1]],
        ),
        (value(weight, lambda named: named["y_true"] == 2), by_token * (y_true == 2)),
    ):
        assert got == pytest.approx(np.average(correct, weights=expected))
    with pytest.raises(errors.ShapeError, match=r"where of metric 'accuracy'.*\(4, 3\).*\(3,\)"):
        value(weight, lambda named: jnp.ones(3, jnp.bool_))
    with pytest.raises(errors.ShapeError, match=r"where of metric 'accuracy'.*\(4,\).*\(\)"):
        value(rows, lambda named: jnp.bool_(True))


def test_one_value_of_a_batch_weighs_the_sum_of_all_weights():
    batches = [batch(4, "int32"), batch(2, "int32", seed=1)]
    totals = [b["sample_weight"].sum() for b in batches]
    shapes = []

    def size(y_pred):
        shapes.append(y_pred.shape)
        return jnp.float32(y_pred.shape[0])

    spec = declare(size, per="batch", transform_or_fields="y_pred")
    assert evaluate(batches, spec)["size"] == np.float32(np.average([4, 2], weights=totals))
    assert set(shapes) == {(4, TIME, CLASSES), (2, TIME, CLASSES)}

    def loss(values):
        return {**values, "loss": jnp.float32(len(values["y_true"]))}

    spec = declare_batch_mean("loss", "loss")
    got = evaluate(batches, spec, prepare=loss)["loss"]
    assert got == np.float32(np.average([4, 2], weights=totals))


@pytest.mark.parametrize("x64", [False, True])
def test_the_mean_of_a_batch_counts_for_the_reported_number_of_examples(x64):
    with jax.enable_x64(x64):
        batches = [np.array([1.0, 5], np.float32), np.array([2.0, 1], np.float32)]

        def run(**outputs):
            def step(values, state):
                return jl.emit(state, loss=values[0], **{k: f(values) for k, f in outputs.items()})

            loop = jl.loop(step).replace(metrics=(declare_batch_mean("loss", "loss"),))
            return loop.run(batches).history[0]["loss"]

        assert run() == 1.5
        expected = np.float32(7) / np.float32(6)
        assert run(num_examples=lambda v: v[1].astype(jnp.int32)) == pytest.approx(expected)
        assert run(num_examples=lambda v: jnp.int32(7)) == 1.5
        with pytest.raises(errors.ShapeError, match=r"num_examples must be a scalar, got.*\(2,\)"):
            run(num_examples=lambda v: v)
        # Weights count if there are some.
        weights = run(
            num_examples=lambda v: jnp.int32(7),
            sample_weight=lambda v: jnp.stack([v[1], v[1]]) * 0.5,
        )
        assert weights == pytest.approx(expected)


@pytest.mark.slow
def test_zero_total_weight_is_no_value():
    empty = {**batch(4, "float32"), "sample_weight": np.zeros((4, TIME), np.float32)}
    full = batch(4, "float32", seed=1)
    some = [declare("accuracy"), declare(entropy), declare(entropy, "max", "running_max")]
    assert all(np.isnan(value) for value in evaluate([empty], *some).values())
    assert evaluate([empty, full, empty], *some) == evaluate([full], *some)


WRONG = {
    "a trailing axis": ((4, TIME, 1), r"\(4, 3\).*got \(4, 3, 1\)"),
    "a short axis": ((4, 2), r"\(4, 3\).*got \(4, 2\)"),
    "an axis of one": ((4, 1), r"\(4, 3\).*got \(4, 1\)"),
    "transposed": ((TIME, 4), r"\(4, 3\).*got \(3, 4\)"),
    "too few": ((3,), r"\(4,\).*got \(3,\)"),
    "no axis": ((), r"\(4,\).*got \(\)"),
}


@pytest.mark.parametrize("shape, message", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("metric", ["accuracy", entropy, metrics.mean(entropy, name="m")])
def test_weights_of_another_shape_are_an_error(metric, shape, message):
    values = {**batch(4, "float32"), "sample_weight": np.ones(shape, np.float32)}
    if metric is entropy and len(shape) == 1:
        message = "one value per example"
    with pytest.raises(errors.ShapeError, match=message):
        bind([declare(metric)], values, {}, None)
    if len(shape) > 1:
        with pytest.raises(errors.ShapeError, match=message):
            losses.average(
                losses.get(entropy), values["y_true"], values["y_pred"], values["sample_weight"], 4
            )


def test_weights_of_a_column_are_an_error_for_a_vector():
    values = {"y_true": np.zeros(4), "y_pred": np.ones(4), "sample_weight": np.ones((4, 1))}
    for metric in ("mean_squared_error", lambda t, p: t - p, clu.metrics.Accuracy):
        with pytest.raises(errors.ShapeError, match=r"\(4,\).*got \(4, 1\)"):
            bind([declare(metric, "m")], values, {}, None)


# --- losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bool", "int32", "float32"])
@pytest.mark.parametrize(
    "loss", [optax.losses.softmax_cross_entropy_with_integer_labels, entropy], ids=["optax", "own"]
)
def test_a_loss_of_elements_is_that_of_as_many_examples(loss, kind):
    values = batch(4, kind)
    found = losses.get(loss)

    def value(y_pred, values):
        return losses.average(found, values["y_true"], y_pred, values["sample_weight"], 4)

    def value_of_flat(y_pred, values):
        values = flat({**values, "y_pred": y_pred})
        return losses.average(
            found, values["y_true"], values["y_pred"], values["sample_weight"], 4 * TIME
        )

    got, grad = jax.value_and_grad(value)(values["y_pred"], values)
    expected, expected_grad = jax.value_and_grad(value_of_flat)(values["y_pred"], values)
    assert got == expected and np.isfinite(got)
    assert np.array_equal(grad, expected_grad) and np.isfinite(grad).all()
    none = {**values, "sample_weight": np.zeros((4, TIME), kind)}
    got, grad = jax.value_and_grad(value)(values["y_pred"], none)
    assert got == 0 and not grad.any()


def test_a_reduction_of_elements():
    per_token = np.arange(12.0, dtype=np.float32).reshape(4, 3)
    weight = np.ones((4, 3), np.float32)
    weight[1] = 0
    per_token[1] = np.nan
    expected = np.average(np.nan_to_num(per_token), weights=weight)
    assert losses.reduce(per_token, weight, 4) == pytest.approx(expected)
    assert losses.reduce(np.stack([per_token] * 2, -1), weight, 4) == pytest.approx(expected)
    for value, shape in ((np.ones(4), r"\(4,\)"), (np.float32(1), r"\(\)")):
        with pytest.raises(errors.ShapeError, match=rf"{shape}, got \(4, 3\)"):
            losses.reduce(value, weight, 4)


def test_several_outputs_whose_targets_have_the_axes_of_the_weights():
    rng = np.random.default_rng(0)
    y_true = {"a": rng.random((4, 3)), "b": rng.random((4, 3, 2))}
    y_pred = {"a": rng.random((4, 3)), "b": rng.random((4, 3, 2))}
    weight = rng.integers(0, 2, (4, 3)).astype(bool)
    loss = losses.get([("mean_squared_error", 1.0), ("mean_absolute_error", 2.0)])
    got = losses.average(loss, y_true, y_pred, weight, 4)
    a = np.mean((y_true["a"] - y_pred["a"])[weight] ** 2)
    b = np.mean(np.abs(y_true["b"] - y_pred["b"])[weight])
    assert got == pytest.approx(a + 2 * b)
    values = {"y_true": y_true, "y_pred": y_pred, "sample_weight": weight}
    found = evaluate([values], declare("mean_squared_error"))
    assert found["mean_squared_error/a"] == pytest.approx(a)
    with pytest.raises(errors.ShapeError, match=r"the target \(4,\), got \(4, 3\)"):
        losses.average(loss, {**y_true, "b": np.ones(4)}, y_pred, weight, 4)


def test_a_trainer_learns_from_the_tokens_that_count():
    """The same as training on the tokens alone, one example each."""
    rng = np.random.default_rng(0)
    x = rng.random((8, TIME, 2)).astype(np.float32)
    y = (x @ np.array([1.0, 2.0], np.float32))[..., None]
    weight = rng.random((8, TIME)) < 0.7
    y[~weight] = np.nan
    model = (lambda key, x: jnp.zeros((2, 1)), lambda w, x: x @ w)
    loop = jl.trainer(model, "mean_squared_error", optax.sgd(0.3), log=0)
    loop = loop.metric("mean_absolute_error")
    state = loop.run([(x, y, weight)], epochs=5, output_transform=lambda s: s)
    alone = loop.run([(x[weight], y[weight])], epochs=5, output_transform=lambda s: s)
    for name in ("loss", "mean_absolute_error"):
        assert state.history[4][name] == pytest.approx(alone.history[4][name], rel=1e-5)
    got, expected = (s.step_state["model_state"] for s in (state, alone))
    np.testing.assert_allclose(jax.tree.leaves(got)[0], jax.tree.leaves(expected)[0], rtol=1e-5)
