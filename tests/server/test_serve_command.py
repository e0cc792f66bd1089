"""`multitensor serve` as people start it: real ranks, the official client, signals, ports and files that are wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from scripted import eventually, make_model, texts

pytestmark = pytest.mark.processes

CAPITAL: Any = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]


class Serving:
    """A server process; `stderr` is what it has said so far."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "multitensor", "serve", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.stderr = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.stderr += line

    def url(self) -> str:
        """Waits for the start-up line."""
        assert eventually(lambda: "serving at" in self.stderr or self.process.poll() is not None, 120)
        found = re.search(r"serving at (\S+) ", self.stderr)
        assert found, self.stderr
        return found.group(1)

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(30)
        self._reader.join(5)
        return code

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def serving(smollm2_path: Path) -> Iterator[Serving]:
    limits = "--ctx", "1024", "--max-prompt-tokens", "1010"
    server = Serving(str(smollm2_path), "--devices", "cpu:2", "--port", "0", "--name", "smollm2", *limits)
    try:
        server.url()
        yield server
    finally:
        server.kill()


def test_prompts_are_no_longer_than_they_may_be(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="prompts may have 1010 tokens") as refused:
        client.completions.create(model="smollm2", prompt=[1] * 1011, max_tokens=1)
    assert refused.value.code == "context_length_exceeded"


@pytest.fixture(scope="module")
def client(serving: Serving) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{serving.url()}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.mark.models
def test_smollm2_over_two_ranks_answers(client: openai.OpenAI, serving: Serving) -> None:
    assert re.search(r"smollm2 on cpu:0, cpu:1, context 1024, ready after", serving.stderr)
    answer = client.chat.completions.create(model="smollm2", messages=CAPITAL, temperature=0, max_tokens=16)
    assert "Paris" in (answer.choices[0].message.content or "")
    stream = client.chat.completions.create(
        model="smollm2", messages=CAPITAL, temperature=0, max_tokens=16, stream=True, logprobs=True, top_logprobs=3
    )
    chunks = list(stream)
    assert texts(chunks) == answer.choices[0].message.content
    entries = [e for chunk in chunks for c in chunk.choices if c.logprobs for e in c.logprobs.content or ()]
    assert all(e.token == e.top_logprobs[0].token and e.logprob <= 0 for e in entries), "greedy takes the likeliest"
    assert len({len(e.top_logprobs) for e in entries}) == 1


@pytest.mark.models
def test_metrics_tell_where_each_ranks_time_went(client: openai.OpenAI, serving: Serving) -> None:
    def seconds(kind: str) -> list[float]:
        text = httpx.get(f"{serving.url()}/metrics").text
        found = re.findall(rf'rank_{kind}_seconds_total{{device="cpu:(\d)",rank="\1"}} (\S+)', text)
        assert [rank for rank, _ in found] == ["0", "1"], text
        return [float(value) for _, value in found]

    client.completions.create(model="smollm2", prompt="The sea", max_tokens=4)
    before = seconds("compute"), seconds("reduction")
    client.completions.create(model="smollm2", prompt="The moon", max_tokens=8, extra_body={"ignore_eos": True})
    after = seconds("compute"), seconds("reduction")
    for kind in (0, 1):
        assert all(0 < old < new for old, new in zip(before[kind], after[kind], strict=True))


@pytest.mark.models
def test_the_same_seed_says_the_same(client: openai.OpenAI) -> None:
    def ask(seed: int) -> list[str]:
        answer = client.completions.create(model="smollm2", prompt="The sea", seed=seed, n=2, max_tokens=12)
        return [choice.text for choice in answer.choices]

    assert ask(1) == ask(1) != ask(2)
    assert len(set(ask(1))) == 2, "choices of one request have random numbers of their own"


@pytest.mark.models
def test_a_schema_is_kept(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "size": {"enum": ["small", "large"]}},
        "required": ["city", "size"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "Describe Paris."}],
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}},
        max_tokens=60,
        n=2,
        seed=3,
    )
    for choice in answer.choices:
        found = json.loads(choice.message.content or "")
        assert set(found) == {"city", "size"} and found["size"] in ("small", "large")
    chosen = client.completions.create(
        model="smollm2", prompt="Yes or no?", extra_body={"grammar": 'root ::= "yes" | "no"'}, max_tokens=5
    )
    assert chosen.choices[0].text in ("yes", "no")


