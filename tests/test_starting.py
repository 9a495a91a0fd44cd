"""How a run starts and resumes: what is compiled, traced and copied before its first block ends."""

import collections
import contextlib
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxloop as jl
from jaxloop._cli import demo
from jaxloop._core.arrays import own
from jaxloop._program import cache

X = np.arange(128, dtype=np.float32).reshape(32, 4) / 128
Y = np.arange(32, dtype=np.int32) % 3
DATA = jl.batches((X, Y), 8)


@contextlib.contextmanager
def compiling():
    """Lists the programs that are compiled, by name."""
    names = []

    def compiled(event, duration, **about):
        if event.endswith("backend_compile_duration"):
            names.append(about["fun_name"].removeprefix("jit(").removesuffix(")"))

    jax.monitoring.register_event_duration_secs_listener(compiled)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(compiled)


def step(batch, state):
    x, y = batch
    new = {**state, "w": state["w"] + x.mean(0), "n": state["n"] + 1}
    return jl.emit(new, y_true=y, y_pred=x[:, :3], size=x.sum())


def own_loop(init_fn=None):
    return jl.loop(step, init_fn).metric("accuracy")


def init_step(batch, given):
    return {"w": batch[0][0] * 0, "n": 0, "key": jax.random.key(1)}


def init_model(key, x):
    return {"w": jax.random.normal(key, (x.shape[-1], 3)), "b": jnp.zeros(3)}


def apply_model(params, x):
    return x @ params["w"] + params["b"]


def trainer(init=init_model, apply=apply_model):
    loss = "softmax_cross_entropy_with_integer_labels"
    return jl.trainer((init, apply), loss, "adam", log=0).metric("accuracy")


def host_state():
    return {"w": np.zeros(4, np.float32), "n": 0, "key": jax.random.key(1)}


def same(a, b):
    def equal(one, other):
        one, other = (
            jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
            for x in (one, other)
        )
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))

    jax.tree.map(equal, a, b)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """A folder with the checkpoints of a run of two epochs, its state, and that of the third."""
    path = tmp_path_factory.mktemp("earlier")
    loop = own_loop(init_step)
    saving = loop.checkpoint(path, event="iteration_completed", keep=None)
    state = saving.final_state(DATA, epochs=2)
    return path, state, loop.from_state(state).final_state(DATA, epochs=3)


@pytest.fixture
def mesh():
    return jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))


# --- a fresh run ---------------------------------------------------------------------------------

STATES = {
    "host": host_state,
    "device": lambda: {**host_state(), "w": jnp.zeros(4), "n": jnp.int32(0)},
    "weak": lambda: {**host_state(), "n": jnp.asarray(0)},
    "committed": lambda: jax.device_put({**host_state(), "n": np.int32(0)}, jax.devices()[0]),
    "partly committed": lambda: {
        **host_state(),
        "w": jax.device_put(np.zeros(4, np.float32), jax.devices()[0]),
    },
    "another device": lambda: jax.device_put({**host_state(), "n": np.int32(0)}, jax.devices()[1]),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_fresh_run_compiles_the_block_and_nothing_else(kind, earlier):
    state = STATES[kind]()
    with compiling() as names:
        final = own_loop().run(DATA, state, epochs=2)
    assert names == ["_block"]
    same(final.step_state, earlier[1].step_state)


def test_a_sharded_state_compiles_the_block_once(mesh):
    spread = NamedSharding(mesh, P("d"))
    state = {**host_state(), "w": jax.device_put(np.zeros(4, np.float32), spread)}
    with compiling() as names:
        final = own_loop().run(DATA, state, epochs=3)
    assert names == ["_block"]
    assert final.step_state["w"].sharding.is_equivalent_to(spread, 1)


def test_a_loop_that_starts_often_compiles_one_copy(monkeypatch):
    monkeypatch.setattr(cache, "_FEW_STARTS", 2)
    loop, state = own_loop(), host_state()
    first = loop.run(DATA, state)
    with compiling() as names:
        for _ in range(4):
            same(loop.run(DATA, state).step_state, first.step_state)
    assert names in ([], ["copy"])  # another test may have compiled it


# --- copies --------------------------------------------------------------------------------------


def pointers(tree):
    found = []
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, np.ndarray):
            found.append(leaf.ctypes.data)
            continue
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        found += [shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards]
    return found


