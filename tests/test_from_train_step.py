"""Training steps that exist already: the same numbers as the loop that called them by hand."""

import dataclasses
import functools
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx, struct
from flax.training import dynamic_scale, train_state

import jaxloop as jl
from tests.digest import digest
from tests.test_costs import counting

RNG = np.random.default_rng(0)
X = RNG.normal(size=(20, 3)).astype(np.float32)
Y = (X @ np.float32([[1.0], [-2.0], [0.5]])).astype(np.float32)
DATA = [(X[i : i + 4], Y[i : i + 4]) for i in range(0, 20, 4)]
EPOCHS = 2


@pytest.fixture(autouse=True)
def standard_promotion():
    """Flax and Optax mix dtypes in what a user's step calls."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def by_hand(train_step, state, epochs=EPOCHS):
    """What a user writes today: a Python loop. Returns the state and the losses."""
    losses = []
    for _ in range(epochs):
        for batch in DATA:
            state, metrics = train_step(state, batch)
            losses.append(float(metrics["loss"]))
    return state, np.float32(losses)


def assert_close(a, b):
    """The same numbers up to rounding."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6)


# --- a TrainState ---


class TrainState(train_state.TrainState):
    batch_stats: dict
    scale: dynamic_scale.DynamicScale


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        return nn.Dense(1)(nn.relu(x))


def make_train_state():
    net = Net()
    variables = net.init(jax.random.key(0), X[:2], train=False)
    return TrainState.create(
        apply_fn=net.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=optax.adam(1e-2),
        scale=dynamic_scale.DynamicScale(),
    )


@jax.jit
def linen_step(state, batch):
    x, y = batch

    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        prediction, updates = state.apply_fn(variables, x, train=True, mutable=["batch_stats"])
        return jnp.mean((prediction - y) ** 2), (prediction, updates)

    gradient = state.scale.value_and_grad(loss_fn, has_aux=True)
    scale, finite, (loss, (_, updates)), grads = gradient(state.params)
    state = state.apply_gradients(grads=grads)
    state = state.replace(scale=scale, batch_stats=updates["batch_stats"])
    return state, {"loss": loss, "aux": {"finite": finite}}


def linen_eval(state, batch):
    x, y = batch
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    prediction = state.apply_fn(variables, x, train=False)
    return {"loss": jnp.mean((prediction - y) ** 2), "y_true": y, "y_pred": prediction}


# --- a plain pytree, which is itself a pair ---


def make_pair():
    return jnp.zeros((3, 1)), {"velocity": np.zeros((3, 1), np.float32), "count": 0}


def pair_step(state, batch):
    w, rest = state
    x, y = batch
    loss, gradient = jax.value_and_grad(lambda w: jnp.mean((x @ w - y) ** 2))(w)
    velocity = 0.9 * rest["velocity"] + gradient
    new = w - 0.05 * velocity, {"velocity": velocity, "count": rest["count"] + 1}
    return new, {"loss": loss}


def pair_eval(state, batch):
    x, y = batch
    return jnp.mean((x @ state[0] - y) ** 2)


# --- NNX modules ---


class Module(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.last = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


def make_modules():
    model = Module(nnx.Rngs(0))
    metrics = nnx.MultiMetric(loss=nnx.metrics.Average("loss"))
    return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param), metrics


def nnx_step(model, optimizer, metrics, batch):
    x, y = batch
    model.train()

    def loss_fn(model):
        return jnp.mean((model(x) - y) ** 2)

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    metrics.update(loss=loss)
    return {"loss": loss}


def nnx_eval(model, optimizer, metrics, batch):
    x, y = batch
    model.eval()
    return {"loss": jnp.mean((model(x) - y) ** 2)}


jitted_nnx_step = nnx.jit(nnx_step)


def nnx_by_hand(state, batch):
    return state, jitted_nnx_step(*state, batch)


KINDS = {
    "TrainState": (make_train_state, linen_step, linen_eval, linen_step),
    "pytree": (make_pair, pair_step, pair_eval, jax.jit(pair_step)),
    "NNX": (make_modules, nnx_step, nnx_eval, nnx_by_hand),
}


