"""``mode="auto"``: a metric says which of its values are better."""

import dataclasses
import warnings

import clu.metrics
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxloop as jl
from jaxloop import losses, metrics
from jaxloop._spec import Handler
from jaxloop.handlers import as_events, as_filter
from jaxloop.metrics.declare import declare, declare_batch_mean, names
from jaxloop.metrics.derived import declare_derived
from jaxloop.metrics.names import better_of

MORE = {"accuracy", "precision", "recall", "sensitivity", "specificity"}
MORE |= {"true_positives", "true_negatives", "top_k_categorical_accuracy", "cosine_similarity"}


@pytest.mark.parametrize("name", names())
def test_what_is_known_of_the_metrics_by_name(name):
    batchwise = losses.get(name).batchwise if name in losses.names() else False
    how = "running_average" if batchwise else None
    assert better_of(declare(name, accumulate=how)) == ("max" if name in MORE else "min")


def test_what_is_known_of_other_metrics():
    own = jl.Metric(*[lambda *args: 0] * 4, name="own")
    cases = {
        "min": [
            declare_batch_mean("loss", "loss"),
            declare(optax.losses.squared_error),
            declare(optax.losses.dice_loss),
            declare(metrics.false_positives(threshold=0.3)),
            declare(metrics.mean_squared_error(), accumulate="last"),
            declare("huber", accumulate=jl.window(3)),
            declare("loss"),
            declare(metrics.mean(abs, better="min"), "m"),
        ],
        "max": [
            declare("accuracy", "top", where="mask"),
            declare("accuracy", accumulate="running_max"),
            declare(metrics.top_k_categorical_accuracy(k=2)),
            declare(optax.losses.cosine_similarity),
            declare(jl.Metric(own.init, own.update, own.merge, own.compute, "own", None, "max")),
        ],
        None: [
            declare(own),
            declare(lambda x: x, "f"),
            declare("kl"),
            declare(metrics.mean(abs), "m"),
            declare(clu.metrics.Accuracy),
            declare("accuracy", accumulate=lambda acc, obs, i: acc),
            declare_derived("log", np.log, "loss"),
        ],
    }
    for better, specs in cases.items():
        assert [better_of(spec) for spec in specs] == [better] * len(specs)


# --- decisions ------------------------------------------------------------------------------------


def emitting(batch, state):
    return jl.emit(state, **batch)


def scored(*scores):
    """Each epoch has an accuracy and a squared error of its own, which rise and fall together."""

    def data(epoch):
        y_pred = np.zeros(10, np.float32)
        y_pred[: scores[epoch]] = 1
        yield {"y_true": np.ones(10, np.float32), "y_pred": y_pred, "x": np.float32(scores[epoch])}

    return data


LOOP = jl.loop(emitting).metric("accuracy").metric("mean_squared_error", "mse").metric("x")


def best_epoch(loop, tmp_path, criteria, scores, **options):
    loop = loop.checkpoint(tmp_path, criteria=criteria, keep=None, **options)
    state = loop.run(scored(*scores), epochs=len(scores))
    memory = state.handler_state[f"checkpoint_{criteria}"]
    return memory["step"] - 1, float(memory["best"])


def test_the_criteria_of_a_checkpoint(tmp_path):
    scores = (3, 8, 1)
    assert best_epoch(LOOP, tmp_path / "a", "accuracy", scores) == (1, pytest.approx(0.8))
    assert best_epoch(LOOP, tmp_path / "b", "mse", scores) == (1, pytest.approx(0.2))
    assert best_epoch(LOOP, tmp_path / "c", "accuracy", scores, mode="min")[0] == 2
    with pytest.warns(UserWarning, match="checkpoint_x: mode='auto' cannot tell.*'x'.*smaller"):
        assert best_epoch(LOOP, tmp_path / "d", "x", scores)[0] == 2


def test_an_early_stop_and_a_monitor():
    calls = []

    def watched(metric, scores):
        calls.clear()
        loop = LOOP.early_stop(metric, patience=2)
        loop = loop.monitor(metric, lambda s: calls.append(s.epoch), name="m", patience=1)
        state = loop.run(scored(*scores), epochs=len(scores))
        return state.halted_by, list(calls)

    for metric in ("accuracy", "mse"):  # both improve as the score grows
        assert watched(metric, (1, 2, 3, 4)) == (None, [])
        assert watched(metric, (4, 3, 2, 1)) == (f"early_stop_{metric}", [1])
    with pytest.warns(UserWarning, match="early_stop_x, m: mode='auto'") as caught:
        assert watched("x", (1, 2, 3, 4)) == ("early_stop_x", [1])
    assert len(caught) == 1


def test_a_plateau():
    def scale(metric, scores):
        def step(batch, state):
            return jl.emit(state, **batch)

        loop = jl.loop(step).metric("accuracy").metric("mean_squared_error", "mse")
        loop = loop.reduce_lr_on_plateau(metric, patience=1, factor=0.5)
        state = loop.run(scored(*scores), {"learning_rate": 1.0}, epochs=len(scores))
        return float(state.step_state["learning_rate"])

    for metric in ("accuracy", "mse"):
        assert scale(metric, (1, 2, 3)) == 1 and scale(metric, (3, 2, 1)) == 0.25


