"""Small functions on the host: the bits of XLA, for any number of rows, or None."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax import lax

from jaxloop._program.host_eval import on_host, on_host_rows
from jaxloop._program.host_rules import RULES
from jaxloop.metrics import reductions
from jaxloop.metrics.binding import bind
from jaxloop.metrics.declare import declare, names
from jaxloop.metrics.exact_int import ExactInt, ExactRatio, zero_int
from jaxloop.metrics.windows import window
from tests.test_costs import counting

S = jax.ShapeDtypeStruct
F, I, U = jnp.float32, jnp.int32, jnp.uint32  # noqa: E741
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def flushed(array):
    """The array without subnormal numbers, which XLA's CPU backend takes for zero."""
    if array.dtype.kind != "f" or array.dtype.itemsize < 4:
        return array
    small = np.abs(array) < np.finfo(array.dtype).tiny
    return np.where(small, np.copysign(np.zeros_like(array), array), array)


def assert_same(host, device):
    """The same types and bits. NaNs are all the same."""
    assert jax.tree.structure(host) == jax.tree.structure(device)
    for x, y in zip(jax.tree.leaves(host), jax.tree.leaves(device), strict=True):
        y = np.asarray(y)
        assert type(x) is np.ndarray
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        x, y = flushed(x), flushed(y)
        nan = np.zeros(x.shape, bool) if x.dtype.kind in "biu" else np.isnan(x)
        if nan.any():
            np.testing.assert_array_equal(nan, np.isnan(y))
        bits = BITS[x.dtype.itemsize]
        np.testing.assert_array_equal(x.view(bits)[~nan], y.view(bits)[~nan])


