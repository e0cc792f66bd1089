"""The parent's side of template_worker.py: one rendering process, killed when it does not answer in time (layer 1)."""

from __future__ import annotations

import json
import os
import selectors
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from multitensor.errors import InputError

_START_SECONDS = 30.0
_OUTPUT_CHARS = 1 << 24


class TemplateProcess:
    """Renders templates; started on first use, kept for the next, started anew after a failure. Safe to call from
    several threads. The process ends with this object, with the interpreter, or when its stdin closes.

    seconds: how long one rendering may take.
    """

    def __init__(self, seconds: float = 5.0) -> None:
        self._seconds = seconds
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize | None = None

    def render(self, template: str, contexts: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
        """{"text": ...} or {"error": ...} for each context. Raises InputError when the template runs out of its
        limits."""
        request = {
            "template": template,
            "contexts": list(contexts),
            "cpu_seconds": int(self._seconds) + 1,
            "output_chars": _OUTPUT_CHARS,
        }
        try:
            body = json.dumps(request).encode()
        except (TypeError, ValueError) as error:
            raise InputError(f"chat messages must be plain JSON values: {error}") from None
        with self._lock:
            process = self._started()
            try:
                return self._exchange(process, struct.pack("<I", len(body)) + body, self._seconds)
            except TimeoutError:
                self._stop()
                raise InputError(f"the chat template did not finish within {self._seconds:g} seconds") from None
            except (EOFError, OSError):
                self._stop()
                raise InputError("the chat template needed more memory or time than it may have") from None

    def close(self) -> None:
        """Ends the process; a later `render` starts another."""
        with self._lock:
            self._stop()

    @property
    def pid(self) -> int | None:
        """The running process, None when there is none."""
        return self._process.pid if self._process else None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._stop()
        # -P: the script's folder has modules whose names others use too, and must not come first on the path.
        # A session of its own: Ctrl-C is for the parent, which then closes stdin.
        process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("template_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert process.stdin is not None and process.stdout is not None
        os.set_blocking(process.stdin.fileno(), False)
        os.set_blocking(process.stdout.fileno(), False)
        self._process = process
        self._finalizer = weakref.finalize(self, _end, process)
        try:
            self._exchange(process, b"", _START_SECONDS)
        except (TimeoutError, EOFError, OSError):
            self._stop()
            hint = f"does `{sys.executable} -c 'import jinja2'` work?"
            raise InputError(f"the chat template's process did not start; {hint}") from None
        return process

    def _stop(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._finalizer = None

    def _exchange(self, process: subprocess.Popen[bytes], data: bytes, seconds: float) -> list[dict[str, str]]:
        """Writes the data and reads one message. Raises TimeoutError, EOFError or OSError."""
        assert process.stdin is not None and process.stdout is not None
        deadline = time.monotonic() + seconds
        received = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if data:
                selector.register(process.stdin, selectors.EVENT_WRITE)
            while (size := _message_size(received)) is None or len(received) < size:
                events = selector.select(max(0.0, deadline - time.monotonic()))
                if not events:
                    raise TimeoutError
                for key, _ in events:
                    if key.fileobj is process.stdout:
                        piece = os.read(process.stdout.fileno(), 1 << 20)
                        if not piece:
                            raise EOFError
                        received += piece
                    else:
                        data = data[os.write(process.stdin.fileno(), data[: 1 << 16]) :]
                        if not data:
                            selector.unregister(process.stdin)
        return json.loads(bytes(received[4:]))["results"]


def _message_size(received: bytearray) -> int | None:
    return 4 + struct.unpack("<I", received[:4])[0] if len(received) >= 4 else None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills the process and reaps it; it has nothing to save."""
    process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
    process.wait()
