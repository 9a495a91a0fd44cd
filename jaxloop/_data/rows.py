"""The short path of a batch into a row of a buffer: one loop that checks and copies.

    copier = RowCopier(signature)
    copier.copy(Target(arrays, signature), 64, iterator, request)
    copier.count        # rows that have a batch
    copier.item         # what was read and does not fit, or NOTHING

A batch fits if it has the structure, shapes and dtypes of the signature. A NumPy array of a wider
dtype that JAX would cast to the signature's fits too, and the copy casts it. Each batch is copied
before the next is read, so the iterator may reuse its arrays. The reader converts what does not
fit with `as_batch`, which also makes the errors.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import jax
import numpy as np

from jaxloop._core.batch import Batch, Signature

if TYPE_CHECKING:
    from jaxloop._data.readers import Fill

NOTHING: Final[Any] = object()
"""No item."""

_Row: TypeAlias = tuple[tuple[np.ndarray[Any, Any], tuple[int, ...], tuple[Any, ...]], ...]
"""For each leaf of a batch: where it is written, its shape, and the dtypes that it may have."""

_USES_BEFORE_VIEWS = 3
"""Writing to a view of a row saves a third of the time of writing to an index of the array, and
making the view takes as long as writing two rows."""

_WIDER: Final = {
    np.dtype(narrow): np.dtype(wide)
    for narrow, wide in (
        (np.float32, np.float64),
        (np.int32, np.int64),
        (np.uint32, np.uint64),
        (np.complex64, np.complex128),
    )
}


class _OnlyNext:
    __slots__ = ("_iterator",)

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator

    def __iter__(self) -> _OnlyNext:
        return self

    def __next__(self) -> Any:
        return next(self._iterator)


def only_next(iterator: Iterator[Any]) -> Iterator[Any]:
    """Returns an iterator over the same items that asks for nothing but the next one.

    A loop asks its iterator for an iterator first. Some of the user's classes have no ``__iter__``
    or start over in it. Python's own iterators return themselves.
    """
    own = type(iterator).__module__ in ("builtins", "itertools")
    return iterator if own else _OnlyNext(iterator)


class Target:
    """The rows of a buffer, to which batches of one signature are written.

    Attributes:
        leaves: The arrays of the buffer, each with the shape and the dtypes of its leaf.
        views: The same for single rows, with views of the rows in place of the arrays. They are
            made for the rows that were used, when the buffer has been reused a few times.
    """

    __slots__ = ("_num_uses", "leaves", "views")

    def __init__(self, arrays: list[np.ndarray[Any, Any]], signature: Signature) -> None:
        self.leaves: _Row = tuple(
            (array, shape, _accepted(dtype))
            for array, (shape, dtype) in zip(arrays, signature.leaves, strict=True)
        )
        self.views: list[_Row] = []
        self._num_uses = 0

    def used(self, count: int) -> None:
        """Records that ``count`` rows were written, and will be again."""
        self._num_uses += 1
        if self._num_uses >= _USES_BEFORE_VIEWS:
            self.views += [
                tuple((array[index, ...], shape, dtypes) for array, shape, dtypes in self.leaves)
                for index in range(len(self.views), count)
            ]


def _accepted(dtype: Any) -> tuple[Any, ...]:
    """Returns the dtypes of NumPy arrays that JAX would put on a device with this dtype."""
    wide = _WIDER.get(dtype)
    if wide is None or jax.dtypes.canonicalize_dtype(wide) != dtype:
        return (dtype,)
    return (dtype, wide)


class RowCopier:
    """Copies batches of one signature into rows.

    Attributes:
        signature: The signature.
        count: The number of rows that have a batch.
        item: What was read and is not in a row, or `NOTHING`.
        ended: Whether the iterator ended.
        late: Whether the request was late.
    """

    __slots__ = ("_convert", "_kind", "_leaves", "count", "ended", "item", "late", "signature")

    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        self._kind: Any
        self._kind, self._leaves = _structure(signature.tree)
        # How leaves that are not NumPy arrays are converted, by type. A type that JAX has found to
        # be a leaf, and not a part of the structure, is always one.
        self._convert: dict[type, Callable[[Any], Any]] = {}
        self.restart()

    def restart(self) -> None:
        """Begins with the first row of another buffer."""
        self.count, self.item = 0, NOTHING
        self.ended = self.late = False

    def copy(self, to: Target, stop: int, iterator: Iterator[Any], request: Fill) -> None:
        """Reads batches into the next rows, at most to row ``stop``, and updates the attributes.

        It ends earlier if a batch does not fit, the iterator ends or the request is late. What the
        iterator raises is raised.
        """
        kind, leaves_of, convert = self._kind, self._leaves, self._convert
        num_leaves, array_type = len(self.signature.leaves), np.ndarray
        count = self.count
        item: Any = NOTHING
        rows: Iterable[_Row] = itertools.repeat(to.leaves)
        index: Any = count
        indexed = count >= len(to.views)
        if not indexed:
            stop = min(stop, len(to.views))
            rows, index = to.views[count:stop], ...
        try:
            for row, item in zip(rows, itertools.islice(iterator, stop - count)):  # noqa: B905
                if leaves_of is not None:
                    leaves = leaves_of(item)
                elif type(item) is kind and len(item) == num_leaves:
                    leaves = item
                else:
                    break
                if num_leaves == 2:  # an inner loop would take a third longer
                    (array, shape, dtypes), (array_2, shape_2, dtypes_2) = row
                    leaf, leaf_2 = leaves
                    if type(leaf) is not array_type:
                        leaf = convert[type(leaf)](leaf)
                    if type(leaf_2) is not array_type:
                        leaf_2 = convert[type(leaf_2)](leaf_2)
                    if leaf.shape != shape or leaf.dtype not in dtypes:
                        break
                    if leaf_2.shape != shape_2 or leaf_2.dtype not in dtypes_2:
                        break
                    array[index] = leaf
                    array_2[index] = leaf_2
                else:
                    for leaf, (array, shape, dtypes) in zip(leaves, row):  # noqa: B905
                        if type(leaf) is not array_type:
                            leaf = convert[type(leaf)](leaf)
                        if leaf.shape != shape or leaf.dtype not in dtypes:
                            raise ValueError("does not fit")
                        array[index] = leaf
                # A signal's exception cannot arise between these two assignments, because Python
                # raises it only after calls and where loops repeat.
                item = NOTHING
                count += 1
                if indexed:
                    index = count
                if request.late is not None and request.late():
                    self.late = True
                    break
            else:
                self.ended = count < stop
        except Exception:
            if item is NOTHING:  # the iterator raised it, and no conversion
                raise
        finally:
            self.count, self.item = count, item

    def write(self, to: Target, batch: Batch) -> None:
        """Writes a batch of the signature to the next row. The caller counts it."""
        for (array, _, _), leaf in zip(to.leaves, jax.tree.leaves(batch.value), strict=True):
            array[self.count] = leaf

    def learn(self, item: Any, batch: Batch) -> None:
        """Learns the types of the leaves of an item that is equal to a batch."""
        if batch.signature is not self.signature and batch.signature != self.signature:
            return
        for leaf in jax.tree.leaves(item):
            kind = type(leaf)
            if isinstance(leaf, jax.Array):
                self._convert[kind] = _on_host
            elif not isinstance(leaf, np.ndarray):  # a subclass may mean something else by itself
                self._convert[kind] = _to_numpy if _reads_by_numpy(leaf) else np.asarray


_to_numpy = operator.methodcaller("numpy")


def _reads_by_numpy(leaf: Any) -> bool:
    """Returns whether ``leaf.numpy()`` gives what `np.asarray` gives, as in PyTorch, but faster."""
    try:
        mine, usual = leaf.numpy(), np.asarray(leaf)
        same = mine.__array_interface__ == usual.__array_interface__
        return bool(type(mine) is np.ndarray and same)
    except Exception:  # it has no such method, or one of another meaning
        return False


def _on_host(leaf: Any) -> Any:
    array = np.asarray(leaf)
    if not leaf.is_fully_replicated:
        raise ValueError("sharded")
    if array.dtype.itemsize > 4 and jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise ValueError("JAX leaves the dtype of its own arrays as it is")
    return array


def _structure(tree: Any) -> tuple[type | None, Callable[[Any], Sequence[Any]] | None]:
    """Returns how to find the leaves of an item: it is a tuple or list of them, or a function.

    The function raises an exception if the item has another structure.
    """
    size = tree.num_leaves
    for kind in (tuple, list):
        if tree == jax.tree.structure(kind([0] * size)):
            return kind, None
    example = jax.tree.unflatten(tree, range(size))
    if type(example) is dict and tree == jax.tree.structure(dict.fromkeys(example, 0)):
        return None, _values_of(sorted(example, key=example.__getitem__))
    if tree == jax.tree.structure(0):
        return None, lambda item: (item,)
    return None, tree.flatten_up_to


def _values_of(keys: list[Any]) -> Callable[[Any], Sequence[Any]]:
    size = len(keys)
    get = operator.itemgetter(*keys) if size > 1 else lambda item: tuple(item.values())

    def values(item: Any) -> Sequence[Any]:
        if type(item) is not dict or len(item) != size:
            raise ValueError("another structure")
        found: Sequence[Any] = get(item)
        return found

    return values
