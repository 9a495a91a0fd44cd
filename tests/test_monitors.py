"""Monitors and validation: what they watch exists, or it is an error before the first step."""

import random
import re
import warnings

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxloop as jl
from jaxloop.handlers import Handler, as_events, as_filter
from tests.digest import digest, hash_tree

X = np.linspace(-1, 1, 24, dtype=np.float32).reshape(12, 2)
Y = X[:, :1]
DATA = jl.batches((X, Y), 4)
PAIR = (lambda key, x: jnp.ones((2, 1)), lambda w, x: x @ w)
TRAINER = jl.trainer(PAIR, "mean_squared_error", optax.sgd(0.1), log=0)
WATCHED = "validation_loss"
STATE = {"output_transform": lambda state: state}


class Steps:
    """Data that count the batches that were read, so that a test sees whether a step was lost."""

    def __init__(self, num_batches=3):
        self.num_batches, self.num_read, self.num_iterators = num_batches, 0, 0

    def __iter__(self):
        self.num_iterators += 1
        for i in range(self.num_batches):
            self.num_read += 1
            yield X[4 * i : 4 * i + 4], Y[4 * i : 4 * i + 4]


def run(loop, epochs=6, data=DATA, **kwargs):
    return loop.run(data, epochs=epochs, **STATE, **kwargs)


def watch(loop, seen, **kwargs):
    """Attaches a monitor of the validation that writes down every event that counts."""

    def mode(new, best):
        return False

    def handler(state):
        seen.append((state.epoch, state.iteration))

    return loop.monitor(WATCHED, handler, name="watch", mode=mode, patience=1, **kwargs)


# --- what can never exist is an error before the first step ---

IN_EPOCH = {"event": "iteration_completed"}
NEVER = {
    "validate is attached later": (
        TRAINER.early_stop(WATCHED).validate(DATA),
        "attach validate before early_stop_validation_loss",
    ),
    "validate is attached later, in mid-epoch": (
        TRAINER.early_stop(WATCHED, **IN_EPOCH).validate(DATA, **IN_EPOCH),
        "attach validate before early_stop_validation_loss",
    ),
    "validate runs later in the epoch": (
        TRAINER.validate(DATA).early_stop(WATCHED, **IN_EPOCH),
        "event='epoch_completed'",
    ),
    "validate runs in another epoch": (
        TRAINER.validate(DATA).early_stop(WATCHED, event="epoch_started"),
        "begins with new metrics",
    ),
    "validate runs before the metrics begin": (
        TRAINER.validate(DATA, event="started").early_stop(WATCHED),
        "begins with new metrics",
    ),
    "an epoch is completed or halted": (
        TRAINER.validate(DATA).early_stop(WATCHED, event="epoch_halted"),
        "begins with new metrics",
    ),
    "filters that exclude each other": (
        TRAINER.validate(DATA, filter=jl.every(2)).early_stop(WATCHED, filter=~jl.every(2)),
        r"filter.*every\(2\)|every\(2\).*same filter=",
    ),
    "filters of different epochs": (
        TRAINER.validate(DATA, filter="once").early_stop(WATCHED, filter=jl.after(1)),
        "same filter=",
    ),
    "filters in the epoch": (
        TRAINER.validate(DATA, filter=jl.only(2, per="epoch")).early_stop(WATCHED),
        "same filter=",
    ),
    "a criterion": (
        TRAINER.checkpoint("never", criteria=WATCHED).validate(DATA),
        "attach validate before checkpoint_validation_loss",
    ),
    "reduce_lr": (TRAINER.reduce_lr_on_plateau(WATCHED).validate(DATA), "attach validate before"),
    "a typo": (
        TRAINER.validate(DATA, filter=jl.every(2)).early_stop("validation_los"),
        "the loop has: loss, validation_loss",
    ),
    "a typo beside a handler that runs later": (
        TRAINER.early_stop("los").handle("epoch_completed", print),
        "'los', which does not exist",
    ),
    "a typo beside a handler of the epoch's end": (
        TRAINER.handle("epoch_completed", print).early_stop("los", **IN_EPOCH),
        "'los', which does not exist",
    ),
}


