"""A `State` as a JSON record and trees of arrays, the form that folders and bytes share.

    record, trees = pack(state)
    state = unpack(record, trees)

Everything that a run needs to resume is in the record or in the trees. No pickle is written or
read. If you change the record's contents, bump its format version.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxloop._core.arrays import structure
from jaxloop._core.events import Event, Place
from jaxloop._core.lazy import EpochRecords, LazyDict, ReadOnlyDict
from jaxloop._core.state import EpochTime, EventCounts, Loan, State, saved_fields
from jaxloop._core.types import PyTree
from jaxloop._data.position import FROM_COUNTERS, Position
from jaxloop.errors import SerializationError

FORMAT = 2
"""The version of the record's format. A later jaxloop reads every earlier version."""


NUMBERED = ("accumulators", "arrays")
"""The trees of numbered leaves, which do not have the structure of the step state."""


_INLINE_BYTES = 1024
"""Handlers' arrays up to this size are stored in the record, and larger ones as arrays."""


def pack(state: State) -> tuple[dict[str, Any], dict[str, PyTree]]:
    """Converts a state to ``(record, trees)``: data for JSON, and trees of arrays by name.

    Raises:
        SerializationError: The memory of a handler, or the data's own state, cannot be saved.
    """
    step_state = state.loan.step_state
    arrays: dict[str, Any] = {}
    trees: dict[str, PyTree] = {
        "step_state": step_state,
        # Only the leaves. Their structure is that of the metrics, which the loop knows.
        "accumulators": numbered(jax.tree.leaves(state.loan.accumulators)),
        "arrays": arrays,
    }
    packer = _Packer(step_state, trees, arrays)
    record: dict[str, Any] = {"format": FORMAT}
    for key, field in saved_fields().items():
        value = getattr(state, field)
        record[key] = _CODECS[key].pack(value, packer) if key in _CODECS else value
    record["leaves"] = {name: describe(tree) for name, tree in trees.items()}
    record["empty_nodes"] = empty_nodes(step_state)
    return record, trees


def step_state_of(like: State | PyTree) -> PyTree:
    """Returns the step state of ``like``. Reading it here does not count as a loan."""
    return like.loan.step_state if isinstance(like, State) else like


def numbered(leaves: list[Any]) -> dict[str, Any]:
    """Returns leaves as a tree that keeps their order."""
    return {f"{i:05d}": leaf for i, leaf in enumerate(leaves)}


def describe(tree: PyTree) -> list[list[Any]]:
    """Returns ``[path, dtype, shape]`` of each leaf."""
    return [
        [jax.tree_util.keystr(path), str(leaf.dtype), list(leaf.shape)]
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def empty_nodes(tree: PyTree) -> list[str]:
    """Returns the paths of the nodes without leaves, such as ``optax.EmptyState()`` or ``{}``.

    Example:
        >>> empty_nodes({"a": (), "b": [1, None]})
        ["['a']", "['b'][1]"]
    """
    # As in JAX, None is a node without leaves.
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_has_no_leaves)
    return [jax.tree_util.keystr(path) for path, node in found if _has_no_leaves(node)]


def _has_no_leaves(node: Any) -> bool:
    return not is_array(node) and not jax.tree.leaves(node)


