"""What all routes share: the engine, the settings, and prompts made beside the event loop."""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Depends, Request

from multitensor.server.access import Access, Record
from multitensor.server.auth import Key
from multitensor.server.errors import ApiError, bad_request
from multitensor.server.metrics import Metrics
from multitensor.server.prompt_threads import PromptThreads
from multitensor.server.settings import ServerSettings

if TYPE_CHECKING:
    from multitensor.engine.async_engine import AsyncEngine
    from multitensor.formats.tokenizer import Tokenizer

Result = TypeVar("Result")

PROMPT_THREADS = 4
FINISH_SECONDS = 2.0


class Service:
    """One engine and what the routes need around it. Made by `create_app`, found by `service_of`."""

    def __init__(self, engine: AsyncEngine, settings: ServerSettings) -> None:
        self.engine = engine
        self.settings = settings
        self.metrics = Metrics(engine)
        self.access = Access(settings, self.metrics)
        self.created = int(time.time())
        self._threads = PromptThreads(PROMPT_THREADS)
        # A lane of their own, one at a time: checking one holds up every thread of this process meanwhile.
        self._large_bodies = PromptThreads(1)

    async def finish(self) -> None:
        """Answers that were cut off get a moment to write down how they ended; then everything is closed."""
        deadline = time.monotonic() + FINISH_SECONDS
        while self.access.streams.active and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        self._threads.close()
        self._large_bodies.close()
        self.access.close()

    def record(self, request: Request, prompt_tokens: int, content: dict[str, Any] | None = None) -> Record:
        """Of a request whose caller is known (see `authorise`)."""
        return Record(
            request.state.key,
            request.url.path,
            self.settings.model_name,
            prompt_tokens,
            content or {},
            started=request.state.arrived,
            metrics=self.metrics,
        )

    async def in_thread(self, request: Request, work: Callable[..., Result], *arguments: Any) -> Result:
        """Beside the event loop; keys take turns."""
        key: Key = request.state.key
        return await self._threads.run(key.name, work, *arguments)

    async def check_large(self, request: Request, check: Callable[[bytes], Result], body: bytes) -> Result:
        """The same for a body that takes its time to be checked; who sends small ones does not wait behind it."""
        key: Key = request.state.key
        return await self._large_bodies.run(key.name, check, body)

    def now(self) -> int:
        return int(time.time())

    # --- the model ---

    def check_model(self, name: str | None) -> None:
        """404 for a model that is not served. No name means the one that is."""
        served = (self.settings.model_name, *self.settings.aliases)
        if name is not None and name not in served:
            message = f"the model {name[:100]!r} is not served here; this server has {', '.join(served)}"
            raise ApiError(404, message, param="model", code="model_not_found", type="invalid_request_error")

    def check_ready(self) -> None:
        """503 while there is no engine to ask (its properties cannot be read before it has been started)."""
        if not self.engine.ready:
            message = "the model is not ready; see /ready"
            raise ApiError(503, message, code="not_ready", headers={"Retry-After": "5"})

    def need_tokenizer(self) -> Tokenizer:
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            raise bad_request(
                "the model's files carry no vocabulary: give token ids to /v1/completions instead of text"
            )
        return tokenizer

    @property
    def fingerprint(self) -> str:
        """Changes when the same seed may say something else: another model, cut, type or version."""
        from multitensor import __version__

        plan, config = self.engine.plan, self.engine.config
        facts = (
            __version__,
            self.settings.model_name,
            self.settings.model_digest,
            plan.dtype,
            plan.kv_type,
            config.exact,
            [(rank.device.name, *rank.query_heads, *rank.ffn) for rank in plan.ranks],
        )
        return "fp_" + hashlib.sha256(repr(facts).encode()).hexdigest()[:12]

    # --- prompts ---

    def text_ids(self, text: str) -> list[int]:
        """A text prompt's ids, with BOS where the model wants one; a text that spells BOS itself gets no second one."""
        tokenizer = self.need_tokenizer()
        if tokenizer.add_bos and tokenizer.bos_id is not None:
            text = text.removeprefix(tokenizer.token_text(tokenizer.bos_id) or "\0")
        return tokenizer.encode(text, bos=True)

    def check_length(self, ids: list[int], param: str) -> None:
        """OpenAI's code for a prompt that leaves no room, before the engine would refuse it."""
        if len(ids) > self._prompt_limit or len(ids) + 1 > self.engine.context:
            raise self._too_long(f"{len(ids)}", param)

    def check_size(self, messages: int, characters: int, param: str) -> None:
        """The same for what must be too long however it is rendered and tokenized, before anybody takes that trouble: a
        message is one token at least, and a token has so many characters at most."""
        limit = self._prompt_limit
        if messages > limit:
            raise self._too_long(f"{messages} messages", param)
        if characters > 4 * limit and characters > limit * self._longest_token:
            raise self._too_long(f"{characters} characters", param)

    @property
    def _prompt_limit(self) -> int:
        return min(self.engine.context, self.settings.max_prompt_tokens or self.engine.context)

    @cached_property
    def _longest_token(self) -> int:
        """In bytes, which characters are not more than."""
        tokenizer = self.need_tokenizer()
        return max(len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size))

    def _too_long(self, size: str, param: str) -> ApiError:
        context, limit = self.engine.context, self._prompt_limit
        bound = f"this model's context is {context} tokens" if limit == context else f"prompts may have {limit} tokens"
        return bad_request(f"{bound}, but the prompt has {size}; shorten it", param, "context_length_exceeded")


def service_of(request: Request) -> Service:
    return request.app.state.service


def authorise(request: Request) -> None:
    """Dependency of every route that is not for everybody: sets request.state.key and, as the clock of its latencies,
    .arrived. Raises ApiError 401, 403."""
    request.state.arrived = time.perf_counter()
    access = service_of(request).access
    access.check_origin(request)
    request.state.key = access.authenticate(request)


async def charge(request: Request, _: None = Depends(authorise)) -> AsyncGenerator[None, None]:
    """Dependency of every route that works for its caller, before the body is looked at. Raises ApiError 401, 403 and
    429."""
    with service_of(request).access.charged(request.state.key):
        yield


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"
