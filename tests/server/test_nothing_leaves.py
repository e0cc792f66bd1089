"""Nothing leaves the machine: server, ranks and client work where there is no network but loopback, and where there is
one, no process of theirs as much as looks up a name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scripted import make_model

pytestmark = pytest.mark.processes

VISITOR = Path(__file__).with_name("visitor.py")
LOOPBACK_UP = """
import fcntl, os, socket, struct, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:  # SIOCSIFFLAGS: IFF_UP, of netdevice(7)
    fcntl.ioctl(s, 0x8914, struct.pack("16sH14x", b"lo", 1))
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
# Found by every Python process of the server and of its ranks, whose module path is the server's.
WATCH = """
import ipaddress, os, sys

LOG = os.environ["SOCKET_LOG"]

def is_near(address):
    if not isinstance(address, tuple):
        return True  # of a Unix socket
    host = address[0]
    if host in (None, "", b"", "localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback or ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False

def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        near = len(arguments) < 2 or arguments[1] is None or is_near(arguments[1])
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        near = is_near(arguments[:1])
    else:
        return
    note("near" if near else "FAR", event, arguments)
    if not near:
        raise PermissionError(f"{event} {arguments}")

def note(*values):
    fd = os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, (" ".join(map(str, values)) + "\\n").encode())
    os.close(fd)

sys.addaudithook(watch)
note("watching", *getattr(sys, "orig_argv", []))
"""


def check(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    assert found["code"] == 0
    assert found["asked"][:5] == ["chat.completion", "True stream", "text_completion", found["asked"][3], "list"]
    assert found["asked"][3] in ("stop", "length")
    assert all(answer.endswith(" 200") for answer in found["asked"][5:]) and len(found["asked"]) == 13
    return found


def visit(model: Path, *prefix: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, str(VISITOR), str(model), "--devices", "cpu:2", "--ctx", "256"],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def test_with_loopback_alone_everything_works(tmp_path: Path) -> None:
    namespace = ["unshare", "--map-root-user", "--net"]
    probe = [*namespace, sys.executable, "-c", LOOPBACK_UP, "-c", ""]
    try:
        allowed = subprocess.run(probe, capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if allowed.returncode:
        pytest.skip(f"no network namespace may be made here: {allowed.stderr.strip()[-200:]}")
    found = check(visit(make_model(tmp_path), *namespace, sys.executable, "-c", LOOPBACK_UP))
    assert found["interfaces"] == ["lo"]


@pytest.fixture
def watched(tmp_path: Path) -> dict[str, str]:
    """Environment in which every Python process notes its connections, and may make none but near ones."""
    folder = tmp_path / "watch"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(WATCH)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), "SOCKET_LOG": str(tmp_path / "sockets")}


def test_no_process_connects_or_looks_up_anything_far(tmp_path: Path, watched: dict[str, str]) -> None:
    check(visit(make_model(tmp_path), sys.executable, **watched))
    lines = Path(watched["SOCKET_LOG"]).read_text().splitlines()
    processes = [line for line in lines if line.startswith("watching")]
    assert sum("multitensor.engine.worker" in line for line in processes) == 2
    assert sum("multitensor serve" in line for line in processes) == 1
    assert not [line for line in lines if line.startswith("FAR")]
    assert any(line.startswith("near socket.") for line in lines), "the client's own connections, at least"


@pytest.mark.parametrize("attempt", ["socket.create_connection(('192.0.2.1', 9), 1)", "socket.getaddrinfo('a.b', 1)"])
def test_the_watch_would_see_it(watched: dict[str, str], attempt: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", f"import socket; {attempt}"],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, **watched},
    )
    assert "PermissionError" in result.stderr
    assert "FAR socket." in Path(watched["SOCKET_LOG"]).read_text()
