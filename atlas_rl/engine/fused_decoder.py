"""A Llama-like decoder in nine calls per layer, for float32 on CPU: calling modules can cost more than a small model computes.

The twin's own modules stay the reference: a fused decoder is used only if it computes what they compute.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from atlas_kernels import cpu
from atlas_rl.engine.attention import attend
from atlas_rl.engine.batch import ForwardBatch
from atlas_rl.engine.linears import PackedLinear, is_linear
from atlas_rl.engine.twin import probe_batches, run_twin

LAYER_KINDS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
"""Pre-norm, rotary attention with or without norms on queries and keys, gated MLP: the same computation under four names."""


class FusedLayer:
    def __init__(self, layer: nn.Module) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.source = layer
        self.scaling = attention.scaling
        is_mistral = type(layer).__name__ == "MistralDecoderLayer"  # which keeps its window in the config alone
        self.sliding_window = getattr(attention.config if is_mistral else attention, "sliding_window", None)
        self.qkv = PackedLinear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = PackedLinear(attention.o_proj)
        self.gate_up = PackedLinear(mlp.gate_proj, mlp.up_proj)
        self.down = PackedLinear(mlp.down_proj)
        self.take_norms()

    def take_norms(self) -> None:
        """The norms' weights as plain attributes: nn.Module takes five times as long to find them."""
        attention = self.source.self_attn
        self.input_norm, self.post_norm = (
            self.source.input_layernorm.weight,
            self.source.post_attention_layernorm.weight,
        )
        self.query_norm = attention.q_norm.weight if hasattr(attention, "q_norm") else None
        self.key_norm = attention.k_norm.weight if hasattr(attention, "k_norm") else None


class FusedDecoder:
    """The layers of a twin between its embedding and its head."""

    def __init__(self, twin: PreTrainedModel) -> None:
        base = twin.base_model
        self.embed_tokens, self.rotary_emb, self.norm = base.embed_tokens, base.rotary_emb, base.norm
        self.layers = [FusedLayer(layer) for layer in base.layers]
        self.eps = base.norm.variance_epsilon
        self.tapped_layers: frozenset[int] = frozenset()
        self.cos_PD = self.sin_PD = torch.empty(0, 0)

    @classmethod
    @torch.inference_mode()
    def of(cls, twin: PreTrainedModel) -> FusedDecoder | None:
        """The fused form of a twin, or None where there is none or it computes something else."""
        if not cls.fits(twin):
            return None
        fused = cls(twin)
        batches = probe_batches(twin, torch.float32)
        expected = torch.cat([run_twin(twin, batch) for batch in batches])
        got = torch.cat([fused(batch) for batch in batches])
        return fused if torch.allclose(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())) else None

    @staticmethod
    def fits(twin: PreTrainedModel) -> bool:
        """Whether the twin is built of the parts that this class computes with, as far as names and types tell."""
        layers = getattr(twin.base_model, "layers", [])
        linears = [m for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)]
        return (
            cpu.unavailable_reason() is None
            and len(layers) > 0
            and all(type(layer).__name__ in LAYER_KINDS for layer in layers)
            and all(map(is_linear, linears))
            and all(p.is_contiguous() for p in twin.parameters())
            and twin.config.hidden_act == "silu"
            and cpu.supports(layers[0].self_attn.head_dim)
        )

    def linears(self) -> list[PackedLinear]:
        """In the order in which a forward calls them."""
        return [linear for layer in self.layers for linear in (layer.qkv, layer.out, layer.gate_up, layer.down)]

    def take_norms(self) -> None:
        """Take over norm weights that may lie elsewhere now; the Linears refresh themselves."""
        for layer in self.layers:
            layer.take_norms()

    def __call__(self, batch: ForwardBatch) -> torch.Tensor:
        """Last hidden states [N, D], after the final norm."""
        self._grow_rotations(batch.num_kv_slots)
        eps, kv_layers = self.eps, batch.kv_cache.layers
        positions_N, slots_N = batch.positions_N, batch.slots_N
        x_ND = torch.nn.functional.embedding(batch.input_ids_N, self.embed_tokens.weight)
        for index, layer in enumerate(self.layers):
            qkv_ND = layer.qkv(cpu.rms_norm(x_ND, layer.input_norm, eps))
            query_NHD = cpu.rope_and_store(
                qkv_ND,
                layer.query_norm,
                layer.key_norm,
                eps,
                self.cos_PD,
                self.sin_PD,
                positions_N,
                slots_N,
                kv_layers[index],
            )
            mixed_NHD = attend(batch, index, query_NHD, layer.scaling, layer.sliding_window)
            x_ND = layer.out(mixed_NHD.flatten(1), x_ND)
            gate_up = layer.gate_up(cpu.rms_norm(x_ND, layer.post_norm, eps))
            x_ND = layer.down(cpu.silu_mul(gate_up), x_ND)
            if index in self.tapped_layers:
                batch.tapped[index] = x_ND
        return cpu.rms_norm(x_ND, self.norm.weight, eps)

    def _grow_rotations(self, num_positions: int) -> None:
        """Cosines and sines [P, D / 2] of at least so many positions."""
        if len(self.cos_PD) >= num_positions:
            return
        size = 1 << (num_positions - 1).bit_length()
        positions = torch.arange(size)[None]
        cos, sin = self.rotary_emb(torch.empty(0), positions)  # the first argument gives the dtype
        half = cos.shape[-1] // 2  # both halves hold the same
        self.cos_PD, self.sin_PD = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
