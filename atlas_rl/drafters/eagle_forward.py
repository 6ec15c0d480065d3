"""The EAGLE layer as it decodes: over a paged cache, and in few calls, as a step of a small policy leaves it little time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from atlas_kernels import cpu, rope_and_store
from atlas_rl.drafters.eagle_head import EagleHead, rotate
from atlas_rl.engine.attention import attend, uses_cpu_kernels
from atlas_rl.engine.batch import ForwardBatch
from atlas_rl.engine.linears import PackedLinear


class JoinedLinear:
    """Several Linears over the same input as one product: `PackedLinear` for any device and dtype."""

    def __init__(self, *sources: nn.Linear) -> None:
        self.sources = sources
        self.refresh()

    def refresh(self) -> None:
        weights = [source.weight.detach() for source in self.sources]
        self.weight = weights[0] if len(weights) == 1 else torch.cat(weights)

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        out = F.linear(x, self.weight)
        return out if residual is None else out + residual


class PagedEagle:
    """An `EagleHead` as it decodes: its products joined and packed, its keys and values in a paged cache."""

    def __init__(self, head: EagleHead) -> None:
        self.head = head
        weight, layer = head.fc.weight, head.midlayer
        linear = PackedLinear if weight.device.type == "cpu" and weight.dtype == torch.float32 else JoinedLinear
        attention, mlp = layer.self_attn, layer.mlp
        self.fc = linear(head.fc)
        self.qkv = linear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = linear(attention.o_proj)
        self.gate_up = linear(mlp.gate_proj, mlp.up_proj)
        self.down = linear(mlp.down_proj)
        self.lm_head = None if head.lm_head is None else linear(head.lm_head)
        self.norms = [
            m.weight.detach() for m in (layer.input_layernorm, layer.hidden_norm, layer.post_attention_layernorm)
        ]
        self.final_norm = head.norm.weight.detach()
        self.eps, self.scaling = head.rms_norm_eps, head.head_dim**-0.5
        self.cos_PD = self.sin_PD = weight.new_empty(0, 0)

    def refresh(self) -> None:
        """Take over the head's weights after they have changed in place."""
        for linear in self._linears():
            linear.refresh()

    def memory_key(self) -> tuple[int, ...]:
        """Changes whenever a forward would read other memory."""
        weights = [linear.weight.data_ptr() for linear in self._linears() if isinstance(linear, JoinedLinear)]
        return (self.cos_PD.data_ptr(), self.sin_PD.data_ptr(), *weights)

    def _linears(self) -> list[PackedLinear | JoinedLinear]:
        linears = (self.fc, self.qkv, self.out, self.gate_up, self.down, self.lm_head)
        return [linear for linear in linears if linear is not None]

    def __call__(self, batch: ForwardBatch, embeds_ND: torch.Tensor, states_ND: torch.Tensor) -> torch.Tensor:
        """Outputs [N, D], before the final norm, of pairs at the batch's positions."""
        fast = uses_cpu_kernels(batch)
        input_norm, hidden_norm, post_norm = self.norms
        normed = self.norm(states_ND, hidden_norm, fast)
        residual = normed if self.head.norm_before_residual else states_ND
        qkv_ND = self.qkv(torch.cat([self.norm(embeds_ND, input_norm, fast), normed], dim=1))
        query_NHD = self._rotate_and_store(qkv_ND, batch, fast)
        x_ND = self.out(attend(batch, 0, query_NHD, self.scaling).flatten(1), residual)
        gate_up = self.gate_up(self.norm(x_ND, post_norm, fast))
        if fast:
            return self.down(cpu.silu_mul(gate_up), x_ND)
        gate, up = gate_up.chunk(2, dim=1)
        return self.down(F.silu(gate) * up, x_ND)

    def norm(self, x_ND: torch.Tensor, weight: torch.Tensor, fast: bool) -> torch.Tensor:
        return cpu.rms_norm(x_ND, weight, self.eps) if fast else torch.rms_norm(x_ND, weight.shape, weight, self.eps)

    def _rotate_and_store(self, qkv_ND: torch.Tensor, batch: ForwardBatch, fast: bool) -> torch.Tensor:
        self.grow_rotations(batch.num_kv_slots)
        cos_PD, sin_PD, head = self.cos_PD, self.sin_PD, self.head
        arguments = (
            qkv_ND,
            None,
            None,
            0.0,
            cos_PD,
            sin_PD,
            batch.positions_N,
            batch.slots_N,
            batch.kv_cache.layers[0],
        )
        if batch.takes_kernels:
            return rope_and_store(*arguments)
        if fast:
            return cpu.rope_and_store(*arguments)
        cos, sin = (torch.cat([x, x], dim=1)[batch.positions_N][:, None] for x in (cos_PD, sin_PD))
        heads = qkv_ND.unflatten(1, (-1, head.head_dim))
        query, key, value = heads.split([head.num_heads, head.num_kv_heads, head.num_kv_heads], dim=1)
        batch.kv_cache.store(0, batch.token_places, rotate(key, cos, sin), value)
        return rotate(query, cos, sin)

    def grow_rotations(self, num_positions: int) -> None:
        """Cosines and sines [P, d / 2] of at least so many positions."""
        if len(self.cos_PD) < num_positions:
            positions = torch.arange(1 << (num_positions - 1).bit_length(), device=self.final_norm.device)
            rotations = self.head.rotations(positions, self.final_norm.dtype)
            self.cos_PD, self.sin_PD = (x[:, : x.shape[1] // 2].contiguous() for x in rotations)
