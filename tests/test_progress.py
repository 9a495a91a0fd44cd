"""Progress: lines in a pipe, bars in a terminal, a table in a notebook, and the summary."""

import contextlib
import io
import logging
import re
import sys
import threading
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest

import jaxloop as jl
from jaxloop._core.sessions import Session
from jaxloop._core.state import Snapshot
from jaxloop._progress.summary import slowest_handlers, summary, time_spent
from jaxloop._progress.text import text_of
from tests.screen import terminal

DATA = [np.full((4, 2), i, np.float32) for i in range(3)]


def step(batch, total):
    return jl.emit(total + batch.sum(), x=batch.mean(), y=-batch.mean())


LOOP = jl.loop(step).metric("x").metric("y")
SHOWN = LOOP.progress(every=2)


def start():
    return jnp.float32(0)


def wait(state):
    time.sleep(0.11)  # longer than the time between two redraws


class Unsized:
    def __iter__(self):
        return iter(DATA)


# --- lines ---------------------------------------------------------------------------------------


def test_a_pipe_gets_plain_lines(capsys):
    SHOWN.run(DATA, start(), epochs=2)
    out = capsys.readouterr().out
    assert out.isascii() and all(char.isprintable() for char in out.replace("\n", ""))
    lines = out.splitlines()
    assert lines[:4] == [
        "epoch 0, batch 1, x 0.5000, y -0.5000",
        "epoch 0, batch 3, x 1.0000, y -1.0000",
        "epoch 1, batch 1, x 0.5000, y -0.5000",
        "epoch 1, batch 3, x 1.0000, y -1.0000",
    ]
    assert lines[4].startswith("completed: 2 epochs, 6 steps in ")
    assert lines[5].split()[:4] == ["metric", "best", "epoch", "last"]


@pytest.mark.parametrize("environ", [{"TERM": "dumb"}, {"TERM": ""}, {"TTY_INTERACTIVE": "0"}])
def test_a_terminal_that_cannot_redraw_gets_lines(monkeypatch, environ):
    with terminal(monkeypatch, **environ) as term:
        LOOP.progress(every=2, summary=False).run(DATA, start())
    assert term.raw.splitlines() == [
        "epoch 0, batch 1, x 0.5000, y -0.5000",
        "epoch 0, batch 3, x 1.0000, y -1.0000",
    ]


def test_log_0_shows_nothing(monkeypatch):
    pair = (lambda key, x: jnp.ones((2, 1)), lambda w, x: x @ w)
    data = [(np.ones((4, 2), np.float32), np.ones((4, 1), np.float32))]
    with terminal(monkeypatch) as term:
        jl.trainer(pair, "huber", "sgd", log=0).run(data)
    assert term.raw == ""
    with terminal(monkeypatch) as term:
        jl.trainer(pair, "huber", "sgd").run(data)
    assert "epoch 0" in term.raw and "completed" in term.raw


def test_the_last_call_counts(capsys):
    SHOWN.progress(every=3, summary=False).run(DATA, start())
    assert [line.split(", x")[0] for line in capsys.readouterr().out.splitlines()] == [
        "epoch 0, batch 2",
        "epoch 0, batch 3",
    ]


def test_names_cannot_garble(capsys):
    loop = jl.loop(lambda b, s: jl.emit(s, **{"a\x1b[2J\nb": b})).metric("a\x1b[2J\nb")
    loop.progress().run([1.0, 2.0], 0, epochs=2)
    out = capsys.readouterr().out
    assert "a?[2J?b 1.5000" in out and "\x1b" not in out


