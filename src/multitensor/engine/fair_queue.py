"""Who is next among those that wait: keys take turns, and within a key it is first come, first served."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar


class Keyed(Protocol):
    @property
    def key(self) -> str: ...


T = TypeVar("T", bound=Keyed)


class FairQueue(Generic[T]):
    """Iterates in the order in which they are to be taken. A key that has just had its turn, or is new, comes last."""

    def __init__(self) -> None:
        self._first: deque[T] = deque()  # those that were running already; they hold slots, so they go before all
        self._turns: OrderedDict[str, deque[T]] = OrderedDict()  # no empty ones

    def __len__(self) -> int:
        return len(self._first) + sum(map(len, self._turns.values()))

    def __iter__(self) -> Iterator[T]:
        yield from self._first
        turns = [iter(queue) for queue in self._turns.values()]
        while turns:
            still = []
            for turn in turns:
                for item in turn:
                    yield item
                    still.append(turn)
                    break
            turns = still

    def push(self, item: T) -> None:
        self._turns.setdefault(item.key, deque()).append(item)

    def push_first(self, item: T) -> None:
        """Before all others, whatever their keys."""
        self._first.appendleft(item)

    def push_back(self, item: T) -> None:
        """Before its key's others: it was taken, and gives the place back."""
        self._turns.setdefault(item.key, deque()).appendleft(item)

    def heads(self) -> list[T]:
        """The next of each key, in the order of their turns; nobody while some wait before all others."""
        return [] if self._first else [queue[0] for queue in self._turns.values()]

    def prefer(self, key: str) -> None:
        """The next turn is that key's, which waits."""
        self._turns.move_to_end(key, last=False)

    def remove(self, item: T) -> None:
        """ValueError when it is not there."""
        if item in self._first:
            self._first.remove(item)
            return
        queue = self._turns.get(item.key, deque())
        queue.remove(item)
        if not queue:
            del self._turns[item.key]

    def take(self, item: T) -> None:
        """Removes it because its turn has come: its key's others come after all other keys."""
        in_turn = item not in self._first
        self.remove(item)
        if in_turn and item.key in self._turns:
            self._turns.move_to_end(item.key)
