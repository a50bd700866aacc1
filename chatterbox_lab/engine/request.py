"""One utterance, checked: what is said, in which voice, how, and for how long at most."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from threading import Event
from typing import Any

import torch
import torch.nn.functional as F
from chatterbox.models.t3.modules.cond_enc import T3Cond
from chatterbox.tts import ChatterboxTTS, Conditionals, punc_norm
from transformers import LlamaModel

from ..host import apart
from ..kept import notice
from .settings import BALANCED, StreamSettings, whole_number
from .t3.backends import backend_of


@dataclass(frozen=True)
class Request:
    """What a stream is made from, besides the model: all of it is settled when the call is made.

    Args:
        text_tokens: int64 (2, S) on the model's device, with start and stop, twice for classifier-free guidance.
        voice: its own copy of the conditionals, with the settings' exaggeration.
        settings: how it is spoken.
        seed: of tokens and audio; None samples from PyTorch's default generator.
        max_new_tokens: the most speech tokens (25 a second).
        stop: ends the speech with the token that is being made, once any thread has set it.
    """

    text_tokens: torch.Tensor
    voice: Conditionals | None
    settings: StreamSettings = BALANCED
    seed: int | None = None
    max_new_tokens: int = 1000
    stop: Event = field(default_factory=Event)


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
    check_model(tts)
    if not isinstance(settings, StreamSettings):
        raise ValueError(f"settings={settings!r}: must be a StreamSettings, such as chatterbox_lab.BALANCED")
    settings = settings.replace(**overrides)
    backend_of(settings, tts.t3)
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, 1, tts.t3.hp.max_speech_tokens)
    seed = seed if seed is None else whole_number("seed", seed, 0, 2**63 - 1)
    stop = Event() if stop is None else stop
    if not isinstance(stop, Event):
        raise ValueError(f"stop={stop!r}: must be a threading.Event")
    if voiced and tts.conds is None:
        raise ValueError("the model has no voice: call tts.prepare_conditionals(recording) first")
    with apart(tts.device):
        text_tokens = encode_text(tts, text)
        voice = voice_of(tts, tts.conds, settings.exaggeration) if voiced else None
        for part in (tts.t3, tts.s3gen.flow, tts.s3gen.mel2wav):
            notice(part)
    return Request(text_tokens, voice, settings, seed, max_new_tokens, stop)


_PARTS = ("t3", "s3gen", "ve", "tokenizer", "watermarker", "conds", "device", "sr")


def check_model(tts: Any) -> None:
    """Raises TypeError for what is no Chatterbox that this package runs."""
    if not isinstance(tts, ChatterboxTTS) or not all(hasattr(tts, part) for part in _PARTS):
        raise TypeError(f"tts: must be a chatterbox.tts.ChatterboxTTS of chatterbox-streaming, is a {_kind(tts)}")
    if not isinstance(tts.t3.tfmr, LlamaModel):
        raise TypeError(f"tts: its T3 must be a Llama, is a {_kind(tts.t3.tfmr)}; this Chatterbox is not supported yet")


def _kind(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def voice_of(tts: ChatterboxTTS, conds: Conditionals, exaggeration: float) -> Conditionals:
    """A copy of a voice with the wanted exaggeration, on the model's device and for T3 in its dtype."""
    tensors = {name: value.to(tts.device, copy=True) for name, value in conds.gen.items() if torch.is_tensor(value)}
    return Conditionals(conditioning(tts, exaggeration, conds.t3), conds.gen | tensors)


def conditioning(tts: ChatterboxTTS, exaggeration: float, cond: T3Cond | None = None) -> T3Cond:
    """A copy of T3's conditioning, None for the model's own, with the wanted exaggeration, in T3's dtype."""
    cond = tts.conds.t3 if cond is None else cond
    own = {name: value.clone() for name, value in vars(cond).items() if torch.is_tensor(value)}
    own |= {"emotion_adv": torch.full((1, 1, 1), float(exaggeration)), "cond_prompt_speech_emb": None}
    return replace(cond, **own).to(device=tts.device, dtype=tts.t3.speech_head.weight.dtype)


def encode_text(tts: ChatterboxTTS, text: str) -> torch.Tensor:
    """Text tokens (2, S), int64 on the model's device, with start and stop, twice for CFG. Raises ValueError."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"text={text!r}: must be a string with something to say")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"text={text!r}: must be Unicode, has half of a surrogate pair")
    hp = tts.t3.hp
    tokens = tts.tokenizer.text_to_tokens(punc_norm(text)).long().to(tts.device)
    count, most = tokens.shape[1], hp.max_text_tokens
    if count > most:
        raise ValueError(f"text of {len(text)} characters: is {count} text tokens, {most} fit; speak it in parts")
    tokens = F.pad(F.pad(tokens, (1, 0), value=hp.start_text_token), (0, 1), value=hp.stop_text_token)
    return tokens.repeat(2, 1)
