"""EAGLE and draft models within captured decode steps, on CPU: the guesses that their host's sides make."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from helpers import VOCAB_SIZE, make_requests, tiny_llama, tiny_qwen3

from atlas_rl.config import AtlasConfig, EngineConfig
from atlas_rl.drafters.base import Drafter
from atlas_rl.drafters.draft_model import DraftModelDrafter
from atlas_rl.drafters.eagle import EagleDrafter
from atlas_rl.drafters.eagle_head import EagleHead, default_layers
from atlas_rl.drafters.paged_step import PagedStep
from atlas_rl.drafters.recurrent import RecurrentDrafter
from atlas_rl.drafters.recurrent_head import RecurrentHead
from atlas_rl.drafters.suffix import SuffixDrafter
from atlas_rl.engine.calibrate import calibrate
from atlas_rl.engine.engine import RolloutEngine
from atlas_rl.engine.graphs import EagerGraphs
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.types import RolloutRequest, SamplingParams

PLAIN = AtlasConfig(speculate=False)
SAMPLING = SamplingParams(max_new_tokens=24)
LOOKAHEAD = 3


@pytest.fixture(scope="module")
def view() -> PolicyView:
    return PolicyView(tiny_llama(torch.float64, num_hidden_layers=4))


def eagle(view: PolicyView, draft_ids: torch.Tensor | None = None) -> EagleDrafter:
    """Of random weights: right now and then. With an output head of its own over `draft_ids`: the policy's rows of these."""
    torch.manual_seed(1)
    size = None if draft_ids is None else len(draft_ids)
    head = EagleHead.for_policy(view.model.config, default_layers(view.num_layers), draft_vocab_size=size)
    if draft_ids is not None:
        head.draft_ids.copy_(draft_ids)
        head.lm_head.weight.data.copy_(view.model.lm_head.weight[draft_ids])
    return EagleDrafter(head)


def copy_of(view: PolicyView) -> DraftModelDrafter:
    return DraftModelDrafter(copy.deepcopy(view.model))


def other_model(view: PolicyView) -> DraftModelDrafter:
    """The policy, disturbed: right often, but not always."""
    model = copy.deepcopy(view.model)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return DraftModelDrafter(model)


def words(view: PolicyView) -> EagleDrafter:
    return eagle(view, torch.arange(0, VOCAB_SIZE, 2))


KINDS = {"eagle": eagle, "eagle of some words": words, "copy": copy_of, "other model": other_model}


def requests_of(seed: int = 0, max_new_tokens: int = 24) -> list[RolloutRequest]:
    """Without prompts of one token: their first step is drafted for within steps, but not by the host."""
    return [r for r in make_requests(5, 3, max_new_tokens, seed=seed) if len(r.prompt_ids) > 1]


def tokens_of(rollouts) -> list[list[int]]:
    return [rollout.token_ids for rollout in rollouts]


class Alternating:
    """In the place of a controller's `choose`: these arms in turn."""

    def __init__(self, *arms: tuple[str, ...]) -> None:
        self.arms = itertools.cycle(arms)

    def __call__(self, num_rows: int, num_cached: int = 0) -> tuple[str, ...]:
        return next(self.arms)


Guesses = dict[tuple[int, int], list[int]]
"""By seed and position of the last token, which together say what came before."""


def record_within(monkeypatch) -> Guesses:
    guesses: Guesses = {}
    draft = PagedStep.draft

    def recorded(self, num_drafts, slots_R, state):
        guesses_RK = draft(self, num_drafts, slots_R, state)
        fields = (state.seeds_S, state.starts_S, state.remaining_S)
        for *key, remaining, row in zip(*(x[slots_R].tolist() for x in fields), guesses_RK.tolist()):
            if remaining:
                guesses[tuple(key)] = row[: remaining - 1]
        return guesses_RK

    monkeypatch.setattr(PagedStep, "draft", recorded)
    return guesses


def record_host(monkeypatch, drafter: Drafter) -> Guesses:
    guesses: Guesses = {}
    propose = drafter.propose

    def recorded(rows, max_lens, min_prob=0.0):
        drafts = propose(rows, max_lens, min_prob)
        for row, tokens, length in zip(rows, drafts.token_ids.tolist(), drafts.lens.tolist(), strict=True):
            if length:
                guesses[row.noise_seed, row.num_computed] = tokens[:length]
        return drafts

    monkeypatch.setattr(drafter, "propose", recorded)
    return guesses


