"""Frozen settings, validated once (layer 0; imports nothing of this package but its errors)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from multitensor.errors import InputError

DeviceKind = Literal["cpu", "cuda"]

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[f"{_letter}B"] = 1000**_power
    _UNITS[f"{_letter}IB"] = 1024**_power
    _UNITS[_letter] = 1024**_power

DTYPES = ("auto", "float32", "float16", "bfloat16")
KV_TYPES = ("auto", "f32", "f16", "bf16", "q8", "q4")
KV_ALIASES = {"q8_0": "q8", "q4_0": "q4"}  # llama.cpp's names
KV_BITS = {"f32": 32, "f16": 16, "bf16": 16, "q8": 8, "q4": 4}
KV_GROUP = 32  # numbers of a head that share a scale, float16, where the cache is quantised


def _is_number(text: str) -> bool:
    """Decimal digits of ASCII alone: str.isdigit() takes a superscript two."""
    return text.isascii() and text.isdecimal()


def parse_bytes(text: str) -> int:
    """Bytes of '24GiB' (1024**3), '80GB' (1000**3) or a plain number. Raises InputError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    unit = match.group(2).upper() if match else None
    if match is None or unit not in _UNITS:
        raise InputError(f"not a size: {text!r}; write it as 24GiB, 80GB or a number of bytes")
    return int(float(match.group(1)) * _UNITS[unit])


def kv_head_bytes(kv_type: str, head_dim: int) -> int:
    """Of one head's key, or value, of one token in the cache."""
    scales = 2 * -(-head_dim // KV_GROUP) if kv_type in ("q8", "q4") else 0
    return head_dim * KV_BITS[kv_type] // 8 + scales


@dataclass(frozen=True)
class DeviceRequest:
    """One device that the user asked for. `kind` None: a size without a device, as `plan --devices 24GiB` has."""

    kind: DeviceKind | None
    index: int
    cap_bytes: int | None = None

    @property
    def name(self) -> str:
        return f"{self.kind or 'device'}:{self.index}"


def parse_devices(text: str) -> tuple[DeviceRequest, ...]:
    """'cpu:2' (two CPU ranks), 'cuda:0,cuda:1=24GiB' (a cap), 'cuda:2' alone is GPU number 2, or bare sizes
    '24GiB,24GiB,12GiB' (for planning only). One entry a rank. Raises InputError."""
    requests: list[DeviceRequest] = []
    for part in (piece.strip() for piece in text.split(",")):
        name, _, cap = part.partition("=")
        cap_bytes = parse_bytes(cap) if cap else None
        kind, colon, number = name.strip().lower().partition(":")
        if kind == "cpu" and (not colon or _is_number(number)):
            count = int(number) if colon else 1
            if not 1 <= count <= 64:
                raise InputError(f"devices: {part!r} asks for {count} CPU ranks; between 1 and 64 are possible")
            first = sum(r.kind == "cpu" for r in requests)
            requests += [DeviceRequest("cpu", first + i, cap_bytes) for i in range(count)]
        elif kind == "cuda" and colon and _is_number(number):
            requests.append(DeviceRequest("cuda", int(number), cap_bytes))
        elif _is_number(part[:1]) and not cap:
            requests.append(DeviceRequest(None, len(requests), parse_bytes(part)))
        else:
            raise InputError(
                f"devices: cannot read {part!r}; write cpu:2, cuda:0,cuda:1, cuda:1=24GiB or (for plan) 24GiB,12GiB"
            )
    if len({(r.kind, r.index) for r in requests}) != len(requests):
        raise InputError(f"devices: the same device is named twice in {text!r}")
    return tuple(requests)


def parse_ratio(text: str) -> tuple[float, ...]:
    """'3,1' -> (3.0, 1.0). Raises InputError."""
    try:
        ratio = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"ratio: cannot read {text!r}; write one number a device, as in 3,1") from None
    check_ratio(ratio)
    return ratio


def check_ratio(ratio: tuple[float, ...]) -> None:
    """Raises InputError unless every part is a finite number >= 0 and one is above 0."""
    if not all(0 <= part < float("inf") for part in ratio) or not any(part > 0 for part in ratio):
        raise InputError(f"ratio: {','.join(map(str, ratio))} is not a ratio; parts are >= 0 and not all 0")


HOST_RELAY = "host-relay"
Q8_WIRE = "q8-wire"
INT8_PROMPTS = "int8-prompts"
EXPERIMENTS = {
    HOST_RELAY: "one launch from attention to attention also for GPUs that do not reach each other's memory, with sums "
    "through the host's",
    INT8_PROMPTS: "long prompts' query, key, value, gate and up in 8 bits: small models lose 0.3% of perplexity; "
    "slower than 16 bits on an H200, for GPUs whose 8-bit tensor cores are several times as fast",
    Q8_WIRE: "between such GPUs sums of many tokens in 8 bits, each off by about 1%",
}


def parse_experiments(names: Iterable[str]) -> frozenset[str]:
    """Raises InputError for a name that is none of EXPERIMENTS."""
    found = frozenset(names)
    for name in sorted(found - set(EXPERIMENTS)):
        known = "; ".join(f"{known} ({what})" for known, what in EXPERIMENTS.items())
        raise InputError(f"experimental: there is no {name!r}; there are: {known}")
    return found


@dataclass(frozen=True)
class EngineConfig:
    """What the engine and its ranks need to know beside the plan.

    dtype: of activations ("float32", "float16" or "bfloat16"; resolved, never "auto").
    exact: no activation is rounded to 8 bits; reductions and products in float32 where the device is a CPU.
    max_num_seqs: sequences in one step at most (also the number of sampler slots).
    max_batch_tokens: query tokens in one step at most (the prefill chunk). mixed_batch_tokens: in one that also makes
    somebody's next token, who would wait for a long one; None: as many.
    block_size: tokens in one KV block.
    prefix_cache: who may reuse what was computed of a prompt's beginning: "shared", all requests; "key", those of one
    API key (else the time to the first token tells whether somebody sent the same beginning); "off".
    p2p: whether GPUs may use each other's memory. None: where a probe finds that it works; True: it has to work; False:
    never, nor may NCCL.
    overlap: steps of many tokens are cut in two, so that sums over GPUs travel while products are computed.
    experimental: names of EXPERIMENTS, ways that may be faster and have not run on several GPUs yet, to be tried.
    step_timeout: seconds after which ranks that do not answer to a step are killed; 0: never.
    """

    model: str
    dtype: str
    exact: bool
    seed: int
    max_num_seqs: int
    max_batch_tokens: int
    block_size: int
    prefix_cache: Literal["shared", "key", "off"] = "shared"
    p2p: bool | None = None
    overlap: bool = False
    experimental: frozenset[str] = frozenset()
    mixed_batch_tokens: int | None = None
    step_timeout: float = 0.0
