from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from chatterbox_lab.engine.s3gen.hift import HiFT
from chatterbox_lab.engine.s3gen.vocoder import Vocoder, folded


def given(frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(frames)
    mel, source = torch.randn(1, 80, frames, generator=random) - 4, torch.randn(1, 1, frames * 480, generator=random)
    return mel, 0.1 * source


@pytest.fixture
def hift(tts: Any) -> torch.nn.Module:
    """The tiny vocoder, with Snakes of all shapes and residual blocks that are heard."""
    twin = folded(tts.s3gen.mel2wav)
    torch.manual_seed(0)
    for name, weight in twin.named_parameters():
        if name.endswith("alpha"):
            weight.data.uniform_(0.2, 3)
        elif "resblocks" in name:
            weight.data.normal_(0, 0.05)
    return twin


@torch.inference_mode()
@pytest.mark.parametrize("frames", [2, 30, 61])
def test_the_waveform_is_upstreams(hift: torch.nn.Module, frames: int) -> None:
    mel, source = given(frames)
    theirs, ours = hift.decode(x=mel, s=source), HiFT(hift)(mel, source)
    assert ours.shape == theirs.shape == (1, 480 * frames)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-5 * float(theirs.abs().max()))
    hift.resblocks[1].activations1[1].alpha.data.add_(0.5)
    changed = HiFT(hift)(mel, source)
    assert (changed - theirs).abs().max() > 1e-3 * theirs.abs().max()  # a part like that is heard


@torch.inference_mode()
def test_convolutions_have_their_channels_innermost(hift: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    convolve, last = F.conv2d, []

    def watched(states: torch.Tensor, *args: Any) -> torch.Tensor:
        last.append(states.shape[1] == 1 or states.stride(1) == 1)
        return convolve(states, *args)

    monkeypatch.setattr(F, "conv2d", watched)
    HiFT(hift)(*given(20))
    blocks = [*hift.resblocks, *hift.source_resblocks]
    assert len(last) == 2 + len(hift.source_downs) + 6 * len(blocks)
    assert all(last)


@torch.inference_mode()
def test_bfloat16_rounds_the_blocks_and_leaves_the_ends_alone(hift: torch.nn.Module) -> None:
    mel, source = given(60)
    exact, rounded = HiFT(hift), HiFT(hift, torch.bfloat16)
    assert {exact.first.weight.dtype, rounded.first.weight.dtype, rounded.last.weight.dtype} == {torch.float32}
    heard = exact(mel, source)
    moved = float((rounded(mel, source) - heard).norm() / heard.norm())
    assert 1e-4 < moved < 0.05
    rounded.first.weight, rounded.last.weight = (
        part.weight.bfloat16().float() for part in (exact.first, exact.last)
    )  # what it would cost to round them as well
    assert float((rounded(mel, source) - heard).norm() / heard.norm()) > moved


def test_the_vocoder_keeps_one_of_each_dtype(tts: Any) -> None:
    parts = [Vocoder(tts.s3gen.mel2wav, 0, dtype).decode for dtype in (torch.float32, torch.bfloat16) * 2]
    assert parts[0] is parts[2]
    assert parts[1] is parts[3]
    assert parts[0] is not parts[1]
