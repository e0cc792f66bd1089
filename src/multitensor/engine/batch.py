"""One step, as it travels from the engine to the ranks and back: plain numpy, picklable, no torch.

THE DATA CLASSES BELOW ARE FIXED (other parts are written against them).
A flat batch mixes prefill and decode: sequence s has query_lens[s] tokens, which follow context_lens[s] tokens that are
in the cache already. A token id of -1 means "the token that this slot sampled last", which the engine does not know
yet, because it reads results one step late; the rank takes it from its own memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class SamplingSetup:
    """Sent when a sequence takes a slot: once, unless it gave its slot to another key's and takes one again. Penalties
    look at prompt_ids, output_ids and what the slot sampled since."""

    slot: int
    temperature: float
    top_k: int  # 0: off
    top_p: float
    min_p: float
    repetition_penalty: float  # prompt and output
    presence_penalty: float  # output only
    frequency_penalty: float  # output only
    logit_bias: dict[int, float]
    logprobs: int  # -1: none; k: log-probabilities of the chosen token and the top k
    prompt_ids: np.ndarray  # int32; empty when no penalty needs it
    min_tokens: int = 0  # suppress_ids cannot be sampled before the slot has sampled so many
    suppress_ids: tuple[int, ...] = ()
    output_ids: tuple[int, ...] = ()  # what the sequence sampled already, in a slot that it held before


@dataclass(frozen=True)
class StepInput:
    """S sequences, T = sum(query_lens) tokens.

    slots int32 [S]; query_lens int32 [S]; context_lens int32 [S]; token_ids int32 [T];
    block_tables int32 [S, B] (physical block of each logical block, 0 past the end);
    sample bool [S]: this sequence's last token yields a new token;
    uniforms float64 [S]: in [0, 1), the sequence's random number for this step, keyed by (seed, position);
    score_top int32 [S]: k >= 1: log-probabilities at each of its query positions (k best, and of the id that
    follows, from score_next int32 [T], -1 for none); 0: none.
    masks: sequence number -> uint32 [vocabulary / 32 rounded up], for sequences with a grammar that sample: only tokens
    whose bit is set (bit i of word w: token 32 w + i) may be sampled.
    late_masks: numbers of the sequences whose grammar's mask depends on a token under way. If there are any, StepMasks
    of this step follow, before any other message but the last; its forward pass need not wait for them.
    pooled: numbers of the sequences whose hidden states are wanted, summed over their query positions.
    """

    step: int
    slots: np.ndarray
    query_lens: np.ndarray
    context_lens: np.ndarray
    token_ids: np.ndarray
    block_tables: np.ndarray
    sample: np.ndarray
    uniforms: np.ndarray
    score_top: np.ndarray
    score_next: np.ndarray
    setups: tuple[SamplingSetup, ...] = ()
    masks: dict[int, np.ndarray] = field(default_factory=dict)
    pooled: tuple[int, ...] = ()
    late_masks: tuple[int, ...] = ()


@dataclass(frozen=True)
class StepMasks:
    """What grammars allow in a step that was submitted before it was known. masks: as in StepInput, of those of its
    `late_masks` whose token is still wanted; what the others sample is dropped, so anything may come there."""

    step: int
    masks: dict[int, np.ndarray]


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of softmax(logits) of the model, before temperature and penalties... as vLLM's raw mode."""

    token_logprob: float
    top_ids: list[int]
    top_logprobs: list[float]
    token_rank: int | None = None  # 1: the likeliest


@dataclass(frozen=True)
class StepOutput:
    """token_ids int32 [S]: -1 where nothing was sampled. logprobs: by sequence number in the step.
    scores: sequence number -> one (top_ids, top_logprobs, next_logprob or None) a query position.
    sums: sequence number -> float32 [hidden], the sum of the last hidden states (after the last norm) over its query
    positions."""

    step: int
    token_ids: np.ndarray
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    scores: dict[int, list[tuple[list[int], list[float], float | None]]] = field(default_factory=dict)
    sums: dict[int, np.ndarray] = field(default_factory=dict)
