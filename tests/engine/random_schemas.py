"""Random JSON schemas of the kinds that people ask models for."""

from __future__ import annotations

import random
from typing import Any

WORDS = ("name", "age", "city", "tags", "price", "id", "color", "items", "note", "ok", "größe", 'a "b"')


def random_schema(seed: int) -> dict[str, Any]:
    """An object with some properties; every one is bounded in length."""
    rng = random.Random(seed)
    schema = _object(rng, 2)
    if rng.random() < 0.2:
        schema["$defs"] = {"part": _object(rng, 1)}
        schema["properties"]["part"] = {"$ref": "#/$defs/part"}
    return schema


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(WORDS, rng.randint(1, 3))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: _value(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
    }
    if rng.random() < 0.8:
        schema["additionalProperties"] = False
    return schema


def _value(rng: random.Random, depth: int) -> dict[str, Any]:
    simple: list[dict[str, Any]] = [
        {"type": "string", "maxLength": rng.randint(1, 8)},
        {"type": "string", "minLength": 2, "maxLength": 5},
        {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,4}$"},
        {"type": "string", "format": "date"},
        {"enum": ["red", "green", 3, None, {"x": [1]}]},
        {"const": "a \\ \u00e9\n"},
        {"type": "integer", "minimum": rng.randint(-50, 0), "maximum": rng.randint(1, 500)},
        {"type": "number", "minimum": 0, "exclusiveMaximum": 10.5},
        {"type": "boolean"},
        {"type": ["null", "boolean"]},
        {"anyOf": [{"type": "boolean"}, {"type": "string", "maxLength": 4}]},
    ]
    if depth <= 0 or rng.random() < 0.6:
        return rng.choice(simple)
    if rng.random() < 0.5:
        return _object(rng, depth)
    return {"type": "array", "items": _value(rng, depth - 1), "minItems": rng.randint(0, 2), "maxItems": 3}
