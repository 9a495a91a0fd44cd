"""The loop through its public names: data kinds, states, options, built-in handlers."""

import io
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxloop as jl


def add(batch, total):
    return total + batch


def emitting(batch, state):
    return jl.emit(state + 1, x=batch)


MEAN = jl.loop(emitting, lambda batch, _: jnp.int32(0)).metric(lambda x: x, "mean", None, ["x"])


class Reiterable:
    def __init__(self):
        self.opened = 0

    def __iter__(self):
        self.opened += 1
        return iter([1, 2, 3])


@pytest.mark.parametrize(
    "data", [[1, 2, 3], (1, 2, 3), Reiterable(), lambda epoch: iter([1, 2, 3]), np.array([1, 2, 3])]
)
def test_every_kind_of_data_gives_the_same(data):
    assert int(jl.loop(add).run(data, 0, epochs=2).step_state) == 12


def test_each_epoch_opens_the_data_once_and_the_sample_is_not_lost():
    data = Reiterable()
    jl.loop(add, lambda batch, _: batch * 0).run(data, epochs=3)
    assert data.opened == 3


def test_callable_gets_the_epoch():
    state = jl.loop(add).run(lambda epoch: [epoch * 10], 0, epochs=3)
    assert int(state.step_state) == 30


def test_one_shot_iterator_continues_and_is_read_no_further_than_needed():
    read = []

    def source():
        for i in range(100):
            read.append(i)
            yield i

    it = source()
    loop = jl.loop(add, lambda batch, _: batch * 0)
    state = loop.run(it, epochs=2, iterations=3)
    assert int(state.step_state) == 15
    assert len(read) == 6
    more = loop.from_state(state).run(it, epochs=3, iterations=2)
    assert int(more.step_state) == 15 + 6 + 7
    halt = loop.handle("iteration_completed", lambda s: ("halt_loop", s), jl.only(2))
    it = source()
    read.clear()
    halt.run(it, epochs=1)
    assert len(read) == 2


def test_a_halt_at_iteration_started_consumes_nothing():
    it = iter([1, 10, 100])
    loop = jl.loop(add)
    halted = loop.handle("iteration_started", lambda s: ("halt_epoch", s), jl.only(2))
    state = halted.run(it, 0, epochs=2, iterations=2)
    # Epoch 0 took 1 and halted before 10; epoch 1 went on with 10 and 100.
    assert int(state.step_state) == 111


def test_no_data_needs_iterations():
    assert (
        int(jl.loop(lambda b, s: s + 1).run(None, 0, iterations=2500, epochs=2).step_state) == 5000
    )


def test_batches_shuffle_pad_and_drop():
    x = np.arange(10)
    plain = jl.batches(x, 4)
    assert [list(b) for b in plain] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(plain) == 3 and len(jl.batches(x, 4, drop_remainder=True)) == 2
    shuffled = jl.batches(x, 4, shuffle=True, seed=1)
    first, second = (np.concatenate(list(shuffled.epoch(e))) for e in (0, 1))
    assert sorted(first) == sorted(second) == list(x) and list(first) != list(second)
    assert list(np.concatenate(list(shuffled))) == list(first)
    *_, (a, b, mask) = jl.batches((x, x), 4, pad=True)
    assert a.shape == b.shape == (4,) and list(mask) == [True, True, False, False]
    *_, (_, _, weight) = jl.batches((x, x, np.full(10, 2.0, np.float32)), 4, pad=True)
    assert list(weight) == [2, 2, 0, 0]
    *_, last = jl.batches({"x": x}, 4, pad=True)
    assert list(last["mask"]) == [True, True, False, False]


def test_counters_at_the_end():
    state = jl.loop(add).run([1, 2], 0, epochs=3)
    assert (state.epoch, state.iteration, state.step, state.status) == (3, 0, 6, "completed")
    assert state.event_counts[jl.Event.ITERATION_COMPLETED] == (6, 2)
    assert state.max_epoch == 3 and state.max_iteration == 2 and set(state.times) == {0, 1, 2}


def test_no_epochs_fire_nothing():
    seen = []
    state = jl.loop(add).handle("all", seen.append).run([1], 7, epochs=0)
    assert int(state.step_state) == 7 and not seen


def test_stream_is_one_state_an_epoch_and_they_stay_valid():
    states = list(jl.loop(add).stream([1, 2], 0, epochs=3))
    assert [s.epoch for s in states] == [0, 1, 2]
    assert [int(s.step_state) for s in states] == [3, 6, 9]


def test_metrics_before_the_first_update_are_nan():
    seen = []
    MEAN.handle(["started", "epoch_started"], lambda s: seen.append(s.metrics["mean"])).run([1.0])
    assert len(seen) == 2 and all(np.isnan(seen))


