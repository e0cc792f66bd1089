"""Products of many tokens on a CUDA device's 8-bit tensor cores, of weights and activations that both lose digits.

Every row, of activations and of weights, becomes 8-bit integers with one scale. That alone costs small models 2% of
perplexity, because single large numbers in a row leave few digits to the rest. So rows are first turned, 64 numbers at
a time, by a Hadamard matrix, which spreads such numbers out and changes no product, both sides being turned alike
(arXiv:2404.00456): then it is 0.2 to 0.3% (docs/perf-log.md) where query, key, value, gate and up are so multiplied.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch

from multitensor.config import INT8_PROMPTS
from multitensor.kernels.cuda.decode import KINDS, or_null
from multitensor.kernels.cuda.program import Program, launch

FEWEST_TOKENS = 256  # below, a product is bound by its weights, of which these read more
TURNED = 64  # columns at a time
_THREADS = 256
_HALVES = (torch.float16, torch.bfloat16)


OLDEST_CAPABILITY = (8, 0)  # of what torch's products of integers ask for


def is_int8_possible(device: torch.device) -> bool:
    """Whether this GPU has products of 8-bit integers; says so where not."""
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        warnings.warn(
            f"{INT8_PROMPTS}: {device} has compute capability {capability[0]}.{capability[1]}, products in 8 bits "
            f"need {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]}; 16 bits are used",
            stacklevel=2,
        )
    return capability >= OLDEST_CAPABILITY


class Int8Products:
    """scratch_bytes: of weights' numbers, integers and sums at a time, the activations' integers included."""

    def __init__(self, device: torch.device, scratch_bytes: int) -> None:
        self.device = device
        self.scratch_bytes = scratch_bytes
        self._programs: dict[torch.dtype, Program] = {}

    @cached_property
    def overlap(self) -> bool:
        """Programmatic dependent launch exists from compute capability 9.0 on."""
        return torch.cuda.get_device_capability(self.device) >= (9, 0)

    def takes(self, x: torch.Tensor, rows: Sequence[int]) -> bool:
        """Whether it can, and should, multiply x [T, K] by weights of so many rows each."""
        return (
            x.dtype in _HALVES
            and x.shape[0] >= FEWEST_TOKENS
            and x.shape[1] % TURNED == 0
            and x.stride(1) == 1
            and x.stride(0) % 8 == 0
            and x.data_ptr() % 16 == 0
            and all(n % 16 == 0 and n for n in rows)
            and x.numel() <= self.scratch_bytes // 2
        )

    def rows_at_a_time(self, tokens: int, columns: int) -> int:
        """Of weights, in 16s: their numbers in 16 bits, their integers and the sums fit the scratch."""
        each = 3 * columns + 4 * tokens
        return max(16, (self.scratch_bytes - tokens * columns) // each // 16 * 16)

    def quantise(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [n, K], as `takes` says, of which only rows may be apart -> turned integers int8 [n, K], and what one of a
        row's is worth, float32 [n]."""
        count, columns = x.shape
        integers = torch.empty((count, columns), dtype=torch.int8, device=x.device)
        scales = torch.empty(count, dtype=torch.float32, device=x.device)
        arguments = (x, integers, scales, columns, x.stride(0))
        launch(self._kernel(x.dtype, "int8_rows"), count, _THREADS, 0, arguments, overlap=self.overlap)
        return integers, scales

    def multiply(
        self, x: torch.Tensor, numbers: Iterator[torch.Tensor], bias: torch.Tensor | None, rows: int
    ) -> torch.Tensor:
        """x [T, K] times weights that come some rows at a time, [n, K] each, so many rows in all, plus bias float32
        [rows] -> [T, rows]."""
        out = x.new_empty((x.shape[0], rows))
        integers, scales = self.quantise(x)
        first = 0
        for some in numbers:
            weights, of_rows = self.quantise(some)
            place = slice(first, first + len(some))
            first = place.stop
            del some  # or it would still be there while the next is made
            sums = torch._int_mm(integers, weights.T)
            self._to_numbers(sums, scales, of_rows, None if bias is None else bias[place], out[:, place])
        return out

    def _to_numbers(
        self,
        sums: torch.Tensor,
        of_tokens: torch.Tensor,
        of_rows: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """int32 [T, n] times what one is worth, float32 [T] and [n], plus bias [n], into out [T, n], whose rows may be
        apart in eights."""
        eights = sums.shape[1] // 8
        arguments = (sums, of_tokens, of_rows, or_null(bias), out, eights, out.stride(0))
        grid = (len(sums), -(-eights // _THREADS))
        launch(self._kernel(out.dtype, "int8_numbers"), grid, _THREADS, 0, arguments, overlap=self.overlap)

    def _kernel(self, dtype: torch.dtype, name: str) -> Any:
        if dtype not in self._programs:
            self._programs[dtype] = Program("prefill.cu", {"X_KIND": KINDS[dtype]}, self.device)
        return self._programs[dtype].kernel(name)
