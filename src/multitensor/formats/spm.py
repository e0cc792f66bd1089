"""SentencePiece-like encoding from pieces and scores: greedy merging by score, as llama.cpp does it (layer 1).

Adjacent symbols are merged into the piece with the highest score, the leftmost first among equals, until no two
neighbours form a piece; a character that is no piece falls back to its UTF-8 bytes. A BPE with merges derived from the
scores would be nearly the same, but cannot tell equal scores apart and takes seconds to derive for 262k pieces.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

from multitensor.formats.detokenizer import SPACE_MARK

_CACHED_WORDS = 1 << 16
_LONGEST_CACHED_WORD = 48


class ScoreMerger:
    """Encodes plain text.

    pieces: text -> (score, id) of every piece that text may become.
    byte_ids: 256 ids of the <0xXX> pieces (None where missing); unknown_id: for bytes without one (None: dropped).
    """

    def __init__(
        self, pieces: Mapping[str, tuple[float, int]], byte_ids: Sequence[int | None], unknown_id: int | None
    ) -> None:
        self._pieces = pieces
        self._byte_ids = byte_ids
        self._unknown_id = unknown_id
        self._boundary = _boundary(pieces)
        self._cached = lru_cache(_CACHED_WORDS)(self._encode_word)

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = []
        for word in self._boundary.split(text.replace(" ", SPACE_MARK)):
            ids += self._cached(word) if len(word) <= _LONGEST_CACHED_WORD else self._encode_word(word)
        return ids

    def _encode_word(self, word: str) -> tuple[int, ...]:
        """Merges with a heap of candidate pairs (-score, left index, length, right index); a pair is stale when
        its symbols have changed length since."""
        pieces = self._pieces
        symbols = list(word)
        following = [*range(1, len(word)), -1]
        preceding = list(range(-1, len(word) - 1))
        heap: list[tuple[float, int, int, int]] = []

        def consider(left: int, right: int) -> None:
            text = symbols[left] + symbols[right]
            if text in pieces:
                heapq.heappush(heap, (-pieces[text][0], left, len(text), right))

        for i in range(len(word) - 1):
            consider(i, i + 1)
        while heap:
            _, left, length, right = heapq.heappop(heap)
            if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != length:
                continue
            symbols[left] += symbols[right]
            symbols[right] = ""
            after = following[left] = following[right]
            if after >= 0:
                preceding[after] = left
                consider(left, after)
            if preceding[left] >= 0:
                consider(preceding[left], left)
        return tuple(token for symbol in symbols if symbol for token in self._symbol_ids(symbol))

    def _symbol_ids(self, symbol: str) -> list[int]:
        if symbol in self._pieces:
            return [self._pieces[symbol][1]]
        found = [self._byte_ids[byte] for byte in symbol.encode()]
        with_unknown = [self._unknown_id if token is None else token for token in found]
        return [token for token in with_unknown if token is not None]


def _boundary(pieces: Mapping[str, tuple[float, int]]) -> re.Pattern[str]:
    """Where text can be cut with no piece reaching across: before a space mark, unless the character before it is a
    space mark too or one that some piece has there (words are then short, and worth remembering)."""
    inner = set(re.findall(f"([^{SPACE_MARK}\0]){SPACE_MARK}", "\0".join(pieces)))
    if any("\0" in piece and SPACE_MARK in piece for piece in pieces):
        inner.add("\0")
    kept = re.escape("".join(sorted(inner | {SPACE_MARK})))
    return re.compile(f"(?<=[^{kept}])(?={SPACE_MARK})")
