"""S3Gen's velocity estimator by plain PyTorch operations over the loaded weights, for all frames or for new ones alone.

The released U-Net has one level: causal convolutions, and transformer blocks in which every frame sees every other. So
nothing can be kept between windows, unless the frames of the past stop looking ahead: then their keys and values are
final, and a chunk costs what its own frames cost (`Past`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from chatterbox.models.s3gen.decoder import CausalConv1d, ConditionalDecoder

from ..linears import affine

_QUERIES = 100
"""Rows of a bfloat16 attention map that a CPU makes at a time: more leave its cache."""


class Past:
    """What the estimator keeps of one stream for one Euler step, so that no frame goes through it twice.

    Args:
        keys: room for keys and values, (layers, 2, CFG rows, heads, capacity, head width). The first ``prompt``
            places are the voice prompt's for good, the others are a ring: attention does not know their order.
    """

    def __init__(self, keys: torch.Tensor) -> None:
        self.keys = keys
        self.prompt = self.said = 0
        self.tails: dict[int, torch.Tensor] = {}
        """The last inputs (CFG rows, channels, kernel - 1) of each convolution."""
        self._start: dict[int, torch.Tensor] = {}

    def end_of_prompt(self) -> None:
        """What was said up to now stays; what follows makes room for one another."""
        self.prompt, self._start = self.said, dict(self.tails)

    def rewind(self) -> None:
        """Forgets all but the prompt."""
        self.said, self.tails = self.prompt, dict(self._start)

    def places(self, frames: int) -> torch.Tensor:
        """Where the next frames' keys go, int64 (frames,)."""
        ring = self.keys.shape[4] - self.prompt
        after = self.said - self.prompt + torch.arange(frames, device=self.keys.device)
        return self.prompt + after % ring

    def seen(self, frames: int) -> int:
        """Places that are filled once the next frames are there."""
        return min(self.keys.shape[4], self.said + frames)


class UNet:
    """The estimator of a `ConditionalDecoder`, without its masks, which are all ones for one utterance.

    Args:
        estimator: upstream's; its weights are used where they are or, on a CPU, in a copy made here.
        dtype: of the products and of attention; sums, norms and the result stay float32.

    Raises:
        ValueError: an estimator of several levels, which Chatterbox does not have.
    """

    def __init__(self, estimator: ConditionalDecoder, dtype: torch.dtype = torch.float32) -> None:
        levels = [*estimator.down_blocks, *estimator.up_blocks]
        if len(levels) != 2 or any(not isinstance(level[2], CausalConv1d) for level in levels):
            raise ValueError(f"an estimator of {len(estimator.down_blocks)} levels: Chatterbox's has one")
        self.estimator, self.dtype = estimator, dtype
        (down, up), middle = levels, [(*block, None) for block in estimator.mid_blocks]
        self.stages = [_Stage(*parts, dtype) for parts in (down, *middle, up)]
        self.final = _Block(estimator.final_block, dtype)
        self.project = affine(estimator.final_proj.weight[:, :, 0], estimator.final_proj.bias, dtype)
        attention = estimator.mid_blocks[0][1][0].attn1
        self.heads, self.head_width = attention.heads, attention.to_q.out_features // attention.heads
        self.layers = sum(len(stage.layers) for stage in self.stages)

    def past(self, rows: int, capacity: int) -> Past:
        """Room to remember ``capacity`` frames of one Euler step with this many CFG rows."""
        shape = (self.layers, 2, rows, self.heads, capacity, self.head_width)
        device = self.estimator.final_proj.weight.device
        return Past(torch.zeros(shape, dtype=self.dtype, device=device))  # written now: a first touch costs, too

    def times(self, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """What each stage adds in steps from these times to those (n,): (n, stages, channels).

        Only a meanflow estimator looks at the end: it gives the mean velocity of a step, not that at its start.
        """
        estimator = self.estimator
        embedded, until = (estimator.time_mlp(estimator.time_embeddings(t).to(t.dtype)) for t in (start, end))
        if (mixer := getattr(estimator, "time_embed_mixer", None)) is not None:
            embedded = mixer(torch.cat([embedded, until], dim=1))
        return torch.stack([stage.time(embedded) for stage in self.stages], dim=1)

    def __call__(self, frames: torch.Tensor, times: torch.Tensor, past: Past | None = None) -> torch.Tensor:
        """The velocity (rows, T, 80), float32.

        Args:
            frames: noisy mel, encoder output, speaker and condition: (rows, T, 320), float32.
            times: what the stages add, (stages, channels).
            past: the frames before these, which see them no more; these are added to it.
        """
        run = _Run(past, frames.shape[1])
        hidden = skipped = frames
        for number, stage in enumerate(self.stages):
            if number == len(self.stages) - 1:
                hidden = torch.cat([hidden, skipped], dim=2)
            hidden = stage.resnet(hidden, times[number], run)
            for layer in stage.layers:
                hidden = self._transformed(hidden, layer, run)
            if number == 0:
                skipped = hidden
            if stage.tail is not None:
                hidden = stage.tail(hidden, run)
        velocity = self.project(self.final(hidden, run)).float()
        if past is not None:
            past.said += frames.shape[1]
        return velocity

    def _transformed(self, hidden: torch.Tensor, layer: _Layer, run: _Run) -> torch.Tensor:
        states = layer.query_key_value(layer.norm1(hidden))
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in states.chunk(3, dim=2))
        attended = attention(query, *run.extended(key, value))
        hidden = hidden + layer.out(attended.transpose(1, 2).flatten(2))
        return hidden + layer.down(layer.up(layer.norm3(hidden)))