def edges(dtype, rng, number):
    """Special values and random bits."""
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return np.array([False, True])
    if dtype.kind in "iu":
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        wide = [0, 1, 2, 3, 7, 8, 31, 32, 33, 63, 64, low, low + 1, high, high - 1, high // 2]
        special = np.array([n for n in wide if low <= n <= high], dtype)
        special = np.concatenate([special, -special])
    else:
        limits = [np.finfo(dtype).max, np.finfo(dtype).tiny, np.finfo(dtype).eps]
        whole = [2.0**k for k in (7, 8, 15, 16, 24, 31, 32, 63, 64)]
        numbers = [0, 0.5, 1, 1.5, 2.5, 3, 0.1, 127.5, 255.9, np.inf, np.nan, *limits, *whole]
        special = np.array(numbers, dtype)
        special = np.concatenate([special, -special])
    random = rng.integers(0, 256, (number, dtype.itemsize), np.uint8).view(dtype)[:, 0]
    return flushed(np.concatenate([special, random]))


ANY, WHOLE, REAL = "bool int32 uint32 float32", "int32 uint32", "float32"
NUMBER = f"{WHOLE} {REAL}"
ELEMENTWISE = [
    *((op, 1, NUMBER) for op in (lax.neg, lax.sign, lax.square)),
    (lax.abs, 1, f"int32 {REAL}"),
    *((op, 1, REAL) for op in (lax.floor, lax.ceil, lax.sqrt, lax.is_finite, jnp.rint)),
    (lax.bitwise_not, 1, f"bool {WHOLE}"),
    *((op, 2, NUMBER) for op in (lax.add, lax.sub, lax.mul, lax.div)),
    *((op, 2, ANY) for op in (lax.max, lax.min, lax.eq, lax.ne, lax.lt, lax.le, lax.gt, lax.ge)),
    *((op, 2, f"bool {WHOLE}") for op in (lax.bitwise_and, lax.bitwise_or, lax.bitwise_xor)),
    *((op, 2, WHOLE) for op in (lax.rem, lax.shift_left)),
    *((op, 2, WHOLE) for op in (lax.shift_right_logical, lax.shift_right_arithmetic)),
    (lax.clamp, 3, NUMBER),
]


def compare_elementwise(op, arity, dtypes):
    """Compares all pairs of values, of all dtypes in one executable."""
    rng = np.random.default_rng(0)
    columns = []
    for dtype in dtypes:
        values = edges(dtype, rng, {1: 3000, 2: 40, 3: 5}[arity])
        each = zip(*itertools.product(values, repeat=arity), strict=True)
        columns.append([np.array(column) for column in each])

    def fn(columns):
        return [op(*arrays) for arrays in columns]

    row = [[S((), array.dtype) for array in arrays] for arrays in columns]
    assert_same(on_host_rows(fn, row)(columns), jax.jit(fn)(columns))


def name_of(case):
    return getattr(case, "__name__", "")


@pytest.mark.parametrize("op, arity, dtypes", ELEMENTWISE, ids=name_of)
def test_an_operation_has_the_bits_of_xla(op, arity, dtypes):
    compare_elementwise(op, arity, dtypes.split())


WIDE = {"int32": ["int64", "int16", "int8"], "uint32": ["uint64", "uint8"], "float32": ["float64"]}


@pytest.mark.slow
@pytest.mark.parametrize("op, arity, dtypes", ELEMENTWISE, ids=name_of)
def test_an_operation_of_64_bits_has_the_bits_of_xla(op, arity, dtypes):
    with jax.enable_x64(True):
        wide = [other for dtype in dtypes.split() for other in WIDE.get(dtype, ())]
        compare_elementwise(op, arity, wide)


def compare_conversions(old, dtypes):
    values = edges(old, np.random.default_rng(1), 3000)

    def convert(x):
        return [lax.convert_element_type(x, new) for new in dtypes]

    assert_same(on_host_rows(convert, S((), old))(values), jax.jit(convert)(values))


@pytest.mark.parametrize("old", ANY.split())
def test_a_conversion_has_the_bits_of_xla(old):
    compare_conversions(old, ["bool", "int8", "uint8", "int32", "uint32", "float32"])


@pytest.mark.slow
@pytest.mark.parametrize("old", ["bool", "int8", "int64", "uint64", "float32", "float64"])
def test_a_conversion_of_64_bits_has_the_bits_of_xla(old):
    with jax.enable_x64(True):
        wide = ["int16", "uint16", "int32", "int64", "uint64", "float32", "float64"]
        compare_conversions(old, wide)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_floats_are_copied_compared_and_converted(dtype):
    half = jnp.dtype(dtype)

    def fn(x, y):
        return {
            "wide": x.astype(F),
            "narrow": (x.astype(F) + y.astype(F)).astype(half),
            "less": x < y,
            "some": jnp.where(x == y, x, y),
            "finite": jnp.isfinite(x),
            "both": jnp.stack([x, y]),
        }

    bits = np.random.default_rng(2).integers(0, 2**16, (2, 4000), np.uint16).view(half)
    bits = np.where(np.abs(bits.astype(F)) < 2e-14, np.zeros((), half), bits)
    host = on_host_rows(fn, S((), half), S((), half))(*bits)
    for row in range(0, 4000, 1000):
        one = jax.tree.map(lambda v, row=row: v[row : row + 1].reshape(v.shape[1:]), host)
        with jax.disable_jit():
            assert_same(one, fn(jnp.asarray(bits[0, row]), jnp.asarray(bits[1, row])))


CONSTANT = np.arange(6, dtype=np.float32).reshape(2, 3)

SHAPES = {
    "argmax": lambda x, n: (jnp.argmax(x, 1), lax.argmin(x, 0, jnp.int32)),
    "bitcast": lambda x, n: (
        lax.bitcast_convert_type(x, U),
        lax.bitcast_convert_type(x, jnp.uint16),
        lax.bitcast_convert_type(lax.bitcast_convert_type(n, jnp.int16), F),
    ),
    "broadcast": lambda x, n: (jnp.broadcast_to(x[:, None], (2, 4, 3)), jnp.full((3, 2), n[1])),
    "clamp": lambda x, n: (jnp.clip(x, -1, 1), lax.clamp(x[0, 0], x, x[1, 1])),
    "concatenate": lambda x, n: (jnp.concatenate([x, CONSTANT], 1), jnp.stack([n, n[::-1]])),
    "constant": lambda x, n: (CONSTANT, jnp.arange(4), jnp.ones((2, 2), jnp.bool_), 3, n),
    "cumsum": lambda x, n: (lax.cumsum(n), lax.cumsum(n.astype(jnp.int8), reverse=True)),
    "index": lambda x, n: (x[1], x[-1, 0], x[:, ::2], x[0:0], n[1:3]),
    "iota": lambda x, n: (lax.broadcasted_iota(I, (2, 3), 1), n + jnp.arange(4, dtype=I)),
    "literal": lambda x, n: (x * 2, 1 - x, jnp.where(n > 0, n, 0), x > 0.5),
    "pad": lambda x, n: (jnp.pad(x, [(0, 1), (2, 0)]), lax.pad(n, n[0], [(1, 1, 0)])),
    "power": lambda x, n: (x**2, n**2),
    "reduce": lambda x, n: (jnp.max(n), jnp.min(n), jnp.all(x > 0, 1), jnp.any(x > 0)),
    "reshape": lambda x, n: (x.reshape(3, 2), x.reshape(-1), x[None, :, None], x.T, x[:, 0]),
    "reverse": lambda x, n: (jnp.flip(x), jnp.flip(x, 1), n[::-1]),
    "scalars": lambda x, n: (jnp.where(n[0] > 0, x, x[0, 0]), x * x[1, 2], jnp.maximum(x, x[0, 1])),
    "sum": lambda x, n: (jnp.sum(n), jnp.sum(n.astype(jnp.int8), dtype=jnp.int8)),
    "transpose": lambda x, n: jnp.transpose(x[None], (2, 0, 1)),
    "tree": lambda x, n: {
        "pair": (x, n),
        "exact": ExactRatio(ExactInt((n, n)), zero_int(num_limbs=2)),
    },
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_and_reductions_have_the_bits_of_xla_for_any_number_of_rows(name):
    fn = SHAPES[name]
    rng = np.random.default_rng(3)
    x = rng.choice(edges(F, rng, 20), (5, 2, 3))
    n = rng.choice(edges(I, rng, 20), (5, 4))
    if name in ("broadcast", "scalars", "concatenate"):
        x = np.nan_to_num(x)
    evaluate = on_host_rows(fn, S((2, 3), F), S((4,), I))
    single = on_host(fn, S((2, 3), F), S((4,), I))
    if name == "index" and evaluate is None:
        pytest.skip("JAX before 0.9 gathers, which the host does not do")
    five = evaluate(x, n)
    assert_same(evaluate(x[:0], n[:0]), jax.tree.map(lambda v: v[:0], five))
    compiled = jax.jit(lambda x, n: jax.tree.map(jnp.asarray, fn(x, n)))
    for i in range(5):
        row = jax.tree.map(lambda v, i=i: v[i : i + 1].reshape(v.shape[1:]), five)
        assert_same(row, compiled(x[i], n[i]))
        assert_same(single(x[i], n[i]), compiled(x[i], n[i]))
        for many in (1, 3):
            several = evaluate(x[i : i + many], n[i : i + many])
            first = jax.tree.map(lambda v: v[:1].reshape(v.shape[1:]), several)
            assert_same(first, row)


def test_every_rule_is_tested():
    covered = set()

    def note(jaxpr):
        for equation in jaxpr.eqns:
            covered.add(equation.primitive.name)
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    note(inner)

    for fn in SHAPES.values():
        note(jax.make_jaxpr(fn)(np.zeros((2, 3), F), np.zeros(4, I)).jaxpr)
    for op, arity, dtypes in ELEMENTWISE:
        note(jax.make_jaxpr(op)(*[S((), dtypes.split()[-1])] * arity).jaxpr)
    # Copies, and a primitive that JAX before 0.9 does not have.
    copies = {"copy", "copy_p", "convert_element_type", "stop_gradient", "stack"}
    assert set(RULES) - covered <= copies


OPERATIONS = {
    "add": lambda x, y, n, m: (x + y, n + m),
    "subtract": lambda x, y, n, m: (x - y, n - m),
    "multiply": lambda x, y, n, m: (x * y, n * m),
    "divide": lambda x, y, n, m: (x / y, lax.div(n, m)),
    "root": lambda x, y, n, m: (jnp.sqrt(x), n >> 1),
    "larger": lambda x, y, n, m: (jnp.maximum(x, y), jnp.minimum(n, m)),
    "where": lambda x, y, n, m: (jnp.where(n < m, x, y), jnp.where(x < y, n, m)),
    "bits": lambda x, y, n, m: (-x, n ^ m | 5),
    "reverse": lambda x, y, n, m: (jnp.concatenate([x[1:], y[:1]]), m[::-1]),
    "or one": lambda x, y, n, m: (jnp.where(jnp.isnan(x), 1, x), jnp.where(m == 0, 7, m)),
}


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 9)), max_size=6),
    st.integers(0, 2**32 - 1),
)
def test_compositions_have_the_bits_of_xla_op_by_op(ops, seed):
    def fn(x, y, n, m):
        floats, ints = [x, y], [n, m]
        for name, pick in ops:
            chosen = (floats[pick % len(floats)], floats[-1], ints[pick % len(ints)], ints[-1])
            x, n = OPERATIONS[name](*chosen)
            floats.append(x)
            ints.append(n)
        return floats, ints

    rng = np.random.default_rng(seed)
    x, y = rng.choice(np.float32([0, -0.0, 1, -1, np.nan, np.inf, 0.1, 3, 1e10, 0.7]), (2, 4, 3))
    n, m = rng.choice(edges(I, rng, 5), (2, 4, 3))
    rows = on_host_rows(fn, *[S((3,), F)] * 2, *[S((3,), I)] * 2)(x, y, n, m)
    assume(all(np.array_equal(v, flushed(v), equal_nan=True) for v in rows[0]))
    with jax.disable_jit():
        for i in range(4):
            row = jax.tree.map(lambda v, i=i: v[i], rows)
            assert_same(row, fn(*(jnp.asarray(v[i]) for v in (x, y, n, m))))


