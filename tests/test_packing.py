"""All accumulators are one vector, and the sums of all metrics are added together."""

import dataclasses
import fractions
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxloop as jl
from jaxloop.metrics.binding import bind
from jaxloop.metrics.declare import declare
from jaxloop.metrics.packing import Packing
from jaxloop.metrics.sums import Examples, summed
from jaxloop.metrics.words import from_words, num_words, to_words

DTYPES = ["bool", "int4", "uint4", "int8", "uint8", "int16", "uint16", "int32", "uint32"]
DTYPES += ["float16", "bfloat16", "float32", "complex64"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_words_keep_every_bit(dtype):
    dtype = jnp.dtype(dtype)
    bits = np.random.default_rng(0).integers(0, 256, 6 * dtype.itemsize, np.uint8)
    if dtype in ("bool", "int4", "uint4"):
        low = -8 if dtype == "int4" else 0
        values = jnp.asarray(np.arange(low, low + 6), dtype)
    else:
        values = jnp.asarray(bits.view(dtype))
    array = values.reshape(2, 3)
    words = jax.jit(to_words)(array)
    assert words.dtype == jnp.uint32 and words.shape == (num_words((2, 3), dtype),)
    back = jax.jit(from_words, static_argnums=(1, 2))(words, (2, 3), dtype)
    assert back.dtype == dtype
    assert np.asarray(back).tobytes() == np.asarray(array).tobytes()


def test_words_of_64_bits():
    with jax.enable_x64(True):
        for dtype in (jnp.float64, jnp.int64, jnp.uint64, jnp.complex128):
            array = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)) * 1e9).astype(dtype)
            words = to_words(array)
            assert words.shape == (num_words((2, 3), dtype),)
            np.testing.assert_array_equal(from_words(words, (2, 3), dtype), array)


def odd_metric():
    """A metric whose accumulator has leaves of many kinds, and which is no sum."""

    def init():
        return {
            "key": jax.random.key(3),
            "flag": jnp.asarray(False),
            "small": jnp.zeros((2,), jnp.int8),
            "half": jnp.zeros((), jnp.bfloat16),
            "none": None,
            "empty": jnp.zeros((0, 3)),
        }

    def update(acc, x, weight=None):
        return {
            **acc,
            "flag": jnp.any(x > 0),
            "small": acc["small"] - jnp.int8(1),
            "half": acc["half"] + jnp.bfloat16(0.5),
        }

    def merge(a, b):
        return b

    return jl.Metric(init, update, merge, lambda acc: acc["half"].astype(jnp.float32))


def test_an_accumulator_of_any_kind_is_carried():
    loop = jl.loop(lambda batch, state: jl.emit(state, x=batch))
    loop = loop.metric(odd_metric(), "odd", None, ["x"]).metric("x", "mean")
    state = loop.run([np.float32(i) for i in range(5)], epochs=2)
    assert float(state.history[1]["odd"]) == 2.5 and float(state.history[1]["mean"]) == 2.0
    (program,) = loop.programs.block_lengths
    unpacked = program.metrics.packing.unpack(state.loan.accumulators)
    np.testing.assert_array_equal(unpacked["odd"]["small"], [-5, -5])
    assert jax.random.key_data(unpacked["odd"]["key"]).tolist() == [0, 3]


