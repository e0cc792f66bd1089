"""Arrays of the host on their way to a device: what arrives, while buffers grow and are used again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from multitensor.kernels.host_copy import Uploads, to_device

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_sent_arrives_though_the_host_goes_on(device: str) -> None:
    """Many sends before anybody looks; the arrays are overwritten at once."""
    uploads, random = Uploads(torch.device(device)), np.random.default_rng(2)
    arrived, wanted = [], []
    for size in (3, 3, 700, 10, 70_000, 1, 0, 70_000, 5):
        first, second = random.random(size), random.integers(0, 1 << 30, 2 * size, dtype=np.int32)
        wanted.append(first.tobytes() + second.tobytes())
        arrived.append(uploads.send(first, second).clone())
        first[:], second[:] = -1, -1
    assert [bytes(there.cpu().numpy()) for there in arrived] == wanted


@pytest.mark.parametrize("device", DEVICES)
def test_an_array_with_gaps_is_copied_whole(device: str) -> None:
    values = np.arange(20)
    assert to_device(values[::2], torch.device(device)).tolist() == list(range(0, 20, 2))
