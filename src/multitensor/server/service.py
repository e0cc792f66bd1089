"""What all routes share: the engine, the settings, and prompts made beside the event loop."""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request

from multitensor.server.access import Access, Record
from multitensor.server.auth import Key
from multitensor.server.errors import ApiError, bad_request
from multitensor.server.metrics import Metrics
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
        # Tokenizing and templates take milliseconds to seconds: never in the event loop, where all answers flow.
        self._pool = ThreadPoolExecutor(PROMPT_THREADS, thread_name_prefix="prompt")

    async def finish(self) -> None:
        """Answers that were cut off get a moment to write down how they ended; then everything is closed."""
        deadline = time.monotonic() + FINISH_SECONDS
        while self.access.streams.active and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.access.close()

    def record(self, request: Request, prompt_tokens: int, content: dict[str, Any] | None = None) -> Record:
        """Of a request whose caller is known (see `authorise`)."""
        key: Key = request.state.key
        return Record(
            key, request.url.path, self.settings.model_name, prompt_tokens, content or {}, metrics=self.metrics
        )

    async def in_thread(self, work: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)

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
        context = self.engine.context
        limit = min(context, self.settings.max_prompt_tokens or context)
        if len(ids) + 1 > context or len(ids) > limit:
            message = (
                f"this model's context is {context} tokens" if limit == context else f"prompts may have {limit} tokens"
            )
            raise bad_request(f"{message}, but the prompt has {len(ids)}; shorten it", param, "context_length_exceeded")


def service_of(request: Request) -> Service:
    return request.app.state.service


def authorise(request: Request) -> None:
    """Dependency of every route that is not for everybody: sets request.state.key. Raises ApiError 401, 403."""
    access = service_of(request).access
    access.check_origin(request)
    request.state.key = access.authenticate(request)


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"
