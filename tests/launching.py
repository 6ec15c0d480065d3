"""Runs a worker script on several processes that talk over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

TESTS = Path(__file__).parent


def launch_ranks(
    worker: str, *args: object, num_ranks: int = 2, timeout: float = 120, ok: bool = True, **environment: str
) -> str:
    """Run `tests/<worker>` under torchrun, one thread per rank; returns its stdout and stderr.

    Args:
        timeout: in seconds; then all of it is killed and TimeoutExpired raised. ok: whether it has to succeed, or to fail.
    """
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(num_ranks), "--standalone"]
    return run_killable([*launch, str(TESTS / worker), *map(str, args)], timeout, ok, environment)


def run_killable(command: list[str], timeout: float, ok: bool = True, environment: dict[str, str] | None = None) -> str:
    """A command whose children die with it."""
    paths = [str(TESTS), *sys.path]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"} | (environment or {})
    process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        raise
    assert (process.returncode == 0) == ok, f"exit code {process.returncode}: {output[-3000:]}"
    return output


def kill_tree(pid: int) -> None:
    """SIGKILL for a process and all below it (torchrun puts each worker into a session of its own); for oneself at last."""
    process = psutil.Process(pid)
    for victim in sorted([process, *process.children(recursive=True)], key=lambda victim: victim.pid == os.getpid()):
        victim.kill()
