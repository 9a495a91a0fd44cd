"""A thread that hands rows to a writer, in order, one row per step.

    delivery = Delivery("csv", writer, step=0, written=())
    delivery.put(50, {"loss": loss})        # returns at once
    delivery.sync()                         # everything so far is durable
    delivery.close()

Invariant: a writer gets each name of a step once, and everything that was put before an error.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from jaxloop.errors import WriterError, first_line
from jaxloop.writers._protocol import FailingWriter, FlushingWriter, Writer
from jaxloop.writers._values import Value, on_host

_MOST_WAITING = 256
"""The number of rows that may wait for the writer. A run that is faster waits for it."""


class _Row(NamedTuple):
    step: int
    values: Mapping[str, Any]
    complete: bool


class _Sync(NamedTuple):
    done: threading.Event


class _End(NamedTuple):
    error: BaseException | None


class Delivery:
    """The rows on their way to one writer.

    Args:
        name: The name of the writer in errors.
        writer: The writer.
        step: The step from which the run resumes.
        written: The names that were already written for this step.
    """

    def __init__(
        self, name: str, writer: Writer, *, step: int = 0, written: Collection[str] = ()
    ) -> None:
        self._name, self._writer = name, writer
        self._step, self._written = step, set(written)
        self._held: dict[str, Value] = {}
        self._queue: queue.Queue[_Row | _Sync | _End] = queue.Queue(_MOST_WAITING)
        self._error: Exception | None = None
        self._raised = False
        self._thread: threading.Thread | None = None

    def put(self, step: int, values: Mapping[str, Any], *, complete: bool = True) -> None:
        """Hands over a row. It waits only if many rows are waiting already.

        Args:
            step: The step, which never decreases.
            values: The values. Those on the device are read by the thread.
            complete: Whether no more values of this step are expected. If not, the row waits for
                the next one, so that a step is one row.

        Raises:
            WriterError: The writer failed since the last call.
        """
        self._check()
        self._send(_Row(step, values, complete))

    def sync(self) -> None:
        """Waits until the writer has written everything and made it durable.

        Raises:
            WriterError: The writer failed.
        """
        done = threading.Event()
        self._send(_Sync(done))
        done.wait()
        self._check()

    def close(self, error: BaseException | None = None) -> None:
        """Writes what waits, closes the writer and ends the thread.

        Args:
            error: The error that ends the run, or None.

        Raises:
            WriterError: The writer failed, and no earlier call has said so.
        """
        self._send(_End(error))
        if self._thread is not None:
            self._thread.join()
        self._check()

    def _send(self, item: _Row | _Sync | _End) -> None:
        if self._thread is None:
            # A daemon, so that a writer that hangs does not keep a process alive.
            self._thread = threading.Thread(
                target=self._work, name=f"jaxloop-{self._name}", daemon=True
            )
            self._thread.start()
        self._queue.put(item)

    def _check(self) -> None:
        """Raises the first error of the writer, once."""
        if self._error is None or self._raised:
            return
        self._raised = True
        raise WriterError(
            f"writer `{self._name}` failed: {type(self._error).__name__}: "
            f"{first_line(self._error)}",
            fix="mend what it reports and resume, or run the loop without this writer",
        ) from self._error

    # --- in the thread -------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            item = self._queue.get()
            if isinstance(item, _Row):
                self._try(self._accept, item)
            elif isinstance(item, _Sync):
                self._try(self._flush)
                item.done.set()
            else:
                self._try(self._hand_over)
                if item.error is not None and isinstance(self._writer, FailingWriter):
                    self._try(self._writer.fail, item.error)
                # Closed even if it failed, because it may hold files.
                self._try(self._writer.close, even_after_error=True)
                return

    def _try(self, act: Any, *arguments: Any, even_after_error: bool = False) -> None:
        """Calls ``act``. After the first error, nothing more is written: no row may be missing."""
        if self._error is not None and not even_after_error:
            return
        try:
            act(*arguments)
        except BaseException as error:
            if self._error is None:
                # A writer may call sys.exit, and the run must hear of that too.
                self._error = error if isinstance(error, Exception) else RuntimeError(repr(error))

    def _accept(self, row: _Row) -> None:
        if row.step != self._step:
            self._hand_over()
            self._step, self._written = row.step, set()
        values = on_host(row.values)
        new = {name: value for name, value in values.items() if name not in self._written}
        self._written |= new.keys()
        self._held |= new
        if row.complete:
            self._hand_over()

    def _hand_over(self) -> None:
        if self._held:
            values, self._held = self._held, {}
            self._writer.write(self._step, values)

    def _flush(self) -> None:
        self._hand_over()
        if isinstance(self._writer, FlushingWriter):
            self._writer.flush()
