"""The twin computes what the trainer's forward computes, follows its weights, and leaves the model alone."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import MODELS, SHAPE, logprobs_of, make_engine, make_requests, tiny_llama, tiny_qwen3
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from atlas_kernels import cpu
from atlas_rl.config import AtlasConfig
from atlas_rl.engine.fused_decoder import FusedDecoder
from atlas_rl.engine.linears import CastLinear, PackedLinear
from atlas_rl.engine.policy_view import PolicyView
from atlas_rl.engine.twin import UnsupportedModel, build_twin
from atlas_rl.types import SamplingParams

PLAIN = AtlasConfig(speculate=False)
needs_kernels = pytest.mark.skipif(cpu.unavailable_reason() is not None, reason=f"{cpu.unavailable_reason()}")


def fingerprint(model) -> tuple:
    """Everything law 3 names, that a rollout could change."""
    return (
        {
            k: (v.data_ptr(), v.dtype, v._version, v.double().sum().item())
            for k, v in model.state_dict(keep_vars=True).items()
        },
        [(name, m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()],
        {name: id(p) for name, p in model.named_parameters()},
        {name: (id(b), b.double().sum().item()) for name, b in model.named_buffers()},
        [p.requires_grad for p in model.parameters()],
        model.config._attn_implementation,
        [getattr(m, "gradient_checkpointing", None) for m in model.modules()],
        torch.get_rng_state().tolist(),
        sorted(vars(model)),
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_alone(name: str, training: bool):
    model = MODELS[name]().train(training)
    model.gradient_checkpointing_enable()
    before = fingerprint(model)
    engine = make_engine(model)
    engine.generate(make_requests(2, 2), SamplingParams())
    assert fingerprint(model) == before
    with pytest.raises(ValueError):
        engine.generate([make_requests(1, 1)[0].__class__(prompt_ids=(), seed=0, max_new_tokens=1)], SamplingParams())
    assert fingerprint(model) == before


@needs_kernels
def test_float32_on_cpu_is_packed_and_shares_the_rest():
    model = tiny_llama()
    view = PolicyView(model)
    assert all(isinstance(linear, PackedLinear) for linear in view.packed_linears())
    num_weights = sum(linear.num_weights for linear in view.packed_linears())
    assert num_weights == sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert view.twin.model.embed_tokens.weight is model.model.embed_tokens.weight
    assert view.twin.model.norm.weight is model.model.norm.weight
    assert PolicyView(model, pack_linears=False).twin.lm_head.weight is model.lm_head.weight


SOME_WINDOWS = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
FUSED = {
    "llama": tiny_llama,
    "llama with biases": lambda: tiny_llama(attention_bias=True, mlp_bias=True),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=9)).eval(),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE | SOME_WINDOWS)).eval(),
    "qwen3": tiny_qwen3,
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_layers_compute_what_the_modules_compute(name: str, monkeypatch):
    """The same tokens and log-probs with the compiled kernels and without, in batches of few rows and of many."""
    torch.manual_seed(0)
    model = FUSED[name]()
    for parameter in model.parameters():  # biases and norms that start at 0 or 1 would prove nothing
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    requests = make_requests(5, 3)
    sampling = SamplingParams(temperature=0.8)
    engine = make_engine(model, PLAIN)
    assert (engine.view.fused is None) == (cpu.unavailable_reason() is not None)
    fused = engine.generate(requests, sampling)
    few = engine.generate(requests[:1], sampling)
    monkeypatch.setattr(cpu, "unavailable_reason", lambda: "switched off")
    engine = make_engine(model, PLAIN)
    assert engine.view.fused is None
    modules = engine.generate(requests, sampling)
    for a, b in zip(fused + few, modules + modules[:1], strict=True):
        assert a.token_ids == b.token_ids
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=0, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("num_rows", [1, 2, 4, 5])
def test_a_packed_linear_takes_any_layout(num_rows: int):
    """Rows that lie apart in memory, and dimensions before them."""
    source = torch.nn.Linear(64, 48)
    x = torch.randn(num_rows, 128)[:, ::2]
    with torch.inference_mode():
        for rows in (x, x[None], torch.randn(64, num_rows).T):
            torch.testing.assert_close(PackedLinear(source)(rows), source(rows), rtol=1e-5, atol=1e-5)


def test_an_unknown_layer_is_not_fused():
    """A Linear that is more than a Linear, and an activation that is not SiLU."""
    assert PolicyView(tiny_llama(hidden_act="gelu")).fused is None
    twin = build_twin(tiny_llama(), "atlas")
    assert FusedDecoder.of(twin, torch.float32, on_device=False) is not None
    twin.model.layers[1].mlp.up_proj.__class__ = type("ScaledLinear", (torch.nn.Linear,), {})
    assert FusedDecoder.of(twin, torch.float32, on_device=False) is None
    twin = build_twin(tiny_llama(), "atlas")
    twin.model.layers[1].mlp.forward = lambda x: 0 * x  # looks right, computes something else
    assert FusedDecoder.of(twin, torch.float32, on_device=False) is None


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_followed(name: str, tied: bool):
    """An optimizer step, and a write through `.data` that no version counter sees."""
    model = MODELS[name](tie_word_embeddings=tied)
    engine = make_engine(model, PLAIN)
    engine.generate(make_requests(1, 1), SamplingParams())
    assert not engine.view.refresh()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    weight = model.model.layers[1].self_attn.q_proj.weight
    norm = model.model.layers[0].input_layernorm.weight

    def move(parameter: torch.nn.Parameter) -> None:
        parameter.data = 1.1 * parameter.data

    changes = [optimizer.step, lambda: weight.data.neg_(), lambda: weight.data.add_(1e-6 * weight.sign())]
    changes += [lambda: move(weight), lambda: move(norm), lambda: norm.data.mul_(1.2)]
    for change in changes:
        fingerprint = engine.view.fingerprint
        change()
        (rollout,) = engine.generate(make_requests(1, 1), SamplingParams())
        assert engine.view.fingerprint != fingerprint
        torch.testing.assert_close(torch.tensor(rollout.logprobs), logprobs_of(model, rollout), atol=1e-4, rtol=0)


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3])
def test_fp32_masters_under_bf16_autocast(make):
    """Numerics of the trainer's autocast forward, from bf16 copies of the Linear weights that follow updates in place."""
    model = make()
    engine = make_engine(model, PLAIN, autocast_dtype=torch.bfloat16)
    linears = [m for m in engine.view.twin.modules() if isinstance(m, CastLinear)]
    assert linears and all(m.weight.dtype == torch.bfloat16 for m in linears)
    assert engine.view.twin.model.embed_tokens.weight is model.model.embed_tokens.weight
    storage = [m.weight.data_ptr() for m in linears]
    for _ in range(2):
        for rollout in engine.generate(make_requests(3, 1), SamplingParams()):
            expected = logprobs_of(model, rollout, torch.bfloat16)
            torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, atol=0.1, rtol=0)
            # far closer to the autocast forward than that one is to float32's: the same roundings, not just small ones
            error = (torch.tensor(rollout.logprobs) - expected).abs().mean()
            assert error < 0.5 * (logprobs_of(model, rollout) - expected).abs().mean()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1)
    assert [m.weight.data_ptr() for m in linears] == storage


