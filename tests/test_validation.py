"""Validation of any loop: which metrics it evaluates, with which step, and at what cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxloop as jl
from tests.test_costs import counting

X = np.linspace(-1.0, 1.0, 12, dtype=np.float32).reshape(6, 2)
Y = (X @ np.float32([[2.0], [-1.0]])).astype(np.float32)
DATA = [(X[:4], Y[:4]), (X[4:], Y[4:])]
HELD_OUT = [(X[:5] + 1, Y[:5]), (X[5:] + 1, Y[5:])]
PAIR = (lambda key, x: jnp.zeros((2, 1)), lambda w, x: x @ w)


def step(batch, w):
    x, y = batch
    loss, gradient = jax.value_and_grad(lambda w: jnp.mean((x @ w - y) ** 2))(w)
    return jl.emit(w - 0.1 * gradient, loss=loss, y_true=y, y_pred=x @ w)


def eval_step(batch, w):
    x, y = batch
    return {"y_true": y, "y_pred": x @ w}


START = jnp.zeros((2, 1))
PLAIN = jl.loop(step)


def squared_error(w, batches=HELD_OUT):
    return np.mean([(x @ w - y) ** 2 for rows in batches for x, y in zip(*rows, strict=True)])


@pytest.mark.parametrize("late", [False, True])
def test_all_metrics_are_evaluated_whatever_the_order_of_the_calls(late):
    def metrics(loop):
        return loop.metric("mean_absolute_error").derive("twice", lambda v: 2 * v, "huber")

    loop = jl.trainer(PAIR, "mean_squared_error", "sgd", log=0).metric("huber")
    loop = metrics(loop.validate(HELD_OUT)) if late else metrics(loop).validate(HELD_OUT)
    state = loop.early_stop("validation_twice", mode="min").run(DATA, output_transform=lambda s: s)
    record = state.history[0]
    names = ["loss", "huber", "mean_absolute_error", "twice"]
    assert set(record) == {*names, *(f"validation_{name}" for name in names)}
    assert record["validation_twice"] == 2 * record["validation_huber"]
    w = state.step_state["model_state"]
    assert record["validation_loss"] == pytest.approx(squared_error(w), rel=1e-5)


def test_any_loop_is_validated_with_a_step_of_its_own():
    kept = []

    def keep(batch, w):
        kept.append(w)
        return eval_step(batch, w)

    loop = PLAIN.metric("mean_squared_error").validate(HELD_OUT, eval_step=keep)
    state = loop.run(DATA, START, epochs=3)
    plain = PLAIN.run(DATA, START, epochs=3)
    assert np.array_equal(state.step_state, plain.step_state)
    value = state.history[2]["validation_mean_squared_error"]
    assert value == pytest.approx(squared_error(state.step_state), rel=1e-5)
    # It is traced once for each shape of a batch, and not called again.
    assert len(kept) == 2
    # What `run` was given is neither changed nor donated.
    assert not START.is_deleted() and not np.any(START)


def test_an_eval_step_gets_the_whole_state_and_may_return_an_emission():
    def train(batch, state):
        return {"w": state["w"] + 1, "num_steps": state["num_steps"] + 1}

    def evaluate(batch, state):
        # Its state is ignored.
        return jl.emit({**state, "w": state["w"] * 0}, product=batch * state["w"], **state)

    loop = jl.loop(train).validate(
        [np.float32([1, 2, 3])],
        eval_step=evaluate,
        metrics={"product": "product", "num_steps": "num_steps"},
    )
    state = loop.run([0, 0], {"w": 1.0, "num_steps": 0}, epochs=2)
    assert [float(state.history[e]["validation_product"]) for e in (0, 1)] == [6.0, 10.0]
    assert [int(state.history[e]["validation_num_steps"]) for e in (0, 1)] == [2, 4]
    assert set(state.history[0]) == {"validation_product", "validation_num_steps"}


def test_a_validation_may_have_its_own_metrics():
    own = {"error": "mean_absolute_error", "peak": lambda t, p: jnp.max(jnp.abs(t - p))}
    loop = (
        jl.trainer(PAIR, "mean_squared_error", "sgd", log=0)
        .validate(HELD_OUT, metrics=own)
        .validate(DATA, prefix="training_")
    )
    record = loop.run(DATA, output_transform=lambda s: s).history[0]
    assert set(record) == {"loss", "validation_error", "validation_peak", "training_loss"}


def test_programs_are_compiled_once_for_all_epochs_and_runs():
    loop = PLAIN.metric("mean_squared_error").validate(HELD_OUT, eval_step=eval_step)
    loop.run(DATA, START)
    with counting() as counts:
        loop.run(DATA, START, epochs=3)
    assert counts["compilations"] == 0
    longer = loop.metric("huber")
    state = longer.run(DATA, START)
    assert set(state.history[0]) >= {"validation_mean_squared_error", "validation_huber"}
    with counting() as counts:
        longer.run(DATA, START, epochs=2)
        loop.run(DATA, START, epochs=2)
    assert counts["compilations"] == 0


def never(batch, w):
    raise AssertionError("the step ran")


WRONG = {
    "no model": (lambda: PLAIN.validate(DATA), "no model to evaluate.*eval_step="),
    "a model too": (
        lambda: PLAIN.validate(DATA, model=PAIR, eval_step=eval_step),
        "model= must not be given together with an eval_step",
    ),
    "not a function": (lambda: PLAIN.validate(DATA, eval_step=3), "eval_step must be a function"),
    "a list of metrics": (
        lambda: PLAIN.validate(DATA, eval_step=eval_step, metrics=["huber"]),
        "metrics must be a dict of metrics by name, got a list",
    ),
    "no metrics": (
        lambda: PLAIN.validate(DATA, eval_step=eval_step, metrics={}),
        "at least one metric, got an empty dict",
    ),
    "a metric of a wrong type": (
        lambda: PLAIN.validate(DATA, eval_step=eval_step, metrics={"huber": 3}),
        "a metric must be",
    ),
    "a name of a wrong type": (
        lambda: PLAIN.validate(DATA, eval_step=eval_step, metrics={3: "huber"}),
        "name of a metric must be a nonempty string",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    act, pattern = WRONG[case]
    with pytest.raises(jl.JaxloopError, match=f"(?s){pattern}") as info:
        act()
    assert "fix:" in str(info.value)


BEFORE_THE_FIRST_STEP = {
    "it reports too little": (
        {"eval_step": lambda batch, w: {"y_pred": batch[0] @ w, "note": w}},
        "validation: unknown field of metric 'huber' 'y_true'.*eval_step reports note, y_pred",
    ),
    "it reports nothing": (
        {"eval_step": lambda batch, w: {}},
        "validation: .*'huber'.*eval_step reports nothing",
    ),
    "an unknown metric": (
        {"eval_step": eval_step, "metrics": {"kl": "kl"}},
        "validation: unknown metric 'kl'.*eval_step reports y_pred, y_true",
    ),
    "not a dict": (
        {"eval_step": lambda batch, w: batch[0] @ w},
        "validation: eval_step must return a dict of values by name, or jl.emit",
    ),
    "empty data": ({"eval_step": eval_step, "data": []}, "at least one batch"),
}


@pytest.mark.parametrize("case", BEFORE_THE_FIRST_STEP)
def test_errors_before_the_first_step(case):
    given, pattern = BEFORE_THE_FIRST_STEP[case]
    seen = []
    loop = PLAIN.metric("huber").handle("started", lambda state: seen.append(state))
    loop = loop.validate(**{"data": HELD_OUT, **given})
    with pytest.raises(jl.JaxloopError, match=f"(?s){pattern}") as info:
        loop.run(DATA, START)
    assert not seen and "fix:" in str(info.value)


def test_a_loop_without_metrics_is_an_error_before_the_first_step():
    loop = PLAIN.validate(HELD_OUT, eval_step=eval_step)
    with pytest.raises(jl.JaxloopError, match="validation: there must be a metric to evaluate"):
        loop.run(DATA, START)
    # A metric that is attached later mends it.
    state = loop.metric("huber").run(DATA, START)
    assert "validation_huber" in state.history[0]


@pytest.mark.slow
def test_a_validated_run_resumes_exactly(tmp_path):
    def make(path):
        loop = PLAIN.validate(HELD_OUT, eval_step=eval_step).metric("mean_squared_error")
        return loop.checkpoint(path, event="iteration_completed").resume(path)

    whole = make(tmp_path / "whole").run(DATA, START, epochs=3)
    halted = make(tmp_path / "halted").handle(
        "iteration_completed", lambda state: 1 / 0, jl.only(4)
    )
    with pytest.raises(ZeroDivisionError):
        halted.run(DATA, START, epochs=3)
    state = make(tmp_path / "halted").run(DATA, START, epochs=3)
    assert np.array_equal(state.step_state, whole.step_state)
    assert state.history == whole.history