def aligned(size):
    """Returns an array whose memory JAX would use as it is."""
    raw = np.zeros(4 * size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + 4 * size].view(np.float32)


@pytest.mark.parametrize("often", [False, True])
def test_a_copy_shares_no_memory(often, mesh):
    array = jnp.arange(64.0)
    tree = {
        "host": aligned(64),
        "scalar": np.zeros((), np.int32),
        "device": array,
        "again": array,
        "empty": np.zeros((0, 3), np.float32),
        "key": jax.random.split(jax.random.key(3), 4),
        "committed": jax.device_put(array, jax.devices()[1]),
    }
    if not often:  # one program cannot have arrays on several devices
        tree["spread"] = jax.device_put(np.ones(64), NamedSharding(mesh, P("d")))
        tree["whole"] = jax.device_put(np.ones(64), NamedSharding(mesh, P()))
        tree["keys"] = jax.device_put(tree["key"], NamedSharding(mesh, P("d")))
    else:
        del tree["committed"]
    made = own(tree, often=often)
    same(made, tree)
    full = [leaf for leaf in jax.tree.leaves(made) if leaf.size]
    assert len(set(pointers(full))) == len(pointers(full))
    assert not set(pointers(full)) & set(pointers(tree))
    for new, old in zip(jax.tree.leaves(made), jax.tree.leaves(tree), strict=True):
        if isinstance(old, jax.Array):
            assert new.sharding == old.sharding and new.committed == old.committed
        else:
            assert not new.committed


def test_the_arrays_of_the_user_are_left_alone():
    state = {"w": aligned(4), "n": np.zeros((), np.int32)}
    shared = jnp.zeros(4)
    loop = jl.loop(lambda b, s: jax.tree.map(lambda x: x + 1, s))
    final = loop.run(DATA, {**state, "a": shared, "b": shared})
    assert not state["w"].any() and not state["n"] and not shared.any()
    assert final.step_state["a"].sum() == final.step_state["b"].sum() == 16


def test_an_init_function_may_return_what_it_gets():
    def init_fn(batch, given):
        return {"w": given, "again": given, "x": batch[0], "n": 0}

    def add(batch, state):
        return jax.tree.map(lambda x: x + 1, state)

    given = jnp.zeros(4)
    batches = [(jnp.asarray(X[:8]), jnp.asarray(Y[:8]))] * 3
    state = jl.loop(add, init_fn).run(batches, given).step_state
    assert not given.any() and state["w"].sum() == state["again"].sum() == 12
    np.testing.assert_array_equal(batches[0][0], X[:8])
    np.testing.assert_array_equal(state["x"], X[:8] + 1 + 1 + 1)
    with pytest.raises(jl.errors.StructureError, match=r"init_fn: the leaf step_state\['name'\]"):
        jl.loop(add, lambda batch, given: {"name": object()}).run(batches)


# --- a resumed run -------------------------------------------------------------------------------


CONTINUED = {
    "resume": lambda loop, path, state: loop.resume(path),
    "restore": lambda loop, path, state: loop.from_state(loop.restore(path, data=DATA)),
    "in mid-epoch": lambda loop, path, state: loop.from_state(loop.restore(path, 6, data=DATA)),
    "jl.restore": lambda loop, path, state: loop.from_state(jl.restore(path, like=state)),
    "bytes": lambda loop, path, state: loop.from_state(
        jl.deserialize_state(jl.serialize_state(state), like=state)
    ),
    "from_state": lambda loop, path, state: loop.from_state(state),
}


