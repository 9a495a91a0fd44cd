"""Rows as the history of a run of Weights & Biases.

    loop = loop.write(wandb("digits", mode="offline"))

Invariant: a step that the run already has is never logged again.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal

from jaxloop._core.extras import import_extra
from jaxloop.writers._protocol import WriterStart
from jaxloop.writers._values import Histogram, Image, Text, Value


def wandb(
    project: str | None = None,
    *,
    name: str | None = None,
    mode: Literal["online", "offline", "disabled"] | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> WandbDescription:
    """Describes a writer to Weights & Biases. It needs the extra ``functional-jaxloop[wandb]``.

    Numbers, images, texts and histograms are logged, and arrays are left out. Hyperparameters are
    the run's config. It is a run of its own, also if your script has called ``wandb.init``.

    A run that resumes continues the same W&B run. W&B cannot delete rows, so those after the
    checkpoint stay, and are not logged again. A row that got its validation only after the resume
    stays without it. In offline mode, each session is a folder of its own, which does not know of
    the earlier ones. Upload them in their order with ``wandb sync --append``, and W&B drops the
    steps that it has. What was logged right before the process was killed may be lost.

    Args:
        project: The project.
        name: The name that W&B shows.
        mode: "online", "offline" or "disabled". Defaults to W&B's own setting.
        folder: The folder of W&B's files. Defaults to W&B's own setting.

    Returns:
        A description, to be passed to `Loop.write`.

    Raises:
        MissingExtraError: Raised by `run`, before the first step, if wandb is missing.

    Example:
        >>> wandb("digits", mode="offline").project
        'digits'
    """
    return WandbDescription(project, name, mode, None if folder is None else os.fspath(folder))


@dataclasses.dataclass(frozen=True)
class WandbDescription:
    """A project of Weights & Biases as a value. Made by `wandb`."""

    project: str | None
    name: str | None
    mode: str | None
    folder: str | None

    def open(self, start: WriterStart) -> WandbWriter:
        """Begins a W&B run, or continues the one of the run that resumes."""
        library = import_extra("wandb", what="writers.wandb", extra="wandb")
        run = library.init(
            project=self.project,
            name=self.name,
            id=start.run_id,
            resume="allow",
            reinit="create_new",
            mode=self.mode,
            dir=self.folder,
            config={str(name): value for name, value in start.hyperparameters.items()},
        )
        return WandbWriter(library, run)


class WandbWriter:
    """A run of Weights & Biases.

    Args:
        library: The module ``wandb``.
        run: The run.
    """

    def __init__(self, library: Any, run: Any) -> None:
        self._library, self._run = library, run
        self._first_step = run.step
        self._exit_code = 0

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Logs the values of a step, unless the run has that step from an earlier session."""
        if step < self._first_step:
            return
        logged = {name: self._converted(value) for name, value in values.items()}
        self._run.log({n: v for n, v in logged.items() if v is not None}, step=step)

    def fail(self, error: BaseException) -> None:
        """Marks the run as failed."""
        self._exit_code = 1

    def close(self) -> None:
        """Ends the run. It waits until W&B has everything."""
        self._run.finish(exit_code=self._exit_code)

    def _converted(self, value: Value) -> Any:
        if isinstance(value, Image):
            pixels = value.to_uint8()
            return self._library.Image(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        if isinstance(value, Text):
            return value.text
        if isinstance(value, Histogram):
            return self._library.Histogram(np_histogram=(value.counts, value.edges))
        return value if isinstance(value, int | float) else None
