"""Text to audio: the loop that ties T3, S3Gen and the watermark together, for streams and for whole utterances."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from threading import Event
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from chatterbox.tts import ChatterboxTTS

from ..host import apart, working_apart
from .clock import Chunks, Measured, StageClock, measured, warn_of
from .overlap import overlapped
from .request import Request, checked
from .s3gen.flow import FlowPlan
from .s3gen.render import Renderer
from .settings import BALANCED, StreamSettings
from .t3.decode import token_chunks, tokens
from .t3.words import Account
from .variants import variant_of

_WATERMARK_BLOCK = 960  # PerTh crops what does not fill its hop of 240 samples at 24 kHz, and needs over 768


def generate_stream(
    tts: ChatterboxTTS,
    text: str,
    settings: StreamSettings = BALANCED,
    *,
    seed: int | None = None,
    max_new_tokens: int = 1000,
    stop: Event | None = None,
    **overrides: Any,
) -> Measured:
    """Speaks ``text`` in chunks, each yielded as soon as it is rendered.

    Arguments are checked, and the voice is taken, when this is called, before any model runs. Any number of threads may
    share a model, each with streams of its own, running or suspended: each stream gets what it would get alone. It
    works in PyTorch's usual ways (no autocast, its own dtypes and device), whatever the application has set. A stream
    with ``overlap`` works on while it is suspended, at most two chunks ahead.

    Args:
        tts: a model from `load`, or any upstream ``ChatterboxTTS``.
        text: what to say, at most T3's 2048 text tokens.
        settings: chunk size, context, sampling and analyzer.
        seed: makes tokens and audio repeatable; equal to ``torch.manual_seed(seed)`` before upstream's sampling.
            None samples from PyTorch's default generator.
        max_new_tokens: the most speech tokens (25 a second), at least 1.
        stop: an event that any thread may set, such as one that sees a client leave: the stream then ends with the
            token that it is at, and renders no further chunk. ``close`` is for the thread that runs the stream.
        **overrides: single fields of ``settings``, such as ``chunk_size=25``.

    Yields:
        ``(audio, metrics)``: audio (1, samples), float32 on the CPU at ``tts.sr``; metrics of the stream so far. The
        vocoder stays within 0.99; the watermark may take a sample a little above 1.0: `pcm16` clamps it.

    Raises:
        TypeError: a model that is no Chatterbox.
        ValueError: names the argument, its value and what is allowed.
    """
    request = checked(tts, text, settings, seed=seed, max_new_tokens=max_new_tokens, stop=stop, **overrides)
    return spoken(tts, request, lambda clock: chunks(tts, request, clock))


def spoken(tts: ChatterboxTTS, request: Request, made: Callable[[StageClock], Chunks]) -> Measured:
    """The chunks that are ``made`` on a clock, measured, and apart from how the application has set PyTorch up."""
    clock = StageClock(tts.t3.device, whole=not request.settings.overlap)
    return measured(working_apart(made(clock), tts.t3.device), clock, tts.sr)


def chunks(tts: ChatterboxTTS, request: Request, clock: StageClock) -> Chunks:
    """The audio (1, samples) of each chunk in turn; the stages ``t3``, ``s3gen`` and ``watermark`` go on the clock."""
    with clock.stage("s3gen"):
        renderer = renderer_of(tts, request.settings, request.seed, request.voice.gen)

    def rendered(new: torch.Tensor, last: bool) -> torch.Tensor:
        with clock.stage("s3gen"):
            return renderer.push(new, last=last)

    def marked(audio: torch.Tensor) -> torch.Tensor:
        with clock.stage("watermark"):
            return watermark(tts, audio)

    if request.settings.overlap:  # the same three, each in its thread
        yield from overlapped(lambda halted: token_chunks(tts, request, clock, halted), rendered, marked, clock)
        return
    with closing(token_chunks(tts, request, clock)) as spoken:
        for new, last in spoken:
            audio = marked(rendered(new, last))
            clock.calls["token"] += len(new)
            if audio.shape[1]:
                yield audio


def generate(tts: ChatterboxTTS, text: str, settings: StreamSettings = BALANCED, **arguments: Any) -> torch.Tensor:
    """The whole utterance at once, (1, samples), float32 on the CPU; arguments as for `generate_stream`."""
    return said(tts, checked(tts, text, settings, **arguments))


def said(tts: ChatterboxTTS, request: Request) -> torch.Tensor:
    """The whole utterance of a request, (1, samples), float32 on the CPU."""
    account = Account((), request.text_tokens.shape[1], [])
    with apart(tts.device):
        codes = request.variant.ended(_all_tokens(tts, request, account))
        audio = _rendered(tts, codes, request.settings, request.seed, request.voice.gen)
    if account.ended == "limit" and not request.settings.ignore_eos:
        warn_of(request.max_new_tokens)
    return audio


def speech_tokens(tts: ChatterboxTTS, text: str, settings: StreamSettings = BALANCED, **arguments: Any) -> torch.Tensor:
    """The speech tokens of ``text``, int64 (n,), start and stop removed; arguments as for `generate_stream`."""
    request = checked(tts, text, settings, **arguments)
    with apart(tts.device):
        return _all_tokens(tts, request)


def _all_tokens(tts: ChatterboxTTS, request: Request, account: Account | None = None) -> torch.Tensor:
    with closing(tokens(tts, request, account)) as stream:
        found = list(stream)
    return torch.cat(found).cpu() if found else torch.zeros(0, dtype=torch.long)


def render(
    tts: ChatterboxTTS, codes: torch.Tensor, settings: StreamSettings = BALANCED, *, seed: int | None = None
) -> torch.Tensor:
    """Audio (1, 960 n), float32 on the CPU and watermarked, of speech tokens (n,) decoded as one window."""
    with apart(tts.device):
        return _rendered(tts, codes, settings, seed, tts.conds.gen)


def _rendered(
    tts: ChatterboxTTS, codes: torch.Tensor, settings: StreamSettings, seed: int | None, voice: dict[str, Any]
) -> torch.Tensor:
    plan = replace(FlowPlan.of(settings, tts.s3gen.device), mode="window")  # there is no past
    renderer = Renderer(tts.s3gen, voice, context_window=0, fade_samples=0, seed=seed or 0, plan=plan)
    return watermark(tts, renderer.push(codes, last=True))


def renderer_of(
    tts: ChatterboxTTS, settings: StreamSettings, seed: int | None = None, voice: dict[str, Any] | None = None
) -> Renderer:
    """What turns the token chunks of one stream into audio, as the settings want it; None is the model's own voice."""
    fade, plan = round(settings.fade * tts.sr), FlowPlan.of(settings, tts.s3gen.device)
    voice = tts.conds.gen if voice is None else voice
    largest = settings.largest_chunk + len(variant_of(tts).after)
    return Renderer(tts.s3gen, voice, settings.context, fade, seed or 0, plan, largest)


