"""Which sequences run in the next forward: admission by free blocks, chunked prefill, preemption by recompute."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from atlas_rl.engine.kv_cache import BlockPool, OutOfBlocks
from atlas_rl.engine.sequence import PromptGroup, Sequence


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Tokens [start, end) of a group's prefix, to be computed in the next forward."""

    group: PromptGroup
    start: int
    end: int


class Scheduler:
    """Owns every block table, and the three places a sequence can be in: waiting, prefilling, running.

    Prefill goes first. A sequence that finishes leaves `running` at once, so the batch drains to its longest completions. When
    blocks run out, the sequence admitted last gives its blocks back and waits to be recomputed.
    """

    def __init__(self, pool: BlockPool, max_num_seqs: int, max_prefill_tokens: int) -> None:
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_prefill_tokens = max_prefill_tokens
        self.waiting: deque[PromptGroup] = deque()
        self.prefilling: list[PromptGroup] = []
        self.running: list[Sequence] = []
        """In order of admission, oldest first."""
        self.num_preemptions = 0

    @property
    def is_done(self) -> bool:
        return not (self.waiting or self.prefilling or self.running)

    def add(self, group: PromptGroup) -> None:
        self.waiting.append(group)

    def next_prefill(self) -> list[PrefillChunk]:
        """Admit what fits, then the next chunks to prefill; empty when every admitted prefix is computed."""
        self._admit()
        chunks, longest = [], 0
        for group in self.prefilling:
            start = group.num_computed
            end = min(len(group.prefix_ids), start + self.max_prefill_tokens)
            # rows are padded to the longest one inside attention, so the padded size is what the budget bounds
            longest = max(longest, end - start)
            if chunks and (len(chunks) + 1) * longest > self.max_prefill_tokens:
                break
            chunks.append(PrefillChunk(group, start, end))
        return chunks

    def commit_prefill(self, chunks: list[PrefillChunk]) -> tuple[list[Sequence], list[tuple[int, int]]]:
        """The chunks are computed: sequences that now start to decode, and the block copies to make before they do."""
        for chunk in chunks:
            chunk.group.num_computed = chunk.end
        started, copies = [], []
        for group in [g for g in self.prefilling if g.is_prefilled]:
            self.prefilling.remove(group)
            copies += self._fork(group)
            started += group.sequences
        self.running += started
        return started, copies

    def reserve(self) -> list[Sequence]:
        """Give every running sequence room for one more token, oldest first; returns those preempted for it."""
        preempted = []
        position = 0
        while position < len(self.running):
            seq = self.running[position]
            try:
                if seq.num_computed == len(seq.block_table) * self.pool.block_size:  # full: one step in block_size
                    self.pool.grow(seq.block_table, seq.num_computed + 1)
                position += 1
            except OutOfBlocks:
                assert len(self.running) > 1 or self.prefilling, "the pool was checked to hold one sequence"
                preempted.append(self._preempt_last())
        return preempted

    def reserve_ahead(self, num_tokens: int) -> bool:
        """Give every running sequence room for so many more tokens (as far as it may get), or none any."""
        block_size, missing = self.pool.block_size, 0
        wanted = []
        for seq in self.running:
            # a completion's last token is never computed
            end = min(seq.num_computed + num_tokens, seq.max_tokens - 1)
            if end > len(seq.block_table) * block_size:
                wanted.append((seq, end))
                missing += self.pool.blocks_for(end) - len(seq.block_table)
        if missing > self.pool.num_free:
            return False
        for seq, end in wanted:
            self.pool.grow(seq.block_table, end)
        return True

    def reserve_draft(self, seq: Sequence, num_draft_tokens: int) -> int:
        """Blocks for drafts are taken only from what is free; returns how many draft tokens fit."""
        free_tokens = (len(seq.block_table) + self.pool.num_free) * self.pool.block_size - seq.num_computed - 1
        fitting = min(num_draft_tokens, free_tokens)
        self.pool.grow(seq.block_table, seq.num_computed + 1 + fitting)
        return fitting

    def retire(self, finished: list[Sequence]) -> None:
        """Finished sequences leave the batch and free their blocks."""
        if finished:
            for seq in finished:
                self.pool.release(seq.block_table)
            self.running = [seq for seq in self.running if seq.finish_reason is None]

    def abort(self) -> list[Sequence]:
        """Drop everything (an error, an interrupt); returns the sequences that were running."""
        running, self.running = self.running, []
        for owner in [*running, *self.prefilling]:
            self.pool.release(owner.block_table)
        self.prefilling.clear()
        self.waiting.clear()
        return running

    def check_integrity(self) -> None:
        """Assert that blocks and tables agree and that no sequence lacks KV it relies on."""
        self.pool.check_integrity(owner.block_table for owner in [*self.running, *self.prefilling])
        for seq in self.running:
            assert seq.num_computed == seq.num_tokens - 1, "a running sequence has exactly one uncomputed token"
            assert len(seq.block_table) >= self.pool.blocks_for(seq.num_computed)
        assert not any(group.block_table for group in self.waiting), "a waiting group owns blocks"

    def _admit(self) -> None:
        while self.waiting:
            group = self.waiting[0]
            idle = not (self.running or self.prefilling)
            num_admitted = len(self.running) + sum(len(g.sequences) for g in self.prefilling)
            # one spare block per admitted sequence keeps a fresh group from being preempted in its first steps
            headroom = 0 if idle else num_admitted
            # beyond its full prefix blocks every sequence needs one of its own: partial block and next token
            num_spare = self.pool.num_free - headroom - len(group.prefix_ids) // self.pool.block_size
            num_fitting = min(len(group.sequences), num_spare, self.max_num_seqs - num_admitted)
            # a part of a group costs a prefill of its own: worth it for a good part, or where nothing else runs
            if num_fitting < 1 or (num_fitting < len(group.sequences) // 4 and not idle):
                assert not idle, "the pool was checked to hold one sequence"
                return
            self.waiting.popleft()
            if num_fitting < len(group.sequences):
                self.waiting.appendleft(PromptGroup.of(group.sequences[num_fitting:]))
                group.sequences = group.sequences[:num_fitting]
            # the sequences' own blocks are promised, not taken: prefills in flight are counted by `headroom`
            self.pool.grow(group.block_table, len(group.prefix_ids))
            self.prefilling.append(group)

    def _fork(self, group: PromptGroup) -> list[tuple[int, int]]:
        """Share the prefix among the group's sequences; those that find no block for the copy wait again."""
        copies = []
        num_tokens = len(group.prefix_ids)
        first, *others = group.sequences
        for position, seq in enumerate(others, start=1):
            try:
                seq.block_table, copy = self.pool.fork(group.block_table, num_tokens)
            except OutOfBlocks:
                self.waiting.appendleft(PromptGroup.of(group.sequences[position:]))
                group.sequences = group.sequences[:position]
                break
            copies += [copy] if copy else []
        first.block_table, group.block_table = group.block_table, []
        for seq in group.sequences:
            seq.num_computed = num_tokens
        return copies

    def _preempt_last(self) -> Sequence:
        seq = self.running.pop()
        self.pool.release(seq.block_table)
        seq.num_computed = 0
        self.waiting.appendleft(PromptGroup.of([seq]))
        self.num_preemptions += 1
        return seq
