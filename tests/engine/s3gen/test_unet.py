from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from chatterbox_lab.engine.s3gen.unet import UNet, attention
from chatterbox_lab.files import attribute


def inputs(frames: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Noisy mel, encoder output, speaker and condition of a CFG pair, as upstream's estimator takes them."""
    generator = torch.Generator().manual_seed(seed)
    x, mu, cond = (torch.randn(2, 80, frames, generator=generator) for _ in range(3))
    return x, mu, torch.randn(2, 80, generator=generator), cond


def upstream(tts: Any, x: torch.Tensor, mu: torch.Tensor, speaker: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
    """The velocity (2, T, 80) of upstream's own estimator at time 0.3."""
    mask, time = torch.ones(2, 1, x.shape[2]), torch.full((2,), 0.3)
    return tts.s3gen.flow.decoder.estimator(x, mask, mu, time, speaker, cond).mT


def together(x: torch.Tensor, mu: torch.Tensor, speaker: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, mu, speaker[:, :, None].expand_as(x), cond], dim=1).mT.contiguous()


def times(unet: UNet) -> torch.Tensor:
    return unet.times(torch.tensor([0.3]), torch.tensor([0.4]))[0]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("frames", [1, 2, 37, 150])
@torch.inference_mode()
def test_the_velocity_is_upstreams(tts: Any, frames: int) -> None:
    given, unet = inputs(frames), UNet(tts.s3gen.flow.decoder.estimator)
    assert error(unet(together(*given), times(unet)), upstream(tts, *given)) < 1e-5


@torch.inference_mode()
def test_plain_products_give_the_same_where_there_is_no_onednn(tts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatterbox_lab.engine.linears._onednn", lambda dtype: False)
    given, unet = inputs(40), UNet(tts.s3gen.flow.decoder.estimator)
    assert error(unet(together(*given), times(unet)), upstream(tts, *given)) < 1e-5


@torch.inference_mode()
def test_bfloat16_stays_near(tts: Any) -> None:
    given, unet = inputs(150), UNet(tts.s3gen.flow.decoder.estimator, torch.bfloat16)
    velocity = unet(together(*given), times(unet))
    assert velocity.dtype == torch.float32
    assert 1e-4 < error(velocity, upstream(tts, *given)) < 0.03


@torch.inference_mode()
def test_chunks_with_their_past_are_upstreams_own_chunked_mask(tts: Any) -> None:
    given, unet = inputs(120), UNet(tts.s3gen.flow.decoder.estimator)
    with attribute(unet.estimator, "static_chunk_size", 20):  # a frame sees its own chunk of 20 and those before
        expected = upstream(tts, *given)
    past = unet.past(2, 120)
    found = torch.cat([unet(part, times(unet), past) for part in together(*given).split(20, dim=1)], dim=1)
    assert error(found, expected) < 1e-5
    assert error(upstream(tts, *given), expected) > 1e-3  # the mask does change something


@torch.inference_mode()
def test_the_past_is_the_prompt_and_as_much_as_there_is_room_for(tts: Any) -> None:
    unet = UNet(tts.s3gen.flow.decoder.estimator)
    frames, past = together(*inputs(110)), unet.past(2, 10 + 30)
    unet(frames[:, :10], times(unet), past)
    past.end_of_prompt()
    assert past.places(4).tolist() == [10, 11, 12, 13]
    for part in frames[:, 10:100].split(15, dim=1):
        unet(part, times(unet), past)
    assert (past.said, past.seen(10)) == (100, 40)
    before, prompt = past.keys.clone(), past.keys[:, :, :, :, :10].clone()
    last = unet(frames[:, 100:], times(unet), past)
    assert torch.equal(past.keys[:, :, :, :, :10], prompt)
    changed = (past.keys != before).any(dim=5).flatten(0, 3).any(dim=0)
    assert changed.nonzero().flatten().tolist() == list(range(10, 20))  # the oldest, which came 30 frames earlier
    # The order of what is remembered does not matter: the same frames elsewhere in the ring give the same.
    other = unet.past(2, 10 + 30)
    unet(frames[:, :10], times(unet), other)
    other.end_of_prompt()
    for part in frames[:, 10:100].split(15, dim=1):
        unet(part, times(unet), other)
    other.keys[:, :, :, :, 20:] = other.keys[:, :, :, :, 20:].flip(4)
    torch.testing.assert_close(unet(frames[:, 100:], times(unet), other), last, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_a_rewound_past_knows_the_prompt_alone(tts: Any) -> None:
    unet = UNet(tts.s3gen.flow.decoder.estimator)
    frames, past = together(*inputs(60)), unet.past(2, 60)
    unet(frames[:, :20], times(unet), past)
    past.end_of_prompt()
    first = unet(frames[:, 20:40], times(unet), past)
    unet(frames[:, 40:], times(unet), past)
    past.rewind()
    assert torch.equal(unet(frames[:, 20:40], times(unet), past), first)


def test_an_estimator_of_several_levels_is_refused(tts: Any) -> None:
    estimator = tts.s3gen.flow.decoder.estimator
    deeper = SimpleNamespace(down_blocks=2 * [*estimator.down_blocks], up_blocks=2 * [*estimator.up_blocks])
    with pytest.raises(ValueError, match="2 levels"):
        UNet(deeper)


def test_attention_in_bfloat16_is_sdpas() -> None:
    query, key, value = torch.randn(3, 2, 4, 230, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
    assert error(attention(query, key, value).float(), expected) < 0.01
