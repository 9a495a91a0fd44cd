"""What jaxloop needs from models of each kind: modes, keys, states, and errors that say so."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxloop as jl

eqx = pytest.importorskip("equinox")
hk = pytest.importorskip("haiku")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 6)).astype(np.float32) + 1
Y = RNG.normal(size=(32, 1)).astype(np.float32)
DATA = [(X[:16], Y[:16]), (X[16:], Y[16:])]
SGD = optax.sgd(0.1)


@pytest.fixture(autouse=True)
def promotion():
    """Equinox and Haiku mix dtypes inside."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def trainer(model, loss="mean_squared_error"):
    return jl.trainer(model, loss, SGD, log=0)


def traced(steps, state=None):
    """The state that the init function and the step of a pair would make of the first batch."""
    init_fn, step_fn = steps
    return jax.eval_shape(lambda state: step_fn(DATA[0], init_fn(DATA[0], state)), state)


def final(loop, **kwargs):
    return loop.run(DATA, output_transform=lambda state: state, **kwargs)


# --- Haiku ---------------------------------------------------------------------------------------


def normalized(x, is_training):
    x = hk.BatchNorm(True, True, 0.9)(hk.Linear(4)(x), is_training)
    x = hk.dropout(hk.next_rng_key(), 0.5, x) if is_training else x
    return hk.Linear(1)(x)


@pytest.mark.slow
def test_haiku_is_validated_in_evaluation_mode():
    model = hk.transform_with_state(normalized)
    state = final(trainer(model).validate(DATA))
    params, rest = state.step_state["model_state"]
    assert np.abs(rest["batch_norm/~/mean_ema"]["average"]).max() > 0
    prediction, _ = model.apply(params, rest, None, X, is_training=False)
    expected = float(jnp.mean((prediction - Y) ** 2))
    assert float(state.history[0]["validation_loss"]) == pytest.approx(expected, rel=1e-5)


def test_haiku_without_a_flag_is_not_evaluated_in_training_mode():
    model = hk.transform_with_state(lambda x: hk.Linear(1)(hk.BatchNorm(True, True, 0.9)(x, True)))
    state = model.init(jax.random.key(0), X)
    with pytest.raises(jl.errors.ModelError, match="(?s)mean_ema.*fix: declare is_training"):
        traced(jl.eval_step(model), state)
    traced(jl.train_step(model, "mean_squared_error", SGD))
    # A loss of probabilities reads the first predictions in training mode, as the steps do.
    model = hk.transform_with_state(
        lambda x: jax.nn.sigmoid(hk.Linear(1)(hk.BatchNorm(True, True, 0.9)(x, True)))
    )
    traced(jl.train_step(model, "binary_cross_entropy", SGD))


@pytest.mark.parametrize("transform", [hk.transform, hk.transform_with_state])
def test_haiku_without_apply_rng(transform):
    model = hk.without_apply_rng(transform(lambda x: hk.Linear(1)(x)))
    steps = jl.train_step(model, "mean_squared_error", SGD)
    model_state = traced(steps).state["model_state"]
    assert traced(jl.eval_step(model), model_state).outputs["y_pred"].shape == (16, 1)


@pytest.mark.slow
@pytest.mark.parametrize("transform", [hk.transform, hk.transform_with_state])
def test_haiku_without_apply_rng_is_the_same_model(transform):
    plain = transform(lambda x: hk.Linear(1)(x))
    ours = trainer(hk.without_apply_rng(plain)).validate(DATA).run(DATA)
    expected = trainer(plain).run(DATA)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert (a == b).all()


# --- keys in evaluation --------------------------------------------------------------------------


class AlwaysDrops(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.Dropout(0.5, deterministic=False)(x))


class DropsIfItHasAKey(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=not self.has_rng("dropout"))(nn.Dense(1)(x))


def always_splits(params, state, x, *, train, key):
    noise = jax.random.normal(jax.random.split(key)[0], x.shape)
    return (x + noise if train else x) @ params, state


class NeedsKey(eqx.Module):
    linear: eqx.nn.Linear

    def __call__(self, x, *, key):
        return self.linear(x + 0.1 * jax.random.normal(key, x.shape))


def needs_key():
    return NeedsKey(eqx.nn.Linear(6, 1, key=jax.random.key(0)))


