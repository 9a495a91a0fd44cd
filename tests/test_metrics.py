"""Metrics: the laws, the numbers of others, exact counts, weights, and errors that teach."""

from __future__ import annotations

import functools
import itertools
import math
import warnings

import clu.metrics
import jax
import jax.numpy as jnp
import metrax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from jaxloop import errors, metrics
from jaxloop.metrics import exact_int, exact_sum
from jaxloop.metrics.binding import bind
from jaxloop.metrics.declare import declare, declare_batch_mean, names

laws = settings(max_examples=4, deadline=None)


@pytest.fixture(autouse=True)
def _strict():
    with (
        warnings.catch_warnings(),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        warnings.simplefilter("error")
        yield


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def data(seed, n, classes=4):
    rng = np.random.default_rng(seed)
    return (
        rng.integers(0, classes, n).astype(np.int32),
        rng.random((n, classes)).astype(np.float32),
        rng.random(n).astype(np.float32),
    )


def binary(seed, n):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 2, n).astype(np.int32), rng.random(n).astype(np.float32)


def feed(metric, parts):
    acc = metric.init()
    for args, weight in parts:
        acc = metric.update(acc, *args, weight=weight)
    return acc


def split(arrays, weight, cuts):
    edges = [0, *sorted(cuts), len(arrays[0])]
    return [
        ([a[i:j] for a in arrays], None if weight is None else weight[i:j])
        for i, j in itertools.pairwise(edges)
        if j > i
    ]


BINARY = [
    metrics.precision(),
    metrics.recall(),
    metrics.specificity(),
    metrics.true_positives(),
    metrics.false_positives(),
    metrics.true_negatives(),
    metrics.false_negatives(),
    metrics.accuracy(),
]
REGRESSION = [
    metrics.mean_absolute_error(),
    metrics.mean_squared_error(),
    metrics.of_loss("huber"),
]


@pytest.mark.parametrize("metric", BINARY + REGRESSION, ids=lambda m: m.name)
@laws
@given(seed=st.integers(0, 99), cuts=st.sampled_from([[16], [1, 20]]), mask=st.booleans())
def test_laws(metric, seed, cuts, mask):
    arrays = binary(seed, 37)
    weight = (np.random.default_rng(seed).random(37) < 0.7) if mask else None
    parts = split(arrays, weight, cuts)
    accs = [feed(metric, [part]) for part in parts]
    a = accs[0]
    assert bits(metric.merge(metric.init(), a)) == bits(a)
    assert bits(metric.merge(a, metric.init())) == bits(a)
    whole = feed(metric, [(arrays, weight)])
    streamed = feed(metric, parts)
    merged = functools.reduce(metric.merge, accs)
    right = functools.reduce(lambda x, y: metric.merge(y, x), reversed(accs))
    values = [np.asarray(metric.compute(x)) for x in (whole, streamed, merged, right)]
    if metric in REGRESSION:
        np.testing.assert_allclose(values, values[0], rtol=3e-7)
    else:
        for value in values:
            assert value.tobytes() == values[0].tobytes()
        assert bits(merged) == bits(right) == bits(streamed) == bits(whole)


@given(seed=st.integers(0, 99), n=st.integers(1, 300), scale=st.integers(-20, 20))
@laws
def test_sums_have_twice_the_precision(seed, n, scale):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(n) * 2.0 ** rng.integers(-10, 10, n) * 2.0**scale).astype(np.float32)
    pair = jax.jit(lambda v: exact_sum.sum_examples(v, None))(jnp.asarray(x))
    exact = math.fsum(x.astype(float))
    got = float(pair.hi) + float(pair.lo)
    assert abs(got - exact) <= 2.0**-34 * float(np.sum(np.abs(x.astype(float))))
    assert np.float32(float(pair.hi) + float(pair.lo)) == pair.hi


def test_a_million_tenths():
    m = metrics.mean(lambda x: x)
    x = jnp.full(100, 0.1, jnp.float32)

    @jax.jit
    def run(acc):
        return jax.lax.fori_loop(0, 20_000, lambda _, acc: m.update(acc, x), acc)

    acc = run(m.init())
    total = float(acc["sum"].hi) + float(acc["sum"].lo)
    assert total == pytest.approx(2_000_000 * float(np.float32(0.1)), rel=1e-11)
    assert m.compute(acc) == np.float32(0.1)


