"""Checkpoints: what is in them, which are kept, how a run goes on from them."""

import json
import logging
import os
import shutil
import threading
from pathlib import Path

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxloop as jl
from jaxloop.errors import CheckpointError, DataError, SerializationError
from tests import kept_trainer
from tests.digest import digest
from tests.memory import held, resident_mb

X = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
Y = (np.arange(40) % 3).astype(np.int32)
BATCHES = jl.batches((X, Y), 8, shuffle=True, seed=3)
LOSS = optax.softmax_cross_entropy_with_integer_labels


def step(batch, total):
    return jl.emit(total * 0.5 + jnp.sum(batch), x=batch)


MEAN = jl.loop(step).metric(lambda x: x, "mean", None, ["x"])


class Stop(Exception):
    pass


def fail_once(loop, event, filter):
    """The loop with a handler that raises, the first time that it is asked."""
    raised = []

    def fail(state):
        if not raised:
            raised.append(True)
            raise Stop

    return loop.handle(event, fail, filter, name="fail")


def whole(state):
    return state


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        return nn.Dense(3)(nn.Dropout(0.3, deterministic=not train)(nn.relu(x)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
        self.drop, self.norm = nnx.Dropout(0.3, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)

    def __call__(self, x):
        return self.second(self.drop(nnx.relu(self.norm(self.first(x)))))


TRAINERS = {
    "linen": lambda: jl.trainer(Linen(), LOSS, optax.adam(0.1), log=0),
    "nnx": lambda: jl.trainer(Nnx(nnx.Rngs(0)), LOSS, optax.adamw(0.1), log=0),
    "scaled": lambda: jl.trainer(
        Linen(),
        LOSS,
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(1, 0, 9))),
        loss_scale="dynamic",
        log=0,
    ),
}


@pytest.mark.parametrize(
    "kind", [*(pytest.param(k, marks=pytest.mark.slow) for k in ("linen", "scaled")), "nnx"]
)
def test_everything_is_in_the_checkpoint(kind, tmp_path):
    loop = (
        TRAINERS[kind]()
        .metric("accuracy")
        .validate(jl.batches((X, Y), 16), event="iteration_completed", filter=jl.every(3))
        .reduce_lr_on_plateau(
            "validation_loss",
            event="iteration_completed",
            filter=jl.every(3),
            patience=1,
            cooldown=1,
            factor=0.5,
        )
        .early_stop("loss", patience=50, restore_best=True)
        .checkpoint(tmp_path / "b", criteria="loss")
    )
    undisturbed = loop.run(BATCHES, epochs=3, output_transform=whole)
    shutil.rmtree(tmp_path / "b")
    # It fails in the middle of an epoch, between two validations.
    saving = loop.checkpoint(tmp_path / "a", event="iteration_completed", filter=jl.every(4))
    with pytest.raises(Stop):
        fail_once(saving, "iteration_completed", jl.only(10)).run(BATCHES, epochs=3)
    resumed = (
        loop.checkpoint(tmp_path / "a", event="iteration_completed", filter=jl.every(4))
        .resume(tmp_path / "a")
        .run(BATCHES, epochs=3, output_transform=whole)
    )
    assert digest(resumed) == digest(undisturbed)
    chex.assert_trees_all_equal_structs(resumed.step_state, undisturbed.step_state)
    # Good for going on with, and for nothing at all: ended, it stays ended.
    again = saving.resume(tmp_path / "a").run(BATCHES, epochs=3, output_transform=whole)
    assert digest(again) == digest(undisturbed) and again.times.keys() == {0, 1, 2}


def test_values_that_handlers_remember_come_back_as_they_were(tmp_path):
    memory = {
        "numbers": (1, 2.5, None, True, float("nan"), np.float32(3.0), np.int64(4)),
        "text": ["a", b"\x00bytes"],
        "arrays": {3: np.arange(5, dtype=np.int16), 4: np.arange(4000.0).reshape(40, 100)},
        "device": jnp.arange(3, dtype=jnp.bfloat16),
        "key": jax.random.key(7, impl="rbg"),
        "keys": jax.random.split(jax.random.key(1), 3),
        "empty": {},
    }

    def remember(state):
        return "continue", state.replace(handler_state={**state.handler_state, "mine": memory})

    loop = jl.loop(step).handle("started", remember).checkpoint(tmp_path)
    first = loop.run([np.float32(1)], 0.0)
    for state in (
        jl.restore(tmp_path),
        jl.deserialize_state(jl.serialize_state(first), like=first),
    ):
        back = state.handler_state["mine"]
        assert all(back["arrays"][i].flags.writeable for i in (3, 4))
        assert repr(back) == repr(memory)
        chex.assert_trees_all_equal(
            jax.tree.map(lambda a, b: type(a) is type(b) or isinstance(a, jax.Array), back, memory),
            jax.tree.map(lambda _: True, memory),
        )