@pytest.mark.parametrize("case", NEVER)
@pytest.mark.parametrize("how", ["run", "check"])
def test_a_metric_that_can_never_exist_is_an_error_before_the_first_step(case, how):
    loop, pattern = NEVER[case]
    data = Steps()
    with pytest.raises(jl.errors.MissingMetricError, match=f"(?s){pattern}") as info:
        getattr(loop, how)(data, epochs=9)
    assert data.num_read == 0
    assert re.search(r"\n  fix: [a-z]", str(info.value))


MAY_EXIST = {
    "each epoch": ({}, {}, [1, 2, 3, 4, 5]),
    "every other epoch": ({"filter": jl.every(2)}, {}, [3, 5]),
    "the same filter": ({"filter": jl.every(2)}, {"filter": jl.every(2)}, [3, 5]),
    "filters that meet": ({"filter": jl.every(2)}, {"filter": jl.every(3)}, []),
    "a monitor that runs seldom": ({}, {"filter": jl.every(3)}, [5]),
    "once": ({"filter": "once"}, {}, []),
    "the third time only": ({"filter": jl.only(3)}, {}, []),
    "a function": ({"filter": lambda s: s.epoch % 2 == 0}, {}, [2, 4]),
    "in the epoch": ({**IN_EPOCH, "filter": jl.every(2, per="epoch")}, {}, [1, 2, 3, 4, 5]),
    "in some epochs": ({**IN_EPOCH, "filter": jl.every(4)}, {}, [2, 3, 5]),
    "at every event": ({}, {"event": "all"}, [1, 2, 3, 4, 5, 6]),
    "a list of events": ({}, {"event": ["epoch_started", "epoch_completed"]}, [1, 2, 3, 4, 5]),
    "at the end of the run": ({}, {"event": "completed"}, []),
}


@pytest.mark.parametrize("case", MAY_EXIST)
def test_an_event_without_a_value_does_not_count(case):
    validate, monitor, expected = MAY_EXIST[case]
    seen = []
    # The first value is the best, and each later one is none, because of the mode.
    state = run(watch(TRAINER.validate(DATA, **validate), seen, **monitor))
    assert [epoch for epoch, _ in seen] == expected
    assert state.status == "completed" and state.handler_state["watch"]["count"] == 0


def test_a_validation_lasts_to_the_end_of_its_epoch():
    seen = []
    loop = TRAINER.validate(DATA, **IN_EPOCH, filter=jl.only(5))
    state = run(watch(loop, seen, **IN_EPOCH), epochs=3)
    # The fifth iteration is the second of epoch 1. The first value is the best.
    assert seen == [(1, 2)]
    assert [WATCHED in metrics for metrics in state.history.values()] == [False, True, False]


def test_patience_counts_validations():
    loop = TRAINER.validate(DATA, filter=jl.every(2)).early_stop(
        WATCHED, patience=2, min_delta=1e9, restore_best=True
    )
    state = run(loop, epochs=20)
    # Validated after epochs 1, 3 and 5: the first is the best, the others are not better.
    assert (state.status, state.epoch) == ("halted", 6)
    best = run(TRAINER, epochs=2)
    assert (state.step_state["model_state"] == best.step_state["model_state"]).all()


def test_a_halt_before_the_validation_does_not_disturb_the_monitor():
    seen = []
    loop = TRAINER.handle(
        "iteration_completed",
        lambda s: ("halt_epoch", s) if s.epoch % 2 and s.iteration == 1 else None,
        name="halts",
    ).validate(DATA, **IN_EPOCH, filter=jl.every(2, per="epoch"))
    state = run(watch(loop, seen, event=["epoch_completed", "epoch_halted"]))
    assert [epoch for epoch, _ in seen] == [2, 4]
    assert [WATCHED in state.history[epoch] for epoch in range(6)] == [True, False] * 3


def test_a_checkpoint_with_criteria_saves_when_there_is_a_value(tmp_path):
    loop = TRAINER.validate(DATA, filter=jl.every(2)).checkpoint(
        tmp_path, criteria=WATCHED, keep=None
    )
    run(loop, epochs=5)
    # Epochs 1 and 3 were validated, each better than before. The end of the run is saved too.
    assert sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()) == [
        6,
        12,
        15,
    ]