def test_counts_beyond_float32():
    count = metrics.true_positives()
    ones = jnp.ones(1024, jnp.int32)
    start = exact_int.exact_int(jnp.asarray(2**24, jnp.int32), exact_int.count_limbs())
    acc = jax.jit(lambda a: jax.lax.fori_loop(0, 3, lambda _, a: count.update(a, ones, ones), a))(
        start
    )
    acc = count.update(acc, ones[:1], ones[:1])
    assert np.asarray(count.compute(acc)).dtype == np.int64
    assert int(count.compute(acc)) == 2**24 + 3 * 1024 + 1
    pair = exact_sum.pair_of_int(2**31 - 200)
    for _ in range(3):
        pair = exact_sum.add_pairs(pair, exact_sum.pair_of_int(1))
    assert float(pair.hi) + float(pair.lo) == 2**31 - 197
    big = exact_sum.sum_examples(jnp.array([2**24 + 1, 2**30 + 3, -5], jnp.int32), None)
    assert float(big.hi) + float(big.lo) == 2**24 + 1 + 2**30 + 3 - 5


def test_binary_against_sklearn():
    y, p = binary(3, 501)
    w = np.random.default_rng(0).random(501).astype(np.float32)
    hat = (p > 0.5).astype(int)
    for weight in (None, w, (w > 0.4)):
        (tn, fp), (fn, tp) = sk.confusion_matrix(y, hat, sample_weight=weight)
        expected = {
            "true_positives": tp,
            "false_positives": fp,
            "true_negatives": tn,
            "false_negatives": fn,
            "precision": sk.precision_score(y, hat, sample_weight=weight),
            "recall": sk.recall_score(y, hat, sample_weight=weight),
            "sensitivity": sk.recall_score(y, hat, sample_weight=weight),
            "specificity": tn / (tn + fp),
            "accuracy": sk.accuracy_score(y, hat, sample_weight=weight),
        }
        outputs = {"y_true": jnp.asarray(y), "y_pred": jnp.asarray(p)[:, None]}
        if weight is not None:
            outputs["sample_weight"] = jnp.asarray(weight)
        bound = bind(tuple(map(declare, expected)), outputs, {}, None)
        update = jax.jit(lambda outputs, bound=bound: bound.update(bound.init(), outputs, {}, None))
        got = bound.compute(update(outputs))
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-6, err_msg=name)
        is_float = weight is w
        assert got["true_positives"].dtype == (np.float32 if is_float else np.int64)


def test_accuracy_forms():
    y, scores, w = data(5, 64)
    expected = np.average(scores.argmax(1) == y, weights=w)
    m = metrics.accuracy()
    one_hot = np.eye(4, dtype=np.float32)[y]
    for y_true in (y, y[:, None], one_hot, one_hot.astype(np.int8)):
        value = m.compute(m.update(m.init(), jnp.asarray(y_true), scores, weight=jnp.asarray(w)))
        np.testing.assert_allclose(value, expected, rtol=1e-6)
    y2, p2 = binary(1, 40)
    for y_true in (y2, y2[:, None], y2.astype(bool), y2.astype(np.float32)):
        for y_pred in (p2, p2[:, None]):
            value = m.compute(m.update(m.init(), y_true, y_pred))
            np.testing.assert_allclose(value, np.mean((p2 > 0.5) == y2), rtol=1e-6)
    assert float(m.compute(m.update(m.init(), jnp.array([2, 1]), jnp.array([2, 3])))) == 0.5
    with pytest.raises(errors.ShapeError, match="accuracy"):
        m.update(m.init(), jnp.zeros((4, 3)), jnp.zeros((4, 5)))
    with pytest.raises(errors.ShapeError):
        m.update(m.init(), jnp.zeros((4, 3)), jnp.zeros(4))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_top_k(k):
    y, scores, _ = data(8, 200)
    m = metrics.top_k_categorical_accuracy(k=k)
    value = m.compute(m.update(m.init(), jnp.asarray(y), jnp.asarray(scores)))
    expected = sk.top_k_accuracy_score(y, scores, k=k, labels=range(4))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    constant = m.compute(m.update(m.init(), jnp.asarray(y), jnp.zeros((200, 4))))
    np.testing.assert_allclose(constant, np.mean(y < k), rtol=1e-6)
    with pytest.raises(errors.ArgumentError):
        metrics.top_k_categorical_accuracy(k=0)


