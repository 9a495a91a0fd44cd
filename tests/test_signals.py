"""SIGTERM and Ctrl-C: the run ends where its state is whole, and goes on from there."""

import contextlib
import ctypes
import logging
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxloop as jl
from jaxloop._checkpoint import reader
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


def end(loop, *args, **options):
    """The state that a signal leaves: Ctrl-C returns it, and SIGTERM raises with it."""
    try:
        state = loop.run(*args, output_transform=lambda state: state, **options)
    except jl.Terminated as ended:
        assert ended.code == 143 and ended.loop_state is ended.state
        assert not isinstance(ended, Exception)
        return ended.state
    assert state.halted_by != "SIGTERM"
    return state


@pytest.fixture(autouse=True)
def nothing_is_left(default_signals):
    """A run leaves the signal handlers as they are, and no thread."""
    yield
    assert {number: signal.getsignal(number) for number in default_signals} == default_signals
    for thread in threading.enumerate():
        if thread.name.startswith("jaxloop"):
            thread.join(SAFETY_S)
            assert not thread.is_alive()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("fuse", ["auto", 1])
def test_a_signal_anywhere_ends_the_run_and_resume_goes_on(number, fuse, tmp_path):
    undisturbed = MEAN.run(DATA, 0.0, epochs=3, fuse=fuse)
    for at in (1, 6, 7, 8, 20):
        seen = []
        loop = MEAN.checkpoint(tmp_path / str(at), event="epoch_completed")
        stopped = end(
            loop.observe("all", lambda s, seen=seen: seen.append((s.event, s.status))).handle(
                "iteration_completed", lambda s: send(number), jl.only(at)
            ),
            DATA,
            0.0,
            epochs=3,
            fuse=fuse,
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

    def __init__(self, at, number=signal.SIGTERM):
        self.at, self.number, self.times = at, number, 0

    def __iter__(self):
        for i in range(0, 40, 8):
            if i == 16:  # not in the check before the first step, which reads one batch
                self.times += 1
                if self.times == self.at:
                    send(self.number)
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
    stopped = end(loop(2).checkpoint(tmp_path), data, epochs=2)
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
    evaluator = jl.evaluator(MODEL).metric("accuracy")
    with pytest.raises(jl.Terminated):
        evaluator.run(Signalling(1), jnp.ones((4, 3)))
    with pytest.raises(KeyboardInterrupt, match="SIGINT") as caught:
        evaluator.run(Signalling(1, signal.SIGINT), jnp.ones((4, 3)))
    assert caught.value.loop_state.status == "interrupted"


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
    stopped = end(MEAN.checkpoint(tmp_path), data, 0.0, fuse=fuse)
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

        return end(MEAN.handle("iteration_completed", handler, jl.only(2)), DATA, 0.0)

    for first in (signal.SIGTERM, signal.SIGINT):
        with pytest.raises(KeyboardInterrupt) as caught:
            twice(first, signal.SIGINT)
        assert caught.value.loop_state.step == 2
        assert twice(first, signal.SIGTERM).halted_by == signal.Signals(first).name


def test_the_scripts_own_handler_is_called_and_comes_back():
    called = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: called.append(number))
    loop = MEAN.handle("iteration_completed", lambda s: send(), jl.only(2))
    try:
        stopped = end(loop, DATA, 0.0)
        assert stopped.status == "interrupted" and called == [signal.SIGTERM]
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert loop.run(DATA, 0.0).status == "completed"
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_the_scripts_own_handler_raises_comes_after_the_save(number, tmp_path):
    """Many scripts call `sys.exit` in a handler of SIGTERM. That must not lose the state."""

    def leave(number, frame):
        raise SystemExit(7)

    before = signal.signal(number, leave)
    try:
        with pytest.raises(SystemExit) as caught:
            MEAN.checkpoint(tmp_path).handle(
                "iteration_completed", lambda s: send(number), jl.only(5)
            ).run(DATA, 0.0)
    finally:
        assert signal.signal(number, before) is leave
    assert caught.value.code == 7 and caught.value.loop_state.step == 5
    assert jl.restore(tmp_path).step == 5
    assert digest(MEAN.resume(tmp_path).run(DATA, 0.0)) == digest(MEAN.run(DATA, 0.0))


def test_a_handler_that_is_set_during_a_run_stays():
    def mine(number, frame):
        raise AssertionError

    try:
        MEAN.handle("started", lambda s: signal.signal(signal.SIGTERM, mine) and None).run(
            DATA, 0.0
        )
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


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