def arrays(state):
    """A state as a pytree of arrays."""
    if isinstance(state, tuple) and isinstance(state[0], nnx.Module):
        return nnx.to_pure_dict(nnx.split(state)[1])
    return jax.tree.map(jnp.asarray, state)


@pytest.mark.parametrize(
    "kind", [pytest.param("TrainState", marks=pytest.mark.slow), "pytree", "NNX"]
)
def test_the_numbers_are_those_of_the_loop_by_hand(kind):
    make, step, eval_step, hand = KINDS[kind]
    expected, losses = by_hand(hand, make())
    given = make()
    before = jax.tree.map(jnp.copy, arrays(given))
    loop = jl.from_train_step(step, eval_step=eval_step).validate(DATA)
    with counting() as counts:
        state = loop.run(DATA, given, epochs=EPOCHS, strict=True)
    assert_close(arrays(state.step_state), arrays(expected))
    for epoch in range(EPOCHS):
        mean = losses[epoch * len(DATA) : (epoch + 1) * len(DATA)].mean()
        assert state.history[epoch]["loss"] == pytest.approx(mean, rel=1e-4)
    last = state.history[EPOCHS - 1]["validation_loss"]
    compiled = (nnx.jit if kind == "NNX" else jax.jit)(eval_step)
    evaluated = [eval_of(compiled, expected, batch) for batch in DATA]
    assert last == pytest.approx(np.mean(evaluated), rel=1e-4)
    # What was passed is not changed.
    assert_close(arrays(given), before)
    assert type(state.step_state) is type(given)
    assert loop.output(loop.from_state(state).run(DATA, epochs=EPOCHS)).step == state.step
    first = counts["compilations"]
    with counting() as counts:
        loop.run(DATA, given, epochs=EPOCHS)
    assert counts["compilations"] <= 1 < first


def eval_of(eval_step, state, batch):
    is_nnx = isinstance(state[0], nnx.Module) if isinstance(state, tuple) else False
    result = eval_step(*state, batch) if is_nnx else eval_step(state, batch)
    return float(result["loss"] if isinstance(result, dict) else result)


@pytest.mark.parametrize(
    "kind",
    ["pytree", *(pytest.param(one, marks=pytest.mark.slow) for one in ("TrainState", "NNX"))],
)
def test_a_resumed_run_is_exact(kind, tmp_path):
    make, step, eval_step, _ = KINDS[kind]

    def loop(path):
        base = jl.from_train_step(step, eval_step=eval_step).validate(DATA)
        return base.checkpoint(path, event="iteration_completed", filter=jl.every(3)).resume(path)

    whole = loop(tmp_path / "whole").run(DATA, make(), epochs=EPOCHS)
    broken = loop(tmp_path / "broken").handle(
        "iteration_completed", lambda state: 1 / 0, jl.only(8)
    )
    with pytest.raises(ZeroDivisionError):
        broken.run(DATA, make(), epochs=EPOCHS)
    resumed = loop(tmp_path / "broken").run(DATA, make(), epochs=EPOCHS)
    assert digest(resumed) == digest(whole)
    assert resumed.history == whole.history
    # A restored state has the user's form too, given only the loop and a state.
    plain = jl.from_train_step(step)
    restored = plain.restore(tmp_path / "whole", data=DATA, init_state=make())
    for state in (restored, plain.output(restored)):
        assert type(state.step_state) is type(whole.step_state)
        assert_close(arrays(state.step_state), arrays(whole.step_state))


def test_modules_without_their_graph_cannot_be_shown(tmp_path):
    loop = jl.from_train_step(in_place)
    loop.checkpoint(tmp_path).run(DATA, make_small())
    with pytest.raises(jl.JaxloopError, match="restored with its modules(?s:.*)init_state="):
        loop.output(jl.restore(tmp_path))


# --- what a step may return ---


class Report(NamedTuple):
    loss: jax.Array
    error: jax.Array


@dataclasses.dataclass
class Fields:
    loss: jax.Array
    error: jax.Array


