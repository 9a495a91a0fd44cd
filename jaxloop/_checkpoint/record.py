"""A `State` as a JSON record and trees of arrays, the form that folders and bytes share.

    record, trees = pack(state)
    state = unpack(record, trees)

Everything that a run needs to resume is in the record or in the trees. No pickle is written or
read. If you change the record's contents, bump its format version.

A stranger may have written a record. `parsing` checks its fields before it gets here, and `unpack`
checks the values in them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxloop._checkpoint.packing import Packer, is_array, plain_name, step_state_test
from jaxloop._checkpoint.schema import (
    NUMBERED,
    check_size,
    hints_of,
    is_list_of_strings,
    is_whole,
    malformed,
    matches,
)
from jaxloop._checkpoint.seconds import pack_sessions, pack_times, unpack_sessions, unpack_times
from jaxloop._checkpoint.unpacking import MALFORMED, Unpacker
from jaxloop._core.events import Event, Place
from jaxloop._core.lazy import EpochRecords, LazyDict, ReadOnlyDict
from jaxloop._core.loan import Loan
from jaxloop._core.state import NO_COUNTS, EventCounts, State, saved_fields
from jaxloop._core.types import PyTree
from jaxloop._data.position import FROM_COUNTERS, Position
from jaxloop.errors import DamagedError, SerializationError

FORMAT = 5
"""The version of the record's format. A later jaxloop reads every earlier version."""


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
    for path, leaf in jax.tree_util.tree_leaves_with_path(step_state):
        if not is_array(leaf):
            raise SerializationError(
                f"step_state{jax.tree_util.keystr(path)} must be an array, got {leaf!r:.80}",
                fix="pass a state that a run returned, or make the leaf an array",
            )
    packer = Packer(trees, arrays, step_state_test(step_state, describe))
    record: dict[str, Any] = {"format": FORMAT}
    for key, field in saved_fields().items():
        value = getattr(state, field)
        record[key] = CODECS[key].pack(value, packer) if key in CODECS else _plain(field, value)
    record["leaves"] = {name: describe(tree) for name, tree in trees.items()}
    record["empty_nodes"] = empty_nodes(step_state)
    return record, trees


def _plain(field: str, value: Any) -> Any:
    """Returns the value of a field that JSON can hold as it is."""
    value = value.item() if isinstance(value, np.generic) else plain_name(value)
    hint = hints_of(State)[field]
    if not matches(value, hint):
        raise SerializationError(
            f"State.{field} must be {hint}, got {value!r:.80}",
            fix="return a state with a value of this type from the handler",
        )
    return value


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
    """Restores a state from a record that `parsing` returned, and its trees.

    Raises:
        SerializationError: A later jaxloop wrote the record, or this process lacks what a value
            needs, such as 64-bit types.
        DamagedError: A value is malformed, or an array is not what the record says.
    """
    check_format(record)
    for name, leaves in record["leaves"].items():
        _check_arrays(name, trees[name], leaves)
    unpacker = Unpacker(trees)
    fields: dict[str, Any] = {}
    for key, field in saved_fields().items():
        if key not in record:  # an older record lacks fields that were added later
            continue
        value = record[key]
        try:
            fields[field] = CODECS[key].unpack(value, unpacker) if key in CODECS else value
        except SerializationError:
            raise
        except (*MALFORMED, RecursionError) as error:
            raise malformed(key, value) from error
    loan = Loan(trees["step_state"], list(trees["accumulators"].values()))
    return State(**fields, loan=loan)


def _check_arrays(name: str, tree: PyTree, leaves: list[list[Any]]) -> None:
    """Raises if the arrays of a tree are not those that the record says."""
    mine = [leaf[1:] for leaf in describe(tree)]
    said = [leaf[1:] for leaf in leaves]
    if name not in NUMBERED:  # without ``like``, their containers and their order may differ
        mine, said = sorted(mine), sorted(said)
    if mine == said:
        return
    if sorted(shape for _, shape in mine) == sorted(shape for _, shape in said):
        raise SerializationError(
            f"the arrays of the {name} must have the dtypes {sorted({d for d, _ in said})}, as "
            f"they were saved, got {sorted({d for d, _ in mine})}",
            fix="set jax_enable_x64 as the run that wrote the state did",
        )
    raise DamagedError(f"the arrays of the {name} must be as the record says", fix=_COPY)


_COPY = "use another copy"

# --- the fields of a state that JSON cannot hold as they are -------------------------------------


class _Codec(NamedTuple):
    """The conversion of a field to its form in the record, and back."""

    pack: Callable[[Any, Packer], Any]
    unpack: Callable[[Any, Unpacker], Any]


def _unpack_counts(kept: dict[str, list[int]], unpacker: Unpacker) -> EventCounts:
    counts = {Event(name): (total, epoch) for name, (total, epoch) in kept.items()}
    if not all(is_whole(number) for pair in counts.values() for number in pair):
        raise malformed("event_counts", kept)
    return EventCounts({**NO_COUNTS, **counts})


_THEIR_OWN = "the data's own state"


