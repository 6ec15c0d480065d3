"""What rollouts leave for retraining equals a teacher-forced replay of them, within its bound."""

from __future__ import annotations

import pytest
import torch
from helpers import make_engine, make_requests, tiny_llama

from atlas_rl.adapt.acceptance import measure
from atlas_rl.adapt.capture import Capture
from atlas_rl.adapt.losses import PolicyEnds
from atlas_rl.adapt.replay import replay
from atlas_rl.config import AtlasConfig, EngineConfig
from atlas_rl.drafters.recurrent import RecurrentDrafter
from atlas_rl.drafters.recurrent_head import RecurrentHead
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.types import SamplingParams

EOS = (11, 12, 13)
SCHEDULES = {
    "plain": {},
    "small blocks, prompts in chunks": {"block_size": 4, "max_prefill_tokens": 7},
    "batch of 3": {"max_num_seqs": 3},
    "preemption": {"block_size": 4, "kv_memory_gib": 70 * 4 * 2 * 4 * 2 * 16 * 8 / 2**30},
}


def capturing_engine(policy, capture: Capture, lookahead: int | None = 4, **engine_options):
    torch.manual_seed(0)
    head = RecurrentHead.for_policy(PolicyView(policy))
    config = AtlasConfig(lookahead=lookahead, engine=EngineConfig(**engine_options))
    engine = make_engine(policy, config, RecurrentDrafter(head))
    engine.speculator.listener = capture
    return engine, head


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_it_equals_a_replay(schedule):
    policy = tiny_llama(torch.float64, num_hidden_layers=4)
    sampling = SamplingParams(eos_token_ids=EOS)
    requests = make_requests(5, 3, max_new_tokens=40)
    capture = Capture((1, 2), max_tokens=10_000)
    engine, head = capturing_engine(policy, capture, **SCHEDULES[schedule])
    rollouts = engine.generate(requests, sampling)
    assert (engine.stats.preemptions > 0) == (schedule == "preemption")
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}
    captured = capture.take()
    expected = replay(engine.view, (1, 2), rollouts, [r.seed for r in requests])

    assert len(captured) == len(rollouts)
    assert captured.seeds_R.tolist() == [r.seed for r in requests]
    assert captured.lens_R.tolist() == [len(r.token_ids) + 1 for r in rollouts]
    ends, other_ends = captured.lens_R.cumsum(0).tolist(), expected.lens_R.cumsum(0).tolist()
    for rollout, end, other_end in zip(rollouts, ends, other_ends, strict=True):
        num = len(rollout.token_ids)
        tokens = captured.token_ids_N[end - num - 1 : end]
        assert tokens.tolist() == [rollout.prompt_ids[-1], *rollout.token_ids]
        mine, theirs = slice(end - num - 1, end - 1), slice(other_end - num - 1, other_end - 1)
        torch.testing.assert_close(captured.hidden_ND[mine], expected.hidden_ND[theirs], rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(captured.tapped_NLD[mine], expected.tapped_NLD[theirs], rtol=1e-7, atol=1e-7)

    # and so does the acceptance of a head, wherever both have a draft start (a replay has one more, before the completion)
    ends_of = PolicyEnds.of(policy)
    torch.manual_seed(5)
    head = head.double()
    one = measure(head, captured.tiles(12, 4), ends_of, sampling, depth=4)
    shorter = [expected.first_starts_R, expected.num_starts_R]
    begins = torch.cat(
        [torch.arange(int(f) + (n > 1), int(f + c)) for f, c, n in zip(*shorter, expected.prompt_lens_R)]
    )
    rows = torch.arange(len(expected)).repeat_interleave(expected.num_starts_R - (expected.prompt_lens_R > 1).long())
    two = measure(head, expected.cut(rows, begins, 5), ends_of, sampling, depth=4)
    assert one.num_starts == two.num_starts > 100
    for name in ("overlap", "coupled", "argmax", "runs"):
        torch.testing.assert_close(
            torch.tensor(getattr(one, name)), torch.tensor(getattr(two, name)), rtol=1e-4, atol=1e-4
        )
    assert not captured.hidden_ND.is_inference(), "autograd is to read it"


def test_float32_features_are_not_overwritten_by_later_steps():
    """They are kept by reference for some steps."""
    policy = tiny_llama(num_hidden_layers=4)
    requests = make_requests(4, 2, max_new_tokens=50)
    capture = Capture((1, 2), max_tokens=10_000)
    engine, _ = capturing_engine(policy, capture)
    rollouts = engine.generate(requests, SamplingParams())
    captured, expected = capture.take(), replay(engine.view, (1, 2), rollouts, [r.seed for r in requests])
    ends, other_ends = captured.lens_R.cumsum(0).tolist(), expected.lens_R.cumsum(0).tolist()
    for rollout, end, other_end in zip(rollouts, ends, other_ends, strict=True):
        mine, theirs = (slice(e - len(rollout.token_ids) - 1, e - 1) for e in (end, other_end))
        torch.testing.assert_close(captured.tapped_NLD[mine], expected.tapped_NLD[theirs], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(captured.hidden_ND[mine], expected.hidden_ND[theirs], rtol=1e-3, atol=1e-4)


def test_the_bound_is_kept_and_the_next_rollout_keeps_whole_rows_by_chance():
    policy = tiny_llama()
    requests = make_requests(10, 4, max_new_tokens=30)
    capture = Capture((0,), max_tokens=200, seed=4)
    engine, _ = capturing_engine(policy, capture)
    engine.generate(requests, SamplingParams())
    first = capture.take()
    assert int((first.lens_R - 1).sum()) <= 200
    assert capture.share == pytest.approx(200 / 1200, rel=0.01)
    rows = []
    for _ in range(6):
        engine.generate(requests, SamplingParams())
        assert capture.num_kept <= 200
        replayed = capture.take()
        assert int((replayed.lens_R - 1).sum()) <= 200
        rows.append(replayed.lens_R.tolist())
    # a share of rows, most of them whole, and not the same in each rollout
    assert 3 <= sum(map(len, rows)) / 6 <= 12 and len({tuple(r) for r in rows}) > 1
    assert sum(length == 31 for r in rows for length in r) > 0.5 * sum(map(len, rows))


def test_the_same_rows_are_chosen_again_with_the_same_seed():
    policy = tiny_llama()
    chosen = []
    for seed in (1, 1, 2):
        capture = Capture((0,), max_tokens=200, seed=seed)
        engine, _ = capturing_engine(policy, capture)
        for i in range(3):
            engine.generate(make_requests(10, 4, max_new_tokens=30, seed=i), SamplingParams())
            replayed = capture.take()
        chosen.append(replayed.token_ids_N.tolist())
    assert chosen[0] == chosen[1] != chosen[2]


def test_rows_that_did_not_finish_leave_nothing():
    policy = tiny_llama()
    capture = Capture((0,), max_tokens=10_000)
    engine, _ = capturing_engine(policy, capture)
    logits, calls = engine.view.logits, []

    def interrupted(hidden):
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return logits(hidden)

    engine.view.logits = interrupted
    requests = make_requests(3, 2, max_new_tokens=30)
    short = type(requests[0])(prompt_ids=(5, 6), seed=1, max_new_tokens=3)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([*requests, short], SamplingParams())
    captured = capture.take()
    assert captured.lens_R.tolist() == [4] and captured.seeds_R.tolist() == [1]
    assert capture.take() is None and not (capture.chosen or capture.finished or capture.parts)


def test_it_sees_rollouts_whose_drafter_is_benched():
    policy = tiny_llama()
    capture = Capture((0,), max_tokens=10_000)
    engine, _ = capturing_engine(policy, capture)
    engine.controller.benched.add("recurrent")
    engine.generate(make_requests(3, 2, max_new_tokens=10), SamplingParams(temperature=0.5))
    assert len(capture.take()) == 6 and capture.sampling.temperature == 0.5


def test_a_listener_that_fails_costs_one_warning(caplog):
    class Broken(Capture):
        def verified(self, rows, batch, num_right):
            raise MemoryError("no room")

    policy = tiny_llama()
    engine, _ = capturing_engine(policy, Broken((0,), max_tokens=100))
    engine.generate(make_requests(3, 2, max_new_tokens=10), SamplingParams())
    assert len(caplog.records) == 1 and "no room" in caplog.text
