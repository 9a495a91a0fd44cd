"""The learning rate range test: what it measures, what it says, and that it changes nothing."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxloop as jl

pytestmark = pytest.mark.slow  # CI counts their coverage all the same

MODEL = (lambda key, x: jnp.full((1, 1), 3.0), lambda w, x: x @ w)
X = np.linspace(-1, 1, 64, dtype=np.float32)[:, None]
DATA = jl.batches((X, 2 * X), 16, shuffle=True)


def make(optimizer="sgd"):
    return jl.trainer(MODEL, "mean_squared_error", optimizer, log=0)


SGD = make()  # its compiled steps are shared
WHOLE = [(X, 2 * X)]


def test_the_rates_and_losses_are_those_of_a_hand_written_loop():
    test = SGD.find_learning_rate(DATA, num_steps=20, highest=1e-2)
    assert test.is_absolute and not test.diverged
    np.testing.assert_allclose(test.rates, np.geomspace(1e-7, 1e-2, 20))
    assert test.losses.shape == test.smoothed.shape == (20,)
    rates, w, losses = test.rates, np.float32(3.0), []
    whole = SGD.find_learning_rate(WHOLE, num_steps=20, highest=1e-2)
    for rate in rates:
        w = w - np.float32(rate) * np.mean(2 * X * (X * w - 2 * X))
        losses.append(np.mean((2 * X - X * w) ** 2))
    np.testing.assert_allclose(whole.losses, losses, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer, rate, is_absolute",
    [
        ("sgd", None, True),
        (optax.sgd(0.01), 0.01, True),
        (optax.inject_hyperparams(optax.sgd)(learning_rate=0.05), None, True),
        (optax.sgd(0.01), None, False),
    ],
)
def test_absolute_rates_and_multiples(optimizer, rate, is_absolute):
    test = make(optimizer).find_learning_rate(WHOLE, num_steps=40, optimizer_rate=rate)
    assert test.is_absolute is is_absolute
    assert test.rates[0] == (1e-7 if is_absolute else 1e-4)
    assert ("times the optimizer's own learning rate" in repr(test)) is not is_absolute
    found = test.suggestion * (1 if is_absolute else 0.01)
    assert 0.05 < found < 3.1  # from 3 on, the steps overshoot: the curvature is 2/3


def test_a_schedule_is_told():
    optimizers = [
        optax.sgd(optax.constant_schedule(0.1)),
        optax.inject_hyperparams(optax.sgd)(learning_rate=optax.constant_schedule(0.1)),
    ]
    for optimizer in optimizers:
        with pytest.warns(UserWarning, match="follows a schedule"):
            test = make(optimizer).find_learning_rate(DATA, num_steps=10, optimizer_rate=0.1)
        assert not test.is_absolute


def test_it_stops_when_the_loss_diverges():
    test = SGD.find_learning_rate(WHOLE, highest=1e4, num_steps=60)
    assert test.diverged and len(test.rates) < 60 and "diverged" in repr(test)
    assert np.all(np.isfinite(test.losses)) and test.suggestion < 10


def test_no_suggestion_without_a_descent():
    test = SGD.find_learning_rate(DATA, lowest=1e-12, highest=1e-11, num_steps=30)
    assert test.suggestion is None and "none" in repr(test)
    test.plot()


def test_no_suggestion_from_noise_alone():
    model = (lambda key, x: jnp.zeros(()), lambda w, x: 0.0 * w * x)
    loop = jl.trainer(model, "mean_absolute_error", "sgd", log=0)
    for seed in range(8):
        noise = 1.0 + np.random.default_rng(seed).uniform(size=(101, 1)).astype(np.float32)
        assert loop.find_learning_rate(list(zip(noise, noise, strict=True))).suggestion is None


def test_it_changes_nothing():
    seen = []
    loop = (
        SGD.metric("mean_absolute_error")
        .observe("all", seen.append)
        .handle("epoch_completed", lambda state: ("halt_loop", state))
        .validate([(X, X)])
    )
    before = loop.run(DATA, epochs=3)
    num_seen = len(seen)
    text, attachments = repr(loop), loop.attachments
    loop.find_learning_rate(DATA, num_steps=12)
    assert len(seen) == num_seen
    assert repr(loop) == text and loop.attachments == attachments
    np.testing.assert_array_equal(before, loop.run(DATA, epochs=3))


def test_it_shares_the_compiled_step():
    traces = []

    def apply(w, x):
        traces.append(1)
        return x @ w

    loop = jl.trainer((MODEL[0], apply), "mean_squared_error", "sgd", log=0)
    loop.find_learning_rate(DATA, num_steps=10)
    num = len(traces)
    loop.run(DATA)
    assert len(traces) == num


def test_an_init_state_is_the_beginning():
    test = SGD.find_learning_rate(WHOLE, jnp.full((1, 1), 2.0), num_steps=10)
    assert np.max(np.abs(test.losses)) < 1e-9  # 2 is the solution


def test_a_loss_that_is_nan_from_the_start():
    with pytest.raises(jl.errors.StructureError, match="finite"):
        SGD.find_learning_rate([(X * np.nan, X)], num_steps=10)


def test_wrong_arguments():
    with pytest.raises(jl.errors.ArgumentTypeError, match="jl.trainer"):
        jl.loop(lambda b, s: s).find_learning_rate([1])
    with pytest.raises(jl.errors.ArgumentTypeError, match="jl.trainer"):
        jl.evaluator(MODEL, "mean_squared_error").find_learning_rate(DATA)
    wrong = [
        ({"num_steps": 9}, "at least 10"),
        ({"lowest": 1.0, "highest": 0.1}, "less than highest"),
        ({"lowest": 0.0}, "positive"),
        ({"highest": float("inf")}, "positive and finite"),
        ({"optimizer_rate": "fast"}, "must be a number"),
    ]
    for arguments, message in wrong:
        with pytest.raises(jl.errors.JaxloopError, match=message):
            SGD.find_learning_rate(DATA, **arguments)
    position = iter([(X, X)] * 30)
    with pytest.raises(jl.errors.ArgumentError, match="one-shot"):
        SGD.find_learning_rate(position)
    assert len(list(position)) == 30


def test_the_plot():
    test = SGD.find_learning_rate(DATA, num_steps=30)
    (axes,) = test.plot().axes
    assert axes.get_xlabel() == "learning rate" and axes.get_ylabel() == "loss"
    assert axes.get_xscale() == "log"
    points, smoothed, marked = axes.get_lines()
    np.testing.assert_array_equal(points.get_ydata(), test.losses)
    np.testing.assert_array_equal(smoothed.get_ydata(), test.smoothed)
    assert marked.get_xdata()[0] == test.suggestion
