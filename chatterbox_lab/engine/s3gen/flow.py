"""Speech tokens to mel: S3Gen's encoder and flow-matching decoder, a window at a time or each frame once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any
from weakref import finalize

import torch
import torch.nn.functional as F

from ...cpu import warn_of_emulation
from ...kept import Pool, kept
from ..linears import multiplies
from ..settings import StreamSettings
from .encoder import Encoder
from .unet import Past, UNet

FRAMES_PER_TOKEN = 2
"""CausalMaskedDiffWithXvec.token_mel_ratio: 50 mel frames for 25 tokens a second."""


@dataclass(frozen=True)
class FlowPlan:
    """How mel and waveform are made, as upstream does unless told otherwise.

    Fields are as in `StreamSettings`, without their ``flow_``; the vocoder's dtype matters on a CPU only.
    """

    mode: str = "window"
    dtype: torch.dtype = torch.float32
    steps: int = 10
    prompt_tokens: int = 250
    vocoder_dtype: torch.dtype = field(default=torch.float32, compare=False)  # nothing that the flow remembers

    @classmethod
    def of(cls, settings: StreamSettings, device: torch.device) -> FlowPlan:
        """What the settings ask for on this device."""
        flow, vocoder = (_dtype(name, getattr(settings, name), device) for name in ("flow_dtype", "vocoder_dtype"))
        return cls(settings.flow, flow, settings.flow_steps, settings.prompt_tokens, vocoder)


def _dtype(field: str, name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "bfloat16" if multiplies(torch.bfloat16, device) else "float32"
    elif name == "bfloat16":
        warn_of_emulation(f"{field}='bfloat16'", f"{field}='auto' takes float32 here.", device)
    return getattr(torch, name)


UPSTREAM = FlowPlan()
MEANFLOW_STEPS = 2
"""Euler steps that a meanflow estimator was distilled for: ``flow_inference`` of chatterbox-tts 0.1.7."""
_KEPT = 2
_NOISE = 50 * 300
"""Frames of noise before it repeats, 300 s, as in the fork; later releases draw new noise with every call."""


class Flow:
    """Speech tokens to mel with one voice prompt.

    Args:
        s3gen: upstream's S3Gen; what is made of its weights (see `affine`) is kept with them.
        ref: the voice: ``prompt_token`` (1, P), ``prompt_feat`` (1, F, 80) and ``embedding`` (1, 192).
        plan: how.
        room: for ``cached``, tokens that can be remembered besides the voice prompt: the context and the largest chunk.
    """

    def __init__(self, s3gen: torch.nn.Module, ref: dict[str, Any], plan: FlowPlan = UPSTREAM, room: int = 0) -> None:
        self.meanflow = getattr(s3gen, "meanflow", False)  # distilled with guidance inside: one row, few steps
        if self.meanflow:
            plan = replace(plan, steps=min(plan.steps, MEANFLOW_STEPS))
        self.flow, self.plan, self.room = s3gen.flow, plan, FRAMES_PER_TOKEN * room
        device, dtype = s3gen.device, plan.dtype
        tokens = ref["prompt_token"].shape[1]
        kept_tokens = min(plan.prompt_tokens, tokens)
        self.prompt_token = ref["prompt_token"].long().to(device)[:, tokens - kept_tokens :]  # official calls: floats
        mel = ref["prompt_feat"].to(device).mT
        self.prompt_mel = mel[:, :, max(0, mel.shape[2] - kept_tokens * FRAMES_PER_TOKEN) :]  # (1, 80, F)
        self.speaker = self.flow.spk_embed_affine_layer(F.normalize(ref["embedding"].to(device), dim=1))
        self.encoder: Encoder = kept(self.flow, ("encoder", dtype), lambda: Encoder(self.flow, dtype))
        self.unet: UNet = kept(self.flow, ("unet", dtype), lambda: UNet(self.flow.decoder.estimator, dtype))
        scheduler = "linear" if self.meanflow else self.flow.decoder.t_scheduler
        self.span, moments = euler_times(plan.steps, scheduler, device)
        self.times = self.unet.times(moments, moments + torch.stack(self.span))
        self.pasts = self._pasts() if plan.mode == "cached" else None

    def mel(self, tokens: torch.Tensor, start: int, made: torch.Tensor | None = None) -> torch.Tensor:
        """Mel (1, 80, 2 n), float32, of a window of n tokens whose first has the absolute position ``start``.

        Args:
            tokens: int64 (n,); the last of what was said, then what is new.
            start: position of the first token.
            made: the mel of the tokens that are not new, (1, 80, 2 m); ``window`` makes it again.
        """
        hidden, prompt = self.encoder(torch.cat([self.prompt_token, tokens[None]], dim=1)), self.prompt_mel.shape[2]
        noise = self._noise(prompt, hidden.shape[1] - prompt, start).to(hidden)
        condition = torch.zeros_like(noise)
        condition[:, :, :prompt] = self.prompt_mel
        if self.plan.mode == "cached":
            skipped = prompt + (0 if made is None else made.shape[2])
            mel = self._solved(hidden[:, skipped:], condition[:, :, skipped:], noise[:, :, skipped:], self.pasts)
            return mel if made is None else torch.cat([made, mel], dim=2)
        return self._solved(hidden, condition, noise)[:, :, prompt:]

    def _solved(
        self, hidden: torch.Tensor, condition: torch.Tensor, noise: torch.Tensor, pasts: list[Past] | None = None
    ) -> torch.Tensor:
        """Euler's method from noise (1, 80, T) to mel (1, 80, T), as upstream's ``solve_euler`` and ``basic_euler``."""
        state, rate = noise.mT, self.flow.decoder.inference_cfg_rate
        frames = torch.zeros(1 if self.meanflow else 2, state.shape[1], 4 * state.shape[2], device=state.device)
        speaker = self.speaker[:, None].expand_as(state)
        frames[:1] = torch.cat([state, hidden, speaker, condition.mT], dim=2)  # CFG's second row knows only the state
        for step, length in enumerate(self.span):
            frames[:, :, : state.shape[2]] = state
            velocity = self.unet(frames, self.times[step], pasts[step] if pasts else None)
            if not self.meanflow:
                velocity = (1 + rate) * velocity[:1] - rate * velocity[1:]
            state = state + length * velocity
        return state.mT

    def _noise(self, prompt: int, frames: int, start: int) -> torch.Tensor:
        """The prompt's noise, then that of the absolute frames of the window; upstream's own for ``start`` 0."""
        noise = self.flow.decoder.rand_noise
        noise = kept(self.flow, "noise", _drawn) if noise is None else noise
        first = prompt + start * FRAMES_PER_TOKEN
        index = torch.cat([torch.arange(prompt), torch.arange(first, first + frames)]) % noise.shape[2]
        return noise[:, :, index.to(noise.device)]

    def _pasts(self) -> list[Past]:
        """A past for every Euler step that knows the voice prompt; given back when this object is gone.

        The last two that differ are kept with the model, so that a voice is read once and not once a stream.
        """
        pool: Pool[_Read] = kept(self.flow, "pasts", lambda: Pool(_KEPT))
        read = pool.take(lambda read: read.fits(self))
        if read is None:
            pool.shrink(_KEPT - 1)  # first, for the memory
            read = _Read(self.plan, self.room, (self.prompt_token, self.prompt_mel, self.speaker), self._read_prompt())
        for past in read.pasts:
            past.rewind()
        finalize(self, pool.give, read).atexit = False
        return read.pasts

    def _read_prompt(self) -> list[Past]:
        prompt = self.prompt_mel.shape[2]
        pasts = [self.unet.past(1 if self.meanflow else 2, prompt + self.room) for _ in self.span]
        if prompt:
            noise = self._noise(prompt, 0, 0).to(self.prompt_mel)
            self._solved(self.encoder(self.prompt_token), self.prompt_mel, noise, pasts)
        for past in pasts:
            past.end_of_prompt()
        return pasts


def _drawn() -> torch.Tensor:
    return torch.randn(1, 80, _NOISE, generator=torch.Generator().manual_seed(0))


@dataclass(eq=False)
class _Read:
    """A voice prompt that was read: for which plan and room, which voice, and what is remembered of it."""

    plan: FlowPlan
    room: int
    voice: tuple[torch.Tensor, ...]
    pasts: list[Past]

    def fits(self, flow: Flow) -> bool:
        voice = flow.prompt_token, flow.prompt_mel, flow.speaker
        return (self.plan, self.room) == (flow.plan, flow.room) and all(map(torch.equal, self.voice, voice))


def euler_times(steps: int, scheduler: str, device: torch.device) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Length () and start (steps,) of every Euler step, added up in upstream's order (``solve_euler``)."""
    span = torch.linspace(0, 1, steps + 1, device=device)
    if scheduler == "cosine":
        span = 1 - torch.cos(span * 0.5 * torch.pi)
    time, length = span[0], span[1] - span[0]
    moments, lengths = [], []
    for step in range(1, steps + 1):
        moments.append(time)
        lengths.append(length)
        time = time + length
        if step < steps:
            length = span[step + 1] - time
    return lengths, torch.stack(moments)