def test_a_handler_changes_the_step_state():
    def reset(state):
        return "continue", state.replace(step_state=100)

    loop = jl.loop(add).handle("iteration_completed", reset, jl.only(2))
    assert int(loop.run([1, 2, 3], 0).step_state) == 103


def test_a_new_structure_compiles_again_and_warns_once():
    def wider(state):
        return "continue", state.replace(step_state=jnp.zeros(3))

    loop = jl.loop(lambda b, s: s + b).handle("iteration_completed", wider, jl.only(1))
    with pytest.warns(UserWarning, match="wider"):
        state = loop.run([1.0, 2.0], 0.0)
    assert list(state.step_state) == [2, 2, 2]


def test_a_handlers_metrics_stay_for_the_epoch_and_reach_history():
    def mark(state):
        return "continue", state.replace(metrics={**state.metrics, "lr": 0.5})

    seen = []
    state = (
        MEAN.handle("iteration_completed", mark, jl.only(1))
        .observe("epoch_started", lambda s: seen.append("lr" in s.metrics))
        .run([1.0, 2.0], epochs=2)
    )
    assert state.history[0]["lr"] == 0.5 and "lr" not in state.history[1]
    assert seen == [False, False]


def test_builders_change_nothing():
    loop = jl.loop(add)
    more = loop.handle("started", lambda s: None).metric(lambda x: x, "x", None, ["x"])
    assert not loop.attachments and not loop.metrics and more != loop
    assert repr(loop) == "Loop(add)" and "x" in repr(more)


def test_jit_options_and_eager():
    values = []

    def step(batch, state):
        values.append(state)
        return state + batch

    assert float(jl.loop(step).run([1.0, 2.0], 0.0, jit=False).step_state) == 3
    assert not any(isinstance(v, jax.core.Tracer) for v in values[-2:])
    assert float(jl.loop(add).run([1.0], 0.0, jit={"donate_argnums": ()}).step_state) == 1


def test_python_scalars_compile_the_step_once():
    traces = []

    def step(batch, state):
        traces.append(1)
        return {"n": state["n"] + 1, "x": state["x"] + batch}

    loop = jl.loop(step)
    loop.run([1.0] * 200, {"n": 0, "x": 0.0}, epochs=3)
    count = len(traces)
    loop.run([1.0] * 200, {"n": 0, "x": 0.0}, epochs=3)
    assert len(traces) == count


def test_one_buffer_in_two_leaves_works_and_the_callers_arrays_stay():
    p = jnp.ones(3)

    def step(batch, state):
        return {"p": state["p"] + batch, "ema": 0.5 * (state["p"] + state["ema"])}

    state = jl.loop(step).run([1.0, 1.0], {"p": p, "ema": p})
    assert list(state.step_state["p"]) == [3, 3, 3] and list(p) == [1, 1, 1]


def test_debug_traces(caplog):
    with caplog.at_level(logging.INFO, "jaxloop"):
        jl.loop(add).handle("started", lambda s: None, name="mine").run([1], 0, debug=True)
    assert "epoch_completed" in caplog.text and "mine" in caplog.text


def test_log_writes_lines():
    file = io.StringIO()
    MEAN.log(lambda s: f"{s.step}: {s.metrics['mean']:.1f}", file=file).run([1.0, 2.0])
    assert file.getvalue() == "1: 1.0\n2: 1.5\n"


def test_every_seconds_runs_an_observer():
    seen = []
    loop = jl.loop(lambda b, s: s + 1).observe(
        "iteration_completed", lambda s: seen.append(s.step), jl.every_seconds(1e-4)
    )
    loop.run(None, 0, iterations=20_000)
    assert seen == sorted(seen) and seen


def test_an_exception_leaves_as_itself_with_the_last_good_state():
    class Mine(Exception):
        pass

    def boom(state):
        raise Mine

    with pytest.raises(Mine) as info:
        jl.loop(add).handle("iteration_completed", boom, jl.only(2)).run([1, 2, 3], 0)
    assert "boom" in info.value.__notes__[0] and "iteration 1" in info.value.__notes__[0]
    state = info.value.loop_state
    assert state.step == 2
    assert int(jl.loop(add).from_state(state).run([1, 2, 3]).step_state) == 6


def test_monitor_counts_consecutive_events():
    calls = []
    values = iter([3.0, 2.0, 2.0, float("nan"), 1.0, 1.0, 1.0, 1.0])
    loop = MEAN.handle(
        "epoch_completed",
        lambda s: ("continue", s.replace(metrics={**s.metrics, "v": next(values)})),
    ).monitor("v", lambda s: calls.append(s.epoch), name="m", mode="min", patience=2)
    state = loop.run([1.0], epochs=8)
    assert calls == [3, 6]
    assert state.handler_state["m"]["best"] == 1.0 and state.handler_state["m"]["count"] == 1


