"""Prints the most bytes that attention of one prompt's last chunk holds beside the cache and its own input and output.

    attention_peak.py KV_TYPE HEAD_DIM CONTEXT

A process of its own, because it is the process's resident memory that is read; small blocks of malloc stay out of it
(MALLOC_MMAP_THRESHOLD_).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from multitensor.kernels.attention import paged_attention
from multitensor.kernels.attention_inputs import AttentionInputs
from multitensor.kernels.cache_tensor import QuantCache, make_cache

QUERIES, BLOCK, KV_HEADS = 160, 32, 2


def resident(line: str) -> int:
    """Bytes, of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(each for each in lines if each.startswith(line)).split()[1])


def main(kv_type: str, head_dim: int, context: int) -> int:
    torch.set_num_threads(1)
    blocks, device = context // BLOCK, torch.device("cpu")
    caches = [make_cache(kv_type, (blocks, BLOCK, KV_HEADS, head_dim), device) for _ in "kv"]
    for cache in caches:
        for numbers in (cache.codes, cache.scales) if isinstance(cache, QuantCache) else (cache,):
            numbers.fill_(1)  # or they would take no memory yet
    inputs = AttentionInputs.build([QUERIES], [context - QUERIES], np.arange(blocks)[None], BLOCK, device)
    q = torch.randn(QUERIES, 2 * KV_HEADS, head_dim)
    before = resident("VmRSS")
    with torch.inference_mode():
        paged_attention(q, caches[0], caches[1], inputs, (0, 0, 1, 1), 1.0)
    return resident("VmHWM") - before


if __name__ == "__main__":
    print(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