def test_empty_and_zero_denominators():
    for name in ("precision", "recall", "specificity", "accuracy", "mean_squared_error"):
        m = declare(name) and getattr(metrics, name)()
        assert np.isnan(m.compute(m.init())), name
        masked = m.update(m.init(), jnp.ones(2), jnp.ones(2), weight=jnp.zeros(2, jnp.bool_))
        assert np.isnan(m.compute(masked)), name
    m = metrics.precision()
    assert float(m.compute(m.update(m.init(), jnp.ones(3), jnp.zeros(3)))) == 0.0


def test_infinity_and_nan_are_honest():
    m = metrics.mean(lambda x: x)

    def value(*batches):
        acc = m.init()
        for x in batches:
            acc = m.update(acc, jnp.asarray(x, jnp.float32))
        return float(m.compute(m.merge(acc, m.update(m.init(), jnp.ones(2)))))

    assert value([1.0, np.inf]) == np.inf
    assert value([1.0], [-np.inf], [2.0, 3.0]) == -np.inf
    assert np.isnan(value([np.nan, 1.0]))
    assert np.isnan(value([np.inf, -np.inf]))
    assert value([3e38, 3e38, 1.0]) == np.inf
    assert value([3e38, -3e38]) == 0.5
    masked = m.update(m.init(), jnp.array([np.nan, 2.0, np.inf]), weight=jnp.array([0.0, 2.0, 0.0]))
    assert float(m.compute(masked)) == 2.0


# --- binding -------------------------------------------------------------------------------------


def batches(seed, sizes, weights):
    rng = np.random.default_rng(seed)
    out = []
    for n in sizes:
        y, scores, w = data(int(rng.integers(1 << 30)), n)
        batch = {"y_true": jnp.asarray(y), "y_pred": jnp.asarray(scores)}
        if weights == "mask":
            batch["sample_weight"] = jnp.asarray(w > 0.3)
        elif weights == "int":
            batch["sample_weight"] = jnp.asarray((w * 4).astype(np.int32))
        elif weights == "float":
            batch["sample_weight"] = jnp.asarray(w)
        out.append(batch)
    return out


def per_example(y_true, y_pred):
    return {"top": jnp.max(y_pred, axis=-1), "row": y_pred, "label": y_true}


@pytest.mark.parametrize("weights", [None, "mask", "int", "float"])
def test_ragged_weighted_function(weights):
    parts = batches(0, (16, 16, 5), weights)
    hows = [None, "running_average", "running_sum", "running_min", "running_max", "last"]
    specs = tuple(declare(per_example, str(how), how) for how in hows)
    bound = bind(specs, parts[0], {}, None)
    accs = bound.init()
    spec = [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(accs)]
    step = jax.jit(lambda accs, o: bound.update(accs, o, {}, None))
    for part in parts:
        accs = step(accs, part)
        assert [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(accs)] == spec
    got = bound.compute(accs)

    def gather(parts):
        rows = np.concatenate([np.asarray(p["y_pred"], np.float64) for p in parts])
        label = np.concatenate([np.asarray(p["y_true"]) for p in parts])
        w = np.concatenate(
            [np.asarray(p.get("sample_weight", np.ones(len(p["y_true"]))), float) for p in parts]
        )
        return {"top": rows.max(1), "row": rows, "label": label}, w

    values, w = gather(parts)
    last, last_w = gather(parts[-1:])
    for key, v in values.items():
        some = v[w != 0]
        expected = {
            "None": np.average(v, axis=0, weights=w),
            "running_average": np.average(v, axis=0, weights=w),
            "running_sum": np.sum(v * w.reshape(-1, *[1] * (v.ndim - 1)), axis=0),
            "running_min": some.min(0),
            "running_max": some.max(0),
            "last": np.average(last[key], axis=0, weights=last_w),
        }
        for how, value in expected.items():
            np.testing.assert_allclose(got[how][key], value, rtol=1e-6, err_msg=f"{how} {key}")
    integer = jnp.issubdtype(got["running_sum"]["label"].dtype, jnp.integer)
    assert integer == (weights != "float")
    # Two halves merged say what the stream said.
    a = step(bound.init(), parts[0])
    b = step(step(bound.init(), parts[1]), parts[2])
    for x, y in zip(
        jax.tree.leaves(bound.compute(bound.merge(a, b)), is_leaf=exact_int.is_exact),
        jax.tree.leaves(got, is_leaf=exact_int.is_exact),
        strict=True,
    ):
        np.testing.assert_allclose(x, y, rtol=3e-7)