@pytest.mark.parametrize("how", CONTINUED)
def test_a_resumed_run_compiles_the_block_once_and_nothing_else(how, earlier):
    path, state, expected = earlier
    with compiling() as names:
        final = CONTINUED[how](own_loop(init_step), path, state).final_state(DATA, epochs=3)
    assert names == ["_block"]
    same(final.step_state, expected.step_state)
    assert final.history == expected.history


def test_a_trainer_compiles_its_init_function_if_it_is_new_and_the_block_once(tmp_path):
    with compiling() as names:
        expected = trainer().run(DATA, epochs=2)
    assert names == ["init_fn", "_block"]
    trainer().checkpoint(tmp_path).run(DATA, epochs=1)
    with compiling() as names:
        final = trainer().resume(tmp_path).run(DATA, epochs=2)
    assert names == ["_block"]
    same(final, expected)


@pytest.mark.parametrize("kind", ["committed", "another device"])
def test_a_resumed_step_state_is_where_it_was(kind, tmp_path):
    state = STATES[kind]()
    before = own_loop().checkpoint(tmp_path).run(DATA, state)
    with compiling() as names:
        final = own_loop().resume(tmp_path).run(DATA, state, epochs=3)
    assert names == ["_block"]
    for name in state:
        assert final.step_state[name].devices() == before.step_state[name].devices()


def test_a_sharded_state_stays_so_and_compiles_the_block_once(tmp_path, mesh):
    spread = NamedSharding(mesh, P("d"))

    def init_fn(batch, given):
        return {**host_state(), "w": jax.lax.with_sharding_constraint(jnp.zeros(4), spread)}

    own_loop(init_fn).checkpoint(tmp_path).run(DATA)
    with compiling() as names:
        final = own_loop(init_fn).resume(tmp_path).run(DATA, epochs=3)
    # Only a run of the init function shows where its arrays are.
    assert names == ["init_fn", "_block"]
    assert final.step_state["w"].sharding.is_equivalent_to(spread, 1)


@pytest.mark.parametrize("kind", ["host", "committed"])
def test_a_run_that_is_rewound_compiles_the_block_once(kind, tmp_path):
    def spoilt(batch, state):
        bad = jnp.where(state["n"] == 9, jnp.nan, 0.0)
        return {"w": state["w"] + batch[0].mean() + bad, "n": state["n"] + 1}

    state = {"w": np.float32(0), "n": np.int32(0)}
    if kind == "committed":
        state = jax.device_put(state, jax.devices()[0])
    rewound = []
    loop = jl.loop(spoilt).checkpoint(tmp_path).nan_guard("rewind")
    loop = loop.handle("epoch_completed", lambda s: rewound.append(s.step - int(s.step_state["n"])))
    with compiling() as names:
        loop.run(DATA, state, epochs=4)
    assert names.count("_block") == 1 and rewound[-1] > 0


def test_a_folder_without_a_good_checkpoint_starts_afresh(tmp_path):
    calls = collections.Counter()

    def init_fn(batch, given):
        calls["init"] += 1
        return init_step(batch, given)

    own_loop(init_fn).checkpoint(tmp_path).run(DATA)
    for file in tmp_path.rglob("*"):
        if file.is_file() and file.parent.name == "d":  # Orbax's arrays
            file.write_bytes(b"damaged")
    calls.clear()
    with compiling() as names, pytest.warns(UserWarning, match="damaged and skipped"):
        final = own_loop(init_fn).resume(tmp_path).run(DATA)
    assert names == ["init_fn", "_block"] and calls == {"init": 1}
    assert final.step == 4


def test_an_init_function_that_reads_values_resumes(tmp_path):
    def init_fn(batch, given):
        return {"w": np.full(4, float(batch[0].sum()), np.float32), "n": 0}

    loop = jl.loop(lambda b, s: {"w": s["w"] + 1, "n": s["n"] + 1}, init_fn)
    loop.checkpoint(tmp_path).run(DATA, epochs=1, jit=False)
    for jit in (False, True):
        state = loop.resume(tmp_path).run(DATA, epochs=2, jit=jit)
        assert state.step_state["n"] == 8


