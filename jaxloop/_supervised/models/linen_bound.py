"""A Linen module at given variables, and its view in an objective.

    bound = BoundModule(module, {"params": params, **rest}, train=True, keys=keys)
    prediction = bound.predict(x)
    bound.view.encode(x)                   # another method of the module
    bound.view.sown("intermediates")       # what the calls so far have sown

Each call is an `apply` of its own with the variables that the calls before it left. So an objective
may call the model more than once, and inside `jax.grad` or `jax.vmap`.
"""

from __future__ import annotations

import functools
import inspect
import re
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

import jax
from flax import errors
from flax import linen as nn
from flax.core import DenyList

from jaxloop._core.types import PyTree
from jaxloop._supervised.models.flags import LINEN_FLAGS, TrainFlags
from jaxloop._supervised.models.functions import never_called
from jaxloop.errors import ModelError

Keys: TypeAlias = dict[str, jax.Array]

_ASKED = re.compile(r'needs PRNG for "(.+)"')


def stream_keys(key: jax.Array, names: Collection[str]) -> Keys:
    """Returns a key for each random stream, made from its name, in the same way everywhere."""
    return {
        name: jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)
        for name in sorted(names)
    }


def is_sown(name: str, collection: Any) -> bool:
    """Returns whether a collection holds what `Module.sow` appended, and so is not carried."""
    return name == "intermediates" or _holds_tuples(collection)


def _holds_tuples(node: Any) -> bool:
    if isinstance(node, Mapping):
        return bool(node) and all(map(_holds_tuples, node.values()))
    return isinstance(node, tuple)


class BoundModule:
    """A Linen module at given variables. See `BoundModel`.

    Args:
        module: The module.
        variables: The variables, or None if the first call makes them.
        train: Whether the module is in training mode.
        keys: ``(number of earlier calls, streams that the module asked for) -> keys by stream``.
    """

    def __init__(
        self,
        module: nn.Module,
        variables: dict[str, PyTree] | None,
        *,
        train: bool,
        keys: Callable[[int, Collection[str]], Keys | None],
    ) -> None:
        self.module = module
        self._variables, self._train, self._keys = variables, train, keys
        self._carried = None if variables is None else tuple(variables)
        self._num_calls = 0

    @property
    def view(self) -> LinenModel:
        """See `BoundModel`."""
        return LinenModel(self)

    @property
    def variables(self) -> dict[str, PyTree]:
        """The variables after the calls so far, with what was sown.

        Raises:
            ModelError: No call has made them.
        """
        if self._variables is None:
            raise never_called()
        return self._variables

    def initialize(self, *args: PyTree, **kwargs: PyTree) -> None:
        """See `BoundModel`."""
        if self._variables is None:
            self.predict(*args, **kwargs)

    def predict(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        """See `BoundModel`."""
        return self.call("__call__", *args, **kwargs)

    def rest(self) -> PyTree:
        """See `BoundModel`."""
        assert self._carried is not None
        return {name: self.variables[name] for name in self._carried if name != "params"}

    def call(self, method: str, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
        """Calls a method of the module, or of one of its submodules, with the train flags."""
        flags = _flags_of(self.module, method)
        kwargs = {**flags.values(self._train, len(args), kwargs), **kwargs}

        def call(module: nn.Module, *args: PyTree, **kwargs: PyTree) -> PyTree:
            return getattr(module, method)(*args, **kwargs)

        result, changed = self._with_streams(call, args, kwargs)
        self._num_calls += 1
        if self._carried is not None:
            self._check_new(changed)
        self._variables = {**(self._variables or {}), **changed}
        return result

    def _with_streams(self, call: Callable[..., PyTree], args: Any, kwargs: Any) -> Any:
        """Calls the module with a key for each random stream that it asks for."""
        asked: set[str] = set()
        while True:
            keys = self._keys(self._num_calls, asked)
            try:
                return self._apply(call, args, kwargs, keys)
            except errors.InvalidRngError as error:
                # Flax does not say in advance which streams a module draws from.
                found = _ASKED.search(str(error))
                if keys is None or found is None or found.group(1) in keys:
                    raise
                asked.add(found.group(1))

    def _apply(
        self, call: Callable[..., PyTree], args: Any, kwargs: Any, keys: Keys | None
    ) -> tuple[PyTree, dict[str, PyTree]]:
        if self._variables is None:
            made = nn.init_with_output(call, self.module, mutable=True)(keys, *args, **kwargs)
            return made[0], dict(made[1])
        if self._carried is None:  # still initializing, so a call may make more variables
            mutable: Any = True
        else:
            mutable = DenyList(["params"] if self._train else list(self._carried))
        apply = nn.apply(call, self.module, mutable=mutable)
        result, changed = apply(self._variables, *args, rngs=keys, **kwargs)
        return result, dict(changed)

    def _check_new(self, changed: Mapping[str, PyTree]) -> None:
        """Raises if a call made a variable that the loop does not carry."""
        for name, collection in changed.items():
            if name not in (self._carried or ()) and not is_sown(name, collection):
                raise ModelError(
                    "a forward pass must keep the structure of the model's state, which the loop "
                    f"carries, got the new collection {name!r}",
                    fix="make every variable in init too, which jaxloop calls with train=False",
                )


def _flags_of(module: nn.Module, method: str) -> TrainFlags:
    function = getattr(type(module), method, None)
    if not callable(function):  # a submodule
        return TrainFlags({}, {})
    return TrainFlags.of(LINEN_FLAGS, inspect.signature(function))


class LinenModel:
    """A Linen module in an objective, at the parameters of this step.

    Call it as you call the module, or call its other methods and its submodules. The train flag is
    set unless you pass it, and each call gets new keys for the random streams.

    Args:
        bound: The module and its variables.
    """

    def __init__(self, bound: BoundModule) -> None:
        self._bound = bound

    def __call__(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        return self._bound.call("__call__", *args, **kwargs)

    @property
    def params(self) -> PyTree:
        """The parameters."""
        return self._bound.variables.get("params", {})

    @property
    def variables(self) -> PyTree:
        """All collections of variables, after the calls so far."""
        return dict(self._bound.variables)

    def sown(self, collection: str = "intermediates") -> PyTree:
        """Returns what the calls so far have sown into a collection, a dict as in Flax."""
        return self._bound.variables.get(collection, {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"a {type(self).__name__} has no attribute {name!r}")
        module = self._bound.module
        on_class = getattr(type(module), name, None)
        if not callable(on_class) and hasattr(module, name):
            value = getattr(module, name)
            if not isinstance(value, nn.Module):
                return value
        # A method, or a submodule, which exists only during a call.
        return functools.partial(self._bound.call, name)
