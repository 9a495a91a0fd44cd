"""The result of a run: `final_state`, `output` and `restore`."""

import inspect

import flax.linen as nn
import numpy as np
import pytest

import jaxloop as jl
from jaxloop._engine.options import RunArguments
from tests.digest import hash_tree


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


@pytest.mark.parametrize("name", ["run", "final_state", "stream", "check"])
def test_help_shows_the_arguments_and_their_defaults(name):
    parameters = inspect.signature(getattr(LOOP, name)).parameters
    shared = {n: p.default for n, p in parameters.items() if n in RunArguments.__annotations__}
    assert shared == {
        "epochs": None,
        "iterations": None,
        "steps": None,
        "jit": True,
        "fuse": "auto",
        "strict": False,
        "debug": False,
    }
    others = ["data", "init_state", *([] if name == "final_state" else ["output_transform"])]
    assert list(parameters) == [*others[:2], *shared, *others[2:]]
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
