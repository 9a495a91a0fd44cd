"""Weights to a safetensors file, and back into a model.

    save_weights("model.safetensors", model_state)
    model_state = load_weights("model.safetensors", like=model_state)

Invariant: every array comes back with the same bits, or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxloop._core.arrays import key_impl
from jaxloop._core.fingerprint import MOST_SHOWN
from jaxloop._core.types import PyTree
from jaxloop._weights.file_format import (
    ArrayFile,
    Entry,
    has_code,
    known_dtypes,
    write_arrays,
)
from jaxloop._weights.named_leaves import NamedLeaves
from jaxloop.errors import (
    ArgumentError,
    ArgumentTypeError,
    ModelError,
    SerializationError,
    unknown_name,
)

_KEYS = "jaxloop.keys"
"""The metadata that names the random keys among the arrays, and their implementations."""


def save_weights(path: str | os.PathLike[str], weights: PyTree) -> None:
    """Writes the weights of a model to a safetensors file, which other libraries read too.

    The file appears, or takes the place of an older one, when all of it is written. Arrays of an
    accelerator are copied to the memory of the host first.

    Args:
        path: The path of the file. Its folder is made if it does not exist.
        weights: What `Loop.run` of a trainer returns: the variables of a Linen module, an NNX or
            Equinox module, ``(params, state)``; or any pytree of arrays. Of a `State`, the model
            state ``step_state["model_state"]`` is written, or the step state if it has none. The
            names of arrays are those of the parts that they are in, joined by dots, such as
            ``"params.Dense_0.kernel"``. Arrays that are in two places are written twice.

    Raises:
        ArgumentError: There is no array, or two of them have one name.
        ArgumentTypeError: A leaf is no array, or ``path`` is no path.
        SerializationError: The format has no such dtype, as int4, or an array is spread over
            several processes.
        CheckpointError: The file cannot be written.
        MissingExtraError: The safetensors library is not installed, or is too old.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> path = tempfile.mkdtemp() + "/model.safetensors"
        >>> save_weights(path, {"dense": {"kernel": np.ones((2, 1)), "bias": np.zeros(1)}})
        >>> sorted(load_weights(path))
        ['dense.bias', 'dense.kernel']
    """
    name = _checked_path("save_weights", path)
    leaves = NamedLeaves.of(weights, "save_weights")
    arrays, keys = {}, {}
    for one, value in zip(leaves.names, leaves.values, strict=True):
        arrays[one] = _as_numpy(one, value)
        if _is_key(value):
            keys[one] = key_impl(value.dtype)
    write_arrays(name, arrays, {_KEYS: json.dumps(keys)} if keys else {})


def load_weights(
    path: str | os.PathLike[str],
    like: PyTree = None,
    *,
    missing: Literal["error", "keep"] = "error",
    unexpected: Literal["error", "ignore"] = "error",
    cast: bool = False,
) -> PyTree:
    """Reads weights from a safetensors file.

    Args:
        path: The path of a file that `save_weights` or another library wrote.
        like: A model like the one that was saved, of any kind that `save_weights` takes. It may
            have shapes in place of arrays, as `jax.eval_shape` gives them. None reads everything.
        missing: What to do if the file lacks an array of ``like``: raise an error, or keep the
            array of ``like``, as for a new last layer.
        unexpected: What to do if ``like`` has no place for an array of the file: raise an error, or
            ignore it.
        cast: Whether a float array may have another float dtype than in ``like``, and an integer
            array another integer dtype. It is converted to that of ``like``.

    Returns:
        A new model like ``like``, with its arrays on the same devices, which is not changed.
        Without ``like``, a dict from names to NumPy arrays. A random key in it is an array of
        uint32.

    Raises:
        ModelError: The arrays do not fit ``like``. The error names each of them.
        CheckpointError: The file cannot be read.
        DamagedError: It is no safetensors file, or is damaged.
        SerializationError: An array has a dtype that NumPy lacks.
        MissingExtraError: The safetensors library is not installed, or is too old.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> path = tempfile.mkdtemp() + "/model.safetensors"
        >>> save_weights(path, {"old": np.ones(2, np.float32)})
        >>> like = {"old": np.zeros(2, np.float32), "new": np.zeros(1, np.float32)}
        >>> load_weights(path, like, missing="keep")
        {'new': array([0.], dtype=float32), 'old': array([1., 1.], dtype=float32)}
    """
    for name, value, choices in (
        ("missing", missing, ("error", "keep")),
        ("unexpected", unexpected, ("error", "ignore")),
    ):
        if value not in choices:
            raise unknown_name(f"value of load_weights({name}=)", str(value), choices)
    with ArrayFile(_checked_path("load_weights", path)) as file:
        if like is None:
            return {name: file.read(name) for name in file.entries}
        leaves = NamedLeaves.of(like, "load_weights")
        fit = _Fit(file, leaves, cast=cast)
        fit.check(missing, unexpected)
        return leaves.replaced([fit.value(*pair) for pair in fit.pairs])


def _checked_path(where: str, path: object) -> str:
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise ArgumentTypeError(
            f"{where}: path must be a string or a pathlib.Path, got {path!r:.80}",
            fix="pass the path of a file first, such as 'model.safetensors'",
        )
    name = os.path.expanduser(os.fspath(path))
    if not name.strip() or "\0" in name:
        raise ArgumentError(
            f"{where}: path must be the path of a file, got {name!r}",
            fix="pass a path such as 'model.safetensors'",
        )
    return name


def _is_key(value: Any) -> bool:
    """Returns whether an array, or the shape of one, has typed keys."""
    dtype = getattr(value, "dtype", None)
    return dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def _stored(value: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape and the dtype that an array or a number has in a file."""
    if _is_key(value):
        return jax.eval_shape(jax.random.key_data, value)
    if isinstance(value, bool | int | float):
        value = np.asarray(value)  # all bits of it
    return jax.ShapeDtypeStruct(value.shape, value.dtype)