def test_a_stream_without_the_characters_of_a_name(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    jl.loop(lambda b, s: jl.emit(s, **{"größe": b})).metric("größe").progress().run([1.0], 0)
    assert rb"gr\xf6\xdfe 1.0000" in raw.getvalue()


class Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError("nobody reads this")


def test_a_display_that_is_gone_ends_no_run(monkeypatch, caplog):
    monkeypatch.setattr(sys, "stdout", Broken())
    state = SHOWN.run(DATA, start(), epochs=3)
    assert state.step == 9
    told = [record for record in caplog.records if "progress is not shown" in record.message]
    assert len(told) == 1 and "nobody reads this" in told[0].message


class Vanishing(io.StringIO):
    """A terminal that is closed while a run shows its progress."""

    encoding = "utf-8"

    def __init__(self):
        super().__init__()
        self.left = 3

    def isatty(self):
        return True

    def write(self, text):
        self.left -= 1
        if self.left < 0:
            raise OSError(5, "Input/output error")
        return len(text)


def test_a_terminal_that_is_gone_ends_no_run(monkeypatch, caplog):
    monkeypatch.setenv("TERM", "xterm")
    stream = Vanishing()
    monkeypatch.setattr(sys, "stdout", stream)
    state = SHOWN.handle("epoch_completed", wait).run(DATA, start(), epochs=3)
    assert state.step == 9 and sys.stdout is stream
    assert sum("progress is not shown" in record.message for record in caplog.records) == 1


def test_wrong_arguments():
    with pytest.raises(jl.errors.ArgumentError, match="progress: every must be at least 1, got 0"):
        LOOP.progress(every=0)
    with pytest.raises(jl.errors.ArgumentTypeError, match="plot must be True or False, got 'yes'"):
        LOOP.progress(plot="yes")


# --- a terminal ----------------------------------------------------------------------------------


def test_bars_go_and_lines_stay(monkeypatch):
    with terminal(monkeypatch) as term:
        result = SHOWN.handle("epoch_completed", wait).run(DATA, start(), epochs=3)
    lines, cursor = term.screen()
    assert result.step_state == 72 and cursor
    assert [line.split()[:2] for line in lines[:3]] == [["epoch", f"{i}"] for i in range(3)]
    assert lines[0].endswith("x 1.0000  y -1.0000")
    assert lines[3].startswith("completed: 3 epochs, 9 steps")
    assert not any("━" in line or "─" in line for line in lines)
    assert any("━" in frame for frame in term.frames)  # while it ran


def counts(term, what):
    return re.findall(rf"{what} +[━─]* +(\S+)", "\n".join(term.frames))


def test_counts(monkeypatch):
    loop = SHOWN.handle("epoch_completed", wait)
    with terminal(monkeypatch) as term:
        loop.run(DATA, start(), epochs=3)
    assert counts(term, "epochs")[0] == "0/3" and counts(term, "epochs")[-1] == "3/3"
    assert set(counts(term, "batches")) == {"0/3", "3/3"}
    with terminal(monkeypatch) as term:
        loop.run(Unsized(), start(), epochs=3)
    assert counts(term, "batches")[0] == "0" and counts(term, "batches")[-1] == "3/3"
    with terminal(monkeypatch) as term:
        loop.run(DATA, start(), steps=5)
    assert counts(term, "steps")[0] == "0/5" and counts(term, "steps")[-1] == "5/5"
    assert counts(term, "batches")[-1] == "2/2"
    with terminal(monkeypatch) as term:
        loop.run(DATA, start())
    assert not counts(term, "epochs") and counts(term, "batches")[-1] == "3/3"


def test_the_time_left_keeps_to_the_limit(monkeypatch):
    loop = SHOWN.handle("epoch_completed", wait)
    with terminal(monkeypatch) as term:
        loop.run(DATA, start(), epochs=100_000, max_time=0.3)
    assert "0:00 left" in term.raw and not re.search(r"[1-9] left", term.raw)


def test_a_resumed_run_counts_on(monkeypatch):
    def fail(state):
        raise ValueError("stop")

    failing = LOOP.handle("iteration_completed", fail, jl.only(5))
    with pytest.raises(ValueError, match="stop") as caught:
        failing.run(DATA, start(), epochs=4)
    state = caught.value.loop_state
    with terminal(monkeypatch) as term:
        SHOWN.from_state(state).run(DATA, epochs=4)
    done = state.iteration + 1
    assert counts(term, "epochs")[0] == "1/4" and counts(term, "batches")[0] == f"{done}/3"


def test_what_handlers_write_is_above_the_bars(monkeypatch):
    def talk(state):
        print("[b]printed[/b]", state.epoch)
        print("begun, ", end="", flush=True)
        sys.stderr.write("error stream\n")
        logging.getLogger("mine").error("logged")

    with terminal(monkeypatch) as term:
        handler = logging.StreamHandler(sys.stderr)
        logging.getLogger("mine").addHandler(handler)
        loop = SHOWN.handle("epoch_completed", talk).handle("epoch_completed", wait)
        try:
            loop.log(lambda s: "from log", event="epoch_completed").run(DATA, start(), epochs=2)
        finally:
            logging.getLogger("mine").removeHandler(handler)
        assert handler.stream is sys.stderr is sys.stdout is term.file
    lines, cursor = term.screen()
    assert cursor and not any("━" in line for line in lines)
    texts = ["[b]printed[/b] 0", "error stream", "begun, logged", "[b]printed[/b] 1"]
    assert [line for line in lines if line in texts] == [*texts, *texts[1:3]]
    assert lines.count("from log") == 2


def test_an_error_comes_after_the_bars(monkeypatch):
    def fail(state):
        raise ValueError("stop")

    with terminal(monkeypatch) as term:
        with pytest.raises(ValueError, match="stop"):
            SHOWN.handle("iteration_completed", fail, jl.only(5)).run(DATA, start(), epochs=4)
        assert sys.stdout is term.file
        print("the traceback")
    lines, cursor = term.screen()
    assert cursor and lines[-1] == "the traceback"
    assert any(line.startswith("epochs") for line in lines)
    assert not any("completed" in line for line in lines)


def test_a_stream_that_is_left(monkeypatch):
    with terminal(monkeypatch) as term:
        stream = SHOWN.stream(DATA, start(), epochs=3)
        next(stream)
        stream.close()
        assert sys.stdout is term.file
    assert term.screen()[1]


def test_no_line_is_wider_than_the_terminal(monkeypatch):
    names = [f"metric_{i}_of_many" for i in range(12)] + ["long_" * 40]
    loop = jl.loop(lambda b, s: jl.emit(s, **dict.fromkeys(names, b)))
    for name in names:
        loop = loop.metric(name)
    for width in (80, 24):
        with terminal(monkeypatch, COLUMNS=str(width)) as term:
            loop.progress(summary=False).handle("epoch_completed", wait).run([1.0], 0, epochs=2)
        lines, _ = term.screen(width)
        assert lines and not any("epochs" in line for line in lines)  # nothing was left behind
        drawn = [line for frame in term.frames for line in frame.split("\n")]
        assert max(map(len, drawn)) < width
        if width == 80:
            assert any(re.search(r"  [+]\d+$", line) for line in lines)


def test_a_terminal_too_narrow_for_bars_gets_lines(monkeypatch):
    with terminal(monkeypatch, COLUMNS="23") as term:
        jl.loop(lambda b, s: jl.emit(s, x=b)).metric("x").progress().run([1.0], 0)
    lines, _ = term.screen(200)
    assert lines[0] == "epoch 0, batch 1, x 1.0000" and not any("━" in line for line in lines)


def test_a_run_inside_a_run_writes_lines(monkeypatch):
    def inner(state):
        SHOWN.run(DATA, start())

    with terminal(monkeypatch) as term:
        SHOWN.handle("epoch_completed", inner, "once").run(DATA, start(), epochs=2)
    lines, cursor = term.screen()
    assert lines[0].startswith("epoch 0, batch 1") and cursor
    assert sum("completed" in line for line in lines) == 1
    assert not any("━" in line for line in lines)


def test_two_threads_in_one_terminal(monkeypatch):
    both = threading.Barrier(2)

    def run():
        loop = SHOWN.handle("started", lambda state: print(both.wait(10)))
        results.append(loop.run(DATA, start(), epochs=5).step)

    results = []
    with terminal(monkeypatch) as term:
        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sys.stdout is term.file
    assert results == [15, 15]
    assert term.screen()[1] and term.raw.count("completed: 5 epochs") == 2


def test_it_is_drawn_at_most_ten_times_a_second(monkeypatch):
    many = [np.zeros((4, 2), np.float32)] * 2000
    with terminal(monkeypatch) as term:
        began = time.perf_counter()
        SHOWN.run(many, start(), epochs=30)
        took = time.perf_counter() - began
    # The first frame, and those at the end, with and without the bars.
    assert 2 <= len(counts(term, "batches")) <= 10 * took + 4


def test_who_watches_changes_no_bit(monkeypatch):
    rows = np.random.default_rng(0).normal(size=(40, 4, 2)).astype(np.float32)
    expected = LOOP.run(list(rows), start(), epochs=3)
    with terminal(monkeypatch):
        state = SHOWN.run(list(rows), start(), epochs=3)
    assert state.step_state == expected.step_state and state.history == expected.history


# --- a notebook ----------------------------------------------------------------------------------


class OutStream(io.StringIO):
    pass


@contextlib.contextmanager
def cell(monkeypatch):
    """The outputs of a notebook's cell, by their ids, as a front end keeps them."""
    outputs = {}

    def display(data, *, raw, display_id):
        assert raw and display_id not in outputs
        outputs[display_id] = data

    def update_display(data, *, raw, display_id):
        assert raw and display_id in outputs
        outputs[display_id] = data

    made, kernel = types.ModuleType("IPython.display"), types.ModuleType("ipykernel.iostream")
    made.display, made.update_display = display, update_display
    kernel.OutStream = OutStream
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "IPython.display", made)
        patch.setitem(sys.modules, "ipykernel.iostream", kernel)
        patch.setattr(sys, "stdout", OutStream())
        yield outputs


