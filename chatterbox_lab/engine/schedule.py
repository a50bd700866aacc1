"""What a chunk costs on one machine, and so how large each may be: the cost model and the schedules.

T3's share of a chunk is proportional to its new tokens. S3Gen's hardly depends on them: it works on a window, which is
the voice prompt, the context and the new tokens, so a chunk costs ``a + b * (prompt + context + new)`` of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import repeat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .settings import StreamSettings

TOKEN_SECONDS = 0.04
"""Speech in one token: S3Gen's tokens come at 25 Hz."""


@dataclass(frozen=True)
class Costs:
    """Seconds that a stream takes on one machine with one model and backend (measured by `costs.calibrate`).

    The defaults stand for a machine nobody has measured: an RTF of 0.5, the report's target, whatever the chunk.

    Args:
        token: T3, per token.
        prefill: T3, once.
        chunk: rendering and watermark, per chunk: ``a`` of the model. A fit may find it below 0.
        window_token: the same, per token of the window: ``b``.
        prompt_tokens: tokens of the voice prompt that is part of every window.
        error: by how much a chunk may exceed the model, as a share of it; `Growing` and `smallest_chunk` allow for it.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """

    token: float = TOKEN_SECONDS / 2
    prefill: float = 0.0
    chunk: float = 0.0
    window_token: float = 0.0
    prompt_tokens: int = 250
    error: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), -math.inf if field.name == "chunk" else 0
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < least:
                raise ValueError(f"{field.name}={value!r}: must be a finite number" + (", at least 0" * (least == 0)))

    def slower(self, factor: float) -> Costs:
        """A machine on which everything takes ``factor`` times as long, with the same error."""
        times = {name: getattr(self, name) * factor for name in ("token", "prefill", "chunk", "window_token")}
        return replace(self, **times)

    def render_seconds(self, new: int, before: int) -> float:
        """Rendering of a chunk of ``new`` tokens with ``before`` tokens of context."""
        return max(0.0, self.chunk + self.window_token * (self.prompt_tokens + before + new))

    def chunk_seconds(self, new: int, before: int) -> float:
        """The whole chunk: T3 and rendering; without the prefill."""
        return self.token * new + self.render_seconds(new, before)

    def first_chunk(self, chunk_size: int) -> float:
        """Latency to the first chunk of this many tokens."""
        return self.prefill + self.chunk_seconds(chunk_size, 0)

    def rtf(self, chunk_size: int, context_window: int, tokens: int) -> float:
        """Real-time factor of an utterance of ``tokens`` in chunks of one size, in closed form."""
        chunks = -(-tokens // chunk_size)
        ramp = min(chunks - 1, context_window // chunk_size)  # chunks whose context is all that was said
        context = chunk_size * ramp * (ramp + 1) // 2 + (chunks - 1 - ramp) * context_window
        total = self.prefill + self.token * tokens + self.chunk * chunks
        total += self.window_token * (chunks * self.prompt_tokens + context + tokens)
        return total / (tokens * TOKEN_SECONDS)

    def smallest_chunk(self, context_window: int, fade: float = 0.0) -> int | None:
        """The smallest chunk that is never slower than its own sound, in tokens; None if every size is.

        A stream that starts with it, and goes on with it or with what `Growing` allows, never starves its listener.
        ``fade`` seconds of each chunk are held back for the next (`StreamSettings.fade_duration`).
        """
        slow = self.slower(1 + self.error)
        spare = TOKEN_SECONDS - slow.token - slow.window_token
        if spare <= 0:
            return None
        overhead = slow.chunk + slow.window_token * (self.prompt_tokens + context_window) + fade
        return max(1, math.ceil(overhead / spare - 1e-9))


UNMEASURED = Costs()
"""A machine nobody has measured: the next chunk may always be about twice as large."""


def fixed(settings: StreamSettings) -> Iterator[int]:
    """Chunk sizes in tokens without end: always ``chunk_size``."""
    return repeat(settings.chunk_size)


class Growing:
    """Chunk sizes in tokens without end: ``chunk_size`` first, each next as large as the play-out buffer allows.

    The buffer is what the listener has still to hear when a chunk arrives, by the cost model and its error: the next
    chunk may take as long as that. A chunk is never smaller than the first, even where the listener has to wait for
    it, nor larger than ``max_chunk_size``. The sizes depend on the settings, and on how long utterances become, and
    not on the clock, so a stream can be repeated. A text of several utterances goes on with what is left to be heard.
    """

    def __init__(self, settings: StreamSettings) -> None:
        self.first, self.most = settings.chunk_size, settings.max_chunk_size
        self.context, self.fade = settings.context, settings.fade
        self.slow = settings.costs.slower(1 + settings.costs.error)
        self.size = self.said = 0  # tokens of the chunk that is under way, and of those before it
        self.buffer: float | None = None  # seconds; None before anything is heard
        self.held = self.prefill = 0.0  # seconds for the cross-fade, and until an utterance begins

    def __iter__(self) -> Growing:
        return self

    def __next__(self) -> int:
        if self.size:
            self._arrived(self.size, self.fade)
        self.size = self.first if self.buffer is None else self._fitting(self.buffer)
        return self.size

    def _fitting(self, buffer: float) -> int:
        each = self.slow.token + self.slow.window_token
        room = buffer - self.prefill - self.slow.render_seconds(0, min(self.context, self.said))
        fitting = math.floor(room / each + 1e-9) if each else self.most
        return min(self.most, max(self.first, fitting))

    def _arrived(self, new: int, holds: float) -> None:
        took = self.prefill + self.slow.chunk_seconds(new, min(self.context, self.said))
        left = 0.0 if self.buffer is None else max(0.0, self.buffer - took)
        self.buffer = left + new * TOKEN_SECONDS + (self.held - holds)
        self.said, self.held, self.prefill = self.said + new, holds, 0.0

    def ended(self, new: int, silence: float | None) -> None:
        """The chunk under way is an utterance's last, of ``new`` tokens; another one, with its prefill, is next.

        ``silence`` is seconds that follow it; None where the next utterance joins it with a cross-fade.
        """
        self._arrived(new, self.fade if silence is None else 0.0)
        self.buffer += silence or 0.0
        self.size, self.prefill = 0, self.slow.prefill


SCHEDULES: dict[str, Callable[[StreamSettings], Iterator[int]]] = {"fixed": fixed, "grow": Growing}
"""By name: the sizes of a stream's chunks, in tokens and without end; none above ``StreamSettings.largest_chunk``."""
