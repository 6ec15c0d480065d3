"""configs/accelerate and configs/deepspeed: every file is what accelerate and DeepSpeed read, and what its header says."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")

from accelerate.commands.config.config_args import load_config_from_file
from transformers.integrations import HfDeepSpeedConfig

from atlas_rl.cli import launching
from atlas_rl.cli.launching import Launch

ROOT = Path(__file__).parents[2]
ACCELERATE = sorted((ROOT / "configs/accelerate").glob("*.yaml"))
DEEPSPEED = sorted((ROOT / "configs/deepspeed").glob("*.json"))
FIELDS = {"per_device_train_batch_size": 8, "num_generations": 8}


def command_of(path: Path) -> list[str]:
    """The launcher's flags of the command in the header."""
    comment = [line.lstrip("# ").rstrip("\\ ") for line in path.read_text().splitlines() if line.startswith("#    ")]
    words = shlex.split(" ".join(comment))
    assert words[:4] == ["atlas-rl", "train", "--config", "my.yaml"], words
    return words[4:]


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_starts_by_it_what_its_header_says(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(launching, "num_accelerators", lambda: 0 if "cpu" in path.stem else 8)
    flags = command_of(path)
    assert flags[:2] == ["--accelerate_config", str(path.relative_to(ROOT))]
    plan = Launch.of(flags)
    launching.check(plan, FIELDS)
    assert plan.num_machines == (2 if "multi_node" in path.stem else 1)
    assert plan.num_processes == (2 if "cpu" in path.stem else 8 * plan.num_machines)
    assert plan.kind == next((kind for name, kind in KINDS.items() if name in path.stem), "plain")
    launching._parse(launching.accelerate_flags(plan, FIELDS), ["train"])
    if plan.kind == "deepspeed":
        assert load_config_from_file(str(path)).deepspeed_config["zero_stage"] == int(path.stem.split("zero")[1][0])
    if plan.num_machines > 1:
        with pytest.raises(ValueError, match="machine_rank"):
            launching.check(Launch.of(flags[:2]), FIELDS)


KINDS = {"zero": "deepspeed", "fsdp": "fsdp"}


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
def test_deepspeed_reads_it(path, monkeypatch):
    from deepspeed.runtime.config import DeepSpeedConfig

    config = json.loads(path.read_text())
    assert HfDeepSpeedConfig(str(path)).is_zero3() == path.stem.startswith("zero3")
    # what the trainer puts in the place of "auto"
    config |= {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1}
    config |= {"gradient_clipping": 1.0, "bf16": {"enabled": False}}
    parsed = DeepSpeedConfig(config)
    assert parsed.zero_config.stage == int(path.stem[4])
    offload = parsed.zero_config.offload_optimizer
    assert (offload is not None and offload.device == "cpu") == ("offload" in path.stem)


def test_there_is_one_for_one_machine_for_many_and_for_the_cpu():
    names = " ".join(path.stem for path in ACCELERATE)
    assert all(name in names for name in ("ddp_cpu", "zero2_cpu", "zero3_cpu", "multi_node_zero3", "multi_node_fsdp2"))
    assert {path.stem for path in DEEPSPEED} >= {"zero2", "zero3"}