def test_the_learning_rate_waits_for_validations():
    loop = TRAINER.validate(DATA, filter=jl.every(3)).reduce_lr_on_plateau(
        WATCHED, factor=0.5, patience=1, min_delta=1e9, cooldown=1
    )
    state = run(loop, epochs=12)
    # Values after epochs 2, 5, 8, 11: the best, reduced, cooling, reduced.
    scale = state.step_state["learning_rate_scale"]
    assert float(scale) == 0.25


@pytest.mark.parametrize("stop", [5, 7])
def test_a_resumed_run_judges_as_if_it_had_not_stopped(stop, tmp_path):
    look = {**IN_EPOCH, "filter": jl.every(4)}
    loop = TRAINER.validate(DATA, **look).early_stop(
        WATCHED, min_delta=1e9, patience=3, restore_best=True
    )

    def fail(state):
        raise RuntimeError("stop")

    whole = run(loop, epochs=9)
    failing = loop.checkpoint(tmp_path, event="iteration_completed").handle(
        "iteration_started", fail, jl.only(stop + 1)
    )
    with pytest.raises(RuntimeError, match="stop"):
        run(failing, epochs=9)
    resumed = run(loop.resume(tmp_path), epochs=9)
    assert digest(resumed) == digest(whole)
    assert whole.halted_by == "early_stop_validation_loss"


def test_a_monitor_that_never_ran_is_a_warning():
    loop = TRAINER.validate(DATA, filter=jl.every(9)).early_stop(WATCHED)
    with pytest.warns(UserWarning, match="early_stop_validation_loss never ran(?s:.*)filter="):
        run(loop, epochs=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(TRAINER.validate(DATA, filter=jl.every(3)).early_stop(WATCHED), epochs=4)


def test_a_handler_of_the_user_may_add_the_metric():
    def add(state):
        return "continue", state.replace(metrics={**state.metrics, "mine": float(state.epoch)})

    base = TRAINER.handle("epoch_completed", add, jl.before(3))
    with pytest.raises(jl.errors.MissingMetricError, match="'typo'"):
        run(base.early_stop("typo", mode="min"))
    # It has read the metric before, so the name is right.
    state = run(base.early_stop("mine", mode="min", patience=2))
    assert state.status == "completed" and state.handler_state["early_stop_mine"]["count"] == 1
    # A handler that says what it adds is treated as `validate` is.
    says = Handler(as_events("epoch_completed"), as_filter(jl.every(4)), "adds", add, adds=("a",))
    with pytest.warns(UserWarning, match="never ran"):
        assert run(TRAINER.attach(says).early_stop("a", mode="min"), epochs=3).status == "completed"
    # So may the handler of a monitor.
    loop = TRAINER.monitor("loss", add, name="m", patience=1, min_delta=1e9, filter=jl.after(1))
    state = run(loop.early_stop("mine", mode="min", filter=jl.after(2), patience=9))
    assert state.handler_state["early_stop_mine"]["best"] == 2


def test_nan_is_a_value_that_is_not_better():
    seen = []
    weights = np.zeros(12, np.float32)
    state = run(watch(TRAINER.validate([(X, Y, weights)]), seen), epochs=3)
    assert np.isnan(state.metrics[WATCHED]) and [epoch for epoch, _ in seen] == [0, 1, 2]


# --- any events and filters, against a probe that is always allowed to look ---

FILTERS = [
    "always",
    "once",
    jl.every(2),
    ~jl.every(2),
    jl.after(2),
    jl.before(3),
    jl.only(4),
    jl.only(1, per="epoch"),
    jl.every(2, per="epoch"),
    lambda state: state.step % 2 == 0,
]
MEAN = jl.loop(lambda b, s: jl.emit(s + b, x=b)).metric(lambda x: x, "x", None, ["x"])


def check_against_a_probe(seed):
    """The monitor counts exactly the events at which a probe in its place sees the metric."""
    rng = random.Random(seed)
    adds_on, looks_on = (
        [e.value for e in rng.sample(list(jl.Event), n)] for n in (1, 1 + seed % 2)
    )
    filters = rng.choice(FILTERS), rng.choice(FILTERS)
    first, halts = rng.random() < 0.7, rng.random() < 0.4
    seen, judged = [], []

    def add(state):
        return "continue", state.replace(metrics={**state.metrics, "v": 1.0})

    def halt(state):
        return ("halt_epoch", state) if (state.epoch, state.iteration) == (1, 1) else None

    def attach(look):
        source = Handler(as_events(adds_on), as_filter(filters[0]), "adds", add, adds=("v",))
        halting = Handler(as_events("iteration_completed"), as_filter("always"), "h", halt, adds=())
        loop = MEAN.attach(halting) if halts else MEAN
        return look(loop.attach(source)) if first else look(loop).attach(source)

    def probe(loop):
        return loop.handle(looks_on, lambda s: seen.append("v" in s.metrics), filters[1])

    def monitor(loop):
        never = {"mode": lambda new, best: False, "patience": 1, "name": "watch"}
        look = {"event": looks_on, "filter": filters[1]}
        return loop.monitor("v", lambda s: judged.append(s.step), **never, **look)

    attach(probe).run([1.0] * 3, 0.0, epochs=6)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="watch never ran")
        try:
            attach(monitor).run([1.0] * 3, 0.0, epochs=6)
        except jl.errors.MissingMetricError:
            # A value of an earlier firing is refused if a newer one follows in the same firing.
            assert not any(seen) or (not first and set(adds_on) & set(looks_on))
        else:
            assert len(judged) == max(0, sum(seen) - 1)


