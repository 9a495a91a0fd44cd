"""Writers: rows in order, one per step, complete after any end of a run."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jaxloop as jl
from jaxloop.writers import Histogram, Image, Text

from .failing import failing_at


class Rows:
    """A writer that keeps its rows."""

    def __init__(self):
        self.rows, self.closed, self.threads = [], 0, set()

    def write(self, step, values):
        self.rows.append((step, dict(values)))
        self.threads.add(threading.current_thread())

    def close(self):
        self.closed += 1


def step_fn(batch, total):
    return jl.emit(total + batch, x=batch)


DATA = [1.0, 2.0, 6.0, 3.0, 0.5]


BASE = jl.loop(step_fn).metric("x")  # compiled once for all tests


def loop_of(*writers, every=None, **options):
    loop = BASE
    for writer in writers:
        loop = loop.write(writer, every=every, **options)
    return loop


def add_validation(state):
    return "continue", state.replace(metrics={**state.metrics, "validation_x": 7.0})


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# --- rows ----------------------------------------------------------------------------------------


def test_a_row_per_epoch_in_a_thread():
    rows = Rows()
    state = loop_of(rows).run(DATA, 0.0, epochs=3)
    assert rows.rows == [
        (5 * (e + 1), {"epoch": e, "x": float(state.history[e]["x"])}) for e in range(3)
    ]
    assert rows.closed == 1
    assert len(rows.threads) == 1 and threading.main_thread() not in rows.threads
    assert not any(thread.is_alive() for thread in rows.threads)


def test_numbers_are_those_of_the_state():
    rows, seen = Rows(), []
    loop = loop_of(rows, every=1).observe(
        "iteration_completed", lambda s: seen.append((s.step, float(s.metrics["x"])))
    )
    loop.run(DATA, 0.0, epochs=2)
    assert [(step, values["x"]) for step, values in rows.rows] == seen


@pytest.mark.parametrize("every", [1, 2, 5, 7])
@pytest.mark.parametrize("as_iterable", [list, iter, lambda data: lambda epoch: iter(data)])
def test_a_step_is_one_row_also_at_the_end_of_an_epoch(every, as_iterable):
    rows = Rows()
    epochs = {} if as_iterable is iter else {"epochs": 2}
    loop = BASE.handle("epoch_completed", add_validation)
    loop.write(rows, every=every).run(as_iterable(DATA), 0.0, **epochs)
    num_steps = 5 * epochs.get("epochs", 1)
    due = [n for n in range(1, num_steps + 1) if n % every == 0 or n % 5 == 0]
    assert [step for step, _ in rows.rows] == due
    for step, values in rows.rows:
        assert ("validation_x" in values) == (step % 5 == 0)


def test_a_halted_epoch_has_a_row():
    rows = Rows()
    stop = lambda state: ("halt_epoch", state)  # noqa: E731
    loop = BASE.handle("iteration_completed", stop, jl.only(3, per="epoch"))
    loop.write(rows, every=3).run(DATA, 0.0, epochs=2)
    assert [step for step, _ in rows.rows] == [3, 6]


def test_every_may_be_a_filter():
    rows = Rows()
    loop_of(rows, every=jl.only(2) | jl.only(4)).run(DATA, 0.0)
    assert [step for step, _ in rows.rows] == [2, 4, 5]
    rows = Rows()
    loop_of(rows, every=jl.every_seconds(1000), values=lambda s: {"y": s.step}).run(DATA, 0.0)
    assert rows.rows == [(5, {"epoch": 0, "x": 2.5, "y": 5})]


def test_several_writers_and_several_runs():
    first, second = Rows(), Rows()
    loop = loop_of(first, second, every=2)
    loop.run(DATA, 0.0)
    assert first.rows == second.rows and len(first.rows) == 3
    loop.run(DATA, 0.0)
    assert first.rows[:3] == first.rows[3:] and first.closed == 2


def test_a_tree_becomes_a_value_per_leaf_and_odd_values_are_left_out():
    rows = Rows()
    odd = {
        "tree": {"a": np.float32(0.1), "b": [1, 2.5]},
        "matrix": np.eye(2),
        "half": jnp.bfloat16(1.5),
        "none": None,
        "object": object(),
        "when": np.datetime64("2020-01-01"),
        "flag": np.True_,
        "big": np.int64(2**60),
        "z": np.complex64(1 + 2j),
        "note": "hello",
    }

    def add(state):
        return "continue", state.replace(metrics={**state.metrics, **odd})

    jl.loop(step_fn).handle("epoch_completed", add).write(rows).run([1.0], 0.0)
    ((_, values),) = rows.rows
    assert list(values) == [
        *("epoch", "tree/a", "tree/b/0", "tree/b/1"),
        *("matrix", "half", "flag", "big", "z", "note"),
    ]
    assert values["tree/a"] == float(np.float32(0.1)) and type(values["tree/a"]) is float
    assert values["half"] == 1.5 and values["flag"] is True and values["big"] == 2**60
    assert values["note"] == Text("hello") and values["matrix"].shape == (2, 2)


# --- more values ---------------------------------------------------------------------------------


def test_values_of_the_state_are_in_the_same_row():
    rows = Rows()

    def values(state):
        return {
            "total": state.step_state,  # on the device
            "last": state.outputs["x"],
            "picture": Image(jnp.zeros((2, 3))),
            "histogram": Histogram(jnp.ones(2), jnp.arange(3.0)),
        }

    loop_of(rows, every=2, values=values).run(DATA, 0.0)
    assert [step for step, _ in rows.rows] == [2, 4, 5]
    assert [row["total"] for _, row in rows.rows] == [3.0, 12.0, 12.5]
    assert [row["last"] for _, row in rows.rows] == [2.0, 3.0, 0.5]
    _, row = rows.rows[-1]
    assert row["picture"].pixels.dtype == np.uint8 and row["picture"].pixels.shape == (2, 3, 1)
    assert row["histogram"].counts.tolist() == [1, 1]


def test_values_and_metrics_share_a_row_if_a_clock_decides():
    custom = Rows()
    # The observer's clock is read after the pause of a step, and that of the handler before it.
    loop = BASE.handle("iteration_completed", lambda state: time.sleep(0.01 * (state.step % 2)))
    loop = loop.write(custom, every=jl.every_seconds(0.005), values=lambda s: {"y": s.step})
    loop.run(DATA, 0.0, epochs=4)
    assert len(custom.rows) > 4
    assert all(row.keys() == {"epoch", "x", "y"} and row["y"] == n for n, row in custom.rows)


def test_values_are_computed_once_per_step():
    calls = []

    def values(state):
        calls.append(state.step)
        return {"y": 1.0}

    loop_of(Rows(), every=5, values=values).run(DATA, 0.0, epochs=2)
    assert calls == [5, 10]


@pytest.mark.parametrize("wrong", [3, {"y": object()}, {"y": {"z": b"bytes"}}])
def test_wrong_values_are_an_error_that_names_the_writer(wrong):
    with pytest.raises(jl.errors.ArgumentTypeError, match=r"values of `write_rows` must"):
        loop_of(Rows(), values=lambda state: wrong).run(DATA, 0.0)


def test_a_writer_changes_no_bit_and_ends_no_block():
    loop = BASE
    plain = loop.run(DATA, 0.0, epochs=3)
    written = loop.write(Rows(), every=2).run(DATA, 0.0, epochs=3)
    assert plain.history == written.history and plain.step_state == written.step_state
    assert loop.check(DATA, 0.0, epochs=3).num_leaves == 1


@pytest.fixture(scope="module")
def models():
    import flax.linen as nn
    from flax import nnx

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(1)(nn.BatchNorm(use_running_average=not train)(x))

    return {
        "linen": Linen(),
        "nnx": nnx.Linear(2, 1, rngs=nnx.Rngs(0)),
        "pair": (lambda key, x: {"kernel": jnp.ones((2, 1))}, lambda w, x: x @ w["kernel"]),
    }


BATCH = (np.array([[1.0, 2.0], [3.0, -4.0]], np.float32), np.ones((2, 1), np.float32))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, names",
    [
        ("linen", ["BatchNorm_0/bias", "BatchNorm_0/scale", "Dense_0/bias", "Dense_0/kernel"]),
        ("nnx", ["bias", "kernel"]),
        ("pair", ["kernel"]),
    ],
)
def test_histograms_of_parameters_and_gradients(kind, names, models):
    rows, kept = Rows(), []
    loop = jl.trainer(
        models[kind], "mean_squared_error", "sgd", log=0, report=["gradients"]
    ).handle("iteration_completed", lambda s: kept.append((s.step_state, s.outputs)))
    loop = loop.write(rows, every=1, values=jl.writers.histograms(gradients=True, bins=5))
    loop.run([BATCH])
    ((_, row),) = rows.rows
    found = {name for name, value in row.items() if isinstance(value, Histogram)}
    assert found == {f"{tree}/{name}" for tree in ("parameters", "gradients") for name in names}
    ((_, outputs),) = kept
    if kind == "pair":
        expected = Histogram.of(outputs["gradients"]["kernel"], bins=5)
        assert row["gradients/kernel"].counts.tolist() == expected.counts.tolist()
        np.testing.assert_allclose(row["gradients/kernel"].edges, expected.edges, rtol=1e-6)


COUNTED = [  # one shape, which is compiled once
    [0.0, 1.0, 2.0, 4.0],
    [3.0, 3.0, 3.0, 3.0],
    [np.nan, np.inf, -np.inf, np.nan],
    [1.0, np.nan, 2.0, np.inf],
    [-3e38, 3e38, 0.0, 0.0],
    [1e-45, 2e-45, 2e-45, 0.0],
    [1.0, -1.0, 0.5, 0.25],
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_device_counts_as_the_host_does(dtype):
    arrays = [jnp.asarray(values, jnp.float32).astype(dtype) for values in COUNTED]
    fn = jl.writers.histograms(lambda step_state: arrays, bins=4)
    for array, counted in zip(arrays, fn(jl.State()).values(), strict=True):
        finite = np.asarray(array).astype(np.float64)
        finite = finite[np.isfinite(finite)]
        assert counted.counts.sum() == finite.size
        edges = np.asarray(counted.edges)
        assert np.isfinite(edges).all() and (np.diff(edges) >= 0).all()
        if finite.size and np.ptp(finite) > 1e-30:
            expected = Histogram.of(finite, bins=4)
            assert counted.counts.tolist() == expected.counts.tolist()


def test_histograms_say_what_they_need():
    histograms = jl.writers.histograms()
    with pytest.raises(jl.errors.ArgumentError, match="must have a `model_state`"):
        loop_of(Rows(), values=histograms).run(DATA, 0.0)
    model = (lambda key, x: jnp.ones((2, 1)), lambda w, x: x @ w)
    loop = jl.trainer(model, "mean_squared_error", "sgd", log=0)
    with pytest.raises(jl.errors.ArgumentError, match="must report `gradients`"):
        loop.write(Rows(), values=jl.writers.histograms(gradients=True)).run([BATCH])
    with pytest.raises(jl.errors.ArgumentError, match="bins must be at least 1"):
        jl.writers.histograms(bins=0)


def test_predictions_are_those_of_the_evaluation(models):
    rows, model = Rows(), models["linen"]
    loop = jl.trainer(model, "mean_squared_error", "sgd", log=0)
    seen = {}

    def draw(batch, predicted):
        seen["y"] = predicted
        assert type(predicted) is np.ndarray and batch[0].shape == (2, 2)
        return {"sample": Text(f"{predicted[0]}")}

    loop = loop.write(rows, values=jl.writers.predictions(model, BATCH, draw))
    model_state = loop.run([BATCH])
    assert rows.rows[0][1]["sample"] == Text(f"{seen['y'][0]}")
    loss = jl.evaluator(model, "mean_squared_error").run([BATCH], model_state)["loss"]
    np.testing.assert_allclose(np.mean((seen["y"] - BATCH[1]) ** 2), loss, rtol=1e-5)


# --- errors --------------------------------------------------------------------------------------


class Broken(Rows):
    def write(self, step, values):
        super().write(step, values)
        if step == 10:
            raise OSError("no space left")


def test_an_error_of_a_writer_ends_the_run_and_names_it():
    broken, good = Broken(), Rows()
    with pytest.raises(
        jl.errors.WriterError, match="`write_broken` failed: OSError: no space"
    ) as e:
        loop_of(broken, good).run(DATA, 0.0, epochs=1000)
    assert isinstance(e.value.__cause__, OSError)
    assert isinstance(e.value.loop_state, jl.State)
    assert not any("another error" in note for note in e.value.__notes__)
    # Nothing is written after the row that failed, and both are closed.
    assert broken.rows[-1][0] == 10
    assert broken.closed == good.closed == 1


def test_an_error_in_the_last_row_is_not_lost():
    with pytest.raises(jl.errors.WriterError, match="no space left"):
        loop_of(Broken()).run(DATA, 0.0, epochs=2)


def test_an_error_of_a_writer_does_not_hide_another():
    def fail(state):
        raise KeyError("mine")

    loop = loop_of(Broken()).handle("epoch_completed", fail, jl.only(3))
    with pytest.raises((KeyError, jl.errors.WriterError)) as e:
        loop.run(DATA, 0.0, epochs=5)
    texts = [str(e.value), *e.value.__notes__]
    if isinstance(e.value, jl.errors.WriterError):
        return  # it was first
    assert "mine" in texts[0] and any("no space left" in text for text in texts[1:])


def test_rows_before_an_error_are_written_and_the_writer_hears_of_it():
    class Told(Rows):
        error = None

        def fail(self, error):
            assert not self.closed
            self.error = error

    def fail(state):
        raise KeyError("mine")

    told = Told()
    with pytest.raises(KeyError, match="mine"):
        loop_of(told, every=1).handle("iteration_completed", fail, jl.only(4)).run(DATA, 0.0)
    assert [step for step, _ in told.rows] == [1, 2, 3]
    assert isinstance(told.error, KeyError) and told.closed == 1


def test_a_writer_that_exits_is_an_error():
    class Exits(Rows):
        def write(self, step, values):
            sys.exit(3)

    with pytest.raises(jl.errors.WriterError, match="SystemExit"):
        loop_of(Exits()).run(DATA, 0.0)


@pytest.mark.parametrize("wrong", [3, "metrics.csv", Rows, object(), None])
def test_what_is_no_writer_is_an_error_at_once(wrong):
    with pytest.raises(jl.errors.ArgumentTypeError, match="writer must have the methods"):
        jl.loop(step_fn).write(wrong)


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "always"])
def test_a_wrong_cadence_is_an_error_at_once(every):
    with pytest.raises((jl.errors.ArgumentError, jl.errors.ArgumentTypeError), match="every"):
        jl.loop(step_fn).write(Rows(), every=every)


def test_check_opens_nothing(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,epoch,x\n5,0,1.0\n")
    loop_of(jl.writers.csv(path), values=lambda s: {}).check(DATA, 0.0)
    loop_of(jl.writers.csv(path)).run(DATA, 0.0, epochs=0)
    assert path.read_text() == "step,epoch,x\n5,0,1.0\n"
    assert os.listdir(tmp_path) == ["metrics.csv"]


def test_the_same_writer_twice_is_an_error(tmp_path):
    rows = Rows()
    for twice in ([rows, rows], [jl.writers.csv(tmp_path / "a")] * 2):
        with pytest.raises(jl.errors.ArgumentError, match="writers of a loop must differ"):
            loop_of(*twice).run(DATA, 0.0)


def test_two_runs_at_once_have_writers_of_their_own(tmp_path):
    paths = [tmp_path / "a.csv", tmp_path / "b.csv"]
    streams = [loop_of(jl.writers.csv(p), every=1).stream(DATA, 0.0, epochs=2) for p in paths]
    for _ in zip(*streams, strict=True):
        pass
    assert paths[0].read_text() == paths[1].read_text()
    assert len(read(paths[0])) == 10
    rows = Rows()
    loop = loop_of(rows, values=lambda s: {"y": s.step})
    for _ in zip(loop.stream(DATA, 0.0), loop.stream([*DATA, 1.0], 0.0), strict=True):
        pass
    assert sorted((step, row["y"]) for step, row in rows.rows) == [(5, 5), (6, 6)]


def test_a_stream_that_is_left_has_written_its_rows(tmp_path):
    path = tmp_path / "a.csv"
    stream = loop_of(jl.writers.csv(path)).stream(DATA, 0.0, epochs=3)
    next(stream)
    stream.close()
    assert [row["step"] for row in read(path)] == ["5"]


# --- files ---------------------------------------------------------------------------------------


def run_files(folder, *, epochs, every=2, fail_at=None, resume=True, write=True):
    """Trains with both files, and fails at a step, after its row and its checkpoint."""
    loop = BASE.handle("epoch_completed", add_validation)
    if write:
        loop = loop.write(jl.writers.csv(folder / "m.csv"), every=every)
        loop = loop.write(
            jl.writers.jsonl(folder / "m.jsonl"),
            every=every,
            values=lambda s: {"total": s.step_state},
            hyperparameters={"rate": np.float64(0.1)},
        )
    loop = loop.checkpoint(
        folder / "saved", event="iteration_completed", filter=jl.every(3), on_exception=False
    )
    if resume:
        loop = loop.resume(folder / "saved")
    return failing_at(loop, fail_at).run(DATA, 0.0, epochs=epochs)


def test_files_after_errors_at_every_step_are_those_of_an_undisturbed_run(tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    run_files(whole, epochs=3)
    for step in (1, 5, 6, 13):
        with pytest.raises(KeyError, match="killed"):
            run_files(torn, epochs=3, fail_at=step)
    run_files(torn, epochs=3)
    for name in ("m.csv", "m.jsonl"):
        assert (torn / name).read_text() == (whole / name).read_text()
    rows = read(whole / "m.csv")
    assert [row["step"] for row in rows] == ["2", "4", "5", "6", "8", "10", "12", "14", "15"]
    assert list(rows[0]) == ["step", "epoch", "x", "validation_x"]
    assert [row["validation_x"] for row in rows[:3]] == ["", "", "7.0"]
    lines = read_lines(whole / "m.jsonl")
    assert lines[0] == {"step": 0, "hyperparameters": {"rate": 0.1}}
    assert lines[3] == {"step": 5, "epoch": 0, "x": 2.5, "validation_x": 7.0, "total": 12.5}


def test_a_row_is_amended_if_the_run_resumes_between_an_iteration_and_its_epoch(tmp_path):
    for name in ("whole", "torn"):
        loop = BASE
        if name == "torn":

            def fail(state):
                raise KeyError("killed")

            broken = loop.handle("epoch_completed", fail)
        loop = loop.handle("epoch_completed", add_validation)
        custom = Rows()

        def attach(loop, name=name, custom=custom):
            path = tmp_path / name
            loop = loop.write(jl.writers.csv(path / "m.csv"), every=5)
            loop = loop.write(jl.writers.jsonl(path / "m.jsonl"), every=5)
            loop = loop.write(custom, every=5, values=lambda s: {"y": s.step})
            return loop.checkpoint(path, event="iteration_completed", resume=True)

        if name == "torn":
            with pytest.raises(KeyError):
                attach(broken).run(DATA, 0.0, epochs=1)
            assert custom.rows == [(5, {"epoch": 0, "x": 2.5, "y": 5})]
            assert "validation" not in (tmp_path / name / "m.csv").read_text()
        attach(loop).run(DATA, 0.0, epochs=2)
        if name == "torn":
            # The checkpoint at step 10 made its row durable before the epoch ended.
            assert [(step, [*row]) for step, row in custom.rows[1:]] == [
                (5, ["validation_x"]),
                (10, ["epoch", "x", "y"]),
                (10, ["validation_x"]),
            ]
    for name in ("m.csv", "m.jsonl"):
        assert (tmp_path / "torn" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_rows_after_a_signal_are_those_of_an_undisturbed_run(tmp_path):
    run_files(tmp_path / "whole", epochs=3)
    folder = tmp_path / "torn"

    def attach(loop, signals=()):
        loop = loop.handle("epoch_completed", add_validation)
        loop = loop.write(jl.writers.csv(folder / "m.csv"), every=2)
        loop = loop.checkpoint(folder / "saved", resume=True)
        for step in signals:
            kill = lambda s, n=step: s.step == n and os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
            loop = loop.observe("iteration_completed", kill)
        return loop

    loop = BASE
    for step in (3, 7, 15):
        attach(loop, [step]).run(DATA, 0.0, epochs=3)
    state = attach(loop).run(DATA, 0.0, epochs=3)
    assert state.status == "completed"
    assert (folder / "m.csv").read_text() == (tmp_path / "whole" / "m.csv").read_text()


def test_a_replay_writes_nothing(tmp_path):
    loop = BASE
    loop = loop.write(
        jl.writers.csv(tmp_path / "m.csv"), every=1, values=lambda s: {"y": s.step}
    ).checkpoint(tmp_path / "saved")
    loop.run(DATA, 0.0, epochs=2)
    text = (tmp_path / "m.csv").read_text()
    state, _ = loop.replay(tmp_path / "saved", 8, data=DATA)
    assert state.step == 7
    assert (tmp_path / "m.csv").read_text() == text and not list(tmp_path.glob("m.1.csv"))


def test_a_fresh_run_renames_the_file_of_an_earlier_one(tmp_path):
    path = tmp_path / "deep" / "metrics.csv"
    for n in range(3):
        loop_of(jl.writers.csv(path)).run(DATA, float(n), epochs=n + 1)
    assert sorted(os.listdir(path.parent)) == ["metrics.1.csv", "metrics.2.csv", "metrics.csv"]
    names = ("metrics.1.csv", "metrics.2.csv", "metrics.csv")
    assert [len(read(path.parent / name)) for name in names] == [1, 2, 3]


def test_a_run_from_a_state_keeps_the_rows_of_the_other_run(tmp_path):
    path = tmp_path / "m.jsonl"
    loop = loop_of(jl.writers.jsonl(path))
    first = loop.run(DATA, 0.0, epochs=1)
    longer = loop.from_state(first).run(DATA, epochs=2)
    assert os.listdir(tmp_path) == ["m.jsonl"]  # nothing had to go
    text = path.read_text()
    loop.from_state(first).run(DATA, epochs=4)
    assert (tmp_path / "m.1.jsonl").read_text() == text
    assert [row["step"] for row in read_lines(path)] == [5, 10, 15, 20]
    assert longer.step == 10


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize(
    "content",
    [b"a,b\n1,2\n", b"hello", b'{"loss": 1}\n', b"\x00\xff\xfe\n" * 9, b"step\n1\n", b"\n\n"],
)
def test_a_foreign_file_is_an_error_before_the_first_step(kind, content, tmp_path):
    path, calls = tmp_path / f"m.{kind}", []
    path.write_bytes(content)
    loop = loop_of(getattr(jl.writers, kind)(path)).observe("started", calls.append)
    with pytest.raises(jl.errors.WriterError, match="must be missing or written by this writer"):
        loop.run(DATA, 0.0)
    assert path.read_bytes() == content and not calls and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_damage_in_the_middle_is_an_error_and_nothing_is_lost(kind, tmp_path):
    loop = loop_of(getattr(jl.writers, kind)(tmp_path / "m"))
    state = loop.run(DATA, 0.0, epochs=2)
    lines = (tmp_path / "m").read_bytes().splitlines(keepends=True)
    damaged = b"".join([*lines[:-1], b"\x00\x00\n", lines[-1]])
    (tmp_path / "m").write_bytes(damaged)
    with pytest.raises(jl.errors.WriterError, match="must be missing or written by this writer"):
        loop.from_state(state).run(DATA, epochs=3)
    assert (tmp_path / "m").read_bytes() == damaged


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_torn_last_lines_are_dropped(kind, tmp_path):
    path = tmp_path / "m"
    loop = loop_of(getattr(jl.writers, kind)(path))
    state = loop.run(DATA, 0.0, epochs=2)
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for cut in range(len(last)):
        path.write_bytes(whole + last[:cut])
        loop.from_state(state).run(DATA, epochs=2)  # has ended: opens nothing
        loop.from_state(state).run(DATA, epochs=3)
        assert path.read_bytes().startswith(whole)
        assert len(path.read_bytes().splitlines()) == len(whole.splitlines()) + 1
        for aside in tmp_path.glob("m.*"):
            aside.unlink()


def test_a_read_only_folder_is_an_error_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    loop = loop_of(jl.writers.csv(tmp_path / "file" / "m.csv"))
    with pytest.raises(jl.errors.WriterError, match="`write_csv` must be opened before the first"):
        loop.run(DATA, 0.0)
    with pytest.raises(jl.errors.WriterError, match="IsADirectoryError"):
        loop_of(jl.writers.csv(tmp_path)).run(DATA, 0.0)


def test_a_second_process_is_an_error(tmp_path):
    path = tmp_path / "m"
    code = (
        "import sys, jaxloop.writers as w; s = w.WriterStart(0, 'a');"
        f"f = w.csv({str(path)!r}).open(s); f.write(1, {{'epoch': 0}});"
        "print('open', flush=True); sys.stdin.read(); f.write(2, {'epoch': 0}); f.close()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(jl.errors.WriterError, match="one run at a time must write"):
            loop_of(jl.writers.csv(path)).run(DATA, 0.0)
        other.stdin.close()
    assert [row["step"] for row in read(path)] == ["1", "2"]


def test_a_file_that_is_replaced_is_an_error_and_the_new_one_stays(tmp_path):
    path = tmp_path / "m.csv"

    def replace(state):
        path.unlink()
        path.write_text("mine")
        return "continue", state.replace(metrics={**state.metrics, "more": 1.0})

    loop = BASE.handle("epoch_completed", replace, jl.only(2))
    with pytest.raises(jl.errors.WriterError, match="must stay in place"):
        loop.write(jl.writers.csv(path)).run(DATA, 0.0, epochs=3)
    assert path.read_text() == "mine"


def test_a_link_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "m.csv").symlink_to(tmp_path / "disk" / "m.csv")
    for _ in range(2):
        BASE.write(jl.writers.csv(tmp_path / "m.csv")).run(DATA, 0.0)
    assert (tmp_path / "m.csv").is_symlink()
    assert sorted(os.listdir(tmp_path / "disk")) == ["m.1.csv", "m.csv"]
    assert [row["step"] for row in read(tmp_path / "m.csv")] == ["5"]


def test_a_column_appears_late(tmp_path):
    path = tmp_path / "m.csv"
    loop = BASE.handle("epoch_completed", add_validation, jl.only(2))

    def odd(state):
        return "continue", state.replace(metrics={**state.metrics, 'a "b",\nc': 1})

    loop = loop.handle("epoch_completed", odd, jl.only(3))
    loop.write(jl.writers.csv(path)).run(DATA, 0.0, epochs=3)
    assert path.read_text() == (
        'step,epoch,x,validation_x,"a ""b"", c"\n5,0,2.5,,\n10,1,2.5,7.0,\n15,2,2.5,,1\n'
    )


def test_a_name_of_several_lines_is_one_line_of_the_header(tmp_path):
    loop = jl.loop(lambda batch, total: jl.emit(total, **{'a,"b"\n': batch}))
    loop = loop.metric('a,"b"\n').write(jl.writers.csv(tmp_path / "m.csv"))
    loop.run([1.0], 0.0)
    assert (tmp_path / "m.csv").read_text() == 'step,epoch,"a,""b"""\n1,0,1.0\n'


