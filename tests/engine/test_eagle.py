"""The EAGLE drafter over a paged cache guesses what the training-time unroll of its head guesses, whatever the schedule."""

from __future__ import annotations

import pytest
import torch
from helpers import VOCAB_SIZE, make_engine, make_requests, tiny_llama
from transformers import LlamaForCausalLM

import atlas_rl.drafters.eagle as eagle
from atlas_rl.config import AtlasConfig, EngineConfig
from atlas_rl.drafters.base import Drafts
from atlas_rl.drafters.eagle import EagleDrafter, EagleHead
from atlas_rl.drafters.eagle_head import default_layers
from atlas_rl.drafters.heads import Windows
from atlas_rl.types import Rollout, SamplingParams

LAYERS = (0, 1, 2)
DEPTH = 4
SAMPLING = SamplingParams(temperature=1.0)


def make_policy(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    return tiny_llama(dtype, num_hidden_layers=4)


def make_head(policy: LlamaForCausalLM, **options) -> EagleHead:
    torch.manual_seed(1)
    return EagleHead.for_policy(policy.config, LAYERS, **options).to(policy.dtype)


class Recorded(EagleDrafter):
    """Keeps the states of every guess, and is away in steps of a pattern, as if another drafter were asked."""

    def __init__(self, head: EagleHead, away: int = 0) -> None:
        super().__init__(head)
        self.away, self.num_asked = away, 0
        self.drafts: dict[tuple, tuple[list[int], list[torch.Tensor]]] = {}
        """Guesses and states after the final norm, by seed, prompt and completion."""
        self.states: list[torch.Tensor] = []
        self.longest_backlog = 0

    def verified(self, rows, batch, num_right):
        super().verified(rows, batch, num_right)
        self.longest_backlog = max(self.longest_backlog, self.backlog_len)

    def propose(self, rows, max_lens, min_prob=0.0):
        self.num_asked += 1
        if self.away and self.num_asked % (self.away + 1):
            return Drafts(*(torch.zeros(len(rows), 1, dtype=t).numpy() for t in (torch.int64, torch.float64)))
        self.states = []
        drafts = super().propose(rows, max_lens, min_prob)
        lens = drafts.lens
        for depth, states in enumerate(self.states):
            drafted = [i for i in range(len(rows)) if lens[i] > depth]
            assert len(drafted) == len(states)
            for i, state in zip(drafted, states):
                key = (rows[i].noise_seed, tuple(rows[i].prompt_ids), tuple(rows[i].output_ids))
                guesses, kept = self.drafts.setdefault(key, ([], []))
                guesses.append(int(drafts.token_ids[i, depth]))
                kept.append(self.head.norm(state))
        return drafts

    def logits(self, states):
        self.states.append(states)
        return super().logits(states)


def run(policy, drafter, requests, **engine_options) -> tuple[list[Rollout], Recorded]:
    engine = make_engine(policy, AtlasConfig(lookahead=DEPTH, engine=EngineConfig(**engine_options)), drafter)
    rollouts = engine.generate(requests, SAMPLING)
    assert engine.stats.drafters["eagle"].proposed, "it was benched"
    assert drafter.kv_cache is None and not (drafter.rows or drafter.lives or drafter.backlog), "memory is given back"
    drafter.num_preemptions = engine.stats.preemptions
    return rollouts, drafter


@torch.no_grad()
def unrolled(policy, head, prompt, output, guesses) -> torch.Tensor:
    """States [K, D] of the draft that follows a prompt and a completion, by the unroll over one long window."""
    known = [*prompt, *output]
    start = len(known) - 2
    ids = torch.tensor([known])
    layers = policy(ids, output_hidden_states=True).hidden_states
    width = start + 1 + len(guesses)
    tapped = torch.zeros(1, width, len(LAYERS), head.hidden_size, dtype=policy.dtype)
    tapped[0, : start + 1] = torch.stack([layers[layer + 1][0, : start + 1] for layer in LAYERS], dim=1)
    windows = Windows(
        token_ids_BW=torch.tensor([[*known, *guesses]])[:, : width + 1],
        hidden_BWD=torch.zeros(1, width, head.hidden_size, dtype=policy.dtype),
        tapped_BWLD=tapped,
        positions_B=torch.zeros(1, dtype=torch.int64),
        prompt_lens_B=torch.tensor([len(prompt)]),
        seeds_B=torch.zeros(1, dtype=torch.int64),
        lens_B=torch.tensor([start + 1]),
    )
    return head.unroll(windows, len(guesses), policy.get_input_embeddings().weight)[0, start]


SCHEDULES = {
    "plain": {},
    "small blocks, prompts in chunks": {"block_size": 4, "max_prefill_tokens": 7},
    "preemption": {"block_size": 4, "kv_memory_gib": 70 * 4 * 2 * 4 * 2 * 16 * 8 / 2**30},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("norm_before_residual", "away"), [(False, 0), (True, 0), (False, 12)])
def test_serving_equals_the_unroll(schedule, norm_before_residual, away):
    policy = make_policy()
    head = make_head(policy, norm_before_residual=norm_before_residual)
    requests = make_requests(5, 3, max_new_tokens=40)
    _, drafter = run(policy, Recorded(head, away), requests, **SCHEDULES[schedule])
    assert len(drafter.drafts) > 20
    assert (drafter.num_preemptions > 0) == (schedule == "preemption")
    for (_, prompt, output), (guesses, states) in list(drafter.drafts.items())[:: 1 if away else 9]:
        expected = unrolled(policy, head, prompt, output, guesses)
        torch.testing.assert_close(torch.stack(states), expected, rtol=1e-6, atol=1e-6)


def test_float32_kernels_serve_the_same_states():
    policy = make_policy(torch.float32)
    head = make_head(policy)
    _, drafter = run(policy, Recorded(head), make_requests(4, 2, max_new_tokens=16))
    for (_, prompt, output), (guesses, states) in list(drafter.drafts.items())[::5]:
        expected = unrolled(policy, head, prompt, output, guesses)
        torch.testing.assert_close(torch.stack(states), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backlog", [64, 3])
def test_coming_back_is_as_never_having_left(monkeypatch, backlog):
    policy = make_policy()
    requests = make_requests(4, 2, max_new_tokens=30)
    rollouts, always = run(policy, Recorded(make_head(policy)), requests)
    monkeypatch.setattr(eagle, "MAX_BACKLOG", backlog)
    again, sometimes = run(policy, Recorded(make_head(policy), away=5), requests)
    assert [r.token_ids for r in again] == [r.token_ids for r in rollouts]
    assert sometimes.longest_backlog <= backlog + DEPTH
    common = always.drafts.keys() & sometimes.drafts.keys()
    assert len(common) > 20
    for key in common:
        assert sometimes.drafts[key][0] == always.drafts[key][0]
        torch.testing.assert_close(torch.stack(sometimes.drafts[key][1]), torch.stack(always.drafts[key][1]))


def test_tokens_are_those_of_plain_decoding():
    policy = make_policy()
    requests = make_requests(6, 2, max_new_tokens=30)
    plain = make_engine(policy).generate(requests, SAMPLING)
    drafted, _ = run(policy, Recorded(make_head(policy)), requests)
    assert [r.token_ids for r in drafted] == [r.token_ids for r in plain]


def test_own_head_draws_from_its_draft_vocabulary():
    policy = make_policy(torch.float32)
    head = make_head(policy, draft_vocab_size=10)
    head.draft_ids = torch.arange(10) * 7 + 3
    _, drafter = run(policy, Recorded(head), make_requests(3, 2))
    allowed = set(head.draft_ids.tolist())
    assert {token for guesses, _ in drafter.drafts.values() for token in guesses} <= allowed


def test_own_embedding_is_read_unless_it_is_a_copy_of_the_policys():
    policy = make_policy(torch.float32)
    other, copy = make_head(policy, own_embedding=True), make_head(policy, own_embedding=True)
    copy.embed_tokens.weight.data.copy_(policy.get_input_embeddings().weight)
    requests = make_requests(2, 2)
    _, drafter = run(policy, Recorded(other), requests)
    for (_, prompt, output), (guesses, states) in list(drafter.drafts.items())[::5]:
        expected = unrolled(policy, other, prompt, output, guesses)
        torch.testing.assert_close(torch.stack(states), expected, rtol=1e-3, atol=1e-4)
    run(policy, Recorded(copy), requests)
    assert copy.embed_tokens is None and other.embed_tokens is not None


def test_rows_stop_where_a_draft_is_not_worth_verifying():
    policy = make_policy(torch.float32)
    drafter = Recorded(make_head(policy))
    probs = []

    class Picky(type(drafter)):
        def propose(self, rows, max_lens, min_prob=0.0):
            drafts = EagleDrafter.propose(self, rows, max_lens, 0.3)
            probs.append(drafts.probs)
            return drafts

    drafter.__class__ = Picky
    make_engine(policy, AtlasConfig(lookahead=DEPTH), drafter).generate(make_requests(4, 2), SAMPLING)
    flat = torch.cat([torch.from_numpy(p).flatten() for p in probs])
    assert (flat[flat > 0] >= 0.3).all() and (flat == 0).any() and (flat > 0).any()


def test_padding_changes_no_start_before_it():
    policy = make_policy(torch.float32)
    head = make_head(policy)
    torch.manual_seed(2)
    width, length = 12, 7
    fields = {
        "token_ids_BW": torch.randint(VOCAB_SIZE, (1, width + 1)),
        "hidden_BWD": torch.randn(1, width, 64),
        "tapped_BWLD": torch.randn(1, width, len(LAYERS), 64),
        "positions_B": torch.tensor([5]),
        "prompt_lens_B": torch.tensor([3]),
        "seeds_B": torch.tensor([0]),
        "lens_B": torch.tensor([length]),
    }
    noisy = fields | {"tapped_BWLD": fields["tapped_BWLD"].clone()}
    noisy["tapped_BWLD"][:, length:] = 100.0
    embedding = policy.get_input_embeddings().weight
    states = head.unroll(Windows(**fields), 3, embedding)
    assert states.shape == (1, width - 3, 3, 64)
    assert torch.equal(states[:, :length], head.unroll(Windows(**noisy), 3, embedding)[:, :length])
    states.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        ({"hidden_size": 32, "num_hidden_layers": 4}, "hidden size"),
        ({"vocab_size": 50, "num_hidden_layers": 4}, "tokens"),
        ({"num_hidden_layers": 2}, "layers"),
    ],
)
def test_a_head_of_another_policy_is_refused(overrides, fault):
    head = make_head(make_policy(torch.float32))
    with pytest.raises(ValueError, match=fault):
        make_engine(tiny_llama(**overrides), drafter=EagleDrafter(head))


def test_layers_that_are_read():
    assert default_layers(32) == (1, 15, 28)
    assert default_layers(7) == (1, 2, 3)
    assert default_layers(6) == (3, 4, 5)
    assert default_layers(2) == (0, 1)