def unsupported_models() -> dict[str, PreTrainedModel]:
    tiny = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 50,
    }
    torch.manual_seed(0)
    dynamic_rope = tiny_llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    pruned = tiny_llama()
    del pruned.model.layers[1]
    parametrised = tiny_llama()
    torch.nn.utils.parametrizations.weight_norm(parametrised.lm_head)
    sinks = {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 1}
    return {
        "encoder-decoder": T5ForConditionalGeneration(
            T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=50)
        ),
        "attention interface": BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=50)),
        "s_aux": GptOssForCausalLM(GptOssConfig(**tiny | sinks)),
        "dynamic": dynamic_rope,
        "model.layers.1": pruned,
        "lm_head": parametrised,
    }


@pytest.mark.parametrize("reason", unsupported_models())
def test_what_the_engine_cannot_run_is_said(reason: str):
    with pytest.raises(UnsupportedModel, match=reason):
        PolicyView(unsupported_models()[reason].eval())


def test_a_window_that_only_the_mask_knows_is_found_by_the_probe(monkeypatch):
    """As some architectures have it: the config says sliding_window, the attention function is not told."""
    from transformers import MistralConfig, MistralForCausalLM
    from transformers.models.mistral import modeling_mistral

    shape = {key: value for key, value in SHAPE.items() if key != "initializer_range"}
    model = MistralForCausalLM(MistralConfig(**shape, sliding_window=64)).eval()
    PolicyView(model)
    forward = modeling_mistral.MistralAttention.forward

    def forgetful(self, *args, **kwargs):
        config, self.config = self.config, copy.copy(self.config)
        self.config.sliding_window = None
        try:
            return forward(self, *args, **kwargs)
        finally:
            self.config = config

    monkeypatch.setattr(modeling_mistral.MistralAttention, "forward", forgetful)
    with pytest.raises(UnsupportedModel, match="other logits"):
        PolicyView(model)