def test_a_notebook_keeps_the_last_table(monkeypatch):
    with cell(monkeypatch) as outputs:
        SHOWN.run(DATA, start(), epochs=3)
        assert sys.stdout.getvalue() == ""  # nothing but the table
    (output,) = outputs.values()
    assert "<progress" not in output["text/html"]
    for text in ("completed: 3 epochs", "-1.0000", "<th", "best"):
        assert text in output["text/html"], text
    assert output["text/plain"].startswith("epoch 0, ") and "completed" in output["text/plain"]


def test_a_notebook_shows_how_it_failed(monkeypatch):
    def fail(state):
        raise ValueError("<b>")

    with cell(monkeypatch) as outputs, pytest.raises(ValueError):
        SHOWN.handle("iteration_completed", fail, jl.only(2)).run(DATA, start())
    (output,) = outputs.values()
    assert "ended by ValueError" in output["text/html"] and "<b><" not in output["text/html"]


def test_html_is_escaped(monkeypatch):
    loop = jl.loop(lambda b, s: jl.emit(s, **{"<i>x</i>": b})).metric("<i>x</i>").progress()
    with cell(monkeypatch) as outputs:
        loop.run([1.0], 0, epochs=2)
    (output,) = outputs.values()
    assert "<i>" not in output["text/html"] and "&lt;i&gt;x" in output["text/html"]


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_notebook_shows_curves(monkeypatch, epochs):
    many = [np.full((4, 2), i, np.float32) for i in range(50)]
    loop = LOOP.progress(plot=True).handle("iteration_completed", wait, jl.only(20))
    with cell(monkeypatch) as outputs:
        loop.run(many, start(), epochs=epochs)
    table, picture = outputs.values()
    assert "text/html" in table and picture["image/png"].startswith(b"\x89PNG")


