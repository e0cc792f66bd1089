"""Logits to tokens on one rank, for all sequences of a step at once. Every rank does this with the same bits.

The order is vLLM's: a grammar's mask, logit bias, suppression before min_tokens, penalties, temperature, min-p, top-k,
top-p; then one uniform number a sequence goes through the inverse of the cumulative distribution over the vocabulary in
id order.

What a row yields depends on that row alone, and on no order of summation: probabilities are summed as integers.
A filter keeps *every* token that is as likely as the least likely one it keeps, so no tie is decided by a sort.
Rows are sorted into kinds on the host, from what the requests asked for (slot_table.py); nothing waits for the device
(but, on a CPU, a look whether top-p needs a full sort).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from multitensor.engine.batch import SamplingSetup
from multitensor.engine.logprobs import Logprobs, pack_logprobs
from multitensor.engine.slot_table import SlotTable
from multitensor.kernels.host_copy import to_device
from multitensor.kernels.token_rows import TokenChooser

_WEIGHT_ONE = 2.0**40  # the likeliest token's weight; 2**22 such tokens still sum within 63 bits
_TOP_P_CANDIDATES = 1024  # a CPU looks at so many before it sorts the vocabulary
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_BOUNDS = np.where(_BITS, np.float32(np.inf), np.float32(-np.inf))  # [256, 8]: of eight tokens, by an octet of a mask
_GROUP_ELEMENTS = 1 << 22  # logits worked on at once, which bounds the temporaries (a few times 32 MiB)


class Sampler:
    """State of `slots` sequences: parameters, history for penalties, and the token sampled last.

    max_context: tokens a sequence may have; the history (int32 [slots, up to max_context]) is made when the first
    request with penalties comes, and grows. chooser: what samples in one launch, where the device has such; all ranks
    must have one, or none, for its weights are not rounded as here.
    """

    def __init__(
        self, slots: int, vocab_size: int, max_context: int, device: torch.device, chooser: TokenChooser | None = None
    ) -> None:
        self.device = device
        self.chooser = chooser
        self.vocab_size = vocab_size
        self.last_tokens = torch.zeros(slots, dtype=torch.int64, device=device)
        self._max_context = max_context
        self._table = SlotTable(slots, vocab_size)
        self._history = torch.zeros(slots, 0, dtype=torch.int32, device=device)

    def admit(self, setup: SamplingSetup) -> None:
        """A sequence takes the slot; what was there is forgotten."""
        self._table.admit(setup)
        length = len(setup.prompt_ids) + len(setup.output_ids)
        if self._table.penalised[setup.slot] and length:
            self._reserve(length)
            seen = np.concatenate([setup.prompt_ids, np.array(setup.output_ids, np.int32)])
            self._history[setup.slot, :length] = self._to_device(seen.astype(np.int32))

    def sample(
        self,
        logits: torch.Tensor,
        slots: np.ndarray,
        uniforms: np.ndarray,
        masks: Mapping[int, np.ndarray] | None = None,
        likeliest: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Logprobs | None]:
        """logits: float32 [S, vocab], one row a sequence that samples now (left as they are). slots: [S], each at most
        once. uniforms: float64 [S]. masks: row -> what a grammar allows, as in StepInput; log-probabilities do not know
        of them. likeliest: int64 [S], each row's argmax where that is known and already stands in `last_tokens`.
        Returns (int64 [S], log-probabilities where any row asked for them), both on the device."""
        if len(slots) == 0:
            return torch.zeros(0, dtype=torch.int64, device=self.device), None
        self._table.require(slots)
        if likeliest is not None and not masks and self._table.plain_greedy[slots].all():
            ids = likeliest
        elif self.chooser is not None:
            ids = self._chosen(self.chooser, logits, slots, uniforms, masks or {})
        else:
            ids = self._by_torch(logits, slots, uniforms, masks)
            self._remember(ids, slots)
        self._table.sampled[slots] += 1
        return ids, self._logprobs(logits, ids, slots)

    def _chosen(
        self,
        chooser: TokenChooser,
        logits: torch.Tensor,
        slots: np.ndarray,
        uniforms: np.ndarray,
        masks: Mapping[int, np.ndarray],
    ) -> torch.Tensor:
        """In one launch, which also writes what the next steps look for. Bias and suppression are rare: before it."""
        table = self._table
        rows = table.rows_of(slots, uniforms)
        self._reserve(int(rows["history"].max()) + 1)
        if masks:
            rows["mask"][list(masks)] = np.arange(len(masks))
        words = list(masks.values())
        if not table.biased[slots].any() and not len(table.suppressed(slots)):
            return chooser.run(logits, rows, words, self._history, self.last_tokens)
        parts = self._groups(len(slots))
        return torch.cat(
            [
                chooser.run(self._adjusted(logits[g], slots[g]), rows[g], words, self._history, self.last_tokens)
                for g in parts
            ]
        )

    def _by_torch(
        self, logits: torch.Tensor, slots: np.ndarray, uniforms: np.ndarray, masks: Mapping[int, np.ndarray] | None
    ) -> torch.Tensor:
        allowed = self._masked(logits, masks) if masks else logits
        if self._table.plain_greedy[slots].all():
            ids = allowed.argmax(-1)
        else:
            ids = torch.cat([self._choose(allowed[g], slots[g], uniforms[g]) for g in self._groups(len(slots))])
        self.last_tokens.index_copy_(0, self._to_device(slots.astype(np.int64)), ids)
        return ids

    def _groups(self, rows: int) -> list[slice]:
        size = max(1, _GROUP_ELEMENTS // self.vocab_size)
        return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]

    def _choose(self, logits: torch.Tensor, slots: np.ndarray, uniforms: np.ndarray) -> torch.Tensor:
        logits = self._process(logits, slots)
        random = np.flatnonzero(self._table.random[slots])
        if len(random) == len(slots):
            return self._draw(logits, slots, uniforms)
        ids = logits.argmax(-1)  # the first of equals
        if len(random):
            rows = self._to_device(random)
            ids[rows] = self._draw(logits[rows], slots[random], uniforms[random])
        return ids

    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        return to_device(values, self.device)

    def _indices(self, numbers: list[int]) -> torch.Tensor:
        return self._to_device(np.array(numbers, np.int64))

    def _column(self, values: np.ndarray, slots: np.ndarray) -> torch.Tensor:
        """The slots' entries of an array of the table, [S, 1] on the device."""
        return self._to_device(values[slots]).unsqueeze(1)

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
        adjusted = self._adjusted(logits, slots)
        penalised = np.flatnonzero(self._table.penalised[slots])
        if not len(penalised):
            return adjusted
        if len(penalised) == len(slots):
            return self._penalise(adjusted, slots)
        adjusted = adjusted.clone() if adjusted is logits else adjusted
        rows = self._to_device(penalised)
        adjusted[rows] = self._penalise(adjusted[rows], slots[penalised])
        return adjusted

    def _adjusted(self, logits: torch.Tensor, slots: np.ndarray) -> torch.Tensor:
        """Bias and suppression; a copy when there are any."""
        table = self._table
        biased, suppressed = np.flatnonzero(table.biased[slots]), table.suppressed(slots)
        if not len(biased) and not len(suppressed):
            return logits
        logits = logits.clone()
        if len(biased):
            added = [(row, *pair) for row in biased.tolist() for pair in table.setup(slots[row]).logit_bias.items()]
            where = self._indices([row for row, _, _ in added]), self._indices([token for _, token, _ in added])
            logits[where] += self._to_device(np.array([bias for _, _, bias in added], np.float32))
        if len(suppressed):
            barred = [(row, token) for row in suppressed.tolist() for token in table.setup(slots[row]).suppress_ids]
            where = self._indices([row for row, _ in barred]), self._indices([token for _, token in barred])
            logits[where] = -torch.inf
        return logits

    def _penalise(self, logits: torch.Tensor, slots: np.ndarray) -> torch.Tensor:
        """Repetition over prompt and output, then frequency and presence over the output."""
        prompt_lens = self._table.prompt_lens[slots]
        lens = prompt_lens + self._table.sampled[slots]
        width = int(lens.max())
        if width == 0:
            return logits
        history = self._history[self._to_device(slots.astype(np.int64)), :width].long()
        place = torch.arange(width, device=self.device)
        seen = place < self._to_device(lens).unsqueeze(1)
        output = seen & (place >= self._to_device(prompt_lens).unsqueeze(1))
        anywhere = torch.zeros_like(logits).scatter_add_(1, history, seen.float()) > 0
        repetition = self._column(self._table.repetition, slots)
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(anywhere, repeated, logits)
        count = torch.zeros_like(logits).scatter_add_(1, history, output.float())
        logits = logits - self._column(self._table.frequency, slots) * count
        return logits - self._column(self._table.presence, slots) * (count > 0)

    # --- drawing ---

    def _draw(self, logits: torch.Tensor, slots: np.ndarray, uniforms: np.ndarray) -> torch.Tensor:
        """One token a row, at random; float32 [R, vocab] -> int64 [R]."""
        best = logits.amax(-1, keepdim=True)
        x = (logits - best) / self._column(self._table.temperature, slots)  # the best is 0 whatever the temperature
        x = torch.where(x >= self._column(self._table.least, slots), x, -torch.inf)
        filtered = np.flatnonzero(self._table.filtered[slots])
        if len(filtered) == len(slots):
            x = torch.where(x >= self._threshold(x, slots), x, -torch.inf)
        elif len(filtered):
            rows = self._to_device(filtered)
            kept = x[rows]
            x[rows] = torch.where(kept >= self._threshold(kept, slots[filtered]), kept, -torch.inf)
        shares = self._to_device(uniforms.astype(np.float64)).unsqueeze(1)
        if x.device.type == "cpu" and len(filtered) == len(slots):
            return torch.cat([_draw_kept(x[row], shares[row : row + 1]) for row in range(len(slots))])
        return _draw_from(x, shares)

    def _threshold(self, x: torch.Tensor, slots: np.ndarray) -> torch.Tensor:
        """The least value that top-k and top-p keep, float32 [R, 1]. x: scaled logits <= 0, -inf where dropped."""
        top_k = self._table.top_k[slots].astype(np.int64)
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
        top_k = self._column(self._table.top_k, slots).long()
        has_k = top_k > 0
        last = torch.where(has_k, top_k, width) - 1  # the last place that top-k leaves
        place = torch.arange(width, device=self.device)
        mass = torch.where(place <= last, _weights(values), 0).cumsum(-1)
        total = mass[:, -1:] if total is None else torch.where(has_k, mass[:, -1:], total)
        top_p = self._column(self._table.top_p, slots).double()
        wanted = torch.minimum(torch.ceil(top_p * total.double()).long(), total)
        first = torch.searchsorted(mass, wanted)  # the first place where mass >= wanted
        kth = torch.where(has_k, values.gather(1, last), -torch.inf)
        least = torch.where(top_p < 1, values.gather(1, torch.minimum(first, last)), kth)
        return torch.maximum(kth, least), (first < width) | (top_p >= 1)

    # --- after ---

    def _remember(self, ids: torch.Tensor, slots: np.ndarray) -> None:
        """Appends the tokens to the history of those that have penalties."""
        table = self._table
        rows = np.flatnonzero(table.penalised[slots])
        if len(rows):
            places = table.prompt_lens[slots[rows]] + table.sampled[slots[rows]]
            self._reserve(int(places.max()) + 1)
            where = self._to_device(slots[rows].astype(np.int64)), self._to_device(places)
            self._history[where] = (ids if len(rows) == len(slots) else ids[self._to_device(rows)]).int()

    def _reserve(self, width: int) -> None:
        if width <= self._history.shape[1]:
            return
        width = max(width, min(2 * width, self._max_context + 1), 64)
        grown = torch.zeros(len(self._history), width, dtype=torch.int32, device=self.device)
        grown[:, : self._history.shape[1]] = self._history
        self._history = grown

    def _logprobs(self, logits: torch.Tensor, ids: torch.Tensor, slots: np.ndarray) -> Logprobs | None:
        wanted = self._table.logprobs[slots]
        rows = np.flatnonzero(wanted >= 0)
        if not len(rows):
            return None
        most = min(int(wanted.max()), self.vocab_size)
        if self.chooser is not None:
            told = self.chooser.logprobs(logits, ids, rows, most)
            if told is not None:
                return Logprobs(rows, wanted[rows], told)
        packed = []
        for g in self._groups(len(rows)):
            if len(rows) == len(slots):
                packed.append(pack_logprobs(logits[g], ids[g], most))
            else:
                where = self._to_device(rows[g])
                packed.append(pack_logprobs(logits[where], ids[where], most))
        return Logprobs(rows, wanted[rows], packed[0] if len(packed) == 1 else torch.cat(packed))


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
