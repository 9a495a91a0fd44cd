"""Each example that ports a hand-written loop has the same curve as that loop, in half the lines.

The loop of an example and the loop of its twin in ``tests/twins`` are what lies between the
comments ``# --- the loop`` and ``# --- end``. Both start from the same parameters and see the same
batches.
"""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxloop as jl
from tests.twins import load

TESTS = Path(__file__).parent
TOLERANCE = 1e-6


@pytest.fixture(autouse=True)
def promotion_of_users():
    """Examples run under the promotion that users have, which is not the one of these tests."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def small_digits(num_train=192, num_test=64):
    (x, y), (a, b) = jl.datasets.digits()
    return (x[:num_train], y[:num_train]), (a[:num_test], b[:num_test])


def digits(twin, make_model):
    example = load("digits")
    train, test = small_digits(200, 50)  # the last batches are ragged
    data, held_out = jl.batches(train, 32, shuffle=True), jl.batches(test, 32)
    model = make_model(example)
    state = example.train(model, data, held_out, epochs=3)
    if twin.__name__.endswith("linen"):
        return state, twin.train(
            model,
            variables_of(example.train, model, data, held_out),
            data.epoch,
            held_out,
            epochs=3,
        )
    return state, twin.train(model, data.epoch, held_out, epochs=3)


def variables_of(train, *args):
    """The initial parameters: what a run of no epochs ends with."""
    return train(*args, epochs=0).step_state["model_state"]


def digits_linen(twin):
    return digits(twin, lambda example: example.LinenMLP())


def digits_nnx(twin):
    return digits(twin, lambda example: example.NNXMLP(nnx.Rngs(0)))


def digits_equinox(twin):
    return digits(twin, lambda example: example.EquinoxMLP(jax.random.key(0)))


def vae(twin):
    example = load("vae")
    (train, _), (test, _) = small_digits()
    data = jl.batches(train.reshape(-1, 64), 32, shuffle=True)
    held_out = jl.batches(test.reshape(-1, 64), 32)
    first = example.train(data, held_out, epochs=0).step_state
    state = example.train(data, held_out, epochs=3)
    history = twin.train(first["model_state"], first["key"], data.epoch, held_out, epochs=3)
    return state, history


def seq2seq(twin):
    example = load("seq2seq")
    words = example.words()
    data = jl.batches(jax.tree.map(lambda x: x[:128], words), 32, shuffle=True)
    held_out = jl.batches(jax.tree.map(lambda x: x[128:192], words), 32)
    variables = variables_of(example.train, data, held_out)
    state = example.train(data, held_out, epochs=2)
    return state, twin.train(variables, data.epoch, held_out, epochs=2)


def language_model(twin):
    example = load("language_model")
    rows = example.text(4_000)
    data, held_out = jl.batches(rows[:80], 16, shuffle=True), jl.batches(rows[80:96], 16)
    variables = example.train(data, held_out, steps=0).step_state["model_state"]
    state = example.train(data, held_out, steps=8)
    return state, twin.train(variables, data.epoch, held_out, steps=8)


def gan(twin):
    (train, _), _ = small_digits()
    data = jl.batches(train.reshape(-1, 64), 32, shuffle=True)
    return load("gan").train(data, epochs=3), twin.train(data.epoch, epochs=3)


def actor_critic(twin):
    state = load("actor_critic").train(epochs=3, iterations=5)
    return state, twin.train(epochs=3, iterations=5)


def graph_network(twin):
    example = load("graph_network")
    train, test = small_digits()
    data = jl.batches(example.graphs(*train, 16), 8, shuffle=True)
    held_out = jl.batches(example.graphs(*train, 8), 8)
    variables = variables_of(example.train, data, held_out)
    state = example.train(data, held_out, epochs=3)
    return state, twin.train(variables, data.epoch, held_out, epochs=3)


def k_means(twin):
    (train, _), _ = small_digits()
    pixels = train.reshape(-1, 64)
    data, centers = jl.batches(pixels, 32, shuffle=True), jnp.asarray(pixels[:8])
    example = load("k_means")
    for moment, by_hand in zip(example.moments(data, 64), twin.moments(data, 64), strict=True):
        np.testing.assert_allclose(moment, by_hand, rtol=TOLERANCE)
    state = example.train(data, centers, epochs=30)
    assert state.halted_by is not None
    return state, twin.train(data.epoch, centers, epochs=30)


def distillation(twin):
    example = load("distillation")
    train, test = small_digits()
    data, held_out = jl.batches(train, 32, shuffle=True), jl.batches(test, 32)
    # The teacher need not be good.
    shapes = jax.eval_shape(example.TEACHER.init, jax.random.key(1), train[0][:1])
    random = np.random.default_rng(0)
    teacher = jax.tree.map(lambda w: random.normal(size=w.shape, scale=0.1).astype("f4"), shapes)
    variables = variables_of(example.train, teacher, data, held_out)
    state = example.train(teacher, data, held_out, epochs=3)
    return state, twin.train(variables, teacher, data.epoch, held_out, epochs=3)


def flax_train_state(twin):
    train, test = small_digits()
    data, held_out = jl.batches(train, 32, shuffle=True), jl.batches(test, 32)
    state = load("flax_train_state").train(data, held_out, epochs=2)
    return state, twin.train(data.epoch, held_out, epochs=2)


PORTS = (k_means,)
SLOW_PORTS = (
    flax_train_state,
    vae,
    digits_linen,
    graph_network,
    digits_nnx,
    digits_equinox,
    seq2seq,
    language_model,
    gan,
    actor_critic,
    distillation,
)


def largest_difference(state, history):
    """The largest relative difference of two curves that have the same epochs and metrics."""
    assert len(state.history) == len(history)
    differences = [
        abs(float(state.history[epoch][name]) - by_hand) / max(abs(by_hand), 1e-6)
        for epoch, values in enumerate(history)
        for name, by_hand in values.items()
    ]
    assert all(state.history[epoch].keys() == values.keys() for epoch, values in enumerate(history))
    return max(differences)


@pytest.mark.parametrize(
    "port", [*PORTS, *(pytest.param(port, marks=pytest.mark.slow) for port in SLOW_PORTS)]
)
def test_a_port_has_the_curve_of_its_twin(port):
    state, history = port(importlib.import_module(f"tests.twins.{port.__name__}"))
    assert len(history) > 1
    assert largest_difference(state, history) <= TOLERANCE


def loop_lines(path):
    """The number of lines of code between the comments that mark the loop."""
    inside, count = False, 0
    for line in path.read_text().splitlines():
        if line.strip() == "# --- the loop":
            inside = True
        elif line.strip() == "# --- end":
            inside = False
        elif inside and line.strip() and not line.strip().startswith("#"):
            count += 1
    assert not inside and count
    return count


@pytest.mark.parametrize("port", [*PORTS, *SLOW_PORTS])
def test_the_loop_of_a_port_has_half_the_lines(port):
    example = port.__name__.removesuffix("_linen").removesuffix("_nnx").removesuffix("_equinox")
    ported = loop_lines(TESTS.parent / "examples" / f"{example}.py")
    by_hand = loop_lines(TESTS / "twins" / f"{port.__name__}.py")
    assert ported * 2 <= by_hand


def test_every_twin_is_compared():
    twins = {path.stem for path in (TESTS / "twins").glob("*.py")} - {"__init__"}
    assert twins == {port.__name__ for port in (*PORTS, *SLOW_PORTS)}
