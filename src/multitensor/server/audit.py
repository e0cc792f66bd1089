"""The audit log: append-only JSON lines, each holding the hash of the one before it.

A record's hash is SHA-256 over its JSON without "hash", keys sorted, no spaces. Whoever changes, removes or inserts a
line breaks the chain from there on. Cutting lines off the end, or writing the whole file anew, leaves a whole chain: to
notice that, keep a head (`multitensor audit verify` prints it) elsewhere and pass it to a later `verify --head`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from multitensor.errors import CheckFailed, InputError, MultitensorError

GENESIS = "0" * 64
TAIL_BYTES = 1 << 16
MAX_LINE = 256 << 20


class AuditError(MultitensorError):
    """A record could not be made lasting, so what it records must not happen. HTTP 503. The message is for the
    operator: it holds the path."""


@dataclass(frozen=True)
class AuditSummary:
    """What `verify` found: records, the hash of the last, and when the first and last were written."""

    records: int
    head: str
    first_time: str | None
    last_time: str | None


@dataclass(frozen=True)
class _End:
    """Where a log ends: bytes, records, and the last one's hash."""

    size: int
    records: int
    head: str


class AuditLog:
    """One writer of one file, for any number of threads. A record is on disk when `append` returns.

    Records that come while others are being synchronised share the next fsync.
    """

    def __init__(self, path: str | os.PathLike[str], include_content: bool = False) -> None:
        """Opens or makes the file (mode 0600). Raises InputError when it cannot be opened or is in use by another
        process, CheckFailed when it does not end in an unchanged record."""
        self._path = Path(path)
        self.include_content = include_content
        self._write_lock = threading.Lock()
        self._sync_lock = threading.Lock()
        self._size = 0
        self._records = 0
        self._head = GENESIS
        self._synced = _End(0, 0, GENESIS)  # what is known to be on disk
        self._taken_back = 0  # how often records were cut off again
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise InputError(f"{path}: cannot open the audit log: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._open_chain()
        except BlockingIOError as error:
            os.close(self._file)
            raise InputError(f"{path}: another process writes this audit log; give each server its own") from error
        except BaseException:
            os.close(self._file)
            raise

    def append(self, event: str, content: Mapping[str, Any] | None = None, **fields: Any) -> str:
        """Adds a record {seq, time, event, **fields, previous, hash} and returns its hash. `content` (prompts,
        answers) is left out unless the log includes content. Raises AuditError, then nothing was added (unless the
        disk does not even let the file be cut; then it stays in the chain)."""
        record = {**fields, "event": event, "time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        if self.include_content and content is not None:
            record["content"] = _writable(content)
        with self._write_lock:
            record |= {"seq": self._records, "previous": self._head}
            record["hash"] = record_hash(record)
            self._write(_encode(record) + b"\n")
            self._records += 1
            self._head = record["hash"]
            number, taken_back = self._records, self._taken_back
        self._sync(number, taken_back)
        return record["hash"]

    def close(self) -> None:
        """Nothing can be appended afterwards."""
        with self._sync_lock, self._write_lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    def _write(self, line: bytes) -> None:
        """All of the line or nothing: half of it is cut off again."""
        if self._file < 0:
            raise AuditError(f"{self._path}: the audit log is closed")
        try:
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError as error:
            os.ftruncate(self._file, self._size)
            raise _failed(self._path, error) from error
        self._size += len(line)

    def _sync(self, number: int, taken_back: int) -> None:
        """Returns when record `number` (counted from 1) and all before it are on disk. taken_back: as it was when the
        record was written. Nobody waits for the lock of `_sync` while holding that of `append`."""
        with self._sync_lock:
            if self._taken_back != taken_back:
                raise AuditError(f"{self._path}: the record was taken back, as one before it could not be made lasting")
            if self._synced.records >= number or self._file < 0:
                return
            with self._write_lock:
                newest = _End(self._size, self._records, self._head)  # fsync covers them too
            try:
                os.fsync(self._file)
            except OSError as error:
                self._take_back()
                raise _failed(self._path, error) from error
            self._synced = newest

    def _take_back(self) -> None:
        """Cuts off all that is not known to be on disk: what it records is refused, to all that wait for it."""
        with self._write_lock, contextlib.suppress(OSError):
            os.ftruncate(self._file, self._synced.size)
            self._size, self._records, self._head = self._synced.size, self._synced.records, self._synced.head
            self._taken_back += 1

    def _open_chain(self) -> None:
        """Takes up the chain where it ends. A last line without its end is what a crash leaves: it is cut off, and a
        record says so."""
        self._size = os.fstat(self._file).st_size
        with open(self._path, "rb") as file:
            whole, torn = _tail(file, self._size)
        if whole:
            record = _decode(whole, f"{self._path}: the last line")
            self._records, self._head = record["seq"] + 1, record["hash"]
        self._size -= len(torn)
        self._synced = _End(self._size, self._records, self._head)
        if torn:
            os.ftruncate(self._file, self._size)
            digest = hashlib.sha256(torn).hexdigest()
            self.append("recovered", discarded_bytes=len(torn), discarded_sha256=digest)


def verify_log(path: str | os.PathLike[str], head: str | None = None) -> AuditSummary:
    """Checks every line of a log; `head`: a hash noted earlier, which must be in the chain.

    Raises CheckFailed, which names the first bad line; InputError for a file that cannot be read.
    """
    head = None if head is None else head.strip().lower()
    previous, number, seen = GENESIS, 0, head is None or head == GENESIS
    first = last = None
    try:
        with open(path, "rb") as file:
            while line := file.readline(MAX_LINE):
                where = f"{path}, line {number + 1}"
                if not line.endswith(b"\n"):
                    raise CheckFailed(f"{where}: the line has no end: a record was cut off, or is longer than allowed")
                record = _decode(line, where)
                if record["previous"] != previous or record["seq"] != number:
                    raise CheckFailed(f"{where}: does not follow the line before it: a line was removed or inserted")
                previous = record["hash"]
                seen = seen or previous == head
                first, last = first or record["time"], record["time"]
                number += 1
    except OSError as error:
        raise InputError(f"{path}: cannot read the audit log: {error.strerror}") from error
    if not seen:
        raise CheckFailed(
            f"{path}: no record has the hash {head}: its last lines were cut off, or the file was replaced"
        )
    return AuditSummary(number, previous, first, last)


def record_hash(record: Mapping[str, Any]) -> str:
    """Hex SHA-256 of a record without its "hash"."""
    return hashlib.sha256(_encode({name: value for name, value in record.items() if name != "hash"})).hexdigest()


def _encode(record: Mapping[str, Any]) -> bytes:
    # ASCII with escapes, so that lone surrogates in a client's text can be written, and read back to the same bytes.
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _writable(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content as JSON can hold it: a client's NaN and infinities (1e999) become their names."""
    try:
        return json.loads(json.dumps(content), parse_constant=str)
    except (RecursionError, ValueError):
        return {"left_out": "nested too deeply, or with numbers too long, to be written"}


def _decode(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        complete = {"seq", "time", "previous", "hash"} <= record.keys()
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckFailed(f"{where}: not a record of an audit log") from error
    if not complete or type(record["seq"]) is not int:
        raise CheckFailed(f"{where}: not a record of an audit log")
    if _encode(record) + b"\n" != line or record_hash(record) != record["hash"]:
        raise CheckFailed(f"{where}: the record was changed: its hash does not match")
    return record


def _tail(file: BinaryIO, size: int) -> tuple[bytes, bytes]:
    """The last whole line, and what comes after it."""
    length = TAIL_BYTES
    while True:
        file.seek(max(0, size - length))
        data = file.read(min(length, size))
        body, newline, torn = data.rpartition(b"\n")
        if newline:
            _, cut, line = body.rpartition(b"\n")
            if cut or length >= size:
                return line + b"\n", torn
        elif length >= size:
            return b"", data
        length *= 4


def _failed(path: Path, error: OSError) -> AuditError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return AuditError(f"{path}: the disk of the audit log is full; free some space")
    return AuditError(f"{path}: the audit log cannot be written: {error.strerror}")
