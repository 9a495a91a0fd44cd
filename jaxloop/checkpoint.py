"""A `State` on disk, through Orbax.

    store = Store("runs/a", keep=3, keep_best=1, keep_every=None)
    store.save("120", state, value=None)
    store.begin()                               # written in the background
    store.close()
    state = restore("runs/a", like=step_state)

A checkpoint is a folder ``<path>/<name>/`` in Orbax's layout: the record in ``meta``, and each tree
of arrays beside it. It gets its name when it is complete, and it loses it before anything of it is
deleted: whatever has a name is whole, unless the disk itself damaged it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import shutil
import threading
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxloop.errors import ArgumentError, CheckpointError, SerializationError
from jaxloop.packing import (
    NUMBERED,
    check_format,
    check_leaves,
    checksum,
    is_array,
    numbered,
    pack,
    unpack,
)
from jaxloop.stacks import placement
from jaxloop.state import PyTree, State

logger = logging.getLogger("jaxloop")

_REPLACED, _DELETED, _UNFINISHED = ".replaced", ".deleted", ".orbax-checkpoint-tmp"

UNTOUCHED = (
    "see that the folder is there, is writable and has room; the checkpoints before it are as they "
    "were, and loop.resume(path) goes on from the newest"
)


class Store:
    """A folder of checkpoints, written in the background.

    A checkpoint of a name that is there already replaces it; the old one goes only once the new one
    is complete.

    Args:
        path: The folder.
        keep: How many of the newest stay; None: all.
        keep_best: How many of those that were the best when they were saved stay beside them.
        keep_every: Those whose step is a multiple of it stay too; None: no more.
    """

    def __init__(
        self, path: str, *, keep: int | None, keep_best: int = 1, keep_every: int | None = None
    ) -> None:
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self.path = Path(path).absolute()
        self.path.mkdir(parents=True, exist_ok=True)
        _tidy(self.path)
        self._keep, self._keep_best, self._keep_every = keep, keep_best, keep_every
        # Directories made in the background leave threads that wait for minutes if that fails.
        options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(), async_options=options
        )
        self._synchronous = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
        self._writer = futures.ThreadPoolExecutor(1, thread_name_prefix="jaxloop-save")
        self._ready: Callable[[], None] | None = None
        self._writing: futures.Future[None] | None = None
        self._order = max((entry.order for entry in entries(self.path)), default=0)

    def save(self, name: str, state: State, value: float | None) -> None:
        """Makes ready to save ``state``; waits for an earlier save, not for this one.

        Whoever donates the state's arrays copies them first, as long as the state is kept here.

        Args:
            name: Of the checkpoint's folder.
            state: What is saved.
            value: Of the metric whose best this is, or None.

        Raises:
            CheckpointError: It cannot be written, or the one before could not.
        """
        ocp = self._ocp
        record, trees = pack(state)
        self._wait()
        if not self.path.is_dir():
            raise CheckpointError(f"the folder {self.path} has vanished", fix=UNTOUCHED)
        self._order += 1
        target, old = self.path / name, self.path / (name + _REPLACED)
        try:
            if target.exists():
                before = _read(target).record
                if before is not None and before["step"] == state.step and value is None:
                    value = before["value"]  # it stays the best that it was
                os.rename(target, old)
            record |= {"order": self._order, "value": value, "empty": _empty(trees)}
            record["sha256"] = checksum(record)
            # In a dict, as Orbax takes no tree that is a single array.
            items = {
                key: ocp.args.StandardSave({"tree": jax.tree.map(_filled, tree)})
                for key, tree in trees.items()
                if jax.tree.leaves(tree)
            }
            args = ocp.args.Composite(meta=ocp.args.JsonSave(record), **items)
            if _on_cpu(trees):
                # Nothing has to be copied to the host: all of the work is done beside the loop.
                self._ready = functools.partial(self._write, target, args, state)
            else:
                # Returns when the host has a copy; the device needs no room for a second one.
                with _ONE_SAVE:
                    self._checkpointer.save(target, args=args)
        except Exception as error:  # Orbax and TensorStore raise errors of many kinds
            raise self._failed(error) from error

    def begin(self) -> None:
        """Begins to write what `save` made ready, unless that has begun.

        Apart, so that the loop has copied what it donates before a thread is in its way.
        """
        ready, self._ready = self._ready, None
        if ready is not None:
            self._writing = self._writer.submit(ready)

    def _write(self, target: Path, args: Any, state: State) -> None:
        """Writes all of a checkpoint.

        For as long as that takes, ``state`` is kept, so that nobody donates its arrays.
        """
        del state
        with _ONE_SAVE, _uncounted():
            try:
                self._synchronous.save(target, args=args)
            except Exception:
                _end_waiting()
                raise
        self._settle()

    def poll(self) -> None:
        """Raises if a save in the background has failed; does not wait.

        Raises:
            CheckpointError: It has.
        """
        if self._writing is not None and self._writing.done():
            self._wait()
            return
        try:
            self._checkpointer.check_for_errors()
        except Exception as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> CheckpointError:
        _tidy(self.path)
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        return CheckpointError(
            f"a checkpoint in {self.path} could not be written: {what:.300}", fix=UNTOUCHED
        )

    def _wait(self) -> None:
        self.begin()
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
            else:
                self._wait_for_orbax()
        except Exception as error:
            raise self._failed(error) from error

    def _wait_for_orbax(self) -> None:
        try:
            self._checkpointer.wait_until_finished()
        except Exception:
            _end_waiting()
            raise
        self._settle()

    def _settle(self) -> None:
        """Deletes what a checkpoint that is complete now makes superfluous."""
        for old in self.path.glob("*" + _REPLACED):
            if (self.path / old.name.removesuffix(_REPLACED)).exists():
                _delete(old)
        self._retain()

    def _retain(self) -> None:
        """Deletes what is neither new nor best; only what is complete counts."""
        if self._keep is None:
            return
        there = [entry for entry in entries(self.path) if entry.record is not None]
        best = [entry for entry in there if entry.value is not None][: self._keep_best]
        for entry in there[self._keep :]:
            often = self._keep_every is not None and entry.step % self._keep_every == 0
            if entry not in best and not often:
                _delete(entry.folder)

    def newest(self, like: PyTree) -> State | None:
        """The newest good state, the one that is being saved included."""
        self._wait()
        return load_latest(self.path, like)

    def close(self) -> None:
        """Waits until everything is on disk, and ends the threads.

        Raises:
            CheckpointError: The last save failed.
        """
        try:
            self._wait()
        finally:
            self._writer.shutdown()
            self._checkpointer.close()


_ONE_SAVE = threading.Lock()
"""Orbax numbers the saves of a process, and those that begin while another does share a number."""


def _end_waiting() -> None:
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
def _uncounted() -> Iterator[None]:
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


# --- what is there -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Entry:
    """A checkpoint in a folder: its record, or what is wrong with it."""

    folder: Path
    record: dict[str, Any] | None
    problem: str = ""

    @property
    def order(self) -> int:
        """When it was saved: larger is later; 0 of a damaged one."""
        return self.record["order"] if self.record is not None else 0

    @property
    def step(self) -> int:
        """The state's step; -1 of a damaged one."""
        return self.record["step"] if self.record is not None else -1

    @property
    def value(self) -> float | None:
        """What made it the best when it was saved."""
        return None if self.record is None else self.record["value"]


