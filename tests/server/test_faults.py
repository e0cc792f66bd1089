"""What is wrong, too large, too deep or too slow: a clear error in OpenAI's shape, and others are unharmed."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted import TEXT, Script, Server, eventually, make_model, scripted_server

from multitensor.server.audit import AuditError
from multitensor.server.auth import add_key, new_key

MESSAGES: Any = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with scripted_server(model, max_choices=8, max_body_bytes=1 << 20, body_seconds=1.0) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text[:300]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert "Traceback" not in answer.text and ".py" not in answer.text and "pydantic" not in answer.text
    return error


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "king", "content": "hi"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"stop": ["x"] * 10_000}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": "x" * 100_000}, "stop"),
        ({"seed": 2**80}, "seed"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"99999999": 1}}, None),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"store": True}, "store"),
        ({"audio": {"voice": "alloy"}}, "audio"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"metadata": {"a": "b"}}, "metadata"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "oyster"}}}},
            None,
        ),
        ({"response_format": {"type": "json_object"}, "grammar": 'root ::= "a"'}, "grammar"),
        ({"grammar": "this is no grammar"}, None),
        ({"grammar": {"type": "regex", "value": "("}}, None),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"min_tokens": 5, "max_tokens": 4}, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_values_are_named(client: httpx.Client, change: dict[str, Any], param: str | None, stream: bool) -> None:
    error = error_of(client.post(CHAT, json={"messages": MESSAGES, "stream": stream, **change}), 400)
    assert error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (CHAT, {"messages": MESSAGES, "stop": ["x"] * 10_000}, "stop: 10000 items; at most 64 are possible"),
        (CHAT, {"messages": MESSAGES, "stop": [f"q{i}" for i in range(65)]}, "stop: 65 items; at most 64 are possible"),
        (CHAT, {"messages": MESSAGES, "stop": ["a", 7]}, "stop.1: Input should be a valid string"),
        (CHAT, {"messages": MESSAGES, "stop": ""}, "stop: String should have at least 1 character"),
        (CHAT, {"messages": MESSAGES, "stop": 7}, "stop: Input should be a valid string"),
        (CHAT, {"messages": []}, "messages: 0 items; at least 1 needed"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}]}, "messages.0.content.0.text"),
        (CHAT, {"messages": MESSAGES, "tools": [], "tool_choice": {"type": "function", "function": {}}},
         "tool_choice.function.name: Field required"),
        (CHAT, {"messages": MESSAGES, "grammar": ""}, "grammar: String should have at least 1 character"),
        ("/v1/embeddings", {"input": []}, "input: 0 items; at least 1 needed"),
        ("/v1/embeddings", {"input": [[]]}, "input.0: 0 items; at least 1 needed"),
        ("/v1/completions", {"prompt": ["a"] * 2049}, "prompt: 2049 items; at most 2048 are possible"),
        ("/v1/completions", {"prompt": [-1]}, "prompt.0: Input should be greater than or equal to 0"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_as_the_user_knows_it(
    client: httpx.Client, path: str, body: dict[str, Any], message: str
) -> None:
    error = error_of(client.post(path, json=body), 400)
    assert error["message"].startswith(message) and "validation" not in error["message"], error["message"]


def test_options_of_a_stream_need_one(client: httpx.Client) -> None:
    body = {"messages": MESSAGES, "stream_options": {"include_usage": True}}
    assert "stream: true" in error_of(client.post(CHAT, json=body), 400)["message"]


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": [1, "a"]},
        {"prompt": [-1]},
        {"prompt": [10**7]},
        {"best_of": 2, "stream": True},
        {"best_of": 1, "n": 2},
        {"echo": True, "logprobs": 1},
        {"suffix": "end"},
        {"prompt": ["a"] * 9},
    ],
)
def test_wrong_completions(client: httpx.Client, change: dict[str, Any]) -> None:
    error_of(client.post("/v1/completions", json={"prompt": "a", **change}), 400)


def test_too_long_a_prompt_has_its_code(client: httpx.Client) -> None:
    for path, body in (
        (CHAT, {"messages": [{"role": "user", "content": "hi " * 2000}]}),
        ("/v1/completions", {"prompt": [1] * 1024}),
    ):
        assert error_of(client.post(path, json=body), 400)["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe\xfa",
        b'{"messages": [{"role": "user", "content": "\xff\xc3"}]}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": ' + b"[" * 100_000,
        b'{"messages": ' + b'{"a":' * 100_000,
        b'{"messages": [], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "hi"}], "temperature": Infinity}',
        b'{"messages": [{"role": "user", "content": "hi"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "hi"}], "n": ' + b"9" * 5000 + b"}",
    ],
)
def test_broken_bodies(client: httpx.Client, data: bytes) -> None:
    error_of(client.post(CHAT, content=data, headers=JSON), 400)


def test_nested_schemas_are_refused(client: httpx.Client) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(150):
        schema = {"type": "array", "items": schema}
    body = {
        "messages": MESSAGES,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    }
    assert client.post(CHAT, json=body).status_code in (200, 400)
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_a_hundred_megabytes(client: httpx.Client, chunked: bool) -> None:
    piece = b" " * (1 << 20)
    content = (piece for _ in range(100)) if chunked else piece * 100
    error = error_of(client.post(CHAT, content=content, headers=JSON), 413)
    assert error["code"] == "request_too_large"


def test_a_body_that_does_not_come(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        sock.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode())
        sock.sendall(b"Content-Length: 1000\r\n\r\n{")
        answer = sock.recv(4096)
    assert b" 408 " in answer.split(b"\r\n")[0]


def test_only_json_is_read(client: httpx.Client) -> None:
    for headers in ({"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}, {}):
        error_of(client.post(CHAT, content=json.dumps({"messages": MESSAGES}).encode(), headers=headers), 415)


def test_packed_bodies_are_not_parsed_as_they_are(client: httpx.Client) -> None:
    body = json.dumps({"messages": MESSAGES}).encode()
    error = error_of(client.post(CHAT, content=body, headers={**JSON, "Content-Encoding": "gzip"}), 415)
    assert "Content-Encoding: gzip" in error["message"]
    assert client.post(CHAT, content=body, headers={**JSON, "Content-Encoding": "identity"}).status_code == 200


def test_a_mistake_of_the_server_is_logged_and_counted_once(
    client: httpx.Client, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("a mistake")

    monkeypatch.setattr(server.app.state.service, "check_model", broken)
    assert error_of(client.post(CHAT, json={"messages": MESSAGES}), 500)["code"] == "internal_error"
    assert caplog.text.count("Traceback") == 1 and "a mistake" in caplog.text
    counted = f'http_requests_total{{route="{CHAT}",status="500"}} 1.0'
    assert counted in client.get("/metrics").text


def test_unknown_paths_and_methods(client: httpx.Client) -> None:
    error_of(client.get("/v1/nothing"), 404)
    error_of(client.get(CHAT), 405)


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Host": "evil.example"}, "wrong_host"),
        ({"Origin": "https://evil.example"}, "wrong_origin"),
        ({"Origin": "null"}, "wrong_origin"),
    ],
)
def test_other_web_pages_are_kept_out(client: httpx.Client, headers: dict[str, str], code: str) -> None:
    error = error_of(client.post(CHAT, json={"messages": MESSAGES}, headers=headers), 403)
    assert error["code"] == code
    assert error_of(client.get("/v1/models", headers=headers), 403)["code"] == code


def test_own_pages_are_not(client: httpx.Client, server: Server) -> None:
    for host in ("localhost", f"127.0.0.1:{server.port}", f"localhost:{server.port}", "[::1]:8000"):
        headers = {"Host": host, "Origin": f"http://{host}"}
        answer = client.post(CHAT, json={"messages": MESSAGES}, headers=headers)
        assert answer.status_code == 200
        assert not any(name.startswith("access-control") for name in answer.headers)


def test_keys_are_asked_for_and_can_be_revoked(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    key, secret = new_key("ann", streams=1)
    add_key(path, key)
    with (
        scripted_server(model, Script(step_seconds=0.01), api_keys=path) as server,
        httpx.Client(base_url=server.url) as client,
    ):
        for headers in ({}, {"Authorization": "Bearer mt-wrong"}, {"Authorization": f"Basic {secret}"}):
            for path_ in ("/v1/models", "/v1/plan", "/v1/stats", "/metrics"):
                assert error_of(client.get(path_, headers=headers), 401)["code"] == "invalid_api_key"
            error_of(client.post(CHAT, json={"messages": MESSAGES}, headers=headers), 401)
        assert client.get("/health").status_code == client.get("/ready").status_code == 200
        client.headers["Authorization"] = f"Bearer {secret}"
        assert client.post(CHAT, json={"messages": MESSAGES}).json()["choices"][0]["message"]["content"] == TEXT
        body = {"messages": MESSAGES, "stream": True, "ignore_eos": True, "max_tokens": 900}
        with client.stream("POST", CHAT, json=body) as answer:
            lines = answer.iter_lines()  # kept: dropping it closes the stream
            next(lines)
            refused = error_of(httpx.post(server.url + CHAT, json={"messages": MESSAGES}, headers=client.headers), 429)
            assert refused["code"] == "too_many_streams"
        assert eventually(lambda: client.post(CHAT, json={"messages": MESSAGES}).status_code == 200)
        path.write_text("# nobody\n")
        error_of(client.post(CHAT, json={"messages": MESSAGES}), 401)


def test_the_audit_log_has_each_request_without_its_content(model: Path, tmp_path: Path) -> None:
    path, script = tmp_path / "audit.jsonl", Script()
    with (
        scripted_server(model, script, audit_log=path, model_digest="sha256:feed") as server,
        httpx.Client(base_url=server.url) as client,
    ):
        client.post(CHAT, json={"messages": MESSAGES})
        client.post(CHAT, json={"messages": MESSAGES, "stream": True})
        client.post("/v1/completions", json={"prompt": "secret words", "max_tokens": 1})
        client.post(CHAT, json={"messages": MESSAGES, "logit_bias": {"1000000": 1}})
        with pytest.raises(httpx.ReadTimeout):
            script.step_seconds = 0.05
            client.post(CHAT, json={"messages": MESSAGES, "ignore_eos": True, "max_tokens": 500}, timeout=0.3)
        assert eventually(lambda: len(path.read_text().splitlines()) == 10)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["event"] for record in records] == ["request", "response"] * 5
    assert [record["outcome"] for record in records[1::2]] == ["stop", "stop", "length", "error 400", "cancelled"]
    assert [record["completion_tokens"] for record in records[1:-1:2]] == [17, 17, 1, 0]
    assert all(record["key"] == "anonymous" and record["model_digest"] == "sha256:feed" for record in records)
    assert "secret" not in path.read_text() and "tide comes" not in path.read_text()


def test_the_audit_log_keeps_content_when_told_to(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with scripted_server(model, audit_log=path, audit_content=True) as server:
        httpx.post(server.url + CHAT, json={"messages": MESSAGES, "stream": True})
    response = json.loads(path.read_text().splitlines()[-1])
    assert response["content"]["messages"] == MESSAGES and response["content"]["answers"] == [TEXT]


@pytest.mark.parametrize("arguments", ['{"x": 1e999}', '{"x": NaN}', '{"x": -Infinity}'])
def test_arguments_that_json_cannot_hold_are_no_mistake_of_the_server(
    model: Path, tmp_path: Path, arguments: str
) -> None:
    path = tmp_path / "audit.jsonl"
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": [call]}, *MESSAGES]
    with scripted_server(model, audit_log=path, audit_content=True) as server:
        assert httpx.post(server.url + CHAT, json={"messages": messages}).status_code == 200
    said = json.loads(path.read_text().splitlines()[0])["content"]["messages"]
    assert said[1]["tool_calls"][0]["function"]["arguments"] == arguments


def test_nothing_is_answered_without_a_record(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted_server(model, audit_log=tmp_path / "audit.jsonl") as server:

        def full(event: str, *_: Any, **__: Any) -> str:
            raise AuditError(f"{tmp_path}/audit.jsonl: the disk is full")

        monkeypatch.setattr(server.app.state.service.access.audit, "append", full)
        for stream in (False, True):
            error = error_of(httpx.post(server.url + CHAT, json={"messages": MESSAGES, "stream": stream}), 503)
            assert error["code"] == "audit_log_failed" and str(tmp_path) not in error["message"]
        assert httpx.get(server.url + "/health").status_code == 200
        assert server.engine.stats().generated_tokens == 0
        monkeypatch.undo()
        assert httpx.post(server.url + CHAT, json={"messages": MESSAGES}).status_code == 200


def test_a_reader_that_does_not_read_does_not_hold_others_up(model: Path) -> None:
    asked = {"n": 64, "logprobs": True, "top_logprobs": 20, "max_tokens": 900}
    body = json.dumps({"messages": MESSAGES, "stream": True, **asked})
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    script = Script(text="x" * 400)
    with scripted_server(model, script, send_seconds=0.5, max_choices=64) as server, socket.socket() as sock:
        streams = server.app.state.service.access.streams
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", server.port))
        sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        assert eventually(lambda: streams.active == 1)
        answer = httpx.post(server.url + CHAT, json={"messages": MESSAGES, "max_tokens": 5}, timeout=20)
        assert answer.status_code == 200
        assert eventually(lambda: streams.active == 0, 20), "it still holds its place"
        assert server.engine.stats().generated_tokens < 64 * 400 + 5, "its request went on to the end"
