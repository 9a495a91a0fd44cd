"""Where arrays belong, given where the state is."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxloop._core.types import PyTree


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where arrays belong, given where the state is; a call puts a pytree there.

    Attributes:
        device: The one device of a state that is on one; arrays are put there uncommitted.
        sharding: Of a state that is spread over a mesh: arrays are replicated over it.
        known: Whether arrays are put anywhere before they are used.
    """

    device: Any = None
    sharding: Any = None
    known: bool = False

    def __call__(self, tree: PyTree) -> PyTree:
        if not self.known:
            return tree
        if self.sharding is not None:
            return jax.device_put(tree, self.sharding)
        with jax.default_device(self.device):
            return jax.device_put(tree)


def placement(state: PyTree) -> Placement:
    """Where the batches of a step belong, given the arrays that it carries."""
    shardings = {x.sharding for x in jax.tree.leaves(state) if isinstance(x, jax.Array)}
    devices = {device for sharding in shardings for device in sharding.device_set}
    if len(devices) == 1:
        return Placement(device=devices.pop(), known=True)
    meshes = {s.mesh for s in shardings if isinstance(s, jax.sharding.NamedSharding)}
    if len(meshes) == 1 and set(next(iter(meshes)).devices.flat) == devices:
        spec = jax.sharding.PartitionSpec()
        return Placement(sharding=jax.sharding.NamedSharding(meshes.pop(), spec), known=True)
    return Placement(known=not devices)
