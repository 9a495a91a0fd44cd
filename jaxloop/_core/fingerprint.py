"""Descriptions of values that are the same in every process that runs the same script.

    stable(functools.partial(my_metric, k=5))     # "partial(my_metric, k=5)"

A saved state holds such descriptions of what it was made of, and a resumed run compares them with
its own. A description therefore has no address and no hash of code: it holds the names of functions
and classes, and the values that they were made with. Two functions of one name whose bodies differ
have the same description.
"""

from __future__ import annotations

import dataclasses
import dis
import enum
import functools
import hashlib
import inspect
import sys
import types
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

_DEPTH = 8
"""How many containers and functions a description may nest."""
_LENGTH = 200
"""The length from which a description is cut and ends with a hash of the whole."""
_HASHED_BYTES = 1 << 20
"""Larger arrays are described by shape and dtype alone."""

MOST_SHOWN = 8
"""The maximum number of differences that an error lists."""

_PLAIN = (type(None), bool, int, float, complex, str, bytes)


def stable(value: Any) -> str:
    """Returns a description of a value that does not depend on the process.

    Args:
        value: Any value. Numbers, strings, arrays, containers, partials and dataclasses are
            described by their content, functions by their name and what they close over, and any
            other object by its class.

    Example:
        >>> print(stable(("accuracy", 0.5)), stable(functools.partial(len, [1])), stable(np.int8))
        ('accuracy', 0.5) partial(len, (1)) int8
    """
    text = _describe(value, 0)
    if len(text) <= _LENGTH:
        return text
    return f"{text[: _LENGTH - 20]}... {_hash(text.encode())}"


def qualified_name(thing: Any) -> str:
    """Returns the name of a function or class, after the package that it comes from, if any.

    The rest of the module's name is left out, because a script may be run, imported or be a
    notebook, and packages move functions between their modules.
    """
    name = getattr(thing, "__qualname__", None) or getattr(thing, "__name__", None)
    if not isinstance(name, str):
        return qualified_name(type(thing))
    module = getattr(thing, "__module__", None) or ""
    if module == "__main__":  # as `python -m package.script` calls package.script
        module = getattr(getattr(sys.modules.get(module), "__spec__", None), "name", "")
    package, dot, _ = str(module).partition(".")
    return f"{package}.{name}" if dot else name


def _describe(value: Any, depth: int) -> str:
    if depth > _DEPTH:
        return "..."
    again = functools.partial(_describe, depth=depth + 1)
    if isinstance(value, enum.Enum):
        return f"{qualified_name(type(value))}.{value.name}"
    if type(value) in _PLAIN:
        return repr(value)
    if isinstance(value, np.dtype | jax.Array):
        return _array(value)
    if isinstance(getattr(value, "dtype", None), np.dtype):  # NumPy's, `jnp.float32`, shapes
        return _array(value)
    if isinstance(value, type):
        return _class(value, depth)
    if isinstance(value, functools.partial):
        keywords = [f"{name}={again(one)}" for name, one in sorted(value.keywords.items())]
        return f"partial({', '.join([again(value.func), *map(again, value.args), *keywords])})"
    if isinstance(value, types.MethodType):
        return f"{qualified_name(value.__func__)} of {again(value.__self__)}"
    if isinstance(value, types.FunctionType):
        return _function(value, depth)
    if callable(value) and callable(getattr(value, "__wrapped__", None)):
        return again(value.__wrapped__)  # `jax.jit`, `jax.custom_jvp`: the same function
    if isinstance(value, Mapping):
        items = sorted(f"{again(name)}: {again(one)}" for name, one in value.items())
        return f"{{{', '.join(items)}}}"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(again, value)))}}}"
    if isinstance(value, tuple | list):
        kind = "" if type(value) in (tuple, list) else qualified_name(type(value))
        return f"{kind}({', '.join(map(again, value))})"
    if dataclasses.is_dataclass(value):
        return _dataclass(value, depth)
    return qualified_name(value)


