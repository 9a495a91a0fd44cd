"""`loop_state`: every exception that leaves a run has it, and it is the last good state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxloop as jl

DATA = [np.full(2, i, np.float32) for i in range(8)]


def step(batch, total):
    return jl.emit(total + jnp.sum(batch), x=batch)


LOOP = jl.loop(step).metric(lambda x: x, "mean", None, ["x"])


def fail(*args):
    raise OSError("gone")


class Gone:
    def __iter__(self):
        return iter(fail())


def leaves(loop, method="run", data=DATA, *args, **options):
    with pytest.raises(Exception) as caught:
        result = getattr(loop, method)(data, *args, **options)
        if method == "stream":
            list(result)
    assert hasattr(caught.value, "loop_state"), caught.value
    return caught.value


@pytest.mark.parametrize("method", ["run", "stream", "check"])
def test_an_error_before_there_is_a_state_has_none(method, tmp_path):
    (tmp_path / "file").write_text("")
    for error in (
        leaves(LOOP, method, epochs=-1),
        leaves(LOOP, method, None),
        leaves(LOOP, method, Gone()),
        leaves(LOOP, method, []),
        leaves(jl.loop(step, fail), method),
        leaves(LOOP.early_stop("los"), method, init_state=0.0),
        leaves(LOOP.checkpoint(tmp_path / "file" / "a"), method, init_state=0.0),
    ):
        assert error.loop_state is None


@pytest.mark.parametrize("method", ["run", "check"])
def test_an_error_after_init_has_the_first_state(method):
    wrong = jl.loop(step, lambda batch, init_state: 5.0).metric(lambda y: y, "mean", None, ["y"])
    state = leaves(wrong, method).loop_state
    assert (float(state.step_state), state.step) == (5.0, 0)
    # The mistake is mended, and the run begins with the state.
    right = jl.loop(step, fail).from_state(state)
    assert float(right.run(DATA).step_state) == 5.0 + sum(2 * i for i in range(8))
    broken = jl.loop(fail, lambda batch, init_state: 5.0)
    error = leaves(broken, method)
    assert isinstance(error, OSError) and float(error.loop_state.step_state) == 5.0
    assert "while checking the step" in error.__notes__[-1]


def test_an_error_on_resume_has_the_state_that_it_resumes_from(tmp_path):
    error = leaves(LOOP.handle("iteration_completed", fail, jl.only(5)), "run", DATA, 0.0)
    state = error.loop_state
    assert state.step == 5 and "in handler `fail`" in error.__notes__[0]
    again = leaves(LOOP.from_state(state), "run", DATA[:2])  # too few batches
    assert again.loop_state is state
    loop = LOOP.checkpoint(tmp_path, on_exception=True)
    leaves(loop.handle("iteration_completed", fail, jl.only(4)), "run", DATA, 0.0)
    resumed = leaves(loop.resume(tmp_path), "run", DATA[:2], 0.0).loop_state
    assert resumed.step == 4
    assert float(LOOP.from_state(resumed).run(DATA).step_state) == sum(2 * i for i in range(8))


def test_an_error_at_the_end_of_a_run_has_its_state(tmp_path):
    class Closing:
        def __call__(self, snapshot):
            pass

        def close(self):
            fail()

    assert leaves(LOOP.observe("completed", Closing()), "run", DATA, 0.0).loop_state.step == 8
    error = leaves(LOOP, "run", DATA, 0.0, output_transform=fail)
    assert error.loop_state.status == "completed"
    assert LOOP.from_state(error.loop_state).run(DATA).step == 8


def test_an_error_of_the_device_names_the_newest_checkpoint(tmp_path):
    def check(x):
        if x > 40:
            raise ValueError("a bad number")
        return np.float32(0)

    def checked(batch, total):
        result = jax.ShapeDtypeStruct((), jnp.float32)
        return total + jnp.sum(batch) + jax.pure_callback(check, result, total)

    loop = jl.loop(checked).checkpoint(tmp_path, filter=jl.every(2), event="iteration_completed")
    error = leaves(loop, "run", DATA, 0.0, fuse=1)
    assert error.loop_state is None
    (note,) = [one for one in error.__notes__ if "loop_state is None" in one]
    newest = jl.restore(tmp_path)
    assert f"the newest checkpoint is {tmp_path / str(newest.step)} (step {newest.step})" in note
