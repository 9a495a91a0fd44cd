"""Reads states from a folder of checkpoints.

    state = restore("runs/a", "best", like=step_state)

A damaged checkpoint is skipped, with a warning that names it. A checkpoint that does not fit the
loop, or that the system does not allow to read, is an error. Reading changes nothing in the folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import uuid
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.random import wrap_key_data

from jaxloop._checkpoint.digests import check_digests, plain_path
from jaxloop._checkpoint.dtypes import leaf_dtype
from jaxloop._checkpoint.layout import Entry, check_readable, entries, unfinished
from jaxloop._checkpoint.lock import FolderLock, held_for
from jaxloop._checkpoint.names import UNFINISHED, check_path
from jaxloop._checkpoint.older import as_now, as_saved
from jaxloop._checkpoint.orbax_io import reason, restore_trees, stored_tree
from jaxloop._checkpoint.packing import is_array
from jaxloop._checkpoint.record import (
    check_format,
    check_leaves,
    numbered,
    step_state_of,
    unpack,
)
from jaxloop._checkpoint.reshaped import reshaped
from jaxloop._checkpoint.schema import NUMBERED
from jaxloop._core.arrays import data_of, is_key, key_impl
from jaxloop._core.placement import Placement, placement
from jaxloop._core.sessions import Sessions
from jaxloop._core.state import State, make
from jaxloop._core.types import PyTree
from jaxloop.errors import (
    ArgumentError,
    CheckpointError,
    DamagedError,
    SerializationError,
    first_line,
)

logger = logging.getLogger("jaxloop")


def restore(
    path: str | os.PathLike[str],
    which: Literal["latest", "best"] | int = "latest",
    *,
    like: PyTree = None,
) -> State[Any]:
    """Returns a `State` from a folder of checkpoints.

    Args:
        path: The path that was passed to `Loop.checkpoint`.
        which: "latest", "best" (by the criteria of the loop that wrote it), or a step.
        like: A `State`, or a step state of arrays or of `jax.ShapeDtypeStruct`. It gives the
            structure and the placement of the arrays. `Loop.restore` takes the structure from the
            loop. Without ``like``, named tuples and classes become lists and dicts, and all arrays
            are on one device.

    Returns:
        A `State`. A damaged checkpoint is skipped with a warning.

    Raises:
        CheckpointError: No such checkpoint exists, and the error lists the ones that do. Or the
            folder cannot be read.
        SerializationError: It belongs to another model or optimizer. The error lists the leaves.
        ArgumentError: ``which`` is invalid.

    Example:
        >>> import tempfile, jaxloop as jl
        >>> path = tempfile.mkdtemp()
        >>> loop = jl.loop(lambda batch, total: total + batch).checkpoint(path)
        >>> _ = loop.run([1, 2], init_state=0)
        >>> int(restore(path).step_state)
        3
    """
    folder = Path(check_path("restore", path)).absolute()
    found = entries(folder)
    if which == "latest":
        candidates = found
    elif which == "best":
        candidates = [entry for entry in found if entry.value is not None]
    elif isinstance(which, int) and not isinstance(which, bool):
        candidates = [entry for entry in found if entry.step == which]
    else:
        raise ArgumentError(
            f"restore: which must be 'latest', 'best' or a step, got {which!r}",
            fix="pass 'latest', 'best', or the number of a step",
        )
    state = newest_good(candidates, jax.tree.map(_array_like, step_state_of(like)))
    if state is None:
        if (folder / "meta").is_dir():
            raise CheckpointError(
                f"restore: path must be a folder of checkpoints, got one checkpoint: {folder}",
                fix=f"pass {str(folder.parent)!r}, and its step as which=",
            )
        steps = ", ".join(
            f"{entry.folder.name} (step {entry.step})" for entry in found if entry.record
        )
        raise CheckpointError(
            f"restore: {folder} has no good checkpoint for {which!r}; it has: {steps or 'none'}",
            fix="pass the path= of Loop.checkpoint, and one of these steps",
        )
    return state


def load_latest(path: str | Path, like: Callable[[], PyTree]) -> State[Any] | None:
    """Returns the newest good state in a folder, or None if the folder has no good one.

    Damaged and unfinished checkpoints are skipped, with a warning for each.

    Args:
        path: The folder.
        like: Returns a step state that gives the structure and the placement of the arrays. It is
            called if the folder has a checkpoint.

    Raises:
        CheckpointError: The path is not a folder, or it cannot be read.
        SerializationError: The newest one belongs to another model or optimizer.
    """
    folder = Path(path).absolute()
    for left in unfinished(folder):
        warnings.warn(
            f"the checkpoint {folder / left.name.split(UNFINISHED)[0]} was still being "
            "written when its run ended, so it is skipped",
            stacklevel=2,
        )
    found = entries(folder)
    state = newest_good(found, like()) if found else None
    return None if state is None else _with_lost_time(state, held_for(folder))


def _with_lost_time(state: State[Any], held: tuple[float, float] | None) -> State[Any]:
    """Returns a state that says how long its run went on after it, if its process was killed.

    Args:
        state: The newest good state of a folder.
        held: When the run acquired the lock of the folder and last touched it, or None if it
            released it.
    """
    sessions = state.sessions
    if held is None or not sessions:
        return state
    last, (since, touched) = sessions[-1], held
    # If the process that died is not that of the last session, nothing ran between the two.
    lost_s = max(0.0, touched - max(last.began + last.elapsed_s, since))
    known = Sessions((*sessions[:-1], dataclasses.replace(last, lost_s=lost_s)))
    return make(State, {**vars(state), "lazy_sessions": known})


def load_of_run(path: str | Path, state: State[Any]) -> State[Any] | None:
    """Returns the newest good state of the same run that is not later than ``state``, or None.

    Args:
        path: The folder.
        state: The present state of the run.

    Raises:
        CheckpointError: The path is not a folder, or it cannot be read.
    """
    for entry in entries(Path(path).absolute()):
        if entry.run_id is None or entry.run_id != state.run_id or entry.step > state.step:
            continue
        # A handler may have changed the structure since an older one was saved.
        with contextlib.suppress(SerializationError):
            found = newest_good([entry], step_state_of(state))
            if found is not None:
                return found
    return None


def check_folder(path: str, fresh: bool) -> None:
    """Raises if the folder cannot be written, and warns if a fresh run finds checkpoints there.

    Raises:
        CheckpointError: The folder cannot be written or read, or another run writes to it.
    """
    folder = Path(path).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{uuid.uuid4().hex}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            f"checkpoint: the folder {folder} cannot be written: {error}",
            fix="pass a writable path=",
        ) from error
    FolderLock(folder).check_free()
    found = entries(folder)
    if found and fresh:
        logger.warning(
            "the folder %s has %d checkpoints of an earlier run (%s ...); this run keeps them and "
            "saves beside them; use loop.resume(path) to continue from them, or another path=",
            folder,
            len(found),
            found[0].folder.name,
        )


def newest_good(found: Iterable[Entry], like: PyTree) -> State[Any] | None:
    """Returns the state of the first good checkpoint, or None. Warns of the damaged ones before it.

    Args:
        found: The checkpoints, in order of preference.
        like: A step state that gives the structure, or None.
    """
    for entry in found:
        try:
            return load(entry, like)
        except DamagedError as error:
            if entry.record is not None and not entry.folder.exists():
                continue  # the run that writes here has just deleted it
            warnings.warn(
                f"the checkpoint {entry.folder} is damaged and skipped: {first_line(error)}",
                stacklevel=2,
            )
    return None


def load(entry: Entry, like: PyTree = None) -> State[Any]:
    """Returns the state in one checkpoint, after checking every array.

    Args:
        entry: The checkpoint.
        like: A step state that gives the structure, or None.

    Raises:
        DamagedError: The record or an array is damaged or missing.
        SerializationError: It belongs to another model or optimizer, or to a later jaxloop.
        CheckpointError: The system does not allow to read it.
    """
    if entry.record is None:
        raise DamagedError(entry.problem)
    try:
        check_readable(entry.folder)
        return _load(entry, like)
    except (SerializationError, CheckpointError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # Orbax raises a bare Exception for damage
        ending = _ending(error)
        if ending is not None:
            raise ending from error
        raise DamagedError(reason(error), fix="use another checkpoint") from error


def _ending(error: BaseException | None) -> BaseException | None:
    """Returns what ends the run, such as a signal, if Orbax raised ``error`` in its place."""
    while isinstance(error, Exception):
        error = error.__cause__ or error.__context__
    return error


def _load(entry: Entry, like: PyTree) -> State[Any]:
    """Returns the state in a checkpoint, placed like ``like``, or in plain containers if None.

    Raises:
        SerializationError: It belongs to another model or optimizer.
        DamagedError: An array is not the one that was saved.
    """
    record = entry.record
    assert record is not None
    check_format(record)
    everywhere = _committed_to(placement(like))
    empty = {(name, path): shape for name, path, shape in record.get("empty", ())}

    def stored(name: str) -> PyTree:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: _device_target(
                empty.get((name, plain_path(path)), leaf.shape), leaf.dtype, everywhere
            ),
            stored_tree(entry.folder / name),
            is_leaf=lambda leaf: hasattr(leaf, "shape"),
        )

    present = like
    if like is not None:
        like = as_saved(record, like)
        if record.get("reshaped"):
            saved = record["leaves"]["step_state"]
            like = reshaped(like, saved, stored("step_state"), record["reshaped"])
        check_leaves(record, like, f"the checkpoint {entry.folder}")
    shapes: dict[str, PyTree] = {}
    for name, leaves in record["leaves"].items():
        if name in NUMBERED:
            # Handlers' arrays are restored as NumPy arrays, because JAX does not have every dtype.
            where = None if name == "arrays" else everywhere
            shapes[name] = numbered([_target(s, leaf_dtype(d), where) for _, d, s in leaves])
        elif like is not None:
            shapes[name] = jax.tree.map(lambda leaf: _target_like(leaf, everywhere), like)
        else:
            shapes[name] = stored(name) if leaves else {}
    restored = restore_trees(entry.folder, shapes)
    trees = {
        name: tree if name == "arrays" else _uncommitted(tree) for name, tree in restored.items()
    }
    state = unpack(record, trees)
    # Afterwards, because arrays of another dtype are no damage. Older formats have no digests.
    if "digests" in record:
        check_digests(record["digests"], restored, f"the checkpoint {entry.folder}")
    return as_now(state, present).replace(last_checkpoint=str(entry.folder))


# --- the placement of restored arrays ------------------------------------------------------------


def _committed_to(place: Placement) -> jax.sharding.Sharding | None:
    """Returns where the leaves of a state go that have no place of their own, or None."""
    if place.sharding is not None or place.device is None or not place.committed:
        return place.sharding
    return jax.sharding.SingleDeviceSharding(place.device)


def _target_like(leaf: Any, everywhere: jax.sharding.Sharding | None) -> Any:
    """Returns what Orbax restores a leaf as, to be placed like a leaf of a step state."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, jax.sharding.Sharding) or not getattr(leaf, "committed", True):
        sharding = everywhere
    return _target(leaf.shape, leaf.dtype, sharding)


