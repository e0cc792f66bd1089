"""Requests in, tokens out: the loop that keeps the ranks busy one step ahead of the results (never imports torch)."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np

from multitensor.config import EngineConfig
from multitensor.engine.batch import SamplingSetup, StepInput, StepOutput
from multitensor.engine.executor import Executor
from multitensor.engine.grammar import GrammarCompiler, GrammarSpec, GrammarState
from multitensor.engine.request import RequestMetrics, SamplingParams
from multitensor.engine.request_state import (
    Continuation,
    EmbedRequest,
    ReadRequest,
    Request,
    ScoreRequest,
    Tokenizer,
)
from multitensor.engine.scheduler import Scheduler
from multitensor.engine.sequence import Sequence
from multitensor.engine.statistics import EngineLoad, EngineStats
from multitensor.engine.uniforms import derive_seed
from multitensor.errors import InputError, RankFailed
from multitensor.sharding.plan import Plan

_READING = SamplingParams(temperature=0.0)


class Engine:
    """Drives an executor whose ranks are ready. Not for several threads at once.

    Every method that talks to the ranks raises RankFailed when one is lost; so does every later call.
    """

    def __init__(
        self, executor: Executor, plan: Plan, config: EngineConfig, tokenizer: Tokenizer | None = None
    ) -> None:
        self.plan = plan
        self.config = config
        self.tokenizer = tokenizer
        self.stats = EngineStats()
        n_blocks = plan.kv_tokens // plan.block_size
        self.context = min(plan.context, n_blocks * plan.block_size)
        self._scheduler = Scheduler(
            max_batch_tokens=config.max_batch_tokens,
            mixed_batch_tokens=config.mixed_batch_tokens,
            max_num_seqs=config.max_num_seqs,
            n_blocks=n_blocks,
            block_size=plan.block_size,
        )
        self._executor = executor
        self._seed = config.seed
        # A vocabulary may name more tokens than the model has rows for; no step can yield those.
        ends = tokenizer.eos_ids if tokenizer else ()
        self._eos_ids = frozenset(token for token in ends if token < plan.spec.vocab_size)
        self._grammars = GrammarCompiler(tokenizer, plan.spec.vocab_size) if tokenizer else None
        self._owners: dict[Sequence, tuple[Request, Continuation] | ReadRequest] = {}
        self._requests: dict[str, Request] = {}
        self._n_requests = 0
        self._submitted: list[tuple[StepInput, float]] = []
        self._untold: dict[Request | ReadRequest, None] = {}  # news that came while a call waited for its turn
        self._last_result = 0.0
        self._failure: RankFailed | None = None

    # --- requests ---

    def check_prompt(self, prompt_ids: SequenceOf[int], *, room: int = 1) -> list[int]:
        """The ids as a list; InputError unless they are ids of the vocabulary that leave room for `room` tokens."""
        ids = [int(token) for token in prompt_ids]
        vocab_size = self.plan.spec.vocab_size
        if not ids:
            raise InputError("the prompt is empty; give it at least one token")
        wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise InputError(f"token id {wrong} is not in the vocabulary of {vocab_size} ids")
        if len(ids) > self.context:
            raise InputError(
                f"the prompt has {len(ids)} tokens, the context {self.context}; shorten it or take a larger context"
            )
        if len(ids) + room > self.context:
            raise InputError(
                f"the prompt has {len(ids)} tokens and fills the context of {self.context}: no room for an answer; "
                "shorten it or take a larger context"
            )
        return ids

    def check_params(self, params: SamplingParams) -> None:
        """InputError where params are wrong, or do not suit the model at hand."""
        params.validate()
        vocab_size = self.plan.spec.vocab_size
        for name, ids in (("stop_token_ids", params.stop_ids), ("logit_bias", tuple(params.logit_bias or ()))):
            wrong = next((token for token in ids if token >= vocab_size), None)
            if wrong is not None:
                raise InputError(f"{name}: token id {wrong} is not in the vocabulary of {vocab_size} ids")
        if params.structured_outputs is not None:
            self.compile_grammar(params.structured_outputs.grammar_spec)
        if params.stop_strings and self.tokenizer is None:
            raise InputError("stop strings need a vocabulary, which this model file lacks; use stop_token_ids")

    def add_request(
        self,
        prompt_ids: SequenceOf[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        request_id: str | None = None,
        key: str = "",
        grammar: GrammarSpec | None = None,
    ) -> Request:
        """Queues a prompt. key: whose request it is; keys take turns. grammar: what the text must follow, instead of
        params.structured_outputs. Raises InputError, or the RankFailed of earlier."""
        self._raise_failure()
        ids = self.check_prompt(prompt_ids)
        self.check_params(params)
        if params.structured_outputs is not None:
            if grammar is not None:
                raise InputError("structured_outputs and grammar both shape the text; give one of them")
            grammar = params.structured_outputs.grammar_spec
        number = self._n_requests
        request_id = str(number) if request_id is None else request_id
        if request_id in self._requests:
            raise InputError(f"request id {request_id!r} is in use")
        if grammar is not None:
            self.compile_grammar(grammar)
        self._n_requests += 1
        seed = derive_seed(0, params.seed) if params.seed is not None else derive_seed(1, self._seed, number)
        room = self.context - len(ids)
        limit = room if params.max_tokens is None else min(params.max_tokens, room)
        setup = self._setup(ids, params)
        states = [self._follow(grammar, params, setup) for _ in range(params.n)]
        continuations = [
            Continuation(
                index,
                Sequence(
                    ids,
                    limit,
                    setup,
                    derive_seed(seed, index),
                    key=key,
                    salt=self._salt(key),
                    grammar=states[index],
                ),
                params,
                self.tokenizer,
                self._eos_ids,
            )
            for index in range(params.n)
        ]
        metrics = RequestMetrics(arrival_time=time.perf_counter(), prompt_tokens=len(ids))
        request = Request(request_id, prompt, ids, continuations, metrics)
        self._requests[request_id] = request
        for continuation in continuations:
            self._owners[continuation.sequence] = (request, continuation)
            self._scheduler.add(continuation.sequence)
        return request

    def add_score(self, ids: SequenceOf[int], top: int) -> ScoreRequest:
        """Queues a text of which every position is scored: the `top` best ids, and the id that follows."""
        self._raise_failure()
        checked = self.check_prompt(ids, room=0)
        vocab_size = self.plan.spec.vocab_size
        if not 1 <= top <= vocab_size:
            raise InputError(f"top must be between 1 and the vocabulary's {vocab_size}, not {top}")
        request = ScoreRequest(Sequence(checked, 0, self._setup(checked, _READING), score_top=top))
        self._add_read(request)
        return request

    def add_embed(self, ids: SequenceOf[int], *, key: str = "") -> EmbedRequest:
        """Queues a text of which one vector is wanted. key: whose it is; keys take turns."""
        self._raise_failure()
        checked = self.check_prompt(ids, room=0)
        request = EmbedRequest(Sequence(checked, 0, self._setup(checked, _READING), pooled=True, key=key))
        self._add_read(request)
        return request

    def _add_read(self, request: ReadRequest) -> None:
        self._owners[request.sequence] = request
        self._scheduler.add(request.sequence)

    def _salt(self, key: str) -> bytes | None:
        """Which requests may share what they have computed of their beginnings."""
        if self.config.prefix_cache == "off":
            return None
        return key.encode() if self.config.prefix_cache == "key" else b""

    def compile_grammar(self, spec: GrammarSpec) -> None:
        """Checks a grammar and keeps it, so that a request with it starts quickly; for any thread. Raises
        InputError."""
        if self._grammars is None:
            raise InputError("grammars need a vocabulary, which this model file lacks")
        self._grammars.compile(spec)

    def _follow(self, spec: GrammarSpec | None, params: SamplingParams, setup: SamplingSetup) -> GrammarState | None:
        if spec is None or self._grammars is None:
            return None
        barred = self._eos_ids if params.ignore_eos else ()
        return self._grammars.start(spec, barred=barred, early=setup.suppress_ids, min_tokens=params.min_tokens)

    def _setup(self, ids: list[int], params: SamplingParams) -> SamplingSetup:
        suppress = set(params.stop_ids) | (set() if params.ignore_eos else set(self._eos_ids))
        return SamplingSetup(
            slot=-1,
            temperature=0.0 if params.greedy else float(params.temperature),
            top_k=max(params.top_k, 0),
            top_p=float(params.top_p),
            min_p=float(params.min_p),
            repetition_penalty=float(params.repetition_penalty),
            presence_penalty=float(params.presence_penalty),
            frequency_penalty=float(params.frequency_penalty),
            logit_bias={int(token): float(bias) for token, bias in (params.logit_bias or {}).items()},
            logprobs=-1 if params.logprobs is None else params.logprobs,
            prompt_ids=np.array(ids if params.repetition_penalty != 1.0 else [], np.int32),
            min_tokens=params.min_tokens,
            suppress_ids=tuple(sorted(suppress)) if params.min_tokens > 0 else (),
        )

    def cancel(self, request: Request | ReadRequest) -> None:
        """Ends it now; what is under way for it is dropped when it arrives. Does nothing to a finished one."""
        if isinstance(request, ReadRequest):
            self._drop(request.sequence)
            return
        for continuation in request.continuations:
            continuation.abort()
            self._drop(continuation.sequence)
        self._close_request(request, time.perf_counter())

    def _drop(self, sequence: Sequence) -> None:
        self._scheduler.finish(sequence)
        self._owners.pop(sequence, None)

    def _close_request(self, request: Request, now: float) -> None:
        if self._requests.pop(request.request_id, None) is not None:
            request.metrics.finished_time = now

    # --- the loop ---

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do for a request, or to tell."""
        return self._scheduler.has_unfinished or bool(self._untold)

    @property
    def is_busy(self) -> bool:
        """The same, or a step is under way that was begun ahead for texts that have ended since: `step` collects it,
        and until then their blocks are in use."""
        return self.has_unfinished or bool(self._submitted)

    def load(self) -> EngineLoad:
        """How much is under way; may be asked from any thread."""
        scheduler, blocks = self._scheduler, self._scheduler.blocks
        used = blocks.n_blocks - blocks.n_free
        size = blocks.block_size
        return EngineLoad(
            len(scheduler.running), len(scheduler.waiting), used * size, blocks.n_cached * size, blocks.n_blocks * size
        )

    def step(self) -> list[Request | ReadRequest]:
        """Submits the next step, then waits for the one before it. Returns the requests that have news; an empty
        list when a step was only submitted."""
        self._raise_failure()
        if self._untold:
            told, self._untold = list(self._untold), {}
            return told
        try:
            step = self._scheduler.schedule()
            self.stats.preemptions = self._scheduler.preemptions
            self.stats.prefix_queries = self._scheduler.prefix_queries
            self.stats.prefix_hits = self._scheduler.prefix_hits
            if step is not None:
                self._submit(step)
                if len(self._submitted) == 1:
                    return []
            if not self._submitted:
                if self.has_unfinished:
                    raise RuntimeError("nothing can be scheduled though requests wait: a fault of the scheduler")
                return []
            return self._collect()
        except RankFailed as failure:
            self._failure = failure
            raise

    def run(
        self, requests: SequenceOf[Request | ReadRequest], progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Steps until all of these are finished; cancels what is not when it is interrupted.
        progress: called with how many are finished, of how many, when that changes."""
        unfinished = {request for request in requests if not request.finished}
        try:
            while unfinished:
                done = {request for request in self.step() if request.finished} & unfinished
                unfinished -= done
                if progress is not None and done:
                    progress(len(requests) - len(unfinished), len(requests))
        finally:
            for request in unfinished:
                self.cancel(request)

    def call(self, method: str, **arguments: Any) -> list[Any]:
        """Runs a method of every rank's ModelRunner between steps; the results in rank order."""
        self._raise_failure()
        try:
            while self._submitted:
                self._untold |= dict.fromkeys(self._collect())
            return self._executor.call(method, **arguments)
        except RankFailed as failure:
            self._failure = failure
            raise

    def check(self) -> None:
        """Raises RankFailed when a rank has been lost, also while nothing runs."""
        self._raise_failure()
        try:
            self._executor.check()
        except RankFailed as failure:
            self._failure = failure
            raise

    def close(self) -> None:
        """Ends the ranks. Requests under way are lost."""
        self._executor.close()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise RankFailed(str(self._failure))

    def _submit(self, step: StepInput) -> None:
        now = time.perf_counter()
        self._executor.submit(step)
        self._submitted.append((step, now))
        for sequence in self._scheduler.started:
            owner = self._owners[sequence]
            if isinstance(owner, tuple) and owner[0].metrics.first_scheduled_time is None:
                owner[0].metrics.first_scheduled_time = now
                owner[0].metrics.cached_tokens = sequence.cached

    def _collect(self) -> list[Request | ReadRequest]:
        output = self._executor.collect()
        now = time.perf_counter()
        self._count(*self._submitted.pop(0), now)
        news = self._deliver(output, now)
        masks = self._scheduler.late_masks()
        if masks is not None:
            self._executor.send_masks(masks)
        return news

    def _deliver(self, output: StepOutput, now: float) -> list[Request | ReadRequest]:
        news: dict[Request | ReadRequest, None] = {}
        following: dict[GrammarState, tuple[Request, Continuation]] = {}
        for update in self._scheduler.collect(output):
            owner = self._owners[update.sequence]
            if isinstance(owner, ReadRequest):
                if owner.finished:
                    self._drop(owner.sequence)
                news[owner] = None
                continue
            request, continuation = owner
            assert update.token is not None
            continuation.accept(update.token, update.logprobs)
            request.count_token(now)
            self.stats.generated_tokens += 1
            news[request] = None
            if continuation.finish_reason is None and update.sequence.grammar is not None:
                following[update.sequence.grammar] = request, continuation
            self._close_ended(request, continuation, now)
        if self._grammars is not None and following:
            self._grammars.fill_masks(list(following))
            for request, continuation in following.values():
                continuation.end_with_grammar()
                self._close_ended(request, continuation, now)
        return list(news)

    def _close_ended(self, request: Request, continuation: Continuation, now: float) -> None:
        if continuation.finish_reason is not None:
            self._drop(continuation.sequence)
            if request.finished:
                self._close_request(request, now)

    def _count(self, step: StepInput, submitted: float, now: float) -> None:
        seconds = now - max(submitted, self._last_result)
        self._last_result = now
        stats = self.stats
        stats.steps += 1
        stats.rank_seconds = self._executor.rank_seconds()
        tokens = int(step.query_lens.sum())
        # A lone token that samples is decode, unless it is all of a one-token prompt.
        decodes = int(((step.query_lens == 1) & step.sample & (step.context_lens > 0)).sum())
        if decodes == tokens:
            stats.decode_tokens += tokens
            stats.decode_seconds += seconds
        else:
            stats.prefill_tokens += tokens - decodes
            stats.prefill_seconds += seconds