def _read(folder: Path) -> Entry:
    try:
        record = json.loads((folder / "meta" / "metadata").read_text())
    except (OSError, ValueError) as error:
        return Entry(folder, None, f"its record cannot be read: {error}")
    if not isinstance(record, dict) or record.get("sha256") != checksum(record):
        return Entry(folder, None, "its record is altered: the checksum differs")
    return Entry(folder, record)


def entries(path: Path) -> list[Entry]:
    """The checkpoints in a folder, the newest first; before them those whose age is unknown."""
    if not path.is_dir():
        return []
    found = []
    for folder in path.iterdir():
        name = folder.name
        if _UNFINISHED in name or name.endswith(_DELETED):
            continue
        # What is being replaced counts for as long as the new one is not there.
        if name.endswith(_REPLACED) and (path / name.removesuffix(_REPLACED)).exists():
            continue
        if (folder / "meta").is_dir() or (folder / "_CHECKPOINT_METADATA").exists():
            found.append(_read(folder))
    return sorted(found, key=lambda entry: (entry.record is not None, -entry.order))


def _filled(leaf: Any) -> Any:
    """An array without elements, which Orbax cannot save, as one of a single zero."""
    if leaf.size:
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.update(shape=(1,), sharding=_one_device(leaf.sharding))
    return np.zeros(1, leaf.dtype)


