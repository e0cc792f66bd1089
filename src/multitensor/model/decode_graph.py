"""The decode step of a GPU rank as one CUDA graph: up to 64 sequences with one new token each.

Nothing of torch's eager machinery is left between kernels: a step copies its small integers to fixed addresses and
replays. The arithmetic is the decoder's (model/decoder.py), with two differences: query, key and value come from one
launch, as do gate, up and activation; and partial sums reach the reduction in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from multitensor.config import KV_GROUP
from multitensor.kernels.cuda.cuda_kernels import CudaKernels
from multitensor.kernels.cuda.decode import HEAD_DIMS, KEY_TILE, MAX_HIDDEN, DecodeAttention, cache_kind
from multitensor.kernels.cuda.layer import STEPS
from multitensor.kernels.cuda.sample import GreedySampler
from multitensor.kernels.cuda.small_batch import PackedRows
from multitensor.kernels.cuda.tiles import TiledTensor
from multitensor.model.attention import KVCache
from multitensor.model.decoder import Decoder, DecoderLayer
from multitensor.model.fused_layers import FusedLayers
from multitensor.parallel.group import Group
from multitensor.sharding.memory import GRAPH_BUCKETS, graph_words
from multitensor.sharding.plan import Plan

BUCKETS = GRAPH_BUCKETS


def can_capture(plan: Plan) -> bool:
    """Whether every rank of the plan can; all ranks must agree, since their collectives have to match."""
    spec = plan.spec
    whole = all(rank.query_heads.size and rank.ffn.size and rank.vocabulary.size for rank in plan.ranks)
    return (
        whole
        and all(rank.device.kind == "cuda" for rank in plan.ranks)
        and plan.dtype in ("float16", "bfloat16")
        and spec.head_dim in HEAD_DIMS
        and (plan.kv_type not in ("q8", "q4") or spec.head_dim % KV_GROUP == 0)
        and plan.block_size % KEY_TILE == 0
        and spec.hidden_size % 4 == 0
        and spec.hidden_size <= MAX_HIDDEN
    )


class DecodeGraphs:
    """One graph a bucket, captured when first needed; they share one memory pool."""

    def __init__(
        self,
        decoder: Decoder,
        plan: Plan,
        rank: int,
        caches: Sequence[KVCache],
        kernels: CudaKernels,
        group: Group,
        last_tokens: torch.Tensor,
        tried: frozenset[str] = frozenset(),
    ) -> None:
        """tried: EngineConfig.experimental."""
        self._parts = (decoder, plan, rank, caches, kernels, group, last_tokens, tried)
        self._graphs: dict[int, _DecodeGraph] = {}
        self._pool: Any | None = None

    @property
    def reads_quantised(self) -> bool:
        """Whether the layers' matrices are read as they lie, quantised."""
        return isinstance(self._parts[0].layers[0].feed_forward.down, TiledTensor)

    @property
    def nbytes(self) -> int:
        """What the graphs that were needed so far keep on the device, but for the memory that torch reuses."""
        return sum(graph.nbytes for graph in self._graphs.values())

    def run(
        self,
        token_ids: np.ndarray,
        slots: np.ndarray,
        context_lens: np.ndarray,
        block_tables: np.ndarray,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One new token for each of S <= 64 sequences -> float32 logits [S, vocabulary], and int64 [S], the likeliest
        token of each, which its slot has sampled last unless something else is sampled; both valid until the next run.

        token_ids: int [S], -1 for what the slot sampled last. slots, context_lens: int [S]. block_tables: int [S, B].
        """
        count = len(token_ids)
        bucket = next(size for size in BUCKETS if size >= count)
        if bucket not in self._graphs:
            graph = _DecodeGraph(*self._parts, sequences=bucket)
            graph.capture(self._pool)
            self._pool = self._pool or graph.pool
            self._graphs[bucket] = graph
        graph = self._graphs[bucket]
        return graph.run(token_ids, slots, context_lens, block_tables)[:count], graph.greedy.ids[:count]


class _DecodeGraph:
    def __init__(
        self,
        decoder: Decoder,
        plan: Plan,
        rank: int,
        caches: Sequence[KVCache],
        kernels: CudaKernels,
        group: Group,
        last_tokens: torch.Tensor,
        tried: frozenset[str],
        *,
        sequences: int,
    ) -> None:
        self.decoder, self.caches, self.kernels, self.group = decoder, caches, kernels, group
        self.last_tokens = last_tokens
        self.sequences, self.hidden_size = sequences, plan.spec.hidden_size
        self.block_size = plan.block_size
        self.blocks = -(-plan.context // plan.block_size)
        self.device = last_tokens.device
        self.dtype = decoder.dtype
        # ids, slots, positions, cache slots; then the block tables; then the count of steps
        length = graph_words(plan, sequences)
        self.host = torch.empty(length, dtype=torch.int32, pin_memory=True)
        self.copied = torch.cuda.Event()
        self.packed = torch.zeros(length, dtype=torch.int32, device=self.device)
        self.ids, self.slots, self.positions, self.cache_slots = (
            self.packed[: 4 * sequences].view(4, sequences).unbind(0)
        )
        self.tables = self.packed[4 * sequences : -1].view(sequences, self.blocks)
        self.steps = self.packed[-1:]
        spec, own = plan.spec, plan.ranks[rank]
        self._attention: dict[int | None, DecodeAttention] = {}
        for layer in spec.layers:
            if layer.window not in self._attention:
                self._attention[layer.window] = DecodeAttention(
                    kernels.decode_kernels,
                    own.kv_map,
                    own.kv_heads.size,
                    spec.head_dim,
                    self.dtype,
                    cache_kind(caches[0][0]),
                    plan.block_size,
                    sequences,
                    scale=spec.attention_scale,
                    window=layer.window,
                    softcap=spec.attention_softcap,
                )
        self.fused = FusedLayers.make(decoder, plan, rank, kernels, group, sequences, tried)
        self._count = 0  # of steps, modulo STEPS
        self.greedy = GreedySampler(sequences, self.device)
        self.graph = torch.cuda.CUDAGraph()
        self.logits: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        logits = 0 if self.logits is None else self.logits.nbytes
        return self.packed.nbytes + sum(attention.nbytes for attention in self._attention.values()) + logits

    @property
    def pool(self) -> Any:
        return self.graph.pool()

    def capture(self, pool: Any | None) -> None:
        """Runs once to compile and warm every kernel, on padding alone, which writes no cache; then records."""
        self.packed.zero_()
        self.positions.fill_(-1)
        self._forward()
        torch.cuda.synchronize(self.device)
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.logits = self._forward()

    def run(
        self, token_ids: np.ndarray, slots: np.ndarray, context_lens: np.ndarray, block_tables: np.ndarray
    ) -> torch.Tensor:
        self.copied.synchronize()  # the step before has read the pinned buffer
        host, size, count = self.host.numpy(), self.sequences, len(token_ids)
        small = host[: 4 * size].reshape(4, size)
        small[:, count:] = 0
        small[2, count:] = -1
        small[0, :count], small[1, :count], small[2, :count] = token_ids, slots, context_lens
        rows = np.arange(count)
        small[3, :count] = (
            block_tables[rows, context_lens // self.block_size] * self.block_size + context_lens % self.block_size
        )
        tables = host[4 * size : -1].reshape(size, self.blocks)
        tables[:count, : block_tables.shape[1]] = block_tables
        self._count = (self._count + 1) % STEPS  # 0 was the warm-up's
        host[-1] = self._count
        self.packed.copy_(self.host, non_blocking=True)
        self.copied.record()
        self.graph.replay()
        if self.logits is None:
            raise RuntimeError("the graph was not captured")
        return self.logits

    def _forward(self) -> torch.Tensor:
        hidden = torch.empty((self.sequences, self.hidden_size), dtype=self.dtype, device=self.device)
        if self.fused is not None:
            logits = self._fused_forward(self.fused, self._embed(hidden, None), hidden)
        else:
            logits = self._layers(hidden)
        self.greedy.run(logits, self.positions, self.slots, self.last_tokens)
        return logits

    def _layers(self, hidden: torch.Tensor) -> torch.Tensor:
        decoder, packed = self.decoder, self._packed_beside(hidden)
        with self.kernels.small_batch_kernels.made_beside(packed):
            residual = self._embed(hidden, packed)
            for layer, cache in zip(decoder.layers, self.caches, strict=True):
                partial = self._attend(layer, hidden, cache)
                self._add_norm(partial, residual, layer.ffn_norm, hidden, layer.post_attention_norm, packed)
                partial = self._feed_forward(layer, hidden)
                self._add_norm(partial, residual, layer.next_norm, hidden, layer.post_ffn_norm, packed)
            return decoder.logits(hidden)

    def _packed_beside(self, hidden: torch.Tensor) -> PackedRows | None:
        """Room for the norms to leave `hidden` as the products of few tokens take it, which saves a launch each; None
        where sums over ranks are made with the norms, or other kernels multiply."""
        if self.group.size > 1:
            return None
        return self.kernels.small_batch_kernels.rows_beside(hidden, self.decoder.layers[0].attention.qkv)

    def _add_norm(
        self,
        partial: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        hidden: torch.Tensor,
        post_weight: torch.Tensor | None,
        packed: PackedRows | None,
    ) -> None:
        eps = self.decoder.eps
        if packed is None:
            self.group.reduce_add_norm_into(partial, residual, weight, eps, hidden, post_weight)
        else:
            norm = self.kernels.decode_kernels.add_rms_norm
            norm(residual, partial, weight, eps, hidden, post_weight=post_weight, packed=packed)

    def _embed(self, hidden: torch.Tensor, packed: PackedRows | None) -> torch.Tensor:
        """The residual stream, and into `hidden` the first layer's input, each [S, hidden]. The embedding is a sum over
        ranks like any."""
        decoder, embedding = self.decoder, self.decoder.embedding
        if isinstance(embedding.weight, TiledTensor):
            partial = self.kernels.tile_kernels.embed(
                embedding.weight,
                self.ids,
                self.slots,
                self.last_tokens,
                first=embedding.rows.start,
                scale=embedding.scale,
            )
        else:
            partial = embedding.partial(torch.where(self.ids < 0, self.last_tokens[self.slots.long()], self.ids.long()))
        weight = decoder.layers[0].first_norm
        if self.group.size == 1:
            self.kernels.decode_kernels.add_rms_norm(partial, None, weight, decoder.eps, hidden, packed=packed)
            return partial
        residual = torch.zeros_like(partial)
        self.group.reduce_add_norm_into(partial, residual, weight, decoder.eps, hidden)
        return residual

    def _fused_forward(self, fused: FusedLayers, residual: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Two launches a layer: rotary and attention, then everything up to the next layer's query, key and value."""
        decoder, first = self.decoder, self.decoder.layers[0]
        out = self.kernels.joined_linear(hidden, first.attention.qkv, first.attention.qkv_biases)
        streams = (residual, torch.empty_like(residual))
        for index, (layer, cache) in enumerate(zip(decoder.layers, self.caches, strict=True)):
            mixed = self._mix(layer, out, cache)
            out = fused.run(index, mixed, streams[index % 2], streams[1 - index % 2], self.steps)
        return decoder.lm_head.gathered(out)

    def _attend(self, layer: DecoderLayer, hidden: torch.Tensor, cache: KVCache) -> torch.Tensor:
        block = layer.attention
        qkv = self.kernels.joined_linear(hidden, block.qkv, block.qkv_biases)
        return self.kernels.partial_linear(self._mix(layer, qkv, cache), block.output, block.output_bias)

    def _mix(self, layer: DecoderLayer, qkv: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Query, key and value side by side [S, columns] -> attention's result [S, query heads x head_dim]."""
        block = layer.attention
        decode = self._attention[block.window]
        rope = self.decoder.ropes[block.rope]
        mixed = torch.empty((self.sequences, block.n_heads * block.head_dim), dtype=self.dtype, device=self.device)
        decode.rope_attend(
            qkv,
            *cache,
            self.positions,
            self.tables,
            self.cache_slots,
            rope.cos,
            rope.sin,
            mixed,
            style=block.rope_style,
            q_norm=block.q_norm,
            k_norm=block.k_norm,
            eps=block.eps,
        )
        return mixed

    def _feed_forward(self, layer: DecoderLayer, hidden: torch.Tensor) -> torch.Tensor:
        block = layer.feed_forward
        inner = self.kernels.gated_linear(
            hidden, block.gate, block.up, block.activation, block.gate_bias, block.up_bias
        )
        return self.kernels.partial_linear(inner, block.down, block.down_bias)
