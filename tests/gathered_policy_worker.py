"""One of two processes over which a policy is sharded (see distributed/test_gathered_policy.py)."""

from __future__ import annotations

import copy
import sys
from collections import Counter

import torch
import torch.distributed as dist
from helpers import make_requests, tiny_llama, tokens_of
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from atlas_rl.config import AtlasConfig
from atlas_rl.engine.engine import RolloutEngine
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.engine.twin import UnsupportedModel
from atlas_rl.integrations import local_policy
from atlas_rl.integrations.local_policy import LocalPolicy
from atlas_rl.integrations.trl import unwrap
from atlas_rl.types import SamplingParams

IDS = torch.arange(2, 42).view(2, 20)
LORA = LoraConfig(target_modules=["q_proj", "lm_head"], modules_to_save=["norm"], init_lora_weights=False)


def adapted(**overrides) -> torch.nn.Module:
    torch.manual_seed(3)
    return get_peft_model(tiny_llama(**overrides), copy.deepcopy(LORA))


def check_copies(local: LocalPolicy, reference: torch.nn.Module, exactly: bool = True) -> None:
    """Against the policy as one process has it."""
    copies, expected = dict(local.model.named_parameters()), dict(reference.named_parameters())
    assert copies.keys() == expected.keys()
    for name, weight in copies.items():
        value = expected[name].detach().to(weight.dtype)
        assert type(weight) is torch.nn.Parameter and weight.shape == value.shape
        assert torch.equal(weight, value) if exactly else torch.allclose(weight, value, atol=1e-6), name


def merged(model: torch.nn.Module) -> torch.nn.Module:
    """By PEFT, which writes into both of two tied weights."""
    head = unwrap(model).lm_head.base_layer
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    return model.merge_and_unload()


def num_in_use(model: torch.nn.Module) -> int:
    """Parameters without those that a trained copy of their module stands in for."""
    return sum("original_module" not in name for name, _ in model.named_parameters())


def check_rollouts(local: LocalPolicy, reference: torch.nn.Module) -> None:
    """The view over the local copy is a view like any other; ranks are on their own."""
    rank = dist.get_rank()
    engines = [RolloutEngine(PolicyView(m), AtlasConfig(speculate=False)) for m in (local.model, reference)]
    requests = make_requests(1 + rank, 1 + rank, max_new_tokens=4 + 8 * rank)
    assert tokens_of(engines[0].generate(requests, SamplingParams())) == tokens_of(
        engines[1].generate(requests, SamplingParams())
    )


def check_refresh(local: LocalPolicy, gathers: Counter, num_expected: int) -> None:
    """Each sharded parameter is gathered once, and what was captured over the copies stays valid."""
    gathers.clear()
    places = [p.data_ptr() for p in local.model.parameters()]
    is_first = not local.is_allocated
    assert len(local.buckets) > 4
    num_gathers, num_bytes = local.num_gathers, local.gathered_bytes
    local.refresh()
    assert set(gathers.values()) == ({1} if num_expected else set()) and len(gathers) == num_expected, gathers
    assert local.num_gathers == num_gathers + bool(num_expected)
    assert local.gathered_bytes == num_bytes + local.copied_bytes
    assert is_first or [p.data_ptr() for p in local.model.parameters()] == places


# ---- FSDP2 ---------------------------------------------------------------------------------------------------------------


def shard(model: torch.nn.Module, policy: MixedPrecisionPolicy) -> torch.nn.Module:
    """As accelerate does it: layers, embeddings, and what is left with the outermost module."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    options = {"mesh": mesh, "mp_policy": policy}
    base = unwrap(model)
    for layer in base.model.layers:
        fully_shard(layer, **options)
    fully_shard([base.model.embed_tokens, base.lm_head], reshard_after_forward=False, **options)
    fully_shard(model, **options)
    return model


def step_fsdp2(model: torch.nn.Module) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def whole_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in model.state_dict().items()
    }


def fsdp2() -> None:
    dist.init_process_group("gloo")
    gathers: Counter = Counter()
    full_tensor = DTensor.full_tensor

    def counting(self: DTensor, **options) -> torch.Tensor:
        gathers[self._local_tensor.data_ptr()] += 1
        return full_tensor(self, **options)

    DTensor.full_tensor = counting
    for cast in (None, torch.bfloat16):
        for tied in (False, True):
            model = shard(tiny_llama(tie_word_embeddings=tied), MixedPrecisionPolicy(param_dtype=cast))
            local = LocalPolicy.of(model)
            assert local.is_collective and type(local.model).__name__ == "LlamaForCausalLM"
            local.check_fits()
            local.refresh()
            step_fsdp2(model)
            reference = tiny_llama(tie_word_embeddings=tied)
            reference.load_state_dict(whole_state(model))
            check_refresh(local, gathers, len(list(model.parameters())))
            check_copies(local, reference)
            assert {p.dtype for p in local.model.parameters()} == {cast or torch.float32}
            assert tied == (local.model.lm_head.weight is local.model.model.embed_tokens.weight)
            for p in reference.parameters():  # not the buffers
                p.data = p.data.to(cast or torch.float32)
            check_rollouts(local, reference)
            with torch.no_grad():
                logits = model(input_ids=IDS).logits  # leaves the last modules whole
                assert torch.equal(local.model(input_ids=IDS).logits, logits)
            assert not isinstance(model.lm_head.weight, DTensor)
            check_refresh(local, gathers, len(list(model.parameters())))
            check_copies(local, reference)
            another = LocalPolicy.of(model)
            check_refresh(another, gathers, len(list(model.parameters())))
            check_copies(another, reference)
            assert local.is_current() and isinstance(model, FSDPModule)
    refuse_within_forward(model)
    for tied in (False, True):
        model = shard(adapted(tie_word_embeddings=tied), MixedPrecisionPolicy())
        local = LocalPolicy.of(unwrap(model))
        local.refresh()
        step_fsdp2(model)
        reference = adapted(tie_word_embeddings=tied)
        reference.load_state_dict(whole_state(model))
        with torch.no_grad():
            model(input_ids=IDS)
        assert not isinstance(unwrap(model).model.norm.weight, DTensor)
        for either in (local, LocalPolicy.of(unwrap(model))):
            check_refresh(either, gathers, num_in_use(model))
        merged_reference = merged(reference)
        check_copies(local, merged_reference, exactly=False)
        check_copies(either, merged_reference, exactly=False)
    refuse_fsdp1()
    dist.destroy_process_group()


def refuse_within_forward(model: torch.nn.Module) -> None:
    """A wrapped `generate` runs there: what is whole then would be taken for the policy's own."""
    reasons = []

    def called(module, args, kwargs):
        try:
            LocalPolicy.of(model)
        except UnsupportedModel as reason:
            reasons.append(str(reason))

    handle = model.model.norm.register_forward_pre_hook(called, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=IDS)
    handle.remove()
    assert len(reasons) == 1 and "own forward" in reasons[0]
    assert LocalPolicy.of(model).is_collective


