"""POST /v1/completions: text or token ids in, text out."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from multitensor.engine.request import CompletionOutput
from multitensor.server.body import read_body
from multitensor.server.errors import bad_request
from multitensor.server.generation import Generation
from multitensor.server.logprobs import TextOffsets, completion_logprobs
from multitensor.server.openapi import json_body
from multitensor.server.sampling import grammar_of, sampling_params
from multitensor.server.schemas import CompletionRequest
from multitensor.server.service import Service, charge, new_id, service_of
from multitensor.server.sse import DONE, EventStream, event, until_hang_up

DEFAULT_TOKENS = 16  # OpenAI's

router = APIRouter(tags=["text"], dependencies=[Depends(charge)])


@router.post("/v1/completions", openapi_extra=json_body(CompletionRequest))
async def completions(request: Request) -> Response:
    """Continue a text. Several prompts, `n`, and `best_of` are answered together; a prompt's answer ends with the
    context at the latest. `echo` repeats the prompt before the answer (not together with `logprobs`)."""
    service = service_of(request)
    body = await read_body(request, CompletionRequest)
    service.check_model(body.model)
    service.check_ready()
    answers = _n_prompts(body.prompt) * max(body.n or 1, body.best_of or 1)
    async with AsyncExitStack() as stack:
        stack.enter_context(service.access.place(request.state.key, answers))
        answer = await service.in_thread(request, _Answer, service, body)
        return await answer.respond(request, stack)


class _Answer:
    """One request's answer. Made in a thread: tokenizing takes time."""

    def __init__(self, service: Service, body: CompletionRequest) -> None:
        self.service = service
        self.body = body
        self.n = body.n or 1
        self.best_of = body.best_of or self.n
        _check(body, self.n, self.best_of)
        self.prompts = prompt_ids(service, body.prompt, "prompt")
        logprobs = body.logprobs if self.best_of == self.n else max(body.logprobs or 0, 0)
        self.params = sampling_params(
            body,
            service.settings,
            max_tokens=body.max_tokens or DEFAULT_TOKENS,
            logprobs=logprobs,
            n=self.best_of,
            prompts=len(self.prompts),
        )
        self.grammar = grammar_of(body)
        if self.grammar is not None:
            service.engine.compile_grammar(self.grammar)
        self.echoes = self._echoes()
        self.offsets: dict[int, TextOffsets] = {}  # by index of the choice
        self.head = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": service.now(),
            "model": service.settings.model_name,
            "system_fingerprint": service.fingerprint,
        }

    def _echoes(self) -> list[str]:
        """What stands before each prompt's answers."""
        if not self.body.echo:
            return [""] * len(self.prompts)
        if isinstance(self.body.prompt, str):
            return [self.body.prompt]
        tokenizer = self.service.engine.tokenizer
        given = self.body.prompt
        return [
            text if isinstance(text, str) else (tokenizer.decode(ids) if tokenizer else "")
            for text, ids in zip(given if len(given) == len(self.prompts) else self.prompts, self.prompts, strict=True)
        ]

    async def respond(self, request: Request, stack: AsyncExitStack) -> Response:
        """stack: left when the answer has ended."""
        record = self.service.record(request, sum(map(len, self.prompts)), {"prompt": self.body.prompt})
        await stack.enter_async_context(self.service.access.admitted(record))
        generation = Generation(self.service, record, self.prompts, self.params, self.grammar)
        if not self.body.stream:

            async def whole() -> dict[str, Any]:
                async with generation:
                    return self._whole(generation, await generation.run())

            answer = await until_hang_up(request, whole())
            return JSONResponse(answer)
        await until_hang_up(request, _enter(stack, generation))
        events = self._events(generation, stack.pop_all())
        return EventStream(events, self.service.settings.ping_seconds)

    def _whole(self, generation: Generation, outputs: Sequence[Any]) -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        for echo, output in zip(self.echoes, outputs, strict=True):
            best = output.outputs
            if self.best_of > self.n:
                best = sorted(best, key=_mean_logprob, reverse=True)[: self.n]
            for choice in best:
                choices.append(self._choice(len(choices), echo + choice.text, choice, 0, choice.finish_reason))
        return {**self.head, "choices": choices, "usage": generation.usage()}

    def _choice(
        self, index: int, text: str, choice: CompletionOutput, first: int, reason: str | None
    ) -> dict[str, Any]:
        """first: tokens whose log-probabilities were sent before."""
        logprobs = None
        if self.body.logprobs is not None and choice.logprobs is not None:
            tokenizer = self.service.engine.tokenizer
            ids, positions = choice.token_ids[first:], choice.logprobs[first:]
            if index not in self.offsets:
                self.offsets[index] = TextOffsets(tokenizer, skip_special=self.params.skip_special_tokens)
            logprobs = completion_logprobs(tokenizer, ids, positions, self.body.logprobs, self.offsets[index])
        found = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        if self.service.engine.tokenizer is None:
            found["token_ids"] = choice.token_ids[first:]
        return found

    async def _events(self, generation: Generation, stack: AsyncExitStack) -> AsyncGenerator[bytes, None]:
        wants_usage = self.body.stream_options is not None and bool(self.body.stream_options.include_usage)
        extra = {"usage": None} if wants_usage else {}
        sent: dict[int, int] = {}  # index of the choice -> tokens sent; -1: it has ended
        async with stack:
            async for number, output in generation.news():
                for choice in output.outputs:
                    index = number * self.n + choice.index
                    first = sent.get(index, 0)
                    if first < 0 or (len(choice.token_ids) == first and choice.finish_reason is None):
                        continue
                    text = choice.delta if index in sent else self.echoes[number] + choice.delta
                    found = self._choice(index, text, choice, first, choice.finish_reason)
                    sent[index] = len(choice.token_ids) if choice.finish_reason is None else -1
                    yield event({**self.head, "choices": [found], **extra})
            if wants_usage:
                yield event({**self.head, "choices": [], "usage": generation.usage()})
            yield DONE


async def _enter(stack: AsyncExitStack, generation: Generation) -> None:
    await stack.enter_async_context(generation)


def _check(body: CompletionRequest, n: int, best_of: int) -> None:
    if best_of < n:
        raise bad_request(f"best_of {best_of} is below n {n}", "best_of")
    if best_of > n and body.stream:
        raise bad_request("best_of above n cannot be streamed: the best is known at the end", "best_of")
    if body.echo and body.logprobs is not None:
        raise bad_request("echo together with logprobs is not supported: prompts are not scored", "echo")


def _mean_logprob(choice: CompletionOutput) -> float:
    total = choice.cumulative_logprob
    return -math.inf if total is None else total / max(len(choice.token_ids), 1)


def _n_prompts(given: str | Sequence[Any]) -> int:
    return 1 if isinstance(given, str) or isinstance(given[0], int) else len(given)


def prompt_ids(service: Service, given: str | Sequence[Any], param: str) -> list[list[int]]:
    """Token ids of each prompt: of a text, of token ids, or of a list of either. Raises ApiError and InputError."""
    prompts: list[list[int]]

    def ids_of(item: str | Sequence[int]) -> list[int]:
        if not isinstance(item, str):
            return list(item)
        service.check_size(1, len(item), param)
        return service.text_ids(item)

    if isinstance(given, str):
        prompts = [ids_of(given)]
    elif given and isinstance(given[0], int):
        prompts = [[*given]]
    else:
        prompts = [ids_of(item) for item in given]
    for ids in prompts:
        if not ids:
            raise bad_request("the prompt is empty, and this model has no token to begin a text with", param)
        service.check_length(ids, param)
    return prompts