def test_ctrl_c_ends_a_stream_with_an_interrupted_state():
    def states(at, number=signal.SIGINT):
        loop = MEAN.handle("iteration_completed", lambda s: send(number), jl.only(at))
        return loop.stream(DATA, 0.0, epochs=3)

    assert [(s.status, s.step) for s in states(10)] == [("running", 7), ("interrupted", 10)]
    # In the last handlers of an epoch, before its state is given.
    loop = MEAN.handle("epoch_completed", lambda s: send(signal.SIGINT), jl.only(2))
    seen = [(s.status, s.step) for s in loop.stream(DATA, 0.0, epochs=3)]
    assert seen == [("running", 7), ("running", 14), ("interrupted", 14)]
    with pytest.raises(jl.Terminated) as caught:
        seen = [s.step for s in states(10, signal.SIGTERM)]
    assert caught.value.state.step == 10
    # After SIGTERM, no state is given whose handling could take long or end the loop.
    given = []
    loop = MEAN.handle("epoch_completed", lambda s: send(), jl.only(2))
    with pytest.raises(jl.Terminated) as caught:
        for state in loop.stream(DATA, 0.0, epochs=3):
            given.append(state.step)
    assert given == [7] and caught.value.state.step == 14 == len(caught.value.state.history) * 7


# Where a signal arrives, and the loop that gets there.
HALTING = MEAN.handle("iteration_completed", lambda s: ("halt_loop", s), jl.only(9))
EVENTS = [
    *((event, MEAN) for event in jl.Event if "halted" not in event),
    *((event, HALTING) for event in (jl.Event.EPOCH_HALTED, jl.Event.HALTED)),
]


class Closing:
    """An observer that a signal reaches when it is closed."""

    def __init__(self, number):
        self.number, self.closed = number, 0

    def __call__(self, snapshot):
        pass

    def close(self):
        self.closed += 1
        send(self.number)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_at_each_event_is_seen_and_loses_nothing(number, tmp_path):
    name = signal.Signals(number).name
    for event, loop in EVENTS:
        undisturbed = loop.run(DATA, 0.0, epochs=2)
        for kind in ("handle", "observe"):
            path = tmp_path / f"{event}-{kind}"
            saving = loop.checkpoint(path)
            try:
                stopped = getattr(saving, kind)(event, lambda s: send(number), jl.once).run(
                    DATA, 0.0, epochs=2
                )
                assert number == signal.SIGINT
                assert (stopped.status, stopped.halted_by) == ("interrupted", name)
            except jl.Terminated as ended:
                assert number == signal.SIGTERM
                stopped = ended.state
            assert jl.restore(path).step == stopped.step
            resumed = saving.resume(path).run(DATA, 0.0, epochs=2)
            assert digest(resumed) == digest(undisturbed), (event, kind)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_after_the_last_poll_is_not_swallowed(number, tmp_path):
    """In the last handler, in the last save, and while observers and stores are closed."""
    closing = Closing(number)

    def pattern(state):
        if state.status == "completed":
            send(number)
        return f"{state.step}-{state.status}"

    late = [
        MEAN.handle("completed", lambda s: send(number)),
        MEAN.observe("completed", closing),
        MEAN.checkpoint(tmp_path / "b", file_pattern=pattern),
    ]
    for loop in late:
        # What is saved and what a resumed run finds is complete.
        loop = loop.checkpoint(tmp_path / "a")
        if number == signal.SIGINT:
            stopped = loop.run(DATA, 0.0)
            assert (stopped.status, stopped.halted_by) == ("interrupted", "SIGINT")
        else:
            with pytest.raises(jl.Terminated) as caught:
                loop.run(DATA, 0.0)
            stopped = caught.value.state
            assert stopped.status == "completed"
        assert stopped.step == 7 and jl.restore(tmp_path / "a").status == "completed"
        assert MEAN.from_state(stopped).run(DATA).step == 7
        assert MEAN.from_state(stopped).run(DATA, epochs=2).step == 14
    assert closing.closed == 1


