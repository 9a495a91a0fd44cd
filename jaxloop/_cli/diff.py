"""Finds out where two runs differ: the first epoch and metric, and the arrays of their states.

    jaxloop diff runs/a runs/b
    jaxloop diff runs/a runs/b --values
    jaxloop diff runs/a/checkpoints/270 runs/b/checkpoints/270

Metrics and arrays are the same if their bits are the same; NaN is the same as NaN. The states are
compared at the last step at which both runs have a checkpoint, by the digests in their records. The
exit status is 0 if nothing differs as far as both runs go, 1 if something differs, and 2 if they
have nothing in common or cannot be read.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxloop._checkpoint.digests import digests, plain_path
from jaxloop._checkpoint.reader import load
from jaxloop._checkpoint.record import numbered
from jaxloop._cli.console import text_of_value
from jaxloop._cli.folders import Checkpoint, open_folder
from jaxloop._cli.inspect import status_of
from jaxloop._core.arrays import data_of
from jaxloop._core.environment import changes
from jaxloop._core.state import State
from jaxloop.errors import CheckpointError

_MOST_SHOWN = 20
"""The maximum number of arrays that are listed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("a", metavar="A", help="a folder of checkpoints, or a checkpoint")
    parser.add_argument("b", metavar="B", help="another one")
    parser.add_argument(
        "--values", action="store_true", help="read the arrays that differ, and say by how much"
    )


def run(options: argparse.Namespace) -> int:
    """Prints what differs."""
    a, b = _checkpoints(options.a), _checkpoints(options.b)
    for name, one, path in (("A", a[0], options.a), ("B", b[0], options.b)):
        print(f"{name}: {path}: {status_of(_state(one))}")
    histories = [_state(one[0]).history for one in (a, b)]
    epochs = sorted(histories[0].keys() & histories[1].keys())
    pair = _last_common(a, b)
    if not epochs and pair is None:
        raise CheckpointError(
            "A and B must have an epoch or a step in common, got runs that have none",
            fix="compare runs that save at the same steps",
        )
    differ = _show_history(histories[0], histories[1], epochs)
    if pair is None:
        print("state: A and B have no checkpoint of the same step")
    else:
        differ |= _show_states(*pair, options.values)
    if differ:
        _show_reasons(a[0], b[0])
    return int(differ)


def _checkpoints(path: str) -> list[Checkpoint]:
    """Returns the good checkpoints of the newest run in a folder, the newest first."""
    folder = open_folder(path)
    newest = folder.newest
    if newest is None:
        raise CheckpointError(
            f"A and B must have a good checkpoint, got {folder.path}, which has none",
            fix="see `jaxloop inspect` for what it has",
        )
    mine = [one for one in folder.checkpoints if one.entry.run_id == newest.entry.run_id]
    return [one for one in mine if one.state and not one.problem] or [newest]


# --- metrics -------------------------------------------------------------------------------------


def _show_history(
    a: Mapping[int, Mapping[str, Any]], b: Mapping[int, Mapping[str, Any]], epochs: list[int]
) -> bool:
    """Prints how the epochs differ that both runs have, and returns whether one does."""
    found = [(epoch, name) for epoch in epochs for name in _different_names(a[epoch], b[epoch])]
    if not found:
        print(f"history: the same bits in all {len(epochs)} epochs that both have")
        return False
    epoch, name = found[0]
    print(
        f"history: the first difference is history[{epoch}][{name!r}]: "
        f"{_exact(a[epoch], name)} in A, {_exact(b[epoch], name)} in B"
    )
    others = [other for first, other in found[1:] if first == epoch]
    if others:
        print(f"  in the same epoch also: {', '.join(others)}")
    print(f"  {len({first for first, _ in found})} of {len(epochs)} common epochs differ")
    return True


