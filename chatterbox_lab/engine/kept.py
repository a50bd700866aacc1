"""What is derived from a model's weights or its voice, and kept with the model until these change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch

_kept: WeakKeyDictionary[torch.nn.Module, tuple[tuple, dict[Any, Any]]] = WeakKeyDictionary()


def kept(module: torch.nn.Module, key: Any, make: Callable[[], Any]) -> Any:
    """What ``make`` returned, kept with the module until that is gone or its weights are others.

    Weights that are changed in place behind PyTorch's back, through ``.data``, go unnoticed.
    """
    state = tuple(
        (weight.data_ptr(), weight.dtype, 0 if weight.is_inference() else weight._version)
        for weight in module.parameters()
    )
    before, found = _kept.get(module, (None, {}))
    if before != state:
        found = {}
        _kept[module] = state, found
    if key not in found:
        found[key] = make()
    return found[key]


class Latest:
    """The value for the tensors that came last; other tensors, and it is made anew.

    One is kept with a model for what depends on its voice, which seldom changes: ``kept(t3, "voice", Latest)``.
    """

    def __init__(self) -> None:
        self._entry: tuple[dict[str, torch.Tensor], Any] = {}, None

    def value(self, given: Mapping[str, torch.Tensor], make: Callable[[], Any]) -> Any:
        """What ``make`` returned for tensors that are equal to those ``given``."""
        before, value = self._entry
        if before.keys() != given.keys() or not given or not all(torch.equal(before[k], given[k]) for k in given):
            value = make()
            self._entry = {name: tensor.clone() for name, tensor in given.items()}, value
        return value