# ---- the host's guesses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "sampling",
    [
        SAMPLING,
        SamplingParams(max_new_tokens=24, top_k=30, top_p=0.95),
        SamplingParams(max_new_tokens=24, temperature=0.0),
    ],
    ids=["plain", "filters", "greedy"],
)
def test_guesses_are_the_hosts(kind: str, sampling: SamplingParams, view: PolicyView):
    counts = []
    for graphs in (None, EagerGraphs()):
        drafter = KINDS[kind](view)
        engine = RolloutEngine(view, AtlasConfig(lookahead=LOOKAHEAD), drafter, graphs=graphs)
        rollouts = engine.generate(requests_of(), sampling)
        counts.append((engine.stats.drafters[drafter.name], engine.stats.decode_steps, tokens_of(rollouts)))
        assert drafter.kv_cache is None and drafter.kept_cache is None and not drafter.rows, "memory is given back"
    assert engine.captured.failure is None and not engine.controller.benched
    assert counts[0] == counts[1]
    (drafted, decode_steps, _) = counts[1]
    if kind == "copy":
        assert drafted.accepted == drafted.proposed and decode_steps == 24 // (1 + LOOKAHEAD)
    else:
        assert 0 < drafted.accepted < drafted.proposed


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_start_from_the_hosts_states(kind: str, view: PolicyView, monkeypatch):
    """Also the first ones, of rows that have just begun."""
    drafter, states = KINDS[kind](view), {None: [], "within": []}
    catch_up, first_states = drafter.catch_up, type(drafter.within_step()).first_states

    def on_host(rows):
        able, states_RD = catch_up(rows)
        states[None].append(states_RD)
        return able, states_RD

    def within(self, rows, slots_R):
        states_RD = first_states(self, rows, slots_R)
        if slots_R.any():  # not over padding, before a step is captured
            states["within"].append(states_RD)
        return states_RD

    monkeypatch.setattr(drafter, "catch_up", on_host)
    monkeypatch.setattr(type(drafter.within_step()), "first_states", within)
    for graphs in (None, EagerGraphs()):
        engine = RolloutEngine(view, AtlasConfig(lookahead=LOOKAHEAD), drafter, graphs=graphs)
        engine.generate(requests_of(), SAMPLING)
    for expected, made in zip(states[None][:4], states["within"][:4], strict=True):
        torch.testing.assert_close(made[: len(expected)], expected, rtol=1e-6, atol=1e-6)


def test_a_copy_of_the_policy_is_right_from_the_first_token_on(view: PolicyView):
    """Also where that is all of a prompt: no token comes before it."""
    requests = [RolloutRequest(prompt_ids=(5 + i % 3,), seed=i, max_new_tokens=24) for i in range(6)]
    engine = RolloutEngine(view, AtlasConfig(lookahead=LOOKAHEAD), copy_of(view), graphs=EagerGraphs())
    engine.generate(requests, SAMPLING)
    counts = engine.stats.drafters["draft_model"]
    assert counts.accepted == counts.proposed and engine.stats.decode_steps == 24 // (1 + LOOKAHEAD)


