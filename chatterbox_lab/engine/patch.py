"""The drop-in: this package behind a model's own ``generate_stream``, ``generate`` and ``prepare_conditionals``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from chatterbox.tts import ChatterboxTTS

from .. import recordings
from .clock import Chunks, Measured, StageClock, StreamMetrics
from .request import Request, checked, voice_of
from .settings import StreamSettings
from .stream import chunks, generate_stream, said, spoken
from .variants import punctuated, released, variant_of

Method = Callable[..., Any]
_OURS = {name: it for name, it in inspect.signature(generate_stream).parameters.items() if it.kind is it.KEYWORD_ONLY}
_OF_A_STREAM = ("chunk_size", "context_window", "fade_duration")


class Patch(ExitStack):
    """What `patch` returns: a context, or an object whose ``undo()`` ends the patch.

    The model is of a class of its own meanwhile, derived from its own, so that a ``copy.copy`` of it, with a voice of
    its own, is patched as well. Its patched methods have this object as ``tts.generate_stream.patch``. A derived class
    may have a ``streamed`` and a ``whole`` of its own (see `patch`).
    """

    def __init__(self, tts: ChatterboxTTS, settings: StreamSettings) -> None:
        super().__init__()
        self.tts, self.settings, kind = tts, settings, type(tts)
        theirs = released(tts)
        whole = _named(kind.generate, theirs.generate)
        methods = {"generate": _like_upstreams(whole, self.whole, _OURS)}
        if hasattr(theirs, "generate_stream"):
            streamed = _named(kind.generate_stream, theirs.generate_stream)
            methods["generate_stream"] = _like_upstreams(streamed, self._generate_stream, _OURS)
        else:  # a release that does not stream: what its own generate takes, and what a stream is made by
            methods["generate_stream"] = _like_upstreams(whole, self._generate_stream, _stream_of(settings))
            methods["generate_stream"].__name__ = "generate_stream"
        if _parameters(kind.prepare_conditionals) == _parameters(theirs.prepare_conditionals):
            methods["prepare_conditionals"] = _like_upstreams(kind.prepare_conditionals, prepare_conditionals, {})
        for method in methods.values():
            method.patch = self
        patched = type(kind)(kind.__name__, (kind,), methods | {"__module__": __name__, "__doc__": kind.__doc__})
        for name in methods:  # at the end copies of the model, which are of the same class, are as they were, too
            self.callback(delattr, patched, name)
        tts.__class__ = patched
        self.callback(setattr, tts, "__class__", kind)
        for name in methods.keys() & vars(tts).keys():  # an application's own wrappers, which would hide ours
            self.callback(setattr, tts, name, vars(tts).pop(name))

    def undo(self) -> None:
        """Gives the model its own class back; may be called more than once."""
        self.close()

    def _generate_stream(self, tts: ChatterboxTTS, print_metrics: bool = False, **wanted: Any) -> Measured:
        stream = self.streamed(tts, **wanted)
        return _reported(stream) if print_metrics else stream

    def streamed(self, tts: ChatterboxTTS, text: str, **wanted: Any) -> Measured:
        """What ``generate_stream`` gives for the arguments of its call, ``print_metrics`` aside."""
        request, recording = self.asked(tts, text, **wanted)

        def made(clock: StageClock) -> Chunks:
            own = voiced(tts, request, recording)  # within the measured time, as upstream has it
            yield from chunks(tts, own, clock)

        return spoken(tts, request, made)

    def whole(self, tts: ChatterboxTTS, text: str, **wanted: Any) -> torch.Tensor:
        """What ``generate`` gives for the arguments of its call."""
        return said(tts, voiced(tts, *self.asked(tts, text, **wanted)))

    def asked(
        self, tts: ChatterboxTTS, text: str, audio_prompt_path: Any = None, **wanted: Any
    ) -> tuple[Request, recordings.Recording | None]:
        """The call, checked, and the recording whose voice it wants, read: both are what they are now."""
        recording = recordings.asked(tts, audio_prompt_path, wanted.pop("norm_loudness", True))
        if isinstance(text, str) and not text.strip():
            text = punctuated(tts, text)  # upstream's stock sentence for no text, a full stop for spaces
        if "language_id" in wanted:
            wanted["language"] = wanted.pop("language_id") or ""
        return checked(tts, text, self.settings, voiced=recording is None, **wanted), recording


def prepare_conditionals(tts: ChatterboxTTS, wav_fpath: Any, exaggeration: float, norm_loudness: bool = True) -> None:
    """Gives the model the voice of a recording; see `recordings.taken` and `recordings.prepared`."""
    tts.conds = recordings.prepared(tts, recordings.taken(tts, wav_fpath, norm_loudness), exaggeration)


def voiced(tts: ChatterboxTTS, request: Request, recording: recordings.Recording | None) -> Request:
    """The request with the recording's voice, which is the model's own from now on, as with upstream."""
    if recording is None:
        return request
    exaggeration = request.settings.exaggeration
    conds = tts.conds = recordings.prepared(tts, recording, exaggeration)
    return replace(request, voice=voice_of(tts, conds, exaggeration))


def _named(own: Method, theirs: Method) -> Method:
    """The method of a derived class, or the release's where that one only passes on what it is given."""
    kinds = {parameter.kind for parameter in inspect.signature(own).parameters.values()}
    return theirs if kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} else own


