"""The drop-in on a bare model: what `model.generate` returns, what falls back, and exact restore."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from types import SimpleNamespace

import pytest
import torch
from helpers import MODELS, left_padded, tiny_llama
from transformers import GenerationConfig, LogitsProcessorList, MinLengthLogitsProcessor, Trainer
from transformers.generation import GenerateDecoderOnlyOutput

from atlas_rl import AtlasConfig, AtlasRolloutGenerator, SamplingParams
from atlas_rl.integrations.local_policy import LocalPolicy
from atlas_rl.telemetry.stats import DrafterStats, RolloutStats

PAD, EOS = 0, 1


@pytest.fixture
def model():
    return tiny_llama(torch.float64)


BATCH = left_padded([[5, 6, 7, 8, 9], [11, 12], [13]])
OPTIONS = {"max_new_tokens": 20, "pad_token_id": PAD, "eos_token_id": [EOS, 40, 41, 42, 43]}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("as_config", [True, False])
def test_greedy_returns_what_generate_returns(name: str, as_config: bool):
    model = MODELS[name](torch.float64)
    call = {"generation_config": GenerationConfig(**OPTIONS)} if as_config else OPTIONS
    expected = model.generate(**BATCH, **call, do_sample=False)
    with AtlasRolloutGenerator().attach(model) as atlas:
        assert torch.equal(model.generate(**BATCH, **call, do_sample=False), expected)
        assert atlas.stats.num_completions == 3
        output = model.generate(**BATCH, **call, do_sample=False, return_dict_in_generate=True)
    assert isinstance(output, GenerateDecoderOnlyOutput) and torch.equal(output.sequences, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 12},
        {},
        {"max_new_tokens": 9, "min_length": 10},
        {"max_new_tokens": 9, "min_new_tokens": 4, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_lengths_are_read_as_transformers_reads_them(model, options: dict):
    call = {**BATCH, "pad_token_id": PAD, "eos_token_id": [3, 4, 5, 6], "do_sample": False, **options}
    expected = model.generate(**call)
    with AtlasRolloutGenerator().attach(model) as atlas:
        assert torch.equal(model.generate(**call), expected)
        assert atlas.stats.num_completions == 3


def test_sampling_honours_the_models_own_defaults(model):
    """top_k = 1 from the model's generation config makes sampling greedy, in both."""
    model.generation_config.top_k = 1
    expected = model.generate(**BATCH, **OPTIONS, do_sample=True)
    with AtlasRolloutGenerator().attach(model):
        assert torch.equal(model.generate(**BATCH, **OPTIONS, do_sample=True), expected)


def test_samples_end_with_padding_and_return_sequences_are_adjacent(model):
    with AtlasRolloutGenerator().attach(model) as atlas:
        output = model.generate(**BATCH, **OPTIONS, do_sample=True, top_k=0, num_return_sequences=4)
    assert output.shape[0] == 12 and atlas.stats.num_prompts == 3
    assert torch.equal(output[:, :5], BATCH["input_ids"].repeat_interleave(4, 0))
    for row in output[:, 5:].tolist():
        ends = [i for i, token in enumerate(row) if token in OPTIONS["eos_token_id"]]
        assert not ends or set(row[ends[0] + 1 :]) <= {PAD}
    assert len({tuple(row) for row in output.tolist()}) > 8  # two may end at once


def test_calls_differ_and_runs_repeat(model):
    def run() -> list[torch.Tensor]:
        torch.manual_seed(7)
        with AtlasRolloutGenerator().attach(model):
            return [model.generate(**BATCH, **OPTIONS, do_sample=True) for _ in range(2)]

    first, second = run()
    again = run()
    assert not torch.equal(first, second)
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])


def test_speculation_changes_nothing_but_the_figures(model, tmp_path):
    outputs = {}
    for speculate in (True, False):
        torch.manual_seed(7)
        log = tmp_path / f"{speculate}.jsonl"
        with AtlasRolloutGenerator(AtlasConfig(speculate=speculate, lookahead=3, log_path=str(log))).attach(model):
            outputs[speculate] = [model.generate(**BATCH, **OPTIONS, do_sample=True, top_k=4) for _ in range(3)]
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        assert len(rows) == 3 and all(row["kind"] == "rollout" for row in rows)
        assert any("acceptance_by_depth" in row for row in rows) == speculate
        assert [row["call"] for row in rows] == [0, 1, 2]
    assert all(torch.equal(a, b) for a, b in zip(outputs[True], outputs[False], strict=True))