def test_the_value_of_one_output_is_like_its_metric():
    def data(epoch):
        ones = np.ones(4, np.float32)
        y_pred = {"head": ones * (epoch > 0), "tail": ones}
        yield {"y_true": {"head": ones, "tail": ones}, "y_pred": y_pred}

    loop = jl.loop(emitting).metric("accuracy", "a/b")
    state = loop.early_stop("a/b/head", patience=2).run(data, epochs=3)
    assert state.handler_state["early_stop_a/b/head"]["best"] == 1 and state.halted_by is None


MODEL = (lambda key, x: jnp.zeros((2, 1)), lambda w, x: x @ w)
X = np.random.default_rng(0).random((8, 2)).astype(np.float32)
DATA = [(X, (X[:, :1] > 0.5).astype(np.float32))]


def test_what_validation_adds_is_like_the_metrics():
    loop = jl.trainer(MODEL, "mean_squared_error", "sgd", log=0).metric("accuracy")
    loop = loop.derive("error", lambda a: 1 - a, of="accuracy").validate(DATA)

    def modes(metric):
        *others, handler = loop.early_stop(metric).attachments
        found = []

        def open(start):
            found.append(handler.open(start).mode)
            return handler.fn

        spied = dataclasses.replace(handler, open=open)
        loop.replace(attachments=(*others, spied)).run(DATA)
        return found

    assert modes("validation_accuracy") == modes("accuracy") == ["max"]
    assert modes("validation_loss") == modes("loss") == ["min"]
    with pytest.warns(UserWarning, match="'validation_error'"):
        assert modes("validation_error") == ["min"]


def adding(better):
    """A user's handler that adds a score to the metrics."""

    def add(state):
        score = np.float32(state.epoch)
        return "continue", state.replace(metrics={**state.metrics, "score": score})

    return Handler(as_events("epoch_completed"), as_filter("always"), "add", add, adds=better)


def test_what_a_handler_says_of_the_metrics_that_it_adds():
    def run(adds):
        loop = LOOP.attach(adding(adds)).early_stop("score", patience=2)
        return loop.run(scored(1, 2, 3, 4), epochs=4).halted_by

    assert run(lambda loop: {"score": "max"}) is None
    assert run(lambda loop: {"score": "min"}) == "early_stop_score"
    for unknown in (lambda loop: {"score": None}, ("score",), None):
        with pytest.warns(UserWarning, match="early_stop_score: mode='auto'"):
            assert run(unknown) == "early_stop_score"


def test_one_warning_a_run_asks_for_the_mode(tmp_path):
    loop = (
        LOOP.metric(lambda x: x, "y", None, ["x"])
        .early_stop("x", patience=9)
        .checkpoint(tmp_path, criteria="y")
        .monitor("x", lambda state: None, name="m")
        .early_stop("accuracy")
        .reduce_lr_on_plateau("x", mode="max", name="asked")
    )
    expected = (
        "early_stop_x, checkpoint_y, m: mode='auto' cannot tell whether smaller or larger values "
        "of 'x', 'y' are better, and takes the smaller ones\n  fix: pass mode='min' or mode='max'"
    )
    started = []
    loop = loop.handle("started", lambda state: started.append(1))
    for call in (loop.run, loop.check):
        with pytest.warns(UserWarning) as caught:
            call(scored(1, 2), {"learning_rate": 1.0}, epochs=2)
        assert [str(one.message) for one in caught] == [expected]
    assert started == [1]


def test_nothing_is_asked_where_the_mode_is_given(tmp_path):
    loop = (
        LOOP.early_stop("x", mode="max")
        .checkpoint(tmp_path / "a")
        .checkpoint(tmp_path / "b", criteria="x", mode=lambda new, best: new > best)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop.run(scored(1, 2), epochs=2)


def test_a_resumed_run_makes_the_same_decisions(tmp_path):
    scores = (2, 5, 4, 3)

    def loop(path):
        watching = LOOP.early_stop("accuracy", patience=2).early_stop("mse", patience=9)
        return watching.checkpoint(path, criteria="accuracy", name="best").checkpoint(path)

    whole = loop(tmp_path / "whole").run(scored(*scores), epochs=4)
    loop(tmp_path / "parts").run(scored(*scores), epochs=2)
    parts = loop(tmp_path / "parts").resume(tmp_path / "parts").run(scored(*scores), epochs=4)
    assert whole.halted_by == parts.halted_by == "early_stop_accuracy"
    assert whole.handler_state == parts.handler_state
    assert parts.handler_state["best"]["best"] == np.float32(0.5)


def test_auto_can_be_written_and_other_words_cannot():
    assert LOOP.early_stop("accuracy", mode="auto").run(scored(1), epochs=1).epoch == 1
    with pytest.raises(jl.errors.UnknownNameError, match="use one of: auto, max, min"):
        LOOP.early_stop("accuracy", mode="best")
