"""What this process holds."""

import gc
import os
import threading


def resident_mb():
    """Memory in MB, after collecting garbage."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def held():
    """``{what: count}`` of what a leak would add to."""
    gc.collect()
    return {
        "objects": len(gc.get_objects()),
        "threads": threading.active_count(),
        "files": len(os.listdir("/proc/self/fd")),
    }
