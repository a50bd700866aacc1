"""Upstream's own generators on our clock: the other side of every comparison.

They run unpatched, from their own class; what they leave behind on the model is removed afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from chatterbox.models.t3 import t3 as t3_module
from chatterbox.tts import ChatterboxTTS

from ..engine.clock import Chunks, Measured, StageClock, measured
from ..engine.settings import BALANCED, StreamSettings
from ..engine.stream import Call, checked, conditioning
from ..engine.t3.attention import remove_spies, without_spies
from ..files import attribute
from ..voices.head import NEVER


def upstream_tokens(
    tts: ChatterboxTTS,
    text: str,
    settings: StreamSettings = BALANCED,
    *,
    seed: int | None = None,
    max_new_tokens: int = 1000,
    leave_spies: bool = False,
    **overrides: Any,
) -> torch.Tensor:
    """What upstream's own ``T3.inference`` says, int64 (n,), start and stop removed; arguments as `speech_tokens`.

    The seed sets PyTorch's default generator. Upstream leaves a spy on layer 9 with every call; it is removed unless
    ``leave_spies``. Upstream cannot sample at temperature 0.
    """
    settings, text_tokens, seed, max_new_tokens = _call(tts, text, settings, overrides, seed, max_new_tokens)
    if seed is not None:
        torch.manual_seed(seed)
    with _borrowed(tts, settings), attribute(t3_module, "tqdm", _no_bar):
        try:
            tokens = tts.t3.inference(
                t3_cond=tts.conds.t3, text_tokens=text_tokens, max_new_tokens=max_new_tokens,
                temperature=settings.temperature, cfg_weight=settings.cfg_weight,
            )[0]  # fmt: skip
        finally:
            if not leave_spies:
                remove_spies(tts.t3.tfmr)
    hp = tts.t3.hp
    return tokens[(tokens != hp.start_speech_token) & (tokens != hp.stop_speech_token)].cpu()


def upstream_steps(
    tts: ChatterboxTTS,
    text: str,
    settings: StreamSettings = BALANCED,
    *,
    seed: int | None = None,
    max_new_tokens: int = 1000,
    **overrides: Any,
) -> Iterator[torch.Tensor]:
    """The same tokens out of upstream's own streaming loop, one at a time as they are decoded, int64 (1,).

    PyTorch's default generator is theirs meanwhile: who draws from it in between changes what is said.
    """
    settings, text_tokens, seed, max_new_tokens = _call(tts, text, settings, overrides, seed, max_new_tokens)

    @torch.inference_mode()
    def steps() -> Iterator[torch.Tensor]:
        if seed is not None:
            torch.manual_seed(seed)
        with without_spies(tts.t3.tfmr), _borrowed(tts, settings):
            stream = type(tts).inference_stream(
                tts, t3_cond=tts.conds.t3, text_tokens=text_tokens, max_new_tokens=max_new_tokens, chunk_size=1,
                temperature=settings.temperature, cfg_weight=settings.cfg_weight,
            )  # fmt: skip
            try:
                for token in stream:
                    if int(token) not in (tts.t3.hp.start_speech_token, tts.t3.hp.stop_speech_token):
                        yield token[0]
            finally:
                stream.close()
                remove_spies(tts.t3.tfmr)

    return steps()


def _call(tts: ChatterboxTTS, text: str, settings: StreamSettings, overrides: dict[str, Any], *rest: Any) -> Call:
    call = checked(tts, text, settings, overrides, *rest)
    if call[0].temperature == 0:
        raise ValueError("temperature=0: upstream divides by it; greedy is ours alone")
    return call


@contextmanager
def _borrowed(tts: ChatterboxTTS, settings: StreamSettings) -> Iterator[None]:
    """Upstream's generators write to the voice and to T3; both are given back as they were."""
    t3, voice, missing = tts.t3, tts.conds.t3, object()
    compiled, patched = t3.compiled, t3._modules.get("patched_model", missing)
    tts.conds.t3 = conditioning(tts, settings.exaggeration)
    t3.compiled = False  # else upstream streams with the text position of an earlier call
    try:
        with stop_suppressed(t3, settings.ignore_eos):
            yield
    finally:
        tts.conds.t3, t3.compiled = voice, compiled
        t3._modules.pop("patched_model", None)
        if patched is not missing:
            t3.patched_model = patched


def _no_bar(steps: Iterable[int], **_: Any) -> Iterable[int]:
    return steps


