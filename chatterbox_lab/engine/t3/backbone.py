"""The layers of T3's transformer by plain PyTorch operations over the loaded weights: Llama's, and GPT-2's
in Turbo.

What the two have in common, attention and its cache, is in `static`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..linears import layer_linears, layers_of

Tables = tuple[torch.Tensor, ...]


class _Layers:
    """What both have.

    Args:
        tfmr: T3's transformer; its weights are used where they are, or in a copy that is made once (`linears`).
        weights: of the decode steps (see `StreamSettings`).
        capacity: positions that there are at most.
        like: an empty tensor in dtype and device of the cache.
    """

    def __init__(self, tfmr: torch.nn.Module, weights: str, capacity: int, like: torch.Tensor) -> None:
        self.tfmr, self.layers, self.like = tfmr, layers_of(tfmr), like
        self.linears, self.heads = layer_linears(tfmr, weights), tfmr.config.num_attention_heads

    def _heads(self, index: int, normed: torch.Tensor) -> torch.Tensor:
        """The heads (rows, 3 H, T, D) of query, key and value in the cache's dtype."""
        found = self.linears[index][0](normed).to(self.like.dtype)
        return found.unflatten(2, (3 * self.heads, -1)).transpose(1, 2)

    def _merged(self, index: int, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        return hidden + self.linears[index][1](attended.to(hidden.dtype).transpose(1, 2).flatten(2))


class Llama(_Layers):
    """``LlamaModel``: RMS norms, rotary positions, a gated MLP."""

    def __init__(self, tfmr: torch.nn.Module, weights: str, capacity: int, like: torch.Tensor) -> None:
        super().__init__(tfmr, weights, capacity, like)
        self.tables = rotary_tables(tfmr.rotary_emb, capacity, like)

    def begin(self, hidden: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, Tables]:
        """What the first layer is given for embeddings (rows, T, C) at places (T,), and tables (T, D) for `enter`."""
        return hidden, tuple(table[position] for table in self.tables)

    def enter(self, index: int, hidden: torch.Tensor, tables: Tables) -> Tables:
        """Query, key and value, each (rows, H, T, D) in the cache's dtype, of a layer's hidden states (rows, T, C)."""
        heads = self._heads(index, rms_norm(hidden, self.layers[index].input_layernorm))
        turned = rotated(heads[:, : 2 * self.heads], *tables)
        return *turned.chunk(2, dim=1), heads[:, 2 * self.heads :]

    def leave(self, index: int, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Hidden states (rows, T, C) after what a layer attended to (rows, H, T, D), of those before."""
        _, _, widen, narrow = self.linears[index]
        hidden = self._merged(index, hidden, attended)
        gate, up = widen(rms_norm(hidden, self.layers[index].post_attention_layernorm)).chunk(2, dim=-1)
        return hidden + narrow(F.silu(gate) * up)

    def end(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (rows, T, C) as the speech head takes them, of the last layer's."""
        return rms_norm(hidden, self.tfmr.norm)


class GPT2(_Layers):
    """``GPT2Model``: learned positions over the whole sequence, layer norms, biases, a GELU by tanh."""

    def begin(self, hidden: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, Tables]:
        """As `Llama.begin`; there are no tables."""
        return hidden + self.tfmr.wpe.weight[position], ()

    def enter(self, index: int, hidden: torch.Tensor, tables: Tables) -> Tables:
        """As `Llama.enter`."""
        return self._heads(index, layer_norm(hidden, self.layers[index].ln_1)).chunk(3, dim=1)

    def leave(self, index: int, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """As `Llama.leave`."""
        _, _, widen, narrow = self.linears[index]
        hidden = self._merged(index, hidden, attended)
        return hidden + narrow(F.gelu(widen(layer_norm(hidden, self.layers[index].ln_2)), approximate="tanh"))

    def end(self, hidden: torch.Tensor) -> torch.Tensor:
        """As `Llama.end`."""
        return layer_norm(hidden, self.tfmr.ln_f)


def backbone_of(tfmr: torch.nn.Module) -> type[Llama | GPT2]:
    """Whose layers a transformer has."""
    return GPT2 if hasattr(tfmr, "wpe") else Llama


def layer_norm(hidden: torch.Tensor, norm: torch.nn.LayerNorm) -> torch.Tensor:
    """Layer norm with a module's weights, past its hooks."""
    return F.layer_norm(hidden, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def rms_norm(hidden: torch.Tensor, norm: torch.nn.Module) -> torch.Tensor:
    """Llama's RMS norm with the weights and the epsilon of a transformers module, in float32 inside."""
    return F.rms_norm(hidden, hidden.shape[-1:], norm.weight, norm.variance_epsilon)


def rotary_tables(rotary: torch.nn.Module, length: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (length, D) of the first positions, in dtype and device of ``like``.

    The frequencies are the model's own (RoPE with Llama 3's scaling, `transformers.modeling_rope_utils`), float32.
    The sines of the first half of D are negative, as `rotated` needs them.
    """
    position = torch.arange(length, device=like.device, dtype=torch.float32)
    angle = position[:, None] * rotary.inv_freq.float()
    cosine, sine = angle.cos() * rotary.attention_scaling, angle.sin() * rotary.attention_scaling
    return torch.cat([cosine, cosine], 1).to(like.dtype), torch.cat([-sine, sine], 1).to(like.dtype)


def rotated(states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """States (..., T, D) turned by the angles of their positions; the halves of D are the pairs' coordinates."""
    return states * cosine + states.roll(states.shape[-1] // 2, dims=-1) * sine
