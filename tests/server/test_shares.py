"""What a request costs its key, what is refused before any work, and what the figures say of it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted import Script, eventually, make_model, scripted_server

from multitensor.server import chat_prompt, routes_tokens
from multitensor.server.auth import add_key, new_key
from multitensor.server.schemas import ChatRequest, ContentPart, Message
from multitensor.server.service import Service

MESSAGES: Any = [{"role": "user", "content": "hi"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@contextlib.contextmanager
def served(model: Path, folder: Path, script: Script | None = None, **limits: int) -> Iterator[httpx.Client]:
    """A client with a key of these limits."""
    key, secret = new_key("ann", **limits)
    add_key(folder / "keys", key)
    headers = {"Authorization": f"Bearer {secret}"}
    with (
        scripted_server(model, script, api_keys=folder / "keys") as server,
        httpx.Client(base_url=server.url, headers=headers, timeout=20) as client,
    ):
        yield client


def code_of(answer: httpx.Response, status: int) -> str | None:
    assert answer.status_code == status, answer.text[:300]
    return answer.json()["error"]["code"]


def figure(client: httpx.Client, name: str) -> float:
    found = [line for line in client.get("/metrics").text.splitlines() if line.startswith(f"multitensor_{name} ")]
    return float(found[0].split()[1]) if found else 0.0


def test_a_key_beyond_its_rate_is_refused_before_any_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(model, tmp_path, requests_per_minute=2) as client:
        assert client.post("/tokenize", json={"prompt": "hi"}).status_code == 200
        assert client.post("/detokenize", json={"tokens": [5]}).status_code == 200
        for module, name in ((chat_prompt, "template_messages"), (routes_tokens, "_tokenize")):
            monkeypatch.setattr(module, name, None)
        for route, body in (
            (CHAT, {"messages": MESSAGES * 2000}),
            ("/tokenize", {"prompt": "hi"}),
            ("/detokenize", {"tokens": [5]}),
            (TEXT, {"nonsense": 1}),
            ("/v1/embeddings", {"input": "hi"}),
        ):
            assert code_of(client.post(route, json=body), 429) == "rate_limit_exceeded"


@pytest.mark.parametrize(
    ("route", "body"),
    [
        (CHAT, {"messages": MESSAGES * 1100}),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 900_000}]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 900}] * 1000}]}),
        (TEXT, {"prompt": ["hi", "x" * 900_000]}),
    ],
)
def test_what_cannot_fit_is_refused_before_it_is_made_a_prompt(
    model: Path, monkeypatch: pytest.MonkeyPatch, route: str, body: dict[str, Any]
) -> None:
    monkeypatch.setattr(chat_prompt, "template_messages", None)
    with scripted_server(model) as server, httpx.Client(base_url=server.url, timeout=20) as client:
        service: Service = server.app.state.service
        texts: list[str] = []
        monkeypatch.setattr(service, "text_ids", lambda text: texts.append(text) or [1])
        assert code_of(client.post(route, json=body), 400) == "context_length_exceeded"
        assert texts in ([], ["hi"])
        too_many = client.post(CHAT, json={"messages": MESSAGES * 20_000})
        assert too_many.status_code == 400 and "16384" in too_many.json()["error"]["message"]


def test_small_requests_do_not_wait_behind_large_bodies(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    check = ChatRequest.model_validate_json
    monkeypatch.setattr(
        ChatRequest, "model_validate_json", lambda data: (len(data) < 300_000 or gate.wait(20)) and check(data)
    )
    large = {"messages": [{"role": "user", "content": "x" * 300_000}]}
    with (
        scripted_server(model) as server,
        httpx.Client(base_url=server.url, timeout=20) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        answers = [pool.submit(httpx.post, server.url + CHAT, json=large, timeout=30) for _ in range(8)]
        service: Service = server.app.state.service
        assert eventually(lambda: len(service._large_bodies._waiting) == 7)
        assert client.post(CHAT, json={"messages": MESSAGES}).status_code == 200
        assert not any(answer.done() for answer in answers)
        gate.set()
        assert {answer.result().status_code for answer in answers} == {400}


def test_what_templates_may_leave_out_is_no_length() -> None:
    messages = [
        Message(role="system", content=" \n be brief  "),
        Message(role="assistant", content="<think>long, long</think>Yes.", reasoning_content="long"),
        Message(role="user", content=[ContentPart(type="text", text=" and "), ContentPart(type="text", text="then?")]),
        Message(role="assistant", tool_calls=[]),
    ]
    assert chat_prompt._characters(messages) == len("be brief") + len("and") + len("then?")


def test_a_request_that_finds_no_place_costs_nothing(model: Path, tmp_path: Path) -> None:
    limits = {"requests_per_minute": 4, "streams": 2}
    with served(model, tmp_path, Script(step_seconds=0.01), **limits) as client:
        body = {"messages": MESSAGES, "stream": True, "ignore_eos": True, "max_tokens": 900, "n": 2}
        with client.stream("POST", CHAT, json=body) as answer:
            lines = answer.iter_lines()  # kept: dropping it closes the stream
            next(lines)
            for _ in range(6):
                refused = httpx.post(client.base_url.join(CHAT), json={"messages": MESSAGES}, headers=client.headers)
                assert code_of(refused, 429) == "too_many_streams"
        # Three of four are left; what can never be answered is asked for, and counts.
        assert eventually(lambda: client.post(CHAT, json={"messages": MESSAGES}).status_code == 200)
        many = client.post(TEXT, json={"prompt": ["a", "b"], "n": 2})
        assert many.status_code == 400 and "4 answers at once" in many.json()["error"]["message"]
        assert client.post(TEXT, json={"prompt": ["a", "b"]}).status_code == 200
        assert code_of(client.post(CHAT, json={"messages": MESSAGES}), 429) == "rate_limit_exceeded"


def test_a_prompt_that_cannot_be_computed_now_costs_nothing(model: Path, tmp_path: Path) -> None:
    script = Script()
    with served(model, tmp_path, script, requests_per_minute=3, tokens_per_minute=60) as client:
        script.fail = True
        assert code_of(client.post(TEXT, json={"prompt": "x" * 30, "max_tokens": 1}), 503) == "engine_failed"
        assert eventually(lambda: client.get("/ready").status_code == 200)
        assert client.post(TEXT, json={"prompt": "x" * 30, "max_tokens": 1}).status_code == 200


def test_latencies_are_of_each_choice_and_from_the_arrival(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted_server(model) as server, httpx.Client(base_url=server.url, timeout=20) as client:
        service: Service = server.app.state.service
        text_ids = service.text_ids

        def slowly(text: str) -> list[int]:
            time.sleep(0.2)
            return text_ids(text)

        monkeypatch.setattr(service, "text_ids", slowly)
        body = {"prompt": ["a", "b"], "n": 4, "max_tokens": 10, "ignore_eos": True}
        assert client.post(TEXT, json=body).json()["usage"]["completion_tokens"] == 80
        assert figure(client, "inter_token_seconds_count") == 72
        assert figure(client, "time_to_first_token_seconds_count") == 1
        assert figure(client, "time_to_first_token_seconds_sum") >= 0.4
        body = {**body, "prompt": "a", "n": 1, "stream": True}
        client.post(TEXT, json=body)
        assert figure(client, "inter_token_seconds_count") == 72 + 9


def test_usage_tells_what_was_found_in_the_cache(model: Path) -> None:
    with scripted_server(model) as server, httpx.Client(base_url=server.url, timeout=20) as client:
        block = server.engine.plan.block_size
        found = []
        for _ in range(2):
            usage = client.post(TEXT, json={"prompt": [7] * (2 * block + 3), "max_tokens": 2}).json()["usage"]
            found.append(usage["prompt_tokens_details"]["cached_tokens"])
        assert found == [0, 2 * block]


def test_the_prompts_of_one_request_do_not_wait_for_each_other(model: Path) -> None:
    with scripted_server(model, max_waiting=3) as server, httpx.Client(base_url=server.url, timeout=20) as client:
        server.engine.max_waiting = 3
        answer = client.post(TEXT, json={"prompt": ["a"] * 20, "max_tokens": 2})
        assert answer.status_code == 200 and len(answer.json()["choices"]) == 20