def refuse_fsdp1() -> None:
    flat = FullyShardedDataParallel(tiny_llama(), device_id=torch.device("cpu"), use_orig_params=True)
    try:
        LocalPolicy.of(unwrap(flat))
    except UnsupportedModel as reason:
        assert "fsdp_version: 2" in str(reason)
    else:
        raise AssertionError("flat parameters passed for a plain model")


# ---- ZeRO-3 --------------------------------------------------------------------------------------------------------------


def zero3_engine(model: torch.nn.Module, persistent_below: int = 0):
    import deepspeed

    zero = {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": persistent_below}
    config = {
        "train_batch_size": 2 * dist.get_world_size(),
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def step_zero3(engine) -> None:
    engine.backward(engine(input_ids=IDS, labels=IDS).loss)
    engine.step()


def zero3() -> None:
    import deepspeed
    from deepspeed.runtime.zero import partition_parameters

    deepspeed.init_distributed("gloo")
    under_trainer = HfDeepSpeedConfig(
        {"zero_optimization": {"stage": 3}}
    )  # which transformers asks as long as it is alive
    assert is_deepspeed_zero3_enabled()
    gathers: Counter = Counter()
    enter = partition_parameters.GatheredParameters.__enter__

    def counting(self):
        gathers.update(p.ds_id for p in self.params if p.ds_status.name == "NOT_AVAILABLE")
        return enter(self)

    def reference_of(module: torch.nn.Module, model: torch.nn.Module) -> torch.nn.Module:
        with deepspeed.zero.GatheredParameters(list(module.parameters())):
            model.load_state_dict({name: value.detach().clone() for name, value in module.state_dict().items()})
        return model

    partition_parameters.GatheredParameters.__enter__ = counting
    for persistent_below, tied in ((0, False), (100, True)):  # norms have 64 elements
        engine = zero3_engine(tiny_llama(tie_word_embeddings=tied), persistent_below)
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            local = LocalPolicy.of(engine.module)
            check_refresh(local, gathers, 0)
        assert local.is_collective
        step_zero3(engine)
        num_gathered = sum(p.ds_numel >= persistent_below for p in engine.module.parameters())
        check_refresh(local, gathers, num_gathered)
        reference = reference_of(engine.module, tiny_llama(tie_word_embeddings=tied))
        check_copies(local, reference)
        assert tied == (local.model.lm_head.weight is local.model.model.embed_tokens.weight)
        check_rollouts(local, reference)
        step_zero3(engine)
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):  # as a trainer does around `generate`
            check_refresh(local, gathers, 0)
        check_copies(local, reference_of(engine.module, reference))
        with torch.no_grad():
            logits = engine(input_ids=IDS).logits
            assert torch.equal(local.model(input_ids=IDS).logits, logits)
        check_refresh(local, gathers, 0)  # such small layers stay whole for the backward that might follow
        check_copies(local, reference)
        step_zero3(engine)
        check_refresh(local, gathers, num_gathered)
        check_copies(local, reference_of(engine.module, reference))
        assert local.is_current()
    engine = zero3_engine(adapted())
    local = LocalPolicy.of(unwrap(engine.module))
    local.refresh()
    step_zero3(engine)
    check_refresh(local, gathers, num_in_use(engine.module))
    check_copies(local, merged(reference_of(engine.module, adapted())), exactly=False)
    step_zero3(engine)
    del under_trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    local_policy.BUCKET_BYTES = 40_000  # a few of these matrices, so that there are several gatherings
    {"fsdp2": fsdp2, "zero3": zero3}[sys.argv[1]]()
