"""A player that sounds chunks without a gap while the kernel still makes them, and shows what each of them cost.

The audio goes to the page as binary messages and is scheduled there on the audio clock (``player.js``). The package
``ipyaudio`` sends audio as one base64 text, and knows neither chunk boundaries nor underruns, so it shows no seams.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import anywidget
import torch
import traitlets
from IPython import get_ipython
from IPython.display import Audio

from ..engine.clock import StreamMetrics, Word
from ..engine.settings import whole_number

Stream = Iterator[tuple[torch.Tensor, StreamMetrics]]


@dataclass(frozen=True)
class ChunkRecord:
    """One chunk: its place and length, what each stage took for it, and its arrival, in seconds since the start."""

    index: int
    samples: int
    t3_seconds: float
    s3gen_seconds: float
    watermark_seconds: float
    arrival: float


class Player(anywidget.AnyWidget):
    """Plays a stream in the notebook while it is generated; display it, then `start` it, or the other way round.

    Generation runs in a thread of its own, so the kernel stays free for other cells. Starting one player silences the
    others on the page. The front end keeps ``played`` and ``buffered`` (seconds), ``underruns`` and ``sounding``. Where
    the metrics of a stream have words, the page shows them as running text and marks the one that sounds; ``words`` has
    them here.

    Args:
        title: what stands above the waveform.
        sample_rate: samples per second of the streams to come, 8000 to 96000.
        compact: waveform and buttons only.
        on_chunk: called with the `ChunkRecord` of every chunk, in the generating thread.
        on_end: called with the player when a run is over, however it ended, in the generating thread.

    Raises:
        ValueError: a sample rate outside of what browsers play.
    """

    _esm = Path(__file__).with_name("player.js")
    _css = Path(__file__).with_name("player.css")

    title = traitlets.Unicode().tag(sync=True)
    compact = traitlets.Bool(False).tag(sync=True)
    sample_rate = traitlets.Int(24000).tag(sync=True)
    run = traitlets.Int(0).tag(sync=True)
    state = traitlets.Enum(("idle", "streaming", "done", "stopped", "failed"), "idle").tag(sync=True)
    message = traitlets.Unicode().tag(sync=True)
    metrics = traitlets.Dict().tag(sync=True)

    played = traitlets.Float(0.0).tag(sync=True)
    buffered = traitlets.Float(0.0).tag(sync=True)
    underruns = traitlets.Int(0).tag(sync=True)
    sounding = traitlets.Bool(False).tag(sync=True)

    def __init__(
        self,
        title: str = "",
        sample_rate: int = 24000,
        *,
        compact: bool = False,
        on_chunk: Callable[[ChunkRecord], None] | None = None,
        on_end: Callable[[Player], None] | None = None,
    ) -> None:
        # Several threads meet here: the one that generates, and those in which the kernel handles cells and messages.
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._audio: list[torch.Tensor] = []
        self._ready = False  # a page has reported; before that, messages would be lost
        self._fresh = False  # this run has reached no page yet, so the first one to get it sounds it at once
        self.chunks: list[ChunkRecord] = []
        self.words: list[Word] = []
        self.error: BaseException | None = None
        self.on_chunk, self.on_end = on_chunk, on_end
        sample_rate = whole_number("sample_rate", sample_rate, 8000, 96000)
        super().__init__(title=title, sample_rate=sample_rate, compact=compact)
        self.on_msg(self._receive)

    def __repr__(self) -> str:
        return f"Player({self.title!r}): {self.state}, {len(self.chunks)} chunks, {self.seconds:.2f} s of audio"

    def start(self, stream: Stream) -> None:
        """Starts to generate in a thread and returns at once; what was played before makes room.

        Args:
            stream: yields ``(audio, metrics)``: audio (1, samples), float32 on the CPU at ``sample_rate``, metrics as
                from `generate_stream`. Closed in the thread that ran it if it has a ``close``.

        Raises:
            RuntimeError: the player is still generating.
        """
        with self._lock:
            if self.generating:
                raise RuntimeError("This player is still generating: stop() it and wait(), or use another Player.")
            self._stopping.clear()
            self._audio, self.chunks, self.words, self.error, self._fresh = [], [], [], None, True
            self.run += 1
            self.metrics, self.message, self.state = {}, "", "streaming"
            self.played, self.buffered, self.underruns = 0.0, 0.0, 0
            self._thread = threading.Thread(target=self._work, args=(stream,), name="chatterbox-player", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ends the sound at once and generation at the next chunk's boundary; that chunk is dropped."""
        with self._lock:
            self._stopping.set()
            self.send({"kind": "silence"})
            if self.generating:
                self.message = "stopping at the end of this chunk"

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until generation has ended, at most ``timeout`` seconds; whether it has.

        Raises:
            BaseException: what ended the stream, if it failed.
        """
        if self._thread is not None:
            self._thread.join(timeout)
        if not self.generating and self.error is not None:
            raise self.error
        return not self.generating

    def close(self) -> None:
        """Stops generation and takes the player off the page."""
        self.stop()
        super().close()

    @property
    def generating(self) -> bool:
        """Whether the generating thread is alive."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def audio(self) -> torch.Tensor:
        """All audio so far, (1, samples), float32."""
        with self._lock:
            return torch.cat(self._audio, dim=1) if self._audio else torch.zeros(1, 0)

    @property
    def seconds(self) -> float:
        """Seconds of audio so far."""
        return sum(chunk.samples for chunk in self.chunks) / self.sample_rate

    def set_state(self, sync_data: dict[str, Any]) -> None:
        """Takes traits from the front end, never while the generating thread sets one: traitlets do not lock."""
        with self._lock:
            super().set_state(sync_data)

    def _work(self, stream: Stream) -> None:
        start, state = time.perf_counter(), "done"
        try:
            try:
                before = metrics = StreamMetrics()
                for audio, metrics in stream:
                    if self._stopping.is_set():
                        state = "stopped"
                        break
                    before = self._take(audio, metrics, before, time.perf_counter() - start)
                with self._lock:
                    self.metrics = _shown(metrics)  # final only after the last chunk
                    self._take_words(metrics.words)
            finally:
                getattr(stream, "close", lambda: None)()  # here, where it ran: it may have patched the model
        except BaseException as error:  # kept for wait(); nobody would see it raised in a thread
            self.error, state = error, "failed"
        with self._lock:
            self.message = "" if self.error is None else str(self.error) or type(self.error).__name__
            self.state = state
        if self.on_end is not None:
            self.on_end(self)

    def _take(
        self, audio: torch.Tensor, metrics: StreamMetrics, before: StreamMetrics, arrival: float
    ) -> StreamMetrics:
        """Keeps a chunk and sends it; returns a copy of the metrics, which are one object that grows."""
        stages = ("t3_seconds", "s3gen_seconds", "watermark_seconds")
        costs = {stage: getattr(metrics, stage) - getattr(before, stage) for stage in stages}
        with self._lock:
            record = ChunkRecord(len(self.chunks), audio.shape[1], **costs, arrival=arrival)
            self._audio.append(audio)
            self.chunks.append(record)
            self.metrics = _shown(metrics)
            self._take_words(metrics.words)
            if self._ready:
                self._send_chunk(record)
        if self.on_chunk is not None:
            self.on_chunk(record)
        return replace(metrics)

    def _take_words(self, words: list[Word]) -> None:
        """Keeps the new ones of words that only grow, and sends those."""
        known = len(self.words)
        self.words += words[known:]
        if self._ready and len(self.words) > known:
            self._send_words(known)

    def _send_words(self, first: int = 0) -> None:
        self.send({"kind": "words", "run": self.run, "index": first, "words": self.words[first:]})

    def _send_chunk(self, record: ChunkRecord) -> None:
        content = {"kind": "chunk", "run": self.run, "play": self._fresh, **asdict(record)}
        self._fresh = False
        self.send(content, buffers=[self._audio[record.index].contiguous().numpy().astype("<f4").tobytes()])

    def _receive(self, _: Any, content: dict[str, Any], buffers: list[memoryview]) -> None:
        if content.get("kind") == "stop":
            self.stop()
        elif content.get("kind") == "ready":  # a page, or the page once more after a reload: it has no chunks
            with self._lock:
                self._ready = True
                self._send_words()
                for record in self.chunks:
                    self._send_chunk(record)