def _emptied(wanted: Any, restored: Any) -> Any:
    """Undoes `_filled`."""
    if wanted.size:
        return restored
    return jnp.zeros(wanted.shape, wanted.dtype, device=wanted.sharding)


def _one_device(sharding: Any) -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(min(sharding.device_set, key=lambda d: d.id))


def _empty(trees: dict[str, PyTree]) -> list[list[Any]]:
    """``[tree, path, shape]`` of each array without elements."""
    return [
        [name, _plain(path), list(leaf.shape)]
        for name, tree in trees.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if not leaf.size
    ]


def _plain(path: Any) -> str:
    """A path as it is too when classes have become dicts."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _on_cpu(trees: PyTree) -> bool:
    leaves = (x for x in jax.tree.leaves(trees) if isinstance(x, jax.Array))
    return all(device.platform == "cpu" for x in leaves for device in x.devices())


def _delete(folder: Path) -> None:
    """Deletes a checkpoint so that it is never there in part."""
    gone = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}{_DELETED}")
    with contextlib.suppress(OSError):
        os.rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _tidy(path: Path) -> list[Path]:
    """Undoes what a killed run left; returns the checkpoints that were being written.

    Raises nothing: a folder that cannot be written may still be read.
    """
    unfinished = list(path.glob(f"*{_UNFINISHED}*"))
    with contextlib.suppress(OSError):
        for old in path.glob("*" + _REPLACED):
            target = path / old.name.removesuffix(_REPLACED)
            if target.exists():
                _delete(old)
            else:
                os.rename(old, target)
    for left in (*unfinished, *path.glob("*" + _DELETED)):
        shutil.rmtree(left, ignore_errors=True)
    return unfinished


# --- reading -----------------------------------------------------------------------------------


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
            lambda path, leaf: placed(empty.get((name, _plain(path)), leaf.shape), leaf.dtype),
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
        name: ocp.args.StandardRestore({"tree": jax.tree.map(_filled, tree)})
        for name, tree in trees.items()
        if jax.tree.leaves(tree)
    }
    if args:
        with contextlib.closing(ocp.Checkpointer(ocp.CompositeCheckpointHandler())) as reader:
            restored = reader.restore(folder, args=ocp.args.Composite(**args))
        for name in args:
            trees[name] = jax.tree.map(_emptied, trees[name], restored[name]["tree"])
    return unpack(record, trees)


def _newest_good(found: Iterable[Entry], like: PyTree) -> State | None:
    for entry in found:
        problem = entry.problem
        if entry.record is not None:
            try:
                return load(entry, like)
            except SerializationError:
                raise
            except Exception as error:  # noqa: BLE001  Orbax raises bare Exception for damage
                problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        warnings.warn(
            f"the checkpoint {entry.folder} is damaged and passed over: {problem:.300}",
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
        for left in _tidy(folder):
            warnings.warn(
                f"the checkpoint {folder / left.name.split(_UNFINISHED)[0]} was still being "
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
    step_state = like._cell.step_state if isinstance(like, State) else like
    step_state = jax.tree.map(_array_like, step_state)
    state = _newest_good(found, step_state)
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
