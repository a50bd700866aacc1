"""Clocks that synchronise the device, and what a stream has cost so far."""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

import psutil
import torch


class Word(NamedTuple):
    """A word as the model was given it, punctuation included, and when it sounds: seconds of the stream's audio."""

    word: str
    start: float
    end: float


Ended = Literal["stop", "limit", "guard"]


@dataclass
class StreamMetrics:
    """What a stream has cost so far. The same object comes with every chunk and is final after the last.

    Times are seconds on a clock that synchronises the device, and count only generation: what the caller does
    between two chunks is left out. ``rtf`` is ``total_generation_time / total_audio_duration``; below 1 is faster
    than real time. ``peak_memory_bytes`` is the allocator's peak on CUDA, the driver's current allocation on MPS
    and the largest resident size seen at a chunk's end on a CPU. With ``overlap`` the stages' seconds may add up to
    more than the whole, and are ahead of the chunk that they come with; and work goes on while the caller is busy with
    a chunk, so that the caller waits less and sees a lower ``rtf`` than one who asks for the next chunk at once.

    ``ended`` is None until the last chunk has been taken, and then says why no more comes: ``"stop"``, the model was
    done; ``"limit"``, ``max_new_tokens`` cut it short; ``"guard"``, the guard ended it or cut its end off. It stays
    None where the stream was stopped or closed. ``words`` grows while the stream goes on, with ``analyzer="probe"``:
    each word in turn, once T3 has left it; with ``overlap`` also before its sound has come. None is ever taken back or
    changed.
    """

    latency_to_first_chunk: float | None = None
    rtf: float | None = None
    total_generation_time: float | None = None
    total_audio_duration: float | None = None
    chunk_count: int = 0
    t3_seconds: float = 0.0
    s3gen_seconds: float = 0.0
    watermark_seconds: float = 0.0
    tokens: int = 0
    peak_memory_bytes: int = 0
    ended: Ended | None = None
    words: list[Word] = field(default_factory=list)

    def numbers(self) -> dict[str, Any]:
        """Every field that is a number, by name."""
        return {name: getattr(self, name) for name in NUMBERS}


NUMBERS = tuple(one.name for one in fields(StreamMetrics) if one.name not in ("ended", "words"))
"""The fields of `StreamMetrics` that are numbers."""


def synchronize(device: str | torch.device) -> None:
    """Waits until the device has done all it was given; nothing to wait for on a CPU."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


class StageClock:
    """Seconds and calls per named stage, with the device synchronised at both ends of each measurement.

    Several threads may share a clock if each has stages of its own. With ``whole=False`` a thread waits only for its
    own CUDA stream, not for what others have given to the device. What T3 tells about its speech is kept beside them:
    ``words`` and ``ended``, as in `StreamMetrics`, and the seconds of speech and pauses that it has ``decoded``.
    """

    def __init__(self, device: str | torch.device, whole: bool = True) -> None:
        self.device, self.whole = device, whole
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.words: list[Word] = []
        self.ended: Ended | None = None
        self.limit, self.decoded = 0, 0.0

    def tell_end(self, how: Ended, limit: int) -> None:
        """Notes how an utterance ended; of several, a limit counts for more than the guard, and that than a stop.

        A ``limit`` of so many tokens is warned of at the stream's end; 0 is one that was wanted.
        """
        self.limit = limit if how == "limit" else self.limit
        self.ended = max(filter(None, (self.ended, how)), key=("stop", "guard", "limit").index)

    def now(self) -> float:
        """A monotonic time in seconds, read once the device (or this thread's stream) is idle."""
        if self.whole or torch.device(self.device).type != "cuda":
            synchronize(self.device)
        else:
            torch.cuda.current_stream(self.device).synchronize()
        return time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to ``name``, also when it ends in an exception."""
        start = self.now()
        try:
            yield
        finally:
            self.seconds[name] += self.now() - start
            self.calls[name] += 1


Chunks = Generator[torch.Tensor, None, None]
Measured = Generator[tuple[torch.Tensor, StreamMetrics], None, None]


def measured(chunks: Chunks, clock: StageClock, sample_rate: int) -> Measured:
    """Passes on the chunks of a generator, each with the metrics so far; the one clock for upstream's and ours.

    Args:
        chunks: a generator of audio tensors, (1, samples).
        clock: adds up stages ``t3``, ``s3gen`` and ``watermark`` inside ``chunks``, counts ``token`` calls, and is told
            words and how it ended.
        sample_rate: samples per second of the audio.
    """
    metrics = StreamMetrics(words=clock.words)
    if torch.device(clock.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(clock.device)
    elapsed = samples = 0
    try:
        while True:
            start = clock.now()
            audio = next(chunks, None)
            elapsed += clock.now() - start
            if audio is not None:
                samples += audio.shape[-1]
                metrics.chunk_count += 1
                metrics.latency_to_first_chunk = metrics.latency_to_first_chunk or elapsed
            metrics.total_generation_time, metrics.total_audio_duration = elapsed, samples / sample_rate
            metrics.rtf = elapsed / metrics.total_audio_duration if samples else None
            metrics.t3_seconds, metrics.s3gen_seconds = clock.seconds["t3"], clock.seconds["s3gen"]
            metrics.watermark_seconds = clock.seconds["watermark"]
            metrics.tokens = clock.calls["token"]
            metrics.peak_memory_bytes = max(metrics.peak_memory_bytes, memory_in_use(clock.device))
            if audio is None:
                metrics.ended = clock.ended
                if clock.limit:
                    warn_of(clock.limit)
                return
            yield audio, metrics
    finally:
        chunks.close()


def warn_of(limit: int) -> None:
    """Warns the code outside of this package that called it that speech was cut: it sounds like any other end."""
    frame, above, ours = sys._getframe(), 1, __name__.partition(".")[0]
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == ours:
        frame, above = frame.f_back, above + 1
    cut = "speech was cut there; give more, or let chatterbox_lab.speak split the text"
    warnings.warn(f"max_new_tokens={limit}: {cut}", UserWarning, stacklevel=above)


def memory_in_use(device: str | torch.device) -> int:
    """Bytes: the peak since its reset on CUDA, the current allocation on MPS, the resident size on a CPU."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if kind == "mps":
        return torch.mps.driver_allocated_memory()
    return psutil.Process().memory_info().rss