def test_nan_and_infinity(tmp_path):
    values = {"a": float("nan"), "b": np.float32("inf"), "c": np.array([-np.inf, 1.0])}
    loop = loop_of(
        jl.writers.csv(tmp_path / "m.csv"),
        jl.writers.jsonl(tmp_path / "m.jsonl"),
        values=lambda s: values,
    )
    loop.run([1.0], 0.0)
    (row,) = read(tmp_path / "m.csv")
    assert row == {"step": "1", "epoch": "0", "x": "1.0", "a": "nan", "b": "inf"}
    text = (tmp_path / "m.jsonl").read_text()

    def refuse(constant):
        raise ValueError(constant)  # NaN and Infinity are not JSON

    line = json.loads(text, parse_constant=refuse)
    assert line["a"] is None and line["b"] == math.inf and line["c"] == [-math.inf, 1.0]


def test_jsonl_keeps_what_can_be_kept(tmp_path):
    values = {
        "array": np.arange(4).reshape(2, 2),
        "half": jnp.ones(2, jnp.bfloat16),
        "z": np.array([1 + 2j]),
        "text": Text('"quoted"\n'),
        "histogram": Histogram.of([0.0, 1.0], bins=2),
        "image": Image(np.zeros((2, 2))),
        "flag": True,
    }
    loop = loop_of(jl.writers.jsonl(tmp_path / "m.jsonl"), values=lambda s: values)
    loop.run([1.0], 0.0)
    (line,) = read_lines(tmp_path / "m.jsonl")
    assert line == {
        "step": 1,
        "epoch": 0,
        "x": 1.0,
        "array": [[0, 1], [2, 3]],
        "half": [1.0, 1.0],
        "z": [[1.0, 2.0]],
        "text": '"quoted"\n',
        "histogram": {"counts": [1, 1], "edges": [0.0, 0.5, 1.0]},
        "flag": True,
    }


