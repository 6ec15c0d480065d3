"""A Llama-like decoder in a handful of calls per layer: calling modules can cost more than a small model computes.

On CPU in float32 it is compiled C++ over packed weights, a single call for all layers; on an accelerator the calls are kernels
over the trainer's own weights. The twin's own modules stay the reference: a fused decoder is used only if it computes what they
compute.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

import atlas_kernels
from atlas_kernels import cpu, fused_linear
from atlas_kernels.cpu_decoder import Decoder, LayerWeights, are_alike
from atlas_rl.engine.attention import attend, uses_cpu_kernels
from atlas_rl.engine.batch import ForwardBatch
from atlas_rl.engine.linears import CastLinear, PackedLinear, is_linear
from atlas_rl.engine.twin import PROBE_TOLERANCE, probe_batches, run_twin

LAYER_KINDS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
"""Pre-norm, rotary attention with or without norms on queries and keys, gated MLP: the same computation under four names."""

Rotations = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines [positions, head_dim / 2]."""


class _LayerParts:
    """What both kinds of layer read off a layer of transformers."""

    def __init__(self, layer: nn.Module, eps: float) -> None:
        attention = layer.self_attn
        self.source = layer
        self.eps = eps
        self.scaling = attention.scaling
        is_mistral = type(layer).__name__ == "MistralDecoderLayer"  # which keeps its window in the config alone
        self.sliding_window = getattr(attention.config if is_mistral else attention, "sliding_window", None)
        self.take_weights()

    def take_weights(self) -> None:
        """Weights as plain attributes: nn.Module takes five times as long to find them."""
        layer, attention = self.source, self.source.self_attn
        self.input_norm, self.post_norm = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.query_norm = attention.q_norm.weight if hasattr(attention, "q_norm") else None
        self.key_norm = attention.k_norm.weight if hasattr(attention, "k_norm") else None


class CPULayer(_LayerParts):
    """In float32, over weights packed for few-row products."""

    def __init__(self, layer: nn.Module, eps: float) -> None:
        super().__init__(layer, eps)
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = PackedLinear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = PackedLinear(attention.o_proj)
        self.gate_up = PackedLinear(mlp.gate_proj, mlp.up_proj)
        self.down = PackedLinear(mlp.down_proj)

    def linears(self) -> tuple[PackedLinear, ...]:
        return self.qkv, self.out, self.gate_up, self.down

    def weights(self) -> LayerWeights:
        return LayerWeights(
            input_norm=self.input_norm,
            query_norm=self.query_norm,
            key_norm=self.key_norm,
            post_norm=self.post_norm,
            qkv=self.qkv.packed,
            out=self.out.packed,
            gate_up=self.gate_up.packed,
            down=self.down.packed,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
        )

    def __call__(self, x_ND: torch.Tensor, batch: ForwardBatch, index: int, rotations: Rotations) -> torch.Tensor:
        eps = self.eps
        qkv_ND = self.qkv(cpu.rms_norm(x_ND, self.input_norm, eps))
        rope_and_store = atlas_kernels.rope_and_store if batch.takes_kernels else cpu.rope_and_store
        places = (batch.positions_N, batch.slots_N, batch.kv_cache.layers[index])
        query_NHD = rope_and_store(qkv_ND, self.query_norm, self.key_norm, eps, *rotations, *places)
        mixed_NHD = attend(batch, index, query_NHD, self.scaling, self.sliding_window)
        x_ND = self.out(mixed_NHD.flatten(1), x_ND)
        return self.down(cpu.silu_mul(self.gate_up(cpu.rms_norm(x_ND, self.post_norm, eps))), x_ND)


