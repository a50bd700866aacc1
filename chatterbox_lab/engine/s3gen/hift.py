"""HiFT's generator by plain PyTorch operations on a CPU: channels innermost, which oneDNN convolves fastest.

PyTorch gives oneDNN a one-dimensional convolution channels first, which it multiplies at half the speed or less where
channels are few and signals long, as in the vocoder's last stages. The same convolution in two dimensions, one of them
1 long, may have its channels last.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_LAST = torch.channels_last


class HiFT:
    """Mel and excitation to a waveform, as upstream's ``HiFTGenerator.decode``, for inference on a CPU.

    Args:
        hift: upstream's ``HiFTGenerator`` without weight norm (`vocoder.folded`); its weights are copied.
        dtype: of the residual blocks' convolutions, nearly all of the work. Sums and activations stay float32, and so
            do the first and the last convolution: rounded to bfloat16 they alone move the sound five times as far as
            all blocks (0.8 against 0.15 dB of log-mel on the lab voice).
    """

    def __init__(self, hift: torch.nn.Module, dtype: torch.dtype = torch.float32) -> None:
        self.hift, count = hift, hift.num_kernels
        self.first, self.last = _Convolution(hift.conv_pre), _Convolution(hift.conv_post)
        blocks = [_Block(block, dtype) for block in hift.resblocks]
        self.stages = [
            (_Upsampling(up), _Convolution(down), _Block(beside, dtype), blocks[n * count :][:count])
            for n, (up, down, beside) in enumerate(zip(hift.ups, hift.source_downs, hift.source_resblocks, strict=True))
        ]

    def __call__(self, mel: torch.Tensor, excitation: torch.Tensor) -> torch.Tensor:
        """Waveform (1, 480 T), within upstream's limit of 0.99, of mel (1, 80, T) and excitation (1, 1, 480 T)."""
        hift, bins = self.hift, self.hift.istft_params["n_fft"] // 2 + 1
        spectra = _flat(torch.cat(hift._stft(excitation[:, 0]), dim=1))
        states = self.first(_flat(mel))
        for up, down, beside, blocks in self.stages:
            states = up(F.leaky_relu(states, hift.lrelu_slope))
            if up is self.stages[-1][0]:
                states = torch.cat([states[..., 1:2], states], dim=3)  # upstream's reflection_pad
            states = states + beside(down(spectra))
            states = sum(block(states) for block in blocks) / len(blocks)
        spectra = self.last(F.leaky_relu(states))[:, :, 0]
        wave = hift._istft(spectra[:, :bins].exp(), spectra[:, bins:].sin())  # magnitude and phase
        return wave.clamp(-hift.audio_limit, hift.audio_limit)


def _flat(states: torch.Tensor) -> torch.Tensor:
    """States (1, C, T) as (1, C, 1, T) with the channels innermost."""
    return states[:, :, None].contiguous(memory_format=_LAST)


class _Convolution:
    def __init__(self, module: torch.nn.Conv1d, dtype: torch.dtype = torch.float32) -> None:
        self.weight, self.bias = _flat(module.weight.detach().to(dtype)), module.bias.detach().to(dtype)
        (self.stride,), (self.padding,), (self.dilation,) = module.stride, module.padding, module.dilation

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        along = (1, self.stride), (0, self.padding), (1, self.dilation)
        return F.conv2d(states.to(self.weight.dtype), self.weight, self.bias, *along).float()


class _Upsampling:
    def __init__(self, module: torch.nn.ConvTranspose1d) -> None:
        self.weight, self.bias = _flat(module.weight.detach()), module.bias
        self.along = {"stride": (1, *module.stride), "padding": (0, *module.padding)}

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        return F.conv_transpose2d(states, self.weight, self.bias, **self.along)


class _Snake:
    """``x + sin(a x)^2 / a`` (upstream's ``Snake``), in as few passes over memory as PyTorch has operations for."""

    def __init__(self, module: torch.nn.Module) -> None:
        alpha = module.alpha.detach()[:, None, None]
        self.alpha, self.inverse = alpha, 1 / (alpha + module.no_div_by_zero)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        sine = (states * self.alpha).sin_()
        return torch.addcmul(states, sine, sine * self.inverse)


class _Block:
    """A ``ResBlock``: three times two convolutions, each after a Snake, with the input added."""

    def __init__(self, module: torch.nn.Module, dtype: torch.dtype) -> None:
        parts = zip(module.activations1, module.convs1, module.activations2, module.convs2, strict=True)
        self.parts = [
            (_Snake(first), _Convolution(dilated, dtype), _Snake(second), _Convolution(plain, dtype))
            for first, dilated, second, plain in parts
        ]

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        for first, dilated, second, plain in self.parts:
            states = states + plain(second(dilated(first(states))))
        return states
