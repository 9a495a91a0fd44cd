"""Bad input gives an error that names the thing, before any step is lost."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxloop as jl

PAIR = (lambda key, x: jnp.zeros((x.shape[-1], 1)), lambda w, x: x @ w)
X = np.ones((4, 2), np.float32)


def trainer(**kwargs):
    return jl.trainer(PAIR, "mean_squared_error", "sgd", log=0, **kwargs)


def plain():
    return jl.loop(lambda b, s: s + b)


CASES = {
    "empty data": (lambda: plain().run([], 0), "empty"),
    "empty generator": (lambda: plain().run(iter([]), 0), "empty"),
    "not a pair": (lambda: trainer().run([X]), r"\(x, y\)"),
    "unknown event": (lambda: plain().handle("epoch_complete", print), "epoch_completed"),
    "unknown filter": (lambda: plain().handle("started", print, "onse"), "once"),
    "unknown filter key": (lambda: plain().handle("started", print, {"evry": 2}), "every"),
    "unknown metric": (lambda: plain().metric("acuracy").run([1], 0), "accuracy"),
    "unknown loss": (lambda: jl.trainer(PAIR, "mean_square_error", "sgd"), "mean_squared_error"),
    "unknown optimizer": (lambda: jl.trainer(PAIR, "huber", "adm"), "adam"),
    "unknown accumulator": (
        lambda: plain().metric("accuracy", None, "runing_sum"),
        "running_sum",
    ),
    "unknown mode": (lambda: trainer().early_stop("loss", mode="mix"), "min"),
    "unknown loss scale": (lambda: trainer(loss_scale="dynamik"), "dynamic"),
    "every(0)": (lambda: jl.every(0), "at least 1"),
    "every(1.5)": (lambda: jl.every(1.5), "whole number"),
    "every(True)": (lambda: jl.every(True), "whole number"),
    "handler returns an int": (
        lambda: plain().handle("started", lambda s: 3, name="mine").run([1], 0),
        "mine.*started.*int",
    ),
    "handler returns another status": (
        lambda: plain().handle("started", lambda s: ("stop", s), name="mine").run([1], 0),
        "mine",
    ),
    "halt_epoch without an epoch": (
        lambda: plain().handle("started", lambda s: ("halt_epoch", s), name="mine").run([1], 0),
        "mine",
    ),
    "structure under strict": (
        lambda: (
            plain()
            .handle("started", lambda s: ("continue", s.replace(step_state=(1, 2))), name="mine")
            .run([1], 0, strict=True)
        ),
        "mine",
    ),
    "metric that will not exist": (lambda: trainer().early_stop("los").run([(X, X[:, :1])]), "los"),
    "criteria made later in the firing": (
        lambda: (
            trainer()
            .checkpoint("never", criteria="validation_loss")
            .validate([(X, X[:, :1])])
            .run([(X, X[:, :1])])
        ),
        "validation_loss",
    ),
    "scalar loss with weights": (
        lambda: jl.trainer(PAIR, lambda t, p: jnp.mean(p), "sgd", log=0).run(
            [(X, X[:, :1], np.ones(4, np.float32))]
        ),
        "per example",
    ),
    "matrix where a scalar is monitored": (
        lambda: (
            jl.loop(lambda b, s: jl.emit(s, x=b))
            .metric(lambda x: (x, x), "pair", "last", ["x"])
            .handle("epoch_completed", lambda s: ("continue", s.replace(metrics={"m": np.ones(2)})))
            .early_stop("m", mode="min")
            .run([1.0])
        ),
        "scalar",
    ),
    "(B, 1) against (B,)": (lambda: trainer().run([(X, X[:, 0])]), r"\(4,\)"),
    "two monitors of one name": (lambda: trainer().early_stop("loss").early_stop("loss"), "loss"),
    "iterator that runs dry": (lambda: plain().run(iter([1, 2]), 0, iterations=3), "2 batches"),
    "iterator over epochs": (lambda: plain().run(iter([1, 2]), 0, epochs=2), "iterations="),
    "ragged under strict": (
        lambda: jl.loop(lambda b, s: s + b.sum()).run([np.ones(2), np.ones(1)], 0.0, strict=True),
        "batch",
    ),
    "not a model": (lambda: jl.trainer(3, "huber", "sgd"), "int"),
    "dtype of the state": (
        lambda: jl.loop(lambda b, s: {"a": s["a"].astype(jnp.int16)}).run([1], {"a": 1}),
        r"\['a'\].*int32.*int16(.|\n)*emit",
    ),
    "structure of the state": (
        lambda: jl.loop(lambda b, s: {**s, "b": b}).run([1], {"a": 1}),
        "'b'(.|\n)*emit",
    ),
    "folder that cannot be written": (
        lambda: trainer().checkpoint("/proc/nowhere").run([(X, X[:, :1])]),
        "/proc/nowhere",
    ),
    "iterations=0": (lambda: plain().run([1], 0, iterations=0), "iterations"),
    "no iterations without data": (lambda: plain().run(None, 0), "iterations"),
    "fuse=0": (lambda: plain().run([1], 0, fuse=0), "fuse"),
    "unknown jit option": (lambda: plain().run([1], 0, jit={"donate": 1}), "donate_argnums"),
    "a string in a batch": (lambda: plain().run([{"x": "a"}], 0), r"\['x'\]"),
    "a function in the state": (lambda: plain().run([1], {"f": print}), r"\['f'\]"),
    "logits for probabilities": (
        lambda: jl.trainer(
            (lambda key, x: jnp.full((2, 3), 5.0), lambda w, x: x @ w),
            "categorical_cross_entropy",
            "sgd",
            log=0,
        ).run([(X, np.eye(3, dtype=np.float32)[[0, 1, 2, 0]])]),
        "from_logits=True",
    ),
    "pad without a place for the mask": (lambda: jl.batches(np.ones(3), 2, pad=True), "pad"),
    "init state of another shape": (
        lambda: trainer().run([(X, X[:, :1])], jnp.ones((3, 1))),
        r"\(3, 1\)",
    ),
    "lambda without a name": (lambda: plain().metric(lambda a, b: a), "name"),
    "evaluation of an iterator": (lambda: trainer().validate(iter([1])), "one-shot"),
    "unknown attribute of State": (lambda: jl.State().replace(epohc=1), "epoch"),
    "patience=0": (lambda: trainer().early_stop("loss", patience=0), "patience"),
    "validation without a model": (lambda: plain().validate([(X, X)]), "model="),
    "validation without a metric": (
        lambda: (
            jl.evaluator(PAIR)
            .validate([(X, X[:, :1])])
            .run([(X, X[:, :1])], init_state=jnp.ones((2, 1)))
        ),
        "validation: there must be a metric",
    ),
    "validation of a state without a model": (
        lambda: (
            jl.loop(lambda b, s: jl.emit(s, y_true=b[1], y_pred=b[0][:, :1]))
            .metric("mean_squared_error")
            .validate([(X, X[:, :1])], model=PAIR)
            .run([(X, X[:, :1])], 0.0)
        ),
        "'model_state', got an array",
    ),
    "a metric that is no name": (lambda: plain().early_stop(3), "name of a metric, got 3"),
    "min_delta=-1": (lambda: plain().early_stop("loss", min_delta=-1), "min_delta"),
    "a mode that is a number": (lambda: plain().early_stop("loss", mode=3), "'min', 'max'"),
    "a monitor without a handler": (lambda: plain().monitor("x", 3, name="m"), "handler"),
    "factor=2": (lambda: plain().reduce_lr_on_plateau("loss", factor=2), "between 0 and 1"),
    "cooldown=-1": (lambda: plain().reduce_lr_on_plateau("loss", cooldown=-1), "cooldown"),
    "no learning rate": (
        lambda: (
            jl.loop(lambda b, s: jl.emit(s, x=b))
            .metric(lambda x: x, "x", None, ["x"])
            .reduce_lr_on_plateau("x", patience=1)
            .run([1.0], {"w": 1.0}, epochs=3)
        ),
        "inject_hyperparams",
    ),
    "a step that is no function": (lambda: jl.loop(3), "step_fn must be a function, got 3"),
    "an init that is no function": (lambda: jl.loop(print, 3), "init_fn must be a function"),
    "a message that is no function": (lambda: plain().log("epoch"), "message_fn"),
    "an observer that is no function": (lambda: plain().observe("started", 3), "observer"),
    "a state that is none": (lambda: plain().from_state({"a": 1}), "jl.State, got dict"),
    "metrics that are no dict": (lambda: jl.State().replace(metrics=3), "metrics must be a dict"),
    "jit=3": (lambda: plain().run([1], 0, jit=3), "jit must be True, False or a dict"),
    "fuse=1.5": (lambda: plain().run([1], 0, fuse=1.5), "fuse must be 'auto' or"),
    "fuse='always'": (lambda: plain().run([1], 0, fuse="always"), "auto"),
    "epochs=-1": (lambda: plain().run([1], 0, epochs=-1), "epochs must be at least 0"),
    "every_seconds(0)": (lambda: jl.every_seconds(0), "positive number of seconds, got 0|seconds"),
    "an empty filter": (lambda: plain().handle("started", print, {}), "filter"),
    "a filter per run": (lambda: jl.every(2, per="run"), "epoch"),
    "an event that is a number": (lambda: plain().handle(3, print), "event"),
    "data that are a string": (lambda: plain().run("data", 0), "iterable of batches"),
    "a size that is no number": (lambda: jl.batches(X, 1.5), "batch_size must be an int"),
    "a size of 0": (lambda: jl.batches(X, 0), "at least 1"),
    "pad and drop_remainder": (lambda: jl.batches(X, 2, pad=True, drop_remainder=True), "both"),
    "no arrays": (lambda: jl.batches({}, 2), "no arrays"),
    "arrays of different lengths": (lambda: jl.batches((X, X[:2]), 2), "same number"),
    "a mask that is there": (lambda: jl.batches({"mask": X}, 2, pad=True), "'mask'"),
    "log=-1": (lambda: jl.trainer(PAIR, "huber", "sgd", log=-1), "log must be at least 0"),
    "log=1.5": (lambda: jl.trainer(PAIR, "huber", "sgd", log=1.5), "log must be a whole number"),
    "a loss scale of two functions": (lambda: trainer(loss_scale=(print, print)), "loss_scale"),
    "an optimizer that is a number": (lambda: jl.trainer(PAIR, "huber", 3), "optimizer"),
    "a fraction of digits": (lambda: jl.datasets.digits(test_fraction=1), "test_fraction"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case):
    act, pattern = CASES[case]
    with pytest.raises(jl.JaxloopError, match=f"(?s){pattern}") as info:
        act()
    assert isinstance(info.value, ValueError | TypeError | KeyError | OSError | RuntimeError)


def test_unknown_keyword():
    with pytest.raises(TypeError, match="epoch"):
        plain().run([1], 0, epoch=3)


def test_changing_shapes_warn_once_and_name_the_leaf():
    data = [{"x": np.ones(n, np.float32)} for n in (1, 2, 3, 4)]
    with pytest.warns(UserWarning, match=r"\['x'\].*(?s:.*)pad=True") as record:
        jl.loop(lambda b, s: s + b["x"].sum()).run(data, 0.0)
    assert len(record) == 1


def test_a_ragged_last_batch_is_no_matter():
    state = jl.loop(lambda b, s: s + b.sum()).run([np.ones(2), np.ones(1)], 0.0, epochs=2)
    assert float(state.step_state) == 6
