"""nan_guard: halt, skip and rewind."""

import logging
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import jaxloop as jl
from tests.digest import digest

DATA = [np.float32(i) for i in range(1, 13)]
BAD = [*DATA[:4], np.float32("nan"), *DATA[5:7], np.float32("inf"), *DATA[8:]]


def step(batch, state):
    key, _ = jax.random.split(state["key"])
    new = {**state, "sum": state["sum"] + batch, "w": state["w"] * 0.5 + batch, "key": key}
    return jl.emit({**new, "best": jnp.minimum(state["best"], batch)}, x=batch)


def start():
    # An infinite number, as best values are before the first, and a key of its own dtype.
    return {"sum": 0.0, "w": jnp.zeros(3), "best": jnp.inf, "key": jax.random.key(0)}


MEAN = jl.loop(step).metric(lambda x: x, "mean", None, ["x"])


@pytest.mark.parametrize("fuse", ["auto", 1])
def test_skip_leaves_state_and_metrics_unchanged_and_counts(fuse):
    good = [x for x in BAD if np.isfinite(x)]
    loop = MEAN.nan_guard("skip")
    state = loop.run(BAD, start(), epochs=2, fuse=fuse)
    expected = MEAN.run(good, start(), epochs=2, fuse=1)
    for name in ("sum", "w", "best"):
        np.testing.assert_allclose(state.step_state[name], expected.step_state[name], rtol=1e-6)
    for epoch in (0, 1):
        assert int(state.history[epoch]["skipped_steps"]) == 2
        np.testing.assert_allclose(state.history[epoch]["mean"], np.mean(good), rtol=1e-6)
    assert state.step == 24 and state.status == "completed"
    assert int(loop.run(DATA, start()).history[0]["skipped_steps"]) == 0


def test_skip_costs_no_wait_and_no_block():
    from jaxloop._program.block import Program

    blocks = []
    run = Program.run

    def counted(self, carry, source, start, bound, length):
        blocks.append(int(bound))
        return run(self, carry, source, start, bound, length)

    # Of data on the device, no block is short because a batch came late.
    data = jl.batches(np.array(BAD), 1, device=True)
    loop = jl.loop(lambda batch, state: step(batch[0], state)).nan_guard("skip")
    loop.run(data, start(), fuse=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "run", counted)
        loop.run(data, start(), fuse=4)
    assert blocks == [4, 4, 4]


def test_skip_reads_a_loss_of_any_structure():
    def step(batch, state):
        losses = {"a": batch, "parts": (batch[None], 1), "none": None}
        return jl.emit(state + 1, loss=losses)

    state = jl.loop(step).nan_guard("skip").run(BAD, jnp.int32(0))
    assert int(state.step_state) == 10 and int(state.history[0]["skipped_steps"]) == 2


def test_skip_in_a_trainer_with_a_mask_and_a_validation():
    x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    y = (np.arange(50) % 3).astype(np.int32)
    spoilt = x.copy()
    spoilt[7] = np.nan
    loss = optax.softmax_cross_entropy_with_integer_labels
    loop = (
        jl.trainer(nn.Dense(3), loss, optax.adam(0.1), log=0)
        .metric("accuracy")
        .nan_guard("skip")
        .validate(jl.batches((x, y), 16, pad=True))
    )
    state = loop.run(
        jl.batches((spoilt, y), 16, pad=True), epochs=3, output_transform=lambda state: state
    )
    for metrics in state.history.values():
        assert metrics["skipped_steps"] == 1
        assert metrics.keys() == {
            "loss",
            "accuracy",
            "skipped_steps",
            "validation_loss",
            "validation_accuracy",
        }
        assert all(np.isfinite(value) for value in metrics.values())


