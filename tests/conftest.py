"""Real models and GPUs where this machine has them; tests that need one are skipped, with the reason, elsewhere."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

# Triton's kernels run in its interpreter where there is no NVIDIA GPU, and on the GPU where there is one. It decides
# when it is imported, which any library may do first.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What `multitensor pull` stores for each name.
MODELS = {
    "smollm2-135m": (
        "smollm2-135m-q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": (
        "gemma3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def find_model(name: str) -> Path:
    """The file of a model, its bytes checked; skips the test where there is none."""
    file_name, digest = MODELS[name]
    folders = [Path.home() / ".cache" / "multitensor" / "models"]
    if os.environ.get("MULTITENSOR_MODELS"):
        folders.insert(0, Path(os.environ["MULTITENSOR_MODELS"]))
    path = next((folder / file_name for folder in folders if (folder / file_name).is_file()), None)
    if path is None:
        pytest.skip(f"{file_name} is not here: run `multitensor pull {name}` or set MULTITENSOR_MODELS to its folder")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest:
        pytest.fail(f"{path}: SHA-256 is {found}, not {digest}; remove the file and pull it again")
    return path


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct Q4_1: llama, 9 query heads, 3 KV heads."""
    return find_model("smollm2-135m")


@pytest.fixture(scope="session")
def gemma3_path() -> Path:
    """Gemma-3-270M Q4_K_M: gemma3, 4 query heads, 1 KV head, sliding window."""
    return find_model("gemma3-270m")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked gpu or gpu2 where there are too few CUDA devices; asks only when there are such tests."""
    for marker, needed in (("gpu", 1), ("gpu2", 2)):
        marked = [item for item in items if item.get_closest_marker(marker)]
        found = _cuda_devices() if marked else needed
        if found < needed:
            reason = f"needs {needed} CUDA device{'s' * (needed > 1)}, found {found}"
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


def _cuda_devices() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
