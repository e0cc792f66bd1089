"""From a request's bytes to a checked body. Size and time are bounded before, by limits.BodyLimit."""

from __future__ import annotations

from typing import TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from multitensor.server.errors import ApiError
from multitensor.server.schemas import Body
from multitensor.server.service import service_of

Model = TypeVar("Model", bound=Body)

_THREAD_BYTES = 1 << 18  # larger bodies are parsed beside the event loop


async def read_body(request: Request, model: type[Model]) -> Model:
    """The checked body. Raises ApiError 415 (no JSON, or packed), and pydantic's ValidationError for all that is wrong
    inside (bad JSON, bad UTF-8 and bottomless nesting too)."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    # Also what keeps web pages of other origins out: a browser sends JSON there only after asking, and nobody says yes.
    if kind != "application/json" and not kind.endswith("+json"):
        given = kind[:60] or "a body without a type"
        raise ApiError(415, f"send JSON with the header Content-Type: application/json, not {given}")
    coding = request.headers.get("content-encoding", "").strip().lower()
    if coding not in ("", "identity"):
        raise ApiError(415, f"bodies with Content-Encoding: {coding[:60]} are not read; send plain JSON")
    try:
        data = await request.body()
    except ClientDisconnect:
        raise ApiError(400, "the client left before its request was complete") from None
    if len(data) > _THREAD_BYTES:
        return await service_of(request).check_large(request, model.model_validate_json, data)
    return model.model_validate_json(data)
