"""A save that the loop does not wait for, against a save by Orbax that it waits for.

figures = save(Effort(repeats=5))       # {"idle device": Figure(0.03, ...), ...}
"""

import tempfile
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from benchmarks.checkpoints import (
    SHAPES,
    SMALL,
    held_up_busy,
    held_up_idle,
    make_state,
    waited_for,
)
from benchmarks.limits.measure import Figure, Row


def save(effort):
    """Measures how long the loop stands still for a save of 100 MB.

    With a busy device, the figure is the time in the driver. The two saves of an epoch are far
    enough apart that each ends before the next begins.
    """
    num_leaves, size, every = SMALL["5 leaves"] if effort.smoke else SHAPES["25 leaves"]
    state, repeats = make_state(num_leaves, size), min(effort.few_repeats, 3)
    pause_s = 0.1 if effort.smoke else 1.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
            sync = waited_for(writer, path / "bare", jax.device_put({"tree": state}), repeats)
        held = {
            "idle device": held_up_idle(path / "idle", state, repeats, pause_s),
            "busy device": held_up_busy(path, state, every, 1)[0],
        }
    return {
        name: Figure(own / sync, f"{own * 1e3:.1f} to {sync * 1e3:.0f} ms a save")
        for name, own in held.items()
    }


ROWS = {
    "save": Row(
        "save that the loop does not wait for, against a save that it waits for",
        save,
        {"idle device": 0.1, "busy device": 0.1},
    ),
}
