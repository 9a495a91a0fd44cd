"""A run that is killed again and again ends with the bits of the run that never was."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
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
    """Random moments: events of the loop, file operations of a save, and shortly after either."""
    chosen = random.Random(seed)
    while True:
        kind = chosen.choice(["event", "write"])
        n = chosen.randint(1, min(400, 40 * epochs) if kind == "event" else min(150, 15 * epochs))
        yield kind, n, chosen.choice([0.0, 0.0, chosen.uniform(0, 0.05)])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked")
@pytest.mark.parametrize(
    "num_kills, seed, epochs",
    [
        (5, 2, 4),
        pytest.param(50, 0, 40, marks=pytest.mark.slow),
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
    print(f"{kills} kills, {in_saves} of them in a save, {finished} runs ended")
    # The kills hit saves in their middle.
    assert in_saves > num_kills / 10
