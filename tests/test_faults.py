"""Every write of a save fails, or is truncated, one after the other: nothing good is lost."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which("cc") or shutil.which("gcc")


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or COMPILER is None,
    reason="writes are made to fail by LD_PRELOAD, which needs Linux and a C compiler",
)
@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_whatever_write_fails_nothing_good_is_lost(stride, tmp_path):
    library = tmp_path / "faults.so"
    source = ROOT / "tests" / "faults" / "faults.c"
    command = [COMPILER, "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.script", library, tmp_path / "runs", str(stride)],
        cwd=ROOT,
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        timeout=1200,  # so that a fault cannot hang the suite
    )
    assert done.returncode == 0, done.stderr[-4000:]
    counted = json.loads(done.stdout)
    print(counted)
    # The faults did hit: directories, files, renames; and data that make up the arrays.
    calls = counted["replaced fail"]["calls"]
    assert calls > 60
    assert counted["replaced fail"]["error"] > 0.9 * (calls // stride)
    if stride == 1:
        assert counted["replaced full"]["error"] > 10 and counted["named fail"]["error"] > 10
        assert counted["named truncate"]["damage found"] > 0
