"""A run continues only from a state that it fits: its metrics, its data, its model's attributes."""

import functools
import os
import shutil
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import jaxloop as jl
from jaxloop.errors import DataError, ModelError, RecompilationError, SerializationError
from tests.digest import digest

X = np.random.default_rng(0).normal(size=(24, 3)).astype(np.float32)
Y = (X[:, :1] > 0).astype(np.float32)
DATA = jl.batches((X, Y), 4)


def step(batch, total):
    x, y = batch
    return jl.emit(
        total + jnp.sum(x), y_true=y, y_pred=jax.nn.sigmoid(x[:, :1]), x=x[:, 0], z=x[:, 1]
    )


STEPS = jl.loop(step)


def whole(state):
    return state


class Stop(Exception):
    pass


def stopped(loop, data, after, event="iteration_completed", **options):
    """The last state of a run that an exception ends, as another process would read it."""

    def stop(state):
        raise Stop

    options = {"epochs": 3, "init_state": 0.0, **options}
    with pytest.raises(Stop) as error:
        loop.handle(event, stop, jl.only(after)).run(data, **options)
    state = error.value.loop_state
    return jl.deserialize_state(jl.serialize_state(state), like=state)


# --- metrics -------------------------------------------------------------------------------------


def square(x):
    return x**2


def scaled(x, by):
    return x * by


def mine(by):
    return lambda x: x * by


SWAPS = {
    "another metric": (("precision", "m"), ("recall", "m")),
    "another name": (("accuracy",), ("accuracy", "other")),
    "another function": ((square, "m", None, ["x"]), (abs, "m", None, ["x"])),
    "another field": ((abs, "m", None, ["x"]), (abs, "m", None, ["z"])),
    "another reduction": ((abs, "m", "running_min", ["x"]), (abs, "m", "running_max", ["x"])),
    "another argument": (
        (functools.partial(scaled, by=2.0), "m", None, ["x"]),
        (functools.partial(scaled, by=3.0), "m", None, ["x"]),
    ),
    "another closure": ((mine(2.0), "m", None, ["x"]), (mine(3.0), "m", None, ["x"])),
    "another threshold": (
        (jl.metrics.top_k_categorical_accuracy(k=1), "m"),
        (jl.metrics.top_k_categorical_accuracy(k=2), "m"),
    ),
    "none": (("accuracy",), None),
    "one more": (None, ("accuracy",)),
}


QUICK = {"another metric", "another name", "another threshold"}


@pytest.mark.parametrize(
    "swap", [pytest.param(one, marks=() if one in QUICK else pytest.mark.slow) for one in SWAPS]
)
def test_a_metric_that_is_swapped_in_mid_epoch_is_refused(swap):
    before, after = (
        STEPS.metric("mean_squared_error")
        if one is None
        else STEPS.metric("mean_squared_error").metric(*one)
        for one in SWAPS[swap]
    )
    state = stopped(before, DATA, 4)
    with pytest.raises(SerializationError, match="accumulators belong to other metrics") as error:
        after.from_state(state).run(DATA, epochs=3)
    assert "fix: finish the epoch" in str(error.value)


@pytest.mark.parametrize("event", ["epoch_started", "epoch_completed"])
def test_between_epochs_metrics_may_come_and_go(event):
    before = STEPS.metric("accuracy").metric("mean_squared_error", "m")
    after = STEPS.metric("recall").metric("mean_absolute_error", "m").early_stop("m", patience=9)
    kept = []
    saving = before.early_stop("m", patience=9).handle(event, kept.append, jl.only(2), name="keep")
    saving.run(DATA, 0.0, epochs=3)
    state = after.from_state(kept[0]).run(DATA, epochs=3)
    expected = after.run(DATA, 0.0, epochs=3)
    assert digest(state)["metrics"] == digest(expected)["metrics"]
    assert set(state.history[2]) == {"recall", "m"} and "accuracy" in state.history[0]
    if event == "epoch_completed":
        # Here the epoch's metrics are not in the history, and its handlers would read others.
        pending = stopped(before, DATA, 2, "epoch_completed")
        with pytest.raises(SerializationError, match="'accuracy' is missing; 'm' was"):
            after.from_state(pending).run(DATA, epochs=3)


