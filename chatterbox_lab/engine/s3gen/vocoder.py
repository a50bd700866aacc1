"""Mel to waveform: HiFT on as many frames as the new samples depend on, with an excitation that never restarts."""

from __future__ import annotations

import copy
import math

import torch
from torch.nn.utils.parametrize import is_parametrized

from ...kept import kept
from .hift import HiFT

SAMPLES_PER_FRAME = 480
"""HiFT's upsampling, 8 * 5 * 3, times the hop of its inverse STFT, 4: 24 kHz over 50 frames a second."""


class Vocoder:
    """HiFT with its weight norm folded into the weights, in a copy that is made once and kept with the model.

    Args:
        hift: upstream's ``HiFTGenerator``.
        seed: of the excitation's noise.
        dtype: of its convolutions, see `HiFT`.
    """

    def __init__(self, hift: torch.nn.Module, seed: int, dtype: torch.dtype = torch.float32) -> None:
        self.hift, self.reach = kept(hift, "folded", lambda: (folded(hift), reach(hift)))
        """Frames to either side that a sample depends on."""
        self.decode = self.hift.decode
        if next(hift.parameters()).device.type == "cpu":  # a GPU's own choice of layout has not been beaten here
            self.decode = kept(hift, ("hift", dtype), lambda: HiFT(self.hift, dtype))
        self.excitation = Excitation(hift, seed)
        self.source = torch.zeros(1, 1, 0, device=next(hift.parameters()).device)

    def __call__(self, mel: torch.Tensor, new: int) -> torch.Tensor:
        """Waveform (1, 480 T) of mel (1, 80, T); the last ``new`` frames, an even number, were not here before.

        Samples further than ``reach`` frames from the beginning are those of any longer mel that ends the same way.
        """
        f0 = self.hift.f0_predictor(mel)[:, mel.shape[2] - new :]
        self.source = torch.cat([self.source, self.excitation.extend(f0)], dim=2)
        source = self.source[:, :, self.source.shape[2] - mel.shape[2] * SAMPLES_PER_FRAME :]
        return self.decode(mel, source)

    def forget(self, frames: int) -> None:
        """Drops the excitation of all but the last frames."""
        self.source = self.source[:, :, max(0, self.source.shape[2] - frames * SAMPLES_PER_FRAME) :]


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
        f0 = f0.repeat_interleave(SAMPLES_PER_FRAME, dim=1)[:, None]  # (1, 1, samples)
        cycles = self.cycles + torch.cumsum(f0 / sine.sampling_rate, dim=2)
        self.cycles = cycles[:, :, -1:] % 1
        order = torch.arange(1, self.harmonics + 1, device=f0.device)[:, None]
        waves = sine.sine_amp * torch.sin(2 * torch.pi * (cycles * order % 1) + self.phases.to(f0))
        voiced = (f0 > sine.voiced_threshold).to(f0)
        noise_amplitude = voiced * sine.noise_std + (1 - voiced) * sine.sine_amp / 3
        waves = waves * voiced + noise_amplitude * self._noise(f0.shape[2]).to(f0)
        return self.source.l_tanh(self.source.l_linear(waves.mT)).mT

    def _noise(self, samples: int) -> torch.Tensor:
        shape = (self.harmonics, 2 * SAMPLES_PER_FRAME)  # a token's
        pieces = [torch.randn(shape, generator=self.generator) for _ in range(samples // shape[1])]
        return torch.cat(pieces, dim=1)[None]


def folded(module: torch.nn.Module) -> torch.nn.Module:
    """A copy without weight norm; the original keeps it.

    PyTorch's ``remove_parametrizations`` changes the class that a copy shares with its original, and HiFT's own
    ``remove_weight_norm`` is for the older kind.
    """
    twin = copy.deepcopy(module)
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if is_parametrized(child):
                kind = type(child).__mro__[1]
                plain = kind.__new__(kind)
                plain.__dict__ = dict(child.__dict__)
                weight = torch.nn.Parameter(child.weight.detach().clone(), requires_grad=False)
                plain._parameters, plain._modules = {"weight": weight, "bias": child.bias}, {}
                setattr(parent, name, plain)
    return twin


def reach(hift: torch.nn.Module) -> int:
    """Frames to either side that a sample depends on, from the kernels of HiFT's convolutions."""
    spectra = hift.istft_params["n_fft"] / hift.istft_params["hop_len"]
    rates = [math.prod(up.stride[0] for up in hift.ups[: stage + 1]) for stage in range(len(hift.ups))]
    after = (_side(hift.conv_post) + spectra) / rates[-1]  # from the last stage on
    furthest = 0.0
    for stage in reversed(range(len(rates))):
        blocks = hift.resblocks[stage * hift.num_kernels : (stage + 1) * hift.num_kernels]
        after += max(map(_side_of_block, blocks)) / rates[stage]
        source = (_side_of_block(hift.source_resblocks[stage]) + spectra) / rates[stage]
        furthest = max(furthest, after + source)  # the excitation joins in before the blocks
        up = hift.ups[stage]
        after += up.kernel_size[0] / 2 / rates[stage]
    f0 = sum(_side(layer) for layer in hift.f0_predictor.condnet if hasattr(layer, "kernel_size"))
    return math.ceil(max(furthest, after + _side(hift.conv_pre), f0)) + 1


def _side(convolution: torch.nn.Module) -> int:
    return convolution.dilation[0] * (convolution.kernel_size[0] - 1) // 2


def _side_of_block(block: torch.nn.Module) -> int:
    return sum(_side(convolution) for convolution in (*block.convs1, *block.convs2))
