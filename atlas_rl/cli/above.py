"""Prints above a live panel: while it is up, whatever writes to stdout, stderr or a logging handler writes whole lines there."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from threading import RLock, Thread
from typing import Any, TextIO

from rich.ansi import AnsiDecoder
from rich.live import Live
from rich.text import Text

Lines = SimpleQueue[Text | None]
"""To be printed; None: no more."""


class LinesAbove:
    """Stands in for a stream.

    rich's own proxy will not do: another `Console` (TRL has one for `log_completions`) looks through it and writes into the
    panel, and each state of a progress bar, which rewrites its line, would become a line.
    """

    def __init__(self, stream: TextIO, lines: Lines) -> None:
        self.stream = stream
        self.lines: Lines | None = lines
        """None: there is no panel any more."""
        self.decoder = AnsiDecoder()
        self.partial = ""
        """Of a line whose end is still to come; where it rewrites itself, its newest state after a carriage return."""
        self.lock = RLock()  # a signal handler may print as well
        self.process = os.getpid()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        if not self._has_panel:
            return self.stream.write(text)
        with self.lock:
            *whole, partial = (self.partial + text).split("\n")
            self.partial = "\r" + newest_state(partial) if "\r" in partial else partial
            self._show(map(newest_state, whole))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        """Somebody is to see a line before its end (a prompt?), unless it is a progress bar's."""
        if not self._has_panel:
            self.stream.flush()
            return
        with self.lock:
            if self.partial and not self.partial.startswith("\r"):
                self._show([self.partial])
                self.partial = ""

    @property
    def _has_panel(self) -> bool:
        return self.lines is not None and os.getpid() == self.process  # a forked worker has none

    def _show(self, lines: Iterable[str]) -> None:
        for line in lines:
            if self.lines is not None:
                self.lines.put(self.decoder.decode_line(line))


def newest_state(line: str) -> str:
    return line.rstrip("\r").rpartition("\r")[2]


@contextmanager
def printed_above(live: Live, seconds: float) -> Iterator[None]:
    """Have a live display up, drawn anew every so many seconds, and lines for the terminal above it.

    One thread draws it all (the display itself redirects nothing): Ctrl-C, which Python raises in the main thread, tears no line
    and no frame. A stream that is no terminal is left alone.
    """
    lines: Lines = SimpleQueue()
    replaced = [(stream, LinesAbove(stream, lines)) for stream in {sys.stdout, sys.stderr} if stream.isatty()]
    drawer = Thread(target=_draw, args=(live, lines, seconds, [above for _, above in replaced]), daemon=True)
    for stream, above in replaced:
        _replace(stream, above)
    drawer.start()
    try:
        yield
    finally:
        for stream, above in replaced:
            above.flush()
            _replace(above, stream)
        lines.put(None)
        drawer.join()


def _draw(live: Live, lines: Lines, seconds: float, streams: list[LinesAbove]) -> None:
    try:
        with live:
            waiting: list[Text | None] = []
            while None not in waiting:
                waiting = _next(lines, seconds)
                if texts := [text for text in waiting if text is not None]:
                    live.console.print(Text("\n").join(texts), soft_wrap=True)
                else:
                    live.refresh()
    finally:
        for stream in streams:  # whoever has kept it, or prints after drawing has failed, has the stream itself
            stream.lines = None


def _next(lines: Lines, seconds: float) -> list[Text | None]:
    """All that waits to be printed; nothing, if nothing comes in so many seconds."""
    try:
        waiting = [lines.get(timeout=seconds)]
    except Empty:
        return []
    while not lines.empty():
        waiting.append(lines.get())
    return waiting


def _replace(old: Any, new: Any) -> None:
    """Also in the handlers of loggers, which keep the stream that they were made with."""
    sys.stdout = new if sys.stdout is old else sys.stdout
    sys.stderr = new if sys.stderr is old else sys.stderr
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for handler in {handler for logger in loggers for handler in getattr(logger, "handlers", ())}:
        if getattr(handler, "stream", None) is old:
            handler.setStream(new)
