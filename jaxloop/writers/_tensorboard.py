"""Rows as event files of TensorBoard, without TensorFlow.

    loop = loop.write(tensorboard("runs/digits"), every=50, values=histograms())

Invariant: the files have what was written up to the last checkpoint. A run that resumes from it
cuts off what came later. It also tells a TensorBoard that has read that already to forget it. That
alone would not do, because TensorBoard does not forget texts.
"""

from __future__ import annotations

import dataclasses
import datetime
import io
import os
import shutil
import socket
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxloop._checkpoint.names import check_path
from jaxloop._core.extras import import_extra
from jaxloop.errors import WriterError
from jaxloop.writers._png import png
from jaxloop.writers._protocol import WriterStart
from jaxloop.writers._values import Histogram, Image, Text, Value

_MARK = ".jaxloop."
"""What the names of this writer's files contain."""


def tensorboard(folder: str | os.PathLike[str]) -> TensorboardDescription:
    """Describes a writer for TensorBoard. It needs the extra ``functional-jaxloop[tensorboard]``.

    Numbers become scalars, which TensorBoard keeps in 32 bits. Images, texts and histograms are
    shown too, and arrays are left out. Hyperparameters are a text and an entry of the HPARAMS tab.

    A fresh run moves earlier event files to a folder beside this one, ``runs/a`` to ``runs/a.1``.
    A run that resumes drops the steps that it writes again, and adds a file.

    Args:
        folder: The folder of the run. Missing folders are made.

    Returns:
        A description, to be passed to `Loop.write`.

    Raises:
        ArgumentTypeError: ``folder`` is not a path.
        ArgumentError: ``folder`` is empty or an address such as "gs://bucket".
        WriterError: Raised by `run`, before the first step, if a fresh run finds event files of
            other programs.
        MissingExtraError: Raised by `run`, before the first step, if tensorboardX is missing.

    Example:
        >>> import jaxloop as jl
        >>> jl.writers.tensorboard("runs/a")
        TensorboardDescription(folder='runs/a')
    """
    return TensorboardDescription(check_path("tensorboard", folder))


@dataclasses.dataclass(frozen=True)
class TensorboardDescription:
    """A folder of TensorBoard as a value. Made by `tensorboard`.

    Attributes:
        folder: The folder.
    """

    folder: str

    @property
    def where(self) -> str:
        """The folder."""
        return self.folder

    def open(self, start: WriterStart) -> TensorboardWriter:
        """Opens an event file for a run."""
        events = _EventLibrary()
        folder = Path(self.folder).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        old = _own_files(folder, start.step)
        written: set[str] = set()
        if not start.step:
            if old:
                _put_aside(old, folder, os.rename)
            old = []
        else:
            # The end of an epoch may have been written at this very step, after the checkpoint.
            ends = {path: events.end_of(path, start.step, written) for path in old}
            if start.branches and any(path.stat().st_size > end for path, end in ends.items()):
                _put_aside(old, folder, shutil.copyfile)
            for path, end in ends.items():
                os.truncate(path, end)
        # TensorBoard reads the files in the order of their names.
        now_s = int(datetime.datetime.now().timestamp())
        if old:
            now_s = max(now_s, int(old[-1].name.split(".")[3]))
        name = f"events.out.tfevents.{now_s:010d}.{socket.gethostname()}{_MARK}{len(old) + 1:04d}"
        file = io.FileIO(folder / name, "x")
        writer = TensorboardWriter(file, events, start.step, written)
        try:
            writer.begin(start)
        except BaseException:
            file.close()
            raise
        return writer


class TensorboardWriter:
    """An open event file.

    Args:
        file: The file.
        events: Makes what is in it.
        step: The step from which the run resumes.
        written: The tags that earlier files have at this step.
    """

    def __init__(
        self, file: io.FileIO, events: _EventLibrary, step: int, written: set[str]
    ) -> None:
        self._file, self._events = file, events
        self._step, self._written = step, written

    def begin(self, start: WriterStart) -> None:
        """Writes the head of the file and, for a fresh run, the hyperparameters."""
        events = self._events
        self._write(events.version())
        if start.step:
            self._write(events.restart(start.step + 1))
        elif start.hyperparameters:
            for event in events.hyperparameters(start.hyperparameters, start.metrics):
                self._write(event)

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Writes the values of a step."""
        written = self._written if step == self._step else frozenset[str]()
        event = self._events.summary(step, values, written)
        if event is not None:
            self._write(event)

    def flush(self) -> None:
        """Makes the file durable."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, event: bytes) -> None:
        """Writes a record in one system call, so that TensorBoard sees it at once."""
        left = memoryview(self._events.record(event))
        while left:
            left = left[self._file.write(left) :]


