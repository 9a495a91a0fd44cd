"""Metrics by the name of a reported value, and metrics that are derived from others."""

import jax.numpy as jnp
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


# --- derived metrics ------------------------------------------------------------------------------


def ratio(precision, recall):
    return 2 * precision * recall / (precision + recall)


def test_a_derived_metric_is_a_function_of_the_values_at_each_iteration():
    seen = []
    loop = (
        jl.loop(emitting)
        .derive("squared", lambda log: log**2, of="log")  # declared before what it reads
        .derive("log", jnp.log, of="kl")
        .metric("kl")
        .derive("sum", lambda kl, norm: {"total": kl + norm, "both": [kl, norm]}, of=("kl", "norm"))
        .metric("norm")
        .observe("iteration_completed", lambda snapshot: seen.append(dict(snapshot.metrics)))
        .handle("epoch_completed", lambda state: seen.append(dict(state.metrics)))
    )
    state = loop.run(PLAIN, epochs=2)
    assert len(seen) == 6 and seen[2] == seen[1] == state.history[0]
    for found in seen:
        kl, norm = found["kl"], found["norm"]
        assert found["log"] == np.asarray(jnp.log(kl)) and type(found["log"]) is np.float32
        assert found["squared"] == found["log"] ** 2
        assert found["sum"] == {"total": kl + norm, "both": [kl, norm]}
    assert seen[0] != seen[1] == seen[4]
    without = jl.loop(emitting).metric("kl").run(PLAIN)
    assert without.history[0]["kl"] == state.history[0]["kl"]


def test_before_the_first_update_it_derives_from_nan_and_zero():
    found = []
    loop = jl.loop(emitting).metric("count", accumulate="running_sum")
    loop = (
        loop.metric("kl").derive("log", np.log, of="kl").derive("root", lambda n: n / n, of="count")
    )
    loop = loop.handle("epoch_started", lambda state: found.append(dict(state.metrics)))
    state = loop.run([{**unweighted(4), "count": np.arange(4)}])
    assert np.isnan(found[0]["log"]) and np.isnan(found[0]["root"])
    assert state.history[0]["root"] == 1


def test_numbers_of_python_become_those_of_numpy():
    loop = jl.loop(emitting).metric("norm")
    loop = loop.derive("float", float, of="norm").derive("flag", lambda n: n > 1, of="norm")
    loop = loop.derive("array", lambda n: [n, 2], of="norm")
    found = history(loop, [unweighted(4)])
    assert type(found["float"]) is np.float64 and type(found["flag"]) is np.bool_
    assert found["array"] == [4, 2] and type(found["array"][1]) is np.int64


def test_monitors_criteria_and_logs_know_it(tmp_path, capsys):
    loop = (
        jl.loop(emitting)
        .metric("norm")
        .derive("half", lambda norm: norm / 2, of="norm")
        .early_stop("half", mode="min", patience=2)
        .checkpoint(tmp_path, criteria="half", mode="min")
        .log(lambda s: f"half {s.metrics['half']:.1f}", event="epoch_completed")
    )
    state = loop.run([unweighted(4)], epochs=5)
    assert state.halted_by == "early_stop_half" and state.epoch == 3
    assert capsys.readouterr().out == "half 2.0\n" * 3
    assert state.handler_state["checkpoint_half"] == {"best": 2.0, "step": 1}


def supervised():
    model = (lambda key, x: jnp.zeros((2, 1)), lambda w, x: x @ w)
    x = np.random.default_rng(0).random((8, 2)).astype(np.float32)
    return model, [(x, x[:, :1])]


def test_validation_and_evaluation_derive_too():
    model, data = supervised()
    loop = jl.trainer(model, "mean_squared_error", "sgd", log=0)
    loop = loop.derive("root", np.sqrt, of="loss").validate(data)
    loop = loop.early_stop("validation_root", mode="min")
    state = loop.run(data, epochs=2, output_transform=lambda state: state)
    for found in state.history.values():
        assert found["root"] == np.sqrt(found["loss"])
        assert found["validation_root"] == np.sqrt(found["validation_loss"])
        assert found["root"] != found["validation_root"]
    evaluation = jl.evaluator(model).metric("mean_squared_error")
    evaluation = evaluation.derive("rmse", np.sqrt, of="mean_squared_error")
    values = evaluation.run(data, jnp.zeros((2, 1)))
    assert values["rmse"] == np.sqrt(values["mean_squared_error"]) > 0


def test_a_metric_of_several_outputs_is_derived_from_by_output():
    outputs = {"head": np.ones(4, np.float32), "tail": np.zeros(4, np.float32)}
    batch = {"y_true": outputs, "y_pred": {**outputs, "head": 3 * outputs["head"]}}
    loop = jl.loop(emitting).metric("mean_squared_error", "mse")
    assert history(loop.derive("root", np.sqrt, of="mse/head"), [batch])["root"] == 2
    with pytest.raises(errors.UnknownNameError, match="'root'.*'mse'; did you mean 'mse/"):
        loop.derive("root", np.sqrt, of="mse").run([batch])


