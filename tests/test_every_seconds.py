"""every_seconds wherever a cadence is accepted, with a clock that the test moves."""

import io

import jax.numpy as jnp
import pytest

import jaxloop as jl

LOOP = jl.loop(lambda b, s: jl.emit(s + b, x=b)).metric("x", per="batch")
DATA = [1.0] * 10


@pytest.fixture
def clock(monkeypatch):
    """A loop in which each iteration takes a second. Nothing else takes any time."""
    seconds = [0.0]
    monkeypatch.setattr("jaxloop._engine.attached.now", lambda: seconds[0])
    monkeypatch.setattr("jaxloop._engine.clock.now", lambda: seconds[0])

    def advance(state):
        seconds[0] += 1.0

    return LOOP.handle("iteration_started", advance)


def eval_step(batch, state):
    return {"error": jnp.abs(state - batch)}


def steps_of(loop, **kwargs):
    """The steps at which `seen` of a loop ran."""
    seen = []
    loop(lambda state: seen.append(state.step)).run(DATA, 0.0, epochs=2, **kwargs)
    return seen


EVERY = jl.every_seconds(3)
AT = {"event": "iteration_completed", "filter": EVERY}


def test_handlers_and_observers(clock):
    on = "iteration_completed"
    assert steps_of(lambda see: clock.handle(on, see, EVERY)) == [3, 6, 9, 12, 15, 18]
    assert steps_of(lambda see: clock.observe(on, see, EVERY)) == [3, 6, 9, 12, 15, 18]
    by_dict = {"every_seconds": 3, "after": 10}
    assert steps_of(lambda see: clock.handle(on, see, by_dict)) == [11, 14, 17, 20]
    both = jl.every_seconds(3) & jl.every(2)
    assert steps_of(lambda see: clock.observe(on, see, both)) == [4, 8, 12, 16, 20]
    either = jl.every_seconds(8) | jl.only(1, per="epoch")
    assert steps_of(lambda see: clock.handle(on, see, either)) == [1, 9, 11, 19]
    # At an event that is rare, it runs as soon as the time is up.
    assert steps_of(lambda see: clock.handle("epoch_completed", see, jl.every_seconds(11))) == [20]
    assert steps_of(lambda see: clock.observe("epoch_completed", see, jl.every_seconds(5))) == [
        10,
        20,
    ]


def test_log(clock):
    file = io.StringIO()
    clock.log(lambda s: str(s.step), filter=EVERY, file=file).run(DATA, 0.0)
    assert file.getvalue().split() == ["3", "6", "9"]


def test_validate(clock):
    def validate(see):
        added = clock.validate([1.0], eval_step=eval_step, metrics={"error": "error"}, **AT)
        return added.observe(
            "iteration_completed", lambda s: see(s) if "validation_error" in s.metrics else None
        )

    # The values last to the end of the epoch.
    assert steps_of(validate) == [*range(3, 11), *range(12, 21)]


def test_checkpoint(clock, tmp_path):
    loop = clock.checkpoint(tmp_path / "a", **AT, keep=None)
    loop.run(DATA, 0.0, epochs=2)
    folders = [int(path.name) for path in (tmp_path / "a").iterdir() if path.name.isdigit()]
    assert sorted(folders) == [3, 6, 9, 12, 15, 18, 20]
    # With a criterion, it is asked at that time.
    loop = clock.checkpoint(tmp_path / "b", **AT, keep=None, criteria="x", mode="max")
    state = loop.run(DATA, 0.0)
    assert state.handler_state["checkpoint_x"]["step"] == 3


def test_monitors(clock):
    def monitor(see):
        return clock.monitor("x", see, name="m", mode="min", patience=1, **AT)

    assert steps_of(monitor) == [6, 9, 12, 15, 18]  # the first value is the best
    state = clock.early_stop("x", mode="min", patience=2, **AT).run(DATA, 0.0)
    assert (state.halted_by, state.step) == ("early_stop_x", 9)
    rate = jl.loop(lambda b, s: jl.emit(s, x=b)).metric("x", per="batch")
    rate = rate.replace(attachments=clock.attachments)
    rate = rate.reduce_lr_on_plateau("x", factor=0.5, mode="min", patience=1, **AT)
    state = rate.run(DATA, {"learning_rate": jnp.float32(1.0)})
    assert float(state.step_state["learning_rate"]) == 0.25  # at the steps 6 and 9


def test_nan_guard_and_alert(clock):
    data = [1.0, float("nan"), *DATA]
    state = clock.nan_guard(**AT).run(data, 0.0)
    assert (state.halted_by, state.step) == ("nan_guard", 3)
    seen = []
    loop = clock.alert(lambda alert: seen.append(alert.step), on="nan", every=EVERY)
    loop.run(data, 0.0)
    assert seen == [3]


def test_a_run_that_resumes_counts_from_its_own_start(clock, tmp_path):
    seen = []
    loop = clock.handle("iteration_completed", lambda s: seen.append(s.step), jl.every_seconds(4))
    loop.checkpoint(tmp_path).run(DATA, 0.0, epochs=1)
    loop.resume(tmp_path).run(DATA, 0.0, epochs=2)
    assert seen == [4, 8, 14, 18]
