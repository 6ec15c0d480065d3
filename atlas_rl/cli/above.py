"""Prints above a live panel: while it is up, whatever writes to stdout, stderr or a logging handler writes whole lines there."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.ansi import AnsiDecoder
from rich.console import Console
from rich.text import Text


class LinesAbove:
    """Stands in for a stream.

    rich's own proxy will not do: another `Console` (TRL has one for `log_completions`) looks through it and writes into the
    panel, and each state of a progress bar, which rewrites its line, would become a line.
    """

    def __init__(self, console: Console, stream: TextIO) -> None:
        self.console: Console | None = console
        self.stream = stream
        self.decoder = AnsiDecoder()
        self.partial = ""
        """Of a line whose end is still to come; where it rewrites itself, its newest state after a carriage return."""
        self.lock = threading.Lock()
        self.process = os.getpid()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        if self.console is None or os.getpid() != self.process:  # a forked worker has no panel
            return self.stream.write(text)
        with self.lock:
            *lines, partial = (self.partial + text).split("\n")
            self.partial = "\r" + newest_state(partial) if "\r" in partial else partial
        self._print(map(newest_state, lines))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        """Somebody is to see a line before its end (a prompt?), unless it is a progress bar's."""
        with self.lock:
            if self.partial.startswith("\r"):
                return
            partial, self.partial = self.partial, ""
        self._print([partial] if partial else [])

    def close_above(self) -> None:
        """From now on, for those who have kept it: the stream itself."""
        self.flush()
        self.console = None

    def _print(self, lines: Iterable[str]) -> None:
        decoded = [self.decoder.decode_line(line) for line in lines]
        if decoded and self.console is not None:
            self.console.print(Text("\n").join(decoded), soft_wrap=True)


def newest_state(line: str) -> str:
    return line.rstrip("\r").rpartition("\r")[2]


@contextmanager
def printed_above(console: Console) -> Iterator[None]:
    """Lines for the terminal go above the console's live display; a stream that is no terminal is left alone."""
    stdout, stderr = sys.stdout, sys.stderr
    replaced = [(stream, LinesAbove(console, stream)) for stream in (stdout, stderr) if stream.isatty()]
    for stream, above in replaced:
        _replace(stream, above)
    try:
        yield
    finally:
        for stream, above in replaced:
            above.close_above()
            _replace(above, stream)


def _replace(old: Any, new: Any) -> None:
    """Also in the handlers of loggers, which keep the stream that they were made with."""
    sys.stdout = new if sys.stdout is old else sys.stdout
    sys.stderr = new if sys.stderr is old else sys.stderr
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for handler in {handler for logger in loggers for handler in getattr(logger, "handlers", ())}:
        if getattr(handler, "stream", None) is old:
            handler.setStream(new)
