"""Chatterbox Lab: why streaming Chatterbox TTS is slower than it should be, and how fast it can honestly be."""

import os
import sys
import warnings
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

# Warnings of the pinned stack that are not this repository's subject; each is filtered by its own text.
for _text in (
    r"pkg_resources is deprecated",  # librosa 0.10, perth
    r"Deprecated call to `pkg_resources",
    r"`torch.backends.cuda.sdp_kernel\(\)` is deprecated",  # T3's Perceiver, on every call
    r"`LoRACompatibleLinear` is deprecated",  # diffusers 0.29, when S3Gen's U-Net is built
):
    warnings.filterwarnings("ignore", message=_text)

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else PyTorch's profiler reports a missing GPU as an error

if find_spec("perth") is None:
    # Upstream imports its watermarker unasked. None is what perth itself offers when a part of it is missing.
    sys.modules["perth"] = ModuleType("perth", "Stands in for resemble-perth, which is not installed.")
    sys.modules["perth"].PerthImplicitWatermarker = None

from .engine.schedule import Costs  # noqa: E402
from .engine.settings import ADAPTIVE, BALANCED, BASELINE, BEST_RTF, FAST, StreamSettings  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "ADAPTIVE",
    "BALANCED",
    "BASELINE",
    "BEST_RTF",
    "Costs",
    "FAST",
    "StreamMetrics",
    "StreamSettings",
    "generate",
    "generate_stream",
    "load",
    "patch",
    "recommend",
    "speech_tokens",
    "tune_torch",
    "upstream_stream",
    "upstream_tokens",
    "warm_up",
]

# Imported on first use: the stack below them takes seconds, and settings and --help need none of it.
_LAZY = {
    "StreamMetrics": "engine.clock",
    "tune_torch": "study.machine",
    "load": "voices.load",
    "generate": "engine.stream",
    "generate_stream": "engine.stream",
    "patch": "engine.stream",
    "recommend": "study.costs",
    "speech_tokens": "engine.stream",
    "warm_up": "engine.stream",
    "upstream_stream": "study.upstream",
    "upstream_tokens": "study.upstream",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
