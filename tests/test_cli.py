"""The command line: what it prints, its exit statuses, and that it changes nothing."""

import json
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

import jaxloop as jl
from jaxloop._cli import verify, watch
from jaxloop._cli.main import COMMANDS, main
from jaxloop._cli.rows import RowFile, history_of

pytestmark = pytest.mark.slow  # CI counts their coverage all the same


def step(batch, state):
    return jl.emit({"w": state["w"] * np.float32(0.5) + batch, "n": state["n"] + 1}, x=batch)


LOOP = jl.loop(step).metric("x")


def make_loop(path, **options):
    """A loop that saves each epoch, and marks the best."""
    loop = LOOP.checkpoint(str(path), keep=None, **options)
    return loop.checkpoint(str(path), criteria="x", mode="min", keep=None)


def start():
    return {"w": np.zeros(3, np.float32), "n": np.int32(0)}


def train(path, data=(3.0, 2.0, 1.0), epochs=3, **options):
    data = [np.float32(value) for value in data]
    return make_loop(path, **options).final_state(data, start(), epochs=epochs)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    path = tmp_path_factory.mktemp("kept") / "checkpoints"
    train(path)
    return path


@pytest.fixture
def folder(kept, tmp_path):
    """A copy of a finished run, which a test may damage."""
    return shutil.copytree(kept, tmp_path / "checkpoints")


@pytest.fixture
def call(capsys):
    """Runs a command, and returns its status, output and errors."""

    def run(*arguments):
        capsys.readouterr()
        status = main([str(one) for one in arguments])
        return status, *capsys.readouterr()

    return run


def assert_mistake(result, *words):
    status, out, err = result
    assert status == 2 and out == ""
    assert 1 <= len(err.splitlines()) <= 2, err
    for word in words:
        assert word in err


def contents_of(path):
    return {
        one.relative_to(path): (one.stat().st_mtime_ns, one.is_file() and one.read_bytes())
        for one in path.rglob("*")
    }


def damage(file, at=-1):
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)


def largest_file(folder):
    return max((one for one in folder.rglob("*") if one.is_file()), key=lambda f: f.stat().st_size)


# --- the command line itself ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspct"],
        ["inspect"],
        ["inspect", "a", "b"],
        ["diff", "a"],
        ["verify", "--nothing"],
        ["--nothing"],
        ["watch", "a", "--every", "soon"],
        ["watch", ".", "--every", "0"],
        ["demo", "--epochs", "0"],
        ["plot", "a", "--out", "curves.exe"],
        ["plot", "a", "--out", "no/such/folder/curves.png"],
    ],
)
def test_a_wrong_argument_is_two_lines(call, arguments):
    assert_mistake(call(*arguments), "fix:")


@pytest.mark.parametrize("command", ["inspect", "verify", "watch", "plot"])
def test_a_path_without_a_run_is_two_lines(call, tmp_path, command):
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    (tmp_path / "foreign" / "table.csv").write_text("name,age\na,3\n")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("missing", "empty", "foreign", "foreign/notes.txt", "loop", "", "gs://bucket"):
        assert_mistake(call(command, tmp_path / name if name not in ("", "gs://bucket") else name))
    assert_mistake(call("diff", tmp_path / "empty", tmp_path / "empty"))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(call, command):
    status, out, _ = call(command, "--help")
    assert status == 0
    assert f"    jaxloop {command}" in out and "usage: jaxloop" in out


def test_the_help_lists_the_commands(call):
    status, out, _ = call("--help")
    assert status == 0 and "exit status" in out
    for command, summary in COMMANDS.items():
        assert f"{command} " in out and summary in out
    assert call("--version")[1] == f"jaxloop {jl.__version__}\n"