@pytest.mark.models
def test_embeddings_of_like_texts_are_alike(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(
        model="smollm2", input=["The cat sleeps on the mat.", "A cat is sleeping on a mat.", "def f(x): return x ** 2"]
    )
    first, alike, other = (entry.embedding for entry in answer.data)
    product = lambda a, b: sum(x * y for x, y in zip(a, b, strict=True))  # noqa: E731
    assert product(first, first) == pytest.approx(1, abs=1e-3)
    assert product(first, alike) > product(first, other)


@pytest.mark.models
def test_clients_that_hang_up_leave_nothing_behind(client: openai.OpenAI, serving: Serving) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).completions.create(
            model="smollm2", prompt="Once", max_tokens=900, extra_body={"ignore_eos": True}
        )
    stream = client.completions.create(
        model="smollm2", prompt="Once", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    stats = lambda: httpx.get(f"{serving.url()}/v1/stats").json()  # noqa: E731
    assert eventually(lambda: stats()["running"] == stats()["waiting"] == 0)


@pytest.mark.models
def test_a_taken_port_is_one_line_and_exit_code_2(serving: Serving, smollm2_path: Path) -> None:
    port = serving.url().rpartition(":")[2]
    second = subprocess.run(
        [sys.executable, "-m", "multitensor", "serve", str(smollm2_path), "--port", port],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert second.returncode == 2 and second.stderr.count("\n") == 1
    assert "in use" in second.stderr and port in second.stderr


@pytest.mark.models
def test_sigterm_lets_answers_end_and_ends_the_ranks(smollm2_path: Path) -> None:
    server = Serving(str(smollm2_path), "--devices", "cpu:2", "--port", "0", "--ctx", "512", "--log-format", "json",
                     "--log-level", "info")  # fmt: skip
    try:
        url = server.url()
        body = {"prompt": "Once", "max_tokens": 100, "ignore_eos": True, "stream": True, "temperature": 0}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]
        assert server.end() == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
        logged = [json.loads(line) for line in server.stderr.splitlines() if line.startswith("{")]
        assert any(entry.get("path") == "/v1/completions" and entry["status"] == 200 for entry in logged)
    finally:
        server.kill()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--api-keys", "nowhere"], "nowhere"),
        (["--tls-cert", "nowhere", "--tls-key", "nowhere"], "nowhere"),
        (["--tls-cert", "nowhere"], "go together"),
        (["--audit-content"], "--audit-log"),
        (["--host", "host.invalid"], "host.invalid"),
        (["--parallel", "100000"], "max_num_seqs"),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], said: str) -> None:
    model = make_model(tmp_path)
    found = subprocess.run(
        [sys.executable, "-m", "multitensor", "serve", str(model), "--port", "0", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 2 and said in found.stderr and found.stderr.count("\n") == 1, found.stderr


def test_every_line_is_json_when_asked_for(tmp_path: Path) -> None:
    """Start-up lines, warnings, and what ends the server; a digest that cannot be the model's is told."""
    model = make_model(tmp_path)
    model.with_name(f"{model.name}.manifest.json").write_text("{")
    audit = ["--audit-log", str(tmp_path / "audit.jsonl")]
    server = Serving(str(model), "--port", "0", "--host", "0.0.0.0", "--log-format", "json", *audit)
    try:
        server.url()
        assert server.end() == 0
    finally:
        server.kill()
    lines = [json.loads(line) for line in server.stderr.splitlines()]
    told = [(line["level"], line["message"]) for line in lines]
    assert [level for level, _ in told] == ["warning", "warning", "info", "info"], told
    for (_, message), said in zip(told, ["manifest", "everybody", "ready after", "serving at http://"], strict=True):
        assert said in message
    found = subprocess.run(
        [
            sys.executable,
            "-m",
            "multitensor",
            "serve",
            str(tmp_path / "no.gguf"),
            "--port",
            "0",
            "--log-format",
            "json",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    (line,) = found.stderr.splitlines()
    assert found.returncode == 2 and json.loads(line)["level"] == "error" and "no.gguf" in line


def test_a_port_is_checked_before_the_model_is_looked_at() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        found = subprocess.run(
            [sys.executable, "-m", "multitensor", "serve", "no-such-model.gguf", "--port", port],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert found.returncode == 2 and port in found.stderr and "in use" in found.stderr


@pytest.mark.models
def test_a_required_tool_is_called(client: openai.OpenAI) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
    tool: Any = {"type": "function", "function": {"name": "get_weather", "parameters": parameters, "strict": True}}
    answer = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=80,
    )
    (call,) = answer.choices[0].message.tool_calls or ()
    assert call.type == "function" and call.function.name == "get_weather"
    assert isinstance(json.loads(call.function.arguments)["city"], str)
    assert answer.choices[0].finish_reason == "tool_calls"


def test_tls(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    write_certificate(cert, key)
    server = Serving(str(make_model(tmp_path)), "--port", "0", "--tls-cert", str(cert), "--tls-key", str(key))
    try:
        url = server.url()
        assert url.startswith("https://127.0.0.1:")
        assert httpx.get(f"{url}/ready", verify=ssl.create_default_context(cafile=str(cert))).status_code == 200
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/ready")  # nobody signed it
        assert server.end() == 0
    finally:
        server.kill()


def write_certificate(cert: Path, key: Path) -> None:
    """For 127.0.0.1, signed by itself."""
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    found = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(private, hashes.SHA256())
    )
    cert.write_bytes(found.public_bytes(serialization.Encoding.PEM))
    key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
