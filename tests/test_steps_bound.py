"""``steps=``: a bound of the whole run, over as many epochs as that takes."""

import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

import jaxloop as jl
from tests.digest import digest


def step(batch, total):
    return jl.emit(3 * total % 1001 + batch, x=batch)


LOOP = jl.loop(step).metric(lambda x: x.astype(jnp.float32), "mean", None, ["x"])
DATA = [1, 2, 3, 4]


class Counting:
    """An endless iterator that says how many batches were read."""

    def __init__(self, num=None):
        self.num, self.read = num, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.read == self.num:
            raise StopIteration
        self.read += 1
        return self.read


class Stateful(Counting):
    """An endless iterator whose position can be saved."""

    def get_state(self):
        return {"read": self.read}

    def set_state(self, state):
        self.read = state["read"]


def seen(loop, trace):
    def look(shot):
        trace.append((shot.event.value, shot.epoch, shot.iteration, shot.step))

    events = ["started", "epoch_started", "epoch_completed", "epoch_halted", "halted", "completed"]
    return loop.observe(events, look)


@pytest.mark.parametrize("fuse", [1, 3, "auto"])
def test_the_epoch_that_is_cut_short_is_completed(fuse):
    trace = []
    state = seen(LOOP, trace).run(DATA, 0, steps=10, fuse=fuse)
    assert trace == [
        ("started", 0, 0, 0),
        ("epoch_started", 0, 0, 0),
        ("epoch_completed", 0, 4, 4),
        ("epoch_started", 1, 0, 4),
        ("epoch_completed", 1, 4, 8),
        ("epoch_started", 2, 0, 8),
        ("epoch_completed", 2, 2, 10),
        ("completed", 3, 0, 10),
    ]
    assert (state.status, state.epoch, state.step) == ("completed", 3, 10)
    assert (state.max_epoch, state.max_step, state.max_iteration) == (None, 10, 2)
    assert {e: float(m["mean"]) for e, m in state.history.items()} == {0: 2.5, 1: 2.5, 2: 1.5}
    assert set(state.times) == {0, 1, 2}
    assert repr(state) == "State(completed, epoch 3, iteration 0, step 10/10, event completed)"


def test_steps_that_end_with_an_epoch_begin_no_other():
    state = LOOP.run(DATA, 0, steps=8)
    assert (state.epoch, state.step, sorted(state.history)) == (2, 8, [0, 1])


def test_no_steps_fire_no_event():
    trace = []
    state = seen(LOOP, trace).run(DATA, 7, steps=0)
    assert (trace, state.step, int(state.step_state)) == ([], 0, 7)
    assert list(LOOP.stream(DATA, 7, steps=0)) == []


@pytest.mark.parametrize("steps", [-1, 2.5, True, "3"])
def test_steps_must_be_a_count(steps):
    with pytest.raises(jl.JaxloopError, match="steps must be"):
        LOOP.run(DATA, 0, steps=steps)


def test_the_first_bound_ends_the_run():
    assert LOOP.run(DATA, 0, epochs=2, steps=100).step == 8
    state = LOOP.run(DATA, 0, epochs=2, steps=7)
    assert (state.step, state.epoch, state.max_epoch) == (7, 2, 2)
    state = LOOP.run(DATA, 0, iterations=3, steps=7)
    assert (state.step, state.epoch, state.event_counts["iteration_started"]) == (7, 3, (7, 1))
    assert LOOP.run(DATA, 0, epochs=None).epoch == 1
    assert LOOP.run(DATA, 0, steps=np.int64(5)).max_step == 5


@pytest.mark.parametrize("fuse", [1, 4, "auto"])
def test_an_endless_iterator_is_one_epoch_and_read_no_further(fuse):
    data = Counting()
    state = LOOP.run(data, 0, steps=50, fuse=fuse)
    assert (state.epoch, state.step, state.max_iteration, data.read) == (1, 50, 50, 50)
    # It continues in this process.
    more = LOOP.from_state(state).run(data, steps=70, fuse=fuse)
    assert (more.epoch, more.step, data.read) == (2, 70, 70)
    assert int(more.step_state) == int(LOOP.run(Counting(), 0, steps=70).step_state)


def test_an_iterator_with_iterations_and_steps():
    data = Counting()
    state = LOOP.run(data, 0, iterations=20, steps=50)
    assert (state.epoch, state.step, data.read) == (3, 50, 50)


def test_an_iterator_that_ends_too_early():
    with pytest.raises(jl.errors.DataError, match="epoch 0 must have 50 batches, got 30"):
        LOOP.run(Counting(30), 0, steps=50)
    with pytest.raises(jl.errors.DataError, match="epoch 2 must have 10 batches, got 5"):
        LOOP.run(Counting(45), 0, iterations=20, steps=50)
    # An epoch that was asked for ends with the data.
    assert LOOP.run(Counting(30), 0, epochs=1, steps=50).step == 30
    with pytest.raises(jl.errors.ArgumentError, match="several epochs of a one-shot iterator"):
        LOOP.run(Counting(), 0, epochs=2, steps=50)


