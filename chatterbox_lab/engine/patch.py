"""The drop-in: this package behind a model's own ``generate_stream`` and ``generate``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from types import MethodType
from typing import Any

import torch
from chatterbox.tts import ChatterboxTTS

from ..files import attribute
from .clock import Chunks, Measured, StageClock, StreamMetrics, measured
from .request import checked
from .settings import StreamSettings
from .stream import chunks, generate


class Patch(ExitStack):
    """What `patch` returns: a context, or an object whose ``undo()`` ends the patch.

    The model's patched methods have it as ``tts.generate_stream.patch``.
    """

    def __init__(self, tts: ChatterboxTTS, settings: StreamSettings) -> None:
        super().__init__()
        self.tts, self.settings = tts, settings
        for name in ("generate_stream", "generate"):
            method = _like_upstreams(MethodType(getattr(type(tts), name), tts), getattr(self, f"_{name}"))
            method.patch = self
            self.enter_context(attribute(tts, name, method))

    def undo(self) -> None:
        """Gives the model its own methods back; may be called more than once."""
        self.close()

    def _generate_stream(self, text: str, audio_prompt_path: Any, print_metrics: bool, **wanted: Any) -> Measured:
        request = checked(self.tts, text, self.settings, audio_prompt_path, **wanted)
        clock = StageClock(self.tts.t3.device, whole=not request.settings.overlap)

        def spoken() -> Chunks:
            if audio_prompt_path:  # within the measured time, as upstream has it
                self.tts.prepare_conditionals(audio_prompt_path, exaggeration=request.settings.exaggeration)
            yield from chunks(self.tts, request, clock)

        stream = measured(spoken(), clock, self.tts.sr)
        return _reported(stream) if print_metrics else stream

    def _generate(self, text: str, audio_prompt_path: Any, **wanted: Any) -> torch.Tensor:
        request = checked(self.tts, text, self.settings, audio_prompt_path, **wanted)
        if audio_prompt_path:
            self.tts.prepare_conditionals(audio_prompt_path, exaggeration=request.settings.exaggeration)
        return generate(self.tts, text, self.settings, **wanted)


def patch(tts: ChatterboxTTS, **overrides: Any) -> Patch:
    """Puts this package's ``generate_stream`` and ``generate`` behind the model's own, with upstream's signatures.

    ``with patch(tts): ...`` undoes itself; ``patch(tts)`` alone lasts until its ``.undo()``.

    Args:
        tts: any upstream ``ChatterboxTTS`` that is not patched yet.
        **overrides: fields of `StreamSettings` that upstream's signature does not have, such as ``analyzer="probe"``.

    Raises:
        ValueError: an unknown field, a value that is not allowed, a field that belongs to the call, a second patch.
    """
    if hasattr(vars(tts).get("generate_stream"), "patch"):
        raise ValueError("tts: already patched; call undo() on that patch first")
    for name in overrides.keys() & inspect.signature(type(tts).generate_stream).parameters.keys():
        raise ValueError(f"{name}={overrides[name]!r}: belongs to generate_stream's own arguments, pass it there")
    return Patch(tts, StreamSettings().replace(**overrides))


def _like_upstreams(theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """Our method behind the signature, defaults and documentation of the model's own."""
    signature = inspect.signature(theirs)

    @wraps(theirs)
    def method(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        return ours(**given.arguments)

    return method


def _reported(stream: Measured) -> Measured:
    """The stream, with upstream's report printed along the way."""
    metrics = StreamMetrics()
    for audio, metrics in stream:
        if metrics.chunk_count == 1:
            print(f"Latency to first chunk: {metrics.latency_to_first_chunk:.3f}s")
        yield audio, metrics
    if metrics.rtf is not None:
        print(f"Total generation time: {metrics.total_generation_time:.3f}s")
        print(f"Total audio duration: {metrics.total_audio_duration:.3f}s")
        print(f"RTF (Real-Time Factor): {metrics.rtf:.3f}")
        print(f"Total chunks yielded: {metrics.chunk_count}")