def _shown(metrics: StreamMetrics) -> dict[str, Any]:
    return {
        "rtf": metrics.rtf, "first_chunk": metrics.latency_to_first_chunk, "tokens": metrics.tokens,
        "generation": metrics.total_generation_time, "duration": metrics.total_audio_duration,
        "ended": metrics.ended, "note": _note(metrics),
    }  # fmt: skip


def _note(metrics: StreamMetrics) -> str:
    """What is to be known of a stream that did not end by itself, else nothing."""
    after = f"after {metrics.tokens} tokens"
    return {"limit": f"cut at max_new_tokens {after}", "guard": f"ended by the guard {after}"}.get(metrics.ended, "")


def play(stream: Stream, sample_rate: int = 24000, title: str = "") -> Player | Audio:
    """Plays a stream: as it is generated where there is a front end (see `front_end`), afterwards where there is none.

    Args:
        stream: as for `Player.start`.
        sample_rate: samples per second.
        title: what stands above the waveform.

    Returns:
        A started `Player`, to be the last expression of a cell; or an ``IPython.display.Audio`` of the whole stream.

    Raises:
        ValueError: without a front end, a stream that ends before it has yielded audio.
    """
    if front_end():
        player = Player(title, sample_rate)
        player.start(stream)
        return player
    audio = [audio for audio, _ in stream]
    if not audio:
        raise ValueError("stream: ended before its first chunk, so there is nothing to play")
    return Audio(torch.cat(audio, dim=1).clamp(-1, 1).numpy(), rate=sample_rate, normalize=False)


def front_end() -> bool:
    """Whether somebody is likely to see a widget: the environment's ``CHATTERBOX_LAB_WIDGETS`` (1 or 0), else a guess.

    A kernel cannot ask who is connected, and nbclient, papermill and nbval run the very same kernel. But Jupyter's
    server sets ``JPY_SESSION_NAME`` for the kernels of a session, which has a notebook open, and those runners start
    kernels without a server. VS Code and Colab have their own servers, and traces of their own.
    """
    wanted = os.environ.get("CHATTERBOX_LAB_WIDGETS")
    if wanted is not None:
        return wanted == "1"
    shell = get_ipython()
    if shell is None or not hasattr(shell, "kernel"):  # such as a script started from a cell, with its environment
        return False
    return "JPY_SESSION_NAME" in os.environ or "__vsc_ipynb_file__" in shell.user_ns or "google.colab" in sys.modules
