"""The engine against transformers' generate, and in trouble."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import MODELS, VOCAB_SIZE, make_engine, make_requests, tiny_llama

from atlas_rl.bench.wrong_drafters import RandomDrafter
from atlas_rl.config import AtlasConfig, EngineConfig
from atlas_rl.drafters.base import Drafts
from atlas_rl.drafters.suffix import SuffixDrafter
from atlas_rl.engine.engine import _warned
from atlas_rl.types import SamplingParams

PLAIN = AtlasConfig(speculate=False)
GREEDY = SamplingParams(temperature=0.0)


def tokens_of(rollouts) -> list[list[int]]:
    return [rollout.token_ids for rollout in rollouts]


def hf_greedy(model, request, **options) -> list[int]:
    input_ids = torch.tensor([request.prompt_ids])
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=False,
        max_new_tokens=request.max_new_tokens,
        pad_token_id=0,
        **options,
    )
    return output[0, input_ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options",
    [{}, {"eos_token_id": [5, 6, 7]}, {"repetition_penalty": 1.7}, {"eos_token_id": [5, 6, 7], "min_new_tokens": 12}],
    ids=str,
)
def test_greedy_equals_generate(name: str, options: dict):
    model = MODELS[name](torch.float64)
    requests = make_requests(8, 1)
    ours = {("eos_token_ids" if k == "eos_token_id" else k): v for k, v in options.items()}
    engine = make_engine(model, AtlasConfig(lookahead=3), RandomDrafter(VOCAB_SIZE))
    rollouts = engine.generate(requests, replace(GREEDY, **ours))
    assert tokens_of(rollouts) == [hf_greedy(model, request, **options) for request in requests]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_equal_a_teacher_forced_forward(name: str, temperature: float):
    """Law 5, in float32 on packed weights, with filters and drafts."""
    model = MODELS[name]()
    engine = make_engine(model, AtlasConfig(lookahead=2), RandomDrafter(VOCAB_SIZE))
    sampling = SamplingParams(temperature=temperature, top_p=0.9, repetition_penalty=1.2)
    for rollout in engine.generate(make_requests(5, 2), sampling):
        ids = torch.tensor([rollout.prompt_ids + rollout.token_ids])
        with torch.no_grad():
            logits = model(ids).logits[0, len(rollout.prompt_ids) - 1 : -1] / temperature
        expected = logits.log_softmax(-1).gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, atol=1e-4, rtol=0)


def test_sampling_statistics_equal_generate():
    """First tokens of 4,000 completions of one prompt, against the model's own distribution."""
    model = tiny_llama(torch.float64)
    (request,) = make_requests(1, 1, max_new_tokens=1)
    requests = [replace(request, seed=i) for i in range(4000)]
    rollouts = make_engine(model, AtlasConfig(engine=EngineConfig(max_num_seqs=1000))).generate(
        requests, SamplingParams()
    )
    with torch.no_grad():
        probs = model(torch.tensor([request.prompt_ids])).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor([r.token_ids[0] for r in rollouts]), minlength=VOCAB_SIZE)
    z = (counts - 4000 * probs) / (4000 * probs * (1 - probs)).sqrt()
    assert z.abs().max() < 5


def test_siblings_share_a_prefill_and_differ():
    model = tiny_llama()
    engine = make_engine(model, PLAIN)
    requests = make_requests(2, 8)
    rollouts = engine.generate(requests, SamplingParams())
    assert engine.stats.num_prompts == 2 and engine.stats.num_completions == 16
    assert engine.stats.prompt_tokens == sum(len(r.prompt_ids) for r in requests[::8])
    assert len({tuple(r.token_ids) for r in rollouts}) == 16
    assert tokens_of(engine.generate(requests, SamplingParams())) == tokens_of(rollouts)


def test_forced_lengths_and_finish_reasons():
    model = tiny_llama()
    lens = [1, 7, 30, 2]
    requests = [replace(r, max_new_tokens=n) for r, n in zip(make_requests(4, 1), lens, strict=True)]
    every_token = tuple(range(VOCAB_SIZE))
    forced = SamplingParams(ignore_eos=True, eos_token_ids=every_token)
    rollouts = make_engine(model).generate(requests, forced)
    assert [len(r.token_ids) for r in rollouts] == lens
    assert {r.finish_reason for r in rollouts} == {"length"}
    stopped = make_engine(model).generate(requests, SamplingParams(eos_token_ids=every_token))
    assert [(len(r.token_ids), r.finish_reason) for r in stopped] == [(1, "stop")] * 4
    stopped = make_engine(model).generate(requests, SamplingParams(ignore_eos=True, stop_token_ids=every_token))
    assert {len(r.token_ids) for r in stopped} == {1}, "stop tokens end a completion even where EOS is ignored"
    late = make_engine(model).generate(
        requests[2:3], SamplingParams(eos_token_ids=tuple(range(VOCAB_SIZE - 1)), min_new_tokens=5)
    )
    assert late[0].token_ids[:5] == [VOCAB_SIZE - 1] * 5 and len(late[0].token_ids) >= 6


def test_kv_memory_is_given_back_and_counted():
    engine = make_engine(tiny_llama(), PLAIN)
    engine.generate(make_requests(2, 4), SamplingParams())
    assert engine.runner is None and engine.scheduler is None
    block_bytes = engine.view.kv_shape(16).block_bytes
    assert engine.stats.kv_peak_bytes > 0 and engine.stats.kv_peak_bytes % block_bytes == 0


def test_no_request_is_no_work():
    assert make_engine(tiny_llama()).generate([], SamplingParams()) == []


