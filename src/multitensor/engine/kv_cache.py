"""Which blocks of the KV pool belong to whom: numbers only, the memory itself is the ranks'.

A block holds `block_size` tokens of every layer. A sequence's table lists its blocks in order. Blocks come back when
the last step that may touch them has ended, because steps are scheduled before the results of the one before are known.
Content is not shared between sequences yet; a table that refers to a shared block would be counted here.
"""

from __future__ import annotations

from collections.abc import Iterable


class BlockManager:
    """The free list, and the blocks that wait for a step to end."""

    def __init__(self, n_blocks: int, block_size: int) -> None:
        if n_blocks < 1 or block_size < 1:
            raise ValueError(f"a KV pool needs blocks of tokens, not {n_blocks} of {block_size}")
        self.n_blocks = n_blocks
        self.block_size = block_size
        self._free = list(range(n_blocks - 1, -1, -1))  # a stack: low numbers, used last, are used next
        self._waiting: dict[int, list[int]] = {}  # step -> blocks that come back when it has ended
        self._last_ended = -1

    @property
    def n_free(self) -> int:
        return len(self._free)

    @property
    def n_waiting(self) -> int:
        """Blocks that will be free as soon as the steps under way have ended."""
        return sum(map(len, self._waiting.values()))

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def grow(self, table: list[int], tokens: int) -> bool:
        """Appends blocks until `table` holds `tokens` tokens; False, with nothing changed, when too few are free."""
        missing = self.blocks_for(tokens) - len(table)
        if missing > len(self._free):
            return False
        if missing > 0:
            table += reversed(self._free[-missing:])
            del self._free[-missing:]
        return True

    def release(self, table: list[int], last_step: int) -> None:
        """Empties the table; its blocks are free once step `last_step`, the last that touches them, has ended."""
        blocks, table[:] = list(table), []
        if last_step <= self._last_ended:
            self._give_back(blocks)
        elif blocks:
            self._waiting.setdefault(last_step, []).extend(blocks)

    def step_ended(self, step: int) -> None:
        """Steps end in the order in which they were submitted."""
        self._last_ended = step
        for waiting in [number for number in self._waiting if number <= step]:
            self._give_back(self._waiting.pop(waiting))

    def _give_back(self, blocks: Iterable[int]) -> None:
        self._free += reversed(list(blocks))