class Moments(eqx.Module):
    mean: jax.Array
    unit: str = eqx.field(static=True)


@chex.dataclass
class Chex:
    a: jax.Array
    b: object = None


def train_state():
    params = nn.Dense(3).init(jax.random.key(0), X)["params"]
    return TrainState.create(apply_fn=nn.Dense(3).apply, params=params, tx=optax.adamw(0.1))


STATES = {
    "one array": lambda: jnp.float32(2),
    "flax's train state": train_state,
    "nnx state": lambda: nnx.split(Nnx(nnx.Rngs(0)))[1],
    "equinox module": lambda: {"m": Moments(jnp.ones(3), "m"), "o": optax.EmptyState()},
    "chex dataclass": lambda: (Chex(a=jnp.ones(3), b=[None, ()]), {}),
    "keys of any kind": lambda: {"a/b": 2, "a": {0: 3, 10: 1.0, 9: 2}, "": 4},
    "no elements": lambda: Chex(a=jnp.zeros((0, 3)), b=(jnp.zeros((2, 0), jnp.bfloat16), 1.5)),
    "small and large": lambda: [
        jnp.ones(3, t) for t in ("int4", "float8_e4m3fn", "bfloat16", "bool", "complex64")
    ],
    "random keys": lambda: [jax.random.split(jax.random.key(3, impl="rbg"), (2, 3))],
}


@pytest.mark.parametrize("kind", STATES)
def test_any_step_state_comes_back_as_it_was(kind, tmp_path):
    start = STATES[kind]()
    state = jl.loop(lambda batch, state: state).checkpoint(tmp_path).run([1.0], start)
    for back in (
        jl.restore(tmp_path, like=start),
        jl.deserialize_state(jl.serialize_state(state), like=state),
        jl.restore(tmp_path, like=jl.loop(lambda b, s: s).run([1.0], start, epochs=0)),
    ):
        assert digest(back) == digest(state)
        assert jax.tree.structure(back.step_state) == jax.tree.structure(state.step_state)
    plain = jax.tree.leaves(jl.restore(tmp_path).step_state)
    described = lambda leaves: sorted((str(x.dtype), x.shape) for x in leaves)  # noqa: E731
    assert described(plain) == described(jax.tree.leaves(state.step_state))


def test_what_cannot_be_kept_is_an_error_that_says_where(tmp_path):
    state = optax.adam(0.1).init(jnp.zeros(2))

    def remember(one):
        return "continue", one.replace(handler_state={"mine": {"inner": [0, state]}})

    loop = jl.loop(step).handle("epoch_completed", remember).checkpoint(tmp_path)
    with pytest.raises(SerializationError, match=r"handler_state\['mine'\]\['inner'\]\[1\]"):
        loop.run([np.float32(1)], 0.0)


def test_arrays_that_are_spread_come_back_where_they_belong(tmp_path):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec("d"))
    data = [np.float32(i) for i in range(6)]
    start = jax.device_put(np.arange(8, dtype=np.float32), spread)
    saving = MEAN.checkpoint(tmp_path, event="iteration_completed", filter=jl.every(2))
    undisturbed = MEAN.run(data, start, epochs=2)
    with pytest.raises(Stop):
        fail_once(saving, "iteration_completed", jl.only(9)).run(data, start, epochs=2)
    resumed = saving.resume(tmp_path).run(data, start, epochs=2)
    assert digest(resumed) == digest(undisturbed)
    assert resumed.step_state.sharding.is_equivalent_to(spread, 1)
    by_hand = jl.restore(tmp_path, like=jax.ShapeDtypeStruct((8,), np.float32, sharding=spread))
    assert by_hand.step_state.sharding.is_equivalent_to(spread, 1)
    # Without anything to go by, on one device.
    assert len(jl.restore(tmp_path).step_state.sharding.device_set) == 1


# --- which are kept ---


def names(path):
    return sorted(int(folder.name) for folder in Path(path).iterdir() if folder.is_dir())


def test_the_newest_the_best_and_every_nth_are_kept(tmp_path):
    values = [5.0, 4.0, 6.0, 3.0, 7.0, 8.0, 9.0, 10.0]
    data = lambda epoch: [np.float32(values[epoch])]  # noqa: E731
    MEAN.checkpoint(tmp_path / "plain", keep=2).run(data, 0.0, epochs=8)
    assert names(tmp_path / "plain") == [7, 8]
    MEAN.checkpoint(tmp_path / "nth", keep=1, keep_every=3).run(data, 0.0, epochs=8)
    assert names(tmp_path / "nth") == [3, 6, 8]
    # Saved at 1, 2 and 4, when it was the best, and at the end.
    MEAN.checkpoint(tmp_path / "best", criteria="mean", mode="min", keep=1, keep_best=2).run(
        data, 0.0, epochs=8
    )
    assert names(tmp_path / "best") == [2, 4, 8]
    MEAN.checkpoint(tmp_path / "all", criteria="mean", mode="min", keep=None).run(
        data, 0.0, epochs=8
    )
    assert names(tmp_path / "all") == [1, 2, 4, 8]
    assert jl.restore(tmp_path / "best", "best").step == 4
    assert jl.restore(tmp_path / "best").step == 8
    assert jl.restore(tmp_path / "best", 2).history == {0: {"mean": 5.0}, 1: {"mean": 4.0}}