@pytest.mark.slow
def test_before_the_first_update():
    part = batches(0, (4,), None)[0]
    hows = [None, "running_sum", "running_min", "running_max", "last", lambda a, o, i: a]
    specs = (
        *(declare(per_example, str(i), how) for i, how in enumerate(hows)),
        declare("accuracy"),
        declare("accuracy", "latest", "last"),
        declare("true_positives", transform_or_fields=("y_true", "y_true")),
        declare(clu.metrics.Accuracy, "clu"),
    )
    bound = bind(specs, part, {}, None)
    values = bound.compute(bound.init())
    for leaf in jax.tree.leaves(values, is_leaf=exact_int.is_exact):
        leaf = np.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            assert bool(jnp.all(jnp.isnan(leaf)))
    assert int(values["true_positives"]) == 0
    a = bound.update(bound.init(), part, {}, None)
    bound = bind([spec for spec in specs if spec.name != "5"], part, {}, None)
    a = bound.update(bound.init(), part, {}, None)
    assert bits(bound.merge(bound.init(), a)) == bits(a)
    assert bits(bound.merge(a, bound.init())) == bits(a)


def test_scan_and_fori_loop_are_carries():
    part = batches(0, (8,), "mask")[0]
    bound = bind(
        tuple(map(declare, ("accuracy", "huber_loss", "top_k_categorical_accuracy"))),
        {**part, "y_true": jax.nn.one_hot(part["y_true"], 4)},
        {},
        None,
    )
    part = {**part, "y_true": jax.nn.one_hot(part["y_true"], 4)}
    stack = jax.tree.map(lambda x: jnp.stack([x] * 3), part)
    once = bound.update(bound.init(), part, {}, None)
    scanned, _ = jax.jit(
        lambda s: jax.lax.scan(
            lambda acc, o: (bound.update(acc, o, {}, None), None), bound.init(), s
        )
    )(stack)
    looped = jax.lax.fori_loop(0, 3, lambda _, acc: bound.update(acc, part, {}, None), bound.init())
    for name, value in bound.compute(once).items():
        np.testing.assert_allclose(bound.compute(scanned)[name], value, rtol=1e-6)
        np.testing.assert_allclose(bound.compute(looped)[name], value, rtol=1e-6)


def test_batch_mean():
    declared = declare_batch_mean("loss", "loss")
    rng = np.random.default_rng(0)
    for weighted in (False, True):
        total = norm = 0.0
        bound = None
        for n in (8, 8, 3):
            values, w = rng.random(n), rng.random(n) if weighted else np.ones(n)
            outputs = {
                "loss": jnp.asarray(np.average(values, weights=w), jnp.float32),
                "y_true": (jnp.zeros((n, 2)), jnp.zeros(n)),
            }
            if weighted:
                outputs["sample_weight"] = jnp.asarray(w, jnp.float32)
            if bound is None:
                bound = bind((declared,), outputs, {}, None)
                accs = bound.init()
            accs = bound.update(accs, outputs, {}, None)
            total, norm = total + float(np.sum(values * w)), norm + float(np.sum(w))
        if weighted:
            dead = {**outputs, "loss": jnp.asarray(np.nan, jnp.float32)}
            dead["sample_weight"] = jnp.zeros(3)
            accs = bound.update(accs, dead, {}, None)
        np.testing.assert_allclose(bound.compute(accs)["loss"], total / norm, rtol=1e-6)


def test_scalars():
    def norm(x):
        return jnp.mean(x)

    def run(how, weight=None):
        outputs = [{"x": jnp.full(n, float(n))} for n in (4, 2)]
        if weight is not None:
            outputs = [{**o, "sample_weight": jnp.ones(len(o["x"]))} for o in outputs]
        bound = bind((declare(norm, None, how, "x"),), outputs[0], {}, None)
        accs = bound.init()
        for o in outputs:
            accs = bound.update(accs, o, {}, None)
        return float(bound.compute(accs)["norm"])

    assert run(None) == pytest.approx((16 + 4) / 6)
    assert run("running_sum") == 6.0
    assert run("running_min") == 2.0
    assert run("running_max") == 4.0
    assert run("last") == run("last", weight=True) == 2.0
    for how in (None, "running_sum", "running_min"):
        with pytest.raises(errors.ShapeError, match="one value per example"):
            run(how, weight=True)
    # The counter is zero-based, and the accumulator begins as zeros.
    assert run(lambda acc, obs, i: acc + obs * (i.astype(jnp.float32) + 1.0)) == 4 + 2 * 2


