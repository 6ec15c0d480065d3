"""Scheduling as a property: whatever the memory and the lengths, every sequence ends, once, and no block is lost."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_rl.engine.kv_cache import BlockPool
from atlas_rl.engine.scheduler import Scheduler
from atlas_rl.engine.sequence import PromptGroup, Sequence
from atlas_rl.types import RolloutRequest

BLOCK_SIZE = 4
GROUPS = st.lists(
    st.tuples(st.integers(1, 30), st.lists(st.integers(1, 25), min_size=1, max_size=6)), min_size=1, max_size=5
)


def make_groups(shapes: list[tuple[int, list[int]]]) -> list[PromptGroup]:
    groups, row_id = [], 0
    for prompt_len, lens in shapes:
        prompt = tuple(range(prompt_len))
        sequences = []
        for length in lens:
            request = RolloutRequest(prompt_ids=prompt, seed=row_id, max_new_tokens=length)
            sequences.append(Sequence(request, row_id, row_id))
            row_id += 1
        groups.append(PromptGroup.of(sequences))
    return groups


def run(scheduler: Scheduler, num_drafts: int = 0) -> int:
    """Drive the scheduler as the engine does, with a model that always emits one token plus what was drafted."""
    steps = 0
    while not scheduler.is_done:
        steps += 1
        assert steps < 5000, "no progress"
        chunks = scheduler.next_prefill()
        if chunks:
            assert (
                len(chunks) == 1 or len(chunks) * max(c.end - c.start for c in chunks) <= scheduler.max_prefill_tokens
            )
            assert max(c.end - c.start for c in chunks) <= scheduler.max_prefill_tokens
            _, copies = scheduler.commit_prefill(chunks)
            assert len({target for _, target in copies}) == len(copies)
            continue
        scheduler.reserve()
        assert len(scheduler.running) <= scheduler.max_num_seqs
        for seq in scheduler.running:
            fitting = scheduler.reserve_draft(seq, min(num_drafts, seq.num_remaining - 1))
            assert len(seq.block_table) * BLOCK_SIZE >= seq.num_computed + 1 + fitting
            seq.append([7] * (fitting + 1), [0.0] * (fitting + 1), frozenset())
        scheduler.retire([seq for seq in scheduler.running if seq.finish_reason])
        scheduler.check_integrity()
    return steps


@settings(max_examples=150, deadline=None)
@given(GROUPS, st.integers(0, 40), st.integers(1, 8), st.integers(1, 20), st.integers(0, 5))
def test_every_sequence_ends_and_no_block_is_lost(shapes, spare_blocks, max_num_seqs, max_prefill_tokens, num_drafts):
    groups = make_groups(shapes)
    sequences = [seq for group in groups for seq in group.sequences]
    longest = max(len(seq.prompt_ids) + seq.request.max_new_tokens for seq in sequences)
    pool = BlockPool(-(-longest // BLOCK_SIZE) + spare_blocks, BLOCK_SIZE)
    scheduler = Scheduler(pool, max_num_seqs, max_prefill_tokens)
    for group in groups:
        scheduler.add(group)
    run(scheduler, num_drafts)
    assert all(len(seq.output_ids) == seq.request.max_new_tokens for seq in sequences)
    assert pool.num_free == pool.num_blocks


def test_a_prompt_is_prefilled_once_for_its_samples():
    (group,) = make_groups([(30, [5] * 6)])
    pool = BlockPool(100, BLOCK_SIZE)
    scheduler = Scheduler(pool, 64, 1000)
    scheduler.add(group)
    chunks = scheduler.next_prefill()
    assert [(c.start, c.end) for c in chunks] == [(0, 29)]
    started, copies = scheduler.commit_prefill(chunks)
    assert len(started) == 6
    # 29 tokens: 7 full blocks shared by all, one partial block each, copied for all but the first
    assert all(seq.block_table[:7] == started[0].block_table[:7] for seq in started)
    assert len(copies) == 5 and pool.num_blocks - pool.num_free == 7 + 6


def test_long_prompts_are_prefilled_in_chunks():
    scheduler = Scheduler(BlockPool(100, BLOCK_SIZE), 64, max_prefill_tokens=10)
    for group in make_groups([(25, [1]), (4, [1])]):
        scheduler.add(group)
    seen = []
    while chunks := scheduler.next_prefill():
        seen.append([(c.start, c.end) for c in chunks])
        scheduler.commit_prefill(chunks)
    assert seen == [[(0, 10)], [(10, 20)], [(20, 24), (0, 3)]]


def test_a_long_prompt_does_not_pad_many_short_ones():
    scheduler = Scheduler(BlockPool(1000, BLOCK_SIZE), 64, max_prefill_tokens=100)
    for group in make_groups([(91, [1]), *[(4, [1])] * 30]):
        scheduler.add(group)
    assert len(scheduler.next_prefill()) == 1


def test_free_seats_take_a_part_of_a_group():
    scheduler = Scheduler(BlockPool(1000, BLOCK_SIZE), max_num_seqs=12, max_prefill_tokens=1000)
    for group in make_groups([(5, [9] * 8), (7, [9] * 8)]):
        scheduler.add(group)
    started, _ = scheduler.commit_prefill(scheduler.next_prefill())
    assert len(started) == 12


def test_the_youngest_is_preempted_and_recomputed():
    groups = make_groups([(4, [20]), (4, [20])])
    scheduler = Scheduler(BlockPool(8, BLOCK_SIZE), 64, 100)
    for group in groups:
        scheduler.add(group)
    run(scheduler)
    assert scheduler.num_preemptions > 0
    old, young = groups[0].sequences[0], groups[1].sequences[0]
    assert len(old.output_ids) == len(young.output_ids) == 20


def test_abort_frees_everything():
    scheduler = Scheduler(BlockPool(50, BLOCK_SIZE), 64, 10)
    for group in make_groups([(3, [9] * 3), (30, [9]), (5, [9])]):
        scheduler.add(group)
    scheduler.commit_prefill(scheduler.next_prefill())
    assert scheduler.running and scheduler.prefilling
    assert len(scheduler.abort()) == 3
    assert scheduler.is_done and scheduler.pool.num_free == 50
    scheduler.check_integrity()
