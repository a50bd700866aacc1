"""What upstream's analyzer leaves on T3's layers: told apart, taken out of the way, removed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def is_spy(function: Any) -> bool:
    """Whether upstream's analyzer has made this function."""
    return "AlignmentStreamAnalyzer" in getattr(getattr(function, "__func__", function), "__qualname__", "")


def is_spied_on(layer: torch.nn.Module) -> bool:
    """Whether upstream's analyzer has left something on this attention layer."""
    return is_spy(layer.__dict__.get("forward")) or any(map(is_spy, layer._forward_hooks.values()))


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
