"""The rings between engine and ranks: order, size, back-pressure, interruption, wrap-around."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_fakes import make_step, run_forked

from multitensor.errors import RankFailed
from multitensor.parallel.shared_region import SharedRegion
from multitensor.parallel.step_channel import EngineChannel, RankChannel, RingReader, RingWriter


class Full(Exception):
    pass


def refuse() -> None:
    raise Full


def wait() -> None:
    return None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=30), st.integers(9, 300), st.integers(1, 3))
def test_messages_arrive_whole_and_in_order(messages: list[bytes], capacity: int, readers: int) -> None:
    """Any sizes, also above the ring's, to every reader."""
    region = SharedRegion.create("test", 4096)
    writer = RingWriter(region, 0, readers, capacity, 0.0)
    found: list[list[bytes]] = [[] for _ in range(readers)]

    def read(number: int) -> None:
        reader = RingReader(region, 0, readers, capacity, number, 0.0)
        found[number] = [bytes(reader.receive(wait)) for _ in messages]

    threads = [threading.Thread(target=read, args=(number,)) for number in range(readers)]
    for thread in threads:
        thread.start()
    for message in messages:
        writer.send(message, wait)
    for thread in threads:
        thread.join(20)
    assert found == [messages] * readers
    region.close()


def test_a_full_ring_makes_the_writer_wait() -> None:
    channel = EngineChannel(2, step_ring_bytes=1024)
    ranks = [RankChannel(SharedRegion(os.dup(channel.region.fd)), rank) for rank in (0, 1)]
    sent = 0
    with pytest.raises(Full):
        for sent in range(1000):
            channel.send(("step", sent, b"x" * 50), refuse)
    assert 5 < sent < 20
    ranks[0].receive()
    with pytest.raises(Full):  # the slower rank counts
        channel.send(("step", sent, b"x" * 50), refuse)
    assert ranks[1].receive()[1] == 0
    channel.send(("step", sent, b"x" * 50), refuse)
    for rank in ranks:
        assert [rank.receive()[1] for _ in range(sent)] == list(range(1, sent + 1))
        rank.close()
    channel.close()


def test_an_interrupted_wait_loses_nothing() -> None:
    """As when Ctrl-C interrupts one answer in a chat that goes on."""
    channel = EngineChannel(1, step_ring_bytes=256)
    rank = RankChannel(SharedRegion(os.dup(channel.region.fd)), 0)
    with pytest.raises(Full):
        channel.receive(0, refuse)
    channel.send(b"a" * 150, refuse)
    with pytest.raises(Full):
        channel.send(b"b" * 150, refuse)
    assert rank.receive() == b"a" * 150
    channel.send(b"c" * 150, refuse)
    assert rank.receive() == b"c" * 150
    rank.send("result")
    assert channel.pending(0) and channel.receive(0, refuse) == "result" and not channel.pending(0)
    rank.close()
    channel.close()


def test_positions_pass_the_futex_words_wrap_around() -> None:
    """Positions are 64 bits, the word that is waited on their low 32."""
    region = SharedRegion.create("test", 4096)
    positions = region.view(0, 256, "Q")
    positions[0] = positions[16] = 2**32 - 30
    writer, reader = RingWriter(region, 0, 1, 64, 0.0), RingReader(region, 0, 1, 64, 0, 0.0)
    for i in range(10):
        writer.send(bytes([i] * 20), refuse)
        assert reader.receive(refuse) == bytes([i] * 20)
    positions = None
    region.close()


def test_ranks_tell_where_their_time_went() -> None:
    channel = EngineChannel(2)
    assert channel.seconds() == ((0.0, 0.0), (0.0, 0.0))
    ranks = [RankChannel(SharedRegion(os.dup(channel.region.fd)), number) for number in range(2)]
    ranks[0].report_progress(3, 4)
    ranks[0].report_seconds(1.5, 0.25)
    ranks[1].report_seconds(2.5, None)
    assert channel.seconds() == ((1.5, 0.25), (2.5, None)) and channel.progress() == (3, 4)
    for rank in ranks:
        rank.close()
    channel.close()


def test_steps_and_results_between_processes() -> None:
    channel = EngineChannel(2)

    def serve(number: int) -> Any:
        rank = RankChannel(SharedRegion(os.dup(channel.region.fd)), number)
        rank.report_progress(10 * (number + 1), 100)
        count = 0
        while True:
            message = rank.receive()
            if message[0] == "stop":
                return count
            count += 1
            if message[0] == "large":
                rank.send(message[1] * (number + 1))
            elif number == 0:
                rank.send(int(message[1].token_ids.sum()))

    results: list[Any] = []

    def run() -> None:
        results.extend(run_forked(2, serve))

    thread = threading.Thread(target=run)
    thread.start()
    for i in range(200):
        channel.send(("step", make_step(i, tokens=1 + i % 7)), wait)
        assert channel.receive(0, wait) == sum(range(1 + i % 7))
    large = np.arange(1_500_000)  # 12 MB: above both rings
    channel.send(("large", large), wait)
    for rank in (0, 1):
        assert np.array_equal(channel.receive(rank, wait), large * (rank + 1))
    assert channel.progress() == (30, 200)
    channel.send(("stop",), wait)
    thread.join(20)
    assert results == [201, 201]
    channel.close()


def test_round_trip_takes_microseconds() -> None:
    """A generous bound for a busy machine; an idle one takes some 60 us with pickling."""
    channel = EngineChannel(1)

    def serve(number: int) -> None:
        rank = RankChannel(SharedRegion(os.dup(channel.region.fd)), number)
        while (message := rank.receive()) != "stop":
            rank.send(message)

    thread = threading.Thread(target=run_forked, args=(1, serve))
    thread.start()
    times = []
    for i in range(300):
        begin = time.perf_counter()
        channel.send(i, wait)
        channel.receive(0, wait)
        times.append(time.perf_counter() - begin)
    channel.send("stop", wait)
    thread.join(20)
    channel.close()
    assert sorted(times)[150] < 0.002


def test_abort_ends_a_rank_that_waits() -> None:
    channel = EngineChannel(1)
    rank = RankChannel(SharedRegion(os.dup(channel.region.fd)), 0)
    threading.Timer(0.1, channel.abort).start()
    with pytest.raises(RankFailed):
        rank.receive()
    rank.close()
    channel.close()


def test_a_closed_region_gives_its_descriptor_back() -> None:
    before = set(os.listdir("/proc/self/fd"))
    channel = EngineChannel(3)
    channel.close()
    channel.close()
    assert set(os.listdir("/proc/self/fd")) == before
