"""Where the time went, over all sessions of a run, and observers that are opened for each run."""

import json
import os
import shutil
import threading

import numpy as np
import pytest

import jaxloop as jl
from jaxloop._checkpoint.lock import last_touched
from jaxloop._checkpoint.record import pack
from jaxloop._checkpoint.seconds import unpack_sessions
from jaxloop.errors import ArgumentError, ArgumentTypeError, DamagedError
from jaxloop.handlers import Observer, as_events, as_filter

from .test_environment import KEPT

DATA = [np.float32(i) for i in range(6)]
PARTS = ("start_s", "data_s", "compile_s", "dispatch_s", "validation_s", "handlers_s", "saves_s")


def step(batch, total):
    return jl.emit(total + batch, x=batch)


def named(name):
    def fn(state):
        return None

    fn.__name__ = name
    return fn


# --- sessions --------------------------------------------------------------------------------


def test_a_run_is_one_session_whose_parts_add_up():
    loop = jl.loop(step).metric("x").handle("epoch_completed", named("look"))
    loop = loop.observe("iteration_completed", named("watch"))
    state = loop.final_state(DATA, np.float32(0), epochs=2)
    (session,) = state.sessions
    assert (session.first_step, session.last_step) == (0, 12)
    parts = [getattr(session, name) for name in PARTS]
    assert all(part >= 0 for part in parts)
    assert session.start_s > 0 and session.compile_s > 0 and session.handlers_s > 0
    assert sum(parts) + session.device_s == pytest.approx(session.elapsed_s)
    assert session.by_handler.keys() == {"look", "watch"}
    assert session.handlers_s == pytest.approx(sum(session.by_handler.values()))
    assert state.sessions == state.sessions  # it does not grow once the run has ended


def test_only_the_first_epoch_compiles():
    loop = jl.loop(step).metric("x")
    state = loop.final_state(DATA, np.float32(0), epochs=3, fuse=1)
    compiled = [state.times[epoch].compile_s for epoch in range(3)]
    assert compiled[0] > 0 and compiled[1:] == [0, 0]
    again = loop.final_state(DATA, np.float32(0), fuse=1)
    assert again.sessions[0].compile_s == 0
    eager = loop.final_state(DATA, np.float32(0), jit=False)
    assert eager.sessions[0].compile_s == 0


def test_a_ragged_batch_compiles_once_more():
    data = jl.batches(np.ones(10, np.float32), 4)
    loop = jl.loop(lambda batch, total: total + batch.sum())
    state = loop.final_state(data, np.float32(0), epochs=2, fuse=1)
    assert state.times[0].compile_s > 0 and state.times[1].compile_s == 0


def test_validations_and_saves_have_their_own_time(tmp_path):
    loop = jl.loop(step).metric("x").checkpoint(tmp_path)
    loop = loop.validate(DATA, eval_step=lambda batch, state: {"x": batch})
    (session,) = loop.final_state(DATA, np.float32(0)).sessions
    assert session.validation_s == pytest.approx(session.by_handler["validate"])
    assert session.saves_s == pytest.approx(session.by_handler["checkpoint"])
    assert session.validation_s > 0 and session.saves_s > 0 and session.handlers_s == 0


def test_a_validation_is_not_the_time_of_its_epoch():
    slow = [np.float32(0)] * 3

    def read():
        for batch in slow:
            threading.Event().wait(0.05)
            yield batch

    loop = jl.loop(step).metric("x")
    loop = loop.validate(lambda epoch: read(), eval_step=lambda batch, state: {"x": batch})
    state = loop.final_state(DATA, np.float32(0), epochs=2)
    (session,) = state.sessions
    assert session.validation_s > 0.3 * 0.9  # twice three waits
    assert sum(state.times.values()) + session.validation_s <= session.elapsed_s  # none is twice


def test_an_error_or_a_resume_begins_a_session(tmp_path):
    def fail(state):
        raise RuntimeError

    loop = jl.loop(step).metric("x").checkpoint(tmp_path, resume=True)
    with pytest.raises(RuntimeError) as caught:
        loop.handle("iteration_completed", fail, jl.only(8)).run(DATA, np.float32(0), epochs=3)
    assert [one.first_step for one in caught.value.loop_state.sessions] == [0]
    state = loop.final_state(DATA, np.float32(0), epochs=3)
    assert [(one.first_step, one.last_step) for one in state.sessions] == [(0, 6), (6, 18)]
    assert jl.restore(tmp_path).sessions[0] == state.sessions[0]
    wider = loop.final_state(DATA, np.float32(0), epochs=4)
    assert [one.first_step for one in wider.sessions] == [0, 6, 18]
    assert wider.sessions[0].began <= wider.sessions[1].began <= wider.sessions[2].began


def test_an_ended_run_adds_no_session(tmp_path):
    loop = jl.loop(step).checkpoint(tmp_path, resume=True)
    loop.run(DATA, np.float32(0))
    state = loop.final_state(DATA, np.float32(0))
    assert len(state.sessions) == 1


