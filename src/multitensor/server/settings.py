"""What the server is told at its start: plain frozen data."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from multitensor.errors import InputError


@dataclass(frozen=True)
class ServerSettings:
    """model_name: what /v1/models calls the model, and what requests must call it; aliases: names that do as well.
    model_digest: SHA-256 of the model's files where known, for the audit log.
    api_keys: file of keys; None: everybody who can connect may ask.
    max_body_bytes: a larger request body is answered with 413. max_choices: largest `n` (times prompts).
    max_prompt_tokens: None is "what the context holds".
    max_streams: requests under way at once, of all callers together; max_waiting: of those, not yet scheduled.
    body_seconds: a body must have arrived by then. ping_seconds: silence on a stream after which a comment is sent.
    send_seconds: a reader that takes nothing for so long is given up. drain_seconds: answers under way get so long to
    finish after SIGTERM.
    """

    model_name: str
    aliases: tuple[str, ...] = ()
    model_digest: str = ""
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: Path | None = None
    audit_log: Path | None = None
    audit_content: bool = False
    tls_cert: Path | None = None
    tls_key: Path | None = None
    max_body_bytes: int = 16 << 20
    max_choices: int = 128
    max_prompt_tokens: int | None = None
    max_streams: int = 1024
    max_waiting: int = 512
    body_seconds: float = 60.0
    ping_seconds: float = 15.0
    send_seconds: float = 60.0
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise InputError(f"--port must be between 0 and 65535, not {self.port}")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise InputError("--tls-cert and --tls-key go together; give both or neither")
        if self.audit_content and self.audit_log is None:
            raise InputError("--audit-content needs a log to write to; give --audit-log FILE too")
        for name in ("max_body_bytes", "max_choices", "max_streams", "max_waiting"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        return is_loopback(self.host)

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls_cert else 'http'}://{host}:{self.port}"


def is_loopback(host: str) -> bool:
    """'localhost', 127.0.0.0/8 and ::1."""
    if host.lower().rstrip(".") == "localhost" or host.lower().endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