def test_generate_on_token_lists(model):
    with AtlasRolloutGenerator().attach(model) as atlas:
        rollouts = atlas.generate([[5, 6], [7]], SamplingParams(max_new_tokens=6), num_samples=3, seed=11)
        assert [r.prompt_ids for r in rollouts] == [[5, 6]] * 3 + [[7]] * 3
        assert all(len(r.token_ids) == len(r.logprobs) == 6 for r in rollouts)
        assert len({tuple(r.token_ids) for r in rollouts}) == 6
        tokens = [r.token_ids for r in rollouts]
        for seed, same in ((11, True), (12, False)):
            again = atlas.generate([[5, 6], [7]], SamplingParams(max_new_tokens=6), num_samples=3, seed=seed)
            assert ([r.token_ids for r in again] == tokens) == same
        with pytest.raises(ValueError, match="num_samples"):
            atlas.generate([[5]], num_samples=0)
    with pytest.raises(ValueError, match="attach"):
        atlas.generate([[5]])


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(3, EOS)])}, "logits_processor"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
        ({"do_sample": True, "typical_p": 0.5}, "typical_p"),
        ({"suppress_tokens": [3]}, "suppress_tokens"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_done_exactly_falls_back(model, call: dict, reason: str, caplog, tmp_path):
    torch.manual_seed(3)
    expected = model.generate(**BATCH, **OPTIONS, **call)
    log = tmp_path / "log.jsonl"
    with AtlasRolloutGenerator(AtlasConfig(log_path=str(log))).attach(model), caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.manual_seed(3)
            output = model.generate(**BATCH, **OPTIONS, **call)
            same = output == expected if isinstance(output, torch.Tensor) else output.sequences == expected.sequences
            assert same.all()
    assert sum("not through Atlas" in record.message and reason in record.message for record in caplog.records) == 1
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(rows) == 2 and all(reason in row["fallback"] for row in rows)


def test_right_padding_falls_back_and_empty_prompts_are_named(model):
    right = {"input_ids": torch.tensor([[5, 6, PAD]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    expected = model.generate(**right, **OPTIONS, do_sample=False)
    with AtlasRolloutGenerator().attach(model) as atlas:
        assert torch.equal(model.generate(**right, **OPTIONS, do_sample=False), expected)
        assert atlas.stats.num_completions == 0
        with pytest.raises(ValueError, match="prompt 1 is empty"):
            model.generate(
                input_ids=torch.tensor([[5], [PAD]]),
                attention_mask=torch.tensor([[1], [0]]),
                **OPTIONS,
                do_sample=False,
            )


def test_detach_restores_exactly(model):
    before, log = sorted(vars(model)), Trainer.log
    atlas = AtlasRolloutGenerator()
    with atlas.attach(model):
        assert "generate" in vars(model) and Trainer.log is not log
        assert atlas.attach(model) is atlas, "attaching twice is attaching once"
    assert sorted(vars(model)) == before and Trainer.log is log
    atlas.detach()
    assert Trainer.log is log

    def own_generate(*args, **kwargs):
        return "own"

    model.generate = own_generate
    with AtlasRolloutGenerator().attach(model):
        assert model.generate is not own_generate
    assert model.generate is own_generate


def test_copies_are_not_attached(model):
    with AtlasRolloutGenerator().attach(model) as atlas:
        twin = copy.deepcopy(model)
        pickled = pickle.loads(pickle.dumps(model))
        expected = twin.generate(**BATCH, **OPTIONS, do_sample=False)
        assert torch.equal(pickled.generate(**BATCH, **OPTIONS, do_sample=False), expected)
        assert atlas.stats.num_completions == 0, "neither copy went through Atlas"
        assert torch.equal(model.generate(**BATCH, **OPTIONS, do_sample=False), expected)


def test_a_model_that_changes_dtype_is_followed(model):
    with AtlasRolloutGenerator().attach(model) as atlas:
        model.generate(**BATCH, **OPTIONS)
        model.to(torch.float32)
        rollouts = atlas.generate([[5, 6]], SamplingParams(temperature=0.0, max_new_tokens=5))
        assert atlas.attachment.engine.view.compute_dtype == torch.float32
    ids = torch.tensor([rollouts[0].prompt_ids + rollouts[0].token_ids])
    with torch.no_grad():
        logprobs = model(ids).logits[0, 1:-1].log_softmax(-1).gather(1, ids[0, 2:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(rollouts[0].logprobs), logprobs, atol=1e-4, rtol=0)


def test_generators_on_one_model_may_be_detached_in_any_order(model):
    expected = model.generate(**BATCH, **OPTIONS, do_sample=False)
    first, second = AtlasRolloutGenerator().attach(model), AtlasRolloutGenerator().attach(model)
    first.detach()
    assert torch.equal(model.generate(**BATCH, **OPTIONS, do_sample=False), expected)
    assert torch.equal(model.generate(**BATCH, **OPTIONS, num_beams=2)[:, :5], BATCH["input_ids"])
    second.detach()
    assert torch.equal(model.generate(**BATCH, **OPTIONS, do_sample=False), expected)
    assert first.stats.num_completions == 0


def test_a_generator_may_move_to_another_model(model):
    atlas = AtlasRolloutGenerator().attach(model)
    model.generate(**BATCH, **OPTIONS)
    smaller = tiny_llama(vocab_size=20)
    with atlas.attach(smaller):
        assert "generate" not in vars(model)
        smaller.generate(torch.tensor([[5, 6]]), attention_mask=torch.ones(1, 2), max_new_tokens=30, pad_token_id=0)
        assert atlas.attachment.engine.speculator.active


def test_the_models_own_eos_ends_a_completion(model):
    model.generation_config.eos_token_id = list(range(97))
    with AtlasRolloutGenerator().attach(model) as atlas:
        assert [r.finish_reason for r in atlas.generate([[5, 6]], num_samples=3)] == ["stop"] * 3
        rollouts = atlas.generate([torch.tensor([5, 6])], SamplingParams(ignore_eos=True, max_new_tokens=4))
        assert [len(r.token_ids) for r in rollouts] == [4]


def test_explicit_none_overrides_the_models_default(model):
    model.generation_config.update(top_k=1, eos_token_id=list(range(2, 97)))
    call = {**BATCH, "max_new_tokens": 8, "pad_token_id": PAD, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**call)
    with AtlasRolloutGenerator().attach(model) as atlas:
        assert torch.equal(model.generate(**call), expected)
        assert atlas.stats.num_completions == 3


def test_adapters_are_merged_for_decoding_and_nowhere_else():
    peft = pytest.importorskip("peft")
    for adapter in (
        peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False),
        peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False),
    ):
        wrapped = peft.get_peft_model(tiny_llama(torch.float64), adapter)
        before = {name: value.clone() for name, value in wrapped.state_dict().items()}
        expected = wrapped.generate(**BATCH, **OPTIONS, do_sample=False)
        with AtlasRolloutGenerator().attach(wrapped) as atlas:
            assert torch.equal(wrapped.generate(**BATCH, **OPTIONS, do_sample=False), expected)
            assert atlas.stats.num_completions == 3
            with torch.no_grad():
                for parameter in wrapped.parameters():
                    if parameter.requires_grad:
                        parameter.mul_(-3)
            changed = wrapped.generate(**BATCH, **OPTIONS, do_sample=False)
            assert atlas.stats.num_completions == 3 and not torch.equal(changed, expected)
            before |= {n: p.detach().clone() for n, p in wrapped.named_parameters() if p.requires_grad}
        assert torch.equal(wrapped.generate(**BATCH, **OPTIONS, do_sample=False), changed)
        assert all(torch.equal(value, before[name]) for name, value in wrapped.state_dict().items())


def test_a_sharded_model_without_a_trainer_falls_back(monkeypatch, caplog):
    """Its copies would go stale unnoticed."""
    monkeypatch.setattr(LocalPolicy, "of", lambda policy: SimpleNamespace(is_collective=True))
    model = tiny_llama()
    expected = model.generate(**BATCH, **OPTIONS, do_sample=False)
    with AtlasRolloutGenerator().attach(model) as atlas:
        assert torch.equal(model.generate(**BATCH, **OPTIONS, do_sample=False), expected)
        assert atlas.stats.num_completions == 0 and "sharded" in caplog.text


def test_only_models_and_trainers_are_taken():
    with pytest.raises(ValueError, match="trainer or a transformers model"):
        AtlasRolloutGenerator().attach(torch.nn.Linear(2, 2))


def test_a_drafter_without_a_verified_token_has_no_acceptance(atlas):
    """In an arm of two drafters the other one's drafts may be the better ones for every row."""
    atlas.attach(tiny_llama())
    stats = RolloutStats(completion_tokens=8, drafters={"suffix": DrafterStats(), "static": DrafterStats(proposed=2)})
    atlas.attachment.ledger.unlogged["train"] = stats
    metrics = atlas.pop_metrics("train")
    assert "rollout/static_acceptance" in metrics and "rollout/suffix_acceptance" not in metrics