ROUNDED_TWICE = {
    "exp": jnp.exp,
    "tanh": jnp.tanh,
    "power": lambda x: x**3,
    "reciprocal root": lax.rsqrt,
    "sum": jnp.sum,
    "mean": jnp.mean,
    "dot": lambda x: x @ x,
    "running sum": jnp.cumsum,
    "inside jit": lambda x: jax.jit(jnp.log)(x) + 1,
    "inside custom_jvp": jax.nn.relu6,
    "remainder": lambda x: lax.rem(x, x),
    "half": lambda x: x.astype(jnp.float16) + jnp.float16(1),
    "half to int": lambda x: x.astype(jnp.float16).astype(jnp.int32),
    "away from zero": lax.round,
    "complex": lambda x: lax.complex(x, x),
    "sort": jnp.sort,
    "largest": jnp.max,
    "gather": lambda x: x[lax.convert_element_type(x, jnp.int32)],
    "dynamic": lambda x: lax.dynamic_slice(x, (x[0].astype(jnp.int32),), (1,)),
    "loop": lambda x: lax.fori_loop(0, 3, lambda i, x: x + 1, x),
    "branch": lambda x: lax.cond(x[0] > 0, lambda: x, lambda: -x),
    "key": lambda x: jax.random.key(0),
    "random": lambda x: x + jax.random.uniform(jax.random.key(0)),
    "print": lambda x: (jax.debug.print("{}", x), x)[1],
    "callback": lambda x: jax.pure_callback(np.negative, S(x.shape, x.dtype), x),
    "small": lambda x: x.astype(jnp.float8_e4m3fn),
    "negative pad": lambda x: lax.pad(x, 0.0, [(-1, 0, 0)]),
    "interior pad": lambda x: lax.pad(x, 0.0, [(0, 0, 1)]),
    "several": lambda x: lax.select_n(x.astype(jnp.int32), x, x, x),
}


