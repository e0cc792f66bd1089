"""THE ONLY SPLITTER: stage, rank and slice of every tensor, as plain data (never imports torch).

Two phases of a layer are cut: attention by query heads, the FFN by its inner size; outside the layers the vocabulary.
Each has its own ratio. Cut points lie on the cut unit of the types involved, so no weight is ever changed by a cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from multitensor.architectures.cut_rules import CutColumns, CutExperts, CutHeads, Replicate
from multitensor.architectures.spec import ModelSpec, TensorDecl
from multitensor.errors import InputError
from multitensor.sharding.topology import Device

VOCABULARY_UNIT = 32  # rows may be cut anywhere; 32 keeps the parts aligned
VECTOR_BYTES = 4  # norms and biases are held in float32, whatever the file has


class Slice(NamedTuple):
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Ratios:
    """One weight a rank, for each kind of tensor on its own."""

    attention: tuple[float, ...]
    ffn: tuple[float, ...]
    experts: tuple[float, ...]
    vocabulary: tuple[float, ...]

    @classmethod
    def uniform(cls, ratio: Sequence[float]) -> Ratios:
        """The same ratio for every kind."""
        return cls(tuple(ratio), tuple(ratio), tuple(ratio), tuple(ratio))


@dataclass(frozen=True)
class TensorPlan:
    """axis: 0 rows, 1 columns, None replicated. slices[rank]: the ranges of that axis the rank holds, in order
    (one range, or one a segment; an empty tuple when the rank holds nothing; the whole axis 0 when replicated).
    reason: why it is replicated, wholly or in part; "" when it is cut cleanly."""

    decl: TensorDecl
    axis: int | None
    slices: tuple[tuple[Slice, ...], ...]
    reason: str = ""
    stage: int = 0

    @property
    def name(self) -> str:
        return self.decl.name

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """Shape of what the rank holds; 0 along the cut axis when it holds nothing."""
        shape = list(self.decl.info.shape)
        shape[self.axis or 0] = sum(part.size for part in self.slices[rank])
        return tuple(shape)

    def _parts(self, rank: int) -> list[tuple[int, int, int]]:
        """(rows, first column, last column + 1) of each of the rank's slices; a vector is one row."""
        shape = self.decl.info.shape
        columns = shape[-1]
        parts = []
        for part in self.slices[rank]:
            if len(shape) == 1:
                parts.append((1, part.start, part.stop))
            elif self.axis == 1:
                parts.append((math.prod(shape[:-1]), part.start, part.stop))
            else:
                parts.append((part.size * math.prod(shape[1:-1]), 0, columns))
        return parts

    def owned_bytes(self, rank: int) -> float:
        """Bytes of the file that are this rank's weights and nobody else's (but for replicas): a fraction of a
        block where a cut goes through it."""
        kind = self.decl.info.type
        weights = sum(rows * (stop - start) for rows, start, stop in self._parts(rank))
        return weights * kind.block_bytes / kind.block_weights

    def read_bytes(self, rank: int) -> int:
        """Bytes of the file blocks that the rank's slices touch."""
        kind = self.decl.info.type
        return sum(kind.read_bytes(rows, start, stop) for rows, start, stop in self._parts(rank))

    def resident_bytes(self, rank: int) -> int:
        """Bytes that the rank keeps on its device: the planes of a matrix, float32 elements of a vector."""
        kind = self.decl.info.type
        if len(self.decl.info.shape) == 1:
            return sum(rows * (stop - start) * VECTOR_BYTES for rows, start, stop in self._parts(rank))
        return sum(kind.resident_bytes(rows, start, stop) for rows, start, stop in self._parts(rank))


@dataclass(frozen=True)
class RankPlan:
    """What rank `rank` computes. kv_heads: the KV heads it holds (global numbers, contiguous). kv_map[i]: local KV
    head that local query head i attends to. ffn, vocabulary: its share of those axes (may be empty)."""

    rank: int
    device: Device
    query_heads: Slice
    kv_heads: Slice
    kv_map: tuple[int, ...]
    ffn: Slice
    vocabulary: Slice
    stage: int = 0