class DeviceLayer(_LayerParts):
    """On an accelerator, in any dtype: six or seven kernels, which read the twin's own weights and copy none."""

    def take_weights(self) -> None:
        super().take_weights()
        attention, mlp = self.source.self_attn, self.source.mlp
        self.qkv = _weights(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = _weights(attention.o_proj)
        self.gate_up = _weights(mlp.gate_proj, mlp.up_proj)
        self.down = _weights(mlp.down_proj)

    def linears(self) -> tuple[PackedLinear, ...]:
        return ()

    def __call__(self, x_ND: torch.Tensor, batch: ForwardBatch, index: int, rotations: Rotations) -> torch.Tensor:
        eps = self.eps
        qkv_ND = fused_linear(x_ND, *self.qkv, norm_D=self.input_norm, eps=eps)
        places = (batch.positions_N, batch.slots_N, batch.kv_cache.layers[index])
        query_NHD = atlas_kernels.rope_and_store(qkv_ND, self.query_norm, self.key_norm, eps, *rotations, *places)
        mixed_NHD = attend(batch, index, query_NHD, self.scaling, self.sliding_window)
        x_ND = fused_linear(mixed_NHD.flatten(1), *self.out, residual_NO=x_ND)
        inner_NI = fused_linear(x_ND, *self.gate_up, norm_D=self.post_norm, eps=eps, gated=True)
        return fused_linear(inner_NI, *self.down, residual_NO=x_ND)


class FusedDecoder:
    """The layers of a twin between its embedding and its head."""

    layer_kinds: ClassVar[dict[bool, type[CPULayer | DeviceLayer]]] = {False: CPULayer, True: DeviceLayer}

    def __init__(self, twin: PreTrainedModel, on_device: bool) -> None:
        base = twin.base_model
        self.on_device = on_device
        self.embed_tokens, self.rotary_emb, self.norm = base.embed_tokens, base.rotary_emb, base.norm
        self.eps = base.norm.variance_epsilon
        self.layers = [self.layer_kinds[on_device](layer, self.eps) for layer in base.layers]
        self.tapped_layers: frozenset[int] = frozenset()
        device = self.embed_tokens.weight.device
        self.rotations: Rotations = (torch.empty(0, 0, device=device), torch.empty(0, 0, device=device))
        self.decoder = self._decoder()
        """All layers in one call, on CPU, where they are of one shape."""

    @classmethod
    @torch.inference_mode()
    def of(cls, twin: PreTrainedModel, compute_dtype: torch.dtype, on_device: bool) -> FusedDecoder | None:
        """The fused form of a twin, or None where there is none or it computes something else.

        Called as the twin is: under autocast, where there is one.
        """
        if not cls.fits(twin, on_device):
            return None
        fused = cls(twin, on_device)
        batches = probe_batches(twin, compute_dtype)
        expected = torch.cat([run_twin(twin, batch) for batch in batches])
        got = torch.cat([fused(batch) for batch in batches])
        tolerance = PROBE_TOLERANCE[compute_dtype] if on_device else 1e-4
        return fused if torch.allclose(got, expected, rtol=0, atol=tolerance * float(expected.abs().max())) else None

    @staticmethod
    def fits(twin: PreTrainedModel, on_device: bool) -> bool:
        """Whether the twin is built of the parts that this class computes with, as far as names and types tell."""
        layers = getattr(twin.base_model, "layers", [])
        names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        linears = [m for layer in layers for name, m in layer.named_modules() if name.endswith(names)]
        return (
            len(layers) > 0
            and all(type(layer).__name__ in LAYER_KINDS for layer in layers)
            and all(is_linear(m) or (on_device and isinstance(m, CastLinear)) for m in linears)
            and all(p.is_contiguous() for p in twin.parameters())
            and twin.config.hidden_act == "silu"
            and (on_device or (cpu.unavailable_reason() is None and cpu.supports(layers[0].self_attn.head_dim)))
        )

    def linears(self) -> list[PackedLinear]:
        """What holds copies of weights, in the order in which a forward calls it."""
        return [linear for layer in self.layers for linear in layer.linears()]

    def take_weights(self) -> None:
        """Take over weights that may lie elsewhere now; packed ones refresh themselves."""
        for layer in self.layers:
            layer.take_weights()
        self.decoder = self._decoder()

    def _decoder(self) -> Decoder | None:
        layers = [] if self.on_device else [layer.weights() for layer in self.layers]
        return Decoder(layers, self.norm.weight, self.eps) if layers and are_alike(layers) else None

    def __call__(self, batch: ForwardBatch) -> torch.Tensor:
        """Last hidden states [N, D], after the final norm."""
        self.grow_rotations(batch.num_kv_slots)
        rotations = self.rotations
        x_ND = torch.nn.functional.embedding(batch.input_ids_N, self.embed_tokens.weight)
        if self.decoder is not None and uses_cpu_kernels(batch) and not batch.takes_kernels:
            tokens = (batch.positions_N, batch.slots_N, batch.block_tables_RM, batch.starts_R, batch.query_lens_R)
            tapped_layers = self.tapped_layers if batch.is_tapped else frozenset()
            x_ND, batch.tapped = self.decoder(x_ND, *tokens, batch.kv_cache.memory_L2NHSD, rotations, tapped_layers)
            return x_ND
        for index, layer in enumerate(self.layers):
            x_ND = layer(x_ND, batch, index, rotations)
            if index in self.tapped_layers:
                batch.tapped[index] = x_ND
        rms_norm = atlas_kernels.rms_norm if self.on_device else cpu.rms_norm
        return rms_norm(x_ND, self.norm.weight, self.eps)

    def grow_rotations(self, num_positions: int) -> None:
        """Have cosines and sines of at least so many positions."""
        if len(self.rotations[0]) >= num_positions:
            return
        size = 1 << (num_positions - 1).bit_length()
        device = self.embed_tokens.weight.device
        # the first argument gives the dtype
        cos, sin = self.rotary_emb(torch.empty(0, device=device), torch.arange(size, device=device)[None])
        half = cos.shape[-1] // 2  # both halves hold the same
        self.rotations = (cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())


def _weights(*linears: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    return [linear.weight for linear in linears], [linear.bias for linear in linears]
