"""Schedules by name, and optimizers by name with a rate of one's own."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxloop as jl
from jaxloop.optimizers import DEFAULT_LEARNING_RATES, SCHEDULES, get, schedule

pytestmark = pytest.mark.slow  # CI counts their coverage all the same

STEPS = np.arange(0, 131, 3)

SAME = {
    "constant": (("constant", 0.3), optax.constant_schedule(0.3)),
    "linear": (("linear_decay", 0.3, 100), optax.linear_schedule(0.3, 0.0, 100)),
    "linear to an end": (
        ("linear_decay", 0.3, 100, {"end": 0.1}),
        optax.linear_schedule(0.3, 0.1, 100),
    ),
    "cosine": (("cosine_decay", 0.3, 100), optax.cosine_decay_schedule(0.3, 100)),
    "warmup and cosine": (
        ("cosine_decay", 0.3, 100, {"warmup": 20, "end": 0.01}),
        optax.warmup_cosine_decay_schedule(0.0, 0.3, 20, 100, 0.01),
    ),
    "exponential": (
        ("exponential_decay", 0.3, 100, {"end": 0.003}),
        optax.exponential_decay(0.3, 100, 0.01, end_value=0.003),
    ),
    "polynomial": (
        ("polynomial_decay", 0.3, 100, {"power": 3, "end": 0.1}),
        optax.polynomial_schedule(0.3, 0.1, 3, 100),
    ),
    "one cycle": (("one_cycle", 0.3, 100), optax.cosine_onecycle_schedule(100, 0.3)),
    "inverse square root": (
        ("inverse_sqrt_decay", 0.3, None, {"warmup": 20}),
        lambda step: 0.3 * jnp.minimum(step / 20, (20 / jnp.maximum(step, 1)) ** 0.5),
    ),
}


def made(name, rate, steps=None, options=()):
    return schedule(name, rate, steps, **dict(options))


@pytest.mark.parametrize("name", SAME)
def test_schedules_are_those_of_optax(name):
    arguments, other = SAME[name]
    mine = made(*arguments)
    found = jax.jit(jax.vmap(mine))(jnp.asarray(STEPS))
    assert found.dtype == np.float32 and found.shape == STEPS.shape
    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it
        want = jax.jit(jax.vmap(other))(jnp.asarray(STEPS))
    np.testing.assert_allclose(found, want, rtol=2e-5, atol=3e-7)
    one = mine(21)
    assert (one.dtype, one.shape) == (np.float32, ())
    np.testing.assert_allclose(one, found[7], rtol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_name_rises_and_falls(name):
    rate = schedule(name, 1.0, 100, warmup=10)
    values = np.asarray(jax.jit(jax.vmap(rate))(jnp.arange(120)))
    assert np.all(np.diff(values[:11]) > 0) and values[10] == values.max() == 1.0
    assert np.all(np.diff(values[10:]) <= 0) and np.isfinite(values).all() and values.min() >= 0


def test_a_schedule_is_a_value():
    one, two = (schedule("cosine_decay", 1e-3, 100, warmup=10) for _ in range(2))
    assert one == two and hash(one) == hash(two) and one != schedule("cosine_decay", 1e-3, 101)
    assert pickle.loads(pickle.dumps(one)) == one
    assert dataclasses.asdict(one)["warmup"] == 10
    assert "cosine_decay" in repr(one)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (("cosine", 0.1, 10), {}, "unknown schedule 'cosine'; did you mean 'cosine_decay'"),
        (("xyz", 0.1, 10), {}, "polynomial_decay"),
        (("cosine_decay", 0.1), {}, "needs steps"),
        (("inverse_sqrt_decay", 0.1), {}, "needs warmup"),
        (("cosine_decay", 0.1, 0), {}, "steps must be at least 1, got 0"),
        (("cosine_decay", 0.1, 10.0), {}, "steps must be a whole number"),
        (("cosine_decay", 0.1, 10), {"warmup": 10}, r"warmup must be below steps \(10\), got 10"),
        (("cosine_decay", 0.1, 10), {"warmup": -1}, "warmup must be at least 0"),
        (("cosine_decay", -0.1, 10), {}, "rate must be finite and at least 0, got -0.1"),
        (("cosine_decay", float("nan"), 10), {}, "rate must be finite"),
        (("cosine_decay", "0.1", 10), {}, "rate must be a number"),
        (("cosine_decay", True, 10), {}, "rate must be a number"),
        (("cosine_decay", 0.1, 10), {"end": float("inf")}, "end must be finite"),
        (("exponential_decay", 0.1, 10), {"end": 0.0}, "must have a rate and an end above 0"),
        (("exponential_decay", 0.0, 10), {}, "must have a rate and an end above 0"),
        (("polynomial_decay", 0.1, 10), {"power": -1}, "power must be finite and at least 0"),
    ],
)
def test_mistakes(arguments, options, message):
    with pytest.raises(jl.JaxloopError, match=message):
        schedule(*arguments, **options)


# --- optimizers with a rate ----------------------------------------------------------------------

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
DATA = [(X, X.sum(1, keepdims=True))] * 5
MODEL = (lambda key, x: jnp.ones((3, 1)), lambda w, x: x @ w)


def trained(optimizer, **options):
    loop = jl.trainer(MODEL, "mean_squared_error", optimizer, log=0, **options)
    return loop, loop.final_state(DATA, epochs=4)


def test_a_rate_of_ones_own():
    def updated(optimizer):
        params = jnp.asarray([1.0, -2.0])
        state = optimizer.init(params)
        for _ in range(2):
            updates, state = optimizer.update(params, state, params)
            params = optax.apply_updates(params, updates)
        return params

    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it
        named = jax.jit(lambda: updated(get("adam", 0.05)))()
        of_optax = jax.jit(lambda: updated(optax.adam(0.05)))()
    np.testing.assert_array_equal(named, of_optax)


@pytest.mark.parametrize("name", DEFAULT_LEARNING_RATES)
def test_every_named_optimizer_takes_a_schedule(name):
    rate = schedule("linear_decay", 0.1, 4)
    optimizer, params = get(name, rate), jnp.ones(3)
    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it
        updates, state = jax.jit(lambda: optimizer.update(params, optimizer.init(params), params))()
    assert updates.shape == (3,)
    assert float(rate(0)) in [float(x) for x in jax.tree.leaves(state.hyperparams)]


@pytest.mark.slow
def test_a_schedule_trains_as_in_optax_and_its_rate_is_reported():
    rate = schedule("cosine_decay", 0.1, 20, warmup=5)
    _, other = trained(optax.adam(optax.warmup_cosine_decay_schedule(0.0, 0.1, 5, 20)))
    loop = jl.trainer(
        MODEL, "mean_squared_error", get("adam", rate), report=("learning_rate",), log=0
    )
    state = loop.metric("learning_rate").final_state(DATA, epochs=4)
    np.testing.assert_allclose(
        state.step_state["model_state"], other.step_state["model_state"], rtol=1e-5
    )
    seen = state.history
    for epoch in range(4):
        want = jnp.mean(jax.vmap(rate)(jnp.arange(5 * epoch, 5 * epoch + 5)))
        np.testing.assert_allclose(seen[epoch]["learning_rate"], want, rtol=1e-5)


def test_a_resumed_run_continues_the_schedule():
    rate = schedule("cosine_decay", 0.1, 20)
    loop, whole = trained(get("sgd", rate))
    half = loop.final_state(DATA, epochs=2)
    resumed = loop.from_state(half).final_state(DATA, epochs=4)
    np.testing.assert_array_equal(
        resumed.step_state["model_state"], whole.step_state["model_state"]
    )


@pytest.mark.parametrize(
    "optimizer, rate, message",
    [
        (optax.adam(1e-3), 0.1, "with the name of an optimizer, got it with a Gradient"),
        ("adam", "fast", "learning_rate must be a number, got 'fast'"),
        ("adam", True, "learning_rate must be a number"),
        ("adam", -1.0, "learning_rate must be finite and at least 0, got -1.0"),
        ("adam", float("nan"), "learning_rate must be finite"),
        ("adamm", 0.1, "did you mean 'adam'"),
    ],
)
def test_rates_that_are_none(optimizer, rate, message):
    with pytest.raises(jl.JaxloopError, match=message):
        get(optimizer, rate)
