"""Times functions that take turns, and measures memory.

seconds = interleaved({"hand": hand, "scan": scan}, repeats=15)
"""

import os
import statistics
import time
from pathlib import Path

import numpy as np

PAUSE_S = 0.05
"""Wait this long after a case of another library, until its threads are idle."""


def timed(function):
    """Returns how many seconds a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def interleaved(functions, repeats, pause_after=()):
    """Times the functions in turn, in random order, and returns the median seconds of each."""
    seconds = {name: [] for name in functions}
    names, order = list(functions), np.random.default_rng(0)
    for _ in range(repeats):
        for name in order.permutation(names):
            seconds[name].append(timed(functions[name]))
            if name in pause_after:
                time.sleep(PAUSE_S)
    return {name: statistics.median(one) for name, one in seconds.items()}


def memory_mb():
    """Returns the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6
