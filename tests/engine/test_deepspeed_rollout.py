"""AtlasRollout answers as DeepSpeed's own rollout engine: shapes, masks, order, ends; and decodes with the weights of now."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import left_padded, tiny_llama

pytest.importorskip("deepspeed.runtime.rollout")

from deepspeed.runtime.rollout import HybridEngineRollout, ResponseTokenBatch, RolloutRequest, SamplingConfig

from atlas_rl import AtlasConfig
from atlas_rl.deepspeed import AtlasRollout

PROMPTS = [[5, 6, 7, 8], [9], [10, 11]]
PAD = 0
SAMPLED = SamplingConfig(max_new_tokens=12, n_samples_per_prompt=2)


def policy() -> torch.nn.Module:
    """Never emits the padding greedily: DeepSpeed's engine would mask it."""
    model = tiny_llama().train()
    with torch.no_grad():
        model.lm_head.weight[PAD] = 0
    return model


def stand_in(model=None, autocast=None) -> SimpleNamespace:
    """What AtlasRollout needs of a DeepSpeed engine, on one process."""
    model = model or policy()
    return SimpleNamespace(
        module=model,
        global_steps=0,
        device=model.device,
        torch_autocast_enabled=lambda: autocast is not None,
        torch_autocast_dtype=lambda: autocast,
    )


def tokenizer(eos=None, pad=PAD) -> SimpleNamespace:
    return SimpleNamespace(eos_token_id=eos, pad_token_id=pad)


@pytest.fixture
def loops():
    """Makes loops, and ends them."""
    made = []

    def make(engine=None, eos=None, pad=PAD, **options) -> AtlasRollout:
        config = AtlasConfig(deterministic=True, drafters="suffix")
        made.append(AtlasRollout(engine or stand_in(), tokenizer(eos, pad), config, **options))
        return made[-1]

    yield make
    for loop in made:
        loop.shutdown()
        loop.shutdown()


def request(prompts=PROMPTS, pad=PAD) -> RolloutRequest:
    padded = left_padded(prompts, pad)
    return RolloutRequest(padded["input_ids"], padded["attention_mask"])


def responses(batch) -> list[list[int]]:
    """Each row's tokens, as its mask has them."""
    kept = batch.attention_mask.bool() & (torch.arange(batch.seq_len) >= batch.response_start_idx[:, None])
    return [ids[k].tolist() for ids, k in zip(batch.input_ids, kept)]


@pytest.mark.parametrize("num_eos, pad", [(1, "own"), (1, "eos"), (1, None), (2, "own"), (2, "eos")])
def test_greedy_batches_are_those_of_deepspeeds_own_engine(loops, num_eos, pad):
    """But for the width: theirs always has room for all new tokens."""
    greedy = SamplingConfig(max_new_tokens=16, temperature=0.0, n_samples_per_prompt=2)
    free = responses(loops().generate(request(), greedy))
    eos = free[0][4] if num_eos == 1 else [free[0][4], free[2][9]]
    pad_id = {"own": PAD, "eos": free[0][4], None: None}[pad]
    prompts = request(pad=PAD if pad == "own" else free[0][4])
    ours = loops(eos=eos, pad=pad_id).generate(prompts, greedy)
    theirs = HybridEngineRollout(stand_in(policy().eval()), tokenizer(eos, pad_id)).generate(prompts, greedy)
    width = ours.seq_len
    assert torch.equal(ours.input_ids, theirs.input_ids[:, :width])
    assert torch.equal(ours.attention_mask, theirs.attention_mask[:, :width])
    assert not theirs.attention_mask[:, width:].any()
    assert torch.equal(ours.response_start_idx, theirs.response_start_idx)
    for name in ("input_ids", "attention_mask", "response_start_idx"):
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype == torch.int64
    assert len(responses(ours)[0]) == 5 < 16