RETURNS = {
    "a dict": (lambda loss: {"loss": loss, "error": 2 * loss}, {"loss", "error"}),
    "a named tuple": (lambda loss: Report(loss, 2 * loss), {"loss", "error"}),
    "a dataclass": (lambda loss: Fields(loss, 2 * loss), {"loss", "error"}),
    "a scalar": (lambda loss: loss, {"loss"}),
    "nothing": (lambda loss: None, set()),
}


@pytest.mark.parametrize("case", RETURNS)
def test_what_is_reported(case):
    report, names = RETURNS[case]

    def beside(w, batch):
        return w + 1, report(jnp.mean(batch))

    state = jl.from_train_step(beside).run([np.ones(2, np.float32)], 0.0)
    assert set(state.history[0]) == names and state.step_state == 1.0

    def in_place(model, batch):
        model.bias[...] += 1
        return report(jnp.mean(batch))

    linear = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    state = jl.from_train_step(in_place).run([np.ones(2, np.float32)], linear)
    assert set(state.history[0]) == names and state.step_state.bias[0] == linear.bias[0] + 1


def test_what_has_the_structure_of_the_state_is_the_state():
    data = [jnp.ones(2)]
    assert jl.from_train_step(lambda s, b: s + 1).run(data, 0).step_state == 1
    bare = jl.from_train_step(lambda s, b: (s[0] + 1, s[1] + 2)).run(data, (0, 0))
    assert bare.step_state == (1, 2) and not bare.history[0]
    both = jl.from_train_step(lambda s, b: ((s[0] + 1, s[1] + 2), {"a": b[0]})).run(data, (0, 0))
    assert both.step_state == (1, 2) and set(both.history[0]) == {"a"}


def make_small():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    return model, nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)


def in_place(model, optimizer, batch):
    x, y = batch
    grads = nnx.grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
    optimizer.update(model, grads)


def returns_state(state, batch):
    in_place(*state, batch)
    return state, {"loss": 0.0}


def returns_copy(model, optimizer, batch):
    model, optimizer = nnx.clone((model, optimizer))
    in_place(model, optimizer, batch)
    return model, optimizer


def has_an_option(state, batch, scale=1.0):
    in_place(*state, batch)


@functools.partial(nnx.jit, static_argnums=(3,))
def has_a_static_argument(model, optimizer, batch, num=1):
    in_place(model, optimizer, batch)


@pytest.mark.parametrize(
    "step",
    [
        returns_state,
        returns_copy,
        has_an_option,
        lambda *args: in_place(*args),
        nnx.jit(in_place),
        nnx.jit(donate_argnums=(0, 1))(in_place),
    ],
)
def test_conventions_of_nnx(step):
    expected = jl.from_train_step(in_place).run(DATA, make_small())
    state = jl.from_train_step(step).run(DATA, make_small())
    assert_close(arrays(state.step_state), arrays(expected.step_state))


@struct.dataclass
class ModuleState:
    model: nnx.Module
    optimizer: nnx.Optimizer
    step: int


def test_modules_may_be_in_a_pytree_with_numbers():
    def step(state, batch):
        in_place(state.model, state.optimizer, batch)
        return state.replace(step=state.step + 1)

    expected = jl.from_train_step(in_place).run(DATA, make_small())
    state = jl.from_train_step(step).run(DATA, ModuleState(*make_small(), 0)).step_state
    assert state.step == len(DATA) and isinstance(state, ModuleState)
    assert_close(arrays((state.model, state.optimizer)), arrays(expected.step_state))


def test_handlers_see_what_is_carried():
    seen = []
    loop = jl.from_train_step(in_place, key=None).handle("epoch_completed", seen.append)
    final = loop.run(DATA, make_small())
    assert_close(seen[0].step_state.nnx_variables[0]["bias"][...], final.step_state[0].bias[...])
    assert_close(arrays(loop.output(seen[0]).step_state), arrays(final.step_state))


