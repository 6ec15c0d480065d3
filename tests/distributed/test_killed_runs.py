"""Runs on two processes that are killed, and resumed: they repeat the run that nobody killed, from the last checkpoint on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
pytest.importorskip("deepspeed")

from killed_run_worker import PLACES
from launching import launch_ranks
from recipes import rollout_rows

pytestmark = pytest.mark.distributed


def launch(policy: Path, folder: Path, mode: str, place: str, ok: bool = True) -> list[dict[str, Any]]:
    """What each rank saw."""
    output = launch_ranks("killed_run_worker.py", policy, folder, mode, place, timeout=240, ok=ok)
    if not ok:
        assert "Traceback" not in output, f"it was to be killed, and failed: {output[-3000:]}"
        return []
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def uninterrupted(tiny_policy, tmp_path_factory):
    """What each rank saw of the run that nobody killed, by mode."""
    seen: dict[str, list[dict[str, Any]]] = {}

    def of(mode: str) -> list[dict[str, Any]]:
        if mode not in seen:
            folder = tmp_path_factory.mktemp(mode)
            seen[mode] = launch(tiny_policy, folder, mode, "nowhere")
            assert any(row.get("retrain", {}).get("steps") for row in rollout_rows(folder))
        return seen[mode]

    return of


@pytest.mark.parametrize("mode, place", [*(("ddp", place) for place in PLACES), ("zero3", "rollout")])
def test_a_killed_run_is_resumed_from_its_last_whole_checkpoint(mode, place, uninterrupted, tiny_policy, tmp_path):
    launch(tiny_policy, tmp_path, mode, place, ok=False)
    half_written = tmp_path / "checkpoint-6"
    assert half_written.exists() == (place in ("trainer's files", "drafters' files"))
    assert (half_written / "trainer_state.json").exists() == (place == "drafters' files")
    for again, whole in zip(launch(tiny_policy, tmp_path, mode, "resume"), uninterrupted(mode), strict=True):
        assert again["from"] == "checkpoint-4"
        assert again["completions"] == whole["completions"][4:]
        assert again["heads"] == whole["heads"] and again["heads"].keys() == {"recurrent", "static"}