def test_accumulate_of_names_takes_the_value_of_the_batch():
    parts = batches(3, (16, 5), None)
    values = [np.mean(np.asarray(p["y_pred"]).argmax(1) == np.asarray(p["y_true"])) for p in parts]
    hows = {"running_max": max(values), "running_min": min(values), "last": values[-1]}
    hows |= {
        "running_sum": sum(values),
        "running_average": (values[0] * 16 + values[1] * 5) / 21,
    }
    bound = bind(
        tuple(declare("accuracy", how, how) for how in hows)
        + tuple(declare(clu.metrics.Accuracy, "clu_" + how, how) for how in hows),
        parts[0],
        {},
        None,
    )
    accs = bound.init()
    for part in parts:
        accs = bound.update(accs, part, {}, None)
    for how, expected in hows.items():
        np.testing.assert_allclose(bound.compute(accs)[how], expected, rtol=1e-6)
        np.testing.assert_allclose(bound.compute(accs)["clu_" + how], expected, rtol=1e-6)


def test_fields_and_transforms():
    state = {"y_pred": jnp.array([1.0, 0.0]), "w": jnp.ones(3)}
    outputs = {"y_true": jnp.array([1, 1])}
    bound = bind(
        (
            declare("accuracy"),
            declare(lambda w: jnp.sum(w), "w", transform_or_fields=lambda both: [both["w"] * 2.0]),
        ),
        outputs,
        state,
        jnp.zeros((2, 7)),
    )
    values = bound.compute(bound.update(bound.init(), outputs, state, None))
    assert bound.names == ("accuracy", "w")
    assert float(values["accuracy"]) == 0.5
    assert float(values["w"]) == 6.0
    with pytest.raises(errors.UnknownNameError, match="y_tru'.*'y_true'[\\s\\S]*w, y_pred, y_true"):
        bind((declare("accuracy", transform_or_fields=("y_tru", "w")),), outputs, state, None)


def test_clu_and_metrax():
    y, p = binary(0, 21)
    y_float = y.astype(np.float32)
    parts = [(slice(0, 8)), (slice(8, 16)), (slice(16, 21))]

    def outs(s):
        logits = np.stack([1 - p, p], 1)[s]
        return {
            "y_true": jnp.asarray(y[s]),
            "logits": jnp.asarray(logits),
            "y_pred": jnp.asarray(p[s]),
            "loss": jnp.asarray(p[s]),
        }

    bound = bind(
        (
            declare(clu.metrics.Accuracy),
            declare(clu.metrics.Average.from_output("loss"), "average"),
            declare(metrax.MSE, "mse", None, ("float", "y_pred")),
            declare(metrax.Precision, "precision"),
            declare(metrax.Recall, "recall"),
        ),
        {**outs(parts[0]), "float": jnp.asarray(y_float[:8])},
        {},
        None,
    )
    step = jax.jit(lambda accs, o: bound.update(accs, o, {}, None))
    accs = bound.init()
    for s in parts:
        accs = step(accs, {**outs(s), "float": jnp.asarray(y_float[s])})
    got = bound.compute(accs)
    hat = p >= 0.5
    np.testing.assert_allclose(got["Accuracy"], np.mean(hat == y), rtol=1e-6)
    np.testing.assert_allclose(got["average"], p.mean(), rtol=1e-6)
    np.testing.assert_allclose(got["mse"], np.mean((p - y) ** 2), rtol=1e-6)
    np.testing.assert_allclose(got["precision"], sk.precision_score(y, hat), rtol=1e-6)
    np.testing.assert_allclose(got["recall"], sk.recall_score(y, hat), rtol=1e-6)


