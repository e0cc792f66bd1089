"""The audit log: what is written is on disk and chained; every change shows; a full disk harms one request."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from multitensor.errors import CheckFailed, InputError
from multitensor.server.audit import GENESIS, AuditError, AuditLog, verify_log


def _write(path: Path, count: int) -> list[str]:
    log = AuditLog(path)
    hashes = [log.append("end", key="ada", prompt_tokens=number, outcome="stop") for number in range(count)]
    log.close()
    return hashes


def test_records_are_chained_and_verified(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    hashes = _write(path, 5)
    summary = verify_log(path)
    assert (summary.records, summary.head) == (5, hashes[-1])
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["previous"] for record in records] == [GENESIS, *hashes[:-1]]
    assert records[3]["key"] == "ada" and records[3]["prompt_tokens"] == 3
    assert path.stat().st_mode & 0o777 == 0o600
    assert verify_log(path, head=hashes[2]).records == verify_log(path, head=f"{hashes[2].upper()} ").records == 5


def test_a_log_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    _write(path, 2)
    log = AuditLog(path)
    log.append("end", note="x" * 200_000)  # longer than what is read of the tail at first
    log.close()
    _write(path, 2)
    assert verify_log(path).records == 5


def test_content_only_when_switched_on(tmp_path: Path) -> None:
    for include in (False, True):
        path = tmp_path / f"{include}.jsonl"
        log = AuditLog(path, include_content=include)
        log.append("end", content={"prompt": "my secret \udcff"}, key="ada")
        log.close()
        assert ("my secret" in path.read_text()) is include
        assert verify_log(path).records == 1


def _change_value(lines: list[str]) -> None:
    lines[2] = lines[2].replace('"prompt_tokens":2', '"prompt_tokens":9')


def _remove(lines: list[str]) -> None:
    del lines[2]


def _remove_first(lines: list[str]) -> None:
    del lines[0]


def _swap(lines: list[str]) -> None:
    lines[2], lines[3] = lines[3], lines[2]


def _double(lines: list[str]) -> None:
    lines.insert(2, lines[2])


def _spaces(lines: list[str]) -> None:
    lines[2] = lines[2].replace(",", ", ")


def _forge_hash(lines: list[str]) -> None:
    record = json.loads(lines[2])
    record["outcome"] = "length"
    from multitensor.server.audit import record_hash

    record["hash"] = record_hash(record)
    lines[2] = json.dumps(record, sort_keys=True, separators=(",", ":"))


@pytest.mark.parametrize("change", [_change_value, _remove, _remove_first, _swap, _double, _spaces, _forge_hash])
def test_every_change_shows(tmp_path: Path, change) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "audit.jsonl"
    _write(path, 6)
    lines = path.read_text().splitlines()
    change(lines)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(CheckFailed, match=r"line [1-4]"):
        verify_log(path)


def test_a_cut_end_shows_by_a_head_noted_before(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    hashes = _write(path, 4)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    assert verify_log(path).records == 3
    with pytest.raises(CheckFailed, match="cut off"):
        verify_log(path, head=hashes[-1])


@pytest.mark.parametrize(
    "line", ["[]", "7", "{}", "\xff", '{"seq":0,"time":"t","previous":"0","hash":"0"}', "[" * 100_000]
)
def test_foreign_lines_are_said_to_be_foreign(tmp_path: Path, line: str) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_text(line + "\n", encoding="latin-1")
    with pytest.raises(CheckFailed, match="line 1"):
        verify_log(path)
    with pytest.raises(CheckFailed, match="last line"):
        AuditLog(path)


def test_what_a_crash_cut_off_is_removed_and_recorded(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    _write(path, 2)
    with open(path, "ab") as file:
        file.write(b'{"half a rec')
    with pytest.raises(CheckFailed, match="line 3"):
        verify_log(path)
    AuditLog(path).close()
    assert verify_log(path).records == 3
    record = json.loads(path.read_text().splitlines()[-1])
    assert (record["event"], record["discarded_bytes"]) == ("recovered", 12)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    with pytest.raises(InputError, match="another process"):
        AuditLog(path)
    log.close()
    AuditLog(path).close()
    with pytest.raises(AuditError):
        log.append("end")
    with pytest.raises(InputError, match="cannot open"):
        AuditLog(tmp_path / "no" / "folder")


def test_a_full_disk_fails_one_record_and_leaves_the_chain_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.append("end", number=0)
    write = os.write

    def half_then_full(file: int, data: bytes) -> int:
        if len(data) > 20 and not half_then_full.__dict__.get("called"):
            half_then_full.__dict__["called"] = True
            return write(file, data[:20])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half_then_full)
        with pytest.raises(AuditError, match="is full"):
            log.append("end", number=1)
    log.append("end", number=2)
    log.close()
    assert verify_log(path).records == 2


FULL = """
import resource, signal, sys
from multitensor.server.audit import AuditError, AuditLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = AuditLog(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))  # what lies beyond cannot be written
failed = 0
for number in range(20):
    try:
        log.append("end", number=number)
    except AuditError:
        failed += 1
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.append("end", number=99)
print(failed)
"""


def test_a_file_that_the_kernel_lets_grow_no_further(tmp_path: Path) -> None:
    """The kernel itself writes half a record and then refuses, as on a full disk."""
    path = tmp_path / "audit.jsonl"
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, check=True)
    failed = int(done.stdout)
    assert 0 < failed < 20
    assert verify_log(path).records == 21 - failed


def test_what_cannot_be_made_lasting_is_cut_off_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what others have written meanwhile, who are told."""
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.append("end", number=0)
    ends: dict[int, str] = {}
    others: list[threading.Thread] = []

    def append(number: int) -> None:
        try:
            log.append("end", number=number)
            ends[number] = "written"
        except AuditError as error:
            ends[number] = str(error)

    def broken(file: int) -> None:
        size = path.stat().st_size
        others.append(threading.Thread(target=append, args=(2,)))
        others[0].start()
        while path.stat().st_size == size:
            pass
        monkeypatch.undo()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    append(1)
    others[0].join(20)
    assert "cannot be written" in ends[1] and "taken back" in ends[2]
    append(3)
    log.close()
    assert ends[3] == "written"
    assert [json.loads(line)["number"] for line in path.read_text().splitlines()] == [0, 3]
    assert verify_log(path).records == 2


def test_content_that_json_cannot_hold_is_written_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, include_content=True)
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    log.append("end", content={"numbers": [float("inf"), float("nan"), 1.5]})
    log.append("end", content={"deep": deep})
    log.close()
    contents = [json.loads(line)["content"] for line in path.read_text().splitlines()]
    assert contents[0] == {"numbers": ["Infinity", "NaN", 1.5]} and "deep" not in contents[1]
    assert verify_log(path).records == 2


def test_many_threads_share_syncs_and_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    fsync, synced = os.fsync, []
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(file), fsync(file))[1])
    threads = [threading.Thread(target=lambda: [log.append("end", key="ada") for _ in range(25)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert verify_log(path).records == 200
    assert 0 < len(synced) <= 200
