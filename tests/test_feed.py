"""Reading ahead: the order, the positions, the thread, and errors where they belong."""

import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxloop as jl

SAFETY_S = 300
"""No wait ends by this; it is there so that a fault cannot hang the suite."""


def step(batch, total):
    # Exact in 32 bits, and another number for another order.
    return jl.emit((3 * total + jnp.sum(batch)) % 4096, x=batch)


def threads():
    return [t.name for t in threading.enumerate() if t.name == "jaxloop-prefetch"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    assert not threads()
    yield
    assert not threads()


class Counting:
    """A re-iterable that knows how many batches were read, each a different number."""

    def __init__(self, length):
        self.length, self.read = length, 0

    def __iter__(self):
        for i in range(self.length):
            self.read += 1
            yield np.full(4, i, np.float32)


def expected(epochs, length):
    total = 0.0
    for _ in range(epochs):
        for i in range(length):
            total = (3 * total + 4 * i) % 4096
    return total


@pytest.mark.parametrize("fuse", ["auto", 1, 2, 7, 100])
@pytest.mark.parametrize("every", [1, 3, 10, 1000])
def test_any_split_of_stacks_and_blocks_is_the_same(fuse, every):
    data = [np.full(4, i, np.float32) for i in range(23)]
    kinds = data, Counting(23), lambda epoch: iter(data), jl.batches(np.concatenate(data), 4)
    loop = jl.loop(step).handle("iteration_completed", lambda s: None, jl.every(every))
    for kind in kinds:
        assert float(loop.run(kind, 0.0, epochs=3, fuse=fuse).step_state) == expected(3, 23)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("last", [{}, {"drop_remainder": True}, {"pad": True}])
@pytest.mark.parametrize("fuse", ["auto", 1, 3])
def test_batches_on_the_host_and_on_the_device_are_those_of_plain_iteration(shuffle, last, fuse):
    x = np.arange(26, dtype=np.float32).reshape(13, 2)
    y = np.arange(13)
    weight = np.linspace(1, 2, 13).astype(np.float32)

    def record(batch, state):
        # Each step writes its batch down: what it was is in the final state.
        n, seen = state
        flat = jnp.concatenate([jnp.ravel(leaf).astype(jnp.float32) for leaf in batch])
        flat = jnp.pad(flat, (0, 24 - flat.size))
        return n + 1, jax.lax.dynamic_update_index_in_dim(seen, flat, n, 0)

    for arrays in ((x, y), (x, y, weight)):
        served = {
            device: jl.batches(arrays, 4, shuffle=shuffle, seed=3, device=device, **last)
            for device in (False, True)
        }
        rows = []
        for epoch in range(2):
            for batch in served[False].epoch(epoch):
                flat = np.concatenate([np.ravel(leaf).astype(np.float32) for leaf in batch])
                rows.append(np.pad(flat, (0, 24 - flat.size)))
        want = np.zeros((8, 24), np.float32)
        want[: len(rows)] = rows
        for data in served.values():
            first = (0, np.zeros((8, 24), np.float32))
            n, seen = jl.loop(record).run(data, first, epochs=2, fuse=fuse).step_state
            assert int(n) == len(rows)
            np.testing.assert_array_equal(seen, want)


def test_an_epoch_on_the_device_goes_on_in_its_middle():
    data = jl.batches(np.arange(40, dtype=np.float32), 4, shuffle=True, device=True)
    kept = []
    loop = jl.loop(step)
    whole = loop.run(data, 0.0, epochs=3)
    loop.handle("iteration_completed", kept.append, jl.every(7)).run(data, 0.0, epochs=3)
    for state in kept:
        assert loop.from_state(state).run(data, epochs=3).step_state == whole.step_state


def test_the_next_epoch_is_prepared_and_a_halt_forgets_it():
    data = jl.batches(np.arange(40, dtype=np.float32), 4, shuffle=True)
    plain = [float(batch.sum()) for epoch in range(3) for batch in data.epoch(epoch)]
    seen = []

    def halt(state):
        return ("halt_epoch", state) if state.epoch == 1 and state.iteration == 3 else None

    loop = jl.loop(step).metric(lambda x: x, "x", "last", ["x"])
    loop = loop.observe("iteration_completed", lambda s: seen.append(float(s.metrics["x"]) * 4))
    loop.run(data, 0.0, epochs=3)
    np.testing.assert_allclose(seen, plain, rtol=1e-6)
    seen.clear()
    loop.handle("iteration_completed", halt).run(data, 0.0, epochs=3)
    np.testing.assert_allclose(seen, plain[:14] + plain[20:], rtol=1e-6)


@pytest.mark.parametrize("fuse", ["auto", 1, 4])
def test_an_error_in_the_data_comes_where_it_belongs(fuse):
    class Broken(Exception):
        pass

    def batches():
        for i in range(10):
            if i == 7:
                raise Broken("no more")
            yield np.full(4, i, np.float32)

    with pytest.raises(Broken, match="no more") as caught:
        jl.loop(step).run(lambda epoch: batches(), 0.0, fuse=fuse)
    state = caught.value.loop_state
    assert state.step == 7
    assert float(state.step_state) == expected(1, 7)
    assert "data of epoch 0" in caught.value.__notes__[0]


@pytest.mark.parametrize("where", ["handle", "observe"])
def test_an_error_in_a_handler_ends_the_thread_and_keeps_the_state(where):
    class Broken(Exception):
        pass

    def fail(state):
        raise Broken

    loop = getattr(jl.loop(step), where)("iteration_completed", fail, jl.only(20))
    with pytest.raises(Broken) as caught:
        loop.run(Counting(1000), 0.0, fuse=4)
    state = caught.value.loop_state
    # The driver may be ahead of an observer, and never behind: the state is whole.
    assert state.step >= 20 and (where == "observe" or state.step == 20)
    assert float(state.step_state) == expected(1, state.step)
    again = jl.loop(step).from_state(state).run(Counting(1000))
    assert float(again.step_state) == expected(1, 1000) and again.step == 1000


def test_an_error_while_tracing_the_step_loses_no_state():
    def picky(batch, total):
        if batch.shape[0] == 3:
            raise ValueError("three is too few")
        return total + jnp.sum(batch)

    data = [np.ones(4, np.float32)] * 5 + [np.ones(3, np.float32)]
    with pytest.raises(ValueError, match="three") as caught:
        jl.loop(picky).run(data, 0.0)
    assert caught.value.loop_state.step == 5
    assert float(caught.value.loop_state.step_state) == 20.0


def test_an_interrupt_ends_the_thread():
    def interrupt(snapshot):
        raise KeyboardInterrupt

    loop = jl.loop(step).observe("iteration_completed", interrupt, jl.only(30))
    with pytest.raises(KeyboardInterrupt) as caught:
        loop.run(Counting(1000), 0.0, fuse=4)
    assert caught.value.loop_state.step >= 30


def test_an_abandoned_stream_ends_the_thread():
    stream = jl.loop(step).stream(Counting(100), 0.0, epochs=3, fuse=4)
    next(stream)
    stream.close()


def test_slow_data_do_not_fill_a_block():
    first_seen = threading.Event()
    slept_s = 0.0

    def slow():
        nonlocal slept_s
        began = time.monotonic()
        for i in range(12):
            time.sleep(0.03)  # longer than a block waits for its batches
            if i == 8:
                # The first is seen while the eighth is waited for.
                assert first_seen.wait(SAFETY_S)
            if i == 11:
                # By now everything is compiled. However slow the machine, this wait is the longest.
                slept_s = 3 * (time.monotonic() - began)
                time.sleep(slept_s)
            yield np.full(4, i, np.float32)

    loop = jl.loop(step).observe("iteration_completed", lambda s: first_seen.set(), jl.only(1))
    state = loop.run(lambda epoch: slow(), 0.0)
    assert state.step == 12
    # The times say what held the run up.
    assert state.times[0].data_s > 0.5 * slept_s


def test_a_one_shot_iterator_is_read_no_further_than_the_next_handler():
    data = Counting(100)
    iterator = iter(data)
    reads = []
    loop = jl.loop(step).handle(
        "iteration_completed", lambda s: reads.append(data.read), jl.every(6)
    )
    loop.run(iterator, 0.0, iterations=20, epochs=2)
    assert reads == [6, 12, 18, 24, 30, 36] and data.read == 40


def test_what_a_one_shot_iterator_gave_is_not_lost_by_an_error():
    data = Counting(30)
    iterator = iter(data)

    def fail(snapshot):
        raise ZeroDivisionError

    loop = jl.loop(step).observe("iteration_completed", fail, jl.only(5))
    with pytest.raises(ZeroDivisionError) as caught:
        loop.run(iterator, 0.0, fuse=4)
    state = jl.loop(step).from_state(caught.value.loop_state).run(iterator)
    assert state.step == 30 and float(state.step_state) == expected(1, 30)


def test_arrays_of_another_device_and_keys_are_stacked():
    device = jax.devices()[1]
    data = [jax.device_put(np.full(4, i, np.float32), device) for i in range(9)]
    state = jl.loop(step).run(data, jax.device_put(np.float32(0), device), fuse=4)
    assert float(state.step_state) == expected(1, 9)
    assert state.step_state.devices() == {device}

    def draw(key, total):
        return total + jax.random.uniform(key)

    keys = list(jax.random.split(jax.random.key(0), 5))
    total = jl.loop(draw).run(keys, 0.0, fuse=2).step_state
    assert float(total) == pytest.approx(float(sum(jax.random.uniform(k) for k in keys)))


def test_batches_follow_a_state_that_is_spread_over_a_mesh():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    state = jax.device_put(np.zeros(8, np.float32), spread)
    data = jl.batches(np.arange(24, dtype=np.float32), 4, shuffle=True)
    for device in (False, True):
        served = jl.batches(np.arange(24, dtype=np.float32), 4, shuffle=True, device=device)
        end = jl.loop(lambda batch, s: s + jnp.sum(batch)).run(served, state).step_state
        np.testing.assert_array_equal(end, np.full(8, 276.0, np.float32))
        assert end.sharding.is_equivalent_to(spread, 1)
    assert len(data) == 6


def test_buffers_that_are_used_again_do_not_change_what_was_seen():
    rng = np.random.default_rng(0)
    arrays = rng.normal(size=(4096, 16)).astype(np.float32)
    data = jl.batches(arrays, 4, shuffle=True)

    def total(batch, state):
        return state + jnp.sum(batch, axis=0)

    for _ in range(3):
        state = jl.loop(total).run(data, np.zeros(16, np.float32), epochs=3).step_state
        np.testing.assert_allclose(state, 3 * arrays.sum(0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fuse", ["auto", 1])
def test_an_error_of_the_device_comes_out_and_ends_the_thread(fuse):
    def check(x):
        if x > 5:
            raise ValueError("a bad number")
        return np.float32(0)

    def checked(batch, total):
        result = jax.ShapeDtypeStruct((), jnp.float32)
        return total + jnp.sum(batch) + jax.pure_callback(check, result, total)

    with pytest.raises(Exception, match="ValueError|bad number|CpuCallback") as caught:
        jl.loop(checked).run([np.ones(2, np.float32)] * 50, 0.0, fuse=fuse)
    # The state before it was donated: better none than a wrong one.
    assert caught.value.loop_state is None
    where, why = caught.value.__notes__
    assert "in the step" in where
    assert "loop_state is None, because the device failed" in why
    assert why.endswith("the loop has no checkpoint")


def test_an_iterator_goes_on_after_a_signal_in_the_last_handler_before_a_read():
    """The signal arrives after the batch was asked for and before anything was read."""
    data = Counting(8)
    iterator = iter(data)

    def interrupt(state):
        signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        loop = jl.loop(step).handle("iteration_started", interrupt, jl.only(3))
        with pytest.raises(jl.Terminated) as caught:
            loop.run(iterator, 0.0, iterations=4, epochs=2)
    finally:
        signal.signal(signal.SIGTERM, before)
    stopped = caught.value.state
    assert stopped.status == "interrupted"
    state = jl.loop(step).from_state(stopped).run(iterator, iterations=4, epochs=2)
    assert state.step == 8 and float(state.step_state) == expected(1, 8)