@dataclass(frozen=True)
class Plan:
    spec: ModelSpec
    ranks: tuple[RankPlan, ...]
    ratios: Ratios
    tensors: Mapping[str, TensorPlan]  # by canonical name, in the model's order
    context: int  # tokens one sequence may have at most
    kv_tokens: int  # tokens the KV pool holds, all sequences together (a multiple of block_size)
    kv_type: str  # of config.KV_TYPES, never "auto"
    block_size: int
    max_num_seqs: int
    max_batch_tokens: int
    dtype: str
    warnings: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return len(self.ranks)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON-serialisable data: bytes a device, ratios, and every tensor's slices a rank."""
        from multitensor.sharding.report import plan_to_json

        return plan_to_json(self)


def apportion(total: int, unit: int, ratio: Sequence[float]) -> tuple[Slice, ...]:
    """Cuts [0, total) into one contiguous range a rank, in rank order, at multiples of `unit`.

    The last unit may be shorter. Each range differs from its exact share by less than a unit: every rank gets its
    share rounded down, and the units left over go to the largest remainders (lower ranks first when equal).
    """
    parts = [Fraction(part) for part in ratio]
    whole = sum(parts)
    exact = [total * part / whole for part in parts]
    last = max(rank for rank, part in enumerate(parts) if part > 0)
    sizes = [share // unit * unit for share in exact]
    # A short unit is the last one, so it belongs to the last rank that takes part. That rank may then have a little
    # more than its share, but no unit more: whenever units are left over, more ranks than units are below their share.
    sizes[last] += total % unit
    left = (total - sum(sizes)) // unit
    by_remainder = sorted(range(len(parts)), key=lambda rank: (sizes[rank] - exact[rank], rank))
    for rank in by_remainder[:left]:
        sizes[rank] += unit
    slices, start = [], 0
    for size in sizes:
        slices.append(Slice(start, start + int(size)))
        start += int(size)
    return tuple(slices)


def heads_unit(spec: ModelSpec) -> int:
    """Query heads that stay together: as many as make a cut through attn_output's columns fall on its cut unit.
    Floats may be cut at any head."""
    units = [
        decl.info.type.cut_unit
        for decl in spec.tensors
        if decl.rule == CutHeads("output") and not decl.info.type.is_float
    ]
    return math.lcm(spec.head_dim, *units) // spec.head_dim


def ffn_unit(spec: ModelSpec) -> int:
    """Columns of ffn_down that stay together in every layer."""
    return math.lcm(*(d.info.type.cut_unit for d in spec.tensors if d.group == "ffn" and d.rule == CutColumns()), 1)


def make_plan(
    spec: ModelSpec,
    devices: Sequence[Device],
    ratios: Ratios,
    *,
    context: int,
    kv_tokens: int,
    kv_type: str,
    dtype: str,
    block_size: int,
    max_num_seqs: int,
    max_batch_tokens: int,
    warnings: Sequence[str] = (),
) -> Plan:
    """Cuts `spec` over `devices`, one rank each. Whether it fits is for `solve` to say.

    Raises InputError when a ratio does not have one part a device.
    """
    for group, ratio in vars(ratios).items():
        if len(ratio) != len(devices):
            raise InputError(
                f"ratio: {len(ratio)} parts for {group}, but there are {len(devices)} ranks; give one each"
            )
    head_unit = heads_unit(spec)
    query = apportion(spec.n_heads, head_unit, ratios.attention)
    ffn = apportion(spec.ffn_size, ffn_unit(spec), ratios.ffn)
    vocabulary = apportion(spec.vocab_size, VOCABULARY_UNIT, ratios.vocabulary)
    ranks = tuple(
        _rank_plan(spec, rank, device, query[rank], ffn[rank], vocabulary[rank]) for rank, device in enumerate(devices)
    )
    idle = (
        *_idle("attention heads", query, ratios.attention, f"{head_unit} of {spec.n_heads} heads"),
        *_idle("FFN", ffn, ratios.ffn, f"{ffn_unit(spec)} of {spec.ffn_size} columns"),
        *_idle("vocabulary", vocabulary, ratios.vocabulary, f"{VOCABULARY_UNIT} of {spec.vocab_size} rows"),
    )
    return Plan(
        spec=spec,
        ranks=ranks,
        ratios=ratios,
        tensors={decl.name: _cut(spec, decl, ranks, ratios) for decl in spec.tensors},
        context=context,
        kv_tokens=kv_tokens,
        kv_type=kv_type,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_batch_tokens=max_batch_tokens,
        dtype=dtype,
        warnings=(*warnings, *idle),
    )


def _rank_plan(spec: ModelSpec, rank: int, device: Device, query: Slice, ffn: Slice, vocabulary: Slice) -> RankPlan:
    group = spec.n_heads // spec.n_kv_heads  # query heads that share a KV head
    first = query.start // group
    kv_heads = Slice(first, -(-query.stop // group)) if query.size else Slice(first, first)
    kv_map = tuple(head // group - first for head in range(query.start, query.stop))
    return RankPlan(rank, device, query, kv_heads, kv_map, ffn, vocabulary)


def _idle(what: str, slices: Sequence[Slice], ratio: Sequence[float], unit: str) -> list[str]:
    """A warning when ranks that were to take part get nothing."""
    ranks = [str(rank) for rank, part in enumerate(slices) if part.size == 0 and ratio[rank] > 0]
    if not ranks:
        return []
    holders = f"rank {ranks[0]} gets" if len(ranks) == 1 else f"ranks {', '.join(ranks)} get"
    return [f"{holders} no part of the {what}: the smallest part is {unit}; fewer ranks or another ratio would help"]


def _cut(spec: ModelSpec, decl: TensorDecl, ranks: Sequence[RankPlan], ratios: Ratios) -> TensorPlan:
    rule = decl.rule
    if isinstance(rule, Replicate):
        everything = (Slice(0, decl.info.shape[0]),)
        return TensorPlan(decl, None, (everything,) * len(ranks), rule.why)
    if isinstance(rule, CutExperts):
        raise InputError(f"{decl.name}: mixture of experts is not supported yet")
    if isinstance(rule, CutHeads):
        return _cut_heads(spec, decl, rule, ranks)
    ranges = [rank.vocabulary if decl.group == "vocabulary" else rank.ffn for rank in ranks]
    if isinstance(rule, CutColumns):
        return TensorPlan(decl, 1, tuple(_held(part) for part in ranges))
    if not rule.segments:
        return TensorPlan(decl, 0, tuple(_held(part) for part in ranges))
    # Parts packed along the rows are as long as the axis itself (gate and up): each is cut where the axis is.
    starts = [sum(rule.segments[:i]) for i in range(len(rule.segments))]
    return TensorPlan(
        decl,
        0,
        tuple(
            tuple(Slice(first + part.start, first + part.stop) for first in starts) if part.size else ()
            for part in ranges
        ),
    )


def _cut_heads(spec: ModelSpec, decl: TensorDecl, rule: CutHeads, ranks: Sequence[RankPlan]) -> TensorPlan:
    heads = [rank.kv_heads if rule.side == "kv" else rank.query_heads for rank in ranks]
    slices = tuple(_held(Slice(part.start * spec.head_dim, part.stop * spec.head_dim)) for part in heads)
    return TensorPlan(decl, int(rule.side == "output"), slices, _shared_kv_heads(ranks) if rule.side == "kv" else "")


def _shared_kv_heads(ranks: Sequence[RankPlan]) -> str:
    """Why KV heads are held by more than one rank; "" when none is."""
    holders: dict[int, list[int]] = {}
    for rank in ranks:
        for head in range(*rank.kv_heads):
            holders.setdefault(head, []).append(rank.rank)
    shared = [f"{head} on ranks {', '.join(map(str, on))}" for head, on in holders.items() if len(on) > 1]
    return f"KV heads whose query heads lie on several ranks: {'; '.join(shared)}" if shared else ""


def _held(part: Slice) -> tuple[Slice, ...]:
    return (part,) if part.size else ()
