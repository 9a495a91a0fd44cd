"""A profile of some iterations: what is recorded, when, and that it never ends a run."""

import gzip
import json

import jax
import numpy as np
import pytest

import jaxloop as jl

DATA = [np.float32(i) for i in range(8)]


def make():
    return jl.loop(lambda batch, total: total + batch)


def run(loop, **arguments):
    return loop.run(DATA, init_state=np.float32(0), **{"epochs": 2, **arguments})


def planes(path):
    return sorted(path.rglob("*.xplane.pb"))


def names(path):
    (file,) = path.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return [event.get("name", "") for event in events]


def test_it_records_the_iterations_and_names_what_runs(tmp_path):
    loop = make().observe("iteration_completed", lambda snapshot: None, name="watcher")
    loop = loop.handle("epoch_completed", lambda state: None, name="mine")
    state = run(loop.profile(tmp_path / "new" / "folder", iterations=(5, 12)))
    assert len(planes(tmp_path)) == 1
    found = names(tmp_path)
    steps = [name for name in found if name.startswith("step: ")]
    covered = set()
    for step in steps:
        epoch, first, last = (int(word.strip(",")) for word in step.split() if word[0].isdigit())
        covered |= {8 * epoch + i for i in range(first, last + 1)}
    assert covered == set(range(5, 12))
    assert {"observer: watcher", "handler: mine"} <= set(found)
    assert float(state.step_state) == float(run(make()).step_state)


def test_it_begins_with_the_first_iteration_if_asked(tmp_path):
    run(make().profile(tmp_path, iterations=(0, 2)))
    assert any(name.startswith("step: epoch 0, iterations 0 to") for name in names(tmp_path))


@pytest.mark.parametrize("iterations", [(10, 100), (15, 16)])
def test_the_end_of_the_run_ends_it(tmp_path, iterations):
    run(make().profile(tmp_path, iterations=iterations))
    assert len(planes(tmp_path)) == 1
    jax.profiler.start_trace(str(tmp_path / "again"))  # nothing records any more
    jax.profiler.stop_trace()


def test_an_error_ends_it_and_is_raised(tmp_path):
    def fail(state):
        raise ValueError("mine")

    loop = make().handle("iteration_completed", fail, jl.only(7))
    with pytest.raises(ValueError, match="mine") as caught:
        run(loop.profile(tmp_path, iterations=(4, 12)))
    assert len(planes(tmp_path)) == 1
    assert caught.value.loop_state.step == 7


def test_an_interrupt_ends_it(tmp_path):
    def fail(state):
        raise KeyboardInterrupt

    loop = make().handle("iteration_completed", fail, jl.only(7))
    with pytest.raises(KeyboardInterrupt):
        run(loop.profile(tmp_path, iterations=(4, 12)))
    assert len(planes(tmp_path)) == 1


def test_a_stream_that_is_closed_ends_it(tmp_path):
    loop = make().profile(tmp_path, iterations=(4, 12))
    stream = loop.stream(DATA, init_state=np.float32(0), epochs=2)
    next(stream)
    stream.close()
    assert len(planes(tmp_path)) == 1


def test_another_profile_is_left_alone_and_the_run_continues(tmp_path):
    jax.profiler.start_trace(str(tmp_path / "other"))
    with pytest.warns(UserWarning, match="could not begin"):
        state = run(make().profile(tmp_path / "mine"))
    assert state.step == 16
    jax.profiler.stop_trace()
    assert planes(tmp_path / "other") and not planes(tmp_path / "mine")


def test_one_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch):
    def fail():
        stop()
        raise OSError("disk full")

    stop = jax.profiler.stop_trace
    monkeypatch.setattr(jax.profiler, "stop_trace", fail)
    with pytest.warns(UserWarning, match="disk full"):
        assert run(make().profile(tmp_path)).step == 16


def test_each_run_records_its_own(tmp_path):
    loop = make().profile(tmp_path, iterations=(2, 4))
    run(loop), run(loop)
    # Two in the same second may share a folder, and each has its own session there.
    assert planes(tmp_path)


def test_a_run_that_resumes_later_records_nothing(tmp_path):
    state = run(make(), epochs=1)
    loop = make().from_state(state).profile(tmp_path, iterations=(2, 4))
    assert loop.run(DATA, epochs=2).step == 16
    assert not planes(tmp_path)


def test_several_profiles_of_one_run(tmp_path):
    loop = make().profile(tmp_path / "a", iterations=(1, 3), name="a")
    run(loop.profile(tmp_path / "b", iterations=(8, 10), name="b"))
    assert planes(tmp_path / "a") and planes(tmp_path / "b")


def test_a_path_that_is_a_file_is_an_error_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("mine")
    seen = []
    loop = make().observe("all", seen.append).profile(tmp_path / "file" / "folder")
    with pytest.raises(jl.errors.ArgumentError, match="is not a folder"):
        run(loop)
    assert not seen


def test_wrong_arguments(tmp_path):
    for iterations in [(3, 3), (5, 2), (-1, 4)]:
        with pytest.raises(jl.errors.ArgumentError):
            make().profile(tmp_path, iterations=iterations)
    for iterations in [5, (1, 2, 3), (1.5, 3), (True, 3)]:
        with pytest.raises(jl.errors.ArgumentTypeError):
            make().profile(tmp_path, iterations=iterations)
    with pytest.raises(jl.errors.ArgumentError):
        make().profile("")
