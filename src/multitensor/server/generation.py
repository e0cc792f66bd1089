"""One HTTP request's prompts through the engine: started together, read as one stream, cancelled together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any

from multitensor.engine.request import CompletionOutput, RequestOutput, SamplingParams
from multitensor.errors import InputError
from multitensor.server.access import Record
from multitensor.server.service import Service

if TYPE_CHECKING:
    from multitensor.engine.grammar import GrammarSpec
    from multitensor.engine.request_stream import RequestStream


class Generation:
    """The engine's requests for `prompts`, one each. Use it as an async context manager: leaving it cancels what is
    not finished. Raises what the engine raises at admission (InputError, Overloaded, RankFailed) on entering, and
    InputError from `run` and `news` for a grammar that became too costly to follow in the midst of a text.

    outputs: the latest of each prompt (None before its first token). told: by index of a choice, the finish reason that
    its reader was given where that is not the engine's.
    """

    def __init__(
        self,
        service: Service,
        record: Record,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        grammar: GrammarSpec | None = None,
    ) -> None:
        self.prompts = prompts
        self.outputs: list[RequestOutput | None] = [None] * len(prompts)
        self.told: dict[int, str] = {}
        self._engine = service.engine
        self.record = record
        self._params = params
        self._grammar = grammar
        self._streams: list[RequestStream] = []

    async def __aenter__(self) -> Generation:
        try:
            for ids in self.prompts:
                self._streams.append(
                    self._engine.generate(
                        ids, self._params, key=self.record.key.name, grammar=self._grammar, group=self
                    )
                )
            for stream in self._streams:
                await stream.admitted()
        except BaseException:
            self.cancel()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()
        answers = [choice for output in self.outputs if output is not None for choice in output.outputs]
        self.record.content["answers"] = [choice.text or list(choice.token_ids) for choice in answers]
        reasons = (self.told.get(index) or choice.finish_reason for index, choice in enumerate(answers))
        self.record.outcome = ", ".join(sorted({reason for reason in reasons if reason}))

    def cancel(self) -> None:
        for stream in self._streams:
            stream.cancel()

    async def run(self) -> list[RequestOutput]:
        """To the end; the last output of each prompt, whose deltas mean nothing then."""
        async for _ in self.news():
            pass
        return [output for output in self.outputs if output is not None]

    async def news(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """(number of the prompt, its output) as they come."""
        if len(self._streams) == 1:
            async for output in self._streams[0]:
                self._note(0, output)
                yield 0, output
            return
        waiting: dict[asyncio.Task[RequestOutput | None], int] = {}

        def ask(number: int) -> None:
            waiting[asyncio.ensure_future(_next(self._streams[number]))] = number

        for number in range(len(self._streams)):
            ask(number)
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    number, news = waiting.pop(task), task.result()
                    if news is not None:
                        self._note(number, news)
                        yield number, news
                        ask(number)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    def _note(self, number: int, output: RequestOutput) -> None:
        self.outputs[number] = output
        now, began = time.perf_counter(), output.metrics.first_token_time if output.metrics is not None else None
        for choice in output.outputs:
            self.record.count_tokens(number, choice.index, len(choice.token_ids), now, began)
        for choice in output.outputs:
            _check_end(choice)

    def usage(self) -> dict[str, Any]:
        """Tokens so far."""
        prompt = sum(map(len, self.prompts))
        completion = self.record.completion_tokens
        found = (output.metrics for output in self.outputs if output is not None)
        cached = sum(metrics.cached_tokens for metrics in found if metrics is not None)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def _check_end(choice: CompletionOutput) -> None:
    """A text that was broken off follows its grammar no further: half of it is an error, not an answer."""
    if choice.finish_reason == "abort" and isinstance(choice.stop_reason, str):
        raise InputError(choice.stop_reason)


async def _next(stream: RequestStream) -> RequestOutput | None:
    return await anext(stream, None)
