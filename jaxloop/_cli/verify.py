"""Checks every checkpoint in a folder: the record by its checksum, and each array by its digest.

    jaxloop verify runs/digits
    jaxloop verify runs/digits && rsync -a runs/digits backup:

It reads each checkpoint as `loop.resume` does, on the CPU, one at a time, and changes nothing. The
exit status is 0 if all are good, 1 if one is damaged, and 2 if one cannot be read here. Files that
resuming does not read are not checked. A checkpoint of jaxloop's first format has no digests.
"""

from __future__ import annotations

import argparse
import gc
import warnings

import jax

from jaxloop._checkpoint.contents import has_changed
from jaxloop._checkpoint.layout import Entry, read
from jaxloop._checkpoint.reader import load
from jaxloop._cli.console import quiet, text_of_bytes
from jaxloop._cli.folders import Checkpoint, open_folder
from jaxloop.errors import CheckpointError, DamagedError, SerializationError, first_line

_GOOD, _DAMAGED, _UNREADABLE = 0, 1, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("path", metavar="PATH", help="a folder of checkpoints, or a checkpoint")


def run(options: argparse.Namespace) -> int:
    """Prints a line for each checkpoint, and the sum."""
    folder = open_folder(options.path)
    worst, counts = _GOOD, [0, 0, 0]
    for one in folder.checkpoints:
        with quiet():
            found = _check_settled(one)
        if found is None:
            continue
        status, words = found
        counts[status] += 1
        worst = max(worst, status)
        print(f"{one.name}: {words}", flush=True)
    for name in folder.unfinished:
        print(f"{name}: is not complete, so it is not checked")
    kinds = ("good", "damaged", "unreadable")
    total = ", ".join(
        f"{number} {kind}" for number, kind in zip(counts, kinds, strict=True) if number
    )
    print(f"{folder.path}: {total or 'no complete checkpoint'}")
    return worst


def _check_settled(one: Checkpoint) -> tuple[int, str] | None:
    """Does the same as `_check`, also if the run replaces the checkpoint meanwhile.

    Returns:
        The status and words, or None if the run has deleted it.
    """
    found: tuple[int, str] | None = _check(one)
    if found is not None and found[0] == _GOOD:
        return found
    for _ in range(_MOST_TRIES):
        if not has_changed(one.entry):
            break
        one = Checkpoint(read(one.entry.folder))
        found = _check(one)
        if found[0] == _GOOD:
            break
    else:
        found = None
    gc.collect()  # the reads that Orbax has abandoned print now, while nobody listens
    return found


_MOST_TRIES = 5


def _check(one: Checkpoint) -> tuple[int, str]:
    """Returns whether a checkpoint is good, and words about it."""
    try:
        # Some arrays may need 64-bit types, and warnings about tensors of torch are of no use here.
        with jax.enable_x64(True), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(one.entry)
    except DamagedError as error:
        return _DAMAGED, f"damaged: {first_line(error)}"
    except (SerializationError, CheckpointError, MemoryError, jax.errors.JaxRuntimeError) as error:
        return _UNREADABLE, f"cannot be read here: {first_line(error)}"
    return _GOOD, f"good, step {one.entry.step}, {_arrays(one.entry)}"


def _arrays(entry: Entry) -> str:
    assert entry.record is not None
    number = sum(map(len, entry.record["leaves"].values()))
    size = text_of_bytes(Checkpoint(entry).size_bytes)
    if "digests" not in entry.record:
        return f"{number} arrays without digests, {size}"
    return f"{number} arrays, {size}"