def test_the_lock_says_when_a_run_was_last_alive(tmp_path):
    assert last_touched(tmp_path) is None
    (tmp_path / ".jaxloop-lock").write_text("{}")
    os.utime(tmp_path / ".jaxloop-lock", (100, 200))
    assert last_touched(tmp_path) == 200


def test_lost_seconds_are_read_from_the_lock(tmp_path, monkeypatch):
    loop = jl.loop(step).checkpoint(tmp_path)
    loop.run(DATA, np.float32(0))
    (saved,) = jl.restore(tmp_path).sessions
    ended_s = saved.began + saved.elapsed_s
    held = (0.0, ended_s + 100)
    monkeypatch.setattr("jaxloop._checkpoint.reader.held_for", lambda folder: held)
    state = loop.resume(tmp_path).final_state(DATA, np.float32(0), epochs=2)
    assert [one.lost_s for one in state.sessions] == [pytest.approx(100), 0]
    assert jl.restore(tmp_path).sessions[0].lost_s == pytest.approx(100)


def test_the_time_between_two_sessions_is_not_lost_work(tmp_path):
    loop = jl.loop(step).checkpoint(tmp_path)
    loop.run(DATA, np.float32(0))
    (saved,) = jl.restore(tmp_path).sessions

    def resumed():
        reader = jl.loop(step).resume(tmp_path)  # it writes nothing, so it needs no lock
        return reader.final_state(DATA, np.float32(0), epochs=2).sessions[0]

    # Long after that, another session began, and was killed before its first checkpoint.
    began_s = saved.began + saved.elapsed_s + 90_000
    lock = tmp_path / ".jaxloop-lock"
    lock.write_text(json.dumps({"pid": 2**22 - 1, "since_s": began_s}))
    os.utime(lock, (0, began_s + 100))
    assert resumed().lost_s == pytest.approx(100, abs=0.01)
    lock.write_text("torn")
    os.utime(lock, (0, saved.began + saved.elapsed_s + 5))
    assert resumed().lost_s == pytest.approx(5, abs=0.01)


def test_snapshots_and_handlers_see_the_sessions_so_far():
    seen = []
    loop = jl.loop(step)
    loop = loop.observe("iteration_completed", lambda s: seen.append(s.sessions[-1].last_step))
    loop.handle("epoch_completed", lambda s: seen.append(s.sessions[-1].last_step)).run(
        DATA, np.float32(0)
    )
    assert seen == [1, 2, 3, 4, 5, 6, 6]


@pytest.mark.parametrize("kept", ["trainer_format_3", "trainer_format_4"])
def test_earlier_formats_have_no_sessions(kept):
    assert jl.restore(KEPT / kept).sessions == ()


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one.pop("began"),
        lambda one: one.update(elapsed_s=-1.0),
        lambda one: one.update(first_step="0"),
        lambda one: one.update(by_handler={"a": "b"}),
        lambda one: one.update(more=1),
    ],
)
def test_sessions_of_a_stranger_are_checked(change):
    state = jl.loop(step).final_state(DATA, np.float32(0))
    (one,) = pack(state)[0]["sessions"]
    assert unpack_sessions([one], None).get() == state.sessions
    change(one)
    with pytest.raises(DamagedError, match="sessions"):
        unpack_sessions([one], None)


# --- the last checkpoint -----------------------------------------------------------------------


def test_the_last_checkpoint(tmp_path):
    assert jl.loop(step).final_state(DATA, np.float32(0)).last_checkpoint is None
    loop = jl.loop(step).checkpoint(tmp_path)
    state = loop.final_state(DATA, np.float32(0), epochs=2)
    assert state.last_checkpoint == str(tmp_path / "12")
    assert jl.restore(tmp_path, 6).last_checkpoint == str(tmp_path / "6")
    shutil.move(tmp_path, tmp_path.with_name("moved"))
    moved = tmp_path.with_name("moved")
    resumed = jl.loop(step).resume(moved).final_state(DATA, np.float32(0), epochs=3)
    assert resumed.last_checkpoint == str(moved / "12")


# --- the time limit ----------------------------------------------------------------------------


def test_a_run_whose_time_is_over_is_saved_and_resumes(tmp_path):
    data = DATA[:3]
    whole = jl.loop(step).metric("x").final_state(data, np.float32(0), epochs=2)
    loop = jl.loop(step).metric("x").checkpoint(tmp_path, resume=True)
    num_calls = 0
    while True:
        num_calls += 1
        state = loop.final_state(data, np.float32(0), epochs=2, max_time=1e-9, fuse=1)
        if state.status == "completed":
            break
        assert (state.status, state.halted_by) == ("interrupted", "max_time")
        assert state.step == num_calls  # each call runs an iteration
    assert state.step_state == whole.step_state and state.history == whole.history
    assert len(state.sessions) == num_calls


