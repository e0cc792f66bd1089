"""Attention over a paged cache in plain torch: causal, sliding window, any query-to-KV-head table, mixed batches.

Scores and softmax are float32 (inside torch's fused kernels where these are used). Scratch memory is bounded: long
prefills run a chunk of queries at a time, long caches are read a few KV heads at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from multitensor.kernels.attention_inputs import AttentionInputs
from multitensor.kernels.cache_tensor import CacheTensor, QuantCache
from multitensor.kernels.prompt_attention import PromptAttention, masked_attention

SCORE_ELEMENTS = 12 << 20  # scores (float32, twice) or mask elements alive at a time
WINDOW_QUERIES = 256
GATHER_BYTES = 32 << 20  # keys, and as much again for values, copied out of the cache at a time: a head's at least
READ_NUMBERS = 2 << 20  # of a quantised cache at a time: they take up to twenty bytes each on their way through float32


class HeadGroups:
    """Query heads arranged by the local KV head that they read: [n_kv_heads, size], short groups padded with head 0.

    kv_map[i] is the local KV head of local query head i; any table will do, sorted or not.
    """

    def __init__(self, kv_map: Sequence[int], n_kv_heads: int, device: torch.device) -> None:
        members: list[list[int]] = [[] for _ in range(n_kv_heads)]
        for head, kv_head in enumerate(kv_map):
            members[kv_head].append(head)
        self.n_kv_heads = n_kv_heads
        self.size = max(map(len, members), default=0)
        order = [head for group in members for head in group + [0] * (self.size - len(group))]
        self._order: torch.Tensor | None = None
        if order != list(range(len(kv_map))):
            places = {head: kv * self.size + i for kv, group in enumerate(members) for i, head in enumerate(group)}
            self._order = torch.tensor(order, dtype=torch.int64, device=device)
            self._places = torch.tensor([places[h] for h in range(len(kv_map))], dtype=torch.int64, device=device)

    def split(self, q: torch.Tensor) -> torch.Tensor:
        """[n, query heads, D] -> [n, n_kv_heads, size, D]"""
        arranged = q if self._order is None else q.index_select(1, self._order)
        return arranged.view(q.shape[0], self.n_kv_heads, self.size, q.shape[2])

    def merge(self, grouped: torch.Tensor) -> torch.Tensor:
        """[n, n_kv_heads, size, D] -> [n, query heads, D]"""
        flat = grouped.reshape(grouped.shape[0], self.n_kv_heads * self.size, grouped.shape[3])
        return flat if self._order is None else flat.index_select(1, self._places)


def write_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: CacheTensor, v_cache: CacheTensor, slot_mapping: torch.Tensor
) -> None:
    """Stores k and v [T, H, D] in the cache slots that slot_mapping (int64 [T]) names, rounded to the cache's type.
    Caches: [blocks, block_size, H, D]."""
    if not k.numel():
        return
    for x, cache in ((k, k_cache), (v, v_cache)):
        if isinstance(cache, QuantCache):
            cache.write(x, slot_mapping)
        else:
            cache.flatten(0, 1).index_copy_(0, slot_mapping, x.to(cache.dtype))


def batches_decodes(device: torch.device) -> bool:
    """Whether one-token sequences are padded and run together (a GPU's launches cost more than the padding)."""
    return device.type != "cpu"


def working_dtype(q: torch.Tensor, k_cache: CacheTensor, softcap: float | None) -> torch.dtype:
    """Of products: torch's fused GPU kernels take halves as they are (their sums are float32), all else is float32.
    These kernels know no softcap and want head sizes in eights."""
    alike = isinstance(k_cache, QuantCache) or q.dtype == k_cache.dtype
    in_half = q.dtype in (torch.float16, torch.bfloat16) and alike
    fused = softcap is None and q.device.type != "cpu" and q.shape[-1] % 8 == 0
    return q.dtype if in_half and fused else torch.float32


def paged_attention(
    q: torch.Tensor,
    k_cache: CacheTensor,
    v_cache: CacheTensor,
    inputs: AttentionInputs,
    kv_map: Sequence[int] | HeadGroups,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    prompts: PromptAttention | None = None,
    singles: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """q [T, query heads, D] attends to its sequences' cached keys, the step's own (already written) included.

    The query at position p sees positions (p - window, p]; scores are scaled, then softcap * tanh(score / softcap).
    Caches: [blocks, block_size, KV heads, D]. Returns [T, query heads, D] in q's dtype. prompts: a way for sequences of
    several new tokens that see all before them. singles: a way for those of one, which fills their rows of the result.
    """
    if q.numel() == 0:
        return torch.empty_like(q)
    groups = kv_map if isinstance(kv_map, HeadGroups) else HeadGroups(kv_map, k_cache.shape[2], q.device)
    grouped = groups.split(q.to(working_dtype(q, k_cache, softcap)))
    out = torch.empty_like(grouped)
    attend = _Attend(k_cache, v_cache, inputs, grouped.dtype, scale, window, softcap, prompts)
    batched = singles is None and inputs.has_decodes and batches_decodes(q.device)
    if batched:
        attend.decode(grouped, out)
    for sequence, length in enumerate(inputs.query_lens):
        if length > 1 or (length == 1 and not batched and singles is None):
            start = inputs.query_starts[sequence]
            rows = slice(start, start + length)
            alone = length == q.shape[0]
            attend.sequence(sequence, grouped if alone else grouped[rows], out if alone else out[rows])
    result = groups.merge(out).to(q.dtype)
    if singles is not None:
        singles(result)
    return result


class _Attend:
    """One call's constants."""

    def __init__(
        self,
        keys: CacheTensor,
        values: CacheTensor,
        inputs: AttentionInputs,
        dtype: torch.dtype,
        scale: float,
        window: int | None,
        softcap: float | None,
        prompts: PromptAttention | None,
    ) -> None:
        self.keys, self.values, self.inputs, self.dtype = keys, values, inputs, dtype
        self.scale, self.window, self.softcap, self.prompts = scale, window, softcap, prompts
        # On a GPU torch's float32 attention may build all scores at once or round through TF32.
        self.fused = softcap is None and (keys.device.type == "cpu" or dtype != torch.float32)

    def _heads_at_a_time(self, tokens: int) -> int:
        # Quantised numbers pass through float32.
        size = 4 if isinstance(self.keys, QuantCache) else self.dtype.itemsize
        return max(1, GATHER_BYTES // (tokens * self.keys.shape[-1] * size))

    def _gather(self, cache: CacheTensor, slots: torch.Tensor, heads: slice) -> torch.Tensor:
        """[..., L] slots -> [..., heads, L, D] in the working dtype."""
        places = slots if slots.dim() == 1 else slots.flatten()
        if isinstance(cache, QuantCache):
            picked = self._read(cache, places, heads)
        else:
            every = cache.view(-1, *cache.shape[2:])
            some = every if heads.stop - heads.start >= every.shape[1] else every[:, heads]
            picked = some.index_select(0, places)
            if picked.dtype != self.dtype:
                picked = picked.to(self.dtype)
        return picked.view(*slots.shape, *picked.shape[1:]).transpose(-2, -3)

    def _read(self, cache: QuantCache, slots: torch.Tensor, heads: slice) -> torch.Tensor:
        """[n] slots -> [n, heads, D] in the working dtype."""
        shape = (slots.shape[0], len(range(*heads.indices(cache.shape[2]))), cache.head_dim)
        step = max(1, READ_NUMBERS // (shape[1] * shape[2]))
        if shape[0] <= step:
            return cache.read(slots, heads, self.dtype)
        numbers = torch.empty(shape, dtype=self.dtype, device=slots.device)
        for start in range(0, shape[0], step):
            numbers[start : start + step] = cache.read(slots[start : start + step], heads, self.dtype)
        return numbers

    def sequence(self, sequence: int, q: torch.Tensor, out: torch.Tensor) -> None:
        """q, out: [n, KV heads, group, D], the sequence's new tokens."""
        context = self.inputs.context_lens[sequence]
        first = 0 if self.window is None else max(0, context - self.window + 1)
        in_place = self._in_place(sequence, first, context + q.shape[0])
        if in_place is not None:
            self._prefill(q.permute(1, 2, 0, 3), *in_place, context, first, out.permute(1, 2, 0, 3))
            return
        slots = self.inputs.slots(sequence, first)
        step = self._heads_at_a_time(slots.shape[0])
        for head in range(0, q.shape[1], step):
            heads = slice(head, head + step)
            k = self._gather(self.keys, slots, heads)
            v = self._gather(self.values, slots, heads)
            # Nothing is cut that need not be: a short prompt on a GPU waits for the host.
            all_heads = step >= q.shape[1]
            some, places = (x if all_heads else x[:, heads] for x in (q, out))
            self._prefill(some.permute(1, 2, 0, 3), k, v, context, first, places.permute(1, 2, 0, 3))

    def _in_place(self, sequence: int, first: int, stop: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values [heads, L, D] of a sequence's positions from first to stop, as views of the cache, with the
        strides that `_gather` gives; None where they lie scattered or in another type."""
        starts, keys, values = self.inputs.first_slots, self.keys, self.values
        start = starts[sequence] if starts else None
        if start is None or isinstance(keys, QuantCache) or isinstance(values, QuantCache) or keys.dtype != self.dtype:
            return None
        rows = slice(start + first, start + stop)
        k, v = (cache.view(-1, *cache.shape[2:])[rows].transpose(0, 1) for cache in (keys, values))
        return k, v

    def _prefill(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: int, first: int, out: torch.Tensor
    ) -> None:
        """q, out: [H, group, n, D]; k, v: [H, L, D], whose key 0 is at position `first`."""
        heads, group, n, _ = q.shape
        if self.fused and n == 1:  # one query sees all keys given: a KV head's group takes the place of the queries
            q, out, k, v = (x.unsqueeze(0) for x in (q.squeeze(2), out.squeeze(2), k, v))
            out.copy_(F.scaled_dot_product_attention(q, k, v, scale=self.scale))
            return
        sees_all = self.window is None or context + n <= self.window
        if self.fused and sees_all and self.prompts is not None:
            shape = (1, heads * group, n, -1)
            if self.prompts.attend(q.view(shape), k.unsqueeze(0), v.unsqueeze(0), out.view(shape), self.scale):
                return
        if self.fused and sees_all and context == 0:
            expanded = (heads, group, *k.shape[1:])
            k, v = k.unsqueeze(1).expand(expanded), v.unsqueeze(1).expand(expanded)
            out.copy_(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale))
            return
        per_query = k.shape[1] * (1 if self.fused else heads * group)
        step = max(1, SCORE_ELEMENTS // per_query)
        if self.window is not None:
            step = min(step, max(self.window, WINDOW_QUERIES))  # longer chunks mostly compute what the mask hides
        for start in range(0, n, step):
            stop = min(start + step, n)
            low = 0 if self.window is None else max(first, context + start - self.window + 1) - first
            high = context + stop - first
            mask = self._mask(context + start, context + stop, first + low, first + high, q.device)
            piece = self._scores_to_values(q[:, :, start:stop], k[:, low:high], v[:, low:high], mask)
            out[:, :, start:stop] = piece

    def _mask(self, start: int, stop: int, low: int, high: int, device: torch.device) -> torch.Tensor | None:
        """bool [queries at positions start..stop, keys at positions low..high]: who sees whom; None: all see all."""
        if stop - start == 1:
            return None  # the caller has narrowed the keys to what one query sees
        positions = torch.arange(start, stop, device=device).unsqueeze(1)
        keys = torch.arange(low, high, device=device)
        mask = keys <= positions
        return mask if self.window is None else mask & (keys > positions - self.window)

    def _scores_to_values(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """q [H, group, n, D]; k, v [H, L, D]; mask [n, L] -> [H, group, n, D]"""
        heads, group, n, size = q.shape
        if self.fused:
            expanded = (heads, group, k.shape[1], size)
            k, v = k.unsqueeze(1).expand(expanded), v.unsqueeze(1).expand(expanded)
            return masked_attention(q, k, v, mask, self.scale)
        scores = torch.bmm(q.reshape(heads, group * n, size), k.mT).view(heads, group, n, -1)
        weights = self._softmax(scores, mask)
        return torch.bmm(weights.view(heads, group * n, -1), v).view(heads, group, n, size)

    def _softmax(self, scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Raw products (overwritten), mask broadcastable to them -> weights in the working dtype, through float32."""
        scores = scores.to(torch.float32).mul_(self.scale)
        if self.softcap is not None:
            scores = scores.div_(self.softcap).tanh_().mul_(self.softcap)
        if mask is not None:
            scores = scores.masked_fill_(~mask, float("-inf"))
        return torch.softmax(scores, dim=-1).to(self.dtype)

    def decode(self, q: torch.Tensor, out: torch.Tensor) -> None:
        """All one-token sequences together, keys padded to the longest of a chunk. q, out: [T, KV heads, group, D]."""
        token_bytes = self.keys.shape[2] * self.keys.shape[3] * self.dtype.itemsize
        for chunk in self.inputs.decode_chunks(self.window, GATHER_BYTES // token_bytes):
            chosen = q.index_select(0, chunk.rows)
            result = torch.empty_like(chosen)
            step = self._heads_at_a_time(chunk.slots.numel())
            for head in range(0, q.shape[1], step):
                heads = slice(head, head + step)
                k = self._gather(self.keys, chunk.slots, heads)
                v = self._gather(self.values, chunk.slots, heads)
                mask = chunk.mask[:, None, None]
                if self.fused:
                    piece = masked_attention(chosen[:, heads], k, v, mask, self.scale)
                else:
                    piece = torch.matmul(self._softmax(torch.matmul(chosen[:, heads], k.mT), mask), v)
                result[:, heads] = piece
            out.index_copy_(0, chunk.rows, result)
