"""What is derived from a model's weights or its voice, and kept with the model until these change.

Any number of threads may ask at once. None waits for another, because a garbage collection may end a forgotten stream
in the midst of such a question, and would wait for threads that ask in turn: where two make the same, one is kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch

Item = TypeVar("Item")
_kept: WeakKeyDictionary[torch.nn.Module, tuple[tuple, dict[Any, Any]]] = WeakKeyDictionary()
_looked_at: WeakKeyDictionary[torch.nn.Module, torch.Tensor] = WeakKeyDictionary()
_LOOKED_AT = 8
"""Values of each weight matrix that `notice` compares."""


def kept(module: torch.nn.Module, key: Any, make: Callable[[], Any]) -> Any:
    """What ``make`` returned, kept with the module until that is gone or its weights are others.

    Weights changed in place behind PyTorch's back, through ``.data``, are for `notice` to find.
    """
    state = tuple(
        (weight.data_ptr(), weight.dtype, 0 if weight.is_inference() else weight._version)
        for weight in module.parameters()
    )
    before, found = _kept.get(module, (None, {}))
    if before != state:
        found = {}
        _kept[module] = state, found
    return found[key] if key in found else found.setdefault(key, _finished(make()))


def _finished(value: Any) -> Any:
    """The value once the GPU has made it: another thread, with a CUDA stream of its own, may ask for it at once."""
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return value


def notice(module: torch.nn.Module) -> bool:
    """Forgets what is kept with a module or its parts if some of its weights were changed through ``.data``.

    PyTorch counts every other change. To read all weights would take as long as a decode step, so a few values of each
    matrix are compared with those of the last time: enough for a merged adapter, not for a single changed number.
    Returns whether there was such a change.
    """
    found = [
        weight.detach().reshape(-1)[:: weight.numel() // _LOOKED_AT + 1].float()
        for weight in module.parameters()
        if weight.ndim > 1 and weight.numel()
    ]
    values = torch.cat(found).cpu() if found else torch.zeros(0)
    before = _looked_at.get(module)
    changed = before is not None and not torch.equal(before, values)
    if changed:
        drop(module)
    _looked_at[module] = values
    return changed


def forget(tts: Any) -> None:
    """Drops all that this package has made of a model's weights and voices; the next call makes it anew.

    Call it after you changed weights in a way that goes unnoticed, such as a few numbers through ``.data``, or to give
    the memory back. A stream that is under way goes on with what it has. Raises TypeError for what is no Chatterbox.
    """
    if not all(hasattr(tts, part) for part in ("t3", "s3gen", "ve")):
        raise TypeError(f"tts: must be a Chatterbox, is a {type(tts).__module__}.{type(tts).__qualname__}")
    for part in (tts.t3, tts.s3gen, tts.ve):
        if part is not None:
            drop(part)


def drop(module: torch.nn.Module) -> None:
    """Drops what is kept with a module or its parts."""
    for part in module.modules():
        _kept.pop(part, None)
        _looked_at.pop(part, None)


class Recent:
    """Values for the tensors that came last, the last few of them; for others they are made anew.

    One is kept with a model for what depends on its voice: ``kept(t3, "voice", Recent)``.
    """

    def __init__(self, most: int = 4) -> None:
        self.most = most
        self._entries: tuple[tuple[dict[str, torch.Tensor], Any], ...] = ()

    def value(self, given: Mapping[str, torch.Tensor], make: Callable[[], Any]) -> Any:
        """What ``make`` returned for tensors that are equal to those ``given``."""
        entries = self._entries
        entry = next((entry for entry in entries if _equal(entry[0], given)), None)
        if entry is None:
            value = make()
            entry = _finished(({name: tensor.clone() for name, tensor in given.items()}, value))
        self._entries = (entry, *(other for other in entries if other is not entry))[: self.most]
        return entry[1]


def _equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Pool(Generic[Item]):
    """What one user at a time may have: taken, and given back, also by a finalizer; the last few are kept."""

    def __init__(self, most: int | None = None) -> None:
        self._free: deque[Item] = deque(maxlen=most)  # each of its operations is one step for other threads

    def __len__(self) -> int:
        return len(self._free)

    def take(self, fits: Callable[[Item], bool]) -> Item | None:
        """One that fits, which is the caller's from now on, or None."""
        for item in tuple(self._free):
            if fits(item):
                try:
                    self._free.remove(item)
                except ValueError:  # another thread was faster
                    continue
                return item
        return None

    def give(self, item: Item) -> None:
        """Gives back what was taken, or puts in what is new; beyond ``most`` the oldest goes."""
        self._free.appendleft(item)

    def shrink(self, most: int = 0) -> None:
        """Drops the oldest beyond ``most``, for their memory."""
        while len(self._free) > most:
            try:
                self._free.pop()
            except IndexError:
                return
