"""Compiles kernels for real, in a process without the interpreter; needs no GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

ARCHITECTURES = (80, 90)
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""That a program may take on A100 and H100."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kernel as a launcher calls it. Types are Triton's: "*bf16", "i32", "fp32"; pointers are taken to be 16-byte aligned.

    divisible: integers that are multiples of 16, for which a launch compiles code of its own.
    """

    module: str
    kernel: str
    arguments: dict[str, str]
    constants: dict[str, int | float | bool | None] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3


def check_compiles(cases: list[Case]) -> None:
    """Assert that each case compiles for every architecture, fits its shared memory, and spills no register."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, json.dumps([asdict(case) for case in cases])]
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(ARCHITECTURES) * len(cases)
    for line in lines:
        assert line["shared"] <= SHARED_BYTES[line["architecture"]], line
        assert line["spilled"] == 0, line


def _compile(case: Case, architecture: int) -> dict[str, int | str]:
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(case.module), case.kernel)
    places = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    pointers = [name for name, kind in case.arguments.items() if kind.startswith("*")]
    aligned = {places[name]: [["tt.divisibility", 16]] for name in [*pointers, *case.divisible]}
    source = ASTSource(
        kernel,
        case.arguments | dict.fromkeys(case.constants, "constexpr"),
        {places[name]: value for name, value in case.constants.items()},
        attrs=aligned,
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return {
        "kernel": case.kernel,
        "architecture": architecture,
        "shared": compiled.metadata.shared,
        "spilled": _spilled_bytes(compiled.asm["ptx"], architecture),
    }


def _spilled_bytes(ptx: str, architecture: int) -> int:
    """What the assembler that comes with Triton says of a kernel's registers."""
    import triton.backends.nvidia as nvidia

    assembler = Path(nvidia.__file__).parent / "bin" / "ptxas"
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    command = [str(assembler), "-v", f"-arch={target}", "-o", os.devnull, "-"]
    result = subprocess.run(command, input=ptx, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr)
    return sum(map(int, re.findall(r"(\d+) bytes spill", result.stderr)))


if __name__ == "__main__":
    for description in json.loads(sys.argv[1]):
        for architecture in ARCHITECTURES:
            print(json.dumps(_compile(Case(**description), architecture)), flush=True)
