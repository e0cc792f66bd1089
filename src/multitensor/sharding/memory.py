"""Plan -> bytes per device: weights, KV cache, buffers (never imports torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby

from multitensor.config import kv_head_bytes
from multitensor.sharding.plan import Plan, RankPlan

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
MIB = 1 << 20

# What a GPU holds beside this project's own tensors: the CUDA context with its kernels and cuBLAS's workspace, and
# NCCL's channels when there is more than one rank.
CUDA_CONTEXT_BYTES = 640 * MIB
NCCL_BYTES = 256 * MIB
# Memory that every GPU shares with its peers: receive buffers of sums and of gathered logits, three sets of each, of so
# many rows, float32; and as much again as for the sums, for kernels that take in several of a layer's steps.
PEER_SETS = 3
PEER_TOKENS = 64
PEER_GATHER_TOKENS = 8
# GPUs without peer access share memory of the host instead, page-locked: beside the same, places that large sums pass
# through in chunks.
HOST_GATHER_SETS = 4
HOST_SLOTS = 4
HOST_CHUNK_BYTES = 4 * MIB
# torch's caching allocator rounds blocks up and keeps freed ones. Calibrated: with 256 MiB here, two H200s with 70.6 GB
# of FP16 weights each used 456 MB more than planned, as the driver counts.
CUDA_ALLOCATOR_BYTES = 768 * MIB
# Host memory of a CPU rank: the interpreter and torch.
CPU_PROCESS_BYTES = 320 * MIB
# Staging of the loader: device copies of its chunks on a GPU; host buffers and the repacker's temporaries on a CPU.
CUDA_LOADER_BYTES = 4 * 32 * MIB
CPU_LOADER_BYTES = 32 * MIB
# Page-locked buffers of the host that the loader of a GPU rank reads into; torch keeps them.
HOST_LOADER_BYTES = 10 * 32 * MIB
# Sequences of a recorded decode step: one graph each. What they hold beside the weights depends on the GPU's number of
# multiprocessors, for which a plan takes as many as any GPU has.
GRAPH_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
PROCESSORS = 192
# Bounds that the kernels keep: what attention makes beside the keys and values of a head, scores and masks mostly; rows
# dequantised at a time.
ATTENTION_BYTES = 160 * MIB
CUDA_DEQUANTISE_BYTES = 256 * MIB
CPU_DEQUANTISE_BYTES = 16 * MIB
# Bounds that sampling and scoring keep, whatever the batch; one follows the other.
SAMPLING_BYTES = 128 * MIB
SCORING_BYTES = 256 * MIB


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device. weights: by group ("attention", "ffn", "vocabulary", "shared"). kv: the pool of cache
    blocks. buffer_parts: by use, everything else. host: by use, at most, page-locked memory of the host, which a GPU
    rank takes beside all that; in no sum."""

    weights: Mapping[str, int]
    kv: int
    buffer_parts: Mapping[str, int]
    host: Mapping[str, int] = field(default_factory=dict)

    @property
    def buffers(self) -> int:
        return sum(self.buffer_parts.values())

    @property
    def total(self) -> int:
        return sum(self.weights.values()) + self.kv + self.buffers


def device_memory(plan: Plan) -> tuple[DeviceMemory, ...]:
    """What each rank's device will hold, in rank order."""
    return tuple(
        DeviceMemory(
            _weights(plan, rank.rank),
            kv_bytes_per_token(plan, rank) * plan.kv_tokens,
            _buffers(plan, rank),
            _host(plan, rank),
        )
        for rank in plan.ranks
    )


def _weights(plan: Plan, rank: int) -> dict[str, int]:
    groups = {"attention": 0, "ffn": 0, "vocabulary": 0, "shared": 0}
    for tensor in plan.tensors.values():
        groups[tensor.decl.group] = groups.get(tensor.decl.group, 0) + tensor.resident_bytes(rank)
    return groups


def kv_bytes_per_token(plan: Plan, rank: RankPlan) -> int:
    """Keys and values of one token in all layers, on this rank."""
    return 2 * plan.spec.n_layers * rank.kv_heads.size * kv_head_bytes(plan.kv_type, plan.spec.head_dim)