def test_halt_keeps_the_last_good_checkpoint(tmp_path, caplog):
    loop = MEAN.checkpoint(
        tmp_path, event="iteration_completed", filter=jl.every(2), keep=1
    ).nan_guard(filter=jl.every(10))
    with caplog.at_level(logging.WARNING, "jaxloop"):
        state = loop.run(BAD, start(), epochs=2)
    assert (state.status, state.halted_by, state.step) == ("halted", "nan_guard", 10)
    # Those of steps 6 to 10 would have been bad, and the end too.
    assert os.listdir(tmp_path) == ["4"]
    assert "step 6 is not saved" in caplog.text and "step_state['w']" in caplog.text
    assert float(jl.restore(tmp_path).step_state["sum"]) == 10.0
    # At the end of an epoch it looks in any case.
    late = MEAN.nan_guard(filter=jl.only(1000)).run(BAD, start(), epochs=2)
    assert (late.halted_by, late.step) == ("nan_guard", 12)


def test_a_good_run_is_not_disturbed():
    plain = MEAN.run(DATA, start(), epochs=2)
    for action in ("halt", "rewind"):
        loop = MEAN.nan_guard(action, filter=jl.every(5))
        if action == "rewind":
            with pytest.raises(ValueError, match="needs a checkpoint to return to"):
                loop.run(DATA, start())
            continue
        assert digest(loop.run(DATA, start(), epochs=2)) == digest(plain)


def test_rewind_goes_back_and_steps_over_the_bad_stretch(tmp_path):
    loop = (
        MEAN.handle("iteration_completed", remember, name="remember")
        .checkpoint(tmp_path / "a", event="iteration_completed", filter=jl.every(2))
        .nan_guard("rewind", filter=jl.every(3))
    )
    state = loop.run(BAD, start())
    # Back from 6 to 4, and from 9 to 6 (which was saved after it): 5, 6, and 7, 8, 9 are over.
    used = [*BAD[:4], *BAD[9:]]
    assert (state.status, state.step, state.epoch) == ("completed", 12, 1)
    assert float(state.step_state["sum"]) == float(sum(used))
    assert float(state.history[0]["mean"]) == pytest.approx(float(np.mean(used)))
    assert state.handler_state["remember"] == {"calls": 4 + 3}
    # Over the end of an epoch: the metrics of the new one begin where it does.
    loop = MEAN.checkpoint(tmp_path / "b", filter=jl.only(1)).nan_guard("rewind")
    epochs = [DATA, BAD, DATA]
    state = loop.run(lambda epoch: epochs[epoch], start(), epochs=3)
    assert float(state.step_state["sum"]) == float(2 * sum(DATA))
    assert float(state.history[2]["mean"]) == float(np.mean(DATA))


def remember(state):
    calls = state.handler_state.get("remember", {"calls": 0})["calls"] + 1
    return "continue", state.replace(
        handler_state={**state.handler_state, "remember": {"calls": calls}}
    )


def test_rewind_without_a_checkpoint_so_far_halts(tmp_path):
    loop = MEAN.checkpoint(tmp_path).nan_guard("rewind", filter=jl.every(3))
    state = loop.run(BAD, start())
    assert (state.status, state.halted_by, state.step) == ("halted", "nan_guard", 6)
    assert os.listdir(tmp_path) == []


def test_a_run_that_is_stopped_after_going_back_repeats_it(tmp_path):
    class Stop(Exception):
        pass

    def fail(state):
        raise Stop

    def loop(folder):
        return (
            MEAN.handle("iteration_completed", remember, name="remember")
            .checkpoint(folder, event="iteration_completed", filter=jl.every(4))
            .nan_guard("rewind", filter=jl.every(3))
        )

    undisturbed = loop(tmp_path / "whole").run(BAD, start(), epochs=2)
    for at in (6, 7, 9, 10, 13, 19):
        folder = tmp_path / str(at)
        with pytest.raises(Stop):
            loop(folder).handle("iteration_completed", fail, jl.only(at)).run(
                BAD, start(), epochs=2
            )
        resumed = loop(folder).resume(folder).run(BAD, start(), epochs=2)
        assert digest(resumed) == digest(undisturbed), at


def test_actions_are_checked_at_once():
    with pytest.raises(ValueError, match="did you mean 'rewind'"):
        MEAN.nan_guard("rewnd")
    with pytest.raises(ValueError, match="attached already"):
        MEAN.nan_guard("skip").nan_guard("skip")