@pytest.mark.slow
def test_a_process_leaves_the_devices_and_heavy_modules_alone(folder):
    code = (
        "import sys; from jaxloop._cli.main import main; status = main(sys.argv[1:]); import jax; "
        "heavy = {'flax', 'optax', 'orbax', 'matplotlib', 'rich'} & set(sys.modules); "
        "print(status, jax.config.jax_platforms, sorted(heavy))"
    )
    command = [sys.executable, "-c", code, "inspect", str(folder)]
    environment = {**os.environ, "JAX_PLATFORMS": "cuda"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == "0 cpu []"


@pytest.mark.slow
def test_nobody_reads_the_output(folder):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "jaxloop", "inspect", str(folder)]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", ["inspect", "verify", "watch", "diff"])
def test_nothing_is_changed(call, folder, command):
    before = contents_of(folder)
    for path in [folder, *folder.iterdir()]:
        path.chmod(0o555)
    status, out, err = call(command, folder, *([folder] if command == "diff" else []))
    assert status == 0 and out and not err
    assert contents_of(folder) == before


# --- inspect -------------------------------------------------------------------------------------


def test_inspect_prints_a_table(call, folder):
    status, out, _ = call("inspect", folder)
    assert status == 0
    lines = out.splitlines()
    assert lines[0].startswith(f"{folder}: 3 checkpoints")
    assert "completed, 3/3 epochs, step 9" in lines[1]
    assert lines[2] == "no process writes here now"
    assert lines[4].split() == ["name", "step", "epochs", "x", "size", "age"]
    assert [line.split()[:4] for line in lines[5:8]] == [
        ["9", "9", "3/3", "2"],
        ["6", "6", "2/3", "2"],
        ["3", "3", "1/3", "2"],
    ]
    assert [line.endswith("best") for line in lines[5:8]] == [False, False, True]


def test_inspect_takes_the_folder_above_and_one_checkpoint(call, folder):
    # As JSON, because the table has ages.
    assert call("inspect", folder.parent, "--json") == call("inspect", folder, "--json")
    status, out, _ = call("inspect", folder / "6", "--json")
    assert status == 0
    assert [one["step"] for one in json.loads(out)["checkpoints"]] == [6]
    shutil.copytree(folder, folder.parent / "others")
    assert_mistake(call("inspect", folder.parent), "2 folders", "checkpoints, others")


def test_the_json_is_what_the_states_say(call, folder):
    found = json.loads(call("inspect", folder, "--json")[1])["checkpoints"]
    assert [one["step"] for one in found] == [9, 6, 3]
    for one in found:
        state = jl.restore(folder, one["step"])
        assert one["history"] == {
            str(epoch): {name: float(value) for name, value in metrics.items()}
            for epoch, metrics in state.history.items()
        }
        assert (one["epoch"], one["status"]) == (state.epoch, state.status)
        assert one["step_state"] == {"['n']": "int32[]", "['w']": "float32[3]"}
        assert one["problem"] is None
    assert [one["best"] for one in found] == [False, False, True]
    assert jl.restore(folder, "best").step == 3


def test_json_has_no_nan(call, tmp_path):
    train(tmp_path, data=(float("nan"), 1.0))
    found = json.loads(call("inspect", tmp_path, "--json")[1], parse_constant=pytest.fail)
    assert found["checkpoints"][0]["metrics"]["x"] == "nan"


def test_inspect_names_what_is_damaged(call, folder):
    damage(folder / "9" / "meta" / "metadata", at=30)
    shutil.rmtree(folder / "6" / "step_state")
    (folder / "4.orbax-checkpoint-tmp").mkdir()
    status, out, _ = call("inspect", folder)
    assert status == 0
    assert "9 is damaged: its record" in out
    assert "6 is damaged: its arrays are missing: step_state" in out
    assert "4 is not complete" in out
    assert "completed" not in out  # the record that said so is damaged


def test_inspect_of_a_later_format(call, folder):
    shutil.rmtree(folder / "3")
    file = folder / "9" / "meta" / "metadata"
    record = {**json.loads(file.read_text()), "format": 99, "history": "of the future"}
    from jaxloop._checkpoint.record import seal

    seal(record)
    file.write_text(json.dumps(record))
    status, out, _ = call("inspect", folder)
    assert status == 0 and "9 is damaged: a later jaxloop wrote it, in format 99" in out
    status, out, _ = call("verify", folder)
    assert status == 2 and "9: cannot be read here" in out and "6: good" in out


