"""Chunks of speech tokens to a waveform that joins the last chunk without a seam.

A chunk is synthesised together with a window of the tokens before it, or goes on from what was made of them. Noise is
addressed absolutely: the flow's by token position, the vocoder's excitation by sample. So a window hears again what the
last one heard, and the join is a short cross-fade between two renderings of the same 20 ms instead of a fade from
silence.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .flow import FRAMES_PER_TOKEN, UPSTREAM, Flow, FlowPlan
from .vocoder import SAMPLES_PER_FRAME, Vocoder

SAMPLES_PER_TOKEN = 960
"""24 kHz over 25 speech tokens a second."""


class Renderer:
    """Turns the token chunks of one stream into audio; it remembers the last window and nothing older.

    Args:
        s3gen: upstream's S3Gen.
        ref: the voice (see `Flow`).
        context_window: tokens before a chunk that it is made with.
        fade_samples: length of the cross-fade between chunks; this much of each chunk waits for the next.
        seed: of the excitation's noise.
        plan: how mel and waveform are made.
        largest_chunk: the most new tokens of a push, for ``cached``.
    """

    def __init__(
        self,
        s3gen: torch.nn.Module,
        ref: dict[str, Any],
        context_window: int,
        fade_samples: int,
        seed: int,
        plan: FlowPlan = UPSTREAM,
        largest_chunk: int = 250,
    ) -> None:
        self.s3gen = s3gen
        self.context_window = max(context_window, math.ceil(fade_samples / SAMPLES_PER_TOKEN))
        with torch.inference_mode():
            self.flow = Flow(s3gen, ref, plan, self.context_window + largest_chunk)
            self.vocoder = Vocoder(s3gen.mel2wav, seed, plan.vocoder_dtype)
        self.fade_samples = fade_samples
        self.overlap = math.ceil(fade_samples / SAMPLES_PER_FRAME) + self.vocoder.reach
        """Frames before a chunk that go through the vocoder with it."""
        self.position = self.frames = 0  # tokens rendered so far; frames that went through the vocoder together
        self.context = torch.zeros(0, dtype=torch.long, device=s3gen.device)
        self.made = torch.zeros(1, 80, 0, device=s3gen.device)  # the mel of the context, or more of it
        self.held = torch.zeros(1, 0)  # audio that waits for the cross-fade

    @torch.inference_mode()
    def push(self, tokens: torch.Tensor, last: bool = False) -> torch.Tensor:
        """Audio (1, samples), float32 on the CPU, that the new tokens (n,) complete.

        Over a stream every token becomes exactly 960 samples; between chunks ``fade_samples`` of them are held back
        until the next push, or until the one with ``last=True``, which may bring no tokens.

        Raises:
            ValueError: a token that the flow has no embedding for, or more tokens than ``largest_chunk`` at once.
        """
        if len(tokens) == 0:
            return self._release(self.held, last)
        self._check(tokens)
        window = torch.cat([self.context, tokens.to(self.context)])
        known = self.made[:, :, self.made.shape[2] - len(self.context) * FRAMES_PER_TOKEN :]
        mel = self.flow.mel(window, self.position - len(self.context), known)
        if self.flow.plan.mode != "window":  # the past stays as it was made, also beyond the context
            mel = torch.cat([self.made, mel[:, :, known.shape[2] :]], dim=2)
        wave = self._vocode(mel, len(tokens) * FRAMES_PER_TOKEN)
        if self.position == 0:  # upstream's fade-in of the utterance, against spill-over from the voice prompt
            fade = self.s3gen.trim_fade[: wave.shape[1]]
            wave[:, : len(fade)] *= fade
        new = len(tokens) * SAMPLES_PER_TOKEN + self.held.shape[1]
        wave = cross_fade(self.held, wave[:, -new:].cpu())
        self.position += len(tokens)
        self.context = window[max(0, len(window) - self.context_window) :]
        return self._release(wave, last)

    def _vocode(self, mel: torch.Tensor, new: int) -> torch.Tensor:
        """Waveform (1, samples) of the end of a window's mel: the new frames, and what joins them to the past.

        At least as many frames as last time, where there are so many: a short last chunk is no new length then, which
        would cost as much again as the work itself (oneDNN on a CPU, cuDNN's search on a GPU).
        """
        self.frames = min(mel.shape[2], max(self.overlap + new, self.frames))
        wave = self.vocoder(mel[:, :, mel.shape[2] - self.frames :], new)
        keep = max(self.context_window * FRAMES_PER_TOKEN, self.frames)
        self.made = mel[:, :, max(0, mel.shape[2] - keep) :]
        self.vocoder.forget(keep)
        return wave

    def _release(self, wave: torch.Tensor, last: bool) -> torch.Tensor:
        ready = wave.shape[1] - (0 if last else min(self.fade_samples, wave.shape[1]))
        self.held = wave[:, ready:]
        return wave[:, :ready]

    def _check(self, tokens: torch.Tensor) -> None:
        room = self.flow.room // FRAMES_PER_TOKEN - self.context_window
        if self.flow.plan.mode == "cached" and len(tokens) > room:
            raise ValueError(f"{len(tokens)} tokens at once: there is room for largest_chunk={room}")
        codes = self.flow.flow.input_embedding.num_embeddings
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < codes:
            wrong = tokens[(tokens < 0) | (tokens >= codes)].tolist()
            raise ValueError(f"speech tokens {wrong[:5]}: the flow takes codes from 0 to {codes - 1}")


def cross_fade(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """``after`` (1, n) with its beginning blended from ``before`` (1, k <= n) by a raised cosine that sums to one.

    Amplitudes add up, not powers: both sides render the same signal, so they are in phase.
    """
    length = before.shape[1]
    if length == 0:
        return after
    rise = (1 - torch.cos(torch.pi * (torch.arange(length, dtype=torch.float32) + 0.5) / length)) / 2
    blended = before * (1 - rise) + after[:, :length] * rise
    return torch.cat([blended, after[:, length:]], dim=1)
