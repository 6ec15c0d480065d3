"""Section `kernels`: each against its torch twin at production shapes, then the speed of those that decoding waits for.

Speeds are over inputs that lie in memory, not in L2, in captured graphs; bytes are those that a kernel cannot do without.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import atlas_kernels
from atlas_kernels import reference, self_check
from atlas_kernels.checks import Inputs
from atlas_kernels.launching import INTERPRETED
from atlas_kernels.layer_checks import linear_arguments
from atlas_kernels.linears import ROUTES
from atlas_rl.bench.gpu.section import Section

ATTENTION_TARGET, SAMPLE_TARGET = 0.75, 0.70
DTYPE = torch.bfloat16


def run(section: Section) -> None:
    plan = section.plan
    if section.machine.is_gpu or INTERPRETED:
        reason = section.part("unavailable", lambda: atlas_kernels.unavailable_reason(section.machine.device), needs=5)
        if reason is not None:  # torch stands in for them, and all that follows is measured with it
            section.errors["unavailable"] = reason
        found = section.part("correct", lambda: correctness(section), needs=10)
        wrong = (
            None if found is None else sum(isinstance(error, str) for row in found.values() for error in row.values())
        )
    else:
        section.skipped["correct"], wrong = "Triton's kernels run on a CPU with TRITON_INTERPRET=1 only", None
    section.judge("kernels that differ from their twins", wrong, 0, at_least=False)
    for num_queries in (1, plan.sizes.num_queries):
        for num_rows in plan.attention_rows:
            name = f"paged_attention, {num_rows} rows of {plan.sizes.context}, Q = {num_queries}"
            row = section.part(name, lambda n=num_rows, q=num_queries: attention_speed(section, n, q))
            if num_queries == 1:
                section.judge(f"{name}: share of copy bandwidth", row and row["share"], ATTENTION_TARGET)
    for num_rows in plan.sample_rows:
        name = f"coupled_sample, {num_rows} rows of {plan.sizes.vocab}"
        row = section.part(name, lambda n=num_rows: sample_speed(section, n))
        if num_rows == max(plan.sample_rows):
            section.judge(f"{name}: share of copy bandwidth", row and row["share"], SAMPLE_TARGET)
    section.part("lk_hybrid", lambda: distill_speed(section), needs=3)
    section.part("filter_thresholds", lambda: filter_speed(section), needs=3)
    for num_rows in plan.linear_rows:
        section.part(f"linears, {num_rows} rows", lambda n=num_rows: linear_speed(section, n), needs=8)
    section.part("routes of linears", routes)


def correctness(section: Section) -> dict[str, dict[str, float | str]]:
    """By op and dtype: the error relative to the size of the results, or what is wrong."""
    device, sizes = section.machine.device, section.plan.sizes
    found: dict[str, dict[str, float | str]] = {}
    for name in self_check.MODULES:
        # every route of every linear is compared with torch when it is first used: here it is enough to do so once per kind
        own = replace(sizes, linears=sizes.linears[:8]) if name == "fused_linear" else sizes
        for dtype in self_check.dtypes_of(name):
            if name == "fused_linear" and dtype == torch.float32:
                own = replace(own, linears=own.linears[-1:])
            try:
                error: float | str = self_check.error_of(name, device, dtype, own)
            except Exception as wrong:  # one that does not work is no reason not to look at the next
                error = f"{type(wrong).__name__}: {str(wrong).strip()[:300]}"
            found.setdefault(name, {})[str(dtype).removeprefix("torch.")] = error
    section.machine.release()
    return found


def attention_speed(section: Section, num_rows: int, num_queries: int) -> dict[str, float]:
    machine, sizes = section.machine, replace(section.plan.sizes, num_rows=num_rows, num_queries=num_queries)
    inputs = Inputs(sizes, machine.device, DTYPE)
    elements = 2 * num_rows * sizes.context * sizes.num_kv_heads * sizes.head_dim
    num_tokens = num_rows * num_queries
    query = inputs.randn(num_tokens, sizes.num_heads, sizes.head_dim)
    starts = torch.full((num_rows,), sizes.context - num_queries, device=machine.device)
    lens = torch.full((num_rows,), num_queries, device=machine.device)
    places = {"query_starts_R": lens.cumsum(0) - lens, "max_query_len": num_queries}
    calls = []
    for _ in range(machine.num_buffers(2 * elements)):
        rows = (inputs.cache(), inputs.tables(), starts, lens, sizes.head_dim**-0.5)
        calls.append(lambda rows=rows: atlas_kernels.paged_attention(query, *rows, **places))
    return speed(section, calls, 2 * elements + 2 * query.nbytes)


def sample_speed(section: Section, num_rows: int) -> dict[str, float]:
    """Against the twin in plain torch as well, which is what a sampler without a kernel would take."""
    machine, vocab = section.machine, section.plan.sizes.vocab
    inputs = Inputs(section.plan.sizes, machine.device, DTYPE)
    num_buffers = machine.num_buffers(2 * num_rows * vocab)
    logits, keys = inputs.randn(num_buffers * num_rows, vocab) * 3, inputs.keys(num_rows)
    calls = [lambda x=x: atlas_kernels.coupled_sample(x, keys, 1.0) for x in logits.split(num_rows)]
    twins = [lambda x=x: reference.coupled_sample(x, keys, 1.0) for x in logits.split(num_rows)[:2]]
    row = speed(section, calls, 2 * num_rows * vocab)
    return row | {"over_torch": machine.seconds(twins, section.plan.repeats, captured=False) / row["seconds"]}


def filter_speed(section: Section) -> dict[str, float]:
    """Thresholds of top-p, over what torch takes to sort the same rows."""
    machine, vocab, num_rows = section.machine, section.plan.sizes.vocab, max(section.plan.sample_rows)
    logits = Inputs(section.plan.sizes, machine.device, DTYPE).randn(num_rows, vocab) * 3
    repeats = section.plan.repeats
    ours = machine.seconds([lambda: atlas_kernels.filter_thresholds(logits, 1.0, top_p=0.9)], repeats)
    top_k = machine.seconds([lambda: atlas_kernels.filter_thresholds(logits, 1.0, top_k=50)], repeats)
    sort = machine.seconds([lambda: torch.sort(logits.float())], repeats, captured=False)
    return {
        "rows": num_rows,
        "top_p_seconds": ours,
        "top_k_seconds": top_k,
        "sort_seconds": sort,
        "over_sort": sort / ours,
    }


def distill_speed(section: Section) -> dict[str, float]:
    """The loss with its gradient, over autograd through the same formula in torch: seconds, and bytes beyond the logits."""
    machine, plan = section.machine, section.plan
    inputs = Inputs(plan.sizes, machine.device, torch.float32)
    draft, target = (inputs.randn(plan.distill_rows, plan.distill_vocab) * 2 for _ in range(2))

    def ours() -> Any:
        return atlas_kernels.lk_hybrid(draft, target)

    def eager() -> Any:
        leaf = draft.detach().requires_grad_()
        log_p, log_q = target.log_softmax(-1), leaf.log_softmax(-1)
        alpha = torch.minimum(log_p.exp(), log_q.exp()).sum(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
        weight = torch.exp(-3.0 * alpha.detach())
        loss = weight * divergence + (1 - weight) * (1 - alpha)
        return loss, torch.autograd.grad(loss.sum(), leaf)

    (loss, _, grad), (expected_loss, (expected_grad,)) = ours(), eager()
    row = {
        "loss_error": float((loss - expected_loss.detach()).abs().max()),
        "grad_error": float((grad - expected_grad).norm() / expected_grad.norm()),
        "seconds": machine.seconds([ours], plan.repeats, captured=False),
        "eager_seconds": machine.seconds([eager], plan.repeats, captured=False),
        "bytes": machine.peak_bytes(ours),
        "eager_bytes": machine.peak_bytes(eager),
    }
    if not (row["loss_error"] < 1e-3 and row["grad_error"] < 1e-3):
        raise ArithmeticError(f"lk_hybrid is off: {row}")
    return row | {"over_eager": row["eager_seconds"] / row["seconds"]}


def linear_speed(section: Section, num_rows: int) -> dict[str, dict[str, float]]:
    """By kind of linear of a layer, and of the output head, by the fastest route."""
    machine, found = section.machine, {}
    for kind in ("qkv", "out", "gate_up", "down", "head"):
        inputs = Inputs(section.plan.sizes, machine.device, DTYPE)
        arguments = linear_arguments(inputs, num_rows, kind)
        nbytes = sum(weight.nbytes for weight in arguments["weights"])
        calls = []
        for _ in range(machine.num_buffers(nbytes)):
            own = arguments | {"weights": [weight.clone() for weight in arguments["weights"]]}
            calls.append(lambda own=own: atlas_kernels.fused_linear(**own))
        found[kind] = speed(section, calls, nbytes)
        del calls, own
        machine.release()
    return found


def routes() -> dict[str, dict[str, Any]]:
    """What `fused_linear` has measured so far: by kind of call, the choice and the seconds of every route."""
    return {
        str(key): {"chosen": str(route), "seconds": ROUTES.seconds.get(key)} for key, route in ROUTES.chosen.items()
    }


def speed(section: Section, calls: list[Callable[[], Any]], nbytes: int) -> dict[str, float]:
    seconds = section.machine.seconds(calls, section.plan.repeats)
    rate = nbytes / seconds
    share = rate / section.copy_rate()
    return {"seconds": seconds, "bytes": nbytes, "bytes_per_s": rate, "share": share if math.isfinite(share) else 0.0}
