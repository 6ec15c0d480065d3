"""Retraining over all ranks: one update of all of them, the same on all, or undone on all."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from helpers import tiny_llama
from learning_rank import ADAPT, SAMPLING, Group, LearningRank, same_bits, weights

from atlas_rl.adapt import retrainer as module
from atlas_rl.adapt.retrainer import Retrainer
from atlas_rl.adapt.state import FOLDER, load_state, save_state
from atlas_rl.drafters.recurrent import RecurrentDrafter
from atlas_rl.drafters.recurrent_head import RecurrentHead
from atlas_rl.drafters.vocab import HALF_LIFE_TOKENS, MIN_TOKENS, DraftVocabulary
from atlas_rl.ranks import RankFailed, Ranks

UPDATE = {"interval_seconds": 10.0, "drafted_seconds": 5.0, "remaining": 50.0}


def make_ranks(size: int = 2, **options) -> tuple[Group, list[LearningRank]]:
    group, policy = Group(size), tiny_llama()
    return group, [LearningRank(policy, ranks, **options) for ranks in group.ranks]


def assert_same(ranks: list[LearningRank]) -> None:
    first = ranks[0].retrainer
    for rank in ranks[1:]:
        mine = rank.retrainer
        assert same_bits(weights(ranks[0]), weights(rank)) and same_bits(first.good_head, mine.good_head)
        moments, others = first.optimizer.state_dict()["state"], mine.optimizer.state_dict()["state"]
        assert moments.keys() == others.keys() and all(same_bits(moments[i], others[i]) for i in moments)
        figures = ("judged_tokens", "drift_reference")
        assert [getattr(first, name) for name in figures] == [getattr(mine, name) for name in figures]
        assert first.budget.state_dict() == mine.budget.state_dict()
        words, other_words = ranks[0].drafter.vocabulary, rank.drafter.vocabulary
        assert np.array_equal(words.counts_V, other_words.counts_V) and np.array_equal(words.ids, other_words.ids)


def update(group: Group, ranks: list[LearningRank]) -> list:
    return group.run(lambda i: ranks[i].retrainer.update(ranks[i].engine.view, **UPDATE))


def test_an_update_is_the_same_on_all_ranks_also_on_one_with_nothing_to_learn_from():
    group, ranks = make_ranks(3)
    before = weights(ranks[0])
    for i in range(4):
        for rank in ranks:
            rank.rollout(i, num_tokens=1 if i == 1 and rank.ranks.rank == 0 or rank.ranks.rank == 2 else 24)
        assert group.run(lambda i: ranks[i].refresh()) == [None] * 3
        assert_same(ranks)
        assert [rank.engine.stats.retrain.steps for rank in ranks] == [4] * 3
        assert not same_bits(before, before := weights(ranks[0]))
    states = [rank.retrainer.generator.get_state() for rank in ranks]
    assert not torch.equal(states[0], states[1]), "windows are each rank's own"
    for rank in ranks:
        rank.rollout(9, num_tokens=1)
    assert update(group, ranks) == [None] * 3, "nobody has anything"


def test_the_clock_of_the_first_decides_for_all():
    group, ranks = make_ranks(2, deterministic=False)
    ranks[1].adaptation.remaining = lambda: 0.0
    ranks[0].adaptation.remaining = lambda: 1e6
    for i in range(6):
        for rank in ranks:
            rank.rollout(i)
            rank.adaptation.last_update -= 60.0 * (rank.ranks.rank == 0)
            rank.engine.traffic.drafted_seconds = 30.0
        assert group.run(lambda i: ranks[i].refresh()) == [None] * 2
        assert_same(ranks)
    assert ranks[0].retrainer.totals.steps == ranks[1].retrainer.totals.steps > 0
    assert ranks[1].retrainer.budget.step_seconds


@pytest.mark.parametrize("num_teachers", [1, 2])
def test_gradients_are_the_mean_over_the_windows_of_all_ranks(num_teachers):
    group, ranks = make_ranks(2)
    alone = [copy.copy(rank) for rank in ranks]
    for rank, single in zip(ranks, alone, strict=True):
        rank.rollout(1, num_tokens=24 if rank.ranks.rank < num_teachers else 1)
        replay = rank.retrainer.capture.take()
        single.retrainer = Retrainer(RecurrentDrafter(copy.deepcopy(rank.drafter.head)), ADAPT, "every_update")
        single.retrainer.generator.set_state(rank.retrainer.generator.get_state())
        for one in (rank, single):
            one.retrainer.capture.take = lambda replay=replay: replay
            one.retrainer.capture.sampling = SAMPLING
    assert all(stats.steps == 1 for stats in group.run(lambda i: ranks[i].retrainer.train(ranks[i].engine.view, 1)))
    expected = []
    for single in alone[:num_teachers]:
        single.retrainer.train(single.engine.view, 1)
        expected.append([p.grad for p in single.retrainer.drafter.head.parameters()])
    for rank in ranks:
        for p, *grads in zip(rank.drafter.head.parameters(), *expected, strict=True):
            assert torch.allclose(p.grad, torch.stack(grads).mean(0), atol=1e-6, rtol=1e-5)
            assert p.grad.abs().max() > 1e-4


def test_what_is_held_out_is_judged_over_all_ranks(monkeypatch):
    group, ranks = make_ranks(2)
    measured = []

    def recording(*args, **kwargs):
        measured.append(measure(*args, **kwargs))
        return measured[-1]

    measure = module.measure
    monkeypatch.setattr(module, "measure", recording)
    for rank in ranks:
        rank.rollout(1, num_tokens=30 if rank.ranks.rank else 12)
    (before,) = {stats.acceptance_before for stats in update(group, ranks)}
    one, other = measured[:2]
    right = sum(np.array(found.runs) * found.num_judged for found in (one, other))
    assert one.num_judged != other.num_judged
    assert before == pytest.approx(1 + (right / np.add(one.num_judged, other.num_judged)).sum())


class Fault:
    """Something that raises on one rank, once, at its n-th call."""

    def __init__(self, monkeypatch, owner, name: str, at: int) -> None:
        self.calls, original = 0, getattr(owner, name)

        def failing(*args, **kwargs):
            self.calls += 1
            if self.calls == at:
                raise MemoryError("none left")
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, failing)


FAULTS = {
    "capture": lambda rank: (rank.retrainer, "_take", 1),
    "judging": lambda rank: (rank.retrainer.drafter.head, "unroll", 1),
    "first forward": lambda rank: (rank.retrainer.drafter.head, "unroll", 2),
    "later forward": lambda rank: (rank.retrainer.drafter.head, "unroll", 3),
    "optimizer": lambda rank: (rank.retrainer.optimizer, "step", 2),
    "last optimizer step": lambda rank: (rank.retrainer.optimizer, "step", 4),
    "undoing": lambda rank: (rank.retrainer.optimizer, "load_state_dict", 1),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("who", [0, 1])
def test_what_fails_on_one_rank_is_undone_on_all(monkeypatch, caplog, fault, who):
    group, ranks = make_ranks(2)
    for rank in ranks:
        rank.rollout(1)
    assert group.run(lambda i: ranks[i].refresh()) == [None] * 2
    good = weights(ranks[0])
    for rank in ranks:
        rank.rollout(2)
        if fault == "undoing":
            rank.retrainer.optimizer.param_groups[0]["lr"] = 1e30
    raised = Fault(monkeypatch, *FAULTS[fault](ranks[who]))
    assert group.run(lambda i: ranks[i].refresh()) == [None] * 2, "rollouts go on"
    assert raised.calls and all(same_bits(weights(rank), good) for rank in ranks)
    assert_same(ranks)
    told = [record.message for record in caplog.records if "diverged" not in record.message]
    assert len(told) == (1 if who == 0 else 2) and all("MemoryError: none left" in message for message in told)
    monkeypatch.undo()
    for rank in ranks:
        rank.rollout(3)
        rank.retrainer.optimizer.param_groups[0]["lr"] = 3e-3
    assert group.run(lambda i: ranks[i].refresh()) == [None] * 2
    assert_same(ranks)
    assert ranks[1].engine.stats.retrain.kept and not same_bits(weights(ranks[1]), good)


def test_one_that_diverges_diverges_for_all(monkeypatch, caplog):
    group, ranks = make_ranks(2)
    for rank in ranks:
        rank.rollout(1)
    good = weights(ranks[0])
    loss = ranks[1].retrainer._loss
    monkeypatch.setattr(ranks[1].retrainer, "_loss", lambda lesson: loss(lesson) * torch.nan)
    assert group.run(lambda i: ranks[i].refresh()) == [None] * 2
    assert [rank.engine.stats.retrain.kept for rank in ranks] == [0, 0]
    assert_same(ranks)
    assert same_bits(weights(ranks[1]), good)
    assert ["diverged" in record.message for record in caplog.records] == [True]


# ---- between rollouts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_a_new_head_is_made_by_all_ranks_or_by_none(monkeypatch, caplog, fails):
    monkeypatch.setattr("atlas_rl.adapt.adaptation.DISTILL_STEPS", 10)
    group, ranks = make_ranks(2, is_new=True)
    if fails:
        Fault(monkeypatch, ranks[1].drafter.head, "unroll", 8)
    for i in range(4):
        for rank in ranks:
            rank.rollout(i, num_tokens=1 if i == 1 and rank.ranks.rank else 24)
        assert group.run(lambda i: ranks[i].refresh()) == [None] * 2
        if ranks[0].adaptation.retrainer:
            assert_same(ranks)
    if fails:
        assert [rank.adaptation.retrainer for rank in ranks] == [None] * 2
        assert ["no draft head is made" in record.message for record in caplog.records] == [True] * 2
        return
    assert [rank.adaptation.distill_steps_left for rank in ranks] == [0, 0]
    assert not any(rank.engine.controller.benched for rank in ranks)
    (one, other) = (rank.static.head.state_dict() for rank in ranks)
    assert same_bits(one, other) and not same_bits(one, weights(ranks[0]))


@pytest.mark.parametrize("damage", [torch.nan, 0.5])
@pytest.mark.parametrize("who", [0, 1])
def test_a_head_that_differs_is_noticed_and_put_right(caplog, damage, who):
    group, ranks = make_ranks(2)
    for i in range(2):
        for rank in ranks:
            rank.rollout(i)
        assert group.run(lambda i: ranks[i].refresh()) == [None] * 2
    with torch.no_grad():
        ranks[who].drafter.head.fc.weight.fill_(damage)
    ranks[who].engine.speculator.weights_updated("recurrent")
    caplog.clear()
    for rank in ranks:
        rank.rollout(2)
    assert group.run(lambda i: ranks[i].refresh()) == [None] * 2
    assert_same(ranks)
    assert sum("were not as on rank 0" in record.message for record in caplog.records) == 1
    assert not any(rank.engine.controller.benched for rank in ranks) and ranks[0].retrainer.is_sound


def test_ranks_start_with_the_heads_of_the_first(caplog):
    group, ranks = make_ranks(2)
    with torch.no_grad():
        ranks[1].drafter.head.fc.weight.mul_(2)
    first = weights(ranks[0])
    group.run(lambda i: ranks[i].refresh())  # without traffic there is no update
    assert same_bits(weights(ranks[1]), first) and not caplog.records
    assert same_bits(ranks[1].retrainer.good_head, first)


def test_ranks_with_different_drafters_are_refused_on_all_of_them():
    group, ranks = make_ranks(2)
    ranks[1].drafter.head = RecurrentHead.for_policy(ranks[1].engine.view, intermediate_size=8)
    assert [type(error) for error in group.run(lambda i: ranks[i].refresh())] == [ValueError] * 2


def test_an_error_from_elsewhere_is_not_taken_for_one_of_retraining():
    group, ranks = make_ranks(2)

    def main(rank: int) -> None:
        if rank:
            ranks[1].ranks.meet("a rollout", error=OSError("disk"))
        ranks[0].refresh()

    failed, own = group.run(main)
    assert isinstance(failed, RankFailed) and "rank 1 failed in a rollout: OSError: disk" in str(failed)
    assert isinstance(own, OSError)


def test_where_ranks_do_not_meet_nothing_is_updated_and_traffic_waits():
    _, ranks = make_ranks(2)
    rank = ranks[1]
    rank.rollout(0)
    tokens = rank.engine.traffic.tokens
    rank.adaptation.may_update = False
    rank.adaptation.refreshed(rank.engine, True)
    assert rank.engine.traffic.tokens == tokens > 0 and rank.retrainer.capture.num_seen


def test_words_are_those_of_all_ranks_also_of_one_whose_drafter_is_benched():
    group, ranks = make_ranks(2)
    ranks[0].drafter.vocabulary.count([[5] * MIN_TOKENS])
    ranks[1].drafter.vocabulary.count([[90] * MIN_TOKENS])
    ranks[1].engine.controller.benched.add("recurrent")
    assert group.run(lambda i: ranks[i].refresh()) == [None] * 2
    assert_same(ranks)
    assert {5, 90} <= set(ranks[1].drafter.vocabulary.ids.tolist()) and len(ranks[1].drafter.vocabulary.ids) == 32
    for _ in range(60):  # halved so often that float64 does not hold the first counts exactly any more
        for rank, token in zip(ranks, (7, 60), strict=True):
            rank.drafter.vocabulary.count([[token] * int(HALF_LIFE_TOKENS / 3 + token)])
        assert group.run(lambda i: ranks[i].refresh()) == [None] * 2
        assert_same(ranks)


def test_alone_words_are_counted_as_ever():
    words = DraftVocabulary(10)
    words.count([[1, 2, 2]])
    words.add_up(Ranks.alone())
    assert words.counts_V.tolist() == [0, 1, 2] + [0] * 7


# ---- checkpoints ------------------------------------------------------------------------------------------------------------


def learned(size: int) -> tuple[Group, list[LearningRank]]:
    group, ranks = make_ranks(size)
    for i in range(2):
        for rank in ranks:
            rank.rollout(i)
        assert group.run(lambda i: ranks[i].refresh()) == [None] * size
    for rank in ranks:
        rank.rollout(5, num_tokens=10 + 3 * rank.ranks.rank)
    return group, ranks


def own(rank: LearningRank) -> str:
    """Numbers that are not the same on all ranks."""
    state, controller = rank.retrainer.state_dict(), rank.engine.controller.state_dict()
    names = ("generator", "capture_rng", "capture_share")
    calibration = rank.drafter.calibration
    trust = vars(rank.engine.speculator.trust["recurrent"])
    return json.dumps([{n: state[n] for n in names}, controller, calibration.right_KM.tolist(), trust])


def test_a_checkpoint_of_two_is_resumed_by_two_one_and_three(tmp_path):
    group, ranks = learned(2)
    lengths = {"prompts": np.arange(5), "means": np.linspace(0, 1, 5)}
    group.run(lambda i: save_state(tmp_path / str(i), ranks[i].adaptation, ranks[i].engine, lengths))
    assert [path.name for path in tmp_path.iterdir()] == ["0"], "rank 0 writes for all"
    assert_same(ranks)  # counts too
    expected = [own(rank) for rank in ranks]
    assert expected[0] != expected[1]
    for size in (2, 1, 3):
        others, resumed = make_ranks(size)
        if size == 1:
            resumed = [LearningRank(tiny_llama(), Ranks.alone())]
        extras = [{} for _ in resumed]

        def load(i: int, resumed=resumed, extras=extras) -> bool:
            return load_state(tmp_path / "0", resumed[i].adaptation, resumed[i].engine, extras[i])

        assert others.run(load) == [True] * size
        assert [own(rank) for rank in resumed] == [expected[i % 2] for i in range(size)]
        assert_same([ranks[0], *resumed])
        assert all(extra.keys() == lengths.keys() for extra in extras)
        assert all(np.array_equal(extra[name], lengths[name]) for extra in extras for name in lengths)


def test_a_resumed_run_goes_on_as_the_other_does(tmp_path):
    group, ranks = learned(2)
    for rank in ranks:
        rank.adaptation.forget_unsaved()
    group.run(lambda i: save_state(tmp_path, ranks[i].adaptation, ranks[i].engine))
    others, resumed = make_ranks(2)
    others.run(lambda i: load_state(tmp_path, resumed[i].adaptation, resumed[i].engine))
    for seed in range(6, 8):
        for rank in [*ranks, *resumed]:
            rank.rollout(seed)
        assert group.run(lambda i: ranks[i].refresh()) == others.run(lambda i: resumed[i].refresh()) == [None] * 2
        assert [own(rank) for rank in ranks] == [own(rank) for rank in resumed]
        for rank, other in zip(ranks, resumed, strict=True):
            assert same_bits(weights(rank), weights(other))


@pytest.mark.parametrize("damage", ["missing", "cut"])
@pytest.mark.parametrize("who", [0, 1])
def test_rank_0_reads_for_all(tmp_path, caplog, damage, who):
    """Each machine may have a disk of its own, and only the first one's holds what counts."""
    group, ranks = learned(2)
    for folder in ("0", "1"):
        group.run(lambda i, folder=folder: save_state(tmp_path / folder, ranks[i].adaptation, ranks[i].engine))
    path = tmp_path / str(who) / FOLDER
    if damage == "missing":
        path.rename(path.parent / "elsewhere")
    else:
        (path / "recurrent" / "model.safetensors").write_bytes(b"")
    others, resumed = make_ranks(2)
    before, heads = [own(rank) for rank in resumed], weights(resumed[0])
    load = others.run(lambda i: load_state(tmp_path / str(i), resumed[i].adaptation, resumed[i].engine))
    if who == 1:
        assert load == [True, True] and not caplog.records
        assert all(same_bits(weights(new), weights(old)) for new, old in zip(resumed, ranks, strict=True))
        return
    assert load == [False, False] and [own(rank) for rank in resumed] == before
    assert all(same_bits(weights(rank), heads) for rank in resumed)
    assert ["start anew" in record.message for record in caplog.records] == [True] * (damage == "cut")


def test_a_full_disk_costs_the_writer_a_warning_and_the_others_nothing(tmp_path, caplog, monkeypatch):
    group, ranks = learned(2)
    (tmp_path / "file").write_text("")
    saved = group.run(lambda i: save_state(tmp_path / "file", ranks[i].adaptation, ranks[i].engine))
    assert saved == [None, None] and ["is not saved" in record.message for record in caplog.records] == [True]
    assert_same(ranks)
