"""What may be sampled of a row of logits, by numpy in float64: for samplers that round weights in ways of their own."""

from __future__ import annotations

import math
from itertools import product

import numpy as np

from multitensor.engine.batch import SamplingSetup

SLACK = 1e-6  # of a share: nearer to the border of a filter or of a token either side is right


def sampling_setup(slot: int = 0, **changes: object) -> SamplingSetup:
    """Greedy, but for the changes."""
    values: dict = {
        "slot": slot,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "logprobs": -1,
        "prompt_ids": np.zeros(0, np.int32),
    }
    return SamplingSetup(**{**values, **changes})


def processed(
    logits: np.ndarray, params: SamplingSetup, outputs: list[int], allowed: np.ndarray | None = None
) -> np.ndarray:
    """float32 logits [V] after mask (bool [V]), bias, suppression and penalties, rounded as they are rounded there."""
    x = logits.astype(np.float32)
    if allowed is not None:
        x = np.where(allowed, x, np.float32(-np.inf))
    for token, bias in params.logit_bias.items():
        x[token] += np.float32(bias)
    if len(outputs) < params.min_tokens:
        x[list(params.suppress_ids)] = -np.inf
    if (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.0, 0.0, 0.0):
        return x
    repetition, presence = np.float32(params.repetition_penalty), np.float32(params.presence_penalty)
    for token in set(params.prompt_ids.tolist()) | set(outputs):
        x[token] = x[token] / repetition if x[token] > 0 else x[token] * repetition
    for token in set(outputs):
        x[token] -= np.float32(params.frequency_penalty) * np.float32(outputs.count(token))
        x[token] -= presence
    return x


def right_tokens(x: np.ndarray, params: SamplingSetup, share: float) -> set[int]:
    """The tokens that a sampler may take of processed logits x with this share of the distribution."""
    if params.temperature == 0:
        return {int(np.argmax(x))}
    best = x.max()
    if not np.isfinite(best):
        return {0}
    with np.errstate(over="ignore"):
        scaled = (x - best) / np.float32(params.temperature)
    scaled = np.where(scaled >= (np.float32(math.log(params.min_p)) if params.min_p else -np.inf), scaled, -np.inf)
    weights = np.exp(scaled.astype(np.float64))
    order = np.argsort(-scaled, kind="stable")
    least, mass = -np.inf, np.cumsum(weights[order])
    if 0 < params.top_k < len(x):
        least = scaled[order[params.top_k - 1]]
        mass = mass[: params.top_k]
    found = set()
    for shift, moved in product((-SLACK, 0.0, SLACK), repeat=2):
        kept = weights * (scaled >= least)
        if params.top_p < 1:
            wanted = min(max(float(np.float32(params.top_p)) + shift, 0.0), 1.0) * mass[-1]
            last = min(int(np.searchsorted(mass, wanted)), len(mass) - 1)
            kept = weights * (scaled >= max(least, scaled[order[last]]))
        total = np.cumsum(kept)
        target = min(max(share + moved, 0.0), 1.0) * total[-1]
        inside = np.flatnonzero(kept)
        found.add(int(inside[min(int(np.searchsorted(total[inside], target, side="right")), len(inside) - 1)]))
    return found
