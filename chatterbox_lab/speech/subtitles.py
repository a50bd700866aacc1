# ruff: noqa: RUF001 (characters that look alike are meant here)
"""Subtitles from the words of a stream: SubRip (``.srt``) and WebVTT (``.vtt``).

The numbers are those of Netflix's Timed Text Style Guide (general requirements: at most two lines, 5/6 to 7 seconds a
subtitle; English: 42 characters a line) and of the BBC's Subtitle Guidelines (break at punctuation; a subtitle for each
sentence, short ones together; no gap of less than a second). WebVTT is https://www.w3.org/TR/webvtt1.

No library: pysubs2 and webvtt-py write cues that are there, and neither makes cues of words or writes WebVTT's times
within a cue. What they would spare is the format, a dozen lines here.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import NamedTuple

import nupunkt

from ..engine.clock import Word
from ..engine.settings import whole_number
from ..files import written_whole

LINE = 42
"""Characters of a line at most; a Chinese, Japanese or Korean one counts as two."""
SHORTEST, LONGEST = 5 / 6, 7.0
"""Seconds for which a subtitle is shown, if the next one leaves so many; a single word may last longer."""
PAUSE = 0.7
"""A longer silence ends a subtitle, whatever the sentence does."""
_GAP = 1.0  # seconds: a shorter gap flickers, so that the subtitle stays until the next one
_AHEAD = 200  # words that are shared out: enough for several subtitles, and no more work for a text without stops
SUFFIXES = (".srt", ".vtt")

_CLOSING = "[\"'”’»)\\]」』】）]*$"
_END = re.compile(rf"[.!?…。！？]{_CLOSING}")
_PLAIN_END = re.compile(rf"(?:[a-z]{{3,}}\.|[!?…。！？]){_CLOSING}")
_CLAUSE = re.compile(rf"[,;:.!?…—–，、；：。！？]{_CLOSING}")


class Cue(NamedTuple):
    """One subtitle: when it is shown, in milliseconds, and the words of each of its lines."""

    start: int
    end: int
    lines: tuple[tuple[Word, ...], ...]


def srt(words: Iterable[Word], *, line: int = LINE) -> str:
    """SubRip subtitles of the words of a stream; empty where there are none.

    SubRip has no escapes: a word such as ``<i>`` stays as it is, and players may take it for markup.

    Args:
        words: `StreamMetrics.words`, in the order in which they sound.
        line: characters of a line at most, 10 to 200; a longer word has a line for itself.

    Raises:
        ValueError: a word whose times are not finite, below 0, or before those of the word before it; a bad ``line``.
    """
    blocks = []
    for number, cue in enumerate(cues(words, line), start=1):
        lines = "\n".join(_text(one) for one in cue.lines)
        blocks.append(f"{number}\n{_stamp(cue.start, ',')} --> {_stamp(cue.end, ',')}\n{lines}\n")
    return "\n".join(blocks)


def vtt(words: Iterable[Word], *, line: int = LINE, each_word: bool = False) -> str:
    """WebVTT subtitles of the words of a stream; only the header where there are none.

    Args:
        words: `StreamMetrics.words`, in the order in which they sound.
        line: characters of a line at most, 10 to 200; a longer word has a line for itself.
        each_word: says before each word when it begins, as ``<00:00:01.200>``: a page may mark it (``::cue(:past)``).

    Raises:
        ValueError: as `srt`.
    """
    blocks = ["WEBVTT\n"]
    for cue in cues(words, line):
        lines = "\n".join(_marked(cue)) if each_word else "\n".join(escape(_text(one), False) for one in cue.lines)
        blocks.append(f"{_stamp(cue.start, '.')} --> {_stamp(cue.end, '.')}\n{lines}\n")
    return "\n".join(blocks)


def subtitles(words: Iterable[Word], path: str | Path, *, line: int = LINE, each_word: bool = False) -> None:
    """Writes subtitles, whole or not at all, in UTF-8: SubRip or WebVTT, as the path ends.

    Args:
        words: `StreamMetrics.words` of a stream with ``analyzer="probe"``.
        path: ends in ``.srt`` or ``.vtt``; a file that is there is replaced.
        line: as `srt` has it.
        each_word: as `vtt` has it.

    Raises:
        ValueError: as `srt`; another suffix, a folder that is not there, no words, or ``each_word`` with ``.srt``.
    """
    path = checked_path(path)
    words = list(words)
    if not words:
        raise ValueError("words=[]: must hold words; a stream reads them with analyzer='probe'")
    if path.suffix.lower() == ".vtt":
        text = vtt(words, line=line, each_word=each_word)
    elif each_word:
        raise ValueError(f"each_word=True: must be False for {str(path)!r}, SubRip has no times within a subtitle")
    else:
        text = srt(words, line=line)
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


def checked_path(path: str | Path, name: str = "path") -> Path:
    """Where subtitles can be written. Raises ValueError, with the argument's ``name``, for what is no such place."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{name}={str(path)!r}: must end in {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ValueError(f"{name}={str(path)!r}: there is no folder {str(path.parent)!r}")
    return path