def _parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def patch(
    tts: ChatterboxTTS, *, kind: Callable[[ChatterboxTTS, StreamSettings], Patch] = Patch, **overrides: Any
) -> Patch:
    """Puts this package behind a model's own methods, with upstream's signatures.

    A release whose models do not stream gets ``generate_stream`` beside its ``generate``, with the same arguments and
    ``chunk_size``, ``context_window`` and ``fade_duration``. Both take three keywords more: ``seed``,
    ``max_new_tokens`` and ``stop``, as `stream.generate_stream` has them. ``prepare_conditionals`` and
    ``audio_prompt_path`` take what `recordings.read` reads; the same recording is prepared once.
    ``with patch(tts): ...`` undoes itself; ``patch(tts)`` alone lasts until its ``.undo()``.

    Args:
        tts: a Chatterbox that is not patched yet: of chatterbox-streaming, English, Multilingual, Turbo or Nano of
            chatterbox-tts or chatterbox-light, or of a class derived from these. Turbo and Nano ignore ``cfg_weight``
            and ``exaggeration``, as their release does, but not a ``min_p`` that is given.
        kind: what makes the patch, once all is checked: `Patch`, or a class derived from it.
        **overrides: fields of `StreamSettings` that upstream's signature does not have, such as ``analyzer="probe"``.

    Raises:
        TypeError: a model that is no Chatterbox that this package runs; nothing of it has been touched then.
        ValueError: an unknown field, a value that is not allowed, a field that belongs to the call, a second patch.
    """
    variant_of(tts)
    if hasattr(getattr(type(tts), "generate_stream", None), "patch"):
        raise ValueError("tts: already patched; call undo() on that patch first")
    taken = inspect.signature(getattr(released(tts), "generate_stream", released(tts).generate)).parameters
    of_calls = taken.keys() | _OURS.keys() | ({"language"} if "language_id" in taken else set())
    for name in overrides.keys() & of_calls:
        raise ValueError(f"{name}={overrides[name]!r}: belongs to generate_stream's own arguments, pass it there")
    return kind(tts, StreamSettings().replace(**overrides))


def _like_upstreams(
    theirs: Callable[..., Any], ours: Callable[..., Any], more: dict[str, inspect.Parameter]
) -> Callable[..., Any]:
    """Our method behind the signature, defaults and documentation of the model's own, with keywords more."""
    signature = inspect.signature(theirs)
    added = [parameter for name, parameter in more.items() if name not in signature.parameters]
    signature = signature.replace(parameters=[*signature.parameters.values(), *added])
    first = next(iter(signature.parameters))  # the model itself

    @wraps(theirs)
    def method(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        tts, *_ = given.args
        return ours(tts, **{name: value for name, value in given.arguments.items() if name != first})

    method.__signature__ = signature
    return method


def _stream_of(settings: StreamSettings) -> dict[str, inspect.Parameter]:
    defaults = {name: getattr(settings, name) for name in _OF_A_STREAM} | {"print_metrics": False}
    kind = inspect.Parameter.KEYWORD_ONLY
    return {name: inspect.Parameter(name, kind, default=value) for name, value in defaults.items()} | _OURS


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
