"""Strict tests: several CPU devices, and no silent promotion of dtypes."""

import os
import signal

import pytest

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import jax  # noqa: E402  the flag has to be there before the backend is

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def default_signals():
    """Python's own handlers. A background job of a shell, for example, inherits no SIGINT."""
    chosen = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    inherited = {number: signal.signal(number, handler) for number, handler in chosen.items()}
    try:
        yield chosen
    finally:
        for number, handler in inherited.items():
            signal.signal(number, handler)
