"""Stop strings in a text that arrives in pieces: matched across pieces, held back while one could still complete."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Feeds on pieces of text and lets through what can no longer be part of a stop string.

    The match that *ends* first wins, and of those that end together the longest, so the result does not depend on
    how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, piece: str) -> str:
        """Text that may be shown now. Sets `matched` when a stop string completed; later pieces are dropped."""
        if self.matched is not None or not piece:
            return ""
        if not self._stops:
            return piece
        text = self._held + piece
        found = self._first_match(text)
        if found is not None:
            start, self.matched = found
            self._held = ""
            return text[: start + len(self.matched)] if self._include else text[:start]
        keep = self._could_complete(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def skip(self, piece: str) -> str:
        """Lets `piece` through unexamined (before min_tokens), with what was held."""
        return self.flush() + piece

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, str] | None:
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        return None if best is None else (best[1], best[2])

    def _could_complete(self, text: str) -> int:
        """Length of the longest tail of `text` that begins a stop string."""
        longest = max(len(stop) for stop in self._stops) - 1
        for size in range(min(longest, len(text)), 0, -1):
            tail = text[-size:]
            if any(len(stop) > size and stop.startswith(tail) for stop in self._stops):
                return size
        return 0