def _different_names(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    # In the order of A, which is that of the loop.
    return [
        name for name in {**a, **b} if not (name in a and name in b and same_bits(a[name], b[name]))
    ]


def same_bits(a: Any, b: Any) -> bool:
    """Returns whether two values are the same bit for bit, with NaN equal to NaN.

    Example:
        >>> same_bits(np.float32("nan"), np.float32("nan")), same_bits(0.0, -0.0)
        (True, False)
    """
    x, y = np.asarray(a), np.asarray(b)
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    if x.tobytes() == y.tobytes():
        return True
    if x.dtype.kind not in "fc":
        return x.dtype.kind == "O" and bool(np.all(x == y))
    nan = np.isnan(x) & np.isnan(y)
    return x[~nan].tobytes() == y[~nan].tobytes()


def _exact(metrics: Mapping[str, Any], name: str) -> str:
    """Returns a metric with all its digits."""
    if name not in metrics:
        return "missing"
    value = metrics[name]
    return str(value) if np.ndim(value) == 0 else text_of_value(value)


# --- states --------------------------------------------------------------------------------------


def _last_common(a: list[Checkpoint], b: list[Checkpoint]) -> tuple[Checkpoint, Checkpoint] | None:
    # The newest come first, so the last of a step that a dict keeps would be the oldest.
    ours, theirs = ({one.entry.step: one for one in reversed(found)} for found in (a, b))
    common = ours.keys() & theirs.keys()
    return (ours[max(common)], theirs[max(common)]) if common else None


def _show_states(a: Checkpoint, b: Checkpoint, values: bool) -> bool:
    """Prints which arrays of two checkpoints differ, and returns whether one does."""
    mine, other = _digests(a), _digests(b)
    names = sorted(name for name in {**mine, **other} if mine.get(name) != other.get(name))
    where = f"state at step {a.entry.step}"
    if not names:
        print(f"{where}: all {len(mine)} arrays have the same bits")
        return False
    print(f"{where}: {len(names)} of {len({**mine, **other})} arrays differ:")
    leaves = [_leaves(one) for one in (a, b)] if values else [{}, {}]
    for name in names[:_MOST_SHOWN]:
        if name not in mine or name not in other:
            print(f"  {name} is only in {'A' if name in mine else 'B'}")
        elif values:
            print(f"  {name}: {distance(leaves[0][name], leaves[1][name])}")
        else:
            print(f"  {name}")
    if len(names) > _MOST_SHOWN:
        print(f"  and {len(names) - _MOST_SHOWN} more")
    return True


_TREES = ("step_state", "accumulators")


def _digests(one: Checkpoint) -> dict[str, str]:
    record = one.entry.record
    assert record is not None
    kept = record.get("digests")
    if kept is None:  # format 1 has none
        kept = digests(_trees(one))
    return {f"{tree}/{path}".rstrip("/"): digest for tree in _TREES for path, digest in kept[tree]}


def _state(one: Checkpoint) -> State[Any]:
    """Returns what the record of a checkpoint says, which `_checkpoints` found to be good."""
    assert one.state is not None
    return one.state


def _trees(one: Checkpoint) -> dict[str, Any]:
    """Returns the trees of arrays of a checkpoint."""
    # Some arrays may need 64-bit types.
    with jax.enable_x64(True):
        loan = load(one.entry).loan
    return {
        "step_state": loan.step_state,
        "accumulators": numbered(jax.tree.leaves(loan.accumulators)),
    }


def _leaves(one: Checkpoint) -> dict[str, Any]:
    return {
        f"{tree}/{plain_path(path)}".rstrip("/"): leaf
        for tree, leaves in _trees(one).items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(leaves)
    }


def distance(a: Any, b: Any) -> str:
    """Returns how much two arrays differ, in words.

    Example:
        >>> distance(np.array([1.0, 2.0]), np.array([1.0, 2.5]))
        '1 of 2 elements differ, by at most 0.5'
    """
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{text_of_value(_host(a))} in A, {text_of_value(_host(b))} in B"
    x, y = np.atleast_1d(_host(a)), np.atleast_1d(_host(b))
    unequal = x != y
    unequal &= ~((x != x) & (y != y))
    number = int(np.count_nonzero(unequal))
    if not number:
        return "only the signs of zeros or the bits of NaN differ"
    wide = np.complex128 if x.dtype.kind == "c" else np.float64
    with np.errstate(all="ignore"):
        most = np.abs(x[unequal].astype(wide) - y[unequal].astype(wide)).max()
    return f"{number} of {x.size} elements differ, by at most {most:.3g}"


def _host(array: Any) -> np.ndarray[Any, Any]:
    return np.asarray(data_of(array))


# --- reasons -------------------------------------------------------------------------------------


def _show_reasons(a: Checkpoint, b: Checkpoint) -> None:
    """Prints which settings differ, because they may be why the runs do."""
    found = [
        f"the data's {name}: {mine} in A, {other} in B"
        for name, mine, other in _different_settings(a, b)
    ]
    environments = [_state(one).environment for one in (a, b)]
    found += [
        text.replace(" was ", ": ", 1).replace(" and is ", " in A, ", 1) + " in B"
        for text in changes(*environments)
    ]
    if found:
        print("settings that differ:")
        for text in found:
            print(f"  {text}")


def _different_settings(a: Checkpoint, b: Checkpoint) -> list[tuple[str, Any, Any]]:
    mine, other = (
        (one.entry.record or {}).get("position", {}).get("settings", {}) for one in (a, b)
    )
    return [
        (name, mine.get(name), other.get(name))
        for name in {**mine, **other}
        if mine.get(name) != other.get(name)
    ]
