"""The recurrent drafter: its C++ guesses as its torch code does, and it reads every row's own features at every moment."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import VOCAB_SIZE, make_engine, make_requests, tiny_llama

import atlas_rl.drafters.recurrent as recurrent
from atlas_rl.config import AtlasConfig, EngineConfig
from atlas_rl.drafters.base import Drafts
from atlas_rl.drafters.recurrent import MAX_DRAFT, NativeHead, RecurrentDrafter
from atlas_rl.drafters.recurrent_head import RecurrentHead
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.types import SamplingParams

VIEW_LOGITS = PolicyView.logits
SCHEDULES = {
    "plain": {},
    "small blocks, prompts in chunks": {"block_size": 4, "max_prefill_tokens": 7},
    "batch of 5": {"max_num_seqs": 5},
    "preemption": {"block_size": 4, "kv_memory_gib": 70 * 4 * 2 * 4 * 2 * 16 * 8 / 2**30},
}


@pytest.fixture(autouse=True)
def needs_a_compiler():
    if recurrent.LIBRARY.unavailable_reason:
        pytest.skip(recurrent.LIBRARY.unavailable_reason)


def make_policy(dtype: torch.dtype = torch.float32, **overrides):
    return tiny_llama(dtype, **{"num_hidden_layers": 4} | overrides)


def make_head(view: PolicyView, **options) -> RecurrentHead:
    torch.manual_seed(3)
    head = RecurrentHead.for_policy(view, **options)
    for name, parameter in head.named_parameters():  # norms that do nothing would hide a norm that is not applied
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return head


def rows_and_features(num_rows: int, view: PolicyView, num_sources: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    rows = [
        SimpleNamespace(
            row_id=i,
            prompt_ids=(int(rng.integers(view.vocab_size)),),
            output_ids=rng.integers(view.vocab_size, size=i % 4).tolist(),
            noise_seed=int(rng.integers(-(2**62), 2**62)),
        )
        for i in range(num_rows)
    ]
    sources = [torch.randn(2 * num_rows, view.hidden_size, generator=generator) for _ in range(num_sources)]
    return rows, sources, rng.permutation(2 * num_rows)[:num_rows]


def both(drafter: RecurrentDrafter, rows, sources, places, max_lens, min_prob):
    """Proposals of the C++ and of the torch code, each as (tokens, cells, probs), in a common width."""
    found = []
    native = drafter.native
    for drafter.native in (native, None):
        drafter.forget()
        drafter.rows, drafter.sources, drafter.places = list(rows), sources, places
        with torch.no_grad():
            drafts = drafter.propose(rows, max_lens, min_prob)
        cells = drafter.proposed[1]
        width = max(1, int(max_lens.max()))
        found.append([np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in (drafts.token_ids, cells, drafts.probs)])
    drafter.native = native
    return found


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 16, 33, 70])
@pytest.mark.parametrize(
    ("hidden_size", "intermediate_size", "layers"),
    [(64, None, (0, 2)), (36, 20, (1,)), (44, 100, ()), (8, 3, (0, 1, 3))],
)
@pytest.mark.parametrize("keeps_part", [True, False])
def test_native_guesses_are_torchs(monkeypatch, num_rows, hidden_size, intermediate_size, layers, keeps_part):
    if not keeps_part:
        monkeypatch.setattr(recurrent, "MAX_TOKEN_PART", 0)
    view = PolicyView(make_policy(hidden_size=hidden_size, num_attention_heads=4, num_key_value_heads=2, head_dim=8))
    torch.manual_seed(1)
    head = make_head(view, intermediate_size=intermediate_size)
    head = RecurrentHead(**head.config_dict() | {"layers": layers})
    drafter = RecurrentDrafter(head)
    drafter.bind(view)
    assert drafter.native is not None
    rng = np.random.default_rng(num_rows)
    ids = np.sort(rng.choice(VOCAB_SIZE, 41, replace=False))
    total, ties = 0, 0
    for vocabulary, temperature, min_prob in (
        (np.arange(VOCAB_SIZE), 1.0, 0.0),
        (ids, 1.0, 0.3),
        (ids, 0.6, 0.0),
        (np.arange(VOCAB_SIZE), 0.0, 0.25),
    ):
        drafter.vocabulary.ids = vocabulary
        drafter.weights_updated()
        drafter.calibration.right_KM[:] = rng.uniform(0.3, 1.0, drafter.calibration.right_KM.shape) * 4
        drafter.sampling = SamplingParams(temperature=temperature)
        outside = np.setdiff1d(np.arange(VOCAB_SIZE), vocabulary)

        def logits(self, hidden, outside=outside):
            return VIEW_LOGITS(self, hidden).index_fill(1, torch.from_numpy(outside), -torch.inf)

        monkeypatch.setattr(PolicyView, "logits", logits)
        rows, sources, places = rows_and_features(num_rows, view, len(layers) + 1, seed=num_rows)
        max_lens = rng.integers(0, 7, num_rows)
        max_lens[0] = 6
        native, plain = both(drafter, rows, sources, places, max_lens, min_prob)
        monkeypatch.setattr(PolicyView, "logits", VIEW_LOGITS)
        lens = [(found[2] > 0).sum(1) for found in (native, plain)]
        assert (lens[0] <= max_lens).all()
        assert all((np.where(found[2] > 0, found[2], 1) >= min_prob).all() for found in (native, plain))
        assert np.isin(native[0][native[2] > 0], vocabulary).all()
        for row in range(num_rows):
            common = min(lens[0][row], lens[1][row])
            same = native[0][row, :common] == plain[0][row, :common]
            agreed = common if same.all() else int(same.argmin())
            total += 1
            ties += agreed < max(lens[0][row], lens[1][row])
            cells = native[1][row, :agreed], plain[1][row, :agreed]
            if (cells[0] == cells[1]).all():
                np.testing.assert_allclose(native[2][row, :agreed], plain[2][row, :agreed], rtol=1e-5)
            else:
                ties += 1
    # float32 in another order, and a rough logarithm: a guess or a cell at an edge falls to the other side now and then
    assert ties <= max(1, 0.03 * total)


def test_the_range_of_lengths_and_rows_that_want_nothing():
    view = PolicyView(make_policy())
    drafter = RecurrentDrafter(make_head(view))
    drafter.bind(view)
    drafter.sampling = SamplingParams()
    rows, sources, places = rows_and_features(5, view, 3)
    native, plain = both(drafter, rows, sources, places, np.zeros(5, np.int64), 0.0)
    assert not native[2].any() and not plain[2].any()
    native, _ = both(drafter, rows, sources, places, np.full(5, 40), 0.0)
    assert ((native[2] > 0).sum(1) == MAX_DRAFT).all()
    places[2] = -1  # no features yet
    native, plain = both(drafter, rows, sources, places, np.full(5, 3), 0.0)
    assert ((native[2] > 0).sum(1) == [3, 3, 0, 3, 3]).all() and ((plain[2] > 0).sum(1) == [3, 3, 0, 3, 3]).all()


def test_judging_in_native_code_counts_as_torchs_does():
    view = PolicyView(make_policy())
    drafter = RecurrentDrafter(make_head(view))
    drafter.bind(view)
    rng = np.random.default_rng(0)
    other = recurrent.Calibration()
    for _ in range(40):
        cells = rng.integers(0, 14, (50, 10))
        drafted = rng.integers(0, 11, 50)
        accepted = np.minimum(rng.integers(0, 11, 50), drafted)
        drafter.native.judge(cells, drafted, accepted, drafter.calibration)
        other.record(cells, drafted, accepted)
    assert drafter.calibration.total_KM.max() < recurrent.HALF_LIFE
    np.testing.assert_allclose(drafter.calibration.right_KM, other.right_KM)
    np.testing.assert_allclose(drafter.calibration.total_KM, other.total_KM)


class Recorded(RecurrentDrafter):
    """Checks at each proposal that the features of every row are those after all of its tokens but the last; may be away."""

    away = 0
    num_asked = num_checked = num_blind = 0

    def propose(self, rows, max_lens, min_prob=0.0):
        self.num_asked += 1
        if self.away and self.num_asked % self.away:
            return Drafts(np.zeros((len(rows), 1), np.int64), np.zeros((len(rows), 1)))
        drafts = super().propose(rows, max_lens, min_prob)
        assert self.rows == rows and len(self.places) == len(rows)
        for row, place in zip(rows, self.places.tolist(), strict=True):
            known = [*row.prompt_ids, *row.output_ids][:-1]
            if place < 0:
                assert not known, "only a row without a prefix has no features"
                self.num_blind += 1
            elif self.num_checked % 5 == 0:
                self.check(known, [source[place] for source in self.sources])
            self.num_checked += 1
        return drafts

    @torch.no_grad()
    def check(self, known: list[int], found: list[torch.Tensor]) -> None:
        states = self.view.model(torch.tensor([known]), output_hidden_states=True).hidden_states
        expected = [*(states[layer + 1][0, -1] for layer in self.layers), states[-1][0, -1]]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("away", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_are_the_rows_own(schedule, away, dtype):
    policy = make_policy(dtype)
    requests = make_requests(7, 3, max_new_tokens=24)
    requests += [type(requests[0])(prompt_ids=(5,), seed=7 + i, max_new_tokens=9 + i) for i in range(3)]
    plain = make_engine(policy, AtlasConfig(speculate=False)).generate(requests, SamplingParams())
    options = dict(SCHEDULES[schedule])
    if dtype == torch.float32 and "kv_memory_gib" in options:
        options["kv_memory_gib"] /= 2
    drafter = Recorded(make_head(PolicyView(policy)))
    drafter.away = away
    engine = make_engine(policy, AtlasConfig(lookahead=4, engine=EngineConfig(**options)), drafter)
    drafted = engine.generate(requests, SamplingParams())
    assert not engine.controller.benched
    assert drafter.num_checked > 100 and (away or drafter.num_blind >= 3)
    assert (engine.stats.preemptions > 0) == (schedule == "preemption")
    if dtype == torch.float64:
        assert [r.token_ids for r in drafted] == [r.token_ids for r in plain]
    assert not drafter.rows and not drafter.sources, "nothing of a rollout is kept"


def test_prompts_of_one_token_that_start_before_the_first_forward():
    """They have no features to move when others start later."""
    policy = make_policy()
    requests = make_requests(2, 2, max_new_tokens=8)
    long = type(requests[0])(prompt_ids=tuple(range(2, 40)), seed=1, max_new_tokens=8)
    one = type(requests[0])(prompt_ids=(5,), seed=2, max_new_tokens=8)
    drafter = Recorded(make_head(PolicyView(policy)))
    engine = make_engine(policy, AtlasConfig(lookahead=3, engine=EngineConfig(max_prefill_tokens=20)), drafter)
    engine.generate([one, long, *requests], SamplingParams())
    assert not engine.controller.benched and engine.stats.drafters["recurrent"].proposed


def bigram_head(view: PolicyView) -> RecurrentHead:
    """Repeats the last token: state = features · 0, and after each token the token's own embedding."""
    head = RecurrentHead(hidden_size=view.hidden_size, layers=(), intermediate_size=view.hidden_size)
    size = view.hidden_size
    with torch.no_grad():
        head.fc.weight.zero_()
        head.state_gate_up.weight.zero_()
        # silu(gate) · up with a large gate: about gate · up; up is the embedding, gate a constant through the norm's scale
        head.token_gate_up.weight.zero_()
        head.token_gate_up.weight[size:] = torch.eye(size)
        head.token_gate_up.weight[:size] = 1.0  # the same sum for every unit
        head.down.weight.copy_(torch.eye(size))
    return head