@pytest.mark.parametrize("name", sorted(ROUNDED_TWICE.keys() - {"inside custom_jvp"}))
def test_anything_else_is_not_evaluated_here(name):
    assert on_host_rows(ROUNDED_TWICE[name], S((4,), F)) is None
    assert on_host(ROUNDED_TWICE[name], S((4,), F)) is None


def test_calls_are_inlined():
    @jax.custom_jvp
    def twice(x):
        return x + x

    twice.defjvps(lambda t, ans, x: t + t)

    @jax.custom_vjp
    def thrice(x):
        return jax.checkpoint(lambda x: jax.jit(twice)(x) + x)(x)

    thrice.defvjp(lambda x: (thrice(x), None), lambda _, g: (3 * g,))
    evaluate = on_host(lambda x: (thrice(x), lax.stop_gradient(x)), S((2,), F))
    assert_same(evaluate(np.array([1, 2], F)), (np.array([3, 6], F), np.array([1, 2], F)))


def test_results_have_memory_of_their_own():
    def fn(x):
        return x, x[1:], x.reshape(3, 1), jnp.zeros(2), CONSTANT

    evaluate = on_host_rows(fn, S((3,), F))
    x = np.ones((2, 3), F)
    first = evaluate(x)
    for value in first:
        assert not np.shares_memory(value, x)
        value[...] = 7
    assert_same(evaluate(x)[3:], (np.zeros((2, 2), F), np.stack([CONSTANT] * 2)))
    assert CONSTANT[0, 1] == 1
    fresh = on_host(lambda: jnp.zeros(2))
    fresh()[...] = 7
    assert_same(fresh(), np.zeros(2, F))


def test_subnormal_numbers_are_kept():
    x = np.array([2e-38], F)
    half = on_host(lambda x: x / 4, S((1,), F))(x)
    assert half == F(5e-39)


