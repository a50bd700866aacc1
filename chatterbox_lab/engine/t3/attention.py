"""Which attention runs in T3's layers: watching it, switching it, and reading the alignment out of it.

Upstream's ``AlignmentStreamAnalyzer`` wants one row per token: how the new speech token attends to the text. It
gets it by asking every layer for its attention map, which SDPA does not return, so all layers fall back to manual
attention. Here the same row is read in four ways (`Attention`), none of which outlives the call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

from ...files import attribute
from ..linears import layers_of
from .backends import FORK_HEADS, Heads, Setup, Span
from .backends import LATER_HEADS as LATER_HEADS
from .eager import EagerT3
from .spies import is_spied_on, lift, unspied_config


class Attention:
    """T3's transformer run in one of four analyzer modes, through copies of its layers that share their weights.

    What reads or switches attention is on the copies: other threads run through the same layers meanwhile.

    Args:
        tfmr: T3's ``LlamaModel``; its ``GPT2Model`` in mode ``off``.
        mode: ``stock``, ``layer``, ``off`` or ``probe`` (see `StreamSettings.analyzer`).
        text: the half-open range of the text tokens' positions in the sequence.
        heads: (layer, head) pairs whose rows are averaged; head None is the mean of a layer's heads.

    Raises:
        ValueError: a layer or head that the model does not have.
    """

    def __init__(self, tfmr: torch.nn.Module, mode: str, text: Span, heads: Heads = FORK_HEADS) -> None:
        self.mode, self.text, self.heads = mode, text, heads
        self.rows: torch.Tensor | None = None
        """Attention to the text (rows, text tokens), float32, of the last forward's speech positions, batch row 0."""
        # GPT-2 of transformers 4 takes none and gives tuples; later versions take one everywhere and say nothing of it
        self.cache = RoomyCache() if getattr(tfmr, "_supports_cache_class", True) else None
        self._found: dict[int, torch.Tensor] = {}
        if mode != "off":
            check_heads(tfmr, heads)
        self.tfmr = self._read(tfmr)

    @torch.inference_mode()
    def __call__(self, embeds: torch.Tensor, cache: Any = None) -> torch.Tensor:
        """Hidden states (B, T, C) of ``embeds`` (B, T, C) after what ``cache`` (a transformers Cache) holds.

        T is 1, or the whole prefill with an empty cache. None is the cache of this object, empty at first.
        """
        own, cache = cache is None, self.cache if cache is None else cache
        self._found.clear()
        with SdpaOfOne() if getattr(cache, "long", False) else nullcontext():
            output = self.tfmr(
                inputs_embeds=embeds, past_key_values=cache, use_cache=True, output_attentions=self.mode == "stock"
            )
        if self.mode != "off":
            if not self._found:
                raise RuntimeError(
                    f"analyzer={self.mode!r}: T3's layers run past what reads them; use analyzer='off', guard=False"
                )
            self.rows = averaged_rows(self._found, self.heads)
        self.cache = output.past_key_values if own else self.cache
        return output.last_hidden_state

    def prefill(self, embeds: torch.Tensor, voice: int) -> torch.Tensor:
        """Hidden states (2, T, C) of a prompt's embeddings (2, T, C), the voice's among them."""
        return self(embeds)

    def _read(self, tfmr: torch.nn.Module) -> torch.nn.Module:
        """The transformer with layers of its own where the alignment is read or upstream's analyzer has been."""
        read = {layer for layer, _ in self.heads} if self.mode != "off" else set()
        if not hasattr(tfmr, "layers"):  # GPT-2's, which no release's analyzer reads
            return tfmr
        layers, config = list(tfmr.layers), unspied_config(tfmr)
        if self.mode == "probe" and config._attn_implementation == "eager":  # the application's choice
            config = copy.copy(config)
            config._attn_implementation = "sdpa"
        # transformers 5 puts hooks on the layers that it asks for maps
        every = config is not tfmr.config or self.mode == "stock"
        for index, layer in enumerate(layers):
            if every or index in read or is_spied_on(layer.self_attn):
                layers[index] = twin(layer, self_attn=twin(layer.self_attn))
                lift(layers[index].self_attn)
                layers[index].self_attn.config = config
        for index in read:
            attention = layers[index].self_attn
            if self.mode == "probe":
                attention.forward = _watched(attention.forward, partial(self._from_query, index))
                continue
            attention.register_forward_hook(partial(self._from_map, index))
            if self.mode == "layer":
                attention.register_forward_pre_hook(_ask_for_map, with_kwargs=True)
        found = twin(tfmr, layers=torch.nn.ModuleList(layers))
        found.config = config
        return found

    def _from_map(self, index: int, module: Any, inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
        if output[1] is None:
            raise RuntimeError("this transformers version returns no attention maps from SDPA; use analyzer='probe'")
        attention = output[1][0]  # (H, T, keys)
        start, end = self.text
        first = _first_speech_row(attention.shape[-2], attention.shape[-1], end)
        self._found[index] = attention[:, first:, start:end].float()

    def _from_query(self, index: int, query: torch.Tensor, key: torch.Tensor, scale: float | None) -> None:
        self._found[index] = alignment_rows(query, key, self.text, scale)


def alignment_rows(
    query: torch.Tensor, key: torch.Tensor, text: Span, scale: float | None = None, position: torch.Tensor | None = None
) -> torch.Tensor:
    """How each head of batch row 0 attends to the text from every speech position of a call.

    Args:
        query: (B, H, T, D), of the last T positions.
        key: (B, KV heads, keys, D), of all positions.
        text: the half-open range of the text tokens' positions.
        scale: of the scores; None is SDPA's own.
        position: places (T,) of the queries, where there are more keys than have a meaning yet; then every query has
            a row. None is the last T of the keys.

    Returns:
        (H, rows, text tokens), float32, as manual attention has them.
    """
    start, end = text
    queries, keys = query.shape[-2], key.shape[-2]
    first = 0 if position is not None else _first_speech_row(queries, keys, end)
    query, key = query[0, :, first:], key[0]
    key = key.repeat_interleave(len(query) // len(key), dim=0)
    scores = query @ key.mT * (scale or query.shape[-1] ** -0.5)
    if position is None:
        position = torch.arange(keys - queries + first, keys, device=key.device)
    future = torch.arange(keys, device=key.device) > position[:, None]
    return scores.float().masked_fill(future, -torch.inf).softmax(-1)[..., start:end]


def averaged_rows(found: Mapping[int, torch.Tensor], heads: Heads) -> torch.Tensor:
    """The mean (rows, text tokens) over (layer, head) pairs of what layers' heads attend to, (H, rows, text tokens)."""
    rows = [found[layer].mean(0) if head is None else found[layer][head] for layer, head in heads]
    return torch.stack(rows).mean(0)


def _first_speech_row(queries: int, keys: int, text_end: int) -> int:
    """Index of the first query after the text: 0 in decode, the start token's in prefill."""
    return max(0, text_end - (keys - queries))


def check_heads(tfmr: torch.nn.Module, heads: Heads) -> None:
    """Raises ValueError for a layer or head that the model does not have."""
    layers, count = len(layers_of(tfmr)), tfmr.config.num_attention_heads
    for layer, head in heads:
        if not 0 <= layer < layers or not (head is None or 0 <= head < count):
            raise ValueError(f"heads={tuple(heads)}: ({layer}, {head}) is not within {layers} layers of {count} heads")


class RoomyCache(DynamicCache):
    """A cache that grows by doubling, so that a new token does not copy all that was said before."""

    def __init__(self) -> None:
        super().__init__()
        self._lengths: dict[int, int] = {}
        self._held: dict[int, list[torch.Tensor]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, H, positions, D) of a layer, those given among them."""
        start, new = self.get_seq_length(layer_idx), (key_states, value_states)
        end = start + key_states.shape[-2]
        held = self._held.get(layer_idx)
        if held is None or end > held[0].shape[-2]:
            larger = [room((*states.shape[:-2], 2 * end, states.shape[-1]), states) for states in new]
            for old, wider in zip(held or (), larger, strict=False):
                wider[..., :start, :] = old[..., :start, :]
            held = self._held[layer_idx] = larger
        for states, all_of_them in zip(new, held, strict=True):
            all_of_them[..., start:end, :] = states
        self._lengths[layer_idx] = end
        return held[0][..., :end, :], held[1][..., :end, :]

    @property
    def long(self) -> bool:
        """Whether what is held lies as `attention_of_one` reads it best."""
        return any(keys.stride(-1) != 1 for keys, _ in self._held.values())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions that a layer holds."""
        return self._lengths.get(layer_idx, 0)

    def get_mask_sizes(self, query: Any, layer_idx: int) -> tuple[int, int]:
        """Keys that new positions will see, and where they begin (asked by transformers from 4.53 on)."""
        return self.get_seq_length(layer_idx) + (query if isinstance(query, int) else len(query)), 0


LONG = 384
"""Positions on a CPU up to which PyTorch's kernel for a single query is the faster one; measured on two kinds of model,
160 and 1024 wide, where both take the same around there."""


def room(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Room for keys or values (..., positions, head width), in dtype and device of ``like``.

    On a CPU, where there are many, the positions of a coordinate lie side by side: `attention_of_one` then reads long
    rows instead of short ones, which is close to what the memory gives.
    """
    if like.device.type == "cpu" and like.dtype == torch.float32 and shape[-2] > LONG:
        return like.new_empty((*shape[:-2], shape[-1], shape[-2])).mT
    return like.new_empty(shape)


def attention_of_one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention (B, H, 1, D) of the last position to all, by two products and the softmax between them."""
    return (query * query.shape[-1] ** -0.5 @ key.mT).softmax(-1) @ value


class SdpaOfOne(TorchFunctionMode):
    """Gives a single query of this thread to `attention_of_one` instead of PyTorch's kernel."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and kwargs.get("attn_mask") is None:
            query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs))[:3]
            if query.shape[-2] == 1 and kwargs.get("scale") in (None, query.shape[-1] ** -0.5):
                return attention_of_one(query, key, value)
        return func(*args, **kwargs)


class SdpaWatch(TorchFunctionMode):
    """Shows query, key and scale of every scaled_dot_product_attention of this thread to a reader."""

    def __init__(self, read: Callable[[torch.Tensor, torch.Tensor, float | None], None]) -> None:
        super().__init__()
        self.read = read

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key = (*args, *(kwargs[name] for name in ("query", "key") if name in kwargs))[:2]
            self.read(query, key, kwargs.get("scale"))
        return func(*args, **kwargs)


@contextmanager
def watching_sdpa(layer: torch.nn.Module, read: Callable[..., None]) -> Iterator[None]:
    """Shows ``read`` the query (B, heads, T, d), key and scale of the layer's attention while the context lasts."""
    with attribute(layer, "forward", _watched(layer.forward, read)):
        yield


def _watched(forward: Callable[..., Any], read: Callable[..., None]) -> Callable[..., Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:
        with SdpaWatch(read):
            return forward(*args, **kwargs)

    return watched


def twin(module: torch.nn.Module, **parts: torch.nn.Module) -> torch.nn.Module:
    """A module that shares all weights with another, but not its attributes, its hooks and these of its parts."""
    found = type(module).__new__(type(module))
    found.__dict__ = {
        name: copy.copy(value) if isinstance(value, dict) else value for name, value in vars(module).items()
    }
    found._modules.update(parts)
    found._compiled_call_impl = None  # it would run the original
    forward = vars(module).get("forward")  # as accelerate sets it
    if isinstance(forward, MethodType) and forward.__self__ is module:
        found.forward = MethodType(forward.__func__, found)
    elif isinstance(forward, partial):
        found.forward = partial(
            forward.func, *(found if arg is module else arg for arg in forward.args), **forward.keywords
        )
    return found


def _ask_for_map(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    # LlamaModel leaves the mask out when it believes that every layer runs SDPA with is_causal; manual attention
    # knows no is_causal, so without a mask of its own the prefill would look into the future.
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    kwargs = dict(kwargs, output_attentions=True)
    if kwargs.get("attention_mask") is None and hidden.shape[1] > 1:
        shape, lowest = (1, 1, hidden.shape[1], hidden.shape[1]), torch.finfo(hidden.dtype).min
        kwargs["attention_mask"] = hidden.new_full(shape, lowest).triu(1)
    return args, kwargs


@contextmanager
def stepper(setup: Setup) -> Iterator[EagerT3]:
    """Backend ``"hf"``: the transformers model, with a cache that grows."""
    attend = Attention(setup.t3.tfmr, setup.analyzer, setup.text, setup.heads)
    yield EagerT3(setup, attend, setup.t3.speech_head)
