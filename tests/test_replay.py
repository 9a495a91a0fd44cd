"""`replay`: the state and the batch right before an iteration, with the bits of the first time."""

import logging
import signal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxloop as jl
from tests.digest import digest, hash_tree

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(56, 3)).astype(np.float32), RNG.integers(0, 2, 56).astype(np.int32)
DATA = jl.batches((X, Y), 8, shuffle=True)
NUM = 7
SLOW = pytest.mark.slow


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(nn.Dense(8)(x)))


def bump(state):
    memory = state.handler_state.get("bump", 0) + 1
    return "continue", state.replace(handler_state={**state.handler_state, "bump": memory})


def shrink(state):
    model = jax.tree.map(lambda x: x * 0.5, state.step_state["model_state"])
    return "continue", state.replace(step_state={**state.step_state, "model_state": model})


BASE = (
    jl.trainer(Net(), "softmax_cross_entropy_with_integer_labels", "adam", log=3)
    .metric("accuracy")
    .handle("iteration_completed", bump, jl.every(3), name="bump")
    .handle("iteration_started", shrink, jl.every(10), name="shrink")
    .validate(DATA)
    .early_stop("validation_loss", mode="min", patience=50, restore_best=True)
    .reduce_lr_on_plateau("validation_loss", mode="min", patience=1)
    .nan_guard("halt")
)


STEP = jax.jit(BASE.step_fn)


def checkpointed(path, **options):
    loop = BASE.checkpoint(path, criteria="accuracy", mode="max", name="best", **options)
    return loop.checkpoint(path, event="iteration_completed", filter=jl.every(5), keep=None)


def recorded(loop, *args, **options):
    """``(final state, states before each step, step states after each step)`` of a run."""
    before, after = {}, {}

    def keep_before(state):
        before[state.step + 1] = state

    def keep_after(state):
        after.setdefault(state.step, state.step_state)

    first = jl.loop(lambda b, s: s).handle("iteration_completed", keep_after).attachments
    loop = loop.replace(attachments=(*first, *loop.attachments))
    final = loop.handle("iteration_started", keep_before).final_state(*args, **options)
    return final, before, after


