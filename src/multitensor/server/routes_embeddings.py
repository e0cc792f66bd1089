"""POST /v1/embeddings: a text's vector, from the model's last hidden states."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from multitensor.server.body import read_body
from multitensor.server.errors import bad_request
from multitensor.server.openapi import json_body
from multitensor.server.routes_completions import prompt_ids
from multitensor.server.schemas import EmbeddingRequest
from multitensor.server.service import charge, service_of
from multitensor.server.sse import until_hang_up

if TYPE_CHECKING:
    from multitensor.engine.async_engine import AsyncEngine

router = APIRouter(tags=["embeddings"], dependencies=[Depends(charge)])


@router.post("/v1/embeddings", openapi_extra=json_body(EmbeddingRequest))
async def embeddings(request: Request) -> Response:
    """A vector of length 1 for each input: the mean of the last hidden states (after the final norm) over the input's
    tokens. Models that were made to write, not to embed, give vectors of modest use."""
    service = service_of(request)
    body = await read_body(request, EmbeddingRequest)
    service.check_model(body.model)
    service.check_ready()
    size = service.engine.plan.spec.hidden_size
    if body.dimensions is not None and body.dimensions != size:
        raise bad_request(f"this model's embeddings have {size} dimensions, which cannot be changed", "dimensions")
    with service.access.place(request.state.key):
        prompts = await service.in_thread(request, prompt_ids, service, body.input, "input")
        tokens = sum(map(len, prompts))
        record = service.record(request, tokens, {"input": body.input})
        async with service.access.admitted(record):
            vectors = await until_hang_up(request, _all(service.engine, prompts, record.key.name))
    as_text = body.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _base64(vector) if as_text else vector}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({"object": "list", "data": data, "model": service.settings.model_name, "usage": usage})


async def _all(engine: AsyncEngine, prompts: Sequence[list[int]], key: str) -> list[list[float]]:
    tasks = [asyncio.ensure_future(engine.embed(ids, key=key)) for ids in prompts]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:  # one that failed takes the others along
            task.cancel()


def _base64(vector: Sequence[float]) -> str:
    """Little-endian float32, as OpenAI's client expects."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
