"""`python -m atlas_rl.bench.gpu` on a machine without a GPU: what it says, and its dry run."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("triton")

from atlas_rl.bench.gpu.__main__ import SECTIONS, main  # noqa: E402
from atlas_rl.bench.gpu.machine import Machine  # noqa: E402
from atlas_rl.bench.gpu.plan import DRY  # noqa: E402
from atlas_rl.bench.gpu.section import Section  # noqa: E402

BLOCKED = ("trl", "datasets", "deepspeed", "dacite", "accelerate", "reasoning_gym")
NEEDED = ("atlas_rl", "atlas_rl.engine.engine", "atlas_rl.adapt.adaptation", "atlas_rl.bench.gpu.__main__")


def test_a_dry_run_exercises_every_section(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    assert main(["--dry-run", "--out", str(out)]) == 0, capsys.readouterr().out
    report = json.loads(out.read_text())
    assert list(report["sections"]) == list(SECTIONS) and report["dry_run"]
    for name, section in report["sections"].items():
        assert not section["errors"] and not section["skipped"] and section["results"], (name, section)
        assert all(check["measured"] is not None for check in section["checks"]), (name, section["checks"])
    checks = {check["what"]: check for section in report["sections"].values() for check in section["checks"]}
    # what has to hold on any machine, whatever its speed
    for what in checks:
        if any(word in what for word in ("differ", "no float tie", "distance to a forward", "an update moves", "MiB")):
            assert checks[what]["verdict"] == "passed", checks[what]
    decode = report["sections"]["decode"]["results"]
    assert decode["verify, 1 rows"]["proposed"] > 0 and decode["model"]["captures"]
    printed = capsys.readouterr().out
    assert all(what in printed for what in checks)


def test_without_a_gpu_it_says_what_to_do(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert "--dry-run" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["--only", "machine,speed"])
    assert stopped.value.code == 2 and "speed" in capsys.readouterr().err


def test_parts_that_fail_hang_or_come_too_late_are_written_down(monkeypatch):
    saved = []
    machine = Machine(torch.device("cpu"))
    monkeypatch.setattr("atlas_rl.bench.gpu.section.GRACE", 0.0)
    section = Section(
        name="any",
        machine=machine,
        plan=DRY,
        deadline=time.perf_counter() + 60,
        copy_rate=lambda: 1.0,
        save=saved.append,
    )
    assert section.part("right", lambda: 7, needs=0.1) == 7
    assert section.part("wrong", lambda: 1 / 0, needs=0.1) is None
    section.deadline = time.perf_counter() + 0.5
    assert section.part("hanging", lambda: time.sleep(30), needs=0.1) is None
    assert section.part("late", lambda: 7) is None
    section.judge("nothing", None, 1.0)
    section.judge("NaN", float("nan"), 1.0)
    section.judge("NaN, at most", float("nan"), 1.0, at_least=False)
    section.judge("enough", 1.0, 1.0)
    assert [check["verdict"] for check in section.checks] == ["not measured", "missed", "missed", "passed"]
    assert "ZeroDivisionError" in section.errors["wrong"] and "TimeoutError" in section.errors["hanging"]
    assert "no time left" in section.skipped["late"] and saved[-1]["results"] == {"right": 7}


def test_it_needs_neither_trl_nor_what_comes_with_it():
    code = f"import sys; sys.modules.update(dict.fromkeys({BLOCKED!r}))\n" + "\n".join(f"import {m}" for m in NEEDED)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
