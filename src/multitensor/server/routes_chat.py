"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from multitensor.engine.request import CompletionOutput, RequestOutput
from multitensor.server.body import read_body
from multitensor.server.chat_output import ChatChoice, Delta, whole_message
from multitensor.server.chat_prompt import ChatPrompt
from multitensor.server.errors import bad_request
from multitensor.server.generation import Generation
from multitensor.server.logprobs import chat_logprobs
from multitensor.server.openapi import json_body
from multitensor.server.sampling import sampling_params
from multitensor.server.schemas import ChatRequest
from multitensor.server.service import Service, charge, new_id, service_of
from multitensor.server.sse import DONE, EventStream, event, until_hang_up

router = APIRouter(tags=["chat"], dependencies=[Depends(charge)])


@router.post("/v1/chat/completions", openapi_extra=json_body(ChatRequest))
async def chat(request: Request) -> Response:
    """Answer a conversation. `max_completion_tokens` (or `max_tokens`) bounds the answer, which ends with the
    context at the latest. Extensions: top_k, min_p, repetition_penalty, min_tokens, stop_token_ids, ignore_eos,
    grammar, chat_template_kwargs."""
    service = service_of(request)
    body = await read_body(request, ChatRequest)
    service.check_model(body.model)
    service.check_ready()
    async with AsyncExitStack() as stack:
        stack.enter_context(service.access.place(request.state.key, body.n or 1))
        answer = await service.in_thread(request, _Answer, service, body)
        return await answer.respond(request, stack)


class _Answer:
    """One request's answer. Made in a thread: templates and tokenizing take time."""

    def __init__(self, service: Service, body: ChatRequest) -> None:
        self.service = service
        self.body = body
        self.top = _top_logprobs(body)
        self.params = sampling_params(body, service.settings, max_tokens=_max_tokens(body), logprobs=self.top)
        self.prompt = ChatPrompt(service, body)
        self.choices = [ChatChoice(index, self.prompt.parser()) for index in range(self.params.n)]
        self.head = {
            "id": new_id("chatcmpl"),
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": service.now(),
            "model": service.settings.model_name,
            "system_fingerprint": service.fingerprint,
        }
        if body.service_tier is not None:
            self.head["service_tier"] = "default"

    async def respond(self, request: Request, stack: AsyncExitStack) -> Response:
        """stack: left when the answer has ended."""
        content = {"messages": self.prompt.messages, "user": self.body.user or self.body.safety_identifier}
        record = self.service.record(request, len(self.prompt.ids), content)
        await stack.enter_async_context(self.service.access.admitted(record))
        generation = Generation(
            self.service, record, [self.prompt.ids], self.prompt.params(self.params), self.prompt.grammar
        )
        if not self.body.stream:

            async def whole() -> dict[str, Any]:
                async with generation:
                    return await self._whole(generation)

            answer = await until_hang_up(request, whole())
            return JSONResponse(answer)
        await until_hang_up(request, _enter(stack, generation))
        events = self._events(generation, stack.pop_all())
        return EventStream(events, self.service.settings.ping_seconds)

    async def _whole(self, generation: Generation) -> dict[str, Any]:
        deltas: list[list[Delta]] = [[] for _ in self.choices]
        reasons: list[str | None] = [None] * len(self.choices)
        last: RequestOutput | None = None
        async for _, last in generation.news():
            for choice, output in self._news(last):
                new, reason = self._take(generation, choice, output)
                deltas[choice.index] += new
                reasons[choice.index] = reason
        assert last is not None
        choices = [
            {
                "index": choice.index,
                "message": whole_message(deltas[choice.index]),
                "logprobs": self._logprobs(choice, output),
                "finish_reason": reasons[choice.index],
            }
            for choice, output in zip(self.choices, last.outputs, strict=True)
        ]
        return {**self.head, "choices": choices, "usage": generation.usage()}

    def _take(
        self, generation: Generation, choice: ChatChoice, output: CompletionOutput
    ) -> tuple[list[Delta], str | None]:
        deltas, reason = choice.take(output)
        if reason is not None:
            generation.told[choice.index] = reason
        return deltas, reason

    def _news(self, output: RequestOutput) -> list[tuple[ChatChoice, CompletionOutput]]:
        pairs = zip(self.choices, output.outputs, strict=True)
        return [(choice, found) for choice, found in pairs if not choice.ended]

    def _logprobs(self, choice: ChatChoice, output: CompletionOutput) -> dict[str, Any] | None:
        """Of the tokens that are new since the last call."""
        first, choice.n_tokens = choice.n_tokens, len(output.token_ids)
        if self.top is None or output.logprobs is None or first == choice.n_tokens:
            return None
        tokenizer = self.service.engine.tokenizer
        return chat_logprobs(tokenizer, output.token_ids[first:], output.logprobs[first:], self.top)

    async def _events(self, generation: Generation, stack: AsyncExitStack) -> AsyncGenerator[bytes, None]:
        wants_usage = self.body.stream_options is not None and bool(self.body.stream_options.include_usage)
        extra = {"usage": None} if wants_usage else {}

        def chunk(index: int, delta: Delta, logprobs: Any = None, reason: str | None = None) -> bytes:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            return event({**self.head, "choices": [choice], **extra})

        async with stack:
            for choice in self.choices:
                yield chunk(choice.index, {"role": "assistant", "content": ""})
            async for _, output in generation.news():
                for choice, found in self._news(output):
                    deltas, reason = self._take(generation, choice, found)
                    logprobs = self._logprobs(choice, found)
                    if logprobs is not None and not deltas:
                        deltas = [{"content": ""}]
                    for delta in deltas:
                        yield chunk(choice.index, delta, logprobs)
                        logprobs = None
                    if reason is not None:
                        yield chunk(choice.index, {}, None, reason)
            if wants_usage:
                yield event({**self.head, "choices": [], "usage": generation.usage()})
            yield DONE


async def _enter(stack: AsyncExitStack, generation: Generation) -> None:
    await stack.enter_async_context(generation)


def _top_logprobs(body: ChatRequest) -> int | None:
    if not body.logprobs:
        if body.top_logprobs is not None:
            raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
        return None
    return body.top_logprobs or 0


def _max_tokens(body: ChatRequest) -> int | None:
    """Both names mean the same; None is "to the end of the context"."""
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise bad_request(f"max_tokens {old} and max_completion_tokens {new} are two names of one limit", "max_tokens")
    return new if new is not None else old
