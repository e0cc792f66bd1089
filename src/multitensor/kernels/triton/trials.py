"""Nothing here becomes what a user gets before it has been tried on his own device: at the first use of every kind, our
kernels' result is compared with plain torch's and both are timed; ours are used from then on where they are right and
faster. What is wrong or fails is told, once, and nothing of its family is used again.

The model's own numbers are what a trial computes with. Ranks may choose differently, which is sound: sums over ranks
travel, and what all ranks compute alike differs by roundings at most.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence

import torch

from multitensor.kernels.triton.device import synchronize

PLAIN = "plain"
ROUNDS = 3
# Largest difference, relative to the largest number of the plain result: a few roundings of the type.
TOLERANCE = {torch.float32: 2e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}

Job = Callable[[], Sequence[torch.Tensor]]


class Trials:
    """Of one rank. A job may be run any number of times and returns everything that is to be compared."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._choices: dict[Hashable, str] = {}
        self._distrusted: set[str] = set()

    def best(self, family: str, key: Hashable, plain: Job, ours: Mapping[str, Job]) -> str:
        """Name of the fastest right way of `ours`, or PLAIN; tried when `key`, with the family, is new.

        family: what is distrusted together, in words, for the message."""
        if family in self._distrusted:
            return PLAIN
        known = self._choices.get((family, key))
        if known is None:
            known = self._try(family, plain, ours)
            self._choices[family, key] = known
        return known

    def _try(self, family: str, plain: Job, ours: Mapping[str, Job]) -> str:
        expected = plain()
        jobs = {PLAIN: plain}
        for name, job in ours.items():
            try:
                got = job()
                synchronize(self.device)
            except Exception as error:  # compilers and drivers raise what they like
                return self._distrust(family, f"fails: {_one_line(error)}")
            if not agree(got, expected):
                return self._distrust(family, "gives another result than plain torch")
            jobs[name] = job
        times: dict[str, list[float]] = {name: [] for name in jobs}
        for _ in range(ROUNDS):  # taking turns: clocks change
            for name, job in jobs.items():
                times[name].append(self.seconds(job))
        return min(times, key=lambda name: min(times[name]))

    def seconds(self, job: Job) -> float:
        """Of one run, with the device idle before and after."""
        synchronize(self.device)
        start = time.perf_counter()
        job()
        synchronize(self.device)
        return time.perf_counter() - start

    def _distrust(self, family: str, why: str) -> str:
        self._distrusted.add(family)
        warnings.warn(
            f"{self.device}: Triton's {family} {why}; plain torch is used instead, which is slower",
            stacklevel=2,
        )
        return PLAIN


def agree(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    """Whether all are finite and differ by roundings at most: of the roughest type among them, which the numbers of
    the others may have passed through."""
    tolerance = max(TOLERANCE[right.dtype] for right in expected)
    for mine, right in zip(got, expected, strict=True):
        if mine.shape != right.shape or mine.dtype != right.dtype:
            return False
        if not right.numel():
            continue
        largest = right.abs().max().float()
        error = (mine.float() - right.float()).abs().max()
        # Written so that NaN anywhere is no agreement.
        if not bool(error <= tolerance * largest) or not bool(torch.isfinite(largest)):
            return False
    return True


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
