"""Which running rows begin with the same blocks: the samples of a prompt, whose attention may read the prompt once for all.

Shapes: R rows, P spans of neighbouring rows.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np

from atlas_rl.engine.sequence import Sequence

MIN_SHARED_TOKENS = 256
"""Of a prompt, from which on its samples share the reading of it: below, it is read from cache anyway."""
MIN_SAVED = 0.2
"""Share of all cached tokens that need not be read again, from which on it pays to look at rows in two passes."""


def spans_of(sequences: Rows[Sequence], block_size: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Spans of rows that share whole blocks of their prompts, if that saves enough.

    Returns:
        [3, P] first row, number of rows, shared tokens of each span, and [R] shared tokens of each row; None: too little.
    """
    spans, shared_R = [], np.zeros(len(sequences), np.int64)
    first = 0
    while first < len(sequences):
        num_blocks = (len(sequences[first].prompt_ids) - 1) // block_size
        prefix, end = sequences[first].block_table[:num_blocks], first + 1
        while end < len(sequences) and num_blocks and sequences[end].block_table[:num_blocks] == prefix:
            end += 1
        if end - first > 1 and num_blocks * block_size >= MIN_SHARED_TOKENS:
            spans.append((first, end - first, num_blocks * block_size))
            shared_R[first:end] = num_blocks * block_size
        first = end
    saved = sum((num_rows - 1) * num_tokens for _, num_rows, num_tokens in spans)
    if saved < MIN_SAVED * sum(seq.num_computed for seq in sequences) or not spans:
        return None
    return np.array(spans, np.int64).T, shared_R
