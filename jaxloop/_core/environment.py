"""What the bits of a run depend on besides its program: versions, machine and devices.

    mine = environment_of(step_state)
    changes(saved, mine)                # ["jax was 0.9.2 and is 0.10.2"]

XLA compiles another program for another device or version, and its sums round in another order.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping

import jax
import jaxlib

from jaxloop._core.placement import devices_of
from jaxloop._core.types import PyTree

_MOST_CHARACTERS = 80


def environment_of(step_state: PyTree) -> dict[str, str]:
    """Returns the versions of JAX, the machine, and the devices that a step state is on.

    The number of devices counts those of the step state only, because others compute nothing. On a
    CPU, the number of cores is missing, because the results do not depend on it.

    Example:
        >>> sorted(environment_of({}))
        ['device_kind', 'jax', 'jaxlib', 'machine', 'num_devices', 'platform', 'runtime']
    """
    devices = devices_of(step_state)
    device = devices[0]
    return {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "platform": device.platform,
        "runtime": " ".join(device.client.platform_version.split()),  # such as that of CUDA
        "machine": platform.machine(),
        "device_kind": device.device_kind,
        "num_devices": str(len(devices)),
    }


def changes(saved: Mapping[str, str], mine: Mapping[str, str]) -> list[str]:
    """Returns a phrase for each part that differs. What was not saved is not compared."""
    return [
        f"{name} was {saved[name][:_MOST_CHARACTERS]} and is {value}"
        for name, value in mine.items()
        if name in saved and saved[name] != value
    ]
