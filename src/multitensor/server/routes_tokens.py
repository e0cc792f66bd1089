"""POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request

from multitensor.errors import InputError
from multitensor.server.body import read_body
from multitensor.server.chat_messages import template_messages, template_tools
from multitensor.server.errors import bad_request
from multitensor.server.openapi import json_body
from multitensor.server.schemas import DetokenizeRequest, TokenizeRequest
from multitensor.server.service import Service, charge, service_of

router = APIRouter(tags=["tokens"], dependencies=[Depends(charge)])


@router.post("/tokenize", openapi_extra=json_body(TokenizeRequest))
async def tokenize(request: Request) -> dict[str, Any]:
    """Token ids of a text, or of a conversation through the model's chat template."""
    service = service_of(request)
    body = await read_body(request, TokenizeRequest)
    service.check_model(body.model)
    service.check_ready()
    with service.access.place(request.state.key):
        return await service.in_thread(request, _tokenize, service, body)


def _tokenize(service: Service, body: TokenizeRequest) -> dict[str, Any]:
    tokenizer = service.need_tokenizer()
    if body.messages is not None:
        from multitensor.formats.chat_template import render_chat

        if body.parse_special is not None or body.add_special_tokens is not None:
            raise bad_request("add_special_tokens and parse_special are for prompt; the template decides for messages")
        generate = body.add_generation_prompt is not False
        messages, tools = template_messages(body.messages), template_tools(body.tools)
        ids = render_chat(tokenizer, messages, add_generation_prompt=generate, tools=tools)
    else:
        if body.tools or body.add_generation_prompt is not None:
            raise bad_request("tools and add_generation_prompt are for messages, not for prompt")
        begins = body.add_special_tokens is not False
        ids = tokenizer.encode(body.prompt or "", special=bool(body.parse_special), bos=begins)
    found: dict[str, Any] = {"count": len(ids), "max_model_len": service.engine.context, "tokens": ids}
    if body.return_token_strs:
        found["token_strs"] = [tokenizer.token_text(token) for token in ids]
    return found


@router.post("/detokenize", openapi_extra=json_body(DetokenizeRequest))
async def detokenize(request: Request) -> dict[str, Any]:
    """Text of token ids."""
    service = service_of(request)
    body = await read_body(request, DetokenizeRequest)
    service.check_model(body.model)
    service.check_ready()
    with service.access.place(request.state.key):
        return {"prompt": await service.in_thread(request, _detokenize, service, body)}


def _detokenize(service: Service, body: DetokenizeRequest) -> str:
    size = service.engine.plan.spec.vocab_size
    wrong = next((token for token in body.tokens if token >= size), None)
    if wrong is not None:
        raise InputError(f"token id {wrong} is not in the vocabulary of {size} ids")
    return service.need_tokenizer().decode(body.tokens, skip_special=bool(body.skip_special_tokens))
