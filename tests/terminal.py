"""A process on a pseudo-terminal, and what its screen would show: as much of a terminal as rich and tqdm use."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import time
from pathlib import Path

TOKEN = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])|([\r\n])|([^\r\n\x1b]+)")


class Terminal:
    """Runs a command; `output` is all that it has written so far."""

    def __init__(self, command: list[str], cwd: Path, env: dict[str, str], columns: int = 100) -> None:
        self.columns = columns
        self.control, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        # a session of its own, whose terminal this is: so that ^C reaches it, also where the tests run in the background
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env=env,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(terminal)
        self.output = ""
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def read(self, until: str | None = None, timeout: float = 120) -> None:
        """To the end, or until some text has been written."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and (until is None or until not in self.output):
            try:
                data = os.read(self.control, 65536)
            except OSError:  # nobody has the other end any more
                data = b""
            if not data:
                break
            self.output += self.decoder.decode(data)
        assert until is None or until in self.output, self.output[-2000:]

    def type(self, text: str) -> None:
        os.write(self.control, text.encode())

    def end(self) -> int:
        """The exit code."""
        self.read()
        self.left_with_echo = self.echoes
        os.close(self.control)
        return self.process.wait(timeout=60)

    @property
    def echoes(self) -> bool:
        """Whether it shows what is typed."""
        return bool(termios.tcgetattr(self.control)[3] & termios.ECHO)

    @property
    def screen(self) -> list[str]:
        """Its lines, from the first that was ever written."""
        return screen_of(self.output, self.columns)

    @property
    def hides_cursor(self) -> bool:
        return self.output.rfind("\x1b[?25l") > self.output.rfind("\x1b[?25h")


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def screen_of(output: str, columns: int) -> list[str]:
    """The lines that some output leaves on a screen."""
    lines, row, column = [""], 0, 0
    for count, letter, control, text in TOKEN.findall(output):
        if control == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif control == "\r":
            column = 0
        elif letter == "A":
            row -= int(count or 1)
        elif letter == "K":
            lines[row] = ""
        for character in text:
            if column == columns:
                row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
            lines[row] = lines[row][:column].ljust(column) + character + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]
