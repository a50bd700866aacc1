"""The schedule that ties decoding and rendering together: streaming, whole utterances, and the drop-in patch."""

from __future__ import annotations

import inspect
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from chatterbox.models.t3.modules.cond_enc import T3Cond
from chatterbox.tts import ChatterboxTTS, punc_norm

from ..files import attribute, check_recording
from .clock import Chunks, Measured, StageClock, StreamMetrics, measured, synchronize
from .overlap import in_turn, own_share, pipelined
from .s3gen.flow import FlowPlan
from .s3gen.render import Renderer
from .settings import BALANCED, StreamSettings, whole_number
from .t3.decode import check_backend, decode

_WATERMARK = 2  # the stage's number, from 0
_WARM_UP, _WARM_UP_TOKENS, _MOST_CHUNKS = "Hello.", 12, 40
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
    time may run, though several may be suspended; one with ``overlap`` works on while it is suspended, so it must be
    finished or closed before another begins.

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
    return _stream(tts, text, settings, overrides, seed, max_new_tokens)


def _stream(
    tts: ChatterboxTTS,
    text: str,
    settings: StreamSettings,
    overrides: dict[str, Any],
    seed: int | None = None,
    max_new_tokens: int = 1000,
    recording: str | Path | None = None,
) -> Measured:
    call = checked(tts, text, settings, overrides, seed, max_new_tokens, recording)
    clock = StageClock(tts.device, whole=not call[0].overlap)

    def chunks() -> Chunks:
        if recording is not None:  # inside the measured time, as upstream has it
            tts.prepare_conditionals(recording, exaggeration=call[0].exaggeration)
        yield from _chunks(tts, call, clock)

    return measured(chunks(), clock, tts.sr)


def generate(
    tts: ChatterboxTTS,
    text: str,
    settings: StreamSettings = BALANCED,
    *,
    seed: int | None = None,
    max_new_tokens: int = 1000,
    **overrides: Any,
) -> torch.Tensor:
    """The whole utterance at once, (1, samples), float32 on the CPU; arguments as for `generate_stream`."""
    codes = speech_tokens(tts, text, settings, seed=seed, max_new_tokens=max_new_tokens, **overrides)
    return render(tts, codes, settings.replace(**overrides), seed=seed)


def speech_tokens(
    tts: ChatterboxTTS,
    text: str,
    settings: StreamSettings = BALANCED,
    *,
    seed: int | None = None,
    max_new_tokens: int = 1000,
    **overrides: Any,
) -> torch.Tensor:
    """The speech tokens of ``text``, int64 (n,), start and stop removed; arguments as for `generate_stream`."""
    tokens = list(_tokens(tts, checked(tts, text, settings, overrides, seed, max_new_tokens)))
    return torch.cat(tokens).cpu() if tokens else torch.zeros(0, dtype=torch.long)


def render(
    tts: ChatterboxTTS, codes: torch.Tensor, settings: StreamSettings = BALANCED, *, seed: int | None = None
) -> torch.Tensor:
    """Audio (1, 960 n), float32 on the CPU and watermarked, of speech tokens (n,) decoded as one window."""
    plan = replace(FlowPlan.of(settings), mode="window")  # there is no past
    renderer = Renderer(tts.s3gen, tts.conds.gen, context_window=0, fade_samples=0, seed=seed or 0, plan=plan)
    return watermark(tts, renderer.push(codes, last=True))


Call = tuple[StreamSettings, torch.Tensor, int | None, int]


def checked(
    tts: ChatterboxTTS,
    text: str,
    settings: StreamSettings,
    overrides: dict[str, Any],
    seed: int | None = None,
    max_new_tokens: int = 1000,
    recording: str | Path | None = None,
) -> Call:
    """Settings with their overrides, text tokens (2, S), seed and length, each checked. Raises ValueError."""
    if not isinstance(settings, StreamSettings):
        raise ValueError(f"settings={settings!r}: must be a StreamSettings, such as chatterbox_lab.BALANCED")
    settings = settings.replace(**overrides)
    check_backend(settings, tts.t3.device)
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, 1, tts.t3.hp.max_speech_tokens)
    if seed is not None:
        seed = whole_number("seed", seed, 0, 2**63 - 1)
    if recording is not None:
        check_recording(recording)
    elif tts.conds is None:
        raise ValueError("the model has no voice: call tts.prepare_conditionals(recording) first")
    return settings, encode_text(tts, text), seed, max_new_tokens