DRAWS = {
    "linen": AlwaysDrops,
    "haiku": lambda: hk.transform(lambda x: hk.Linear(1)(hk.dropout(hk.next_rng_key(), 0.5, x))),
    "model": lambda: jl.Model(lambda key, x: (jnp.ones((6, 1)), ()), always_splits),
    "equinox": needs_key,
    "container": lambda: (AlwaysDrops(), needs_key()),
}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=[pytest.mark.slow] * (k != "linen")) for k in DRAWS],
)
def test_a_model_that_always_draws_is_evaluated_with_a_fixed_key(kind):
    model = DRAWS[kind]()
    data = [(x, (y, y)) for x, y in DATA] if kind == "container" else DATA
    loss = "mean_squared_error" if kind != "container" else [("mean_squared_error", 1.0)] * 2
    loop = trainer(model, loss).validate(data)
    state = loop.run(data, output_transform=lambda state: state)
    assert np.isfinite(state.history[0]["validation_loss"])
    again = loop.run(data, output_transform=lambda state: state)
    assert again.history[0] == state.history[0]


@pytest.mark.slow
def test_a_key_is_not_passed_to_a_model_that_takes_it_for_training():
    model = DropsIfItHasAKey()
    state = final(trainer(model).validate(DATA))
    expected = jnp.mean((model.apply(state.step_state["model_state"], X) - Y) ** 2)
    assert float(state.history[0]["validation_loss"]) == pytest.approx(float(expected), rel=1e-5)


# --- evaluation needs a state --------------------------------------------------------------------

PAIR = (lambda key, x: jnp.zeros((6, 1)), lambda w, x: x @ w)
MODELS = {
    "pair": lambda: PAIR,
    "model": lambda: jl.Model(lambda key, x: (jnp.zeros((6, 1)), ()), always_splits),
    "linen": lambda: nn.Dense(1),
    "haiku": lambda: hk.transform(lambda x: hk.Linear(1)(x)),
    "container": lambda: {"a": PAIR, "b": needs_key()},
}


@pytest.mark.parametrize("kind", MODELS)
def test_an_evaluation_without_a_state_is_an_error(kind):
    model = MODELS[kind]()
    loop = jl.evaluator(model).metric(lambda y, p: y[:, 0], "y")
    for call in (loop.run, loop.check):
        with pytest.raises(jl.errors.ArgumentError, match="(?s)must have the state.*fix:"):
            call(DATA)
    with pytest.raises(jl.errors.ArgumentError, match="must have the state"):
        jl.eval_step(model)[0](DATA[0], None)