def _target(shape: Any, dtype: Any, sharding: jax.sharding.Sharding | None) -> Any:
    """Returns what Orbax restores an array as: one of NumPy, or one on devices.

    Orbax commits arrays to their devices, and the first block of a run would compile twice if some
    are. Those for the default device are therefore restored as arrays of NumPy.
    """
    if sharding is not None or jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return _device_target(shape, dtype, sharding)
    # It takes no memory, because a record may say any shape.
    return np.broadcast_to(np.zeros((), dtype), shape)


def _device_target(shape: Any, dtype: Any, sharding: jax.sharding.Sharding | None) -> Any:
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding or default)


def _uncommitted(tree: PyTree) -> PyTree:
    """Moves the arrays of NumPy to the default device. Those that are there become uncommitted."""
    leaves, tree_structure = jax.tree.flatten(tree)
    default = {jax.local_devices()[0]}
    at = [i for i, x in enumerate(leaves) if not isinstance(x, jax.Array) or x.devices() == default]
    hosts = [np.asarray(data_of(leaves[i])) for i in at]
    for i, array in zip(at, jax.device_put(hosts), strict=True):
        key = is_key(leaves[i])
        leaves[i] = wrap_key_data(array, impl=key_impl(leaves[i].dtype)) if key else array
    return jax.tree.unflatten(tree_structure, leaves)


def _array_like(leaf: Any) -> Any:
    return leaf if is_array(leaf) or hasattr(leaf, "shape") else jnp.asarray(leaf)
