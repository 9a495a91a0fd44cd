"""All uses of Orbax: saving and restoring trees of arrays, and two private functions.

    io = OrbaxIO()
    io.save_now(folder, record, trees)              # returns when everything is written
    io.start_saving(folder, record, trees)          # returns when the host has a copy
    io.wait()
    restored = restore_trees(folder, {"step_state": shapes})

Orbax is imported here, when a checkpoint is first written or read. It cannot save an array without
elements, so such an array is saved as a single zero.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxloop._core.types import PyTree

PRIVATE_FROM, PRIVATE_BEFORE = (0, 12, 5), (0, 13, 0)
"""jaxloop uses private functions of Orbax only in versions from the first to before the second."""

_ONE_SAVE = threading.Lock()
"""Orbax numbers the saves of a process. Saves that begin at the same time would share a number."""


def orbax() -> Any:
    """Returns `orbax.checkpoint`."""
    # Imported here, because it takes 0.2 s and 50 MB, and not every loop saves.
    import orbax.checkpoint as ocp

    return ocp


class OrbaxIO:
    """Writes checkpoints, one at a time."""

    def __init__(self) -> None:
        self._ocp = ocp = orbax()
        # If Orbax fails to make directories in the background, it leaves threads that wait for
        # minutes.
        options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        self._asynchronous = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(), async_options=options
        )
        self._synchronous = ocp.Checkpointer(ocp.CompositeCheckpointHandler())

    def arguments(self, record: dict[str, Any], trees: dict[str, PyTree]) -> Any:
        """Returns Orbax's save arguments. Each tree is in a dict, as Orbax takes no bare array."""
        ocp = self._ocp
        items = {
            key: ocp.args.StandardSave({"tree": jax.tree.map(_filled, tree)})
            for key, tree in trees.items()
            if jax.tree.leaves(tree)
        }
        return ocp.args.Composite(meta=ocp.args.JsonSave(record), **items)

    def save_now(self, target: Path, arguments: Any) -> None:
        """Writes a checkpoint, and returns when it is complete."""
        with _ONE_SAVE, _without_counters():
            try:
                self._synchronous.save(target, args=arguments)
            except Exception:
                _end_waiting_threads()
                raise

    def start_saving(self, target: Path, arguments: Any) -> None:
        """Starts writing a checkpoint, and returns when the host has a copy of the arrays."""
        with _ONE_SAVE:
            self._asynchronous.save(target, args=arguments)

    def poll(self) -> None:
        """Raises if the save that was started has failed."""
        self._asynchronous.check_for_errors()

    def wait(self) -> None:
        """Waits for the save that was started."""
        try:
            self._asynchronous.wait_until_finished()
        except Exception:
            _end_waiting_threads()
            raise

    def close(self) -> None:
        """Stops Orbax's threads."""
        self._asynchronous.close()


def restore_trees(folder: Path, shapes: dict[str, PyTree]) -> dict[str, PyTree]:
    """Returns the trees of a checkpoint, with the shapes, dtypes and shardings of ``shapes``."""
    ocp = orbax()
    arguments = {
        name: ocp.args.StandardRestore({"tree": jax.tree.map(_filled, tree)})
        for name, tree in shapes.items()
        if jax.tree.leaves(tree)
    }
    trees = dict(shapes)
    if arguments:
        with contextlib.closing(ocp.Checkpointer(ocp.CompositeCheckpointHandler())) as reader:
            restored = reader.restore(folder, args=ocp.args.Composite(**arguments))
        for name in arguments:
            trees[name] = jax.tree.map(_emptied, shapes[name], restored[name]["tree"])
    return trees


def stored_tree(folder: Path) -> PyTree:
    """Returns the structure of a tree in a checkpoint, with shapes and dtypes as leaves."""
    return orbax().StandardCheckpointHandler().metadata(folder).tree["tree"]


def are_on_cpu(trees: PyTree) -> bool:
    """Returns whether every array is in the host's memory."""
    leaves = (x for x in jax.tree.leaves(trees) if isinstance(x, jax.Array))
    return all(device.platform == "cpu" for x in leaves for device in x.devices())


# --- arrays without elements ---------------------------------------------------------------------


def empty_arrays(trees: dict[str, PyTree]) -> list[list[Any]]:
    """Returns ``[tree, path, shape]`` of each array without elements."""
    return [
        [name, plain_path(path), list(leaf.shape)]
        for name, tree in trees.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if not leaf.size
    ]


def plain_path(path: Any) -> str:
    """Returns a path as a string that does not change if classes become dicts."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _filled(leaf: Any) -> Any:
    """Replaces an array without elements by an array of one zero."""
    if leaf.size:
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.update(shape=(1,), sharding=_one_device(leaf.sharding))
    return np.zeros(1, leaf.dtype)


def _emptied(shape: Any, restored: Any) -> Any:
    """Undoes `_filled`."""
    if shape.size:
        return restored
    return jnp.zeros(shape.shape, shape.dtype, device=shape.sharding)


def _one_device(sharding: Any) -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(min(sharding.device_set, key=lambda d: d.id))


# --- private parts of Orbax ----------------------------------------------------------------------


def may_use_private(version: str) -> bool:
    """Returns whether the private functions of this version of Orbax were tested.

    Example:
        >>> may_use_private("0.12.8"), may_use_private("1.0.0")
        (True, False)
    """
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    return PRIVATE_FROM <= numbers < PRIVATE_BEFORE


def _end_waiting_threads() -> None:
    """Ends the threads of the save that has just failed.

    Orbax lets them wait for minutes for a signal that never arrives, and the process cannot exit
    before they end. Orbax has no public way to end them. In untested versions, they wait.
    """
    if not may_use_private(orbax().__version__):
        return
    with contextlib.suppress(Exception):
        # Private, so only imported where it is used.
        from orbax.checkpoint._src.futures import future, synchronization

        operation = synchronization.OperationIdGenerator.get_current_operation_id()
        for thread in threading.enumerate():
            if isinstance(thread, future._SignalingThread) and thread._operation_id == operation:
                thread.cancel()
                future.set_signals(thread._receive_signals, operation_id=operation)


@contextlib.contextmanager
def _without_counters() -> Iterator[None]:
    """Stops Orbax from reading TensorStore's counters, which it needs only for its log.

    TensorStore never frees the result, which takes 20 KB for each saved tree. In untested versions
    of Orbax, the counters are read.
    """
    if not may_use_private(orbax().__version__):
        yield
        return
    # Private, so only imported where it is used.
    from orbax.checkpoint._src.serialization import tensorstore_utils

    counter = tensorstore_utils.get_tensorstore_raw_bytes
    tensorstore_utils.get_tensorstore_raw_bytes = lambda *_: 0
    try:
        yield
    finally:
        tensorstore_utils.get_tensorstore_raw_bytes = counter
