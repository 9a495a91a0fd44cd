"""dry_run and overfit: short runs that find mistakes, and leave no trace."""

import logging
import os
import stat

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxloop as jl
from jaxloop.handlers import CheckpointTrigger, Observer, as_events, as_filter, left_out

pytestmark = pytest.mark.slow  # CI counts their coverage all the same

X = np.linspace(-1, 1, 24, dtype=np.float32).reshape(12, 2)
Y = X[:, :1]
DATA = jl.batches((X, Y), 4)
PAIR = (lambda key, x: jnp.ones((2, 1)), lambda w, x: x @ w)
TRAINER = jl.trainer(PAIR, "mean_squared_error", optax.sgd(0.1), log=0)
SUM = jl.loop(lambda b, s: jl.emit(s + b, x=b)).metric("x", per="batch")


def what(report):
    return {name: did for _, name, _, did in report.attachments}


# --- dry_run ---


def test_every_handler_runs_once_at_each_of_its_events_whatever_its_filter():
    seen, shown = [], []
    loop = (
        SUM.handle("all", lambda s: seen.append(s.event.value), jl.every(1000), name="all")
        .handle("iteration_completed", lambda s: seen.append("late"), jl.after(50), name="late")
        .handle(["halted", "epoch_halted"], lambda s: seen.append("halt"), name="halt")
        .observe("iteration_completed", lambda s: shown.append(s.step), jl.every_seconds(900))
        .observe("halted", lambda s: shown.append(s.event.value))
    )
    report = loop.dry_run([1.0] * 9, 0.0, iterations=3)
    order = ["started", "epoch_started", "iteration_started", "iteration_completed", "late"]
    assert seen == [*order, "epoch_completed", "completed", "halt", "halt"]
    assert shown == [1, "halted"]
    assert set(what(report).values()) == {"ran"}
    assert (report.status, report.iterations, report.metrics) == ("completed", 3, {"x": 1.0})


def test_a_function_as_filter_is_called_and_its_mistakes_are_found():
    asked = []
    loop = SUM.handle("epoch_completed", print, lambda s: asked.append(s.epoch), name="p")
    assert what(loop.dry_run([1.0, 2.0], 0.0)) == {"p": "ran"} and asked == [0]
    wrong = SUM.observe("epoch_completed", print, lambda s: s.metrics["typo"] > 0)
    with pytest.raises(KeyError, match="typo"):
        wrong.dry_run([1.0], 0.0)


def test_a_mistake_that_a_run_would_make_after_an_hour_is_found():
    def late(state):
        return state.metrics["typo"]

    loop = TRAINER.handle("epoch_completed", late, jl.only(100))
    with pytest.raises(KeyError, match="typo"):
        loop.dry_run(DATA)
    loop = TRAINER.handle("epoch_halted", late)
    with pytest.raises(KeyError, match="typo"):
        loop.dry_run(DATA)

    def remembers(state):
        return "continue", state.replace(handler_state={"mine": {"file": object()}})

    loop = SUM.handle("epoch_completed", remembers).checkpoint("never", filter=jl.every(100))
    with pytest.raises(jl.errors.SerializationError):
        loop.dry_run([1.0], 0.0)
    loop = jl.loop(lambda b, s: s + b, None, lambda state: state.metrics["typo"])
    with pytest.raises(KeyError, match="typo"):
        loop.dry_run([1.0], 0.0)


def test_nothing_is_written_and_nothing_is_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    run = SUM.checkpoint("run", keep=1)
    run.run([1.0, 2.0], 0.0, epochs=3)
    before = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))}
    loop = (
        SUM.checkpoint("run", resume=True)
        .checkpoint("run", criteria="x", mode="max", filter=jl.every(9))
        .checkpoint("other", event="iteration_completed", file_pattern=lambda s: f"s{s.step}")
    )
    folders = []

    class Look:
        def __call__(self, snapshot):
            pass

        def close(self):  # after the last save
            folders.append(list(temporary.rglob("s1")))

    opens = Observer(as_events("completed"), as_filter("always"), "o", print, open=lambda s: Look())
    loop = loop.attach(opens)
    report = loop.dry_run([1.0, 2.0, 3.0], 0.0)
    assert report.iterations == 2 and set(what(report).values()) == {"ran"}
    written = loop.write(jl.writers.csv("metrics.csv"), every=1, values=lambda s: {"v": 1.0})
    did = what(written.dry_run([1.0, 2.0], 0.0))
    assert (did["write_csv"], did["write_csv_values"]) == ("left out", "ran")
    assert [len(found) for found in folders] == [1, 1], "it saves for real, to a temporary folder"
    after = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))}
    before.pop(temporary), after.pop(temporary)
    assert before == after
    os.chmod(tmp_path / "run", stat.S_IRUSR)
    try:
        assert loop.dry_run([1.0], 0.0).status == "completed"
    finally:
        os.chmod(tmp_path / "run", stat.S_IRWXU)