def _pack_position(position: Position | None, packer: Packer) -> Any:
    kept = {}
    for field in dataclasses.fields(Position):
        value = getattr(position or FROM_COUNTERS, field.name)
        if field.name == "state":
            kept["state"] = packer.pack(value, _THEIR_OWN)
        elif field.name == "settings":
            kept["settings"] = {name: packer.pack(one, name) for name, one in value.items()}
        elif field.name != "unread":  # these batches exist in this process only
            kept[field.name] = value
    return kept


def _unpack_position(kept: dict[str, Any], unpacker: Unpacker) -> Position:
    fields: dict[str, Any] = {}
    for name, value in kept.items():
        if name == "state":
            fields[name] = unpacker.unpack(value)
        elif name == "settings":
            fields[name] = {key: unpacker.unpack(one) for key, one in value.items()}
            if not all(map(_is_plain, fields[name].values())):
                raise malformed("position", kept)
        elif name != "unread" and matches(value, hints_of(Position)[name]):
            fields[name] = value
        else:
            raise malformed("position", kept)
    return Position(**fields)


def _is_plain(value: Any) -> bool:
    """Returns whether ``==`` of two such values gives a bool."""
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | np.generic)


def _by_name(values: Mapping[Any, Any]) -> dict[Any, Any]:
    return {plain_name(name): value for name, value in values.items()}


def _unpack_dict(kept: Any, unpacker: Unpacker) -> ReadOnlyDict:
    values = unpacker.unpack(kept)
    if type(values) is not dict:
        raise malformed("handler_state or metrics", kept)
    return ReadOnlyDict(values)


def _unpack_metrics(kept: Any, unpacker: Unpacker) -> LazyDict:
    metrics = _unpack_dict(kept, unpacker)
    return LazyDict(lambda: metrics)


def _are_texts(kept: Any) -> bool:
    return isinstance(kept, dict) and all(type(text) is str for text in kept.values())


def _unpack_texts(kept: Any, unpacker: Unpacker) -> ReadOnlyDict:
    if not _are_texts(kept):
        raise malformed("statics or environment", kept)
    return ReadOnlyDict(kept)


_TEXTS = _Codec(lambda texts, packer: dict(texts), _unpack_texts)


def _pack_meanings(meanings: Mapping[str, Mapping[str, str]] | None, packer: Packer) -> Any:
    return None if meanings is None else {name: dict(one) for name, one in meanings.items()}


def _unpack_meanings(kept: Any, unpacker: Unpacker) -> Any:
    if kept is None or (isinstance(kept, dict) and all(map(_are_texts, kept.values()))):
        return kept
    raise malformed("metric_meanings", kept)


def _unpack_reshaped(kept: Any, unpacker: Unpacker) -> tuple[str, ...]:
    if not is_list_of_strings(kept):
        raise malformed("reshaped", kept)
    return tuple(kept)


# By key of the record. A field without a codec is stored as it is.
CODECS: dict[str, _Codec] = {
    "event": _Codec(
        lambda event, packer: None if event is None else event.value,
        lambda kept, unpacker: None if kept is None else Event(kept),
    ),
    "next": _Codec(lambda place, packer: place.value, lambda kept, unpacker: Place(kept)),
    "event_counts": _Codec(
        lambda counts, packer: {event.value: list(n) for event, n in counts.get().items()},
        _unpack_counts,
    ),
    "history": _Codec(
        lambda history, packer: packer.columns(history.get(), "history"),
        lambda kept, unpacker: EpochRecords.of(unpacker.table(kept)),
    ),
    "times": _Codec(pack_times, unpack_times),
    "sessions": _Codec(pack_sessions, unpack_sessions),
    "handler_state": _Codec(
        lambda memory, packer: packer.pack(_by_name(memory), "handler_state"), _unpack_dict
    ),
    "metrics": _Codec(
        lambda metrics, packer: packer.pack(_by_name(metrics.get()), "metrics"), _unpack_metrics
    ),
    "position": _Codec(_pack_position, _unpack_position),
    **dict.fromkeys(("statics", "environment"), _TEXTS),
    "metric_meanings": _Codec(_pack_meanings, _unpack_meanings),
    "reshaped": _Codec(lambda paths, packer: list(paths), _unpack_reshaped),
}


def check_leaves(record: dict[str, Any], like: PyTree, where: str) -> None:
    """Raises if a record's step state differs from ``like`` in a leaf, a shape or a dtype.

    Raises:
        SerializationError: They differ. The error lists the leaves.
    """
    kept = {name: (dtype, tuple(shape)) for name, dtype, shape in record["leaves"]["step_state"]}
    mine = {name: (dtype, tuple(shape)) for name, dtype, shape in describe(like)}
    # Older formats have none, and a handler that changed the structure may have added some.
    if "empty_nodes" in record and not record["reshaped"]:
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


def seal(record: dict[str, Any]) -> None:
    """Adds the checksum to a complete record.

    Raises:
        SerializationError: The record is so large that it could not be read again.
    """
    text = _canonical(record)
    check_size(text)
    record["sha256"] = hashlib.sha256(text).hexdigest()


def _canonical(record: dict[str, Any]) -> bytes:
    plain = {name: value for name, value in record.items() if name != "sha256"}
    return json.dumps(plain, sort_keys=True).encode()


def checksum(record: dict[str, Any]) -> str:
    """Returns the checksum of a record without its own ``sha256``."""
    return hashlib.sha256(_canonical(record)).hexdigest()
