"""HiFT learns to turn the teacher's mel back into its speech, without an adversary."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from chatterbox.models.s3gen.hifigan import HiFTGenerator
from chatterbox.models.s3gen.utils.mel import mel_spectrogram

from .corpus import HOP, Utterance, steady

FRAMES = 32  # of an example: 0.64 s
WINDOWS = (128, 256, 512, 1024, 2048)  # samples of the STFTs that speech is compared in


def prepare(vocoder: HiFTGenerator) -> HiFTGenerator:
    """Sets the pitch predictor to begin at a man's voice instead of at 0 Hz."""
    with torch.no_grad():
        vocoder.f0_predictor.classifier.weight.mul_(30)
        vocoder.f0_predictor.classifier.bias.fill_(60)
    return vocoder


def losses(
    vocoder: HiFTGenerator, speech: torch.Tensor, mel: torch.Tensor, pitch: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Spectral distances of the speech made from the teacher's mel and pitch, and the pitch predictor's error.

    Args:
        speech: (B, samples) at 24 kHz.
        mel: (B, frames, 80), log.
        pitch: (B, frames) in Hz, 0 where unvoiced.
    """
    features = mel.transpose(1, 2)
    heard = vocoder.f0_predictor(features)
    # Upstream stops the gradient at the excitation, so the predictor learns from the teacher's pitch alone.
    source = vocoder.m_source(vocoder.f0_upsamp(pitch[:, None]).transpose(1, 2))[0].transpose(1, 2)
    made = vocoder.decode(x=features, s=source)
    inner = slice(3 * HOP, -3 * HOP)  # the edges lack their context
    made, speech = made[:, inner], speech[:, inner]
    return {
        "spectrum": torch.stack([_distance(made, speech, window) for window in WINDOWS]).mean(),
        "mel": F.l1_loss(mel_spectrogram(made), mel_spectrogram(speech)),
        "pitch": F.smooth_l1_loss(heard, pitch, beta=5.0) / 20,
    }


def _distance(made: torch.Tensor, speech: torch.Tensor, window: int) -> torch.Tensor:
    """Relative distance of magnitudes, and the mean distance of their logarithms."""
    shape = torch.hann_window(window, device=made.device)
    a, b = (
        torch.stft(x, window, window // 4, window=shape, return_complex=True).abs().clamp_min(1e-5)
        for x in (made, speech)
    )
    return (a - b).norm() / b.norm() + F.l1_loss(a.log(), b.log())


class Batches:
    """Pieces of the corpus; which ones is drawn from the step's number alone."""

    def __init__(self, items: list[Utterance], size: int) -> None:
        self.items = [item for item in items if len(item.mel) > FRAMES]
        self.size = size

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Speech (B, samples), mel (B, frames, 80) and pitch (B, frames) of a step."""
        draw = np.random.default_rng(step)
        pieces = []
        for index in draw.integers(0, len(self.items), self.size):
            item = self.items[index]
            start = int(draw.integers(0, len(item.mel) - FRAMES))
            frames = slice(start, start + FRAMES)
            speech = item.speech[start * HOP : (start + FRAMES) * HOP].astype(np.float32) / 32767
            pieces.append((speech, item.mel[frames].astype(np.float32), steady(item.pitch[frames])))
        return tuple(torch.from_numpy(np.stack(part)) for part in zip(*pieces, strict=True))