def test_a_monitor_counts_what_a_probe_sees():
    for seed in range(60):
        check_against_a_probe(seed)


@pytest.mark.slow
def test_a_monitor_counts_what_a_probe_sees_often():
    for seed in range(60, 3000):
        check_against_a_probe(seed)


# --- restore_best ---


def test_only_one_handler_restores_the_best():
    loop = TRAINER.early_stop("loss", restore_best=True)
    with pytest.raises(jl.errors.ArgumentError, match="(?s)early_stop_loss and other.*fix: pass"):
        loop.early_stop("loss", restore_best=True, name="other")
    assert loop.early_stop("loss", name="other").best_from == "early_stop_loss"


def test_restore_best_may_be_added_or_removed_by_a_changed_script(tmp_path):
    data, look = (lambda epoch: [(X, Y * (epoch + 1))]), {"patience": 9, "name": "stop"}
    plain, best = TRAINER.early_stop("loss", **look), None
    run(plain.checkpoint(tmp_path / "a"), 3, data)
    best = TRAINER.early_stop("loss", restore_best=True, **look)
    with pytest.warns(UserWarning, match="did not keep its best step state"):
        state = run(best.resume(tmp_path / "a"), 3, data)
    assert state.step == 3
    with pytest.warns(UserWarning, match="the best value starts anew"):
        state = run(best.resume(tmp_path / "a"), 6, data)
    # The loss grows from epoch to epoch, so the best of the new ones is the first.
    first = run(TRAINER, 4, data)
    assert (state.step_state["model_state"] == first.step_state["model_state"]).all()
    run(best.checkpoint(tmp_path / "b"), 3, data)
    state = run(plain.resume(tmp_path / "b"), 4, data)
    assert set(state.handler_state["stop"]) == {"best", "count", "cooldown"}


@pytest.mark.parametrize("accumulate", ["running_sum", "running_average"])
def test_a_monitor_may_watch_exact_integers(accumulate):
    loop = jl.loop(lambda batch, total: jl.emit(total, n=batch))
    loop = loop.metric("n", accumulate=accumulate).early_stop("n", mode="max", patience=2)
    assert loop.run([jnp.int32(1), jnp.int32(2)], 0, epochs=9).epoch == 3


# --- validation is checked before the first step ---