def test_a_signal_in_the_last_epoch_leaves_the_completion_to_the_resumed_run(caplog):
    completed = []
    loop = MEAN.handle("completed", lambda s: completed.append(s.step))
    with caplog.at_level(logging.WARNING, "jaxloop"):
        stopped = end(
            loop.handle("epoch_completed", lambda s: send(), jl.only(3)), DATA, 0.0, epochs=3
        )
    assert (stopped.status, stopped.epoch, len(stopped.history)) == ("interrupted", 3, 3)
    assert "SIGTERM: the run ends here" in caplog.text and not completed
    assert loop.from_state(stopped).run(DATA, epochs=3).status == "completed"
    assert completed == [21]


# --- SIGTERM ends the script ---------------------------------------------------------------------


def test_sigterm_ends_a_loop_over_runs_and_everything_is_closed_first(tmp_path):
    closing = Closing(signal.SIGTERM)  # once more, which does no harm
    began, order = [], []
    with pytest.raises(jl.Terminated) as caught:
        try:
            for seed in range(3):
                began.append(seed)
                loop = MEAN.checkpoint(tmp_path / str(seed)).observe("halted", closing)
                with contextlib.suppress(Exception):
                    loop.handle("iteration_completed", lambda s: send(), jl.only(3)).run(
                        DATA, float(seed)
                    )
        finally:
            order.append((closing.closed, jl.restore(tmp_path / "0").step))
    assert began == [0] and order == [(1, 3)]
    assert "SIGTERM ended the run in epoch 0, after step 3" in str(caught.value)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("kind", ["handle", "observe"])
def test_a_run_inside_a_run_ends_the_outer_one_with_its_own_save(kind, number, tmp_path):
    """No number of an inner run that a signal cut short gets into the outer run."""
    inside = []

    def evaluate(state, number=None):
        inner = MEAN.checkpoint(tmp_path / "inner")
        if number is not None:
            inner = inner.handle("iteration_completed", lambda s: send(number), jl.only(4))
        inside.append(inner.run(DATA, float(state.step)).step)

    def loop(number=None, at="epoch_completed"):
        watched = MEAN.checkpoint(tmp_path / f"outer-{at}")
        return getattr(watched, kind)(at, lambda s: evaluate(s, number), jl.once)

    undisturbed = loop().run(DATA, 0.0, epochs=2)
    for at in ("epoch_completed", "halted"):
        inside.clear()
        folder = tmp_path / f"outer-{at}"
        own = loop(number, at)
        if at == "halted":  # the inner run begins when a signal has ended the outer one
            own = own.handle("iteration_completed", lambda s: send(number), jl.only(9))
        stopped = end(own, DATA, 0.0, epochs=2)
        assert stopped.status == "interrupted" and not inside
        saved = jl.restore(folder)
        assert (saved.status, saved.step) == ("interrupted", stopped.step)
        resumed = loop().resume(folder).run(DATA, 0.0, epochs=2)
        assert digest(resumed) == digest(undisturbed)


def test_an_error_after_sigterm_does_not_keep_the_script_alive(tmp_path, caplog):
    """The signal reaches the data workers too, and their death is an error of the data."""

    class Dying:
        def __iter__(self):
            yield from [np.ones(4, np.float32)] * 3
            send()
            raise RuntimeError("a worker died")

    with pytest.raises(jl.Terminated) as caught:
        MEAN.checkpoint(tmp_path).run(Dying(), 0.0, fuse=1)
    assert caught.value.state.step == jl.restore(tmp_path).step
    if caught.value.__cause__ is not None:
        assert "a worker died" in str(caught.value.__cause__) and "a worker died" in caplog.text

    def fail(state):
        send()
        raise OSError("a full disk")

    with pytest.raises(jl.Terminated) as caught:
        MEAN.checkpoint(tmp_path / "b").handle("iteration_completed", fail, jl.only(6)).run(
            DATA, 0.0
        )
    assert isinstance(caught.value.__cause__, OSError) and "a full disk" in caplog.text
    assert caught.value.state.step == jl.restore(tmp_path / "b").step == 6
    resumed = MEAN.resume(tmp_path / "b").run(DATA, 0.0)
    assert digest(resumed) == digest(MEAN.run(DATA, 0.0))


def test_sigterm_after_ctrl_c_still_ends_the_script(tmp_path):
    def twice(state):
        send(signal.SIGINT)
        send(signal.SIGTERM)

    with pytest.raises(jl.Terminated) as caught:
        MEAN.handle("iteration_completed", twice, jl.only(2)).run(DATA, 0.0)
    assert caught.value.state.halted_by == "SIGINT"


