"""A bounded fuzz over the OpenAPI document: whatever is sent, no 5xx, and every error in OpenAI's shape."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from scripted import Script, Server, make_model, scripted_server

schemathesis = pytest.importorskip("schemathesis")

EXAMPLES = int(os.environ.get("MULTITENSOR_FUZZ_EXAMPLES", "15"))  # an operation and mode
WELL_FORMED = ("application/json", "text/event-stream", "text/plain")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = make_model(tmp_path_factory.mktemp("model"))
    with scripted_server(model, Script(), max_choices=4) as server:
        yield server


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_nothing_is_answered_with_5xx(server: Server, mode: str) -> None:
    """POSITIVE: what the document allows; NEGATIVE: what it does not."""
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    seen: Counter[tuple[str, int]] = Counter()
    for found in document.get_all_operations():
        operation = found.ok()
        strategy = operation.as_strategy(generation_mode=schemathesis.GenerationMode[mode])
        if mode == "POSITIVE" or operation.body:
            _fuzz(strategy, f"{operation.method.upper()} {operation.path}", seen)
    assert server.engine.ready and not server.engine.failure
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/v1/embeddings"):
        statuses = {status for (label, status) in seen if label == f"POST {path}"}
        assert statuses & ({200, 400, 404} if mode == "POSITIVE" else {400}), f"{path} was not reached: {statuses}"


def _fuzz(strategy: Any, label: str, seen: Counter[tuple[str, int]]) -> None:
    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(case=strategy)
    def fuzz(case: Any) -> None:
        answer = case.call(timeout=20)
        seen[label, answer.status_code] += 1
        assert answer.status_code < 500, (label, answer.content[:500])
        assert b"Traceback" not in answer.content
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        else:
            assert answer.headers["content-type"][0].startswith(WELL_FORMED)

    fuzz()
