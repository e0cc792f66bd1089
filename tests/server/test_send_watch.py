"""The patience of one answer's sends: each counts by itself, and only who sends is ended."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.types import Message

from multitensor.server.limits import SlowClientGuard

PATIENCE = 0.4
PART: Message = {"type": "http.response.body", "body": b"x", "more_body": True}


def answer(app: Any, send: Any) -> Any:
    async def receive() -> Message:
        return {"type": "http.request"}

    return asyncio.run(asyncio.wait_for(SlowClientGuard(app, PATIENCE)({"type": "http"}, receive, send), 30))


def test_every_part_has_its_own_time() -> None:
    """Together they take far longer than one may, silence between them included."""
    sent = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for _ in range(4):
            await send(PART)
            await asyncio.sleep(0.6 * PATIENCE)

    async def send(message: Message) -> None:
        await asyncio.sleep(0.5 * PATIENCE)
        sent.append(message)

    answer(app, send)
    assert len(sent) == 4


def test_one_that_is_not_taken_is_an_error_at_that_place_and_the_next_is_tried() -> None:
    found: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for _ in range(2):
            with pytest.raises(ConnectionResetError, match="took nothing"):
                await send(PART)
            found.append("given up")
        await asyncio.sleep(0)  # nothing of the cancellation is left
        await send({"type": "quick"})
        found.append("sent")

    async def send(message: Message) -> None:
        if message is PART:
            await asyncio.Event().wait()

    answer(app, send)
    assert found == ["given up", "given up", "sent"]


def test_an_end_that_others_want_stays_one() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        sending = asyncio.ensure_future(send(PART))
        await asyncio.sleep(0.1 * PATIENCE)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        await asyncio.sleep(2 * PATIENCE)  # its timer finds nobody who sends

    async def send(message: Message) -> None:
        await asyncio.Event().wait()

    answer(app, send)