def test_endless_epochs_of_a_function_are_read_no_further():
    opened = []

    def data(epoch):
        opened.append(Counting())
        return opened[-1]

    state = LOOP.run(data, 0, steps=33)
    assert (state.epoch, state.max_iteration) == (1, None)
    assert [one.read for one in opened] == [33]


def test_steps_without_data():
    loop = jl.loop(lambda batch, n: n + 1)
    assert int(loop.run(None, 0, steps=300).step_state) == 300
    assert loop.run(None, 0, steps=300, iterations=100).epoch == 3
    with pytest.raises(jl.errors.ArgumentError, match="data=None needs iterations=.*or steps="):
        loop.run(None, 0)


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("steps", [7, 14, 17, 21])
def test_shuffled_batches(steps, device):
    data = jl.batches(np.arange(20), 3, shuffle=True, device=device)
    loop = jl.loop(lambda batch, total: (3 * total + jnp.sum(batch)) % 65536)
    expected = 0
    epochs = itertools.count()
    batches = itertools.chain.from_iterable(data.epoch(e) for e in epochs)
    for batch in itertools.islice(batches, steps):
        expected = (3 * expected + int(batch.sum())) % 65536
    assert int(loop.run(data, 0, steps=steps).step_state) == expected


# --- resuming ------------------------------------------------------------------------------------


def test_more_steps_go_on_with_the_next_epoch(tmp_path):
    loop = LOOP.checkpoint(tmp_path).resume(tmp_path)
    assert loop.run(DATA, 0, steps=6).epoch == 2
    ended = loop.run(DATA, 0, steps=6)  # it stays ended, without a warning
    assert (ended.status, ended.step) == ("completed", 6)
    state = loop.run(DATA, 0, steps=12)
    # The epoch that was cut short is completed, so the next one begins.
    assert (state.epoch, state.step, sorted(state.history)) == (4, 12, [0, 1, 2, 3])
    assert (state.max_step, state.max_iteration) == (12, 2)
    with pytest.warns(UserWarning, match="steps=10, and the state .* has completed 12"):
        assert loop.run(DATA, 0, steps=10).step == 12


def test_a_resume_with_another_kind_of_bound(tmp_path):
    loop = LOOP.checkpoint(tmp_path).resume(tmp_path)
    assert loop.run(DATA, 0, epochs=2).step == 8
    assert loop.run(DATA, 0, steps=8).event_counts["epoch_completed"] == (2, 1)
    assert loop.run(DATA, 0, steps=18).epoch == 5
    state = loop.run(DATA, 0, epochs=6)
    assert (state.epoch, state.step, state.max_epoch, state.max_step) == (6, 22, 6, None)
    with pytest.warns(UserWarning, match="epochs=5, and the state .* has completed 6"):
        loop.run(DATA, 0, epochs=5, steps=100)
    with pytest.warns(UserWarning, match="steps=21, and the state .* has completed 22"):
        loop.run(DATA, 0, epochs=7, steps=21)


def test_a_halted_run_stays_halted(tmp_path):
    loop = LOOP.handle("iteration_completed", lambda s: ("halt_loop", s), jl.only(6), name="stop")
    loop = loop.checkpoint(tmp_path).resume(tmp_path)
    assert loop.run(DATA, 0, steps=9).halted_by == "stop"
    assert loop.run(DATA, 0, steps=9).step == 6
    assert loop.run(DATA, 0, steps=10).step == 10


@pytest.mark.parametrize("kind", [lambda: DATA, Stateful])
@pytest.mark.parametrize("fuse", [1, "auto"])
def test_going_on_from_any_state_gives_the_same_bits(fuse, kind):
    kept = []

    def keep(state):
        kept.append(state)

    iterations = None if kind().__class__ is list else 4
    options = {"steps": 10, "iterations": iterations, "fuse": fuse}
    whole = LOOP.run(kind(), 0, **options)
    LOOP.handle("all", keep).run(kind(), 0, **options)
    assert len(kept) == 28
    for state in kept:
        data = kind()
        back = jl.deserialize_state(jl.serialize_state(state), like=state)
        assert (back.max_step, back.max_epoch) == (10, None)
        again = LOOP.from_state(back).run(data, **options)
        assert digest(again) == digest(whole), state
        if isinstance(data, Stateful):
            assert data.read in ((10,) if state.step < 10 else (0, 10))


