"""How much KV memory is taken: what is needed, bounded, rounded where it is to be kept, and less where memory is in pieces."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers import make_requests, tiny_llama

from atlas_rl.config import EngineConfig
from atlas_rl.engine import memory
from atlas_rl.engine.engine import RolloutEngine
from atlas_rl.engine.kv_cache import KVCache
from atlas_rl.engine.memory import kv_blocks, take_kv
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.engine.sequence import Sequence

CONFIG = EngineConfig(block_size=4)


@pytest.fixture(scope="module")
def view() -> PolicyView:
    return PolicyView(tiny_llama())


@pytest.fixture(scope="module")
def groups():
    sequences = [Sequence(request, i, i) for i, request in enumerate(make_requests(3, 4))]
    return RolloutEngine._group(sequences)


def test_drafters_share_the_bound(view, groups):
    shape = view.kv_shape(CONFIG.block_size)
    least, wanted = kv_blocks(shape, groups, CONFIG, view.device)
    assert 2 < least < wanted
    bound = EngineConfig(block_size=4, kv_memory_gib=(wanted - 1) * shape.block_bytes / 2**30)
    assert kv_blocks(shape, groups, bound, view.device) == (least, wanted - 1)
    _, beside_drafters = kv_blocks(shape, groups, bound, view.device, drafter_block_bytes=shape.block_bytes)
    assert beside_drafters == (wanted - 1) // 2
    with pytest.raises(ValueError, match="engine.kv_memory_gib"):
        kv_blocks(shape, groups, bound, view.device, drafter_block_bytes=wanted * shape.block_bytes)


def test_memory_in_pieces_is_taken_as_it_is(view, groups, monkeypatch, caplog):
    least, wanted = kv_blocks(view.kv_shape(4), groups, CONFIG, view.device)
    largest, asked = 0.6 * wanted, []

    def in_pieces(shape, num_blocks, device):
        asked.append(num_blocks)
        if num_blocks > largest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return KVCache(shape, num_blocks, device)

    monkeypatch.setattr(memory, "KVCache", in_pieces)
    with caplog.at_level(logging.WARNING):
        cache = take_kv(view, groups, CONFIG, 0, None)
    assert asked[0] == wanted and least <= cache.num_blocks == asked[-1] <= largest
    assert "not in one piece" in caplog.text
    largest = least - 1
    with pytest.raises(ValueError, match="max_completion_length"):
        take_kv(view, groups, CONFIG, 0, None)
    assert asked[-1] == least, "one sequence's worth was tried last"


def test_little_memory_is_kept_and_has_room_to_spare(view, groups, monkeypatch):
    _, wanted = kv_blocks(view.kv_shape(4), groups, CONFIG, view.device)
    assert take_kv(view, groups, CONFIG, 0, None).num_blocks == wanted, "a CPU keeps none"
    monkeypatch.setattr(memory, "_little_bytes", lambda device: 2.0**30)
    kept = take_kv(view, groups, CONFIG, 0, None)
    assert wanted <= kept.num_blocks == 1 << (wanted - 1).bit_length() and memory.is_little(kept)
    assert take_kv(view, groups, CONFIG, 0, kept) is kept
    assert take_kv(view, groups[:1], CONFIG, 0, kept) is kept
    assert take_kv(view, groups, EngineConfig(block_size=8), 0, kept) is not kept, "another shape"
    assert not memory.is_little(kept, drafter_block_bytes=2**30)
