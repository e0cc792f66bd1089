"""The split model against the whole one, a layer at a time.

Two chains run over the same prompts. The *whole* one lives on rank 0 alone: its matrices stay on disk and pass through
the device a few rows at a time, in float32 and plain torch, so a model larger than the device can be checked. The
*split* one is the engine's own: resident weights and the real group.

Each layer of the split chain starts from the whole chain's hidden state, so that errors of the layers before do not
blur it, and runs twice: in exact float32, where nothing but a wrong weight or a wrong cut can make a difference, and as
the engine runs it, where roundings of the compute dtype (and of activations to 8 bits) are allowed for. What its cache
rounds is judged by itself: the keys and values in it against exact ones, and the layer against plain float32 that reads
the very same cache. Beside that the engine's chain runs on its own from end to end, which gives the divergence of the
logits. When a layer is out of
tolerance its weights are compared bit by bit, and the first tensor and rank that disagree are named; when they agree
but something is not finite, the first tensor that holds NaN or infinity is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from multitensor.config import EngineConfig
from multitensor.engine.verify_errors import (
    NOT_FINITE,
    cache_error,
    kl_divergence,
    layer_error,
    max_error,
    rms_error,
)
from multitensor.errors import InputError
from multitensor.kernels.attention_inputs import AttentionInputs
from multitensor.kernels.cache_tensor import CacheTensor, make_cache
from multitensor.kernels.dequantize import dequantize
from multitensor.kernels.dispatch import Kernels, make_kernels
from multitensor.kernels.quant_tensor import QuantTensor
from multitensor.loading.loader import load_tensors
from multitensor.loading.streamed import StreamingKernels, stream_weights, whole_rows
from multitensor.model.attention import KVCache, Step
from multitensor.model.decoder import Decoder, DecoderLayer
from multitensor.model.embedding import EMBEDDING, LMHead, lm_head_name
from multitensor.parallel.group import SingleGroup
from multitensor.sharding.plan import Plan, Ratios, Slice, TensorPlan, make_plan

if TYPE_CHECKING:
    from multitensor.engine.runner import ModelRunner

_FINITE_CHUNK = 1 << 24  # weights looked at together


# Of a layer in exact float32. Sums taken in another order give up to 2e-5 on the models below.
LAYER_TOLERANCE = 1e-4


# What a type of cache adds to the errors of the keys and values in it, and to the KL.
_CACHE_TOLERANCE = {
    "f32": (0.0, 0.0),
    "f16": (7e-4, 1e-3),
    "bf16": (5e-3, 1e-2),
    "q8": (1.2e-2, 5e-3),
    "q4": (1.5e-1, 2e-1),
}


@dataclass(frozen=True)
class Tolerance:
    """layer: of a layer as the engine runs it (see `verify_errors.layer_error`); cache: of the keys and values that it
    keeps (`cache_error`); kl: of the logits' mean divergence, in nats."""

    layer: float
    cache: float
    kl: float


def rounds_to_8_bits(runner: ModelRunner) -> bool:
    """Whether activations are rounded to 8 bits before they meet quantised weights: the native CPU kernels do, where
    exactness was not asked for; plain torch, which stands in where they are not built, does not; GPUs do it to prompts
    where asked to."""
    return not runner.config.exact and (runner.kernels.name == "native" or runner.kernels.rounds_prompts)


def tolerance(config: EngineConfig, plan: Plan, *, rounded: bool) -> Tolerance:
    """What rounding alone explains, times about three; a wrong tensor gives errors of about 1."""
    if rounded:
        base = Tolerance(layer=5e-1, cache=1e-1, kl=1.5e-2)
    elif config.dtype == "bfloat16":
        base = Tolerance(layer=1.5e-1, cache=1e-2, kl=3e-2)
    elif config.dtype == "float16":
        base = Tolerance(layer=3e-2, cache=1.5e-3, kl=1e-3)
    else:
        base = Tolerance(layer=LAYER_TOLERANCE, cache=1e-5, kl=1e-6)
    cache, kl = _CACHE_TOLERANCE[plan.kv_type]
    return Tolerance(base.layer, base.cache + cache, base.kl + kl)


def arithmetic(config: EngineConfig, plan: Plan, *, rounded: bool) -> str:
    """How the engine computes, in words for people."""
    how = ", rounded to 8 bits where weights are quantised" if rounded else ""
    return f"activations in {config.dtype}{how}, KV cache in {plan.kv_type}"


