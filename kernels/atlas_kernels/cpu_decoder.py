"""A Llama-like decoder on CPU in float32, all its layers in one call (`decoder.h`)."""

from __future__ import annotations

from ctypes import Structure, addressof
from dataclasses import dataclass

import torch

from atlas_kernels.cpu import FLOAT, INT, LIBRARY, POINTER, PackedWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """Of one layer, the trainer's own but for the packed ones; norms on queries and keys may be absent."""

    input_norm: torch.Tensor
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    post_norm: torch.Tensor
    qkv: PackedWeight
    out: PackedWeight
    gate_up: PackedWeight
    down: PackedWeight
    scaling: float
    sliding_window: int | None


class _Layer(Structure):
    """`atlas::Layer`"""

    _fields_ = [
        *((name, POINTER) for name in ("input_norm", "query_norm", "key_norm", "post_norm")),
        *((name, POINTER) for name in ("qkv", "out", "gate_up", "down", "tapped")),
        ("scaling", FLOAT),
        ("window", INT),
    ]


class _Decoder(Structure):
    """`atlas::Decoder`"""

    _fields_ = [
        ("layers", POINTER),
        ("num_layers", INT),
        ("hidden_size", INT),
        ("eps", FLOAT),
        *((name, POINTER) for name in ("final_norm", "cos", "sin", "cache")),
        *((name, INT) for name in ("layer_stride", "value_stride")),
    ]


class _Rows(Structure):
    """`atlas::Rows`"""

    _fields_ = [
        *((name, POINTER) for name in ("block_tables", "starts", "query_lens")),
        *((name, INT) for name in ("num_rows", "max_blocks", "num_heads", "num_kv_heads", "head_dim", "block_size")),
    ]


class Decoder:
    """Layers of one shape and the final norm, over the weights that lie where they lay when it was made."""

    def __init__(self, layers: list[LayerWeights], final_norm: torch.Tensor, eps: float) -> None:
        assert are_alike(layers)
        self.weights = (layers, final_norm)  # the pointers are theirs
        self.layers = (_Layer * len(layers))(*map(_layer, layers))
        self.model = _Decoder(addressof(self.layers), len(layers), len(final_norm), eps, final_norm.data_ptr())
        qkv, out, gate_up, down = _products(layers[0])
        inputs = qkv.in_features + out.in_features + down.in_features  # gate_up's lie where qkv's lay
        self.workspace_size = inputs + qkv.out_features + gate_up.out_features
        self.heads_size = out.in_features

    def __call__(
        self,
        x_ND: torch.Tensor,
        positions_N: torch.Tensor,
        slots_N: torch.Tensor,
        block_tables_RM: torch.Tensor,
        starts_R: torch.Tensor,
        query_lens_R: torch.Tensor,
        kv_L2BHSD: torch.Tensor,
        rotations: tuple[torch.Tensor, torch.Tensor],
        tapped_layers: frozenset[int] = frozenset(),
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Last hidden states [N, D] after the final norm, written over the embeddings x_ND, and the tapped layers' outputs.

        Args:
            kv_L2BHSD: the cache of all layers; 2: keys, values. The tokens' own are stored there.
            rotations: cosines and sines [positions, head_dim / 2].
        """
        tapped = {index: torch.empty_like(x_ND) for index in tapped_layers}
        for index, layer in enumerate(self.layers):
            layer.tapped = tapped[index].data_ptr() if index in tapped else None
        model, workspace = self.model, x_ND.new_empty(len(x_ND) * self.workspace_size)
        model.cos, model.sin = rotations[0].data_ptr(), rotations[1].data_ptr()
        model.cache, model.layer_stride, model.value_stride = kv_L2BHSD.data_ptr(), *kv_L2BHSD.stride()[:2]
        *_, num_kv_heads, block_size, head_dim = kv_L2BHSD.shape
        rows = _Rows(
            block_tables_RM.data_ptr(),
            starts_R.data_ptr(),
            query_lens_R.data_ptr(),
            *block_tables_RM.shape,
            self.heads_size // head_dim,
            num_kv_heads,
            head_dim,
            block_size,
        )
        LIBRARY.functions.decode(
            addressof(model),
            addressof(rows),
            positions_N.data_ptr(),
            slots_N.data_ptr(),
            len(x_ND),
            workspace.data_ptr(),
            x_ND.data_ptr(),
        )
        return x_ND, tapped


def are_alike(layers: list[LayerWeights]) -> bool:
    """Whether all layers are of one shape."""
    shapes = {tuple((p.in_features, p.out_features) for p in _products(layer)) for layer in layers}
    return len(shapes) == 1


def _products(weights: LayerWeights) -> tuple[PackedWeight, ...]:
    return weights.qkv, weights.out, weights.gate_up, weights.down


def _layer(weights: LayerWeights) -> _Layer:
    norms = (weights.input_norm, weights.query_norm, weights.key_norm, weights.post_norm)
    return _Layer(
        *(None if norm is None else norm.data_ptr() for norm in norms),
        *(product.address for product in _products(weights)),
        None,
        weights.scaling,
        weights.sliding_window or 0,
    )
