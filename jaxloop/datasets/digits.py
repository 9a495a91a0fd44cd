"""Handwritten digits: 1,797 gray images of 8 by 8 pixels.

    (x_train, y_train), (x_test, y_test) = digits(test_fraction=0.2)

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
Repository, 1998, https://doi.org/10.24432/C50P49, the test set, licensed under CC BY 4.0. The file
holds the original pixels from 0 to 16. `digits` divides them by 16.
"""

from __future__ import annotations

from importlib import resources
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from jaxloop.errors import ArgumentError

Split: TypeAlias = tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]
"""Images and labels."""


def digits(*, test_fraction: float = 0.2, seed: int = 0) -> tuple[Split, Split]:
    """Loads the digits, shuffled and split into two parts.

    Args:
        test_fraction: The share of the images in the second part, at least 0 and below 1.
        seed: The seed of the shuffle.

    Returns:
        ``((x_train, y_train), (x_test, y_test))``: images of shape ``(n, 8, 8, 1)``, float32 from 0
        to 1, and labels of shape ``(n,)``, int32 from 0 to 9.

    Raises:
        ArgumentError: ``test_fraction`` is not in [0, 1).

    Example:
        >>> (x_train, y_train), (x_test, y_test) = digits()
        >>> x_train.shape, x_test.shape
        ((1438, 8, 8, 1), (359, 8, 8, 1))
    """
    if not 0 <= test_fraction < 1:
        raise ArgumentError(
            f"digits: test_fraction must be at least 0 and below 1, got {test_fraction}",
            fix="pass a fraction such as test_fraction=0.2",
        )
    with (
        resources.files("jaxloop.datasets").joinpath("digits.npz").open("rb") as file,
        np.load(file) as archive,
    ):
        images, labels = archive["images"], archive["labels"]
    order = np.random.default_rng(seed).permutation(len(images))
    x = (images[order].astype(np.float32) / 16)[..., None]
    y = labels[order].astype(np.int32)
    cut = len(x) - int(len(x) * test_fraction)
    return (x[:cut], y[:cut]), (x[cut:], y[cut:])
