"""The decode step's layers as one launch each beside attention (kernels/cuda/layer.py), where model and GPU allow."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from multitensor.kernels.cuda.cuda_kernels import CudaKernels, joined_biases
from multitensor.kernels.cuda.layer import (
    MAX_HIDDEN,
    MAX_TOKENS,
    LayerKernel,
    LayerPhases,
    LayerShape,
    Matrices,
    places_bytes,
    type_pair,
)
from multitensor.kernels.cuda.tiles import TiledTensor
from multitensor.kernels.quant_tensor import QuantTensor
from multitensor.model.decoder import Decoder
from multitensor.parallel.group import Group
from multitensor.parallel.peer_memory import NOTHING, PeerMemory
from multitensor.sharding.plan import Plan


class FusedLayers:
    """One LayerKernel, and the weights of every layer as its phases."""

    def __init__(
        self, decoder: Decoder, phases: list[LayerPhases], kernel: LayerKernel, dtype: torch.dtype, *, gelu: bool
    ) -> None:
        self._phases, self._kernel, self._dtype = phases, kernel, dtype
        self._eps, self._gelu = decoder.eps, gelu

    @classmethod
    def make(
        cls, decoder: Decoder, plan: Plan, rank: int, kernels: CudaKernels, group: Group, tokens: int
    ) -> FusedLayers | None:
        """Collective. None where the model, the GPU or the number of tokens does not allow it, on all ranks alike."""
        hidden = plan.spec.hidden_size
        tiles = kernels.tile_kernels
        phases = _phases(decoder, plan, rank) if tokens <= MAX_TOKENS and hidden <= MAX_HIDDEN else []
        shape = LayerShape.of(phases, tokens, tiles.blocks) if phases else None
        fits = shape is not None and shape.warps(tiles.shared_limit) > 0 and hidden % 8 == 0
        if not all(group.gather_objects(fits)):
            return None
        size = places_bytes(hidden, tokens, group.size)
        places = _own_places(size, tiles.device) if group.size == 1 else _shared_places(group, size)
        if places is None or shape is None:
            return None
        kernel = LayerKernel(
            tiles,
            shape,
            decoder.dtype,
            hidden=hidden,
            rank=rank,
            places=places[0],
            own=places[1],
            inner=phases[0].down.weights[0].cols,
        )
        return cls(decoder, phases, kernel, decoder.dtype, gelu=plan.spec.activation == "gelu_tanh")

    def run(
        self, index: int, mixed: torch.Tensor, residual: torch.Tensor, new_residual: torch.Tensor, steps: torch.Tensor
    ) -> torch.Tensor:
        """Layer `index` after its attention: mixed [T, query heads x head_dim] -> the next layer's query, key and
        value [T, columns], or after the last layer this rank's logits, float32 [T, its rows]. As LayerKernel.run."""
        phases = self._phases[index]
        dtype = torch.float32 if phases.logits else self._dtype
        out = torch.empty((mixed.shape[0], phases.following.rows), dtype=dtype, device=mixed.device)
        self._kernel.run(
            phases,
            mixed,
            residual,
            new_residual,
            out,
            eps=self._eps,
            gelu=self._gelu,
            steps=steps,
            launches=len(self._phases),
            number=index,
        )
        return out


def _phases(decoder: Decoder, plan: Plan, rank: int) -> list[LayerPhases]:
    """What each layer's launch multiplies; nothing where a rank lacks a part, or a weight is not tiled."""
    own = plan.ranks[rank]
    head = decoder.lm_head.weight
    if not (own.query_heads.size and own.ffn.size) or head is None:
        return []
    blocks = [(layer.attention, layer.feed_forward) for layer in decoder.layers]
    weights = [w for a, f in blocks for w in (*a.qkv, a.output, f.gate, f.up, f.down)]
    if type_pair([*weights, head]) is None:
        return []
    following = [_matrices(a.qkv, a.qkv_biases) for a, _ in blocks[1:]] + [_matrices((head,), None)]
    return [
        LayerPhases(
            output=_matrices((a.output,), (a.output_bias,)),
            gated=_matrices((f.gate, f.up), (f.gate_bias, f.up_bias)),
            down=_matrices((f.down,), (f.down_bias,)),
            following=after,
            ffn_norm=layer.ffn_norm,
            next_norm=layer.next_norm,
            post_attention_norm=layer.post_attention_norm,
            post_ffn_norm=layer.post_ffn_norm,
            logits=layer is decoder.layers[-1],
        )
        for layer, (a, f), after in zip(decoder.layers, blocks, following, strict=True)
    ]


def _matrices(weights: Sequence[QuantTensor], biases: Sequence[torch.Tensor | None] | None) -> Matrices:
    tiled = tuple(w for w in weights if isinstance(w, TiledTensor))
    return Matrices(tiled, joined_biases(biases, weights))


def _own_places(size: int, device: torch.device) -> tuple[torch.Tensor, object]:
    memory = torch.full((size // 4,), NOTHING, dtype=torch.int32, device=device)
    return torch.tensor([memory.data_ptr()], device=device), memory


def _shared_places(group: Group, size: int) -> tuple[torch.Tensor, object] | None:
    memory: PeerMemory | None = group.peer_memory
    if memory is None or memory.free < size + 256:
        return None
    offset = memory.carve(size)
    return memory.table(offset), memory
