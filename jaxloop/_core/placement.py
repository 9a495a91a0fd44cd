"""The placement of arrays on devices, given the placement of the step state.

    place = placement(step_state)
    place(batch)                    # on the state's device, or replicated over its mesh
    state = place.commit(state)     # all of it, if any of it is committed

If the placement of a state is unknown, other arrays stay where they are.

A state may be sharded over the devices of this process. A batch may not: each device gets a copy.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxloop._core.jaxprs import equations, parts_of
from jaxloop._core.types import PyTree
from jaxloop.errors import ShardingError

_DEFAULT_DEVICE = "jax_default_device"
"""A setting of JAX, which is a device, the name of a platform, or None."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """The placement of arrays. Call it with a pytree to put the tree there.

    Attributes:
        device: The device, if the state is on a single one. Arrays are put there uncommitted.
        sharding: The sharding, if the state is spread over a mesh. Arrays are replicated over it.
        known: Whether arrays are moved before they are used.
        committed: Whether an array of the state is committed to its devices. What a block returns
            is then committed too.
    """

    device: jax.Device | None = None
    sharding: jax.sharding.Sharding | None = None
    known: bool = False
    committed: bool = dataclasses.field(default=False, compare=False)

    def __call__(self, tree: PyTree) -> PyTree:
        if not self.known:
            return tree
        if self.sharding is not None:
            return jax.device_put(tree, self.sharding)
        with jax.default_device(self.device):
            return jax.device_put(tree)

    def commit(self, tree: PyTree) -> PyTree:
        """Commits the arrays of a carry to the devices on which a block will return them.

        JAX compiles a program once for arrays that are committed, and once for others.
        """
        where = self.sharding or self.device
        if not self.committed or where is None:
            return tree
        return jax.tree.map(
            lambda x: x if getattr(x, "committed", False) else jax.device_put(x, where), tree
        )


def placement(state: PyTree) -> Placement:
    """Returns the placement for a step's batches, given the arrays that the step carries."""
    arrays = [x for x in jax.tree.leaves(state) if isinstance(x, jax.Array)]
    shardings = {x.sharding for x in arrays}
    devices = {device for sharding in shardings for device in sharding.device_set}
    committed = any(x.committed for x in arrays)
    if len(devices) == 1:
        return Placement(device=devices.pop(), known=True, committed=committed)
    meshes = {s.mesh for s in shardings if isinstance(s, jax.sharding.NamedSharding)}
    if len(meshes) == 1 and set(next(iter(meshes)).devices.flat) == devices:
        whole = jax.sharding.NamedSharding(meshes.pop(), jax.sharding.PartitionSpec())
        return Placement(sharding=whole, known=True, committed=committed)
    return Placement(known=not devices)


def devices_of(state: PyTree) -> list[jax.Device]:
    """Returns the devices that a state's arrays are on, or the default one if it has none."""
    arrays = [x for x in jax.tree.leaves(state) if isinstance(x, jax.Array)]
    devices = {device for array in arrays for device in array.sharding.device_set}
    if devices:
        return sorted(devices, key=lambda device: device.id)
    default = getattr(jax.config, _DEFAULT_DEVICE)
    return [default if isinstance(default, jax.Device) else jax.local_devices(backend=default)[0]]


def chooses_devices(jaxpr: Any, arguments: PyTree) -> bool:
    """Returns whether what a traced function returns may be elsewhere than on the default device.

    Args:
        jaxpr: The closed jaxpr of the function.
        arguments: The arrays that it gets.
    """
    default = {jax.local_devices()[0]}
    arrays = [x for x in jax.tree.leaves((arguments, jaxpr.consts)) if isinstance(x, jax.Array)]
    return any(x.devices() != default for x in arrays) or _names_devices(jaxpr)


def _names_devices(jaxpr: Any) -> bool:
    """Returns whether an equation of a jaxpr, at any depth, has a sharding or a device."""
    return any(
        equation.primitive.name == "shard_map"
        or any(isinstance(part, jax.sharding.Sharding | jax.Device) for part in parts_of(equation))
        for equation in equations(jaxpr)
    )


def check_processes() -> None:
    """Raises if several processes run, each of which would train a copy of the model.

    Raises:
        ShardingError: ``jax.process_count()`` is not 1.
    """
    count = jax.process_count()
    if count != 1:
        raise ShardingError(
            f"run: jax.process_count() must be 1, got {count}; each process would train its own "
            "copy of the model, because jaxloop cannot train over several processes yet",
            fix="start one process, and do not call jax.distributed.initialize with several",
        )


def check_whole(array: jax.Array, where: str) -> None:
    """Raises if an array of the data is sharded.

    Args:
        array: The array.
        where: What it is, for the error.

    Raises:
        ShardingError: It is neither on one device nor replicated.
    """
    if not array.sharding.is_fully_replicated:
        raise ShardingError(
            f"{where} must be on one device or replicated, got an array that is sharded over "
            f"{len(array.sharding.device_set)} devices; jaxloop cannot split a batch between "
            "devices yet, and would copy all of it to each",
            fix="pass host arrays, such as np.asarray(batch); the step state may be sharded over "
            "the devices of this process",
        )


def check_axes(state: PyTree) -> None:
    """Raises if a state is on a mesh with explicit axes, which is what `jax.make_mesh` makes.

    Raises:
        ShardingError: The types of the metrics' arrays would not fit those of the state.
    """
    if all(_explicit_mesh(leaf) is None for leaf in jax.tree.leaves(state)):
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        mesh = _explicit_mesh(leaf)
        if mesh is not None:
            raise ShardingError(
                f"run: the axes of the mesh must be of type Auto, got explicit axes {mesh} for the "
                f"leaf step_state{jax.tree_util.keystr(path)}",
                fix="make the mesh with jax.make_mesh(shape, names, axis_types=(jax.sharding."
                "AxisType.Auto,) * len(names))",
            )


def _explicit_mesh(leaf: Any) -> Any:
    """Returns the mesh of a leaf if it has explicit axes, or None."""
    mesh = getattr(getattr(leaf, "sharding", None), "mesh", None)
    if mesh is None or jax.sharding.AxisType.Explicit not in mesh.axis_types:
        return None
    return mesh
