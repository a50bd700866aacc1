"""What the first stream of a process would pay once, paid before."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from chatterbox.tts import ChatterboxTTS

from ..host import apart
from .clock import synchronize
from .request import Request, checked
from .settings import BALANCED, StreamSettings
from .stream import renderer_of, watermark
from .t3.decode import tokens

_TEXT, _TOKENS, _MOST_CHUNKS = "Hello.", 12, 40


def warm_up(tts: ChatterboxTTS, settings: StreamSettings = BALANCED, **overrides: Any) -> float:
    """Pays what the first stream with these settings would pay once; returns the seconds that it took.

    That is: weights in the form that the device reads fastest, compilation, CUDA graphs, the voice's share of T3's and
    S3Gen's work, the kernels of every length of chunk that the schedule begins with, the watermark's first use. A
    chunk shorter than planned, such as an utterance of one word, may still meet a new length. Nothing is spoken, and
    PyTorch's default generator is left as it is. Arguments and errors as for `generate_stream`.
    """
    request = checked(tts, _TEXT, settings, **{"seed": 0, "language": settings.language or "en", **overrides})
    request = replace(request, settings=request.settings.replace(ignore_eos=True, guard=False))
    start = time.perf_counter()
    with apart(tts.device):
        _work(tts, request)
    synchronize(tts.device)
    return time.perf_counter() - start


def _work(tts: ChatterboxTTS, request: Request) -> None:
    with closing(tokens(tts, request)) as spoken:
        deque(islice(spoken, _TOKENS), maxlen=0)
    renderer = renderer_of(tts, request.settings, request.seed, request.voice.gen)
    codes = torch.zeros(request.settings.largest_chunk, dtype=torch.long)
    for size in _opening(request.settings):
        watermark(tts, renderer.push(codes[:size]))
    watermark(tts, renderer.push(codes[:0], last=True))


def _opening(settings: StreamSettings) -> Iterator[int]:
    """The sizes of a schedule's chunks up to where all that follow are alike: the context is full, growth has ended."""
    said, last = 0, None
    for size in islice(settings.chunk_sizes(), _MOST_CHUNKS):
        yield size
        if said >= settings.context and size == last:
            return
        said, last = said + size, size
