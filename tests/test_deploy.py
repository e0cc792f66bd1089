"""The files in deploy/ name options, extras, files and folders that exist; the health check finds the server."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import ssl
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import typer.main

from multitensor.cli.main import app
from multitensor.kernels.cuda.program import cache_folder

ROOT = Path(__file__).parent.parent
UNIT = (ROOT / "deploy/multitensor.service").read_text()
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text()
HEALTHCHECK = ROOT / "deploy/healthcheck.py"


def unit() -> dict[str, list[str]]:
    """Every setting's values."""
    found: dict[str, list[str]] = {}
    for line in UNIT.splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def serve_options() -> set[str]:
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    return {word for parameter in command.params for word in parameter.opts}


def test_the_commands_have_options_that_exist() -> None:
    (start,) = unit()["ExecStart"]
    entry = re.search(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.M)
    assert entry is not None
    for words in (shlex.split(start), json.loads(entry[1])):
        assert Path(words[0]).name == "multitensor" and words[1] == "serve"
        used = {word for word in words if word.startswith("--")}
        assert used and used <= serve_options()
    health = HEALTHCHECK.read_text()
    assert set(re.findall(r'"(--[a-z-]+)":', health)) <= serve_options()


@pytest.mark.parametrize("text", [UNIT, DOCKERFILE])
def test_what_is_installed_is_this_source_with_what_compiles_kernels(text: str) -> None:
    installed = [
        word
        for line in re.findall(r"^(?:RUN|#  ).*pip install (.*)$", text, re.M)
        for word in shlex.split(line)
        if not word.startswith("-")
    ]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(name.startswith("cuda-") for name in extras["cuda"])
    assert [word for word in installed if not word.startswith("torch==")] == [".[cuda]"]


def test_kernels_are_kept_in_a_folder_that_the_service_may_write(monkeypatch: pytest.MonkeyPatch) -> None:
    (folder,) = unit()["CacheDirectory"]
    (environment,) = unit()["Environment"]
    variables = dict(word.split("=", 1) for word in shlex.split(environment))
    assert all(path.startswith(f"%C/{folder}/") for path in variables.values())
    monkeypatch.setenv("MULTITENSOR_KERNEL_CACHE", variables["MULTITENSOR_KERNEL_CACHE"].replace("%C", "/var/cache"))
    assert cache_folder() == Path(f"/var/cache/{folder}/kernels")


def test_what_the_image_copies_is_here() -> None:
    for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.M):
        *sources, _ = line.split()
        assert all((ROOT / source).exists() for source in sources), line
    copied = re.search(r"^COPY deploy/healthcheck.py (\S+)$", DOCKERFILE, re.M)
    checked = re.search(r"HEALTHCHECK .*?CMD (\[.*?\])", DOCKERFILE, re.S)
    assert copied is not None and checked is not None and json.loads(checked[1])[-1] == copied[1]


class _Health(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    if request.param == "https" and shutil.which("openssl") is None:
        pytest.skip("needs the openssl command, for a certificate")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Health)
    if request.param == "https":
        cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
        subject = ["-days", "2", "-subj", "/CN=models.example", "-keyout", str(key), "-out", str(cert)]
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        subprocess.run(["openssl", "req", "-x509", *curve, *subject], check=True, capture_output=True)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def check(tmp_path: Path, *words: str) -> int:
    file = tmp_path / "cmdline"
    file.write_text("\0".join(["/opt/multitensor/bin/python", "multitensor", "serve", *words, ""]))
    return subprocess.run([sys.executable, str(HEALTHCHECK), str(file)], capture_output=True, timeout=60).returncode


@pytest.mark.parametrize("server", ["http", "https"], indirect=True)
def test_the_health_check_follows_port_and_tls(
    server: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    port = str(server.server_address[1])
    tls = ["--tls-cert", "c.pem", "--tls-key=k.pem"] if isinstance(server.socket, ssl.SSLSocket) else []
    words = ["--host", "0.0.0.0", "--port", "8000", "/models/m.gguf", *tls]
    assert check(tmp_path, *words, "--port", port) == 0
    assert check(tmp_path, *words, f"--port={port}") == 0
    monkeypatch.setattr(_Health, "status", 503)
    assert check(tmp_path, *words, "--port", port) == 1
    monkeypatch.undo()
    server.shutdown()
    server.server_close()
    assert check(tmp_path, *words, "--port", port) == 1