def test_a_run_that_starts_anew_where_checkpoints_are_says_so(tmp_path, caplog):
    loop = MEAN.checkpoint(tmp_path)
    loop.run([np.float32(1)], 0.0)
    loop.resume(tmp_path).run([np.float32(1)], 0.0, epochs=2)
    assert not caplog.records
    loop.run([np.float32(1)], 0.0)
    (record,) = caplog.records
    assert f"{tmp_path} has 2 checkpoints of an earlier run (2 ...)" in record.getMessage()


def test_restore_says_what_is_there(tmp_path):
    MEAN.checkpoint(tmp_path).run([np.float32(1)], 0.0, epochs=2)
    with pytest.raises(CheckpointError, match=r"1 \(step 1\)"):
        jl.restore(tmp_path, 7)
    with pytest.raises(CheckpointError, match="none"):
        jl.restore(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="which"):
        jl.restore(tmp_path, "newest")


def test_restore_without_the_loop_gives_plain_containers(tmp_path):
    loop = TRAINERS["linen"]().checkpoint(tmp_path)
    variables = loop.run(BATCHES, epochs=1)
    state = jl.restore(tmp_path)
    chex.assert_trees_all_equal(state.step_state["model_state"]["params"], variables["params"])
    assert state.step_state["key"].dtype == jax.random.key(0).dtype
    assert state.epoch == 1 and state.status == "completed"


@pytest.mark.parametrize(
    "arguments, error",
    [
        ({"keep": 0}, "keep must be at least 1"),
        ({"keep": True}, "whole number"),
        ({"keep_best": -1}, "keep_best"),
        ({"keep_every": 0}, "keep_every"),
    ],
)
def test_retention_is_checked_at_once(arguments, error):
    with pytest.raises(jl.JaxloopError, match=error):
        MEAN.checkpoint("never", **arguments)
    assert not Path("never").exists()


# --- damage ---


@pytest.fixture
def saved(tmp_path):
    """A folder with the checkpoints of steps 2, 3 and 4, and the values after each step."""
    folder = tmp_path / "saved"
    data = [np.float32(i) for i in (1, 2, 3, 4)]
    MEAN.checkpoint(folder, event="iteration_completed").run(data, 0.0)
    return folder, {2: 2.5, 3: 4.25, 4: 6.125}


