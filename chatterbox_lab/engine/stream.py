"""Text to audio: the loop that ties T3, S3Gen and the watermark together, for streams and for whole utterances."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from chatterbox.tts import ChatterboxTTS

from .clock import Chunks, Measured, StageClock, measured
from .overlap import overlapped
from .request import Request, checked
from .s3gen.flow import FlowPlan
from .s3gen.render import Renderer
from .settings import BALANCED, StreamSettings
from .t3.decode import token_chunks, tokens

_WATERMARK_BLOCK = 960  # PerTh crops what does not fill its hop of 240 samples at 24 kHz, and needs over 768


def generate_stream(
    tts: ChatterboxTTS,
    text: str,
    settings: StreamSettings = BALANCED,
    *,
    seed: int | None = None,
    max_new_tokens: int = 1000,
    **overrides: Any,
) -> Measured:
    """Speaks ``text`` in chunks, each yielded as soon as it is rendered.

    Arguments are checked when this is called, before any model runs. Not thread-safe: one stream of a model at a
    time may run, though several may be suspended. A stream with ``overlap`` works on while it is suspended: finish or
    close it before you begin another.

    Args:
        tts: a model from `load`, or any upstream ``ChatterboxTTS``.
        text: what to say, at most T3's 2048 text tokens.
        settings: chunk size, context, sampling and analyzer.
        seed: makes tokens and audio repeatable; equal to ``torch.manual_seed(seed)`` before upstream's sampling.
            None samples from PyTorch's default generator.
        max_new_tokens: the most speech tokens (25 a second), at least 1.
        **overrides: single fields of ``settings``, such as ``chunk_size=25``.

    Yields:
        ``(audio, metrics)``: audio (1, samples), float32 on the CPU at ``tts.sr``; metrics of the stream so far.

    Raises:
        ValueError: names the argument, its value and what is allowed.
    """
    request = checked(tts, text, settings, seed=seed, max_new_tokens=max_new_tokens, **overrides)
    clock = StageClock(tts.t3.device, whole=not request.settings.overlap)
    return measured(chunks(tts, request, clock), clock, tts.sr)


def chunks(tts: ChatterboxTTS, request: Request, clock: StageClock) -> Chunks:
    """The audio (1, samples) of each chunk in turn; the stages ``t3``, ``s3gen`` and ``watermark`` go on the clock."""
    with clock.stage("s3gen"):
        renderer = renderer_of(tts, request.settings, request.seed)

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
    request = checked(tts, text, settings, **arguments)
    return render(tts, _all_tokens(tts, request), request.settings, seed=request.seed)


def speech_tokens(tts: ChatterboxTTS, text: str, settings: StreamSettings = BALANCED, **arguments: Any) -> torch.Tensor:
    """The speech tokens of ``text``, int64 (n,), start and stop removed; arguments as for `generate_stream`."""
    return _all_tokens(tts, checked(tts, text, settings, **arguments))


def _all_tokens(tts: ChatterboxTTS, request: Request) -> torch.Tensor:
    found = list(tokens(tts, request))
    return torch.cat(found).cpu() if found else torch.zeros(0, dtype=torch.long)


def render(
    tts: ChatterboxTTS, codes: torch.Tensor, settings: StreamSettings = BALANCED, *, seed: int | None = None
) -> torch.Tensor:
    """Audio (1, 960 n), float32 on the CPU and watermarked, of speech tokens (n,) decoded as one window."""
    plan = replace(FlowPlan.of(settings, tts.s3gen.device), mode="window")  # there is no past
    renderer = Renderer(tts.s3gen, tts.conds.gen, context_window=0, fade_samples=0, seed=seed or 0, plan=plan)
    return watermark(tts, renderer.push(codes, last=True))


def renderer_of(tts: ChatterboxTTS, settings: StreamSettings, seed: int | None = None) -> Renderer:
    """What turns the token chunks of one stream into audio, as the settings want it, in the model's voice."""
    fade, plan = round(settings.fade * tts.sr), FlowPlan.of(settings, tts.s3gen.device)
    return Renderer(tts.s3gen, tts.conds.gen, settings.context, fade, seed or 0, plan, settings.largest_chunk)


def watermark(tts: ChatterboxTTS, audio: torch.Tensor) -> torch.Tensor:
    """Audio (1, n) with the model's watermark, as long as before: PerTh alone would crop or refuse odd lengths."""
    samples = audio.shape[1]
    if samples == 0:
        return audio
    padded = F.pad(audio, (0, -samples % _WATERMARK_BLOCK))
    with torch.inference_mode():  # PerTh's weights ask for gradients, and its graph would stay in memory
        marked = tts.watermarker.apply_watermark(padded[0].numpy(), sample_rate=tts.sr)
    return torch.from_numpy(np.array(marked[:samples], dtype=np.float32))[None]
