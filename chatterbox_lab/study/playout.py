"""What a listener gets who starts with the first chunk: by the cost model, or from measured arrivals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..engine.schedule import TOKEN_SECONDS, Costs


@dataclass(frozen=True)
class Chunk:
    """One chunk of a stream: its new tokens, the context before them, when it arrives, and what is heard of it."""

    new: int
    before: int
    arrival: float
    seconds: float


def timeline(costs: Costs, sizes: Iterable[int], tokens: int, context_window: int, fade: float = 0.0) -> list[Chunk]:
    """The chunks of an utterance of ``tokens`` by the cost model, as `stream.generate_stream` would cut it."""
    chunks: list[Chunk] = []
    said, clock, held = 0, costs.prefill, 0.0
    for size in sizes:
        new, before = min(size, tokens - said), min(context_window, said)
        clock += costs.chunk_seconds(new, before)
        said += new
        holds = 0.0 if said == tokens else fade
        chunks.append(Chunk(new, before, clock, new * TOKEN_SECONDS + held - holds))
        held = holds
        if said == tokens:
            break
    return chunks


@dataclass(frozen=True)
class Playout:
    """What a listener gets who starts with the first chunk.

    Args:
        levels: seconds still to be heard when each chunk but the first arrives; below 0 is how long it was silent.
    """

    levels: tuple[float, ...]

    @property
    def underruns(self) -> int:
        """How often the listener ran out of sound."""
        return sum(level < -1e-9 for level in self.levels)

    @property
    def silence(self) -> float:
        """Seconds of silence between chunks."""
        return -sum(level for level in self.levels if level < 0)


def playout(arrivals: Sequence[float], seconds: Sequence[float]) -> Playout:
    """Play-out simulated from when chunks arrive and how many seconds of sound each brings.

    Raises:
        ValueError: sequences of different lengths.
    """
    if len(arrivals) != len(seconds):
        raise ValueError(f"seconds of {len(seconds)} chunks: must be as many as arrivals, {len(arrivals)}")
    levels: list[float] = []
    end = 0.0
    for number, (arrival, length) in enumerate(zip(arrivals, seconds, strict=True)):
        if number:
            levels.append(end - arrival)
        end = max(end, arrival) + length
    return Playout(tuple(levels))