def _array(value: Any) -> str:
    """Describes an array or a dtype. The values of large arrays are left out."""
    if isinstance(value, np.dtype) or not hasattr(value, "shape"):
        return str(getattr(value, "dtype", value))
    shown = f"{value.dtype}{list(value.shape)}"
    if not isinstance(value, np.ndarray | np.generic | jax.Array) or isinstance(
        value, jax.core.Tracer
    ):
        return shown
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        return f"{shown} {_hash(jax.random.key_data(value))}"
    if value.nbytes > _HASHED_BYTES:
        return shown
    array = np.asarray(value)
    return f"{value.dtype}({array.item()!r})" if not array.ndim else f"{shown} {_hash(array)}"


def _hash(content: Any) -> str:
    raw = content if isinstance(content, bytes) else np.ascontiguousarray(content).tobytes()
    return hashlib.sha256(raw).hexdigest()[:16]


def _class(value: type, depth: int) -> str:
    """Describes a class by its name. If a function made it, its bases and methods say more."""
    if issubclass(value, np.generic):
        return str(np.dtype(value))
    name = qualified_name(value)
    if "<" not in name:
        return name
    parts = [_describe(base, depth + 1) for base in value.__bases__ if base is not object]
    for member, one in sorted(vars(value).items()):
        function = getattr(one, "__func__", one)
        if isinstance(function, types.FunctionType) and not member.startswith("__"):
            parts.append(f"{member}={_function(function, depth + 1)}")
    return f"{name}({', '.join(parts)})"


def _dataclass(value: Any, depth: int) -> str:
    """Describes a dataclass by the fields that differ from their defaults.

    A field that a later version adds therefore changes no description.
    """
    parts = []
    for field in dataclasses.fields(value):
        one = getattr(value, field.name, None)
        text = _describe(one, depth + 1)
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if default is dataclasses.MISSING or text != _describe(default, depth + 1):
            parts.append(f"{field.name}={text}")
    return f"{qualified_name(type(value))}({', '.join(parts)})"


def _function(function: types.FunctionType, depth: int) -> str:
    """Describes a function by its name and by the constants that it closes over."""
    held: dict[str, Any] = {}
    if function.__closure__:
        code = function.__code__
        # A variable that the function itself assigns is not a constant, such as a counter.
        assigned = {one.argval for one in dis.get_instructions(code) if one.opname == "STORE_DEREF"}
        for name, cell in zip(code.co_freevars, function.__closure__, strict=True):
            if name not in assigned and name != "__class__":
                try:
                    held[name] = cell.cell_contents
                except ValueError:  # the variable has no value yet
                    continue
    if "<" in function.__qualname__:
        # An inner function may hold constants as defaults too, as in `lambda x, k=k: ...`.
        held |= {
            name: parameter.default
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.default is not parameter.empty
        }
    shown = [
        f"{name}={_describe(one, depth + 1)}"
        for name, one in held.items()
        if _is_constant(one) and one is not function
    ]
    name = qualified_name(function)
    return f"{name}[{', '.join(shown)}]" if shown else name


def _is_constant(value: Any) -> bool:
    """Returns whether a value that a function holds stays as it is. A list may be its log."""
    if type(value) in _PLAIN or isinstance(value, enum.Enum | type | np.dtype | np.generic):
        return True
    if isinstance(value, tuple | frozenset):
        return all(map(_is_constant, value))
    if isinstance(value, functools.partial | types.FunctionType | jax.Array):
        return not isinstance(value, jax.core.Tracer)
    frozen = getattr(type(value), "__dataclass_params__", None)
    return bool(frozen and frozen.frozen) or callable(getattr(value, "__wrapped__", None))


def differences(saved: Mapping[str, str], mine: Mapping[str, str]) -> list[str]:
    """Returns a sentence for each path that differs.

    A missing attribute is the same as one that is None or False, because libraries add attributes
    with such defaults in later versions.

    Example:
        >>> differences({"model.drop.rate": "0.5"}, {"model.drop.rate": "0.1", "model.new": "None"})
        ['model.drop.rate was 0.5 and is 0.1']
    """
    return [
        f"{path} was {saved.get(path, 'missing')} and is {mine.get(path, 'missing')}"
        for path in sorted({**saved, **mine})
        if saved.get(path) != mine.get(path)
        and not {saved.get(path), mine.get(path)} <= {None, "None", "False"}
    ]
