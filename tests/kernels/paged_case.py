"""A batch of sequences over a paged cache, and dense float64 attention to compare with."""

from __future__ import annotations

import numpy as np
import torch

from multitensor.kernels.attention import paged_attention, write_kv
from multitensor.kernels.attention_inputs import AttentionInputs
from multitensor.kernels.prompt_attention import PromptAttention


class Case:
    """Sequences with histories, their cache filled through write_kv step by step, the rest of the cache poisoned."""

    def __init__(
        self,
        query_lens: list[int],
        context_lens: list[int],
        kv_map: tuple[int, ...],
        n_kv_heads: int,
        head_dim: int = 16,
        block_size: int = 4,
        seed: int = 0,
        cache_dtype: torch.dtype = torch.float32,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        rng = np.random.default_rng(seed)
        self.kv_map, self.query_lens, self.context_lens = kv_map, query_lens, context_lens
        lengths = [q + c for q, c in zip(query_lens, context_lens, strict=True)]
        blocks = [-(-length // block_size) for length in lengths]
        physical = rng.permutation(sum(blocks) + 3)  # some blocks belong to nobody
        tables = np.full((len(lengths), max(blocks, default=0) + 1), physical[-1] if len(lengths) else 0)
        ends = np.cumsum(blocks)
        for s, (count, end) in enumerate(zip(blocks, ends, strict=True)):
            tables[s, :count] = physical[end - count : end]
        shape = (len(physical), block_size, n_kv_heads, head_dim)
        poison = float("nan")  # a key or value of somebody else must never be touched
        self.k_cache = torch.full(shape, poison, dtype=cache_dtype, device=device)
        self.v_cache = torch.full(shape, poison, dtype=cache_dtype, device=device)
        self.inputs = AttentionInputs.build(query_lens, context_lens, tables, block_size, torch.device(device))
        self.q = torch.randn(sum(query_lens), len(kv_map), head_dim, generator=generator).to(device, dtype)
        self.keys = [torch.randn(n, n_kv_heads, head_dim, generator=generator).to(cache_dtype) for n in lengths]
        self.values = [torch.randn(n, n_kv_heads, head_dim, generator=generator).to(cache_dtype) for n in lengths]
        past = AttentionInputs.build(context_lens, [0] * len(lengths), tables, block_size, torch.device(device))
        new = zip(context_lens, lengths, strict=True)
        for inputs, spans in ((past, [(0, c) for c in context_lens]), (self.inputs, list(new))):
            for cache, source in ((self.k_cache, self.keys), (self.v_cache, self.values)):
                pieces = [x[a:b] for x, (a, b) in zip(source, spans, strict=True)]
                written = torch.cat([*pieces, torch.zeros(0, n_kv_heads, head_dim)]).to(device)
                write_kv(written, written, cache, cache, inputs.slot_mapping)

    def dense(self, scale: float, window: int | None, softcap: float | None) -> np.ndarray:
        """float64, one query at a time, from the lists (never from the cache)."""
        out, row = np.zeros(self.q.shape), 0
        q = self.q.cpu().double().numpy()
        for s, length in enumerate(self.query_lens):
            keys, values = self.keys[s].double().numpy(), self.values[s].double().numpy()
            for i in range(length):
                position = self.context_lens[s] + i
                first = 0 if window is None else max(0, position - window + 1)
                for head, kv_head in enumerate(self.kv_map):
                    scores = keys[first : position + 1, kv_head] @ q[row, head] * scale
                    if softcap is not None:
                        scores = softcap * np.tanh(scores / softcap)
                    weights = np.exp(scores - scores.max())
                    out[row, head] = weights @ values[first : position + 1, kv_head] / weights.sum()
                row += 1
        return out

    def check(
        self,
        window: int | None = None,
        softcap: float | None = None,
        tolerance: float = 3e-6,
        prompts: PromptAttention | None = None,
    ) -> None:
        scale = 0.3
        caches = self.k_cache, self.v_cache
        got = paged_attention(self.q, *caches, self.inputs, self.kv_map, scale, window, softcap, prompts)
        assert got.dtype == self.q.dtype
        assert got.shape == self.q.shape
        np.testing.assert_allclose(got.cpu().double().numpy(), self.dense(scale, window, softcap), atol=tolerance)
