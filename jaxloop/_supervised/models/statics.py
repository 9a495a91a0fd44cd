"""What a model is made of besides its arrays: the classes of its parts and their attributes.

    found = statics_of(module, attributes, is_saved)
    found                         # {"model": "Net", "model.drop": "flax.Dropout", ...}

The arrays of a model are saved. Its other attributes, such as a dropout rate or whether a layer is
switched off, are in the user's script, so a resumed run compares them with those of the saved run.
Two kinds of attributes are left out: train flags, which the loop sets itself, and initializers,
which have done their work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxloop._core.fingerprint import qualified_name, stable

Attributes = Callable[[Any], Mapping[str, Any] | None]
"""Returns the attributes of a part of a model by name, or None if the value is not such a part."""

IsSaved = Callable[[Any], bool]
"""Returns whether a value belongs to the model state."""

_SET_BY_THE_LOOP = frozenset({"deterministic", "use_running_average", "inference"})


def statics_of(model: Any, attributes: Attributes, is_saved: IsSaved) -> dict[str, str]:
    """Returns a description of each part and attribute of a model, by path.

    Args:
        model: The model.
        attributes: Returns the attributes of a part of it.
        is_saved: Returns whether a value belongs to the model state, and so is left out.
    """
    found: dict[str, str] = {}
    seen: set[int] = set()

    def walk(value: Any, path: str) -> None:
        own = attributes(value)
        if own is not None:
            found[path] = qualified_name(type(value))
            if id(value) in seen:  # a part that the model holds twice
                return
            seen.add(id(value))
            for name, one in own.items():
                if not _is_left_out(name):
                    walk(one, f"{path}.{name}")
        elif isinstance(value, Mapping) and value:
            for name, one in value.items():
                walk(one, f"{path}[{name!r}]")
        elif type(value) in (tuple, list) and value:
            for index, one in enumerate(value):
                walk(one, f"{path}[{index}]")
        elif not is_saved(value):
            found[path] = stable(value)

    walk(model, "model")
    return found


def _is_left_out(name: str) -> bool:
    return name in _SET_BY_THE_LOOP or name.endswith(("_init", "initializer"))