def test_the_order_of_metrics_does_not_matter_in_mid_epoch():
    one = STEPS.metric("accuracy").metric("precision")
    other = STEPS.metric("precision").metric("accuracy")
    state = stopped(one, DATA, 4)
    expected = digest(one.run(DATA, 0.0, epochs=3))
    for loop in (one, other):
        assert digest(loop.from_state(state).run(DATA, epochs=3)) == expected


def test_another_loss_in_mid_epoch_is_refused_and_between_epochs_not():
    model = (lambda key, x: jnp.zeros((3, 1)), lambda w, x: x @ w)
    one = jl.trainer(model, "mean_squared_error", optax.sgd(0.1), log=0)
    other = jl.trainer(model, "mean_absolute_error", optax.sgd(0.1), log=0)
    state = stopped(one, DATA, 4, init_state=None)
    with pytest.raises(SerializationError, match="'loss' was .*squared.* and is .*absolute"):
        other.from_state(state).run(DATA, epochs=3)
    state = stopped(one, DATA, 2, "epoch_started", init_state=None)
    assert other.from_state(state).run(DATA, epochs=3).shape == (3, 1)


def test_a_folder_is_resumed_with_other_metrics_after_the_epoch_only(tmp_path):
    saving = {"event": "iteration_completed", "filter": jl.every(4)}
    one = STEPS.metric("accuracy").checkpoint(tmp_path, **saving).resume(tmp_path)
    other = STEPS.metric("recall").checkpoint(tmp_path, **saving).resume(tmp_path)
    with pytest.raises(Stop):
        one.handle("iteration_completed", _stop, jl.only(10)).run(DATA, 0.0, epochs=3)
    with pytest.raises(SerializationError, match="'accuracy' is missing; 'recall' is new"):
        other.run(DATA, 0.0, epochs=3)
    one.run(DATA, 0.0, epochs=2)  # what the error says
    state = other.run(DATA, 0.0, epochs=4)
    assert set(state.history[1]) == {"accuracy"} and set(state.history[3]) == {"recall"}
    assert state.step == 24


def _stop(state):
    raise Stop


# --- data ----------------------------------------------------------------------------------------


def lists(size, num=24):
    return [(X[i : i + size], Y[i : i + size]) for i in range(0, num, size)]


def generated(size, num=24):
    return lambda epoch: iter(lists(size, num))


CHANGES = {
    "batch_size": (DATA, jl.batches((X, Y), 6)),
    "seed": (jl.batches((X, Y), 4, shuffle=True), jl.batches((X, Y), 4, shuffle=True, seed=1)),
    "shuffle": (DATA, jl.batches((X, Y), 4, shuffle=True)),
    "num_examples": (DATA, jl.batches((X[:20], Y[:20]), 4)),
    "examples": (DATA, jl.batches((X.astype(np.float16), Y), 4)),
    "drop_remainder": (jl.batches((X, Y), 5), jl.batches((X, Y), 5, drop_remainder=True)),
    "pad": (jl.batches((X, Y), 5), jl.batches({"x": X}, 5, pad=True)),
    "length": (lists(4), lists(4, 20)),
    "first_batch": (lists(4), lists(6, 36)),
    "first_batch of a function": (generated(4), generated(6)),
    "kind": (DATA, lists(4)),
    "kind of a list": (lists(4), DATA),
}


@pytest.mark.parametrize("change", CHANGES)
def test_data_that_change_in_mid_epoch_are_refused(change):
    before, after = CHANGES[change]
    if change == "first_batch":
        assert len(before) == len(after)
    state = stopped(STEPS, before, 3)
    with pytest.raises(DataError, match=f"{change.split()[0]} was .* and is "):
        STEPS.from_state(state).run(after, epochs=3)
    expected = STEPS.run(before, 0.0, epochs=3)
    assert digest(STEPS.from_state(state).run(before, epochs=3)) == digest(expected)
    if change not in ("examples", "pad"):
        state = stopped(STEPS, before, 1, "epoch_started")  # nothing is consumed yet
        expected = STEPS.run(after, 0.0, epochs=3)
        assert digest(STEPS.from_state(state).run(after, epochs=3)) == digest(expected)


