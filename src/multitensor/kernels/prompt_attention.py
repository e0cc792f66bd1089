"""Attention of many new tokens over their own keys and those before them, without a mask.

With a mask torch takes slower kernels, which compute what the mask hides. Two ways do without:

"flash": causal attention aligned to the last key, which that kernel knows by itself. Any lengths, one call.

"cudnn": on compute capability 9.0 twice as fast, but as torch calls it, it can only do squares whose queries see the
keys up to their own, and rectangles in which all is seen; and each new shape is planned first, which takes 36 ms
(docs/perf-log.md). So both queries and keys are cut into blocks of powers of two, few shapes in all: a block of queries
takes the keys before it in rectangles and its own in a square, and the results, each a softmax over its own keys alone,
are joined by the logarithms of their sums (arXiv:2205.14135, section 3.1). What no block covers goes through the other.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

_WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

Way = Literal["flash", "cudnn"]
# q [1, heads, n, D], k and v [1, KV heads, L, D], causal, scale -> (result as q, logarithms of sums [1, heads, n])
Part = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool, float], tuple[torch.Tensor, torch.Tensor]]

SMALLEST_BLOCK = 1024  # below, a call's time is its launch, and cuDNN's plans would be many
LARGEST_BLOCK = 1 << 16
# Of a trial's result, relative to that with a mask: both were rounded, some of theirs twice.
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 2e-2}


def masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """torch's fused attention, but never cuDNN, which plans for 0.6 s for each new shape with a mask: and there are as
    many shapes as lengths of texts. Shapes as torch takes them."""
    with sdpa_kernel(_WITHOUT_PLANS):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def flash_part(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal: the last query sees the last key, whatever the lengths."""
    out, sums, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out, sums[..., : q.shape[2]]


def cudnn_part(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal: of as many keys as queries."""
    out, sums, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, False, scale=scale
    )
    return out, sums.reshape(q.shape[:3])


def powers(length: int, smallest: int, largest: int = LARGEST_BLOCK) -> Iterator[int]:
    """Sizes of blocks, powers of two between the two, largest first, as far as they fit into `length`."""
    size = largest
    while size >= smallest:
        if size <= length:
            length -= size
            yield size
        else:
            size //= 2


def join(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the same queries over two sets of keys: over both together. The first result may be overwritten."""
    (a, sums_a), (b, sums_b) = first, second
    weight = torch.sigmoid(sums_b - sums_a).unsqueeze(-1).to(a.dtype)
    return torch.lerp(a, b, weight, out=a), torch.logaddexp(sums_a, sums_b)


def attend_in_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    block: Part,
    rest: Part,
    smallest: int,
) -> None:
    """q, out [1, heads, n, D], the last n of L positions; k, v [1, KV heads, L, D]. `block` is called with powers of
    two of at least `smallest`, `rest` with what is left, whose causal rectangles end at the last key."""
    n, context = q.shape[2], k.shape[2] - q.shape[2]
    done = 0
    for size in powers(n, smallest):
        rows = slice(done, done + size)
        own = slice(context + done, context + done + size)
        queries = q[:, :, rows]
        result = block(queries, k[:, :, own], v[:, :, own], True, scale)
        low = 0
        for keys in powers(own.start, smallest):
            seen = slice(low, low + keys)
            result = join(result, block(queries, k[:, :, seen], v[:, :, seen], False, scale))
            low += keys
        if low < own.start:
            seen = slice(low, own.start)
            result = join(result, rest(queries, k[:, :, seen], v[:, :, seen], False, scale))
        out[:, :, rows] = result[0]
        done += size
    if done < n:
        out[:, :, done:] = rest(q[:, :, done:], k, v, True, scale)[0]


class PromptAttention:
    """The way that a GPU's prompts take: each tried before it is believed in, when it is first wanted for a type and
    size of heads."""

    def __init__(self, device: torch.device) -> None:
        hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
        self.ways: tuple[Way, ...] = ("cudnn", "flash") if hopper else ("flash",)
        self._sound: dict[tuple[Way, torch.dtype, int, int], bool] = {}

    def way(self, q: torch.Tensor, k: torch.Tensor) -> Way | None:
        """For q [1, heads, n, D], k [1, KV heads, L, D]; None: neither is right here."""
        short = q.shape[2] < SMALLEST_BLOCK
        for way in self.ways:
            if way == "cudnn" and short:  # all of it would be left to the other
                continue
            key = (way, q.dtype, q.shape[1] // k.shape[1], q.shape[3])
            sound = self._sound.get(key)
            if sound is None:
                sound = self._sound[key] = self._is_sound(way, q, k)
            if sound:
                return way
        return None

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, scale: float) -> bool:
        """q, out [1, heads, n, D], the last n of L positions; k, v [1, KV heads, L, D], all in 16 bits. False: nothing
        was done."""
        way = self.way(q, k) if q.dtype in TOLERANCE else None
        if way is None:
            return False
        self.run(way, q, k, v, out, scale)
        return True

    def run(self, way: Way, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, scale: float) -> None:
        """`attend` by a way that is given."""
        if way == "flash":
            out.copy_(flash_part(q, k, v, True, scale)[0])
        else:
            attend_in_blocks(q, k, v, out, scale, cudnn_part, flash_part, SMALLEST_BLOCK)

    def _is_sound(self, way: Way, q: torch.Tensor, k: torch.Tensor) -> bool:
        why = self._fault(way, q, k)
        if why is not None:
            warnings.warn(f"{q.device}: attention of prompts through {way} {why}; another way is used", stacklevel=2)
        return why is None

    def _fault(self, way: Way, q: torch.Tensor, k: torch.Tensor) -> str | None:
        """What is wrong with a way, tried on random numbers of every kind of part; None: nothing."""
        heads, size = q.shape[1], q.shape[3]
        blocks = SMALLEST_BLOCK if way == "cudnn" else 0
        new, before = blocks + 60, blocks + 36
        generator = torch.Generator(q.device).manual_seed(0)

        def numbers(length: int, count: int) -> torch.Tensor:
            shape = (length, count, size)
            return torch.randn(shape, generator=generator, device=q.device).to(q.dtype).transpose(0, 1).unsqueeze(0)

        query, key, value = numbers(new, heads), *(numbers(before + new, k.shape[1]) for _ in "kv")
        found = torch.full_like(query, float("nan"))
        scale = size**-0.5
        try:
            self.run(way, query, key, value, found, scale)
            wanted = with_mask(query, key, value, scale)
            error = ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()
        except (RuntimeError, NotImplementedError, AttributeError, TypeError) as problem:
            return f"fails ({' '.join(str(problem).split())[:120]})"
        return None if error <= TOLERANCE[q.dtype] else f"gives another result (by {error:.2g})"


def with_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """The same by a mask: what the ways are held against."""
    n, total = q.shape[2], k.shape[2]
    positions = torch.arange(total - n, total, device=q.device).unsqueeze(1)
    mask = torch.arange(total, device=q.device) <= positions
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    return masked_attention(q, k, v, mask, scale)