# --- metrics -------------------------------------------------------------------------------------

NOT_ON_HOST = {("multiclass_generalized_dice_loss", None)}
"""Its value is a sum of floats over the classes."""


def outputs_for(name):
    """Shapes of targets and predictions that a metric takes, without and with weights."""
    y, scores = S((8,), F), S((8, 3), F)
    if name == "connectionist_temporal_classification":
        padding = S((8, 7), F), S((8, 5), F)
        y_true, y_pred = [S((8, 5), I), padding[1]], [S((8, 7, 4), F), padding[0]]
        return [{"y_true": y_true, "y_pred": y_pred}]
    return [
        {"y_true": y, "y_pred": y},
        {"y_true": S((8,), I), "y_pred": scores},
        {"y_true": scores, "y_pred": scores},
        {"y_true": y, "y_pred": [y, y]},
    ]


def bound(name, accumulate, weights):
    """The metric, bound to the first outputs that it takes, or None."""
    for outputs in outputs_for(name):
        if weights is not None:
            outputs = {**outputs, "sample_weight": S((8,), weights)}
        try:
            return bind([declare(name, None, accumulate)], outputs, {}, None)
        except Exception:  # other shapes, or no weights, or none of these reductions
            continue
    return None


def compare_metric(name, accumulate, weights):
    """Returns whether the metric is bound and has values on the host, and compares these."""
    metrics = bound(name, accumulate, weights)
    if metrics is None:
        return False
    assert_same(on_host(metrics.init)(), metrics.init())
    accumulators = jax.eval_shape(metrics.init)
    evaluate = on_host_rows(metrics.compute, accumulators)
    assert (evaluate is None) == ((name, accumulate) in NOT_ON_HOST)
    if evaluate is None:
        return False
    rng = np.random.default_rng(4)
    rows = jax.tree.map(
        lambda a: rng.choice(edges(a.dtype, rng, 5)[:18], (6, *a.shape)), accumulators
    )
    six = evaluate(rows)
    for i in range(6):
        row = jax.tree.map(lambda v, i=i: v[i : i + 1].reshape(v.shape[1:]), six)
        one = evaluate(jax.tree.map(lambda v, i=i: v[i : i + 1], rows))
        assert_same(jax.tree.map(lambda v: v.reshape(v.shape[1:]), one), row)
        if i < 2:
            arrays = jax.tree.map(lambda v, i=i: jnp.asarray(v[i]), rows)
            assert_same(row, metrics.compute(arrays))
    return True


@pytest.mark.parametrize("name", names())
def test_a_built_in_metric_is_evaluated_on_the_host(name):
    compare_metric(name, None, None)


@pytest.mark.parametrize("weights", [None, F, I])
@pytest.mark.parametrize("accumulate", [*reductions.NAMES, window(2), lambda a, o, i: a + o])
def test_a_reduction_is_evaluated_on_the_host(accumulate, weights):
    for name in ("mean_squared_error", "true_positives"):
        assert compare_metric(name, accumulate, weights)


@pytest.mark.slow
@pytest.mark.parametrize("weights", [None, F, I, jnp.bool_])
def test_all_built_in_metrics_are_evaluated_on_the_host(weights):
    modes = (None, *reductions.NAMES, window(5))
    compared = sum(compare_metric(name, mode, weights) for name in names() for mode in modes)
    assert compared > 250


def test_the_values_of_several_metrics_have_the_bits_of_the_compiled_ones():
    each = [("accuracy", None), ("precision", None), ("true_positives", None)]
    each += [("mean_squared_error", mode) for mode in (*reductions.NAMES, window(3))]
    specs = [declare(name, f"{name} {mode}", mode) for name, mode in each]
    y = np.array([0, 1, 1, 0.3], F)
    outputs = {"y_true": y, "y_pred": y[::-1] * F(0.7)}
    metrics = bind(specs, outputs, {}, None)
    update = jax.jit(lambda a: metrics.update(a, outputs, {}, None))
    accs = [metrics.init()]
    for _ in range(5):
        accs.append(update(accs[-1]))
    rows = jax.tree.map(lambda *leaves: np.stack(leaves), *accs)
    compiled = jax.jit(metrics.compute)
    evaluate = on_host_rows(metrics.compute, accs[0])
    with counting() as counts:
        six = evaluate(rows)
    assert not counts
    for i, acc in enumerate(accs):
        row = jax.tree.map(lambda v, i=i: v[i : i + 1].reshape(v.shape[1:]), six)
        assert_same(row, compiled(acc))
