"""Say what works on this machine, what does not and why.

Looks at Python, torch, the accelerator, Triton and the libraries around TRL, and lets the engine generate with a tiny
random model, compared with `model.generate`. Then it measures what the controller decides by: milliseconds of a decode step of
the shipped policy, by rows and lookahead, and of its drafters. Exit code 0 if all that Atlas-RL needs works, 1 if not.

example:
  atlas-rl doctor
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, NamedTuple

from atlas_rl.config import CONFIGS

if TYPE_CHECKING:
    from rich.table import Table

OK, OPTIONAL, BROKEN = "works", "absent", "broken"
STYLES = {OK: "green", OPTIONAL: "yellow", BROKEN: "bold red"}

LIBRARIES = ("transformers", "trl", "accelerate", "datasets")
OPTIONAL_LIBRARIES = {
    "peft": "LoRA policies: pip install 'atlas-rl[peft]'",
    "deepspeed": "ZeRO: pip install 'atlas-rl[deepspeed]'",
    "reasoning_gym": "the embedded tasks: pip install 'atlas-rl[tasks]'",
    "kernels": "Hugging Face's kernel hub; Atlas-RL does not need it",
}


class Finding(NamedTuple):
    name: str
    status: str
    detail: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Atlas-RL on this machine", title_justify="left", padding=(0, 1))
    for column in ("", "status", "detail"):
        table.add_column(column, no_wrap=column == "status")
    findings = list(examine())
    for name, status, detail in findings:
        table.add_row(name, Text(status, STYLES[status]), Text(detail))
    Console().print(table)
    for row_table in _costs():
        Console().print(row_table)
    broken = [finding.name for finding in findings if finding.status == BROKEN]
    print(f"Does not work: {', '.join(broken)}" if broken else "Everything that Atlas-RL needs works here.")
    return 1 if broken else 0


def examine() -> Iterator[Finding]:
    yield _python()
    yield _probe("memory", _memory)
    found = _probe("torch", _torch)
    yield found
    if found.status == OK:
        kernels = _probe("CPU kernels", _cpu_kernels)  # they only make it faster
        yield kernels if kernels.status == OK else kernels._replace(status=OPTIONAL)
        accelerator = _accelerator()
        yield accelerator
        yield _distributed()
        yield _triton()
        if accelerator.status == OK and importlib.util.find_spec("triton") is not None:
            kernels = _probe("GPU kernels", _gpu_kernels)  # torch stands in for them
            yield kernels if kernels.status == OK else kernels._replace(status=OPTIONAL)
    for name in LIBRARIES:
        yield _library(name, BROKEN, "missing: pip install atlas-rl")
    for name, purpose in OPTIONAL_LIBRARIES.items():
        yield _library(name, OPTIONAL, f"not installed ({purpose})")
    compiler = shutil.which("g++") or shutil.which("c++")
    yield Finding("C++ compiler", OK if compiler else OPTIONAL, compiler or "none: DeepSpeed on CPUs builds with one")
    yield Finding("configs", OK, str(CONFIGS))
    yield _probe("engine", _engine)


def _costs() -> Iterator[Table]:
    """The controller's cost table, measured here and now; nothing where the engine does not work."""
    from rich.table import Table

    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as transformers_logging

        from atlas_rl.config import AtlasConfig
        from atlas_rl.drafters import build_drafters
        from atlas_rl.engine.calibrate import calibrate, cost_table
        from atlas_rl.engine.engine import RolloutEngine
        from atlas_rl.engine.policy_view import PolicyView
        from atlas_rl.tasks import policy_path

        transformers_logging.disable_progress_bar()
        config = AtlasConfig()
        view = PolicyView(AutoModelForCausalLM.from_pretrained(policy_path()).eval())
        engine = RolloutEngine(view, config, build_drafters(config, view).all)
        calibrate(engine, max_seconds=10.0)
    except Exception:  # the findings above say what does not work
        return
    title, *rows = cost_table(engine)
    table = Table(title="Milliseconds of a decode step, shipped policy", title_justify="left", padding=(0, 1))
    for name in title:
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        table.add_row(*row)
    yield table


