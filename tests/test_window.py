"""`jl.window(n)`: the mean over the last n iterations of an epoch."""

from fractions import Fraction

import clu.metrics
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxloop as jl
from jaxloop import errors, metrics
from jaxloop.metrics.binding import bind
from jaxloop.metrics.declare import declare, declare_batch_mean
from jaxloop.metrics.exact_int import host_rows


def batch(rng, num, kind):
    y_true = rng.integers(0, 2, num).astype(np.int32)
    scores = rng.standard_normal((num, 2)).astype(np.float32)
    values = {"y_true": y_true, "y_pred": scores, "x": scores[:, 0], "loss": scores.sum() / 2}
    values["int"] = rng.integers(-(2**31), 2**31, num).astype(np.int32)
    if kind != "none":
        # Some batches have no weight at all. They are iterations too.
        empty = rng.random() < 0.2
        weight = np.zeros(num) if empty else rng.integers(0, 3, num)
        values["sample_weight"] = weight.astype(kind)
    return values


def batches(kind, seed=0, count=9):
    rng = np.random.default_rng(seed)
    return [batch(rng, 4 if i < count - 1 else 3, kind) for i in range(count)]


def rows(loop, data, **options):
    """The metrics after each iteration."""
    seen = []
    loop = loop.observe("iteration_completed", lambda s: seen.append(dict(s.metrics)))
    loop.run(data, **options)
    return seen


def mean(values, weights):
    total = sum(weights)
    exact = sum(
        Fraction(float(v)) * Fraction(float(w)) for v, w in zip(values, weights, strict=True)
    )
    return float(exact / Fraction(float(total))) if total else float("nan")


def weights_of(one):
    return one.get("sample_weight", np.ones(len(one["x"]))).astype(np.float64)


def per_example(window, key):
    values = np.concatenate([one[key] for one in window])
    return mean(values, np.concatenate([weights_of(one) for one in window]))


def per_batch(window, value):
    return mean([value(one) for one in window], [weights_of(one).sum() for one in window])


def accuracy(one):
    if not weights_of(one).sum():
        return 0.0
    correct = one["y_pred"].argmax(1) == one["y_true"]
    return np.float32(np.average(correct, weights=weights_of(one)))


def emitting(one, state):
    return jl.emit(state, **one)


def loop_of(how):
    loop = jl.loop(emitting).metric("x", accumulate=how).metric("int", accumulate=how)
    loop = loop.metric("accuracy", accumulate=how).metric(jnp.sum, "n", how, ["x"], per="batch")
    return loop.replace(metrics=(*loop.metrics, declare_batch_mean("loss", "loss")))


@pytest.mark.parametrize(
    "n, kind",
    [
        (1, "none"),
        (3, "float32"),
        pytest.param(3, "bool", marks=pytest.mark.slow),
        pytest.param(20, "int32", marks=pytest.mark.slow),
    ],
)
def test_each_kind_of_metric_is_exact_after_each_iteration(n, kind):
    data = batches(kind)
    loop = loop_of(jl.window(n))
    specs = [spec if spec.name != "loss" else None for spec in loop.metrics]
    mean_of_batch = declare_batch_mean("loss", "loss")
    specs[-1] = type(mean_of_batch)(**{**vars(mean_of_batch), "accumulate": jl.window(n)})
    found = rows(loop.replace(metrics=tuple(specs)), data, epochs=2)
    assert len(found) == 2 * len(data)
    for i, got in enumerate(found):
        i %= len(data)  # the second epoch begins with an empty window
        last = data[max(0, i + 1 - n) : i + 1]
        expected = {
            "x": per_example(last, "x"),
            "int": per_example(last, "int"),
            "accuracy": per_batch(last, accuracy),
            "n": per_batch(last, lambda one: one["x"].sum()),
            "loss": per_batch(last, lambda one: one["loss"]),
        }
        for name, value in expected.items():
            exact = name == "int" and kind != "float32"
            close = {"rel": 0, "abs": 0} if exact else {"rel": 2e-6, "abs": 1e-6}
            assert got[name] == pytest.approx(value, nan_ok=True, **close), (i, name)


@pytest.mark.slow
def test_a_long_window_is_the_running_average():
    data = batches("float32")
    longest = loop_of(jl.window(len(data))).run(data).history[0]
    assert longest == loop_of("running_average").run(data).history[0]


