"""The environment in a checkpoint's record: a run that resumes elsewhere says so, and runs."""

import json
import shutil
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxloop as jl
from jaxloop._core.environment import environment_of
from jaxloop._engine import fitting
from tests import kept_trainer
from tests.test_strangers import joined, parts

KEPT = Path(__file__).parent / "data"
DATA = [np.ones(3, np.float32)] * 4


def step(batch, total):
    return total + batch.sum()


@pytest.fixture
def elsewhere(monkeypatch):
    """Lets a run believe that it runs with another jaxlib on other devices."""

    def move(**other):
        monkeypatch.setattr(fitting, "environment_of", lambda state: environment_of(state) | other)

    return move


def saved(path, **options):
    """A folder with a checkpoint after each epoch, and the state at the end of the run."""
    return jl.loop(step).checkpoint(path, **options).run(DATA, 0.0, epochs=2)


def test_the_environment_has_versions_and_devices():
    found = environment_of({"w": jax.device_put(np.ones(2), jax.devices()[1])})
    assert found["jax"] == jax.__version__ and found["platform"] == "cpu"
    assert found["device_kind"] == "cpu" and found["num_devices"] == "1"
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(np.ones(4), NamedSharding(mesh, PartitionSpec("x")))
    assert environment_of([spread])["num_devices"] == "4"


def test_a_checkpoint_has_the_environment_of_its_run(tmp_path):
    final = saved(tmp_path)
    state = jl.restore(tmp_path)
    assert state.environment == final.environment == environment_of({})
    (newest, *_) = sorted(tmp_path.glob("[0-9]*"), reverse=True)
    record = json.loads((newest / "meta" / "metadata").read_text())
    assert record["format"] == 5 and record["environment"] == environment_of({})


def test_the_same_environment_warns_of_nothing(tmp_path):
    saved(tmp_path)
    state = jl.loop(step).resume(tmp_path).run(DATA, 0.0, epochs=3)  # warnings are errors
    assert float(state.step_state) == 36


@pytest.mark.parametrize("how", ["resume", "from_state", "bytes"])
def test_another_environment_warns_once_and_runs(tmp_path, elsewhere, how):
    final = saved(tmp_path)
    elsewhere(jaxlib="9.9.9", device_kind="NVIDIA H100")
    loop = jl.loop(step)
    if how == "resume":
        loop = loop.resume(tmp_path)
    elif how == "from_state":
        loop = loop.from_state(final)
    else:
        loop = loop.from_state(jl.deserialize_state(jl.serialize_state(final), like=final))
    with pytest.warns(UserWarning, match="was computed elsewhere") as caught:
        state = loop.run(DATA, 0.0, epochs=4)
    (warning,) = caught
    text = str(warning.message)
    mine = environment_of({})["jaxlib"]
    assert f"jaxlib was {mine} and is 9.9.9; device_kind was cpu and is NVIDIA H100" in text
    assert "num_devices" not in text and "fix: if you need the same bits" in text
    assert float(state.step_state) == 48
    assert state.environment["jaxlib"] == "9.9.9"
    jl.loop(step).from_state(state).run(DATA, epochs=5)  # it is this run's environment by now


def test_a_run_that_has_ended_computes_nothing_and_warns_of_nothing(tmp_path, elsewhere):
    saved(tmp_path)
    elsewhere(jax="9.9.9")
    assert float(jl.loop(step).resume(tmp_path).run(DATA, 0.0, epochs=2).step_state) == 24


def test_a_state_of_several_devices_is_not_that_of_one(elsewhere):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(np.zeros(4, np.float32), NamedSharding(mesh, PartitionSpec("x")))
    loop = jl.loop(lambda batch, total: total + batch)
    state = loop.run([np.ones(4, np.float32)], spread)
    assert state.environment["num_devices"] == "2"
    one = state.replace(step_state=np.asarray(state.step_state))
    with pytest.warns(UserWarning, match="num_devices was 2 and is 1"):
        loop.from_state(one).run([np.ones(4, np.float32)], epochs=2)


@pytest.mark.parametrize("kept", ["checkpoint_format_1", "trainer_format_2", "trainer_format_3"])
def test_earlier_formats_have_no_environment(kept):
    (file,) = (KEPT / kept).glob("*/meta/metadata")
    assert json.loads(file.read_text())["format"] == int(kept[-1])
    state = jl.restore(KEPT / kept)
    assert state.environment == {}
    assert fitting.compared_environment(state, state.step_state)["platform"] == "cpu"  # no warning


@pytest.mark.slow
def test_a_trainer_of_format_3_ends_as_it_would_have(tmp_path):
    shutil.copytree(KEPT / "trainer_format_3", tmp_path / "kept")
    options = {"epochs": 4, "output_transform": lambda state: state}
    whole = kept_trainer.loop().run(kept_trainer.DATA, **options)
    resumed = kept_trainer.loop().resume(tmp_path / "kept").run(kept_trainer.DATA, **options)
    jax.tree.map(  # another processor may round otherwise
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        jax.tree.map(_numbers, resumed.step_state),
        jax.tree.map(_numbers, whole.step_state),
    )
    for epoch, metrics in whole.history.items():
        np.testing.assert_allclose(resumed.history[epoch]["loss"], metrics["loss"], rtol=1e-5)
    assert resumed.environment == environment_of({})  # and nothing was warned of


def _numbers(leaf):
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


@pytest.mark.parametrize("value", [None, 3, ["jax"], {"jax": 1}, {"jax": None}])
def test_an_environment_that_jaxloop_never_writes_is_damage(value):
    data = jl.serialize_state(jl.loop(step).run(DATA, 0.0))
    record, content = parts(data)
    raw = joined(record | {"environment": value}, content)
    with pytest.raises(jl.errors.DamagedError, match="environment"):
        jl.deserialize_state(raw, like=np.float32(0))


def test_a_long_or_unknown_environment_is_short_in_the_warning():
    state = jl.loop(step).run(DATA, 0.0)
    record, content = parts(jl.serialize_state(state))
    raw = joined(record | {"environment": {"jax": "9" * 10**5, "weather": "bad"}}, content)
    strange = jl.deserialize_state(raw, like=np.float32(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jl.loop(step).from_state(strange).run(DATA, epochs=2)
    (text,) = [str(one.message) for one in caught]
    assert len(text) < 500 and "weather" not in text
