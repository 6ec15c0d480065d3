"""PolicyView: the hook-free inference twin of the trainer's model. The engine never runs the trainer's module.

The twin is built from a deep copy of the config (a shared one would switch the trainer's attention) on the meta device, and then
given parameters: the trainer's own tensors where they are usable as they are, so that nothing has to be synchronised, and copies
of the Linear weights where another form decodes faster, refreshed in place once per policy update.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from atlas_kernels import uses_triton
from atlas_rl.engine import attention
from atlas_rl.engine.batch import ForwardBatch
from atlas_rl.engine.fused_decoder import FusedDecoder
from atlas_rl.engine.graphs import on
from atlas_rl.engine.kv_cache import KVShape
from atlas_rl.engine.linears import CastLinear, DeviceLinear, PackedLinear, is_linear, share
from atlas_rl.engine.twin import (
    UnsupportedModel,
    build_twin,
    decoder_layers,
    kv_shape,
    probe_mismatch,
    run_twin,
    scale_logits,
    unsupported_reason,
)


class FastRMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight in one call; the modules of transformers take seven."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        share(self, weight=source.weight)
        self.eps = source.variance_epsilon
        self.shape = tuple(source.weight.shape)

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether a module of this kind of name computes just that: some scale by 1 + weight."""
        if not (type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")):
            return False
        x = torch.linspace(-2, 3, 2 * module.weight.numel()).view(2, *module.weight.shape)
        with torch.no_grad():
            return torch.allclose(cls(module)(x), module(x), rtol=1e-6, atol=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.rms_norm(x, self.shape, self.weight, self.eps)


class PolicyView:
    """The policy as the engine sees it: hidden states and logits of packed tokens, under the trainer's autocast.

    Raises:
        UnsupportedModel: the twin would not compute what the model computes.
    """

    def __init__(
        self, model: PreTrainedModel, *, autocast_dtype: torch.dtype | None = None, pack_linears: bool = True
    ) -> None:
        reason = unsupported_reason(model)
        if reason is not None:
            raise UnsupportedModel(reason)
        self.model = model
        weight = model.get_input_embeddings().weight
        self.device = weight.device
        self.autocast_dtype = autocast_dtype if autocast_dtype != weight.dtype else None
        self.compute_dtype = self.autocast_dtype or weight.dtype
        self.tapped_layers: frozenset[int] = frozenset()
        self.tap_handles: list[torch.utils.hooks.RemovableHandle] = []
        with on(self.device):
            self._build(pack_linears)
            self.fingerprint = fingerprint(self.model.parameters())

    def _build(self, pack_linears: bool) -> None:
        """The twin, and its Linears or layers in the form that decodes fastest here."""
        model, weight = self.model, self.model.get_input_embeddings().weight
        mismatch = probe_mismatch(model, self._autocast)
        if mismatch is not None:
            raise UnsupportedModel(mismatch)
        self.twin = build_twin(model, attention.NAME)
        self.fused: FusedDecoder | None = None
        """The twin's layers in a form that decodes faster, where there is one."""
        if self.autocast_dtype is not None:
            self._replace(is_linear, lambda linear: CastLinear(linear, self.autocast_dtype))
        if uses_triton(weight):
            with self._autocast():
                self.fused = FusedDecoder.of(self.twin, self.compute_dtype, on_device=True)
            if self.fused is not None:
                self.twin.set_output_embeddings(DeviceLinear(self.twin.get_output_embeddings()))
        elif (
            pack_linears and self.device.type == "cpu" and self.autocast_dtype is None and weight.dtype == torch.float32
        ):
            self.fused = FusedDecoder.of(self.twin, self.compute_dtype, on_device=False)
            if self.fused is None:
                self._replace(PackedLinear.fits, PackedLinear)
                self._replace(FastRMSNorm.fits, FastRMSNorm)
            else:
                self.twin.set_output_embeddings(PackedLinear(self.twin.get_output_embeddings()))
        self.head = self.twin.get_output_embeddings()

    @cached_property
    def vocab_size(self) -> int:
        return self.model.get_output_embeddings().weight.shape[0]

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Of hidden states: the residual stream's, which autocast leaves alone."""
        return self.model.get_input_embeddings().weight.dtype

    @property
    def max_len(self) -> int | None:
        """Positions the model was made for."""
        return getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)

    def kv_shape(self, block_size: int) -> KVShape:
        return kv_shape(self.model, self.compute_dtype, block_size)

    def memory_key(self) -> tuple[int, ...]:
        """Changes whenever a forward would read other memory: what was captured before is void then."""
        copies = [
            t.data_ptr() for module in self._copies() for t in vars(module).values() if isinstance(t, torch.Tensor)
        ]
        rotations = [] if self.fused is None else [t.data_ptr() for t in self.fused.rotations]
        taps = sorted(self.tapped_layers)
        return (*(p.data_ptr() for p in self.model.parameters()), *copies, *rotations, *taps)

    def prepare_positions(self, num_positions: int) -> None:
        """Have whatever a forward over so many positions needs: within a captured step nothing can be made."""
        if self.fused is not None:
            self.fused.grow_rotations(num_positions)

    def refresh(self, force: bool = False) -> bool:
        """Take over the trainer's weights if they have changed; shared tensors need nothing. Returns whether they had."""
        now = fingerprint(self.model.parameters())
        if now == self.fingerprint and not force:
            return False
        self.fingerprint = now
        with torch.no_grad():
            for linear in self._copies():
                linear.refresh()
            if self.fused is not None:
                self.fused.take_weights()
        return True

    @property
    def hidden_size(self) -> int:
        return self.model.get_input_embeddings().weight.shape[1]

    @property
    def num_layers(self) -> int:
        return self.model.config.get_text_config(decoder=True).num_hidden_layers

    def tap(self, layers: Iterable[int]) -> None:
        """Have every forward from now on leave the outputs of these decoder layers (from 0) in `batch.tapped`."""
        self.tapped_layers = frozenset(layers)
        assert all(0 <= layer < self.num_layers for layer in self.tapped_layers)
        if self.fused is not None:
            self.fused.tapped_layers = self.tapped_layers
            return
        for handle in self.tap_handles:
            handle.remove()
        modules = decoder_layers(self.twin)
        self.tap_handles = [
            modules[layer].register_forward_hook(partial(_leave_output, layer), with_kwargs=True)
            for layer in self.tapped_layers
        ]

    def compile_layers(self, **options: Any) -> None:
        """Have the twin's layers compiled at their next call, by `torch.compile` with these options: one code for all."""
        attention.keep_out_of_compiled_layers()
        for layer in decoder_layers(self.twin):
            layer.compile(dynamic=True, **options)

    def drop_compiled_layers(self) -> None:
        for layer in decoder_layers(self.twin):
            layer._compiled_call_impl = None  # what nn.Module calls where it is there

    def hidden_states(self, batch: ForwardBatch) -> torch.Tensor:
        """Last hidden states [N, D] (after the final norm) of a batch whose KV lands in its cache; also `batch.hidden_ND`."""
        if self.fused is not None:
            batch.hidden_ND = self.fused(batch)
        else:
            with self._autocast():
                batch.hidden_ND = run_twin(self.twin, batch)
        return batch.hidden_ND

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """[N, D] -> [N, V], with the scalings that some architectures put on their head."""
        with self._autocast():
            logits_NV = self.head(hidden_ND)
        return scale_logits(logits_NV, self.model.config) if self.scales_logits else logits_NV

    @cached_property
    def scales_logits(self) -> bool:
        """Whether logits are more than the output head's product."""
        probe = torch.linspace(-2, 3, 8)
        return not torch.equal(scale_logits(probe, self.model.config), probe)

    def packed_linears(self) -> list[PackedLinear]:
        """The packed products of one forward, in order, head included: what a bench times by themselves."""
        return [module for module in self._copies() if isinstance(module, PackedLinear)]

    def _copies(self) -> list[PackedLinear | CastLinear]:
        """What holds a copy of the trainer's weights."""
        fused = [] if self.fused is None else self.fused.linears()
        return fused + [module for module in self.twin.modules() if isinstance(module, (PackedLinear, CastLinear))]

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        # without its cache of casts: what a captured step reads has to stay
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, cache_enabled=False)

    def _replace(self, fits: Callable[[nn.Module], bool], make: Callable[[nn.Module], nn.Module]) -> None:
        for parent in list(self.twin.modules()):
            for name, child in parent.named_children():
                if fits(child):
                    setattr(parent, name, make(child).eval())


def _leave_output(layer: int, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    kwargs["atlas"].tapped[layer] = (output[0] if isinstance(output, tuple) else output)[0]


def fingerprint(parameters: Iterable[torch.Tensor]) -> list[int]:
    """Changes whenever the weights do: version counters catch optimizers, sums of the bits what goes through `.data`."""
    parameters = [p.detach() for p in parameters]
    versions = [0 if p.is_inference() else p._version for p in parameters]
    places = [p.data_ptr() for p in parameters]  # kernels read some of them where they are
    sums = [p.view(INTEGERS[p.element_size()]).sum(dtype=torch.int64) for p in parameters]
    return versions + places + torch.stack(sums).tolist()


INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""To read a float's bits, by its size in bytes."""
