"""How an application has set PyTorch up, kept away from this package's work, and left as it is.

PyTorch's defaults are partly a thread's (autocast, device, gradients) and partly the process's (dtype). Here only the
thread's are changed, and only while a call works: never between two chunks.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

Item = TypeVar("Item")
_ALWAYS_FLOATS = {torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.linspace, torch.eye}
_ALWAYS_FLOATS |= {torch.hann_window, torch.hamming_window}
_MAYBE_FLOATS = {torch.arange, torch.full, torch.tensor, torch.as_tensor, torch.scalar_tensor}


class _Float32(TorchFunctionMode):
    """In this thread, new tensors of floats are float32 where no dtype is given, whatever the process's default."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _ALWAYS_FLOATS and kwargs.get("dtype") is None:
            return func(*args, **dict(kwargs, dtype=torch.float32))
        found = func(*args, **kwargs)
        typed = kwargs.get("dtype") is not None or isinstance(args[0] if args else None, (np.ndarray, torch.Tensor))
        if func in _MAYBE_FLOATS and not typed and found.is_floating_point():
            return func(*args, **dict(kwargs, dtype=torch.float32))
        return found


@contextmanager
def apart(device: str | torch.device) -> Iterator[None]:
    """PyTorch as this package expects it, in this thread: no autocast, float32 and the CPU where nothing else is said.

    Args:
        device: where the model is.
    """
    with ExitStack() as stack:
        for kind in {"cpu", torch.device(device).type}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        default = torch.empty(0)
        if default.dtype != torch.float32 or _builders:  # while somebody builds, it may be another again at any time
            stack.enter_context(_Float32())
        if default.device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


_switching = threading.Lock()
_without = 0
_wanted = True


@contextmanager
def without_cudnns_attention() -> Iterator[None]:
    """cuDNN's attention, which plans anew for every length, is off until the last thread that is in here has left.

    PyTorch has one switch for the process: two threads that each put back what they found would leave it wrong.
    """
    global _without, _wanted
    with _switching:
        if _without == 0:
            _wanted = torch.backends.cuda.cudnn_sdp_enabled()
            torch.backends.cuda.enable_cudnn_sdp(False)
        _without += 1
    try:
        yield
    finally:
        with _switching:
            _without -= 1
            if _without == 0:
                torch.backends.cuda.enable_cudnn_sdp(_wanted)


@contextmanager
def switches_kept() -> Iterator[None]:
    """For upstream's Perceiver, which sets SDPA's switches and puts back what it found: others may have left since."""
    with _switching:
        wanted = _wanted if _without else torch.backends.cuda.cudnn_sdp_enabled()
    try:
        yield
    finally:
        with _switching:
            torch.backends.cuda.enable_cudnn_sdp(wanted and not _without)


_builders = 0
_default = torch.float32


@contextmanager
def building() -> Iterator[None]:
    """PyTorch as upstream expects it while a model is built or the voice of a recording is prepared.

    Both follow the process's default dtype in ways that cannot be kept to one thread: where that is not float32, it is
    until the last builder is done.
    """
    global _builders, _default
    with _switching:
        if _builders == 0:
            _default = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
        _builders += 1
    try:
        with apart("cpu"):
            yield
    finally:
        with _switching:
            _builders -= 1
            if _builders == 0:
                torch.set_default_dtype(_default)


def working_apart(items: Generator[Item, None, None], device: str | torch.device) -> Generator[Item, None, None]:
    """The items of a generator that works within `apart` and yields outside of it."""
    end = object()
    with closing(items):
        while True:
            with apart(device):
                item = next(items, end)
            if item is end:
                return
            yield item
