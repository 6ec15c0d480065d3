"""A local policy computes what an adapted model computes, from copies that leave the base as it is."""

from __future__ import annotations

import pytest
import torch
from helpers import SHAPE, VOCAB_SIZE, make_requests, tiny_llama, tiny_qwen3, tokens_of
from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from atlas_rl.config import AtlasConfig
from atlas_rl.engine.engine import RolloutEngine
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.engine.twin import UnsupportedModel
from atlas_rl.integrations import local_policy
from atlas_rl.integrations.local_policy import LocalPolicy
from atlas_rl.integrations.trl import unwrap
from atlas_rl.types import SamplingParams

ATTENTION = ["q_proj", "v_proj"]
IDS = torch.arange(2, 42).view(2, 20)


def small_llama(**overrides) -> PreTrainedModel:
    """Its logits are about 1, so that 1e-5 is a hundred float32 roundings."""
    return tiny_llama(**{"initializer_range": 0.05} | overrides)


def adapted(config, model: PreTrainedModel | None = None) -> PeftModel:
    """With adapters that do something."""
    torch.manual_seed(1)
    model = get_peft_model(small_llama() if model is None else model, config).eval()
    shake(model)
    return model


@torch.no_grad()
def shake(model: torch.nn.Module, scale: float = 0.02) -> None:
    for p in model.parameters():
        if p.requires_grad:
            p.add_(torch.randn_like(p) * scale)


def local_of(model: torch.nn.Module) -> LocalPolicy:
    local = LocalPolicy.of(unwrap(model))
    local.refresh()
    return local


@torch.no_grad()
def assert_same_logits(local: LocalPolicy, model: torch.nn.Module) -> None:
    torch.testing.assert_close(local.model(IDS).logits, model(IDS).logits, atol=1e-5, rtol=0)


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.1}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB_SIZE, bos_token_id=None, eos_token_id=None, **shape)).eval()


def tiny_moe() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE | experts | {"initializer_range": 0.05})).eval()


