"""What the alignment of speech to text says about a stream, from the attention rows it is given.

Most rules are those of the analyzers of chatterbox-streaming 0.1.2, where they are present but never called, and of
chatterbox-tts 0.1.7 (``alignment_stream_analyzer.py``); the cap, the trimming and what is early are ours. `rules` has
the thresholds.
Sums are kept instead of the whole alignment matrix, so a step costs the same however long the stream.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from .rules import FORK, Rules

# Thresholds and spans of upstream's analyzer, which gives no source for them.
_JUMP_BACK, _JUMP_AHEAD = -4, 7  # text tokens that the position may move by, both excluded
_LAST_WORDS = 3  # text tokens that count as the end: the stop token itself is seldom attended to
_BACK = 3  # text tokens before these that speech has to look back to, to be taken for more than its last sound
LAST_SOUND = 2
"""Speech tokens, 80 ms, that are heard in any case after the speech has left the end of its text."""
MOST_HELD = 25
"""Speech tokens, a second, for which speech may look back before the guard ends it."""
_STOP_LOGIT = 2.0**15  # outweighs any logit and fits every 16-bit float


@dataclass(frozen=True)
class Alignment:
    """The state after one step; ``stop`` is what the guard would do to the stop token."""

    position: int
    started: bool
    complete: bool
    discontinuity: bool
    long_tail: bool
    repetition: bool
    equal_tokens: bool
    trailing: bool
    stop: Literal["force", "suppress"] | None


class AlignmentTracker:
    """Follows where in the text the speech is.

    Args:
        text_tokens: length of the text in tokens, start and stop included.
        rules: when to act.
    """

    def __init__(self, text_tokens: int, rules: Rules = FORK) -> None:
        self.text_tokens, self.rules = text_tokens, rules
        self._last, self._equal = -1, 0  # the token said last, and how often in a row
        self.steps = 0
        self.position = 0
        self.started = self.complete = False
        self._before: torch.Tensor | None = None  # the last row of the step before
        self._beginning = 0.0  # strongest attention so far to the first four text tokens
        self._tail = torch.zeros(_LAST_WORDS)  # attention to the last text tokens since completion
        self._repeated = 0.0  # attention to earlier text since completion

    def update(self, rows: torch.Tensor, token: int | None = None) -> Alignment:
        """Takes the attention rows (n, text tokens) of one step, after a token was said, and says what they mean.

        The first step has two rows, because the start token is fed twice; every later one has one.
        """
        rows = rows.detach().float().cpu().clone()
        rows[:, self.steps + 1 :] = 0  # speech cannot be further in the text than it is long
        attended = int(rows[-1].argmax())
        discontinuity = not _JUMP_BACK < attended - self.position < _JUMP_AHEAD
        if not discontinuity:
            self.position = attended
        self._notice_start(rows)
        self._notice_end(rows)
        self.steps += 1
        self._equal = self._equal + 1 if token is not None and token == self._last else 1
        self._last = -1 if token is None else token
        rules, suppressed = self.rules, attended < self._end and self._early()
        long_tail = self.complete and float(self._tail.max()) >= rules.long_tail
        repetition = self.complete and self._repeated > rules.repetition
        equal = self._equal >= rules.equal_tokens
        stop = "force" if long_tail or repetition or equal else "suppress" if suppressed else None
        trailing = self.complete and attended < self._end - _BACK
        found = self.position, self.started, self.complete, discontinuity, long_tail, repetition, equal
        return Alignment(*found, trailing, stop)

    def _early(self) -> bool:
        """Whether a stop would come early, by how much was said, in a text that is long enough to tell."""
        length = self.text_tokens
        return length > self.rules.shortest and self.steps <= self.rules.early * length

    @property
    def _end(self) -> int:
        return self.text_tokens - _LAST_WORDS

    def _notice_start(self, rows: torch.Tensor) -> None:
        last_two = rows if self._before is None else torch.cat([self._before, rows])
        self._before = rows[-1:]
        self._beginning = max(self._beginning, float(rows[:, :4].max()))
        hallucinated = float(last_two[-2:, -2:].max()) > 0.1
        self.started = self.started or not (hallucinated or self._beginning < 0.5)

    def _notice_end(self, rows: torch.Tensor) -> None:
        if self.complete:  # the step that completes does not count yet
            self._tail += rows[:, -_LAST_WORDS:].sum(0)
            earlier = rows[:, :-5]
            self._repeated += float(earlier.max(1).values.sum()) if earlier.shape[1] else 0.0
        self.complete = self.complete or self.position >= self._end


class Guard:
    """Leads one utterance to its end by the alignment: holds T3 back from stopping early, and from going on.

    Args:
        text_tokens: length of the text in tokens, start and stop included.
        rules: when to act.
        acts: or only looks on.
    """

    def __init__(self, text_tokens: int, rules: Rules, acts: bool) -> None:
        self.tracker, self.rules, self.acts = AlignmentTracker(text_tokens, rules), rules, acts
        self.forces = self.trailing = False
        self.most = rules.most(text_tokens) if acts else math.inf
        """Speech tokens of the utterance at most."""

    def led(self, logits: torch.Tensor, rows: torch.Tensor, token: int, stop_token: int) -> torch.Tensor:
        """The logits (..., V) of the step with these attention rows, after this token, as the guard wants them."""
        alignment = self.tracker.update(rows, token)
        if not self.acts:
            return logits
        self.forces = alignment.stop == "force"
        self.trailing = self.rules.trims and alignment.trailing
        return guard_logits(logits.float(), alignment, stop_token)


def guard_logits(logits: torch.Tensor, alignment: Alignment, stop_token: int) -> torch.Tensor:
    """Logits (..., V) with the stop token forced or suppressed as ``alignment.stop`` says.

    Upstream would apply both when speech repeats early text after completion, which levels all logits and samples a
    random token; here forcing wins.
    """
    if alignment.stop == "force":
        logits = torch.full_like(logits, -_STOP_LOGIT)
        logits[..., stop_token] = _STOP_LOGIT
    elif alignment.stop == "suppress":
        logits = logits.clone()
        logits[..., stop_token] = -_STOP_LOGIT
    return logits
