"""Logits to tokens on one rank, for all sequences of a step at once. Every rank does this with the same bits.

The order is vLLM's: a grammar's mask, logit bias, suppression before min_tokens, penalties, temperature, min-p, top-k,
top-p; then one uniform number a sequence goes through the inverse of the cumulative distribution over the vocabulary in
id order.

What a row yields depends on that row alone, and on no order of summation: probabilities are summed as integers.
A filter keeps *every* token that is as likely as the least likely one it keeps, so no tie is decided by a sort.
Rows are sorted into kinds on the host, from what the requests asked for; nothing waits for the device except
log-probabilities (and, on a CPU, a look whether top-p needs a full sort).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from multitensor.engine.batch import SamplingSetup, TokenLogprobs
from multitensor.kernels.host_copy import to_device

_PARAMETERS = ("temperature", "min_p", "top_p", "repetition", "presence", "frequency")
_WEIGHT_ONE = 2.0**40  # the likeliest token's weight; 2**22 such tokens still sum within 63 bits
_TOP_P_CANDIDATES = 1024  # a CPU looks at so many before it sorts the vocabulary
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_BOUNDS = np.where(_BITS, np.float32(np.inf), np.float32(-np.inf))  # [256, 8]: of eight tokens, by an octet of a mask
_GROUP_ELEMENTS = 1 << 22  # logits worked on at once, which bounds the temporaries (a few times 32 MiB)


class Sampler:
    """State of `slots` sequences: parameters, history for penalties, and the token sampled last.

    max_context: tokens a sequence may have; the history (int32 [slots, up to max_context]) is made when the first
    request with penalties comes, and grows.
    """

    def __init__(self, slots: int, vocab_size: int, max_context: int, device: torch.device) -> None:
        self.device = device
        self.vocab_size = vocab_size
        self.last_tokens = torch.zeros(slots, dtype=torch.int64, device=device)
        self._max_context = max_context
        self._setups: list[SamplingSetup | None] = [None] * slots
        self._sampled = np.zeros(slots, np.int64)  # tokens each slot has sampled
        self._prompt_lens = np.zeros(slots, np.int64)  # tokens of the prompt in its history
        self._plain_greedy = np.zeros(slots, bool)
        self._parameters = torch.zeros(slots, len(_PARAMETERS), dtype=torch.float32, device=device)
        self._top_k = np.zeros(slots, np.int64)
        self._history = torch.zeros(slots, 0, dtype=torch.int32, device=device)

    def admit(self, setup: SamplingSetup) -> None:
        """A new request takes the slot; what was there is forgotten."""
        slot = setup.slot
        self._setups[slot] = setup
        self._sampled[slot] = 0
        self._top_k[slot] = setup.top_k if setup.top_k < self.vocab_size else 0
        self._plain_greedy[slot] = _is_plain_greedy(setup)
        if not self._plain_greedy[slot]:  # else nobody reads them, and the prompt's step begins earlier
            penalties = (setup.repetition_penalty, setup.presence_penalty, setup.frequency_penalty)
            values = np.array([setup.temperature, setup.min_p, setup.top_p, *penalties], np.float32)
            self._parameters[slot] = self._to_device(values)
        self._prompt_lens[slot] = len(setup.prompt_ids)
        if _has_penalties(setup) and len(setup.prompt_ids):
            self._reserve(len(setup.prompt_ids))
            self._history[slot, : len(setup.prompt_ids)] = self._to_device(setup.prompt_ids.astype(np.int32))

    def sample(
        self,
        logits: torch.Tensor,
        slots: np.ndarray,
        uniforms: np.ndarray,
        masks: Mapping[int, np.ndarray] | None = None,
        likeliest: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[int, TokenLogprobs]]:
        """logits: float32 [S, vocab], one row a sequence that samples now (left as they are). slots: [S], each at most
        once. uniforms: float64 [S]. masks: row -> what a grammar allows, as in StepInput; log-probabilities do not know
        of them. likeliest: int64 [S], each row's argmax where that is known and already stands in `last_tokens`.
        Returns (int64 [S] on the device, row number -> log-probabilities where asked)."""
        if len(slots) == 0:
            return torch.zeros(0, dtype=torch.int64, device=self.device), {}
        logprobs: dict[int, TokenLogprobs] = {}
        allowed = self._masked(logits, masks) if masks else logits
        greedy = self._plain_greedy[slots].all()
        if greedy and likeliest is not None and not masks:
            ids = likeliest
        else:
            if greedy:
                ids = allowed.argmax(-1)
            else:
                ids = torch.cat([self._choose(allowed[g], slots[g], uniforms[g]) for g in self._groups(len(slots))])
            self.last_tokens.index_copy_(0, self._to_device(slots.astype(np.int64)), ids)
        self._remember(ids, slots)
        for g in self._groups(len(slots)):
            logprobs |= self._logprobs(logits[g], ids[g], slots[g], g.start)
        return ids, logprobs

    def _groups(self, rows: int) -> list[slice]:
        size = max(1, _GROUP_ELEMENTS // self.vocab_size)
        return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]

    def _choose(self, logits: torch.Tensor, slots: np.ndarray, uniforms: np.ndarray) -> torch.Tensor:
        logits = self._process(logits, slots)
        ids = logits.argmax(-1)  # the first of equals
        random = [row for row, slot in enumerate(slots) if self._setup(slot).temperature > 0]
        if random:
            rows = self._indices(random)
            ids[rows] = self._draw(logits[rows], slots[random], uniforms[random])
        return ids

    def _setup(self, slot: int) -> SamplingSetup:
        setup = self._setups[slot]
        if setup is None:
            raise RuntimeError(f"sampler slot {slot} was never set up")
        return setup

    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        return to_device(values, self.device)

    def _indices(self, numbers: list[int]) -> torch.Tensor:
        return self._to_device(np.array(numbers, np.int64))

    def _column(self, name: str, slots: np.ndarray) -> torch.Tensor:
        """Parameter `name` of the slots, float32 [S, 1]."""
        return self._parameters[self._to_device(slots.astype(np.int64)), _PARAMETERS.index(name)].unsqueeze(1)

    # --- logits ---

    def _masked(self, logits: torch.Tensor, masks: Mapping[int, np.ndarray]) -> torch.Tensor:
        """A copy in which the rows that have masks are -inf where their bit is not set."""
        octets = np.stack(list(masks.values())).astype("<u4", copy=False).view(np.uint8)
        if list(masks) == list(range(len(logits))):
            return self._bounded(logits, octets)
        rows = self._indices(list(masks))
        logits = logits.clone()
        logits[rows] = self._bounded(logits[rows], octets)
        return logits

    def _bounded(self, logits: torch.Tensor, octets: np.ndarray) -> torch.Tensor:
        """float32 [R, vocabulary] and a bit a token, uint8 [R, at least vocabulary / 8] -> the same, -inf where the bit
        is not set."""
        if self.device.type != "cpu":
            return torch.where(self._unpacked(octets)[:, : logits.shape[-1]], logits, -torch.inf)
        # By bounds, eight at a time from a table: torch's choice by booleans takes ten times as long.
        bounds = torch.from_numpy(_BOUNDS.take(octets, axis=0).reshape(len(octets), -1))[:, : logits.shape[-1]]
        return torch.minimum(logits, bounds)

    def _unpacked(self, octets: np.ndarray) -> torch.Tensor:
        """uint8 [R, W] -> bool [R, 8 W] on the device, which gets bits, not bytes."""
        powers = self._to_device(np.left_shift(1, np.arange(8)).astype(np.uint8))
        return ((self._to_device(octets).unsqueeze(-1) & powers) != 0).flatten(1)

    def _process(self, logits: torch.Tensor, slots: np.ndarray) -> torch.Tensor:
        """Bias, suppression and penalties; a copy when there are any."""
        setups = [self._setup(slot) for slot in slots]
        biased = [(row, token, bias) for row, setup in enumerate(setups) for token, bias in setup.logit_bias.items()]
        suppressed = [
            (row, token)
            for row, setup in enumerate(setups)
            if self._sampled[setup.slot] < setup.min_tokens
            for token in setup.suppress_ids
        ]
        penalised = [row for row, setup in enumerate(setups) if _has_penalties(setup)]
        if not biased and not suppressed and not penalised:
            return logits
        logits = logits.clone()
        if biased:
            where = self._indices([row for row, _, _ in biased]), self._indices([token for _, token, _ in biased])
            logits[where] += self._to_device(np.array([bias for _, _, bias in biased], np.float32))
        if suppressed:
            where = self._indices([row for row, _ in suppressed]), self._indices([token for _, token in suppressed])
            logits[where] = -torch.inf
        if penalised:
            rows = self._indices(penalised)
            logits[rows] = self._penalise(logits[rows], slots[penalised])
        return logits

    def _penalise(self, logits: torch.Tensor, slots: np.ndarray) -> torch.Tensor:
        """Repetition over prompt and output, then frequency and presence over the output."""
        prompt_lens = self._prompt_lens[slots]
        lens = prompt_lens + self._sampled[slots]
        width = int(lens.max())
        if width == 0:
            return logits
        history = self._history[self._to_device(slots.astype(np.int64)), :width].long()
        place = torch.arange(width, device=self.device)
        seen = place < self._to_device(lens).unsqueeze(1)
        output = seen & (place >= self._to_device(prompt_lens).unsqueeze(1))
        anywhere = torch.zeros_like(logits).scatter_add_(1, history, seen.float()) > 0
        repetition = self._column("repetition", slots)
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(anywhere, repeated, logits)
        count = torch.zeros_like(logits).scatter_add_(1, history, output.float())
        logits = logits - self._column("frequency", slots) * count
        return logits - self._column("presence", slots) * (count > 0)

    # --- drawing ---

    def _draw(self, logits: torch.Tensor, slots: np.ndarray, uniforms: np.ndarray) -> torch.Tensor:
        """One token a row, at random; float32 [R, vocab] -> int64 [R]."""
        best = logits.amax(-1, keepdim=True)
        x = (logits - best) / self._column("temperature", slots)  # the best is 0 whatever the temperature
        x = torch.where(x >= torch.log(self._column("min_p", slots)), x, -torch.inf)
        filtered = [row for row, slot in enumerate(slots) if self._top_k[slot] or self._setup(slot).top_p < 1]
        if filtered:
            rows = self._indices(filtered)
            kept = x[rows]
            x[rows] = torch.where(kept >= self._threshold(kept, slots[filtered]), kept, -torch.inf)
        shares = self._to_device(uniforms.astype(np.float64)).unsqueeze(1)
        if x.device.type == "cpu" and len(filtered) == len(slots):
            return torch.cat([_draw_kept(x[row], shares[row : row + 1]) for row in range(len(slots))])
        return _draw_from(x, shares)

    def _threshold(self, x: torch.Tensor, slots: np.ndarray) -> torch.Tensor:
        """The least value that top-k and top-p keep, float32 [R, 1]. x: scaled logits <= 0, -inf where dropped."""
        top_k = self._top_k[slots]
        candidates = x.shape[-1]
        all_k = bool((top_k > 0).all())
        if all_k:
            candidates = int(top_k.max())
        elif x.device.type == "cpu":
            candidates = min(candidates, max(int(top_k.max()), _TOP_P_CANDIDATES))
        total = None if all_k else _weights(x).sum(-1, keepdim=True)
        threshold, reached = self._cut(_largest(x, candidates), total, slots)
        if x.device.type == "cpu" and not reached.all():
            threshold, _ = self._cut(_largest(x, x.shape[-1]), total, slots)
        return threshold

    def _cut(
        self, values: torch.Tensor, total: torch.Tensor | None, slots: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """values: the largest of each row, descending. total: mass of the whole row, None where every row has a top-k.
        Returns the least value in the smallest set whose mass reaches top_p of the mass that top-k leaves (float32
        [R, 1]), and whether `values` reach that far."""
        width = values.shape[1]
        top_k = self._to_device(self._top_k[slots]).unsqueeze(1)
        has_k = top_k > 0
        last = torch.where(has_k, top_k, width) - 1  # the last place that top-k leaves
        place = torch.arange(width, device=self.device)
        mass = torch.where(place <= last, _weights(values), 0).cumsum(-1)
        total = mass[:, -1:] if total is None else torch.where(has_k, mass[:, -1:], total)
        top_p = self._column("top_p", slots).double()
        wanted = torch.minimum(torch.ceil(top_p * total.double()).long(), total)
        first = torch.searchsorted(mass, wanted)  # the first place where mass >= wanted
        kth = torch.where(has_k, values.gather(1, last), -torch.inf)
        least = torch.where(top_p < 1, values.gather(1, torch.minimum(first, last)), kth)
        return torch.maximum(kth, least), (first < width) | (top_p >= 1)

    # --- after ---

    def _remember(self, ids: torch.Tensor, slots: np.ndarray) -> None:
        """Appends the tokens to the history of those that have penalties."""
        rows = [row for row, slot in enumerate(slots) if _has_penalties(self._setup(slot))]
        if rows:
            places = self._prompt_lens[slots[rows]] + self._sampled[slots[rows]]
            self._reserve(int(places.max()) + 1)
            where = self._to_device(slots[rows].astype(np.int64)), self._to_device(places)
            self._history[where] = ids[self._indices(rows)].int()
        self._sampled[slots] += 1

    def _reserve(self, width: int) -> None:
        if width <= self._history.shape[1]:
            return
        width = max(width, min(2 * width, self._max_context + 1), 64)
        grown = torch.zeros(len(self._setups), width, dtype=torch.int32, device=self.device)
        grown[:, : self._history.shape[1]] = self._history
        self._history = grown

    def _logprobs(
        self, logits: torch.Tensor, ids: torch.Tensor, slots: np.ndarray, first_row: int
    ) -> dict[int, TokenLogprobs]:
        rows = [row for row, slot in enumerate(slots) if self._setup(slot).logprobs >= 0]
        if not rows:
            return {}
        where = self._indices(rows)
        logprobs = logits[where].double().log_softmax(-1)
        chosen = logprobs.gather(1, ids[where].unsqueeze(1))
        ranks = (logprobs > chosen).sum(-1) + 1
        widest = min(max(self._setup(slots[row]).logprobs for row in rows), logits.shape[-1])
        top_values, top_ids = logprobs.topk(widest)
        columns = (chosen.squeeze(1).tolist(), ranks.tolist(), top_ids.tolist(), top_values.tolist())
        result = {}
        for row, value, rank, best, values in zip(rows, *columns, strict=True):
            k = self._setup(slots[row]).logprobs
            result[first_row + row] = TokenLogprobs(value, best[:k], values[:k], rank)
        return result


def _weights(x: torch.Tensor) -> torch.Tensor:
    """exp(x) in units of 2**-40, as int64, so that sums do not depend on their order. x <= 0."""
    return torch.round(torch.exp(x.double()) * _WEIGHT_ONE).long()


def _draw_from(x: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """The place in each row where the cumulative weight passes that share of the whole; [R, n], [R, 1] -> int64 [R]."""
    cumulative = _weights(x).cumsum(-1)
    total = cumulative[:, -1:]
    target = torch.minimum((shares * total.double()).long(), total - 1)  # the product may round up to the total
    places = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return places.clamp_(max=x.shape[-1] - 1)  # NaN logits must not lead out of the vocabulary


def _draw_kept(x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """The same for one row [n] of which few are kept, without the exponentials of the others; waits for the device."""
    kept = torch.nonzero(x > -torch.inf).squeeze(1)
    if len(kept) == 0:  # all NaN
        return kept.new_zeros(1)
    return kept[_draw_from(x[kept].unsqueeze(0), share)]


def _largest(x: torch.Tensor, count: int) -> torch.Tensor:
    if count < x.shape[-1]:
        return x.topk(count)[0]
    return x.sort(-1, descending=True)[0]


def _has_penalties(setup: SamplingSetup) -> bool:
    return setup.repetition_penalty != 1.0 or setup.presence_penalty != 0.0 or setup.frequency_penalty != 0.0


def _is_plain_greedy(setup: SamplingSetup) -> bool:
    return (
        setup.temperature == 0
        and not setup.logit_bias
        and not _has_penalties(setup)
        and not (setup.min_tokens and setup.suppress_ids)
    )