def encode_text(tts: ChatterboxTTS, text: str) -> torch.Tensor:
    """Text tokens (2, S), int64 on the model's device, with start and stop, twice for CFG. Raises ValueError."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"text={text!r}: must be a string with something to say")
    hp = tts.t3.hp
    tokens = tts.tokenizer.text_to_tokens(punc_norm(text)).long().to(tts.device)
    if tokens.shape[1] > hp.max_text_tokens:
        raise ValueError(
            f"text of {len(text)} characters: is {tokens.shape[1]} text tokens, at most {hp.max_text_tokens} fit; "
            "speak it in parts"
        )
    tokens = F.pad(F.pad(tokens, (1, 0), value=hp.start_text_token), (0, 1), value=hp.stop_text_token)
    return tokens.repeat(2, 1)


def _tokens(tts: ChatterboxTTS, call: Call) -> Iterator[torch.Tensor]:
    settings, text_tokens, seed, max_new_tokens = call
    generator = None if seed is None else torch.Generator(tts.t3.device).manual_seed(seed)
    cond = conditioning(tts, settings.exaggeration)
    return decode(tts.t3, cond, text_tokens, settings, generator=generator, max_new_tokens=max_new_tokens)


def conditioning(tts: ChatterboxTTS, exaggeration: float) -> T3Cond:
    """T3's conditioning with the wanted exaggeration, in T3's dtype; the model's own is left as it is."""
    cond = replace(tts.conds.t3, emotion_adv=exaggeration * torch.ones(1, 1, 1), cond_prompt_speech_emb=None)
    return cond.to(device=tts.device, dtype=tts.t3.speech_head.weight.dtype)


def _chunks(tts: ChatterboxTTS, call: Call, clock: StageClock) -> Chunks:
    """The audio of each chunk, after its three stages: one after the other, or each ahead of the next."""
    source = partial(_token_chunks, tts, call, clock)
    with clock.stage("s3gen"):
        renderer = renderer_of(tts, call[0], call[2])  # for a voice that is new to a cached flow, as long as a chunk
    stages = partial(_rendered, renderer, clock), partial(_marked, tts, clock)
    if call[0].overlap:
        synchronize(tts.device)  # what the stages share is there
        items = pipelined(source, *stages, inside=partial(_share, tts.t3.device, torch.get_num_threads()))
    else:
        items = in_turn(source, *stages)
    with closing(items):
        for tokens, audio in items:
            clock.calls["token"] += tokens
            if audio.shape[1]:
                yield audio


def renderer_of(tts: ChatterboxTTS, settings: StreamSettings, seed: int | None = None) -> Renderer:
    """What turns the token chunks of one stream into audio, as the settings want it."""
    fade, plan = round(settings.fade * tts.sr), FlowPlan.of(settings)
    return Renderer(tts.s3gen, tts.conds.gen, settings.context, fade, seed or 0, plan, settings.largest_chunk)