def test_an_evaluation_needs_the_whole_state():
    class Normalized(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.BatchNorm(use_running_average=not train)(nn.Dense(1)(x))

    steps = jl.eval_step(Normalized())
    variables = Normalized().init(jax.random.key(0), X, train=False)
    traced(steps, variables)
    with pytest.raises(jl.errors.ModelError, match="(?s)init_state must.*'batch_stats'.*fix:"):
        traced(steps, {"params": variables["params"]})
    # A trainer initializes the rest.
    traced(jl.train_step(Normalized(), "mean_squared_error", SGD), {"params": variables["params"]})
    box = jl.eval_step({"a": PAIR, "b": PAIR})
    with pytest.raises(jl.errors.ModelError, match="(?s)init_state.*'b'.*fix:"):
        traced(box, {"a": jnp.ones((6, 1))})


def test_a_module_that_holds_its_state_is_evaluated_as_it_is():
    module = nnx.Linear(6, 1, rngs=nnx.Rngs(0))
    expected = float(jnp.mean((module(X) - Y) ** 2))
    loop = jl.evaluator(module).metric("mean_squared_error")
    assert float(loop.run(DATA)["mean_squared_error"]) == pytest.approx(expected, rel=1e-6)
    assert loop.run(DATA, module) == loop.run(DATA)
    linear = eqx.nn.Linear(6, 1, key=jax.random.key(0))
    expected = float(jnp.mean((jax.vmap(linear)(X) - Y) ** 2))
    found = jl.evaluator(linear).metric("mean_squared_error").run(DATA)
    assert float(found["mean_squared_error"]) == pytest.approx(expected, rel=1e-6)


# --- errors that say what jaxloop needs ----------------------------------------------------------


class Noise(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(x + jax.random.normal(self.make_rng("noise"), x.shape))


class Sows(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.sow("losses", "norm", jnp.sum(x**2))
        return nn.Dense(1)(x)


class Counts(nn.Module):
    @nn.compact
    def __call__(self, x):
        count = self.variable("counts", "calls", lambda: jnp.int32(0))
        count.value = count.value + 1
        return nn.Dense(1)(x)


class Late(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        if train:
            self.variable("late", "calls", lambda: jnp.int32(0))
        return nn.Dense(1)(x)


class TwoInputs(nn.Module):
    @nn.compact
    def __call__(self, x, z):
        return nn.Dense(1)(x + z)


class NoStream(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.dropout = nnx.Linear(6, 1, rngs=rngs), nnx.Dropout(0.5)

    def __call__(self, x):
        return self.linear(self.dropout(x))


class Grows(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(6, 1, rngs=rngs)

    def __call__(self, x):
        self.calls = nnx.Variable(jnp.int32(1))
        return self.linear(x)


class KeylessDropout(eqx.Module):
    linear: eqx.nn.Linear
    dropout: eqx.nn.Dropout

    def __call__(self, x):
        return self.linear(self.dropout(x))


class Stateful(eqx.Module):
    linear: eqx.nn.Linear
    norm: eqx.nn.BatchNorm

    def __init__(self, key):
        self.linear = eqx.nn.Linear(6, 1, key=key)
        self.norm = eqx.nn.BatchNorm(1, "batch", mode="batch")

    def __call__(self, x, state):
        return self.norm(self.linear(x), state)


def linear():
    return eqx.nn.Linear(6, 1, key=jax.random.key(0))


def stateful():
    return eqx.nn.make_with_state(Stateful)(jax.random.key(0))


def draws_without_rng():
    return hk.without_apply_rng(
        hk.transform(lambda x: hk.Linear(1)(hk.dropout(hk.next_rng_key(), 0.5, x)))
    )


# A model, and what its error says that jaxloop needs.
NEEDS = {
    "linen, changed in evaluation": (Counts, "an evaluation may not"),
    "linen, made in training": (Late, "make every variable in init too"),
    "linen, two inputs": (TwoInputs, "as its one argument"),
    "nnx, no stream": (lambda: NoStream(nnx.Rngs(0)), "rngs=rngs"),
    "nnx, a variable in a call": (lambda: Grows(nnx.Rngs(0)), "in __init__"),
    "equinox, no key": (lambda: KeylessDropout(linear(), eqx.nn.Dropout(0.5)), "declares key"),
    "equinox, a state": (lambda: stateful()[0], "pass a jl.Model(init, apply)"),
    "equinox, a module and its state": (stateful, "pass a jl.Model(init, apply)"),
    "haiku, no key": (draws_without_rng, "leave that out"),
    "haiku, two inputs": (lambda: hk.transform(lambda x, z: x + z), "as its one argument"),
    "a pair, no key": (
        lambda: (lambda key, x: jnp.ones(1), lambda w, x, *, key: x * w),
        "pass a jl.Model",
    ),
    "a model, other names": (
        lambda: jl.Model(lambda key, x: (jnp.ones(1), ()), lambda w, s, x, training, key: (x, s)),
        "train=..., key=...",
    ),
    "a model, a new state": (
        lambda: jl.Model(
            lambda key, x: (jnp.ones((6, 1)), {}),
            lambda w, s, x, *, train, key: (x @ w, {"calls": jnp.int32(1)}),
        ),
        "the structure of the one that apply gets",
    ),
}


@pytest.mark.parametrize("name", NEEDS)
def test_an_error_says_what_jaxloop_needs(name):
    make, sentence = NEEDS[name]
    events = []
    observed = lambda loop: loop.observe("all", lambda s: events.append(s.event))  # noqa: E731
    with pytest.raises(Exception) as caught:  # noqa: B017  each framework has its own
        observed(trainer(make()).validate(DATA)).run(DATA)
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert sentence in text
    if name != "linen, changed in evaluation":
        assert not events


@pytest.mark.parametrize("module", [Noise, Sows])
def test_any_random_stream_and_any_sown_collection_works(module):
    ended = final(trainer(module()).validate(DATA), epochs=2)
    assert np.isfinite(ended.history[1]["validation_loss"])
    assert set(ended.step_state["model_state"]) == {"params"}


@pytest.mark.slow
def test_an_equinox_state_works_as_the_error_says():
    module, state = stateful()
    arrays, static = eqx.partition(module, eqx.is_inexact_array)

    def apply(params, state, x, *, train, key):
        model = eqx.nn.inference_mode(eqx.combine(params, static), value=not train)
        call = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        return call(x, state)

    loop = trainer(jl.Model(lambda key, x: (arrays, state), apply)).validate(DATA)
    ended = final(loop, epochs=2)
    assert ended.history[1]["validation_loss"] < ended.history[0]["loss"]


@pytest.mark.slow
def test_sow_with_a_reduction_works_as_the_error_says():
    class SowsOne(nn.Module):
        @nn.compact
        def __call__(self, x):
            last = {"reduce_fn": lambda a, b: b, "init_fn": lambda: jnp.zeros(())}
            self.sow("losses", "norm", jnp.sum(x), **last)
            return nn.Dense(1)(x)

    variables = trainer(SowsOne()).validate(DATA).run(DATA)
    assert float(variables["losses"]["norm"]) == pytest.approx(float(X[16:].sum()), rel=1e-5)