class _EventLibrary:
    """What tensorboardX knows of event files: the messages and the checksum."""

    def __init__(self) -> None:
        def load(name: str) -> Any:
            return import_extra(
                f"tensorboardX.{name}",
                what="writers.tensorboard",
                extra="tensorboard",
                package="tensorboardX",
            )

        self._event = load("proto.event_pb2")
        self._summary = load("proto.summary_pb2")
        self._make = load("summary")
        self._checksum = load("record_writer").masked_crc32c

    def record(self, event: bytes) -> bytes:
        """Returns an event as a record of a file."""
        length = struct.pack("<Q", len(event))
        check_length, check = self._checksum(length), self._checksum(event)
        return b"".join([length, struct.pack("<I", check_length), event, struct.pack("<I", check)])

    def end_of(self, path: Path, step: int, tags: set[str]) -> int:
        """Returns where the events after ``step`` begin in a file, or a torn event.

        The tags of the events of ``step`` are added to ``tags``.
        """
        with open(path, "rb") as file:
            while len(head := file.read(12)) == 12:
                at = file.tell() - 12
                (length,) = struct.unpack("<Q", head[:8])
                data = file.read(length + 4)
                if len(data) < length + 4:
                    return at
                event = self._event.Event.FromString(data[:-4])
                # The event that hides steps names the first one of them. What follows it may be of
                # an earlier step: the end of the epoch at which the session began.
                if event.step > step and not event.HasField("session_log"):
                    return at
                if event.step == step:
                    tags.update(value.tag for value in event.summary.value)
            return file.tell() - len(head)

    def version(self) -> bytes:
        """Returns the first event of a file."""
        return self._bytes(file_version="brain.Event:2")

    def restart(self, step: int) -> bytes:
        """Returns the event that hides what earlier files have of ``step`` and later ones."""
        log = self._event.SessionLog(status=self._event.SessionLog.START)
        return self._bytes(step=step, session_log=log)

    def hyperparameters(self, values: Mapping[str, Any], metrics: tuple[str, ...]) -> list[bytes]:
        """Returns the events that show hyperparameters as a text and in the HPARAMS tab."""
        rows = "\n".join(f"| {name} | {value} |" for name, value in values.items())
        text = self._make.text("hyperparameters", f"| name | value |\n|---|---|\n{rows}")
        plain = {
            str(name): value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in values.items()
        }
        experiment, session, _ = self._make.hparams(plain, dict.fromkeys(metrics, 0.0))
        return [self._bytes(summary=one) for one in (text, experiment, session)]

    def summary(
        self, step: int, values: Mapping[str, Value], written: Collection[str]
    ) -> bytes | None:
        """Returns the event of a step, or None if there is nothing to show.

        What has one of the tags in ``written`` is left out.
        """
        shown = []
        for name, value in values.items():
            if isinstance(value, int | float):
                shown.append(self._summary.Summary.Value(tag=name, simple_value=float(value)))
            elif isinstance(value, Text):
                shown += self._make.text(name, value.text).value
            elif isinstance(value, Image):
                shown += self._image(name, value.to_uint8())
            elif isinstance(value, Histogram):
                shown += self._histogram(name, value)
        shown = [value for value in shown if value.tag not in written]
        if not shown:
            return None
        return self._bytes(step=step, summary=self._summary.Summary(value=shown))

    def _image(self, name: str, pixels: np.ndarray[Any, Any]) -> list[Any]:
        height, width, channels = pixels.shape
        image = self._summary.Summary.Image(
            height=height, width=width, colorspace=channels, encoded_image_string=png(pixels)
        )
        return [self._summary.Summary.Value(tag=name, image=image)]

    def _histogram(self, name: str, histogram: Histogram) -> Any:
        counts = np.asarray(histogram.counts, np.float64)
        edges = np.asarray(histogram.edges, np.float64)
        centers = (edges[:-1] + edges[1:]) / 2
        # TensorBoard has only the right edge of each bin, so the left edge needs an empty bin.
        return self._make.histogram_raw(
            name,
            min=edges[0],
            max=edges[-1],
            num=counts.sum(),
            sum=(counts * centers).sum(),
            sum_squares=(counts * centers**2).sum(),
            bucket_limits=edges.tolist(),
            bucket_counts=[0.0, *counts.tolist()],
        ).value

    def _bytes(self, **fields: Any) -> bytes:
        now_s = datetime.datetime.now().timestamp()
        event: bytes = self._event.Event(wall_time=now_s, **fields).SerializeToString()
        return event


def _own_files(folder: Path, step: int) -> list[Path]:
    """Returns the event files of this writer in the order in which TensorBoard reads them."""
    files = sorted(path for path in folder.glob("*tfevents*") if path.is_file())
    own = [path for path in files if _MARK in path.name]
    if len(own) < len(files) and not step:
        raise WriterError(
            f"tensorboard: {str(folder)!r} must have no event files of other programs, got "
            f"{', '.join(path.name for path in files if path not in own)}",
            fix="pass a folder for this run alone; TensorBoard shows the folders beside it too",
        )
    return own


def _put_aside(files: list[Path], folder: Path, move: Any) -> None:
    n = 1
    while os.path.lexists(aside := folder.with_name(f"{folder.name}.{n}")):
        n += 1
    aside.mkdir()
    for path in files:
        move(path, aside / path.name)