def context_bytes_per_token(plan: Plan) -> int:
    """What a longer context costs each rank beside its KV: cosines and sines of every rope (float32), and the tokens
    that penalties look back at (int32)."""
    ropes = sum(2 * 4 * len(rope.inverse_frequencies) for rope in plan.spec.ropes)
    return ropes + 4 * plan.max_num_seqs


def attention_bytes(plan: Plan) -> int:
    """What attention holds beside the cache: keys and values of one head, copied out of it, and what ATTENTION_BYTES
    bounds, in which those of short contexts have room."""
    return ATTENTION_BYTES + _head_bytes_per_token(plan) * plan.context


def context_growth_per_token(plan: Plan) -> int:
    """The most that one more token of context can cost a rank beside its KV."""
    tables = -(-4 * sum(graph_buckets(plan)) // plan.block_size)
    return context_bytes_per_token(plan) + _head_bytes_per_token(plan) + tables


def _head_bytes_per_token(plan: Plan) -> int:
    """Of a head's keys and values as they are multiplied: in float32 where the scores are capped."""
    element = 4 if plan.spec.attention_softcap is not None else DTYPE_BYTES[plan.dtype]
    return 2 * plan.spec.head_dim * element


def peer_memory_bytes(plan: Plan) -> int:
    """Of the buffer that every GPU shares with its peers; 0 with one rank, and on CPUs."""
    if plan.size == 1 or any(rank.device.kind == "cpu" for rank in plan.ranks):
        return 0
    sums = plan.size * PEER_TOKENS * plan.spec.hidden_size
    logits = PEER_GATHER_TOKENS * plan.spec.vocab_size
    return 4 * PEER_SETS * (2 * sums + logits) + MIB


def host_memory_bytes(plan: Plan) -> int:
    """Of the host's memory that every GPU writes for its peers where they do not reach each other's, a rank: sums of
    few rows, kernels that take in several of a layer's steps, gathered logits, chunks of large sums and of their
    results; 0 with one rank, and on CPUs."""
    if peer_memory_bytes(plan) == 0:
        return 0
    rows = PEER_TOKENS + 8 * plan.size
    logits = PEER_GATHER_TOKENS * max(rank.vocabulary.size for rank in plan.ranks)
    words = PEER_SETS * rows * plan.spec.hidden_size + HOST_GATHER_SETS * logits
    return 4 * words + 2 * HOST_SLOTS * HOST_CHUNK_BYTES + MIB


def graph_buckets(plan: Plan) -> tuple[int, ...]:
    """Sequences of each decode step that is recorded; none on CPUs and in float32."""
    if any(rank.device.kind == "cpu" for rank in plan.ranks) or plan.dtype == "float32":
        return ()
    return buckets_up_to(plan.max_num_seqs)


def buckets_up_to(sequences: int) -> tuple[int, ...]:
    """Those that steps of up to so many sequences need: the last may be larger than they are."""
    return tuple(size for last, size in zip((0, *GRAPH_BUCKETS), GRAPH_BUCKETS, strict=False) if last < sequences)


def graph_words(plan: Plan, sequences: int) -> int:
    """int32 numbers that a recorded step of so many sequences is fed with, on the device and from the host: id, slot,
    position and place in the cache of each, its table of blocks, the count of steps."""
    return sequences * (4 + -(-plan.context // plan.block_size)) + 1


def graph_bytes(plan: Plan, rank: RankPlan, buckets: tuple[int, ...]) -> int:
    """The most that these recorded steps hold on a rank: their inputs, scratch of attention and of products of
    quantised weights, and what goes from one kernel to the next, of which torch keeps all that was ever needed."""
    spec, element = plan.spec, DTYPE_BYTES[plan.dtype]
    attention = (2 * rank.query_heads.size + 2 * rank.kv_heads.size) * spec.head_dim
    words = 4 * spec.hidden_size + rank.vocabulary.size + spec.vocab_size
    per_sequence = 4 * words + element * (2 * spec.hidden_size + max(attention, 3 * rank.ffn.size))
    kinds = len({layer.window for layer in spec.layers})
    total = sum(
        4 * graph_words(plan, size) + kinds * _attention_scratch(rank, spec.head_dim, size) + size * per_sequence
        for size in buckets
    )
    # Two runs a multiprocessor of panels of 16 x 16 rows; one set for 8, 16, 32 and 64 tokens each.
    tiles = sum(size // 8 for size in buckets if size >= 8)
    return total + PROCESSORS * 2 * 16 * 16 * 8 * 4 * tiles


def _attention_scratch(rank: RankPlan, head_dim: int, sequences: int) -> int:
    """Of one kind of layers: sums of the pieces that sequences are cut into, for the query heads of a KV head in eights
    or, where there are more, in sixteens."""
    runs = [len(list(heads)) for _, heads in groupby(rank.kv_map)]
    if not runs:
        return 0
    most = 0
    for wide in (8, 16):
        jobs = sum(-(-run // wide) for run in runs)
        at_once = max(1, 4 * PROCESSORS // jobs)  # blocks that run at once have a piece each
        pieces = min(64, at_once) if sequences == 1 else at_once + sequences
        most = max(most, 4 * jobs * (pieces * wide * (head_dim + 2) + sequences + 3))
    return most


def _host(plan: Plan, rank: RankPlan) -> dict[str, int]:
    """torch rounds page-locked blocks up to powers of two."""
    if rank.device.kind == "cpu":
        return {}
    fed = (4 * graph_words(plan, size) for size in graph_buckets(plan))
    return {
        "loader": HOST_LOADER_BYTES,
        "peers": host_memory_bytes(plan),
        "graphs": sum(1 << (nbytes - 1).bit_length() for nbytes in fed),
    }


def _buffers(plan: Plan, rank: RankPlan) -> dict[str, int]:
    """Everything that is neither weights nor KV. Work is done one phase at a time, so the largest phase counts."""
    spec, tokens, on_cpu = plan.spec, plan.max_batch_tokens, rank.device.kind == "cpu"
    element = DTYPE_BYTES[plan.dtype]
    # Queries, keys, values and the result; on a GPU two parts of the result too, that are joined (prompt_attention.py).
    of_queries = 2 if on_cpu else 4
    attention = (of_queries * rank.query_heads.size + 2 * rank.kv_heads.size) * spec.head_dim
    # The residual stream and a temporary of it in float32; normed input, partial sum; the widest phase beside them.
    activations = tokens * (8 * spec.hidden_size + element * (2 * spec.hidden_size + max(attention, 3 * rank.ffn.size)))
    # A rank's own logits and those gathered from all ranks, in float32.
    logits = plan.max_num_seqs * 4 * (rank.vocabulary.size + spec.vocab_size)
    quantised = any(not tensor.decl.info.type.is_float for tensor in plan.tensors.values())
    dequantise = (CPU_DEQUANTISE_BYTES if on_cpu else CUDA_DEQUANTISE_BYTES) if quantised else 0
    parts = {
        "activations": activations,
        "context": context_bytes_per_token(plan) * plan.context,
        "scratch": max(attention_bytes(plan), dequantise, logits + SAMPLING_BYTES, SCORING_BYTES),
        "loader": CPU_LOADER_BYTES if on_cpu else CUDA_LOADER_BYTES,
    }
    if on_cpu:
        return {**parts, "process": CPU_PROCESS_BYTES}
    nccl = NCCL_BYTES if plan.size > 1 else 0
    outside = {"cuda_context": CUDA_CONTEXT_BYTES, "nccl": nccl, "peer_memory": peer_memory_bytes(plan)}
    graphs = graph_bytes(plan, rank, graph_buckets(plan))
    kinds = len({layer.window for layer in spec.layers})
    singles = kinds * _attention_scratch(rank, spec.head_dim, GRAPH_BUCKETS[-1])  # in steps that are not recorded
    return {**parts, "graphs": graphs, "single_tokens": singles, **outside, "allocator": CUDA_ALLOCATOR_BYTES}
