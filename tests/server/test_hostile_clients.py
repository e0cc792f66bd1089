"""Bodies that are too large or never end, and readers that do not read, over real connections."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serving import serve

from multitensor.server.limits import BodyLimit, SlowClientGuard

MIB = 1 << 20


class Target:
    """Echoes the size of a body; /flood sends until it is stopped and remembers how it ended."""

    def __init__(self) -> None:
        self.calls = 0
        self.flood_ended = threading.Event()
        self.ending: BaseException | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        self.calls += 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/flood":
            try:
                while True:
                    await send({"type": "http.response.body", "body": bytes(MIB), "more_body": True})
            except BaseException as error:
                self.ending = error
                raise
            finally:
                self.flood_ended.set()
        message = await receive()
        assert message["more_body"] is False
        await send({"type": "http.response.body", "body": str(len(message["body"])).encode()})


@pytest.fixture
def target() -> Target:
    return Target()


@pytest.fixture
def port(target: Target) -> Iterator[int]:
    with serve(SlowClientGuard(BodyLimit(target, max_bytes=MIB, seconds=1.0), seconds=1.0)) as port:
        yield port


def test_bodies_up_to_the_limit_pass_whole(port: int) -> None:
    url = f"http://127.0.0.1:{port}/"
    assert httpx.get(url).text == "0"
    assert httpx.post(url, content=b"x" * 1000).text == "1000"
    assert httpx.post(url, content=iter([b"x" * 1000] * 100)).text == "100000"
    assert httpx.post(url, content=b"x" * MIB).text == str(MIB)


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_of_100_mb_is_answered_with_413(port: int, target: Target, declared: bool) -> None:
    parts = [bytes(MIB)] * 100
    content = b"".join(parts) if declared else iter(parts)
    answer = httpx.post(f"http://127.0.0.1:{port}/", content=content, timeout=60)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"
    assert target.calls == 0


def test_a_body_that_does_not_come_is_answered_with_408(port: int, target: Target) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc")
        started = time.monotonic()
        answer = b""
        while part := client.recv(65536):
            answer += part
        assert time.monotonic() - started < 15
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408") and json.loads(body)["error"]["code"] == "request_timeout"
    assert target.calls == 0


def test_a_client_that_leaves_in_the_middle_reaches_no_route(port: int, target: Target) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc")
    time.sleep(0.2)
    assert target.calls == 0
    assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 200


def test_a_reader_that_does_not_read_is_given_up_and_others_are_served(port: int, target: Target) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(b"GET /flood HTTP/1.1\r\nHost: x\r\n\r\n")
        client.recv(1)
        assert httpx.get(f"http://127.0.0.1:{port}/", timeout=10).text == "0"
        assert target.flood_ended.wait(20)
    assert isinstance(target.ending, ConnectionResetError)