def test_a_head_that_repeats_the_last_token_is_right_where_the_policy_does():
    """Tied embeddings whose rows are far apart, and a policy whose layers add nothing: its arg-max is the last token."""
    policy = make_policy(tie_word_embeddings=True, num_hidden_layers=2)
    with torch.no_grad():
        for layer in policy.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        weight = torch.randn(VOCAB_SIZE, 64, generator=torch.Generator().manual_seed(0))
        weight[:, 0] = 8.0  # gates are positive: the sum of a row is
        policy.model.embed_tokens.weight.copy_(weight)
        policy.lm_head.weight.copy_(weight)
    drafter = RecurrentDrafter(bigram_head(PolicyView(policy)))
    engine = make_engine(policy, AtlasConfig(lookahead=4), drafter)
    rollouts = engine.generate(make_requests(4, 2, max_new_tokens=30), SamplingParams(temperature=0.0))
    assert all(set(r.token_ids) == {r.prompt_ids[-1]} for r in rollouts), "the policy repeats itself"
    counts = engine.stats.drafters["recurrent"]
    assert counts.accepted == counts.proposed > 0


def test_being_away_changes_no_guess():
    policy = make_policy()
    found = []
    for away in (0, 3):
        guesses = {}

        class Noting(Recorded):
            def propose(self, rows, max_lens, min_prob=0.0, guesses=guesses):
                drafts = super().propose(rows, max_lens, min_prob)
                for row, tokens, probs in zip(rows, *drafts, strict=True):
                    if probs.any():
                        guesses[row.noise_seed, tuple(row.output_ids)] = tokens[probs > 0].tolist()
                return drafts

        drafter = Noting(make_head(PolicyView(policy)))
        drafter.away = away
        engine = make_engine(policy, AtlasConfig(lookahead=3), drafter)
        engine.generate(make_requests(4, 2, max_new_tokens=30), SamplingParams())
        found.append(guesses)
    common = found[0].keys() & found[1].keys()
    assert len(common) > 20 and all(found[0][key] == found[1][key] for key in common)


