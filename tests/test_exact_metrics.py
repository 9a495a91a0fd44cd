"""Metrics against exact fractions, for each dtype, metric and kind of weights.

The quick table is in the suite. ``python -m pytest -m "slow or endurance"`` runs all
dtypes with all weights.
"""

from __future__ import annotations

import functools
import itertools
from fractions import Fraction

import clu.metrics
import jax
import jax.numpy as jnp
import metrax
import numpy as np
import pytest

import jaxloop as jl
from jaxloop import errors, metrics
from jaxloop.metrics.binding import bind
from jaxloop.metrics.declare import declare
from jaxloop.metrics.exact_int import exact_int, host_rows, multiply_ints, sum_ints
from jaxloop.metrics.exact_sum import add_pairs, sum_examples, zero_pair

NARROW = ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32"]
NARROW += ["float16", "bfloat16", "float32"]
WIDE = ["int64", "uint64", "float64"]
WEIGHTS = ["none", "bool", "int8", "int32", "uint32", "float16", "float32"]
QUICK = [
    ("int32", "uint32", False),
    ("bfloat16", "float32", False),
    ("float64", "none", True),
]
ALL = [
    (dtype, weights, x64)
    for x64 in (False, True)
    for dtype in (["int32", "float32", *WIDE] if x64 else NARROW)
    for weights in WEIGHTS + ["int64", "float64"] * x64
]
HOWS = ["running_average", "running_sum", "running_min", "running_max", "last"]
COUNTS = ["true_positives", "false_positives", "true_negatives", "false_negatives"]
RATIOS = ["accuracy", "precision", "recall", "specificity"]


def random_values(rng, dtype, size):
    """Numbers of all magnitudes, with the extremes of the dtype."""
    dtype = jnp.dtype(dtype)
    if dtype == jnp.bool_:
        return rng.random(size) < 0.5
    if jnp.issubdtype(dtype, jnp.integer):
        limits = np.iinfo(dtype)
        values = rng.integers(limits.min, limits.max, size, dtype, endpoint=True)
        values = values >> rng.integers(0, limits.bits, size, dtype)
        values.flat[:3] = limits.max, limits.min, limits.max - 1
        return values
    return (rng.standard_normal(size) * 2.0 ** rng.integers(-8, 6, size)).astype(dtype)


def random_weights(rng, kind, num):
    """Weights that are not negative; some are 0."""
    if kind == "none":
        return None
    values = random_values(rng, kind, num)
    positive = (
        values
        if kind == "bool"
        else np.where(values < 0, ~values if is_int(kind) else -values, values)
    )
    return np.where(rng.random(num) < 0.3, np.zeros((), values.dtype), positive)


def fractions(array):
    exact = array.astype(np.float64) if array.dtype.kind not in "biu" else array
    return [Fraction(v.item()) for v in exact.reshape(-1)]


def is_int(kind):
    return "int" in kind


def check(name, got, expected, scale, eps):
    """Compares with a fraction: exactly if ``eps`` is None, else with an error of eps * scale."""
    got = np.asarray(got)
    if expected is None:
        assert np.isnan(got), name
    elif eps is None:
        value = int(got) if got.dtype.kind in "iu" else float(got)
        exact = expected if isinstance(value, int) else float(expected)
        assert value == exact, (name, value, expected)
    else:
        assert abs(Fraction(float(got)) - expected) <= Fraction(eps) * scale, (name, got, expected)


@pytest.mark.parametrize("dtype, weights, x64", QUICK, ids=str)
def test_metrics_equal_exact_fractions(dtype, weights, x64):
    compare(dtype, weights, x64, seeds=[0])


@pytest.mark.parametrize(
    "dtype, weights, x64",
    [
        pytest.param(*one, marks=pytest.mark.endurance if i % 8 else pytest.mark.slow)
        for i, one in enumerate(ALL)
    ],
    ids=str,
)
def test_all_metrics_equal_exact_fractions(dtype, weights, x64):
    compare(dtype, weights, x64, seeds=range(1, 9))


