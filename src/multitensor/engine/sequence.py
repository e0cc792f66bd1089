"""One text in the making as the scheduler sees it: its tokens, known and under way, and its blocks. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from multitensor.engine.batch import SamplingSetup
from multitensor.engine.kv_cache import BlockHash, block_hash

if TYPE_CHECKING:
    from multitensor.engine.grammar import GrammarState

PositionScores = list[tuple[list[int], list[float], float | None]]


@dataclass(eq=False)
class Sequence:
    """One text in the making, or one that is only read: to be scored (score_top >= 1) or to be pooled.

    prompt_ids: at least one id. limit: output tokens it may have; len(prompt_ids) + limit is within context and pool.
    setup: sent to the ranks when the sequence gets a slot (its `slot` is filled in then). seed: of `derive_seed`.
    key: whose it is; keys take turns. salt: only sequences of the same salt share blocks; None: it shares none.
    grammar: what it must follow, if anything.
    The rest belongs to the scheduler: `output_ids` are the tokens known so far, `pending` counts those under way,
    `computed` the tokens whose keys and values are in the cache, or will be when the steps under way have ended.
    """

    prompt_ids: list[int]
    limit: int
    setup: SamplingSetup | None = None
    seed: int = 0
    score_top: int = 0
    pooled: bool = False
    key: str = ""
    salt: bytes | None = None
    grammar: GrammarState | None = None

    output_ids: list[int] = field(default_factory=list)
    scores: PositionScores = field(default_factory=list)
    sums: list[np.ndarray] = field(default_factory=list)  # one a chunk
    n_summed: int = 0  # tokens that they are of
    lives: int = 0  # how often it was preempted
    keeps_until: int = 0  # output tokens that it must have before it gives its slot to another key
    cached: int = 0  # tokens that others had computed when it started first
    pending: int = 0
    computed: int = 0
    table: list[int] = field(default_factory=list)
    slot: int = -1
    last_step: int = -1
    finished: bool = False
    hashes: list[BlockHash] = field(default_factory=list)  # of its full blocks of known tokens, as far as needed yet
    n_filled: int = 0  # blocks whose filling has been counted as ended

    @property
    def is_read(self) -> bool:
        """Nothing is sampled."""
        return self.pooled or self.score_top > 0

    @property
    def total(self) -> int:
        """Tokens it has, those under way included."""
        return len(self.prompt_ids) + len(self.output_ids) + self.pending

    @property
    def remaining(self) -> int:
        """Tokens to compute now: the last token that the limit allows needs no computing."""
        if not self.is_read and len(self.output_ids) + self.pending >= self.limit:
            return 0
        return self.total - self.computed

    @property
    def can_share(self) -> bool:
        """Whether it may take over what others computed; not if something is wanted of each of its tokens."""
        return self.salt is not None and not self.is_read

    def ids(self, start: int, stop: int) -> list[int]:
        """Token ids [start, stop); -1 for tokens under way."""
        split = len(self.prompt_ids)
        ids = self.prompt_ids[start:stop] + self.output_ids[max(start - split, 0) : max(stop - split, 0)]
        return ids + [-1] * (stop - start - len(ids))

    def block_hashes(self, count: int, block_size: int) -> list[BlockHash]:
        """Of its first `count` blocks, whose tokens are all known."""
        assert self.salt is not None
        for number in range(len(self.hashes), count):
            parent = self.hashes[-1] if self.hashes else self.salt
            self.hashes.append(block_hash(parent, self.ids(number * block_size, (number + 1) * block_size)))
        return self.hashes[:count]
