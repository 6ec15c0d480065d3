"""`atlas-rl bench` on a tiny random model: every arm makes what it was told to, and the figures hang together."""

from __future__ import annotations

import json
from statistics import median

import pytest
import yaml
from helpers import SHAPE

from atlas_rl.bench.arms import ARMS
from atlas_rl.bench.cli import ARM_NAMES
from atlas_rl.bench.workload import BenchConfig, build_workload, load_policy
from atlas_rl.cli import main

MODEL = SHAPE | {"model_type": "llama", "eos_token_id": 1}
CONFIG = {
    "model": MODEL,
    "repeats": 2,
    "max_new_tokens": 20,
    "workloads": [
        {"name": "equal", "num_prompts": 2, "num_samples": 2, "prompt_tokens": 5, "new_tokens": 9},
        {"name": "draining", "num_prompts": 2, "num_samples": 3, "prompt_tokens": 5, "new_tokens": None},
    ],
}


def write(path, values) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_all_arms_and_the_json(tmp_path, capsys):
    out = tmp_path / "out" / "bench.json"
    assert main(["bench", "--config", write(tmp_path / "bench.yaml", CONFIG), "--json", str(out)]) == 0
    results = json.loads(out.read_text())
    assert [result["workload"]["name"] for result in results] == ["equal", "draining"]
    assert results[0]["workload"]["completion_tokens"] == 36
    for result in results:
        assert set(result["arms"]) == set(ARM_NAMES)
        for row in result["arms"].values():
            assert len(row["seconds"]) == len(row["tokens_per_s"]) == 2 and row["skipped"] is None
        a, b = (result["arms"][name]["seconds"] for name in ("atlas_plain", "hf_generate"))
        ratio = result["ratios"]["atlas_plain/hf_generate"]
        assert ratio["median"] == pytest.approx(median(y / x for x, y in zip(a, b, strict=True)))
        assert ratio["min"] <= ratio["median"] <= ratio["max"]
        assert result["arms"]["atlas_plain"]["tokens_per_decode_step"] == 1
        assert {"torch", "transformers"} <= set(result["versions"])
    assert "atlas_plain" in capsys.readouterr().out


def test_every_arm_makes_the_lengths_it_is_told():
    config = BenchConfig.from_dict(CONFIG)
    policy = load_policy(config.model)
    draining = build_workload(config.workloads[1], config, policy)
    assert len(set(draining.lens)) > 1 and len(draining.lens) == 6
    for name, make in ARMS.items():
        arm = make(policy)
        for repeat in range(2):
            arm.start(draining, repeat)
            assert arm.run(draining, repeat) == draining.lens, name


def test_repeats_have_other_completions():
    config = BenchConfig.from_dict(CONFIG)
    workload = build_workload(config.workloads[0], config, load_policy(config.model))
    seeds = [request.seed for repeat in range(3) for request in workload.requests(repeat)]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize(
    ("values", "arguments", "words"),
    [
        ({"workload": []}, [], ["workload"]),
        ({}, [], ["workloads is empty"]),
        (CONFIG | {"repeats": 0}, [], ["repeats"]),
        ({"workloads": [{"name": "x", "num_prompts": 0}]}, [], ["num_prompts"]),
        (CONFIG, ["--arms", "atlas_plain,vlm"], ["vlm", "atlas_suffix"]),
        (CONFIG, ["--json", "/proc/none/x.json"], ["--json"]),
    ],
)
def test_bad_input_is_named(tmp_path, capsys, values, arguments, words):
    assert main(["bench", "--config", write(tmp_path / "bench.yaml", values), *arguments]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
