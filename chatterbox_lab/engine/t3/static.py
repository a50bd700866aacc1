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
from ..linears import head_linear
from .attention import FORK_HEADS, LONG, alignment_rows, attention_of_one, averaged_rows, check_heads, room
from .backbone import GPT2, Llama, backbone_of
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
    """T3's transformer with a cache that has room; takes the place of `Attention` in decoding.

    Args:
        tfmr: T3's ``LlamaModel`` or ``GPT2Model``.
        mode: ``off``, or ``probe`` to read the alignment beside attention.
        text: the half-open range of the text tokens' positions in the sequence.
        capacity: positions that fit, prefill included.
        heads: (layer, head) pairs whose rows are averaged; head None is the mean of a layer's heads.
        weights: of the decode steps (see `StreamSettings`).
        rows: 2 for classifier-free guidance, 1 without; shapes say 2.
        kind: what runs the layers; None is their own kind (`backbone`).

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
        kind: type[Llama | GPT2] | None = None,
    ) -> None:
        if mode not in READ_BESIDE:
            raise ValueError(
                f"mode={mode!r}: there are no attention maps here; must be one of {', '.join(READ_BESIDE)}"
            )
        self.tfmr, self.text, self.heads = tfmr, text, heads if mode == "probe" else ()
        check_heads(tfmr, self.heads)
        config, like = tfmr.config, next(tfmr.parameters())
        shape = (config.num_hidden_layers, 2, rows, config.num_attention_heads)
        # A CPU reads float32 in less time than its kernels need for half as many bytes of bfloat16.
        dtype = torch.float32 if like.device.type == "cpu" else like.dtype
        self.capacity, first = capacity, min(capacity, LONG) if like.device.type == "cpu" else capacity
        like = torch.empty(0, dtype=dtype, device=like.device)
        self.cache = room((*shape, first, config.hidden_size // config.num_attention_heads), like)
        """Keys and values: (layers, 2, CFG rows, heads, positions, head width); on a CPU the positions grow."""
        self.backbone = (kind or backbone_of(tfmr))(tfmr, weights, capacity, like)
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
        self.reserve(embeds.shape[1])
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
        hidden, tables = self.backbone.begin(hidden, place.position)
        found: dict[int, torch.Tensor] = {}
        wanted = {index for index, _ in self.heads if text is not None}
        with without_cudnns_attention() if hidden.device.type == "cuda" else nullcontext():
            for index in range(len(self.cache)):
                hidden, query = self.layer(index, hidden, tables, place)
                if index in wanted:
                    keys = self.cache[index, 0, :, :, : place.window]
                    position = None if place.mask is None else place.position
                    found[index] = alignment_rows(query, keys, text, position=position)
        rows = averaged_rows(found, self.heads) if found else None
        return self.backbone.end(hidden), rows

    def layer(
        self, index: int, hidden: torch.Tensor, tables: tuple[torch.Tensor, ...], place: Place
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer: hidden states (2, T, C), and its queries (2, H, T, D); ``tables`` are the backbone's."""
        query, key, value = self.backbone.enter(index, hidden, tables)
        keys, values = (states[:, :, : place.window] for states in self.cache[index])
        for new, states in ((key, keys), (value, values)):
            if place.mask is None:  # the new ones end the window: a copy, which is less work than a scatter
                states[:, :, -new.shape[2] :] = new
            else:
                states.index_copy_(2, place.position, new)
        return self.backbone.leave(index, hidden, attention(query, keys, values, place.mask)), query


@contextmanager
def stepper(setup: Setup, kind: type[Llama] | None = None) -> Iterator[EagerT3]:
    """Backend ``"static"``, and with another ``kind`` of layers those that build on it."""
    arguments = setup.analyzer, setup.text, setup.capacity, setup.heads, setup.weights, setup.rows, kind
    yield EagerT3(setup, StaticT3(setup.t3.tfmr, *arguments), head_linear(setup.t3.speech_head, setup.weights))


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Scaled dot-product attention (B, H, T, D); without a mask the queries are the last T of the keys, causally."""
    if query.shape[2] > 1 and mask is None:
        mask = causal_lower_right(query.shape[2], key.shape[2])
    elif mask is None and key.stride(3) != 1:
        return attention_of_one(query, key, value)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
