"""All uses of Orbax: saving and restoring trees of arrays, and two private functions.

    save_trees(folder, record, on_host(trees))      # returns when everything is written
    restored = restore_trees(folder, {"step_state": shapes})

Orbax is imported here, when a checkpoint is first written or read. It cannot save an array without
elements, so such an array is saved as a single zero.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxloop._checkpoint.digests import plain_path
from jaxloop._core.arrays import is_key
from jaxloop._core.types import PyTree
from jaxloop.errors import first_line

PRIVATE_FROM, PRIVATE_BEFORE = (0, 12, 5), (0, 13, 0)
"""jaxloop uses private functions of Orbax only in versions from the first to before the second."""

_ONE_SAVE = threading.Lock()
"""Orbax numbers the saves of a process. Saves that begin at the same time would share a number."""


def orbax() -> Any:
    """Returns `orbax.checkpoint`."""
    # Imported here, because it takes 0.2 s and 50 MB, and not every loop saves.
    import orbax.checkpoint as ocp

    return ocp


def on_host(trees: dict[str, PyTree]) -> dict[str, PyTree]:
    """Returns the trees with all arrays in the host's memory.

    Arrays on a CPU stay as they are. Others are copied, because the device may have no room for a
    copy of its own.
    """
    leaves = [leaf for leaf in jax.tree.leaves(trees) if not _is_on_host(leaf)]
    for leaf in leaves:
        if not is_key(leaf):
            leaf.copy_to_host_async()

    def fetched(leaf: Any) -> Any:
        if _is_on_host(leaf):
            return leaf
        return jnp.copy(leaf) if is_key(leaf) else np.asarray(leaf)

    return jax.tree.map(fetched, trees)


def _is_on_host(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array):
        return True
    return all(device.platform == "cpu" for device in leaf.devices())


def save_trees(folder: Path, record: dict[str, Any], trees: dict[str, PyTree]) -> None:
    """Writes a checkpoint, and returns when it is complete.

    Args:
        folder: The folder of the checkpoint. It must not exist.
        record: The record.
        trees: The trees of arrays. Each is in a dict, as Orbax takes no bare array.
    """
    ocp = orbax()
    items = {
        key: ocp.args.StandardSave({"tree": jax.tree.map(_filled, tree)})
        for key, tree in trees.items()
        if jax.tree.leaves(tree)
    }
    arguments = ocp.args.Composite(meta=ocp.args.JsonSave(record), **items)
    with _ONE_SAVE, _without_counters(), _with_plain_name(folder) as target:
        writer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
        try:
            writer.save(target, args=arguments)
        except Exception:
            _end_waiting_threads()
            raise
        finally:
            writer.close()


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
        reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
        with contextlib.closing(reader), _with_plain_name(folder) as source:
            restored = reader.restore(source, args=ocp.args.Composite(**arguments))
        for name in arguments:
            trees[name] = jax.tree.map(_emptied, shapes[name], restored[name]["tree"])
    return trees


def reason(error: BaseException) -> str:
    """Returns why Orbax could not read a checkpoint, in one line.

    Orbax' message about an unreadable array is the specification of the array. This finds its name.

    Example:
        >>> reason(Exception("Error ...\\n 'path': '/a/6/step_state/', 'path': 'tree.w/'"))
        'the array step_state/w cannot be read'
    """
    found = _UNREADABLE.search(str(error))
    if found is None:
        return first_line(error)
    tree, name = found[1], found[2].strip(".").replace(".", "/")
    return f"the array {f'{tree}/{name}'.rstrip('/')} cannot be read"


_UNREADABLE = re.compile(r"'path': '[^']*/(\w+)/'.*'path': 'tree([^']*)/'", re.DOTALL)


def stored_tree(folder: Path) -> PyTree:
    """Returns the structure of a tree in a checkpoint, with shapes and dtypes as leaves."""
    with _with_plain_name(folder) as source:
        return orbax().StandardCheckpointHandler().metadata(source).tree["tree"]


@contextlib.contextmanager
def _with_plain_name(folder: Path) -> Iterator[Path]:
    """Returns a path of the folder that Orbax and TensorStore understand.

    Orbax takes some characters for patterns, and TensorStore takes a backslash for a separator. If
    the path contains one of them, this makes a symbolic link to the folder's parent for a while.
    """
    if not any(sign in str(folder.parent) for sign in "*?[]\\"):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="jaxloop-") as temporary:
        link = Path(temporary) / "checkpoints"
        link.symlink_to(folder.parent, target_is_directory=True)
        try:
            yield link / folder.name
        finally:
            link.unlink()


# --- arrays without elements ---------------------------------------------------------------------


def empty_arrays(trees: dict[str, PyTree]) -> list[list[Any]]:
    """Returns ``[tree, path, shape]`` of each array without elements."""
    return [
        [name, plain_path(path), list(leaf.shape)]
        for name, tree in trees.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if not leaf.size
    ]


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
    empty = np.zeros(shape.shape, shape.dtype)
    return empty if isinstance(shape, np.ndarray) else jax.device_put(empty, shape.sharding)


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
