"""The OpenAPI document with the request bodies in it, and a page of documentation that needs nothing from outside."""

from __future__ import annotations

import html
import json
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from multitensor.server import schemas

BODIES = (
    schemas.ChatRequest,
    schemas.CompletionRequest,
    schemas.EmbeddingRequest,
    schemas.TokenizeRequest,
    schemas.DetokenizeRequest,
)
_REFERENCE = "#/components/schemas/{model}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads its body itself."""
    reference = {"$ref": _REFERENCE.format(model=model.__name__)}
    failure = {"application/json": {"schema": {"$ref": _REFERENCE.format(model="Error")}}}
    statuses = {"400": "the request is wrong", "401": "no valid key", "404": "no such model", "413": "too large",
                "415": "not JSON", "429": "too much at once", "503": "the model is not ready"}  # fmt: skip
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": reference}}},
        "responses": {status: {"description": text, "content": failure} for status, text in statuses.items()},
    }


def install(app: FastAPI) -> None:
    """Replaces FastAPI's document by one that has the bodies' schemas among its components."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _document(app: FastAPI) -> dict[str, Any]:
    found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    for path in found["paths"].values():
        for operation in path.values():
            operation.get("responses", {}).pop("422", None)  # what is wrong is answered with 400
    _, definitions = models_json_schema([(body, "validation") for body in BODIES], ref_template=_REFERENCE)
    components = found.setdefault("components", {}).setdefault("schemas", {})
    components.update(definitions.get("$defs", {}))
    components["Error"] = _ERROR
    for unused in ("HTTPValidationError", "ValidationError"):
        components.pop(unused, None)
    found["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    return found


def docs_page(document: dict[str, Any]) -> str:
    """The document as one page of plain HTML."""
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'>",
        f"<title>{_text(document['info']['title'])}</title><style>",
        "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}",
        "code,pre{font:14px/1.4 ui-monospace,monospace}pre{overflow:auto;padding:.75rem;border:1px solid #8886}",
        "table{border-collapse:collapse}td,th{text-align:left;vertical-align:top;padding:.2rem .8rem .2rem 0}",
        ":root{color-scheme:light dark}</style>",
        f"<h1>{_text(document['info']['title'])}</h1><p>{_text(document['info'].get('description', ''))}</p>",
        "<p>The same as data: <a href='openapi.json'>openapi.json</a></p>",
    ]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts.append(_operation(path, method, operation))
    parts.append("<h2>Bodies</h2>")
    for name, schema in sorted(document["components"]["schemas"].items()):
        parts.append(_schema(name, schema))
    return "".join(parts) + "</html>"


def _operation(path: str, method: str, operation: dict[str, Any]) -> str:
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    body = f"<p>Body: {_reference(content)}</p>" if content else ""
    description = _text(operation.get("description", operation.get("summary", "")))
    return f"<h3><code>{_text(method.upper())} {_text(path)}</code></h3><p>{description}</p>{body}"


def _schema(name: str, schema: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{_text(field)}</code><td><code>{_kind(value)}</code>"
        for field, value in schema.get("properties", {}).items()
    )
    text = _text(schema.get("description", ""))
    return f"<h3 id='{_text(name)}'>{_text(name)}</h3><p>{text}</p><table>{rows}</table>"


def _kind(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return _reference(schema)
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return " or ".join(_kind(branch) for branch in schema[union])
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    if "enum" in schema or "const" in schema:
        return _text(" | ".join(json.dumps(value) for value in schema.get("enum", [schema.get("const")])))
    bounds = {"minimum": "at least", "maximum": "at most", "exclusiveMinimum": "above", "exclusiveMaximum": "below"}
    words = [f"{word} {schema[name]:g}" for name, word in bounds.items() if name in schema]
    return _text(" ".join([str(schema.get("type", "any")), *words]))


def _reference(schema: dict[str, Any]) -> str:
    name = _text(schema.get("$ref", "").rpartition("/")[2])
    return f"<a href='#{name}'>{name}</a>"


def _text(value: object) -> str:
    return html.escape(str(value))
