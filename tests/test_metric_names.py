"""Metrics by the name of a reported value, and metrics that are derived from others."""

import numpy as np
import pytest

import jaxloop as jl
from jaxloop import errors


def emitting(batch, state):
    return jl.emit(state, **batch)


def values(num, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "kl": rng.random(num).astype(np.float32),
        "norm": np.float32(num),
        "sample_weight": rng.integers(0, 3, num).astype(np.float32),
    }


def unweighted(num, seed=0):
    return {name: value for name, value in values(num, seed).items() if name != "sample_weight"}


BATCHES = [values(5), values(2, seed=1)]
PLAIN = [unweighted(5), unweighted(2, seed=1)]


def history(loop, batches):
    return loop.run(batches).history[0]


# --- names of reported values ---------------------------------------------------------------------


def test_a_reported_value_is_averaged_like_the_result_of_a_function():
    loop = jl.loop(emitting)
    by_name = loop.metric("kl").metric("kl", "worst", "running_max").metric("norm", per="batch")
    by_name = by_name.metric("kl", "some", where=lambda named: named["kl"] > 0.5)
    by_function = (
        loop.metric(lambda x: x, "kl", None, ["kl"])
        .metric(lambda x: x, "worst", "running_max", ["kl"])
        .metric(lambda x: x, "norm", None, ["norm"], per="batch")
        .metric(lambda x: x, "some", None, ["kl"], where=lambda named: named["kl"] > 0.5)
    )
    assert history(by_name, BATCHES) == history(by_function, BATCHES)
    kl = np.concatenate([b["kl"] for b in BATCHES])
    weight = np.concatenate([b["sample_weight"] for b in BATCHES])
    assert history(by_name, BATCHES)["kl"] == pytest.approx(np.average(kl, weights=weight))


def test_a_scalar_counts_for_its_examples_but_not_under_weights():
    loop = jl.loop(emitting).metric("norm")
    assert history(loop, PLAIN)["norm"] == np.float32((5 * 5 + 2 * 2) / 7)
    with pytest.raises(errors.ShapeError, match=r"one value per example(.|\n)*per='batch'"):
        loop.run(BATCHES)


def test_a_carried_value_and_a_tree_have_names_too():
    def step(batch, state):
        return jl.emit({"total": state["total"] + batch}, parts={"a": batch, "b": [batch + 1]})

    loop = jl.loop(step).metric("total", accumulate="last").metric("parts")
    state = loop.run([1.0, 3.0], {"total": 0.0})
    assert state.history[0]["total"] == 4
    assert state.history[0]["parts"] == {"a": 2.0, "b": [3.0]}


def test_the_name_of_a_built_in_is_a_value_if_its_fields_are_not_reported():
    """As in the metrics that a Flax training step returns."""
    reported = {"accuracy": np.float32(0.5), "huber": np.ones(2, np.float32)}
    loop = jl.loop(emitting).metric("accuracy", per="batch").metric("huber")
    weight = {"sample_weight": np.array([1.0, 2.0], np.float32)}
    assert history(loop, [{**reported, **weight}]) == {"accuracy": 0.5, "huber": 1.0}
    fields = {"y_true": np.array([0, 1]), "y_pred": np.eye(2, dtype=np.float32)}
    loop = jl.loop(emitting).metric("accuracy")
    assert history(loop, [{**reported, **fields}])["accuracy"] == 1
    with pytest.raises(errors.ArgumentError, match="function or a reported value.*accuracy"):
        jl.loop(emitting).metric("accuracy", per="batch").run([{**reported, **fields}])
    # Half of the fields are not enough for the built-in.
    assert history(loop, [{**reported, "y_true": fields["y_true"]}])["accuracy"] == 0.5


@pytest.mark.parametrize(
    "name, near", [("acuracy", "accuracy"), ("kll", "kl"), ("entropy_of_all", None)]
)
def test_an_unknown_name_is_an_error_before_the_first_step(name, near):
    loop = jl.loop(emitting).metric(name).handle("started", lambda state: 1 / 0)
    with pytest.raises(errors.UnknownNameError) as caught:
        loop.run(BATCHES)
    text = str(caught.value)
    assert f"unknown metric {name!r}" in text
    assert near is None or f"did you mean {near!r}" in text
    assert "accuracy" in text and "kl" in text.split("use one of")[1]


def test_errors_without_data():
    loop = jl.loop(emitting)
    with pytest.raises(errors.UnknownNameError, match="'acuracy'.*did you mean 'accuracy'"):
        loop.metric("acuracy", transform_or_fields=["a", "b"])
    with pytest.raises(errors.UnknownNameError, match="field of metric 'accuracy'"):
        loop.metric("accuracy").run([{"y_true": np.zeros(2)}])
    with pytest.raises(errors.ArgumentError, match="per must be"):
        loop.metric("kl", per="row")


def test_elements_and_watchers():
    batch = {"kl": np.arange(6.0, dtype=np.float32).reshape(2, 3)}
    batch["sample_weight"] = batch["kl"] > 2
    loop = jl.loop(emitting).metric("kl").early_stop("kl", mode="min", patience=2)
    state = loop.run([batch], epochs=9)
    assert state.history[0]["kl"] == 4 and state.halted_by == "early_stop_kl"
