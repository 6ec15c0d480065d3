"""`rollouts.jsonl`: one object per generate call, one per optimizer step, and one per log of the trainer."""

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
    """Appends rows to a file, each written at once. A full disk costs one warning; its rows wait for the next write."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.pending: deque[str] = deque(maxlen=MAX_PENDING_ROWS)
        self.failing = False

    def write(self, row: dict[str, Any]) -> None:
        """Append a row, after those that earlier failures left behind. Never raises for a disk's fault."""
        self.pending.append(json.dumps(row))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write("".join(f"{line}\n" for line in self.pending))
        except OSError as error:
            if not self.failing:
                logger.warning("cannot write %s (%s): rows wait in memory until it works again", self.path, error)
            self.failing = True
            return
        self.pending.clear()
        self.failing = False


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Its rows, as far as they are whole: a run that is killed, or still goes on, may leave half a line."""
    rows = []
    for line in Path(path).read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "kind" in row:
            rows.append(row)
    return rows


def keep_earlier_log(path: str | Path | None) -> None:
    """Move the log of an earlier run in the same place to `rollouts.1.jsonl`, `rollouts.2.jsonl`, …"""
    if path is None or not Path(path).exists():
        return
    path, number = Path(path), 1
    while (kept := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    try:
        path.rename(kept)
    except OSError as error:
        logger.warning("cannot move the earlier %s away (%s): this run's rows are appended to it", path, error)
