"""Shardings and processes: what works, and what is refused before the first step."""

import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxloop as jl
from jaxloop.errors import ShardingError

SAFETY_S = 300

DATA = [np.arange(8, dtype=np.float32) + i for i in range(10)]
ONE = {"w": jnp.zeros(8)}


def step(batch, state):
    return jl.emit({"w": state["w"] * 0.5 + batch}, x=batch)


LOOP = jl.loop(step).metric(lambda x: x, "mean", None, ["x"])


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.fixture(scope="module")
def sharded(mesh):
    return NamedSharding(mesh, P("d"))


@pytest.mark.parametrize("where", ["one device", "sharded"])
def test_sharded_batches_are_refused_before_the_first_step(where, mesh, sharded):
    began = []
    loop = LOOP.handle("started", lambda s: began.append(s))
    init = ONE if where == "one device" else {"w": jax.device_put(jnp.zeros(8), sharded)}
    split = [jax.device_put(batch, sharded) for batch in DATA]
    for method in (loop.run, loop.check, loop.stream):
        with pytest.raises(ShardingError, match="over 4 devices") as caught:
            method(split, init)
        assert "batch 0 of the data: the leaf batch must be on one device" in str(caught.value)
        assert isinstance(caught.value, ValueError) and caught.value.loop_state is None
    with pytest.raises(ShardingError, match=r"the leaf batch\['a'\]\[1\] must"):
        loop.run([{"a": (DATA[0], split[0])}], init)
    with pytest.raises(ShardingError, match="batches: every array must"):
        jl.batches((DATA[0], split[0]), 4)
    assert not began
    # A later batch is refused when it is read, and the state before it is kept.
    with pytest.raises(ShardingError, match="batch 3 of the data") as caught:
        loop.run([*DATA[:3], *split], init)
    assert caught.value.loop_state.step == 3
    # A replicated batch is whole.
    whole = [jax.device_put(batch, NamedSharding(mesh, P())) for batch in DATA]
    expected = LOOP.run(DATA, ONE).step_state["w"]
    np.testing.assert_array_equal(LOOP.run(whole, init).step_state["w"], expected)


def test_a_state_that_is_sharded_over_local_devices_stays_so(sharded, tmp_path):
    def init_fn(batch, init_state):
        return {"w": jax.lax.with_sharding_constraint(jnp.zeros(8), sharded)}

    expected = LOOP.run(DATA, ONE, epochs=3)
    born = jl.loop(step, init_fn).metric(lambda x: x, "mean", None, ["x"])
    saving = born.checkpoint(tmp_path)
    half = saving.run(DATA, epochs=2)
    for state in (
        born.run(DATA, epochs=3),
        LOOP.run(DATA, {"w": jax.device_put(jnp.zeros(8), sharded)}, epochs=3),
        saving.resume(tmp_path).run(DATA, epochs=3),
        born.from_state(half).run(DATA, epochs=3),
        born.run(jl.batches(np.concatenate(DATA), 8, device=True), epochs=3),
    ):
        assert state.step_state["w"].sharding.is_equivalent_to(sharded, 1)
        np.testing.assert_array_equal(state.step_state["w"], expected.step_state["w"])
        assert state.history == expected.history


def test_explicit_axes_are_refused_before_the_first_step():
    """`jax.make_mesh` makes them, unless it is told otherwise."""
    explicit = NamedSharding(jax.make_mesh((4,), ("d",)), P("d"))
    for method in (LOOP.run, LOOP.check, LOOP.stream):
        with pytest.raises(ShardingError, match=r"type Auto.* leaf step_state\['w'\]") as caught:
            method(DATA, {"w": jax.device_put(jnp.zeros(8), explicit)})
        assert caught.value.loop_state.step == 0


def test_several_processes_are_refused_before_the_first_step(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    loop = jl.loop(lambda batch, total: total + batch.sum())
    for method in (loop.run, loop.check, loop.stream):
        with pytest.raises(ShardingError, match=r"process_count\(\) must be 1, got 2"):
            method([np.ones(2, np.float32)], 0.0)


PROCESS = """
import sys
import jax, jax.numpy as jnp, numpy as np
import jaxloop as jl
from jax.sharding import NamedSharding, PartitionSpec as P

jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, int(sys.argv[1]))
assert jax.process_count() == 2
mesh = jax.make_mesh((2,), ("d",))
spread = jax.make_array_from_process_local_data(
    NamedSharding(mesh, P("d")), np.ones(2, np.float32), (4,)
)
loop = jl.loop(lambda batch, total: total + batch.sum())
for data, init in (([np.ones(2, np.float32)], 0.0), ([spread], 0.0), ([np.ones(4)], spread)):
    try:
        loop.run(data, init)
    except jl.errors.ShardingError as error:
        print(error.loop_state, str(error).splitlines()[0][:47], flush=True)
"""


@pytest.mark.slow
def test_two_processes_each_get_the_error():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), port],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},  # one device each
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for one in both:
            out, err = one.communicate(timeout=SAFETY_S)
            assert one.returncode == 0, err
            assert out == "None run: jax.process_count() must be 1, got 2; each\n" * 3, out
    finally:
        for one in both:
            one.kill()  # the notifier of jax.distributed ignores SIGTERM
