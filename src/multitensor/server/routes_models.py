"""What is served and how it is: models, health, readiness, the plan, figures."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from multitensor.server.errors import ApiError
from multitensor.server.metrics import CONTENT_TYPE
from multitensor.server.service import Service, authorise, service_of
from multitensor.sharding.report import with_ratios

open_router = APIRouter(tags=["state"])
router = APIRouter(tags=["state"], dependencies=[Depends(authorise)])

_GIVEN_UP = "the ranks failed and could not be started again"


@open_router.get("/health", responses={503: {"description": "only a new process can help"}})
async def health(request: Request) -> Response:
    """200 as long as the server answers, also while ranks are started again; 503 when they could not be, and the
    process is about to end."""
    if service_of(request).engine.given_up:
        return JSONResponse({"status": "failed", "reason": _GIVEN_UP}, 503)
    return JSONResponse({"status": "ok"})


@open_router.get("/ready", responses={503: {"description": "not ready"}})
async def ready(request: Request) -> Response:
    """200 when requests are taken; 503 while ranks are started again, when they could not be, and when the server
    drains."""
    engine = service_of(request).engine
    if engine.ready:
        return JSONResponse({"ready": True})
    if engine.given_up:
        reason = _GIVEN_UP
    else:
        reason = "restarting after a failure" if engine.failure else "not taking requests"
    return JSONResponse({"ready": False, "reason": reason}, 503, headers={"Retry-After": "5"})


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The one model that is served."""
    return {"object": "list", "data": [_model(service_of(request))]}


@router.get("/v1/models/{name:path}", responses={404: {"description": "no such model"}})
async def model(request: Request, name: str) -> dict[str, Any]:
    """The same by name."""
    service = service_of(request)
    service.check_model(name)
    return _model(service)


def _model(service: Service) -> dict[str, Any]:
    settings, engine = service.settings, service.engine
    return {
        "id": settings.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "multitensor",
        "aliases": list(settings.aliases),
        "max_model_len": engine.context,
        "architecture": engine.plan.spec.architecture,
        "has_vocabulary": engine.tokenizer is not None,
    }


@router.get("/v1/plan")
async def plan(request: Request, tensors: str = "true") -> Response:
    """How the model is cut over the devices at this moment. tensors=false leaves the list of tensors out. memory: what
    the ranks held when it was last measured, and their weights over those of the plan (weights_over_plan)."""
    service = service_of(request)
    if tensors not in ("true", "false"):
        raise ApiError(400, "tensors must be true or false", param="tensors")
    found = await service.in_thread(request, service.engine.plan.to_json)
    if tensors == "false":
        del found["tensors"]
    memory = with_ratios(service.engine.plan, service.engine.stats().memory)
    return JSONResponse({"model": service.settings.model_name, **found, "memory": memory})


@router.get("/v1/stats")
async def stats(request: Request) -> Response:
    """Figures of this moment: tokens a second, requests, KV use; each device's share, memory and load."""
    service = service_of(request)
    return JSONResponse(await service.in_thread(request, service.metrics.stats_json))


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    service = service_of(request)
    return Response(await service.in_thread(request, service.metrics.render), headers={"Content-Type": CONTENT_TYPE})
