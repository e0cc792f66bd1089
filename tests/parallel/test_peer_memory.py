"""Peer memory without GPUs: how it is shared out, and how every way of not having it is told."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multitensor.errors import DoesNotFit
from multitensor.parallel import peer_memory
from multitensor.parallel.local_group import LocalGroup
from multitensor.parallel.peer_memory import ALIGNMENT, NOTHING, PeerMemory, open_peer_memory
from multitensor.parallel.peer_probe import PeerProbe, read_verdict

CPU = torch.device("cpu")


def make(nbytes: int, rank: int = 0, size: int = 2) -> PeerMemory:
    local = torch.zeros(nbytes, dtype=torch.uint8)
    addresses = tuple(local.data_ptr() + (r - rank) * (1 << 30) for r in range(size))
    return PeerMemory(rank, local, addresses)


@given(st.lists(st.tuples(st.integers(1, 3000), st.sampled_from([1, 4, 16, 64, ALIGNMENT])), max_size=20))
def test_pieces_are_aligned_apart_and_alike_on_all_ranks(wishes: list[tuple[int, int]]) -> None:
    first, second = make(16384), make(16384, rank=1)
    taken: list[tuple[int, int]] = []
    for nbytes, alignment in wishes:
        try:
            offset = first.carve(nbytes, alignment)
        except DoesNotFit:
            assert first.free < nbytes + alignment
            with pytest.raises(DoesNotFit):
                second.carve(nbytes, alignment)
            continue
        assert second.carve(nbytes, alignment) == offset
        assert offset % alignment == 0 and offset + nbytes <= 16384
        assert all(offset >= stop or offset + nbytes <= start for start, stop in taken)
        taken.append((offset, offset + nbytes))


@pytest.mark.parametrize(("nbytes", "alignment"), [(0, 16), (16, 3), (16, 0), (16, 512)])
def test_senseless_pieces_are_refused(nbytes: int, alignment: int) -> None:
    with pytest.raises(ValueError, match="peer memory"):
        make(4096).carve(nbytes, alignment)


def test_a_piece_as_numbers_and_as_addresses() -> None:
    memory = make(4096, rank=1, size=3)
    memory.carve(100)
    offset = memory.carve(64)
    memory.words(offset, 4).copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert memory.local[offset : offset + 16].view(torch.float32).tolist() == [1.0, 2.0, 3.0, 4.0]
    assert memory.table(offset).tolist() == [address + offset for address in memory.addresses]
    assert memory.words(offset, 4).data_ptr() == memory.table(offset)[1]


def test_nothing_is_minus_zero() -> None:
    assert torch.tensor([-0.0]).view(torch.int32).item() == NOTHING


def opened(rank_maps: list[Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each rank's open_peer_memory returns where mapping does what rank_maps say."""
    ranks = LocalGroup.make(len(rank_maps))
    numbers = threading.local()

    def mapped(device: torch.device, nbytes: int, group: Any) -> Any:
        return rank_maps[numbers.rank](nbytes)

    monkeypatch.setattr(peer_memory, "_map", mapped)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    results: list[Any] = [None] * len(ranks)

    def one(rank: int) -> None:
        numbers.rank = rank
        share = ranks[rank].gather_objects
        results[rank] = open_peer_memory(rank, CPU, 1024, None, share, contextlib.nullcontext())

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def mapping(rank: int, skip: int = 256) -> Any:
    """A rank's mapping of two, whose buffer begins `skip` bytes after the address that torch tells."""

    def mapped(nbytes: int) -> Any:
        whole = torch.ones(nbytes + 512, dtype=torch.uint8)
        bases = [0x1000, 0x2000]
        bases[rank] = whole.data_ptr()
        return whole[skip : skip + nbytes], bases, whole

    return mapped


def test_a_new_buffer_is_all_nothing_and_its_offset_is_the_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = opened([mapping(0), mapping(1)], monkeypatch)
    for memory in (first, second):
        assert isinstance(memory, PeerMemory)
        assert bool((memory.local.view(torch.int32) == NOTHING).all())
    assert first.addresses == (first.local.data_ptr(), 0x2000 + 256)
    assert second.addresses == (0x1000 + 256, second.local.data_ptr())


def test_one_rank_that_cannot_map_is_everybodys_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(nbytes: int) -> Any:
        raise RuntimeError("CUDA driver error:\n operation not permitted")

    for answer in opened([mapping(0), fails], monkeypatch):
        assert answer == (
            "rank 1 could not map the peers' memory (RuntimeError: CUDA driver error: operation not permitted)"
        )


def test_buffers_that_lie_differently_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for answer in opened([mapping(0, skip=256), mapping(1, skip=0)], monkeypatch):
        assert answer == "the ranks' buffers do not lie alike in their allocations"


@pytest.mark.parametrize(
    ("status", "printed", "errors", "wanted"),
    [
        (0, 'noise\n{"reason": null}\n', "", None),
        (0, '{"reason": "GPU 0 has no peer access to GPU 1"}', "", "GPU 0 has no peer access to GPU 1"),
        (-11, "", "", "the probe of peer access ended with signal 11"),
        (
            1,
            "",
            "Traceback\nImportError: no cuda\n",
            "the probe of peer access ended with exit status 1: ImportError: no cuda",
        ),
        (0, "", "", "the probe of peer access ended with exit status 0"),
        (0, "[]", "", "the probe of peer access ended with exit status 0"),
        (-6, '{"reason": null}', "", "the probe of peer access ended with signal 6"),
    ],
)
def test_what_a_probe_says(status: int, printed: str, errors: str, wanted: str | None) -> None:
    assert read_verdict(status, printed, errors) == wanted


class ScriptedProbe(PeerProbe):
    """Runs a line of Python in place of the probe."""

    def __init__(self, line: str, patience: float) -> None:
        self.line = line
        super().__init__(["00000000-0000-0000-0000-000000000000", "GPU-1"], patience)

    def _command(self, patience: float) -> list[str]:
        return [sys.executable, "-c", self.line]


@pytest.mark.processes
def test_a_probe_sees_the_ranks_gpus_alone() -> None:
    probe = ScriptedProbe(
        "import json, os; print(json.dumps({'reason': os.environ['CUDA_VISIBLE_DEVICES']}))", patience=60
    )
    assert probe.reason() == "GPU-00000000-0000-0000-0000-000000000000,GPU-1"


@pytest.mark.processes
def test_a_probe_that_hangs_or_crashes_is_a_reason() -> None:
    hangs = ScriptedProbe("import time; time.sleep(600)", patience=0.5)
    began = time.monotonic()
    assert hangs.reason() == "the probe of peer access did not end within 0.5 s"
    assert time.monotonic() - began < 30
    crashes = ScriptedProbe("import os; os.abort()", patience=60)
    assert crashes.reason() == "the probe of peer access ended with signal 6"


@pytest.mark.processes
@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs to probe")
def test_without_gpus_the_probe_says_so_in_one_line() -> None:
    reason = PeerProbe(["a", "b"]).reason()
    assert reason is not None and "\n" not in reason and reason.startswith("the probe of peer access failed: ")
