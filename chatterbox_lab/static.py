"""T3's transformer by plain PyTorch operations over the loaded weights, with a KV cache that never moves.

The released loop lets transformers grow the cache by concatenation, which copies all of it for every token, and asks
for masks and rotary tables anew in every step. Here both are there before the first token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .attention import FORK_HEADS, Heads, alignment_rows, averaged_rows, check_heads
from .settings import READ_BESIDE


class StaticT3:
    """T3's ``LlamaModel`` with a cache of fixed size; takes the place of `Attention` in decoding.

    Args:
        tfmr: T3's ``LlamaModel``; its weights are used where they are.
        mode: ``off``, or ``probe`` to read the alignment beside attention.
        text: the half-open range of the text tokens' positions in the sequence.
        capacity: positions that fit, prefill included.
        heads: (layer, head) pairs whose rows are averaged; head None is the mean of a layer's heads.

    Raises:
        ValueError: a mode that needs attention maps, or a layer or head that the model does not have.
    """

    def __init__(
        self, tfmr: torch.nn.Module, mode: str, text: tuple[int, int], capacity: int, heads: Heads = FORK_HEADS
    ) -> None:
        if mode not in READ_BESIDE:
            raise ValueError(
                f"mode={mode!r}: there are no attention maps here; must be one of {', '.join(READ_BESIDE)}"
            )
        self.tfmr, self.text, self.heads = tfmr, text, heads if mode == "probe" else ()
        check_heads(tfmr, self.heads)
        config, like = tfmr.config, tfmr.norm.weight
        self.head_count, self.head_width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        shape = (len(tfmr.layers), 2, 2, self.head_count, capacity, self.head_width)
        self.cache = torch.empty(shape, dtype=like.dtype, device=like.device)
        """Keys and values: (layers, 2, CFG rows, heads, capacity, head width)."""
        self.tables = rotary_tables(tfmr.rotary_emb, capacity, like)
        self.length = 0
        self.rows: torch.Tensor | None = None
        """Attention to the text (rows, text tokens), float32, of the last call's speech positions, batch row 0."""

    @torch.inference_mode()
    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (2, T, C) of the embeddings (2, T, C) that follow all that was given before.

        T is 1, or the whole prefill in the first call. Raises ValueError when they do not fit any more.
        """
        start, end = self.length, self.length + hidden.shape[1]
        if end > self.cache.shape[4]:
            raise ValueError(f"position {end}: the cache was made for {self.cache.shape[4]}")
        tables = tuple(table[start:end] for table in self.tables)
        found = {}
        for index, layer in enumerate(self.tfmr.layers):
            query, key, value = self._project(index, layer, hidden, tables, start)
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=end - start > 1)
            if any(index == wanted for wanted, _ in self.heads):
                found[index] = alignment_rows(query, key, self.text)
            hidden = hidden + layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        self.length = end
        if found:
            self.rows = averaged_rows(found, self.heads)
        return self.tfmr.norm(hidden)

    def _project(
        self, index: int, layer: torch.nn.Module, hidden: torch.Tensor, tables: tuple[torch.Tensor, ...], start: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The layer's query (2, H, T, D), and keys and values (2, H, start + T, D) out of the cache."""
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        query, key, value = (
            projection(normed).unflatten(2, (self.head_count, self.head_width)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        end = start + hidden.shape[1]
        self.cache[index, 0, :, :, start:end] = rotated(key, *tables)
        self.cache[index, 1, :, :, start:end] = value
        return rotated(query, *tables), *self.cache[index, :, :, :, :end]


def rotary_tables(rotary: torch.nn.Module, length: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (length, D) of the first positions, in dtype and device of ``like``.

    The frequencies are the model's own (RoPE with Llama 3's scaling, `transformers.modeling_rope_utils`), float32.
    """
    position = torch.arange(length, device=like.device, dtype=torch.float32)
    angle = (position[:, None] * rotary.inv_freq.float()).repeat(1, 2)
    scale = rotary.attention_scaling
    return (angle.cos() * scale).to(like.dtype), (angle.sin() * scale).to(like.dtype)


def rotated(states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """States (..., T, D) turned by the angles of their positions; the halves of D are the pairs' coordinates."""
    first, second = states.chunk(2, dim=-1)
    return states * cosine + torch.cat((-second, first), dim=-1) * sine