@pytest.mark.parametrize("has_room", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_guesses_stay_the_hosts_where_drafters_take_turns(kind: str, has_room: bool, view: PolicyView, monkeypatch):
    """After plain steps, steps of a drafter within them, and steps of the host's; with rows that are preempted among them."""
    host_drafter = KINDS[kind](view)
    expected = record_host(monkeypatch, host_drafter)
    RolloutEngine(view, AtlasConfig(lookahead=LOOKAHEAD), host_drafter).generate(requests_of(), SAMPLING)
    within, drafter = record_within(monkeypatch), KINDS[kind](view)
    torch.manual_seed(0)
    other = RecurrentDrafter(RecurrentHead.for_policy(view).to(view.compute_dtype))
    drafter.bind(view)
    block_bytes = view.kv_shape(4).block_bytes + drafter.kv_shape(4).block_bytes
    memory = EngineConfig(block_size=4, kv_memory_gib=(1000 if has_room else 60) * block_bytes / 2**30)
    config = AtlasConfig(lookahead=LOOKAHEAD, engine=memory)
    engine = RolloutEngine(view, config, [SuffixDrafter(), other, drafter], graphs=EagerGraphs())
    mine = (drafter.name,)
    engine.controller.choose = Alternating((), mine, ("recurrent",), mine, mine, ("suffix",), mine, (), (), mine)
    engine.generate(requests_of(), SAMPLING)
    assert engine.captured.failure is None and not engine.controller.benched
    assert (engine.stats.preemptions > 0) != has_room
    shared = [key for key in within if key in expected and within[key]]
    assert len(shared) > (0 if kind == "copy" else 30)  # where all is accepted, steps seldom meet
    assert [within[key] for key in shared] == [expected[key] for key in shared]
    counts = engine.stats.drafters[drafter.name]
    assert counts.accepted == counts.proposed if kind == "copy" else counts.accepted > 0


def test_a_draft_model_is_brought_up_to_date_only_when_it_takes_over(view: PolicyView, monkeypatch):
    drafter = copy_of(view)
    forward, lens = drafter._forward, []
    monkeypatch.setattr(
        drafter, "_forward", lambda rows, *spans: (lens.append(spans[1] - spans[0]), forward(rows, *spans))[1]
    )
    monkeypatch.setattr("atlas_rl.drafters.draft_model.MAX_PIECE", 3)
    engine = RolloutEngine(view, AtlasConfig(lookahead=LOOKAHEAD), [drafter], graphs=EagerGraphs())
    mine = ("draft_model",)
    engine.controller.choose = Alternating(mine, mine, *[()] * 5, mine, mine)
    engine.generate(requests_of(), SAMPLING)
    counts = engine.stats.drafters["draft_model"]
    assert counts.accepted == counts.proposed > 0
    # two steps of 4 tokens, five plain ones: of the 5 + 1 tokens that are missing, the last is the next draft's to compute
    assert [set(n.tolist()) for n in lens[:2]] == [{3}, {2}] and len(lens) == 2, lens


# ---- ends, beginnings, memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_ends_and_beginnings(kind: str, view: PolicyView):
    """Prompts and lengths of one token, stops in the middle of accepted drafts, filters, greedy decoding; small blocks."""
    prompts = [(5,), (7, 8), tuple(range(2, 30)), (9,), tuple(range(40, 57))]
    requests = [
        RolloutRequest(prompt_ids=prompts[i % 5], seed=31 * i, max_new_tokens=1 + i * 7 % 30) for i in range(20)
    ]
    stops = {"eos_token_ids": (1, 2, 40, 41, 42), "stop_token_ids": (3, 4)}
    config = AtlasConfig(lookahead=5, engine=EngineConfig(block_size=4))
    for sampling in (
        SamplingParams(max_new_tokens=30, **stops),
        SamplingParams(max_new_tokens=30, temperature=0.7, top_k=20, top_p=0.9, min_p=0.02, **stops),
        SamplingParams(max_new_tokens=30, temperature=0.0, **stops),
        SamplingParams(max_new_tokens=30, repetition_penalty=1.2, **stops),  # the host drafts, in uncaptured steps
    ):
        expected = RolloutEngine(view, PLAIN).generate(requests, sampling)
        engine = RolloutEngine(view, config, KINDS[kind](view), graphs=EagerGraphs())
        made = engine.generate(requests, sampling)
        assert tokens_of(made) == tokens_of(expected) and engine.captured.failure is None
        assert {r.finish_reason for r in made} == {"stop", "length"}
        (counts,) = engine.stats.drafters.values()
        assert counts.proposed and not engine.controller.benched


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_stored_outside_of_a_rows_blocks(kind: str, view: PolicyView, monkeypatch):
    """Every slot that a draft or a step's end writes belongs to a row that runs."""
    drafter = KINDS[kind](view)
    engine = RolloutEngine(
        view, AtlasConfig(lookahead=6, engine=EngineConfig(block_size=4)), drafter, graphs=EagerGraphs()
    )
    advance = type(drafter).advance
    written = []

    def checked(self, batch, states):
        if batch.query_starts_R is not None:
            slots = batch.slots_N[batch.slots_N >= 0].tolist()
            owned = {b for seq in engine.scheduler.running for b in seq.block_table}
            assert {slot // 4 for slot in slots} <= owned and len(slots) == len(set(slots))
            written.extend(slots)
        return advance(self, batch, states)

    monkeypatch.setattr(type(drafter), "advance", checked)
    requests = make_requests(4, 2, 13)
    made = engine.generate(requests, SAMPLING)
    assert tokens_of(made) == tokens_of(RolloutEngine(view, PLAIN).generate(requests, SAMPLING))
    assert written and engine.captured.failure is None, engine.captured.failure


@pytest.mark.parametrize("kind", ["eagle", "copy"])
def test_memory_is_kept_with_the_steps_that_read_it(kind: str, view: PolicyView, monkeypatch):
    drafter = KINDS[kind](view)
    engine = RolloutEngine(view, AtlasConfig(lookahead=LOOKAHEAD), drafter, graphs=EagerGraphs())
    monkeypatch.setattr("atlas_rl.engine.engine.is_little", lambda *sizes: True)
    requests = requests_of()
    expected = tokens_of(engine.generate(requests, SAMPLING))
    steps, cache = dict(engine.captured.steps), drafter.kept_cache
    assert steps and cache is not None and drafter.kv_cache is None
    assert tokens_of(engine.generate(requests, SAMPLING)) == expected
    assert all(engine.captured.steps[key] is step for key, step in steps.items()), "nothing was captured again"
    assert drafter.kept_cache is cache
    engine.kv_cache = None  # other memory: other steps
    engine.generate(requests_of(max_new_tokens=300), SamplingParams(max_new_tokens=300))
    assert drafter.kept_cache is not cache
    assert not any(step is engine.captured.steps.get(key) for key, step in steps.items())


@pytest.mark.parametrize("kind", ["eagle", "copy"])
def test_one_that_fails_takes_no_part_in_captured_steps(kind: str, view: PolicyView, monkeypatch):
    drafter, requests = KINDS[kind](view), requests_of()
    monkeypatch.setattr(drafter, "wake", lambda *args: 1 / 0)
    engine = RolloutEngine(view, AtlasConfig(), drafter, graphs=EagerGraphs())
    made = engine.generate(requests, SAMPLING)
    assert tokens_of(made) == tokens_of(RolloutEngine(view, PLAIN).generate(requests, SAMPLING))
    assert engine.controller.benched == {drafter.name} and engine.captured.failure is None
    assert not engine.captured.drafters and engine.captured.all_drafters


@pytest.mark.parametrize("kind", KINDS)
def test_the_host_goes_on_where_steps_cannot_be_captured_any_more(kind: str, view: PolicyView, monkeypatch):
    """In the middle of a rollout: drafts go on to be right."""

    class Tired(EagerGraphs):
        def capture(self, step):
            if captured:
                raise RuntimeError("out of memory")
            captured.append(step)
            return super().capture(step)

    captured, drafter, requests = [], KINDS[kind](view), requests_of()
    lengths = [24 if i % 2 else 9 for i in range(len(requests))]
    requests = [
        RolloutRequest(prompt_ids=r.prompt_ids, seed=r.seed, max_new_tokens=n) for r, n in zip(requests, lengths)
    ]
    engine = RolloutEngine(view, AtlasConfig(lookahead=LOOKAHEAD), drafter, graphs=Tired())
    monkeypatch.setattr("atlas_rl.engine.captured.CAPTURE_AFTER", 0)
    made = engine.generate(requests, SAMPLING)
    assert "out of memory" in engine.captured.failure and not engine.controller.benched
    assert tokens_of(made) == tokens_of(RolloutEngine(view, PLAIN).generate(requests, SAMPLING))
    counts = engine.stats.drafters[drafter.name]
    assert counts.accepted == counts.proposed if kind == "copy" else counts.accepted > 0


@pytest.mark.parametrize("size", [80, 112])
def test_vocabularies_padded_to_different_sizes(size: int, monkeypatch):
    monkeypatch.setattr("atlas_rl.drafters.draft_model._token_ids", lambda path: {"a": 0})
    view, counts = PolicyView(tiny_qwen3(torch.float64)), []
    for graphs in (None, EagerGraphs()):
        drafter = DraftModelDrafter(tiny_llama(torch.float64, vocab_size=size))
        engine = RolloutEngine(view, AtlasConfig(lookahead=LOOKAHEAD), drafter, graphs=graphs)
        rollouts = engine.generate(requests_of(), SAMPLING)
        counts.append((engine.stats.drafters["draft_model"], engine.stats.decode_steps, tokens_of(rollouts)))
    assert counts[0] == counts[1] and counts[0][0].accepted and engine.captured.failure is None


@pytest.mark.parametrize("kind", KINDS)
def test_calibration_measures_them(kind: str, view: PolicyView):
    drafter = KINDS[kind](view)
    engine = RolloutEngine(view, AtlasConfig(), drafter, graphs=EagerGraphs())
    assert calibrate(engine, max_seconds=30.0, rows=(1, 4)) < 30 and engine.captured.failure is None
    assert engine.controller.draft_cost[drafter.name].seconds(4, np.array([3])) > 0
    assert not engine.captured.steps and drafter.kv_cache is None and drafter.kept_cache is None


def test_prompts_that_are_prefilled_in_several_forwards(view: PolicyView):
    """After most of them no row begins."""
    requests = make_requests(2, 2, 8)
    config = AtlasConfig(lookahead=LOOKAHEAD, engine=EngineConfig(max_prefill_tokens=4))
    expected = RolloutEngine(view, PLAIN).generate(requests, SAMPLING)
    for make in (eagle, lambda view: DraftModelDrafter(copy.deepcopy(view.model))):
        engine = RolloutEngine(view, config, make(view), graphs=EagerGraphs())
        made = engine.generate(requests, SAMPLING)
        assert [r.token_ids for r in made] == [r.token_ids for r in expected]
        assert engine.captured.failure is None and not engine.controller.benched
