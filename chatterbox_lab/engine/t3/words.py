"""When each word is said: a path through the text over the attention rows of T3's steps, a few tokens behind them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from ..clock import Ended, Word
from ..schedule import TOKEN_SECONDS
from ..variants import punctuated

_LAG = 4
"""Speech tokens after which a step's place in the text is settled. Of the lab voice's words 2 and 12 say the same."""
_LEAP = 3
"""Text tokens that one speech token may go on by: the shortest sounds take less than its 40 ms."""
_LEAP_COST = 0.7
"""For each text token beyond the first, in natural logarithms of attention."""
_FLOOR = 1e-4  # attention below which all is the same: rows have zeros
_SPACE = "[SPACE]"  # chatterbox.models.tokenizers.tokenizer.SPACE


class TextWord(NamedTuple):
    """A word, and where its text tokens are, without the punctuation around it: a half-open range."""

    word: str
    first: int
    end: int


def text_words(tts: Any, text: str, text_tokens: torch.Tensor) -> tuple[TextWord, ...]:
    """The words of a text between spaces, as the model is given them, and their places in its text tokens (rows, S).

    Empty for a tokenizer that keeps no spaces.
    """
    inner = getattr(tts.tokenizer, "tokenizer", None)
    space = inner.token_to_id(_SPACE) if hasattr(inner, "token_to_id") else None
    ids = text_tokens[0].tolist()
    words, groups = punctuated(tts, text).split(), _groups(ids, space)
    if space is None or len(words) != len(groups):
        return ()
    said = [[inner.id_to_token(token) or "" for token in ids[first:end]] for first, end in groups]
    letters = [[number for number, token in enumerate(tokens) if _sounds(token)] for tokens in said]
    found = zip(words, groups, letters, strict=True)
    return tuple(TextWord(word, at + sound[0], at + sound[-1] + 1) for word, (at, _), sound in found if sound)


def _sounds(token: str) -> bool:
    """Whether it is more than punctuation and none of the tokenizer's own, such as ``[en]`` and ``[UNK]``."""
    return any(map(str.isalnum, token)) and not (token.startswith("[") and token.endswith("]"))


def _groups(ids: list[int], space: int | None) -> list[tuple[int, int]]:
    """Half-open ranges of the tokens between spaces; the first token is the start, the last the stop."""
    bounds = [0, *(number for number, token in enumerate(ids) if token == space), len(ids) - 1]
    return [(before + 1, after) for before, after in pairwise(bounds) if after > before + 1]


class Path:
    """The likeliest way through a text that never goes back (Viterbi), with attention for the probabilities.

    Args:
        text_tokens: length of the text in tokens, start and stop included.
    """

    def __init__(self, text_tokens: int) -> None:
        self.scores = np.full(text_tokens, -np.inf)
        self.scores[:2] = 0.0  # the start token, or the first
        self.leaps: deque[np.ndarray] = deque(maxlen=_LAG)
        self.place = 0

    def update(self, row: np.ndarray) -> int:
        """Takes the attention (text tokens,) of one step; the place in the text, `_LAG` steps ago."""
        leaps = np.stack([self._after(leap) for leap in range(_LEAP + 1)])
        best = leaps.argmax(0)
        self.leaps.append(best)
        self.scores = leaps.max(0) + np.log(row + _FLOOR)
        self.scores -= self.scores.max()
        self.place = max(self.place, self.back()[0])
        return self.place

    def _after(self, leap: int) -> np.ndarray:
        before = np.concatenate([np.full(leap, -np.inf), self.scores])[: len(self.scores)]
        return before - _LEAP_COST * max(0, leap - 1)

    def back(self) -> list[int]:
        """The places of the last steps by what is known now, of the oldest unsettled one first."""
        places = [int(self.scores.argmax())]
        for leaps in reversed(self.leaps):
            places.append(places[-1] - int(leaps[places[-1]]))
        return places[::-1]


class Account:
    """What T3 tells of one utterance beside its tokens: its words, one after the other, and how it ended.

    Args:
        words: of the text.
        text_tokens: length of the text in tokens, start and stop included.
        told: gets each `Word` once it has been said.
        begun: seconds of the stream's audio before the utterance.
    """

    def __init__(self, words: Iterable[TextWord], text_tokens: int, told: list[Word], begun: float = 0.0) -> None:
        self.words, self.told, self.begun = deque(words), told, begun
        self.ended: Ended | None = None
        self.reads = bool(self.words)
        self._path = Path(text_tokens)
        self._times: deque[int] = deque(maxlen=_LAG + 1)
        self._started: float | None = None

    def heard(self, row: torch.Tensor, tokens: int) -> None:
        """Takes the attention (text tokens,), on the CPU, of the step that gives the token after so many."""
        self._times.append(tokens)
        place = self._path.update(row.float().numpy())
        if len(self._times) > _LAG:
            self._reached(place, self._times[0])

    def end(self, how: Ended, tokens: int) -> None:
        """The utterance has so many tokens; words that it has not come to are not told. Once is enough."""
        if self.ended is not None:
            return
        self.ended = how
        if not self._times:
            return
        for place, time in zip(self._path.back()[-len(self._times) :], self._times, strict=True):
            self._reached(max(place, self._path.place), min(time, tokens))
        if self._started is not None:
            self._tell(tokens)

    def _reached(self, place: int, tokens: int) -> None:
        while self.words:
            if self._started is None and place >= self.words[0].first:
                self._started = self._seconds(tokens)
            if self._started is None or place < self.words[0].end:
                return
            self._tell(tokens)

    def _tell(self, tokens: int) -> None:
        self.told.append(Word(self.words.popleft().word, self._started, self._seconds(tokens)))
        self._started = None

    def _seconds(self, tokens: int) -> float:
        return round(self.begun + tokens * TOKEN_SECONDS, 3)
