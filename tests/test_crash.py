"""A run that is killed again and again ends with the bits, and the rows, of one that never was."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.crash.script import rows_of

ROOT = Path(__file__).parent.parent


def load(folder):
    loaded = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    return loaded.Reload()


def scalars(folder):
    """Returns every number that TensorBoard shows."""
    loaded = load(folder)
    tags = loaded.Tags()["scalars"]
    return {tag: [(one.step, one.value) for one in loaded.Scalars(tag)] for tag in tags}


NEVER = ("never", 0, 0.0)


class Server:
    """Runs the script again and again, in processes that share their imports."""

    def __init__(self, folder, epochs, cache):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.script", str(folder), str(epochs), "--serve"],
            cwd=ROOT,
            env={**os.environ, "CRASH_CACHE": str(cache)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )

    def run(self, result, moment):
        """Runs the script, to be killed at a moment; returns whether it was."""
        self.process.stdin.write(" ".join(map(str, (result, *moment))).encode() + b"\n")
        code = int(self.process.stdout.readline())
        assert code in (0, -signal.SIGKILL)
        return code != 0

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def moments(seed, epochs):
    """Random moments: events, file operations of a save, rows, and shortly after any of these."""
    chosen = random.Random(seed)
    while True:
        kind = chosen.choice(["event", "event", "write", "write", "row"])
        most = {"event": min(400, 40 * epochs), "write": min(150, 15 * epochs), "row": 9 * epochs}
        n = chosen.randint(1, most[kind])
        yield kind, n, chosen.choice([0.0, 0.0, chosen.uniform(0, 0.05)])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked")
@pytest.mark.parametrize(
    "num_kills, seed, epochs",
    [
        (3, 2, 3),
        pytest.param(25, 0, 20, marks=pytest.mark.slow),
        pytest.param(500, 1, 40, marks=pytest.mark.endurance),
    ],
)
def test_killed_at_any_moment_it_ends_with_the_same_bits(num_kills, seed, epochs, tmp_path):
    cache = tmp_path / "cache"
    undisturbed = Server(tmp_path / "undisturbed", epochs, cache)
    try:
        assert not undisturbed.run(tmp_path / "expected", NEVER)
    finally:
        undisturbed.close()
    expected = json.loads((tmp_path / "expected").read_text())
    rows = rows_of(tmp_path / "undisturbed")
    assert len(expected["metrics.csv"].splitlines()) > 9 * epochs / 2
    stops = "early_stop_validation_loss" if epochs == 40 else "None"
    assert expected["halted_by"] == stops

    at = moments(seed, epochs)
    kills = in_saves = finished = 0
    while kills < num_kills:
        folder = tmp_path / f"killed-{finished}"
        server = Server(folder, epochs, cache)
        try:
            while kills < num_kills:
                if not server.run(tmp_path / "result", next(at)):
                    break
                kills += 1
                in_saves += bool(list(folder.glob("*.orbax-checkpoint-tmp*")))
            # The last process, or one that ended before its moment.
            server.run(tmp_path / "result", NEVER)
        finally:
            server.close()
        finished += 1
        result = json.loads((tmp_path / "result").read_text())
        assert result == expected, f"seed {seed}, after {kills} kills"
        assert scalars(rows_of(folder) / "tensorboard") == scalars(rows / "tensorboard")
    print(f"{kills} kills, {in_saves} of them in a save, {finished} runs ended")
    # The kills hit saves in their middle.
    assert in_saves > num_kills / 10


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked")
@pytest.mark.slow
@pytest.mark.parametrize("every, checkpoint_every", [(1, 1), (2, 5), (5, 5), (5, 1), (10, 2)])
def test_rows_of_killed_runs_are_those_of_an_undisturbed_one(every, checkpoint_every, tmp_path):
    """Epochs of five iterations, so rows, checkpoints and ends of epochs coincide in all ways."""
    chosen = random.Random(every)
    with subprocess.Popen(
        [sys.executable, "-m", "tests.crash.rows"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as server:

        def run(folder, seconds):
            print(folder, every, checkpoint_every, seconds, file=server.stdin, flush=True)
            code = int(server.stdout.readline())
            assert code in (0, -signal.SIGKILL)
            return code == 0

        whole, killed = tmp_path / "whole", tmp_path / "killed"
        assert run(whole, 0)
        for _ in range(10):
            if run(killed, chosen.uniform(0.05, 1.0)):
                break
        run(killed, 0)
        server.stdin.close()
    for name in ("metrics.csv", "metrics.jsonl"):
        assert (killed / name).read_text() == (whole / name).read_text()
    assert scalars(killed / "tensorboard") == scalars(whole / "tensorboard")
    shown = [
        load(folder / "tensorboard").Tensors("step/text_summary") for folder in (whole, killed)
    ]
    steps = [[event.step for event in events] for events in shown]
    assert steps[0] == steps[1] and steps[0] == sorted(set(steps[0]))