def _share(device: torch.device, threads: int, number: int) -> AbstractContextManager[None]:
    """T3 and S3Gen share a CPU's cores evenly; the watermark gets one."""
    return own_share(device, 1 if number == _WATERMARK else max(1, threads // 2), threads)


Chunk = tuple[torch.Tensor, bool]


def _token_chunks(tts: ChatterboxTTS, call: Call, clock: StageClock, halted: Event) -> Generator[Chunk, None, None]:
    """New tokens (n,) of each chunk, and whether it is the last."""
    settings, _, _, max_new_tokens = call
    sizes, said, ended = settings.chunk_sizes(), 0, False
    with closing(_tokens(tts, call)) as tokens:  # an error must not leave T3 suspended
        while not ended and not halted.is_set():
            with clock.stage("t3"):
                size = next(sizes)
                chunk = list(takewhile(lambda _: not halted.is_set(), islice(tokens, size)))
                new = torch.cat(chunk) if chunk else torch.zeros(0, dtype=torch.long)
            said += len(chunk)
            ended = len(chunk) < size or said == max_new_tokens
            yield new, ended


def _rendered(renderer: Renderer, clock: StageClock, chunk: Chunk) -> tuple[int, torch.Tensor]:
    tokens, last = chunk
    with clock.stage("s3gen"):
        return len(tokens), renderer.push(tokens, last=last)


def _marked(tts: ChatterboxTTS, clock: StageClock, made: tuple[int, torch.Tensor]) -> tuple[int, torch.Tensor]:
    tokens, audio = made
    with clock.stage("watermark") if audio.shape[1] else nullcontext():
        return tokens, watermark(tts, audio)


def warm_up(tts: ChatterboxTTS, settings: StreamSettings = BALANCED, **overrides: Any) -> float:
    """Pays what the first stream with these settings would pay once; returns the seconds that it took.

    That is: weights in the form that the device reads fastest, compilation, CUDA graphs, the voice's share of T3's and
    S3Gen's work, the kernels of every length of chunk that the schedule begins with, the watermark's first use. A
    chunk shorter than planned, such as an utterance of one word, may still meet a new length. Nothing is spoken, and
    PyTorch's default generator is left as it is. Arguments and errors as for `generate_stream`.
    """
    call = checked(tts, _WARM_UP, settings, {**overrides, "ignore_eos": True, "guard": False}, 0)
    start = time.perf_counter()
    with closing(_tokens(tts, call)) as tokens:
        deque(islice(tokens, _WARM_UP_TOKENS), maxlen=0)
    renderer = renderer_of(tts, call[0], call[2])
    codes = torch.zeros(call[0].largest_chunk, dtype=torch.long)
    for size in _opening(call[0]):
        watermark(tts, renderer.push(codes[:size]))
    watermark(tts, renderer.push(codes[:0], last=True))
    synchronize(tts.device)
    return time.perf_counter() - start


def _opening(settings: StreamSettings) -> Iterator[int]:
    """The sizes of a schedule's chunks up to where all that follow are alike: the context is full, growth has ended."""
    said, last = 0, None
    for size in islice(settings.chunk_sizes(), _MOST_CHUNKS):
        yield size
        if said >= settings.context and size == last:
            return
        said, last = said + size, size


def watermark(tts: ChatterboxTTS, audio: torch.Tensor) -> torch.Tensor:
    """Audio (1, n) with the model's watermark, as long as before: PerTh alone would crop or refuse odd lengths."""
    samples = audio.shape[1]
    if samples == 0:
        return audio
    padded = F.pad(audio, (0, -samples % _WATERMARK_BLOCK))
    with torch.inference_mode():  # PerTh's weights ask for gradients, and its graph would stay in memory
        marked = tts.watermarker.apply_watermark(padded[0].numpy(), sample_rate=tts.sr)
    return torch.from_numpy(np.array(marked[:samples], dtype=np.float32))[None]


class Patch:
    """What `patch` returns: a context, or an object whose ``undo()`` ends the patch."""

    def __init__(self, tts: ChatterboxTTS, settings: StreamSettings) -> None:
        self.tts, self.settings = tts, settings
        self._stack = ExitStack()
        self._stack.enter_context(attribute(tts, "generate_stream", self._generate_stream))
        self._stack.enter_context(attribute(tts, "generate", self._generate))

    def undo(self) -> None:
        """Gives the model its own methods back; may be called more than once."""
        self._stack.close()

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exc: object) -> None:
        self.undo()

    def _generate_stream(
        self,
        text: str,
        audio_prompt_path: str | Path | None = None,
        exaggeration: float = 0.5,
        cfg_weight: float = 0.5,
        temperature: float = 0.8,
        chunk_size: int = 25,
        context_window: int = 50,
        fade_duration: float = 0.02,
        print_metrics: bool = True,
    ) -> Measured:
        wanted = {
            "exaggeration": exaggeration, "cfg_weight": cfg_weight, "temperature": temperature,
            "chunk_size": chunk_size, "context_window": context_window, "fade_duration": fade_duration,
        }  # fmt: skip
        stream = _stream(self.tts, text, self.settings, wanted, recording=audio_prompt_path or None)
        return _reported(stream) if print_metrics else stream

    def _generate(
        self,
        text: str,
        audio_prompt_path: str | Path | None = None,
        exaggeration: float = 0.5,
        cfg_weight: float = 0.5,
        temperature: float = 0.8,
    ) -> torch.Tensor:
        wanted = {"exaggeration": exaggeration, "cfg_weight": cfg_weight, "temperature": temperature}
        if audio_prompt_path:
            checked(self.tts, text, self.settings, wanted, recording=audio_prompt_path)
            self.tts.prepare_conditionals(audio_prompt_path, exaggeration=exaggeration)
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
    for name in overrides.keys() & inspect.signature(Patch._generate_stream).parameters.keys():
        raise ValueError(f"{name}={overrides[name]!r}: belongs to generate_stream's own arguments, pass it there")
    if isinstance(getattr(vars(tts).get("generate_stream"), "__self__", None), Patch):
        raise ValueError("tts: already patched; call undo() on that patch first")
    return Patch(tts, StreamSettings().replace(**overrides))


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
