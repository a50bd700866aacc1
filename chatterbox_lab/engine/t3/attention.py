"""Which attention runs in T3's layers: watching it, switching it, and reading the alignment out of it.

Upstream's ``AlignmentStreamAnalyzer`` wants one row per token: how the new speech token attends to the text. It
gets it by asking every layer for its attention map, which SDPA does not return, so all layers fall back to manual
attention. Here the same row is read in four ways (`Attention`), none of which outlives the call.
"""

from __future__ import annotations

import logging
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

from ...patching import attribute

Heads = Sequence[tuple[int, int | None]]
FORK_HEADS: Heads = ((9, None),)
"""(layer, head) pairs that the streaming fork's analyzer reads: layer 9, the mean of its heads."""
LATER_HEADS: Heads = ((12, 15), (13, 11), (9, 2))
"""What later Chatterbox releases read: one head in each of three layers."""


class Attention:
    """T3's transformer run in one of four analyzer modes; the layers are changed only while a forward runs.

    Args:
        tfmr: T3's ``LlamaModel``.
        mode: ``stock``, ``layer``, ``off`` or ``probe`` (see `StreamSettings.analyzer`).
        text: the half-open range of the text tokens' positions in the sequence.
        heads: (layer, head) pairs whose rows are averaged; head None is the mean of a layer's heads.

    Raises:
        ValueError: a layer or head that the model does not have.
    """

    def __init__(self, tfmr: torch.nn.Module, mode: str, text: tuple[int, int], heads: Heads = FORK_HEADS) -> None:
        self.tfmr, self.mode, self.text, self.heads = tfmr, mode, text, heads
        self.rows: torch.Tensor | None = None
        """Attention to the text (rows, text tokens), float32, of the last forward's speech positions, batch row 0."""
        self.cache = DynamicCache()
        self._found: dict[int, torch.Tensor] = {}
        if mode != "off":
            check_heads(tfmr, heads)

    @torch.inference_mode()
    def __call__(self, embeds: torch.Tensor, cache: Any = None) -> torch.Tensor:
        """Hidden states (B, T, C) of ``embeds`` (B, T, C) after what ``cache`` (a transformers Cache) holds.

        T is 1, or the whole prefill with an empty cache. None is the cache of this object, empty at first.
        """
        cache = self.cache if cache is None else cache
        self._found.clear()
        with without_spies(self.tfmr), self._reading():
            output = self.tfmr(
                inputs_embeds=embeds, past_key_values=cache, use_cache=True, output_attentions=self.mode == "stock"
            )
        if self._found:
            self.rows = averaged_rows(self._found, self.heads)
        return output.last_hidden_state

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with ExitStack() as stack:
            for index in {layer for layer, _ in self.heads} if self.mode != "off" else ():
                layer = self.tfmr.layers[index].self_attn
                if self.mode == "probe":
                    stack.enter_context(watching_sdpa(layer, partial(self._from_query, index)))
                else:
                    stack.enter_context(_hooked(layer, partial(self._from_map, index), self.mode == "layer"))
            yield

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
    query: torch.Tensor,
    key: torch.Tensor,
    text: tuple[int, int],
    scale: float | None = None,
    position: torch.Tensor | None = None,
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
    layers, count = len(tfmr.layers), tfmr.config.num_attention_heads
    for layer, head in heads:
        if not 0 <= layer < layers or not (head is None or 0 <= head < count):
            raise ValueError(f"heads={tuple(heads)}: ({layer}, {head}) is not within {layers} layers of {count} heads")


class _SdpaWatch(TorchFunctionMode):
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
    original = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _SdpaWatch(read):
            return original(*args, **kwargs)

    with attribute(layer, "forward", forward):
        yield


