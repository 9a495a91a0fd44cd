"""A run that is killed again and again ends with the bits of the run that never was."""

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LONGEST_LIFE_S = 2.2


class Server:
    """Lives of the script, one after the other, in processes that share their imports."""

    def __init__(self, folder, cache):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.script", str(folder), "--serve"],
            cwd=ROOT,
            env={**os.environ, "CRASH_CACHE": str(cache)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )

    def live(self, result, seconds):
        """Lets it live so long; returns whether it had to be killed."""
        self.process.stdin.write(f"{result}\n".encode())
        life = int(self.process.stdout.readline())
        done, _, _ = select.select([self.process.stdout], [], [], seconds)
        if not done:
            os.kill(life, signal.SIGKILL)
        assert self.process.stdout.readline() == b"dead\n"
        return not done

    def close(self):
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()


def steps(folder):
    return [int(one.name) for one in folder.glob("*") if one.name.isdigit()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="lives are forked")
@pytest.mark.parametrize(
    "num_kills, seed",
    [(50, 0), pytest.param(500, 1, marks=pytest.mark.slow)],
)
def test_killed_at_any_moment_it_ends_with_the_same_bits(num_kills, seed, tmp_path):
    cache = tmp_path / "cache"
    undisturbed = Server(tmp_path / "undisturbed", cache)
    try:
        assert not undisturbed.live(tmp_path / "expected", 300)
    finally:
        undisturbed.close()
    expected = json.loads((tmp_path / "expected").read_text())
    assert expected["halted_by"] == "early_stop_validation_loss"

    moments = random.Random(seed)
    kills = in_saves = finished = 0
    began = time.monotonic()
    while kills < num_kills:
        folder = tmp_path / f"killed-{finished}"
        server = Server(folder, cache)
        try:
            while kills < num_kills:
                seconds = moments.uniform(0, LONGEST_LIFE_S)
                if not server.live(tmp_path / "result", seconds):
                    break
                kills += 1
                in_saves += bool(list(folder.glob("*.orbax-checkpoint-tmp*")))
            # The last life, or one that was faster than its death.
            server.live(tmp_path / "result", 300)
        finally:
            server.close()
        finished += 1
        result = json.loads((tmp_path / "result").read_text())
        assert result == expected, f"seed {seed}, after {kills} kills"
    print(
        f"{kills} kills, {in_saves} of them in a save, {finished} runs ended, "
        f"{time.monotonic() - began:.0f} s"
    )
    # They did hit what they were to hit: saves, and the time before and after them.
    assert num_kills / 10 < in_saves < num_kills
