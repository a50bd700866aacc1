"""Text of any length, spoken by the models of the releases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from living.inner.said import LANGUAGES

import chatterbox_lab as lab
from chatterbox_lab.engine.variants import variant_of

TEXT = "Hello there, my friends. We walk along the river now! Do we sing until the night?"
RATE = 24000
FIXED = {"seed": 1, "max_new_tokens": 12, "ignore_eos": True, "chunk_size": 5, "context_window": 10}


@pytest.fixture(params=["english", "multilingual", "turbo", "nano"])
def tts(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def language(tts: Any) -> dict[str, str]:
    return {"language": LANGUAGES[1]} if variant_of(tts).multilingual else {}


def joined(chunks: Any) -> torch.Tensor:
    return torch.cat([audio for audio, _ in chunks], dim=1)


@pytest.mark.parametrize("way", [{}, {"flow": "cached", "overlap": True, "schedule": "grow"}], ids=["plain", "all"])
def test_three_sentences_have_their_samples_however_the_text_comes(tts: Any, way: dict[str, Any]) -> None:
    given, variant = {**FIXED, **way, **language(tts)}, variant_of(tts)
    audio = joined(lab.speak(tts, TEXT, **given, pauses=lab.Pauses(sentence=0.1)))
    each = 960 * (12 - variant.unsaid + len(variant.after))
    assert audio.shape == (1, 3 * each + 2 * RATE // 10)
    for end in (each, 2 * each + RATE // 10):
        assert not audio[:, end : end + RATE // 10].any()
        assert audio[:, :end].any()
    assert torch.equal(joined(lab.speak(tts, iter(TEXT), **given, pauses=lab.Pauses(sentence=0.1))), audio)
    other = joined(lab.speak(tts, TEXT, **given | {"seed": 2}, pauses=lab.Pauses(sentence=0.1)))
    assert not torch.equal(other, audio)


def test_a_patch_that_splits_speaks_them_too(tts: Any) -> None:
    own = {f"{name}_id": value for name, value in language(tts).items()}
    sized = {name: FIXED[name] for name in ("chunk_size", "context_window")}
    fixed = {name: FIXED[name] for name in ("seed", "max_new_tokens")}
    first = lab.speak(tts, TEXT, **FIXED, **language(tts), temperature=0.7)
    with lab.patch(tts, split=True, ignore_eos=True):
        found = tts.generate_stream(TEXT, temperature=0.7, **own, **fixed, **sized)
        assert torch.equal(joined(found), joined(first))
        whole = tts.generate(TEXT, temperature=0.7, **own, **fixed)
        one = tts.generate("Hello there, my friends.", **own, **fixed)
    assert whole.shape[1] == 3 * one.shape[1] + 2 * RATE // 5
    with lab.patch(tts, ignore_eos=True):
        assert torch.equal(tts.generate("Hello there, my friends.", **own, **fixed), one)
