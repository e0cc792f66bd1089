"""What goes over NVLink while a command runs: the driver's counters of every GPU, before and after.

    python benchmarks/nvlink_traffic.py -- multitensor bench MODEL --devices cuda:0,cuda:1 --no-p2p

Prints one line of JSON: {"status": the command's, "kib": {gpu: {"sent": ..., "received": ...}}}, KiB of data; a GPU
whose links do not count, or that has none, has null. Ends with 1 if the command failed, and with --still, 3 if any
counter moved.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

Counters = Mapping[str, int] | None  # "sent" and "received", KiB over all links

_LINKS = 18  # the most that a GPU has had so far; those that are not there answer with an error


def difference(before: Mapping[int, Counters], after: Mapping[int, Counters]) -> dict[int, dict[str, int] | None]:
    """By GPU, how far the counters went; None where one was not told."""
    result: dict[int, dict[str, int] | None] = {}
    for gpu, first in before.items():
        second = after.get(gpu)
        result[gpu] = None if first is None or second is None else {name: second[name] - first[name] for name in first}
    return result


def read_counters() -> dict[int, Counters]:
    """Of all GPUs of the machine, by number."""
    import pynvml

    pynvml.nvmlInit()
    try:
        devices = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return {number: _counters(pynvml, device) for number, device in enumerate(devices)}
    finally:
        pynvml.nvmlShutdown()


def _counters(pynvml: Any, device: Any) -> Counters:
    fields = {
        "sent": pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX,
        "received": pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX,
    }
    totals: dict[str, int] = {}
    for name, field in fields.items():
        values = pynvml.nvmlDeviceGetFieldValues(device, [(field, link) for link in range(_LINKS)])
        told = [int(value.value.ullVal) for value in values if value.nvmlReturn == pynvml.NVML_SUCCESS]
        if not told:
            return None
        totals[name] = sum(told)
    return totals


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--still", action="store_true", help="fail if any counter moved")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    before = read_counters()
    status = subprocess.run(arguments.command, check=False).returncode
    moved = difference(before, read_counters())
    print(json.dumps({"status": status, "kib": moved}))
    if status:
        return 1
    return 3 if arguments.still and any(value for each in moved.values() for value in (each or {}).values()) else 0


if __name__ == "__main__":
    sys.exit(main())
