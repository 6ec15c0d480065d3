"""What is typed while a live display is up."""

from __future__ import annotations

import os
import termios
from collections.abc import Iterator
from contextlib import contextmanager

LOCAL_FLAGS = 3
"""Their place in what `termios.tcgetattr` returns."""


@contextmanager
def unechoed(terminal: int) -> Iterator[None]:
    """Have the terminal (a file descriptor) show nothing of what is typed, and drop nothing of what is written at Ctrl-C.

    It would put ^C between any two bytes of a frame, also within the codes that move the cursor, and Enter would move the
    display by a line. A job in the background is left alone: to change its terminal would stop it.
    """
    if not _has_foreground(terminal):
        yield
        return
    before = termios.tcgetattr(terminal)
    during = before.copy()
    during[LOCAL_FLAGS] = before[LOCAL_FLAGS] & ~termios.ECHO | termios.NOFLSH
    termios.tcsetattr(terminal, termios.TCSADRAIN, during)
    try:
        yield
    finally:
        if _has_foreground(terminal):
            termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _has_foreground(terminal: int) -> bool:
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:  # some other session's
        return False
