"""Ctrl-C while the app is made ends the server before it has begun, without a traceback of what it interrupted."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from multitensor.server import app, run
from multitensor.server.settings import ServerSettings


def test_ctrl_c_while_the_app_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun: list[Any] = []

    async def serve(server: uvicorn.Server, sockets: Any) -> None:
        begun.append(server)
        await asyncio.sleep(0)

    def interrupted(*arguments: Any) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()  # what asyncio's runner does at SIGINT

    monkeypatch.setattr(uvicorn.Server, "serve", serve)
    monkeypatch.setattr(app, "create_app", interrupted)
    settings = ServerSettings(model_name="tiny", port=0)
    sock, settings = run.bind(settings)
    with sock, pytest.raises(asyncio.CancelledError):
        asyncio.run(run.serve(object(), settings, sock, lambda: None))  # type: ignore[arg-type]
    assert begun == []
