"""The drafters' loss: the kernel against its twin, the twin against autograd over the formula in float64."""

from __future__ import annotations

import pytest
import torch
from compiling import Case, check_compiles

import atlas_kernels
from atlas_kernels import reference

triton = pytest.importorskip("triton")

DTYPES = [(torch.float32, 2e-5, 1e-4), (torch.float16, 1e-3, 2e-3), (torch.bfloat16, 1e-2, 1e-2)]
"""Of the logits; atol, rtol of the gradient, which is rounded to it."""


def make_logits(num_rows: int, vocab_size: int, drafted: int | None = None, scale: float = 2.0):
    """A drafter's logits that resemble the target's, the target's, and the ids of the draft vocabulary."""
    generator = torch.Generator().manual_seed(num_rows + vocab_size)
    target = scale * torch.randn(num_rows, vocab_size, generator=generator)
    ids = None if drafted is None else torch.randperm(vocab_size, generator=generator)[:drafted]
    near = target if ids is None else target[:, ids]
    return near + scale / 4 * torch.randn(near.shape, generator=generator), target, ids


def by_formula(draft: torch.Tensor, target: torch.Tensor, ids: torch.Tensor | None, decay: float):
    """Loss and acceptance in float64, plainly."""
    p, q = target.double().softmax(-1), draft.softmax(-1)
    p = p if ids is None else p[:, ids]
    near = p / p.sum(-1, keepdim=True)
    alpha = torch.minimum(p, q).sum(-1)
    lam = torch.exp(-decay * alpha.detach())
    return lam * (near * (near.log() - q.log())).sum(-1) + (1 - lam) * (1 - alpha), alpha.detach()


@pytest.mark.parametrize(("dtype", "atol", "rtol"), DTYPES)
@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "drafted"),
    [(0, 50, None), (1, 1, None), (3, 2048, None), (2, 5003, None), (2, 4500, 3001), (3, 97, 8)],
)
def test_kernel_equals_twin(num_rows, vocab_size, drafted, dtype, atol, rtol):
    from atlas_kernels import distill

    draft, target, ids = make_logits(num_rows, vocab_size, drafted)
    draft, target = draft.to(dtype), target.to(dtype)
    for with_grad in (True, False):
        loss, alpha, grad = distill.lk_hybrid(draft, target, ids, lambda_decay=2.0, with_grad=with_grad)
        expected = reference.lk_hybrid(draft, target, ids, lambda_decay=2.0, with_grad=with_grad)
        torch.testing.assert_close(loss, expected[0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(alpha, expected[1], atol=2e-5, rtol=1e-4)
        if with_grad:
            scale = 1 if num_rows == 0 else expected[2].abs().max().item()
            torch.testing.assert_close(grad, expected[2], atol=atol * scale, rtol=rtol)
        else:
            assert grad is None and expected[2] is None


@pytest.mark.parametrize("drafted", [None, 40])
def test_both_equal_autograd_over_the_formula(drafted, monkeypatch):
    draft, target, ids = make_logits(5, 300, drafted)
    exact = draft.double().requires_grad_()
    expected, alpha = by_formula(exact, target, ids, 3.0)
    (grad,) = torch.autograd.grad(expected.sum(), exact)
    assert alpha.max() < 0.95  # losses of both kinds
    for everywhere, tolerance in ((False, 1e-5), (True, 1e-5)):
        monkeypatch.setattr(atlas_kernels, "triton_everywhere", everywhere)
        got = atlas_kernels.lk_hybrid(draft, target, ids)
        for value, exact_value in zip(got, (expected.detach(), alpha, grad), strict=True):
            torch.testing.assert_close(value.double(), exact_value, atol=tolerance, rtol=1e-4)
    got = atlas_kernels.lk_hybrid(exact.detach(), target.double(), ids)
    torch.testing.assert_close(got, (expected.detach(), alpha, grad))


@pytest.mark.parametrize("scale", [30.0, 1000.0])
def test_rows_of_extreme_logits(scale: float):
    from atlas_kernels import distill

    draft, target, ids = make_logits(3, 2500, 2100, scale)
    draft[0], draft[1] = -draft[0], 0.0
    got, expected = distill.lk_hybrid(draft, target, ids), reference.lk_hybrid(draft, target, ids)
    assert all(value.isfinite().all() for value in got)
    for value, exact_value in zip(got, expected, strict=True):
        torch.testing.assert_close(value, exact_value, atol=1e-5, rtol=1e-4)


def test_forbidden_tokens_take_no_part():
    """A target's -inf is a probability of 0, in the vocabulary's first block and in a whole one."""
    from atlas_kernels import distill

    draft, target, _ = make_logits(2, 6000)
    forbidden = torch.zeros(6000, dtype=torch.bool)
    forbidden[:2100] = True
    target[:, forbidden] = draft[:, forbidden] = -torch.inf
    loss, alpha, grad = distill.lk_hybrid(draft, target)
    expected = reference.lk_hybrid(draft[:, ~forbidden], target[:, ~forbidden])
    torch.testing.assert_close((loss, alpha, grad[:, ~forbidden]), expected, atol=1e-5, rtol=1e-4)
    assert (grad[:, forbidden] == 0).all()


@pytest.mark.parametrize("everywhere", [False, True])
def test_the_trainers_loss_takes_any_leading_dimensions(everywhere: bool, monkeypatch):
    from atlas_rl.adapt import losses

    monkeypatch.setattr(atlas_kernels, "triton_everywhere", everywhere)
    draft, target, ids = make_logits(6, 70, 20)
    rows = draft.clone().requires_grad_()
    loss, alpha = losses.lk_hybrid(rows, target, ids)
    weights = torch.arange(6.0)
    (loss * weights).sum().backward()
    shaped = draft.view(2, 3, 20).clone().requires_grad_()
    loss_23, alpha_23 = losses.lk_hybrid(shaped, target.view(2, 3, 70), ids)
    (loss_23 * weights.view(2, 3)).sum().backward()
    assert torch.equal(loss_23.view(6), loss) and torch.equal(alpha_23.view(6), alpha)
    assert torch.equal(shaped.grad.view(6, 20), rows.grad) and not alpha_23.requires_grad
    exact = draft.double().requires_grad_()
    (by_formula(exact, target, ids, losses.LAMBDA_DECAY)[0] * weights).sum().backward()
    torch.testing.assert_close(rows.grad.double(), exact.grad, atol=1e-5, rtol=1e-4)


def test_compiles_for_ampere_and_hopper():
    from atlas_kernels import distill

    cases = []
    for dtype, has_ids, has_grad in (
        ("bf16", True, True),
        ("fp32", True, True),
        ("bf16", False, True),
        ("fp32", False, False),
    ):
        pointers = {"draft_ptr": f"*{dtype}", "target_ptr": f"*{dtype}", "loss_ptr": "*fp32", "alpha_ptr": "*fp32"}
        optional = {"ids_ptr": "*i64" if has_ids else None, "grad_ptr": f"*{dtype}" if has_grad else None}
        sizes = {"num_drafted": "i32", "vocab_size": "i32", "lambda_decay": "fp32"}
        cases.append(
            Case(
                module="atlas_kernels.distill",
                kernel="lk_hybrid_kernel",
                arguments=pointers | sizes | {name: kind for name, kind in optional.items() if kind},
                constants={"BLOCK": distill.BLOCK} | {name: None for name, kind in optional.items() if not kind},
                divisible=("num_drafted", "vocab_size"),
                num_warps=distill.NUM_WARPS,
            )
        )
    check_compiles(cases)