WIDE = (np.ones((4, 3), np.float32), Y[:4])
BAD_VALIDATIONS = {
    "empty data": (lambda: TRAINER.validate([]), "at least one batch"),
    "an empty iterable": (lambda: TRAINER.validate(Steps(0)), "at least one batch"),
    "an empty function": (lambda: TRAINER.validate(lambda epoch: []), "at least one batch"),
    "a function that returns nothing": (lambda: TRAINER.validate(lambda e: None), "NoneType"),
    "a function that fails": (lambda: TRAINER.validate(lambda epoch: {}[epoch]), "validation"),
    "inputs of another width": (lambda: TRAINER.validate([WIDE]), r"\(3,\) and \(2,\)"),
    "targets of another shape": (lambda: TRAINER.validate([(X, Y[:, 0])]), r"\(12,\)"),
    "not a pair": (lambda: TRAINER.validate([X]), r"\(x, y\)"),
    "arrays in place of batches": (lambda: TRAINER.validate((X, Y)), "jl.batches"),
    "strings": (lambda: TRAINER.validate([("a", "b")]), "array of numbers"),
    "weights of another length": (lambda: TRAINER.validate([(X, Y, Y[:3, 0])]), "weight"),
    "a model of another structure": (
        lambda: TRAINER.validate(DATA, model=(PAIR[0], lambda w, x: x @ w["a"])),
        "validation",
    ),
    "a metric that does not fit": (
        lambda: TRAINER.metric(lambda t, p: t.reshape(4), "m").validate([(X, Y)]),
        "reshape",
    ),
    "no model": (
        lambda: (
            jl.loop(lambda b, s: jl.emit(s, y_true=b[1], y_pred=b[0][:, :1]), lambda b, s: {"w": 1})
            .metric("mean_squared_error")
            .validate(DATA, model=PAIR)
        ),
        "'model_state', got a dict with 'w'",
    ),
    "one-shot iterator": (lambda: TRAINER.validate(iter(DATA)), "one-shot"),
    "no data": (lambda: TRAINER.validate(None), "NoneType"),
    "no prefix": (lambda: TRAINER.validate(DATA, prefix=""), "prefix"),
    "a prefix that is no string": (lambda: TRAINER.validate(DATA, prefix=1), "prefix"),
    "two of one prefix": (lambda: TRAINER.validate(DATA).validate(Steps()), "prefix"),
    "the name of a metric": (
        lambda: TRAINER.metric("mean_squared_error", WATCHED).validate(DATA),
        "validation_loss",
    ),
    "a monitor of a vector": (
        lambda: TRAINER.metric(lambda t, p: {"a": p[:, 0]}, "d").early_stop("d"),
        "a scalar metric, got 'd', a dict",
    ),
    "no learning rate": (
        lambda: (
            jl.loop(lambda b, s: jl.emit(s, x=b[0].sum()), lambda b, s: {"w": 1.0})
            .metric(lambda x: x, "x", None, ["x"])
            .reduce_lr_on_plateau("x")
        ),
        "inject_hyperparams",
    ),
    "a name that is no string": (lambda: TRAINER.early_stop("loss", name=3), "name"),
    "min_delta that is no number": (lambda: TRAINER.early_stop("loss", min_delta="1"), "min_delta"),
}


@pytest.mark.parametrize("how", ["run", "check"])
@pytest.mark.parametrize("case", BAD_VALIDATIONS)
def test_validation_is_checked_before_the_first_step(case, how):
    make, pattern = BAD_VALIDATIONS[case]
    data, events = Steps(), []
    with pytest.raises(Exception, match=f"(?s){pattern}") as info:
        getattr(make().observe("all", lambda s: events.append(s)), how)(data, epochs=3)
    assert data.num_read <= 1 and not events
    text = "\n".join([str(info.value), *getattr(info.value, "__notes__", [])])
    assert re.search("validat|monitor|scalar|reduce_lr|early_stop", text)


def test_an_error_of_a_later_batch_says_that_it_comes_from_validation():
    loop = TRAINER.validate([(X, Y), (X, Y[:, 0])])
    with pytest.raises(jl.errors.ShapeError, match="^validation: mean_squared_error") as info:
        run(loop, epochs=1)
    notes = [note for note in info.value.__notes__ if note.startswith("jaxloop")]
    assert notes[0].startswith("jaxloop: validation: in the step, epoch 0")
    assert notes[-1] == "jaxloop: in handler `validate` on epoch_completed, epoch 0, iteration 3"
    assert info.value.loop_state.step == 3

    class Fails:
        def __iter__(self):
            yield X, Y
            raise OSError("disk")

    with pytest.raises(OSError, match=r"disk(?s:.*)jaxloop: in the validation 'test_'"):
        run(TRAINER.validate(Fails(), prefix="test_"), epochs=1)


