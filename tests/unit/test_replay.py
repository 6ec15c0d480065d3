"""Replayed rollouts: the features that the engine had, windows by the conventions of `Windows`, acceptance measured on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import MODELS, make_engine, make_requests, tiny_llama

from atlas_rl.adapt import replay as replay_module
from atlas_rl.adapt.acceptance import measure
from atlas_rl.adapt.losses import PolicyEnds
from atlas_rl.adapt.replay import Replay, replay
from atlas_rl.config import AtlasConfig
from atlas_rl.drafters.heads import DraftHead, Windows
from atlas_rl.drafters.recurrent_head import RecurrentHead
from atlas_rl.engine.engine import RolloutEngine
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.types import Rollout, SamplingParams

SAMPLING = SamplingParams(temperature=0.8)
LAYERS = (0, 1)


def made_replay(lens: list[int], prompt_lens: list[int]) -> Replay:
    """Token i of rollout r is 1000 r + i, and so are its features."""
    ids = torch.cat([1000 * r + torch.arange(n) for r, n in enumerate(lens)])
    return Replay(
        token_ids_N=ids,
        hidden_ND=ids[:, None].float(),
        tapped_NLD=ids[:, None, None].float(),
        lens_R=torch.tensor(lens),
        prompt_lens_R=torch.tensor(prompt_lens),
        seeds_R=torch.arange(len(lens)) + 50,
        groups_R=torch.arange(len(lens)),
    )


def starts_of(windows: Windows, depth: int) -> list[int]:
    """The tokens at which complete first guesses start."""
    complete_BS = windows.is_complete(depth)[:, :, 0]
    return windows.token_ids_BW[:, : windows.width - depth][complete_BS].tolist()


def rolled_out(model, num_prompts: int = 4) -> tuple[list[Rollout], list[int]]:
    requests = make_requests(num_prompts, 2)
    rollouts = make_engine(model, AtlasConfig(speculate=False)).generate(requests, SAMPLING)
    return rollouts, [request.seed for request in requests]


# ---- features


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pack", [True, False])
def test_features_are_those_of_the_model(name, pack, monkeypatch):
    monkeypatch.setattr(replay_module, "MAX_CHUNK", 16)  # rows of several chunks
    monkeypatch.setattr(replay_module, "MAX_TOKENS", 48)  # several groups of rows
    model = MODELS[name]()
    rollouts, seeds = rolled_out(model)
    view = PolicyView(model, pack_linears=pack)
    view.tap([1])
    replayed = replay(view, LAYERS, rollouts, seeds)
    assert view.tapped_layers == {1}
    assert replayed.seeds_R.tolist() == seeds and not replayed.hidden_ND.is_inference()
    end = 0
    for rollout, length in zip(rollouts, replayed.lens_R.tolist(), strict=True):
        part = slice(end, end := end + length)
        ids = torch.tensor([rollout.prompt_ids + rollout.token_ids])
        assert replayed.token_ids_N[part].tolist() == ids[0].tolist()
        with torch.no_grad():
            states = model.model(ids, output_hidden_states=True).hidden_states
            before_norm = []
            handle = model.model.layers[1].register_forward_hook(lambda *a, out=before_norm: out.append(a[2]))
            model.model(ids)
            handle.remove()
        last_layer = before_norm[0][0] if isinstance(before_norm[0], tuple) else before_norm[0]
        torch.testing.assert_close(replayed.hidden_ND[part], states[-1][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(replayed.tapped_NLD[part, 0], states[1][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            replayed.tapped_NLD[part, 1], last_layer.view_as(states[-1][0]), rtol=1e-4, atol=1e-4
        )


def test_features_are_those_of_the_engine():
    """Every forward of a rollout is recorded by position and token; replayed features are among those."""
    view, recorded = PolicyView(tiny_llama()), {}
    requests, hidden_states = make_requests(3, 2), view.hidden_states

    def recording(batch):
        view.tap(LAYERS)
        hidden_ND = hidden_states(batch)
        features = torch.stack([*(batch.tapped[layer] for layer in LAYERS), hidden_ND], dim=1)
        places = zip(batch.positions.tolist(), batch.input_ids.tolist(), strict=True)
        for place, features_LD in zip(places, features, strict=True):
            recorded.setdefault(place, []).append(features_LD)
        return hidden_ND

    view.hidden_states = recording
    rollouts = RolloutEngine(view, AtlasConfig(speculate=False)).generate(requests, SAMPLING)
    del view.hidden_states
    replayed = replay(view, LAYERS, rollouts, [request.seed for request in requests])
    features_NLD = torch.cat([replayed.tapped_NLD, replayed.hidden_ND[:, None]], dim=1)
    positions = [position for n in replayed.lens_R.tolist() for position in range(n)]
    last = set((replayed.lens_R.cumsum(0) - 1).tolist())  # which the engine never computes
    for i, place in enumerate(zip(positions, replayed.token_ids_N.tolist(), strict=True)):
        if i not in last:
            assert any(torch.allclose(f, features_NLD[i], rtol=1e-4, atol=1e-4) for f in recorded[place])


# ---- windows


def test_windows_hold_what_they_say():
    windows = made_replay([6, 9], [3, 4]).cut(torch.tensor([1, 0]), torch.tensor([2, 3]), width=4)
    assert windows.token_ids_BW.tolist() == [[1002, 1003, 1004, 1005, 1006], [3, 4, 5, 5, 5]]
    assert windows.hidden_BWD[0, :, 0].tolist() == windows.tapped_BWLD[0, :, 0, 0].tolist() == [1002, 1003, 1004, 1005]
    assert windows.positions_B.tolist() == [2, 3] and windows.prompt_lens_B.tolist() == [4, 3]
    assert windows.seeds_B.tolist() == [51, 50] and windows.lens_B.tolist() == [4, 2]
    # window 1: its start 3 guesses token 5, the last one, from position 4; nothing else has a target
    assert windows.is_complete(2)[1].tolist() == [[True, False], [False, False]]
    # window 0: start 2 guesses tokens 4 (the completion's first) and 5
    assert windows.is_complete(2)[0].all()


def test_tiles_hold_every_start_once():
    replayed = made_replay([6, 9, 3, 2, 4], [3, 4, 1, 1, 4])
    for width, depth in [(5, 2), (3, 2), (40, 8)]:
        # from the prompt's last token but one (or from its only token) to the last but two
        assert sorted(starts_of(replayed.tiles(width, depth), depth)) == [1, 2, 3, 1002, 1003, 1004, 1005, 1006, 2000]


@pytest.mark.parametrize(("width", "depth"), [(3, 2), (6, 2), (12, 4)])
def test_samples_hold_every_start_about_as_often(width, depth):
    replayed = made_replay([6, 60, 2], [3, 40, 1])
    windows = replayed.sample(4000, width, depth, torch.Generator().manual_seed(0))
    starts, counts = np.unique(starts_of(windows, depth), return_counts=True)
    assert starts.tolist() == [1, 2, 3, *range(1038, 1058)]
    if (
        width - depth <= 2
    ):  # wider windows would have to begin before the first token: the rest are drawn a little more often
        assert counts.max() < 1.3 * counts.min()
    again = replayed.sample(4000, width, depth, torch.Generator().manual_seed(0))
    assert torch.equal(windows.token_ids_BW, again.token_ids_BW)


def test_newest_keeps_whole_rollouts():
    replayed = made_replay([6, 9, 3], [3, 4, 1])
    kept = (replayed + replayed).newest(20)
    assert kept.lens_R.tolist() == [6, 9, 3] and kept.token_ids_N.tolist() == replayed.token_ids_N.tolist()
    assert kept.newest(5).token_ids_N.tolist() == kept.newest(1).token_ids_N.tolist() == [2000, 2001, 2002]


# ---- acceptance


class Oracle(DraftHead):
    """Goes on as the policy does: its states are the policy's own, of the position that draws the token."""

    kind, layers = "oracle", ()

    def unroll(self, windows: Windows, depth: int, embedding_VD: torch.Tensor) -> torch.Tensor:
        return windows.hidden_BWD[:, 1:].unfold(1, depth, 1).transpose(2, 3)

    def config_dict(self):
        return {}