def _as_numpy(name: str, value: Any) -> np.ndarray[Any, Any]:
    if isinstance(value, jax.ShapeDtypeStruct | jax.core.Tracer):
        raise ArgumentTypeError(
            f"save_weights: {name!r} must be an array, got its shape alone",
            fix="pass the weights, not what jax.eval_shape returns, and save them outside jax.jit",
        )
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        raise SerializationError(
            f"save_weights: {name!r} must be an array of this process, got one that is spread over "
            "several",
            fix="gather it first, with jax.experimental.multihost_utils.process_allgather",
        )
    stored = _stored(value)
    if not has_code(np.dtype(stored.dtype)):
        raise SerializationError(
            f"save_weights: {name!r} must have a dtype of {known_dtypes()}, got {stored.dtype}",
            fix="convert it with astype, or keep it in a checkpoint",
        )

    return np.asarray(jax.random.key_data(value) if _is_key(value) else value, stored.dtype)


def _implementations(file: ArrayFile) -> dict[str, Any]:
    """Returns the implementation of each random key in a file, as far as it says."""
    try:
        found = json.loads(file.metadata[_KEYS])
    except (LookupError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


@dataclasses.dataclass
class _Fit:
    """The arrays of a file beside those of a model.

    Attributes:
        file: The file.
        leaves: The arrays of the model.
        cast: Whether dtypes may differ.
    """

    file: ArrayFile
    leaves: NamedLeaves
    cast: bool

    @property
    def pairs(self) -> list[tuple[str, Any]]:
        """The names and values of the model."""
        return list(zip(self.leaves.names, self.leaves.values, strict=True))

    def check(self, missing: str, unexpected: str) -> None:
        """Raises if an array does not fit, before any is read.

        Raises:
            ModelError: See `load_weights`.
        """
        entries, mine = self.file.entries, set(self.leaves.names)
        wrong = [text for name, value in self.pairs if (text := self._problem(name, value))]
        absent = [name for name in self.leaves.names if name not in entries]
        unknown = [name for name in entries if name not in mine]
        if missing == "error":
            wrong += [f"no {name!r}" for name in absent]
        else:
            kept = dict(self.pairs)
            wrong += [
                f"no {name!r}, of which like has only the shape"
                for name in absent
                if isinstance(kept[name], jax.ShapeDtypeStruct)
            ]
        if unexpected == "error":
            wrong += [f"an unexpected {name!r}" for name in unknown]
        elif len(absent) == len(mine):
            wrong.append(f"none of its names, but {', '.join(map(repr, unknown[:3]))} ...")
        if missing == "keep" and len(absent) == len(mine) and not wrong:
            wrong.append("no array at all")
        if wrong:
            more = f"; and {len(wrong) - MOST_SHOWN} more" if len(wrong) > MOST_SHOWN else ""
            raise ModelError(
                "load_weights: the arrays of the file must be those of like, got "
                f"{'; '.join(wrong[:MOST_SHOWN])}{more}",
                fix="pass a model like the one that was saved; for a part of it, missing='keep' "
                "and unexpected='ignore'; for another dtype, cast=True",
            )

    def _problem(self, name: str, value: Any) -> str | None:
        entry = self.file.entries.get(name)
        if entry is None:
            return None
        stored = _stored(value)
        if entry.shape != tuple(stored.shape) or not self._agrees(entry, stored.dtype):
            return f"{name!r} {entry} in place of {stored.dtype}{list(stored.shape)}"
        if not _is_key(value):
            return None
        found, mine = _implementations(self.file).get(name), key_impl(value.dtype)
        return None if found in (None, mine) else f"{name!r} a key of {found} in place of {mine}"

    def _agrees(self, entry: Entry, dtype: Any) -> bool:
        found = entry.dtype
        if found is None or found == dtype:
            return found is not None
        kinds = (np.inexact, np.integer)
        both = [jax.dtypes.issubdtype(one, kind) for kind in kinds for one in (found, dtype)]
        return self.cast and (all(both[:2]) or all(both[2:]))

    def value(self, name: str, like: Any) -> Any:
        """Returns the array for a place in the model."""
        if name not in self.file.entries:
            return like
        array = self.file.read(name).astype(_stored(like).dtype, copy=False)
        if isinstance(like, bool | int | float):
            return type(like)(array.item())
        if isinstance(like, np.ndarray | np.generic):
            return array if isinstance(like, np.ndarray) else array[()]
        where = like.sharding if getattr(like, "committed", like.sharding is not None) else None
        if not _is_key(like):
            return jnp.asarray(array) if where is None else jax.device_put(array, where)
        key = jax.random.wrap_key_data(jnp.asarray(array), impl=key_impl(like.dtype))
        return key if where is None else jax.device_put(key, where)
