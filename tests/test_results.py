"""The result of a run: `final_state`, `output` and `restore`."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxloop as jl
from jaxloop._engine.options import RunArguments
from tests.digest import digest, hash_tree


def step(batch, total):
    return jl.emit(0.5 * total + batch, x=batch)


LOOP = jl.loop(step, output_transform=lambda state: float(state.step_state))
LOOP = LOOP.metric(lambda x: x, "mean", None, ["x"])
DATA = [1.0, 2.0, 4.0]

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(40, 3)).astype(np.float32), RNG.integers(0, 2, 40).astype(np.int32)
BATCHES = jl.batches((X, Y), 8, shuffle=True)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(nn.Dense(4)(x)))


TRAINER = jl.trainer(Net(), "softmax_cross_entropy_with_integer_labels", "adam", log=0)
TRAINER = TRAINER.metric("accuracy")


# --- the arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run", "final_state", "stream", "check", "replay"])
def test_help_shows_the_arguments_and_their_defaults(name):
    parameters = inspect.signature(getattr(LOOP, name)).parameters
    shared = {n: p.default for n, p in parameters.items() if n in RunArguments.__annotations__}
    assert shared == {
        "epochs": None,
        "iterations": None,
        "steps": None,
        "max_time": None,
        "jit": True,
        "fuse": "auto",
        "strict": False,
        "debug": False,
    }
    before = ["path", "step", "data"] if name == "replay" else ["data", "init_state"]
    after = {"replay": ["init_state"], "final_state": []}.get(name, ["output_transform"])
    assert list(parameters) == [*before, *shared, *after]
    assert all(type(p.annotation) is str for p in parameters.values())


@pytest.mark.parametrize("name", ["run", "final_state", "stream", "check"])
def test_an_unknown_argument(name):
    with pytest.raises(TypeError, match="unknown argument 'epoch'; did you mean 'epochs'"):
        getattr(LOOP, name)(DATA, 0.0, epoch=3)
    if name == "final_state":
        with pytest.raises(TypeError, match="unknown argument 'output_transform'"):
            LOOP.final_state(DATA, 0.0, output_transform=str)


# --- final_state and output ----------------------------------------------------------------------


def test_the_final_state_and_its_output():
    state = LOOP.final_state(DATA, 0.0, epochs=2)
    assert isinstance(state, jl.State) and state.status == "completed"
    assert (sorted(state.history), sorted(state.times)) == ([0, 1], [0, 1])
    assert LOOP.output(state) == LOOP.run(DATA, 0.0, epochs=2) == float(state.step_state)
    assert [LOOP.output(s) for s in LOOP.stream(DATA, 0.0, epochs=2)][-1] == LOOP.output(state)
    assert LOOP.final_state(DATA, 3.0, epochs=0).step == 0


def test_the_output_of_a_trainer_is_the_model_state():
    loop = TRAINER.validate(BATCHES)
    state = loop.final_state(BATCHES, epochs=2)
    assert hash_tree(loop.output(state)) == hash_tree(loop.run(BATCHES, epochs=2))


def test_without_a_transform_the_output_is_the_state():
    loop = jl.loop(step)
    state = loop.final_state(DATA, 0.0)
    assert loop.output(state) is state


def test_the_output_is_made_from_the_best_step_state(tmp_path):
    def worse(state):
        return "continue", state.replace(metrics={**state.metrics, "score": -state.epoch})

    loop = LOOP.handle("epoch_completed", worse)
    loop = loop.early_stop("score", mode="max", patience=5, restore_best=True)
    loop = loop.checkpoint(tmp_path)
    state = loop.final_state(DATA, 0.0, epochs=3)
    best = LOOP.run(DATA, 0.0, epochs=1)
    assert float(state.step_state) != best
    assert loop.output(state) == loop.run(DATA, 0.0, epochs=3) == best
    assert loop.output(jl.restore(tmp_path, like=state)) == best
    assert loop.output(loop.restore(tmp_path, data=DATA, init_state=0.0)) == best


def test_the_output_of_a_terminated_run():
    import signal

    def send(state):
        signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(jl.Terminated) as ended:
            LOOP.handle("epoch_completed", send).final_state(DATA, 0.0, epochs=3)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert LOOP.output(ended.value.state) == LOOP.run(DATA, 0.0)


def test_the_output_needs_a_state():
    with pytest.raises(jl.errors.ArgumentTypeError, match=r"output: state must be a jl.State, got"):
        LOOP.output({"w": 1})


def test_an_error_in_the_transform_has_the_state():
    def fail(state):
        raise ValueError("no")

    loop = jl.loop(step, output_transform=fail)
    state = loop.final_state(DATA, 0.0)
    with pytest.raises(ValueError, match="no") as caught:
        loop.output(state)
    assert caught.value.loop_state is state


# --- restore -------------------------------------------------------------------------------------


class Iterator:
    """An iterator whose position can be saved."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        return X[:8], Y[:8]

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of checkpoints, and the final state of the run that wrote it."""
    path = tmp_path_factory.mktemp("saved")
    loop = TRAINER.validate(BATCHES).checkpoint(path, criteria="validation_loss", mode="min")
    loop = loop.checkpoint(path)
    return path, loop.final_state(BATCHES, epochs=3)


@pytest.mark.parametrize(
    "data",
    [BATCHES, [(X[:8], Y[:8])], lambda epoch: BATCHES],
    ids=["batches", "list", "function"],
)
def test_restore_takes_the_structure_from_the_loop(saved, data):
    path, final = saved
    state = TRAINER.restore(path, data=data)
    assert digest(state) == digest(final)
    assert jax.tree.structure(state.step_state) == jax.tree.structure(final.step_state)
    assert hash_tree(TRAINER.output(state)) == hash_tree(TRAINER.output(final))
    again = TRAINER.from_state(state).final_state(BATCHES, epochs=4)
    assert again.epoch == 4


def test_restore_the_best_and_a_step(saved):
    path, _ = saved
    best = TRAINER.restore(path, "best", data=BATCHES)
    assert digest(best) == digest(jl.restore(path, "best", like=best))
    assert TRAINER.restore(path, 5, data=BATCHES).step == 5
    with pytest.raises(jl.errors.CheckpointError, match="no good checkpoint for 4"):
        TRAINER.restore(path, 4, data=BATCHES)
    with pytest.raises(jl.errors.ArgumentError, match="which must be 'latest', 'best' or a step"):
        TRAINER.restore(path, "newest", data=BATCHES)


def test_restore_compiles_and_runs_nothing(saved):
    path, _ = saved
    fresh = jl.trainer(Net(), "softmax_cross_entropy_with_integer_labels", "adam", log=0)
    compiled = []

    def count(name, *args, **kwargs):
        if "backend_compile" in name:
            compiled.append(kwargs.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        fresh.restore(path, data=BATCHES)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert not compiled


def test_restore_consumes_no_batch(saved):
    path, final = saved
    data = Iterator()
    assert digest(TRAINER.restore(path, data=data)) == digest(final)
    assert data.at == 0
    with pytest.raises(jl.errors.DataError, match="got a one-shot iterator, which would lose"):
        TRAINER.restore(path, data=iter([(X[:8], Y[:8])]))
    with pytest.raises(jl.errors.DataError, match="got empty data"):
        TRAINER.restore(path, data=[])


def test_restore_without_an_init_function(tmp_path):
    loop = jl.loop(lambda batch, state: {"a": state["a"] + batch, "b": (state["b"][0],)})
    first = {"a": 0.0, "b": (1.0,)}
    final = loop.checkpoint(tmp_path).final_state(DATA, first)
    state = loop.restore(tmp_path, init_state=first)
    assert jax.tree.structure(state.step_state) == jax.tree.structure(final.step_state)
    assert digest(state) == digest(final)
    # Without a first state either, classes and tuples are not known.
    assert loop.restore(tmp_path).step_state == {"a": 7.0, "b": [1.0]}


def test_restore_with_an_init_function_that_reads_values(tmp_path):
    def init(batch, scale):
        return {"w": jnp.zeros(int(jnp.max(batch))), "scale": scale}

    data = [np.array([3.0], np.float32)]
    loop = jl.loop(lambda batch, state: {**state, "w": state["w"] + batch}, init)
    final = loop.checkpoint(tmp_path).final_state(data, np.float32(2), jit=False)
    assert digest(loop.restore(tmp_path, data=data, init_state=np.float32(2))) == digest(final)

    traced = jl.loop(lambda b, s: s + b[0], lambda b, s: jnp.where(b[0] > 1, b[0], 0.0) * 1)
    other = traced.checkpoint(tmp_path / "other").final_state(data)
    assert digest(traced.restore(tmp_path / "other", data=data)) == digest(other)


def test_restore_says_that_the_init_function_needs_data(saved):
    path, _ = saved
    with pytest.raises(jl.errors.DataError) as caught:
        TRAINER.restore(path)
    assert "if it needs one, pass data=" in "".join(caught.value.__notes__)


def test_restore_of_another_model(saved):
    path, _ = saved
    other = jl.trainer(nn.Dense(2), "softmax_cross_entropy_with_integer_labels", "adam", log=0)
    with pytest.raises(jl.errors.SerializationError, match="Dense_0"):
        other.restore(path, data=BATCHES)


# --- checkpoint(resume=True) ---------------------------------------------------------------------


def test_checkpoint_and_resume_in_one_call(tmp_path):
    def loop(path):
        return TRAINER.checkpoint(path, resume=True)

    whole = loop(tmp_path / "a").final_state(BATCHES, epochs=3)
    loop(tmp_path / "b").run(BATCHES, epochs=2)
    assert digest(loop(tmp_path / "b").final_state(BATCHES, epochs=3)) == digest(whole)
    assert loop(tmp_path).resume_path == TRAINER.resume(tmp_path).resume_path
    assert TRAINER.checkpoint(tmp_path).resume_path is None
    with pytest.raises(jl.errors.ArgumentTypeError, match="resume must be True or False"):
        TRAINER.checkpoint(tmp_path, resume="runs/a")