def test_other_iterations_in_mid_epoch_are_exact_or_refused():
    for data in (DATA, lists(4)):
        state = stopped(STEPS, data, 3, iterations=4)
        for iterations in (None, 3, 5):
            ended = STEPS.from_state(state).run(data, epochs=3, iterations=iterations)
            expected = STEPS.run(data, 0.0, epochs=3, iterations=iterations)
            assert digest(ended) == digest(expected)
        with pytest.raises(DataError, match="iterations= must be at least 3, got 2"):
            STEPS.from_state(state).run(data, epochs=3, iterations=2)
    count = jl.loop(lambda batch, n: n + 1)
    state = stopped(count, None, 3, iterations=4, init_state=0)
    with pytest.raises(DataError, match=r"kind was 'data=None' and is 'jl\.batches'"):
        count.from_state(state).run(DATA, epochs=3)
    with pytest.raises(DataError, match="iterations= must be at least 3, got 2"):
        count.from_state(state).run(None, epochs=3, iterations=2)
    assert int(count.from_state(state).run(None, epochs=3, iterations=5).step_state) == 15


def test_an_iterator_with_its_own_state_refuses_other_batches():
    grain = pytest.importorskip("grain")

    def data(size):
        source = grain.MapDataset.source(list(zip(X, Y, strict=True))).shuffle(seed=1)
        return source.to_iter_dataset().batch(size)

    state = stopped(STEPS, data(4), 3)
    expected = STEPS.run(data(4), 0.0, epochs=3)
    assert digest(STEPS.from_state(state).run(data(4), epochs=3)) == digest(expected)
    with pytest.raises(DataError, match="first_batch was"):
        STEPS.from_state(state).run(data(2), epochs=3)


def test_settings_of_any_integer_type_are_saved():
    data = jl.batches((X, Y), 4, shuffle=np.True_, seed=np.int64(3))
    state = stopped(STEPS, data, 3)
    same = jl.batches((X, Y), 4, shuffle=True, seed=3)
    assert STEPS.from_state(state).run(same, epochs=3).step == 18
    with pytest.raises(TypeError, match="seed must be an int, got 1.5"):
        jl.batches((X, Y), 4, seed=1.5)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        jl.batches((X, Y), 4, seed=-1)


# --- epochs --------------------------------------------------------------------------------------


def test_a_state_with_more_epochs_than_asked_for_warns():
    done = STEPS.run(DATA, 0.0, epochs=3)
    with pytest.warns(UserWarning, match="epochs=2, and the state .* has completed 3"):
        assert STEPS.from_state(done).run(DATA, epochs=2) is done
    opened = stopped(STEPS, DATA, 15)
    with pytest.warns(UserWarning, match="epochs=1, and the state .* has completed 2"):
        state = STEPS.from_state(opened).run(DATA, epochs=1)
    assert state.iteration == 2 and state.step == 15
    # The rest of it is not lost.
    assert digest(STEPS.from_state(state).run(DATA, epochs=3)) == digest(done)


def test_a_handlers_max_epoch_survives_a_resume(tmp_path):
    def change(to):
        def more(state):
            return "continue", state.replace(max_epoch=to)

        return STEPS.handle("epoch_completed", more, jl.only(1)).checkpoint(tmp_path)

    for to in (5, 2):
        expected = change(to).run(DATA, 0.0, epochs=3)
        shutil.rmtree(tmp_path)
        assert expected.epoch == to
        with pytest.raises(Stop):
            change(to).handle("epoch_started", _stop, jl.only(2)).run(DATA, 0.0, epochs=3)
        resumed = change(to).resume(tmp_path)
        assert digest(resumed.run(DATA, 0.0, epochs=3)) == digest(expected)
        assert resumed.run(DATA, 0.0, epochs=3).step == expected.step  # it stays ended
        assert resumed.run(DATA, 0.0, epochs=6).epoch == 6


# --- the attributes of models --------------------------------------------------------------------


class Ema(nnx.Variable):
    """A kind of variable of the user's own."""


