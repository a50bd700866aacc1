"""How speech is ended in tests."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def stopping(tts: Any, after: int) -> Iterator[None]:
    """T3 says its stop token after so many others, in upstream's loops and in ours."""
    count = itertools.count()

    def force(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        logits[..., tts.t3.hp.stop_speech_token] = 1e4 if next(count) >= after else -1e4
        return logits

    handle = tts.t3.speech_head.register_forward_hook(force)
    try:
        yield
    finally:
        handle.remove()