def test_returned_states_have_the_form_that_was_passed():
    loop = jl.from_train_step(in_place, key=None)
    *_, last = kept = list(loop.stream(DATA, make_small(), epochs=3))
    final = loop.final_state(DATA, make_small(), epochs=3)
    assert_close(arrays(last.step_state), arrays(final.step_state))
    # A state stays valid while the loop goes on.
    first = loop.run(DATA, make_small(), output_transform=lambda state: state.step_state)
    assert_close(arrays(kept[0].step_state), arrays(first))


def test_the_best_state_is_returned():
    def step(w, batch, key):
        return w + 1, {"distance": jnp.abs(w - 7)}

    loop = jl.from_train_step(step, key=0).early_stop(
        "distance", mode="min", patience=2, restore_best=True
    )
    state = loop.run([0, 0, 0], 0, epochs=9)
    assert state.status == "halted" and state.step_state == 9 and state.step == 15


def test_shared_variables_stay_shared():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(3, 3, rngs=rngs)
            self.b = self.a

    model = Tied(nnx.Rngs(0))

    def step(model, other, batch):
        model.b.kernel[...] += 1

    tied, inner = jl.from_train_step(step).run(DATA, (model, model.a)).step_state
    assert tied.a is tied.b and tied.a is inner
    np.testing.assert_allclose(tied.a.kernel[...], model.a.kernel[...] + len(DATA))


def test_jit_inside_costs_and_warns_nothing():
    donating = functools.partial(jax.jit, donate_argnums=0)(pair_step)
    expected = jl.from_train_step(pair_step).run(DATA, make_pair())
    state = jl.from_train_step(donating).run(DATA, make_pair())
    assert_close(state.step_state, expected.step_state)
    kept = []
    loop = jl.from_train_step(donating).handle("iteration_completed", kept.append)
    loop.run(DATA, make_pair(), jit=False)
    assert float(jnp.sum(kept[0].step_state[0])) != float(jnp.sum(kept[-1].step_state[0]))


def test_nnx_jit_that_must_stay_warns_once():
    with pytest.warns(UserWarning, match="train_step stays under nnx.jit") as caught:
        loop = jl.from_train_step(has_a_static_argument)
    assert len(caught) == 1
    expected = jl.from_train_step(in_place).run(DATA, make_small())
    assert_close(arrays(loop.run(DATA, make_small()).step_state), arrays(expected.step_state))


# --- keys ---


def noisy(w, batch, key):
    return w + jax.random.normal(key), {"noise": jax.random.normal(key)}


@pytest.mark.slow
@pytest.mark.parametrize("key", [jax.random.key(3), jax.random.PRNGKey(3)])
def test_a_key_may_have_any_form(key):
    state, other = (jl.from_train_step(noisy, key=one).run(DATA, 0.0) for one in (key, 3))
    assert state.step_state == other.step_state


@pytest.mark.slow
def test_each_step_gets_its_own_key(tmp_path):
    key, base = 3, jax.random.key(3)
    expected = [jax.random.normal(jax.random.fold_in(base, i)) for i in range(10)]

    def loop():
        return (
            jl.from_train_step(noisy, key=key)
            .checkpoint(tmp_path, event="iteration_completed")
            .resume(tmp_path)
        )

    seen = []
    broken = loop().observe("iteration_completed", lambda s: seen.append(s.step))
    with pytest.raises(ZeroDivisionError):
        broken.handle("iteration_completed", lambda s: 1 / 0, jl.only(7)).run(DATA, 0.0, epochs=2)
    state = loop().run(DATA, 0.0, epochs=2)
    assert state.step == 10 and float(state.step_state) == pytest.approx(
        float(sum(expected)), rel=1e-5
    )
    # A final state continues with the keys that come next.
    longer = jl.from_train_step(noisy, key=key).from_state(state).run(DATA, epochs=3)
    more = [jax.random.normal(jax.random.fold_in(base, i)) for i in range(10, 15)]
    assert float(longer.history[2]["noise"]) == pytest.approx(float(np.mean(more)), rel=1e-5)


