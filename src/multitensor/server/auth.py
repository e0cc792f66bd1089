"""API keys: random secrets of which a file holds only the SHA-256, named, limited, revocable while the server runs.

One line a key, spaces between, `#` starts a comment:

    NAME sha256:HEX [requests_per_minute=60] [tokens_per_minute=100000] [streams=8]

Keys are 256 random bits made by `new_key`, so a fast hash is enough: nothing can be guessed by trying words.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from multitensor.errors import InputError, MultitensorError

logger = logging.getLogger(__name__)

KEY_PREFIX = "mt-"
LIMITS = ("requests_per_minute", "tokens_per_minute", "streams")
MAX_HEADER = 512  # bytes of a header value worth hashing; a key has 46
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_HEX = re.compile(r"[0-9a-f]{64}")


class AuthError(MultitensorError):
    """A request carried no key, or one that is not (or no longer) known. HTTP 401; the message is safe to send."""


@dataclass(frozen=True)
class Key:
    """Who asks. digest: SHA-256 of the secret (empty for ANONYMOUS). Limits: None is none."""

    name: str
    digest: bytes = b""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    streams: int | None = None

    def to_line(self) -> str:
        limits = [f"{name}={value}" for name in LIMITS if (value := getattr(self, name)) is not None]
        return " ".join([self.name, f"sha256:{self.digest.hex()}", *limits])


ANONYMOUS = Key("anonymous")


class KeyStore:
    """The keys of one file, read again whenever it changes. For any number of threads.

    A line that goes bad while the server runs is left out, and a file that vanishes leaves no key valid: an edit can
    lock people out, it cannot let anybody in.
    """

    def __init__(self, path: Path) -> None:
        """Use `load`."""
        self._path = path
        self._lock = threading.Lock()
        self._stamp: tuple[int, ...] | None = None
        self._keys: tuple[Key, ...] = ()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> KeyStore:
        """Raises InputError when the file cannot be read, has a bad line, or may be written by everybody."""
        store = cls(Path(path))
        store._stamp = _stamp(store._path)
        store._keys = read_keys(store._path)
        return store

    @property
    def keys(self) -> tuple[Key, ...]:
        """The keys that are valid now."""
        with self._lock:
            self._refresh()
            return self._keys

    def check(self, header_value: str | None) -> Key | None:
        """The key of an `Authorization` header ("Bearer SECRET"), or None. Takes as long whichever key it is."""
        secret = secret_of(header_value)
        if secret is None:
            return None
        digest = hash_secret(secret)
        found = None
        for key in self.keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def _refresh(self) -> None:
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        keys, problems = _parse(self._path)
        self._keys = tuple(keys)
        for problem in problems:
            logger.error("API keys: %s", problem)
        logger.info("API keys: read %s again, %d valid", self._path, len(keys))


def authenticate(store: KeyStore | None, header_value: str | None) -> Key:
    """The key of a request; ANONYMOUS when the server has no key file (then any header is accepted).

    Raises AuthError with a message that is safe to send.
    """
    if store is None:
        return ANONYMOUS
    key = store.check(header_value)
    if key is not None:
        return key
    if secret_of(header_value) is None:
        raise AuthError("this server needs an API key; send it as 'Authorization: Bearer KEY'")
    raise AuthError("the API key is not valid: unknown, or revoked")


def secret_of(header_value: str | None) -> str | None:
    """ "Bearer SECRET" -> SECRET; None for anything else."""
    if not header_value or len(header_value) > MAX_HEADER:
        return None
    scheme, _, secret = header_value.strip().partition(" ")
    secret = secret.strip()
    return secret if scheme.lower() == "bearer" and secret else None


def hash_secret(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


def new_key(
    name: str,
    *,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    streams: int | None = None,
) -> tuple[Key, str]:
    """A key and its secret, which is in no file: show it once."""
    secret = KEY_PREFIX + secrets.token_urlsafe(32)
    _check_name(name)
    for limit, value in (("requests", requests_per_minute), ("tokens", tokens_per_minute), ("streams", streams)):
        if value is not None and value < 1:
            raise InputError(f"key {name}: the limit on {limit} must be at least 1, not {value}; leave it out for none")
    return Key(name, hash_secret(secret), requests_per_minute, tokens_per_minute, streams), secret


def read_keys(path: Path) -> tuple[Key, ...]:
    """All keys of a file; InputError for the first thing that is wrong with it."""
    keys, problems = _parse(path)
    if problems:
        raise InputError(problems[0])
    return tuple(keys)


def add_key(path: Path, key: Key) -> None:
    """Appends a key, making the file (mode 0600) if need be. Raises InputError when the name is taken."""
    with _locked(path):
        lines = _lines(path) if path.exists() else ["# API keys of multitensor: NAME sha256:HEX [limits]"]
        if path.exists() and any(known.name == key.name for known in read_keys(path)):
            raise InputError(f"{path}: a key named {key.name} exists; revoke it first or take another name")
        _write(path, [*lines, key.to_line()])


def revoke_key(path: Path, name: str) -> None:
    """Removes a key's line; servers that use the file refuse it from their next request on."""
    with _locked(path):
        lines = _lines(path)
        kept = [line for line in lines if line.partition("#")[0].split()[:1] != [name]]
        if len(kept) == len(lines):
            raise InputError(f"{path}: no key is named {name}; see `multitensor keys list {path}`")
        _write(path, kept)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Around reading and writing anew, one process at a time. The lock is on a file beside it, which stays: the file of
    keys itself is another one after each change."""
    try:
        handle = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InputError(f"{path}: cannot lock it with a file beside it: {error.strerror}") from error
    try:
        if path.exists():  # so that whoever owns the keys can change them after root has
            owner = path.stat()
            with contextlib.suppress(PermissionError):
                os.fchown(handle, owner.st_uid, owner.st_gid)
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _parse(path: Path) -> tuple[list[Key], list[str]]:
    """Keys, and one line of words for each thing that is wrong."""
    try:
        lines = _lines(path)
        mode = path.stat().st_mode
    except InputError as error:
        return [], [str(error)]
    except OSError as error:
        return [], [f"{path}: {error.strerror}"]
    if mode & stat.S_IWOTH:
        return [], [f"{path}: everybody may write this file, so everybody may add keys; run chmod 600 on it"]
    keys: list[Key] = []
    problems: list[str] = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            key = _parse_key(words)
            if any(known.name == key.name for known in keys):
                raise InputError(f"the name {key.name} comes twice")
            keys.append(key)
        except InputError as error:
            problems.append(f"{path}, line {number}: {error}")
    return keys, problems


def _parse_key(words: Sequence[str]) -> Key:
    name = words[0]
    _check_name(name)
    kind, _, digest = words[1].partition(":") if len(words) > 1 else ("", "", "")
    if kind != "sha256" or not _HEX.fullmatch(digest):
        raise InputError(f"after the name {name} comes sha256: and 64 lower-case hex digits")
    limits: dict[str, int] = {}
    for word in words[2:]:
        limit, _, value = word.partition("=")
        if limit not in LIMITS or not value.isascii() or not value.isdigit() or int(value) < 1 or limit in limits:
            raise InputError(f"{word}: a limit is one of {', '.join(LIMITS)}, then = and a number from 1 up, once")
        limits[limit] = int(value)
    return Key(name, bytes.fromhex(digest), **limits)


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or name == ANONYMOUS.name:
        raise InputError(f"{name!r} cannot name a key: use up to 64 letters, digits and . _ @ -, but not 'anonymous'")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot read the API keys: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text, so not a file of API keys") from error


def _write(path: Path, lines: Sequence[str]) -> None:
    """All or nothing, so that a server reading at this moment sees the old file or the new one."""
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o600
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
                file.flush()
                os.fsync(file.fileno())
            if path.exists():  # a service's own user must still be able to read what root rewrites
                owner = path.stat()
                os.chown(temporary, owner.st_uid, owner.st_gid)
            os.chmod(temporary, mode)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise InputError(f"{path}: cannot write: {error.strerror}") from error


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino
