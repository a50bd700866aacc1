"""One utterance, checked: what is said, in which voice, how, and for how long at most."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from threading import Event
from typing import Any

import torch
from chatterbox.models.t3.modules.cond_enc import T3Cond
from chatterbox.tts import ChatterboxTTS, Conditionals

from ..host import apart
from ..kept import notice
from .settings import BALANCED, StreamSettings, whole_number
from .t3.backends import backend_of
from .t3.words import TextWord, text_words
from .variants import STREAMING, Variant, variant_of
from .variants import encode as encode_text


@dataclass(frozen=True)
class Request:
    """What a stream is made from, besides the model: all of it is settled when the call is made.

    Args:
        text_tokens: int64 (rows, S) on the model's device, twice for classifier-free guidance (`variants.encode`).
        voice: its own copy of the conditionals, with the settings' exaggeration.
        settings: how it is spoken.
        seed: of tokens and audio; None samples from PyTorch's default generator.
        max_new_tokens: the most speech tokens (25 a second).
        stop: ends the speech with the token that is being made, once any thread has set it.
        variant: what kind of model it is for.
        words: where in the text tokens they are, if the alignment is read.
    """

    text_tokens: torch.Tensor
    voice: Conditionals | None
    settings: StreamSettings = BALANCED
    seed: int | None = None
    max_new_tokens: int = 1000
    stop: Event = field(default_factory=Event)
    variant: Variant = STREAMING
    words: tuple[TextWord, ...] = ()


def checked(
    tts: ChatterboxTTS,
    text: str,
    settings: StreamSettings = BALANCED,
    *,
    seed: int | None = None,
    max_new_tokens: int = 1000,
    stop: Event | None = None,
    voiced: bool = True,
    **overrides: Any,
) -> Request:
    """A request with every argument checked, before any model runs; arguments and errors as for `generate_stream`.

    Without ``voiced`` it has no voice yet, and the model needs none.
    """
    variant = variant_of(tts)
    if not isinstance(settings, StreamSettings):
        raise ValueError(f"settings={settings!r}: must be a StreamSettings, such as chatterbox_lab.BALANCED")
    settings = variant.settled(settings.replace(**overrides))
    backend_of(settings, tts.t3)
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, 1, tts.t3.hp.max_speech_tokens)
    seed = seed if seed is None else whole_number("seed", seed, 0, 2**63 - 1)
    stop = Event() if stop is None else stop
    if not isinstance(stop, Event):
        raise ValueError(f"stop={stop!r}: must be a threading.Event")
    if voiced and tts.conds is None:
        raise ValueError("the model has no voice: call tts.prepare_conditionals(recording) first")
    with apart(tts.device):
        text_tokens = encode_text(tts, text, settings.language, variant.rows if settings.cfg_weight else 1)
        voice = voice_of(tts, tts.conds, settings.exaggeration) if voiced else None
        for part in (tts.t3, tts.s3gen.flow, tts.s3gen.mel2wav):
            notice(part)
    words = () if settings.analyzer == "off" else text_words(tts, text, text_tokens)
    return Request(text_tokens, voice, settings, seed, max_new_tokens, stop, variant, words)


def voice_of(tts: ChatterboxTTS, conds: Conditionals, exaggeration: float) -> Conditionals:
    """A copy of a voice with the wanted exaggeration, on the model's device and for T3 in its dtype."""
    tensors = {name: value.to(tts.device, copy=True) for name, value in conds.gen.items() if torch.is_tensor(value)}
    return replace(conds, t3=conditioning(tts, exaggeration, conds.t3), gen=conds.gen | tensors)


def conditioning(tts: ChatterboxTTS, exaggeration: float, cond: T3Cond | None = None) -> T3Cond:
    """A copy of T3's conditioning, None for the model's own, with the wanted exaggeration, in T3's dtype."""
    cond = tts.conds.t3 if cond is None else cond
    own = {name: value.clone() for name, value in vars(cond).items() if torch.is_tensor(value)}
    own |= {"emotion_adv": torch.full((1, 1, 1), float(exaggeration)), "cond_prompt_speech_emb": None}
    return replace(cond, **own).to(device=tts.device, dtype=tts.t3.speech_head.weight.dtype)
