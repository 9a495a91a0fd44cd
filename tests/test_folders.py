"""Folders of checkpoints: who writes there, what is found there, and what is never deleted."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxloop as jl
from jaxloop.errors import CheckpointError, DamagedError, SerializationError
from tests import flips
from tests.digest import hash_tree

ROOT = Path(__file__).parent.parent
X = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
Y = (np.arange(40) % 3).astype(np.int32)
BATCHES = jl.batches((X, Y), 8, shuffle=True, seed=3)
LOSS = optax.softmax_cross_entropy_with_integer_labels

SUM = jl.loop(lambda batch, total: jl.emit(total + batch, x=batch)).metric(
    lambda x: x, "x", None, ["x"]
)
DATA = [np.float32(i) for i in (1, 2, 3, 4)]


def names(folder):
    """The checkpoints in a folder."""
    return sorted(path.name for path in Path(folder).iterdir() if path.is_dir())


def contents(folder):
    """The bytes of each file in a folder."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def scores(*values):
    """A loop whose metric ``score`` is the epoch's value, and its data."""
    step = lambda batch, n: jl.emit(n + 1, score=batch)  # noqa: E731  a step
    loop = jl.loop(step).metric(lambda score: score, "score", None, ["score"])
    return loop, lambda epoch: [np.float32(values[epoch])]


