"""What upstream's analyzer leaves on T3's layers: told apart, and removed."""

from __future__ import annotations

import copy
from typing import Any

import torch


def is_spy(function: Any) -> bool:
    """Whether upstream's analyzer has made this function."""
    return "AlignmentStreamAnalyzer" in getattr(getattr(function, "__func__", function), "__qualname__", "")


def is_spied_on(layer: torch.nn.Module) -> bool:
    """Whether upstream's analyzer has left something on this attention layer."""
    return is_spy(layer.__dict__.get("forward")) or any(map(is_spy, layer._forward_hooks.values()))


def remove_spies(tfmr: torch.nn.Module) -> None:
    """Removes for good what upstream's analyzers have left on the layers and in the configuration."""
    config = unspied_config(tfmr)
    if config is not tfmr.config:
        vars(tfmr.config).update(vars(config))
    for layer in getattr(tfmr, "layers", ()):  # the analyzers know no GPT-2
        lift(layer.self_attn)


def unspied_config(tfmr: torch.nn.Module) -> Any:
    """The transformer's configuration, or a copy as it was before Multilingual's analyzer switched off SDPA."""
    config = tfmr.config
    left = config.output_attentions and any(is_spied_on(layer.self_attn) for layer in getattr(tfmr, "layers", ()))
    if not left:
        return config
    config = copy.copy(config)
    config.output_attentions, config._attn_implementation = False, "sdpa"
    return config


def lift(layer: torch.nn.Module) -> None:
    """Removes what upstream's analyzers have left on one attention layer."""
    if is_spy(layer.__dict__.get("forward")):
        del layer.forward
    for key in [key for key, hook in layer._forward_hooks.items() if is_spy(hook)]:
        del layer._forward_hooks[key]
