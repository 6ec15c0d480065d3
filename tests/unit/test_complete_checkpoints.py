"""Which checkpoint a run is resumed from: the newest that is whole."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from atlas_rl import last_complete_checkpoint
from atlas_rl.adapt import state
from atlas_rl.checkpoints import (
    FOLDER,
    TRAINER_STATE,
    check_checkpoint,
    check_saving,
    is_complete,
    reopen,
    warn_of_saving,
)


def checkpoint(folder: Path, step: int, *, trainer_state: bool = True, atlas: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "model.safetensors").touch()
    if trainer_state:
        (path / TRAINER_STATE).write_text("{}")
    if atlas:
        (path / FOLDER).mkdir()
        (path / FOLDER / "state.json").write_text("{}")
    return path


def test_the_newest_complete_one_is_taken_and_newer_ones_are_named_once(tmp_path, caplog):
    checkpoint(tmp_path, 9)
    expected = checkpoint(tmp_path, 10)
    assert last_complete_checkpoint(tmp_path) == expected and not caplog.records, "10 comes after 9"
    checkpoint(tmp_path, 12, atlas=False)
    checkpoint(tmp_path, 100, trainer_state=False, atlas=False)
    (tmp_path / "checkpoint-200").touch()
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete_checkpoint(str(tmp_path)) == expected
    (record,) = caplog.records
    said = record.getMessage()
    assert "checkpoint-100, checkpoint-12 " in said and TRAINER_STATE in said and "atlas/" in said and "200" not in said


def test_none_where_there_is_none(tmp_path, caplog):
    assert last_complete_checkpoint(tmp_path) is None and last_complete_checkpoint(tmp_path / "nowhere") is None
    assert not caplog.records
    checkpoint(tmp_path, 3, atlas=False)
    assert last_complete_checkpoint(tmp_path) is None
    assert "checkpoint-3" in caplog.text and TRAINER_STATE not in caplog.text


def test_atlas_folder_has_one_name():
    assert state.FOLDER == FOLDER


def test_a_checkpoint_that_is_named(tmp_path, caplog):
    check_checkpoint(checkpoint(tmp_path, 1), deterministic=True)
    for path in (tmp_path / "nowhere", checkpoint(tmp_path, 2, trainer_state=False)):
        with pytest.raises(ValueError, match="resume_from_checkpoint: .*latest"):
            check_checkpoint(path)
    without_atlas = checkpoint(tmp_path, 3, atlas=False)
    assert not caplog.records
    check_checkpoint(without_atlas)
    assert len(caplog.records) == 1 and "start anew" in caplog.text
    with pytest.raises(ValueError, match="deterministic: false"):
        check_checkpoint(without_atlas, deterministic=True)


def test_a_checkpoint_that_is_written_over_is_incomplete_meanwhile(tmp_path):
    path = checkpoint(tmp_path, 3)
    reopen(path)
    assert not is_complete(path) and sorted(p.name for p in path.iterdir()) == ["model.safetensors", TRAINER_STATE]
    reopen(path)
    reopen(tmp_path / "checkpoint-4")


def saving(**options) -> SimpleNamespace:
    defaults = {
        "save_strategy": "steps",
        "save_steps": 500,
        "save_total_limit": None,
        "save_only_model": False,
        "max_steps": 20,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 1,
        "num_iterations": 1,
        "eval_steps": None,
        "logging_steps": 1,
    }
    return SimpleNamespace(**defaults | options)


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"save_steps": 3}, None),
        ({"steps_per_generation": 4, "save_steps": 6}, "save_steps: 8"),
        ({"steps_per_generation": 4, "save_steps": 8}, None),
        ({"steps_per_generation": 4, "gradient_accumulation_steps": 4, "save_steps": 7}, None),
        ({"steps_per_generation": 4, "gradient_accumulation_steps": 2, "save_steps": 7}, "save_steps: 8"),
        ({"steps_per_generation": 4, "gradient_accumulation_steps": 6, "save_steps": 3}, "save_steps: 4"),
        ({"num_iterations": 2, "save_steps": 3}, "save_steps: 4"),
        ({"num_iterations": 2, "save_steps": 3, "save_strategy": "epoch"}, None),
        ({"num_iterations": 2, "save_steps": 3, "save_strategy": "no"}, None),
        ({"num_iterations": 2, "eval_steps": 3, "save_strategy": "best"}, "eval_steps: 4"),
        ({"num_iterations": 2, "save_steps": 0.24}, "save_steps: 6"),
        ({"num_iterations": 2, "save_steps": 0.24, "max_steps": -1}, None),
        ({"steps_per_generation": None, "save_steps": 3}, None),
    ],
)
def test_deterministic_runs_save_between_two_generations(options, remedy):
    check_saving(saving(**options), deterministic=False)
    if remedy is None:
        check_saving(saving(**options), deterministic=True)
    else:
        with pytest.raises(ValueError, match=f"set {remedy}$"):
            check_saving(saving(**options), deterministic=True)


def test_what_the_trainer_has_made_of_save_steps_counts():
    with pytest.raises(ValueError, match="set save_steps: 4"):
        check_saving(saving(num_iterations=2, save_steps=0.1, max_steps=-1), True, save_steps=3)


def test_weights_alone_are_no_checkpoint_to_repeat_a_run_from(caplog):
    with pytest.raises(ValueError, match="set save_only_model: false"):
        check_saving(saving(save_only_model=True), deterministic=True)
    check_saving(saving(save_only_model=True, save_strategy="no"), deterministic=True)
    warn_of_saving(saving(save_only_model=True))
    assert "new optimizer" in caplog.text


def test_a_total_limit_of_one_is_warned_of(caplog):
    warn_of_saving(saving(save_total_limit=2))
    warn_of_saving(saving(save_total_limit=1, save_strategy="no"))
    assert not caplog.records
    warn_of_saving(saving(save_total_limit=1))
    assert "Set it to 2" in caplog.text