def python(source, *arguments, **options):
    """Starts a script in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(source), *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


# --- a changed script ---


def trainer(optimizer=optax.adam(0.1), size=3, **settings):  # noqa: B008  a value
    return jl.trainer(nn.Dense(size, **settings), LOSS, optimizer, log=0)


CHANGES = {
    "adam to adamw": (lambda: trainer(optax.adamw(0.1)), r"optimizer_state.*part without arrays"),
    "adam to sgd": (lambda: trainer(optax.sgd(0.1)), r"\.mu.*missing here"),
    "a wider layer": (lambda: trainer(size=5), r"float32\[4,3\] there and float32\[4,5\] here"),
    "another layer": (
        lambda: jl.trainer(nn.Sequential([nn.Dense(3), nn.Dense(3)]), LOSS, optax.adam(0.1), log=0),
        r"layers_1.*missing there",
    ),
    "another dtype": (
        lambda: jl.trainer(
            nn.Dense(3, dtype=jnp.float32, param_dtype=jnp.bfloat16), LOSS, optax.adam(0.1), log=0
        ),
        r"float32\[4,3\] there and bfloat16\[4,3\] here",
    ),
}


QUICK = ("adam to adamw", "another dtype")


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k in QUICK else [pytest.mark.slow]) for k in CHANGES]
)
def test_a_changed_script_is_an_error_and_loses_nothing(kind, tmp_path):
    trainer().checkpoint(tmp_path).run(BATCHES, epochs=2)
    before = contents(tmp_path)
    changed, expected = CHANGES[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is no damage
        with pytest.raises(SerializationError, match=expected) as info:
            changed().checkpoint(tmp_path, keep=1).resume(tmp_path).run(BATCHES, epochs=4)
    assert "another folder" in str(info.value) and "jl.restore(path)" in str(info.value)
    assert contents(tmp_path) == before


def test_the_way_out_of_a_changed_script_works(tmp_path):
    trainer().checkpoint(tmp_path / "old").run(BATCHES, epochs=2)
    model_state = jl.restore(tmp_path / "old").step_state["model_state"]
    changed = trainer(optax.adamw(0.1)).checkpoint(tmp_path / "new")
    assert changed.run(BATCHES, model_state, epochs=2) is not None


def test_a_fresh_run_keeps_the_checkpoints_of_another(tmp_path, caplog):
    SUM.checkpoint(tmp_path, event="iteration_completed").run(DATA, np.float32(0))
    before = contents(tmp_path)
    fresh = SUM.checkpoint(tmp_path, event="iteration_completed", keep=1)
    state = fresh.run(DATA, np.float32(100))
    assert "this run keeps them and saves beside them" in caplog.text
    assert before.items() <= contents(tmp_path).items()
    assert names(tmp_path) == ["2", "3", "4", "4_2"]
    # The newest is that of the fresh run, which goes on with it and deletes only its own.
    assert float(jl.restore(tmp_path).step_state) == float(state.step_state) == 110
    fresh.resume(tmp_path).run(DATA, np.float32(0), epochs=2)
    assert names(tmp_path) == ["2", "3", "4", "8"]
    assert before.items() <= contents(tmp_path).items()


def test_a_run_from_a_state_keeps_the_checkpoints_it_came_from(tmp_path):
    loop = SUM.checkpoint(tmp_path, event="iteration_completed", keep=2)
    first = loop.run(DATA, np.float32(0))
    loop.from_state(first).run(DATA, epochs=2)
    assert names(tmp_path) == ["3", "4", "7", "8"]


# --- what is not accessible ---


@pytest.mark.parametrize("method", ["resume", "checkpoint", "restore"])
def test_a_file_in_place_of_the_folder_is_an_error(method, tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(CheckpointError, match=r"Not a directory|File exists"):
        if method == "restore":
            jl.restore(path)
        else:
            getattr(SUM, method)(path).run(DATA, np.float32(0))
    assert path.read_text() == "mine"


def test_a_link_to_nothing_is_an_error(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "not mounted")
    with pytest.raises(CheckpointError, match="which is missing"):
        SUM.resume(tmp_path / "link").run(DATA, np.float32(0))


DENIED = {
    "the folder": lambda folder: folder,
    "the record": lambda folder: folder / "4" / "meta" / "metadata",
    "a folder of arrays": lambda folder: folder / "4" / "step_state",
    "a file of arrays": lambda folder: next((folder / "4" / "step_state").glob("manifest*")),
}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=[] if k == "a file of arrays" else [pytest.mark.slow]) for k in DENIED],
)
def test_a_folder_that_may_not_be_read_is_an_error_and_no_damage(kind, tmp_path):
    folder = tmp_path / "ck"
    SUM.checkpoint(folder, event="iteration_completed").run(DATA, np.float32(0))
    before = contents(folder)
    denied = DENIED[kind](folder)
    mode = denied.stat().st_mode
    script = """
        import os, sys, tempfile, warnings, numpy as np, jaxloop as jl
        loop = jl.loop(lambda batch, total: total + batch)
        with tempfile.TemporaryDirectory() as folder:  # everything is imported now
            loop.checkpoint(folder).run([np.float32(1)], np.float32(0))
            loop.resume(folder).run([np.float32(1)], np.float32(0))
        if os.getuid() == 0:
            os.setgid(65534), os.setuid(65534)  # root may read everything
        warnings.simplefilter("error")
        try:
            loop.resume(sys.argv[1]).run([np.float32(1)], np.float32(0))
        except jl.errors.CheckpointError as error:
            print(error)
    """
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    denied.chmod(0)
    try:
        out, err = python(script, folder).communicate(timeout=120)
    finally:
        denied.chmod(mode)
    assert "must be readable, got: [Errno 13] Permission denied" in out, err
    assert contents(folder) == before


# --- flipped bits ---


@pytest.mark.parametrize(
    "num_flips",
    [
        25,
        pytest.param(420, marks=pytest.mark.slow),
        pytest.param(2000, marks=pytest.mark.endurance),
    ],
)
def test_no_flipped_bit_is_loaded_silently(num_flips, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.flips", tmp_path, str(num_flips)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    counted = json.loads(done.stdout.splitlines()[-1])
    print(counted)
    assert counted["found"] > num_flips // 4


def test_an_older_step_state_in_a_newer_checkpoint_is_found(tmp_path):
    final = flips.trained(tmp_path)
    shutil.rmtree(tmp_path / "5" / "step_state")
    shutil.copytree(tmp_path / "4" / "step_state", tmp_path / "5" / "step_state")
    with pytest.warns(UserWarning, match="5 is damaged.*differ from those that were saved: step_s"):
        assert jl.restore(tmp_path, like=final.step_state).step == 4
    with pytest.warns(UserWarning, match="5 is damaged"):
        assert jl.restore(tmp_path).step == 4  # without `like` too
    assert issubclass(DamagedError, SerializationError)


def test_what_a_handler_changes_during_a_save_does_not_reach_it(tmp_path):
    table = np.zeros(300_000)

    def scribble(state):
        table[:] += 1
        return "continue", state.replace(handler_state={"table": table})

    loop = SUM.handle("iteration_completed", scribble)
    loop.checkpoint(tmp_path, event="iteration_completed", keep=None).run(DATA, np.float32(0))
    for step in (1, 2, 3):
        (value,) = np.unique(jl.restore(tmp_path, step).handler_state["table"])
        assert value == step


# --- the best, and several checkpoints in one folder ---


def test_the_best_and_the_last_survive_a_pattern_that_names_them_alike(tmp_path):
    loop, data = scores(1.0, 5.0, 2.0, 3.0)
    best = {"criteria": "score", "mode": "max", "file_pattern": lambda state: "model"}
    loop.checkpoint(tmp_path, **best).run(data, 0, epochs=4)
    assert jl.restore(tmp_path, "best").step == 2
    assert jl.restore(tmp_path).step == 4
    assert names(tmp_path) == ["model", "model_2"]
    # A run that goes on replaces its last and, once it is better, its best.
    more, data = scores(1.0, 5.0, 2.0, 3.0, 4.0, 9.0, 0.0)
    more.checkpoint(tmp_path, **best).resume(tmp_path).run(data, 0, epochs=7)
    assert jl.restore(tmp_path, "best").step == 6
    assert jl.restore(tmp_path).step == 7
    assert names(tmp_path) == ["model", "model_2"]


def test_the_best_survives_a_handler_that_changes_the_state_at_the_end(tmp_path):
    loop, data = scores(5.0, 1.0)
    loop = loop.checkpoint(tmp_path, criteria="score", mode="min")
    loop = loop.handle("completed", lambda state: ("continue", state.replace(step_state=-1)))
    loop.run(data, 0, epochs=2)
    assert int(jl.restore(tmp_path, "best").step_state) == 2
    assert int(jl.restore(tmp_path).step_state) == -1


def test_a_last_state_that_is_the_best_is_one_checkpoint(tmp_path):
    loop, data = scores(5.0, 1.0)
    loop.checkpoint(tmp_path, criteria="score", mode="min", keep=1).run(data, 0, epochs=2)
    assert names(tmp_path) == ["2"] and jl.restore(tmp_path, "best").status == "completed"


def test_two_checkpoints_of_a_loop_share_a_folder(tmp_path):
    values = [3.0, 1.0, 2.0, 4.0, 5.0, 6.0]
    loop, data = scores(*values)
    loop = loop.checkpoint(tmp_path, filter=jl.every(2), keep=2)
    loop = loop.checkpoint(tmp_path, criteria="score", mode="min", keep=1)
    state = loop.run(data, 0, epochs=6)
    assert names(tmp_path) == ["2", "4", "6"]  # 2 is the best, 4 and 6 the newest of the first
    assert jl.restore(tmp_path, "best").step == 2
    assert loop.resume(tmp_path).run(data, 0, epochs=6).step == state.step
    assert names(tmp_path) == ["2", "4", "6"]
    with pytest.raises(ValueError, match="'best' would have two meanings"):
        loop.checkpoint(tmp_path, criteria="score", name="other")


# --- rewind ---


def nan_at(*steps):
    def step(batch, total):
        bad = jnp.any(batch == jnp.array(steps, jnp.float32))
        return total + jnp.where(bad, jnp.nan, batch)

    return jl.loop(step).nan_guard("rewind", filter="always")


def test_rewind_takes_no_checkpoint_of_another_run(tmp_path):
    SUM.checkpoint(tmp_path, event="iteration_completed").run(DATA, np.float32(500))
    loop = nan_at(1).checkpoint(tmp_path, event="iteration_completed")
    state = loop.run(DATA, np.float32(0))
    assert state.halted_by == "nan_guard" and state.step == 1
    loop = nan_at(3).checkpoint(tmp_path, event="iteration_completed")
    assert float(loop.run(DATA, np.float32(0)).step_state) == 1 + 2 + 4


def test_rewind_takes_no_later_checkpoint(tmp_path):
    data = [np.float32(i) for i in range(1, 13)]
    loop = nan_at(99).checkpoint(tmp_path, event="iteration_completed", keep=None)
    loop.run(data, np.float32(0))
    later = [tmp_path / str(step) / "meta" / "metadata" for step in range(7, 13)]
    for record in later:  # the run resumes from step 6, as if the later ones were damaged
        record.rename(record.with_name("hidden"))

    def show(state):
        for record in later:
            record.with_name("hidden").rename(record)

    loop = nan_at(8).handle("started", show).checkpoint(tmp_path).resume(tmp_path)
    with pytest.warns(UserWarning, match="damaged"):
        state = loop.run(data, np.float32(0))
    # Step 8 is NaN and returns to the state that this run saved at step 8, and not at step 12.
    assert float(state.step_state) == sum(range(1, 13))


# --- two writers ---


WRITER = """
    import sys, time, numpy as np, jaxloop as jl
    def wait(state):
        print("open", flush=True)
        sys.stdin.readline()
    loop = jl.loop(lambda batch, total: total + batch).handle("started", wait)
    print(loop.checkpoint(sys.argv[1], keep=None).run([np.float32(1)], np.float32(0)), flush=True)
