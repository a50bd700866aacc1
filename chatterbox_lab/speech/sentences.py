# ruff: noqa: RUF001 (characters that look alike are meant here)
"""Text that arrives in any pieces, cut into utterances.

nupunkt says whether a full stop ends a sentence: MIT, pure Python, half a megabyte, nothing beneath it, 0.8 of 2026. It
was made from legal texts and takes many a word for an abbreviation ("a car. Birds"), so an ordinary word is not asked
about. sentencex is 4 MB of compiled Rust and cuts after "Ms." and "Vol."; pysbd, last released in 2021, after "cf."
and "p.m."; wtpsplit-lite needs onnxruntime and a model from a network, ICU a C library, blingfire has 42 MB.

Text is taken a character at a time, so where it is cut depends on the text alone and not on how it arrived.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

import nupunkt

from .spoken import cleaned, has_words, visible

LONGEST = 240
"""Characters of an utterance at most: about 16 s of speech, far from the 40 s after which T3 stops or strays."""
SHORTEST = 12
"""A sentence of fewer characters is joined to the next one: T3 is unsure where a text of one word ends."""
MOST_PAUSE = 60.0
"""Seconds of one pause at most, so that no text can ask for memory without end."""
_WIDE = 3  # a Chinese, Japanese or Korean character is about a syllable or two, three letters

_CLOSING = "[\"'”’»)\\]*_`]*"
_FOREIGN = "。！？｡।॥؟۔።។။։"
_FOREIGN_CLOSING = "[\"'”’»）)」』》】]*"
_LINE_END = r"(?<=\S)(?=\s?\n)"
_END = re.compile(rf"[.!?…]+{_CLOSING}(?=\s)|[{_FOREIGN}！？…]*[{_FOREIGN}]+{_FOREIGN_CLOSING}|{_LINE_END}")
"""Where a sentence may end. Terminators of scripts that write no spaces always end one."""
_ENDED = re.compile(rf"(?:[.!?…]+{_CLOSING}|[{_FOREIGN}…]+{_FOREIGN_CLOSING})$")
_CLAUSE = re.compile(
    rf"(?:[,;:—–!?،…]|(?<=[^\W\d_]{{4}})\.){_CLOSING}(?=\s)|[、，；：]{_FOREIGN_CLOSING}|\s[-—–](?=\s)|[—–](?=\w)"
)
_STRONG = ".;:!?—–；："
"""Where a long sentence is rather cut than at a comma."""
_WORD_ENDS = re.compile(r"\s|[\u3000-\u9fff\uac00-\ud7af\uff00-\uffef]|.{32}", re.DOTALL)
"""The first word of a sentence is there: what follows cannot change whether another sentence ended before it."""
_ORDINARY = re.compile(
    rf"(?<![^\s\"'“‘(*_-])([a-z]{{3,}}|a[mnst]|b[ey]|do|go|he|i[fnst]|m[ey]|no|o[fnr]|so|to|u[ps]|we)\.{_CLOSING}$"
)
_SHORTENED = (
    "approx apt assoc capt col corp dept eds esp est etc excl ext fig figs gen gov hon inc incl ltd max min misc op "
    "pres prof rep resp rev sec sen tel trans univ vol vols"
)
"""Lower-case words that a full stop may follow within a sentence, also before a capital."""
_NEVER_ENDS = re.compile(
    r"(?<!\w)(?:Capt|Cmdr|Col|Dña|Dra|Gen|Gral|Hon|Lt|Mlle|Mme|Msgr|Rev|Sgt|Sra|bzw|d\.\s?h|p\.\s?ej|z\.\s?B|ул)\.$"
)
"""Titles, of which nupunkt knows most in English, and what goes on in other languages: nouns are capitalised there."""
_DATE = re.compile(r"\b\d{1,2}\. (?:Jan|Feb|März|Apr|Mai|Juni|Juli|Aug|Sept|Okt|Nov|Dez)")
"""As in "am 3. Mai", German; a sentence that ends in a day and another that begins with a month are rarer."""
_PAUSE = re.compile(r"\[pause:(\d*\.?\d+|\d+\.)s?\]$", re.IGNORECASE)
_TAG_BEGUN = re.compile(r"\[[^\s\]]{0,15}$")
_ATTRIBUTE = r"\s+[\w:-]+=(?:\"[^\"<>]*\"|'[^'<>]*'|[^\s<>\"']+)"
_HTML = re.compile(rf"</?([A-Za-z][A-Za-z0-9]*)(?:{_ATTRIBUTE})*\s*/?>$|<!--[^<>]*-->$")
_BLOCKS = "address article blockquote br dd div dl dt h1 h2 h3 h4 h5 h6 hr li ol p pre td th tr ul"
_MARKER = re.compile(r"(?:[-*•+]|\d{1,3}[.)]|#{1,6})\s")
_HEADING = re.compile(r"#{1,6}\s[^\n]*$")


@dataclass(frozen=True)
class Pauses:
    """Seconds of silence after an utterance, by how it ends; 0 to 60. ``[pause:0.5]`` in a text takes their place.

    Args:
        sentence: after a sentence, a heading, an item of a list.
        clause: where a long sentence was cut at a comma or the like; none where it had to be cut between words.
        paragraph: before a blank line.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """

    sentence: float = 0.2
    clause: float = 0.05
    paragraph: float = 0.5

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not 0 <= value <= MOST_PAUSE:
                raise ValueError(f"{field.name}={value!r}: must be a number of seconds from 0 to {MOST_PAUSE:g}")


@dataclass(frozen=True)
class Utterance:
    """What is spoken in one go, and the seconds of silence after it; the text is empty for a pause alone."""

    text: str
    pause: float = 0.0
    last: bool = False


def utterances(
    pieces: str | Iterable[str], pauses: Pauses | None = None, longest: int = LONGEST
) -> Iterator[Utterance]:
    """The utterances of a text, each as soon as no later text can change it.

    That is when the first word of the next sentence is there, or the end of the text. No more of the text is drawn or
    kept than that takes, at most ``longest`` characters and a word.

    Args:
        pieces: the text, or parts of it in any sizes, such as a language model's tokens.
        pauses: seconds of silence by punctuation; None is `Pauses` as it is.
        longest: characters of an utterance at most; a Chinese, Japanese or Korean one counts as three.

    Raises:
        TypeError: a piece that is no string.
        ValueError: half of a surrogate pair, or a pause that is too long. As with any error of the pieces' own, what
            was complete before it is given first.
    """
    cutter = _Cutter(Pauses() if pauses is None else pauses, longest)
    failed: Exception | None = None
    try:
        for number, piece in enumerate([pieces] if isinstance(pieces, str) else pieces):
            if not isinstance(piece, str):
                raise TypeError(f"text: piece {number} is {piece!r:.80}, a {type(piece).__name__}: must be a string")
            for character in piece:
                yield from cutter.take(character)
    except Exception as error:
        failed = error
    yield from cutter.end(whole=failed is None)
    if failed is not None:
        raise failed


class _Cutter:
    """The text that is not given out yet, how far it was searched for a sentence's end, and where a short one ended."""

    def __init__(self, pauses: Pauses, longest: int) -> None:
        self.pauses, self.longest = pauses, longest
        self.text, self.size, self.seen, self.short = "", 0, 0, 0

    def take(self, character: str) -> Iterator[Utterance]:
        """One character more of the text, and the utterances that it settles."""
        if not self._added(character):
            return
        if character == "]" and (pause := _PAUSE.search(self.text)):
            self._keep(self.text[: pause.start()])
            yield from self._paused(pause)
        elif character == ">" and (tag := _HTML.search(self.text)):
            block = (tag[1] or "-").lower() in _BLOCKS.split()
            before = self.text[: tag.start()]
            self._keep(f"{before.rstrip()}\n\n" if block and before.strip() else before)
        if self.size > self.longest or (self.text and _WORD_ENDS.match(self.text[-1])):
            yield from self._settled()

    def _added(self, character: str) -> bool:
        """Runs of white space become one space, or one or two ends of line: there is no end of them otherwise."""
        if character.isspace():
            if not self.text or (character == "\n" and self.text.endswith("\n\n")):
                return False
            if character != "\n":
                if self.text[-1].isspace():
                    return False
                character = " "
        elif not visible(character, self.text[-1:]):
            return False
        self.text += character
        self.size += _width(character)
        return True

    def _keep(self, text: str) -> None:
        self.text, self.size = text, sum(map(_width, text))
        self.seen, self.short = min(self.seen, len(text)), min(self.short, len(text))

    def _paused(self, pause: re.Match[str]) -> Iterator[Utterance]:
        seconds = float(pause[1])
        if seconds > MOST_PAUSE:
            raise ValueError(f"text: {pause[0]}: must be at most {MOST_PAUSE:g} seconds")
        *before, final = [Utterance(""), *self._rest()]
        yield from (one for one in before if one.text)
        yield Utterance(final.text, seconds)

    def end(self, whole: bool = True) -> Iterator[Utterance]:
        """What is left; without ``whole`` only the sentences that are complete."""
        if not whole:
            yield from self._settled(final=True)
            if not _ENDED.search(self.text.rstrip()):
                self._keep(self.text[: self.short])
        yield from self._rest()

    def _rest(self) -> Iterator[Utterance]:
        yield from self._settled(final=True)
        rest = cleaned(self.text)
        self._keep("")
        if has_words(rest):
            yield Utterance(rest, last=True)

    def _settled(self, final: bool = False) -> Iterator[Utterance]:
        """The utterances that no later text can change; with ``final`` none will come."""
        while True:
            cut = self._sentence(final)
            if cut is None and self.size > self.longest:
                cut = self._clause()
            if not cut:
                return
            end, pause = cut
            text = cleaned(self.text[:end])
            self.seen = self.short = 0
            self._keep(self.text[end:].lstrip())
            if has_words(text):
                yield Utterance(text, pause)

    def _sentence(self, final: bool) -> tuple[int, float] | tuple[()] | None:
        """Where the first sentence ends, and the pause after it; () while that is not settled, None without an end."""
        for found in _END.finditer(self.text, self.seen):
            rest = self.text[found.end() :].lstrip()
            if not rest:
                return None if final else ()
            if not final and not _settles(found[0], rest):
                return ()
            gap = self.text[found.end() : len(self.text) - len(rest)]
            broken = self._breaks(found.end(), gap, rest)
            ends = broken or (found[0] and self._ends(found, rest))
            if ends and (broken or sum(map(_width, self.text[: found.end()])) >= SHORTEST):
                return found.end(), self.pauses.paragraph if "\n\n" in gap else self.pauses.sentence
            self.seen, self.short = found.end(), found.end() if ends else self.short
        return None

    def _breaks(self, end: int, gap: str, rest: str) -> bool:
        """Whether a line ends here that does not go on in the next."""
        listed = _MARKER.match(rest) or _HEADING.search(self.text[:end].rpartition("\n")[2])
        return "\n\n" in gap or ("\n" in gap and listed is not None)

    def _ends(self, found: re.Match[str], rest: str) -> bool:
        if any(mark in _FOREIGN for mark in found[0]):
            return True
        said = re.sub(r"[*_`]", "", " ".join(self.text[: found.end()].split()))
        word = next(iter(re.sub(r"^[*_`\s]+|^\[\w+\]", " ", rest).split()), "The")  # a tag may begin any sentence
        if _NEVER_ENDS.search(said) or _DATE.search(f"{said[-4:]} {word}"):
            return False
        plain = _ORDINARY.search(said)
        if plain and plain[1] not in _SHORTENED.split() and word.lstrip("\"'“‘(")[:1].isupper():
            return True
        spans = nupunkt.sent_spans(f"{said} {word}")
        return any(len(said) <= end <= len(said) + 1 for _, end in spans[:-1])

    def _clause(self) -> tuple[int, float]:
        """Where a sentence that is too long is cut: at its last clause, else between words, else anywhere."""
        most = self._fitting()
        least = most // 3
        clauses = [found for found in _CLAUSE.finditer(self.text, least, most + 1) if found.end() <= most]
        strong = [found for found in clauses if found[0].strip()[0] in _STRONG]
        if clauses:
            return (strong or clauses)[-1].end(), self.pauses.clause
        space = max(self.text.rfind(" ", least, most + 1), self.text.rfind("\n", least, most + 1))
        return (space if space > 0 else most), 0.0

    def _fitting(self) -> int:
        """How many characters of the text are ``longest`` in size, at most."""
        size = 0
        for number, character in enumerate(self.text):
            size += _width(character)
            if size > self.longest:
                return number
        return len(self.text)


def _settles(end: str, rest: str) -> bool:
    """Whether what follows an end shows enough of itself: a character where there are no spaces, else a word."""
    if _TAG_BEGUN.match(rest):  # it may become a pause
        return False
    return any(mark in _FOREIGN for mark in end) or _WORD_ENDS.search(rest) is not None


def _width(character: str) -> int:
    return _WIDE if unicodedata.east_asian_width(character) in "WF" else 1