@contextmanager
def _hooked(layer: torch.nn.Module, read: Callable[..., None], fall_back: bool) -> Iterator[None]:
    handles = [layer.register_forward_hook(read)]
    if fall_back:
        handles.append(layer.register_forward_pre_hook(_ask_for_map, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _ask_for_map(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    # LlamaModel leaves the mask out when it believes that every layer runs SDPA with is_causal; manual attention
    # knows no is_causal, so without a mask of its own the prefill would look into the future.
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    kwargs = dict(kwargs, output_attentions=True)
    if kwargs.get("attention_mask") is None and hidden.shape[1] > 1:
        kwargs["attention_mask"] = causal_mask(hidden.shape[1], hidden)
    return args, kwargs


def causal_mask(length: int, like: torch.Tensor) -> torch.Tensor:
    """An additive mask (1, 1, length, length) of dtype and device of ``like``: its minimum above the diagonal."""
    lowest = torch.finfo(like.dtype).min
    return torch.full((1, 1, length, length), lowest, dtype=like.dtype, device=like.device).triu(1)


def count_spies(tfmr: torch.nn.Module) -> dict[str, int]:
    """Forward hooks and nested wrapped forwards that upstream's analyzer has left on all layers together."""
    hooks = wrapped = 0
    for layer in tfmr.layers:
        hooks += sum(_is_spy(hook) for hook in layer.self_attn._forward_hooks.values())
        wrapped += _depth(layer.self_attn.__dict__.get("forward"))
    return {"hooks": hooks, "wrapped forwards": wrapped}


def _is_spy(function: Any) -> bool:
    return "AlignmentStreamAnalyzer" in getattr(getattr(function, "__func__", function), "__qualname__", "")


def _depth(forward: Any) -> int:
    depth = 0
    while _is_spy(forward):
        depth += 1
        closure = forward.__func__.__closure__ or ()
        forward = next((cell.cell_contents for cell in closure if callable(cell.cell_contents)), None)
    return depth


@contextmanager
def without_spies(tfmr: torch.nn.Module) -> Iterator[None]:
    """Takes what upstream's analyzers have left on the layers out of the way, and puts it back afterwards.

    One plain ``generate()`` leaves a spy behind that makes layer 9 fall back without a causal mask in every later
    call that asks for no attention maps; so a faithful forward must not run through it.
    """
    lifted = []
    for layer in (block.self_attn for block in tfmr.layers):
        if _is_spy(layer.__dict__.get("forward")) or any(map(_is_spy, layer._forward_hooks.values())):
            lifted.append((layer, layer.__dict__.get("forward"), dict(layer._forward_hooks)))
            _lift(layer)
    try:
        yield
    finally:
        for layer, forward, hooks in lifted:
            if forward is not None:
                layer.forward = forward
            layer._forward_hooks.clear()  # refilled, to keep the order in which hooks were registered
            layer._forward_hooks.update(hooks)


def remove_spies(tfmr: torch.nn.Module) -> None:
    """Removes for good what upstream's analyzers have left on the layers."""
    for layer in tfmr.layers:
        _lift(layer.self_attn)


def _lift(layer: torch.nn.Module) -> None:
    if _is_spy(layer.__dict__.get("forward")):
        del layer.forward
    for key in [key for key, hook in layer._forward_hooks.items() if _is_spy(hook)]:
        del layer._forward_hooks[key]


@contextmanager
def watch_layers(tfmr: torch.nn.Module) -> Iterator[list[Counter[str]]]:
    """Counts, layer by layer, the calls that ran ``sdpa`` and those that ran ``manual`` attention."""
    counts: list[Counter[str]] = [Counter() for _ in tfmr.layers]
    with ExitStack() as stack:
        for layer, count in zip(tfmr.layers, counts, strict=True):
            stack.enter_context(_counted(layer.self_attn, count))
        yield counts


@contextmanager
def _counted(layer: torch.nn.Module, count: Counter[str]) -> Iterator[None]:
    # Hooks and no wrapped forward: a spy must stay visible to `without_spies`.
    seen: list[bool] = []
    watch = _SdpaWatch(lambda query, key, scale: seen.append(True))

    def begin(module: Any, inputs: Any) -> None:
        seen.clear()
        watch.__enter__()

    def end(module: Any, inputs: Any, output: Any) -> None:
        watch.__exit__(None, None, None)
        count["sdpa" if seen else "manual"] += 1

    handles = layer.register_forward_pre_hook(begin), layer.register_forward_hook(end, always_call=True)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class CaughtWarning:
    """One emission of a transformers warning: text, line that raised it, layer, and chatterbox's calls above it."""

    message: str
    raised_in: str
    layer: int | None
    called_from: str


@contextmanager
def catch_warnings() -> Iterator[list[CaughtWarning]]:
    """Catches every warning that transformers logs, each time it is raised and not just the first.

    transformers says such things once a process (``warning_once`` is cached); inside this context each emission is
    recorded, with the layer that was running and the line of chatterbox that called into transformers. Nothing is
    printed.
    """
    caught: list[CaughtWarning] = []
    logger = logging.getLogger("transformers")
    import_module("transformers.utils.logging")  # gives Logger its warning_once
    once, handlers, level = logging.Logger.warning_once, logger.handlers[:], logger.level
    logging.Logger.warning_once = logging.Logger.warning
    logger.handlers = [_Catcher(caught)]
    logger.setLevel(logging.WARNING)
    try:
        yield caught
    finally:
        logging.Logger.warning_once = once
        logger.handlers = handlers
        logger.setLevel(level)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' warnings off the screen and, unlike `catch_warnings`, out of what is being timed."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def warning_table(caught: Sequence[CaughtWarning]) -> pd.DataFrame:
    """The caught warnings, one row for each text and call site: message, raised in, called from, layers, times."""
    groups: dict[tuple[str, str, str], list[CaughtWarning]] = {}
    for warning in caught:
        groups.setdefault((warning.message, warning.raised_in, warning.called_from), []).append(warning)
    columns = ["warning", "raised in", "called from", "layers", "times"]
    rows = [(*site, _ranges({w.layer for w in group} - {None}), len(group)) for site, group in groups.items()]
    return pd.DataFrame(rows, columns=columns)


def _ranges(numbers: set[int]) -> str:
    """Sorted numbers with runs joined: {0, 1, 2, 5} is ``0-2, 5``."""
    text: list[str] = []
    for number in sorted(numbers):
        if number - 1 in numbers:
            text[-1] = f"{text[-1].split('-')[0]}-{number}"
        else:
            text.append(str(number))
    return ", ".join(text)


class _Catcher(logging.Handler):
    def __init__(self, caught: list[CaughtWarning]) -> None:
        super().__init__()
        self.caught = caught

    def emit(self, record: logging.LogRecord) -> None:
        frames = [frame for frame, _ in traceback.walk_stack(None)]
        layers = [getattr(frame.f_locals.get("self"), "layer_idx", None) for frame in frames]
        callers = [_site(frame) for frame in frames if frame.f_globals["__name__"].startswith("chatterbox.")]
        self.caught.append(
            CaughtWarning(
                message=record.getMessage(),
                raised_in=f"{record.filename}:{record.lineno} {record.funcName}",
                layer=next((layer for layer in layers if layer is not None), None),
                called_from=" < ".join(callers),
            )
        )


def _site(frame: Any) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"


@dataclass(frozen=True)
class HalfFix:
    """What the half fix does to one prefill (see `measure_half_fix`)."""

    layer: int
    sound: torch.Tensor
    """Attention of the layer's heads, averaged, with a causal mask: (T, T)."""
    half_fixed: torch.Tensor
    """The same with the spy on the layer and no mask: (T, T)."""
    logits_change: float
    """Relative change of the last position's hidden state's logits against SDPA everywhere."""
    rounding: float
    """The same change for stock attention: what rounding alone does."""

    @property
    def future_mass(self) -> float:
        """Share of the half-fixed layer's attention that falls on tokens still to come."""
        return float(self.half_fixed.triu(1).sum() / self.half_fixed.sum())


@torch.inference_mode()
def measure_half_fix(
    tfmr: torch.nn.Module, head: torch.nn.Linear, embeds: torch.Tensor, text: tuple[int, int], layer: int = 9
) -> HalfFix:
    """Runs one prefill in three ways: stock, SDPA everywhere, and SDPA with upstream's spy left on its layer.

    Args:
        tfmr: T3's ``LlamaModel``.
        head: T3's speech head.
        embeds: the prefill's input embeddings (B, T, C).
        text: the half-open range of the text tokens' positions.
        layer: the layer that upstream's analyzer spies on; the spy is removed before returning.
    """
    from chatterbox.models.t3.inference.alignment_stream_analyzer import AlignmentStreamAnalyzer

    def run(**kwargs: Any) -> tuple[torch.Tensor, Any]:
        output = tfmr(inputs_embeds=embeds, use_cache=False, **kwargs)
        # The weights alone: a head that masks codes would drown every change in its constants.
        return F.linear(output.last_hidden_state[:, -1], head.weight).cpu().double(), output

    with without_spies(tfmr):
        sdpa, _ = run()
        stock, output = run(output_attentions=True)
        try:
            spy = AlignmentStreamAnalyzer(tfmr, None, text, alignment_layer_idx=layer)
            half, _ = run(output_attentions=False)
        finally:
            remove_spies(tfmr)
    sound = output.attentions[layer][0].float().mean(0).cpu()
    return HalfFix(layer, sound, spy.last_aligned_attn.float(), _relative(half, sdpa), _relative(stock, sdpa))


def _relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value - reference).norm() / reference.norm())
