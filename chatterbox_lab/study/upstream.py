"""Upstream's own generators on our clock: the other side of every comparison.

They run unpatched, from their own class; what they leave behind on the model is removed afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from typing import Any

import torch
from chatterbox.models.t3 import t3 as t3_module
from chatterbox.tts import ChatterboxTTS

from ..engine.clock import Chunks, Measured, StageClock, measured
from ..engine.request import Request, checked
from ..engine.settings import BALANCED, StreamSettings
from ..engine.t3.decode import conditioning
from ..engine.t3.spies import remove_spies
from ..files import attribute
from ..voices.head import NEVER
from .fallback import without_spies


def upstream_tokens(
    tts: ChatterboxTTS, text: str, settings: StreamSettings = BALANCED, *, leave_spies: bool = False, **arguments: Any
) -> torch.Tensor:
    """What upstream's own ``T3.inference`` says, int64 (n,), start and stop removed; arguments as for `speech_tokens`.

    The seed sets PyTorch's default generator. Upstream leaves a spy on layer 9 with every call; it is removed unless
    ``leave_spies``. Upstream cannot sample at temperature 0 (ValueError).
    """
    request = _checked(tts, text, settings, **arguments)
    _seed(request)
    with _borrowed(tts, request.settings), attribute(t3_module, "tqdm", _no_bar):
        try:
            tokens = tts.t3.inference(**_for_t3(tts, request))[0]
        finally:
            if not leave_spies:
                remove_spies(tts.t3.tfmr)
    hp = tts.t3.hp
    return tokens[(tokens != hp.start_speech_token) & (tokens != hp.stop_speech_token)].cpu()


def upstream_steps(
    tts: ChatterboxTTS, text: str, settings: StreamSettings = BALANCED, **arguments: Any
) -> Iterator[torch.Tensor]:
    """The same tokens from upstream's own streaming loop, one at a time as they are decoded, int64 (1,).

    They are sampled from PyTorch's default generator: if you draw from it in between, other tokens follow.
    """
    request = _checked(tts, text, settings, **arguments)

    @torch.inference_mode()
    def steps() -> Iterator[torch.Tensor]:
        with _alone(tts, request):
            stream = ChatterboxTTS.inference_stream(tts, chunk_size=1, **_for_t3(tts, request))
            with closing(stream):
                for token in stream:
                    if int(token) not in (tts.t3.hp.start_speech_token, tts.t3.hp.stop_speech_token):
                        yield token[0]

    return steps()


def upstream_stream(
    tts: ChatterboxTTS, text: str, settings: StreamSettings = BALANCED, *, leave_spies: bool = False, **arguments: Any
) -> Measured:
    """Upstream's own ``generate_stream``, on our clock and for as many tokens; arguments as for `generate_stream`.

    The analyzer's choice does not apply: upstream always asks for attention maps. The seed sets PyTorch's default
    generator, as a user of upstream would. Its vocoder draws from the same generator between chunks, so from the second
    chunk on its tokens are others than those of `upstream_tokens`. Where ``max_new_tokens`` ends the speech, upstream
    loses what does not fill a chunk: take a multiple of ``chunk_size``.

    Spies that are on the model are out of the way meanwhile, unless ``leave_spies``: then it runs through them, as an
    application's call would, and leaves its own.
    """
    request, clock = _checked(tts, text, settings, **arguments), StageClock(tts.device)

    def chunks() -> Chunks:
        wanted = {name: getattr(request.settings, name) for name in ("chunk_size", "context_window", "fade_duration")}
        with _alone(tts, request, leave_spies), _timed(tts, clock, request.max_new_tokens):
            stream = ChatterboxTTS.generate_stream(tts, text, print_metrics=False, **wanted, **_for_tts(tts, request))
            with closing(stream):
                for audio, _ in stream:
                    yield audio

    return measured(chunks(), clock, tts.sr)


def upstream_whole(
    tts: ChatterboxTTS, text: str, settings: StreamSettings = BALANCED, *, leave_spies: bool = False, **arguments: Any
) -> Measured:
    """Upstream's own ``generate``, which does not stream, as a stream of one chunk; else as `upstream_stream`."""
    request, clock = _checked(tts, text, settings, **arguments), StageClock(tts.device)

    def chunks() -> Chunks:
        alone = _alone(tts, request, leave_spies)
        with alone, _timed(tts, clock, request.max_new_tokens), attribute(t3_module, "tqdm", _no_bar):
            yield ChatterboxTTS.generate(tts, text, **_for_tts(tts, request))

    return measured(chunks(), clock, tts.sr)


def _checked(tts: ChatterboxTTS, text: str, settings: StreamSettings, **arguments: Any) -> Request:
    request = checked(tts, text, settings, **arguments)
    if request.settings.temperature == 0:
        raise ValueError("temperature=0: upstream divides by it; greedy is ours alone")
    return request


def _for_t3(tts: ChatterboxTTS, request: Request) -> dict[str, Any]:
    """What T3's own generators are given."""
    return _sampling(request) | {
        "t3_cond": tts.conds.t3,
        "text_tokens": request.text_tokens[:1].repeat(2, 1),  # also without guidance
        "max_new_tokens": request.max_new_tokens,
    }


def _for_tts(tts: ChatterboxTTS, request: Request) -> dict[str, Any]:
    """What the whole model's generators are given; with an exaggeration other than the voice's they make it anew."""
    return _sampling(request) | {"exaggeration": tts.conds.t3.emotion_adv.item()}


def _sampling(request: Request) -> dict[str, Any]:
    return {"temperature": request.settings.temperature, "cfg_weight": request.settings.cfg_weight}


def _seed(request: Request) -> None:
    """Sets PyTorch's default generator, from which upstream samples."""
    if request.seed is not None:
        torch.manual_seed(request.seed)


@contextmanager
def _alone(tts: ChatterboxTTS, request: Request, leave_spies: bool = False) -> Iterator[None]:
    """The model as upstream's generators expect it, seeded and without spies; afterwards it is as before."""
    _seed(request)
    with nullcontext() if leave_spies else without_spies(tts.t3.tfmr), _borrowed(tts, request.settings):
        try:
            yield
        finally:
            if not leave_spies:
                remove_spies(tts.t3.tfmr)


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


@contextmanager
def _timed(tts: ChatterboxTTS, clock: StageClock, max_new_tokens: int) -> Iterator[None]:
    """Upstream's three stages on our clock, and its fixed 1000 tokens replaced."""

    def inference(**kwargs: Any) -> torch.Tensor:
        with clock.stage("t3"):
            tokens = type(tts.t3).inference(tts.t3, **dict(kwargs, max_new_tokens=max_new_tokens))
        clock.calls["token"] += int((tokens[0] < tts.t3.hp.start_speech_token).sum())  # start and stop are above
        return tokens

    def inference_stream(**kwargs: Any) -> Iterator[torch.Tensor]:
        chunks = ChatterboxTTS.inference_stream(tts, **dict(kwargs, max_new_tokens=max_new_tokens))
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
    """Keeps T3 from sampling its stop token, in upstream's loops and in ours; does nothing unless ``active``."""

    def suppress(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        logits[..., t3.hp.stop_speech_token] = NEVER
        return logits

    handle = t3.speech_head.register_forward_hook(suppress) if active else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