FUNCTIONS = {
    "plain": lambda x: x,
    "positive": lambda x: x > 0,
    "whole": lambda x: jnp.round(x * 100).astype(jnp.int32),
    "half": lambda x: x.astype(jnp.bfloat16),
    "scalar": lambda x: jnp.sum(x),
    "both": lambda x: {"a": x, "b": x > 1},
}


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    names=st.lists(st.sampled_from(sorted(FUNCTIONS)), min_size=2, max_size=5, unique=True),
    how=st.sampled_from(["running_average", "running_sum"]),
    weighted=st.sampled_from([None, "bool", "float32"]),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    seed=st.integers(0, 100),
)
def test_together_they_are_what_each_is_alone(names, how, weighted, sizes, seed):
    rng = np.random.default_rng(seed)
    if weighted is not None:
        names = [name for name in names if name != "scalar"]  # an error with weights
    batches = []
    for size in sizes:
        batch = {"x": rng.normal(size=size).astype(np.float32) * 10.0 ** rng.integers(-8, 8, size)}
        batch["x"] = batch["x"].astype(np.float32)
        if weighted is not None:
            batch["sample_weight"] = rng.integers(0, 3, size).astype(weighted)
        batches.append(batch)

    def values(names):
        specs = [declare(FUNCTIONS[name], name, how, ["x"]) for name in names]
        metrics = bind(specs, batches[0], {}, None)
        add = jax.jit(lambda packed, batch: metrics.add(packed, batch, {}, None))
        packed = metrics.packing.pack(metrics.init())
        for batch in batches:
            packed = add(packed, batch)
        return jax.tree.map(np.asarray, metrics.compute(metrics.packing.unpack(packed)))

    together = values(names)
    for name in names:
        # Sums of floats may round in another order, far below the last bit of the value.
        for a, b in zip(*map(jax.tree.leaves, (together[name], values([name])[name])), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-7)


@pytest.mark.parametrize("num", [1, 7, 33, 5000])
def test_bools_and_floats_are_summed_in_one_and_both_are_exact(num):
    rng = np.random.default_rng(0)
    flags, values = rng.random(num) < 0.5, rng.normal(size=num).astype(np.float32)
    specs = [declare(lambda f: f, "flags", None, ["flags"])]
    specs += [declare(lambda v: v, "values", None, ["values"])]
    outputs = {"flags": jnp.asarray(flags), "values": jnp.asarray(values)}
    metrics = bind(specs, outputs, {}, None)
    text = str(
        jax.make_jaxpr(lambda p: metrics.add(p, outputs, {}, None))(
            metrics.packing.pack(metrics.init())
        )
    )
    assert text.count("reduce_max") == 1 or num == 1  # one sum for both
    accs = metrics.update(metrics.init(), outputs, {}, None)
    pair = accs["flags"][0]["sum"]
    assert float(pair.hi) == flags.sum() and float(pair.lo) == 0
    exact = sum(map(fractions.Fraction, values.tolist()))
    pair = accs["values"][0]["sum"]
    found = fractions.Fraction(float(pair.hi)) + fractions.Fraction(float(pair.lo))
    size = sum(abs(fractions.Fraction(value)) for value in values.tolist())
    assert abs(found - exact) <= size * fractions.Fraction(1, 2**36)


def test_the_order_of_the_declarations_does_not_matter():
    names = ("loss", "accuracy", "mean_squared_error", "true_positives")
    outputs = {"y_true": jnp.asarray([0, 1, 1]), "y_pred": jnp.asarray([0.3, 0.2, 0.9])}

    def loss(y_true, y_pred):
        return y_pred

    packed = set()
    for order in itertools.permutations(names):
        specs = [declare(loss if name == "loss" else name, name) for name in order]
        metrics = bind(specs, outputs, {}, None)
        one = metrics.add(metrics.packing.pack(metrics.init()), outputs, {}, None)
        packed.add(tuple(np.asarray(one[0]).tolist()))
        assert tuple(metrics.names) == order
    assert len(packed) == 1


def older(accs):
    """Packs accumulators as formats 1 to 3 did: one vector for each dtype."""
    leaves = jax.tree.leaves(accs)
    dtypes = dict.fromkeys(leaf.dtype for leaf in leaves)
    return [
        jnp.concatenate([jnp.ravel(leaf) for leaf in leaves if leaf.dtype == dtype])
        for dtype in dtypes
    ]


def test_accumulators_of_earlier_formats_are_converted():
    outputs = {"y_true": jnp.asarray([0, 1, 1]), "y_pred": jnp.asarray([0.3, 0.2, 0.9])}
    specs = [declare(name) for name in ("accuracy", "true_positives", "recall")]
    specs += [declare(lambda p: p, name, name, ["y_pred"]) for name in ("running_min", "last")]
    metrics = bind(specs, outputs, {}, None)
    accs = metrics.update(metrics.init(), outputs, {}, None)
    packed = metrics.packing.pack(accs)
    (restored,) = metrics.packing.restored(older(accs), by_dtype=True)
    np.testing.assert_array_equal(restored, packed[0])
    assert metrics.packing.restored(packed, by_dtype=False) == packed
    assert metrics.packing.restored(older(accs)[:-1], by_dtype=True) is None
    assert metrics.packing.restored([packed[0][1:]], by_dtype=False) is None


