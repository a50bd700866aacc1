"""A stream measured chunk by chunk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from chatterbox.tts import ChatterboxTTS

from ..engine.clock import Measured
from ..engine.settings import StreamSettings
from ..engine.stream import generate_stream
from ..files import DATA

PROMPTS: dict[str, str] = json.loads((DATA / "prompts.json").read_text(encoding="utf-8"))
"""Texts of three lengths, by name."""
TOKENS_PER_CHARACTER = 25 / 15
"""Speech tokens a character, at 15 characters a second: the length to ask for, as random weights never stop."""


def chunks_of(stream: Measured) -> Iterator[dict[str, Any]]:
    """One row a chunk of a stream: what was new in it, when it arrived, and what each stage took, in seconds."""
    before: dict[str, float] = {}
    for number, (_, metrics) in enumerate(stream):
        now = {
            "new_tokens": metrics.tokens,
            "audio_seconds": metrics.total_audio_duration,
            "t3_seconds": metrics.t3_seconds,
            "s3gen_seconds": metrics.s3gen_seconds,
            "watermark_seconds": metrics.watermark_seconds,
        }
        row = {name: value - before.get(name, 0) for name, value in now.items()}
        yield {"chunk": number, "arrival_seconds": metrics.total_generation_time} | row
        before = now


def measured_chunks(
    tts: ChatterboxTTS, text: str, settings: StreamSettings, *, seed: int, tokens: int
) -> Iterator[dict[str, Any]]:
    """The rows of `chunks_of` for one utterance of ``tokens``, and the window that S3Gen worked on for each chunk.

    ``window_tokens`` is the voice prompt, ``prompt_tokens``, with ``context_tokens`` and the new ones.
    """
    prompt, said = min(settings.prompt_tokens, tts.conds.gen["prompt_token"].shape[1]), 0
    fixed = {"seed": seed, "max_new_tokens": tokens, "ignore_eos": True}
    for row in chunks_of(generate_stream(tts, text, settings, **fixed)):
        context = min(settings.context, said)
        said += row["new_tokens"]
        window = prompt + context + row["new_tokens"]
        yield row | {"prompt_tokens": prompt, "context_tokens": context, "window_tokens": window}