def test_the_check_reads_no_batch_twice():
    data = Steps()
    run(TRAINER.validate(data), epochs=4)
    assert (data.num_read, data.num_iterators) == (12, 4)
    # A validation that runs later, or never, costs one batch.
    data = Steps()
    run(TRAINER.validate(data, filter=jl.every(2)), epochs=4)
    assert (data.num_read, data.num_iterators) == (7, 3)
    # Each run of the same loop has its own.
    data = Steps()
    loop = TRAINER.validate(data)
    loop.check(DATA)
    assert data.num_read == 1
    first, second = run(loop, epochs=1), run(loop, epochs=1)
    assert data.num_read == 7 and first.metrics == second.metrics


def test_the_check_calls_a_function_only_for_epochs_that_are_validated():
    called = []

    def validation(epoch):
        called.append(epoch)
        return [(X, Y)] if epoch % 3 == 2 else []

    run(TRAINER.validate(validation, filter=jl.every(3)), epochs=7)
    assert called == [2, 2, 5]
    called.clear()
    run(TRAINER.validate(validation, filter=jl.every(3)), epochs=2)
    assert called == []
    # The filter decides during the run, so the first epoch is a guess, and has no data.
    called.clear()
    run(TRAINER.validate(validation, filter=lambda s: s.epoch == 2), epochs=4)
    assert called == [0, 2]
    called.clear()
    run(TRAINER.validate(validation, filter=jl.after(2)).from_state(run(TRAINER, epochs=2)), 3)
    assert called == [2]


class Shared:
    """A re-iterable that has one position, so two iterators over it disturb each other."""

    def __iter__(self):
        self.i = 0
        while self.i < 12:
            yield X[self.i : self.i + 4], Y[self.i : self.i + 4]
            self.i += 4


def test_data_for_training_and_validation_are_opened_once_at_a_time():
    shared = Shared()
    kinds = [shared, lambda epoch: shared]
    expected = digest(run(TRAINER.validate(DATA), epochs=2))
    for validation in kinds:
        loop = TRAINER.validate(validation)
        for training in kinds:
            assert digest(run(loop, 2, training)) == expected


class Drawing:
    """Data that are shuffled by the global generator, as those of a PyTorch loader are."""

    def __iter__(self):
        order = np.random.permutation(12)
        return ((X[at], Y[at] ** 2) for at in np.split(order, 3))


@pytest.mark.parametrize("filter", ["always", jl.every(2), jl.every(9)])
def test_the_check_changes_no_random_number(filter):
    def draw(state):
        np.random.permutation(12)

    np.random.seed(3)
    state = run(TRAINER.validate(Drawing(), filter=filter), 4, Drawing())
    np.random.seed(3)
    expected = run(TRAINER.handle("epoch_completed", draw, filter), 4, Drawing())
    assert hash_tree(state.step_state) == hash_tree(expected.step_state)


def test_the_check_traces_what_the_validations_run():
    traced = []

    def apply(w, x):
        traced.append(x.shape)
        return x @ w

    loop = TRAINER.validate(DATA, model=(PAIR[0], apply))
    loop.check(DATA)
    assert traced == [(4, 2)]
    state = run(loop, epochs=2)
    assert traced == [(4, 2)]  # the check and the validations share what was traced
    assert hash_tree(state.step_state) == hash_tree(run(TRAINER, epochs=2).step_state)


# --- metrics that come and go ---


def test_the_log_shows_numbers_and_leaves_out_the_rest(capsys):
    def add(state):
        return "continue", state.replace(metrics={**state.metrics, "phase": "warm", "z": 1j})

    loop = jl.trainer(PAIR, "mean_squared_error", "sgd", log=9)
    loop = loop.metric(lambda t, p: {"a": p[:, 0]}, "d").handle("epoch_completed", add)
    loop.validate(DATA, filter=jl.every(2)).run(DATA, epochs=2)
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("epoch 0, batch ") and second.startswith("epoch 1, batch ")
    assert "validation_loss" not in first and "validation_loss" in second
    assert "phase" not in first and " z " not in first and " d " not in first
