"""Errors as the API shows them: OpenAI's shape, a message for people, nothing of the inside."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from multitensor.errors import InputError, MultitensorError, Overloaded, RankFailed, ShuttingDown
from multitensor.server.audit import AuditError

logger = logging.getLogger("multitensor.server")

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_MAX_MESSAGE = 600
CLIENT_CLOSED = 499


class HungUp(Exception):
    """The client closed the connection; nobody is left to answer."""


class ApiError(MultitensorError):
    """An answer other than 200. type: by default the one that goes with the status. headers: sent with it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.type = type or _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """{"error": {"message", "type", "param", "code"}}."""
        message = " ".join(self.message.split())
        if len(message) > _MAX_MESSAGE:
            message = message[: _MAX_MESSAGE - 3] + "..."
        return {"error": {"message": message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, headers=self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def to_api_error(error: BaseException) -> ApiError:
    """What the caller is told of an error. Whatever was not raised on purpose is logged and becomes a bare 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        return _validation(error)
    if isinstance(error, InputError):
        return bad_request(str(error))
    if isinstance(error, RankFailed):
        logger.error("a rank failed: %s", error)
        message = f"{_ranks(str(error))} failed; all ranks are being started again: try again shortly"
        return ApiError(503, message, code="engine_failed", headers={"Retry-After": "5"})
    if isinstance(error, ShuttingDown):
        return ApiError(503, str(error), code="shutting_down", headers={"Retry-After": "5"})
    if isinstance(error, AuditError):
        logger.error("%s", error)
        message = "the audit log cannot be written, and nothing is answered without a record of it"
        return ApiError(503, message, code="audit_log_failed")
    if isinstance(error, Overloaded):
        return ApiError(429, str(error), code="server_overloaded", headers={"Retry-After": "1"})
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    logger.error("unexpected error while answering", exc_info=error)
    return ApiError(500, "the server made a mistake; its log has the details", code="internal_error")


def _ranks(message: str) -> str:
    """'rank 1 (cpu:1)' of an engine's message about it, whose rest (signals, paths, last words) is for the log."""
    named = dict.fromkeys(re.findall(r"\brank \d+(?: \([a-z]+:\d+\))?", message))
    return ", ".join(named) or "a rank"


def _validation(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a body. A union reports each branch: what is of a branch's type but wrong
    tells more than what is of none, and then the longest path got furthest."""
    details = error.errors(include_url=False, include_input=False)
    detail = max(details, key=lambda entry: (not _is_mismatch(entry["type"]), len(_path(entry["loc"]))))
    path = _path(detail["loc"])
    param = ".".join(path) or None
    if detail["type"] == "json_invalid":
        return bad_request(f"the request body is not valid JSON: {detail['msg']}")
    message = _length(detail["type"], detail.get("ctx", {})) or str(detail["msg"]).removeprefix("Value error, ")
    return bad_request(f"{param}: {message}" if param else message, param=path[0] if path else None)


def _is_mismatch(kind: str) -> bool:
    """Whether a value was of another type than a branch, or none of its words."""
    return kind.endswith("_type") or kind in ("literal_error", "none_required")


def _length(kind: str, context: Mapping[str, Any]) -> str | None:
    """Of a list that is too long or too short; in words that know of no steps of a validation."""
    if kind == "too_long":
        return f"{context['actual_length']} items; at most {context['max_length']} are possible"
    if kind == "too_short":
        return f"{context['actual_length']} items; at least {context['min_length']} needed"
    return None


def _path(location: tuple[int | str, ...]) -> list[str]:
    """The location without pydantic's names of union branches ("str", "constrained-str", "list[int]", "ToolFunction"),
    which are no names of fields."""
    branches = ("str", "int", "float", "bool", "none")
    return [
        str(part)
        for part in location
        if isinstance(part, int) or (re.fullmatch("[a-z_][a-z0-9_]*", part) and part not in branches)
    ]


def install(app: FastAPI) -> None:
    """Every error of every route in OpenAI's shape; also unknown paths and methods."""

    async def answer(request: Request, error: Exception) -> Response:
        if isinstance(error, HungUp):
            return Response(status_code=CLIENT_CLOSED)
        found = to_api_error(error)
        if found.status == 404 and not isinstance(error, ApiError):
            found = ApiError(404, f"there is no {request.method} {request.url.path} here; see /docs")
        elif found.status == 405:
            found = ApiError(405, f"{request.url.path} does not take {request.method}", headers=found.headers)
        return found.response()

    for kind in (HungUp, MultitensorError, ValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
