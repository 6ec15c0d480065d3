"""ForwardBatch: every tensor one forward needs, passed as an argument, never a module global.

Shapes: N tokens of all rows back to back, R rows, Q the largest query length, M blocks, S = M * block_size KV slots per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

import numpy as np
import torch

from atlas_kernels import SharedPrefixes, StepInputs, uses_triton
from atlas_rl.engine.kv_cache import KVCache


def _nothing() -> np.ndarray:
    return np.zeros(0, np.int64)


@dataclass(kw_only=True)
class ForwardBatch:
    kv_cache: KVCache
    input_ids_N: torch.Tensor
    positions_N: torch.Tensor
    slots_N: torch.Tensor
    """Where each token's key and value go: block * block_size + offset; -1: nowhere, the place is padding."""
    block_tables_RM: torch.Tensor
    """Where each row's keys and values are; block 0 pads."""
    starts_R: torch.Tensor
    query_lens_R: torch.Tensor
    """Position of each row's first token in this forward, and how many tokens it has."""
    query_starts_R: torch.Tensor | None = None
    """Place of each row's first token among the N, where places may be padding; None: rows lie back to back."""
    shared: SharedPrefixes | None = None
    """Rows that begin with the same blocks; None: each row reads its own."""
    max_query_len: int
    num_cached: int = 0
    """Tokens of all rows that were in the cache before, as far as the host knows."""
    input_ids: np.ndarray = field(default_factory=_nothing)
    positions: np.ndarray = field(default_factory=_nothing)
    """[N] tokens and their positions for the host; a captured step's are known after it only."""
    query_lens: np.ndarray = field(default_factory=_nothing)
    """[R] the same."""
    hidden_ND: torch.Tensor | None = None
    """What the forward leaves: last hidden states, after the final norm."""
    is_tapped: bool = True
    """Whether the forward has to leave what is tapped."""
    tapped: dict[int, torch.Tensor] = field(default_factory=dict)
    """And the outputs [N, D] of the decoder layers that drafters read, by layer (`PolicyView.tap`)."""
    masks: dict[tuple[int | None, torch.dtype, int], torch.Tensor] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        kv_cache: KVCache,
        token_ids: Sequence[Sequence[int]],
        starts: Sequence[int],
        block_tables: Sequence[list[int]],
    ) -> ForwardBatch:
        """Rows of tokens; row r sits at positions starts[r], starts[r] + 1, … and finds its KV in block_tables[r]."""
        num_rows = len(token_ids)
        query_lens = np.fromiter(map(len, token_ids), np.int64, num_rows)
        start_R = np.fromiter(starts, np.int64, num_rows)
        blocks_RM = np.zeros((num_rows, max(map(len, block_tables))), np.int64)
        for row, table in enumerate(block_tables):
            blocks_RM[row, : len(table)] = table
        flat_ids = np.fromiter(chain.from_iterable(token_ids), np.int64, int(query_lens.sum()))
        return cls.of_arrays(kv_cache, flat_ids, query_lens, start_R, blocks_RM)

    @classmethod
    def of_arrays(
        cls,
        kv_cache: KVCache,
        flat_ids: np.ndarray,
        query_lens: np.ndarray,
        start_R: np.ndarray,
        blocks_RM: np.ndarray,
    ) -> ForwardBatch:
        """The same from arrays, all int64: tokens [N], query lengths and starts [R], and block tables, padded by block 0 (which
        is always masked) to as many as the longest row needs, or more."""
        device = kv_cache.memory_L2NHSD.device
        block_size, num_rows = kv_cache.shape.block_size, len(query_lens)
        max_query_len = int(query_lens.max())
        num_blocks = -(-int((start_R + query_lens).max()) // block_size)
        blocks_RM = np.ascontiguousarray(blocks_RM[:, :num_blocks])

        rows_N, positions_N = np.arange(num_rows), start_R
        if len(flat_ids) > num_rows:
            rows_N = np.repeat(rows_N, query_lens)
            row_starts = np.cumsum(query_lens) - query_lens
            positions_N = np.arange(len(rows_N)) + np.repeat(start_R - row_starts, query_lens)
        slots_N = blocks_RM[rows_N, positions_N // block_size] * block_size + positions_N % block_size

        def to_device(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        return cls(
            kv_cache=kv_cache,
            input_ids=flat_ids,
            positions=positions_N,
            input_ids_N=to_device(flat_ids),
            positions_N=to_device(positions_N),
            slots_N=to_device(slots_N),
            block_tables_RM=to_device(blocks_RM),
            starts_R=to_device(start_R),
            query_lens_R=to_device(query_lens),
            query_lens=query_lens,
            max_query_len=max_query_len,
            num_cached=int(start_R.sum()),
        )

    @classmethod
    def of_step(
        cls, kv_cache: KVCache, inputs: StepInputs, query_starts_R: torch.Tensor, num_places: int
    ) -> ForwardBatch:
        """Within a captured step: so many places for each row, those beyond its query length are padding."""
        return cls(
            kv_cache=kv_cache,
            input_ids_N=inputs.input_ids_N,
            positions_N=inputs.positions_N,
            slots_N=inputs.kv_slots_N,
            block_tables_RM=inputs.block_tables_RM,
            starts_R=inputs.starts_R,
            query_lens_R=inputs.query_lens_R,
            query_starts_R=query_starts_R,
            max_query_len=num_places,
        )

    @property
    def num_rows(self) -> int:
        return len(self.query_lens)

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @cached_property
    def takes_kernels(self) -> bool:
        """Whether attention is that of `atlas_kernels`: on an accelerator, and where places may be padding, as the host then
        does not know how many tokens a row has."""
        return self.query_starts_R is not None or uses_triton(self.positions_N)

    @property
    def num_kv_slots(self) -> int:
        """S: KV slots per row, a multiple of the block size."""
        return self.block_tables_RM.shape[1] * self.kv_cache.shape.block_size

    @cached_property
    def token_places(self) -> torch.Tensor:
        return self.kv_cache.token_places(self.slots_N)

    @cached_property
    def piece_places(self) -> torch.Tensor:
        return self.kv_cache.piece_places(self.block_tables_RM)

    @cached_property
    def is_token_RQ(self) -> torch.Tensor | None:
        """Which of R * Q padded places hold a token; None where no row is padded."""
        if self.num_tokens == self.num_rows * self.max_query_len:
            return None
        return torch.arange(self.max_query_len, device=self.positions_N.device) < self.query_lens_R[:, None]

    @cached_property
    def padded_index_N(self) -> torch.Tensor | None:
        """Place of each token among R * Q padded ones; None where no row is padded."""
        return None if self.is_token_RQ is None else self.is_token_RQ.flatten().nonzero()[:, 0]

    def mask(self, sliding_window: int | None, dtype: torch.dtype, num_copies: int) -> torch.Tensor:
        """Additive causal mask [R, 1, num_copies * Q (or 1), S], built once per forward for all layers of one kind.

        A row's padding is masked as its last token is."""
        key = (sliding_window, dtype, num_copies)
        if key not in self.masks:
            slots_S = torch.arange(self.num_kv_slots, device=self.positions_N.device)
            offsets_Q = torch.arange(self.max_query_len, device=self.positions_N.device)
            padded_positions_RQ = self.starts_R[:, None] + offsets_Q.minimum(self.query_lens_R[:, None] - 1)
            distance_RQS = padded_positions_RQ[:, :, None] - slots_S
            hidden = distance_RQS < 0
            if sliding_window is not None:
                hidden |= distance_RQS >= sliding_window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
            many_queries = mask.shape[1] > 1  # one query's mask broadcasts over its copies
            self.masks[key] = mask[:, None].repeat(1, 1, num_copies, 1) if many_queries else mask[:, None]
        return self.masks[key]

    def pad_queries(self, query_NHD: torch.Tensor) -> torch.Tensor:
        """[N, H, D] -> [R, Q, H, D]."""
        dims = (self.num_rows, self.max_query_len, *query_NHD.shape[1:])
        if self.padded_index_N is None:
            return query_NHD.reshape(dims)
        padded = query_NHD.new_zeros(dims)
        padded.flatten(0, 1).index_copy_(0, self.padded_index_N, query_NHD)
        return padded

    def unpad(self, output_RQHD: torch.Tensor) -> torch.Tensor:
        """[R, Q, H, D] -> [N, H, D]."""
        flat = output_RQHD.flatten(0, 1)
        return flat if self.padded_index_N is None else flat.index_select(0, self.padded_index_N)
