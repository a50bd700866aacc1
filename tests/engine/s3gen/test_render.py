from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from chatterbox.models.s3gen import hifigan

from chatterbox_lab import kept
from chatterbox_lab.engine.s3gen.flow import Flow, FlowPlan, euler_times
from chatterbox_lab.engine.s3gen.render import Renderer, cross_fade
from chatterbox_lab.engine.s3gen.unet import UNet
from chatterbox_lab.engine.s3gen.vocoder import Excitation
from chatterbox_lab.files import attribute
from chatterbox_lab.voices import load as models


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


@pytest.mark.parametrize("mode", ["window", "cached"])
@pytest.mark.parametrize(("context", "fade"), [(0, 0), (0, 480), (1, 480), (5, 2400), (100, 480)])
def test_every_token_becomes_960_samples(tts: Any, context: int, fade: int, mode: str) -> None:
    renderer = Renderer(tts.s3gen, tts.conds.gen, context, fade, 0, FlowPlan(mode, steps=2), largest_chunk=13)
    lengths = [renderer.push(codes(count)).shape[1] for count in (6, 1, 13)]
    assert sum(lengths) == 20 * 960 - fade
    assert renderer.push(codes(0), last=True).shape[1] == fade


def test_context_is_rendered_again_but_no_more_than_that(tts: Any) -> None:
    renderer = Renderer(tts.s3gen, tts.conds.gen, context_window=20, fade_samples=480, seed=0)
    windows: list[int] = []
    inner = renderer.flow.mel
    renderer.flow.mel = lambda tokens, start, made: windows.append((start, len(tokens))) or inner(tokens, start, made)
    for _ in range(8):
        renderer.push(codes(10))
    assert windows == [(0, 10), (0, 20), (0, 30), *[(10 * n, 30) for n in range(1, 6)]]
    assert renderer.vocoder.source.shape[2] == 20 * 960
    assert renderer.made.shape[2] == 20 * 2
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


