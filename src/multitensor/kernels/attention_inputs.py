"""What attention needs to know of one step: made once a step, read by every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from multitensor.kernels.host_copy import to_device

KEY_ALIGNMENT = 16  # padded key counts are multiples of this, as fused GPU kernels want their masks


class DecodeChunk(NamedTuple):
    """Some of the sequences of a step that have one query token each, with the keys they see padded to one length.

    rows: int64 [S] flat query row of each. slots: int64 [S, L] flat cache slots of the keys each sees; padding repeats
    the sequence's own last key, so that nothing of another request is ever read. mask: bool [S, L], False on padding.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    mask: torch.Tensor


class SingleTokens(NamedTuple):
    """S sequences of a step that have one query token each, all int32.

    rows: [S] flat query row of each. positions: [S]. tables: [S, B], as AttentionInputs.block_tables.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    tables: torch.Tensor


@dataclass(frozen=True)
class AttentionInputs:
    """S sequences with T query tokens in all, laid one after another; see engine/batch.py for the step they come from.

    query_lens, context_lens: [S] query tokens, and tokens that are in the cache before the step.
    query_starts: [S] first flat row of each sequence.
    block_tables: int64 [S, B]: physical block of each logical block (anything past the end, so long as it exists).
    slot_mapping: int64 [T]: flat cache slot (physical block * block_size + offset) of each new token.
    positions: int64 [T]: position of each new token in its sequence.
    first_slots: [S]: the slot of position 0 where a sequence of several query tokens lies in one piece, its blocks one
    behind the other; else None.
    The tensors lie on the rank's device.
    """

    query_lens: list[int]
    context_lens: list[int]
    query_starts: list[int]
    block_tables: torch.Tensor
    slot_mapping: torch.Tensor
    positions: torch.Tensor
    block_size: int
    first_slots: list[int | None] = field(default_factory=list)
    _decode_chunks: dict[tuple[int | None, int], list[DecodeChunk]] = field(
        default_factory=dict, repr=False, compare=False
    )

    _single_tokens: dict[int, list[SingleTokens]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _slots: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def build(
        query_lens: Sequence[int] | np.ndarray,
        context_lens: Sequence[int] | np.ndarray,
        block_tables: np.ndarray,
        block_size: int,
        device: torch.device,
    ) -> AttentionInputs:
        """From a step's lengths and integer block tables [S, B]; positions and slots are computed on the host."""
        queries = np.asarray(query_lens, dtype=np.int64)
        contexts = np.asarray(context_lens, dtype=np.int64)
        tables = np.asarray(block_tables, dtype=np.int64)
        starts = np.cumsum(queries) - queries
        sequence = np.repeat(np.arange(len(queries)), queries)
        positions = np.arange(int(queries.sum())) - starts[sequence] + contexts[sequence]
        slots = tables[sequence, positions // block_size] * block_size + positions % block_size
        # One copy for all.
        numbers = to_device(np.concatenate((slots, positions, tables.ravel())), device)
        on_device = numbers.split((len(slots), len(positions), tables.size))
        return AttentionInputs(
            query_lens=queries.tolist(),
            context_lens=contexts.tolist(),
            query_starts=starts.tolist(),
            block_tables=on_device[2].view(tables.shape),
            slot_mapping=on_device[0],
            positions=on_device[1],
            block_size=block_size,
            first_slots=[
                _first_slot(table[: -(-int(length) // block_size)], block_size) if query > 1 else None
                for table, query, length in zip(tables, queries, contexts + queries, strict=True)
            ],
        )

    @cached_property
    def has_decodes(self) -> bool:
        """Whether some sequence has exactly one query token."""
        return 1 in self.query_lens

    def slots(self, sequence: int, first: int) -> torch.Tensor:
        """int64: flat cache slots of a sequence's positions from `first` on, the step's own included. Made at the first
        layer of a kind, then shared by the step's other layers."""
        key = (sequence, first)
        if key not in self._slots:
            size = self.block_size
            stop = self.context_lens[sequence] + self.query_lens[sequence]
            block = first // size
            table = self.block_tables[sequence, block : -(-stop // size)]
            every = (table.unsqueeze(1) * size + torch.arange(size, device=table.device)).flatten()
            self._slots[key] = every[first - block * size : stop - block * size]
        return self._slots[key]

    def single_tokens(self, most: int) -> list[SingleTokens]:
        """The one-token sequences, so many at a time. Made at the first layer, then shared by the step's others."""
        if most not in self._single_tokens:
            every = [s for s, length in enumerate(self.query_lens) if length == 1]
            table = [every, [self.query_starts[s] for s in every], [self.context_lens[s] for s in every]]
            device = self.block_tables.device
            numbers = to_device(np.array(table, np.int32).reshape(3, -1), device)
            tables = self.block_tables.index_select(0, numbers[0]).to(torch.int32)
            groups = zip(numbers[1].split(most), numbers[2].split(most), tables.split(most), strict=True)
            self._single_tokens[most] = [SingleTokens(*group) for group in groups] if every else []
        return self._single_tokens[most]

    def decode_chunks(self, window: int | None, max_tokens: int) -> list[DecodeChunk]:
        """The one-token sequences in chunks of about max_tokens padded keys. Made at the first layer of a kind, then
        shared by the step's other layers."""
        key = (window, max_tokens)
        if key not in self._decode_chunks:
            visible = {
                s: self.context_lens[s] + 1 if window is None else min(window, self.context_lens[s] + 1)
                for s, length in enumerate(self.query_lens)
                if length == 1
            }
            chunks = []
            order = sorted(visible, key=lambda s: -visible[s])  # neighbours of like length: little padding
            while order:
                longest = -(-visible[order[0]] // KEY_ALIGNMENT) * KEY_ALIGNMENT
                count = max(1, max_tokens // longest)
                chunks.append(self._decode_chunk(order[:count], visible, longest))
                order = order[count:]
            self._decode_chunks[key] = chunks
        return self._decode_chunks[key]

    def _decode_chunk(self, sequences: list[int], visible: dict[int, int], longest: int) -> DecodeChunk:
        device = self.block_tables.device
        numbers = [
            sequences,
            [self.query_starts[s] for s in sequences],
            [self.context_lens[s] + 1 - visible[s] for s in sequences],
            [visible[s] for s in sequences],
        ]
        which, rows, first, seen = to_device(np.array(numbers, np.int64), device).unsqueeze(-1).unbind(0)
        steps = torch.arange(longest, device=device)
        positions = first + torch.minimum(steps, seen - 1)
        blocks = self.block_tables[which.squeeze(-1)].gather(1, positions // self.block_size)
        slots = blocks * self.block_size + positions % self.block_size
        return DecodeChunk(rows.squeeze(-1), slots, steps < seen)


def _first_slot(blocks: np.ndarray, block_size: int) -> int | None:
    """Of blocks that follow one another; None of others."""
    consecutive = bool((np.diff(blocks) == 1).all())
    return int(blocks[0]) * block_size if consecutive else None