def test_early_stop_restores_the_best():
    data = [[3.0], [1.0], [2.0], [2.5], [0.0]]
    loop = MEAN.early_stop("mean", mode="min", patience=2, restore_best=True)
    state = loop.run(lambda epoch: data[epoch], epochs=5)
    assert state.status == "halted" and state.epoch == 4 and state.halted_by == "early_stop_mean"
    assert int(state.step_state) == 2


def test_reduce_lr_scales_any_optimizer():
    model = (lambda key, x: jnp.zeros((1, 1)), lambda w, x: x @ w)
    x = np.ones((4, 1), np.float32)
    loop = jl.trainer(model, "mean_squared_error", optax.sgd(0.0), log=0).reduce_lr_on_plateau(
        "loss", factor=0.5, patience=1, min_scale=0.2, cooldown=1
    )
    state = loop.run([(x, x)], epochs=6, output_transform=lambda s: s)
    scale = state.step_state["learning_rate_scale"]
    assert float(scale) == pytest.approx(0.2)


def test_checkpoint_keeps_the_newest_and_the_best_and_resumes(tmp_path):
    data = [[1.0], [3.0], [2.0], [2.5], [2.1], [2.0]]
    best = MEAN.checkpoint(tmp_path / "a", keep=1).checkpoint(
        tmp_path / "b", criteria="mean", mode="max", keep=1
    )
    whole = best.run(lambda epoch: data[epoch], epochs=6)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["6"]
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["2", "6"]
    again = best.resume(tmp_path / "a")
    assert again.run(lambda epoch: data[epoch], epochs=6).history == whole.history
    assert again.run(lambda epoch: [9.0], epochs=7).step == 7


def test_a_stopped_run_goes_on_from_mid_epoch_with_the_same_history(tmp_path):
    class Killed(Exception):
        pass

    def kill(state):
        if state.step == 7:
            raise Killed

    rng = np.random.default_rng(0)
    data = jl.batches(rng.normal(size=(40,)).astype(np.float32), 8, shuffle=True)
    whole = MEAN.run(data, epochs=3)
    saving = MEAN.checkpoint(tmp_path, event="iteration_completed", filter=jl.every(3))
    with pytest.raises(Killed):
        saving.handle("iteration_completed", kill).run(data, epochs=3)
    again = saving.resume(tmp_path).run(data, epochs=3)
    assert again.history == whole.history and again.step == whole.step
    assert again.event_counts == whole.event_counts


def test_bytes_round_trip_and_damage():
    step = lambda b, s: {"k": jax.random.split(s["k"])[0], "n": s["n"] + b}  # noqa: E731
    state = jl.loop(step).run([1, 2], {"k": jax.random.key(1), "n": 0})
    for compress in (False, True):
        data = jl.serialize_state(state, compress=compress)
        back = jl.deserialize_state(data, like=state.step_state)
        assert int(back.step_state["n"]) == 3 and back.step == 2
        assert (
            jax.random.key_data(back.step_state["k"]) == jax.random.key_data(state.step_state["k"])
        ).all()
        for bad in (data[:-1], data[:60] + b"x" + data[61:], b"", b"pickle"):
            with pytest.raises(jl.JaxloopError):
                jl.deserialize_state(bad, like=state)
    with pytest.raises(jl.JaxloopError, match="differ"):
        jl.deserialize_state(data, like={"n": jnp.zeros(2)})


def test_check_reports_without_running():
    seen = []
    loop = MEAN.handle("iteration_completed", seen.append, jl.every(5), name="mine")
    report = loop.check([1.0] * 9)
    assert not seen and report.block_length == 5 and "mine" in str(report)


def test_observers_cost_no_handler_calls_and_no_more_blocks():
    from jaxloop._program.block import Program

    blocks = []
    run = Program.run

    def counted(self, carry, source, start, bound, length):
        blocks.append(int(bound))
        return run(self, carry, source, start, bound, length)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "run", counted)
        # Of data on the device, no block is short because a batch came late.
        data = jl.batches(np.ones(20, np.float32), 1, device=True)
        MEAN.run(data, fuse=8)  # finds out how long a step takes
        blocks.clear()
        MEAN.run(data, fuse=8)
        plain = list(blocks)
        blocks.clear()
        MEAN.observe("iteration_completed", lambda s: s.metrics["mean"]).run(data, fuse=8)
        assert blocks == plain == [8, 8, 4]
        blocks.clear()
        MEAN.handle("iteration_completed", lambda s: None, jl.every(5)).run(data, fuse=8)
        assert blocks == [5, 5, 5, 5]


