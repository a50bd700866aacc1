from __future__ import annotations

from typing import Any

import pytest
import torch
from chatterbox.models.s3gen import hifigan

from chatterbox_lab.render import Excitation, Flow, Renderer, cross_fade


def codes(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 6561, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream's excitation with our phases and noise, drawn in the same order."""

    def forward(self: Any, f0: torch.Tensor) -> Any:
        f0 = f0.mT  # (1, 1, samples)
        ours = Excitation(type("Vocoder", (), {"m_source": self}), seed=0)
        noise = ours._noise(f0.shape[2])
        monkeypatch.setattr(hifigan.Uniform, "sample", lambda *_, **__: ours.phases.clone())
        monkeypatch.setattr(torch, "randn_like", lambda like: noise if like.shape == noise.shape else torch.zeros(1))
        return plain(self, f0.mT)

    plain = hifigan.SourceModuleHnNSF.forward
    monkeypatch.setattr(hifigan.SourceModuleHnNSF, "forward", forward)


def test_one_window_is_upstreams_waveform(tts: Any, same_noise: None) -> None:
    for count in (1, 2, 37):
        expected, _ = tts.s3gen.inference(codes(count), ref_dict=tts.conds.gen)
        audio = Renderer(tts.s3gen, tts.conds.gen, 0, 0, seed=0).push(codes(count), last=True)
        assert audio.shape == expected.shape == (1, count * 960)
        # Upstream adds up the phase in one float32 sum, which loses about 1e-4 of a cycle a second.
        torch.testing.assert_close(audio, expected, rtol=0, atol=2e-3 * float(expected.abs().max()))


def test_mel_of_one_window_is_upstreams(tts: Any) -> None:
    with torch.inference_mode():
        mel = Flow(tts.s3gen, tts.conds.gen).mel(codes(30), start=0)
        expected = tts.s3gen.flow_inference(codes(30), ref_dict=tts.conds.gen, finalize=True)
    torch.testing.assert_close(mel, expected, rtol=1e-5, atol=1e-5)


def test_noise_belongs_to_the_absolute_token(tts: Any) -> None:
    flow = Flow(tts.s3gen, tts.conds.gen)
    whole, later = flow._noise(20, 120, start=0), flow._noise(20, 40, start=30)
    assert torch.equal(later[:, :, :20], whole[:, :, :20])
    assert torch.equal(later[:, :, 20:], whole[:, :, 80:120])


def test_the_excitation_does_not_depend_on_the_cuts(tts: Any) -> None:
    f0 = 80 + 200 * torch.rand(1, 80, generator=torch.Generator().manual_seed(1))
    f0[:, 30:44] = 0  # unvoiced
    with torch.inference_mode():
        whole = Excitation(tts.s3gen.mel2wav, seed=5).extend(f0)
        pieces = Excitation(tts.s3gen.mel2wav, seed=5)
        parts = [pieces.extend(f0[:, start:end]) for start, end in ((0, 2), (2, 30), (30, 80))]
        other = Excitation(tts.s3gen.mel2wav, seed=6).extend(f0)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=0, atol=1e-4)
    assert (other - whole).abs().max() > 0.01


@pytest.mark.parametrize(("context", "fade"), [(0, 0), (0, 480), (1, 480), (5, 2400), (100, 480)])
def test_every_token_becomes_960_samples(tts: Any, context: int, fade: int) -> None:
    renderer = Renderer(tts.s3gen, tts.conds.gen, context, fade, seed=0)
    lengths = [renderer.push(codes(count)).shape[1] for count in (6, 1, 13)]
    assert sum(lengths) == 20 * 960 - fade
    assert renderer.push(codes(0), last=True).shape[1] == fade


def test_context_is_rendered_again_but_no_more_than_that(tts: Any) -> None:
    renderer = Renderer(tts.s3gen, tts.conds.gen, context_window=20, fade_samples=480, seed=0)
    windows: list[int] = []
    inner = renderer.flow.mel
    renderer.flow.mel = lambda tokens, start: windows.append((start, len(tokens))) or inner(tokens, start)
    for _ in range(8):
        renderer.push(codes(10))
    assert windows == [(0, 10), (0, 20), (0, 30), *[(10 * n, 30) for n in range(1, 6)]]
    assert renderer.source.shape[2] == 20 * 960
    assert renderer.context.shape == (20,)


def test_a_code_that_the_flow_cannot_take_is_named(tts: Any) -> None:
    with pytest.raises(ValueError, match=r"\[6561\].*0 to 6560"):
        Renderer(tts.s3gen, tts.conds.gen, 0, 0, seed=0).push(torch.tensor([1, 6561]))


def test_a_cross_fade_of_equal_signals_is_the_signal() -> None:
    signal = torch.randn(1, 100)
    torch.testing.assert_close(cross_fade(signal[:, :30], signal), signal)
    faded = cross_fade(torch.ones(1, 30), torch.zeros(1, 100))
    assert (faded[0, :30].diff() < 0).all()
    assert torch.equal(faded[:, 30:], torch.zeros(1, 70))


def seam_dip(audio: torch.Tensor, seams: list[int]) -> float:
    """Energy of the 10 ms after each seam over that of the 40 ms before, median."""
    ratios = [audio[0, s : s + 240].square().mean() / audio[0, s - 960 : s].square().mean() for s in seams]
    return float(torch.stack(ratios).median())


def test_joins_keep_their_energy_where_upstream_dips(tts: Any) -> None:
    tokens = codes(100)
    renderer = Renderer(tts.s3gen, tts.conds.gen, 10, 480, seed=0)
    ours = torch.cat([renderer.push(part, last=i == 9) for i, part in enumerate(tokens.split(10))], dim=1)
    whole = Renderer(tts.s3gen, tts.conds.gen, 0, 0, seed=0).push(tokens, last=True)
    upstream = whole.clone()
    seams = list(range(9600, 96000, 9600))
    for seam in seams:  # upstream's fade-in from zero (tts.py, _process_token_buffer)
        upstream[0, seam : seam + 480] *= torch.linspace(0, 1, 480)
    assert seam_dip(upstream, seams) < 0.2
    fade = 480
    assert seam_dip(ours, [seam - fade // 2 for seam in seams]) > 0.6 * seam_dip(whole, [s - fade // 2 for s in seams])
    difference = (ours - whole).square().mean().sqrt() / whole.square().mean().sqrt()
    assert difference < 0.5