class _Packer:
    """A converter of handlers' memories to data for JSON."""

    def __init__(self, step_state: PyTree, trees: dict[str, PyTree], arrays: dict[str, Any]):
        self._trees, self._arrays = trees, arrays
        self._structure, self._leaves = structure(step_state), describe(step_state)

    def pack(self, value: Any, where: str) -> Any:
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float) and not isinstance(value, np.generic):
            return value
        if isinstance(value, bytes):
            return {"$bytes": base64.b64encode(value).decode()}
        if is_key(value):
            kept = self.pack(np.asarray(jax.random.key_data(value)), where)
            return {"$key": kept, "impl": str(jax.random.key_impl(value))}
        if is_array(value):
            return self._array(value)
        if _is_torch(value):  # in the states of torchdata's loaders
            return {"$torch": self._array(value.numpy())}
        if self._like_step_state(value):
            name = f"like_{len(self._trees)}"
            self._trees[name] = value
            return {"$like": name}
        if isinstance(value, dict):
            items = [
                [self.pack(k, where), self.pack(v, f"{where}[{k!r}]")] for k, v in value.items()
            ]
            return {"$dict": items}
        if type(value) in (tuple, list):
            items = [self.pack(v, f"{where}[{i}]") for i, v in enumerate(value)]
            return {"$tuple" if isinstance(value, tuple) else "$list": items}
        raise SerializationError(
            f"{where} must be a value that a checkpoint can save, got a {type(value).__name__}",
            fix="use numbers, strings, bytes, arrays, keys, and dicts, lists and plain tuples of "
            "them, or a whole step state",
        )

    def columns(self, table: Mapping[int, Mapping[str, Any]], where: str) -> dict[str, Any]:
        """Returns ``{row: {name: value}}`` by columns, which is fast and compact for many rows."""
        columns: dict[Any, tuple[list[int], list[Any]]] = {}
        others: dict[int, dict[str, Any]] = {}
        for row, values in table.items():
            for name, value in values.items():
                if isinstance(value, np.ndarray | np.generic):
                    column = columns.setdefault((name, value.dtype, value.shape), ([], []))
                    column[0].append(row)
                    column[1].append(value)
                else:
                    others.setdefault(row, {})[name] = value
        return {
            "rows": list(table),
            "columns": [
                [name, rows, _inline(np.array(values, dtype))]
                for (name, dtype, _), (rows, values) in columns.items()
            ],
            "others": self.pack(others, where),
        }

    def _like_step_state(self, value: Any) -> bool:
        try:
            if not self._leaves or structure(value) != self._structure:
                return False
        except ValueError:  # a dict whose keys have no order
            return False
        return all(map(is_array, jax.tree.leaves(value))) and describe(value) == self._leaves

    def _array(self, value: Any) -> dict[str, Any]:
        on_device = isinstance(value, jax.Array)
        if value.nbytes <= _INLINE_BYTES:
            kept = _inline(np.asarray(value))
        else:
            name = f"{len(self._arrays):05d}"
            self._arrays[name] = value
            kept = {"$at": name}
        return {**kept, "device": True} if on_device else kept


