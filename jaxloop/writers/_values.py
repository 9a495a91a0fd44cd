"""The values that writers get: numbers, arrays, images, texts and histograms.

    values = on_host({"loss": np.float32(0.5), "confusion": {"a": matrix}, "digit": Image(pixels)})
    values == {"loss": 0.5, "confusion/a": matrix, "digit": Image(pixels)}

Invariant: a number that a writer gets equals the number in ``state.metrics``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import numpy as np

from jaxloop.errors import ArgumentTypeError


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
    """An image, for writers that show images.

    Args:
        pixels: An array of shape ``(height, width)`` or ``(height, width, channels)`` with 1, 3 or
            4 channels: uint8, or floats from 0 to 1, which are clipped. It may be on the device.

    Example:
        >>> import numpy as np
        >>> Image(np.zeros((8, 8))).to_uint8().shape
        (8, 8, 1)
    """

    pixels: Any

    def to_uint8(self) -> np.ndarray[Any, Any]:
        """Returns the pixels as uint8, of shape ``(height, width, channels)``.

        Raises:
            ArgumentTypeError: The shape or the dtype is not that of an image.
        """
        pixels = np.asarray(self.pixels)
        if pixels.ndim == 2:
            pixels = pixels[..., None]
        if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3, 4) or 0 in pixels.shape:
            raise ArgumentTypeError(
                "Image: pixels must have the shape (height, width) or (height, width, channels) "
                f"with 1, 3 or 4 channels, got {np.shape(self.pixels)}",
                fix="pass one image, and not a batch of images",
            )
        if pixels.dtype == np.uint8:
            return pixels
        if pixels.dtype == np.bool_:
            return pixels.astype(np.uint8) * np.uint8(255)
        if not jax.numpy.issubdtype(pixels.dtype, np.floating):
            raise ArgumentTypeError(
                f"Image: pixels must be uint8 or floats, got {pixels.dtype}",
                fix="convert them, as in pixels.astype(np.uint8)",
            )
        scaled = np.nan_to_num(np.clip(pixels.astype(np.float32), 0.0, 1.0)) * 255
        return np.rint(scaled).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Text:
    """A text, for writers that show texts.

    Args:
        text: The text. TensorBoard, MLflow and Trackio show Markdown.

    Example:
        >>> Text("**so far** so good").text
        '**so far** so good'
    """

    text: str


@dataclasses.dataclass(frozen=True, eq=False)
class Histogram:
    """A histogram, for writers that show histograms.

    Args:
        counts: How many values are in each bin, of shape ``(bins,)``. It may be on the device.
        edges: The edges of the bins, increasing, of shape ``(bins + 1,)``.

    Example:
        >>> Histogram.of([0.0, 1.0, 1.0, float("nan")], bins=2).counts.tolist()
        [1, 2]
    """

    counts: Any
    edges: Any

    @classmethod
    def of(cls, values: Any, bins: int = 64) -> Histogram:
        """Returns the histogram of an array on the host. Values that are not finite do not count.

        `histograms` computes those of parameters and gradients on the device.
        """
        flat = np.asarray(values).astype(np.float64).ravel()
        counts, edges = np.histogram(flat[np.isfinite(flat)], bins=bins)
        return cls(counts, edges)


Value: TypeAlias = bool | int | float | np.ndarray[Any, Any] | Image | Text | Histogram
"""A value as a writer gets it, on the host."""


VALUES = (bool, int, float, str, np.ndarray, np.generic, jax.Array, Image, Text, Histogram)
"""The classes of the leaves that a function of values may return."""


def start_copies(values: Any) -> None:
    """Starts to copy the arrays of ``values`` to the host, without waiting for the device."""
    for leaf in jax.tree.leaves(values, is_leaf=is_drawn):
        parts = dataclasses.astuple(leaf) if is_drawn(leaf) else (leaf,)
        for part in parts:
            if isinstance(part, jax.Array):
                part.copy_to_host_async()


def on_host(values: Mapping[str, Any]) -> dict[str, Value]:
    """Returns the values as writers get them. It waits for those that are on the device.

    A tree of values becomes one value per leaf, such as ``confusion/a``. What is no value, such as
    None or an object, is left out.
    """
    found: dict[str, Value] = {}
    for name, tree in values.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_drawn):
            value = _leaf_on_host(leaf)
            if value is not None:
                found[join(name, path)] = value
    return found


def join(name: str, path: tuple[Any, ...]) -> str:
    """Returns the name of a leaf of a tree.

    Example:
        >>> join("accuracy", (jax.tree_util.DictKey("head"), jax.tree_util.SequenceKey(0)))
        'accuracy/head/0'
    """
    parts = jax.tree_util.keystr(path, simple=True, separator="/") if path else ""
    return f"{name}/{parts}" if parts else str(name)


def is_drawn(value: Any) -> bool:
    """Returns whether a value is one that a writer draws."""
    return isinstance(value, Image | Text | Histogram)


def _leaf_on_host(leaf: Any) -> Value | None:
    if isinstance(leaf, Image):
        return Image(leaf.to_uint8())
    if isinstance(leaf, Histogram):
        return Histogram(np.asarray(leaf.counts), np.asarray(leaf.edges))
    if isinstance(leaf, Text):
        return leaf
    if isinstance(leaf, str):
        return Text(leaf)
    if isinstance(leaf, bool | int | float):
        return leaf
    try:
        array = np.asarray(leaf)
    except (TypeError, ValueError):
        return None
    if array.dtype == object or array.dtype.kind in "SUMmV" and not _is_number(array.dtype):
        return None
    if array.ndim or array.dtype.kind == "c":
        return array
    if array.dtype == np.bool_:
        return bool(array)
    return int(array) if array.dtype.kind in "iu" else float(array)


def _is_number(dtype: np.dtype[Any]) -> bool:
    # bfloat16 and its relatives have the kind "V" in NumPy.
    return bool(jax.numpy.issubdtype(dtype, np.number))
