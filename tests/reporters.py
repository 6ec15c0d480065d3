"""Reads back what wandb, TensorBoard and trackio have kept of a run: {metric: {step: value}}."""

from __future__ import annotations

import json
import sqlite3
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Series = dict[str, dict[int, float]]


def from_tensorboard(output_dir: Path) -> Series:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (output_dir / "runs").iterdir()
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def from_trackio(folder: Path, project: str) -> Series:
    with sqlite3.connect(folder / f"{project}.db") as database:
        rows = [json.loads(text) for (text,) in database.execute("select metrics from metrics")]
    return _by_step(rows)


def from_wandb(folder: Path) -> Series:
    """From the file of an offline run: protobuf records in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    rows = []
    for data in _log_records(path.read_bytes()):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return _by_step(rows)


def _log_records(data: bytes) -> Iterator[bytes]:
    """After a header of 7 bytes, blocks of 32 KiB hold pieces (checksum, length, kind) of records; 1 and 4 end a record."""
    position, record = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def _by_step(rows: Iterable[dict[str, Any]]) -> Series:
    series: Series = defaultdict(dict)
    for row in rows:
        for name, value in row.items():
            if "train/global_step" in row:
                series[name][row["train/global_step"]] = value
    return series
