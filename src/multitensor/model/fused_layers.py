"""The decode step's layers as one launch each beside attention (kernels/cuda/layer.py), where model and GPU allow."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from multitensor.config import HOST_RELAY
from multitensor.kernels.cuda.cuda_kernels import CudaKernels, joined_biases
from multitensor.kernels.cuda.layer import (
    MAX_HIDDEN,
    MAX_TOKENS,
    LayerKernel,
    LayerPhases,
    LayerShape,
    Matrices,
    Places,
    mail_bytes,
    places_bytes,
)
from multitensor.kernels.cuda.layer_weights import LayerWeights, ways_to_lie
from multitensor.kernels.quant_tensor import QuantTensor
from multitensor.model.decoder import Decoder
from multitensor.parallel.group import Group
from multitensor.parallel.host_memory import HostMemory
from multitensor.parallel.peer_memory import PeerMemory
from multitensor.parallel.rank_memory import NOTHING
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
        cls,
        decoder: Decoder,
        plan: Plan,
        rank: int,
        kernels: CudaKernels,
        group: Group,
        tokens: int,
        tried: frozenset[str] = frozenset(),
    ) -> FusedLayers | None:
        """Collective. None where the model, the GPU or the number of tokens does not allow it, on all ranks alike.
        tried: as EngineConfig has it."""
        hidden = plan.spec.hidden_size
        tiles = kernels.tile_kernels
        small = tokens <= MAX_TOKENS and hidden <= MAX_HIDDEN and hidden % 8 == 0
        weights = _weights(decoder, plan, rank) if small else []
        ways = ways_to_lie(weights)
        phases = _phases(decoder) if ways else []
        shape = _fitting(phases, tokens, tiles.blocks, tiles.shared_limit, ways)
        if not all(group.gather_objects(shape is not None)):
            return None
        places = _places(group, hidden, tokens, tiles.device, relay=HOST_RELAY in tried)
        if places is None or shape is None:
            return None
        inner = phases[0].down.weights[0].cols
        kernel = LayerKernel(tiles, shape, decoder.dtype, hidden=hidden, rank=rank, places=places, inner=inner)
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


def _weights(decoder: Decoder, plan: Plan, rank: int) -> list[QuantTensor]:
    """All that the launches multiply with; nothing where a rank lacks a part."""
    own = plan.ranks[rank]
    head = decoder.lm_head.weight
    if not (own.query_heads.size and own.ffn.size) or head is None:
        return []
    blocks = [(layer.attention, layer.feed_forward) for layer in decoder.layers]
    return [*(w for a, f in blocks for w in (*a.qkv, a.output, f.gate, f.up, f.down)), head]


def _phases(decoder: Decoder) -> list[LayerPhases]:
    """What each layer's launch multiplies."""
    blocks = [(layer.attention, layer.feed_forward) for layer in decoder.layers]
    head = decoder.lm_head.weight
    if head is None:
        raise ValueError("a rank without logits has no last launch")
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
    return Matrices(tuple(weights), joined_biases(biases, weights))


def _fitting(
    phases: Sequence[LayerPhases], tokens: int, blocks: int, limit: int, ways: Sequence[LayerWeights]
) -> LayerShape | None:
    """Of the first way for whose launches a block's shared memory, `limit` bytes, is enough."""
    for lie in ways:
        shape = LayerShape.of(phases, tokens, blocks, lie)
        if shape.warps(limit) > 0:
            return shape
    return None


def _places(group: Group, hidden: int, tokens: int, device: torch.device, *, relay: bool) -> Places | None:
    """Of one rank alone, in memory that all GPUs reach, or with mail through the host's; alike on all ranks."""
    size = places_bytes(hidden, tokens, group.size)
    if group.size > 1 and group.peer_memory is not None:
        memory: PeerMemory = group.peer_memory
        return Places(memory.table(memory.carve(size)), memory) if memory.free >= size + 256 else None
    own = torch.full((size // 4,), NOTHING, dtype=torch.int32, device=device)
    if group.size == 1:
        return Places(torch.tensor([own.data_ptr()], device=device), own)
    host: HostMemory | None = group.host_memory if relay else None
    if host is None or host.free < mail_bytes(hidden, tokens) + 256:
        return None
    boxes = host.table(host.carve(mail_bytes(hidden, tokens)))
    table = torch.cat((boxes, boxes[group.rank : group.rank + 1]))
    table[group.rank] = own.data_ptr()
    return Places(table, (own, host), relay=True)
