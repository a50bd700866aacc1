from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils.parametrize import is_parametrized

from chatterbox_lab.engine.s3gen.vocoder import Vocoder, folded, reach


def mel_of(frames: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 80, frames, generator=torch.Generator().manual_seed(seed)) - 4


@torch.inference_mode()
def test_folding_the_weight_norm_changes_nothing_and_leaves_the_original_alone(tts: Any) -> None:
    hift = tts.s3gen.mel2wav
    twin, mel, source = folded(hift), mel_of(30), 0.1 * torch.randn(1, 1, 30 * 480)
    assert not any(is_parametrized(module) for module in twin.modules())
    assert torch.equal(twin.decode(x=mel, s=source), hift.decode(x=mel, s=source))
    assert torch.equal(twin.f0_predictor(mel), hift.f0_predictor(mel))
    assert sum(is_parametrized(module) for module in hift.modules()) > 20


@torch.inference_mode()
def test_a_sample_depends_on_the_frames_within_reach_and_on_no_others(tts: Any) -> None:
    hift = folded(tts.s3gen.mel2wav)
    side, middle = reach(hift), 60
    mel, source = mel_of(2 * middle), 0.1 * torch.randn(1, 1, 2 * middle * 480)
    other_mel, other_source = mel.clone(), source.clone()
    other_mel[:, :, middle:] += 3
    other_source[:, :, middle * 480 :] += 1
    changed = (hift.decode(x=mel, s=source) != hift.decode(x=other_mel, s=other_source))[0].nonzero().min() // 480
    assert middle - side <= int(changed) < middle - side // 2  # the bound holds, and is not idly large


@torch.inference_mode()
def test_the_end_of_a_window_sounds_as_with_all_of_it(tts: Any) -> None:
    mel = mel_of(120)
    whole, short = Vocoder(tts.s3gen.mel2wav, seed=3), Vocoder(tts.s3gen.mel2wav, seed=3)
    for vocoder in (whole, short):
        vocoder(mel[:, :, :80], 80)
    expected = whole(mel, 40)
    left = 40 + short.reach
    short.forget(80)
    found = short(mel[:, :, -left:], 40)
    scale = float(expected.abs().max())
    torch.testing.assert_close(found[:, -40 * 480 :], expected[:, -40 * 480 :], rtol=0, atol=1e-5 * scale)
    assert short.source.shape[2] == 120 * 480
    short.forget(10)
    assert short.source.shape[2] == 10 * 480