def test_samples_follow_their_prompt_and_differ(loops):
    batch = loops().generate(request(), SAMPLED)
    prompts = [ids[m.bool()].tolist() for ids, m in zip(batch.input_ids[:, :4], batch.attention_mask[:, :4])]
    assert prompts == [prompt for prompt in PROMPTS for _ in range(2)]
    assert len(set(map(tuple, responses(batch)))) == 6


def test_also_the_models_own_eos_ends_a_completion(loops):
    """As where the tokenizer has the end of a turn and generation_config that of a text as well."""
    free = responses(loops().generate(request(), SAMPLED))
    engine = stand_in()
    engine.module.generation_config.eos_token_id = [free[0][6], free[1][5]]
    ends = {free[0][6], free[1][5], free[2][8]}
    rows = responses(loops(engine, eos=free[2][8]).generate(request(), SAMPLED))
    assert rows == [row[: next((i + 1 for i, token in enumerate(row) if token in ends), None)] for row in free]
    assert len(rows[0]) < 12 and len(rows[1]) < 12 and len(rows[2]) < 12


def test_options_that_sampling_lacks_are_the_models_own(loops):
    greedy, engine = SamplingConfig(max_new_tokens=16, temperature=0.0), stand_in()
    free = responses(loops(engine).generate(request(), greedy))
    engine.module.generation_config.repetition_penalty = 2.0
    ours = loops(engine).generate(request(), greedy)
    theirs = HybridEngineRollout(stand_in(engine.module.eval()), tokenizer()).generate(request(), greedy)
    assert responses(ours) != free
    assert torch.equal(ours.input_ids, theirs.input_ids)
    engine.module.generation_config.repetition_penalty = 1.0
    engine.module.generation_config.no_repeat_ngram_size = 2
    with pytest.raises(ValueError, match="no_repeat_ngram_size"):
        loops(engine).generate(request(), SAMPLED)


def test_a_rank_without_prompts_gets_an_empty_batch(loops):
    empty = RolloutRequest(torch.empty(0, 4, dtype=torch.int64), torch.empty(0, 4, dtype=torch.int64))
    batch = loops(eos=1).generate(empty, SAMPLED)
    assert batch.input_ids.shape == batch.attention_mask.shape == (0, 4)
    assert batch.response_start_idx.shape == (0,)


def test_batches_can_be_trained_on(loops):
    loop = loops()
    with torch.inference_mode():
        prompts = request()
    batch = loop.generate(prompts, SAMPLED)
    targets = ResponseTokenBatch.from_rollout(batch)
    model = loop.engine.module
    logits = targets.select_causal_logits(model(batch.input_ids, attention_mask=batch.attention_mask).logits)
    (logits.log_softmax(-1).gather(2, targets.target_ids[:, :, None])[:, :, 0] * targets.response_mask).sum().backward()
    assert model.training and all(p.grad is not None for p in model.parameters())


def test_under_torch_autocast_completions_are_those_of_the_autocast_policy(loops):
    engine = stand_in(autocast=torch.bfloat16)
    greedy = SamplingConfig(max_new_tokens=8, temperature=0.0)
    loop = loops(engine)
    batch = loop.generate(request(), greedy)
    assert loop.attachment.policy.engine.view.autocast_dtype == torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = engine.module(batch.input_ids, attention_mask=batch.attention_mask).logits.float()
    targets = ResponseTokenBatch.from_rollout(batch)
    best = logits[:, :-1].max(-1).values
    chosen = logits[:, :-1].gather(2, targets.target_ids[:, :, None])[:, :, 0]
    assert ((best - chosen)[targets.response_mask] < 0.05).all()


def test_every_call_samples_anew_and_a_step_is_repeated_by_its_seed(loops):
    loop = loops(seed=3)
    first, second = (responses(loop.generate(request(), SAMPLED)) for _ in range(2))
    loop.engine.global_steps = 1
    loop.sync_weights(1)
    third = responses(loop.generate(request(), SAMPLED))
    assert first != second != third != first
    again = loops(seed=3)
    assert [responses(again.generate(request(), SAMPLED)) for _ in range(2)] == [first, second]
    assert responses(loops(seed=4).generate(request(), SAMPLED)) != first