def compare(dtype, weights, x64, seeds):
    """Compares every reduction and metric of classification with an exact fraction."""
    specs = [declare(identity, how, how, "x", per="example") for how in HOWS]
    specs += [declare(name) for name in COUNTS + RATIOS]
    eps = 2.0**-48 if x64 else 2.0**-22
    with (
        jax.enable_x64(x64),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        bound = bind(specs, make_batches(dtype, weights, 0)[0], {}, None)
        update = jax.jit(lambda accs, outputs: bound.update(accs, outputs, {}, None))
        for seed in seeds:
            batches = make_batches(dtype, weights, seed)
            accs = functools.reduce(update, batches, bound.init())
            rows = jax.tree.map(lambda leaf: np.asarray(leaf)[None], bound.compute(accs))
            got = {name: value[0] for name, value in host_rows(rows).items()}
            compare_reductions(got, batches, dtype, weights, eps)
            compare_classification(got, batches, weights, eps)


def identity(x):
    return x


def make_batches(dtype, weights, seed):
    rng = np.random.default_rng(seed)
    batches = []
    for num in (9, 9, 4):
        x, labels = random_values(rng, dtype, num), rng.integers(0, 2, num).astype(np.int32)
        scores = rng.random(num).astype(np.float32)
        scores[rng.random(num) < 0.2] = np.nan
        batch = {"x": x, "y_true": labels, "y_pred": scores}
        weight = random_weights(rng, weights, num)
        if weight is not None:
            weight[:2] = 1  # the extremes count
            batch["sample_weight"] = weight
            if x.dtype.kind not in "biu":  # an example of weight 0 is not there
                x[weight == 0] = rng.choice([np.nan, np.inf], (weight == 0).sum())
        batches.append(jax.tree.map(jnp.asarray, batch))
    return batches


def present(batches, name):
    """Pairs of weight and value of the examples whose weight is not 0."""
    for batch in batches:
        values = np.asarray(batch[name])
        weight = np.asarray(batch.get("sample_weight", np.ones(len(values), np.int32)))
        some = weight != 0
        yield from zip(fractions(weight[some]), fractions(values[some]), strict=True)


def compare_reductions(got, batches, dtype, weights, eps):
    exact = None if is_int(dtype) and "float" not in weights else eps
    pairs, last = list(present(batches, "x")), list(present(batches[-1:], "x"))
    total, norm = sum(w * v for w, v in pairs), sum(w for w, _ in pairs)
    size = sum(abs(w * v) for w, v in pairs)
    exact_sum = None if dtype == "bool" and "float" not in weights else exact
    check("running_sum", got["running_sum"], total, size, exact_sum)
    check("running_average", got["running_average"], total / norm, size / norm, exact)
    check("running_min", got["running_min"], min(v for _, v in pairs), 0, None)
    check("running_max", got["running_max"], max(v for _, v in pairs), 0, None)
    norm, size = sum(w for w, _ in last), sum(abs(w * v) for w, v in last)
    mean = sum(w * v for w, v in last) / norm
    check("last", got["last"], mean, size / norm, exact)


def compare_classification(got, batches, weights, eps):
    cells = dict.fromkeys(itertools.product((0, 1), (0, 1, None)), Fraction(0))
    for batch in batches:
        labels, scores = np.asarray(batch["y_true"]), np.asarray(batch["y_pred"])
        weight = batch.get("sample_weight", jnp.ones(len(labels), jnp.int32))
        for label, score, w in zip(labels, scores, fractions(np.asarray(weight)), strict=True):
            cells[int(label), None if np.isnan(score) else int(score > 0.5)] += w
    tp, fp, tn, fn = cells[1, 1], cells[0, 1], cells[0, 0], cells[1, 0]
    exact = eps if "float" in weights else None
    for name, value in zip(COUNTS, (tp, fp, tn, fn), strict=True):
        check(name, got[name], value, value, exact)
    whole = sum(cells.values())
    for name, part, of in (
        ("accuracy", tp + tn, whole),
        ("precision", tp, tp + fp),
        ("recall", tp, tp + fn),
        ("specificity", tn, tn + fp),
    ):
        check(name, got[name], part / of if of else Fraction(0), 1, eps)


# --- exact integers ------------------------------------------------------------------------------


def test_a_sum_of_many_large_integers():
    for num in (0, 70_000):
        largest = jnp.full(num, 2**32 - 1, jnp.uint32)
        assert sum_ints(largest, None, 2).python_ints() == num * (2**32 - 1)


@pytest.mark.slow
@pytest.mark.parametrize("num", [0, 1, 2**15, 2**15 + 1, 70_000, 2**21])
def test_sums_of_many_integers_are_exact(num):
    largest = jnp.full(num, 2**32 - 1, jnp.uint32)
    assert sum_ints(largest, largest, 3).python_ints() == num * (2**32 - 1) ** 2
    smallest = jnp.full((num, 2), -(2**31), jnp.int32)
    weight = jnp.arange(num, dtype=jnp.int32) % 2 == 0
    assert list(sum_ints(smallest, weight, 3).python_ints()) == [(num + 1) // 2 * -(2**31)] * 2
    product = sum_ints(smallest, jnp.full(num, -(2**31), jnp.int32), 3)
    assert list(product.python_ints()) == [num * 2**62] * 2


def test_an_exact_integer_is_a_number_on_the_host():
    big = exact_int(jnp.asarray([2**31 - 1, -3, 0], jnp.int32), 3)
    product = multiply_ints(big, big)
    assert np.asarray(product).tolist() == [(2**31 - 1) ** 2, 9, 0]
    assert np.asarray(product).dtype == np.int64
    assert (product == np.array([(2**31 - 1) ** 2, 9, 0])).all() and (product - 1)[1] == 8
    assert int(exact_int(jnp.int32(-7), 2)) == float(exact_int(jnp.int32(-7), 2)) == -7
    assert repr(exact_int(jnp.int32(-7), 2)) == "ExactInt(-7)"
    assert repr(jax.eval_shape(lambda: exact_int(jnp.int32(-7), 2))) == "ExactInt(...)"
    above = multiply_ints(product, exact_int(jnp.asarray([3, 1, 1], jnp.int32), 3))
    assert np.asarray(above).dtype == np.uint64
    assert np.asarray(above)[0] == 3 * (2**31 - 1) ** 2
    beyond = np.asarray(multiply_ints(above, big))
    assert beyond.dtype == np.float64 and beyond[0] == float(3 * (2**31 - 1) ** 3)
    # The value of a row does not depend on the others.
    rows = host_rows(above)
    assert [row.dtype for row in rows] == [np.uint64, np.int64, np.int64]


def emitting(batch, state):
    return jl.emit(state, **batch)


def evaluate(batches, *specs):
    """The values of metrics over batches, op by op, which compiles less than a run."""
    batches = [jax.tree.map(jnp.asarray, batch) for batch in batches]
    bound = bind(specs, batches[0], {}, None)
    accs = bound.init()
    for batch in batches:
        accs = bound.update(accs, batch, {}, None)
    return bound.compute(accs)


def test_integers_are_exact_in_a_run(tmp_path):
    big = 2**31 - 1
    data = [{"x": np.full(3, big, np.int32), "sample_weight": np.full(3, big, np.int32)}] * 4
    seen = []
    loop = (
        jl.loop(emitting)
        .metric(identity, "sum", "running_sum", ["x"])
        .metric(identity, "mean", None, ["x"])
        .metric("true_positives", "count", None, ["x", "x"])
        .observe("iteration_completed", lambda s: seen.append(int(s.metrics["count"])))
        .checkpoint(tmp_path, event="iteration_completed")
    )
    with pytest.raises(ZeroDivisionError):
        loop.handle("iteration_started", lambda state: 1 // 0, jl.only(3)).run(data)
    values = loop.resume(tmp_path).run(data).history[0]
    assert values["sum"].dtype == np.float64 and values["sum"] == float(12 * big * big)
    assert values["mean"] == big and values["mean"].dtype == np.float64
    assert values["count"] == 12 * big and values["count"].dtype == np.int64
    assert seen == [3 * big, 6 * big, 9 * big, 12 * big]
    assert dict(loop.resume(tmp_path).run(data).history[0]) == dict(values)


def test_integers_are_exact_op_by_op():
    data = [{"x": np.ones(3, np.int32)}] * 2
    loop = jl.loop(emitting).metric("true_positives", "count", "running_sum", ["x", "x"])
    assert dict(loop.run(data, jit=False).history[0]) == {"count": 6}


def test_a_count_of_each_batch_is_accumulated_exactly():
    big = 2**31 - 1
    batches = [{"x": np.ones(n, np.int32), "sample_weight": np.full(n, big)} for n in (2, 3)]
    batches = jax.tree.map(np.int32, batches)
    hows = {
        "running_sum": 5 * big,
        "running_min": 2 * big,
        "running_max": 3 * big,
        "last": 3 * big,
    }
    specs = [declare("true_positives", how, how, ["x", "x"]) for how in hows]
    values = evaluate(batches, *specs)
    assert {how: float(values[how]) for how in hows} == hows
    own = declare("true_positives", "n", lambda acc, new, i: acc + new + i, ["x", "x"])
    assert evaluate([{"x": np.ones(3, np.int32)}] * 2, own)["n"] == 7


def test_half_precision_is_accumulated_as_float32():
    x = jnp.concatenate([jnp.full(1, 256, jnp.bfloat16), jnp.ones(1, jnp.bfloat16)])
    specs = [declare(jnp.sum, how, how, ["x"], per="batch") for how in ("running_sum", "last")]
    specs.append(declare(jnp.sum, "own", lambda acc, new, i: acc + new, ["x"]))
    specs.append(declare(clu.metrics.Average.from_output("x"), "clu"))
    values = evaluate([{"x": x[:1]}, {"x": x[1:]}], *specs)
    assert values["own"] == values["running_sum"] == 257 and values["clu"] == 128.5
    assert {value.dtype for value in values.values()} == {np.dtype(np.float32)}


def test_a_threshold_is_not_rounded_to_half_precision():
    score = jnp.asarray([0.30078125], jnp.bfloat16)  # what bfloat16 makes of 0.3
    for metric in (metrics.true_positives(threshold=0.3), metrics.accuracy(threshold=0.3)):
        acc = metric.update(metric.init(), jnp.ones(1, jnp.int32), score)
        assert float(metric.compute(acc)) == 1


def test_integers_of_one_example_are_averaged_exactly():
    x = jnp.asarray([[2**24 + 1, -(2**24)]], jnp.int32)
    mean = metrics.mean(lambda x: x)
    assert float(mean.compute(mean.update(mean.init(), x))) == 0.5


def test_a_compiled_sum_of_products_keeps_its_precision():
    """XLA may contract a product and a sum into one operation, in some places and not in all."""
    rng = np.random.default_rng(1)
    values = rng.standard_normal((300, 9, 3)) * 2.0 ** rng.integers(-6, 6, (300, 9, 3))
    values, weight = values.astype(np.float32), rng.random((300, 9)).astype(np.float32)

    @jax.jit
    def total(values, weight):
        def body(i, acc):
            return add_pairs(acc, sum_examples(values[i], weight[i]))

        return jax.lax.fori_loop(0, 300, body, zero_pair((3,)))

    pair = total(values, weight)
    products = (values * weight[..., None]).astype(float)
    error = np.asarray(pair.hi, float) + np.asarray(pair.lo, float) - products.sum((0, 1))
    assert (np.abs(error) <= 2.0**-36 * np.abs(products).sum((0, 1))).all()


# --- missing values ------------------------------------------------------------------------------


def value_of(metric, y_true, y_pred):
    outputs = {"y_true": jnp.asarray(y_true), "y_pred": jnp.asarray(y_pred)}
    return float(evaluate([outputs], declare(metric, "value"))["value"])


def test_a_nan_prediction_is_never_correct():
    nan = np.nan
    labels, scores = [0, 1, 0], np.array([[nan, nan], [nan, 0.1], [0.9, 0.1]], np.float32)
    top_2 = metrics.top_k_categorical_accuracy(k=2)
    for metric in ("accuracy", top_2):
        assert value_of(metric, labels, scores) == np.float32(1 / 3)
        one_hot = np.eye(2, dtype=np.float32)[labels]
        assert value_of(metric, one_hot, scores) == np.float32(1 / 3)
        one_hot[2, 1] = nan
        assert value_of(metric, one_hot, scores) == 0
    column = np.array([nan, nan, 0.1, 0.9], np.float32)
    assert value_of("accuracy", [0, 1, 0, 1], column) == 0.5
    counts = [value_of(name, [0, 1, 0, 1], column) for name in COUNTS]
    assert counts == [1, 0, 1, 0]
    assert value_of("accuracy", column, np.array([0, 1, 0, 1], np.int32)) == 0


def test_a_label_that_is_no_class_is_never_correct():
    scores = np.array([[0.1, 0.9], [0.1, 0.9]], np.float32)
    top_2 = metrics.top_k_categorical_accuracy(k=2)
    for metric in ("accuracy", top_2):
        for labels in ([-1, 1], [2, 1], np.array([1.5, 1], np.float32), [[-1], [1]]):
            assert value_of(metric, labels, scores) == 0.5
    # A cast to another integer must not wrap: -1 is 2**32 - 1 as an unsigned integer.
    top = np.array([2**32 - 1, 1], np.uint32)
    assert value_of("accuracy", np.array([-1, 1], np.int32), top) == 0.5
    assert value_of("accuracy", np.array([True, True]), np.array([1, 0], np.int32)) == 0.5


# --- several outputs -----------------------------------------------------------------------------

TWO = {
    "y_true": {"head": np.array([0, 1], np.int32), "tail": np.array([1, 1], np.int32)},
    "y_pred": {"head": np.eye(2, dtype=np.float32), "tail": np.eye(2, dtype=np.float32)},
}


def test_a_metric_by_name_is_evaluated_for_each_output():
    loop = jl.loop(emitting).metric("accuracy")
    state = loop.early_stop("accuracy/tail", mode="max", patience=2).run([TWO] * 2, epochs=9)
    assert dict(state.history[0]) == {"accuracy/head": 1, "accuracy/tail": 0.5}
    assert state.epoch == 3
    specs = [declare("accuracy", "best", "running_max")]
    specs.append(declare("true_positives", "tp", None, lambda n: [n["y_true"], n["y_true"]]))
    values = evaluate([TWO] * 2, *specs)
    assert values == {"best/head": 1, "best/tail": 0.5, "tp/head": 2, "tp/tail": 4}
    tuples = {name: [tuple(value.values()), {"deep": value["head"]}] for name, value in TWO.items()}
    values = evaluate([tuples], declare("accuracy"))
    assert list(values) == ["accuracy/0/0", "accuracy/0/1", "accuracy/1/deep"]


def test_several_outputs_that_do_not_pair_are_errors_that_say_what_to_do():
    one = {**TWO, "y_true": TWO["y_true"]["head"]}
    with pytest.raises(errors.ShapeError, match=r"got 1 and 2\n.*transform_or_fields"):
        evaluate([one], declare("accuracy"))
    for metric in (metrics.accuracy(), metrics.precision(), metrics.top_k_categorical_accuracy()):
        with pytest.raises(errors.ShapeError, match=r"one array.*\n.*transform_or_fields"):
            evaluate([TWO], declare(metric))
    loop = jl.loop(emitting).metric("accuracy")
    for name in ("accuracy", "accuracy/body"):
        with pytest.raises(errors.MissingMetricError, match="accuracy/head, accuracy/tail"):
            loop.early_stop(name).run([TWO])


def test_a_pair_can_be_one_argument():
    pair = {"y_true": np.ones(2, np.float32), "y_pred": (np.ones(2), np.zeros(2))}
    assert evaluate([pair], declare("margin_ranking")) == {"margin_ranking": 0}


# --- functions, weights and classes --------------------------------------------------------------


def test_a_state_may_have_keys_of_any_kind():
    loop = jl.loop(emitting, lambda batch, _: {0: jnp.ones(2), 1: 0}).metric("accuracy")
    loop = loop.metric(identity, "own", None, lambda named: [named[0]])
    state = loop.run([{"y_true": np.ones(2, np.int32), "y_pred": np.ones(2, np.float32)}])
    assert dict(state.history[0]) == {"accuracy": 1, "own": 1}


def test_per_says_what_a_value_is_for():
    def run(per, how=None, weight=None, sizes=(3,)):
        batches = [{"x": np.arange(n, dtype=np.float32)} for n in sizes]
        if weight is not None:
            batches = [{**batch, "sample_weight": np.float32(weight)} for batch in batches]
        spec = declare(lambda x: jnp.arange(3.0), "v", how, ["x"], per=per)
        return evaluate(batches, spec)["v"].tolist()

    assert run(None) == run("example") == 1
    assert run("batch") == run("batch", sizes=(3, 2)) == [0, 1, 2]
    assert run("batch", "running_sum", sizes=(3, 2)) == [0, 2, 4]
    assert run("example", weight=[0, 1, 3]) == 1.75
    assert run("batch", weight=[0, 1, 3]) == [0, 1, 2]
    for per, wrong in (("example", "per='example' says"), (None, "per='batch'")):
        with pytest.raises(errors.ShapeError, match=wrong):
            run(per, sizes=(2,))
    weighted = {"x": np.ones(3, np.float32), "sample_weight": np.array([True, True, False])}
    loop = jl.loop(emitting)
    scalar = loop.metric(jnp.sum, "v", "running_max", ["x"], per="batch")
    assert scalar.run([weighted]).history[0]["v"] == 3
    with pytest.raises(errors.ArgumentError, match="'example', 'batch' or None"):
        loop.metric(jnp.sum, per="row")
    for metric in ("accuracy", metrics.accuracy(), clu.metrics.Accuracy):
        with pytest.raises(errors.ArgumentError, match="with a function"):
            loop.metric(metric, per="batch").run([{"y_true": np.zeros(2), "y_pred": np.zeros(2)}])
    with pytest.raises(errors.ShapeError, match="real numbers"):
        evaluate([weighted], declare(lambda x: x.astype(jnp.complex64), "v", None, ["x"]))


def test_where_selects_the_examples_that_count():
    batch = {"y_true": np.array([-1, 1, 0], np.int32), "y_pred": np.eye(3, dtype=np.float32)}
    known = {"where": lambda named: named["y_true"] >= 0}
    specs = [declare("accuracy", "all"), declare("accuracy", "known", **known)]
    specs.append(declare(identity, "sum", "running_sum", ["y_true"], **known))
    values = evaluate([batch], *specs)
    assert {name: float(value) for name, value in values.items()} == {
        "all": np.float32(1 / 3),
        "known": 0.5,
        "sum": 1,
    }
    weighted = {**batch, "sample_weight": np.array([5, 3, 1], np.float32)}
    assert evaluate([weighted], *specs)["known"] == 0.75
    loop = jl.loop(emitting).metric("accuracy", where="valid")
    assert loop.run([{**batch, "valid": np.arange(3) == 1}]).history[0]["accuracy"] == 1
    spec = declare("accuracy", where="valid")
    for mask, error in (
        (np.ones(3), errors.ArgumentTypeError),
        (np.ones(2) > 0, errors.ShapeError),
    ):
        for known in (batch, weighted):
            with pytest.raises(error, match="accuracy"):
                evaluate([{**known, "valid": mask}], spec)
    with pytest.raises(errors.UnknownNameError, match="valid"):
        evaluate([batch], spec)
    with pytest.raises(errors.ArgumentTypeError, match="where"):
        loop.metric("accuracy", where=3)


def test_an_update_without_weight():
    def update(acc, x):
        return acc + jnp.sum(x)

    total = metrics.Metric(lambda: jnp.float32(0), update, jnp.add, lambda acc: acc, "total")
    batch = {"x": np.ones(3, np.float32)}
    for how in (None, "running_max"):
        spec = declare(total, None, how, ["x"])
        assert evaluate([batch], spec)["total"] == 3
        with pytest.raises(errors.ArgumentError, match=r"'total': update must take weight="):
            evaluate([{**batch, "sample_weight": np.ones(3) > 0}], spec)


class Total:
    """A class with the protocol of CLU and no ``==``. It takes any keyword, and reads a mask."""

    def __init__(self, total):
        self.total = total

    @classmethod
    def from_model_output(cls, y_pred, **others):
        return cls(jnp.where(others["mask"], y_pred, 0).sum() if "mask" in others else y_pred.sum())

    def merge(self, other):
        return type(self)(self.total + other.total)

    def compute(self):
        return self.total


jax.tree_util.register_pytree_node(Total, lambda t: ((t.total,), None), lambda _, c: Total(*c))


class Deaf(Total):
    """It takes any keyword, and reads no mask."""

    @classmethod
    def from_model_output(cls, y_pred, **others):
        return cls(y_pred.sum())


jax.tree_util.register_pytree_node(Deaf, lambda t: ((t.total,), None), lambda _, c: Deaf(*c))


def test_weights_of_classes_are_exact_or_an_error():
    y_pred, y_true = np.array([1.0, 2.0, np.nan], np.float32), np.zeros(3, np.float32)
    masked = {"y_true": y_true, "y_pred": y_pred, "sample_weight": np.array([True, True, False])}
    weighted = {**masked, "sample_weight": np.array([1, 3, 0], np.float32)}
    assert evaluate([masked] * 2, declare(Total))["Total"] == 6
    specs = declare(metrax.MSE, "mse"), declare(metrax.MSE, "last", "last")
    assert evaluate([masked] * 2, *specs) == {"mse": 2.5, "last": 2.5}
    assert evaluate([weighted] * 2, *specs) == {"mse": 3.25, "last": 3.25}
    reads_mask = (Total, clu.metrics.Average.from_output("y_pred"))
    for cls, how, dtype in itertools.product(reads_mask, (None, "last"), (np.float32, np.int32)):
        numbers = {**masked, "sample_weight": np.array([1, 2, 0], dtype)}
        with pytest.raises(errors.ArgumentTypeError, match="must be a boolean mask"):
            evaluate([numbers], declare(cls, "m", how))
    for how in (None, "last"):
        with pytest.raises(errors.ShapeError, match="takes none of"):
            evaluate([masked], declare(Deaf, "m", how))
