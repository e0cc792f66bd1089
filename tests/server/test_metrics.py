"""Metrics: what Prometheus reads parses, and says what the engine and the devices say."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from multitensor.engine.prepare import prepare
from multitensor.engine.statistics import EngineSnapshot
from multitensor.server.hardware import HardwareReader, Reading
from multitensor.server.metrics import Metrics
from multitensor.sharding.plan import Plan
from multitensor.sharding.topology import Device
from synthetic import write_gguf

SNAPSHOT = EngineSnapshot(
    ready=True,
    failure=None,
    running=3,
    waiting=2,
    kv_used=100,
    kv_cached=32,
    kv_total=4096,
    prefix_hits=64,
    prefix_queries=128,
    prompt_tokens=500,
    generated_tokens=77,
    steps=90,
    preemptions=1,
    prefill_seconds=1.5,
    decode_seconds=2.5,
    tokens_per_second=12.5,
    restarts=0,
    memory=({"weights": 1000}, {"weights": 500}),
    compute_seconds=(2.0, 1.0),
    reduction_seconds=(0.25, 1.25),
)


class FakeHardware:
    def read(self) -> tuple[Reading, ...]:
        return (Reading("cpu:0", 10, 20, 0.5), Reading("cpu:1"))


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    path: Path = tmp_path_factory.mktemp("metrics") / "tiny.gguf"
    write_gguf(path, n_layers=1)
    return prepare(path, devices="cpu:2", ratio="3,1", max_model_len=64).plan


@pytest.fixture
def metrics(plan: Plan) -> Metrics:
    return Metrics(SimpleNamespace(plan=plan, stats=lambda: SNAPSHOT), FakeHardware())  # type: ignore[arg-type]


def _samples(metrics: Metrics) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_what_was_counted_is_exposed(metrics: Metrics) -> None:
    metrics.request_finished("/v1/chat/completions", 200, 0.3)
    metrics.request_finished("/v1/chat/completions", 200, 0.4)
    metrics.request_finished("/v1/chat/completions", 429, 0.0)
    metrics.request_refused("rate_limit")
    metrics.first_token(0.2)
    metrics.next_token(0.004)
    found = _samples(metrics)
    assert found["multitensor_http_requests_total", "/v1/chat/completions", "200"] == 2
    assert found["multitensor_refused_requests_total", "rate_limit"] == 1
    assert found["multitensor_http_request_seconds_count", "/v1/chat/completions"] == 3
    assert found["multitensor_time_to_first_token_seconds_bucket", "0.25"] == 1
    assert found["multitensor_time_to_first_token_seconds_bucket", "0.1"] == 0
    assert found["multitensor_inter_token_seconds_bucket", "0.005"] == 1


def test_the_engines_numbers_are_those_of_its_snapshot(metrics: Metrics) -> None:
    found = _samples(metrics)
    for name, value in (
        ("ready", 1),
        ("sequences_running", 3),
        ("requests_waiting", 2),
        ("kv_used_tokens", 100),
        ("kv_cached_tokens", 32),
        ("kv_total_tokens", 4096),
        ("prefix_hit_tokens_total", 64),
        ("prefix_query_tokens_total", 128),
        ("generated_tokens_total", 77),
        ("prompt_tokens_total", 500),
        ("steps_total", 90),
        ("tokens_per_second", 12.5),
    ):
        assert found[(f"multitensor_{name}",)] == value
    assert found["multitensor_rank_compute_seconds_total", "cpu:0", "0"] == 2.0
    assert found["multitensor_rank_reduction_seconds_total", "cpu:1", "1"] == 1.25
    assert found["multitensor_rank_memory_bytes", "1", "weights"] == 500


def test_what_a_device_does_not_tell_is_left_out(metrics: Metrics) -> None:
    found = _samples(metrics)
    assert found["multitensor_device_load_ratio", "cpu:0", "0"] == 0.5
    assert found["multitensor_device_memory_used_bytes", "cpu:0", "0"] == 10
    assert not any(name[0].startswith("multitensor_device") and "cpu:1" in name for name in found)
    assert not any(name[0] == "multitensor_device_power_watts" for name in found)


def test_the_panels_numbers(metrics: Metrics) -> None:
    stats = json.loads(json.dumps(metrics.stats_json()))
    first, second = stats["devices"]
    assert first["share"] + second["share"] == pytest.approx(1)
    assert first["share"] > second["share"]
    assert first["held_bytes"] == first["weights_bytes"] + first["kv_bytes"] + first["buffers_bytes"]
    assert (first["load"], second["load"]) == (0.5, None)
    assert (first["compute_seconds"], second["reduction_seconds"]) == (2.0, 1.25)
    assert (stats["tokens_per_second"], stats["kv_total"]) == (12.5, 4096)


def test_two_servers_in_one_process_do_not_share(plan: Plan) -> None:
    engine = SimpleNamespace(plan=plan, stats=lambda: SNAPSHOT)
    one, two = (Metrics(engine, FakeHardware()) for _ in range(2))  # type: ignore[arg-type]
    one.request_refused("streams")
    assert ("multitensor_refused_requests_total", "streams") not in _samples(two)


def test_this_machines_cpu_is_read_and_not_too_often() -> None:
    now = [0.0]
    device = Device("cpu:0", "cpu", 0, 1 << 30, 1 << 30)
    reader = HardwareReader([device, device], clock=lambda: now[0])
    first = reader.read()
    assert len(first) == 2
    assert 0 < first[0].memory_used < first[0].memory_total  # type: ignore[operator]
    assert first[0].load is not None and 0 <= first[0].load <= 1 and first[0].power is None
    now[0] = 0.4
    assert reader.read() is first
    now[0] = 0.6
    assert reader.read() is not first


def test_a_gpu_that_cannot_be_asked_tells_nothing() -> None:
    reader = HardwareReader([Device("cuda:99", "cuda", 99, 1, 1, uuid="GPU-does-not-exist")])
    assert reader.read() == (Reading("cuda:99"),)
