"""S3Gen's token encoder by plain PyTorch operations over the loaded weights, with the same result.

Upstream multiplies the encodings of all distances anew in every layer and call, and builds attention maps by hand; here
these products are kept, and SDPA gets the relative positions as a bias that is read in place.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F

from ..linears import affine

_ALIGNED = 8
"""Elements of a mask's row that attention on a GPU reads at once: 16 bytes of bfloat16."""


class Encoder:
    """Speech tokens to what the estimator is conditioned on: a Conformer over tokens, then over mel frames.

    Args:
        flow: upstream's ``CausalMaskedDiffWithXvec``; its weights are used where they are or, on a CPU, in a copy.
        dtype: of the products and of attention; sums, norms and the result stay float32.
    """

    def __init__(self, flow: torch.nn.Module, dtype: torch.dtype = torch.float32) -> None:
        # Not the flow itself: what is kept with a module must not keep it alive.
        self.embedding, self.encoder, self.project = flow.input_embedding, flow.encoder, flow.encoder_proj
        self.layers = [_Layer(layer, self.encoder.embed.pos_enc, dtype) for layer in self.encoder.encoders]
        self.up_layers = [_Layer(layer, self.encoder.up_embed.pos_enc, dtype) for layer in self.encoder.up_encoders]

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """(1, 2 n, 80), float32, for tokens (1, n)."""
        encoder = self.encoder
        states = encoder.pre_lookahead_layer(_embedded(encoder.embed, self.embedding(tokens)))
        for layer in self.layers:
            states = layer(states)
        states, _ = encoder.up_layer(states.mT.contiguous(), tokens)
        states = _embedded(encoder.up_embed, states.mT)
        for layer in self.up_layers:
            states = layer(states)
        return self.project(encoder.after_norm(states))


def _embedded(embed: torch.nn.Module, states: torch.Tensor) -> torch.Tensor:
    return embed.out(states) * embed.pos_enc.xscale


class _Layer:
    """A ``ConformerEncoderLayer`` without convolution: attention with relative positions, then two products."""

    def __init__(self, module: torch.nn.Module, positions: Any, dtype: torch.dtype) -> None:
        own = module.self_attn
        self.module, self.positions, self.dtype = module, positions, dtype
        self.heads, self.scale = own.h, own.d_k**-0.5
        linears = (own.linear_q, own.linear_k, own.linear_v)
        weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
        self.query_key_value = affine(torch.cat(weights), torch.cat(biases), dtype)
        self.out = affine(own.linear_out.weight, own.linear_out.bias, dtype)
        self.up = affine(module.feed_forward.w_1.weight, module.feed_forward.w_1.bias, dtype)
        self.down = affine(module.feed_forward.w_2.weight, module.feed_forward.w_2.bias, dtype)
        self.content, self.place = (bias.detach()[:, None].to(dtype) for bias in (own.pos_bias_u, own.pos_bias_v))
        self.distances = torch.zeros(self.heads, own.d_k, 0)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        states = states + self.attended(self.module.norm_mha(states))
        hidden = self.module.feed_forward.activation(self.up(self.module.norm_ff(states)))
        return states + self.down(hidden)

    def attended(self, states: torch.Tensor) -> torch.Tensor:
        """Attention's output (1, T, C) for states (1, T, C)."""
        length = states.shape[1]
        states = self.query_key_value(states)
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in states.chunk(3, dim=2))
        bias = torch.matmul((query + self.place) * self.scale, self._keys_of_distances(length))
        # Row i of the result has the distances T-1 .. -(T-1); that to key j is T-1-i further on: the next row begins
        # one earlier each time, so a stride one shorter puts every key in its column.
        strides = (bias.stride(0), bias.stride(1), 2 * length - 2, 1)
        bias = bias.as_strided((1, self.heads, length, length), strides, length - 1)
        if bias.device.type == "cuda":  # where kernels fail on rows that begin in between (PyTorch 2.11, H200)
            bias = F.pad(bias, (0, -length % _ALIGNED))[..., :length]
        attended = F.scaled_dot_product_attention(query + self.content, key, value, attn_mask=bias)
        return self.out(attended.transpose(1, 2).flatten(2))

    def _keys_of_distances(self, length: int) -> torch.Tensor:
        """The products of distances T-1 to -(T-1), (heads, width, 2 T - 1), kept for as many as were ever asked for."""
        distances = self.distances  # another thread may put longer or shorter ones there meanwhile
        if distances.shape[2] < 2 * length - 1:
            positions = copy.copy(self.positions)  # upstream's own table stays as it is
            positions.extend_pe(self.content.new_empty(1, length, dtype=torch.float32))
            middle = positions.pe.shape[1] // 2
            table = positions.pe[0, middle - length + 1 : middle + length]
            found = F.linear(table, self.module.self_attn.linear_pos.weight).unflatten(1, (self.heads, -1))
            distances = self.distances = found.permute(1, 2, 0).to(self.dtype).contiguous()
        middle = distances.shape[2] // 2
        return distances[:, :, middle - length + 1 : middle + length]