# --- traces --------------------------------------------------------------------------------------


def test_nothing_of_the_users_is_traced_twice(tmp_path):
    calls = collections.Counter()

    def counted(name, fn):
        def call(*args):
            calls[name] += 1
            return fn(*args)

        return call

    for epochs in (1, 4):
        loop = jl.loop(counted("step", step), counted("init", init_step))
        loop = loop.checkpoint(tmp_path, resume=True)
        calls.clear()
        loop.run(DATA, epochs=epochs)
        assert calls == {"init": 1, "step": 1}
        loop.run(DATA, epochs=epochs + 1)  # this one resumes too
        assert calls == {"init": 1, "step": 1}

    def squared(y_true, y_pred):
        return jnp.square(y_pred[:, 0] - y_true.astype(jnp.float32))

    # A validation evaluates the model in another program, which is one more trace.
    model = counted("init", init_model), counted("apply", apply_model)
    calls.clear()
    jl.trainer(model, counted("loss", squared), "sgd", log=0).validate(DATA).run(DATA)
    assert calls == {"init": 1, "apply": 2, "loss": 2}


# --- the persistent compilation cache ------------------------------------------------------------

SCRIPT = """
import collections, os, sys
import jax
import jax.numpy as jnp

path, epochs, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.config.update("jax_compilation_cache_dir", os.path.join(path, "programs"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event.split("/")[-1]]))

import jaxloop as jl
from tests.test_starting import DATA, own_loop, trainer, host_state

loop, given = (own_loop(), (host_state(),)) if kind == "own step" else (trainer(), ())
if kind == "handlers":
    loop = loop.validate(DATA).early_stop("validation_loss", patience=9, restore_best=True)
    loop = loop.metric(lambda a, b: abs(a - b.sum(-1)), "difference")
    loop = loop.nan_guard("halt").reduce_lr_on_plateau("validation_loss", patience=1)
    loop = loop.handle("iteration_completed", lambda s: s.step_state and None, jl.every(3))
    loop = loop.observe("iteration_completed", lambda s: s.metrics)
folder = os.path.join(path, "checkpoints" + sys.argv[4])
loop.checkpoint(folder, resume=True).final_state(DATA, *given, epochs=epochs).history
print(counts["cache_hits"], counts["cache_misses"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["own step", "trainer", "handlers"])
def test_a_second_process_compiles_nothing_if_programs_are_kept(kind, tmp_path):
    """The names and constants of a program depend on no hash and on no address."""

    def process(seed, epochs, run):
        environment = {
            **os.environ,
            "PYTHONHASHSEED": str(seed),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(epochs), kind, run]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return tuple(map(int, done.stdout.split()))

    hits, misses = process(1, 2, "a")
    assert misses > 0
    hits, misses = process(2, 2, "b")  # the same run once more
    assert hits > 0 and misses == 0
    hits, misses = process(3, 4, "b")  # and resumed
    assert hits > 0 and misses == 0


def test_the_demo_keeps_programs_in_the_users_cache(tmp_path, monkeypatch):
    def settings(before, root):
        """Returns what the demo sets, in a process with a folder or None, and a root of caches."""
        made = {"jax_compilation_cache_dir": before}
        config = types.SimpleNamespace(**made, update=made.__setitem__)
        monkeypatch.setitem(sys.modules, "jax", types.SimpleNamespace(config=config))
        monkeypatch.setenv("XDG_CACHE_HOME", str(root))
        demo.keep_programs()
        return made

    made = settings(None, tmp_path)
    folder = Path(made.pop("jax_compilation_cache_dir"))
    assert folder.is_dir() and folder.is_relative_to(tmp_path / "jaxloop")
    assert made == {"jax_persistent_cache_min_compile_time_secs": 0}
    assert settings("mine", tmp_path) == {"jax_compilation_cache_dir": "mine"}
    (tmp_path / "file").touch()  # no folder can be made in it
    assert settings(None, tmp_path / "file") == {"jax_compilation_cache_dir": None}