def test_a_run_inside_a_run_of_a_notebook_writes_lines(monkeypatch):
    loop = SHOWN.handle("epoch_completed", lambda state: SHOWN.run(DATA, start()) and None)
    with cell(monkeypatch) as outputs:
        loop.run(DATA, start())
        assert sys.stdout.getvalue().startswith("epoch 0, batch 1")
    assert len(outputs) == 1


@pytest.mark.slow
def test_an_executed_notebook_keeps_the_table():
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    code = (
        "import jaxloop as jl\n"
        "loop = jl.loop(lambda b, s: jl.emit(s, x=b)).metric('x').progress(plot=True)\n"
        "loop.handle('epoch_completed', lambda s: print('hello')).run([1.0, 2.0], 0, epochs=3)\n"
        "None"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = notebook.cells[0].outputs
    table, picture = [one["data"] for one in outputs if one["output_type"] == "display_data"]
    assert "completed: 3 epochs, 6 steps" in table["text/html"] and "image/png" in picture
    assert "".join(one.get("text", "") for one in outputs) == "hello\n" * 3


# --- the summary ---------------------------------------------------------------------------------


def test_best_values():
    nan = float("nan")
    history = {
        0: {"loss": 2.0, "accuracy": 0.5, "other": 3.0, "never": nan, "count": np.int64(7)},
        1: {"loss": nan, "accuracy": 0.9, "other": 1.0, "never": nan, "count": np.int64(9)},
        2: {"loss": 2.5, "accuracy": 0.7, "other": 2.0, "never": nan, "word": "text"},
    }
    better = {"loss": "min", "accuracy": "max", "never": "min", "count": "max"}
    shown = summary(Snapshot().__class__(lazy_history=_records(history)), better_of=better.get)
    (table,) = shown.tables
    assert table.rows == (
        ("loss", "2.0000", "0", "2.5000"),
        ("accuracy", "0.9000", "1", "0.7000"),
        ("other", "1.0000 (lowest)", "1", "2.0000"),
        ("never", "-", "-", "nan"),
        ("count", "9", "1", "9"),
    )


def _records(values):
    from jaxloop._core.lazy import EpochRecords

    return EpochRecords.of(values)


def session(**parts):
    return Session(**{"began": 0.0, "first_step": 0, "last_step": 9, "elapsed_s": 100.0, **parts})


def test_where_the_time_went():
    one = session(compile_s=20.0, data_s=5.0, dispatch_s=0.1, handlers_s=25.0)
    assert [row[0] for row in time_spent([one]).rows] == [
        "device",
        "handlers",
        "compiling",
        "waiting for data",
    ]
    two = time_spent([one, session(compile_s=10.0, lost_s=30.0)])
    assert two.rows[0] == ("device", "90.0 s", "69 %", "139.9 s", "61 %")
    assert ("lost and repeated", "30.0 s", "23 %", "30.0 s", "13 %") in two.rows


def test_handlers_are_listed_the_slowest_first():
    many = {f"handler_{i}": float(i) for i in range(20)}
    rows = slowest_handlers([session(by_handler=many), session(by_handler={"validate": 90.0})]).rows
    assert rows[:2] == (("validate", "90.0 s", "45 %"), ("handler_19", "19.0 s", "10 %"))
    assert len(rows) == 10


def test_the_summary_says_what_was_written_where(tmp_path, capsys):
    loop = SHOWN.checkpoint(tmp_path / "run").write(jl.writers.csv(tmp_path / "metrics.csv"))
    loop.run(DATA, start())
    out = capsys.readouterr().out.replace("\n  ", " ")
    assert f"checkpoint wrote to {tmp_path / 'run'}" in out
    assert f"wrote to {tmp_path / 'metrics.csv'}" in out


def test_goodput_of_a_resumed_run(tmp_path, capsys):
    def fail(state):
        raise ValueError("stop")

    loop = SHOWN.checkpoint(tmp_path, resume=True)
    with pytest.raises(ValueError):
        loop.handle("epoch_completed", fail, jl.only(2)).run(DATA, start(), epochs=3)
    capsys.readouterr()
    loop.run(DATA, start(), epochs=3)
    out = capsys.readouterr().out
    assert re.search(r"^epoch 1, batch 1, ", out)
    assert "completed: 3 epochs, 9 steps" in out and "in 2 sessions" in out
    assert re.search(r"^goodput \d+ %: ", out, re.MULTILINE)


def test_a_narrow_summary_fits():
    history = {i: {f"a_name_that_is_long_{j}" * 3: 1.0 for j in range(40)} for i in range(2)}
    snapshot = Snapshot(lazy_history=_records(history), status="completed", epoch=2, step=6)
    lines = text_of(summary(snapshot), 50)
    assert max(map(len, lines)) <= 50 and any("and 20 more" in line for line in lines)


def test_the_time_of_waiting_is_not_the_observers(capsys):
    """An observer that reads a metric waits for the device, which is not its own time."""
    import jax

    def slow(x):
        time.sleep(0.05)
        return x

    def sleepy(batch, total):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return jl.emit(total + 1, x=jax.pure_callback(slow, shape, batch))

    loop = jl.loop(sleepy).metric("x").observe("epoch_completed", lambda s: s.metrics["x"])
    state = loop.run([np.float32(1)] * 10, start())
    assert state.sessions[-1].handlers_s < state.sessions[-1].elapsed_s / 2
