"""Rows in a local project of Trackio.

    loop = loop.write(trackio("digits"))        # then run `trackio show --project digits`

Invariant: a row has an identity of its own, so a run that resumes adds none twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxloop._core.checks import check_string
from jaxloop._core.extras import import_extra
from jaxloop.writers._protocol import WriterStart
from jaxloop.writers._values import Histogram, Text, Value


def trackio(project: str, *, name: str | None = None) -> TrackioDescription:
    """Describes a writer to Trackio. It needs the extra ``functional-jaxloop[trackio]``.

    Trackio keeps its projects on this machine, in the folder that ``TRACKIO_DIR`` names. Numbers,
    texts and histograms are logged, and images and arrays are left out. Hyperparameters are the
    run's config.

    A run that resumes continues its Trackio run. Rows after the checkpoint stay, and are not
    written again.

    Args:
        project: The project.
        name: The name of the Trackio run. The default is made from the identity of the run.

    Returns:
        A description, to be passed to `Loop.write`.

    Raises:
        ArgumentTypeError: ``project`` is not a string.
        MissingExtraError: Raised by `run`, before the first step, if Trackio is missing.

    Example:
        >>> trackio("digits", name="wide").name
        'wide'
    """
    check_string("trackio", "project", project, fix="pass the name of the project")
    return TrackioDescription(project, name)


@dataclasses.dataclass(frozen=True)
class TrackioDescription:
    """A project of Trackio as a value. Made by `trackio`."""

    project: str
    name: str | None

    def open(self, start: WriterStart) -> TrackioWriter:
        """Opens the project, and makes it if it is missing."""
        library = import_extra("trackio", what="writers.trackio", extra="trackio")
        reserved = import_extra(
            "trackio.utils", what="writers.trackio", extra="trackio"
        ).RESERVED_KEYS
        library.SQLiteStorage.init_db(self.project)
        return TrackioWriter(library, self, start, frozenset(reserved))


class TrackioWriter:
    """A run of Trackio.

    Its rows go straight to the project's database, because ``trackio.log`` drops what it cannot
    write, and does not say when a row is durable.

    Args:
        library: The module ``trackio``.
        description: The project.
        start: The run.
        reserved: The names that Trackio uses itself.
    """

    def __init__(
        self,
        library: Any,
        description: TrackioDescription,
        start: WriterStart,
        reserved: frozenset[str],
    ) -> None:
        self._library, self._project, self._reserved = library, description.project, reserved
        self._run_id = start.run_id
        self._name = description.name or f"run-{start.run_id[:8]}"
        self._config = {str(name): value for name, value in start.hyperparameters.items()}

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Logs the values of a step."""
        logged = {
            f"__{name}" if name in self._reserved or name.startswith("__") else name: converted
            for name, value in values.items()
            if (converted := self._converted(value)) is not None
        }
        if not logged:
            return
        # A row is ignored if there is one with the same identity. A second row of a step has
        # other names, so it has another one.
        identity = f"{self._run_id}-{step}-{min(logged)}"
        self._library.SQLiteStorage.bulk_log(
            self._project,
            self._name,
            [logged],
            steps=[step],
            config=self._config,
            log_ids=[identity],
            run_id=self._run_id,
        )
        self._config = {}

    def close(self) -> None:
        """Does nothing, because every row is durable already."""

    def _converted(self, value: Value) -> Any:
        if isinstance(value, Text):
            return {"_type": self._library.Markdown.TYPE, "_value": value.text}
        if isinstance(value, Histogram):
            kind = self._library.Histogram.TYPE
            return {"_type": kind, "bins": value.edges.tolist(), "values": value.counts.tolist()}
        return value if isinstance(value, int | float) else None
