"""The peak rate of accelerators in floating-point operations a second.

    peak_of("NVIDIA H100 80GB HBM3", "bfloat16")        # 989.4e12

The rates are those of dense matrices with the tensor cores, without sparsity. Those of float32 are
of TensorFloat-32 where JAX uses it by default, which is on NVIDIA from Ampere on. By default, TPUs
multiply float32 in bfloat16.

Sources: NVIDIA's data sheets of V100 (SXM2), T4, A100, H100, H200, L4, L40S and B200 (HGX), and
"System architecture" of each TPU in https://cloud.google.com/tpu/docs. A device of JAX is half a
chip of TPU v2 and v3, and a whole one from v4 on.
"""

from __future__ import annotations

_TERA = 1e12

# The first name that the kind of the device contains counts, so longer names come first.
_NVIDIA: tuple[tuple[str, dict[str, float]], ...] = (
    ("B200", {"bfloat16": 2250, "float16": 2250}),
    ("GH200", {"bfloat16": 989.4, "float16": 989.4, "float32": 494.7, "float64": 66.9}),
    ("H200", {"bfloat16": 989.4, "float16": 989.4, "float32": 494.7, "float64": 66.9}),
    ("H100 PCIe", {"bfloat16": 756.0, "float16": 756.0, "float32": 378.0, "float64": 51.2}),
    ("H100 NVL", {"bfloat16": 835.0, "float16": 835.0, "float32": 417.5, "float64": 60.0}),
    ("H100", {"bfloat16": 989.4, "float16": 989.4, "float32": 494.7, "float64": 66.9}),
    ("A100", {"bfloat16": 312.0, "float16": 312.0, "float32": 156.0, "float64": 19.5}),
    ("L40S", {"bfloat16": 362.0, "float16": 362.0, "float32": 183.0}),
    ("L4", {"bfloat16": 121.0, "float16": 121.0, "float32": 60.0}),
    ("T4", {"float16": 65.0, "float32": 8.1}),
    ("V100-SXM2", {"float16": 125.0, "float32": 15.7, "float64": 7.8}),
)
_TPUS: dict[str, float] = {
    "TPU v2": 22.5,
    "TPU v3": 61.5,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
}


def peak_of(device_kind: str, dtype: str) -> float | None:
    """Returns the peak rate of a device in operations a second, or None if it is unknown.

    Args:
        device_kind: The ``device_kind`` of a `jax.Device`.
        dtype: The dtype of the operands of the matrix multiplications.

    Example:
        >>> peak_of("NVIDIA A100-SXM4-80GB", "bfloat16"), peak_of("cpu", "float32")
        (312000000000000.0, None)
    """
    if device_kind in _TPUS and dtype in ("bfloat16", "float32"):
        return _TPUS[device_kind] * _TERA
    words = device_kind.replace("-", " ").split()
    if "MIG" in words:
        return None  # a part of a device
    for name, by_dtype in _NVIDIA:
        wanted = name.replace("-", " ").split()
        pairs = (words[i : i + len(wanted)] for i in range(len(words)))
        if any(pair == wanted for pair in pairs):
            rate = by_dtype.get(dtype)
            return None if rate is None else rate * _TERA
    return None