def test_what_acts_outside_is_left_out():
    class File:
        closed = 0

        def __call__(self, snapshot):
            seen.append(snapshot.step)

        def close(self):
            self.closed += 1

    seen, alerts, file = [], [], File()
    when = as_events("completed"), as_filter("always")
    writer = Observer(*when, "w", seen.append, in_dry_run=left_out)
    store = CheckpointTrigger(
        *when,
        "cloud",
        decide=lambda state: state,
        open_store=lambda opened: pytest.fail("it is not opened"),
    )
    loop = SUM.attach(store).attach(writer)
    loop = loop.alert(alerts.append, on=("completed", "nan")).observe("completed", file, name="f")
    report = loop.dry_run([float("nan")], 0.0)
    assert what(report) == {"cloud": "left out", "w": "left out", "alert": "left out", "f": "ran"}
    assert (seen, alerts, file.closed) == ([1], [], 0)


def test_validation_and_monitors_run_on_a_few_batches():
    read = []

    def validation(epoch):
        for i in range(0, 12, 4):
            read.append(i)
            yield X[i : i + 4], Y[i : i + 4]

    loop = (
        TRAINER.validate(validation, filter=jl.every(5))
        .early_stop("validation_loss", patience=1, filter=jl.every(5), restore_best=True)
        .reduce_lr_on_plateau("validation_loss", filter=jl.every(10))
        .nan_guard("rewind")
        .checkpoint("never", criteria="validation_loss", filter=jl.every(5))
    )
    report = loop.dry_run(DATA, iterations=2)
    assert set(what(report).values()) == {"ran"} and report.status == "completed"
    assert set(report.metrics) == {"loss", "validation_loss"}
    assert read == [0, 4]
    first = TRAINER.validate([(X[:4], Y[:4]), (X[4:8], Y[4:8])]).final_state(DATA, iterations=2)
    assert report.metrics == pytest.approx({k: float(v) for k, v in first.metrics.items()})
    assert not os.path.exists("never")


def test_a_halt_is_in_the_report(caplog):
    halts = SUM.handle("iteration_completed", lambda s: ("halt_loop", s), jl.only(9), name="stop")
    report = halts.handle("epoch_completed", print, name="later").dry_run([1.0, 2.0], 0.0)
    assert (report.status, report.halted_by, report.iterations) == ("halted", "stop", 1)
    assert what(report) == {"stop": "ran", "later": "did not run"}
    assert "halted by stop after 1 iterations" in str(report)
    with caplog.at_level(logging.ERROR):
        guarded = SUM.nan_guard(filter=jl.every(50)).dry_run([float("nan")], 0.0)
    assert guarded.halted_by == "nan_guard"


def test_a_dry_run_changes_nothing_and_its_programs_are_used_again(capsys):
    traced = []

    def step(batch, state):
        traced.append(1)
        return jl.emit(state + batch, x=batch)

    loop = jl.loop(step).metric("x", per="batch").handle("epoch_completed", lambda s: None)
    before = repr(loop)
    print(loop.dry_run([1.0] * 5, 0.0))
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["kind", "name", "events", "dry", "run"]
    assert table[-2:] == ["completed after 2 iterations", "metrics: x 1"]
    num_traced = len(traced)
    assert loop.run([1.0] * 5, 0.0).step_state == 5 and len(traced) == num_traced
    assert repr(loop) == before
    # A loop that starts from a state starts fresh here.
    state = loop.run([1.0], 0.0)
    assert loop.from_state(state).dry_run([1.0], 0.0).iterations == 1


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, None])
def test_iterations_must_be_a_count(bad):
    with pytest.raises(jl.JaxloopError, match="dry_run: iterations must be"):
        SUM.dry_run([1.0], 0.0, iterations=bad)


# --- overfit ---


