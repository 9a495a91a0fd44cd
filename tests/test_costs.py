"""What a run costs, counted and not timed: compilations, dispatches, waits, transfers, memory."""

import collections
import contextlib
import dataclasses
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxloop as jl
from jaxloop._engine import carry, first_state
from jaxloop._engine.in_flight import InFlight
from jaxloop._engine.options import RunOptions
from jaxloop._engine.parts import Parts
from jaxloop._engine.start import begin
from jaxloop._program.block import Program
from jaxloop._program.metric_values import MetricValues
from tests.memory import held, resident_mb


def step(batch, total):
    x = batch["x"] if isinstance(batch, dict) else batch
    return jl.emit(total + jnp.sum(x), x=x)


MEAN = jl.loop(step).metric(lambda x: x, "mean", None, ["x"])
DATA = [np.full(4, i, np.float32) for i in range(20)]


class Counts(collections.Counter):
    """How often something happened, by name."""


@contextlib.contextmanager
def counting():
    """Counts compilations, dispatched blocks, computed metrics, copies to the host and waits."""
    counts = Counts()

    def compiled(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            counts["compilations"] += 1

    def count(owner, name, key):
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            counts[key] += 1
            return original(*args, **kwargs)

        patch.setattr(owner, name, counted)

    jax.monitoring.register_event_duration_secs_listener(compiled)
    with pytest.MonkeyPatch.context() as patch:
        count(Program, "run", "blocks")
        count(MetricValues, "start", "computed")
        count(jax, "device_get", "fetched")
        count(jax, "block_until_ready", "waits")
        try:
            yield counts
        finally:
            jax.monitoring.unregister_event_duration_listener(compiled)


def test_a_second_run_compiles_nothing_and_the_first_little():
    loop = jl.loop(step).metric(lambda x: x, "mean", None, ["x"])
    with counting() as first:
        loop.run(DATA, np.float32(0), epochs=3)
    assert first["compilations"] == 1  # the block
    zero = jnp.float32(0)
    with counting() as second:
        loop.run(DATA, 0.0, epochs=3)
        loop.run(DATA, zero, epochs=2)
    assert second["compilations"] == 0


def test_weak_types_in_the_initial_state_cost_no_second_compilation():
    def add(batch, state):
        return {"a": state["a"] + batch, "b": state["b"] * 2}

    loop = jl.loop(add)
    loop.run([1.0, 2.0], {"a": 0.0, "b": jnp.asarray(1.0)})
    with counting() as counts:
        loop.run([1.0, 2.0], {"a": jnp.asarray(0.0), "b": 1.0}, epochs=2)
        loop.run([1.0, 2.0], {"a": np.float32(0), "b": jnp.float32(1)})
    assert counts["compilations"] == 0


def test_a_ragged_last_batch_costs_one_compilation():
    loop = jl.loop(step).metric(lambda x: x, "mean", None, ["x"])
    loop.run(DATA, 0.0)
    loop.run([np.ones(4, np.float32)] * 2, 0.0)
    with counting() as counts:
        loop.run([*DATA, np.ones(3, np.float32)], 0.0, epochs=3)
    # One for the block, and one for each helper that sees the new shape: none does.
    assert counts["compilations"] == 1


@pytest.mark.parametrize("kind", ["list", "batches", "shuffled", "device", "none"])
def test_nothing_is_transferred_but_what_was_asked_for(kind):
    array = {"x": np.ones((40, 4), np.float32)}
    data = {
        "list": DATA,
        "batches": jl.batches(array, 8),
        "shuffled": jl.batches(array, 8, shuffle=True),
        "device": jl.batches(array, 8, shuffle=True, device=True),
        "none": None,
    }[kind]
    loop = MEAN
    if data is None:
        loop = jl.loop(lambda _, total: jl.emit(total + 1, x=total))
        loop = loop.metric(lambda x: x, "mean", None, ["x"])
    for index in range(10):
        loop = loop.handle("iteration_completed", print, jl.only(10**6), name=f"h{index}")
    seen = []
    loop = loop.observe("iteration_completed", lambda s: seen.append(dict(s.metrics)))
    options = {"epochs": 2, "iterations": 20 if data is None else None}
    loop.run(data, 0.0, **options)
    # Explicit transfers are what `device_put` and `device_get` do; nothing else may move.
    with jax.transfer_guard("disallow"):
        state = loop.run(data, 0.0, **options)
        assert float(jax.device_get(state.step_state)) > 0
    assert len(seen) == 2 * state.step


def test_nobody_looks_and_nothing_is_computed():
    data = jl.batches(np.ones((40, 4), np.float32), 4)
    MEAN.run(data, 0.0, epochs=5)
    with counting() as counts:
        state = MEAN.run(data, 0.0, epochs=5)
        assert counts["computed"] == counts["fetched"] == counts["waits"] == 0
        assert len(state.history) == 5
        assert counts["computed"] == 1  # all epochs together
        assert counts["compilations"] == 0


def exponential():
    """Makes a metric whose value the host cannot compute with the same bits."""
    mean = jl.metrics.mean(lambda x: x)
    return dataclasses.replace(mean, compute=lambda acc: jnp.exp(mean.compute(acc)))


def test_what_the_host_cannot_compute_is_dispatched_once_an_epoch():
    data = jl.batches(np.ones((40, 4), np.float32), 4)
    loop = jl.loop(step).metric(exponential(), "mean", None, ["x"])
    loop.run(data, 0.0, epochs=5)
    with counting() as counts:
        state = loop.run(data, 0.0, epochs=5)
        # The values of each epoch's end, for the history; those of the last epochs not yet fetched.
        assert counts["computed"] == 5
        assert counts["fetched"] <= 3
        assert counts["waits"] == 0
        _ = state.history
        assert counts["fetched"] == 5
        assert float(state.history[4]["mean"]) == pytest.approx(np.e)


def test_one_transfer_a_block_serves_every_observer():
    seen = []
    loop = MEAN.observe("iteration_completed", lambda s: seen.append(float(s.metrics["mean"])))
    loop = loop.observe("iteration_started", lambda s: seen.append(float(s.metrics["mean"])))
    loop.run(DATA, 0.0, fuse=10)
    seen.clear()
    with counting() as counts:
        loop.run(DATA, 0.0, fuse=10)
    # One a block; and one for the values before the first update, unless they are known.
    assert counts["blocks"] == 2 and counts["computed"] == 2 and counts["fetched"] == 0
    assert len(seen) == 40


def test_handlers_that_do_not_fire_cost_no_block():
    loop = MEAN
    for index in range(10):
        loop = loop.handle("all", print, jl.only(10**6 + index), name=f"h{index}")
    MEAN.run(DATA, 0.0)
    with counting() as plain:
        MEAN.run(DATA, 0.0)
    with counting() as watched:
        loop.run(DATA, 0.0)
    assert watched == plain


def test_a_pure_reduction_is_a_handful_of_dispatches():
    loop = jl.loop(lambda _, s: (s[0] + 1, s[1] * 0.5, s[2] + s[0]))
    with counting() as counts:
        state = loop.run(None, (0, 1.0, 0), iterations=1_000_000)
    assert int(state.step_state[0]) == state.step == 1_000_000
    assert counts["blocks"] <= 12


def test_validation_reuses_its_executable():
    model = (lambda key, x: jnp.ones((4, 3)), lambda w, x: x @ w)
    loss = optax.softmax_cross_entropy_with_integer_labels
    data = jl.batches((np.ones((20, 4), np.float32), np.zeros(20, np.int32)), 5)
    loop = jl.trainer(model, loss, "sgd", log=0).metric("accuracy").validate(data)
    runs = []
    loop = loop.handle("epoch_completed", lambda s: runs.append(counts["compilations"]))
    with counting() as counts:
        loop.run(data, epochs=4)
    assert runs[1] == runs[2] == runs[3]


def lowered(loop, data):
    parts = Parts.of(loop, data, RunOptions.of({}))
    begin(parts, 0.0)
    return parts.blocks.program.lower(parts.carry.values, parts.blocks.sample.value).as_text()


def test_who_watches_does_not_enter_the_program():
    watched = (
        MEAN.handle("iteration_completed", lambda s: None, jl.every(3))
        .observe("all", lambda s: None)
        .log(lambda s: "", filter=jl.every_seconds(1))
        .early_stop("mean", mode="min")
        .handle("iteration_started", lambda s: None, lambda state: True)
    )
    assert lowered(watched, DATA) == lowered(MEAN, DATA)
    jaxpr = re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(step)(DATA[0], 0.0)))
    assert jaxpr == re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(watched.step_fn)(DATA[0], 0.0)))


