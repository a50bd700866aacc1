from __future__ import annotations

from typing import Any

import pytest
import torch

from chatterbox_lab.engine.s3gen.encoder import Encoder


def upstream(tts: Any, tokens: torch.Tensor) -> torch.Tensor:
    flow = tts.s3gen.flow
    states, _ = flow.encoder(flow.input_embedding(tokens), torch.tensor([tokens.shape[1]]))
    return flow.encoder_proj(states)


@torch.inference_mode()
def test_what_it_says_is_upstreams_for_any_length_in_any_order(tts: Any) -> None:
    encoder = Encoder(tts.s3gen.flow)
    for count in (40, 1, 3, 120, 41):
        tokens = torch.randint(0, 6561, (1, count), generator=torch.Generator().manual_seed(count))
        torch.testing.assert_close(encoder(tokens), upstream(tts, tokens), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_a_window_beyond_upstreams_table_of_distances(tts: Any) -> None:
    tokens = torch.randint(0, 6561, (1, 2600), generator=torch.Generator().manual_seed(0))  # 5200 frames, 5000 in it
    torch.testing.assert_close(Encoder(tts.s3gen.flow)(tokens), upstream(tts, tokens), rtol=1e-5, atol=1e-4)


@torch.inference_mode()
def test_bfloat16_stays_near(tts: Any) -> None:
    tokens = torch.randint(0, 6561, (1, 70), generator=torch.Generator().manual_seed(0))
    found, expected = Encoder(tts.s3gen.flow, torch.bfloat16)(tokens), upstream(tts, tokens)
    assert found.dtype == torch.float32
    assert 1e-6 < float((found - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("count", [1, 9])
@torch.inference_mode()
def test_relative_positions_matter(tts: Any, count: int) -> None:
    """Guards the shifted bias: with the distances turned round, what comes out is something else."""
    encoder, tokens = Encoder(tts.s3gen.flow), torch.arange(count)[None]
    expected = encoder(tokens)
    for layer in (*encoder.layers, *encoder.up_layers):
        layer.distances = layer.distances.flip(2)
    assert not torch.allclose(encoder(tokens), expected, rtol=1e-6, atol=1e-6)