def cues(words: Iterable[Word], line: int = LINE) -> list[Cue]:
    """The words in subtitles, one after the other and never two at once. Raises ValueError as `srt`.

    A subtitle ends with its sentence, unless it would be shown for less than `SHORTEST`, before a pause, and where it
    is full: then at a comma or the like if there is one nearby, else where the rest is shared out evenly.
    """
    line = whole_number("line", line, 10, 200)
    groups = [group for passage in _passages(_checked(words)) for group in _cut(passage, line)]
    found: list[Cue] = []
    for group, after in zip_longest(groups, groups[1:]):
        start = max(_milliseconds(group[0].start), found[-1].end if found else 0)
        next_one = max(_milliseconds(after[0].start), start + 1) if after else None
        found.append(Cue(start, _end(start, _milliseconds(group[-1].end), next_one), _lines(group, line)))
    return found


def _end(start: int, spoken: int, next_one: int | None) -> int:
    """When a subtitle goes, in milliseconds: it is shown long enough to be read, and over gaps that would flicker."""
    end = max(spoken, start + _milliseconds(SHORTEST))
    if next_one is None:
        return end
    if next_one - end < _milliseconds(_GAP):
        end = min(next_one, max(end, start + _milliseconds(LONGEST)))
    return end


def _checked(words: Iterable[Word]) -> list[Word]:
    """The words that can be seen, without white space in them."""
    found, before = [], 0.0
    for number, (word, start, end) in enumerate(words):
        if not (math.isfinite(end) and before <= start <= end):
            allowed = (
                f"must begin at {before:g} s or later, where the word before does, and end later, at a finite time"
            )
            raise ValueError(f"words[{number}]={(word, start, end)}: {allowed}")
        before = start
        if seen := " ".join(word.split()):
            found.append(Word(seen, start, end))
    return found


def _passages(words: Sequence[Word]) -> Iterator[Sequence[Word]]:
    """The words between pauses and ends of sentences; sentences that are over too soon go with the next one."""
    ends = _sentence_ends(words)
    first = 0
    for number in range(1, len(words)):
        paused = words[number].start - words[number - 1].end > PAUSE
        lasted = words[number].start - words[first].start >= SHORTEST
        if paused or (lasted and number in ends):
            yield words[first:number]
            first = number
    if words:
        yield words[first:]


def _sentence_ends(words: Sequence[Word]) -> set[int]:
    """The numbers of the words that begin a sentence. nupunkt knows abbreviations, and takes some words for one."""
    spans = nupunkt.sent_spans(_text(words))
    places = list(accumulate((len(word.word) + 1 for word in words), initial=0))
    begun = {start for start, _ in spans}
    found = set()
    for number in range(1, len(words)):
        before, word = words[number - 1].word, words[number].word
        ends = _PLAIN_END.search(before) or (_END.search(before) and places[number] in begun)
        if ends and not word[0].islower():
            found.add(number)
    return found


def _cut(words: Sequence[Word], line: int) -> Iterator[Sequence[Word]]:
    """A passage in parts that fit into a subtitle each, of about equal length, and rather cut at a clause."""
    while words:
        most = 1
        while most < len(words) and _fits(words[: most + 1], line):
            most += 1
        if most < len(words):
            rest = words[:_AHEAD]
            room = max(_width(rest) / (2 * line), (rest[-1].end - rest[0].start) / LONGEST)
            share = _width(rest) / math.ceil(room)
            most = max(range(1, most + 1), key=lambda n: _clause(words, n, line) - abs(_width(words[:n]) - share))
        yield words[:most]
        words = words[most:]


def _fits(words: Sequence[Word], line: int) -> bool:
    brief = words[-1].end - words[0].start <= LONGEST
    return brief and all(_width(one) <= line for one in _lines(words, line))


def _lines(words: Sequence[Word], line: int) -> tuple[tuple[Word, ...], ...]:
    """One line if they fit, else two: cut at a clause or about evenly, the second rather the longer."""
    if len(words) == 1 or _width(words) <= line:
        return (tuple(words),)

    def badness(n: int) -> tuple[bool, float]:
        upper, lower = _width(words[:n]), _width(words[n:])
        return max(upper, lower) > line, abs(upper - lower) + 0.5 * (upper > lower) - _clause(words, n, line)

    best = min(range(1, len(words)), key=badness)
    return tuple(words[:best]), tuple(words[best:])


def _clause(words: Sequence[Word], number: int, line: int) -> float:
    """How many characters of unevenness a cut after so many words is worth."""
    return line / 2 if _CLAUSE.search(words[number - 1].word) else 0.0


def _width(words: Sequence[Word]) -> int:
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in _text(words))


def _text(words: Iterable[Word]) -> str:
    return " ".join(word.word for word in words)


def _marked(cue: Cue) -> Iterator[str]:
    """The lines of a cue, each word after its time; WebVTT wants these to rise, and to lie within the cue."""
    before = cue.start
    for line in cue.lines:
        parts = []
        for word in line:
            start = _milliseconds(word.start)
            said = before < start < cue.end
            parts.append((f"<{_stamp(start, '.')}>" if said else "") + escape(word.word, False))
            before = start if said else before
        yield " ".join(parts)


def _milliseconds(seconds: float) -> int:
    return round(1000 * seconds)


def _stamp(milliseconds: int, mark: str) -> str:
    """``hours:minutes:seconds`` with three decimals behind the mark."""
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{mark}{rest % 1000:03}"
