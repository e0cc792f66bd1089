"""What the server counts and what Prometheus reads: HTTP's own numbers, and the engine's at the moment of asking."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from multitensor.engine.statistics import EngineSnapshot
from multitensor.server.hardware import HardwareReader, Reading
from multitensor.sharding.memory import device_memory
from multitensor.sharding.plan import Plan

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Seconds. From a token of a fast card to a prompt of a whole context on a CPU.
FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
GAP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
REQUEST_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)


class EngineNumbers(Protocol):
    """What is asked of an AsyncEngine."""

    @property
    def plan(self) -> Plan: ...

    def stats(self) -> EngineSnapshot: ...


class Metrics:
    """A registry of its own, so that several servers may live in one process."""

    def __init__(self, engine: EngineNumbers, hardware: HardwareReader | None = None) -> None:
        disable_created_metrics()  # a time beside every series, which nobody asks for: a third of the text
        self._engine = engine
        self._hardware = hardware or HardwareReader([rank.device for rank in engine.plan.ranks])
        self._registry = registry = CollectorRegistry(auto_describe=False)
        self.requests = Counter(
            "multitensor_http_requests", "Requests answered.", ["route", "status"], registry=registry
        )
        self.refused = Counter(
            "multitensor_refused_requests", "Requests refused before they ran, by why.", ["reason"], registry=registry
        )
        self.request_seconds = Histogram(
            "multitensor_http_request_seconds",
            "From a request's arrival to the end of its answer.",
            ["route"],
            buckets=REQUEST_BUCKETS,
            registry=registry,
        )
        self.first_token_seconds = Histogram(
            "multitensor_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self.token_gap_seconds = Histogram(
            "multitensor_inter_token_seconds",
            "From one token of a sequence to its next.",
            buckets=GAP_BUCKETS,
            registry=registry,
        )
        registry.register(_EngineCollector(engine, self._hardware))

    def request_finished(self, route: str, status: int, seconds: float) -> None:
        """route: the template ("/v1/chat/completions"), never a client's own path: labels must stay few."""
        self.requests.labels(route, str(status)).inc()
        self.request_seconds.labels(route).observe(seconds)

    def request_refused(self, reason: str) -> None:
        """reason: one of a few words ("rate_limit", "streams", "overloaded", "unauthorized", "audit")."""
        self.refused.labels(reason).inc()

    def first_token(self, seconds: float) -> None:
        self.first_token_seconds.observe(seconds)

    def next_token(self, seconds: float) -> None:
        self.token_gap_seconds.observe(seconds)

    def render(self) -> bytes:
        """The text that /metrics answers, of type CONTENT_TYPE. May ask NVML: call it off the event loop."""
        return generate_latest(self._registry)

    def stats_json(self) -> dict[str, Any]:
        """What the page's panel shows (/v1/stats): the engine's numbers, and each device's share, memory and load.
        May ask NVML: call it off the event loop."""
        return stats_json(self._engine.stats(), self._engine.plan, self._hardware.read())


def stats_json(stats: EngineSnapshot, plan: Plan, readings: Sequence[Reading]) -> dict[str, Any]:
    """share: of the model's weights, 0 to 1. held_bytes: what the plan says that rank holds. Seconds per rank are
    totals; None where they are not measured."""
    memory = device_memory(plan)
    whole = sum(sum(entry.weights.values()) for entry in memory) or 1
    devices = []
    for rank, entry, reading in zip(plan.ranks, memory, readings, strict=True):
        weights = sum(entry.weights.values())
        measured = stats.memory[rank.rank] if rank.rank < len(stats.memory) else {}
        devices.append(
            {
                "rank": rank.rank,
                "name": rank.device.name,
                "description": rank.device.description,
                "share": weights / whole,
                "weights_bytes": weights,
                "kv_bytes": entry.kv,
                "buffers_bytes": entry.buffers,
                "held_bytes": entry.total,
                "capacity_bytes": rank.device.capacity_bytes,
                "measured": dict(measured),
                "query_heads": list(rank.query_heads),
                "compute_seconds": _of_rank(stats.compute_seconds, rank.rank),
                "reduction_seconds": _of_rank(stats.reduction_seconds, rank.rank),
                **{name: value for name, value in reading.to_json().items() if name != "name"},
            }
        )
    return {
        "ready": stats.ready,
        "running": stats.running,
        "waiting": stats.waiting,
        "tokens_per_second": stats.tokens_per_second,
        "kv_used": stats.kv_used,
        "kv_cached": stats.kv_cached,
        "kv_total": stats.kv_total,
        "prefix_hits": stats.prefix_hits,
        "prefix_queries": stats.prefix_queries,
        "prompt_tokens": stats.prompt_tokens,
        "generated_tokens": stats.generated_tokens,
        "context": plan.context,
        "devices": devices,
    }