def pcm16(audio: torch.Tensor) -> np.ndarray:
    """Audio (1, samples) or (samples,) as 16-bit samples, int16 (samples,); what is beyond -1 to 1 is clamped.

    ``pcm16(audio).tobytes()`` is what sound cards, WAV files and many telephone gateways take, on little-endian hosts.

    Raises:
        ValueError: audio of another shape, or samples that are NaN, which 16 bits cannot say.
    """
    if audio.ndim not in (1, 2) or (audio.ndim == 2 and len(audio) != 1):
        raise ValueError(f"audio of shape {tuple(audio.shape)}: must be (1, samples) or (samples,)")
    if audio.isnan().any():
        raise ValueError("audio has samples that are NaN")
    return (audio.detach().flatten().float().clamp(-1, 1) * 32767).round().to(torch.int16).cpu().numpy()


def watermark(tts: ChatterboxTTS, audio: torch.Tensor) -> torch.Tensor:
    """Audio (1, n) with the model's watermark, as long as before: PerTh alone would crop or refuse odd lengths."""
    samples = audio.shape[1]
    if samples == 0:
        return audio
    if not hasattr(tts, "watermarker"):  # chatterbox-light has none
        return audio
    padded = F.pad(audio, (0, -samples % _WATERMARK_BLOCK))
    with torch.inference_mode():  # PerTh's weights ask for gradients, and its graph would stay in memory
        marked = tts.watermarker.apply_watermark(padded[0].numpy(), sample_rate=tts.sr)
    return torch.from_numpy(np.array(marked[:samples], dtype=np.float32))[None]