def test_a_signal_before_the_first_event(tmp_path):
    def init(number):
        def init_fn(batch, init_state):
            send(number)
            return 0.0

        return jl.loop(step, init_fn)

    with pytest.raises(jl.Terminated) as caught:
        init(signal.SIGTERM).run(DATA)
    assert caught.value.state is None and "before it had a state" in str(caught.value)
    with pytest.raises(KeyboardInterrupt) as caught:
        init(signal.SIGINT).run(DATA)
    assert caught.value.loop_state is None

    class Late:
        def __iter__(self):
            send()
            yield np.ones(4, np.float32)

    done = MEAN.run(DATA, 0.0)
    with pytest.raises(jl.Terminated) as caught:
        MEAN.from_state(done).run(Late(), epochs=2)
    assert caught.value.state is done


# --- forked children, and handlers from outside Python -------------------------------------------


def _child(queue):
    queue.put(signal.getsignal(signal.SIGTERM) is not None)
    time.sleep(SAFETY_S)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_dies_of_sigterm_and_the_run_goes_on():
    context = multiprocessing.get_context("fork")
    codes = []

    def handler(state):
        queue = context.SimpleQueue()
        child = context.Process(target=_child, args=(queue,), daemon=True)
        child.start()
        queue.get()
        child.terminate()
        child.join(SAFETY_S)
        codes.append(child.exitcode)

    done = MEAN.handle("iteration_completed", handler, jl.only(3)).run(DATA, 0.0)
    assert codes == [-signal.SIGTERM] and done.status == "completed"


FORKING = """
import os, signal, sys
import numpy as np
import jaxloop as jl
from jaxloop._checkpoint import reader

def step(batch, total):
    return total + batch.sum()

def fork(state):
    pid = os.fork()
    if pid == 0:
        # The child of a run has the handlers that its parent had before the run.
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            signal.raise_signal(signal.SIGTERM)
        os._exit(1)
    print("child", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)

def own(number, frame):
    os._exit(42)

loop = jl.loop(step).handle("iteration_completed", fork, jl.only(2))
data = [np.ones(2, np.float32)] * 4
print(loop.run(data, 0.0).status)
signal.signal(signal.SIGTERM, own)
print(loop.run(data, 0.0).status)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_forked_child_has_the_handlers_of_before():
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKING],
        capture_output=True,
        text=True,
        timeout=SAFETY_S,
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.split() == ["child", "-15", "completed", "child", "42", "completed"]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "sigaction"), reason="needs sigaction")
def test_a_handler_that_was_set_from_c_gets_the_signal_and_comes_back():
    """As that of `jax.distributed`: `signal.getsignal` returns SIG_DFL for it."""
    called = []
    from_c = ctypes.CFUNCTYPE(None, ctypes.c_int)(called.append)
    address = ctypes.cast(from_c, ctypes.c_void_p).value
    libc = ctypes.CDLL(None)
    libc.signal.restype = libc.signal.argtypes = None
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    before = libc.signal(signal.SIGTERM, address)
    try:
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        with pytest.raises(jl.Terminated):
            MEAN.handle("iteration_completed", lambda s: send(), jl.only(2)).run(DATA, 0.0)
        assert called == [signal.SIGTERM]
        signal.raise_signal(signal.SIGTERM)
        assert called == [signal.SIGTERM] * 2
        assert MEAN.run(DATA, 0.0).status == "completed"
        assert called == [signal.SIGTERM] * 2
        stream = MEAN.stream(DATA, 0.0, epochs=2)
        next(stream)
        signal.raise_signal(signal.SIGTERM)
        assert next(stream).epoch == 1 and called == [signal.SIGTERM] * 3
        stream.close()
    finally:
        assert libc.signal(signal.SIGTERM, before) == address


DISTRIBUTED = """
import signal, sys, time
import jax
import numpy as np
import jaxloop as jl
from jaxloop._checkpoint import reader
from jax.experimental import multihost_utils

jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 1, 0)
assert not multihost_utils.reached_preemption_sync_point(0)

def send(state):
    signal.raise_signal(signal.SIGTERM)

loop = jl.loop(lambda batch, total: total + batch.sum())
data = [np.ones(2, np.float32)] * 4
assert loop.run(data, 0.0).status == "completed"
try:
    loop.handle("iteration_completed", send, jl.only(2)).run(data, 0.0)
except jl.Terminated as ended:
    print("ended after step", ended.state.step, flush=True)
