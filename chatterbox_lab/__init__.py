"""Chatterbox Lab: why streaming Chatterbox TTS is slower than it should be, and how fast it can honestly be made."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .files import extras_named

if TYPE_CHECKING:  # for editors; each is imported at its first use, because the stack below takes seconds
    from .engine.clock import StreamMetrics, Word
    from .engine.schedule import Costs
    from .engine.settings import ADAPTIVE, BALANCED, BASELINE, BEST_RTF, FAST, StreamSettings
    from .engine.stream import generate, generate_stream, pcm16, speech_tokens
    from .engine.warm import warm_up
    from .kept import forget
    from .show.report import diagnose
    from .speech.patch import patch
    from .speech.sentences import Pauses
    from .speech.speak import speak
    from .speech.subtitles import subtitles
    from .study.costs import recommend
    from .study.machine import tune_torch
    from .study.upstream import upstream_stream, upstream_tokens
    from .voices.load import load

__version__ = "0.1.0"
__all__ = [
    "ADAPTIVE",
    "BALANCED",
    "BASELINE",
    "BEST_RTF",
    "Costs",
    "FAST",
    "Pauses",
    "StreamMetrics",
    "StreamSettings",
    "Word",
    "diagnose",
    "forget",
    "generate",
    "generate_stream",
    "load",
    "patch",
    "pcm16",
    "recommend",
    "speak",
    "speech_tokens",
    "subtitles",
    "tune_torch",
    "upstream_stream",
    "upstream_tokens",
    "warm_up",
]

_LAZY = dict.fromkeys(("ADAPTIVE", "BALANCED", "BASELINE", "BEST_RTF", "FAST", "StreamSettings"), "engine.settings") | {
    "Costs": "engine.schedule",
    "Pauses": "speech.sentences",
    "StreamMetrics": "engine.clock",
    "Word": "engine.clock",
    "diagnose": "show.report",
    "forget": "kept",
    "generate": "engine.stream",
    "generate_stream": "engine.stream",
    "load": "voices.load",
    "patch": "speech.patch",
    "pcm16": "engine.stream",
    "recommend": "study.costs",
    "speak": "speech.speak",
    "speech_tokens": "engine.stream",
    "subtitles": "speech.subtitles",
    "tune_torch": "study.machine",
    "upstream_stream": "study.upstream",
    "upstream_tokens": "study.upstream",
    "warm_up": "engine.warm",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        with extras_named():
            import_module(".released", __name__)  # says so where there is no Chatterbox
            return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
