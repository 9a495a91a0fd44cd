"""What is asked of Orbax, and what is asked of its private parts."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxloop._core.types import PyTree

ONE_SAVE = threading.Lock()
"""Orbax numbers the saves of a process, and those that begin while another does share a number."""


def end_waiting() -> None:
    """Ends the threads of the save that has just failed.

    Orbax lets them wait for minutes for what will not come, and the process cannot end before
    they do. It has no public way to end them; where this one is gone, they wait.
    """
    with contextlib.suppress(Exception):
        from orbax.checkpoint._src.futures import future, synchronization

        operation = synchronization.OperationIdGenerator.get_current_operation_id()
        for thread in threading.enumerate():
            if isinstance(thread, future._SignalingThread) and thread._operation_id == operation:
                thread.cancel()
                future.set_signals(thread._receive_signals, operation_id=operation)


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Keeps Orbax from asking TensorStore for its counters, which are for Orbax's log alone.

    TensorStore never frees what it answers with: 20 KB for each tree that is saved.
    """
    try:
        from orbax.checkpoint._src.serialization import tensorstore_utils

        counter = tensorstore_utils.get_tensorstore_raw_bytes
    except (ImportError, AttributeError):  # another version of Orbax's
        yield
        return
    tensorstore_utils.get_tensorstore_raw_bytes = lambda *_: 0
    try:
        yield
    finally:
        tensorstore_utils.get_tensorstore_raw_bytes = counter


# --- arrays without elements, and where arrays are ---


def filled(leaf: Any) -> Any:
    """An array without elements, which Orbax cannot save, as one of a single zero."""
    if leaf.size:
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.update(shape=(1,), sharding=_one_device(leaf.sharding))
    return np.zeros(1, leaf.dtype)


def empty_arrays(trees: dict[str, PyTree]) -> list[list[Any]]:
    """``[tree, path, shape]`` of each array without elements."""
    return [
        [name, plain_path(path), list(leaf.shape)]
        for name, tree in trees.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if not leaf.size
    ]


def plain_path(path: Any) -> str:
    """A path as it is too when classes have become dicts."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _one_device(sharding: Any) -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(min(sharding.device_set, key=lambda d: d.id))


def on_cpu(trees: PyTree) -> bool:
    leaves = (x for x in jax.tree.leaves(trees) if isinstance(x, jax.Array))
    return all(device.platform == "cpu" for x in leaves for device in x.devices())
