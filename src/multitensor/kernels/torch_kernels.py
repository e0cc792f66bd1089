"""`Kernels`: what a model may ask of a device, in plain torch. Faster sets override it; kernels/dispatch.py chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Literal

import torch

from multitensor.kernels import reference
from multitensor.kernels.attention import HeadGroups
from multitensor.kernels.attention_inputs import AttentionInputs
from multitensor.kernels.cache_tensor import CacheTensor
from multitensor.kernels.projection import Projection
from multitensor.kernels.prompt_attention import PromptAttention
from multitensor.kernels.quant_tensor import QuantTensor
from multitensor.kernels.rows import Rows
from multitensor.kernels.token_rows import TokenChooser


class Kernels:
    """Plain torch on any device: the base of every faster set, which overrides what it does better.

    T: tokens of the step. Results are in x's dtype. A method may overwrite only what it says it does.
    """

    name = "torch"
    prompt_attention: PromptAttention | None = None
    rounds_prompts = False  # whether activations of long prompts are rounded to 8 bits

    def __init__(self, device: torch.device, exact: bool) -> None:
        self.device = device
        self.exact = exact
        self._head_groups: dict[tuple[tuple[int, ...], int], HeadGroups] = {}

    def try_out(self, experimental: frozenset[str]) -> None:
        """Takes up ways that are asked for by name (EngineConfig.experimental), where it has them."""

    def adopt(self, weights: Mapping[str, QuantTensor | torch.Tensor]) -> dict[str, QuantTensor | torch.Tensor]:
        """Some of a rank's weights, just loaded, in the layout that these kernels want: once each, before the model is
        built."""
        return dict(weights)

    def join(self, weights: MutableMapping[str, QuantTensor | torch.Tensor], groups: Iterable[Sequence[str]]) -> None:
        """May put the weights of each group, which will be multiplied by the same activations, next to each other."""

    def token_chooser(self, columns: int) -> TokenChooser | None:
        """What samples rows of so many logits on the device; None: plain torch does."""
        return None

    def logits(self, hidden: torch.Tensor, w: QuantTensor) -> torch.Tensor:
        """hidden [S, w.cols] -> float32 [S, w.rows]. Sums of bfloat16 products are kept in float32: rounded to
        bfloat16 they would be worth no more than three digits, and close candidates would change places."""
        plane = w.planes.get("weight")
        if plane is not None and plane.is_cuda and plane.dtype == hidden.dtype != torch.float32:
            if "dtype" in torch.ops.aten.mm.overloads():  # since torch 2.8
                return torch.mm(hidden, plane.T, out_dtype=torch.float32)
            return self.linear(hidden, w).float()
        return self.linear(hidden.float(), w)

    def linear(self, x: torch.Tensor, w: QuantTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, w.cols] -> [T, w.rows]; see reference.linear."""
        return reference.linear(x, w, bias)

    def linears(
        self,
        x: torch.Tensor,
        weights: Sequence[QuantTensor],
        biases: Sequence[torch.Tensor | None] | None = None,
    ) -> list[torch.Tensor]:
        """`linear` of one x with several weights of equal columns (query, key, value): one job where that is faster."""
        return [self.linear(x, w, bias) for w, bias in zip(weights, biases or [None] * len(weights), strict=True)]

    def gated_linear(
        self,
        x: torch.Tensor,
        gate: QuantTensor,
        up: QuantTensor,
        kind: Literal["silu", "gelu_tanh"],
        gate_bias: torch.Tensor | None = None,
        up_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """activation(linear(x, gate, gate_bias)) * linear(x, up, up_bias): [T, gate.rows]."""
        return self.gated_activation(self.linear(x, gate, gate_bias), self.linear(x, up, up_bias), kind)

    def embedding(self, ids: torch.Tensor, w: QuantTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Integer ids [T] -> rows [T, w.cols]; an id outside [0, w.rows) gives zeros (another rank holds it)."""
        return reference.embedding(ids, w, dtype)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
        """Over the last axis of x, any shape; weight [last axis], to which offset is added."""
        return reference.rms_norm(x, weight, eps, offset)

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        offset: float = 0.0,
        post_weight: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """residual += x, in place, or rms_norm(x, post_weight) where that is given; returns (rms_norm(residual),
        residual)."""
        return reference.add_rms_norm(x, residual, weight, eps, offset, post_weight)

    def apply_rope(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, style: Literal["interleaved", "half"]
    ) -> torch.Tensor:
        """x [T, H, D]; cos and sin float32 [T, R/2], R <= D. May rotate x in place and return it."""
        return reference.apply_rope(x, cos, sin, style)

    def apply_rope_pair(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        style: Literal["interleaved", "half"],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """apply_rope of queries and keys, which share their positions."""
        return self.apply_rope(q, cos, sin, style), self.apply_rope(k, cos, sin, style)

    def write_kv(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: CacheTensor,
        v_cache: CacheTensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """k, v [T, KV heads, D] into caches [blocks, block_size, KV heads, D] at int64 slots [T]."""
        reference.write_kv(k, v, k_cache, v_cache, slot_mapping)

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
        """x [T, hidden] -> queries [T, query heads, head_dim], normalised and rotated; keys, treated alike, and values
        go to the caches. cos, sin: float32 [T, R / 2]; caches and slots as in `write_kv`."""
        tokens, size = x.shape[0], projection.head_dim
        products = self.linears(x, projection.weights, projection.biases)
        q, k, v = (y.view(tokens, y.shape[1] // size, size) for y in products)
        return self.place_heads(q, k, v, projection, cos, sin, k_cache, v_cache, slot_mapping)

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
        """What `project` does with its products q [T, query heads, head_dim] and k, v [T, KV heads, head_dim], which
        may be overwritten."""
        if projection.q_norm is not None and projection.k_norm is not None:
            q = self.rms_norm(q, projection.q_norm, projection.eps)
            k = self.rms_norm(k, projection.k_norm, projection.eps)
        q, k = self.apply_rope_pair(q, k, cos, sin, projection.style)
        self.write_kv(k, v, k_cache, v_cache, slot_mapping)
        return q

    # The same for rows that come in parts (rows.py): each is waited for just before it is multiplied, and given on as
    # soon as it is done. What has to be done to a weight first, other sets of kernels do once for all parts.

    def linear_in_parts(
        self, x: torch.Tensor, sizes: Sequence[int], w: QuantTensor, bias: torch.Tensor | None = None
    ) -> Iterator[torch.Tensor]:
        """`linear` of x [T, w.cols], so many rows at a time: [size, w.rows] each, queued when it is asked for."""
        for rows in x.split(list(sizes)):
            yield self.linear(rows, w, bias)

    def gated_linear_of_parts(
        self,
        parts: Sequence[Rows],
        gate: QuantTensor,
        up: QuantTensor,
        kind: Literal["silu", "gelu_tanh"],
        gate_bias: torch.Tensor | None = None,
        up_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`gated_linear` of all parts: [T, gate.rows]."""
        return torch.cat([self.gated_linear(part.wait(), gate, up, kind, gate_bias, up_bias) for part in parts])

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
        """`project` of all parts, T rows together: the queries of all."""
        queries, first = [], 0
        for part in parts:
            rows = slice(first, first + part.shape[0])
            first = rows.stop
            q = self.project(part.wait(), projection, cos[rows], sin[rows], k_cache, v_cache, slot_mapping[rows])
            queries.append(q)
        return torch.cat(queries)

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
        """q [T, query heads, D], after write_kv of the step's own keys -> [T, query heads, D]."""
        key = (tuple(kv_map), k_cache.shape[2])
        groups = self._head_groups.get(key)
        if groups is None:
            groups = self._head_groups[key] = HeadGroups(*key, q.device)
        prompts, singles = self.prompt_attention, None
        if inputs.has_decodes:
            singles = self.single_tokens(q, k_cache, v_cache, inputs, kv_map, scale, window, softcap)
        return reference.paged_attention(q, k_cache, v_cache, inputs, groups, scale, window, softcap, prompts, singles)

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
        """A way of its own for the sequences of one query token, for `paged_attention`; None: it has none."""
        return None

    def gated_activation(
        self, gate: torch.Tensor, up: torch.Tensor, kind: Literal["silu", "gelu_tanh"]
    ) -> torch.Tensor:
        """activation(gate) * up, elementwise."""
        return reference.gated_activation(gate, up, kind)