def test_a_stream_whose_time_is_over_ends_with_that_state():
    states = list(jl.loop(step).stream(DATA, np.float32(0), epochs=2, max_time=1e-9, fuse=1))
    assert [(one.status, one.step) for one in states] == [("interrupted", 1)]


def test_enough_time_changes_nothing():
    state = jl.loop(step).final_state(DATA, np.float32(0), epochs=2, max_time=3600)
    assert (state.status, state.step, state.halted_by) == ("completed", 12, None)


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan")])
def test_a_time_must_be_positive(wrong):
    with pytest.raises(ArgumentError, match="max_time"):
        jl.loop(step).run(DATA, np.float32(0), max_time=wrong)


@pytest.mark.parametrize("wrong", ["1", True, [1, 2]])
def test_a_time_must_be_a_number(wrong):
    with pytest.raises(ArgumentTypeError, match="max_time"):
        jl.loop(step).run(DATA, np.float32(0), max_time=wrong)


# --- observers that are opened for each run ----------------------------------------------------


class Rows:
    """What an observer saw, in memory and "on disk"."""

    def __init__(self, log, start):
        self.log, self.rows = log, []
        log.append(("open", start.snapshot.step))

    def __call__(self, snapshot):
        self.rows.append((snapshot.event.value, snapshot.step))

    def sync(self):
        self.log.append(("sync", tuple(self.rows)))

    def fail(self, error):
        self.log.append(("fail", str(error)))

    def close(self):
        self.log.append(("close", len(self.rows)))


def watching(loop, log, events=("iteration_completed", "epoch_completed")):
    return loop.attach(
        Observer(
            as_events(list(events)),
            as_filter("always"),
            "rows",
            lambda snapshot: None,
            open=lambda start: Rows(log, start),
        )
    )


def test_an_observer_is_opened_for_each_run_and_closed():
    log = []
    loop = watching(jl.loop(step), log)
    loop.run(DATA, np.float32(0))
    loop.run(DATA, np.float32(0), epochs=2)
    assert log == [("open", 0), ("close", 7), ("open", 0), ("close", 14)]


def test_a_check_or_an_ended_run_opens_nothing(tmp_path):
    log = []
    loop = watching(jl.loop(step).checkpoint(tmp_path, resume=True), log)
    loop.check(DATA, np.float32(0))
    loop.run(DATA, np.float32(0), epochs=0)
    assert log == []
    jl.loop(step).checkpoint(tmp_path).run(DATA, np.float32(0))
    loop.run(DATA, np.float32(0))
    assert log == []


def test_an_observer_syncs_before_each_save_what_it_has_seen(tmp_path):
    log = []
    loop = watching(jl.loop(step).checkpoint(tmp_path), log)
    loop.run(DATA[:2], np.float32(0))
    rows = (("iteration_completed", 1), ("iteration_completed", 2), ("epoch_completed", 2))
    # At the end of the epoch, and at the end of the run.
    assert log == [("open", 0), ("sync", rows), ("sync", rows), ("close", 3)]


def test_a_save_inside_an_epoch_waits_for_the_rows_before_it(tmp_path):
    log = []
    loop = jl.loop(step).checkpoint(tmp_path, event="iteration_completed", filter=jl.only(4))
    watching(loop, log, ["iteration_completed"]).run(DATA, np.float32(0))
    assert log[1] == ("sync", tuple(("iteration_completed", n) for n in (1, 2, 3, 4)))


def test_an_observer_hears_of_the_error_and_is_closed_after_the_save(tmp_path):
    def fail(state):
        raise RuntimeError("no more")

    log = []
    loop = watching(jl.loop(step).checkpoint(tmp_path, on_exception=True), log)
    with pytest.raises(RuntimeError):
        loop.handle("iteration_completed", fail, jl.only(3)).run(DATA, np.float32(0))
    assert [what for what, _ in log] == ["open", "sync", "fail", "close"]
    assert log[2] == ("fail", "no more") and jl.restore(tmp_path).step == 3


def test_what_fails_to_sync_loses_no_checkpoint(tmp_path):
    class Full(Rows):
        def sync(self):
            raise OSError("the disk is full")

    loop = jl.loop(step).checkpoint(tmp_path)
    observer = Observer(
        as_events("epoch_completed"),
        as_filter("always"),
        "full",
        lambda snapshot: None,
        open=lambda start: Full([], start),
    )
    with pytest.raises(OSError, match="full"):
        loop.attach(observer).run(DATA, np.float32(0))
    assert jl.restore(tmp_path).step == 6


def test_an_observer_may_check_the_loop():
    def check(loop):
        raise ArgumentError("no", fix="none")

    observer = Observer(as_events("started"), as_filter("always"), "o", print, check=check)
    with pytest.raises(ArgumentError):
        jl.loop(step).attach(observer).check(DATA, np.float32(0))
