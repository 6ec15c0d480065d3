"""The loss of draft heads: against autograd over its formula and finite differences, with a draft vocabulary, and unrolled."""

import pytest
import torch
from helpers import tiny_qwen3

from atlas_rl.adapt import losses
from atlas_rl.adapt.losses import DEPTH_DECAY, LAMBDA_DECAY, PolicyEnds, lk_hybrid, unrolled_loss
from atlas_rl.drafters.heads import Windows
from atlas_rl.drafters.recurrent_head import RecurrentHead

VOCAB_IDS = torch.tensor([2, 3, 5, 11])


def logits(*dims: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(*dims, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_formula(
    draft: torch.Tensor, target: torch.Tensor, vocab_ids: torch.Tensor | None, lam: torch.Tensor | None = None
):
    """Loss, acceptance and lambda; a lambda that is given is held."""
    p, q = target.softmax(-1), draft.softmax(-1)
    if vocab_ids is not None:
        p = p[..., vocab_ids]
    alpha = torch.minimum(p, q).sum(-1)
    p_in_vocab = p / p.sum(-1, keepdim=True)
    kl = (p_in_vocab * (p_in_vocab / q).log()).sum(-1)
    lam = torch.exp(-LAMBDA_DECAY * alpha.detach()) if lam is None else lam
    return lam * kl + (1 - lam) * (1 - alpha), alpha, lam


@pytest.mark.parametrize("vocab_ids", [None, VOCAB_IDS])
def test_value_and_gradient(vocab_ids):
    target = logits(5, 13)
    draft = logits(5, 13 if vocab_ids is None else len(vocab_ids), seed=1).requires_grad_()
    loss, alpha = lk_hybrid(draft, target, vocab_ids)
    expected, expected_alpha, lam = by_formula(draft, target, vocab_ids)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(alpha, expected_alpha.detach())
    assert not alpha.requires_grad
    row_weights = torch.arange(1.0, 6.0, dtype=torch.float64)
    (grad,) = torch.autograd.grad((loss * row_weights).sum(), draft)
    torch.testing.assert_close(grad, torch.autograd.grad((expected * row_weights).sum(), draft)[0])
    eps = 1e-6
    for row, token in [(0, 0), (2, 3), (4, 1)]:
        moved = []
        for sign in (1, -1):
            shifted = draft.detach().clone()
            shifted[row, token] += sign * eps
            moved.append((by_formula(shifted, target, vocab_ids, lam)[0] * row_weights).sum())
        assert (moved[0] - moved[1]).item() / (2 * eps) == pytest.approx(grad[row, token].item(), abs=1e-7)


def test_acceptance_is_1_for_the_policy_itself_and_bounded_by_the_draft_vocabulary():
    target = logits(50, 13)
    loss, alpha = lk_hybrid(target.clone(), target)
    torch.testing.assert_close(alpha, torch.ones(50, dtype=torch.float64))
    torch.testing.assert_close(loss, torch.zeros(50, dtype=torch.float64))
    _, alpha = lk_hybrid(target[:, VOCAB_IDS], target, VOCAB_IDS)
    torch.testing.assert_close(alpha, target.softmax(-1)[:, VOCAB_IDS].sum(-1))
    _, alpha = lk_hybrid(logits(50, 13, seed=1, scale=30.0), logits(50, 13, scale=30.0))
    assert alpha.min() >= 0 and alpha.max() <= 1 + 1e-12


def test_probabilities_that_underflow_give_finite_gradients():
    target = torch.tensor([[0.0, -2000.0, -2000.0]])
    draft = torch.tensor([[-2000.0, 0.0, -2000.0]], requires_grad=True)
    loss, alpha = lk_hybrid(draft, target)
    loss.sum().backward()
    assert alpha.item() == 0 and loss.item() == pytest.approx(2000)
    torch.testing.assert_close(draft.grad, torch.tensor([[-1.0, 1.0, 0.0]]))


def random_windows(lens: list[int], width: int, hidden_size: int, num_layers: int) -> Windows:
    generator = torch.Generator().manual_seed(3)
    count = len(lens)
    return Windows(
        token_ids_BW=torch.randint(0, 97, (count, width + 1), generator=generator),
        hidden_BWD=torch.randn(count, width, hidden_size, generator=generator),
        tapped_BWLD=torch.randn(count, width, num_layers, hidden_size, generator=generator),
        positions_B=torch.tensor([0, 7, 20]),
        prompt_lens_B=torch.tensor([4, 9, 3]),
        seeds_B=torch.arange(count),
        lens_B=torch.tensor(lens),
    )


@pytest.mark.parametrize("at_once", [1, 2**18])
def test_unrolled_loss_is_the_weighted_mean_over_complete_guesses(at_once, monkeypatch):
    monkeypatch.setitem(losses.MAX_LOGITS, "cpu", at_once)
    model, depth = tiny_qwen3(), 3
    ends = PolicyEnds.of(model)
    head = RecurrentHead(hidden_size=64, layers=(0, 1))
    windows = random_windows([8, 5, 2], width=8, hidden_size=64, num_layers=2)
    loss, alpha_K = unrolled_loss(head, windows, depth, ends, temperature=0.7)
    states = head.unroll(windows, depth, ends.embedding_VD)
    expected, expected_alpha = 0.0, []
    for k in range(depth):
        places = windows.is_complete(depth)[:, :, k].nonzero().tolist()
        targets = torch.stack([windows.hidden_BWD[b, s + k + 1] for b, s in places])
        guesses = torch.stack([states[b, s, k] for b, s in places])
        of_guess, alpha, _ = by_formula(ends.logits(guesses) / 0.7, ends.logits(targets) / 0.7, None)
        expected = expected + DEPTH_DECAY**k * of_guess.mean()
        expected_alpha.append(alpha.mean())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(alpha_K, torch.stack(expected_alpha).detach())
    grads = torch.autograd.grad(loss, list(head.parameters()))
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected, list(head.parameters())), strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in model.parameters())


def test_unroll_is_start_and_steps():
    windows = random_windows([8, 8, 8], width=8, hidden_size=64, num_layers=2)
    head, ends = RecurrentHead(hidden_size=64, layers=(0, 1)), PolicyEnds.of(tiny_qwen3())
    states = head.unroll(windows, 3, ends.embedding_VD)
    assert states.shape == (3, 5, 3, 64)
    state = head.start(windows.tapped_BWLD[1, 2], windows.hidden_BWD[1, 2])
    for k in range(3):
        state = head.step(state, ends.embedding_VD[windows.token_ids_BW[1, 2 + 1 + k]])
        torch.testing.assert_close(states[1, 2, k], head.output(state))


def test_which_guesses_are_complete_is_computed_where_the_windows_are():
    """A device of its own, as a GPU is, to which tensors of the CPU do not go."""
    fields = {
        name: torch.empty(3, 8, dtype=torch.int64, device="meta")
        for name in ("token_ids_BW", "hidden_BWD", "tapped_BWLD")
    }
    rows = {
        name: torch.empty(3, dtype=torch.int64, device="meta")
        for name in ("positions_B", "prompt_lens_B", "seeds_B", "lens_B")
    }
    complete = Windows(**fields, **rows).is_complete(depth=3)
    assert complete.device.type == "meta" and complete.shape == (3, 5, 3)