def test_at_most_two_blocks_are_in_flight():
    most = []
    settle = InFlight.settle

    def counted(self, in_flight):
        most.append(len(self.blocks))
        settle(self, in_flight)
        most.append(-len(self.blocks))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InFlight, "settle", counted)
        MEAN.run(DATA * 20, 0.0, fuse=4)
    assert max(most) <= 3 and min(most) == -2


def test_memory_does_not_grow():
    seen = [0]

    def look(snapshot):
        seen[0] += 1

    loop = MEAN.observe("iteration_completed", look, jl.every(100))
    for index in range(5):
        loop = loop.handle("iteration_completed", lambda s: None, jl.every(400 + index))
    data = DATA * 50
    for _ in range(2):  # the allocator needs a while to have all that it will use again
        loop.run(data, 0.0, epochs=50)
    before = resident_mb()
    loop.run(data, 0.0, epochs=200)
    assert resident_mb() - before < 5
    assert seen[0] == 3000


def test_an_epoch_leaves_its_history_and_no_more():
    loop = MEAN.observe("epoch_completed", lambda snapshot: None)
    before = held(), resident_mb()
    size = sum(x.nbytes for x in jax.live_arrays())
    state = loop.run(DATA, 0.0, epochs=1000)
    assert held()["objects"] - before[0]["objects"] < 6 * 1000
    # Rows of blocks that are long done would take more.
    assert sum(x.nbytes for x in jax.live_arrays()) - size < 1e6
    assert resident_mb() - before[1] < 20
    assert len(state.history) == 1000


