"""The draft-model drafter: a model that equals the policy is right nearly always, and never changes a token."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from helpers import make_engine, make_requests, tiny_llama, tiny_qwen3

from atlas_rl.config import AtlasConfig, EngineConfig
from atlas_rl.drafters.base import Drafts
from atlas_rl.drafters.draft_model import MAX_PIECE, DraftModelDrafter
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.tasks import policy_path
from atlas_rl.types import SamplingParams

SCHEDULES = {
    "plain": {},
    "small blocks, prompts in chunks": {"block_size": 4, "max_prefill_tokens": 7},
    "preemption": {"block_size": 4, "kv_memory_gib": 40 * 4 * 2 * 2 * 2 * 16 * 8 / 2**30},
}


class SometimesAway(DraftModelDrafter):
    """Asked in every tenth step only."""

    num_asked = 0

    def propose(self, rows, max_lens, min_prob=0.0):
        self.num_asked += 1
        if self.num_asked % 10:
            return Drafts(*(torch.zeros(len(rows), 1, dtype=t).numpy() for t in (torch.int64, torch.float64)))
        return super().propose(rows, max_lens, min_prob)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=0.7, top_p=0.9)])
def test_a_copy_of_the_policy_is_accepted(schedule, sampling):
    policy = tiny_llama(torch.float64)
    requests = make_requests(5, 3, max_new_tokens=24)
    plain = make_engine(policy).generate(requests, sampling)
    config = AtlasConfig(lookahead=4, engine=EngineConfig(**SCHEDULES[schedule]))
    engine = make_engine(policy, config, DraftModelDrafter(copy.deepcopy(policy)))
    drafted = engine.generate(requests, sampling)
    assert [r.token_ids for r in drafted] == [r.token_ids for r in plain]
    counts = engine.stats.drafters["draft_model"]
    # the policy draws in float64, its copy in float32: a tie now and then
    assert counts.accepted >= 0.99 * counts.proposed > 0
    assert (engine.stats.preemptions > 0) == (schedule == "preemption")


def test_it_catches_up_after_many_steps_without_being_asked(monkeypatch):
    monkeypatch.setattr("atlas_rl.drafters.draft_model.MAX_PIECE", 5)
    assert MAX_PIECE > 5
    policy = tiny_llama(torch.float64)
    engine = make_engine(policy, AtlasConfig(lookahead=4), SometimesAway(copy.deepcopy(policy)))
    engine.generate(make_requests(3, 2, max_new_tokens=60), SamplingParams())
    counts = engine.stats.drafters["draft_model"]
    assert counts.accepted >= 0.99 * counts.proposed > 0


def test_another_model_changes_no_token():
    policy, draft = tiny_qwen3(torch.float64), tiny_llama(torch.float64, hidden_size=32, num_hidden_layers=1)
    requests = make_requests(5, 2, max_new_tokens=24)
    plain = make_engine(policy).generate(requests, SamplingParams())
    engine = make_engine(policy, AtlasConfig(lookahead=3), DraftModelDrafter(draft))
    assert [r.token_ids for r in engine.generate(requests, SamplingParams())] == [r.token_ids for r in plain]
    assert 0 < engine.stats.drafters["draft_model"].accepted < engine.stats.drafters["draft_model"].proposed


def test_a_smaller_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocabulary of 50 tokens and the policy one of 97"):
        DraftModelDrafter(tiny_llama(vocab_size=50)).bind(PolicyView(tiny_llama()))


@pytest.mark.parametrize("size", [80, 112])
def test_vocabularies_of_one_tokenizer_may_be_padded_to_different_sizes(monkeypatch, size):
    monkeypatch.setattr("atlas_rl.drafters.draft_model._token_ids", lambda path: {"a": 0})
    policy = tiny_llama(torch.float64)
    requests = make_requests(4, 2, max_new_tokens=24)
    plain = make_engine(policy).generate(requests, SamplingParams())
    engine = make_engine(
        policy, AtlasConfig(lookahead=3), DraftModelDrafter(tiny_llama(torch.float64, vocab_size=size))
    )
    assert [r.token_ids for r in engine.generate(requests, SamplingParams())] == [r.token_ids for r in plain]
    assert engine.stats.drafters["draft_model"].accepted and not engine.controller.benched


def test_another_tokenizer_is_refused(tmp_path, shipped_policy):
    same, other = tmp_path / "same", tmp_path / "other"
    shutil.copytree(policy_path(), same)
    shutil.copytree(policy_path(), other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["e"] = vocab["e"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    view = PolicyView(shipped_policy)
    DraftModelDrafter.load(str(same)).bind(view)
    with pytest.raises(ValueError, match="another tokenizer"):
        DraftModelDrafter.load(str(other)).bind(view)


def test_a_path_without_a_model_is_named(tmp_path):
    with pytest.raises(ValueError, match="not a draft model"):
        DraftModelDrafter.load(str(tmp_path))
