"""T3's transformer by plain PyTorch operations over the loaded weights, with a KV cache that has room from the start.

The released loop lets transformers grow the cache by concatenation, which copies all of it for every token, and asks
for masks and rotary tables anew in every step. Here they are there before the first token; on a CPU the cache grows by
doubling, and where an utterance gets long, into an order that suits many positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from ...host import without_cudnns_attention
from ...kept import Recent, kept
from ..linears import head_linear, layer_linears
from .attention import FORK_HEADS, LONG, alignment_rows, attention_of_one, averaged_rows, check_heads, room
from .backends import READ_BESIDE, Heads, Setup, Span
from .eager import EagerT3


class Place(NamedTuple):
    """Where new positions go and what they see, as data, so that a call can be captured.

    Args:
        position: their places in the sequence, int64 (T,).
        window: positions of the cache that are looked at.
        mask: bool (1, 1, 1, window), True where there is something to see; None is all of the window, causally.
    """

    position: torch.Tensor
    window: int
    mask: torch.Tensor | None = None


class StaticT3:
    """T3's ``LlamaModel`` with a cache that has room; takes the place of `Attention` in decoding.

    Args:
        tfmr: T3's ``LlamaModel``; its weights are used where they are, or in a copy that is made once (`linears`).
        mode: ``off``, or ``probe`` to read the alignment beside attention.
        text: the half-open range of the text tokens' positions in the sequence.
        capacity: positions that fit, prefill included.
        heads: (layer, head) pairs whose rows are averaged; head None is the mean of a layer's heads.
        weights: of the decode steps (see `StreamSettings`).
        rows: 2 for classifier-free guidance, 1 without; shapes say 2.

    Raises:
        ValueError: a mode that needs attention maps, or a layer or head that the model does not have.
    """

    def __init__(
        self,
        tfmr: torch.nn.Module,
        mode: str,
        text: Span,
        capacity: int,
        heads: Heads = FORK_HEADS,
        weights: str = "loaded",
        rows: int = 2,
    ) -> None:
        if mode not in READ_BESIDE:
            raise ValueError(
                f"mode={mode!r}: there are no attention maps here; must be one of {', '.join(READ_BESIDE)}"
            )
        self.tfmr, self.text, self.heads = tfmr, text, heads if mode == "probe" else ()
        check_heads(tfmr, self.heads)
        config, like = tfmr.config, tfmr.norm.weight
        self.head_count, self.head_width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        shape = (len(tfmr.layers), 2, rows, self.head_count)
        # A CPU reads float32 in less time than its kernels need for half as many bytes of bfloat16.
        dtype = torch.float32 if like.device.type == "cpu" else like.dtype
        self.capacity, first = capacity, min(capacity, LONG) if like.device.type == "cpu" else capacity
        self.cache = room((*shape, first, self.head_width), torch.empty(0, dtype=dtype, device=like.device))
        """Keys and values: (layers, 2, CFG rows, heads, positions, head width); on a CPU the positions grow."""
        self.tables = rotary_tables(tfmr.rotary_emb, capacity, self.cache)
        self.weights, self.linears = weights, layer_linears(tfmr, weights)
        self.length = 0
        self.rows: torch.Tensor | None = None
        """Attention to the text (rows, text tokens), float32, of the last call's speech positions, batch row 0."""

    @torch.inference_mode()
    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (2, T, C) of the embeddings (2, T, C) that follow all that was given before.

        Raises ValueError when they do not fit any more.
        """
        start, end = self.length, self.length + hidden.shape[1]
        self.reserve(end)
        place = Place(torch.arange(start, end, device=hidden.device), end)
        hidden, self.rows = self.run(hidden, place, self.text)
        self.length = end
        return hidden

    @torch.inference_mode()
    def prefill(self, embeds: torch.Tensor, voice: int) -> torch.Tensor:
        """Hidden states (2, T - voice, C) of a prompt's embeddings (2, T, C), of which the first are the voice's.

        Keys and values of a voice do not depend on what it says: those of the last few are kept with the model.
        """
        self.reserve(voice)
        recent: Recent = kept(self.tfmr, "voice", Recent)
        spoken = embeds[:, :voice]
        self.cache[:, :, :, :, :voice] = recent.value({"voice": spoken}, lambda: self._read(spoken))
        self.length = voice
        return self(embeds[:, voice:])

    def reserve(self, end: int) -> None:
        """Makes room for this many positions. Raises ValueError beyond the capacity."""
        if end > self.capacity:
            raise ValueError(f"position {end}: the cache was made for {self.capacity}")
        if end > self.cache.shape[4]:
            short, shape = self.cache, self.cache.shape
            self.cache = room((*shape[:4], min(self.capacity, 2 * end), shape[5]), short)
            self.cache[:, :, :, :, : self.length] = short[:, :, :, :, : self.length]

    def _read(self, voice: torch.Tensor) -> torch.Tensor:
        """Keys and values, as in `cache`, of the voice's embeddings (2, T, C)."""
        length = voice.shape[1]
        self.run(voice, Place(torch.arange(length, device=voice.device), length), None)
        return self.cache[:, :, :, :, :length].clone()

    def run(self, hidden: torch.Tensor, place: Place, text: Span | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All layers: hidden states (2, T, C) of embeddings (2, T, C), and the alignment rows where they are wanted.

        ``text`` is where the alignment is read; None is nowhere.
        """
        tables = tuple(table[place.position] for table in self.tables)
        found: dict[int, torch.Tensor] = {}
        wanted = {index for index, _ in self.heads if text is not None}
        with without_cudnns_attention() if hidden.device.type == "cuda" else nullcontext():
            for index in range(len(self.tfmr.layers)):
                hidden, query = self.layer(index, hidden, tables, place)
                if index in wanted:
                    keys = self.cache[index, 0, :, :, : place.window]
                    position = None if place.mask is None else place.position
                    found[index] = alignment_rows(query, keys, text, position=position)
        rows = averaged_rows(found, self.heads) if found else None
        return rms_norm(hidden, self.tfmr.norm), rows

    def layer(
        self, index: int, hidden: torch.Tensor, tables: tuple[torch.Tensor, ...], place: Place
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer: hidden states (2, T, C), and its queries (2, H, T, D); ``tables`` are cosines and sines (T, D)."""
        query, key, value = self.enter(index, hidden, tables)
        keys, values = (states[:, :, : place.window] for states in self.cache[index])
        for new, states in ((key, keys), (value, values)):
            if place.mask is None:  # the new ones end the window: a copy, which is less work than a scatter
                states[:, :, -new.shape[2] :] = new
            else:
                states.index_copy_(2, place.position, new)
        return self.leave(index, hidden, attention(query, keys, values, place.mask)), query

    def enter(self, index: int, hidden: torch.Tensor, tables: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Query, key, both turned, and value, each (2, H, T, D) in the cache's dtype, of hidden states (2, T, C)."""
        project, norm = self.linears[index][0], self.tfmr.layers[index].input_layernorm
        heads = (
            project(rms_norm(hidden, norm))
            .to(self.cache.dtype)
            .unflatten(2, (3 * self.head_count, self.head_width))
            .transpose(1, 2)
        )
        turned = rotated(heads[:, : 2 * self.head_count], *tables)
        return *turned.chunk(2, dim=1), heads[:, 2 * self.head_count :]

    def leave(self, index: int, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """A layer's hidden states (2, T, C) after what was attended to (2, H, T, D), of those before (2, T, C)."""
        _, merge, widen, narrow = self.linears[index]
        hidden = hidden + merge(attended.to(hidden.dtype).transpose(1, 2).flatten(2))
        gate, up = widen(rms_norm(hidden, self.tfmr.layers[index].post_attention_layernorm)).chunk(2, dim=-1)
        return hidden + narrow(F.silu(gate) * up)


@contextmanager
def stepper(setup: Setup, kind: type[StaticT3] = StaticT3) -> Iterator[EagerT3]:
    """Backend ``"static"``, and with another ``kind`` of transformer those that build on it."""
    arguments = setup.analyzer, setup.text, setup.capacity, setup.heads, setup.weights, setup.rows
    yield EagerT3(setup, kind(setup.t3.tfmr, *arguments), head_linear(setup.t3.speech_head, setup.weights))


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Scaled dot-product attention (B, H, T, D); without a mask the queries are the last T of the keys, causally."""
    if query.shape[2] > 1 and mask is None:
        mask = causal_lower_right(query.shape[2], key.shape[2])
    elif mask is None and key.stride(3) != 1:
        return attention_of_one(query, key, value)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


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
