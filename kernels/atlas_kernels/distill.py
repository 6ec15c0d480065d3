"""The loss that drafters are trained on, with its gradient, and no distribution over the vocabulary in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK, NUM_WARPS = 2048, 8


@triton.jit
def add_exponentials(highest, sums, x):
    """Online log-sum-exp: sums of exp(x - highest), kept apart by place in the block."""
    higher = tl.maximum(highest, tl.max(x, 0))
    return higher, sums * tl.exp(highest - higher) + tl.exp(x - higher)


@triton.jit
def load_pair(draft_ptr, target_ptr, ids_ptr, place, num_drafted):
    """A block of a row's draft logits, and the target's of the same tokens; -inf past the end."""
    inside = place < num_drafted
    draft = tl.load(draft_ptr + place, mask=inside, other=-float("inf")).to(tl.float32)
    token = place
    if ids_ptr is not None:
        token = tl.load(ids_ptr + place, mask=inside, other=0)
    return draft, tl.load(target_ptr + token, mask=inside, other=-float("inf")).to(tl.float32)


@triton.jit
def lk_hybrid_kernel(
    draft_ptr,
    target_ptr,
    ids_ptr,
    loss_ptr,
    alpha_ptr,
    grad_ptr,
    num_drafted,
    vocab_size,
    lambda_decay,
    BLOCK: tl.constexpr,
):
    """`reference.lk_hybrid` of a row. Grid: (rows,).

    Three passes over the logits: their log-sum-exps; acceptance, KL and R; the gradient

        lambda (q - p') + (1 - lambda) q (R - 1[q < p]),      R = sum of q where q < p
    """
    row = tl.program_id(0).to(tl.int64)
    draft_ptr += row * num_drafted
    target_ptr += row * vocab_size
    offsets = tl.arange(0, BLOCK)
    lowest, zeros = tl.full([], -3.0e38, tl.float32), tl.full([BLOCK], 0.0, tl.float32)
    draft_highest, draft_sums = lowest, zeros
    near_highest, near_sums = lowest, zeros  # of the target within the draft vocabulary
    for start in range(0, num_drafted, BLOCK):
        draft, target = load_pair(draft_ptr, target_ptr, ids_ptr, start + offsets, num_drafted)
        draft_highest, draft_sums = add_exponentials(draft_highest, draft_sums, draft)
        near_highest, near_sums = add_exponentials(near_highest, near_sums, target)
    log_q_total = draft_highest + tl.log(tl.sum(draft_sums, 0))
    log_near_total = near_highest + tl.log(tl.sum(near_sums, 0))
    log_p_total = log_near_total
    if ids_ptr is not None:
        highest, sums = lowest, zeros
        for start in range(0, vocab_size, BLOCK):
            place = start + offsets
            target = tl.load(target_ptr + place, mask=place < vocab_size, other=-float("inf")).to(tl.float32)
            highest, sums = add_exponentials(highest, sums, target)
        log_p_total = highest + tl.log(tl.sum(sums, 0))

    shared, divergence, below = zeros, zeros, zeros
    for start in range(0, num_drafted, BLOCK):
        draft, target = load_pair(draft_ptr, target_ptr, ids_ptr, start + offsets, num_drafted)
        log_q, log_near = draft - log_q_total, target - log_near_total
        p, q, near = tl.exp(target - log_p_total), tl.exp(log_q), tl.exp(log_near)
        shared += tl.minimum(p, q)
        divergence += tl.where(near > 0, near * (log_near - log_q), 0.0)
        below += tl.where(q < p, q, 0.0)
    alpha, kl, sum_below = tl.sum(shared, 0), tl.sum(divergence, 0), tl.sum(below, 0)
    lam = tl.exp(-lambda_decay * alpha)
    tl.store(loss_ptr + row, lam * kl + (1 - lam) * (1 - alpha))
    tl.store(alpha_ptr + row, alpha)

    if grad_ptr is not None:
        grad_ptr += row * num_drafted
        for start in range(0, num_drafted, BLOCK):
            place = start + offsets
            draft, target = load_pair(draft_ptr, target_ptr, ids_ptr, place, num_drafted)
            p, q, near = tl.exp(target - log_p_total), tl.exp(draft - log_q_total), tl.exp(target - log_near_total)
            grad = lam * (q - near) + (1 - lam) * q * (sum_below - tl.where(q < p, 1.0, 0.0))
            tl.store(grad_ptr + place, grad.to(grad_ptr.dtype.element_ty), mask=place < num_drafted)


def lk_hybrid(
    draft_logits_NV: torch.Tensor,
    target_logits_NF: torch.Tensor,
    vocab_ids_V: torch.Tensor | None = None,
    *,
    lambda_decay: float = 3.0,
    with_grad: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Same as `reference.lk_hybrid`. Bound by reading the logits three times (F - V of a row once) and writing the gradient."""
    draft_logits_NV, target_logits_NF = draft_logits_NV.contiguous(), target_logits_NF.contiguous()
    (num_rows, num_drafted), vocab_size = draft_logits_NV.shape, target_logits_NF.shape[1]
    loss_N, alpha_N = torch.empty(2, num_rows, dtype=torch.float32, device=draft_logits_NV.device)
    grad_NV = torch.empty_like(draft_logits_NV) if with_grad else None
    if num_rows:
        lk_hybrid_kernel[(num_rows,)](
            draft_logits_NV,
            target_logits_NF,
            vocab_ids_V,
            loss_N,
            alpha_N,
            grad_NV,
            num_drafted,
            vocab_size,
            lambda_decay,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    return loss_N, alpha_N, grad_NV