class _Run:
    """One call: which layer and convolution comes next, and the past that they look up and extend."""

    def __init__(self, past: Past | None, frames: int) -> None:
        self.past = past
        self.layer = self.convolution = 0
        if past is not None:
            self.places, self.seen = past.places(frames), past.seen(frames)

    def extended(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (rows, heads, T, width) that the next layer's frames see."""
        if self.past is None:
            return key, value
        keys, values = self.past.keys[self.layer]
        keys.index_copy_(2, self.places, key)
        values.index_copy_(2, self.places, value)
        self.layer += 1
        return keys[:, :, : self.seen], values[:, :, : self.seen]

    def padded(self, states: torch.Tensor, length: int) -> torch.Tensor:
        """States (rows, C, T) with the ``length`` before them, which are zero where nothing was."""
        if self.past is None:
            return F.pad(states, (length, 0))
        before = self.past.tails.get(self.convolution, states.new_zeros(*states.shape[:2], length))
        states = torch.cat([before, states], dim=2)
        self.past.tails[self.convolution] = states[:, :, -length:].clone()
        self.convolution += 1
        return states


class _Convolution:
    def __init__(self, module: CausalConv1d, dtype: torch.dtype) -> None:
        self.weight, self.bias = module.weight.to(dtype), module.bias.to(dtype)

    def __call__(self, states: torch.Tensor, run: _Run) -> torch.Tensor:
        states = run.padded(states.mT.to(self.weight), self.weight.shape[2] - 1)
        return F.conv1d(states, self.weight, self.bias).mT.float()


class _Block:
    """A `CausalBlock1D`: convolution, norm, Mish."""

    def __init__(self, module: torch.nn.Module, dtype: torch.dtype) -> None:
        self.convolution, self.norm = _Convolution(module.block[0], dtype), module.block[2]

    def __call__(self, states: torch.Tensor, run: _Run) -> torch.Tensor:
        return F.mish(self.norm(self.convolution(states, run)))


class _Layer:
    """The parts of a `BasicTransformerBlock`, its three projections as one."""

    def __init__(self, module: torch.nn.Module, dtype: torch.dtype) -> None:
        attention, (up, _, down) = module.attn1, module.ff.net
        self.norm1, self.norm3 = module.norm1, module.norm3
        together = torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight])
        self.query_key_value = affine(together, None, dtype)
        self.out = affine(attention.to_out[0].weight, attention.to_out[0].bias, dtype)
        self.up = affine(up.proj.weight, up.proj.bias, dtype, gelu=True)
        self.down = affine(down.weight, down.bias, dtype)


class _Stage:
    """A level of the U-Net: a `CausalResnetBlock1D`, its transformer blocks, and the convolution after them, if any."""

    def __init__(self, resnet: Any, layers: Sequence[Any], tail: CausalConv1d | None, dtype: torch.dtype) -> None:
        self.time = resnet.mlp
        self.blocks = _Block(resnet.block1, dtype), _Block(resnet.block2, dtype)
        self.beside = affine(resnet.res_conv.weight[:, :, 0], resnet.res_conv.bias, dtype)
        self.layers = [_Layer(layer, dtype) for layer in layers]
        self.tail = tail and _Convolution(tail, dtype)

    def resnet(self, states: torch.Tensor, time: torch.Tensor, run: _Run) -> torch.Tensor:
        first, second = self.blocks
        return second(first(states, run) + time, run) + self.beside(states)


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Every query's mean of all values, (rows, heads, T, width), by SDPA.

    Except for bfloat16 on a CPU: PyTorch's fused kernel multiplies it no faster than float32 there, plain products do.
    """
    if query.dtype != torch.bfloat16 or query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value)
    heads, scale = query.shape[:2], query.shape[3] ** -0.5
    query, key, value = (states.flatten(0, 1).contiguous() for states in (query, key, value))
    nothing = query.new_empty(1)
    scores = (torch.baddbmm(nothing, part, key.mT, beta=0, alpha=scale) for part in query.split(_QUERIES, dim=1))
    return torch.cat([torch.bmm(part.softmax(dim=2), value) for part in scores], dim=1).unflatten(0, heads)