def test_nnx_steps_get_keys_after_the_batch():
    def step(model, optimizer, batch, key):
        model.bias[...] += jax.random.normal(key, (1,))

    model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    pair = model, nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    new, _ = jl.from_train_step(step, key=0).run([1, 2], pair).step_state
    keys = [jax.random.fold_in(jax.random.key(0), i) for i in range(2)]
    expected = sum(jax.random.normal(key, (1,)) for key in keys)
    np.testing.assert_allclose(new.bias[...], expected, rtol=1e-5)


# --- mistakes ---


def creates(model, optimizer, metrics, batch):
    model.extra = nnx.Variable(jnp.zeros(()))


def counts(model, optimizer, metrics, batch):
    model.first.in_features += 1


def on_the_host(w, batch):
    return w, {"loss": float(jnp.mean(batch[0]))}


W = np.zeros(3, np.float32)
MISTAKES = {
    "no state": (lambda w, b: w, None, "must get the first state(?s:.*)loop.run.data, state."),
    "nothing is returned": (lambda w, b: None, W, "must return the state, or a pair(?s:.*)None"),
    "only metrics": (lambda w, b: {"a": 1.0}, W, "must return the state(?s:.*)a dict"),
    "three parts": (
        lambda w, b: (w, 1.0, 2.0),
        W,
        "must return the state, or a pair of it and metrics, got a tuple of 3",
    ),
    "a vector as metrics": (
        lambda w, b: (w, w),
        W,
        r"must report metrics as a dict.*scalar loss, got an array float32\[3\]",
    ),
    "a new leaf": (
        lambda s, b: ({**s, "new": s["w"]}, {}),
        {"w": W},
        r"changed the structure of its state: new leaves \[\"\['new'\]\"\]",
    ),
    "another shape": (lambda w, b: w[:2], W, r"step_state was float32\[3\] and became"),
    "another dtype": (
        lambda s, b: ({"w": s["w"].astype(jnp.bfloat16)}, {}),
        {"w": W},
        r"step_state\['w'\] was float32\[3\] and became bfloat16\[3\]",
    ),
    "a value on the host": (on_the_host, W, "float"),
    "a leaf that is no array": (
        lambda w, b: w,
        {"w": object()},
        r"step_state\['w'\] must be an array",
    ),
    "a variable that the step creates": (
        creates,
        make_modules,
        "must not create variables, got 0/extra",
    ),
    "an attribute that changes": (
        counts,
        make_modules,
        "must not change attributes of modules(?s:.*)in_features from 3 to 4",
    ),
    "modules and something else": (
        lambda model, optimizer, metrics, b: (model, optimizer, metrics, 1.0),
        make_modules,
        "must return the modules that it got, or a pair of it and metrics, got a tuple of 4",
    ),
    "a module of another form": (
        lambda model, optimizer, metrics, b: (optimizer, model, metrics),
        make_modules,
        "must not create variables",
    ),
    "too few arguments": (lambda w: w, W, "must take 2 .state, batch. arguments, got the sig"),
    "too many arguments": (
        nnx_step,
        lambda: make_modules()[:2],
        "must take 2 .state, batch. or 3 .each module, batch. arguments",
    ),
    "text as a metric": (
        lambda w, b: (w, {"a": "text"}),
        W,
        r"must report arrays and numbers, got a str \('text'\) in 'a'",
    ),
    "a loss and something else": (
        lambda model, optimizer, metrics, b: (jnp.zeros(()), b[0]),
        make_modules,
        "must report metrics as a dict",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_before_the_first_step(case):
    step, state, pattern = MISTAKES[case]
    started = []
    loop = jl.from_train_step(step).handle("started", started.append)
    with pytest.raises(Exception, match=pattern) as info:
        loop.run(DATA, state() if callable(state) else state)
    assert not started
    text = "\n".join([str(info.value), *getattr(info.value, "__notes__", [])])
    assert "fix:" in text
    if case == "a value on the host":
        assert "cannot use values on the host" in text
    else:
        assert isinstance(info.value, jl.JaxloopError)


def test_a_module_outside_of_the_state_is_named_in_a_note():
    model, _ = make_small()

    def step(w, batch):
        model.bias[...] += 1
        return w

    with pytest.raises(Exception, match="different trace level") as info:
        jl.from_train_step(step).run(DATA, 0.0)
    assert any("not in its state" in note for note in info.value.__notes__)


def test_modules_cannot_take_the_place_of_what_is_carried():
    loop = jl.from_train_step(in_place)
    state = loop.run(DATA, make_small())
    changed = state.replace(step_state=state.step_state)
    with pytest.raises(jl.JaxloopError, match="got NNX modules(?s:.*)loop.run.data, modules."):
        loop.from_state(changed).run(DATA, epochs=2)
    assert loop.run(DATA, state.step_state).step == state.step


@pytest.mark.parametrize("key", ["a", 1.5, True, jnp.zeros(2)])
def test_wrong_keys(key):
    with pytest.raises(jl.JaxloopError, match="key must be a key or a seed"):
        jl.from_train_step(noisy, key=key)


def test_wrong_steps():
    with pytest.raises(jl.JaxloopError, match="train_step must be a function"):
        jl.from_train_step(3)
    with pytest.raises(jl.JaxloopError, match="eval_step must be a function"):
        jl.from_train_step(pair_step, eval_step=3)
    with pytest.raises(jl.JaxloopError, match="must not be under jax.pmap"):
        jl.from_train_step(jax.pmap(pair_step))
    with pytest.raises(jl.JaxloopError, match="got nnx.cached_partial, which holds them"):
        jl.from_train_step(nnx.cached_partial(nnx.jit(in_place), *make_small()))
    with pytest.raises(jl.JaxloopError, match="no model to evaluate(?s:.*)eval_step="):
        jl.from_train_step(pair_step).validate(DATA)
    loop = jl.from_train_step(pair_step, eval_step=lambda state, batch: None).validate(DATA)
    with pytest.raises(jl.JaxloopError, match="validation: eval_step must return metrics"):
        loop.run(DATA, make_pair())


# --- the metrics of each scalar ---


def test_each_scalar_is_weighted_by_the_examples_of_its_batch():
    def step(state, batch):
        values = {
            "loss": jnp.mean(batch),
            "aux": {"kl": jnp.sum(batch), "count": jnp.int32(3)},
            "above": jnp.mean(batch) > 2,
            "vector": batch,
            "complex": 1j * jnp.mean(batch),
        }
        return state, values

    data = [np.float32([1, 2, 3]), np.float32([5])]
    loop = jl.from_train_step(step)
    record = loop.run(data, 0).history[0]
    assert record == {"loss": 2.75, "aux/kl": 5.75, "aux/count": 3, "above": 0.25}
    # A metric of that name takes precedence, wherever it is declared, and others read the values.
    loop = loop.metric(jnp.max, "aux/kl", "running_max", "vector", per="batch")
    record = loop.derive("twice", lambda v: 2 * v, "loss").run(data, 0).history[0]
    assert record["aux/kl"] == 5.0 and record["twice"] == 5.5


def test_names_of_scalars_are_checked_before_the_first_step():
    loop = jl.from_train_step(pair_step, eval_step=pair_eval).validate(DATA)
    for name in ("los", "validation_los"):
        with pytest.raises(jl.JaxloopError, match=f"{name}(?s:.*)has: loss, validation_loss"):
            loop.early_stop(name).run(DATA, make_pair())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the mode of a loss is known
        state = loop.early_stop("loss").early_stop("validation_loss").run(DATA, make_pair())
    assert state.status == "completed"


def test_scalars_that_change_in_mid_epoch_do_not_fit(tmp_path):
    def make(name):
        loop = jl.from_train_step(lambda s, b: (s, {name: jnp.mean(b[0])}))
        return loop.checkpoint(tmp_path, event="iteration_completed").resume(tmp_path)

    with pytest.raises(ZeroDivisionError):
        make("a").handle("iteration_completed", lambda s: 1 / 0, jl.only(2)).run(DATA, 0)
    with pytest.raises(jl.JaxloopError, match="'each scalar' was a float32 and is b float32"):
        make("b").run(DATA, 0)
    assert set(make("a").run(DATA, 0).history[0]) == {"a"}
