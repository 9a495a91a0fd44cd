"""Prints versions, devices and settings, to paste into a bug report.

    jaxloop env
    jaxloop env --json

It starts JAX with the devices of this machine, as a script would. It prints no host name, no user
name, and of the environment only the variables that change what JAX does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxloop import __version__
from jaxloop.errors import first_line

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "tensorstore",
)
_OPTIONAL = (
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "jax-rocm7-plugin",
    "libtpu",
    "equinox",
    "dm-haiku",
    "grain",
    "torch",
    "rich",
    "matplotlib",
    "tensorboardX",
    "wandb",
    "mlflow-skinny",
    "mlflow",
    "trackio",
    "safetensors",
)
"""These are listed if they are installed."""

_VARIABLES = re.compile(
    r"(JAX|XLA|NCCL|TPU|LIBTPU|TF_CPP)_\w+|CUDA_VISIBLE_DEVICES|ROCR_VISIBLE_DEVICES|OMP_NUM_THREADS"
    r"|CUDA_MODULE_LOADING|SLURM_(NTASKS|PROCID|NNODES)"
)
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)
_ADDRESS_WITH_PASSWORD = re.compile(r"(\w+://)[^/@\s]+@")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Prints the report."""
    report = make_report()
    if options.json:
        print(json.dumps(report, indent=2))
        return 0
    for section, values in report.items():
        print(f"{section}:")
        for name, value in values.items():
            print(f"  {name}: {value}")
        if not values:
            print("  none")
    return 0


def make_report() -> dict[str, dict[str, Any]]:
    """Returns ``{section: {name: value}}``."""
    variables = relevant(os.environ)  # before this process changes one
    if "jax" not in sys.modules:
        # Otherwise JAX would reserve most of the memory of a GPU that a run may use.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return {
        "versions": {
            "jaxloop": __version__,
            "python": f"{platform.python_version()} ({platform.python_implementation()})",
            **{name: _version(name) or "not installed" for name in _PACKAGES},
            **{name: version for name in _OPTIONAL if (version := _version(name))},
        },
        "machine": {
            "system": platform.platform(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
        },
        "devices": _devices(),
        "settings": _settings(),
        "environment": variables,
    }


def relevant(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables that change what JAX does, without secrets and home directories.

    Example:
        >>> relevant({"XLA_FLAGS": "--xla_x=1", "JAX_TOKEN": "abc", "EDITOR": "vi"})
        {'JAX_TOKEN': '(hidden)', 'XLA_FLAGS': '--xla_x=1'}
    """
    found = {}
    for name in sorted(environment):
        if _VARIABLES.fullmatch(name):
            found[name] = "(hidden)" if _SECRET.search(name) else _public(environment[name])
    return found


def _public(value: str) -> str:
    try:
        home = str(Path.home())
    except RuntimeError:  # there is none
        home = "/"
    if len(home) > 1:
        value = value.replace(home, "~")
    return _ADDRESS_WITH_PASSWORD.sub(r"\1(hidden)@", value)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, Any]:
    # Imported here, after the variables are read and set.
    import jax

    try:
        devices = jax.devices()
        backend = jax.default_backend()
    except Exception as error:  # a broken driver raises errors of many kinds
        return {"error": _public(first_line(error))}
    kinds = [device.device_kind for device in devices]
    return {
        "backend": backend,
        "runtime": " ".join(devices[0].client.platform_version.split()),
        "processes": jax.process_count(),
        "devices": ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)),
    }


_OPTIONS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion",
    "jax_debug_nans",
    "jax_disable_jit",
)


def _settings() -> dict[str, Any]:
    # Imported here, after the variables are read and set.
    import jax

    values = jax.config.values
    return {name: values[name] for name in _OPTIONS if name in values}
