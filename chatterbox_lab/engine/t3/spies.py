"""What upstream's analyzer leaves on T3's layers: told apart, and removed."""

from __future__ import annotations

from typing import Any

import torch


def is_spy(function: Any) -> bool:
    """Whether upstream's analyzer has made this function."""
    return "AlignmentStreamAnalyzer" in getattr(getattr(function, "__func__", function), "__qualname__", "")


def is_spied_on(layer: torch.nn.Module) -> bool:
    """Whether upstream's analyzer has left something on this attention layer."""
    return is_spy(layer.__dict__.get("forward")) or any(map(is_spy, layer._forward_hooks.values()))


def remove_spies(tfmr: torch.nn.Module) -> None:
    """Removes for good what upstream's analyzers have left on the layers."""
    for layer in tfmr.layers:
        lift(layer.self_attn)


def lift(layer: torch.nn.Module) -> None:
    """Removes what upstream's analyzers have left on one attention layer."""
    if is_spy(layer.__dict__.get("forward")):
        del layer.forward
    for key in [key for key, hook in layer._forward_hooks.items() if is_spy(hook)]:
        del layer._forward_hooks[key]
