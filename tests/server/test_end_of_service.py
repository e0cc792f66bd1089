"""How a server ends: answers under way end with an error that their clients can read, also when the drain is over or
the ranks cannot be started again."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted import Script, Server, eventually, make_model, make_opener

from multitensor.engine.async_engine import AsyncEngine
from multitensor.engine.engine import Engine
from multitensor.errors import InputError, RankFailed
from multitensor.server import run
from multitensor.server.settings import ServerSettings

ENDLESS: dict[str, Any] = {"prompt": "a", "ignore_eos": True, "max_tokens": 900}
Test = Callable[[httpx.AsyncClient, AsyncEngine], Awaitable[None]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def served(open_engine: Callable[[], Engine], test: Test, **settings: Any) -> None:
    """Runs the test beside the server, in one event loop, and waits until the server has ended."""

    async def main() -> None:
        sock, bound = run.bind(ServerSettings(model_name="tide", port=0, **settings))
        engine = AsyncEngine(open_engine, backoff=0.01, restart_attempts=2)
        up = asyncio.Event()
        await engine.start()
        try:
            serving = asyncio.create_task(run.serve(engine, bound, sock, up.set))
            await asyncio.wait_for(up.wait(), 20)
            async with httpx.AsyncClient(base_url=bound.url, timeout=20) as client:
                await test(client, engine)
            await asyncio.wait_for(serving, 20)
        finally:
            sock.close()
            await engine.stop()

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.01)


async def stream(client: httpx.AsyncClient) -> list[str]:
    async with client.stream("POST", "/v1/completions", json={**ENDLESS, "stream": True}) as answer:
        return [line async for line in answer.aiter_lines() if line]


def terminate(times: int) -> None:
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("drain", "signals"), [(0.0, 1), (0.3, 1), (60.0, 2)])
def test_what_outlasts_the_drain_ends_with_an_error(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, drain: float, signals: int
) -> None:
    log = tmp_path / "audit.jsonl"

    async def test(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        whole = asyncio.create_task(client.post("/v1/completions", json=ENDLESS))
        streamed = asyncio.create_task(stream(client))
        embedded = asyncio.create_task(client.post("/v1/embeddings", json={"input": [[5] * 900] * 64}))
        await until(lambda: engine.stats().running >= 2 and log.read_text().count('"event":"request"') == 3)
        began = time.monotonic()
        terminate(1)
        await asyncio.sleep(0.05)
        terminate(signals - 1)
        for answer in (await whole, await embedded):
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "shutting_down", answer.text
        lines = await streamed
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "shutting_down", lines[-3:]
        assert time.monotonic() - began > (drain if signals == 1 else 0)

    script = Script(step_seconds=0.02)
    with caplog.at_level(logging.WARNING):
        served(make_opener(model, script)[1], test, drain_seconds=drain, audit_log=log)
    assert [record.getMessage() for record in caplog.records] == [], "nothing went wrong"
    ends = [json.loads(line) for line in log.read_text().splitlines()]
    assert [end["outcome"] for end in ends if end["event"] == "response"] == ["error shutting_down"] * 3


def test_a_request_that_the_engine_has_not_seen_is_told_too(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is cancelled by uvicorn in the end, which would answer with a text of its own."""
    monkeypatch.setattr(run, "_LAST_WORDS_SECONDS", 0.1)

    async def test(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: 1000\r\n\r\n{{".encode())
        await asyncio.sleep(0.2)
        terminate(1)
        answer, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        assert answer.startswith(b"HTTP/1.1 503") and json.loads(body)["error"]["code"] == "shutting_down"

    served(make_opener(model, Script())[1], test, drain_seconds=0.0)


class Once:
    """Opens an engine the first time; its model is gone afterwards."""

    def __init__(self, model: Path, script: Script) -> None:
        self._open = make_opener(model, script)[1]
        self.count = 0

    def __call__(self) -> Engine:
        self.count += 1
        if self.count > 1:
            raise InputError("/secret/model.gguf: no such file")
        return self._open()


def test_ranks_that_cannot_be_started_again_end_the_server(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    script = Script(step_seconds=0.02)
    opener = Once(model, script)

    async def test(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
        waiting = asyncio.create_task(stream(client))
        await until(lambda: engine.stats().running == 1)
        script.fail = True
        error = json.loads((await waiting)[-1].removeprefix("data: "))["error"]
        assert error["code"] == "engine_failed" and error["message"].startswith("rank 0 failed")
        assert "secret" not in error["message"]

    with pytest.raises(RankFailed, match=r"could not be started again: InputError: /secret/model.gguf"):
        served(opener, test)
    assert opener.count == 3 and "given up after 2 attempts" in caplog.text


def test_health_and_readiness_tell_of_ranks_that_cannot_be_started_again(model: Path) -> None:
    script = Script(step_seconds=0.02)
    with Server(Once(model, script), ServerSettings(model_name="tide"), restart_attempts=2) as server:
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
        script.fail = True
        assert httpx.post(f"{server.url}/v1/completions", json=ENDLESS).status_code == 503
        assert eventually(lambda: server.engine.given_up)
        for path in ("/health", "/ready"):
            answer = httpx.get(server.url + path)
            assert answer.status_code == 503 and "could not be started again" in answer.json()["reason"]
            assert "secret" not in answer.text
