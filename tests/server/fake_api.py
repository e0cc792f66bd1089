"""The chat page over an API that answers as a test tells it to."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from multitensor.server.pages import page_router

GIB = 1 << 30


def _device(rank: int, share: float, description: str, capacity: int) -> dict[str, Any]:
    weights = int(40 * GIB * share)
    kv, buffers = int(9 * GIB * share), int(1.4 * GIB)
    return {
        "rank": rank,
        "name": f"cuda:{rank}",
        "description": description,
        "share": share,
        "weights_bytes": weights,
        "kv_bytes": kv,
        "buffers_bytes": buffers,
        "held_bytes": weights + kv + buffers,
        "capacity_bytes": capacity,
        "measured": {},
        "query_heads": [0, 32],
        "compute_seconds": 10.0 + time.monotonic() * (0.9 - 0.1 * rank),
        "reduction_seconds": 1.0 + time.monotonic() * (0.1 + 0.1 * rank),
        "memory_used": weights + kv + 2 * GIB,
        "memory_total": capacity,
        "load": 0.93 - 0.2 * rank,
        "power": 311.0 - 60 * rank,
        "temperature": 61,
    }


class FakeApi:
    """reply: what the next answers say, in pieces of a few characters, `delay` seconds apart. bodies: what was asked.
    error: (status, message) instead of an answer. key: if set, the only one that is known."""

    def __init__(self) -> None:
        self.reset()
        self.app = FastAPI(openapi_url=None)
        self.app.include_router(page_router())
        self.app.post("/v1/chat/completions")(self.chat)
        self.app.get("/v1/models")(self.models)
        self.app.get("/v1/plan")(self.plan)
        self.app.get("/v1/stats")(self.stats)

    def reset(self) -> None:
        """As new, for the next test."""
        self.reply = "Hello there."
        self.thoughts = ""
        self.delay = 0.0
        self.break_after: int | None = None
        self.error: tuple[int, str] | None = None
        self.key: str | None = None
        self.bodies: list[dict[str, Any]] = []
        self.hung_up = 0

    def refusal(self, request: Request) -> JSONResponse | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": {"message": "this server needs an API key", "type": "x", "code": "y"}}, 401)

    async def models(self, request: Request) -> Any:
        return self.refusal(request) or {"object": "list", "data": [{"id": "llama-3-70b-q4_k_m"}]}

    async def plan(self, request: Request) -> Any:
        return self.refusal(request) or {"architecture": "llama", "dtype": "bfloat16", "kv_type": "f16"}

    async def stats(self, request: Request) -> Any:
        return self.refusal(request) or {
            "ready": True,
            "running": 3,
            "waiting": 1,
            "tokens_per_second": 83.2 + 9 * math.sin(time.monotonic() * 1.3) + 4 * math.sin(time.monotonic() * 5),
            "kv_used": 18_432,
            "kv_cached": 4_096,
            "kv_total": 65_536,
            "prefix_hits": 700,
            "prefix_queries": 1000,
            "prompt_tokens": 5000,
            "generated_tokens": 9000,
            "context": 8192,
            "devices": [
                _device(0, 0.5, "NVIDIA GeForce RTX 4090", 48 * GIB),
                _device(1, 0.3, "NVIDIA GeForce RTX 3090", 24 * GIB),
                _device(2, 0.2, "NVIDIA GeForce RTX 4070 Ti", 16 * GIB),
            ],
        }

    async def chat(self, request: Request) -> Any:
        refusal = self.refusal(request)
        if refusal is not None:
            return refusal
        self.bodies.append(await request.json())
        if self.error is not None:
            status, message = self.error
            return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status)
        return StreamingResponse(self._events(), media_type="text/event-stream")

    async def _events(self) -> AsyncIterator[bytes]:
        try:
            deltas: list[dict[str, str]] = [{"role": "assistant", "content": ""}]
            deltas += [{"reasoning_content": piece} for piece in _pieces(self.thoughts)]
            deltas += [{"content": piece} for piece in _pieces(self.reply)]
            for number, delta in enumerate(deltas):
                if number == self.break_after:
                    return
                chunk = _event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
                # In two writes, so that events and characters are cut where a network may cut them.
                yield chunk[: len(chunk) // 2]
                await asyncio.sleep(self.delay)
                yield chunk[len(chunk) // 2 :]
            yield b": a comment\n\n" + _event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            yield _event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": len(deltas) - 1}})
            yield b"data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.hung_up += 1
            raise


def _pieces(text: str) -> list[str]:
    return [text[i : i + 5] for i in range(0, len(text), 5)]


def _event(value: Any) -> bytes:
    text = json.dumps({"object": "chat.completion.chunk", **value}, ensure_ascii=False)
    return f"data: {text}\r\n\r\n".encode()
