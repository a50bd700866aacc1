"""What is said, by the release's own functions."""

from __future__ import annotations

import os
from typing import Any

import torch

import chatterbox_lab as lab
from chatterbox_lab.engine.variants import encode, variant_of

WORDS = ("Hello", "there", "my", "friends", "we", "walk", "along", "the", "river", "and", "sing", "until", "night")
TEXTS = [" ".join(WORDS[(3 * n + k) % len(WORDS)] for k in range(1 + n % 9)) + ".!?"[n % 3] for n in range(20)]
LANGUAGES = ("en", "fr", "de", "fi")
FULL = bool(os.environ.get("CHATTERBOX_LAB_FULL"))
"""Compares all texts with two seeds and for longer, which takes ten minutes and not one."""
CASES = [
    (text, seed, LANGUAGES[number % 4])
    for number, text in enumerate(TEXTS)
    for seed in (0, 1)
    if FULL or (number % 3 == 0 and seed == 0)
]


def released_tokens(
    tts: Any, text: str, seed: int, most: int, language: str | None = None, **changes: Any
) -> torch.Tensor:
    """What the release's own ``T3.inference`` says, as its ``generate`` goes on with it."""
    numbers = variant_of(tts).settled(lab.StreamSettings())
    wanted = {"temperature": 0.8, "cfg_weight": 0.5, "repetition_penalty": numbers.repetition_penalty}
    wanted |= {"min_p": numbers.min_p, "top_p": numbers.top_p, "max_new_tokens": most, **changes}
    torch.manual_seed(seed)
    said = tts.t3.inference(t3_cond=tts.conds.t3, text_tokens=encode(tts, text, language), **wanted)[0]
    return said[said < 6561]
