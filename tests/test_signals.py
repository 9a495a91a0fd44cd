"""SIGTERM and Ctrl-C: the run ends where its state is whole, and goes on from there."""

import logging
import os
import signal
import subprocess
import sys
import threading

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxloop as jl
from tests.digest import digest

X = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
Y = (np.arange(40) % 3).astype(np.int32)
SAFETY_S = 300
"""No wait ends by this; it is there so that a fault cannot hang the suite."""
MODEL = (lambda key, x: jnp.ones((4, 3)), lambda w, x: x @ w)


def step(batch, total):
    return jl.emit(total * 0.5 + jnp.sum(batch), x=batch)


MEAN = jl.loop(step).metric(lambda x: x, "mean", None, ["x"])
DATA = jl.batches(np.arange(28, dtype=np.float32), 4, shuffle=True)


def send(number=signal.SIGTERM):
    """Sends a signal to the main thread; it has arrived when this returns there."""
    signal.pthread_kill(threading.main_thread().ident, number)


@pytest.fixture(autouse=True)
def dispositions():
    """Python's own handlers, whatever this process inherited; a run leaves them as they are."""
    chosen = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    inherited = {number: signal.signal(number, handler) for number, handler in chosen.items()}
    try:
        yield
        assert {number: signal.getsignal(number) for number in chosen} == chosen
        for thread in threading.enumerate():
            if thread.name.startswith("jaxloop"):
                thread.join(SAFETY_S)
                assert not thread.is_alive()
    finally:
        for number, handler in inherited.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("fuse", ["auto", 1])
def test_a_signal_anywhere_ends_the_run_and_resume_goes_on(number, fuse, tmp_path):
    undisturbed = MEAN.run(DATA, 0.0, epochs=3, fuse=fuse)
    for at in (1, 6, 7, 8, 20):
        seen = []
        loop = MEAN.checkpoint(tmp_path / str(at), event="epoch_completed")
        stopped = (
            loop.observe("all", lambda s, seen=seen: seen.append((s.event, s.status)))
            .handle("iteration_completed", lambda s: send(number), jl.only(at))
            .run(DATA, 0.0, epochs=3, fuse=fuse)
        )
        name = signal.Signals(number).name
        assert (stopped.status, stopped.halted_by) == ("interrupted", name)
        assert seen[-1] == ("halted", "interrupted") and stopped.step == at
        # Only `halted` fires, and the epoch stays open.
        assert len(stopped.history) == (at - 1) // 7
        assert [event for event, _ in seen].count("epoch_halted") == 0
        assert jl.restore(tmp_path / str(at)).status == "interrupted"
        resumed = loop.resume(tmp_path / str(at)).run(DATA, 0.0, epochs=3, fuse=fuse)
        assert digest(resumed) == digest(undisturbed)
        assert digest(MEAN.from_state(stopped).run(DATA, epochs=3)) == digest(undisturbed)


def bump(state):
    """A handler that has done its work when the validation after it is interrupted."""
    memory = {"n": state.handler_state.get("bump", {"n": 0})["n"] + 1}
    return "continue", state.replace(handler_state={**state.handler_state, "bump": memory})


# One trainer for all tests, which share what it compiles.
TRAINER = (
    jl.trainer(MODEL, optax.softmax_cross_entropy_with_integer_labels, "sgd", log=0)
    .metric("accuracy")
    .handle("iteration_completed", bump, jl.every(3), name="bump")
)


class Signalling:
    """Validation data in the middle of which a signal comes, the n-th time."""

    def __init__(self, at):
        self.at, self.times = at, 0

    def __iter__(self):
        self.times += 1
        for i in range(0, 40, 8):
            if self.times == self.at and i == 16:
                send()
            yield X[i : i + 8], Y[i : i + 8]


@pytest.mark.parametrize("event", ["iteration_completed", "epoch_completed"])
def test_a_signal_in_a_validation_begins_its_firing_again(event, tmp_path, caplog):
    data = jl.batches((X, Y), 8, shuffle=True)
    filter = jl.every(3) if event == "iteration_completed" else "always"

    def loop(at):
        return TRAINER.validate(Signalling(at), event=event, filter=filter).early_stop(
            "validation_loss", event=event, filter=filter, patience=40
        )

    whole = {"epochs": 2, "output_transform": lambda state: state}
    undisturbed = loop(None).run(data, **whole)
    stopped = loop(2).checkpoint(tmp_path).run(data, **whole)
    assert stopped.status == "interrupted"
    # Said once, of the run; the validation is a part of it.
    assert [
        r.getMessage() for r in caplog.records if f"after step {stopped.step};" in r.getMessage()
    ]
    assert len(caplog.records) == 1
    assert stopped.step == (6 if event == "iteration_completed" else 10)
    assert len(stopped.history) == (0 if event == "iteration_completed" else 1) + (
        event == "iteration_completed"
    )
    resumed = loop(None).resume(tmp_path).run(data, **whole)
    assert digest(resumed) == digest(undisturbed)


def test_an_interrupted_evaluation_gives_no_number():
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
        jl.evaluator(MODEL).metric("accuracy").run(Signalling(1), jnp.ones((4, 3)))


