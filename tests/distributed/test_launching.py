"""`atlas-rl train` on two processes, over gloo where there is no accelerator: it starts, ends and resumes as one process does."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import run_killable

from atlas_rl import last_complete_checkpoint

ROOT = Path(__file__).parents[2]
REWARDS = """
import atexit, os

if "RANK" in os.environ:
    atexit.register(print, "exit function of rank", os.environ["RANK"])

def shortness(completions, **_):
    return [-float(len(text)) for text in completions]

def failing(completions, **_):
    if os.environ["RANK"] == "1":
        raise OSError("the reward's own error")
    return shortness(completions)

def waiting(completions, **_):
    import time
    open("waiting", "w").close()
    time.sleep(60)
"""


@pytest.fixture
def run_dir(tmp_path, tiny_policy, monkeypatch) -> Path:
    """Two processes with half a group each."""
    rows = [{"prompt": f"What is {a} + {b}?"} for a in range(4) for b in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "launched_rewards.py").write_text(REWARDS)
    (tmp_path / "run.yaml").write_text(
        "output_dir: out\nbf16: false\nmax_steps: 1\nnum_generations: 4\nper_device_train_batch_size: 2\nddp_timeout: 60\n"
        "max_completion_length: 8\nlogging_steps: 1\nsave_strategy: 'no'\nreport_to: none\nlearning_rate: 1e-3\n"
        f"model_name_or_path: {tiny_policy}\ndataset_name: data.jsonl\nreward_funcs: [launched_rewards.shortness]\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*flags: str, launcher: tuple[str, ...] = (), code: int = 0) -> str:
    """What it prints; `code` is what it exits with."""
    command = [sys.executable, *launcher, "-m", "atlas_rl", "train", "--config", "run.yaml", *flags]
    output = run_killable(["sh", "-c", f"{shlex.join(command)}; echo exit code $?"], timeout=180)
    assert output.rstrip().endswith(f"exit code {code}"), output[-3000:]
    return output


def rollouts(run_dir: Path) -> list[tuple[int, int]]:
    rows = [json.loads(line) for line in (run_dir / "out" / "rollouts.jsonl").read_text().splitlines()]
    assert not any("fallback" in row for row in rows)
    return sorted((row["step"], row["rank"]) for row in rows if row["kind"] == "rollout")


def accelerate_config(name: str) -> list[str]:
    return ["--accelerate_config", str(ROOT / "configs/accelerate" / f"{name}.yaml")]


def test_ddp_on_the_cpu(run_dir):
    output = train(*accelerate_config("ddp_cpu"), "--save_strategy", "steps", "--save_steps", "1")
    assert "2 processes on the CPU, DDP" in output and output.count("Every rollout in figures") == 1
    assert rollouts(run_dir) == [(0, 0), (0, 1)]
    assert last_complete_checkpoint("out") == Path("out/checkpoint-1")
    assert all(f"exit function of rank {rank}" in output for rank in "01"), "wandb finishes its run in one"


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_on_the_cpu_and_resumed(run_dir, stage):
    saving = ["--save_strategy", "steps", "--save_steps", "1"]
    assert "DeepSpeed over gloo" in train(*accelerate_config(f"zero{stage}_cpu"), *saving)
    assert rollouts(run_dir) == [(0, 0), (0, 1)]
    (run_dir / "out" / "checkpoint-7").mkdir()  # a run that was killed while it saved
    resumed = ["--max_steps", "2", "--resume_from_checkpoint", "latest"]
    output = train(*accelerate_config(f"zero{stage}_cpu"), *saving, *resumed)
    assert "Resuming from out/checkpoint-1" in output and output.count("checkpoint-7 is incomplete") == 1
    assert rollouts(run_dir) == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("stage", "launcher", "flags"),
    [
        (2, (), ["--num_processes", "2"]),
        (3, ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"), []),
    ],
    ids=["accelerate", "torchrun"],
)
def test_deepspeed_s_own_config(run_dir, stage, launcher, flags):
    config = str(ROOT / "configs/deepspeed" / f"zero{stage}.json")
    output = train("--deepspeed", config, "--resume_from_checkpoint", "true", *flags, launcher=launcher)
    assert "DeepSpeed over gloo" in output and "No complete checkpoint in out" in output
    assert rollouts(run_dir) == [(0, 0), (0, 1)]


@pytest.mark.distributed
def test_two_machines(run_dir):
    """Two launchers, each of them told that it is one of two machines."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    shared = ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port]
    command = [
        sys.executable,
        "-m",
        "atlas_rl",
        "train",
        "--config",
        "run.yaml",
        *accelerate_config("multi_node_zero3"),
    ]
    first, second = (shlex.join([*command, *shared, "--machine_rank", rank]) for rank in "01")
    output = run_killable(
        ["sh", "-c", f"{first} & first=$!; {second}; echo second $?; wait $first; echo first $?"], 300
    )
    assert "second 0" in output and "first 0" in output, output[-3000:]
    assert rollouts(run_dir) == [(0, 0), (0, 1)]


@pytest.mark.distributed
def test_exit_codes(run_dir):
    two = ["--num_processes", "2"]
    output = train(*two, "--reward_funcs", "launched_rewards.missing", code=2)
    assert output.count("has no 'missing'") == 1, "said once, not by every process"
    output = train(*two, "--reward_funcs", "launched_rewards.failing", code=1)
    # gloo now and then aborts an interpreter that ends by an error, after the error is told
    assert "the reward's own error" in output and re.search("rank 1 ended with exit code (1|-6)$", output, re.M)


@pytest.mark.distributed
def test_an_interrupt_ends_all_processes(run_dir):
    command = [sys.executable, "-m", "atlas_rl", "train", "--config", "run.yaml", "--num_processes", "2"]
    command += ["--reward_funcs", "launched_rewards.waiting"]
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        deadline = time.monotonic() + 90
        while not (run_dir / "waiting").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, output[-3000:]
    assert "tokens per second" in output, "what was done is reported"