def _probe(name: str, check: Callable[[], str]) -> Finding:
    """A check returns what it saw; whatever it raises is the finding."""
    try:
        return Finding(name, OK, check())
    except Exception as error:
        return Finding(name, BROKEN, f"{type(error).__name__}: {error}")


def _python() -> Finding:
    status = OK if sys.version_info >= (3, 10) else BROKEN
    return Finding("Python", status, f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _memory() -> str:
    import psutil  # comes with accelerate

    return f"{psutil.virtual_memory().available / 2**30:.1f} GiB free, {os.cpu_count()} CPUs"


def _torch() -> str:
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    return f"{torch.__version__}, {capability} on CPU, {torch.get_num_threads()} threads"


def _cpu_kernels() -> str:
    """Compiled here and now if they never were."""
    from atlas_kernels import cpu
    from atlas_rl.drafters.suffix import SuffixDrafter

    reasons = {
        "fused layers and packed linears": cpu.unavailable_reason(),
        "suffix drafter": SuffixDrafter.unavailable_reason(),
    }
    missing = [f"no {name}: {reason}" for name, reason in reasons.items() if reason is not None]
    if missing:
        raise RuntimeError("; ".join(missing))
    return f"compiled: {', '.join(reasons)}"


def _accelerator() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("accelerator", OPTIONAL, "none: rollouts and training run on the CPU")
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return Finding(
        "accelerator", OK, f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, {memory:.0f} GiB"
    )


def _distributed() -> Finding:
    """What several processes have to talk over, and how many devices they would find."""
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        return Finding("distributed", OPTIONAL, "this torch is built without it: runs of one process only")
    checks = {"nccl": dist.is_nccl_available, "gloo": dist.is_gloo_available, "mpi": dist.is_mpi_available}
    backends = [name for name, is_there in checks.items() if is_there()]
    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    where = f"{devices} accelerator{'s' * (devices > 1)}" if devices else "on CPUs"
    deepspeed = _library("DeepSpeed", OPTIONAL, "not installed")
    sharding = f"DeepSpeed {deepspeed.detail}"
    if deepspeed.status == OK and not devices and shutil.which("ninja") is None:
        sharding += " (on CPUs it needs ninja: pip install ninja)"
    return Finding("distributed", OK if backends else OPTIONAL, f"{', '.join(backends)}; {where}; {sharding}")


def _triton() -> Finding:
    import torch

    if importlib.util.find_spec("triton") is None:
        return Finding("Triton", OPTIONAL, "not installed: kernels run as plain torch")
    from atlas_rl.cli import triton_probe

    name = f"Triton {version('triton')}"
    if torch.cuda.is_available():
        return _probe(name, triton_probe.run_on_accelerator)
    return Finding(name, OPTIONAL, _probe(name, triton_probe.compile_for_h100).detail)


def _gpu_kernels() -> str:
    """Compiled here and now: the first time takes a minute."""
    from atlas_rl.cli import triton_probe

    return triton_probe.check_kernels()


def _library(name: str, status_if_missing: str, remedy: str) -> Finding:
    try:
        return Finding(name, OK, version(name))
    except PackageNotFoundError:
        return Finding(name, status_if_missing, remedy)


def _engine() -> str:
    """Greedy completions of a tiny random Llama, by the engine and by transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from atlas_rl import AtlasRolloutGenerator, SamplingParams

    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    torch.random.set_rng_state(state)
    prompt, length = list(range(5, 25)), 32
    expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=length, min_new_tokens=length)
    sampling = SamplingParams(temperature=0, max_new_tokens=length, ignore_eos=True)
    with AtlasRolloutGenerator().attach(model) as atlas:
        (rollout,) = atlas.generate([prompt], sampling=sampling)
    if rollout.token_ids != expected[0, len(prompt) :].tolist():
        raise RuntimeError("greedy tokens of a tiny Llama differ from model.generate: please report this machine")
    return f"{length} greedy tokens of a tiny Llama equal model.generate's"
