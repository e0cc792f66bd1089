"""Starts `multitensor serve` with the arguments given, asks it for a bit of everything with the official client, and
ends it. Prints the network interfaces there are and every answer's kind as one line of JSON. A script of its own, so
that all of it can run inside a network namespace."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from typing import Any

import httpx
import openai

SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}


def visit(url: str) -> list[str]:
    messages: Any = [{"role": "user", "content": "hello"}]
    shape: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    asked: list[str] = []
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        model = client.models.list().data[0].id
        answer = client.chat.completions.create(model=model, messages=messages, max_tokens=4)
        asked.append(answer.object)
        stream = client.chat.completions.create(model=model, messages=messages, max_tokens=4, stream=True)
        asked.append(f"{len(list(stream)) > 0} stream")
        asked.append(client.completions.create(model=model, prompt="a", max_tokens=4).object)
        shaped = client.chat.completions.create(model=model, messages=messages, max_tokens=40, response_format=shape)
        asked.append(shaped.choices[0].finish_reason)
        asked.append(client.embeddings.create(model=model, input="a").object)
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
        paths = ("/", "/docs", "/openapi.json", "/health", "/ready", "/metrics", "/v1/plan", "/v1/stats")
        return asked + [f"{path} {http.get(path).status_code}" for path in paths]


def main() -> None:
    command = [sys.executable, "-m", "multitensor", "serve", *sys.argv[1:], "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        said = ""
        while (found := re.search(r"serving at (\S+) ", said)) is None:
            line = server.stderr.readline()
            if not line:
                raise SystemExit(f"the server ended: {said}")
            said += line
        asked = visit(found.group(1))
        server.terminate()
        code = server.wait(30)
    finally:
        server.kill()
    print(json.dumps({"interfaces": [name for _, name in socket.if_nameindex()], "asked": asked, "code": code}))


if __name__ == "__main__":
    main()