class Waiting:
    """Data that stop coming after three batches, until they may go on."""

    def __init__(self):
        self.waits, self.go_on = threading.Event(), threading.Event()

    def __iter__(self):
        for i in range(9):
            if i == 3:
                self.waits.set()
                # Short waits: a signal that comes right before a wait in C does not end it.
                for _ in range(100 * SAFETY_S):
                    if self.go_on.wait(0.01):
                        break
                else:
                    raise AssertionError("the signal was not seen")
            yield np.full(2, i, np.float32)


@pytest.mark.parametrize("fuse", [1, 2, "auto"])
def test_a_signal_is_seen_while_waiting_for_data(fuse, tmp_path):
    data = Waiting()

    def interrupt():
        assert data.waits.wait(SAFETY_S)
        send()

    thread = threading.Thread(target=interrupt)
    thread.start()
    # It returns while the data still wait.
    stopped = MEAN.checkpoint(tmp_path).run(data, 0.0, fuse=fuse)
    assert not data.go_on.is_set()
    # Batches that were read, but are not part of a block yet, are not consumed.
    assert stopped.status == "interrupted" and stopped.step <= 3
    data.go_on.set()
    thread.join()
    undisturbed = MEAN.run(data, 0.0)
    assert digest(MEAN.resume(tmp_path).run(data, 0.0)) == digest(undisturbed)


def test_a_second_ctrl_c_stops_at_once_and_one_sigterm_after_another_does_not():
    def twice(first, second):
        def handler(state):
            send(first)
            send(second)

        return MEAN.handle("iteration_completed", handler, jl.only(2)).run(DATA, 0.0)

    for first in (signal.SIGTERM, signal.SIGINT):
        with pytest.raises(KeyboardInterrupt) as caught:
            twice(first, signal.SIGINT)
        assert caught.value.loop_state.step == 2
        assert twice(first, signal.SIGTERM).halted_by == signal.Signals(first).name


def test_the_scripts_own_handler_is_called_and_comes_back():
    called = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: called.append(number))
    try:
        stopped = MEAN.handle("iteration_completed", lambda s: send(), jl.only(2)).run(DATA, 0.0)
        assert stopped.status == "interrupted" and called == [signal.SIGTERM]
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ignored = MEAN.handle("iteration_completed", lambda s: send(), jl.only(2)).run(DATA, 0.0)
        assert ignored.status == "completed"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_another_thread_runs_without_signals():
    states = []
    thread = threading.Thread(target=lambda: states.append(MEAN.run(DATA, 0.0)))
    thread.start()
    thread.join()
    assert states[0].status == "completed"


def test_a_stream_leaves_the_signals_of_its_caller_alone():
    stream = MEAN.stream(DATA, 0.0, epochs=3)
    next(stream)
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)
    assert next(stream).epoch == 1
    stream.close()


def test_a_signal_during_the_last_epoch_end_still_completes(caplog):
    with caplog.at_level(logging.WARNING, "jaxloop"):
        done = MEAN.handle("epoch_completed", lambda s: send(), jl.only(3)).run(DATA, 0.0, epochs=3)
        assert done.status == "completed" and not caplog.records
        stopped = MEAN.handle("epoch_completed", lambda s: send(), jl.only(2)).run(
            DATA, 0.0, epochs=3
        )
    assert (stopped.status, stopped.epoch, len(stopped.history)) == ("interrupted", 2, 2)
    assert "SIGTERM: the run ends here" in caplog.text


SCRIPT = """
import itertools
import sys
import numpy as np
import jaxloop as jl

def step(batch, total):
    return jl.emit(total + batch.sum(), x=batch)

def data(epoch):
    # The second epoch has no end: only a signal ends the run.
    for i in range(5000) if epoch == 0 else itertools.count():
        if i == 5000:
            print("running", flush=True)
        yield np.full(2, i % 7, np.float32)

loop = jl.loop(step).metric(lambda x: x, "mean", None, ["x"]).checkpoint(sys.argv[1])
state = loop.resume(sys.argv[1]).run(data, 0.0, epochs=30)
print(state.status, state.halted_by, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_script_that_gets_a_signal_goes_on_after_the_loop(number, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "running\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=SAFETY_S)
    assert process.returncode == 0, err
    assert out == f"interrupted {signal.Signals(number).name}\n"
    assert "the run ends here with the status 'interrupted'" in err
    state = jl.restore(tmp_path)
    assert state.status == "interrupted" and state.epoch >= 1 and state.iteration > 0


def test_a_notebooks_interrupt_ends_the_run(tmp_path):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    cell = nbformat.v4.new_code_cell
    source = SCRIPT.replace("sys.argv[1]", repr(str(tmp_path)))
    notebook = nbformat.v4.new_notebook(cells=[cell(source), cell("print(state.step > 0)")])
    client = nbclient.NotebookClient(notebook, timeout=SAFETY_S, kernel_name="python3")
    stop = threading.Event()

    def interrupt():
        # As the button does, once the cell has said that it is running.
        while not stop.wait(0.2):
            outputs = notebook.cells[0].get("outputs", [])
            if any("running" in output.get("text", "") for output in outputs):
                os.kill(client.km.provisioner.pid, signal.SIGINT)
                return

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        client.execute()
    finally:
        stop.set()
        thread.join()
    texts = ["".join(o.get("text", "") for o in c.outputs) for c in notebook.cells]
    assert "interrupted SIGINT" in texts[0] and texts[1] == "True\n"
    assert jl.restore(tmp_path).status == "interrupted"
