"""A `State` on disk, through Orbax, and as bytes.

    data = serialize_state(state)
    state = deserialize_state(data, like=state.step_state)

A state is split once, by `pack`, into a JSON-able record and trees of arrays; both ways of keeping
it share that split. No pickle is written or read. Whatever a run needs to go on is in the record or
in the trees: nothing lives elsewhere.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import shutil
import struct
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxloop.errors import CheckpointError, SerializationError
from jaxloop.events import Event
from jaxloop.state import Cell, EpochTime, Lazy, PyTree, ReadOnlyDict, Records, State, structure

FORMAT = 1
"""The version of the record; a later jaxloop reads every earlier one."""

_PLAIN = ("epoch", "max_epoch", "iteration", "max_iteration", "step", "status", "halted_by")


# --- the split ---------------------------------------------------------------------------------


def pack(state: State) -> tuple[dict[str, Any], dict[str, PyTree]]:
    """A state as ``(record, trees)``: what JSON holds, and arrays by the name of their tree."""
    step_state = state._cell.step_state
    step_structure = structure(step_state)
    trees: dict[str, PyTree] = {
        "step_state": step_state,
        # Leaves alone: their structure is the metrics', which the loop knows.
        "accumulators": {
            f"{i:05d}": x for i, x in enumerate(jax.tree.leaves(state._cell.accumulators))
        },
    }

    def encode(value: Any) -> Any:
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float) and not isinstance(value, np.generic):
            return value
        if isinstance(value, np.ndarray | np.generic) or (
            isinstance(value, jax.Array) and structure(value) != step_structure
        ):
            array = np.asarray(value)
            data = base64.b64encode(array.tobytes()).decode()
            return {"$array": data, "dtype": array.dtype.name, "shape": list(array.shape)}
        if structure(value) == step_structure:
            name = f"like_{len(trees)}"
            trees[name] = value
            return {"$like": name}
        if isinstance(value, dict):
            return {"$dict": [[encode(k), encode(v)] for k, v in value.items()]}
        if isinstance(value, tuple | list):
            return {"$tuple" if isinstance(value, tuple) else "$list": [encode(v) for v in value]}
        raise SerializationError(
            f"handler_state, history or metrics: a {type(value).__name__} cannot be kept",
            fix="keep numbers, strings, arrays, and dicts, lists and tuples of them",
        )

    record: dict[str, Any] = {
        "format": FORMAT,
        **{name: getattr(state, name) for name in _PLAIN},
        "event": None if state.event is None else state.event.value,
        "next": str(state._next),
        "elapsed_s": state._elapsed_s,
        "event_counts": {event.value: list(counts) for event, counts in state.event_counts.items()},
        "history": encode(dict(state.history)),
        "times": encode({int(k): list(EpochTime.of(v).parts) for k, v in state.times.items()}),
        "handler_state": encode(dict(state.handler_state)),
        "metrics": encode(dict(state._metrics.get())),
        "consumed": state._unread is None,
    }
    record["leaves"] = {name: _describe(tree) for name, tree in trees.items()}
    return record, trees


def _describe(tree: PyTree) -> list[list[Any]]:
    return [
        [jax.tree_util.keystr(path), str(leaf.dtype), list(leaf.shape)]
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def unpack(record: dict[str, Any], trees: dict[str, PyTree]) -> State:
    """The state that was packed."""

    def decode(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if "$array" in value:
            raw = np.frombuffer(base64.b64decode(value["$array"]), jnp.dtype(value["dtype"]))
            return raw.reshape(value["shape"])[()]
        if "$like" in value:
            return trees[value["$like"]]
        if "$dict" in value:
            return {decode(k): decode(v) for k, v in value["$dict"]}
        if "$tuple" in value:
            return tuple(decode(v) for v in value["$tuple"])
        return [decode(v) for v in value["$list"]]

    metrics = decode(record["metrics"])
    event = record["event"]
    return State(
        **{name: record[name] for name in _PLAIN},
        event=None if event is None else Event(event),
        _history=Records.known(decode(record["history"])),
        _times=Records.known(
            {e: EpochTime(*parts) for e, parts in decode(record["times"]).items()}
        ),
        event_counts=ReadOnlyDict(
            {Event(name): (n[0], n[1]) for name, n in record["event_counts"].items()}
        ),
        handler_state=ReadOnlyDict(decode(record["handler_state"])),
        _metrics=Lazy(lambda: metrics),
        _cell=Cell(trees["step_state"], list(trees["accumulators"].values())),
        _next=record["next"],
        _elapsed_s=record["elapsed_s"],
    )


def _check_leaves(record: dict[str, Any], like: PyTree, where: str) -> None:
    """Raises if the step state that was kept is not one like ``like``; lists what differs."""
    kept = {name: (dtype, tuple(shape)) for name, dtype, shape in record["leaves"]["step_state"]}
    mine = {name: (dtype, tuple(shape)) for name, dtype, shape in _describe(like)}
    differ = [
        f"{name}: kept {kept.get(name, 'nothing')}, expected {mine.get(name, 'nothing')}"
        for name in {**kept, **mine}
        if kept.get(name) != mine.get(name)
    ]
    if differ:
        raise SerializationError(
            f"{where} holds the state of another model or optimizer; these leaves differ: "
            + "; ".join(differ[:20]),
            fix="use the model, optimizer and step that the state was made with",
        )


# --- bytes -------------------------------------------------------------------------------------

_MAGIC = b"JAXLOOP\x01"
_CHECKSUM_BYTES = 32


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _raw(leaf: Any) -> np.ndarray[Any, Any]:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def serialize_state(
    state: State,
    *,
    compress: bool = False,
    serialize_step_state: Callable[[PyTree], bytes] | None = None,
) -> bytes:
    """A state as bytes: versioned, checksummed, without pickle.

    Args:
        state: A `State`.
        compress: Whether to compress with zlib.
        serialize_step_state: Makes the bytes of the step state, for leaves of one's own kinds.

    Returns:
        Bytes for `deserialize_state`.

    Raises:
        SerializationError: Something in the state cannot be kept.

    Example:
        >>> import jaxloop as jl
        >>> state = jl.loop(lambda b, s: s + b).run([1, 2], init_state=0)
        >>> int(deserialize_state(serialize_state(state), like=state).step_state)
        3
    """
    if serialize_step_state is not None:
        own = serialize_step_state(state._cell.step_state)
        state = state.replace(step_state={})
        record, trees = pack(state)
        record["own"] = True
    else:
        own = b""
        record, trees = pack(state)
    chunks = [own]
    record["own_bytes"] = len(own)
    for tree in trees.values():
        for leaf in jax.tree.leaves(tree):
            chunks.append(_raw(leaf).tobytes())
    record["trees"] = list(trees)
    header = json.dumps(record).encode()
    body = struct.pack("<Q", len(header)) + header + b"".join(chunks)
    if compress:
        body = zlib.compress(body)
    flag = b"\x01" if compress else b"\x00"
    return _MAGIC + flag + hashlib.sha256(flag + body).digest() + body


def deserialize_state(
    data: bytes,
    *,
    like: State | PyTree,
    deserialize_step_state: Callable[[bytes], PyTree] | None = None,
) -> State:
    """The state that `serialize_state` made bytes of.

    Args:
        data: The bytes.
        like: A `State`, or a step state of the same structure, shapes and dtypes.
        deserialize_step_state: Undoes ``serialize_step_state``.

    Raises:
        SerializationError: The bytes are not a state, are truncated or altered, or do not fit.

    Example:
        >>> deserialize_state(b"nonsense", like={})
        Traceback (most recent call last):
        jaxloop.errors.SerializationError: these bytes are not a serialized state...
    """
    start = len(_MAGIC) + 1 + _CHECKSUM_BYTES
    if data[: len(_MAGIC)] != _MAGIC or len(data) < start:
        raise SerializationError(
            "these bytes are not a serialized state of this format",
            fix="pass what jl.serialize_state returned",
        )
    flag, body = data[len(_MAGIC) : len(_MAGIC) + 1], data[start:]
    if hashlib.sha256(flag + body).digest() != data[len(_MAGIC) + 1 : start]:
        raise SerializationError("the bytes of this state are damaged: their checksum differs")
    if flag == b"\x01":
        body = zlib.decompress(body)
    (size,) = struct.unpack("<Q", body[:8])
    record, rest = json.loads(body[8 : 8 + size]), body[8 + size :]
    step_like = like._cell.step_state if isinstance(like, State) else like
    own, rest = rest[: record["own_bytes"]], rest[record["own_bytes"] :]
    if record.get("own"):
        if deserialize_step_state is None:
            raise SerializationError(
                "this state was written with serialize_step_state=",
                fix="pass deserialize_step_state= too",
            )
        step_like = {}
    else:
        _check_leaves(record, step_like, "the serialized state")
    trees: dict[str, PyTree] = {}
    for name in record["trees"]:
        leaves = []
        models = (
            [None] * len(record["leaves"][name])
            if name == "accumulators"
            else jax.tree.leaves(step_like)
        )
        for model, (_, dtype, shape) in zip(models, record["leaves"][name], strict=True):
            leaf, rest = _take(rest, model, dtype, shape)
            leaves.append(leaf)
        if name == "accumulators":
            trees[name] = {f"{i:05d}": leaf for i, leaf in enumerate(leaves)}
        else:
            trees[name] = jax.tree.unflatten(jax.tree.structure(step_like), leaves)
    state = unpack(record, trees)
    if record.get("own"):
        assert deserialize_step_state is not None
        state = state.replace(step_state=deserialize_step_state(own))
    return state


def _take(rest: bytes, model: Any, dtype: str, shape: list[int]) -> tuple[Any, bytes]:
    if model is not None and _is_key(model):
        data = jax.random.key_data(model)
        size = data.size * data.dtype.itemsize
        raw = np.frombuffer(rest[:size], data.dtype).reshape(data.shape)
        return jax.random.wrap_key_data(jnp.asarray(raw), impl=jax.random.key_impl(model)), rest[
            size:
        ]
    kind = jnp.dtype(dtype)
    size = int(np.prod(shape)) * kind.itemsize
    return jnp.asarray(np.frombuffer(rest[:size], kind).reshape(shape)), rest[size:]


# --- Orbax -------------------------------------------------------------------------------------

_REPLACED = ".replaced"
_TMP = ".orbax-checkpoint-tmp"


class Store:
    """A folder of checkpoints: ``<path>/<name>/`` in Orbax's layout, written in the background.

    A checkpoint of a name that is there already replaces it; the old one goes only once the new one
    is complete.
    """

    def __init__(self, path: str, keep: int | None, better: Callable[[float, float], bool]) -> None:
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self.path = Path(path).absolute()
        self.path.mkdir(parents=True, exist_ok=True)
        _tidy(self.path)
        self._keep = keep
        self._better = better
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._order = max((m["order"] for m in listed(self.path).values()), default=0)

    def save(self, name: str, state: State, value: float | None) -> None:
        """Begins to save ``state``; waits for an earlier save, not for this one."""
        ocp = self._ocp
        record, trees = pack(state)
        self._wait()
        self._order += 1
        record["order"], record["value"] = self._order, value
        target = self.path / name
        old = self.path / (name + _REPLACED)
        if target.exists():
            before = _record(target)
            if before is not None and value is None:
                record["value"] = before.get("value")  # it stays the best that it was
            os.rename(target, old)
        # In a dict, as Orbax takes no tree that is a single array.
        items = {
            key: ocp.args.StandardSave({"tree": tree})
            for key, tree in trees.items()
            if _has_leaves(tree)
        }
        try:
            self._checkpointer.save(
                target, args=ocp.args.Composite(meta=ocp.args.JsonSave(record), **items)
            )
        except Exception as error:
            raise CheckpointError(f"the checkpoint {target} cannot be written: {error}") from error
        if old.exists():
            self._wait()
        self._retain()

    def _wait(self) -> None:
        try:
            self._checkpointer.wait_until_finished()
        except Exception as error:
            raise CheckpointError(
                f"a checkpoint in {self.path} could not be written: {error}"
            ) from error
        for old in self.path.glob("*" + _REPLACED):
            shutil.rmtree(old, ignore_errors=True)

    def _retain(self) -> None:
        if self._keep is None:
            return
        there = sorted(listed(self.path).items(), key=lambda item: item[1]["order"])
        best: str | None = None
        best_value = 0.0
        for name, record in there:
            value = record.get("value")
            if value is not None and (best is None or self._better(value, best_value)):
                best, best_value = name, value
        for name, _ in there[: -self._keep]:
            if name != best:
                shutil.rmtree(self.path / name, ignore_errors=True)

    def close(self) -> None:
        """Waits until everything is on disk, and ends the threads."""
        try:
            self._wait()
            self._retain()
        finally:
            self._checkpointer.close()


def _has_leaves(tree: PyTree) -> bool:
    return bool(jax.tree.leaves(tree))


def _tidy(path: Path) -> None:
    """Undoes what a killed run left: half-written checkpoints, and a replacement half done."""
    for old in path.glob("*" + _REPLACED):
        target = path / old.name.removesuffix(_REPLACED)
        if _record(target) is None:
            shutil.rmtree(target, ignore_errors=True)
            os.rename(old, target)
        else:
            shutil.rmtree(old, ignore_errors=True)
    for left in path.glob(f"*{_TMP}*"):
        shutil.rmtree(left, ignore_errors=True)


def _record(folder: Path) -> dict[str, Any] | None:
    """The record of a complete checkpoint, or None."""
    try:
        record = json.loads((folder / "meta" / "metadata").read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and "order" in record else None


def listed(path: Path) -> dict[str, dict[str, Any]]:
    """The complete checkpoints in a folder, by name."""
    if not path.is_dir():
        return {}
    found = ((folder.name, _record(folder)) for folder in path.iterdir())
    return {
        name: record
        for name, record in found
        if record is not None and not name.endswith(_REPLACED) and _TMP not in name
    }


def load(folder: Path, record: dict[str, Any], like: PyTree) -> State:
    """The state in one checkpoint, with the shardings of ``like``."""
    import orbax.checkpoint as ocp

    _check_leaves(record, like, f"the checkpoint {folder}")
    (device, *_) = jax.local_devices()
    here = jax.sharding.SingleDeviceSharding(device)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
    )
    wanted: dict[str, PyTree] = {}
    for name, leaves in record["leaves"].items():
        if name == "accumulators":
            wanted[name] = {
                f"{i:05d}": jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=here)
                for i, (_, dtype, shape) in enumerate(leaves)
            }
        else:
            wanted[name] = abstract
    args = {k: ocp.args.StandardRestore({"tree": v}) for k, v in wanted.items() if _has_leaves(v)}
    trees = dict(wanted)
    if args:
        with contextlib.closing(ocp.Checkpointer(ocp.CompositeCheckpointHandler())) as reader:
            restored = reader.restore(folder, args=ocp.args.Composite(**args))
        trees.update({name: restored[name]["tree"] for name in args})
    return unpack(record, trees)


def load_latest(path: str, like: PyTree) -> State | None:
    """The newest good state in ``path``; a damaged checkpoint is passed over with a warning.

    Raises:
        SerializationError: A checkpoint is of another model or optimizer.
    """
    folder = Path(path).absolute()
    if folder.is_dir():
        _tidy(folder)
    for name, record in sorted(listed(folder).items(), key=lambda item: -item[1]["order"]):
        try:
            return load(folder / name, record, like)
        except SerializationError:
            raise
        except Exception as error:  # noqa: BLE001  Orbax raises bare Exception for damage
            warnings.warn(
                f"the checkpoint {folder / name} is damaged and passed over: {error}", stacklevel=2
            )
    return None


def check_writable(path: str) -> None:
    """Raises if nothing can be written in ``path``.

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


@contextlib.contextmanager
def opened(store: Callable[[], Store]) -> Iterator[Store]:
    """A store that is closed, with all saves on disk, when the run ends."""
    one = store()
    try:
        yield one
    finally:
        one.close()