def upstream_stream(
    tts: ChatterboxTTS,
    text: str,
    settings: StreamSettings = BALANCED,
    *,
    seed: int | None = None,
    max_new_tokens: int = 1000,
    **overrides: Any,
) -> Measured:
    """Upstream's own ``generate_stream``, on the same clock as ours and for as many tokens; arguments as there.

    The analyzer's choice does not apply: upstream always asks for attention maps. The seed sets PyTorch's default
    generator, as a user of upstream would; its vocoder draws from the same generator between chunks, so from the
    second chunk on its tokens are others than `upstream_tokens` says. Where ``max_new_tokens`` ends the speech,
    upstream loses what does not fill a chunk: take a multiple of ``chunk_size``.
    """
    call = _call(tts, text, settings, overrides, seed, max_new_tokens)
    clock = StageClock(tts.device)
    return measured(_upstream_chunks(tts, text, call, clock), clock, tts.sr)


def _upstream_chunks(tts: ChatterboxTTS, text: str, call: Call, clock: StageClock) -> Chunks:
    settings, _, seed, max_new_tokens = call
    if seed is not None:
        torch.manual_seed(seed)
    with without_spies(tts.t3.tfmr), _borrowed(tts, settings), _timed(tts, clock, max_new_tokens):
        stream = type(tts).generate_stream(
            tts, text, chunk_size=settings.chunk_size, context_window=settings.context_window,
            temperature=settings.temperature, cfg_weight=settings.cfg_weight, fade_duration=settings.fade_duration,
            exaggeration=tts.conds.t3.emotion_adv.item(), print_metrics=False,
        )  # fmt: skip
        try:
            for audio, _ in stream:
                yield audio
        finally:
            stream.close()
            remove_spies(tts.t3.tfmr)


def upstream_whole(
    tts: ChatterboxTTS,
    text: str,
    settings: StreamSettings = BALANCED,
    *,
    seed: int | None = None,
    max_new_tokens: int = 1000,
    **overrides: Any,
) -> Measured:
    """Upstream's own ``generate``, which does not stream, as a stream of one chunk; arguments as `upstream_stream`."""
    call = _call(tts, text, settings, overrides, seed, max_new_tokens)
    clock = StageClock(tts.device)
    return measured(_upstream_audio(tts, text, call, clock), clock, tts.sr)


def _upstream_audio(tts: ChatterboxTTS, text: str, call: Call, clock: StageClock) -> Chunks:
    settings, _, seed, max_new_tokens = call
    if seed is not None:
        torch.manual_seed(seed)
    with (
        without_spies(tts.t3.tfmr), _borrowed(tts, settings), _timed(tts, clock, max_new_tokens),
        attribute(t3_module, "tqdm", _no_bar),
    ):  # fmt: skip
        try:
            yield type(tts).generate(
                tts, text, exaggeration=tts.conds.t3.emotion_adv.item(), cfg_weight=settings.cfg_weight,
                temperature=settings.temperature,
            )  # fmt: skip
        finally:
            remove_spies(tts.t3.tfmr)


@contextmanager
def _timed(tts: ChatterboxTTS, clock: StageClock, max_new_tokens: int) -> Iterator[None]:
    """Upstream's three stages on our clock, and its fixed 1000 tokens replaced."""

    def inference(**kwargs: Any) -> torch.Tensor:
        with clock.stage("t3"):
            tokens = type(tts.t3).inference(tts.t3, **dict(kwargs, max_new_tokens=max_new_tokens))
        clock.calls["token"] += int((tokens[0] < tts.t3.hp.start_speech_token).sum())  # start and stop are above
        return tokens

    def inference_stream(**kwargs: Any) -> Iterator[torch.Tensor]:
        chunks = type(tts).inference_stream(tts, **dict(kwargs, max_new_tokens=max_new_tokens))
        while True:
            with clock.stage("t3"):
                chunk = next(chunks, None)
            if chunk is None:
                return
            clock.calls["token"] += int((chunk != tts.t3.hp.stop_speech_token).sum())
            yield chunk

    with (
        attribute(tts.t3, "inference", inference),
        attribute(tts, "inference_stream", inference_stream),
        attribute(tts.s3gen, "inference", _staged(clock, "s3gen", tts.s3gen.inference)),
        attribute(tts.watermarker, "apply_watermark", _staged(clock, "watermark", tts.watermarker.apply_watermark)),
    ):
        yield


def _staged(clock: StageClock, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        with clock.stage(stage):
            return function(*args, **kwargs)

    return timed


@contextmanager
def stop_suppressed(t3: torch.nn.Module, active: bool = True) -> Iterator[None]:
    """Keeps T3 from sampling its stop token, whoever runs it; does nothing unless ``active``."""

    def suppress(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        logits[..., t3.hp.stop_speech_token] = NEVER
        return logits

    handle = t3.speech_head.register_forward_hook(suppress) if active else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