class Closing:
    """An observer with a `close`, as a writer of metrics is."""

    def __init__(self, fails_at=None):
        self.steps, self.closed, self.fails_at = [], 0, fails_at

    def __call__(self, snapshot):
        assert not self.closed
        self.steps.append(snapshot.step)
        if snapshot.step == self.fails_at:
            raise ZeroDivisionError("in the observer")

    def close(self):
        self.closed += 1


def test_observers_are_closed_once_however_the_run_ends():
    def run(observer, **changes):
        loop = jl.loop(lambda b, s: s + b).observe("iteration_completed", observer)
        for name, arguments in changes.items():
            loop = getattr(loop, name)(*arguments)
        return loop.run([1, 2, 3], 0, epochs=2)

    completed = Closing()
    run(completed)
    assert completed.closed == 1 and completed.steps == [1, 2, 3, 4, 5, 6]
    halted = Closing()
    run(halted, handle=("epoch_completed", lambda s: ("halt_loop", s)))
    assert halted.closed == 1 and halted.steps == [1, 2, 3]
    failed = Closing(fails_at=2)
    with pytest.raises(ZeroDivisionError):
        run(failed)
    assert failed.closed == 1
    abandoned = Closing()
    stream = jl.loop(lambda b, s: s + b).observe("all", abandoned).stream([1, 2], 0, epochs=3)
    next(stream)
    stream.close()
    assert abandoned.closed == 1


def test_a_close_that_fails_raises_and_hides_no_error():
    class Failing(Closing):
        def close(self):
            super().close()
            raise OSError("no room")

    last = Closing()
    loop = jl.loop(lambda b, s: s + b).observe("started", Failing()).observe("started", last)
    with pytest.raises(OSError, match="no room"):
        loop.run([1], 0)
    assert last.closed == 1

    def fail(state):
        raise ValueError("the handler's")

    with pytest.raises(ValueError, match="the handler's") as caught:
        loop.handle("started", fail).run([1], 0)
    assert any("no room" in note for note in caught.value.__notes__)


def test_an_output_transform_is_checked_before_the_first_step():
    loop = jl.loop(lambda b, s: s + b)
    for method in (loop.run, loop.check, loop.stream):
        with pytest.raises(TypeError, match="output_transform must be a function, got 3"):
            method([1], 0, output_transform=3)

    def last_total(state):
        return state.step_state

    report = loop.check([1], 0, output_transform=last_total)
    assert report.output == "last_total" and "output: last_total" in str(report)


def test_a_state_and_a_snapshot_are_values():
    state = jl.loop(lambda b, s: s + b).run([1], 0)
    for name in ("step", "epoch", "lazy_metrics", "news"):
        with pytest.raises(AttributeError, match=f"cannot assign to '{name}'"):
            setattr(state, name, 3)
    with pytest.raises(AttributeError, match="cannot delete 'step'"):
        del state.step
    with pytest.raises(ValueError, match="lazy_metrics"):
        state.replace(lazy_metrics=3)
    shown = [name for name in dir(state) if not name.startswith("_")]
    assert "step_state" in shown and "loan" not in shown


def test_methods_and_functions_are_the_same():
    step = lambda b, s: jl.emit(s, x=b)  # noqa: E731  a step
    loop = jl.loop(step).metric(lambda x: x, "x", None, ["x"])
    by_method = loop.early_stop("x", mode="min", patience=2)
    by_function = jl.handlers.early_stop(loop, "x", mode="min", patience=2)
    assert type(by_function) is jl.Loop
    assert by_method.attachments == by_function.attachments
    assert by_function.run([1.0], epochs=9).halted_by == "early_stop_x"


def test_a_clock_and_a_function_count_from_the_last_run():
    clock = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxloop._engine.attached.now", lambda: clock[0])
        patch.setattr("jaxloop._engine.clock.now", lambda: clock[0])
        seen = []

        def advance(state):
            clock[0] += 1.0

        loop = jl.loop(lambda b, s: s + b).handle("iteration_completed", advance)
        filter = jl.every_seconds(3) & (lambda snapshot: True)
        loop.observe("iteration_completed", lambda s: seen.append(s.step), filter).run([1] * 12, 0)
    assert seen == [3, 6, 9, 12]


def test_a_report_knows_the_bound_of_observed_blocks():
    loop = jl.loop(lambda b, s: s + 1)
    assert loop.check(None, 0, iterations=10_000).block_length == 10_000
    observed = loop.observe("iteration_completed", print)
    assert observed.check(None, 0, iterations=10_000).block_length == 4096


def test_numpys_integers_are_kept(tmp_path):
    loop = jl.loop(lambda b, s: s + b).checkpoint(tmp_path)
    loop.run([1, 2, 3], 0, epochs=np.int64(2), iterations=np.int32(2))
    state = jl.restore(tmp_path)
    assert (state.epoch, state.max_epoch, state.step) == (2, 2, 4)