def _inline(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    data = base64.b64encode(array.tobytes()).decode()
    return {"$array": data, "dtype": array.dtype.name, "shape": list(array.shape)}


def is_array(leaf: Any) -> bool:
    """Returns whether a leaf has a shape and a dtype."""
    return isinstance(leaf, np.ndarray | np.generic | jax.Array)


def is_key(leaf: Any) -> bool:
    """Returns whether a leaf is an array of typed PRNG keys."""
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _is_torch(value: Any) -> bool:
    return type(value).__module__ == "torch" and type(value).__name__ == "Tensor"


def _unpacked(value: Any, trees: dict[str, PyTree]) -> Any:
    if not isinstance(value, dict):
        return value
    again = functools.partial(_unpacked, trees=trees)
    if "$array" in value or "$at" in value:
        if "$at" in value:
            array = np.asarray(trees["arrays"][value["$at"]])
        else:
            raw = np.frombuffer(base64.b64decode(value["$array"]), jnp.dtype(value["dtype"]))
            array = raw.reshape(value["shape"]).copy()[()]
        return jnp.asarray(array) if value.get("device") else array
    if "$bytes" in value:
        return base64.b64decode(value["$bytes"])
    if "$key" in value:
        return jax.random.wrap_key_data(jnp.asarray(again(value["$key"])), impl=value["impl"])
    if "$torch" in value:
        # An optional dependency. If a state holds a tensor, the process that saved it had torch.
        import torch

        return torch.from_numpy(np.array(again(value["$torch"])))
    if "$like" in value:
        return trees[value["$like"]]
    if "$dict" in value:
        return {again(k): again(v) for k, v in value["$dict"]}
    if "$tuple" in value:
        return tuple(again(v) for v in value["$tuple"])
    return [again(v) for v in value["$list"]]


def _table(kept: dict[str, Any], trees: dict[str, PyTree]) -> dict[int, dict[str, Any]]:
    """Undoes `_Packer.columns`."""
    table: dict[int, dict[str, Any]] = {row: {} for row in kept["rows"]}
    for name, rows, values in kept["columns"]:
        for row, value in zip(rows, _unpacked(values, trees), strict=True):
            table[row][name] = value
    for row, others in _unpacked(kept["others"], trees).items():
        table[row].update(others)
    return table


def check_format(record: dict[str, Any]) -> None:
    """Raises if a later jaxloop wrote the record.

    Raises:
        SerializationError: The format is newer than `FORMAT`.
    """
    if record["format"] > FORMAT:
        raise SerializationError(
            f"the state must be of format {FORMAT} or earlier, got format {record['format']}",
            fix="use the jaxloop that wrote it, or a later one",
        )


def unpack(record: dict[str, Any], trees: dict[str, PyTree]) -> State:
    """Restores a state from a record and its trees.

    Raises:
        SerializationError: A later jaxloop wrote the record.
    """
    check_format(record)
    fields: dict[str, Any] = {}
    for key, field in saved_fields().items():
        if key in record:  # an older record lacks fields that were added later
            value = record[key]
            fields[field] = _CODECS[key].unpack(value, trees) if key in _CODECS else value
    loan = Loan(trees["step_state"], list(trees["accumulators"].values()))
    return State(**fields, loan=loan)


# --- the fields of a state that JSON cannot hold as they are -------------------------------------


class _Codec(NamedTuple):
    """The conversion of a field to its form in the record, and back."""

    pack: Callable[[Any, _Packer], Any]
    unpack: Callable[[Any, dict[str, PyTree]], Any]


def _pack_times(times: EpochRecords, packer: _Packer) -> Any:
    rows = [[epoch, *EpochTime.of(seconds).parts] for epoch, seconds in times.get().items()]
    return _inline(np.array(rows, np.float64))


def _unpack_times(kept: Any, trees: dict[str, PyTree]) -> EpochRecords:
    rows = _unpacked(kept, trees).tolist()
    return EpochRecords.of({int(epoch): EpochTime(*parts) for epoch, *parts in rows})


def _pack_position(position: Position | None, packer: _Packer) -> Any:
    known = position or FROM_COUNTERS
    return {
        "one_shot": known.one_shot,
        "state": packer.pack(known.state, "the data's own state"),
        "skip": known.skip,
        "at_end": known.at_end,
        "settings": dict(known.settings),
    }


def _unpack_metrics(kept: Any, trees: dict[str, PyTree]) -> LazyDict:
    metrics = _unpacked(kept, trees)
    return LazyDict(lambda: metrics)


# By key of the record. A field without a codec is stored as it is.
_CODECS: dict[str, _Codec] = {
    "event": _Codec(
        lambda event, packer: None if event is None else event.value,
        lambda kept, trees: None if kept is None else Event(kept),
    ),
    "next": _Codec(lambda place, packer: place.value, lambda kept, trees: Place(kept)),
    "event_counts": _Codec(
        lambda counts, packer: {event.value: list(n) for event, n in counts.get().items()},
        lambda kept, trees: EventCounts({Event(name): (n[0], n[1]) for name, n in kept.items()}),
    ),
    "history": _Codec(
        lambda history, packer: packer.columns(history.get(), "history"),
        lambda kept, trees: EpochRecords.of(_table(kept, trees)),
    ),
    "times": _Codec(_pack_times, _unpack_times),
    "handler_state": _Codec(
        lambda memory, packer: packer.pack(dict(memory), "handler_state"),
        lambda kept, trees: ReadOnlyDict(_unpacked(kept, trees)),
    ),
    "metrics": _Codec(
        lambda metrics, packer: packer.pack(dict(metrics.get()), "metrics"), _unpack_metrics
    ),
    "position": _Codec(
        _pack_position,
        lambda kept, trees: Position(**{**kept, "state": _unpacked(kept["state"], trees)}),
    ),
}


def check_leaves(record: dict[str, Any], like: PyTree, where: str) -> None:
    """Raises if a record's step state differs from ``like`` in a leaf, a shape or a dtype.

    Raises:
        SerializationError: They differ. The error lists the leaves.
    """
    kept = {name: (dtype, tuple(shape)) for name, dtype, shape in record["leaves"]["step_state"]}
    mine = {name: (dtype, tuple(shape)) for name, dtype, shape in describe(like)}
    if "empty_nodes" in record:  # older formats have none
        # An optimizer's state without arrays, such as that of weight decay, is part of it too.
        kept |= dict.fromkeys(record["empty_nodes"], _EMPTY)
        mine |= dict.fromkeys(empty_nodes(like), _EMPTY)
    differ = [
        f"step_state{name} is {_words(kept.get(name))} there and {_words(mine.get(name))} here"
        for name in {**kept, **mine}
        if kept.get(name) != mine.get(name)
    ]
    if differ:
        more = f"; and {len(differ) - _MOST_LEAVES} more" if len(differ) > _MOST_LEAVES else ""
        raise SerializationError(
            f"{where} belongs to another model or optimizer; these leaves differ: "
            + "; ".join(differ[:_MOST_LEAVES])
            + more,
            fix="use the model, optimizer and step that the state was made with, or another folder "
            "for the new ones; to start from parts of the old state, read it with jl.restore(path) "
            "and pass them as init_state= to run",
        )


_MOST_LEAVES = 20
"""The maximum number of leaves that an error lists."""

_EMPTY = ("a part without arrays", ())


def _words(leaf: tuple[str, tuple[int, ...]] | None) -> str:
    if leaf == _EMPTY:
        return leaf[0]
    return "missing" if leaf is None else f"{leaf[0]}[{','.join(map(str, leaf[1]))}]"


def checksum(record: dict[str, Any]) -> str:
    """Returns the checksum of a record without its own ``sha256``."""
    plain = {name: value for name, value in record.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
