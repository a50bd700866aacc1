"""What a listener gets who starts with the first chunk: by the cost model, or from measured arrivals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..engine.schedule import TOKEN_SECONDS, Costs


@dataclass(frozen=True)
class Chunk:
    """One chunk of a stream.

    Args:
        new: its new tokens.
        before: tokens of context before them.
        arrival: when it is there, in seconds after the request.
        seconds: of sound that it brings.
    """

    new: int
    before: int
    arrival: float
    seconds: float


def expected(costs: Costs, sizes: Iterable[int], tokens: int, context_window: int, fade: float = 0.0) -> list[Chunk]:
    """The chunks of an utterance of ``tokens`` by the cost model, as `generate_stream` would cut it."""
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
        levels: seconds of sound that are left when each chunk but the first arrives; negative is silence before it.
    """

    levels: tuple[float, ...]

    @property
    def underruns(self) -> int:
        """How many chunks arrived too late: the stream underruns before each of them."""
        return sum(level < -1e-9 for level in self.levels)

    @property
    def silence(self) -> float:
        """Seconds of silence between chunks."""
        return -sum(level for level in self.levels if level < 0)


def play(arrivals: Sequence[float], seconds: Sequence[float]) -> Playout:
    """Plays a stream out, given when each chunk arrives and how many seconds of sound it brings.

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
