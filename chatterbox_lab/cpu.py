"""What the CPU at hand multiplies itself, and what bfloat16 costs where it is emulated."""

from __future__ import annotations

import math
import platform
import time
import warnings
from functools import cache

import torch
import torch.nn.functional as F

from .host import apart

_PRODUCTS = {64: (512, 512), 2: (4096, 1024)}
"""Rows of a product, and its weight (out, in): what S3Gen and a prefill do, and what a token of T3 does."""
_warned: set[str] = set()


def onednn(dtype: torch.dtype) -> bool:
    """Whether PyTorch's oneDNN multiplies this dtype, float32 or bfloat16, here.

    oneDNN says that it supports bfloat16 on every x86 CPU with AVX-512, also where it turns it into float32 first.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype != torch.bfloat16 or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return dtype == torch.float32
    has = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return has is None or platform.machine() not in ("x86_64", "AMD64") or has()


def emulation(device: str | torch.device) -> dict[int, float]:
    """How many times as long as in float32 products take in bfloat16 where a CPU emulates it, by their rows.

    It is timed once a process, in 20 ms. Empty on other devices, where oneDNN multiplies bfloat16, and where products
    of many rows are no slower.
    """
    if torch.device(device).type != "cpu" or onednn(torch.bfloat16):
        return {}
    found = _timed(torch.get_num_threads())
    return found if found[max(_PRODUCTS)] > 1 else {}


@cache
def _timed(threads: int) -> dict[int, float]:
    """`emulation`'s ratios: the fastest of three products each."""
    found = {}
    with apart("cpu"):
        for rows, (out, width) in _PRODUCTS.items():
            fastest = dict.fromkeys((torch.float32, torch.bfloat16), math.inf)
            for dtype in fastest:
                weight, states = torch.ones(out, width, dtype=dtype), torch.ones(rows, width, dtype=dtype)
                for _ in range(3):
                    start = time.perf_counter()
                    F.linear(states, weight)
                    fastest[dtype] = min(fastest[dtype], time.perf_counter() - start)
            found[rows] = fastest[torch.bfloat16] / fastest[torch.float32]
    return found


def warn_of_emulation(setting: str, instead: str, device: str | torch.device) -> None:
    """Warns, once a process and setting, that this CPU emulates bfloat16, with what that costs (see `emulation`).

    Args:
        setting: what asks for bfloat16, as it is written.
        instead: what to write, and what it does here.
        device: of the model.
    """
    if setting not in _warned and (costs := emulation(device)):
        _warned.add(setting)
        told = ", ".join(f"{ratio:.2g} times as long with {rows} rows" for rows, ratio in costs.items())
        text = f"{setting}: this CPU emulates bfloat16; against float32 a product takes {told}. {instead}"
        warnings.warn(text, UserWarning, stacklevel=2)