def test_weights_are_those_of_now(loops):
    """Also after a load_checkpoint that leaves the count of steps as it is."""
    loop = loops(stand_in())
    greedy = SamplingConfig(max_new_tokens=6, temperature=0.0)
    before = responses(loop.generate(request(), greedy))
    with torch.no_grad():
        for p in loop.engine.module.parameters():
            p.data.copy_(p.flip(0) if p.dim() == 2 else p)
    loop.sync_weights(0)
    assert loop.attachment.policy.taken_step is None  # copies of sharded weights would be made again
    changed = responses(loop.generate(request(), greedy))
    assert changed != before
    fresh = loops(stand_in(loop.engine.module))
    assert responses(fresh.generate(request(), greedy)) == changed


def test_one_row_per_call_and_one_per_step(loops, tmp_path):
    loop = loops(output_dir=tmp_path)
    loop.sync_weights(0)  # before any rollout
    for step in (1, 2):
        for _ in range(step):
            loop.generate(request(), SAMPLED)
        loop.engine.global_steps = step
        loop.sync_weights(step)
    rows = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["step"], row.get("call")) for row in rows] == [
        ("rollout", 0, 0),
        ("step", 1, None),
        ("rollout", 1, 0),
        ("rollout", 1, 1),
        ("step", 2, None),
    ]
    assert rows[-1]["num_completions"] == 12


def test_a_loop_that_goes_back_to_a_checkpoint_repeats_itself(loops, tmp_path):
    loop = loops(output_dir=tmp_path / "log")
    loop.generate(request(), SAMPLED)
    loop.engine.global_steps = 1
    loop.sync_weights(1)
    loop.save(tmp_path)
    first = responses(loop.generate(request(), SAMPLED))
    assert responses(loop.generate(request(), SAMPLED)) != first
    loop.resume(tmp_path)
    assert responses(loop.generate(request(), SAMPLED)) == first
    fresh = stand_in()
    fresh.global_steps = 1
    resumed = loops(fresh)
    resumed.resume(tmp_path)
    assert responses(resumed.generate(request(), SAMPLED)) == first


def test_a_loop_that_loaded_weights_alone_starts_its_drafters_anew(loops):
    engine = stand_in()
    engine.global_steps = 7
    assert len(responses(loops(engine).generate(request(), SAMPLED))) == 6


@pytest.mark.parametrize(
    "prompts, sampling, message",
    [
        (RolloutRequest(torch.tensor([[5, 0]]), torch.tensor([[1, 0]])), SAMPLED, "padded on the left"),
        (RolloutRequest(torch.tensor([[5], [0]]), torch.tensor([[1], [0]])), SAMPLED, "prompt 1 is empty"),
        (request(), SamplingConfig(max_new_tokens=4, n_samples_per_prompt=0), "n_samples_per_prompt"),
        (request(), SamplingConfig(max_new_tokens=4, top_p=0.0), "top_p"),
    ],
)
def test_wrong_input_is_named(loops, prompts, sampling, message):
    with pytest.raises(ValueError, match=message):
        loops().generate(prompts, sampling)


def test_neither_padding_nor_eos(loops):
    with pytest.raises(ValueError, match="neither pad_token_id nor eos_token_id"):
        loops(pad=None)


def test_an_older_deepspeed_is_named_with_a_remedy(tmp_path):
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "__init__.py").write_text("__version__ = '0.18.0'")
    root = Path(__file__).parents[2]
    paths = [str(tmp_path), str(root), str(root / "kernels")]
    script = f"import sys; sys.path[:0] = {paths}; import atlas_rl.deepspeed"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "ImportError: atlas_rl.deepspeed needs deepspeed>=0.19.3" in done.stderr
