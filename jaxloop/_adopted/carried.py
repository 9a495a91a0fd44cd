"""What a loop carries of a user's state: a pytree of arrays, for a keyed step with its keys.

    carried = Carried.of(key=0)
    step_state = carried.prepare((model, optimizer))    # {"state": ..., "key": ..., "num_steps": 0}
    model, optimizer = carried.show(step_state)         # new modules

Invariant: a carried state alone is enough to make the user's state, so a loop remembers nothing.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxloop._adopted.detection import NNX_VARIABLES, has_modules
from jaxloop._core.arrays import as_state
from jaxloop._core.checks import in_words
from jaxloop._core.types import PyTree
from jaxloop.errors import ArgumentTypeError, SerializationError


@dataclasses.dataclass(frozen=True, eq=False)
class Carried:
    """The init function of an adopted step, in the three parts of `PreparedInit`, and its inverse.

    Attributes:
        key: The key from which the step gets one each time, or None.
    """

    key: jax.Array | None

    @classmethod
    def of(cls, key: Any) -> Carried:
        """Checks the key.

        Raises:
            ArgumentTypeError: It is neither a key nor a seed.
        """
        if key is None:
            return cls(None)
        if isinstance(key, int | np.integer) and not isinstance(key, bool):
            return cls(jax.random.key(int(key)))
        if isinstance(key, jax.Array) and (
            (jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ())
            or (key.dtype == jnp.uint32 and key.ndim == 1)
        ):
            return cls(key)
        raise ArgumentTypeError(
            f"from_train_step: key must be a key or a seed, got {in_words(key)}",
            fix="pass jax.random.key(0), or 0",
        )

    # --- the init function -----------------------------------------------------------------------

    def __call__(self, batch: PyTree, init_state: Any) -> PyTree:
        """Returns the first step state."""
        return self.prepare(init_state)

    @staticmethod
    def fn(batch: PyTree, prepared: PyTree) -> tuple[PyTree, None]:
        """See `PreparedInit`."""
        return prepared, None

    def prepare(self, init_state: Any) -> PyTree:
        """See `PreparedInit`."""
        if init_state is None:
            raise ArgumentTypeError(
                "run must get the first state of a train_step, got none",
                fix="pass it, as in loop.run(data, state)",
            )
        state = init_state
        if has_modules(state):
            state = split(state)
        state = as_state(state, "run(init_state=)")
        if self.key is None:
            return state
        return {"state": state, "key": self.key, "num_steps": jnp.int32(0)}

    def check(self, evidence: PyTree) -> None:
        """See `PreparedInit`. There is nothing to check."""

    # --- the parts -------------------------------------------------------------------------------

    def state_of(self, step_state: PyTree) -> PyTree:
        """Returns the user's state, as it is carried.

        Raises:
            ArgumentTypeError: The step state is not a carried one.
        """
        if has_modules(step_state):
            raise ArgumentTypeError(
                "the step state must be a pytree of arrays, got NNX modules",
                fix="start a run from modules with loop.run(data, modules)",
            )
        if self.key is None:
            return step_state
        if isinstance(step_state, dict) and step_state.keys() >= {"state", "key", "num_steps"}:
            return step_state["state"]
        raise ArgumentTypeError(
            "the step state of a train_step with key= must be a dict with 'state', 'key' and "
            f"'num_steps', got {type(step_state).__name__}",
            fix="start a run from a state of your own with loop.run(data, state)",
        )

    def key_of(self, step_state: PyTree) -> tuple[jax.Array, ...]:
        """Returns the key of the next step, if the step gets one."""
        if self.key is None:
            return ()
        return (jax.random.fold_in(step_state["key"], step_state["num_steps"]),)

    def advanced(self, step_state: PyTree, state: PyTree) -> PyTree:
        """Returns the next step state, with the user's new state as it is carried."""
        if self.key is None:
            return state
        return {**step_state, "state": state, "num_steps": step_state["num_steps"] + 1}

    def show(self, step_state: PyTree) -> Any:
        """Returns the user's state in the form in which it was passed to `run`.

        Raises:
            SerializationError: It was restored without the modules that it belongs to.
        """
        state = self.state_of(step_state)
        if isinstance(state, dict) and state.keys() == {NNX_VARIABLES}:
            raise SerializationError(
                "a state of NNX modules must be restored with its modules, got only its arrays",
                fix="use loop.restore(path, data=..., init_state=(model, optimizer))",
            )
        return merged(state)


# --- NNX -----------------------------------------------------------------------------------------


def split(state: Any) -> PyTree:
    """Returns NNX modules as a pytree."""
    # Imported here, because only a state of NNX modules needs Flax.
    from jaxloop._adopted import modules

    return modules.split(state)


def merged(state: PyTree) -> Any:
    """Returns the new NNX modules of a carried state, or any other state as it is."""
    if "flax.nnx" not in sys.modules:
        return state
    # Imported here, because only a state of NNX modules needs Flax.
    from jaxloop._adopted import modules

    return state.merge() if isinstance(state, modules.Modules) else state