def test_what_leaves_the_window_leaves_no_trace():
    """The sums are not updated by subtraction, so neither NaN nor a huge value stays."""
    for huge in (np.nan, np.inf, 1e38):
        data = [np.float32(value) for value in (huge, 1, 1e-3, 2e-3)]
        loop = jl.loop(lambda x, s: jl.emit(s, x=x)).metric("x", accumulate=jl.window(2))
        assert loop.run(data).history[0]["x"] == np.float32(1.5e-3)


@pytest.mark.slow
def test_a_class_a_metric_and_a_tree():
    data = batches("bool")
    how = jl.window(2)
    loop = jl.loop(emitting).metric(clu.metrics.Accuracy, "clu", how)
    loop = loop.metric(metrics.accuracy(), "object", how).metric("accuracy", "name", how)
    loop = loop.metric("true_positives", "count", how, lambda v: [v["y_true"], v["y_pred"][:, 1]])
    loop = loop.metric(lambda x: {"a": x, "b": [x * 2]}, "tree", how, ["x"])
    for i, found in enumerate(rows(loop, data)):
        last = data[max(0, i - 1) : i + 1]
        assert found["clu"] == pytest.approx(per_batch(last, accuracy), nan_ok=True)
        assert np.array_equal(found["object"], found["name"], equal_nan=True)
        x = per_example(last, "x")
        assert found["tree"]["a"] == pytest.approx(x, nan_ok=True)
        assert found["tree"]["b"][0] == pytest.approx(2 * x, nan_ok=True)
        positives = [
            ((one["y_pred"][:, 1] > 0.5) & (one["y_true"] == 1) & one["sample_weight"]).sum()
            for one in last
        ]
        counts = dict(zip(map(id, last), positives, strict=True))
        assert found["count"] == pytest.approx(
            per_batch(last, lambda one, counts=counts: counts[id(one)]), nan_ok=True
        )


@pytest.mark.parametrize("x64", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_laws(x64):
    """Merging keeps the last of both, is associative, and has a neutral element."""
    with jax.enable_x64(x64):
        data = batches("float32")
        specs = [declare("x", None, jl.window(4)), declare("int", None, jl.window(4))]
        bound = bind(specs, data[0], {}, None)

        def accumulated(some):
            accs = bound.init()
            for one in some:
                accs = bound.update(accs, one, {}, None)
            return accs

        def same(a, b):
            assert all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))

        whole = accumulated(data)
        for i in range(len(data) + 1):
            a, b = accumulated(data[:i]), accumulated(data[i:])
            same(bound.merge(a, b), whole)
            same(bound.merge(bound.init(), a), a)
            same(bound.merge(a, bound.init()), a)
        a, b, c = (accumulated(data[i : i + 3]) for i in (0, 3, 6))
        same(bound.merge(bound.merge(a, b), c), bound.merge(a, bound.merge(b, c)))
        values = host_rows(jax.tree.map(lambda x: np.asarray(x)[None], bound.compute(whole)))
        assert values["x"][0].dtype == (np.float64 if x64 else np.float32)
        assert values["x"][0] == pytest.approx(per_example(data[-4:], "x"))


@pytest.mark.slow
def test_a_resumed_epoch_has_the_same_bits():
    data = batches("float32")
    loop = loop_of(jl.window(3))
    expected, states = rows(loop, data), []
    loop.handle("iteration_completed", lambda s: states.append(s)).run(data)
    for i in (0, 4, 7):
        restored = jl.deserialize_state(jl.serialize_state(states[i]), like=states[i])
        got = rows(loop.from_state(restored), data)
        assert repr(got) == repr(expected[i + 1 :])


@pytest.mark.slow
def test_before_the_first_update_it_is_nan():
    found = []
    loop = loop_of(jl.window(3)).handle("epoch_started", lambda s: found.append(dict(s.metrics)))
    loop.run(batches("int32"))
    assert len(found[0]) == 5 and all(np.isnan(value) for value in found[0].values())


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "3", None])
def test_mistakes(n):
    with pytest.raises((errors.ArgumentError, errors.ArgumentTypeError), match="window: n must be"):
        jl.window(n)


def test_a_window_is_a_value():
    assert jl.window(3) == jl.window(np.int64(3)) != jl.window(4)
    assert repr(jl.window(3)) == "Window(n=3)"
    with pytest.raises(errors.ArgumentTypeError, match=r"jl\.window\(n\)"):
        jl.loop(emitting).metric("x", accumulate=3)
