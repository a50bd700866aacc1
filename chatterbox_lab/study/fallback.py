"""Which attention T3's layers run, what upstream's analyzer leaves on them, and what the half fix does.

Upstream's analyzer puts a spy on one layer: a hook that keeps the attention map, and a wrapped ``forward`` that asks
for the map. The half fix is ``output_attentions=False`` while such a spy is still there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..engine.t3.attention import SdpaWatch
from ..engine.t3.spies import is_spied_on, is_spy, lift, remove_spies


def count_spies(tfmr: torch.nn.Module) -> dict[str, int]:
    """How many forward hooks and wrapped forwards upstream's analyzers have left on all layers together."""
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
    """Counts by layer how many of its calls run ``sdpa`` and how many ``manual`` attention.

    Args:
        tfmr: a Llama, such as T3's.
    """
    counts: list[Counter[str]] = [Counter() for _ in tfmr.layers]
    with ExitStack() as stack:
        for layer, count in zip(tfmr.layers, counts, strict=True):
            stack.enter_context(_counted(layer.self_attn, count))
        yield counts


@contextmanager
def _counted(layer: torch.nn.Module, count: Counter[str]) -> Iterator[None]:
    # By hooks, not by a wrapped forward, which would hide a spy from `without_spies`.
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
    """What the half fix does to one prefill of T positions (see `measure_half_fix`).

    Args:
        layer: the number of the layer with the spy.
        sound: the mean attention of its heads with a causal mask, (T, T).
        half_fixed: the same with the spy and no mask, (T, T).
        logits_change: of the last position, relative to SDPA in every layer.
        rounding: the same change by stock attention, which is right: rounding alone.
    """

    layer: int
    sound: torch.Tensor
    half_fixed: torch.Tensor
    logits_change: float
    rounding: float

    @property
    def future_mass(self) -> float:
        """The share of the layer's attention that falls on tokens still to come; 0 is causal."""
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
        layer: the layer that upstream's analyzer spies on; the spy is gone afterwards.
    """
    from chatterbox.models.t3.inference.alignment_stream_analyzer import AlignmentStreamAnalyzer

    def run(**kwargs: Any) -> tuple[torch.Tensor, Any]:
        output = tfmr(inputs_embeds=embeds, use_cache=False, **kwargs)
        # By the weights alone: a head that masks codes adds constants, beside which every change is small.
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


@contextmanager
def without_spies(tfmr: torch.nn.Module) -> Iterator[None]:
    """Takes what upstream's analyzers have left on the layers out of the way, and puts it back afterwards.

    One plain ``generate()`` leaves a spy behind that makes layer 9 fall back without a causal mask in every later
    call that asks for no attention maps; so a faithful forward must not run through it. For upstream's own loops, which
    one thread at a time may run.
    """
    lifted = []
    for layer in (block.self_attn for block in tfmr.layers):
        if is_spied_on(layer):
            lifted.append((layer, layer.__dict__.get("forward"), dict(layer._forward_hooks)))
            lift(layer)
    try:
        yield
    finally:
        for layer, forward, hooks in lifted:
            if forward is not None:
                layer.forward = forward
            layer._forward_hooks.clear()  # refilled, to keep the order in which hooks were registered
            layer._forward_hooks.update(hooks)