def acceptance_of(head: DraftHead, sampling: SamplingParams = SAMPLING, **options):
    model = tiny_llama()
    rollouts, seeds = rolled_out(model)
    windows = replay(PolicyView(model), head.layers, rollouts, seeds).tiles(12, 4)
    return measure(head, windows, PolicyEnds.of(model), sampling, depth=4, **options), rollouts


def test_the_policy_itself_is_always_right():
    acceptance, rollouts = acceptance_of(Oracle())
    # one start per token of a completion but the first where the prompt is a single token
    assert acceptance.num_starts == sum(len(r.token_ids) - (len(r.prompt_ids) == 1) for r in rollouts)
    assert acceptance.coupled == acceptance.runs == [1.0] * 4
    assert acceptance.overlap == pytest.approx([1.0] * 4, abs=1e-5)
    assert acceptance.tokens_per_step == [2.0, 3.0, 4.0, 5.0]
    assert max(acceptance.argmax) < 1  # a sample is not always the most probable token
    assert acceptance.to_dict()["coupled_over_overlap"] == pytest.approx([1.0] * 4, abs=1e-4)


def test_another_temperature_or_noise_is_not_right():
    at_another = acceptance_of(Oracle(), SamplingParams(temperature=3.0))[0]
    assert max(at_another.coupled) < 1
    greedy = acceptance_of(Oracle(), SamplingParams(temperature=0.0))[0]
    assert greedy.coupled == greedy.argmax


def test_a_random_head_is_hardly_ever_right():
    torch.manual_seed(0)
    acceptance, _ = acceptance_of(RecurrentHead(hidden_size=64, layers=LAYERS))
    assert all(0 <= x < 0.4 for x in acceptance.coupled + acceptance.overlap)
    assert acceptance.runs == sorted(acceptance.runs, reverse=True)
    assert 1 <= acceptance.tokens_per_step[0] <= acceptance.tokens_per_step[-1] < 2


def test_a_draft_vocabulary_bounds_what_can_be_right():
    vocab_ids = torch.arange(0, 97, 2)
    acceptance, rollouts = acceptance_of(Oracle(), vocab_ids=vocab_ids)
    even = np.mean([t % 2 == 0 for r in rollouts for t in r.token_ids[len(r.prompt_ids) == 1 :]])
    assert acceptance.coupled[0] == pytest.approx(even) and acceptance.overlap[0] < 0.9


def test_table_has_a_row_per_depth():
    table = acceptance_of(Oracle())[0].table("figures")
    assert table.row_count == 4 and len(table.columns) == 7