def test_inspect_of_a_run_that_is_going_on(call, tmp_path):
    data = [np.float32(1)] * 2
    states = make_loop(tmp_path).stream(data, start(), epochs=3)
    next(states)
    status, out, _ = call("inspect", tmp_path)
    assert status == 0 and f"process {os.getpid()} on" in out and "writes here since" in out
    assert json.loads(call("inspect", tmp_path, "--json")[1])["writer"]["is_running"] is True
    states.close()
    assert json.loads(call("inspect", tmp_path, "--json")[1])["writer"] is None


def test_a_dead_writer_is_named(call, folder):
    lock = {"pid": 2**22 - 1, "host": "here", "since": "2026-01-01 10:00:00"}
    from jaxloop._checkpoint import lock as locks

    lock["machine"] = locks._machine()
    (folder / ".jaxloop-lock").write_text(json.dumps(lock))
    assert "process 4194303 on here wrote here since 2026" in call("inspect", folder)[1]
    (folder / ".jaxloop-lock").write_text(json.dumps({**lock, "machine": "another"}))
    assert "may write here since 2026" in call("inspect", folder)[1]
    (folder / ".jaxloop-lock").write_text("{")
    assert "process unknown on unknown may write here" in call("inspect", folder)[1]


def test_several_runs_in_a_folder_have_their_names(call, folder):
    train(folder, data=(5.0, 5.0), epochs=1)
    lines = call("inspect", folder)[1].splitlines()
    assert lines[4].split() == ["name", "step", "epochs", "x", "size", "age", "run"]
    runs = [line.removesuffix("best").split()[-1] for line in lines[5:9]]
    assert runs[0] != runs[1] == runs[2] == runs[3]


def test_a_long_history_is_read_from_its_arrays(call, folder, monkeypatch):
    from jaxloop._checkpoint import packing

    monkeypatch.setattr(packing.Packer.array, "__defaults__", (0,))
    train(folder / "long")
    one = json.loads(call("inspect", folder / "long", "--json")[1])["checkpoints"][0]
    assert [row["x"] for row in one["history"].values()] == [2.0, 2.0, 2.0]


# --- verify --------------------------------------------------------------------------------------


def test_verify_reads_every_array(call, folder):
    status, out, _ = call("verify", folder)
    assert status == 0 and out.splitlines()[-1] == f"{folder}: 3 good"
    assert "9: good, step 9" in out


# Orbax abandons its other reads, whose errors may come later.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_verify_names_the_damage(call, folder):
    damage(largest_file(folder / "6" / "step_state"), at=100)
    damage(folder / "9" / "meta" / "metadata", at=30)
    status, out, _ = call("verify", folder)
    assert status == 1
    assert "9: damaged: its record" in out and "6: damaged: " in out and "3: good" in out
    assert out.splitlines()[-1] == f"{folder}: 1 good, 2 damaged"
    assert call("verify", folder / "3")[0] == 0


def test_a_checkpoint_that_is_replaced_or_deleted_meanwhile_is_not_damaged(
    call, folder, tmp_path, monkeypatch
):
    train(tmp_path / "other", data=(1.0, 1.0, 1.0))
    whole = verify.load

    def load_late(entry):
        """Reads the first two after the run has replaced the one and deleted the other."""
        if entry.step == 9 and entry.run_id == run_id:
            shutil.rmtree(folder / "9")
            shutil.copytree(tmp_path / "other" / "9", folder / "9")
            raise jl.errors.DamagedError("arrays of one and the record of another")
        if entry.step == 6:
            shutil.rmtree(folder / "6")
        return whole(entry)

    run_id = json.loads(call("inspect", folder, "--json")[1])["checkpoints"][0]["run_id"]
    monkeypatch.setattr(verify, "load", load_late)
    status, out, _ = call("verify", folder)
    assert status == 0 and "9: good" in out and "3: good" in out and "6" not in out.split(":")[0]
    assert out.splitlines()[-1] == f"{folder}: 2 good"


def test_damage_is_found_in_a_run_of_nan(call, tmp_path):
    loop = LOOP.handle("epoch_completed", remember_nan)
    loop.checkpoint(str(tmp_path)).run([np.float32("nan")], start())
    damage(largest_file(tmp_path / "1" / "step_state"), at=100)
    assert call("verify", tmp_path)[0] == 1