def test_what_a_handler_keeps_is_copied_and_nothing_else_is():
    copies = []
    with pytest.MonkeyPatch.context() as patch:
        original = carry.copy
        names = ((carry, "copy"), (carry, "copy_later"), (first_state, "own"))
        for module, name in names:
            patch.setattr(module, name, lambda tree, **_: copies.append(1) or original(tree))
        MEAN.handle("iteration_completed", lambda s: None).run(DATA, 0.0)
        untouched = len(copies)
        kept = []
        MEAN.handle("iteration_completed", kept.append, jl.every(5)).run(DATA, 0.0)
        assert untouched == 1 and len(copies) == 2 + 4
    assert [float(s.step_state) for s in kept] == [40.0, 180.0, 420.0, 760.0]


def calls_of_blocks(loop, num_blocks):
    """Calls of Python functions, and how often they change the file, in so many blocks of 100."""
    counts = Counts()
    last = None

    def count(frame, event, _):
        nonlocal last
        if event == "call":
            counts["calls"] += 1
            counts["files"] += frame.f_code.co_filename != last
            last = frame.f_code.co_filename

    data = jl.batches(np.zeros(4 * 100 * num_blocks, np.float32), 4)
    loop.run(data, 0.0, fuse=100)
    loop.programs.block_lengths.update(dict.fromkeys(loop.programs.block_lengths, 100))
    sys.setprofile(count)
    try:
        loop.run(data, 0.0, fuse=100)
    finally:
        sys.setprofile(None)
    return counts


@pytest.mark.parametrize(
    "every, calls, files",
    # It was 126 calls that changed the file 63 times with a handler after each block, and 63 calls
    # and 38 changes without. Of those with a handler, two are for the time that each one takes.
    [(100, 60, 40), (None, 30, 21)],
)
def test_a_block_is_a_short_way(every, calls, files):
    loop = MEAN
    if every is not None:
        loop = loop.handle("iteration_completed", lambda s: None, jl.every(every))
    # The difference of two lengths leaves out what a run costs once.
    short, long = calls_of_blocks(loop, 10), calls_of_blocks(loop, 60)
    assert (long["calls"] - short["calls"]) / 50 <= calls
    assert (long["files"] - short["files"]) / 50 <= files


def test_each_filter_is_evaluated_once_in_a_firing():
    asked = []

    class Counting(jl.handlers.Filter):
        def matches(self, firing):
            asked.append(firing.total)
            return firing.total % 2 == 0

    ran = []
    loop = jl.loop(step).handle("epoch_completed", lambda s: ran.append(s.epoch), Counting())
    loop = loop.observe("epoch_started", lambda s: None, Counting())
    loop.run(DATA, 0.0, epochs=4)
    assert ran == [1, 3]
    assert sorted(asked) == [1, 1, 2, 2, 3, 3, 4, 4]
