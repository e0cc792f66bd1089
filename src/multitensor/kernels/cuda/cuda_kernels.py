"""The kernels of an NVIDIA GPU: CUDA C++ for quantised weights and few tokens, torch's own for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Literal

import torch

from multitensor.config import INT8_PROMPTS
from multitensor.kernels.attention_inputs import AttentionInputs
from multitensor.kernels.cache_tensor import CacheTensor
from multitensor.kernels.cuda.choose import CudaTokenChooser
from multitensor.kernels.cuda.decode import DecodeKernels
from multitensor.kernels.cuda.float_matrix import FloatKernels
from multitensor.kernels.cuda.int8 import Int8Products, is_int8_possible
from multitensor.kernels.cuda.joined import join_planes, join_tiles, joined_plane
from multitensor.kernels.cuda.matrix import MAX_TOKENS, TileKernels
from multitensor.kernels.cuda.prefill import PrefillKernels
from multitensor.kernels.cuda.single_tokens import SingleTokens
from multitensor.kernels.cuda.small_batch import MAX_TOKENS as SMALL_BATCH_TOKENS
from multitensor.kernels.cuda.small_batch import SmallBatchKernels
from multitensor.kernels.cuda.tiles import TILE_BYTES, TiledTensor, to_tiles
from multitensor.kernels.projection import Projection
from multitensor.kernels.prompt_attention import PromptAttention
from multitensor.kernels.quant_tensor import QuantTensor
from multitensor.kernels.rows import Here, Rows
from multitensor.kernels.token_rows import TokenChooser
from multitensor.kernels.torch_kernels import Kernels

FEW_TOKENS = 32  # up to here the matrix-vector kernels, four tokens at a time, beat expansion, where it is they or it
MOST_FEW_TOKENS = max(FEW_TOKENS, SMALL_BATCH_TOKENS)  # beyond, nothing reads tiles as they lie
EXPAND_BYTES = 256 << 20  # scratch for a matrix's numbers in the activations' type, where many tokens are multiplied


class CudaKernels(Kernels):
    """Quantised matrices lie in tiles (tiles.py), with not a bit of a weight changed."""

    name = "cuda"
    int8_products: Int8Products | None = None

    def __init__(self, device: torch.device, exact: bool) -> None:
        super().__init__(device, exact)
        self.tile_kernels = TileKernels(device)
        self.small_batch_kernels = SmallBatchKernels(device)
        self.float_kernels = FloatKernels(device)
        self.decode_kernels = DecodeKernels(device)
        self.prefill_kernels = PrefillKernels(device)
        self.prompt_attention = PromptAttention(device)
        self.singles = SingleTokens(self.decode_kernels)

    def try_out(self, experimental: frozenset[str]) -> None:
        if INT8_PROMPTS in experimental and is_int8_possible(self.device):
            self.int8_products = Int8Products(self.device, EXPAND_BYTES)
            self.rounds_prompts = True

    def token_chooser(self, columns: int) -> TokenChooser | None:
        try:
            return CudaTokenChooser(columns, self.device)
        except ValueError:  # the GPU is too small for rows of so many
            return None

    def adopt(self, weights: Mapping[str, QuantTensor | torch.Tensor]) -> dict[str, QuantTensor | torch.Tensor]:
        """Packs every quantised matrix into tiles, one at a time, dropping its planes; `weights` is emptied."""
        remaining = dict(weights)
        if isinstance(weights, dict):
            weights.clear()
        adopted: dict[str, QuantTensor | torch.Tensor] = {}
        while remaining:
            name = next(iter(remaining))
            weight = remaining.pop(name)
            if isinstance(weight, QuantTensor) and weight.type.name in TILE_BYTES and weight.rows and weight.cols:
                weight = to_tiles(weight, self._expander)
            adopted[name] = weight
        return adopted

    def join(self, weights: MutableMapping[str, QuantTensor | torch.Tensor], groups: Iterable[Sequence[str]]) -> None:
        groups = list(groups)
        join_planes(weights, groups)
        join_tiles(weights, groups)

    def _expander(self, w: TiledTensor, rows: slice | torch.Tensor | None) -> torch.Tensor:
        if isinstance(rows, torch.Tensor):
            return self.tile_kernels.gather(w, rows, torch.float32)
        start, stop, step = (rows or slice(None)).indices(w.rows)
        first = start // 16 * 16
        numbers = self.tile_kernels.expand(w, torch.float32, first, max(stop - first, 0))
        return numbers[start - first :: step]

    def embedding(self, ids: torch.Tensor, w: QuantTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        if not isinstance(w, TiledTensor) or w.phase or dtype != torch.float32 or not len(ids):
            return super().embedding(ids, w, dtype)
        # To that kernel an id below 0 is a token that only the device knows; here it is another rank's, as those above.
        places = torch.where(ids < 0, w.rows, ids).to(torch.int32)
        return self.tile_kernels.embed(w, places, places, ids, first=0, scale=1.0)

    def linear(self, x: torch.Tensor, w: QuantTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self._linear(x, w, bias, float_out=False)

    def partial_linear(self, x: torch.Tensor, w: QuantTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`linear` in float32: a rank's part of a sum over ranks, not rounded before it is added."""
        return self._linear(x, w, bias, float_out=True)

    def joined_linear(
        self, x: torch.Tensor, weights: Sequence[QuantTensor], biases: Sequence[torch.Tensor | None] | None
    ) -> torch.Tensor:
        """`linear` with several weights, their outputs side by side in one tensor."""
        tiled = self._few(weights, x)
        if tiled is not None:
            return self._multiply(x, tiled, joined_biases(biases, weights))
        y = self._joined_product(x, weights, biases)
        if y is not None:
            return y
        every = biases or [None] * len(weights)
        return torch.cat([self.linear(x, w, bias) for w, bias in zip(weights, every, strict=True)], dim=1)

    def _linear(self, x: torch.Tensor, w: QuantTensor, bias: torch.Tensor | None, *, float_out: bool) -> torch.Tensor:
        few = self._few((w,), x)
        if few is not None:
            return self._multiply(x, few, bias, float_out=float_out)
        tiled, plane = self._tiled((w,), x), w.planes.get("weight")
        if plane is not None and self._few_floats(x, plane):
            y = self.float_kernels.multiply(x, plane, float_out=float_out)
            return y if bias is None else y.add_(bias.to(y.dtype))
        y = super().linear(x, w, bias) if tiled is None else self._expanded_linear(x, tiled[0], bias)
        return y.float() if float_out else y

    def linears(
        self,
        x: torch.Tensor,
        weights: Sequence[QuantTensor],
        biases: Sequence[torch.Tensor | None] | None = None,
    ) -> list[torch.Tensor]:
        tiled = self._few(weights, x)
        if tiled is None:
            joined = self._joined_product(x, weights, biases)
            if joined is not None:
                return list(joined.split([w.rows for w in weights], dim=1))
            return super().linears(x, weights, biases)
        y = self._multiply(x, tiled, joined_biases(biases, weights))
        return list(y.split([w.rows for w in weights], dim=1))

    def gated_linear(
        self,
        x: torch.Tensor,
        gate: QuantTensor,
        up: QuantTensor,
        kind: Literal["silu", "gelu_tanh"],
        gate_bias: torch.Tensor | None = None,
        up_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        tiled = self._few((gate, up), x)
        if tiled is None:
            joined = self._joined_product(x, (gate, up), (gate_bias, up_bias))
            if joined is not None:
                gate_part, up_part = joined.split_with_sizes((gate.rows, up.rows), 1)
                return self.gated_activation(gate_part, up_part, kind)
            return super().gated_linear(x, gate, up, kind, gate_bias, up_bias)
        return self._multiply(x, tiled, joined_biases((gate_bias, up_bias), (gate, up)), gated=kind)

    def project(
        self,
        x: torch.Tensor,
        projection: Projection,
        cos: torch.Tensor,
        sin: torch.Tensor,
        k_cache: CacheTensor,
        v_cache: CacheTensor,
        slot_mapping: torch.Tensor,
    ) -> torch.Tensor:
        if not self.prefill_kernels.project_takes(x.shape[0], x.dtype, projection, cos, k_cache, v_cache):
            return super().project(x, projection, cos, sin, k_cache, v_cache, slot_mapping)
        qkv = self.joined_linear(x, projection.weights, projection.biases)
        return self.prefill_kernels.rope_write_kv(qkv, projection, cos, sin, k_cache, v_cache, slot_mapping)

    def single_tokens(
        self,
        q: torch.Tensor,
        k_cache: CacheTensor,
        v_cache: CacheTensor,
        inputs: AttentionInputs,
        kv_map: Sequence[int],
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Callable[[torch.Tensor], None] | None:
        if not self.singles.takes(q, k_cache, v_cache):
            return None
        attend = partial(self.singles.attend, q, k_cache, v_cache, inputs, kv_map)
        return partial(attend, scale=scale, window=window, softcap=softcap)

    def linear_in_parts(
        self, x: torch.Tensor, sizes: Sequence[int], w: QuantTensor, bias: torch.Tensor | None = None
    ) -> Iterator[torch.Tensor]:
        parts = [Here(rows) for rows in x.split(list(sizes))]
        if not self._expands(parts, (w,)):
            yield from super().linear_in_parts(x, sizes, w, bias)
            return
        out = x.new_empty((x.shape[0], w.rows))
        yield from _multiply_parts(parts, self._numbers((w,), x.dtype), out, bias)

    def gated_linear_of_parts(
        self,
        parts: Sequence[Rows],
        gate: QuantTensor,
        up: QuantTensor,
        kind: Literal["silu", "gelu_tanh"],
        gate_bias: torch.Tensor | None = None,
        up_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not self._expands(parts, (gate, up)):
            return super().gated_linear_of_parts(parts, gate, up, kind, gate_bias, up_bias)
        both = self._product_of_parts(parts, (gate, up), (gate_bias, up_bias))
        return self.gated_activation(both[:, : gate.rows], both[:, gate.rows :], kind)

    def project_parts(
        self,
        parts: Sequence[Rows],
        projection: Projection,
        cos: torch.Tensor,
        sin: torch.Tensor,
        k_cache: CacheTensor,
        v_cache: CacheTensor,
        slot_mapping: torch.Tensor,
    ) -> torch.Tensor:
        tokens, dtype = len(slot_mapping), parts[0].dtype
        takes = self.prefill_kernels.project_takes(tokens, dtype, projection, cos, k_cache, v_cache)
        if not takes or not self._expands(parts, projection.weights):
            return super().project_parts(parts, projection, cos, sin, k_cache, v_cache, slot_mapping)
        qkv = self._product_of_parts(parts, projection.weights, projection.biases)
        return self.prefill_kernels.rope_write_kv(qkv, projection, cos, sin, k_cache, v_cache, slot_mapping)

    def _expands(self, parts: Sequence[Rows], weights: Sequence[QuantTensor]) -> bool:
        """Whether cuBLAS is to multiply all parts by these weights, as numbers in the activations' type."""
        if any(self._few(weights, part) is not None for part in parts):
            return False
        planes = [w.planes.get("weight") for w in weights]
        plain = all(plane is not None and plane.dtype == parts[0].dtype for plane in planes)
        return plain or all(self._tiled(weights, part) is not None for part in parts)

    def _product_of_parts(
        self, parts: Sequence[Rows], weights: Sequence[QuantTensor], biases: Sequence[torch.Tensor | None] | None
    ) -> torch.Tensor:
        """What `_expands` found: all parts times all weights, side by side [T, all rows]."""
        shape = (sum(part.shape[0] for part in parts), sum(w.rows for w in weights))
        out = torch.empty(shape, dtype=parts[0].dtype, device=self.device)
        numbers = self._numbers(weights, parts[0].dtype)
        for _ in _multiply_parts(parts, numbers, out, joined_biases(biases, weights)):
            pass
        return out

    def _numbers(self, weights: Sequence[QuantTensor], dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, numbers of some rows from there), the weights one behind the other: all at once where they fit
        the scratch together, or lie so already."""
        tiled = [w for w in weights if isinstance(w, TiledTensor)]
        plane = joined_plane(weights)
        if plane is not None:
            yield 0, plane
        elif not tiled:
            first = 0
            for w in weights:
                yield first, w.planes["weight"]
                first += w.rows
        elif self._fit_together(tiled, dtype):
            yield 0, self.tile_kernels.expand_joined(tiled, dtype)
        else:
            before = 0
            for w in tiled:
                for first, part in self._parts(w, dtype):
                    yield before + first, part
                    del part  # or it would still be there while the next is made
                before += w.rows

    def gated_activation(
        self, gate: torch.Tensor, up: torch.Tensor, kind: Literal["silu", "gelu_tanh"]
    ) -> torch.Tensor:
        if not self.prefill_kernels.gate_takes(gate, up):
            return super().gated_activation(gate, up, kind)
        return self.prefill_kernels.gated_activation(gate, up, kind)

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        offset: float = 0.0,
        post_weight: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        norm = self.decode_kernels
        if not norm.norm_takes(residual, x, weight, post_weight):
            return super().add_rms_norm(x, residual, weight, eps, offset, post_weight)
        normed = torch.empty_like(x)
        # x may be a sum that another stream made (Group.start_reduce_add_norm).
        norm.add_rms_norm(residual, x, weight, eps, normed, post_weight=post_weight, offset=offset, early=False)
        return normed, residual

    def logits(self, hidden: torch.Tensor, w: QuantTensor) -> torch.Tensor:
        tiled = self._tiled((w,), hidden)
        plane = w.planes.get("weight")
        if plane is not None and self._few_floats(hidden, plane):
            return self.float_kernels.multiply(hidden, plane, float_out=True)
        if tiled is None:
            return super().logits(hidden, w)
        if self._few(tiled, hidden) is not None:
            return self.partial_linear(hidden, w)
        return torch.cat([self._float_product(hidden, part) for _, part in self._parts(tiled[0], hidden.dtype)], dim=1)

    def _joined_product(
        self, x: torch.Tensor, weights: Sequence[QuantTensor], biases: Sequence[torch.Tensor | None] | None
    ) -> torch.Tensor | None:
        """x [T, cols] times float weights that lie one behind the other, or tiled ones that fit the scratch together
        -> [T, all rows]; None for others."""
        if self.int8_products is not None:
            y = self._int8_product(self.int8_products, x, weights, biases)
            if y is not None:
                return y
        tiled = self._tiled(weights, x)
        if tiled is not None and self._fit_together(tiled, x.dtype):
            return _product(x, self.tile_kernels.expand_joined(tiled, x.dtype), joined_biases(biases, weights))
        plane = joined_plane(weights)
        if plane is None or plane.dtype != x.dtype:
            return None
        few = self._few_floats(x, plane)
        y = self.float_kernels.multiply(x, plane) if few else torch.mm(x, plane.T)
        bias = joined_biases(biases, weights)
        return y if bias is None else y.add_(bias.to(y.dtype))

    def _int8_product(
        self,
        int8: Int8Products,
        x: torch.Tensor,
        weights: Sequence[QuantTensor],
        biases: Sequence[torch.Tensor | None] | None,
    ) -> torch.Tensor | None:
        """The same with all of them rounded to 8 bits, where these are many tokens."""
        rows = [w.rows for w in weights]
        if not int8.takes(x, rows) or not self._expands((Here(x),), weights):
            return None
        few = int8.rows_at_a_time(*x.shape)
        return int8.multiply(x, self._few_rows(weights, x.dtype, few), joined_biases(biases, weights), sum(rows))

    def _few_rows(self, weights: Sequence[QuantTensor], dtype: torch.dtype, few: int) -> Iterator[torch.Tensor]:
        """The weights' numbers, one behind the other, so many rows at a time."""
        for w in weights:
            for first in range(0, w.rows, few):
                if isinstance(w, TiledTensor):
                    yield self.tile_kernels.expand(w, dtype, first, few)
                else:
                    yield w.planes["weight"][first : first + few]

    @staticmethod
    def _float_product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        if "dtype" in torch.ops.aten.mm.overloads():  # since torch 2.8
            return torch.mm(x, w.T, out_dtype=torch.float32)
        return torch.mm(x, w.T).float()

    @staticmethod
    def _fit_together(weights: Sequence[TiledTensor], dtype: torch.dtype) -> bool:
        """Whether the weights' numbers fit the scratch at once, as one matrix."""
        columns, rows = weights[0].cols, 0
        for w in weights:
            rows += w.rows
            if w.cols != columns:
                return False
        return rows * columns * dtype.itemsize <= EXPAND_BYTES

    def _tiled(self, weights: Sequence[QuantTensor], x: torch.Tensor | Rows) -> list[TiledTensor] | None:
        """The weights, where all are tiled and x is a type that the kernels take."""
        if x.dtype not in (torch.float16, torch.bfloat16) or not x.shape[0]:
            return None
        found = [w for w in weights if isinstance(w, TiledTensor)]
        return found if len(found) == len(weights) else None

    def _few_floats(self, x: torch.Tensor, plane: torch.Tensor) -> bool:
        """Whether our kernel takes float weights as they lie, and beats cuBLAS at it."""
        return self.float_kernels.takes(x, plane) and self.float_kernels.pays(x, plane)

    def _few(self, weights: Sequence[QuantTensor], x: torch.Tensor | Rows) -> list[TiledTensor] | None:
        """The weights, where kernels that read them as they lie are the best there is for x."""
        tokens = x.shape[0]
        tiled = self._tiled(weights, x) if tokens <= MOST_FEW_TOKENS else None
        if tiled is None:
            return None
        by_fours = tokens <= FEW_TOKENS and self.tile_kernels.takes(tiled, min(tokens, MAX_TOKENS))
        return tiled if by_fours or self.small_batch_kernels.takes(tiled, tokens) else None

    def _multiply(
        self,
        x: torch.Tensor,
        weights: Sequence[TiledTensor],
        bias: torch.Tensor | None = None,
        *,
        float_out: bool = False,
        gated: Literal["silu", "gelu_tanh"] | None = None,
    ) -> torch.Tensor:
        """What _few found: one launch for up to four tokens, one for up to 64, or four tokens a launch."""
        single = x.shape[0] <= MAX_TOKENS and self.tile_kernels.takes(weights, x.shape[0])
        if not single and self.small_batch_kernels.takes(weights, x.shape[0]):
            return self.small_batch_kernels.multiply(x, weights, bias, float_out=float_out, gated=gated)
        products = [
            self.tile_kernels.multiply(part, weights, bias, float_out=float_out, gated=gated)
            for part in x.split(MAX_TOKENS)
        ]
        return products[0] if len(products) == 1 else torch.cat(products)

    def _parts(self, w: TiledTensor, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, numbers of some rows from there), one after another, never all at once."""
        rows = max(16, EXPAND_BYTES // (2 * w.cols) // 16 * 16)
        for first in range(0, w.rows, rows):
            yield first, self.tile_kernels.expand(w, dtype, first, rows)

    def _expanded_linear(self, x: torch.Tensor, w: TiledTensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Many tokens: the weights as numbers in x's type, some rows at a time, and cuBLAS, each part to its place."""
        if self._fit_together((w,), x.dtype):
            return _product(x, self.tile_kernels.expand(w, x.dtype), bias)
        y: torch.Tensor | None = None
        for first, numbers in self._parts(w, x.dtype):
            y = x.new_empty((x.shape[0], w.rows)) if y is None else y
            torch.mm(x, numbers.T, out=y[:, first : first + len(numbers)])
        if y is None:
            raise ValueError("a tiled matrix without rows")
        return y if bias is None else y.add_(bias.to(y.dtype))


def _product(x: torch.Tensor, numbers: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [T, K] times numbers [N, K], plus bias [N] of any float type: [T, N]."""
    return torch.mm(x, numbers.T) if bias is None else torch.addmm(bias.to(x.dtype), x, numbers.T)


def _multiply_parts(
    parts: Sequence[Rows],
    numbers: Iterator[tuple[int, torch.Tensor]],
    out: torch.Tensor,
    bias: torch.Tensor | None,
) -> Iterator[torch.Tensor]:
    """Queues the parts, T rows [n, K] together, times numbers [all N, K], plus bias [N], into out [T, N]; gives each
    part's rows of out once their last product is queued. numbers: (first, [some, K]) in order. All parts are multiplied
    by numbers that are there once, the first part being waited for only when they are on their way."""
    for first, some in numbers:
        last = first + len(some)
        own = None if bias is None else bias[first:last].to(out.dtype)
        rows = out.split([part.shape[0] for part in parts])
        for part, place in zip(parts, rows, strict=True):
            columns = place[:, first:last]
            if own is None:
                torch.mm(part.wait(), some.T, out=columns)
            else:
                torch.addmm(own, part.wait(), some.T, out=columns)
            if last == out.shape[1]:
                yield place
        del some  # or it would still be there while the next is made


def joined_biases(biases: Sequence[torch.Tensor | None] | None, weights: Sequence[QuantTensor]) -> torch.Tensor | None:
    """One float32 vector over all rows, zeros where a weight has no bias; None where none has."""
    if biases is None or all(bias is None for bias in biases):
        return None
    parts = [
        torch.zeros(w.rows, device=w.device) if bias is None else bias.float()
        for bias, w in zip(biases, weights, strict=True)
    ]
    return torch.cat(parts)