def verify(runner: ModelRunner, prompts: list[list[int]]) -> dict[str, Any]:
    """Collective: every rank calls it between steps, and every rank returns the same JSON-serialisable result:

    ok; layers: one {"layer", "error", "run_error", "cache_error", "max_error", "rms", "drift"} each: error (exact
    float32), run_error (as the engine runs, given the keys and values in its cache) and cache_error (of these) are
    judged; max_error and rms are the layer's difference from the whole model's, relative to its largest element and to
    its mean square; drift is max_error of the chain that ran on its own;
    embedding_error, lm_head_error: exact; kl_mean, kl_max: of whole || split over the positions; top1_agreement;
    whole_top1, split_top1: likeliest ids, a list a prompt; first_bad_tensor, first_bad_rank: what differs from the
    file, or None; not_finite_tensor, not_finite_rank: what holds NaN or infinity where the file does, or None;
    tolerance, run_tolerance, cache_tolerance, kl_tolerance; arithmetic: how the engine runs, in words.
    An error that is not finite is NOT_FINITE; kl_mean, kl_max and top1_agreement are None where logits are not finite.
    Raises InputError for prompts longer than the context.
    """
    with torch.inference_mode():
        return _Verification(runner, prompts).run()


class _WholeChain:
    """The whole model on one device, a layer at a time. residual, hidden: float32 [T, hidden] before the next layer."""

    def __init__(self, runner: ModelRunner, ids: torch.Tensor, inputs: AttentionInputs, context: int) -> None:
        plan = _whole_plan(runner.plan, context)
        device = runner.device
        kernels = StreamingKernels(device, runner.checkpoint)
        group = SingleGroup()
        group.kernels = kernels
        weights = stream_weights(runner.checkpoint, plan, device)
        self.decoder = Decoder(plan, 0, weights, kernels, group, torch.float32, device)
        self.step = self.decoder.begin(inputs)
        self.cache = _scratch_cache(inputs, plan, 0, "f32", device)
        self.residual = self.decoder.embedding(ids)
        self.hidden = self.decoder.first_norm(self.residual)

    def run_layer(self, index: int) -> None:
        self.hidden, self.residual = self.decoder.layers[index](self.hidden, self.residual, self.step, self.cache)


class _ReadingKernels(Kernels):
    """Plain torch in float32 that takes a layer's keys and values as they lie in the cache."""

    def write_kv(
        self, k: torch.Tensor, v: torch.Tensor, k_cache: CacheTensor, v_cache: CacheTensor, slot_mapping: torch.Tensor
    ) -> None:
        """Nothing: the engine's own kernels have filled it."""


