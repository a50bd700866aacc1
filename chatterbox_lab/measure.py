"""Clocks that synchronise the device, the metrics of a stream, memory, and the facts of the machine."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
RECORDED_PACKAGES = ("torch", "transformers", "chatterbox-streaming", "diffusers")


@dataclass
class StreamMetrics:
    """What a stream has cost so far. The same object comes with every chunk and is final after the last.

    Times are seconds on a clock that synchronises the device, and count only generation: what the caller does
    between two chunks is left out. ``rtf`` is ``total_generation_time / total_audio_duration``; below 1 is faster
    than real time. ``peak_memory_bytes`` is the allocator's peak on CUDA, the driver's current allocation on MPS
    and the largest resident size seen at a chunk's end on a CPU.
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


def synchronize(device: str | torch.device) -> None:
    """Waits until the device has done all it was given; nothing to wait for on a CPU."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


class StageClock:
    """Seconds and calls per named stage, with the device synchronised at both ends of each measurement."""

    def __init__(self, device: str | torch.device) -> None:
        self.device = device
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def now(self) -> float:
        """A monotonic time in seconds, read once the device is idle."""
        synchronize(self.device)
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
        clock: adds up stages ``t3``, ``s3gen`` and ``watermark`` inside ``chunks``, and counts ``token`` calls.
        sample_rate: samples per second of the audio.
    """
    metrics = StreamMetrics()
    reset_peak_memory(clock.device)
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
            _fill(metrics, clock, elapsed, samples / sample_rate)
            if audio is None:
                return
            yield audio, metrics
    finally:
        chunks.close()


def _fill(metrics: StreamMetrics, clock: StageClock, elapsed: float, duration: float) -> None:
    metrics.total_generation_time = elapsed
    metrics.total_audio_duration = duration
    metrics.rtf = elapsed / duration if duration else None
    metrics.t3_seconds = clock.seconds["t3"]
    metrics.s3gen_seconds = clock.seconds["s3gen"]
    metrics.watermark_seconds = clock.seconds["watermark"]
    metrics.tokens = clock.calls["token"]
    metrics.peak_memory_bytes = max(metrics.peak_memory_bytes, memory_in_use(clock.device))


def reset_peak_memory(device: str | torch.device) -> None:
    """Starts a new peak where the device keeps one (CUDA)."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def memory_in_use(device: str | torch.device) -> int:
    """Bytes: the peak since its reset on CUDA, the current allocation on MPS, the resident size on a CPU."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if kind == "mps":
        return torch.mps.driver_allocated_memory()
    return psutil.Process().memory_info().rss


class TorchFlags:
    """The values that PyTorch's speed flags had before `tune_torch`; restores them on request or on leaving."""

    def __init__(self) -> None:
        self.matmul_precision = torch.get_float32_matmul_precision()
        self.cudnn_benchmark = torch.backends.cudnn.benchmark
        self.allow_tf32 = torch.backends.cuda.matmul.allow_tf32

    def restore(self) -> None:
        """Puts the flags back; may be called more than once."""
        # allow_tf32 writes the precision as well, so the precision comes last.
        torch.backends.cuda.matmul.allow_tf32 = self.allow_tf32
        torch.backends.cudnn.benchmark = self.cudnn_benchmark
        torch.set_float32_matmul_precision(self.matmul_precision)

    def __enter__(self) -> TorchFlags:
        return self

    def __exit__(self, *exc: object) -> None:
        self.restore()


def tune_torch() -> TorchFlags:
    """Sets the report's three PyTorch flags for this process and returns what to restore.

    TF32 for float32 matrix products and cuDNN's autotuning; none of them touches a CPU. Use as
    ``with tune_torch(): ...`` or call ``.restore()`` on what comes back.
    """
    before = TorchFlags()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    return before


def machine_facts(device: str | torch.device = "cpu") -> dict[str, Any]:
    """What a measurement ran on: processor, cores, memory, accelerator, versions, commit and date (UTC)."""
    facts: dict[str, Any] = {
        "machine": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else _cpu_name(),
        "device": torch.device(device).type,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": platform.system(),
        "python": platform.python_version(),
    }
    facts.update({name: _version(name) for name in RECORDED_PACKAGES})
    facts["commit"] = commit()
    facts["date"] = datetime.now(UTC).strftime("%Y-%m-%d")
    return facts


def commit() -> str:
    """The repository's short commit, ``+`` appended when the package differs from it; ``unknown`` outside git."""
    git = ["git", "-C", str(REPOSITORY)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        code = [str(REPOSITORY / "chatterbox_lab")]
        clean = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *code]).returncode == 0
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("" if clean else "+")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def verdict(claim: str, holds: bool, evidence: str) -> str:
    """One line of a notebook's conclusion; ``holds`` and ``evidence`` are computed, never typed."""
    return f"{claim:<44} {'reproduced' if holds else 'not reproduced':<15} {evidence}"


def output_folder(kind: str) -> Path:
    """Where a run puts its ``figures`` or ``data``: under ``CHATTERBOX_LAB_OUTPUT`` if that is set.

    Else figures go to the repository's folder, and data to ``build/data``: what ``data/`` holds was recorded on
    purpose (``notebooks/run.py --in-place``), and a table of the README may be made from it.
    """
    default = REPOSITORY if kind == "figures" else REPOSITORY / "build"
    folder = Path(os.environ.get("CHATTERBOX_LAB_OUTPUT", default)) / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place on success and is gone on failure."""
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def save_results(table: pd.DataFrame, name: str, facts: dict[str, Any]) -> Path:
    """Writes ``name.csv`` (see `output_folder`) whole or not at all: the table, with the machine's facts as columns."""
    path = output_folder("data") / f"{name}.csv"
    with written_whole(path) as part:
        table.assign(**facts).to_csv(part, index=False)
    return path


def load_results(name: str) -> pd.DataFrame:
    """The recorded measurements ``data/name.csv`` of the repository. Raises FileNotFoundError naming what exists."""
    path = REPOSITORY / "data" / f"{name}.csv"
    if not path.exists():
        there = ", ".join(sorted(file.stem for file in path.parent.glob("*.csv"))) or "none"
        raise FileNotFoundError(f"no recorded measurement {name!r} in data/; there are: {there}")
    return pd.read_csv(path)