@pytest.mark.parametrize("event", ["iteration_started", "epoch_started"])
def test_a_state_in_an_iteration_beyond_the_bound(event):
    kept = []
    filter = jl.only(7) if event == "iteration_started" else jl.only(2)
    LOOP.handle(event, kept.append, filter).run(DATA, 0, steps=10)
    loop = LOOP.from_state(kept[0])
    bound = kept[0].step
    with pytest.warns(UserWarning, match=f"steps={bound}, and the state .* completed {bound}"):
        assert loop.run(DATA, steps=bound) is kept[0]
    assert loop.run(DATA, steps=bound + 1).step == bound + 1


def test_a_smaller_bound_in_the_middle_of_an_epoch():
    kept = []
    LOOP.handle("iteration_completed", kept.append, jl.only(6)).run(DATA, 0, steps=10)
    loop = LOOP.from_state(kept[0])
    state = loop.run(DATA, steps=6)
    assert (state.epoch, state.step, state.status) == (2, 6, "completed")
    with pytest.warns(UserWarning, match="nothing remains to be done: steps=5"):
        assert loop.run(DATA, steps=5) is kept[0]


def test_sigterm_in_the_middle(tmp_path):
    import signal

    def send(state):
        signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        loop = LOOP.checkpoint(tmp_path).resume(tmp_path)
        with pytest.raises(jl.Terminated) as ended:
            loop.handle("iteration_completed", send, jl.only(6)).run(DATA, 0, steps=10)
        assert (ended.value.state.status, ended.value.state.step) == ("interrupted", 6)
        assert digest(loop.run(DATA, 0, steps=10)) == digest(LOOP.run(DATA, 0, steps=10))
    finally:
        signal.signal(signal.SIGTERM, before)


# --- handlers ------------------------------------------------------------------------------------


def test_a_handler_may_still_change_max_epoch(tmp_path):
    def shorten(state):
        assert state.max_epoch is None and state.max_step == 100
        return "continue", state.replace(max_epoch=3)

    loop = LOOP.handle("epoch_completed", shorten, jl.only(1)).checkpoint(tmp_path)
    loop = loop.resume(tmp_path)
    state = loop.run(DATA, 0, steps=100)
    assert (state.epoch, state.max_epoch, state.step) == (3, 3, 12)
    assert loop.run(DATA, 0, steps=100).step == 12  # it stays ended
    assert loop.run(DATA, 0, steps=14).epoch == 3
    assert loop.run(DATA, 0, steps=101, epochs=5).epoch == 5


def test_no_handler_changes_max_step():
    def change(state):
        return "continue", state.replace(max_step=3)

    with pytest.raises(jl.errors.StructureError, match="state.max_step from 10 to 3"):
        LOOP.handle("iteration_completed", change).run(DATA, 0, steps=10)


def predict(w, x):
    return x * w


def test_validation_knows_which_epochs_come():
    opened = []

    def held_out(epoch):
        opened.append(epoch)
        return [(np.ones((2, 1), np.float32), np.ones((2, 1), np.float32))]

    data = held_out(0) * 4
    loop = jl.trainer(((lambda key, x: jnp.ones(())), predict), "mean_squared_error", "sgd", log=0)
    loop = loop.validate(held_out, filter=jl.every(2)).early_stop("validation_loss", mode="min")
    opened.clear()
    state = loop.final_state(data, steps=10)
    assert opened == [1, 1]  # for the check before the first step, and for the evaluation
    assert (state.epoch, "validation_loss" in state.history[1]) == (3, True)


def test_a_report_knows_the_bound():
    assert LOOP.check(DATA, 0, steps=2).block_length == 2
    assert LOOP.check(DATA, 0).block_length > 2


def test_a_stream_ends_with_the_last_step():
    states = list(LOOP.stream(DATA, 0, steps=6))
    assert [(state.epoch, state.iteration, state.step) for state in states] == [
        (0, 4, 4),
        (1, 2, 6),
    ]


def test_a_checkpoint_says_the_bounds(tmp_path):
    LOOP.checkpoint(tmp_path).run(DATA, 0, steps=6, iterations=5)
    record = json.loads((tmp_path / "6" / "meta" / "metadata").read_text())
    assert (record["max_step"], record["max_epoch"], record["requested_iterations"]) == (6, None, 5)


def test_a_run_whose_epochs_are_all_halted_at_their_start_does_not_hang():
    loop = jl.loop(lambda batch, total: total + batch)
    halting = loop.handle("epoch_started", lambda state: ("halt_epoch", state))
    with pytest.raises(jl.errors.ArgumentError, match="within reach.*1,000 epochs"):
        halting.run([1, 2], 0, steps=5)
    once = loop.handle("epoch_started", lambda state: ("halt_epoch", state), jl.before(900))
    assert once.run([1, 2], 0, steps=5).step == 5
