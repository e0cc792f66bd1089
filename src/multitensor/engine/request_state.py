"""A request on its way through the engine: tokens in, text, stops, log-probabilities and timings out."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from multitensor.engine.batch import TokenLogprobs
from multitensor.engine.grammar import GrammarTokenizer
from multitensor.engine.request import (
    CompletionOutput,
    Logprob,
    PositionScore,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
)
from multitensor.engine.sequence import Sequence
from multitensor.engine.stop import StopMatcher


class TextStream(Protocol):
    """Token ids in, text out; never half a character."""

    def push(self, token: int) -> str: ...
    def flush(self) -> str: ...


class Tokenizer(GrammarTokenizer, Protocol):
    """What the engine needs of a tokenizer."""

    def stream(self, *, skip_special: bool = True, continuation: bool = False) -> TextStream: ...


class Continuation:
    """One sequence's output as it grows. Without a tokenizer the text stays empty."""

    def __init__(
        self,
        index: int,
        sequence: Sequence,
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        eos_ids: frozenset[int],
    ) -> None:
        self.index = index
        self.sequence = sequence
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._params = params
        self._tokenizer = tokenizer
        self._stop_ids = frozenset(params.stop_ids)
        self._eos_ids = frozenset() if params.ignore_eos else eos_ids
        self._stream = (
            tokenizer.stream(skip_special=params.skip_special_tokens, continuation=True) if tokenizer else None
        )
        self._matcher = StopMatcher(params.stop_strings, params.include_stop_str_in_output)
        self._token_ids: list[int] = []
        self._text: list[str] = []
        self._n_shown = 0  # pieces of text that an output has shown already
        self._cumulative = 0.0
        self._logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []

    def accept(self, token: int, logprobs: TokenLogprobs | None) -> None:
        """One token more; sets finish_reason when it is the last."""
        self._token_ids.append(token)
        if self._logprobs is not None and logprobs is not None:
            self._add_logprobs(token, logprobs)
        enough = len(self._token_ids) >= self._params.min_tokens
        ends = enough and (token in self._eos_ids or token in self._stop_ids)
        if self._stream is not None and (not ends or self._params.include_stop_str_in_output):
            piece = self._stream.push(token)
            self._text.append(self._matcher.push(piece) if enough else self._matcher.skip(piece))
        if self._matcher.matched is not None:
            self.finish_reason, self.stop_reason = "stop", self._matcher.matched
        elif ends:
            self._end("stop", None if token in self._eos_ids else token)
        elif self._followed_grammar(token):
            self.end_with_grammar()
        elif len(self._token_ids) >= self.sequence.limit:
            self._end("length")

    def _followed_grammar(self, token: int) -> bool:
        """Tells the grammar of the token; whether that ends the text."""
        grammar = self.sequence.grammar
        if grammar is None:
            return False
        grammar.accept(token)
        return grammar.finished or grammar.error is not None

    def end_with_grammar(self) -> None:
        """Ends the text if nothing may follow, or if its grammar cannot be followed (stop_reason then says why)."""
        grammar = self.sequence.grammar
        if grammar is not None and grammar.error is not None:
            self._end("abort", grammar.error)
        elif grammar is not None and grammar.finished:
            self._end("stop")

    def abort(self) -> None:
        if self.finish_reason is None:
            self._end("abort")

    def _end(self, reason: str, stop_reason: int | str | None = None) -> None:
        """The text is over: what was held back is shown, unless it completes a stop string."""
        self.finish_reason, self.stop_reason = reason, stop_reason
        if self._stream is not None:
            self._text.append(self._matcher.push(self._stream.flush()))
        if self._matcher.matched is not None:
            self.finish_reason, self.stop_reason = "stop", self._matcher.matched
        self._text.append(self._matcher.flush())

    def _add_logprobs(self, token: int, logprobs: TokenLogprobs) -> None:
        self._cumulative += logprobs.token_logprob
        entry = {token: Logprob(logprobs.token_logprob, logprobs.token_rank, self._decoded(token))}
        for rank, (other, value) in enumerate(zip(logprobs.top_ids, logprobs.top_logprobs, strict=True), start=1):
            entry.setdefault(other, Logprob(value, rank, self._decoded(other)))
        assert self._logprobs is not None
        self._logprobs.append(entry)

    def _decoded(self, token: int) -> str | None:
        return self._tokenizer.token_bytes(token).decode("utf-8", "replace") if self._tokenizer else None

    def output(self) -> CompletionOutput:
        delta = "".join(self._text[self._n_shown :])
        if self._n_shown == 0:
            text = delta
        else:
            text = self._text[0] + delta
        self._text, self._n_shown = [text], 1
        return CompletionOutput(
            index=self.index,
            text=text,
            token_ids=list(self._token_ids),
            cumulative_logprob=None if self._logprobs is None else self._cumulative,
            logprobs=None if self._logprobs is None else list(self._logprobs),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            delta=delta,
        )


class Request:
    """A prompt and its continuations. Made by `Engine.add_request`; `output()` tells how far it is."""

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_ids: list[int],
        continuations: list[Continuation],
        metrics: RequestMetrics,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_ids = prompt_ids
        self.continuations = continuations
        self.metrics = metrics
        self._shown_ids = list(prompt_ids)  # one copy for all outputs: a long prompt's would cost more than its tokens

    @property
    def finished(self) -> bool:
        return all(continuation.finish_reason is not None for continuation in self.continuations)

    def output(self) -> RequestOutput:
        """Everything so far; each continuation's `delta` is what is new since the last call."""
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self._shown_ids,
            outputs=[continuation.output() for continuation in self.continuations],
            finished=self.finished,
            metrics=self.metrics,
        )

    def count_token(self, now: float) -> None:
        """Books a token that arrived at `now` (one clock reading a step)."""
        metrics = self.metrics
        metrics.output_tokens += 1
        if metrics.first_token_time is None:
            metrics.first_token_time = now
        metrics.first_tokens += now == metrics.first_token_time
        metrics.last_token_time = now


class ReadRequest:
    """A text that is only read."""

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence

    @property
    def finished(self) -> bool:
        raise NotImplementedError


class EmbedRequest(ReadRequest):
    """A text to be embedded. Made by `Engine.add_embed`."""

    @property
    def finished(self) -> bool:
        return self.sequence.n_summed == len(self.sequence.prompt_ids)

    def vector(self) -> list[float]:
        """Mean of the last hidden states over all tokens, of length 1; [hidden]."""
        total = np.sum(np.stack(self.sequence.sums).astype(np.float64), axis=0)
        length = float(np.linalg.norm(total))
        values: list[float] = (total / length if length > 0 else total).tolist()
        return values


class ScoreRequest(ReadRequest):
    """A text to be scored. Made by `Engine.add_score`."""

    @property
    def finished(self) -> bool:
        return len(self.sequence.scores) == len(self.sequence.prompt_ids)

    def scores(self) -> list[PositionScore]:
        return [PositionScore(*score) for score in self.sequence.scores]
