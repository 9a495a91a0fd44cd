"""A run continues only from a state that it fits: its metrics, its data, its model's attributes."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxloop as jl
from jaxloop.errors import DataError, SerializationError
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


@pytest.mark.parametrize("swap", SWAPS)
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
    # At the end of an epoch, any metric may come and go, and monitors of it work.
    state = stopped(before, DATA, 1, "epoch_started")
    ended = after.early_stop(after.metrics[-1].name, patience=9).from_state(state)
    assert (
        digest(ended.run(DATA, epochs=2))["metrics"]
        == digest(after.run(DATA, 0.0, epochs=2))["metrics"]
    )


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