def test_the_draft_vocabulary_is_a_slice_of_the_live_head(monkeypatch):
    monkeypatch.setattr("atlas_rl.drafters.vocab.MIN_TOKENS", 100)
    policy = make_policy()
    drafter = RecurrentDrafter(make_head(PolicyView(policy)))
    engine = make_engine(policy, AtlasConfig(lookahead=3), drafter)
    sampling = SamplingParams(temperature=0.3)
    requests = make_requests(2, 4, max_new_tokens=60)
    engine.generate(requests, sampling)
    assert len(drafter.vocabulary.ids) == VOCAB_SIZE
    engine.weights_changed = True
    engine.generate(requests, sampling)
    ids = drafter.vocabulary.ids
    assert len(ids) in (32, 64, 96) and (np.diff(ids) > 0).all()
    assert engine.stats.draft_vocabulary["size"] == len(ids) and engine.stats.draft_vocabulary["coverage"] > 0.99
    assert not engine.controller.benched


def test_damaged_weights_bench_it_at_once_also_while_an_engine_is_built(caplog):
    policy = make_policy()
    head = make_head(PolicyView(policy))
    with torch.no_grad():
        head.fc.weight[0, 0] = torch.nan
    engine = make_engine(policy, AtlasConfig(lookahead=3), RecurrentDrafter(head))
    rollouts = engine.generate(make_requests(2, 2), SamplingParams())
    plain = make_engine(policy).generate(make_requests(2, 2), SamplingParams())
    assert [r.token_ids for r in rollouts] == [r.token_ids for r in plain]
    assert [r.message.count("NaN") for r in caplog.records] == [1]


@pytest.mark.parametrize("overrides", [{"hidden_size": 32}, {"num_hidden_layers": 2}])
def test_a_head_of_another_policy_is_refused(overrides):
    head = make_head(PolicyView(make_policy()))
    with pytest.raises(ValueError, match="hidden size 64 with at least 3 layers"):
        make_engine(make_policy(**overrides), drafter=RecurrentDrafter(head))


def test_a_policy_whose_logits_are_scaled_is_served_by_torch():
    view = PolicyView(make_policy(torch.float64))
    assert not NativeHead.serves(view) and NativeHead.serves(PolicyView(make_policy()))
