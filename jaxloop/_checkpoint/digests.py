"""Digests of arrays, which show whether a restored array is the one that was saved.

    kept = digests({"step_state": tree})            # {"step_state": [["w", "9f86d0..."], ...]}
    check_digests(kept, restored, "the checkpoint runs/a/8")

Neither Orbax nor TensorStore notices every flipped bit in a file of arrays. A digest is the SHA-256
of an array's dtype, shape and bytes, and it does not depend on where the array is.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np

from jaxloop._core.arrays import data_of
from jaxloop._core.types import PyTree
from jaxloop.errors import DamagedError

Digests = dict[str, list[list[str]]]
"""``{tree: [[path, digest], ...]}``, with the path of each leaf as in `plain_path`."""


def digests(trees: Mapping[str, PyTree], *, parallel: bool = False) -> Digests:
    """Returns the digest of each leaf.

    Args:
        trees: The trees of arrays by name.
        parallel: Whether to use all cores. A save uses one, so that the loop keeps the others.
    """
    leaves = [
        (name, plain_path(path), leaf)
        for name, tree in trees.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    arrays = [leaf for _, _, leaf in leaves]
    if parallel and len(arrays) > 1:
        with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            values = list(pool.map(digest, arrays))
    else:
        values = [digest(leaf) for leaf in arrays]
    found: Digests = {name: [] for name in trees}
    for (name, path, _), value in zip(leaves, values, strict=True):
        found[name].append([path, value])
    return found


def digest(leaf: Any) -> str:
    """Returns the SHA-256 of an array's dtype, shape and bytes.

    Example:
        >>> digest(np.float32(1)) == digest(np.ones((), np.float32))
        True
    """
    dtype = str(leaf.dtype)
    array = np.asarray(data_of(leaf))
    if array.dtype.kind == "V" and array.dtype.names is None and _is_below_a_byte(dtype):
        array = array.astype(np.float32)  # the unused bits of each byte have no meaning
    found = hashlib.sha256(f"{dtype}{list(array.shape)}".encode())
    found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def check_digests(kept: Digests, trees: Mapping[str, PyTree], where: str) -> None:
    """Raises if an array differs from the one that was saved.

    Restoring without ``like`` may change the order of the leaves, so they are compared by path.

    Raises:
        DamagedError: An array differs. The error names it.
    """
    found = digests(trees, parallel=True)
    for name in {**kept, **found}:
        saved, here = sorted(kept.get(name, [])), sorted(found.get(name, []))
        if saved != here:
            raise DamagedError(
                f"{where} has arrays that differ from those that were saved: "
                f"{_different(name, saved, here)}",
                fix="use another checkpoint",
            )


def _different(tree: str, saved: Sequence[Any], here: Sequence[Any]) -> str:
    paths = sorted({path for path, value in saved if [path, value] not in here})
    more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
    return ", ".join(f"{tree}/{path}".rstrip("/") for path in paths[:5]) + more


def _is_below_a_byte(dtype: str) -> bool:
    return any(dtype.startswith(kind) for kind in ("int2", "int4", "uint2", "uint4", "float4"))


def plain_path(path: Any) -> str:
    """Returns a path as a string that does not change if classes become dicts."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
