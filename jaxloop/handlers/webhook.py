"""A webhook: JSON that a thread sends to a web server.

    webhook = Webhook("https://hooks.example.com/T123", timeout_s=5.0)
    webhook.send({"text": "hello"})         # returns at once
    webhook.close()                         # waits at most timeout_s

Nothing here raises because of the server. A request that fails is a warning in the log.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

logger = logging.getLogger("jaxloop")


class Webhook:
    """A web server that gets JSON by POST requests, in order.

    Args:
        url: The URL. It may contain a secret, so messages show only the host.
        timeout_s: How many seconds a request, and `close`, may take.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self._url, self._timeout_s = url, timeout_s
        self._host = urlsplit(url).hostname
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def send(self, record: Mapping[str, Any]) -> None:
        """Sends a record of values that JSON has, without waiting."""
        if self._thread is None:
            # A daemon, because a server that never answers must not keep the script alive.
            self._thread = threading.Thread(target=self._work, name="jaxloop-alert", daemon=True)
            self._thread.start()
        self._queue.put(json.dumps(record).encode())

    def close(self) -> None:
        """Waits until everything is sent, but at most ``timeout_s``."""
        if self._thread is None:
            return
        self._queue.put(None)
        self._thread.join(self._timeout_s)
        if self._thread.is_alive():
            logger.warning(
                "alert: %s has not answered after %g s; the run does not wait for it any longer",
                self._host,
                self._timeout_s,
            )

    def _work(self) -> None:
        while (body := self._queue.get()) is not None:
            try:
                self._post(body)
            except Exception as error:
                logger.warning("alert: the request to %s failed: %s", self._host, _reason(error))

    def _post(self, body: bytes) -> None:
        # Imported here, because it takes some time and most runs send nothing.
        from urllib.request import Request, urlopen

        headers = {"Content-Type": "application/json", "User-Agent": "jaxloop"}
        request = Request(self._url, data=body, headers=headers, method="POST")
        with urlopen(request, timeout=self._timeout_s) as response:
            response.read(1)


def _reason(error: Exception) -> str:
    """Describes an error without its text if that may contain the URL."""
    # Imported here, as in `_post`.
    from urllib.error import HTTPError, URLError

    if isinstance(error, HTTPError):
        return f"HTTP {error.code}"
    if isinstance(error, URLError):
        return str(error.reason)
    return type(error).__name__
