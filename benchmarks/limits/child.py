"""What the processes that are measured share. It does not import jaxloop.

watch = Stopwatch()
...
watch.report()          # prints a line of JSON for the parent, and ends the process
"""

import json
import os
import time

import jax
import numpy as np

from benchmarks.perceptron import TX, init_params

SIZES, BATCH_SIZE = (64, 64, 10), 32
STARTED = "BENCHMARK_STARTED"
"""The environment variable with the time at which the parent started this process."""


def random_params(key):
    """Returns random parameters as a user's model makes them, with `jax.random`."""
    params = []
    for a, b in zip(SIZES, SIZES[1:], strict=False):
        key, one = jax.random.split(key)
        params.append({"w": jax.random.normal(one, (a, b)) / a**0.5, "b": jax.numpy.zeros(b)})
    return params


def host_state():
    """Returns an initial state of NumPy arrays."""
    params = init_params(SIZES)
    return jax.tree.map(np.asarray, {"params": params, "opt": TX.init(params)})


class Stopwatch:
    """Measures from now on, and lists the executables that are compiled from now on."""

    def __init__(self):
        self._executables = []
        jax.monitoring.register_event_duration_secs_listener(self._compiled)
        self._wall, self._cpu = time.time(), time.process_time()

    @classmethod
    def of_process(cls):
        """Returns one that measures from the start of the process."""
        watch = cls()
        watch._wall, watch._cpu = float(os.environ[STARTED]), 0.0
        return watch

    def _compiled(self, event, duration, *, fun_name="?", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            self._executables.append(fun_name)

    def report(self):
        """Prints the figures and ends the process at once."""
        figures = {
            "wall_s": time.time() - self._wall,
            "cpu_s": time.process_time() - self._cpu,
            "executables": self._executables,
        }
        print(json.dumps(figures), flush=True)
        os._exit(0)  # the end of the run and the exit are not measured