class Net(nnx.Module):
    def __init__(self, rngs, rate=0.5, act=nnx.relu):
        self.first, self.second = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)
        self.drop, self.norm = nnx.Dropout(rate, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.noise = nnx.Rngs(noise=1)
        self.seen = Ema(jnp.zeros(4), decay=0.9)
        self.raw = jnp.zeros(())
        self.skip, self.act = True, act

    def __call__(self, x):
        x = self.norm(self.act(self.first(x)))
        self.seen[...] = self.seen.decay * self.seen[...] + x.mean(0)
        self.raw = self.raw + 1
        x = x + 0.1 * self.noise.noise.normal(x.shape)
        return self.second(x if self.skip else self.drop(x))


class Dense(nn.Module):
    rate: float = 0.5

    @nn.compact
    def __call__(self, x, train: bool = False):
        return nn.Dense(1)(nn.Dropout(self.rate, deterministic=not train)(x))


class Tree(eqx.Module):
    layer: eqx.nn.Linear
    scale: float = eqx.field(static=True)

    def __call__(self, x):
        return self.layer(x) * self.scale


def net(change=None, **options):
    module = Net(nnx.Rngs(0), **options)
    if change is not None:
        change(module)
    return module


def tree(scale):
    return Tree(eqx.nn.Linear(3, 1, key=jax.random.key(0)), scale)


def trainer(model):
    return jl.trainer(model, "mean_squared_error", optax.adam(0.1), log=0)


@pytest.fixture(scope="module")
def opened():
    """A trainer of `net`, its state in an epoch, and its state at the end."""
    loop = trainer(net())
    return stopped(loop, DATA, 8, init_state=None), loop.run(DATA, epochs=3, output_transform=whole)


NETS = {
    "a switch": (lambda: net(lambda m: setattr(m, "skip", False)), "model.skip was True"),
    "a rate": (lambda: net(rate=0.1), "model.drop.rate was 0.5 and is 0.1"),
    "a function": (lambda: net(act=jax.nn.gelu), "model.act was jax.relu and is jax.gelu"),
    "metadata": (
        lambda: net(lambda m: setattr(m, "seen", Ema(jnp.zeros(4), decay=0.5))),
        "model.seen.decay was 0.9 and is 0.5",
    ),
}


@pytest.mark.parametrize("change", NETS)
def test_a_module_with_other_attributes_is_refused(change, opened):
    other, message = NETS[change]
    with pytest.raises(SerializationError, match=message) as error:
        trainer(other()).from_state(opened[0]).run(DATA, epochs=3)
    assert "state.replace(statics={})" in str(error.value)


@pytest.mark.slow
def test_another_attribute_may_be_accepted(opened):
    state = opened[0].replace(statics={})
    loop = trainer(net(rate=0.1)).from_state(state)
    assert loop.run(DATA, epochs=3, output_transform=whole).step == 18


MODELS = {
    "Linen": (Dense(), Dense(0.1), "model.rate was 0.5 and is 0.1"),
    "Equinox": (tree(1.0), tree(2.0), "model.scale was 1.0 and is 2.0"),
    "a container": ({"a": Dense(0.2)}, {"a": Dense(0.1)}, r"model\['a'\].rate was 0.2 and is 0.1"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_of_any_kind_with_other_attributes_is_refused(kind):
    one, other, message = MODELS[kind]
    several = kind == "a container"
    loss = [("mean_squared_error", 1.0)] if several else "mean_squared_error"
    loops = [jl.trainer(model, loss, "sgd", log=0) for model in (one, other)]
    data = [(x, {"a": y}) for x, y in DATA] if several else DATA
    state = loops[0].run(data, epochs=0, output_transform=whole)
    with pytest.raises(SerializationError, match=message):
        loops[1].from_state(state).run(data, epochs=3)


@pytest.mark.parametrize("change", ["eval", "initializers", "a missing None"])
def test_what_the_loop_sets_itself_and_what_has_done_its_work_may_differ(change, opened):
    changes = {
        "eval": lambda m: m.eval(),
        "initializers": lambda m: setattr(m.first, "kernel_init", nn.initializers.zeros),
        "a missing None": lambda m: setattr(m, "new_in_a_later_version", None),
    }
    state, expected = opened
    other = trainer(net(changes[change])).from_state(state)
    if change != "eval":
        other.check(DATA, epochs=3)
        return
    ended = other.run(DATA, epochs=3, output_transform=whole)
    assert digest(ended) == digest(expected)
    # Streams, statistics, a variable of one's own and a bare array are in the state.
    model_state = expected.step_state["model_state"]
    assert float(model_state["raw"]) == 18
    assert int(model_state["noise"]["noise"]["count"][...]) == 18
    for name in ("seen", "norm"):
        assert all(np.abs(leaf).sum() > 0 for leaf in jax.tree.leaves(model_state[name]))


def test_the_module_of_the_user_may_change_after_the_loop_is_made():
    module = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    data = [(X, X)]
    loops = [jl.trainer(module, "mean_squared_error", "sgd", log=0) for _ in range(2)]
    expected = loops[0].validate(data).run(data, output_transform=whole)
    module.rate = 0.1
    assert digest(loops[1].validate(data).run(data, output_transform=whole)) == digest(expected)


def test_a_module_as_the_first_state_must_have_the_loops_attributes():
    def dropout(rate=0.5):
        return nnx.Dropout(rate, rngs=nnx.Rngs(0))

    data = [(X, X)]
    evaluator = jl.evaluator(dropout()).metric("mean_squared_error")
    given = dropout()
    given.eval()
    assert evaluator.run(data, given)["mean_squared_error"] == 0
    given = dropout(0.1)
    with pytest.raises(ModelError, match="model.rate was 0.1 and is 0.5"):
        evaluator.run(data, given)
    assert evaluator.run(data, nnx.state(given))["mean_squared_error"] == 0
    with pytest.raises(ModelError, match="model.scale was 2.0 and is 1.0"):
        jl.evaluator(tree(1.0)).metric("mean_squared_error").run(DATA, tree(2.0))


def test_an_attribute_that_the_forward_pass_changes_warns():
    class Counts(nnx.Module):
        def __init__(self):
            self.layer, self.calls = nnx.Linear(3, 1, rngs=nnx.Rngs(0)), 0

        def __call__(self, x):
            self.calls += 1
            return self.layer(x)

    with pytest.warns(UserWarning, match="model.calls was 0 and is 1"):
        trainer(Counts()).run(DATA)


# --- a key that a handler adds -------------------------------------------------------------------


def add(state):
    if "mine" in state.step_state:
        return None
    mine = {"count": jnp.int32(7), "like": jnp.ones((2, 3))}
    return "continue", state.replace(step_state={**state.step_state, "mine": mine})


LINE = (lambda key, x: jnp.zeros((3, 1)), lambda w, x: x @ w)


@pytest.mark.parametrize(
    "event",
    [
        pytest.param("started", marks=pytest.mark.slow),
        pytest.param("epoch_started", marks=pytest.mark.slow),
        "iteration_completed",
    ],
)
def test_a_key_that_a_handler_adds_to_a_trainers_state_is_kept(event, tmp_path):
    plain = trainer(LINE).validate(DATA)
    loop = plain.handle(event, add)

    def saving(folder):
        every = {"event": "iteration_completed", "filter": jl.every(4)}
        return loop.checkpoint(tmp_path / folder, **every)

    with pytest.warns(UserWarning, match="handler `add` changed the structure") as seen:
        expected = saving("a").run(DATA, epochs=3, output_transform=whole)
    assert len(seen) == 1
    assert int(expected.step_state["mine"]["count"]) == 7
    without = plain.run(DATA, epochs=3, output_transform=whole)
    assert digest(without)["history"] == digest(expected)["history"]
    with pytest.raises(RecompilationError):
        loop.run(DATA, epochs=3, strict=True)
    with pytest.warns(UserWarning), pytest.raises(Stop):
        saving("b").handle("iteration_completed", _stop, jl.only(10)).run(DATA, epochs=3)
    # The change is in the checkpoint, so nothing is recompiled.
    options = {"output_transform": whole, "strict": True}
    ended = saving("b").resume(tmp_path / "b").run(DATA, epochs=3, **options)
    assert digest(ended) == digest(expected)
    state = jl.deserialize_state(jl.serialize_state(ended), like=ended)
    state = loop.from_state(state).run(DATA, epochs=4, **options)
    assert int(state.step_state["mine"]["count"]) == 7


def test_a_key_that_a_handler_adds_to_an_evaluators_state_is_kept():
    loop = jl.evaluator(LINE).metric("mean_squared_error").handle("iteration_completed", add)
    with pytest.warns(UserWarning, match="handler `add` changed the structure"):
        state = loop.run(DATA, jnp.zeros((3, 1)), output_transform=whole)
    assert int(state.step_state["mine"]["count"]) == 7


def test_a_metric_whose_shape_a_handler_changes_in_mid_epoch_is_an_error():
    def grow(state):
        return "continue", state.replace(step_state={"w": jnp.zeros(5)})

    loop = jl.loop(lambda batch, s: s).metric(lambda w: w, "w", lambda acc, w, i: w, ["w"])
    start = {"w": jnp.zeros(3)}
    with pytest.warns(UserWarning), pytest.raises(jl.errors.StructureError, match="old shapes"):
        loop.handle("iteration_completed", grow, jl.only(2)).run([1, 2, 3], start)
    with pytest.warns(UserWarning):
        state = loop.handle("epoch_started", grow).run([1, 2, 3], start)
    assert state.history[0]["w"].shape == (5,)


def test_a_step_state_that_a_handler_reshaped_is_resumed(tmp_path):
    def grow(state):
        old = state.step_state
        new = {"w": jnp.ones(5), "opt": old["opt"], "nested": {**old["nested"], "more": (X, 1)}}
        return "continue", state.replace(step_state=new)

    start = {
        "w": jnp.zeros(3),
        "gone": jnp.zeros(2),
        "opt": optax.adam(0.1).init(jnp.zeros(2)),
        "nested": {"key": jax.random.key(0), "none": {}},
    }
    loop = (
        jl.loop(lambda batch, s: {**s, "w": s["w"] + batch})
        .handle("iteration_completed", grow, jl.only(2))
        .checkpoint(tmp_path, event="iteration_completed", filter=jl.every(3))
    )
    with pytest.warns(UserWarning, match="handler `grow` changed"):
        expected = loop.run([1.0, 2.0, 3.0, 4.0], start)
    shutil.rmtree(tmp_path)
    with pytest.warns(UserWarning), pytest.raises(Stop):
        loop.handle("iteration_completed", _stop, jl.only(4)).run([1.0, 2.0, 3.0, 4.0], start)
    resumed = loop.resume(tmp_path).run([1.0, 2.0, 3.0, 4.0], start, strict=True)
    assert digest(resumed) == digest(expected)
    # Only what the handler changed may differ.
    start["opt"] = optax.sgd(0.1, momentum=0.9).init(jnp.zeros(2))
    with pytest.raises(SerializationError, match=r"step_state\['opt'\]"):
        loop.resume(tmp_path).run([1.0, 2.0, 3.0, 4.0], start)


# --- descriptions --------------------------------------------------------------------------------

DESCRIBE = """
import functools, json, clu.metrics, jax
from tests import test_continuing as t

def fn(x):
    return x

loop = t.STEPS
for index, (before, after) in enumerate(t.SWAPS.values()):
    for name, one in (("a", before), ("b", after)):
        if one is not None:
            metric, *rest = one
            loop = loop.metric(metric, f"{name}{index}", *rest[1:])
loop = loop.metric(clu.metrics.Average.from_output("x"), "clu").metric(fn, "fn", None, {"x"}.pop())
loop = loop.metric(jax.jit(lambda x: x), "jit", None, ["x"])
models = [t.net(), t.Dense(), t.tree(2.0), {"a": t.net(act=functools.partial(jax.nn.elu, alpha=2))}]
found = [dict(loop.run(t.DATA, 0.0, epochs=0).metric_meanings)]
for model in models:
    loss = [("mean_squared_error", 1.0)] if isinstance(model, dict) else "mean_squared_error"
    data = [(x, {"a": y} if isinstance(model, dict) else y) for x, y in t.DATA]
    trainer = t.jl.trainer(model, loss, "sgd", log=0)
    found.append(trainer.run(data, epochs=0, output_transform=t.whole).statics)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_descriptions_are_the_same_in_every_process():
    seen = set()
    for seed in ("0", "1"):
        made = subprocess.run(
            [sys.executable, "-c", DESCRIBE],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        seen.add(made.stdout)
    (text,) = seen
    assert "0x" not in text and "object at" not in text
