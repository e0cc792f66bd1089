"""The shared library of the native CPU kernels as ctypes sees it: where it lies, its functions, its structures.

Imports no torch. The C side of everything here: native.c, native.h, paged.h.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_int64, c_void_p
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

INTERFACE_VERSION = 2
LEVELS = ("scalar", "avx2", "avx512")  # numbers of enum level in native.c
TYPE_NAMES = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "MXFP4"),
)  # numbers of enum weight_type in native.h
TYPE_IDS = {name: number for number, name in enumerate(TYPE_NAMES)}
PLANES = {"weight": 0, "quants": 0, "high": 1, "scales": 2, "mins": 3, "d": 4, "m": 5, "dmin": 5}  # enum plane


class WeightStruct(ctypes.Structure):
    """struct weight of native.h"""

    _fields_ = (
        ("type", c_int64),
        ("phase", c_int64),
        ("rows", c_int64),
        ("cols", c_int64),
        ("planes", c_void_p * 6),
        ("strides", c_int64 * 6),
    )


class AttentionStruct(ctypes.Structure):
    """struct attention of native.h"""

    _fields_ = (
        ("q", c_void_p),
        ("q_stride", c_int64),
        ("out", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_scales", c_void_p),
        ("value_scales", c_void_p),
        ("cache_type", c_int64),
        ("block_size", c_int64),
        ("n_heads", c_int64),
        ("n_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("tables", c_void_p),
        ("table_stride", c_int64),
        ("n_sequences", c_int64),
        ("query_lens", c_void_p),
        ("context_lens", c_void_p),
        ("query_starts", c_void_p),
        ("kv_map", c_void_p),
        ("window", c_int64),
        ("scale", c_float),
        ("softcap", c_float),
    )


def _arguments(letters: str) -> tuple[Any, ...]:
    """Argument types, a letter each: p pointer, n int64, i int, f float."""
    types = {"p": c_void_p, "n": c_int64, "i": c_int, "f": c_float}
    return tuple(types[letter] for letter in letters)


_SIGNATURES: dict[str, tuple[Any, str]] = {
    "mt_interface_version": (c_int, ""),
    "mt_best_level": (c_int, ""),
    "mt_create": (c_void_p, "ii"),
    "mt_destroy": (None, "p"),
    "mt_linear": (c_int, "ppnniippp"),
    "mt_linear_one": (c_int, "ppnnippp"),
    "mt_gated_linear": (c_int, "ppnnippppip"),
    "mt_rows": (c_int, "pppnnp"),
    "mt_rms_norm": (c_int, "pppnnpffp"),
    "mt_gated_activation": (c_int, "pppni"),
    "mt_rope": (c_int, "pnnpnnpnnppni"),
    "mt_write_kv": (c_int, "pppnnnnnppppnnpn"),
    "mt_attention": (c_int, "ppn"),
}


def load_library() -> ctypes.CDLL | None:
    """The shared library with its signatures set, or None where it is not built (or is of another version)."""
    folder = Path(__file__).parent
    for path in (folder / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES):
        if not path.is_file():
            continue
        try:
            library = ctypes.CDLL(str(path))
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, _arguments(arguments)
        except (OSError, AttributeError):  # built for another machine, or from older sources
            continue
        if library.mt_interface_version() == INTERFACE_VERSION:
            return library
    return None
