"""Suffix drafter: guesses that the policy goes on as it, its siblings or its earlier rollouts went on after the same last tokens.

It holds no weights. An *index* maps a context (the last 1, 2, 4 or 8 tokens) to one entry: the token that followed most often
and how reliably it did. Two indexes are kept:

    group   per prompt: the prompt, all that its live and finished rows emitted, its rollouts of an earlier policy (aged)
    shared  over all prompts, with longer contexts: how this policy phrases things, whatever it was asked

To draft, look up the longest known context in both, take the guess with the better record, append it to the context, go on.

An entry is one integer, `token << CELL_BITS | cell`. The cell is a small state (level, count, misses) that moves with every
occurrence of the context (a majority vote: agreement raises the count, dissent lowers it, below one the dissenter takes over),
and all that a guess's probability depends on: `chance[cell]` is the measured rate at which guesses from such entries came true.
So nothing is assumed about what a match of length 4, a lead of 3 votes or last week's rollout is worth; it is counted, for this
policy, as it decodes.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from sys import getsizeof
from typing import ClassVar

from atlas_rl.drafters.base import Draft, DraftRow

Index = dict[int, int]
Orders = tuple[tuple[int, int], ...]

# A context is one integer of 20 bits per token, the newest token lowest; (1 << 20 * n) - 1 masks its last n tokens.
TOKEN_BITS = 20
LAST_1, LAST_2, LAST_4, LAST_8 = ((1 << TOKEN_BITS * n) - 1 for n in (1, 2, 4, 8))
NO_CONTEXT = LAST_8  # pads sequences of fewer than 8 tokens, so that contexts of different lengths never share a key

# A cell is level << 7 | count << 3 | misses. Level 0..2: group contexts of 1, 2, 4 tokens; 3..5: shared, of 2, 4, 8; + 8: aged.
CELL_BITS = 11
CELL_MASK = (1 << CELL_BITS) - 1
COUNT_ABOVE_1, AGED = 14 << 3, 8 << 7


def _cell(level: int, count: int, misses: int) -> int:
    return level << 7 | min(count, 15) << 3 | min(misses, 7)


# Longest context first: (mask, cell of a context seen once).
GROUP_ORDERS = ((LAST_4, _cell(2, 1, 0)), (LAST_2, _cell(1, 1, 0)), (LAST_1, _cell(0, 1, 0)))
SHARED_ORDERS = ((LAST_8, _cell(5, 1, 0)), (LAST_4, _cell(4, 1, 0)), (LAST_2, _cell(3, 1, 0)))


def _build_transitions() -> tuple[list[int], list[int], list[int]]:
    """Per cell: the step to add when the entry's token occurs again, the step when another token occurs (0: that one takes over),
    and the cell of the token that takes over. An aged count weighs half; the first fresh agreement makes the entry fresh."""
    hit_step, miss_step, takeover = ([0] * (CELL_MASK + 1) for _ in range(3))
    for cell in range(CELL_MASK + 1):
        level, count, misses = cell >> 7, cell >> 3 & 15, cell & 7
        fresh, is_aged = level & 7, level >> 3
        if is_aged:
            count, misses = count // 2, misses // 2
        left = count if is_aged else count - 1
        forgiven = 1 if count == 15 and misses else 0
        hit_step[cell] = _cell(fresh, count + 1, misses - forgiven) - cell
        miss_step[cell] = _cell(level, left, misses + 1) - cell if left > 0 else 0
        takeover[cell] = _cell(fresh, 1, misses + 1)
    return hit_step, miss_step, takeover


HIT_STEP, MISS_STEP, TAKEOVER = _build_transitions()


def _extend(context: int, token_ids: Sequence[int]) -> int:
    for token in token_ids:
        context = (context << TOKEN_BITS | token) & LAST_8
    return context


def _learn(index: Index, older: Index, orders: Orders, context: int, token_ids: Sequence[int]) -> int:
    """Teach `index` that `token_ids` followed `context`; returns the context after them. Entries met in `older` move over."""
    for token in token_ids:
        for mask, first_cell in orders:
            key = context & mask
            entry = index.get(key) or older.get(key)
            if entry is None:
                index[key] = token << CELL_BITS | first_cell
            elif entry >> CELL_BITS == token:
                index[key] = entry + HIT_STEP[entry & CELL_MASK]
                if entry & COUNT_ABOVE_1:
                    break  # shorter contexts are asked only where this one is unknown, so what it explains would blur them
            else:
                step = MISS_STEP[entry & CELL_MASK]
                index[key] = entry + step if step else token << CELL_BITS | TAKEOVER[entry & CELL_MASK]
        context = (context << TOKEN_BITS | token) & LAST_8
    return context


def _aged(index: Index) -> Index:
    return {key: entry | AGED for key, entry in index.items()}


class _Calibration:
    """chance[on_track][cell]: measured probability that a guess from an entry in that state is right. A row is on track where its
    last token was guessed right; elsewhere it has just left the beaten path, and the same entry is worth less."""

    MEMORY = 255  # guesses that the average of a cell runs over
    MEMORY_AFTER_UPDATE = 31  # weight of what was measured under the policy before

    def __init__(self) -> None:
        # entry counts as they stand, before anything is measured; 0 for cell 0, which stands for "no entry"
        prior = [(cell >> 3 & 15) / ((cell >> 3 & 15) + (cell & 7) + 1) for cell in range(CELL_MASK + 1)]
        self.chance = (prior, prior.copy())
        self.num_seen = ([0] * len(prior), [0] * len(prior))

    def score(self, on_track: bool, guesses: list[int], cells: list[int], emitted: list[int]) -> bool:
        """Judge guesses by what was emitted, whether or not the engine had them verified. Is the row on track now?"""
        for guess, cell, token in zip(guesses, cells, emitted):
            chance, num_seen = self.chance[on_track], self.num_seen[on_track]
            weight = num_seen[cell] + 5  # the prior counts as 4 guesses
            if weight < self.MEMORY:
                num_seen[cell] += 1
            on_track = guess == token
            chance[cell] += (on_track - chance[cell]) / weight
            if not on_track:
                return False
        return on_track and len(guesses) >= len(emitted)

    def policy_updated(self) -> None:
        for num_seen in self.num_seen:
            num_seen[:] = [min(seen, self.MEMORY_AFTER_UPDATE) for seen in num_seen]


@dataclass(slots=True)
class _Group:  # the rows of one prompt under the current policy
    key: bytes
    index: Index
    num_live: int = 0


@dataclass(slots=True)
class _History:  # the finished rollouts of one prompt, all of the last policy version that rolled it out
    version: int
    rollouts: list[array[int]] = field(default_factory=list)
    num_bytes: int = 0


@dataclass(slots=True)
class _RowState:
    group: _Group
    context: int
    num_learned: int
    on_track: bool = False
    guesses: list[int] = field(default_factory=list)
    cells: list[int] = field(default_factory=list)


@dataclass(kw_only=True, eq=False, repr=False)
class SuffixDrafter:
    """Bounds (defaults): groups 2 M and shared 2 x 200 k entries of about 100 bytes each, history 16 MB. The oldest prompt goes
    first; shared entries go with their generation unless they are met again. A prompt's history is replaced when a newer policy
    rolls it out; what is `max_age` policy updates old is dropped from the history and from the shared index."""

    name: ClassVar[str] = "suffix"

    floor: float = 0.05  # a draft ends where the probability that all of it is accepted falls below this
    max_age: int = 256  # policy updates
    max_group_entries: int = 2_000_000
    max_shared_entries: int = 200_000  # per generation; 0: prompts never learn from each other
    max_history_bytes: int = 16_000_000
    max_history_bytes_per_prompt: int = 32_000  # bounds the time to build an index, too

    def __post_init__(self) -> None:
        self.rows: dict[int, _RowState] = {}
        self.groups: OrderedDict[bytes, _Group] = OrderedDict()  # least recently admitted first
        self.history: OrderedDict[bytes, _History] = OrderedDict()  # least recently extended first
        self.num_group_entries = self.num_history_bytes = 0
        self.shared: Index = {}
        self.shared_older: Index = {}  # the generation before, aged; entries that are met again move to `shared`
        self.version = self.version_of_shared = 0  # counted in policy updates
        self.calibration = _Calibration()

    def admit(self, rows: Sequence[DraftRow]) -> None:
        for row in rows:
            key = blake2b(array("i", row.prompt_ids).tobytes(), digest_size=16).digest()
            context = _extend(NO_CONTEXT, row.prompt_ids[-8:])
            group = self.groups.get(key)
            if group is None:
                group = self.groups[key] = _Group(key, self._build_index(key, row.prompt_ids))
                # of a preempted row whose group was dropped meanwhile
                _learn(group.index, {}, GROUP_ORDERS, context, row.output_ids)
                self.num_group_entries += len(group.index)
            self.groups.move_to_end(key)
            group.num_live += 1
            self.rows[row.row_id] = _RowState(group, _extend(context, row.output_ids[-8:]), len(row.output_ids))
        self._enforce_bounds()

    def propose(self, rows: Sequence[DraftRow], max_lens: Sequence[int]) -> list[Draft]:
        return [self._draft(self.rows[row.row_id], max_len) for row, max_len in zip(rows, max_lens)]

    def _draft(self, state: _RowState, max_len: int) -> Draft:
        group, shared, older = state.group.index.get, self.shared.get, self.shared_older.get
        chance, chance_on_track = self.calibration.chance[state.on_track], self.calibration.chance[True]
        context, prob = state.context, 1.0
        guesses, cells, probs = [], [], []
        for _ in range(max_len):
            last_4, last_2 = context & LAST_4, context & LAST_2
            entry = group(last_4) or group(last_2) or group(context & LAST_1) or 0
            other = shared(context) or older(context) or shared(last_4) or older(last_4)
            other = other or shared(last_2) or older(last_2) or 0
            if chance[other & CELL_MASK] > chance[entry & CELL_MASK]:
                entry = other
            if not entry:
                break
            token = entry >> CELL_BITS
            guesses.append(token)
            cells.append(entry & CELL_MASK)
            prob *= chance[entry & CELL_MASK]
            if prob < self.floor:  # not drafted, yet scored: a cell could not recover from early bad luck otherwise
                break
            probs.append(prob)
            context = (context << TOKEN_BITS | token) & LAST_8
            chance = chance_on_track
        state.guesses, state.cells = guesses, cells
        return Draft(guesses[: len(probs)], probs)

    def observe(self, rows: Sequence[DraftRow], num_drafted: Sequence[int], num_accepted: Sequence[int]) -> None:
        """The counts are not needed: every guess, verified or not, is judged by the tokens that were emitted."""
        for row in rows:
            state = self.rows[row.row_id]
            index, new_ids = state.group.index, row.output_ids[state.num_learned :]
            state.on_track = self.calibration.score(state.on_track, state.guesses, state.cells, new_ids)
            state.guesses, state.cells = [], []
            if self.max_shared_entries:
                _learn(self.shared, self.shared_older, SHARED_ORDERS, state.context, new_ids)
            self.num_group_entries -= len(index)
            state.context = _learn(index, {}, GROUP_ORDERS, state.context, new_ids)
            self.num_group_entries += len(index)
            state.num_learned += len(new_ids)
        self._enforce_bounds()

    def release(self, rows: Sequence[DraftRow], finished: bool) -> None:
        for row in rows:
            group = self.rows.pop(row.row_id).group
            group.num_live -= 1
            if finished:
                self._remember(group.key, row.output_ids)
        self._enforce_bounds()

    def policy_updated(self) -> None:
        """Idle prompts give their indexes back (built from history, aged, when they return); those of live rows age in place."""
        self.version += 1
        self.calibration.policy_updated()
        self.groups = OrderedDict((key, group) for key, group in self.groups.items() if group.num_live)
        for group in self.groups.values():
            group.index = _aged(group.index)
        self.num_group_entries = sum(len(group.index) for group in self.groups.values())
        if self.version - self.version_of_shared >= max(1, self.max_age // 2):
            self._retire_shared()
        while self.history and self.version - next(iter(self.history.values())).version >= self.max_age:
            self._forget_oldest_history()

    def _build_index(self, key: bytes, prompt_ids: Sequence[int]) -> Index:
        index: Index = {}
        after_prompt = _learn(index, {}, GROUP_ORDERS, NO_CONTEXT, prompt_ids)
        history = self.history.get(key) or _History(self.version)
        for rollout in history.rollouts:
            _learn(index, {}, GROUP_ORDERS, after_prompt, rollout)
        return index if history.version == self.version else _aged(index)

    def _remember(self, key: bytes, output_ids: list[int]) -> None:
        history = self.history.pop(key, None) or _History(self.version)
        self.num_history_bytes -= history.num_bytes
        if history.version < self.version:
            history = _History(self.version)
        rollout = array("i", output_ids[: self.max_history_bytes_per_prompt // 8])  # 4 bytes each: at most half
        history.rollouts.append(rollout)
        history.num_bytes += getsizeof(rollout)
        while history.num_bytes > self.max_history_bytes_per_prompt:
            history.num_bytes -= getsizeof(history.rollouts.pop(0))
        self.num_history_bytes += history.num_bytes
        self.history[key] = history

    def _forget_oldest_history(self) -> None:
        self.num_history_bytes -= self.history.popitem(last=False)[1].num_bytes

    def _retire_shared(self) -> None:
        self.shared, self.shared_older = {}, _aged(self.shared)
        self.version_of_shared = self.version

    def _enforce_bounds(self) -> None:
        if len(self.shared) > self.max_shared_entries:
            self._retire_shared()
        while self.num_group_entries > self.max_group_entries:
            key, group = self.groups.popitem(last=False)
            self.num_group_entries -= len(group.index)
            if group.num_live:  # its rows go on with an empty index
                group.index = {}
                self.groups[key] = group
        while self.num_history_bytes > self.max_history_bytes:
            self._forget_oldest_history()