def remember_nan(state):
    return "continue", state.replace(handler_state={**state.handler_state, "x": float("nan")})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_verify_sees_whatever_resuming_would(call, folder):
    """A flipped bit in any file is found, or the state is restored as it was."""
    shutil.rmtree(folder / "9"), shutil.rmtree(folder / "6")
    whole = jl.restore(folder, 3)
    found = 0
    for file in [one for one in folder.rglob("*") if one.is_file()]:
        raw = file.read_bytes()
        for at in {0, len(raw) // 2, len(raw) - 1} if raw else ():
            damage(file, at)
            status, out, _ = call("verify", folder)
            if status == 0:
                again = jl.restore(folder, 3)
                assert again.history == whole.history
                for name, leaf in whole.step_state.items():
                    assert np.array_equal(leaf, again.step_state[name])
            else:
                assert status == 1 and "3: damaged" in out, file
                found += 1
            file.write_bytes(raw)
    assert found > 10


@pytest.mark.slow
def test_verify_reads_64_bits_and_the_oldest_format(call, tmp_path):
    import jax

    with jax.enable_x64(True):
        jl.loop(lambda batch, state: state + batch).checkpoint(str(tmp_path)).run(
            [np.float64(0.1)], np.float64(0.2)
        )
    status, out, _ = call("verify", tmp_path)
    assert status == 0 and "1: good" in out
    status, out, _ = call("verify", "tests/data/checkpoint_format_1")
    assert status == 0 and "without digests" in out


# --- diff ----------------------------------------------------------------------------------------


def test_the_same_run_does_not_differ(call, folder, tmp_path):
    train(tmp_path / "again")
    status, out, _ = call("diff", folder, tmp_path / "again")
    assert status == 0
    assert "history: the same bits in all 3 epochs" in out
    assert "state at step 9: all" in out and "arrays have the same bits" in out


def test_a_longer_run_does_not_differ(call, folder, tmp_path):
    train(tmp_path / "longer", epochs=5)
    status, out, _ = call("diff", folder, tmp_path / "longer")
    assert status == 0 and "all 3 epochs that both have" in out and "state at step 9" in out


def test_diff_names_the_first_epoch_and_metric(call, folder, tmp_path):
    other = tmp_path / "other"
    data = lambda epoch: [np.float32(v) for v in ((3, 2, 1) if epoch < 1 else (3, 2, 1.5))]  # noqa: E731
    make_loop(other).run(data, start(), epochs=3)
    status, out, _ = call("diff", folder, other, "--values")
    assert status == 1
    assert "the first difference is history[1]['x']: 2.0 in A, 2.1666667 in B" in out
    assert "2 of 3 common epochs differ" in out
    assert "state at step 9: 2 of 3 arrays differ:" in out
    assert "  step_state/w: 3 of 3 elements differ, by at most 0.5" in out
    assert "step_state/n" not in out
    assert call("diff", folder / "3", other / "3")[0] == 0
    status, out, _ = call("diff", folder / "3", other)
    assert status == 0 and "state at step 3" in out


def test_nan_does_not_differ_from_nan_but_the_sign_of_zero_does(call, tmp_path):
    train(tmp_path / "a", data=(float("nan"), 1.0))
    train(tmp_path / "b", data=(-float("nan"), 1.0))
    assert "history: the same bits" in call("diff", tmp_path / "a", tmp_path / "b")[1]
    for name, value in (("c", 0.0), ("d", -0.0)):
        loop = jl.loop(lambda batch, state: state).checkpoint(str(tmp_path / name))
        loop.run([np.float32(1)], np.float32(value))
    status, out, _ = call("diff", tmp_path / "c", tmp_path / "d", "--values")
    assert status == 1 and "only the signs of zeros" in out


def test_diff_says_which_settings_differ(call, tmp_path):
    arrays = np.arange(8, dtype=np.float32)
    for name, seed in (("a", 1), ("b", 2)):
        loop = jl.loop(lambda batch, state: jl.emit(state + batch.sum(), x=batch[0])).metric("x")
        data = jl.batches(arrays, 2, shuffle=True, seed=seed)
        loop.checkpoint(str(tmp_path / name)).run(data, np.float32(0))
    status, out, _ = call("diff", tmp_path / "a", tmp_path / "b")
    assert status == 1 and "the data's seed: 1 in A, 2 in B" in out


def test_runs_without_a_common_step_are_an_error(call, folder, tmp_path):
    make_loop(tmp_path / "a", event="iteration_completed", filter={"only": 2}).run(
        [np.float32(1)] * 5, start(), epochs=1
    )
    for entry in (tmp_path / "a").iterdir():
        if entry.name != "2":
            shutil.rmtree(entry)
    status, _, err = call("diff", tmp_path / "a", folder)
    assert status == 2 and "in common" in err
    for one in folder.iterdir():
        damage(one / "meta" / "metadata", at=30)
    status, _, err = call("diff", tmp_path / "a", folder)
    assert status == 2 and "a good checkpoint" in err


# --- watch ---------------------------------------------------------------------------------------


def test_watch_follows_a_run_to_its_end(tmp_path, capsys, monkeypatch):
    """Each time that the command waits, the run does an epoch."""
    begin, begun = threading.Semaphore(0), threading.Semaphore(0)

    def pause(state):
        begun.release()
        assert begin.acquire(timeout=60)

    loop = make_loop(tmp_path / "run").handle("epoch_started", pause)
    data = lambda epoch: [np.float32(epoch)] * 2  # noqa: E731
    run = threading.Thread(target=loop.run, args=(data, start()), kwargs={"epochs": 3})

    def wait(seconds=0):
        begin.release()
        while run.is_alive() and not begun.acquire(timeout=0.05):
            pass

    run.start()
    assert begun.acquire(timeout=60)
    monkeypatch.setattr(watch.time, "sleep", wait)
    assert main(["watch", str(tmp_path)]) == 0
    run.join()
    lines = capsys.readouterr().out.splitlines()
    assert f"process {os.getpid()}" in lines[0]
    assert [line for line in lines if line.startswith("epoch")] == [
        "epoch 0, x 0",
        "epoch 1, x 1",
        "epoch 2, x 2",
    ]
    assert lines[-1] == "the run ended: completed, 3/3 epochs, step 6"
    assert "checkpoint 6: step 6" in lines
    assert "checkpoint 2: step 2, the best so far" in lines


def test_watch_once_shows_how_the_run_is(call, folder):
    status, out, _ = call("watch", folder, "--once")
    assert status == 0
    assert "no process writes here now" in out and "completed, 3/3 epochs, step 9" in out
    assert out.splitlines()[-1].split() == ["2", "2"]


def test_watch_prefers_the_rows_of_a_writer(call, folder):
    (folder.parent / "metrics.csv").write_text("step,epoch,loss\n3,0,0.5\n6,1,\n9,2,0.25\n9")
    (folder.parent / "table.csv").write_text("name,age\na,3\n")
    status, out, _ = call("watch", folder.parent)
    assert status == 0
    assert "step 3, epoch 0, loss 0.5\nstep 6, epoch 1\nstep 9, epoch 2, loss 0.25\n" in out
    assert out.endswith("the run ended: completed, 3/3 epochs, step 9\n")


def test_ctrl_c_ends_the_watch_of_a_file(tmp_path, call, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": null}\n')
    waits = []

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            raise KeyboardInterrupt
        with file.open("a") as rows:
            rows.write('{"step": 2, "loss": 3.5}\n{"step": 3, "lo')

    monkeypatch.setattr(watch.time, "sleep", wait)
    status, out, err = call("watch", file)
    assert (status, out, err) == (0, "step 1, loss nan\nstep 2, loss 3.5\n", "")


def test_a_run_that_died_is_said_to_be_unfinished(call, folder):
    shutil.rmtree(folder / "9")
    assert "the run ended without being finished" in call("watch", folder)[1]


def test_rows_are_read_as_they_come(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text("")
    rows = RowFile(file)
    assert rows.poll() == []
    file.write_text("step,epoch,loss\n2,0,0.5\n4,0")
    assert rows.poll() == [{"step": 2, "epoch": 0, "loss": 0.5}]
    assert rows.poll() == []
    # The row of an epoch gets the values of a validation, in a new column.
    file.write_text("step,epoch,loss,more\n2,0,0.5,7\n4,0,nan,\n")
    first, second = rows.poll()
    assert first == {"step": 2, "epoch": 0, "loss": 0.5, "more": 7}
    assert np.isnan(second["loss"]) and "more" not in second
    # The run resumed from step 2, and goes another way.
    file.write_text("step,epoch,loss\n2,0,0.5\n")
    assert rows.poll() == []
    file.write_text("step,epoch,loss\n2,0,0.5\n4,0,0.25\n")
    assert rows.poll() == [{"step": 4, "epoch": 0, "loss": 0.25}]
    file.write_text("another,file\n1,2\n")
    with pytest.raises(jl.errors.DataError, match="rows with a step"):
        rows.poll()


@pytest.mark.parametrize(
    "text", ['{"a": 1}\n', "[1]\n", '{"step": "x"}\n', '{"step": null}\n', "{\n", "[" * 9999 + "\n"]
)
def test_foreign_lines_of_json_are_an_error(call, tmp_path, text):
    (tmp_path / "a.jsonl").write_text(text)
    assert_mistake(call("watch", tmp_path / "a.jsonl"), "rows with a step")


def test_the_history_of_rows_is_the_last_of_each_epoch():
    rows = [{"step": 0, "hyperparameters": {}}, {"step": 1, "epoch": 0, "a": 1.0}]
    rows += [{"step": 2, "epoch": 0, "a": 2.0}, {"step": 3, "epoch": 1, "a": float("nan")}]
    found = history_of(rows)
    assert list(found) == [0, 1] and found[0] == {"a": 2.0}


# --- env -----------------------------------------------------------------------------------------


def test_env_prints_versions_and_devices(call):
    import jax

    status, out, _ = call("env")
    assert status == 0
    assert f"  jax: {jax.__version__}\n" in out and f"  jaxloop: {jl.__version__}\n" in out
    assert "  devices: 4 x cpu\n" in out
    report = json.loads(call("env", "--json")[1])
    assert report["versions"]["numpy"] == np.__version__
    assert report["devices"]["backend"] == "cpu"


def test_env_prints_no_secret(call, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", f"{tmp_path}/cache")
    monkeypatch.setenv("JAX_API_KEY", "12345")
    monkeypatch.setenv("WANDB_API_KEY", "67890")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "http://me:pass@host:1")
    out = call("env")[1]
    assert "JAX_COMPILATION_CACHE_DIR: ~/cache" in out
    assert "JAX_API_KEY: (hidden)" in out
    assert "http://(hidden)@host:1" in out
    for secret in ("12345", "67890", "pass@", str(tmp_path), os.uname().nodename):
        assert secret not in out


# --- demo ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_trains_and_resumes(call, tmp_path):
    status, out, _ = call("--out", tmp_path, "--epochs", "1")
    assert status == 0 and "completed after 1 epochs" in out
    assert (tmp_path / "curves.png").stat().st_size > 1000
    header, row = (tmp_path / "metrics.csv").read_text().splitlines()
    assert header.startswith("step,epoch,") and row.startswith("45,0,")
    status, again, _ = call("demo", "--out", tmp_path, "--epochs", "1")
    assert status == 0 and again.splitlines()[-2].split(";")[1] in out
    status, again, _ = call("demo", "--out", tmp_path, "--epochs", "2")
    assert status == 0 and len((tmp_path / "metrics.csv").read_text().splitlines()) == 3
    assert call("watch", tmp_path, "--once")[0] == 0
    (tmp_path / "metrics.csv").write_text("mine")
    assert call("demo", "--out", tmp_path, "--epochs", "3")[0] == 2


def test_plot_draws_folders_and_files(call, folder, tmp_path):
    (tmp_path / "metrics.csv").write_text("step,epoch,x\n3,0,2.5\n6,1,2.25\n")
    out = tmp_path / "curves.png"
    for paths in ([folder], [folder.parent], [folder / "6"], [tmp_path / "metrics.csv", folder]):
        assert call("plot", *paths, "--out", out)[:2] == (0, f"{out}\n")
        assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 5000
        out.unlink()
    assert_mistake(call("plot", folder, "--out", out, "--metric", "y"), "'y'", "x")
    (tmp_path / "metrics.csv").write_text("step,epoch,x\n")
    assert_mistake(call("plot", tmp_path / "metrics.csv", "--out", out), "rows of metrics")
    assert not out.exists()