class _Verification:
    def __init__(self, runner: ModelRunner, prompts: list[list[int]]) -> None:
        self.runner = runner
        self.plan, self.group, self.device = runner.plan, runner.group, runner.device
        self.prompts = prompts
        self.lengths = [len(prompt) for prompt in prompts]
        if not prompts or min(self.lengths) < 1 or max(self.lengths) > self.plan.context:
            raise InputError(f"verify: prompts of {self.lengths} tokens; each needs 1 to {self.plan.context}")
        self.tolerance = tolerance(runner.config, self.plan, rounded=rounds_to_8_bits(runner))
        self.ids = torch.tensor([token for prompt in prompts for token in prompt], device=self.device)
        self.inputs = _inputs(self.lengths, self.plan.block_size, self.device)
        self.split = runner.decoder
        self.cache = _scratch_cache(self.inputs, self.plan, runner.rank, self.plan.kv_type, self.device)
        self.exact_cache = _scratch_cache(self.inputs, self.plan, runner.rank, "f32", self.device)
        self.exact_kernels = make_kernels(self.device, exact=True)
        self.reading_kernels = _ReadingKernels(self.device, exact=True)
        self.whole = _WholeChain(runner, self.ids, self.inputs, max(self.lengths)) if runner.rank == 0 else None
        self.bad: tuple[str, int] | None = None
        self.not_finite: tuple[str, int] | None = None
        self.finite = True
        self.ok = True

    def run(self) -> dict[str, Any]:
        step = self.split.begin(self.inputs)
        whole_x = self._share(self.whole.residual if self.whole else None)
        own_x = self.split.embedding(self.ids)
        embedding_error = self._judge(layer_error(own_x, whole_x, torch.zeros_like(whole_x)), [EMBEDDING])
        own = (self.split.first_norm(own_x), own_x)
        layers = []
        exact_hidden = own[0]
        for index, layer in enumerate(self.split.layers):
            exact_hidden, exact = self._plain_layer(index, whole_x, step, self.exact_kernels, self.exact_cache)
            _, as_run = layer(self._normed(index, whole_x), whole_x.clone(), step, self.cache)
            _, expected = self._plain_layer(index, whole_x, step, self.reading_kernels, self.cache)
            kept = max(cache_error(found, exact) for found, exact in zip(self.cache, self.exact_cache, strict=True))
            own = layer(*own, step, self.cache)
            before = whole_x
            if self.whole:
                self.whole.run_layer(index)
            whole_x = self._share(self.whole.residual if self.whole else None)
            names = [t.name for t in self.plan.tensors.values() if t.decl.layer == index]
            layers.append(
                {
                    "layer": index,
                    "error": self._judge(layer_error(exact, whole_x, before), names),
                    "run_error": self._judge(layer_error(as_run, expected, before), names, self.tolerance.layer),
                    "cache_error": self._judge(kept, names, self.tolerance.cache),
                    "max_error": max_error(as_run, whole_x),
                    "rms": rms_error(as_run, whole_x),
                    "drift": max_error(own[1], whole_x),
                }
            )
        final = self._share(self.whole.hidden if self.whole else None)
        # Every rank normalises for itself, so every rank's result is looked at.
        norm_error = self._judge(layer_error(exact_hidden, final, torch.zeros_like(final)), ["output_norm.weight"])
        head = {"embedding_error": embedding_error, "output_norm_error": norm_error}
        return self._report(head, layers, final, own[0])

    def _normed(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The layer's input of the stream x, in the compute dtype."""
        weight = self.split.layers[index].first_norm
        return self.runner.kernels.rms_norm(x, weight, self.plan.spec.norm_eps).to(self.runner.dtype)

    def _plain_layer(
        self, index: int, x: torch.Tensor, step: Step, kernels: Kernels, cache: KVCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The resident layer on the stream x in float32: (normalised, residual), each [T, hidden]."""
        layer = DecoderLayer(self.plan, self.runner.rank, index, self.runner.weights, kernels, self.group)
        hidden = kernels.rms_norm(x, layer.first_norm, self.plan.spec.norm_eps)
        return layer(hidden, x.clone(), step, cache)

    def _share(self, x: torch.Tensor | None) -> torch.Tensor:
        """Rank 0's float32 [T, hidden], on every rank: the sum with the others' zeros."""
        if x is None:
            x = torch.zeros((len(self.ids), self.plan.spec.hidden_size), device=self.device)
        return self.group.all_reduce(x.float().clone()).clone()

    def _judge(self, error: float, names: Iterable[str], limit: float = LAYER_TOLERANCE) -> float:
        """The largest error of any rank. Beyond the limit: looks for the tensor that is wrong, once."""
        errors: list[float] = self.group.gather_objects(error)  # type: ignore[assignment]
        worst = max(errors)
        if worst > limit:
            self.ok = False
            names = list(names)
            if self.bad is None:
                self.bad = first_bad_tensor(self.runner, names)
            # Whatever follows is not finite either, so only the first place tells anything.
            if worst >= NOT_FINITE and self.finite:
                self.finite = False
                self.not_finite = first_not_finite(self.runner, names)
        return worst

    def _layer_tensors(self, index: int) -> list[str]:
        return [t.name for t in self.plan.tensors.values() if t.decl.layer == index]

    def _report(
        self,
        errors: dict[str, float],
        layers: list[dict[str, Any]],
        whole_hidden: torch.Tensor,
        own_hidden: torch.Tensor,
    ) -> dict[str, Any]:
        wanted = self.whole.decoder.logits(whole_hidden) if self.whole else None
        exact_head = LMHead(self.plan, self.runner.rank, self.runner.weights, self.exact_kernels, self.group)
        exact = exact_head(whole_hidden)
        logits = self.split.logits(own_hidden)
        reference = exact if wanted is None else wanted
        head_error = self._judge(
            layer_error(exact, reference, torch.zeros_like(reference)), [lm_head_name(self.plan.spec)]
        )
        divergence = kl_divergence(reference, logits)
        whole_top1, split_top1 = reference.argmax(-1), logits.argmax(-1)
        kl_mean = float(divergence.mean())
        # A row of NaN has a "likeliest" id too, so agreement would mean nothing.
        known = math.isfinite(kl_mean)
        result = {
            "ok": self.ok and known and kl_mean <= self.tolerance.kl,
            "layers": layers,
            **errors,
            "lm_head_error": head_error,
            "kl_mean": kl_mean if known else None,
            "kl_max": float(divergence.max()) if known else None,
            "top1_agreement": float((whole_top1 == split_top1).float().mean()) if known else None,
            "whole_top1": [part.tolist() for part in whole_top1.split(self.lengths)],
            "split_top1": [part.tolist() for part in split_top1.split(self.lengths)],
            "positions": len(self.ids),
            "first_bad_tensor": self.bad[0] if self.bad else None,
            "first_bad_rank": self.bad[1] if self.bad else None,
            "not_finite_tensor": self.not_finite[0] if self.not_finite else None,
            "not_finite_rank": self.not_finite[1] if self.not_finite else None,
            "arithmetic": arithmetic(self.runner.config, self.plan, rounded=rounds_to_8_bits(self.runner)),
            "tolerance": LAYER_TOLERANCE,
            "run_tolerance": self.tolerance.layer,
            "cache_tolerance": self.tolerance.cache,
            "kl_tolerance": self.tolerance.kl,
        }
        return self.group.gather_objects(result)[0]  # type: ignore[return-value]


def first_bad_tensor(runner: ModelRunner, names: Iterable[str]) -> tuple[str, int] | None:
    """Collective: the first of the tensors whose resident slice is not, bit for bit, what the file says, and the rank
    that holds it; None when all are right (then the computation is wrong, not the weights)."""
    names = list(names)
    return _first(runner, names, [name for name in names if not _slice_is_right(runner, runner.plan.tensors[name])])


def first_not_finite(runner: ModelRunner, names: Iterable[str]) -> tuple[str, int] | None:
    """Collective: the first of the tensors whose resident slice holds NaN or infinity, and the rank that holds it."""
    names = list(names)
    return _first(runner, names, [name for name in names if not _is_finite(runner.weights.get(name))])


def _first(runner: ModelRunner, names: list[str], own: list[str]) -> tuple[str, int] | None:
    """The first of `names` that is among any rank's own, and the first such rank."""
    everyone: list[list[str]] = runner.group.gather_objects(own)  # type: ignore[assignment]
    for name in names:
        for rank, found in enumerate(everyone):
            if name in found:
                return name, rank
    return None


def _is_finite(weight: QuantTensor | torch.Tensor | None) -> bool:
    """Of all weights, dequantised a bounded number at a time. None: this rank holds no part."""
    if weight is None:
        return True
    if not isinstance(weight, QuantTensor):
        return bool(weight.isfinite().all())
    step = max(1, _FINITE_CHUNK // max(1, weight.cols))
    chunks = (slice(start, min(start + step, weight.rows)) for start in range(0, weight.rows, step))
    return all(bool(dequantize(weight, chunk).isfinite().all()) for chunk in chunks)


def _slice_is_right(runner: ModelRunner, tensor: TensorPlan) -> bool:
    """Whether this rank's resident slice holds the values of the whole tensor, read anew and dequantised."""
    slices = tensor.slices[runner.rank]
    if not slices:
        return True
    resident = runner.weights[tensor.name]
    checkpoint, device = runner.checkpoint, runner.device
    if not isinstance(resident, QuantTensor):
        whole = replace(tensor, axis=None)
        everything = (Slice(0, tensor.decl.info.shape[0]),)
        vector = load_tensors(checkpoint, [(whole, everything)], device, runner.plan.spec.norm_offset)[tensor.name]
        if isinstance(vector, QuantTensor):
            return False
        return _same_bits(resident, torch.cat([vector[part.start : part.stop] for part in slices]))
    rows, cols = (slices, Slice(0, resident.cols)) if tensor.axis != 1 else ((Slice(0, resident.rows),), slices[0])
    first = 0  # row of the resident slice
    for segment in rows:
        for part, whole_part in whole_rows(checkpoint, tensor, segment, device):
            wanted = dequantize(whole_part)[:, cols.start : cols.stop]
            if not _same_bits(dequantize(resident, slice(first, first + part.size)), wanted):
                return False
            first += part.size
    return True


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Of two float32 tensors. Any NaN equals any other: arithmetic leaves open which bits one gets."""
    if a.shape != b.shape:
        return False
    same = a.contiguous().view(torch.int32) == b.contiguous().view(torch.int32)
    return bool((same | (a.isnan() & b.isnan())).all())


def _inputs(lengths: list[int], block_size: int, device: torch.device) -> AttentionInputs:
    """One prefill of all prompts, their blocks one after another."""
    blocks = [-(-length // block_size) for length in lengths]
    table = torch.zeros((len(lengths), max(blocks)), dtype=torch.int64)
    for sequence, count in enumerate(blocks):
        table[sequence, :count] = torch.arange(count) + sum(blocks[:sequence])
    return AttentionInputs.build(lengths, [0] * len(lengths), table.numpy(), block_size, device)


def _scratch_cache(inputs: AttentionInputs, plan: Plan, rank: int, kv_type: str, device: torch.device) -> KVCache:
    """Keys and values of one layer, used by one layer after another: each writes before it reads."""
    blocks = int(inputs.block_tables.max()) + 1
    shape = (blocks, inputs.block_size, plan.ranks[rank].kv_heads.size, plan.spec.head_dim)
    return make_cache(kv_type, shape, device), make_cache(kv_type, shape, device)


def _whole_plan(plan: Plan, context: int) -> Plan:
    return make_plan(
        plan.spec,
        [plan.ranks[0].device],
        Ratios.uniform((1.0,)),
        context=context,
        kv_tokens=plan.kv_tokens,
        kv_type="f32",
        dtype="float32",
        block_size=plan.block_size,
        max_num_seqs=plan.max_num_seqs,
        max_batch_tokens=plan.max_batch_tokens,
    )
