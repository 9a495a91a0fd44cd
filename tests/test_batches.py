"""`jl.batches`: what an epoch costs, counted, and that no way of reading changes a number."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxloop as jl
from jaxloop._data import array_reader
from jaxloop._data.in_memory import Batches
from jaxloop._engine.options import RunOptions
from jaxloop._engine.parts import Parts
from jaxloop._engine.start import begin

SIZE = 64
X = np.random.default_rng(0).normal(size=(SIZE, 3)).astype(np.float32)
Y = np.arange(SIZE, dtype=np.int32)
ZERO = np.int32(0)
LASTS = [{}, {"drop_remainder": True}, {"pad": True}]


def step(batch, state):
    # Whole numbers, exact in any program, and another one for another order of the examples.
    place = jnp.arange(1, batch[0].shape[0] + 1, dtype=jnp.int32)
    whole = [(100 * x.astype(jnp.float32)).astype(jnp.int32) for x in batch]
    seen = sum(jnp.sum(place * x.reshape(x.shape[0], -1).sum(1)) for x in whole)
    return jl.emit(3 * state + seen, x=seen.astype(jnp.float32))


LOOP = jl.loop(step).metric(lambda x: x, "x", "last", ["x"])


class Counts:
    """The epochs whose order was drawn or gathered, and the threads that were started."""

    def __init__(self, patch):
        self.drawn, self.gathered, self.threads = [], 0, 0
        order, gather = Batches.order, array_reader._gather_into
        start = threading.Thread.start

        def counted_order(batches, epoch):
            self.drawn.append(epoch)
            return order(batches, epoch)

        def counted_gather(*args):
            self.gathered += 1
            return gather(*args)

        def counted_start(thread):
            self.threads += thread.name == "jaxloop-prefetch"
            start(thread)

        patch.setattr(Batches, "order", counted_order)
        patch.setattr(array_reader, "_gather_into", counted_gather)
        patch.setattr(threading.Thread, "start", counted_start)


@pytest.fixture
def counts(monkeypatch):
    return Counts(monkeypatch)


@pytest.fixture
def at_once(monkeypatch):
    """Gathers whole epochs of arrays of any size."""
    monkeypatch.setattr(array_reader, "_THREADED_GATHER_BYTES", 1)


def batches(device=True, arrays=(X, Y), batch_size=6, **options):
    return jl.batches(arrays, batch_size, shuffle=True, seed=1, device=device, **options)


def by_hand(data, epochs):
    state = jnp.int32(0)
    advance = jax.jit(lambda batch, state: step(batch, state).state)
    for epoch in range(epochs):
        for batch in data.epoch(epoch):
            state = advance(batch, state)
    return state


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("gather", [False, True])
def test_the_order_of_an_epoch_is_drawn_once(device, gather, counts, request):
    if gather:
        request.getfixturevalue("at_once")
    kept = []
    loop = LOOP.handle("iteration_completed", lambda s: kept.append(s))
    loop = loop.handle("iteration_completed", lambda s: None, lambda s: s.step_state is None)
    whole = loop.run(batches(device), ZERO, epochs=4)
    assert counts.drawn == [0, 1, 2, 3]
    counts.drawn.clear()
    middle = next(s for s in kept if s.epoch == 2 and s.iteration == 4)
    again = LOOP.from_state(middle).run(batches(device), epochs=4)
    assert again.step_state == whole.step_state
    assert counts.drawn == [2, 3]


def test_an_epoch_of_large_arrays_is_gathered_in_one_dispatch(counts, monkeypatch):
    rows = 512 * 2**10 // X[:1].nbytes
    large = np.zeros((rows, 3), np.float32), np.zeros(rows, np.int32)
    LOOP.run(batches(arrays=large, batch_size=1000), ZERO, epochs=3)
    assert counts.gathered == 3
    # In the order of the arrays, batches are slices. On the host, they are gathered there.
    LOOP.run(jl.batches(large, 1000, device=True), ZERO, epochs=2)
    LOOP.run(batches(False, large, 1000), ZERO, epochs=2)
    assert counts.gathered == 3
    monkeypatch.setattr(array_reader, "_EPOCH_GATHER_BYTES", 2**16)
    LOOP.run(batches(arrays=large, batch_size=1000), ZERO, epochs=2)
    LOOP.run(batches(), ZERO, epochs=2)
    assert counts.gathered == 3


@pytest.mark.parametrize("order", ["shuffled", "in order"])
@pytest.mark.parametrize("num_examples", [1900, 1990, 4096])
def test_no_gather_in_a_block_is_split_between_threads(num_examples, order):
    """On a CPU with one core, XLA never does that, and this test shows nothing."""
    arrays = np.zeros((num_examples, 64), np.float32), np.zeros(num_examples, np.int32)
    data = jl.batches(arrays, 32, shuffle=order == "shuffled", pad=True, device=True)
    parts = Parts.of(LOOP, data, RunOptions.of({}))
    begin(parts, ZERO)
    program, prefetcher = parts.blocks.program, parts.prefetcher
    assert prefetcher.has_more()
    prefetcher.read(4, lambda: False)
    window = prefetcher.take(4)
    carry = parts.carry.step_state, program.values.init()
    lowered = program._call.lower(carry, window.rows, window.start, window.bound)
    assert "outer_dimension_partitions" not in lowered.compile().as_text()


@pytest.mark.parametrize("shuffle", [False, True])
def test_no_thread_is_started_where_nothing_is_copied(shuffle, counts, monkeypatch):
    arrays = X[:60], Y[:60]
    for _ in range(2):
        LOOP.run(jl.batches(arrays, 6, shuffle=shuffle, device=True), ZERO, epochs=3)
    assert counts.threads == 0
    LOOP.run(jl.batches(arrays, 6, shuffle=shuffle), ZERO, epochs=3)
    assert counts.threads == 1
    monkeypatch.setattr(array_reader, "_QUICK_SHUFFLE", 50)
    LOOP.run(jl.batches(arrays, 6, shuffle=shuffle, device=True), ZERO, epochs=3)
    assert counts.threads == 1 + shuffle


@pytest.mark.parametrize(
    "batch_size, last",
    [(6, {}), (6, {"drop_remainder": True}), (6, {"pad": True}), (100, {"pad": True})],
)
def test_every_way_of_reading_gives_the_same_bits(batch_size, last, monkeypatch):
    weight = np.linspace(1, 2, SIZE).astype(np.float32)
    arrays = (X, Y, weight) if "pad" in last else (X, Y)
    want = by_hand(batches(False, arrays, batch_size, **last), 3)
    for threshold in (1, 2**40):
        monkeypatch.setattr(array_reader, "_THREADED_GATHER_BYTES", threshold)
        for device in (False, True):
            data = batches(device, arrays, batch_size, **last)
            assert LOOP.run(data, ZERO, epochs=3).step_state == want


@pytest.mark.parametrize("last", LASTS)
def test_a_run_resumes_in_the_middle_of_an_epoch_that_is_gathered_at_once(last, at_once):
    data = batches(**last)
    kept = []
    loop = LOOP.handle("iteration_completed", kept.append, jl.every(4))
    whole = loop.run(data, ZERO, epochs=3)
    assert len(kept) > 6
    for state in kept:
        assert LOOP.from_state(state).run(data, epochs=3).step_state == whole.step_state


@pytest.mark.parametrize("fuse", ["auto", 3])
def test_a_halted_epoch_and_a_nested_run_keep_their_own_arrays(fuse, at_once, counts):
    data = batches(drop_remainder=True)
    values = []

    def halt(state):
        if state.epoch == 1 and state.iteration == 4:
            values.append(LOOP.run(data, ZERO, epochs=2, fuse=fuse).step_state)
            return "halt_epoch", state
        return None

    loop = LOOP.handle("iteration_completed", halt, jl.after(1))
    state = loop.run(data, ZERO, epochs=3, fuse=fuse)
    expected = jnp.int32(0)
    advance = jax.jit(lambda batch, state: step(batch, state).state)
    for epoch in range(3):
        for index, batch in enumerate(data.epoch(epoch)):
            if epoch != 1 or index <= 4:
                expected = advance(batch, expected)
    assert state.step_state == expected
    assert values == [by_hand(data, 2)]
    assert counts.gathered == 3 + 2


def test_the_memory_of_an_epoch_is_used_again(at_once):
    x = np.zeros((4096, 16), np.float32)
    data = batches(arrays=(x,), batch_size=256)
    seen = []

    def look(_):
        seen.append(sum(a.nbytes for a in jax.live_arrays() if a.shape == x.shape))

    LOOP.observe("epoch_completed", look).run(data, ZERO, epochs=5)
    assert max(seen) == 2 * x.nbytes


@pytest.mark.parametrize("last", LASTS)
@pytest.mark.parametrize("iterations", [4, 1000])
def test_no_more_is_gathered_than_the_iterations_of_an_epoch_need(last, iterations, at_once):
    data = batches(**last)
    others, seen = jax.live_arrays(), []  # other modules may hold arrays

    def lengths():
        found = (a for a in jax.live_arrays() if a.shape[1:] == (3,))
        return {len(a) for a in found if not any(a is other for other in others)}

    def look(_):
        seen.append(lengths())

    loop = LOOP.observe("epoch_completed", look)
    state = loop.run(data, ZERO, epochs=3, iterations=iterations)
    plain = LOOP.run(batches(False, **last), ZERO, epochs=3, iterations=iterations)
    assert state.step_state == plain.step_state
    assert seen == [{SIZE, min(SIZE, 6 * iterations)}] * 3
    assert lengths() == {SIZE}


def test_gathered_arrays_follow_a_state_that_is_spread_over_a_mesh(at_once, counts):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    first = jax.device_put(np.zeros(8, np.int32), spread)
    want = jl.loop(step).run(batches(False), np.zeros(8, np.int32), epochs=2)
    state = jl.loop(step).run(batches(), first, epochs=2)
    np.testing.assert_array_equal(state.step_state, want.step_state)
    assert counts.gathered == 2


def test_the_arrays_of_the_user_are_not_written(at_once):
    # The CPU backend reads memory with this alignment where it is, and the run donates it.
    raw = np.empty(4 * SIZE + 16, np.float32)
    start = -raw.ctypes.data % 64 // 4
    x = raw[start : start + 4 * SIZE].reshape(SIZE, 4)
    x[:] = np.arange(4 * SIZE).reshape(SIZE, 4)
    before = x.copy()
    LOOP.run(batches(arrays=(x,)), ZERO, epochs=3)
    np.testing.assert_array_equal(x, before)


def test_a_second_epoch_gathers_with_the_executable_of_the_first(at_once):
    compiled = []

    def listen(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    data = batches(arrays=(X[:50],), batch_size=5)
    LOOP.run(batches(False, arrays=(X[:50],), batch_size=5), ZERO)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        LOOP.run(data, ZERO)
        first = len(compiled)
        LOOP.run(data, ZERO, epochs=4)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    # The gather, and the block for rows that are slices.
    assert (first, len(compiled)) == (2, 2)
