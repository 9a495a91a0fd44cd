"""A `State` as a record for JSON and trees of arrays: what both ways of keeping it share.

    record, trees = pack(state)
    state = unpack(record, trees)

Whatever a run needs to go on is in the record or in the trees: nothing lives elsewhere. No pickle
is written or read.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxloop._core.arrays import structure
from jaxloop._core.events import Event
from jaxloop._core.lazy import Lazy, ReadOnlyDict, Records
from jaxloop._core.state import Cell, EpochTime, State
from jaxloop._core.types import PyTree
from jaxloop._data.position import NOWHERE, Position
from jaxloop.errors import SerializationError

FORMAT = 1
"""The version of the record; a later jaxloop reads every earlier one."""


NUMBERED = ("accumulators", "arrays")
"""The trees whose structure is not the step state's: numbered leaves."""


INLINE_BYTES = 1024
"""Larger arrays of handlers are kept as arrays, not in the text of the record."""


_PLAIN = ("epoch", "max_epoch", "iteration", "max_iteration", "step", "status", "halted_by")


def pack(state: State) -> tuple[dict[str, Any], dict[str, PyTree]]:
    """A state as ``(record, trees)``: what JSON holds, and arrays by the name of their tree.

    Raises:
        SerializationError: Something that a handler or the data left in it cannot be kept.
    """
    step_state = state._cell.step_state
    arrays: dict[str, Any] = {}
    trees: dict[str, PyTree] = {
        "step_state": step_state,
        # Leaves alone: their structure is the metrics', which the loop knows.
        "accumulators": numbered(jax.tree.leaves(state._cell.accumulators)),
        "arrays": arrays,
    }
    position: Position = state._position or NOWHERE
    packer = _Packer(step_state, trees, arrays)
    record: dict[str, Any] = {
        "format": FORMAT,
        **{name: getattr(state, name) for name in _PLAIN},
        "event": None if state.event is None else state.event.value,
        "next": str(state._next),
        "elapsed_s": state._elapsed_s,
        "event_counts": {event.value: list(counts) for event, counts in state.event_counts.items()},
        "history": packer.columns(state.history, "history"),
        "times": _inline(
            np.array([[e, *EpochTime.of(v).parts] for e, v in state.times.items()], np.float64)
        ),
        "handler_state": packer.pack(dict(state.handler_state), "handler_state"),
        "metrics": packer.pack(dict(state._metrics.get()), "metrics"),
        "position": {
            "one_shot": position.one_shot,
            "state": packer.pack(position.state, "the data's own state"),
            "skip": position.skip,
            "at_end": position.at_end,
            "settings": dict(position.settings),
        },
    }
    record["leaves"] = {name: describe(tree) for name, tree in trees.items()}
    return record, trees


def step_state_of(like: State | PyTree) -> PyTree:
    """The step state that a ``like=`` stands for; looking does not keep it from being donated."""
    return like._cell.step_state if isinstance(like, State) else like


def numbered(leaves: list[Any]) -> dict[str, Any]:
    """A tree of leaves whose order is theirs."""
    return {f"{i:05d}": leaf for i, leaf in enumerate(leaves)}


def describe(tree: PyTree) -> list[list[Any]]:
    """``[path, dtype, shape]`` of each leaf."""
    return [
        [jax.tree_util.keystr(path), str(leaf.dtype), list(leaf.shape)]
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


class _Packer:
    """Turns what handlers remember into what JSON holds."""

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
            f"{where} is a {type(value).__name__}, and cannot be kept",
            fix="keep numbers, strings, bytes, arrays, keys, and dicts, lists and plain tuples of "
            "them; or a whole step state",
        )

    def columns(self, table: Mapping[int, Mapping[str, Any]], where: str) -> dict[str, Any]:
        """``{row: {name: value}}`` by columns: quick, and short, where there are many rows."""
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
        if value.nbytes <= INLINE_BYTES:
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
    """Whether it has a shape and a dtype."""
    return isinstance(leaf, np.ndarray | np.generic | jax.Array)


def is_key(leaf: Any) -> bool:
    """Whether it is an array of typed PRNG keys."""
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
    """What `_Packer.columns` packed."""
    table: dict[int, dict[str, Any]] = {row: {} for row in kept["rows"]}
    for name, rows, values in kept["columns"]:
        for row, value in zip(rows, _unpacked(values, trees), strict=True):
            table[row][name] = value
    for row, others in _unpacked(kept["others"], trees).items():
        table[row].update(others)
    return table


def check_format(record: dict[str, Any]) -> None:
    """Raises if a later jaxloop packed it.

    Raises:
        SerializationError: One did.
    """
    if record["format"] > FORMAT:
        raise SerializationError(
            f"the state is of format {record['format']}, and this jaxloop knows formats up to "
            f"{FORMAT}",
            fix="use the jaxloop that wrote it, or a later one",
        )


def unpack(record: dict[str, Any], trees: dict[str, PyTree]) -> State:
    """The state that was packed.

    Raises:
        SerializationError: It was packed by a later jaxloop.
    """
    check_format(record)
    metrics = _unpacked(record["metrics"], trees)
    times = _unpacked(record["times"], trees)
    position = record["position"]
    event = record["event"]
    return State(
        **{name: record[name] for name in _PLAIN},
        event=None if event is None else Event(event),
        _history=Records.known(_table(record["history"], trees)),
        _times=Records.known({int(e): EpochTime(*parts) for e, *parts in times.tolist()}),
        event_counts=ReadOnlyDict(
            {Event(name): (n[0], n[1]) for name, n in record["event_counts"].items()}
        ),
        handler_state=ReadOnlyDict(_unpacked(record["handler_state"], trees)),
        _metrics=Lazy(lambda: metrics),
        _cell=Cell(trees["step_state"], list(trees["accumulators"].values())),
        _next=record["next"],
        _position=Position(**{**position, "state": _unpacked(position["state"], trees)}),
        _elapsed_s=record["elapsed_s"],
    )


def check_leaves(record: dict[str, Any], like: PyTree, where: str) -> None:
    """Raises if the step state that was kept is not one like ``like``; lists what differs.

    Raises:
        SerializationError: It is not.
    """
    kept = {name: (dtype, tuple(shape)) for name, dtype, shape in record["leaves"]["step_state"]}
    mine = {name: (dtype, tuple(shape)) for name, dtype, shape in describe(like)}
    differ = [
        f"step_state{name} is {_words(kept.get(name))} there and {_words(mine.get(name))} here"
        for name in {**kept, **mine}
        if kept.get(name) != mine.get(name)
    ]
    if differ:
        more = f"; and {len(differ) - MOST_LEAVES} more" if len(differ) > MOST_LEAVES else ""
        raise SerializationError(
            f"{where} holds the state of another model or optimizer; these leaves differ: "
            + "; ".join(differ[:MOST_LEAVES])
            + more,
            fix="use the model, optimizer and step that the state was made with",
        )


MOST_LEAVES = 20
"""So many are listed in an error."""


def _words(leaf: tuple[str, tuple[int, ...]] | None) -> str:
    return "missing" if leaf is None else f"{leaf[0]}[{','.join(map(str, leaf[1]))}]"


def checksum(record: dict[str, Any]) -> str:
    """What a record must add up to; its own ``sha256`` left out."""
    plain = {name: value for name, value in record.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
