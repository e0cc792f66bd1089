"""`Kernels` on a GPU of AMD or Intel: Triton where it was tried and found right and faster, else plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from multitensor.kernels.attention_inputs import AttentionInputs
from multitensor.kernels.cache_tensor import CacheTensor
from multitensor.kernels.projection import Projection
from multitensor.kernels.quant_tensor import QuantTensor
from multitensor.kernels.reference import GPU_CHUNK_BYTES
from multitensor.kernels.torch_kernels import Kernels
from multitensor.kernels.triton import attention, norm, products, rotary
from multitensor.kernels.triton.trials import PLAIN, Trials


class TritonKernels(Kernels):
    """Weights stay in the planes that the loader makes. trials: what decides between Triton and plain torch."""

    name = "triton"

    def __init__(self, device: torch.device, exact: bool, trials: Trials | None = None) -> None:
        super().__init__(device, exact)
        self.trials = trials or Trials(device)
        self._tables: dict[tuple[tuple[int, ...], int], attention.HeadTable] = {}
        self._step: tuple[AttentionInputs, attention.Decodes | None] | None = None

    def linear(self, x: torch.Tensor, w: QuantTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if not products.takes(x, w):
            return super().linear(x, w, bias)
        tokens = x.shape[0]
        family = "products of few tokens" if tokens <= products.MAX_TOKENS else "expansion of weights"
        ways = {"expanded": lambda: [_expanded_linear(x, w, bias)]}
        if tokens <= products.MAX_TOKENS:
            ways["packed"] = lambda: [products.multiply(x, w, bias)]
        plain = super().linear
        key = (w.type.name, w.rows, w.cols, w.phase, x.dtype, bias is None, _bucket(tokens))
        way = self.trials.best(family, key, lambda: [plain(x, w, bias)], ways)
        return plain(x, w, bias) if way == PLAIN else ways[way]()[0]

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
        plain = super().rms_norm
        if norm.takes(x, weight):
            key = (x.dtype, x.shape[-1], _bucket(x.numel() // x.shape[-1]))
            ours = {"triton": lambda: [norm.rms_norm(x, weight, eps, offset)]}
            if self.trials.best("norms", key, lambda: [plain(x, weight, eps, offset)], ours) != PLAIN:
                return norm.rms_norm(x, weight, eps, offset)
        return plain(x, weight, eps, offset)

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        offset: float = 0.0,
        post_weight: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        plain = super().add_rms_norm
        if norm.takes(x, weight, residual):
            key = ("add", x.dtype, x.shape[-1], post_weight is None, _bucket(x.shape[0]))
            rest = (weight, eps, offset, post_weight)
            ours = {"triton": lambda: norm.add_rms_norm(x, residual.clone(), *rest)}
            if self.trials.best("norms", key, lambda: plain(x, residual.clone(), *rest), ours) != PLAIN:
                return norm.add_rms_norm(x, residual, weight, eps, offset, post_weight)
        return plain(x, residual, weight, eps, offset, post_weight)

    def place_heads(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        projection: Projection,
        cos: torch.Tensor,
        sin: torch.Tensor,
        k_cache: CacheTensor,
        v_cache: CacheTensor,
        slot_mapping: torch.Tensor,
    ) -> torch.Tensor:
        plain = super().place_heads
        if not (isinstance(k_cache, torch.Tensor) and isinstance(v_cache, torch.Tensor)):
            return plain(q, k, v, projection, cos, sin, k_cache, v_cache, slot_mapping)
        if not rotary.takes(q, projection, cos, k_cache, v_cache):
            return plain(q, k, v, projection, cos, sin, k_cache, v_cache, slot_mapping)

        def run(way: object) -> list[torch.Tensor]:
            """Queries, and what lies in the step's slots afterwards."""
            place = plain if way == PLAIN else rotary.place_heads
            queries = place(q.clone(), k.clone(), v, projection, cos, sin, k_cache, v_cache, slot_mapping)
            return [queries, *(cache.flatten(0, 1)[slot_mapping] for cache in (k_cache, v_cache))]

        key = (q.dtype, k_cache.dtype, q.shape[1:], k.shape[1], projection.style, cos.shape[-1], _bucket(q.shape[0]))
        normed = projection.q_norm is not None
        way = self.trials.best("rotation", (*key, normed), lambda: run(PLAIN), {"triton": lambda: run("triton")})
        place = plain if way == PLAIN else rotary.place_heads
        return place(q, k, v, projection, cos, sin, k_cache, v_cache, slot_mapping)

    def paged_attention(
        self,
        q: torch.Tensor,
        k_cache: CacheTensor,
        v_cache: CacheTensor,
        inputs: AttentionInputs,
        kv_map: Sequence[int],
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Sequences with one new token by Triton, the others, if there are any, by plain torch."""
        plain = super().paged_attention
        if not attention.takes(q, k_cache, v_cache):
            return plain(q, k_cache, v_cache, inputs, kv_map, scale, window, softcap)
        decodes = self._decodes(inputs)
        if decodes is None:
            return plain(q, k_cache, v_cache, inputs, kv_map, scale, window, softcap)
        heads = self._head_table(kv_map, k_cache.shape[2])

        def by_torch() -> list[torch.Tensor]:
            every = plain(q, k_cache, v_cache, decodes.inputs, kv_map, scale, window, softcap)
            return [every.index_select(0, decodes.rows)]

        def by_triton() -> list[torch.Tensor]:
            assert isinstance(k_cache, torch.Tensor) and isinstance(v_cache, torch.Tensor)
            return [attention.attend(q, k_cache, v_cache, decodes, heads, scale, window, softcap)]

        sizes = (_bucket(len(decodes.rows)), _bucket(decodes.longest))
        key = (q.dtype, q.shape[1:], tuple(kv_map), window, softcap, sizes)
        way = self.trials.best("attention", key, by_torch, {"triton": by_triton})
        if way == PLAIN:
            return plain(q, k_cache, v_cache, inputs, kv_map, scale, window, softcap)
        mixed = by_triton()[0]
        if decodes.others is None and len(mixed) == len(q):
            return mixed
        if decodes.others is None:
            raise ValueError(f"{len(q)} query rows for {len(mixed)} sequences of one token each")
        out = plain(q, k_cache, v_cache, decodes.others, kv_map, scale, window, softcap)
        return out.index_copy_(0, decodes.rows, mixed)

    def _decodes(self, inputs: AttentionInputs) -> attention.Decodes | None:
        """Made at a step's first layer, shared by the others."""
        if self._step is None or self._step[0] is not inputs:
            self._step = (inputs, attention.Decodes.of(inputs))
        return self._step[1]

    def _head_table(self, kv_map: Sequence[int], n_kv_heads: int) -> attention.HeadTable:
        key = (tuple(kv_map), n_kv_heads)
        if key not in self._tables:
            self._tables[key] = attention.HeadTable(*key, self.device)
        return self._tables[key]


def _bucket(count: int) -> int:
    """The power of two at or above: what speed depends on, roughly."""
    return 1 << max(0, count - 1).bit_length()


def _expanded_linear(x: torch.Tensor, w: QuantTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The weights as numbers in x's type, some rows at a time, and the vendor's library, each part to its place."""
    rows = max(1, GPU_CHUNK_BYTES // (w.cols * x.element_size()))
    if rows >= w.rows:
        return F.linear(x, products.expand(w, x.dtype), None if bias is None else bias.to(x.dtype))
    y = torch.empty((x.shape[0], w.rows), dtype=x.dtype, device=x.device)
    for first in range(0, w.rows, rows):
        part = slice(first, min(first + rows, w.rows))
        torch.mm(x, products.expand(w, x.dtype, part).T, out=y[:, part])
    return y if bias is None else y.add_(bias.to(x.dtype))