def test_clu_masks():
    part = batches(0, (9,), "mask")[0]
    bound = bind((declare(clu.metrics.Accuracy, "a"),), part, {}, None)
    got = bound.compute(bound.update(bound.init(), part, {}, None))["a"]
    correct = np.asarray(part["y_pred"]).argmax(1) == np.asarray(part["y_true"])
    np.testing.assert_allclose(got, correct[np.asarray(part["sample_weight"])].mean(), rtol=1e-6)
    with pytest.raises(errors.ShapeError, match="takes none"):
        bind((declare(metrax.Precision, "p"),), part, {}, None)
    with pytest.raises(errors.ArgumentError, match="needs logits"):
        bind((declare(clu.metrics.Accuracy, "a"),), {"y_true": jnp.ones(3)}, {}, None)


def test_errors():
    with pytest.raises(errors.UnknownNameError, match="did you mean 'accuracy'"):
        bind((declare("acuracy"),), {"y_true": jnp.ones(4), "y_pred": jnp.ones(4)}, {}, None)
    with pytest.raises(errors.UnknownNameError, match="running_average"):
        declare("accuracy", None, "running_avg")
    with pytest.raises(errors.ArgumentError, match="name="):
        declare(lambda a, b: a)
    with pytest.raises(errors.ArgumentTypeError):
        declare(3)
    with pytest.raises(errors.ArgumentTypeError, match="from_model_output"):
        declare(dict)
    with pytest.raises(errors.ArgumentTypeError):
        declare("accuracy", transform_or_fields=3)
    with pytest.raises(errors.ArgumentTypeError):
        declare("accuracy", accumulate=3)
    outputs = {"y_true": jnp.ones((4, 1)), "y_pred": jnp.ones(4)}
    with pytest.raises(errors.ShapeError, match=r"\(4, 1\)"):
        bind((declare("mean_squared_error"),), outputs, {}, None)
    with pytest.raises(errors.ShapeError, match="'odd'.*shape \\(7,\\)"):
        bind((declare(lambda t, p: jnp.ones(7), "odd"),), outputs, {}, None)
    with pytest.raises(errors.ShapeError, match="sample_weight"):
        bind((declare("accuracy"),), {**outputs, "sample_weight": jnp.ones(3)}, {}, None)
    with pytest.raises(errors.ArgumentTypeError, match="weighted"):
        m = metrics.true_positives()
        m.update(m.init(), jnp.ones(2), jnp.ones(2), weight=jnp.ones(2))

    def grows(acc, x, weight=None):
        return x

    bad = metrics.Metric(lambda: 0.0, grows, lambda a, b: a, lambda a: a)
    with pytest.raises(errors.ShapeError, match="'bad'"):
        bind((declare(bad, "bad", None, "y_pred"),), outputs, {}, None)
    custom = declare("accuracy", accumulate=lambda a, o, i: a + o)
    bound = bind([custom], {**outputs, "y_true": jnp.ones(4)}, {}, None)
    with pytest.raises(errors.ArgumentError, match="merged"):
        bound.merge(bound.init(), bound.init())


def test_declared_are_keys():
    assert declare("accuracy") == declare("accuracy")
    assert hash(declare("accuracy")) == hash(declare("accuracy"))
    assert "huber_loss" in names() and "poisson" in names() and "precision" in names()
    assert declare(metrics.top_k_categorical_accuracy(k=3)).name == "top_k_categorical_accuracy"


def test_weak_typed_metric_is_a_carry():
    m = metrics.Metric(
        lambda: 0.0, lambda acc, x, weight=None: acc + jnp.sum(x), jnp.add, lambda acc: acc
    )
    x = {"x": jnp.ones(3)}
    bound = bind((declare(m, "m", None, "x"),), x, {}, None)
    acc = jax.lax.fori_loop(0, 4, lambda _, a: bound.update(a, x, {}, None), bound.init())
    assert float(bound.compute(acc)["m"]) == 12.0


def test_mean_of_every_loss_is_the_losses_average():
    y_true, y_pred = jax.nn.one_hot(jnp.array([0, 1, 1]), 2), jnp.full((3, 2), 0.5)
    for name in ("categorical_cross_entropy", "huber", "l2_loss", "sigmoid_binary_cross_entropy"):
        m = metrics.of_loss(name)
        assert np.isfinite(m.compute(m.update(m.init(), y_true, y_pred))), name
    value = metrics.of_loss("l2_loss")
    acc = value.update(value.init(), y_true, y_pred)
    np.testing.assert_allclose(value.compute(acc), jnp.mean(optax.l2_loss(y_pred, y_true)))
