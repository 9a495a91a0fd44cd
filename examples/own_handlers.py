"""A handler package of your own, made from public names alone.

    python examples/own_handlers.py

A handler is a function from loop to loop. `save_records` has a memory, checks the loop before the
first step, and requests saves. It works as the built-in handlers do: because its memory is part of
the state, a resumed run makes the same decisions.

It attaches a `CheckpointTrigger`, because only a trigger can request a save. A handler that changes
the state or halts the loop attaches a `Handler`, and one that only reads attaches an `Observer`.
"""

from __future__ import annotations

import tempfile
from typing import Any

import jax.numpy as jnp

import jaxloop as jl
from jaxloop.handlers import (
    CheckpointTrigger,
    FolderStore,
    LoopSpec,
    SpecT,
    as_events,
    as_filter,
    is_better,
    read_scalar,
)


def save_records(
    loop: SpecT, metric: str, path: str, *, at_most: int, name: str = "save_records"
) -> SpecT:
    """Saves the state each time ``metric`` sets a record, but at most so many times.

    Args:
        loop: The loop.
        metric: A metric whose larger values are better.
        path: The folder of the checkpoints.
        at_most: How many records are saved.
        name: The key of its memory in ``state.handler_state``.
    """
    folder = FolderStore(path, keep=None)  # keep=None: no checkpoint is ever deleted

    def decide(state: jl.State[Any]) -> jl.State[Any] | None:
        # Called when the event fires. None means that the state is not saved.
        # Before the first record, the best value is NaN. Every number is better than NaN.
        memory = state.handler_state.get(name, {"best": float("nan"), "saved": 0})
        value = read_scalar(state, f"`{name}`", metric)
        if memory["saved"] >= at_most or not is_better(value, memory["best"], "max", 0.0):
            return None
        memory = {"best": value, "saved": memory["saved"] + 1}
        # A state is a value: return a changed copy. It is saved when the firing ends.
        return state.replace(handler_state={**state.handler_state, name: memory})

    def check(loop: LoopSpec) -> None:
        # Called by `run` before the first step. It raises what can be known to be wrong by then.
        folder.check(loop)  # whether the folder can be written
        if at_most < 1:
            raise ValueError(f"{name}: at_most must be at least 1, got {at_most}")

    return loop.attach(
        CheckpointTrigger(
            as_events("epoch_completed"),
            as_filter("always"),
            name,
            decide=decide,
            open_store=folder,
            watches=(metric,),  # a metric that does not exist is an error before the first step
            check=check,
            unique=True,  # no other handler may have this name, which is the key of the memory
        )
    )


def main() -> None:
    """Trains on the digits, and shows what was saved."""
    train, test = jl.datasets.digits()
    model = (
        lambda key, x: {"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)},
        lambda params, x: x.reshape(len(x), -1) @ params["w"] + params["b"],
    )
    with tempfile.TemporaryDirectory() as path:
        loop = (
            jl.trainer(model, "softmax_cross_entropy_with_integer_labels", "adam", log=0)
            .metric("accuracy")
            .validate(jl.batches(test, 128))
        )
        # `validate` adds "validation_accuracy", so it is attached first.
        loop = save_records(loop, "validation_accuracy", path, at_most=3)
        state = loop.final_state(jl.batches(train, 32, shuffle=True), epochs=8)
        memory = state.handler_state["save_records"]
        print(f"{memory['saved']} records, the best of them {memory['best']:.1%}")
        assert memory["saved"] == 3 and jl.restore(path).step > 0


if __name__ == "__main__":
    main()