def test_csv_has_no_place_for_hyperparameters(tmp_path):
    loop = loop_of(jl.writers.csv(tmp_path / "m.csv"), hyperparameters={"rate": 0.1})
    with pytest.raises(jl.errors.ArgumentError, match="hyperparameters must be empty"):
        loop.run(DATA, 0.0)
    with pytest.raises(jl.errors.ArgumentTypeError, match="hyperparameters must be a dict"):
        loop_of(Rows(), hyperparameters=0.1)


def test_descriptions_are_values():
    assert jl.writers.csv("a") == jl.writers.csv(Path("a")) != jl.writers.csv("b")
    with pytest.raises(jl.errors.ArgumentTypeError, match="csv: path must be"):
        jl.writers.csv(3)
    with pytest.raises(jl.errors.ArgumentError, match="jsonl: path must not be empty"):
        jl.writers.jsonl("")


def test_the_core_imports_no_package_of_a_writer(tmp_path):
    code = (
        "import sys, jaxloop as jl; "
        "loop = jl.loop(lambda b, s: jl.emit(s, x=b)).metric('x'); "
        f"loop.write(jl.writers.csv({str(tmp_path / 'm.csv')!r})).run([1.0, 2.0]); "
        "heavy = {'tensorboardX', 'wandb', 'mlflow', 'trackio', 'PIL', 'matplotlib'}; "
        "print(sorted(heavy & {m.split('.')[0] for m in sys.modules}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_metric_named_epoch_does_not_replace_the_epoch(tmp_path):
    loop = jl.loop(lambda batch, state: jl.emit(state, epoch=batch)).metric("epoch")
    state = loop.write(jl.writers.jsonl(tmp_path / "m.jsonl")).run([7.0], 0, epochs=2)
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1] and state.history[0]["epoch"] == 7
