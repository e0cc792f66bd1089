"""How far two results are apart, as `verify` judges them: relative errors, and the divergence of logits."""

from __future__ import annotations

import math

import torch

from multitensor.kernels.cache_tensor import CacheTensor, QuantCache

KL_SCRATCH_BYTES = 64 << 20
NOT_FINITE = 1e30  # stands for an error that is no number, since JSON has no NaN


def _finite(value: float) -> float:
    return value if math.isfinite(value) else NOT_FINITE


def layer_error(found: torch.Tensor, wanted: torch.Tensor, before: torch.Tensor) -> float:
    """The worst position's error, relative to what the layer adds to the stream there (its largest element).

    The stream may be thousands of times larger than what one layer adds; float32's rounding of it is allowed for.
    """
    difference = (found - wanted).abs().amax(-1)
    added = (wanted - before).abs().amax(-1)
    stream = torch.maximum(wanted.abs().amax(-1), before.abs().amax(-1))
    excess = (difference - 2 * torch.finfo(torch.float32).eps * stream).clamp(min=0)
    return _finite(float((excess / added.clamp(min=1e-30)).max()))


def max_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return _finite(float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)))


def cache_error(found: CacheTensor, wanted: CacheTensor) -> float:
    """rms_error of one layer's keys, or values, as two caches of any type hold them."""
    exact = _numbers(wanted)
    return rms_error(_numbers(found), exact) if exact.numel() else 0.0  # a rank may have no heads


def _numbers(cache: CacheTensor) -> torch.Tensor:
    return cache.dequantise() if isinstance(cache, QuantCache) else cache.float()


def rms_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    rms = (found - wanted).square().mean().sqrt()
    return _finite(float(rms / wanted.square().mean().sqrt().clamp(min=1e-30)))


def kl_divergence(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Sum of p log(p / q) of each row, in nats, float64 [T]; a bounded number of rows at a time."""
    step = max(1, KL_SCRATCH_BYTES // (4 * 8 * wanted.shape[-1]))
    parts = []
    for start in range(0, wanted.shape[0], step):
        p = wanted[start : start + step].double().log_softmax(-1)
        q = found[start : start + step].double().log_softmax(-1)
        parts.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(parts)