def test_a_trainer_learns_a_batch_by_heart():
    data = jl.batches((X, Y), 4, shuffle=True)  # each epoch has other batches
    report = TRAINER.validate(DATA).overfit(data, steps=300)
    assert report.fell and report.last["loss"] < 0.01 < report.first["loss"]
    assert (report.steps, report.num_batches, len(report.history)) == (300, 1, 300)
    assert set(report.last) == {"loss"}
    text = str(report)
    assert text.splitlines()[0].split() == ["metric", "first", "pass", "last", "pass"]
    assert len(repr(report)) < 100
    assert "loss fell from" in text and "in 300 steps on 1 batch" in text
    # It is what a run over that batch does.
    batch = next(iter(data))
    state = TRAINER.final_state([batch], epochs=300)
    assert report.last["loss"] == float(state.history[299]["loss"])


def test_several_batches_are_whole_passes():
    report = TRAINER.overfit(lambda epoch: DATA, num_batches=2, steps=5)
    assert (report.steps, report.num_batches, len(report.history)) == (6, 2, 3)
    assert TRAINER.overfit(iter(DATA), num_batches=9, steps=3).num_batches == 3


def test_nothing_that_is_attached_runs(tmp_path):
    def fail(*args):
        raise AssertionError

    loop = TRAINER.handle("all", fail).observe("all", fail).checkpoint(tmp_path / "a", resume=True)
    loop = loop.early_stop("loss", patience=1, restore_best=True).nan_guard()
    assert loop.overfit(DATA, steps=3).steps == 3
    assert not (tmp_path / "a").exists()
    state = TRAINER.final_state(DATA, epochs=50)
    first = TRAINER.overfit(DATA, steps=1).first
    assert TRAINER.from_state(state).overfit(DATA, steps=1).first == first


def test_what_does_not_learn_is_said():
    flat = jl.loop(lambda b, s: jl.emit(s, loss=jnp.sum(b))).metric("loss", per="batch")
    report = flat.overfit([jnp.ones(2)], 0.0, steps=4)
    assert not report.fell and "loss did not fall in 4 steps" in str(report)
    bad = jl.loop(lambda b, s: jl.emit(s * 1e30, loss=s)).metric("loss", per="batch")
    report = bad.overfit([jnp.ones(2)], 1.0, steps=4)
    assert not report.fell and "loss is inf in pass 2" in str(report)
    rising = jl.loop(lambda b, s: jl.emit(s - 1, score=s)).metric("score", per="batch")
    assert rising.overfit([1.0], 0.0, steps=4, metric="score").fell


def test_a_loader_that_reuses_its_memory_does_no_harm():
    def data():
        buffer = np.zeros(2, np.float32)
        for i in range(3):
            buffer[:] = i
            yield buffer

    loop = jl.loop(lambda b, s: jl.emit(s, loss=jnp.sum(b))).metric("loss", per="batch")
    loop = loop.metric("loss", "most", "running_max")
    report = loop.overfit(data(), 0.0, num_batches=3, steps=3)
    assert report.first == {"loss": 2.0, "most": 4.0}


MISTAKES = {
    "no batch": (lambda: SUM.overfit([], 0.0), "at least one batch, got empty data"),
    "no data": (lambda: SUM.overfit(None, 0.0), "iterable of batches, got NoneType"),
    "text": (lambda: SUM.overfit("abc", 0.0), "iterable of batches, got str"),
    "batches of text": (lambda: SUM.overfit(["a"], 0.0), "overfit: batch 0"),
    "steps=0": (lambda: SUM.overfit([1.0], 0.0, steps=0), "overfit: steps must be at least 1"),
    "no metric": (lambda: SUM.overfit([1.0], 0.0), "got 'loss'; the loop has: x"),
    "a vector": (
        lambda: SUM.metric(lambda x: {"a": x}, "v", None, ["x"], per="batch").overfit(
            [1.0], 0.0, metric="v"
        ),
        "scalar metric, got 'v'",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_an_error_before_the_steps(case):
    make, pattern = MISTAKES[case]
    with pytest.raises(jl.JaxloopError, match=f"(?s){pattern}.*\n  fix: [a-z]"):
        make()


def test_an_error_of_the_step_leaves_as_itself():
    def step(batch, state):
        jax.debug.callback(lambda: None)
        raise RuntimeError("in the step")

    for call in (jl.loop(step).overfit, jl.loop(step).dry_run):
        with pytest.raises(RuntimeError, match="in the step"):
            call([1.0], 0.0)
