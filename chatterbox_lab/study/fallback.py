"""Which attention T3's layers run, what upstream's analyzer leaves on them, and what the half fix does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..engine.t3.attention import SdpaWatch, is_spy, remove_spies, without_spies


def count_spies(tfmr: torch.nn.Module) -> dict[str, int]:
    """Forward hooks and nested wrapped forwards that upstream's analyzer has left on all layers together."""
    hooks = wrapped = 0
    for layer in tfmr.layers:
        hooks += sum(is_spy(hook) for hook in layer.self_attn._forward_hooks.values())
        wrapped += _depth(layer.self_attn.__dict__.get("forward"))
    return {"hooks": hooks, "wrapped forwards": wrapped}


def _depth(forward: Any) -> int:
    depth = 0
    while is_spy(forward):
        depth += 1
        closure = forward.__func__.__closure__ or ()
        forward = next((cell.cell_contents for cell in closure if callable(cell.cell_contents)), None)
    return depth


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
    watch = SdpaWatch(lambda query, key, scale: seen.append(True))

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
