"""The FLOPs of a step, the peak rates of devices, and the utilization."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxloop as jl
from jaxloop._core.state import Snapshot
from jaxloop._core.times import EpochTime
from jaxloop._engine.peaks import peak_of
from jaxloop._program.flops import count_flops

pytestmark = pytest.mark.slow  # CI counts their coverage all the same


def count(fn, *shapes, dtype=jnp.float32):
    arguments = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
    return count_flops(jax.make_jaxpr(fn)(*arguments))


def test_matrix_products():
    assert count(jnp.matmul, (3, 5), (5, 7)).flops == 2 * 3 * 5 * 7
    assert count(jnp.matmul, (4, 3, 5), (4, 5, 7)).flops == 4 * 2 * 3 * 5 * 7
    assert count(jnp.dot, (9,), (9,)).flops == 18
    assert count(jnp.tanh, (3, 5)).flops == 0
    assert count(jnp.matmul, (3, 5), (5, 7), dtype=jnp.bfloat16).dtype == "bfloat16"


def test_a_training_step_is_three_forward_passes():
    def loss(w, x):
        return jnp.sum(jnp.tanh(x @ w))

    step = jax.grad(loss, argnums=(0, 1))
    assert count(step, (64, 32), (16, 64)).flops == 3 * 2 * 16 * 64 * 32


def test_loops():
    def scanned(w, x):
        return lax.scan(lambda c, _: (c @ w, None), x, None, length=10)[0]

    exact = count(scanned, (8, 8), (4, 8))
    assert (exact.flops, exact.is_exact) == (10 * 2 * 4 * 8 * 8, True)
    assert count(jax.jit(scanned), (8, 8), (4, 8)) == exact
    endless = count(
        lambda w, x: lax.while_loop(lambda c: jnp.sum(c) < 9, lambda c: c @ w, x), (8, 8), (4, 8)
    )
    assert (endless.flops, endless.is_exact) == (2 * 4 * 8 * 8, False)

    def branch(w, x):
        return lax.cond(jnp.sum(x) > 0, lambda: x @ w, lambda: x)

    assert count(branch, (8, 8), (4, 8)).flops == 2 * 4 * 8 * 8
    assert not count(branch, (8, 8), (4, 8)).is_exact


CONVOLUTIONS = [
    {"window_strides": (1, 1), "padding": "SAME"},
    {"window_strides": (2, 3), "padding": "SAME"},
    {"window_strides": (1, 1), "padding": "VALID", "rhs_dilation": (2, 1)},
    {"window_strides": (1, 1), "padding": [(2, 1), (0, 3)], "lhs_dilation": (2, 3)},
    {"window_strides": (2, 1), "padding": [(5, 5), (-1, 2)]},
]


@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_convolutions_count_as_xla_does(options):
    left, kernel = (2, 3, 9, 8), (4, 3, 3, 2)
    fn = lambda a, b: lax.conv_general_dilated(a, b, **options)  # noqa: E731
    lowered = jax.jit(fn).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in (left, kernel)))
    assert count(fn, left, kernel).flops == lowered.cost_analysis()["flops"]


def test_grouped_convolutions_and_their_gradients_count_as_xla_does():
    def fn(a, b):
        return lax.conv_general_dilated(a, b, (2, 2), "SAME", feature_group_count=2)

    def gradients(a, b):
        out, back = jax.vjp(fn, a, b)
        return out, back(jnp.ones(out.shape))

    left, kernel = (2, 4, 9, 8), (6, 2, 3, 3)
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (left, kernel)]
    for one, times in ((fn, 1), (gradients, 3)):
        flops = count(one, left, kernel).flops
        assert flops == jax.jit(one).lower(*shapes).cost_analysis()["flops"]
        assert flops == times * count(fn, left, kernel).flops


def make(**options):
    model = (lambda key, x: jnp.ones((64, 32)), lambda w, x: x @ w)
    return jl.trainer(model, "mean_squared_error", "sgd", log=0, **options)


@functools.cache
def report_of():
    return make().check(DATA)


DATA = [(np.ones((16, 64), np.float32), np.ones((16, 32), np.float32))] * 4


def test_the_report_has_them():
    report = report_of()
    assert report.model_flops == 2 * 2 * 16 * 64 * 32  # forward, and the gradient of w
    assert report.flops_per_example == report.model_flops / 16
    assert report.num_devices == 1 and report.device_kind == jax.devices()[0].device_kind
    assert report.flops_are_exact and report.peak_flops is None
    assert "1.311e+05 FLOPs a step, 8192 per example" in str(report)
    assert "peak unknown" in str(report)


def test_micro_batches_count_each():
    assert make(accumulate_gradients=4).check(DATA).model_flops == report_of().model_flops


def test_a_step_without_data():
    report = jl.loop(lambda batch, w: w @ w).check(None, jnp.ones((4, 4)), iterations=3)
    assert report.model_flops == 128 and report.flops_per_example is None
    assert "per example" not in str(report)


def test_utilization():
    loop = make()
    report, state = report_of(), loop.final_state(DATA, epochs=3)
    assert report.utilization(0.5, peak_flops=report.model_flops) == 2.0
    measured = report.utilization(state, peak_flops=1e12)
    seconds = report.model_flops / (measured * 1e12)
    assert 0 < seconds * 12 <= sum(state.times.values()) * (1 + 1e-9)


def test_utilization_leaves_out_compiling_validation_and_saves():
    report = report_of()
    time = EpochTime(
        10.0, data_s=1, dispatch_s=1, handlers_s=1, compile_s=2, validation_s=3, saves_s=1
    )
    records = jl.State().replace(times={0: time, 1: 6.0}).lazy_times
    ended = Snapshot(epoch=2, step=10, lazy_times=records)  # 4 + 6 seconds
    assert report.utilization(ended, peak_flops=1.0) == pytest.approx(report.model_flops)
    inside = Snapshot(epoch=2, iteration=3, step=13, lazy_times=records)
    assert report.utilization(inside, peak_flops=1.0) == pytest.approx(report.model_flops)
    at_end = Snapshot(epoch=1, iteration=5, step=10, lazy_times=records)
    assert report.utilization(at_end, peak_flops=1.0) == pytest.approx(report.model_flops)


def test_utilization_says_what_is_missing():
    report = report_of()
    with pytest.raises(jl.errors.ArgumentError, match="peak rate of 1 x"):
        report.utilization(0.1)
    with pytest.raises(jl.errors.ArgumentError, match="finished an epoch"):
        report.utilization(Snapshot(step=3, iteration=3), peak_flops=1e12)
    with pytest.raises(jl.errors.ArgumentError, match="must have matrix multiplications"):
        jl.loop(lambda b, s: s + b).check([1.0], 0.0).utilization(0.1, peak_flops=1e12)
    for seconds in (0.0, -1.0, float("nan")):
        with pytest.raises(jl.errors.ArgumentError, match="must be positive"):
            report.utilization(seconds, peak_flops=1e12)


@pytest.mark.parametrize(
    "kind, dtype, tera",
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 PCIe", "bfloat16", 756.0),
        ("NVIDIA H200", "float32", 494.7),
        ("NVIDIA A100-SXM4-40GB", "float16", 312.0),
        ("NVIDIA L4", "bfloat16", 121.0),
        ("NVIDIA L40S", "bfloat16", 362.0),
        ("NVIDIA L40", "bfloat16", None),
        ("Tesla T4", "bfloat16", None),
        ("Tesla V100-SXM2-16GB", "float16", 125.0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
        ("TPU v5 lite", "bfloat16", 197.0),
        ("TPU v4", "float64", None),
        ("cpu", "float32", None),
        ("NVIDIA GeForce RTX 4090", "", None),
    ],
)
def test_peaks(kind, dtype, tera):
    found = peak_of(kind, dtype)
    assert found is None if tera is None else found == pytest.approx(tera * 1e12)
