"""Reads states from a folder of checkpoints.

    state = restore("runs/a", "best", like=step_state)

A damaged checkpoint is passed over, and named; one of another model is an error.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import uuid
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxloop._checkpoint.layout import UNFINISHED, Entry, entries, tidy
from jaxloop._checkpoint.orbax_io import filled, plain_path
from jaxloop._checkpoint.record import (
    NUMBERED,
    check_format,
    check_leaves,
    is_array,
    numbered,
    step_state_of,
    unpack,
)
from jaxloop._core.placement import placement
from jaxloop._core.state import State
from jaxloop._core.types import PyTree
from jaxloop.errors import ArgumentError, CheckpointError, SerializationError, first_line

logger = logging.getLogger("jaxloop")


def load(entry: Entry, like: PyTree) -> State:
    """The state in one checkpoint, placed as ``like`` is; None: as plain containers.

    Raises:
        SerializationError: It is of another model or optimizer.
    """
    import orbax.checkpoint as ocp

    record = entry.record
    assert record is not None
    check_format(record)
    if like is not None:
        check_leaves(record, like, f"the checkpoint {entry.folder}")
    place = placement(like)
    everywhere = place.sharding or jax.sharding.SingleDeviceSharding(
        place.device or jax.local_devices()[0]
    )

    placed = functools.partial(jax.ShapeDtypeStruct, sharding=everywhere)
    empty = {(name, path): shape for name, path, shape in record.get("empty", ())}

    def wanted(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, jax.sharding.Sharding):
            sharding = everywhere
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def stored(name: str) -> PyTree:
        kept = ocp.StandardCheckpointHandler().metadata(folder / name).tree["tree"]
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: placed(empty.get((name, plain_path(path)), leaf.shape), leaf.dtype),
            kept,
            is_leaf=lambda leaf: hasattr(leaf, "shape"),
        )

    folder = entry.folder
    trees: dict[str, PyTree] = {}
    for name, leaves in record["leaves"].items():
        if name in NUMBERED:
            # Arrays of handlers come back as NumPy's, of which JAX has not every dtype.
            make = np.zeros if name == "arrays" else placed
            trees[name] = numbered([make(s, jnp.dtype(d)) for _, d, s in leaves])
        elif like is not None:
            trees[name] = jax.tree.map(wanted, like)
        else:
            trees[name] = stored(name) if leaves else {}
    args = {
        name: ocp.args.StandardRestore({"tree": jax.tree.map(filled, tree)})
        for name, tree in trees.items()
        if jax.tree.leaves(tree)
    }
    if args:
        with contextlib.closing(ocp.Checkpointer(ocp.CompositeCheckpointHandler())) as reader:
            restored = reader.restore(folder, args=ocp.args.Composite(**args))
        for name in args:
            trees[name] = jax.tree.map(_emptied, trees[name], restored[name]["tree"])
    return unpack(record, trees)


def _emptied(wanted: Any, restored: Any) -> Any:
    """Undoes `filled`."""
    if wanted.size:
        return restored
    return jnp.zeros(wanted.shape, wanted.dtype, device=wanted.sharding)


def _newest_good(found: Iterable[Entry], like: PyTree) -> State | None:
    for entry in found:
        problem = entry.problem
        if entry.record is not None:
            try:
                return load(entry, like)
            except (SerializationError, MemoryError, jax.errors.JaxRuntimeError):
                raise  # no damage: nothing on the disk would be read better
            except Exception as error:  # noqa: BLE001  Orbax raises bare Exception for damage
                problem = first_line(error)
        warnings.warn(
            f"the checkpoint {entry.folder} is damaged and passed over: {problem}",
            stacklevel=2,
        )
    return None


def load_latest(path: str | Path, like: PyTree) -> State | None:
    """The newest good state in ``path``; damaged and half-written ones are passed over, and named.

    Raises:
        SerializationError: The newest is of another model or optimizer.
    """
    folder = Path(path).absolute()
    if folder.is_dir():
        for left in tidy(folder):
            warnings.warn(
                f"the checkpoint {folder / left.name.split(UNFINISHED)[0]} was still being "
                "written when its run ended, and is passed over",
                stacklevel=2,
            )
    return _newest_good(entries(folder), like)


def restore(path: str, which: str | int = "latest", *, like: State | PyTree = None) -> State:
    """The `State` in a folder of checkpoints, for use by hand.

    Args:
        path: What `Loop.checkpoint` was given.
        which: "latest", "best" (by the criteria of the loop that wrote it), or a step.
        like: A `State`, or a step state of arrays or of `jax.ShapeDtypeStruct`: its structure,
            and where its arrays are. ``loop.run(data, epochs=0, output_transform=lambda s: s)``
            makes one without a step. None: named tuples and classes come back as lists and dicts,
            and all arrays on one device.

    Returns:
        A `State`. A damaged checkpoint is passed over with a warning.

    Raises:
        CheckpointError: There is no such checkpoint; the error lists those that are there.
        SerializationError: It is of another model or optimizer; the error lists the leaves.

    Example:
        >>> import tempfile, jaxloop as jl
        >>> path = tempfile.mkdtemp()
        >>> loop = jl.loop(lambda batch, total: total + batch).checkpoint(path)
        >>> _ = loop.run([1, 2], init_state=0)
        >>> int(restore(path).step_state)
        3
    """
    folder = Path(path).absolute()
    there = entries(folder)
    if which == "latest":
        found = there
    elif which == "best":
        found = [entry for entry in there if entry.value is not None]
    elif isinstance(which, int) and not isinstance(which, bool):
        found = [entry for entry in there if entry.step == which]
    else:
        raise ArgumentError(f"restore: which must be 'latest', 'best' or a step, and is {which!r}")
    state = _newest_good(found, jax.tree.map(_array_like, step_state_of(like)))
    if state is None:
        steps = ", ".join(
            f"{entry.folder.name} (step {entry.step})" for entry in there if entry.record
        )
        raise CheckpointError(
            f"restore: {folder} holds no good checkpoint for {which!r}; there are: "
            f"{steps or 'none'}",
            fix="pass the path= that Loop.checkpoint got, and one of these steps",
        )
    return state


def _array_like(leaf: Any) -> Any:
    return leaf if is_array(leaf) or hasattr(leaf, "shape") else jnp.asarray(leaf)


def check_folder(path: str, fresh: bool) -> None:
    """Raises if nothing can be written in ``path``; warns if a fresh run finds checkpoints there.

    Raises:
        CheckpointError: It cannot; the error says why.
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
            fix="pass a path= that can be written",
        ) from error
    there = entries(folder) if fresh else []
    if there:
        logger.warning(
            "the folder %s holds %d checkpoints of an earlier run (%s ...), which this one starts "
            "to replace; loop.resume(path) goes on from them, another path= leaves them alone",
            folder,
            len(there),
            there[0].folder.name,
        )
