"""Chunks of speech tokens to a waveform that joins the last chunk without a seam.

A chunk is synthesised together with a window of the tokens before it. Noise is addressed absolutely: the flow's by
token position, the vocoder's excitation by sample. So a window hears again what the last one heard, and the join is
a short cross-fade between two renderings of the same 20 ms instead of a fade from silence.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

SAMPLES_PER_TOKEN = 960
"""24 kHz over 25 speech tokens a second."""
_FRAMES_PER_TOKEN = 2  # CausalMaskedDiffWithXvec.token_mel_ratio: 50 mel frames a second
_SAMPLES_PER_FRAME = SAMPLES_PER_TOKEN // _FRAMES_PER_TOKEN  # HiFT: 8 * 5 * 3 upsampling, 4 samples of hop
_EULER_STEPS = 10  # CausalMaskedDiffWithXvec.inference


class Flow:
    """Speech tokens to mel with one voice prompt: S3Gen's encoder and flow-matching decoder.

    Args:
        s3gen: upstream's S3Gen.
        ref: the voice: ``prompt_token`` (1, P), ``prompt_feat`` (1, F, 80) and ``embedding`` (1, 192).
    """

    def __init__(self, s3gen: torch.nn.Module, ref: dict[str, Any]) -> None:
        self.flow = s3gen.flow
        device = s3gen.device
        self.prompt_token = ref["prompt_token"].to(device)
        self.prompt_mel = ref["prompt_feat"].to(device).mT  # (1, 80, F)
        self.speaker = self.flow.spk_embed_affine_layer(F.normalize(ref["embedding"].to(device), dim=1))

    def mel(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        """Mel (1, 80, 2 n), float32, of a window of n tokens whose first has the absolute position ``start``."""
        hidden = self._encode(tokens)
        prompt = self.prompt_mel.shape[2]
        condition = torch.zeros_like(hidden)
        condition[:, :, :prompt] = self.prompt_mel
        noise = self._noise(prompt, hidden.shape[2] - prompt, start).to(hidden)
        time = torch.linspace(0, 1, _EULER_STEPS + 1, device=hidden.device, dtype=hidden.dtype)
        if self.flow.decoder.t_scheduler == "cosine":
            time = 1 - torch.cos(time * 0.5 * torch.pi)
        mask = torch.ones_like(hidden[:, :1])
        mel = self.flow.decoder.solve_euler(noise, t_span=time, mu=hidden, mask=mask, spks=self.speaker, cond=condition)
        return mel[:, :, prompt:]

    def _encode(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = torch.cat([self.prompt_token, tokens[None]], dim=1)
        length = torch.tensor([tokens.shape[1]], device=tokens.device)
        hidden, _ = self.flow.encoder(self.flow.input_embedding(tokens), length)
        return self.flow.encoder_proj(hidden).mT.contiguous()  # (1, 80, prompt + window)

    def _noise(self, prompt: int, frames: int, start: int) -> torch.Tensor:
        """The prompt's noise, then that of the absolute frames of the window; upstream's own for ``start`` 0."""
        noise = self.flow.decoder.rand_noise
        first = prompt + start * _FRAMES_PER_TOKEN
        index = torch.cat([torch.arange(prompt), torch.arange(first, first + frames)]) % noise.shape[2]
        return noise[:, :, index.to(noise.device)]


class Excitation:
    """The vocoder's harmonic source as one endless signal, made a piece at a time.

    The same formula as HiFT's ``SineGen`` (harmonics of F0 plus noise where voiced, noise alone elsewhere), but the
    phase runs on from piece to piece, harmonics keep their random phases, and noise is drawn token by token, so the
    signal does not depend on where it is cut.

    Args:
        vocoder: upstream's ``HiFTGenerator``.
        seed: of the phases and the noise.
    """

    def __init__(self, vocoder: torch.nn.Module, seed: int) -> None:
        self.source = vocoder.m_source
        self.harmonics = self.source.l_sin_gen.harmonic_num + 1
        self.generator = torch.Generator().manual_seed(seed)  # on the CPU: the same signal on every device
        phases = (2 * torch.rand(1, self.harmonics, 1, generator=self.generator) - 1) * torch.pi
        phases[:, 0] = 0
        self.phases = phases
        self.cycles: torch.Tensor | float = 0.0  # of the fundamental, where the last piece ended

    def extend(self, f0: torch.Tensor) -> torch.Tensor:
        """The next piece (1, 1, 480 n) for F0 (1, n) in Hz, one value a mel frame, n even."""
        sine = self.source.l_sin_gen
        f0 = f0.repeat_interleave(_SAMPLES_PER_FRAME, dim=1)[:, None]  # (1, 1, samples)
        cycles = self.cycles + torch.cumsum(f0 / sine.sampling_rate, dim=2)
        self.cycles = cycles[:, :, -1:] % 1
        order = torch.arange(1, self.harmonics + 1, device=f0.device)[:, None]
        waves = sine.sine_amp * torch.sin(2 * torch.pi * (cycles * order % 1) + self.phases.to(f0))
        voiced = (f0 > sine.voiced_threshold).to(f0)
        noise_amplitude = voiced * sine.noise_std + (1 - voiced) * sine.sine_amp / 3
        waves = waves * voiced + noise_amplitude * self._noise(f0.shape[2]).to(f0)
        return self.source.l_tanh(self.source.l_linear(waves.mT)).mT

    def _noise(self, samples: int) -> torch.Tensor:
        shape = (self.harmonics, SAMPLES_PER_TOKEN)
        pieces = [torch.randn(shape, generator=self.generator) for _ in range(samples // SAMPLES_PER_TOKEN)]
        return torch.cat(pieces, dim=1)[None]


class Renderer:
    """Turns the token chunks of one stream into audio; it remembers the last window and nothing older.

    Args:
        s3gen: upstream's S3Gen.
        ref: the voice (see `Flow`).
        context_window: tokens before a chunk that are synthesised again with it.
        fade_samples: length of the cross-fade between chunks; this much of each chunk waits for the next.
        seed: of the excitation's noise.
    """

    def __init__(
        self, s3gen: torch.nn.Module, ref: dict[str, Any], context_window: int, fade_samples: int, seed: int
    ) -> None:
        with torch.inference_mode():
            self.flow = Flow(s3gen, ref)
        self.s3gen = s3gen
        self.context_window = max(context_window, math.ceil(fade_samples / SAMPLES_PER_TOKEN))
        self.fade_samples = fade_samples
        self.excitation = Excitation(s3gen.mel2wav, seed)
        self.position = 0  # tokens rendered so far
        self.context = torch.zeros(0, dtype=torch.long, device=s3gen.device)
        self.source = torch.zeros(1, 1, 0, device=s3gen.device)  # the excitation of the context
        self.held = torch.zeros(1, 0)  # audio that waits for the cross-fade

    @torch.inference_mode()
    def push(self, tokens: torch.Tensor, last: bool = False) -> torch.Tensor:
        """Audio (1, samples), float32 on the CPU, that the new tokens (n,) complete.

        Over a stream every token becomes exactly 960 samples; between chunks ``fade_samples`` of them are held back
        until the next push, or until the one with ``last=True``, which may bring no tokens.

        Raises:
            ValueError: a token that the flow has no embedding for.
        """
        if len(tokens) == 0:
            return self._release(self.held, last)
        self._check(tokens)
        window = torch.cat([self.context, tokens.to(self.context)])
        mel = self.flow.mel(window, self.position - len(self.context))
        wave = self._vocode(mel, len(self.context))
        if self.position == 0:  # upstream's fade-in of the utterance, against spill-over from the voice prompt
            fade = self.s3gen.trim_fade[: wave.shape[1]]
            wave[:, : len(fade)] *= fade
        new = len(tokens) * SAMPLES_PER_TOKEN + self.held.shape[1]
        wave = cross_fade(self.held, wave[:, -new:].cpu())
        self.position += len(tokens)
        self.context = window[max(0, len(window) - self.context_window) :]
        self.source = self.source[:, :, self.source.shape[2] - len(self.context) * SAMPLES_PER_TOKEN :]
        return self._release(wave, last)

    def _vocode(self, mel: torch.Tensor, context: int) -> torch.Tensor:
        """Waveform (1, samples) of a window's mel; the excitation of its context is the one used before."""
        vocoder = self.s3gen.mel2wav
        f0 = vocoder.f0_predictor(mel)[:, context * _FRAMES_PER_TOKEN :]
        self.source = torch.cat([self.source, self.excitation.extend(f0)], dim=2)
        return vocoder.decode(x=mel, s=self.source)

    def _release(self, wave: torch.Tensor, last: bool) -> torch.Tensor:
        ready = wave.shape[1] - (0 if last else min(self.fade_samples, wave.shape[1]))
        self.held = wave[:, ready:]
        return wave[:, :ready]

    def _check(self, tokens: torch.Tensor) -> None:
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
    rise = (1 - torch.cos(torch.pi * (torch.arange(length) + 0.5) / length)) / 2
    blended = before * (1 - rise) + after[:, :length] * rise
    return torch.cat([blended, after[:, length:]], dim=1)
