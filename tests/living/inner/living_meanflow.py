"""Turbo's S3Gen gives the release's own mel: two steps, no guidance, both times of a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import chatterbox_lab as lab
from chatterbox_lab.engine.s3gen.flow import MEANFLOW_STEPS, Flow, FlowPlan
from chatterbox_lab.engine.stream import renderer_of

CODES = torch.randint(0, 6561, (60,), generator=torch.Generator().manual_seed(2))
VOICE = "prompt_token", "prompt_token_len", "prompt_feat", "prompt_feat_len", "embedding"


def release_mel(tts: Any, codes: torch.Tensor, noise: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The release's own mel (1, 80, 2 n) of codes (n,), its noise (1, 80, prompt and 2 n) given."""
    monkeypatch.setattr(torch, "randn_like", lambda like, **_: noise.to(like))
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: noise[:, :, -shape[-1] :])
    voice = {name: tts.conds.gen[name] for name in VOICE}
    mel = tts.s3gen.flow_inference(codes, ref_dict=voice, finalize=True)
    monkeypatch.undo()
    return mel


@torch.inference_mode()
@pytest.mark.parametrize("count", [5, 25, 60])
def test_mel_is_the_releases_own_for_the_same_noise(turbo: Any, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    flow, codes = Flow(turbo.s3gen, turbo.conds.gen), CODES[:count]
    noise = flow._noise(flow.prompt_mel.shape[2], 2 * count, 0)
    theirs = release_mel(turbo, codes, noise, monkeypatch)
    torch.testing.assert_close(flow.mel(codes, 0), theirs, atol=1e-4, rtol=1e-4)
    others = release_mel(turbo, codes, noise.flip(2), monkeypatch)
    assert (theirs - others).abs().max() > 0.1  # noise matters
    flow.times = flow.unet.times(*[torch.tensor([0.0, 0.5])] * 2)  # the end of a step left out
    assert (flow.mel(codes, 0) - theirs).abs().max() > 1e-2


def test_two_steps_at_most_each_with_one_row(turbo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    for steps in (10, 2, 1):
        flow = Flow(turbo.s3gen, turbo.conds.gen, FlowPlan(steps=steps))
        run = flow.unet.__call__
        monkeypatch.setattr(
            flow, "unet", lambda frames, *rest, run=run: asked.append(tuple(frames.shape)) or run(frames, *rest)
        )
        with torch.inference_mode():
            flow.mel(CODES[:20], 0)
        assert len(asked) == min(steps, MEANFLOW_STEPS)
        assert {shape[0] for shape in asked} == {1}
        torch.testing.assert_close(float(sum(flow.span)), 1.0)
        asked.clear()


@pytest.mark.parametrize("settings", [lab.BASELINE, lab.BALANCED, lab.FAST], ids=["25", "50", "fast"])
def test_every_token_becomes_its_samples(turbo: Any, settings: lab.StreamSettings) -> None:
    renderer = renderer_of(turbo, settings, seed=0)
    pieces = CODES.split(settings.chunk_size)
    audio = torch.cat([renderer.push(piece, last=piece is pieces[-1]) for piece in pieces], dim=1)
    assert audio.shape == (1, 960 * len(CODES))
    assert audio.abs().max() > 0


@torch.inference_mode()
def test_windows_of_the_same_speech_agree(turbo: Any) -> None:
    flow = Flow(turbo.s3gen, turbo.conds.gen)
    whole = flow.mel(CODES, 0)
    window = flow.mel(CODES[20:], 20)
    same = float((whole[:, :, 60:] - window[:, :, 20:]).abs().mean())
    elsewhere = float((whole[:, :, 60:] - flow.mel(CODES[20:], 0)[:, :, 20:]).abs().mean())
    assert same < elsewhere  # noise is addressed by place
    cached = Flow(turbo.s3gen, turbo.conds.gen, FlowPlan("cached"), room=80)
    first = cached.mel(CODES[:30], 0)
    again = Flow(turbo.s3gen, turbo.conds.gen, FlowPlan("cached"), room=80).mel(CODES[:30], 0)
    assert torch.equal(first, again)  # the voice was read once; a second stream finds it
