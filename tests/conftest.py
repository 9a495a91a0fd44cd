"""Strict tests: several CPU devices, and no silent promotion of dtypes."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import jax  # noqa: E402  the flag has to be there before the backend is

jax.config.update("jax_numpy_dtype_promotion", "strict")
