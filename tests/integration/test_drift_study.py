"""The studies, tiny: their arithmetic, that modes make the same tokens, and what their JSON holds."""

from __future__ import annotations

import copy
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from helpers import VOCAB_SIZE, make_requests, tiny_llama
from recipes import TEXTS

from atlas_rl import SamplingParams
from atlas_rl.adapt.distill import fresh_head
from atlas_rl.bench.drift import MODES, probed_steps, replay_run, summarize, sweep_shares
from atlas_rl.bench.head_study import compare_heads
from atlas_rl.bench.probe import Probe, per_token_kl
from atlas_rl.bench.recorded_run import RecordedRun, RecordedStep, forced_reward, record_run
from atlas_rl.bench.workload import load_policy
from atlas_rl.control.budget import RetrainBudget
from atlas_rl.drafters.checkpoints import save_head
from atlas_rl.engine.engine import RolloutEngine
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.telemetry.plots import plot_drift
from atlas_rl.types import Rollout

ROOT = Path(__file__).parents[2]
SAMPLING = SamplingParams(max_new_tokens=16)


def moved(model, distance: float):
    """A copy whose weights lie elsewhere."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(distance * torch.randn(parameter.shape, generator=generator))
    return other


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("head")
    save_head(fresh_head("recurrent", PolicyView(tiny_llama()), 0), folder / "head")
    return str(folder / "head")


@pytest.fixture(scope="module")
def run() -> RecordedRun:
    """Three steps of a policy that moves a little at each."""
    steps, requests = [], make_requests(3, 4, max_new_tokens=16)
    for index in range(3):
        policy = moved(tiny_llama(), 0.02 * index)
        made = RolloutEngine(PolicyView(policy)).generate(requests, SAMPLING)
        completions = [rollout.token_ids for rollout in made]
        weights = copy.deepcopy(policy.state_dict())
        steps.append(RecordedStep(weights=weights, requests=requests, completions=completions, seconds=0.5))
    return RecordedRun(sampling=SAMPLING, steps=steps)


def make_probe(policy) -> Probe:
    return Probe(policy, [(5, 6, 7), (8, 9)], 2, SAMPLING)


def test_kl_of_a_policy_to_itself_is_zero():
    policy = tiny_llama()
    rollouts = [
        Rollout(prompt_ids=[3, 4], token_ids=[5, 6, 7], logprobs=[], finish_reason="length"),
        Rollout(prompt_ids=[9], token_ids=[1], logprobs=[], finish_reason="length"),
    ]
    assert per_token_kl(policy, copy.deepcopy(policy), rollouts) == 0.0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kl_matches_its_definition(temperature: float):
    policy, start = tiny_llama(torch.float64), moved(tiny_llama(torch.float64), 0.05)
    rollouts = [
        Rollout(prompt_ids=[3, 4, 5], token_ids=[6, 7], logprobs=[], finish_reason="length"),
        Rollout(prompt_ids=[9], token_ids=[1, 2, 3, 4], logprobs=[], finish_reason="length"),
    ]
    by_hand = []
    for rollout in rollouts:
        for n in range(len(rollout.token_ids)):
            prefix = torch.tensor([rollout.prompt_ids + rollout.token_ids[:n]])
            with torch.no_grad():
                p, q = ((m(prefix).logits[0, -1] / temperature).softmax(-1) for m in (policy, start))
            by_hand.append(sum(float(p[v] * (p[v] / q[v]).log()) for v in range(VOCAB_SIZE)))
    got = per_token_kl(policy, start, rollouts, temperature)
    assert got == pytest.approx(sum(by_hand) / 6, rel=1e-9) and got > 0.01


def test_all_modes_make_the_recorded_tokens(run: RecordedRun, head: str, monkeypatch):
    # so short a rollout would not be learned from
    monkeypatch.setattr(RetrainBudget, "choose", lambda *args: 2)
    monkeypatch.setattr(RetrainBudget, "is_near", True)
    policy = tiny_llama()
    result = replay_run(policy, run, make_probe(policy), head, MODES, num_probes=2)
    assert result["float_ties"] == 0, "tiny and few: ties are one in a million tokens"
    assert [step.get("kl") is not None for step in result["steps"]] == [True, False, True]
    assert result["steps"][0]["kl"] == 0.0 and result["steps"][-1]["kl"] > 0.01
    for name, mode in result["modes"].items():
        probes = [step["probe"] for step in mode["steps"] if "probe" in step]
        assert len(probes) == (0 if name == "plain" else 2)
        assert all(1 <= p["tokens_per_decode_step"] <= 5 and len(p["acceptance_by_depth"]) <= 4 for p in probes)
        assert all(step["tokens_per_s"] > 0 and step["completion_tokens"] == 12 * 16 for step in mode["steps"])
    assert result["modes"]["every_update"]["steps"][1]["retrain"]["steps"] > 0
    assert not any("retrain" in step for step in result["modes"]["never"]["steps"])
    summary = summarize(result)
    assert {"tokens_per_s", "tokens_per_s_last_third"} < set(summary["ratios"]["every_update/never"])
    json.dumps(result | summary)


def test_other_tokens_than_the_recorded_ones_are_a_fault(run: RecordedRun, head: str):
    policy, wrong = tiny_llama(), copy.deepcopy(run)
    wrong.steps[1].completions[0][3] = (wrong.steps[1].completions[0][3] + 1) % VOCAB_SIZE
    with pytest.raises(AssertionError, match="no tie"):
        replay_run(policy, wrong, make_probe(policy), head, ["plain"], num_probes=1)


def test_shares_of_retraining(run: RecordedRun, head: str, tmp_path: Path):
    policy = tiny_llama()
    sweep = sweep_shares(policy, run, make_probe(policy), head, [1e-6, 0.9], {"steps": 2})
    little, much = sweep["shares"]
    assert much["optimizer_steps"] > little["optimizer_steps"] == 1, "the first update tells what a step takes"
    assert much["share_spent"] > 0 and much["of_converged"] > 0.5
    assert {"converged", "frozen", "policy"} < set(sweep)
    pytest.importorskip("matplotlib")
    png = plot_drift({"sweep": sweep}, tmp_path / "sweep.png")
    assert 1000 < png.stat().st_size < 100_000


def test_heads_are_compared(head: str):
    policy, prompts = tiny_llama(), [(5, 6), (7, 8), (9, 10), (11, 12)]
    study = compare_heads(policy, prompts, make_probe(policy), SAMPLING, {"steps": 2}, sizes=(1, 2), repeats=1)
    assert study["heads"]["recurrent, no layer"]["layers"] == []
    for row in [study["plain"], *study["heads"].values()]:
        assert set(row["tokens_per_s"]) == {"1", "2"} and all(len(rates) == 1 for rates in row["tokens_per_s"].values())
    json.dumps(study)


def test_a_real_run_is_recorded_as_it_was(tiny_policy: Path, head: str):
    from datasets import Dataset

    rows = Dataset.from_list([{"prompt": text} for text in TEXTS])
    options = {"per_device_train_batch_size": 4, "num_generations": 2, "max_steps": 2, "max_completion_length": 8}
    options |= {"bf16": False, "use_cpu": True, "learning_rate": 1e-3, "disable_tqdm": True, "logging_steps": 1}
    run = record_run(str(tiny_policy), rows, forced_reward, **options)
    assert len(run.steps) == len(run.rewards) == 2 and all(step.seconds > 0 for step in run.steps)
    policy = load_policy(str(tiny_policy))
    assert all(torch.equal(run.steps[0].weights[name], value) for name, value in policy.state_dict().items())
    assert any(not torch.equal(run.steps[1].weights[name], value) for name, value in policy.state_dict().items())
    probe = Probe(policy, run.prompts[:2], 1, run.sampling)
    replay_run(policy, run, probe, head, ["plain", "suffix"], num_probes=1)  # or else: other tokens


def test_forced_reward():
    full, half, short = ". ! " * 40, "a.b," * 40, "a."
    assert forced_reward([half]) == [0.0]
    assert forced_reward([full, half]) == [0.0, 0.0], "spaces are characters too"
    assert forced_reward([short])[0] < -0.9 and forced_reward(["word " * 30]) == [-0.5]


def test_probes_are_spread_over_the_run():
    assert probed_steps(40, 3) == {0, 20, 39} or probed_steps(40, 3) == {0, 19, 39}
    assert probed_steps(2, 8) == {0, 1} and probed_steps(5, 1) == {0}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["drift_study", "evolving_workload"])
def test_the_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    out, png = tmp_path / "out.json", tmp_path / "out.png"
    monkeypatch.setattr(sys, "argv", [name, "--quick", "--json", str(out), "--plot", str(png)])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    study = json.loads(out.read_text())
    assert "summary" in study and png.stat().st_size < 100_000