def test_integers_of_earlier_formats_are_converted_although_their_shapes_are_those_of_today():
    outputs = {"x": jnp.asarray([2**20, 3, 5]), "y": jnp.asarray([7, 2**28, 1])}
    specs = [declare(name, name, "running_average") for name in ("x", "y")]
    metrics = bind(specs, outputs, {}, None)
    accs = metrics.update(metrics.init(), outputs, {}, None)
    (packed,), saved = metrics.packing.pack(accs), older(accs)
    assert [(one.shape, one.dtype) for one in saved] == [(packed.shape, packed.dtype)]
    (restored,) = metrics.packing.restored(saved, by_dtype=True)
    np.testing.assert_array_equal(restored, packed)


def test_a_skipped_step_changes_only_the_count_of_skipped_steps():
    specs = [declare("x", "x"), declare("skipped_steps", "skipped_steps", "running_sum")]
    specs += [declare("x", "most", "running_max"), declare(odd_metric(), "odd", None, ["x"])]
    first = {"x": jnp.asarray([1.0, 2.0]), "skipped_steps": jnp.int32(0)}
    bad = {"x": jnp.asarray([jnp.nan, 9.0]), "skipped_steps": jnp.int32(1)}
    metrics = bind(specs, first, {}, None)
    before = metrics.update(metrics.init(), first, {}, None)
    after = metrics.update(before, bad, {}, None)
    counts = [int(metrics.compute(accs)["skipped_steps"]) for accs in (before, after)]
    assert counts == [0, 1]
    for name in ("x", "most", "odd"):
        for a, b in zip(*map(jax.tree.leaves, (before[name], after[name])), strict=True):
            assert jnp.all(a == b)


def test_a_sum_of_another_shape_is_an_error_that_names_the_metric():
    def wide(x):
        return jnp.ones((*x.shape, 2 if x.shape[0] == 3 else 4), jnp.float32)

    metric = jl.Metric(
        lambda: summed(Examples(jnp.zeros((1, 2)), None), jl_zero()),
        lambda acc, x, weight=None: acc,
        lambda a, b: a,
        lambda acc: acc.hi,
        delta=lambda x, weight=None: Examples(wide(x), weight),
    )
    metrics = bind([declare(metric, "mine", None, ["x"])], {"x": jnp.ones(3)}, {}, None)
    with pytest.raises(jl.errors.ShapeError, match="'mine': the sum of the examples must have"):
        metrics.update(metrics.init(), {"x": jnp.ones(5)}, {}, None)


def test_an_update_that_replaces_that_of_a_built_in_metric_counts():
    mean = jl.metrics.mean(lambda x: x)
    metric = dataclasses.replace(
        mean, update=lambda acc, x, weight=None: mean.update(acc, x * 2, weight=weight)
    )
    metrics = bind([declare(metric, "mine", None, ["x"])], {"x": jnp.ones(3)}, {}, None)
    accs = metrics.update(metrics.init(), {"x": jnp.asarray([1.0, 2.0, 3.0])}, {}, None)
    assert float(metrics.compute(accs)["mine"]) == 4.0


@pytest.mark.parametrize("zero", [jnp.int32(0), 0.0])
def test_a_delta_of_plain_numbers_is_an_error(zero):
    metric = jl.Metric(
        lambda: {"n": zero},
        lambda acc, x: {"n": acc["n"] + 1},
        lambda a, b: {"n": a["n"] + b["n"]},
        lambda acc: acc["n"],
        delta=lambda x: {"n": jnp.ones_like(zero)},
    )
    with pytest.raises(jl.errors.ArgumentError, match="'mine': the accumulator of a metric with"):
        bind([declare(metric, "mine", None, ["x"])], {"x": jnp.ones(3)}, {}, None)


def jl_zero():
    from jaxloop.metrics.exact_sum import zero_pair

    return zero_pair((2,))


def test_no_metric_takes_no_vector():
    packing = Packing({}, ())
    assert packing.pack({}) == [] and packing.unpack([]) == {} and packing.add([], {}, {}) == []