class _EngineCollector(Collector):
    """Turns a snapshot into metrics when it is scraped, so nothing is counted twice and nothing lags."""

    def __init__(self, engine: EngineNumbers, hardware: HardwareReader) -> None:
        self._engine = engine
        self._hardware = hardware

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        for name, help_text, value in (
            ("multitensor_ready", "1 when requests are taken.", float(stats.ready)),
            ("multitensor_sequences_running", "Sequences in the batch.", stats.running),
            ("multitensor_requests_waiting", "Requests that wait for their first step.", stats.waiting),
            ("multitensor_kv_used_tokens", "Tokens of the KV pool in use.", stats.kv_used),
            ("multitensor_kv_cached_tokens", "Tokens of the KV pool kept for reuse, free.", stats.kv_cached),
            ("multitensor_kv_total_tokens", "Tokens that the KV pool holds.", stats.kv_total),
            ("multitensor_tokens_per_second", "Tokens made a second, lately.", stats.tokens_per_second),
        ):
            yield GaugeMetricFamily(name, help_text, value)
        for name, help_text, value in (
            ("multitensor_steps", "Steps of the engine.", stats.steps),
            (
                "multitensor_preemptions",
                "Sequences put back, for want of cache blocks or for another key.",
                stats.preemptions,
            ),
            ("multitensor_rank_restarts", "How often the ranks were started again.", stats.restarts),
            ("multitensor_prefix_query_tokens", "Prompt tokens looked up in the prefix cache.", stats.prefix_queries),
            ("multitensor_prefix_hit_tokens", "Prompt tokens found in the prefix cache.", stats.prefix_hits),
            ("multitensor_prompt_tokens", "Prompt tokens computed.", stats.prompt_tokens),
            ("multitensor_generated_tokens", "Tokens made.", stats.generated_tokens),
            ("multitensor_prefill_seconds", "Time in steps with prompt tokens.", stats.prefill_seconds),
            ("multitensor_decode_seconds", "Time in other steps.", stats.decode_seconds),
        ):
            yield CounterMetricFamily(name, help_text, value)
        devices = [rank.device.name for rank in self._engine.plan.ranks]
        yield from _ranks(stats, devices)
        yield from _devices(self._hardware.read())


def _ranks(stats: EngineSnapshot, devices: Sequence[str]) -> Iterator[Metric]:
    for name, help_text, values in (
        ("multitensor_rank_compute_seconds", "Time a rank computed.", stats.compute_seconds),
        (
            "multitensor_rank_reduction_seconds",
            "Time of a rank in reductions, waits too.",
            stats.reduction_seconds,
        ),
    ):
        if values is not None:
            family = CounterMetricFamily(name, help_text, labels=["rank", "device"])
            for rank, (device, seconds) in enumerate(zip(devices, values, strict=False)):
                family.add_metric([str(rank), device], seconds)
            yield family
    held = GaugeMetricFamily(
        "multitensor_rank_memory_bytes", "Bytes a rank holds, by use, when last measured.", labels=["rank", "use"]
    )
    for rank, uses in enumerate(stats.memory):
        for use, count in uses.items():
            held.add_metric([str(rank), use], count)
    yield held


def _devices(readings: Sequence[Reading]) -> Iterator[Metric]:
    """By rank and device; what a device does not tell is left out rather than 0."""
    for name, help_text, field in (
        ("multitensor_device_memory_used_bytes", "Memory in use, by everybody.", "memory_used"),
        ("multitensor_device_memory_total_bytes", "Memory there is.", "memory_total"),
        ("multitensor_device_load_ratio", "How busy the device is, 0 to 1.", "load"),
        ("multitensor_device_power_watts", "Power drawn.", "power"),
        ("multitensor_device_temperature_celsius", "Temperature.", "temperature"),
    ):
        family = GaugeMetricFamily(name, help_text, labels=["rank", "device"])
        for rank, reading in enumerate(readings):
            value = getattr(reading, field)
            if value is not None:
                family.add_metric([str(rank), reading.name], value)
        yield family


def _of_rank(values: Sequence[float] | None, rank: int) -> float | None:
    return values[rank] if values is not None and rank < len(values) else None
