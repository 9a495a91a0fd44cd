"""early_stop with its `start_from` and `baseline`, against a naive interpreter."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxloop as jl
from tests import reference


def step(batch, state):
    return jl.emit(state + 1, x=batch)


# The value of an epoch is that of its only batch, and the state counts the epochs.
LOOP = jl.loop(step).metric("x", per="batch")


def data_of(values):
    return lambda epoch: [jnp.float32(values[epoch])]


def run(loop, values, **kwargs):
    return loop.run(data_of(values), 0, epochs=len(values), **kwargs)


numbers = st.sampled_from([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, float("nan")])
options = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(["min", "max"]),
        "patience": st.integers(1, 3),
        "min_delta": st.sampled_from([0.0, 0.5, 1.0]),
        "start_from": st.integers(0, 4),
        "baseline": st.none() | st.sampled_from([1.0, 2.5, 4.0]),
    }
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(values=st.lists(numbers, min_size=1, max_size=9), options=options, cut=st.integers(1, 8))
def test_it_does_what_the_interpreter_does(values, options, cut):
    num_epochs, best = reference.early_stop(values, **options)
    loop = LOOP.early_stop("x", **options)
    state = run(loop, values)
    assert state.epoch == num_epochs
    assert state.status == ("halted" if state.halted_by else "completed")
    # With restore_best, the output is made from the state after the best epoch.
    kept = run(LOOP.early_stop("x", **options, restore_best=True), values)
    assert int(kept.step_state) == (num_epochs if best is None else best + 1)
    # Continued from any epoch, it decides the same.
    first = loop.run(data_of(values), 0, epochs=min(cut, len(values)))
    if first.status == "completed" and cut < len(values):
        again = run(loop.from_state(first), values)
        assert (again.epoch, again.halted_by) == (state.epoch, state.halted_by)
        assert repr(again.handler_state) == repr(state.handler_state)


def test_start_from_waits_with_everything():
    values = [0.0, 9.0, 9.0, 5.0, 6.0, 7.0]
    state = run(LOOP.early_stop("x", mode="min", patience=2, start_from=3), values)
    assert (state.epoch, state.handler_state["early_stop_x"]["best"]) == (6, 5.0)
    state = run(LOOP.early_stop("x", mode="min", patience=2), values)
    assert (state.epoch, state.handler_state["early_stop_x"]["best"]) == (3, 0.0)
    # If it starts after the run's end, there is no best, and the output is the last state.
    loop = LOOP.early_stop("x", mode="min", patience=1, start_from=99, restore_best=True)
    state = run(loop, values)
    assert (state.status, int(state.step_state)) == ("completed", 6)
    assert "early_stop_x" not in state.handler_state


def test_start_from_counts_epochs_at_any_event():
    loop = LOOP.early_stop("x", mode="max", patience=4, start_from=2, event="iteration_completed")
    state = loop.run([jnp.float32(1.0)] * 3, 0, epochs=9)
    # The first of epoch 2 is the best, and the fourth event after that is the second of epoch 3.
    assert (state.status, state.step) == ("halted", 11)


def test_a_baseline_must_be_reached_within_patience():
    rises = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    state = run(LOOP.early_stop("x", mode="max", patience=3, baseline=0.9), rises)
    assert (state.epoch, state.halted_by) == (3, "early_stop_x")
    assert np.isclose(state.handler_state["early_stop_x"]["best"], 0.3)
    state = run(LOOP.early_stop("x", mode="max", patience=3, baseline=0.25), rises)
    assert state.status == "completed"
    # It is judged by the function of the mode, too.
    near = lambda new, old: abs(new - 0.35) < abs(old - 0.35)  # noqa: E731
    state = run(LOOP.early_stop("x", mode=near, patience=2, baseline=0.32), rises)
    assert state.epoch == 2


@pytest.mark.parametrize("restore_best", [False, True])
def test_a_run_of_a_script_without_them_continues_with_them(tmp_path, restore_best):
    """Nothing in the memory is new, so checkpoints of older versions are read as before."""
    values = [5.0, 4.0, 4.0, 4.0, 4.0]
    old = LOOP.early_stop("x", mode="min", patience=3, restore_best=restore_best)
    old.checkpoint(tmp_path).run(data_of(values), 0, epochs=3)
    memory = jl.restore(tmp_path).handler_state["early_stop_x"]
    assert set(memory) == {"best", "count", "cooldown"} | (
        {"step_state"} if restore_best else set()
    )
    new = LOOP.early_stop(
        "x", mode="min", patience=3, restore_best=restore_best, start_from=1, baseline=4.5
    )
    state = run(new.resume(tmp_path), values)
    assert (state.epoch, state.halted_by) == (5, "early_stop_x")
    assert int(state.step_state) == (2 if restore_best else 5)


BAD = {
    "start_from=-1": ({"start_from": -1}, "start_from must be at least 0, got -1"),
    "start_from=1.5": ({"start_from": 1.5}, "start_from"),
    "start_from=True": ({"start_from": True}, "start_from"),
    "baseline='1'": ({"baseline": "1"}, "baseline must be a number or None, got '1'"),
    "baseline=nan": ({"baseline": float("nan")}, "baseline must be a number, got nan"),
    "baseline=array": ({"baseline": np.ones(2)}, "baseline must be a number or None"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_is_an_error_at_the_call(case):
    kwargs, pattern = BAD[case]
    with pytest.raises(jl.JaxloopError, match=f"(?s){pattern}.*\n  fix: [a-z]"):
        LOOP.early_stop("x", **kwargs)