CASES = {
    "linear": lambda: adapted(LoraConfig(target_modules=ATTENTION)),
    "all linears": lambda: adapted(LoraConfig(target_modules="all-linear", r=4, lora_dropout=0.5)),
    "embedding": lambda: adapted(LoraConfig(target_modules=["embed_tokens", "q_proj"])),
    "rslora": lambda: adapted(LoraConfig(target_modules=ATTENTION, use_rslora=True, r=16)),
    "dora": lambda: adapted(LoraConfig(target_modules=[*ATTENTION, "embed_tokens"], use_dora=True)),
    "bias": lambda: adapted(
        LoraConfig(target_modules=ATTENTION, lora_bias=True, bias="all"), small_llama(attention_bias=True)
    ),
    "modules to save": lambda: adapted(LoraConfig(target_modules=ATTENTION, modules_to_save=["lm_head", "norm"])),
    "tied, head adapted": lambda: adapted(
        LoraConfig(target_modules=["lm_head", "q_proj"]), small_llama(tie_word_embeddings=True)
    ),
    "tied, tokens": lambda: adapted(
        LoraConfig(target_modules=ATTENTION, trainable_token_indices=[3, 5]), small_llama(tie_word_embeddings=True)
    ),
    "conv1d": lambda: adapted(LoraConfig(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True), tiny_gpt2()),
    "ia3": lambda: adapted(IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "loha": lambda: adapted(LoHaConfig(target_modules=ATTENTION, rank_dropout=0.5)),
    "vera": lambda: adapted(VeraConfig(target_modules=ATTENTION, r=16)),
    "norms": lambda: adapted(LNTuningConfig(target_modules=["input_layernorm"])),
    "tokens": lambda: adapted(TrainableTokensConfig(token_indices=[2, 7], target_modules=["embed_tokens"])),
    "experts": lambda: adapted(
        LoraConfig(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
        tiny_moe(),
    ),
    "replicated layers": lambda: adapted(LoraConfig(target_modules=ATTENTION, layer_replication=[[0, 2], [1, 2]])),
    "parameter": lambda: adapted(LoraConfig(target_modules=["q_proj"], target_parameters=["up_proj.weight"])),
}


@pytest.mark.parametrize("name", CASES)
def test_merged_copies_compute_what_the_adapters_compute(name):
    model = CASES[name]()
    local = local_of(model)
    assert type(local.model) is type(unwrap(model)) and not local.is_collective
    assert {name for name, _ in local.model.named_modules()} <= {name for name, _ in tiny_names(model)}
    assert_same_logits(local, model)
    before = local.model(IDS).logits
    model.train()  # dropout of adapters is the trainer's
    shake(model)
    assert local.has_changed()
    local.refresh()
    assert not local.has_changed()
    assert_same_logits(local, model.eval())
    assert (local.model(IDS).logits - before).abs().max() > 1e-3
    PolicyView(local.model)


def tiny_names(model: torch.nn.Module):
    return type(unwrap(model))(unwrap(model).config).named_modules()


def test_the_base_is_never_written_and_copies_stay_in_place():
    model = adapted(LoraConfig(target_modules=[*ATTENTION, "embed_tokens"], use_dora=True, r=4))
    base = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    everything = {name: (p.data_ptr(), p._version) for name, p in model.named_parameters()}
    bytes_before = {name: p.detach().numpy().tobytes() for name, p in base.items()}
    local = local_of(model)
    assert {name: (p.data_ptr(), p._version) for name, p in model.named_parameters()} == everything
    places = [p.data_ptr() for p in local.model.parameters()]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(20):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        local.refresh()
    assert {name: p.detach().numpy().tobytes() for name, p in base.items()} == bytes_before
    assert [p.data_ptr() for p in local.model.parameters()] == places
    assert_same_logits(local, model)


def test_memory_is_given_back_until_the_next_refresh():
    model = adapted(LoraConfig(target_modules=["q_proj"]))
    local = local_of(model)
    local.release()
    queries = [layer.self_attn.q_proj.weight for layer in local.model.model.layers]
    assert all(q.is_meta for q in queries) and local.has_changed()
    assert sum(q.nbytes for q in queries) == local.copied_bytes
    local.refresh()
    assert_same_logits(local, model)


def test_what_is_not_adapted_is_the_trainers_own():
    model = adapted(LoraConfig(target_modules=["q_proj"]))
    local, policy = local_of(model), unwrap(model)
    for name, p in local.model.named_parameters():
        if "q_proj" not in name:
            assert p is policy.get_parameter(name)
    queries = [layer.self_attn.q_proj.weight for layer in local.model.model.layers]
    assert local.copied_bytes == sum(q.nbytes for q in queries) and not local.gathered_bytes
    assert not any(q.requires_grad for q in queries)


def test_tied_embeddings_are_tied_until_an_adapter_changes_one():
    config = LoraConfig(target_modules=ATTENTION, trainable_token_indices=[3])
    both = local_of(adapted(config, small_llama(tie_word_embeddings=True))).model
    assert both.lm_head.weight is both.model.embed_tokens.weight
    head = local_of(adapted(LoraConfig(target_modules=["lm_head"]), small_llama(tie_word_embeddings=True))).model
    assert head.lm_head.weight is not head.model.embed_tokens.weight


def test_several_adapters():
    model = adapted(LoraConfig(target_modules=ATTENTION))
    model.add_adapter("other", LoraConfig(target_modules=["v_proj", "o_proj"]))
    model.set_adapter("other")
    shake(model)
    local = local_of(model)
    assert_same_logits(local, model)
    model.base_model.set_adapter(["default", "other"])
    assert local.has_changed() and local.is_current()
    local.refresh()
    assert_same_logits(local, model)
    with model.disable_adapter():
        assert local.has_changed()
        local.refresh()
        assert_same_logits(local, model)
    model.merge_adapter()
    assert local.has_changed()
    local.refresh()
    assert_same_logits(local, model)
    model.add_adapter("third", LoraConfig(target_modules=["v_proj"]))
    assert not local.is_current()


def test_another_copy_of_a_saved_module_is_another_model():
    model = adapted(LoraConfig(target_modules=ATTENTION, modules_to_save=["lm_head"]))
    local = local_of(model)
    assert local.is_current()
    with model.disable_adapter():
        assert not local.is_current()
        assert_same_logits(local_of(model), model)
    assert local.is_current()


def test_rollouts_are_those_of_the_merged_model():
    model = adapted(LoraConfig(target_modules=ATTENTION), tiny_qwen3(torch.float64))
    local = local_of(model)
    engine = RolloutEngine(PolicyView(local.model), AtlasConfig(speculate=False))
    requests = make_requests(2, 2)
    before = tokens_of(engine.generate(requests, SamplingParams()))
    shake(model, 0.2)
    local.refresh()
    after = tokens_of(engine.generate(requests, SamplingParams()))
    merged = RolloutEngine(PolicyView(model.merge_and_unload()), AtlasConfig(speculate=False))
    assert after == tokens_of(merged.generate(requests, SamplingParams())) != before


def test_bfloat16_is_rounded_once():
    model = adapted(LoraConfig(target_modules=ATTENTION), tiny_llama(torch.bfloat16))
    local = local_of(model)
    layer = unwrap(model).model.layers[0].self_attn.q_proj
    expected = (layer.weight.float() + layer.get_delta_weight("default").float()).bfloat16()
    assert torch.equal(local.model.model.layers[0].self_attn.q_proj.weight, expected)


def test_a_plain_model_needs_none():
    assert LocalPolicy.of(tiny_llama()) is None
    assert LocalPolicy.of(small_llama(tie_word_embeddings=True)) is None


def test_copies_made_in_inference_mode_serve_autograd():
    model = adapted(LoraConfig(target_modules=["lm_head"]))
    with torch.inference_mode():
        local = local_of(model)
    x = torch.ones(1, 64, requires_grad=True)
    local.model.lm_head(x).sum().backward()
    assert x.grad is not None


def other_activation() -> PreTrainedModel:
    model = tiny_llama()
    model.model.layers[1].mlp.act_fn = torch.nn.ReLU()
    return model


UNMERGEABLE = {
    "its adapter on .*q_proj cannot be merged .*aLoRA": lambda: adapted(
        LoraConfig(target_modules=ATTENTION, alora_invocation_tokens=[5], task_type="CAUSAL_LM")
    ),
    "cannot be merged .*base layer has no bias": lambda: adapted(LoraConfig(target_modules=ATTENTION, lora_bias=True)),
    "its module model.layers.1.mlp.act_fn is not what its config describes": lambda: adapted(
        LoraConfig(target_modules=ATTENTION), other_activation()
    ),
}


@pytest.mark.parametrize("reason", UNMERGEABLE)
def test_what_cannot_be_merged_is_refused_at_once(reason):
    with pytest.raises(UnsupportedModel, match=reason):
        LocalPolicy.of(unwrap(UNMERGEABLE[reason]()))


def test_a_replaced_forward_is_refused():
    model = adapted(LoraConfig(target_modules=ATTENTION))
    layer = unwrap(model).model.layers[1].self_attn.v_proj
    layer.forward = layer.forward  # as X-LoRA mixes adapters
    with pytest.raises(
        UnsupportedModel, match="replaced the forward of its adapter on model.layers.1.self_attn.v_proj"
    ):
        LocalPolicy.of(unwrap(model))


def test_fully_sharded_of_the_first_version_is_refused(monkeypatch):
    model = tiny_llama()
    model.model.layers[0]._is_fsdp_managed_module = True  # as FullyShardedDataParallel marks what it manages
    with pytest.raises(UnsupportedModel, match="fsdp_version: 2"):
        LocalPolicy.of(model)


def test_a_policy_that_does_not_fit_is_refused_with_figures(monkeypatch):
    local = LocalPolicy.of(unwrap(adapted(LoraConfig(target_modules=["q_proj"]))))
    assert all(part_copy.is_meta for part in local.parts for part_copy in part.copies.values())
    local.check_fits()
    monkeypatch.setattr(local_policy, "free_bytes", lambda device: 2**20)
    local.check_fits(kv_bytes=2**19)
    with pytest.raises(
        ValueError, match=r"adapted.* 3.05e-05 GiB on this device \(cpu\).*0.000977 GiB are free.* takes 2 GiB"
    ):
        local.check_fits(kv_bytes=2**31)
    local.allocate()
    local.check_fits(kv_bytes=2**31)  # the copies are there


def test_prompt_learning_changes_no_weights():
    """Its base model is plain; that `generate` goes through PEFT's wrapper is the caller's knowledge."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert LocalPolicy.of(unwrap(get_peft_model(tiny_llama(), config))) is None
