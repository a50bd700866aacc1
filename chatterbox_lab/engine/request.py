"""One utterance, checked: what is said, how, and for how long at most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from chatterbox.tts import ChatterboxTTS, punc_norm

from ..files import check_recording
from .settings import BALANCED, StreamSettings, whole_number
from .t3.backends import backend_of


@dataclass(frozen=True)
class Request:
    """What a stream is made from, besides the model and its voice.

    Args:
        text_tokens: int64 (2, S) on the model's device, with start and stop, twice for classifier-free guidance.
        settings: how it is spoken.
        seed: of tokens and audio; None samples from PyTorch's default generator.
        max_new_tokens: the most speech tokens (25 a second).
    """

    text_tokens: torch.Tensor
    settings: StreamSettings = BALANCED
    seed: int | None = None
    max_new_tokens: int = 1000


def checked(
    tts: ChatterboxTTS,
    text: str,
    settings: StreamSettings = BALANCED,
    recording: Any = None,
    /,
    *,
    seed: int | None = None,
    max_new_tokens: int = 1000,
    **overrides: Any,
) -> Request:
    """A request with every argument checked, before any model runs; arguments and errors as for `generate_stream`.

    A ``recording`` is checked, too; the model then needs no voice yet, since it will be given that one.
    """
    if not isinstance(settings, StreamSettings):
        raise ValueError(f"settings={settings!r}: must be a StreamSettings, such as chatterbox_lab.BALANCED")
    settings = settings.replace(**overrides)
    backend_of(settings, tts.t3)
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, 1, tts.t3.hp.max_speech_tokens)
    seed = seed if seed is None else whole_number("seed", seed, 0, 2**63 - 1)
    if recording:
        check_recording(recording)
    elif tts.conds is None:
        raise ValueError("the model has no voice: call tts.prepare_conditionals(recording) first")
    return Request(encode_text(tts, text), settings, seed, max_new_tokens)


def encode_text(tts: ChatterboxTTS, text: str) -> torch.Tensor:
    """Text tokens (2, S), int64 on the model's device, with start and stop, twice for CFG. Raises ValueError."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"text={text!r}: must be a string with something to say")
    hp = tts.t3.hp
    tokens = tts.tokenizer.text_to_tokens(punc_norm(text)).long().to(tts.device)
    count, most = tokens.shape[1], hp.max_text_tokens
    if count > most:
        raise ValueError(f"text of {len(text)} characters: is {count} text tokens, {most} fit; speak it in parts")
    tokens = F.pad(F.pad(tokens, (1, 0), value=hp.start_text_token), (0, 1), value=hp.stop_text_token)
    return tokens.repeat(2, 1)
