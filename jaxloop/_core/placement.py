"""The placement of arrays on devices, given the placement of the step state.

    place = placement(step_state)
    place(batch)                    # on the state's device, or replicated over its mesh

If the placement of a state is unknown, other arrays stay where they are.
"""

from __future__ import annotations

import dataclasses

import jax

from jaxloop._core.types import PyTree


@dataclasses.dataclass(frozen=True)
class Placement:
    """The placement of arrays. Call it with a pytree to put the tree there.

    Attributes:
        device: The device, if the state is on a single one. Arrays are put there uncommitted.
        sharding: The sharding, if the state is spread over a mesh. Arrays are replicated over it.
        known: Whether arrays are moved before they are used.
    """

    device: jax.Device | None = None
    sharding: jax.sharding.Sharding | None = None
    known: bool = False

    def __call__(self, tree: PyTree) -> PyTree:
        if not self.known:
            return tree
        if self.sharding is not None:
            return jax.device_put(tree, self.sharding)
        with jax.default_device(self.device):
            return jax.device_put(tree)


def placement(state: PyTree) -> Placement:
    """Returns the placement for a step's batches, given the arrays that the step carries."""
    shardings = {x.sharding for x in jax.tree.leaves(state) if isinstance(x, jax.Array)}
    devices = {device for sharding in shardings for device in sharding.device_set}
    if len(devices) == 1:
        return Placement(device=devices.pop(), known=True)
    meshes = {s.mesh for s in shardings if isinstance(s, jax.sharding.NamedSharding)}
    if len(meshes) == 1 and set(next(iter(meshes)).devices.flat) == devices:
        spec = jax.sharding.PartitionSpec()
        return Placement(sharding=jax.sharding.NamedSharding(meshes.pop(), spec), known=True)
    return Placement(known=not devices)
