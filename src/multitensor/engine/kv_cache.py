"""Which blocks of the KV pool belong to whom: numbers only, the memory itself is the ranks'.

A block holds `block_size` tokens of every layer. A sequence's table lists its blocks in order. Blocks come back when
the last step that may touch them has ended, because steps are scheduled before the results of the one before are known.

A full block may be known by a hash of its tokens and of all tokens before it. Sequences that begin alike then share it;
it is counted once for each table it is in, and nobody writes to it any more. When no table holds it, it is kept until
its place is needed: the one that was left longest ago goes first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

BlockHash = bytes


def block_hash(parent: BlockHash, token_ids: SequenceOf[int]) -> BlockHash:
    """Of a block's tokens after those that `parent` stands for (b"" or a salt: none). 128 bits of BLAKE2b: whoever
    chooses prompts cannot make two that collide."""
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


class BlockManager:
    """The free list, the blocks that wait for a step to end, and those that can be found by their content."""

    def __init__(self, n_blocks: int, block_size: int) -> None:
        if n_blocks < 1 or block_size < 1:
            raise ValueError(f"a KV pool needs blocks of tokens, not {n_blocks} of {block_size}")
        self.n_blocks = n_blocks
        self.block_size = block_size
        self._free = list(range(n_blocks - 1, -1, -1))  # a stack: low numbers, used last, are used next
        self._holders = [0] * n_blocks  # tables that hold the block, those given up but waited for included
        self._waiting: dict[int, list[int]] = {}  # step -> blocks of which one holder goes when it has ended
        self._last_ended = -1
        self._by_hash: dict[BlockHash, int] = {}
        self._hashes: dict[int, BlockHash] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # known by a hash, held by none; longest left first

    @property
    def n_free(self) -> int:
        """Blocks that `grow` can hand out now."""
        return len(self._free) + len(self._idle)

    @property
    def n_cached(self) -> int:
        """Of these, the ones whose content can still be found."""
        return len(self._idle)

    @property
    def n_waiting(self) -> int:
        """Blocks that will be free as soon as the steps under way have ended."""
        leaving = Counter(block for blocks in self._waiting.values() for block in blocks)
        return sum(self._holders[block] == count for block, count in leaving.items())

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def grow(self, table: list[int], tokens: int) -> bool:
        """Appends blocks until `table` holds `tokens` tokens; False, with nothing changed, when too few are free."""
        missing = self.blocks_for(tokens) - len(table)
        if missing > self.n_free:
            return False
        for _ in range(missing):
            block = self._free.pop() if self._free else self._evict()
            self._holders[block] = 1
            table.append(block)
        return True

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._by_hash[self._hashes.pop(block)]
        return block

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
        """The end of a text first: without its beginning it cannot be found, so it has to go earlier."""
        for block in reversed(list(blocks)):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._hashes:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    # --- by content ---

    def remember(self, block: int, content: BlockHash) -> None:
        """The step that filled the block has ended: whoever begins with this content may share it from now on. Does
        nothing when another block is known for it."""
        if content not in self._by_hash and block not in self._hashes:
            self._by_hash[content] = block
            self._hashes[block] = content

    def find(self, contents: Iterable[BlockHash]) -> list[int]:
        """The blocks of the longest beginning that is known. They are not held by this."""
        found: list[int] = []
        for content in contents:
            block = self._by_hash.get(content)
            if block is None:
                break
            found.append(block)
        return found

    def n_idle(self, blocks: Iterable[int]) -> int:
        """How many of these count as free."""
        return sum(self._holders[block] == 0 for block in blocks)

    def share(self, table: list[int], blocks: Iterable[int]) -> None:
        """Appends blocks that `find` gave; nothing else may have happened since."""
        for block in blocks:
            self._holders[block] += 1
            self._idle.pop(block, None)
            table.append(block)