def contents(path):
    """Everything in a folder: names, times and bytes."""
    return {
        file: (file.stat().st_mtime_ns, file.read_bytes() if file.is_file() else None)
        for file in sorted([path, *path.rglob("*")])
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    final, before, after = recorded(checkpointed(path), DATA, epochs=4)
    assert final.step == 4 * NUM and final.handler_state["bump"] == 9
    return path, before, after


@pytest.mark.parametrize(
    "step, fuse",
    [(1, "auto"), (7, "auto"), (10, 4), (25, "auto")]
    + [pytest.param(n, "auto", marks=SLOW) for n in (3, 6, 8, 11, 14, 15, 28)]
    + [
        pytest.param(n, fuse, marks=SLOW) for n, fuse in ((5, 1), (5, 4), (10, 1), (19, 1), (19, 4))
    ],
)
def test_the_state_and_the_batch_have_the_bits_of_the_run(run, step, fuse, capsys):
    path, before, after = run
    state, batch = checkpointed(path).replay(path, step, data=DATA, fuse=fuse)
    assert state.step == step - 1 and state.event == "iteration_started"
    assert digest(state) == digest(before[step])
    assert (state.max_epoch, state.max_iteration) == (4, NUM)
    epoch, iteration = divmod(step - 1, NUM)
    assert hash_tree(batch) == hash_tree(next(DATA.epoch(epoch, iteration)))
    stepped = STEP(batch, state.step_state)
    assert hash_tree(stepped.state) == hash_tree(after[step])
    assert capsys.readouterr().out == ""  # the log is an observer


def test_nothing_in_the_folder_changes(run, caplog):
    path, _, _ = run
    was = contents(path)
    with caplog.at_level(logging.INFO, "jaxloop"):
        checkpointed(path, on_exception=True).replay(path, 24, data=DATA)
    assert contents(path) == was
    assert "earlier run" not in caplog.text


def test_handlers_run_and_observers_do_not(run):
    path, _, _ = run
    handled, observed = [], []
    loop = checkpointed(path).handle("all", lambda state: handled.append(str(state.event)))
    loop = loop.observe("all", lambda shot: observed.append(shot))
    loop.replay(path, 17, data=DATA)
    assert observed == []
    # From the checkpoint of step 15 on, and no event says that the run ended.
    assert handled == ["started", "iteration_started", "iteration_completed", "iteration_started"]


def test_the_replayed_state_goes_on_like_the_run(run):
    path, _, after = run
    state, _ = checkpointed(path).replay(path, 18, data=DATA)
    final = BASE.from_state(state).final_state(DATA, epochs=4)
    assert hash_tree(final.step_state) == hash_tree(after[28])


@pytest.mark.parametrize("step", [0, -1, 29, 1000])
def test_a_step_that_was_never_run(run, step):
    path, _, _ = run
    match = "step must be at least 1" if step < 1 else f"got {step}; .* are 1 to 28\n"
    with pytest.raises(jl.errors.ArgumentError, match=match):
        checkpointed(path).replay(path, step, data=DATA)


def test_bounds_that_end_the_run_before_the_step(run):
    path, before, _ = run
    with pytest.raises(jl.errors.ArgumentError, match="got 20; .* are 1 to 17"):
        BASE.replay(path, 20, data=DATA, steps=17)
    state, _ = BASE.replay(path, 20, data=DATA, epochs=3)
    assert hash_tree(state.step_state) == hash_tree(before[20].step_state)


# --- where a replay starts -----------------------------------------------------------------------


def step(batch, total):
    return jl.emit(3 * total % 1001 + batch, x=batch)


LOOP = jl.loop(step, lambda batch, init: 0 * batch + (0 if init is None else init))
LOOP = LOOP.metric(lambda x: x, "sum", "running_sum", ["x"])
SMALL = [1, 2, 3, 4]


def totals(steps, data=SMALL, total=0):
    """The totals before each step."""
    found = {}
    for n in range(1, steps + 1):
        found[n] = total
        total = 3 * total % 1001 + data[(n - 1) % len(data)]
    return found


def check(loop, path, steps, data=SMALL, expected=None, **options):
    expected = expected or totals(max(steps))
    for n in steps:
        state, batch = loop.replay(path, n, data=data, **options)
        assert (state.step, int(state.step_state)) == (n - 1, expected[n])
        assert int(batch) == SMALL[(n - 1) % 4]


def test_without_a_checkpoint_before_it_the_run_starts_again(tmp_path):
    loop = LOOP.checkpoint(tmp_path, keep=1)
    loop.run(SMALL, epochs=3)
    check(loop, tmp_path, [1, 2, 5, 12])


def test_the_bounds_are_those_of_the_run(tmp_path):
    loop = LOOP.checkpoint(tmp_path / "a", keep=1)
    loop.run(SMALL, steps=10)
    check(loop, tmp_path / "a", [1, 9, 10])
    loop = LOOP.checkpoint(tmp_path / "b", keep=1)
    loop.run(SMALL, epochs=3, iterations=3)
    state, batch = loop.replay(tmp_path / "b", 8, data=SMALL)
    assert (state.epoch, state.iteration, int(batch)) == (2, 1, 2)
    assert (state.max_epoch, state.max_iteration) == (3, 3)


def test_a_run_that_was_killed_ran_steps_after_its_checkpoint(tmp_path):
    def fail(state):
        raise RuntimeError("killed")

    loop = LOOP.checkpoint(tmp_path)
    with pytest.raises(RuntimeError, match="killed"):
        loop.handle("iteration_completed", fail, jl.only(7)).run(SMALL, epochs=3)
    check(loop, tmp_path, [3, 4, 5, 7, 8, 12])
    match = "got 13; .* are 1 to 12"
    with pytest.raises(jl.errors.ArgumentError, match=match):
        loop.replay(tmp_path, 13, data=SMALL)


def test_an_interrupted_run_ended_there(tmp_path):
    def send(state):
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        loop = LOOP.checkpoint(tmp_path)
        stopped = loop.handle("iteration_completed", send, jl.only(6))
        assert stopped.run(SMALL, epochs=3).status == "interrupted"
        check(loop, tmp_path, [5, 6])
        with pytest.raises(jl.errors.ArgumentError, match="1 to 6\n"):
            loop.replay(tmp_path, 7, data=SMALL)
        # Ctrl-C while a replay runs.
        loop.resume(tmp_path).run(SMALL, epochs=3)
        with pytest.raises(KeyboardInterrupt):
            loop.handle("iteration_completed", send).replay(tmp_path, 12, data=SMALL)
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_run_of_the_newest_checkpoint_is_replayed(tmp_path):
    loop = LOOP.checkpoint(tmp_path)
    loop.run(SMALL, 500, epochs=2)
    loop.run(SMALL, 7, epochs=1)
    check(loop, tmp_path, [2, 4], expected=totals(4, total=7), init_state=7)
    with pytest.raises(jl.errors.ArgumentError, match="got 5; .* 1 to 4\n"):
        loop.replay(tmp_path, 5, data=SMALL)


def test_a_run_that_started_from_a_state(tmp_path):
    first = LOOP.final_state(SMALL, epochs=1)
    loop = LOOP.checkpoint(tmp_path, keep=1).from_state(first)
    loop.run(SMALL, epochs=3)
    check(loop, tmp_path, [5, 9, 12])
    with pytest.raises(jl.errors.ArgumentError, match="got 4; .* are 5 to 12\n"):
        loop.replay(tmp_path, 4, data=SMALL)
    with pytest.raises(jl.errors.ArgumentError, match="started from a state of step 4,.*got none"):
        LOOP.replay(tmp_path, 6, data=SMALL)


@pytest.mark.parametrize("fuse", [pytest.param(1, marks=SLOW), "auto"])
@pytest.mark.parametrize("event", ["iteration_started", "epoch_started", "epoch_completed"])
def test_checkpoints_of_every_event(event, fuse, tmp_path):
    loop = LOOP.checkpoint(tmp_path, event=event, keep=None)
    loop.run(SMALL, epochs=2, fuse=fuse)
    check(loop, tmp_path, range(1, 9), fuse=fuse)


def test_iterations_that_handlers_halted(tmp_path):
    skip = jl.only(3) | jl.only(6)
    loop = LOOP.handle("iteration_started", lambda s: ("halt_epoch", s), skip, name="skip")
    loop = loop.checkpoint(tmp_path, event="epoch_started", keep=1)
    _, before, _ = recorded(loop, SMALL, epochs=5)
    assert len(before) == 4 + 4 + 4 + 2 + 2
    for n, expected in before.items():
        state, _ = loop.replay(tmp_path, n, data=SMALL)
        assert digest(state) == digest(expected)


@pytest.mark.parametrize(
    "first, then, where",
    [
        ({"steps": 6}, {"steps": 11}, 6),  # the second epoch was cut short
        ({"epochs": 2, "iterations": 3}, {"epochs": 4}, 6),
        ({"epochs": 2, "steps": 8}, {"epochs": 3}, 8),  # the bound may have cut it short
        ({"epochs": 2}, {"epochs": 4}, 0),
        ({"epochs": 2}, {"steps": 14}, 0),
    ],
)
def test_a_run_that_went_on_with_other_bounds(tmp_path, first, then, where):
    loop = LOOP.checkpoint(tmp_path / "all", keep=None, resume=True)
    _, before, _ = recorded(loop, SMALL, **first)
    middle = max(before)
    final, more, _ = recorded(loop, SMALL, **then)
    for n, expected in {**before, **more}.items():
        state, batch = loop.replay(tmp_path / "all", n, data=SMALL)
        assert int(batch) == SMALL[expected.iteration]
        assert (state.epoch, state.iteration) == (expected.epoch, expected.iteration)
        assert int(state.step_state) == int(expected.step_state)
        if n > middle:
            assert state.max_step == expected.max_step and state.max_epoch == expected.max_epoch

    loop = LOOP.checkpoint(tmp_path / "last", keep=1, resume=True)
    loop.run(SMALL, **first)
    loop.run(SMALL, **then)
    if not where:
        for n in (1, middle, middle + 1):
            state, _ = loop.replay(tmp_path / "last", n, data=SMALL)
            assert int(state.step_state) == int({**before, **more}[n].step_state)
        return
    # Nothing tells where the first part ended its epochs, so a replay would not be exact.
    with pytest.raises(jl.errors.ArgumentError, match=f"a state of step {where}, or got other"):
        loop.replay(tmp_path / "last", where + 2, data=SMALL)
    with pytest.raises(
        jl.errors.ArgumentError, match=f"replayed are {where + 1} to {final.step}\n"
    ):
        loop.replay(tmp_path / "last", where, data=SMALL)


def test_an_interrupted_run_that_went_on_with_other_iterations(tmp_path):
    def send(state):
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    loop = LOOP.checkpoint(tmp_path, keep=None, resume=True)
    stopped = loop.handle("iteration_completed", send, jl.only(5))
    try:
        assert stopped.run(SMALL, epochs=3, iterations=3).step == 5
    finally:
        signal.signal(signal.SIGINT, before)
    _, rest, _ = recorded(loop, SMALL, epochs=3)
    assert rest[7].iteration == 3
    for n in (2, 5, 6, 7, 10):
        state, _ = loop.replay(tmp_path, n, data=SMALL)
        if n <= 5:
            assert (state.epoch, state.iteration) == divmod(n - 1, 3)
        else:
            assert digest(state) == digest(rest[n])


def test_an_ended_run_that_went_on(tmp_path):
    loop = LOOP.checkpoint(tmp_path, keep=None, resume=True)
    loop.run(SMALL, epochs=1)
    loop.run(SMALL, epochs=3)
    check(loop, tmp_path, [4, 5, 12])


class Stateful:
    """An iterator whose position can be saved."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        return SMALL[(self.at - 1) % 4]

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


@pytest.mark.parametrize("fuse", [pytest.param(1, marks=SLOW), pytest.param(3, marks=SLOW), "auto"])
def test_data_of_other_kinds(tmp_path, fuse):
    loop = LOOP.checkpoint(tmp_path / "a", event="iteration_completed", filter=jl.every(7))
    loop.run(Stateful(), steps=40, fuse=fuse)
    for n in (2, 30, 36, 40):  # only the newest three are kept
        check(loop, tmp_path / "a", [n], data=Stateful(), fuse=fuse)
    with pytest.raises(jl.errors.DataError, match="one-shot iterator"):
        loop.replay(tmp_path / "a", 30, data=iter(SMALL * 10))
    loop = LOOP.checkpoint(tmp_path / "b")
    loop.run(lambda epoch: iter(SMALL), epochs=3, fuse=fuse)
    check(loop, tmp_path / "b", [1, 6, 12], data=lambda epoch: (b for b in SMALL), fuse=fuse)
    loop = jl.loop(lambda batch, n: n + 1).checkpoint(tmp_path / "c")
    loop.run(None, 0, steps=9, iterations=4)
    state, batch = loop.replay(tmp_path / "c", 7, data=None, init_state=0)
    assert (int(state.step_state), batch) == (6, None)


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("device", [False, True])
def test_a_last_batch_that_is_not_full(tmp_path, device, pad):
    loop = jl.loop(lambda b, total: 3 * total % 1001 + jnp.sum(b[0])).checkpoint(tmp_path)
    arrays = (np.arange(14), np.arange(14))
    data = jl.batches(arrays, 4, shuffle=True, device=device, pad=pad)
    _, before, _ = recorded(loop, data, 0, epochs=2)
    for n in (1, 4, 6, 8):
        state, batch = loop.replay(tmp_path, n, data=data, init_state=0)
        assert digest(state) == digest(before[n])
        assert hash_tree(batch) == hash_tree(next(data.epoch((n - 1) // 4, (n - 1) % 4)))


# --- what a replay is for ------------------------------------------------------------------------


def test_the_step_that_made_a_nan(tmp_path):
    data = [np.float32(x) for x in (1, 2, 0, 4)] * 3
    loop = jl.loop(lambda b, s: s * jnp.where(b == 0, jnp.log(b - 1), 0.5))
    loop = loop.nan_guard("halt", filter={"every": 4})
    loop = loop.checkpoint(tmp_path, event="iteration_completed", filter=jl.every(2))
    final = loop.final_state(data, 1.0)
    assert (final.halted_by, final.step) == ("nan_guard", 4)
    assert [int(one.name) for one in tmp_path.iterdir() if one.name.isdigit()] == [2]
    state, batch = loop.replay(tmp_path, 3, data=data, init_state=1.0)
    assert (float(state.step_state), float(batch)) == (0.25, 0.0)
    assert np.isnan(loop.step_fn(batch, state.step_state))
    # The guard does not fire, so what came after can be looked at as well.
    state, _ = loop.replay(tmp_path, 4, data=data, init_state=1.0)
    assert np.isnan(state.step_state)


def test_a_run_that_was_rewound(tmp_path):
    data = [np.float32(x) for x in (1, 2, np.nan, 4, 5, 6, 7, 8)]
    loop = jl.loop(lambda b, s: 2 * s + b)
    loop = loop.nan_guard("rewind", filter="always")
    kept = loop.checkpoint(tmp_path, event="iteration_completed", filter=jl.every(2), keep=None)
    _, before, _ = recorded(kept, data, 0.0)
    assert float(before[4].step_state) == 4.0  # of step 2
    for n in (2, 3, 5, 7, 8):
        state, _ = kept.replay(tmp_path, n, data=data, init_state=0.0)
        assert float(state.step_state) == float(before[n].step_state)
    with pytest.raises(jl.errors.ArgumentError, match="a state of step 3, .* or was rewound"):
        kept.replay(tmp_path, 4, data=data, init_state=0.0)


def test_a_folder_without_checkpoints(tmp_path):
    with pytest.raises(jl.errors.CheckpointError, match="folder with checkpoints of the run, got"):
        LOOP.replay(tmp_path / "none", 1, data=SMALL)
    assert not (tmp_path / "none").exists()


def test_a_run_that_ended_before_its_first_checkpoint(tmp_path):
    data = [1.0, 2.0, float("nan"), 4.0]
    loop = jl.loop(lambda batch, total: total + batch).nan_guard(filter="always")
    saving = loop.checkpoint(tmp_path / "a")
    assert saving.run(data, 0.0, epochs=2).status == "halted"
    assert not list((tmp_path / "a").iterdir())
    state, batch = saving.replay(tmp_path / "a", 3, data=data, init_state=0.0)
    assert (state.step, float(state.step_state)) == (2, 3.0) and np.isnan(batch)
    with pytest.raises(jl.errors.ArgumentError, match="got 9; the steps .* are 1 to 4"):
        saving.replay(tmp_path / "a", 9, data=data, init_state=0.0)
    # The same, for a run that continued from a state.
    state = jl.loop(lambda batch, total: total + batch).run(data[:2], 0.0)
    saving = loop.from_state(state).checkpoint(tmp_path / "b")
    saving.run(data, epochs=2)
    state, batch = saving.replay(tmp_path / "b", 5, data=data, epochs=2)
    assert (state.step, float(state.step_state)) == (4, 6.0) and np.isnan(batch)
    with pytest.raises(jl.errors.ArgumentError, match="step must be one of the run"):
        saving.replay(tmp_path / "b", 2, data=data)


def test_a_damaged_checkpoint_is_skipped(tmp_path):
    loop = LOOP.checkpoint(tmp_path, keep=None)
    loop.run(SMALL, epochs=3)
    for file in (tmp_path / "8" / "step_state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.warns(UserWarning, match="8 is damaged and skipped"):
        check(loop, tmp_path, [10])
