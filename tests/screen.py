"""A terminal for tests: a pty that something reads, and what its screen shows."""

import contextlib
import os
import pty
import re
import sys
import threading

ESCAPE = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])")


class Terminal:
    """What was written to a pty. `raw` is everything, and `screen` is what remains visible."""

    def __init__(self):
        self._master, slave = pty.openpty()
        self.file = open(slave, "w", encoding="utf-8")  # noqa: SIM115  closed by `end`
        self._parts = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        # The other end of a closed pty raises.
        with contextlib.suppress(OSError):
            while part := os.read(self._master, 65536):
                self._parts.append(part)

    def end(self):
        self.file.close()
        self._reader.join()
        os.close(self._master)

    @property
    def raw(self):
        return b"".join(self._parts).decode()

    @property
    def frames(self):
        """The texts between two moves of the cursor, without control characters."""
        plain = re.split(r"\x1b\[[0-9]*A|\r", self.raw)
        return [ESCAPE.sub("", text) for text in plain]

    def screen(self, width=80):
        """The lines that remain, and whether the cursor is shown."""
        lines, row, column, shown = [""], 0, 0, True
        text = self.raw
        while text:
            if match := ESCAPE.match(text):
                text = text[match.end() :]
                argument, command = match.groups()
                if command == "A":
                    row = max(0, row - int(argument or 1))
                elif command == "K":
                    lines[row] = ""
                elif argument == "?25":
                    shown = command == "h"
                else:
                    assert command == "m", (argument, command)
                continue
            char, text = text[0], text[1:]
            if char == "\r":
                column = 0
            elif char == "\n":
                row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
            else:
                assert char.isprintable(), repr(char)
                if column == width:
                    row, column = row + 1, 0
                    lines += [""] * (row + 1 - len(lines))
                lines[row] = lines[row][:column].ljust(column) + char + lines[row][column + 1 :]
                column += 1
        return [line.rstrip() for line in lines if line.strip()], shown


@contextlib.contextmanager
def terminal(monkeypatch, **environ):
    """Standard output and standard error are a terminal of 80 columns."""
    made = Terminal()
    settings = {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24", **environ}
    with monkeypatch.context() as patch:
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_INTERACTIVE", "TTY_COMPATIBLE"):
            patch.delenv(name, raising=False)
        for name, value in settings.items():
            patch.setenv(name, value)
        patch.setattr(sys, "stdout", made.file)
        patch.setattr(sys, "stderr", made.file)
        try:
            yield made
        finally:
            made.end()