for step in range(1, 300):
    if multihost_utils.reached_preemption_sync_point(step):
        print("the notifier knows", flush=True)
        break
    time.sleep(0.1)
"""


@pytest.mark.slow  # the notifier looks once a second
def test_the_notifier_of_jax_distributed_gets_the_signal_and_comes_back():
    out = subprocess.run(
        [sys.executable, "-c", DISTRIBUTED, str(free_port())],
        capture_output=True,
        text=True,
        timeout=SAFETY_S,
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout == "ended after step 2\nthe notifier knows\n"


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


# --- the long variant ----------------------------------------------------------------------------


# A signal may arrive in a weakref's callback. Python reports what it raises there, and goes on. The
# run then sees the signal when it polls.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("seed", range(2))
def test_signals_at_random_moments_lose_nothing(seed, number, tmp_path):
    """Each run gets a signal at a random time, and is resumed until it completes.

    The script's own handler counts the signals, so one between two runs does not end the test.
    """
    data = jl.batches((X, Y), 4, shuffle=True)
    epochs = 8

    def loop(path):
        return (
            TRAINER.validate([(X[:20], Y[:20]), (X[20:], Y[20:])])
            .early_stop("validation_loss", patience=100, restore_best=True)
            .checkpoint(path, event="iteration_completed", filter=jl.every(20))
            .resume(path)
        )

    options = {"epochs": epochs, "output_transform": lambda state: state}
    loop(tmp_path / "compiles").run(data, **options)
    began = time.monotonic()
    undisturbed = loop(tmp_path / "undisturbed").run(data, **options)
    took_s = time.monotonic() - began
    chosen = random.Random(seed)
    sent, got, ended = 0, [], 0
    before = signal.signal(number, lambda number, frame: got.append(number))
    try:
        for trial in range(10):
            path, within_s = tmp_path / str(trial), took_s
            while True:
                at_s = chosen.uniform(0, within_s)
                within_s *= 1.5  # on a machine that got slower, a run gets on too
                timer = threading.Timer(at_s, os.kill, (os.getpid(), number))
                timer.start()
                sent += 1
                try:
                    state = loop(path).run(data, **options)
                except jl.Terminated as error:
                    state = error.state
                    assert number == signal.SIGTERM
                except KeyboardInterrupt as error:  # before the first event
                    assert number == signal.SIGINT
                    state = error.loop_state
                timer.join()
                done = state is not None and state.epoch == epochs
                ended += not done
                if done:
                    break
            final = loop(path).run(data, **options)
            assert digest(final) == digest(undisturbed), (seed, trial)
            assert len(got) == sent
    finally:
        signal.signal(number, before)
    print(f"{sent} signals, {ended} of them ended a run")
    assert ended >= 5


SCRIPT = """
import itertools
import sys
import numpy as np
import jaxloop as jl
from jaxloop._checkpoint import reader

def step(batch, total):
    return jl.emit(total + batch.sum(), x=batch)

def data(epoch):
    # The second epoch has no end: only a signal ends the run.
    for i in range(5000) if epoch == 0 else itertools.count():
        if i == 5000:
            print("running", flush=True)
        yield np.full(2, i % 7, np.float32)

loop = jl.loop(step).metric(lambda x: x, "mean", None, ["x"]).checkpoint(sys.argv[1])
try:
    state = loop.resume(sys.argv[1]).run(data, 0.0, epochs=30)
    print(state.status, state.halted_by, flush=True)
finally:
    print("finally", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_ends_a_script_and_ctrl_c_only_the_loop(number, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "running\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=SAFETY_S)
    if number == signal.SIGINT:
        assert process.returncode == 0, err
        assert out == "interrupted SIGINT\nfinally\n"
    else:
        assert process.returncode == 143, err
        assert out == "finally\n" and "Traceback" not in err
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


def test_a_signal_while_a_checkpoint_is_read_is_no_damage(tmp_path, monkeypatch):
    def interrupted(*_):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except BaseException as error:  # as Orbax does
            raise Exception("Encountered error while reading") from error

    loop = jl.loop(lambda batch, total: total + batch).checkpoint(tmp_path, resume=True)
    expected = loop.run([1, 2], 0, epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(reader, "restore_trees", interrupted)
        with pytest.raises(jl.Terminated):
            loop.run([1, 2], 0, epochs=2)
    assert int(loop.run([1, 2], 0, epochs=2).step_state) == 2 * int(expected.step_state)
