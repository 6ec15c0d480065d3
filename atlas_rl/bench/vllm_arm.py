"""vLLM as an arm, alone and with the speculation that it has without a trained drafter. Its CPU build pins other versions than
ours, so it runs in an environment and a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from ctypes.util import find_library
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from atlas_rl.bench.arms import Arm
from atlas_rl.bench.make_vllm_venv import COMMAND, venv_dir
from atlas_rl.bench.workload import Batch, Workload

WORKER = Path(__file__).parent / "vllm_worker.py"
PRELOADED = "vLLM preloads"
"""Among the versions: the libraries that it begins with."""
TCMALLOC = "tcmalloc"
"""What the name of any of its builds holds."""
MAX_NUM_SEQS = 256
"""vLLM's own default, and the engine's."""
MAX_MODEL_LEN = 4096
KV_GIB = 2
"""Enough for every workload here; vLLM's own choice is half of the machine's memory."""


class VLLM(Arm):
    """The worker loads the policy once and is stopped between its turns, so that the other arms have the machine to themselves.

    The samples of a prompt share it in vLLM's prefix cache, which every run begins without. Where the policy stays as it is, vLLM
    is spared what the engine's arms pay for at every run: no weights are handed over and nothing is packed anew. Where it moves,
    vLLM takes each step's weights over within its process, as in TRL's colocated mode, and that counts (`vllm_worker`).
    """

    speculation: ClassVar[dict[str, Any] | None] = None
    """vLLM's `speculative_config`."""
    learns = False
    """Whether drafts come from earlier completions too: then it is warmed up like the engine's drafters."""

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__(policy)
        self.process: subprocess.Popen[str] | None = None
        self.has_moved = False
        if not (venv_dir() / "bin" / "python").exists():
            self.skipped = f"there is no vLLM in {venv_dir()}: make it with `{COMMAND}`"
            return
        try:
            self._load()
        except EOFError as error:
            self.skipped = f"vLLM cannot load this policy: {error}"
            self.close()

    def start(self, workload: Workload, repeat: int) -> None:
        if workload.moves or self.has_moved:
            self.policy.save_pretrained(self.weights_folder)
            self._ask({"read": str(self.weights_folder)})
            self.has_moved = workload.moves
        if self.learns and workload.starts_over(repeat):
            self._ask({"forget": True})
            for batch in workload.warm_batches:
                self.timed(batch)

    def ends_by_itself(self, batch: Batch) -> bool:
        return self.speculation is not None and batch.own is not None

    def timed(self, batch: Batch) -> tuple[float, list[int]]:
        task = {"run": batch.prompts, "lens": batch.lens, "eos": []}
        if self.ends_by_itself(batch):
            task |= {"lens": [batch.own.max_new_tokens] * len(batch.lens), "eos": batch.own.eos_token_ids}
        self.answer = self._ask(task)
        return self.answer["seconds"], self.answer["lens"]

    def figures(self) -> dict[str, Any]:
        """Its memory is all that it has been given, taken at the start."""
        num_tokens = sum(self.answer["lens"])
        per_step = num_tokens / (num_tokens - self.answer["accepted"])
        return {"tokens_per_decode_step": per_step, "peak_bytes": KV_GIB << 30}

    def close(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.folder.cleanup()
            self.process = None

    def _load(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="atlas-bench-vllm-")
        folder = Path(self.folder.name)
        self.weights_folder = folder / "weights"
        self.policy.save_pretrained(folder / "policy")
        self.log = folder / "log"
        env = environment()
        self.process = subprocess.Popen(
            [str(venv_dir() / "bin" / "python"), "-I", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            env=env,
            start_new_session=True,  # a process group to stop and to end as one
        )
        max_len = min(MAX_MODEL_LEN, self.policy.config.max_position_embeddings)
        task = {"load": str(folder / "policy"), "max_num_seqs": MAX_NUM_SEQS, "max_model_len": max_len}
        versions = self._ask(task | {"speculation": self.speculation})["versions"]
        self.versions = versions | {PRELOADED: " ".join(Path(name).name for name in preloaded(env))}

    def _ask(self, task: dict[str, Any]) -> dict[str, Any]:
        os.killpg(self.process.pid, signal.SIGCONT)
        answer = ""
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        if not answer:
            raise EOFError(f"its process has ended: {last_words(self.log.read_text())}")
        os.killpg(self.process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED)
        return json.loads(answer)


class VLLMNgram(VLLM):
    """Drafts are looked up in the sequence itself, by its last tokens."""

    speculation: ClassVar = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4}
    """As vLLM's documentation has it."""


class VLLMSuffix(VLLM):
    """Drafts are the most frequent continuations in the sequence and in earlier completions (Arctic's suffix trees)."""

    speculation: ClassVar = {"method": "suffix", "num_speculative_tokens": 32}
    """As vLLM's documentation has it; how many of them are drafted, the trees decide."""
    learns = True


def last_words(log: str) -> str:
    """Of a process that has ended: its last line that names an error, or else its last one."""
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["without a word"]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1])[-500:]


def environment() -> dict[str, str]:
    """Ours, with as many threads as the other arms have, and what vLLM's documentation asks for on CPU: Intel's OpenMP, which
    its environment holds, and TCMalloc, where this machine has it. One process, as TRL's colocated mode has it, so that no time
    goes into messages. What the user preloads stays, before that."""
    others = ("PYTHON", "VLLM_", "OMP_", "MKL_", "LD_PRELOAD")
    env = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    env |= {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    libraries = preloaded(os.environ)
    names = [Path(library).name for library in libraries]
    tcmalloc, openmp = find_library("tcmalloc_minimal"), venv_dir() / "lib" / "libiomp5.so"
    if tcmalloc and not any(TCMALLOC in name for name in names):
        libraries.append(tcmalloc)
    if openmp.exists() and openmp.name not in names:
        libraries.append(str(openmp))
    return env | ({"LD_PRELOAD": ":".join(dict.fromkeys(libraries))} if libraries else {})


def preloaded(env: Mapping[str, str]) -> list[str]:
    """Libraries, by names or paths; the loader takes spaces for colons."""
    return env.get("LD_PRELOAD", "").replace(":", " ").split()