# ---- bad input and trouble -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ((), ["prompt 1", "empty"]),
        ((3,) * 512, ["prompt 1", "512", "shorten"]),
        ((3, VOCAB_SIZE), ["prompt 1", "token id", "tokenizer"]),
        ((3, -1), ["prompt 1", "token id"]),
    ],
)
def test_bad_prompts_are_named(prompt, words):
    good, bad = make_requests(2, 1)
    with pytest.raises(ValueError) as caught:
        make_engine(tiny_llama()).generate([good, replace(bad, prompt_ids=prompt)], GREEDY)
    assert all(word in str(caught.value) for word in words), caught.value


def test_too_little_kv_memory_is_named():
    engine = make_engine(tiny_llama(), AtlasConfig(engine=EngineConfig(kv_memory_gib=1e-6)))
    with pytest.raises(ValueError, match="engine.kv_memory_gib"):
        engine.generate(make_requests(1, 1), GREEDY)
    assert engine.scheduler is None


def test_completions_are_cut_at_the_models_limit(caplog):
    model = tiny_llama(max_position_embeddings=50)
    requests = [replace(r, max_new_tokens=100) for r in make_requests(3, 1)]
    _warned.clear()
    with caplog.at_level(logging.WARNING):
        rollouts = make_engine(model).generate(requests, SamplingParams())
    assert all(len(r.prompt_ids) + len(r.token_ids) == 50 for r in rollouts)
    assert sum("50 positions" in record.message for record in caplog.records) == 1


def test_nan_logits_are_a_clear_error_and_leave_the_engine_usable():
    model = tiny_llama()
    engine = make_engine(model, PLAIN)
    expected = tokens_of(engine.generate(make_requests(2, 2), SamplingParams()))
    weight = model.model.layers[0].mlp.up_proj.weight
    saved = weight.detach().clone()
    weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="diverged"):
        engine.generate(make_requests(2, 2), SamplingParams())
    assert engine.runner is None
    weight.data.copy_(saved)
    assert tokens_of(engine.generate(make_requests(2, 2), SamplingParams())) == expected


class FailingDrafter(RandomDrafter):
    """Misbehaves in one chosen way at its fifth proposal."""

    def __init__(self, fault: str) -> None:
        super().__init__(VOCAB_SIZE)
        self.fault = fault
        self.calls = 0

    def propose(self, rows, max_lens, min_prob=0.0):
        drafts = super().propose(rows, max_lens)
        self.calls += 1
        if self.calls < 5:
            return drafts
        if self.fault == "raises":
            raise RuntimeError("no more ideas")
        if self.fault == "nan":
            return Drafts(drafts.token_ids, np.full_like(drafts.probs, np.nan))
        if self.fault == "foreign token":
            return Drafts(np.full_like(drafts.token_ids, VOCAB_SIZE + 5), drafts.probs)
        return Drafts(drafts.token_ids[:-1], drafts.probs[:-1])


@pytest.mark.parametrize("fault", ["raises", "nan", "foreign token", "too few drafts"])
def test_a_failing_drafter_is_benched_with_one_warning(fault: str, caplog):
    model = tiny_llama()
    requests = make_requests(2, 4)
    expected = tokens_of(make_engine(model, PLAIN).generate(requests, SamplingParams()))
    drafter = FailingDrafter(fault)
    engine = make_engine(model, AtlasConfig(lookahead=2), drafter)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert tokens_of(engine.generate(requests, SamplingParams())) == expected
    assert drafter.calls == 5
    assert [r.message for r in caplog.records if "benched" in r.message] == [
        r.message for r in caplog.records if "random" in r.message
    ]
    assert sum("benched" in r.message for r in caplog.records) == 1


def test_an_interrupt_frees_everything_and_the_next_rollout_is_right():
    model = tiny_llama()
    requests = make_requests(3, 4)
    drafter = RandomDrafter(VOCAB_SIZE)
    engine = make_engine(model, AtlasConfig(lookahead=2), drafter)
    expected = tokens_of(engine.generate(requests, SamplingParams()))
    propose, calls = drafter.propose, []

    def interrupted(rows, max_lens, min_prob):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return propose(rows, max_lens, min_prob)

    drafter.propose = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.generate(requests, SamplingParams())
    assert engine.runner is None and not drafter.rows
    assert 0 < engine.stats.completion_tokens < sum(map(len, expected))
    assert tokens_of(engine.generate(requests, SamplingParams())) == expected


def test_an_overpromising_drafter_is_soon_left_alone():
    """Floor law, counted: a random drafter that promises certainty gets few tokens verified under the automatic lookahead."""
    model = tiny_llama()
    engine = make_engine(model, AtlasConfig(), RandomDrafter(VOCAB_SIZE))
    requests = [replace(r, max_new_tokens=200) for r in make_requests(2, 2)]
    engine.generate(requests, SamplingParams())
    first = engine.stats.drafters["random"].steps
    engine.generate(requests, SamplingParams())
    later = engine.stats.drafters["random"].steps if engine.stats.drafters else 0
    assert first < 60 and later < 20, (first, later)


def test_a_drafter_tells_rows_of_its_second_engine_from_those_of_its_first():
    """A run that ends drops its engine; what drafters have learned outlives it."""
    model, drafter = tiny_llama(), SuffixDrafter()
    for _ in range(2):
        engine = make_engine(model, AtlasConfig(), drafter)
        for seed in range(2):
            engine.generate(make_requests(2, 4, seed=seed), SamplingParams())
        assert not engine.controller.benched