def largest(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "truncated array": lambda folder: truncate(largest(folder / "step_state")),
    "no arrays": lambda folder: shutil.rmtree(folder / "step_state"),
    "no manifest": lambda folder: (folder / "step_state" / "manifest.ocdbt").unlink(),
    "truncated record": lambda folder: truncate(folder / "meta" / "metadata"),
    "altered record": lambda folder: (folder / "meta" / "metadata").write_text(
        (folder / "meta" / "metadata").read_text().replace('"step": 4', '"step": 5')
    ),
    "no record": lambda folder: (folder / "meta" / "metadata").unlink(),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.filterwarnings("ignore:coroutine")
def test_a_damaged_checkpoint_is_passed_over_and_named(kind, saved):
    folder, values = saved
    DAMAGE[kind](folder / "4")
    with pytest.warns(UserWarning, match=rf"{folder}/4 is damaged and skipped: \w"):
        state = jl.restore(folder)
    assert state.step == 3 and float(state.step_state) == values[3]
    with pytest.warns(UserWarning, match=f"{folder}/4 is damaged"):
        resumed = MEAN.resume(folder).run([np.float32(i) for i in (1, 2, 3, 4)], 0.0)
    assert float(resumed.step_state) == values[4] and resumed.step == 4


def test_a_device_without_room_is_no_damage(saved, monkeypatch):
    import orbax.checkpoint as ocp

    def restore(self, *args, **settings):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(ocp.Checkpointer, "restore", restore)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        MEAN.resume(saved[0]).run([np.float32(1)], 0.0)
    assert names(saved[0]) == [2, 3, 4]


def test_a_half_written_checkpoint_is_passed_over_and_named(saved):
    folder, values = saved
    shutil.copytree(folder / "4", folder / "5.orbax-checkpoint-tmp")
    (folder / "2").rename(folder / "2.abc.deleted")
    (folder / "3").rename(folder / "3.replaced")
    with pytest.warns(UserWarning, match=f"{folder}/5 was still being written"):
        state = MEAN.resume(folder).run([np.float32(9)] * 5, 0.0)
    assert state.step == 4 and float(state.step_state) == values[4]  # it had ended
    # Reading changes nothing. The next run that writes there restores what was being replaced.
    assert len(list(folder.iterdir())) == 4
    with pytest.warns(UserWarning, match=f"{folder}/5 was still being written"):
        MEAN.checkpoint(folder, keep=9).resume(folder).run([np.float32(9)] * 5, 0.0, epochs=2)
    assert names(folder) == [3, 4, 9]


def test_a_replacement_that_was_cut_short_loses_nothing(saved):
    folder, values = saved
    (folder / "4").rename(folder / "4.replaced")
    assert jl.restore(folder).step == 4
    shutil.copytree(folder / "3", folder / "4.orbax-checkpoint-tmp-7")
    with pytest.warns(UserWarning, match="still being written"):
        assert float(MEAN.resume(folder).run([1], 0.0).step_state) == values[4]


def test_a_checkpoint_of_another_model_lists_the_leaves(tmp_path):
    small = jl.trainer(nn.Dense(3), LOSS, optax.adam(0.1), log=0).checkpoint(tmp_path)
    small.run(BATCHES)
    before = names(tmp_path)
    other = jl.trainer(nn.Dense(3, use_bias=False), LOSS, optax.sgd(0.1, 0.9), log=0)
    with pytest.raises(SerializationError, match=r"another model or optimizer.*bias.*missing here"):
        other.resume(tmp_path).run(BATCHES)
    wider = jl.trainer(nn.Dense(5), LOSS, optax.adam(0.1), log=0).resume(tmp_path)
    with pytest.raises(SerializationError, match=r"float32\[4,3\] there and float32\[4,5\] here"):
        wider.run(BATCHES)
    assert names(tmp_path) == before


def test_a_later_format_is_an_error_and_not_damage(saved):
    folder, _ = saved
    from jaxloop._checkpoint.record import checksum

    path = folder / "4" / "meta" / "metadata"
    record = json.loads(path.read_text()) | {"format": 99}
    path.write_text(json.dumps(record | {"sha256": checksum(record)}))
    with pytest.raises(SerializationError, match="format 99"):
        jl.restore(folder)


KEPT = Path(__file__).parent / "data" / "checkpoint_format_1"


def kept_loop():
    """What wrote `KEPT`, by ``.checkpoint(KEPT, event="iteration_completed", filter=jl.only(5))``.

    It failed at step 6 of `KEPT_DATA`.
    """

    def init(batch, _):
        return {
            "w": jnp.full((4, 3), 0.5),
            "opt": optax.adam(0.1).init(jnp.zeros(3)),
            "key": jax.random.key(5),
            "half": jnp.ones(2, jnp.bfloat16),
        }

    def advance(batch, s):
        key, sub = jax.random.split(s["key"])
        noise = jnp.sum(batch[0]) + jax.random.uniform(sub)
        return jl.emit({**s, "w": s["w"] + noise, "key": key}, loss=noise)

    return (
        jl.loop(advance, init)
        .metric(lambda loss: loss, "loss", None, ["loss"])
        .early_stop("loss", mode="min", patience=9, restore_best=True)
    )


KEPT_DATA = jl.batches((np.arange(24, dtype=np.float32).reshape(12, 2),), 4, shuffle=True, seed=1)


def test_a_checkpoint_of_format_1_is_restored_for_ever_after(tmp_path):
    shutil.copytree(KEPT, tmp_path / "kept")
    undisturbed = kept_loop().run(KEPT_DATA, epochs=3)
    resumed = kept_loop().resume(tmp_path / "kept").run(KEPT_DATA, epochs=3)
    assert resumed.step == 9 and sorted(resumed.history) == [0, 1, 2]
    # Another processor may round otherwise.
    np.testing.assert_allclose(resumed.step_state["w"], undisturbed.step_state["w"], rtol=1e-5)
    state = jl.restore(KEPT, 5)
    assert (state.epoch, state.iteration, state.status) == (1, 1, "running")
    assert state.step_state["half"].dtype == jnp.bfloat16
    assert jax.dtypes.issubdtype(state.step_state["key"].dtype, jax.dtypes.prng_key)
    assert set(state.handler_state["early_stop_loss"]) == {
        "best",
        "count",
        "cooldown",
        "step_state",
    }
    assert state.history[0].keys() == {"loss"} and state.times[0] > 0


KEPT_TRAINER = Path(__file__).parent / "data" / "trainer_format_2"


def test_a_trainer_of_format_2_continues_with_its_optimizer_and_its_scale(tmp_path):
    shutil.copytree(KEPT_TRAINER, tmp_path / "kept")
    loop, data = kept_trainer.loop(), kept_trainer.DATA
    first = loop.run(data, epochs=0, output_transform=lambda state: state)
    plain = jl.restore(KEPT_TRAINER)  # in plain containers, as it was saved
    state = jl.restore(KEPT_TRAINER, like=first)
    assert jax.tree.structure(state.step_state) == jax.tree.structure(first.step_state)
    assert (state.epoch, state.step, int(state.step_state["num_steps"])) == (2, 8, 0)
    assert float(state.step_state["learning_rate_scale"]) == 0.5
    saved, scale = plain.step_state["optimizer_state"]
    assert float(jax.tree.leaves(scale)[0]) == 0.5
    for a, b in zip(
        jax.tree.leaves(state.step_state["optimizer_state"]), jax.tree.leaves(saved), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    again = jl.deserialize_state(jl.serialize_state(state), like=first)
    assert int(again.step_state["optimizer_state"][0].count) == 8
    resumed = loop.resume(tmp_path / "kept").run(
        data, epochs=4, output_transform=lambda state: state
    )
    assert resumed.step == 12 and sorted(resumed.history) == [0, 1, 2, 3]
    assert int(resumed.step_state["optimizer_state"][0].count) == 12


# --- where it was in the data ---


class Plain:
    """A re-iterable that counts what was read of it."""

    def __init__(self, num=7):
        self.num, self.read = num, 0

    def __iter__(self):
        for i in range(self.num):
            self.read += 1
            yield np.full(2, i, np.float32)


class Own:
    """An iterator with a state of its own, which it goes on changing."""

    def __init__(self, num, epoch=0):
        self._at = {"next": 0, "epoch": epoch, "kept": np.arange(3)}
        self.num, self.read = num, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self._at["next"] >= self.num:
            raise StopIteration
        self._at["next"] += 1
        self.read += 1
        return np.full(2, 10 * self._at["epoch"] + self._at["next"], np.float32)

    def get_state(self):
        return self._at

    def set_state(self, state):
        assert isinstance(state["kept"], np.ndarray)
        self._at = dict(state)


class Loader:
    """As torchdata's loaders: the state is the loader's, over epochs, and of a random order."""

    def __init__(self, num=7):
        self.num, self._epoch, self._at, self.read = num, 0, 0, 0
        self._resumed = False

    def state_dict(self):
        return {"epoch": self._epoch, "at": self._at}

    def load_state_dict(self, state):
        self._epoch, self._at, self._resumed = state["epoch"], state["at"], True

    def __iter__(self):
        if not self._resumed:
            self._at = 0
        self._resumed = False
        return self._batches()

    def _batches(self):
        order = np.random.default_rng(self._epoch).permutation(self.num)
        while self._at < self.num:
            self._at += 1
            self.read += 1
            yield np.full(2, order[self._at - 1], np.float32)
        self._epoch, self._at = self._epoch + 1, 0


class Streamed(Plain):
    """As Hugging Face's: a state that was loaded is where every epoch from then on begins."""

    def __init__(self, num=7):
        super().__init__(num)
        self._first = self._next = 0

    def set_epoch(self, epoch):
        raise AssertionError("it is the caller's")

    def state_dict(self):
        return {"next": self._next}

    def load_state_dict(self, state):
        self._first = state["next"]

    def __iter__(self):
        for i in range(self._first, self.num):
            self._next = i + 1
            yield np.full(2, i, np.float32)


KINDS = {
    "batches": lambda: jl.batches(np.arange(28, dtype=np.float32), 4, shuffle=True),
    "device": lambda: jl.batches(np.arange(28, dtype=np.float32), 4, shuffle=True, device=True),
    "re-iterable": Plain,
    "function": lambda: lambda epoch: Plain(5 + epoch),
    "own state": lambda: lambda epoch: Own(5 + epoch, epoch),
    "loader": Loader,
    "streamed": Streamed,
    "iterator": lambda: Own(100),
    "ragged": lambda: [np.ones(4, np.float32), np.full(4, 2.0, np.float32), np.ones(3, np.float32)],
}


@pytest.mark.parametrize("iterations", [None, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fuse", ["auto", 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_where_it_was_in_its_data(kind, fuse, iterations, tmp_path):
    if kind == "iterator":
        iterations = iterations or 7
    arguments = {"epochs": 3, "iterations": iterations, "fuse": fuse}
    undisturbed = MEAN.run(KINDS[kind](), 0.0, **arguments)
    last = undisturbed.step
    for at in (1, 3, 5, last // 2 + 1, last - 1):
        folder = tmp_path / str(at)
        # The newest that saving every second step would leave: the step that fails is not saved.
        saving = MEAN.checkpoint(
            folder, event="iteration_completed", filter=jl.only(max(2, (at - 1) // 2 * 2))
        )
        saving = saving.checkpoint(folder / "epochs")
        with pytest.raises(Stop):
            fail_once(saving, "iteration_completed", jl.only(at)).run(
                KINDS[kind](), 0.0, **arguments
            )
        resumed = MEAN.resume(folder).run(KINDS[kind](), 0.0, **arguments)
        assert digest(resumed) == digest(undisturbed), at
        resumed = MEAN.resume(folder / "epochs").run(KINDS[kind](), 0.0, **arguments)
        assert digest(resumed) == digest(undisturbed), at


def test_data_with_a_state_of_their_own_are_not_read_from_the_beginning(tmp_path):
    saving = MEAN.checkpoint(tmp_path, event="iteration_completed", filter=jl.every(50))
    with pytest.raises(Stop):
        fail_once(saving, "iteration_completed", jl.only(990)).run(Own(1000), 0.0)
    again = Own(1000)
    state = MEAN.resume(tmp_path).run(again, 0.0)
    assert state.step == 1000
    # From the step that was saved on, 950, and at most one stack before it; one sample.
    assert again.read <= 50 + 1 + 64


def test_others_are_skipped_forward_which_is_logged(tmp_path, caplog):
    saving = MEAN.checkpoint(tmp_path, event="iteration_completed", filter=jl.every(3))
    with pytest.raises(Stop):
        fail_once(saving, "iteration_completed", jl.only(12)).run(Plain(), 0.0, epochs=3)
    data = Plain()
    with caplog.at_level(logging.INFO, "jaxloop"):
        MEAN.resume(tmp_path).run(data, 0.0, epochs=3)
    (line,) = [r.getMessage() for r in caplog.records if "read past" in r.getMessage()]
    assert "read past 2 batches of epoch 1 in " in line


def test_a_one_shot_iterator_cannot_be_saved_and_the_error_says_what_can(tmp_path):
    seen = []
    loop = MEAN.checkpoint(tmp_path / "a").observe("all", seen.append)
    with pytest.raises(DataError, match=r"one-shot(.|\n)*get_state"):
        loop.run(iter([np.float32(1)]), 0.0)
    assert not seen and not (tmp_path / "a").exists()
    # As bytes it can be saved, and gone on with elsewhere, but not with an iterator.
    state = MEAN.handle("iteration_completed", lambda s: ("halt_loop", s), jl.only(2)).run(
        iter([np.float32(1)] * 9), 0.0
    )
    again = jl.deserialize_state(jl.serialize_state(state), like=state)
    with pytest.raises(DataError, match="one-shot"):
        MEAN.from_state(again).run(iter([np.float32(1)] * 9), epochs=2, iterations=3)
    assert MEAN.from_state(again).run([np.float32(1)] * 3, epochs=2).step == 5


def test_other_batches_in_the_middle_of_an_epoch_are_an_error(tmp_path):
    data = lambda size: jl.batches(np.arange(24, dtype=np.float32), size)  # noqa: E731
    saving = MEAN.checkpoint(tmp_path, event="iteration_completed", filter=jl.only(2))
    with pytest.raises(Stop):
        fail_once(saving, "iteration_completed", jl.only(3)).run(data(4), 0.0)
    with pytest.raises(DataError, match="batch_size was 4 and is 6"):
        MEAN.resume(tmp_path).run(data(6), 0.0)
    assert MEAN.resume(tmp_path).run(data(4), 0.0).step == 6


def test_grain_goes_on_by_its_own_state(tmp_path):
    import grain

    def data(epoch):
        source = grain.MapDataset.source(np.arange(40, dtype=np.float32)).seed(epoch).shuffle()
        return source.batch(4).to_iter_dataset()

    def iterator():
        return iter(grain.MapDataset.source(np.arange(4000.0, dtype=np.float32)).batch(4))

    for make, arguments in ((lambda: data, {}), (iterator, {"iterations": 10})):
        undisturbed = MEAN.run(make(), 0.0, epochs=3, **arguments)
        shutil.rmtree(tmp_path, ignore_errors=True)
        saving = MEAN.checkpoint(tmp_path, event="iteration_completed", filter=jl.every(4))
        with pytest.raises(Stop):
            fail_once(saving, "iteration_completed", jl.only(19)).run(
                make(), 0.0, epochs=3, **arguments
            )
        resumed = MEAN.resume(tmp_path).run(make(), 0.0, epochs=3, **arguments)
        assert digest(resumed) == digest(undisturbed)


@pytest.mark.filterwarnings("ignore")  # torchdata's own
def test_torchdata_goes_on_by_its_own_state(tmp_path):
    torch = pytest.importorskip("torch")
    loaders = pytest.importorskip("torchdata.stateful_dataloader")

    def data():
        torch.manual_seed(0)  # its random order is in its state, as a tensor
        examples = list(np.arange(40, dtype=np.float32))
        return loaders.StatefulDataLoader(examples, 4, shuffle=True, collate_fn=np.stack)

    undisturbed = MEAN.run(data(), 0.0, epochs=3)
    for at in (3, 17, 20):
        saving = MEAN.checkpoint(
            tmp_path / str(at), event="iteration_completed", filter=jl.every(2)
        )
        with pytest.raises(Stop):
            fail_once(saving, "iteration_completed", jl.only(at)).run(data(), 0.0, epochs=3)
        resumed = saving.resume(tmp_path / str(at)).run(data(), 0.0, epochs=3)
        assert digest(resumed) == digest(undisturbed), at


# --- exceptions ---


def test_a_run_goes_on_from_any_exception_as_if_it_had_not_been(tmp_path):
    """Whatever fails, at whichever call: the firing that was cut short begins again."""
    data = jl.batches(np.arange(20, dtype=np.float32), 4, shuffle=True)
    calls, fails_at = 0, None

    def handler(state):
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise Stop(state.event)
        memory = {"seen": state.handler_state.get("mine", {"seen": 0})["seen"] + 1}
        changed = state.replace(handler_state={**state.handler_state, "mine": memory})
        metrics = {**changed.metrics, "seen": np.float32(memory["seen"])}
        return "continue", changed.replace(metrics=metrics, step_state=state.step_state + 1)

    events = [
        "epoch_started",
        "iteration_started",
        "iteration_completed",
        "epoch_completed",
        "completed",
    ]
    # Two handlers at each firing: the first has done its work when the second fails.
    loop = MEAN.handle(events, handler, name="a").handle(events, handler, name="b")
    undisturbed = digest(loop.run(data, 0.0, epochs=2))
    num_calls = calls
    assert num_calls == 2 * (2 * (2 + 5 * 2) + 1)
    for fails_at in range(1, num_calls + 1):
        calls, folder = 0, tmp_path / str(fails_at)
        saving = loop.checkpoint(folder, filter=jl.only(1), on_exception=True)
        with pytest.raises(Stop) as caught:
            saving.run(data, 0.0, epochs=2)
        calls = -(10**6)
        from_error = loop.from_state(caught.value.loop_state).run(data, epochs=2)
        from_disk = loop.resume(folder).run(data, 0.0, epochs=2)
        expected = undisturbed
        assert digest(from_error) == expected, (fails_at, caught.value.args)
        assert digest(from_disk) == expected, (fails_at, caught.value.args)


def test_the_exception_stays_the_same_when_saving_fails_too(tmp_path, monkeypatch):
    folder = tmp_path / "a"
    seen = []

    def vanish(state):
        shutil.rmtree(folder)
        raise Stop

    loop = (
        MEAN.checkpoint(folder, on_exception=True)
        .observe("iteration_completed", lambda s: seen.append(float(s.metrics["mean"])))
        .handle("iteration_completed", vanish, jl.only(3))
    )
    threads = threading.active_count()
    with pytest.raises(Stop) as caught:
        loop.run([np.float32(i) for i in (1, 2, 3, 4)], 0.0)
    assert any("has vanished" in note for note in caught.value.__notes__)
    assert seen == [1.0, 1.5]  # those before the firing that failed have had their values
    assert threading.active_count() <= threads
    assert caught.value.loop_state.step == 3


def test_a_folder_that_vanishes_or_cannot_be_written_is_a_clear_error(tmp_path):
    folder = tmp_path / "a"

    def vanish(state):
        while not (folder / "2").exists():
            threading.Event().wait(0.01)
        folder.rename(tmp_path / "b")

    loop = MEAN.checkpoint(folder, keep=None).handle("epoch_started", vanish, jl.only(3))
    with pytest.raises(
        CheckpointError, match=r"has vanished\n  fix: make sure that the folder"
    ) as info:
        loop.run([np.float32(1)], 0.0, epochs=4)
    assert names(tmp_path / "b") == [1, 2] and info.value.loop_state.step == 3
    assert not folder.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        MEAN.checkpoint(tmp_path / "file" / "x").run([np.float32(1)], 0.0)


@pytest.mark.parametrize("num_batches", [200, 11])
def test_a_failure_in_the_background_surfaces_at_the_next_block_or_at_the_end(
    num_batches, tmp_path, monkeypatch
):
    import orbax.checkpoint as ocp

    saves, goes_on = ocp.Checkpointer.save, threading.Event()

    def save(self, directory, *args, **settings):
        if Path(directory).name == "10":
            assert goes_on.wait(300)  # so that a fault cannot hang the suite
            raise OSError(28, "No space left on device")
        return saves(self, directory, *args, **settings)

    monkeypatch.setattr(ocp.Checkpointer, "save", save)
    loop = (
        MEAN.checkpoint(tmp_path, event="iteration_completed", filter=jl.every(5))
        .observe("iteration_completed", lambda s: None, jl.every(3))
        # The loop is ahead of the save by now, and one block further on it hears of its end.
        .handle("iteration_started", lambda s: goes_on.set(), jl.only(11))
    )
    threads = threading.active_count()
    with pytest.raises(CheckpointError, match=r"could not be written: .*No space left") as caught:
        loop.run([np.float32(i) for i in range(num_batches)], 0.0)
    # It does not wait for the next save to find out, and never overlooks it.
    assert caught.value.loop_state.step == min(num_batches, 15) or num_batches == 200
    assert 10 <= caught.value.loop_state.step < 200
    assert threading.active_count() <= threads
    assert jl.restore(tmp_path).step == 5


# --- costs ---


def test_a_save_does_not_see_what_the_donated_block_after_it_writes(tmp_path):
    big = np.arange(2**20, dtype=np.float32)

    def add(batch, s):
        return {"a": s["a"] + 1, "b": s["b"] - 1}

    state = {"a": big, "b": -big}
    loop = jl.loop(add).checkpoint(tmp_path, event="iteration_completed", keep=None)
    loop.run([np.float32(0)] * 6, state, fuse=1)
    for step in range(1, 7):
        back = jl.restore(tmp_path, step).step_state
        np.testing.assert_array_equal(back["a"], big + step)
        np.testing.assert_array_equal(back["b"], -big - step)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="it reads /proc")
@pytest.mark.parametrize("epochs", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_checkpoints_leave_nothing_in_memory(epochs, tmp_path):
    loop = MEAN.checkpoint(tmp_path, keep=2)
    data = [np.float32(1)] * 3
    warm = epochs // 2 if epochs < 200 else 100
    for _ in loop.stream(data, 0.0, epochs=warm):
        pass
    before, before_mb = held(), resident_mb()
    loop.resume(tmp_path).run(data, 0.0, epochs=warm + epochs)
    grown_mb = resident_mb() - before_mb
    after = held()
    print(f"{epochs} checkpoints: {grown_mb:.1f} MB")
    # In a short run, the allocator alone decides.
    assert epochs < 1000 or grown_mb < 25
    # The history itself is a few objects an epoch.
    assert after["objects"] - before["objects"] < 10 * epochs
    assert after["threads"] <= before["threads"] and after["files"] <= before["files"] + 2
    assert len(os.listdir(tmp_path)) == 2


def test_the_private_functions_of_orbax_are_there():
    """What is patched exists in the installed version, or that version is not patched."""
    import orbax.checkpoint

    from jaxloop._checkpoint.orbax_io import may_use_private

    for version, tested in {"0.12.4": False, "0.12.5": True, "0.13.0": False, "1.0": False}.items():
        assert may_use_private(version) == tested
    if may_use_private(orbax.checkpoint.__version__):
        from orbax.checkpoint._src.futures import future, synchronization
        from orbax.checkpoint._src.serialization import tensorstore_utils

        assert callable(tensorstore_utils.get_tensorstore_raw_bytes)
        assert callable(synchronization.OperationIdGenerator.get_current_operation_id)
        assert callable(future.set_signals) and callable(future._SignalingThread.cancel)


@pytest.mark.parametrize("path", [None, 3, b"runs", ""])
@pytest.mark.parametrize("method", ["resume", "checkpoint"])
def test_a_path_is_a_path(method, path):
    loop = jl.loop(lambda b, s: s + b)
    with pytest.raises(jl.JaxloopError, match=f"{method}: path must"):
        getattr(loop, method)(path)


def scores(values):
    """A loop whose metric ``score`` is the epoch's value."""
    step = lambda batch, state: jl.emit(state, score=batch)  # noqa: E731  a step
    loop = jl.loop(step).metric(lambda score: score, "score", None, ["score"])
    return loop, lambda epoch: [np.float32(values[epoch])]


def test_the_best_survives_a_folder_that_moves(tmp_path):
    loop, data = scores([1.0, 5.0, 2.0, 4.0])
    best = {"criteria": "score", "mode": "max"}
    loop.checkpoint(tmp_path / "a", **best).run(data, epochs=3)
    (tmp_path / "a").rename(tmp_path / "b")
    moved = loop.checkpoint(tmp_path / "b", **best).resume(tmp_path / "b")
    state = moved.run(data, epochs=4)
    assert float(state.handler_state["checkpoint_score"]["best"]) == 5.0
    assert jl.restore(tmp_path / "b", "best").epoch == 1


def test_a_memory_that_was_named_by_its_path_is_found(tmp_path):
    loop, data = scores([3.0, 2.0])
    old = f"checkpoint_{tmp_path}"
    best = {"criteria": "score", "mode": "max"}

    def as_before(state):
        memory = {old: {"best": np.float64(9.0), "step": 1}}
        return "continue", state.replace(handler_state=memory)

    loop = loop.handle("started", as_before).checkpoint(tmp_path, **best)
    assert loop.run(data, epochs=2).handler_state == {old: {"best": 9.0, "step": 1}}


def test_name_chooses_the_memory_and_two_of_one_name_are_an_error(tmp_path):
    loop, data = scores([1.0])
    loop = loop.checkpoint(tmp_path / "a", criteria="score", mode="min", name="best_score")
    assert "best_score" in loop.run(data).handler_state
    with pytest.raises(ValueError, match="'best_score' and would share a memory"):
        loop.checkpoint(tmp_path / "b", criteria="score", mode="min", name="best_score")
