from __future__ import annotations

from typing import Any

import pytest
import torch
from chatterbox.models.t3.inference.alignment_stream_analyzer import AlignmentStreamAnalyzer

from chatterbox_lab.engine.t3.spies import remove_spies
from chatterbox_lab.study import fallback, logs

NO_SPIES = {"hooks": 0, "wrapped forwards": 0}


def noise(tts: Any, length: int = 20) -> torch.Tensor:
    return torch.randn(2, length, tts.t3.dim, generator=torch.Generator().manual_seed(0))


def test_layers_are_counted_by_the_attention_that_they_run(tts: Any) -> None:
    with logs.quiet(), torch.inference_mode(), fallback.watch_layers(tts.t3.tfmr) as counts:
        for maps in (False, True, False):
            tts.t3.tfmr(inputs_embeds=noise(tts), output_attentions=maps)
    assert counts == [{"sdpa": 2, "manual": 1}] * len(tts.t3.tfmr.layers)


def test_a_watch_that_is_left_by_an_error_is_over(tts: Any) -> None:
    # conftest's `tts` also fails where hooks stay
    with pytest.raises(RuntimeError), fallback.watch_layers(tts.t3.tfmr) as counts:
        tts.t3.tfmr(inputs_embeds=noise(tts)[..., 1:])
    with torch.inference_mode():
        tts.t3.tfmr(inputs_embeds=noise(tts))
    assert sum(count["sdpa"] for count in counts) == 0


def test_spies_are_counted_one_within_the_other(tts: Any) -> None:
    for number in (1, 2, 3):
        AlignmentStreamAnalyzer(tts.t3.tfmr, None, (0, 5))
        assert fallback.count_spies(tts.t3.tfmr) == {"hooks": number, "wrapped forwards": number}
    remove_spies(tts.t3.tfmr)
    assert fallback.count_spies(tts.t3.tfmr) == NO_SPIES


def test_the_half_fix_is_told_from_rounding_and_leaves_no_spy(tts: Any) -> None:
    with logs.quiet():
        found = fallback.measure_half_fix(tts.t3.tfmr, tts.t3.speech_head, noise(tts), (2, 12))
    assert found.sound.shape == found.half_fixed.shape == (20, 20)
    assert float(found.sound.triu(1).abs().sum()) == 0
    assert found.future_mass > 0.1
    assert found.rounding < 1e-5 < found.logits_change
    assert fallback.count_spies(tts.t3.tfmr) == NO_SPIES
