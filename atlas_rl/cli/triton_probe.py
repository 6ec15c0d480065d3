"""Does Triton compile, and run, on this machine? One kernel, compiled for the accelerator here or else for an H100."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def double_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask=mask) * 2, mask=mask)


def run_on_accelerator() -> str:
    x = torch.arange(1000, dtype=torch.float32, device="cuda")
    out = torch.empty_like(x)
    double_kernel[(triton.cdiv(x.numel(), 256),)](x, out, x.numel(), BLOCK=256)
    if not torch.equal(out, 2 * x):
        raise RuntimeError("a kernel compiled, but its result is wrong")
    return "a kernel compiled and ran"


def check_kernels() -> str:
    """Of ours, each on small inputs."""
    from atlas_kernels.self_check import MODULES, failures

    wrong = failures(torch.device("cuda", torch.cuda.current_device()))
    if wrong:
        raise RuntimeError(
            "; ".join(f"{name}: {reason}" for name, reason in wrong.items()) + " (torch stands in for all)"
        )
    return f"{len(MODULES)} kernels compute what their torch twins compute"


def compile_for_h100() -> str:
    """Needs no accelerator: ptxas comes with Triton."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {"x_ptr": "*fp32", "out_ptr": "*fp32", "size": "i32", "BLOCK": "constexpr"}
    source = ASTSource(fn=double_kernel, signature=signature, constexprs={"BLOCK": 256})
    triton.compile(source, target=GPUTarget("cuda", 90, 32))
    return "compiles for sm_90, but nothing here runs it: kernels run as plain torch"