def test_mistakes_are_errors_before_the_first_step():
    loop = jl.loop(emitting).metric("kl").handle("started", lambda state: 1 / 0)
    with pytest.raises(errors.UnknownNameError, match="'log': 'kll'; did you mean 'kl'"):
        loop.derive("log", np.log, of="kll").run(PLAIN)
    with pytest.raises(errors.UnknownNameError, match="use one of: kl"):
        loop.derive("log", np.log, of="validation_kl").run(PLAIN)
    circle = loop.derive("a", np.log, of="b").derive("b", np.log, of=("kl", "a"))
    with pytest.raises(errors.ArgumentError, match="derived from each other, got 'a', 'b'"):
        circle.run(PLAIN)
    with pytest.raises(errors.ArgumentError, match="derived from each other, got 'a'"):
        loop.derive("a", np.log, of="a").run(PLAIN)
    for wrong in (
        {"name": ""},
        {"name": None},
        {"fn": 3},
        {"of": ()},
        {"of": 3},
        {"of": ["kl", 1]},
    ):
        with pytest.raises(errors.ArgumentTypeError, match=f"derive: {next(iter(wrong))} must"):
            loop.derive(**{"name": "a", "fn": np.log, "of": "kl", **wrong})


def test_a_name_that_is_derived_twice_warns_and_the_last_wins():
    loop = jl.loop(emitting).metric("kl").derive("a", np.log, of="kl")
    with pytest.warns(UserWarning, match="'a' was declared twice") as caught:
        loop = loop.derive("a", np.sqrt, of="kl")
    assert caught[0].filename == __file__
    found = history(loop, PLAIN)
    assert found["a"] == np.sqrt(found["kl"])


def test_an_error_in_the_function_names_the_metric():
    def fails(kl):
        raise ValueError("no")

    loop = jl.loop(emitting).metric("kl").handle("started", lambda state: 1 / 0)
    for wrong, error in ((fails, ValueError), (ratio, TypeError)):
        with pytest.raises(error) as caught:
            loop.derive("mine", wrong, of="kl").run(PLAIN)
        assert "jaxloop: in the derived metric 'mine'" in caught.value.__notes__

    def fails_later(kl):
        return 0 if np.isnan(kl) else fails(kl)

    loop = jl.loop(emitting).metric("kl").derive("mine", fails_later, of="kl")
    with pytest.raises(ValueError, match="no") as caught:
        loop.run(PLAIN).history[0]
    assert "jaxloop: in the derived metric 'mine'" in caught.value.__notes__
    for value in (None, "high", [], object()):
        loop = jl.loop(emitting).metric("kl").derive("mine", lambda kl, value=value: value, of="kl")
        with pytest.raises(errors.ArgumentTypeError, match="'mine' must return numbers"):
            loop.run(PLAIN)
    for tree in (lambda kl: [kl, kl], lambda kl: np.stack([kl, kl])):
        loop = jl.loop(emitting).metric("kl").derive("two", tree, of="kl")
        loop = loop.handle("started", lambda state: 1 / 0).early_stop("two", mode="min")
        with pytest.raises(errors.ShapeError, match="scalar metric, got 'two'"):
            loop.run(PLAIN)


def test_it_may_change_in_mid_epoch():
    """A derived metric has no accumulator, so nothing of an open epoch depends on it."""
    states = []
    base = jl.loop(emitting).metric("kl")
    keep = ("iteration_completed", lambda state: states.append(state), jl.only(1))
    before = base.derive("a", np.log, of="kl").derive("gone", np.log, of="kl")
    before.handle(*keep).run(PLAIN)
    expected = base.run(PLAIN).history[0]["kl"]
    seen = []
    after = base.derive("a", np.sqrt, of="kl").derive("new", np.exp, of="a")
    after = after.observe("all", lambda s: seen.append((s.event, dict(s.metrics))))
    state = after.from_state(states[0]).run(PLAIN)
    assert set(state.history[0]) == {"kl", "a", "new"} and state.history[0]["kl"] == expected
    assert seen[-1][0] == "completed"
    for _, found in seen:
        assert set(found) == {"kl", "a", "new"}
        assert found["a"] == np.sqrt(found["kl"]) and found["new"] == np.exp(found["a"])
    with pytest.raises(errors.SerializationError, match="'a' is new"):
        base.metric("kl", "a").from_state(states[0]).run(PLAIN)


def test_it_may_change_at_the_end_of_an_epoch(tmp_path):
    base = jl.loop(emitting).metric("kl")
    states = []
    base.derive("a", np.log, of="kl").checkpoint(tmp_path).run(PLAIN)
    resumed = base.derive("a", np.sqrt, of="kl").resume(tmp_path).run(PLAIN, epochs=2)
    kl = resumed.history[1]["kl"]
    assert resumed.history == {0: {"kl": kl, "a": np.log(kl)}, 1: {"kl": kl, "a": np.sqrt(kl)}}

    def stop(state):
        states.append(state)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        base.derive("a", np.log, of="kl").handle("epoch_completed", stop).run(PLAIN)
    state = caught.value.loop_state
    found = base.derive("a", np.sqrt, of="kl").from_state(state).run(PLAIN).history[0]
    assert found == {"kl": kl, "a": np.sqrt(kl)}


def test_the_function_of_two():
    values = {
        "y_true": np.array([1, 0, 1, 1]),
        "y_pred": np.array([0.9, 0.8, 0.7, 0.1], np.float32),
    }
    loop = jl.loop(emitting).metric("precision").metric("recall")
    found = history(loop.derive("f1", ratio, of=("precision", "recall")), [values])
    assert found["f1"] == pytest.approx(2 / 3)