def spoken(tts: Any, plan: FlowPlan, sizes: tuple[int, ...] = (10, 10, 4, 10), context: int = 20) -> list[torch.Tensor]:
    """The chunks of one stream, without cross-fades."""
    renderer = Renderer(tts.s3gen, tts.conds.gen, context, 0, 0, plan, max(sizes))
    return [renderer.push(part) for part in codes(sum(sizes)).split(sizes)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """CFG rows and frames of every call of the estimator."""
    seen: list[tuple[int, int]] = []
    inner = UNet.__call__

    def counted(self: UNet, frames: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(tuple(frames.shape[:2]))
        return inner(self, frames, *rest)

    monkeypatch.setattr(UNet, "__call__", counted)
    return seen


def test_a_window_computes_all_of_it_and_cached_each_frame_once(tts: Any, calls: list[tuple[int, int]]) -> None:
    spoken(tts, FlowPlan("window", steps=1))
    assert calls == [(2, 40), (2, 60), (2, 68), (2, 80)]  # the prompt's 20 frames, the context, what is new
    del calls[:]
    spoken(tts, FlowPlan("cached", steps=1))
    assert calls == [(2, 20), (2, 20), (2, 20), (2, 8), (2, 20)]  # the prompt once, then what is new
    del calls[:]
    spoken(tts, FlowPlan("cached", steps=1))
    assert calls == [(2, 20), (2, 20), (2, 8), (2, 20)]  # the voice is known


def test_streams_in_turn_with_two_settings_read_the_voice_once_each(tts: Any, calls: list[tuple[int, int]]) -> None:
    plans = [FlowPlan("cached", steps=1, prompt_tokens=number) for number in (8, 10)]
    for plan in plans * 2:
        spoken(tts, plan, sizes=(10,))
    assert len(calls) == 2 * 2 + 2  # the prompt and a chunk, then a chunk alone
    spoken(tts, FlowPlan("cached", steps=2), sizes=(10,))
    pool = kept.kept(tts.s3gen.flow, "pasts", lambda: kept.Pool(2))
    assert len(pool) == 2  # the oldest made room


def test_another_voice_is_read_anew(tts: Any, calls: list[tuple[int, int]]) -> None:
    plan = FlowPlan("cached", steps=1)
    first = spoken(tts, plan)
    other = dict(tts.conds.gen, embedding=-tts.conds.gen["embedding"])
    Renderer(tts.s3gen, other, 20, 0, 0, plan, 10).push(codes(10))
    assert calls[-2:] == [(2, 20), (2, 20)]
    assert all(map(torch.equal, spoken(tts, plan), first))


@torch.inference_mode()
def test_cached_is_what_upstreams_decoder_says_under_its_own_chunked_mask(tts: Any) -> None:
    """Prompt and chunks are 20 frames each, so the released estimator's static_chunk_size has the same blocks."""
    flow, tokens = Flow(tts.s3gen, tts.conds.gen, FlowPlan("cached"), room=50), codes(30)
    found, hidden = None, [flow.encoder(flow.prompt_token)]
    for end in (10, 20, 30):
        found = flow.mel(tokens[:end], 0, found)
        hidden.append(flow.encoder(torch.cat([flow.prompt_token, tokens[None, :end]], 1))[:, -20:])
    decoder, mu = tts.s3gen.flow.decoder, torch.cat(hidden, dim=1).mT.contiguous()
    condition = F.pad(flow.prompt_mel, (0, 60))
    with attribute(decoder.estimator, "static_chunk_size", 20):
        expected, _ = decoder(mu, torch.ones(1, 1, 80), 10, spks=flow.speaker, cond=condition)
    torch.testing.assert_close(found, expected[:, :, 20:], rtol=1e-4, atol=1e-4)


def test_streams_that_take_turns_do_not_hear_one_another(tts: Any) -> None:
    plan = FlowPlan("cached", steps=2)
    alone = spoken(tts, plan)
    one, two = (Renderer(tts.s3gen, tts.conds.gen, 20, 0, 0, plan, 10) for _ in range(2))
    both = []
    for part in codes(34).split((10, 10, 4, 10)):
        both.append((one.push(part), two.push(part)))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, (b, c) in zip(alone, both, strict=True))


def test_a_shorter_prompt_is_its_end(tts: Any) -> None:
    flow = Flow(tts.s3gen, tts.conds.gen, FlowPlan(prompt_tokens=4))
    assert torch.equal(flow.prompt_token, tts.conds.gen["prompt_token"][:, -4:])
    assert torch.equal(flow.prompt_mel, tts.conds.gen["prompt_feat"][:, -8:].mT)
    for mode in ("window", "cached"):
        chunks = spoken(tts, FlowPlan(mode, steps=1, prompt_tokens=0), sizes=(5, 5))
        assert [chunk.shape[1] for chunk in chunks] == [4800, 4800]


def test_more_than_there_is_room_for_is_refused(tts: Any) -> None:
    renderer = Renderer(tts.s3gen, tts.conds.gen, 20, 0, 0, FlowPlan("cached", steps=1), largest_chunk=10)
    with pytest.raises(ValueError, match=r"11 tokens at once.*largest_chunk=10"):
        renderer.push(codes(11))


def test_euler_steps_are_upstreams() -> None:
    lengths, moments = euler_times(10, "cosine", torch.device("cpu"))
    span = 1 - torch.cos(torch.linspace(0, 1, 11) * 0.5 * torch.pi)
    torch.testing.assert_close(torch.stack(lengths), span.diff(), rtol=0, atol=1e-6)
    torch.testing.assert_close(moments, span[:-1], rtol=0, atol=1e-6)


def test_the_vocoder_hears_no_more_than_it_needs(tts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    renderer = Renderer(tts.s3gen, tts.conds.gen, 100, 480, 0, FlowPlan(steps=1))
    decode = renderer.vocoder.decode
    monkeypatch.setattr(renderer.vocoder, "decode", lambda mel, s: lengths.append(mel.shape[2]) or decode(mel, s))
    for count in (25, 25, 25, 7):
        renderer.push(codes(count))
    steady = 50 + 1 + renderer.vocoder.reach
    assert lengths == [50, steady, steady, steady]  # the short one takes more of the past: no new length


def test_what_is_kept_with_a_model_goes_with_it() -> None:
    tts = models.load("tiny", device="cpu", watermark=False)
    spoken(tts, FlowPlan("cached", steps=1))
    ends = [weakref.ref(part) for part in (tts.s3gen.flow, tts.s3gen.mel2wav)]
    del tts
    gc.collect()
    assert [end() for end in ends] == [None, None]