"""


def test_a_second_writer_is_an_error_and_leaves_the_first_alone(tmp_path):
    first = python(WRITER, tmp_path, stdin=subprocess.PIPE)
    try:
        assert first.stdout.readline() == "open\n"
        (tmp_path / "7.orbax-checkpoint-tmp").mkdir()  # as if the first was writing
        with pytest.raises(CheckpointError, match=f"belongs to process {first.pid} on .* since 2"):
            SUM.checkpoint(tmp_path).run(DATA, np.float32(0))
        with pytest.raises(CheckpointError, match="only one run can write"):
            SUM.checkpoint(tmp_path).check(DATA, np.float32(0))
        with pytest.warns(UserWarning, match="still being written"):
            SUM.resume(tmp_path).run(DATA, np.float32(0))  # a reader
        assert (tmp_path / "7.orbax-checkpoint-tmp").is_dir()
        out, err = first.communicate("\n", timeout=120)
        assert "completed" in out, err
    finally:
        first.kill()
        first.wait()
    assert names(tmp_path) == ["1", "7.orbax-checkpoint-tmp"]


def test_a_killed_writer_leaves_a_lock_that_is_stale(tmp_path):
    first = python(WRITER, tmp_path, stdin=subprocess.PIPE)
    assert first.stdout.readline() == "open\n"
    os.kill(first.pid, signal.SIGKILL)
    while Path(f"/proc/{first.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    # Not even waited for by its parent.
    SUM.checkpoint(tmp_path).run(DATA, np.float32(0))
    first.communicate()
    assert names(tmp_path) == ["4"] and not (tmp_path / ".jaxloop-lock").exists()


def test_two_runs_of_one_process_are_two_writers(tmp_path):
    stream = SUM.checkpoint(tmp_path).stream(DATA, np.float32(0), epochs=3)
    next(stream)
    with pytest.raises(CheckpointError, match="another run of this process"):
        SUM.checkpoint(tmp_path).run(DATA, np.float32(0))
    stream.close()
    SUM.checkpoint(tmp_path).run(DATA, np.float32(0))


@pytest.mark.filterwarnings("ignore:os.fork")
def test_a_forked_worker_is_a_second_writer_and_does_not_free_the_lock(tmp_path):
    results = []

    def fork(state):
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                SUM.checkpoint(tmp_path).check(DATA, np.float32(0))
                os.write(write, b"no error")
            except BaseException as error:
                os.write(write, str(error).encode())
            os._exit(0)
        os.waitpid(pid, 0)
        results.append(os.read(read, 1000).decode())

    loop = SUM.handle("started", fork).checkpoint(tmp_path)
    # The child forks before JAX computes anything, so that it can use Python safely.
    loop.run(DATA, np.float32(0))
    assert "only one run can write" in results[0]
    assert names(tmp_path) == ["4"]


@pytest.mark.parametrize(
    "lock", ["", "{", "[1]", '{"pid": -5}', '{"pid": "x", "host": 3}', "[" * 9]
)
def test_a_lock_of_an_unknown_owner_is_taken_over_if_nobody_touches_it(lock, tmp_path, monkeypatch):
    import jaxloop._checkpoint.lock as lock_module

    monkeypatch.setattr(lock_module, "_STALE_AFTER_S", 1.0)
    (tmp_path / ".jaxloop-lock").write_text(lock)
    SUM.checkpoint(tmp_path).run(DATA, np.float32(0))
    assert names(tmp_path) == ["4"]


def test_a_lock_that_was_taken_over_stops_the_first_owner(tmp_path):
    def steal(state):
        (tmp_path / ".jaxloop-lock").write_text(json.dumps({"pid": 7, "host": "far", "since": "2"}))

    loop = SUM.handle("started", steal).checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="belongs to process 7 on far since 2"):
        loop.run(DATA, np.float32(0))
    assert names(tmp_path) == []


# --- names and paths ---


@pytest.mark.parametrize(
    "name", ["a.b", "0008", "step 8", "é", "8.", "-", "~", "a#b%c&d", "x" * 200]
)
def test_a_name_is_found_again(name, tmp_path):
    loop = SUM.checkpoint(tmp_path, file_pattern=lambda state: name)
    loop.run(DATA, np.float32(0))
    assert names(tmp_path) == [name]
    assert jl.restore(tmp_path, 4).step == loop.resume(tmp_path).run(DATA, np.float32(0)).step == 4
    loop.resume(tmp_path).run(DATA, np.float32(0), epochs=2)
    assert names(tmp_path) == [name]


BAD_NAMES = ["../x", "/tmp/x", "a/b", "a\\b", "", " ", ".", "..", "a\0b", "x" * 300, "é" * 150]
BAD_NAMES += ["8.orbax-checkpoint-tmp-3", "8.replaced", "8.deleted", ".hidden", "a[1]*", "\ud800"]


@pytest.mark.parametrize("name", [*BAD_NAMES, None, 8, b"8", Path("8")])
def test_a_name_that_could_not_be_found_is_refused_before_step_1(name, tmp_path):
    started = []
    loop = SUM.handle("started", lambda state: started.append(True))
    loop = loop.checkpoint(tmp_path / "ck", file_pattern=lambda state: name)
    with pytest.raises(jl.JaxloopError, match="file_pattern must return"):
        loop.run(DATA, np.float32(0))
    assert not started and names(tmp_path) == ["ck"] and not names(tmp_path / "ck")


def test_a_name_made_of_a_metric_is_checked_when_it_exists(tmp_path):
    pattern = lambda state: "../" * (state.epoch > 0) + f"{state.history[0]['x']:.2f}"  # noqa: E731
    loop = SUM.checkpoint(tmp_path / "ck", file_pattern=pattern, event="epoch_completed")
    with pytest.raises(jl.JaxloopError) as info:
        loop.run(DATA, np.float32(0), epochs=2)
    assert info.value.loop_state.step == 8 and names(tmp_path / "ck") == ["2.50"]


@pytest.mark.parametrize(
    "part", ["lr[1e-3]*", "a\\b", "a?b", "sp ace", "é%20", "a'b\"c", "[", "{x}"]
)
def test_any_folder_is_found_again(part, tmp_path):
    folder = tmp_path / part / "ck"
    loop = SUM.checkpoint(folder, event="iteration_completed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop.run(DATA, np.float32(0))
        assert float(jl.restore(folder).step_state) == 10
        assert loop.resume(folder).run(DATA, np.float32(0), epochs=2).step == 8
    assert names(folder) == ["6", "7", "8"]
    assert [path.name for path in tmp_path.iterdir()] == [part]


def test_paths_of_every_kind(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    SUM.checkpoint("~/a").run(DATA, np.float32(0))
    assert names(tmp_path / "a") == ["4"] and jl.restore("~/a").step == 4
    assert SUM.resume("~/a").run(DATA, np.float32(0)).step == 4
    SUM.checkpoint(f"{tmp_path}/b/").run(DATA, np.float32(0))
    assert jl.restore(tmp_path / "b").step == jl.restore(f"{tmp_path}/b/").step == 4
    monkeypatch.chdir(tmp_path)
    SUM.checkpoint("c").run(DATA, np.float32(0))
    assert jl.restore(Path("c")).step == 4
    with pytest.raises(CheckpointError, match="got one checkpoint"):
        jl.restore(tmp_path / "c" / "4")


@pytest.mark.parametrize(
    "path", ["gs://bucket/a", "s3://a", "file:///a", Path("gs://b"), "a\0b", " "]
)
@pytest.mark.parametrize("method", ["resume", "checkpoint", "restore"])
def test_a_path_that_is_no_local_folder_is_refused(method, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"{method}: path must"):
        jl.restore(path) if method == "restore" else getattr(SUM, method)(path)
    assert not list(tmp_path.iterdir())


def test_arrays_of_a_device_are_saved_from_the_host(tmp_path, monkeypatch):
    import jaxloop._checkpoint.orbax_io as orbax_io

    monkeypatch.setattr(orbax_io, "_is_on_host", lambda leaf: not isinstance(leaf, jax.Array))
    start = {"w": np.arange(3.0, dtype=np.float32), "key": jax.random.key(3), "b": jnp.bfloat16(2)}
    loop = jl.loop(lambda batch, s: {**s, "w": s["w"] + batch}).checkpoint(tmp_path)
    state = loop.run(DATA, start)
    back = jl.restore(tmp_path, like=start)
    assert hash_tree(back.step_state) == hash_tree(state.step_state)
    assert re.match("key<", str(back.step_state["key"].dtype))
