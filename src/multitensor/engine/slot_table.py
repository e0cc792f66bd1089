"""What the requests in a sampler's slots ask for, as arrays by slot: a step looks its rows up all at once.

Imported by ranks only: what it imports imports torch.
"""

from __future__ import annotations

import math

import numpy as np

from multitensor.engine.batch import SamplingSetup
from multitensor.kernels.token_rows import ROW


class SlotTable:
    """Arrays [slots] on the host; a slot's entries stand until the next request takes it.

    rows: ROW, and its columns by name. random: temperature above 0. filtered: top-k or top-p drop something.
    penalised: any of the three penalties. plain_greedy: nothing but the likeliest token of the model's own logits.
    biased, suppressing: logit_bias; tokens kept from being sampled before min_tokens. logprobs: as SamplingSetup.
    sampled: tokens sampled so far. prompt_lens: tokens of the prompt in the history that penalties look at.
    """

    def __init__(self, slots: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._setups: list[SamplingSetup | None] = [None] * slots
        self.rows = np.zeros(slots, ROW)
        self.rows["slot"] = np.arange(slots)
        self.temperature, self.least, self.top_p = (self.rows[name] for name in ("temperature", "least", "top_p"))
        self.repetition, self.presence = self.rows["repetition"], self.rows["presence"]
        self.frequency, self.top_k = self.rows["frequency"], self.rows["top_k"]
        self.min_tokens, self.sampled, self.prompt_lens = np.zeros((3, slots), np.int64)
        self.logprobs = np.full(slots, -1, np.int64)
        self.known, self.random, self.filtered, self.penalised, self.plain_greedy, self.biased, self.suppressing = (
            np.zeros((7, slots), bool)
        )

    def admit(self, setup: SamplingSetup) -> None:
        """A sequence takes its slot; what was there is forgotten."""
        slot = setup.slot
        self._setups[slot] = setup
        self.known[slot] = True
        self.temperature[slot], self.top_p[slot] = setup.temperature, setup.top_p
        self.least[slot] = math.log(setup.min_p) if setup.min_p > 0 else -math.inf
        self.repetition[slot], self.presence[slot] = setup.repetition_penalty, setup.presence_penalty
        self.frequency[slot] = setup.frequency_penalty
        self.top_k[slot] = setup.top_k if setup.top_k < self._vocab_size else 0
        self.random[slot] = self.temperature[slot] > 0  # as float32: what that rounds to 0 is greedy
        self.filtered[slot] = self.top_k[slot] > 0 or setup.top_p < 1
        penalties = (setup.repetition_penalty, setup.presence_penalty, setup.frequency_penalty)
        self.penalised[slot] = penalties != (1.0, 0.0, 0.0)
        self.biased[slot] = bool(setup.logit_bias)
        self.min_tokens[slot] = setup.min_tokens
        self.suppressing[slot] = bool(setup.min_tokens and setup.suppress_ids)
        touched = self.random[slot] or self.penalised[slot] or self.biased[slot] or self.suppressing[slot]
        self.plain_greedy[slot] = not touched
        self.logprobs[slot] = setup.logprobs
        self.sampled[slot] = len(setup.output_ids)
        self.prompt_lens[slot] = len(setup.prompt_ids)

    def rows_of(self, slots: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        """ROW [S] of a step in which these slots sample with these shares; without masks."""
        rows = self.rows[slots]
        prompt_lens = self.prompt_lens[slots]
        rows["history"] = np.where(self.penalised[slots], prompt_lens + self.sampled[slots], -1)
        rows["prompt"] = prompt_lens
        rows["mask"] = -1
        rows["share"] = uniforms
        return rows

    def setup(self, slot: int) -> SamplingSetup:
        found = self._setups[slot]
        if found is None:
            raise RuntimeError(f"sampler slot {slot} was never set up")
        return found

    def require(self, slots: np.ndarray) -> None:
        """Raises RuntimeError unless requests have taken all of these slots."""
        if not self.known[slots].all():
            raise RuntimeError(f"sampler slot {slots[~self.known[slots]][0]} was never set up")

    def suppressed(self, slots: np.ndarray) -> np.ndarray:
        """Rows whose requests have not sampled min_tokens yet, and have ids that wait for that."""
        return np.flatnonzero(self.suppressing[slots] & (self.sampled[slots] < self.min_tokens[slots]))
