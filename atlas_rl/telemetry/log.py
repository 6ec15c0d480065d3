"""`rollouts.jsonl`: one object per generate call and one per optimizer step."""

from __future__ import annotations

import json
import logging
from collections import deque
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MAX_PENDING_ROWS = 10_000
"""Rows kept in memory while the disk refuses them; the oldest go first."""


class RolloutLog:
    """Appends rows to a file, each flushed at once. A full disk costs one warning; its rows wait for the next write.

    A log of an earlier run in the same place is kept as `rollouts.1.jsonl`, `rollouts.2.jsonl`, … unless `append` is set.
    """

    def __init__(self, path: str | Path, *, append: bool = False) -> None:
        self.path = Path(path)
        self.pending: deque[str] = deque(maxlen=MAX_PENDING_ROWS)
        self.failing = False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not append and self.path.exists():
                self.path.rename(_free_name(self.path))
        except OSError as error:
            self._warn(error)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row, after those that earlier failures left behind. Never raises for a disk's fault."""
        self.pending.append(json.dumps(row))
        try:
            with self.path.open("a") as file:
                file.write("".join(f"{line}\n" for line in self.pending))
        except OSError as error:
            self._warn(error)
            return
        self.pending.clear()
        self.failing = False

    def _warn(self, error: OSError) -> None:
        if not self.failing:
            logger.warning("cannot write %s (%s): rows are kept in memory until it works again", self.path, error)
        self.failing = True


def _free_name(path: Path) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return candidate
