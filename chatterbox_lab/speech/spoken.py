# ruff: noqa: RUF001 (characters that look alike are meant here)
"""Texts as they come, made speakable: without markup, without what the model's tokenizer does not know.

A model that reads phones was taught letters and phones alone, so digits and signs become words for it, by the numbers
in words of transformers' CLVP, which every Chatterbox brings. Other models get the text as their release would.
"""

from __future__ import annotations

import html
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from ..engine.variants import encode

_UNKNOWN = "[UNK]"  # chatterbox.models.tokenizers.tokenizer.UNK
_LINK = re.compile(r"!?\[([^\]\n]*)\]\(([^()\s]*)(?:\s+\"[^\"]*\")?\)")
_URL = re.compile(r"\bhttps?://(?:[^\s/@]*@)?(?:www\.)?([\w.-]*\w)(?:[/?#:][^\s<>\"')\]]*[^\s<>\"')\].,:;!?…])?/?")
_LINE = re.compile(r"^[ \t]*(?:#{1,6}[ \t]+|>[ \t]?|[-*•+][ \t]+)+", re.MULTILINE)
_RULE = re.compile(r"^[ \t]*(?:[-*_=][ \t]*){3,}$|^```\w*$", re.MULTILINE)
_EMPHASIS = re.compile(r"(?<![\w*_~`])[*_~`]+(?=[^\s*_~`])|(?<=[^\s*_~`])[*_~`]+(?![\w*_~`])|`+|~~+|\*\*+")


def visible(character: str, before: str = "") -> bool:
    """Whether a character is text: no control, no format character such as a zero-width space.

    Joiners of scripts that need them (Arabic, Indic) stay: ``before`` is what they stand after.
    """
    if character in "\u200c\u200d":
        return "\u0590" <= before < "\u2000"
    return unicodedata.category(character) not in ("Cc", "Cf", "Co", "Cn")


def has_words(text: str) -> bool:
    """Whether there is anything to say: a letter or a digit."""
    return any(map(str.isalnum, text))


def cleaned(text: str) -> str:
    """Text without Markdown and entities, its addresses as their host, in one line; tags such as ``[laugh]`` stay."""
    text = _LINK.sub(lambda link: link[1] or link[2], html.unescape(text))
    text = _URL.sub(lambda url: url[1], text)
    for pattern in (_RULE, _LINE, _EMPHASIS):
        text = pattern.sub("", text)
    return " ".join(text.split())


class Wording:
    """What one stream of a model says for a text. It names each character that it drops once, in a warning.

    Args:
        tts: a Chatterbox.
        language: as in `StreamSettings`.
    """

    def __init__(self, tts: Any, language: str | None = None) -> None:
        self.tts, self.language = tts, language
        inner = getattr(tts.tokenizer, "tokenizer", None)
        self.unknown = inner.token_to_id(_UNKNOWN) if hasattr(inner, "token_to_id") else None
        self.phones = reads_phones(tts)
        self.named: set[str] = set()

    def __call__(self, text: str) -> str:
        """The text as it is sent to the model; empty if nothing of it can be said."""
        text = in_words(text) if self.phones else text
        if self.unknown is not None and self._unknown(text):
            found = [one for one in dict.fromkeys(text) if not one.isspace() and self._unknown(one)]
            self._dropped(found)
            text = _without(text, found, str)
            if self._unknown(text):  # not by itself, but together with its neighbours
                words = [word for word in dict.fromkeys(text.split()) if self._unknown(word)]
                self._dropped(words)
                text = _without(text, words, str.split)
        return text if has_words(text) else ""

    def _unknown(self, text: str) -> bool:
        return bool(text.strip()) and self.unknown in encode(self.tts, text, self.language, 1)[0].tolist()

    def _dropped(self, found: Iterable[str]) -> None:
        new = [one for one in found if one not in self.named]
        self.named.update(new)
        if new:
            names = ", ".join(repr(one) for one in new)
            warnings.warn(f"text: the model's tokenizer does not know {names}; dropped", UserWarning, stacklevel=2)


def _without(text: str, dropped: list[str], parts: Callable[[str], Iterable[str]]) -> str:
    kept = (part for part in parts(text) if part not in dropped)
    return " ".join("".join(kept).split()) if parts is str else " ".join(kept)


def reads_phones(tts: Any) -> bool:
    """Whether the tokenizer turns words into something other than their letters, as the lab voice's does."""
    inner = getattr(tts.tokenizer, "tokenizer", None)
    if not hasattr(inner, "encode") or not hasattr(tts.tokenizer, "text_to_tokens"):
        return False
    return not set("".join(inner.encode("the").tokens).lower()) & set("the")


_ORDINALS = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth"}
_ORDINALS |= {"twelve": "twelfth"}
_MONEY = {"$": ("dollar", "cent"), "£": ("pound", "penny"), "€": ("euro", "cent"), "¥": ("yen", "")}
_SCALES = r"(?:\s(hundred|thousand|million|billion|trillion))?\b"
_SIGNS = {"%": "percent", "&": "and", "+": "plus", "=": "equals", "@": "at", "°": "degrees", "#": "number"}
_SIGNS |= {"\u2044": "over"}
_ABBREVIATIONS = {
    "mr": "mister", "mrs": "missis", "ms": "miss", "dr": "doctor", "prof": "professor", "st": "saint", "mt": "mount",
    "jr": "junior", "sr": "senior", "gen": "general", "capt": "captain", "lt": "lieutenant", "sgt": "sergeant",
    "rev": "reverend", "hon": "honorable", "etc": "et cetera", "vs": "versus", "approx": "approximately",
    "dept": "department", "inc": "incorporated", "ltd": "limited", "corp": "corporation", "co": "company",
    "col": "colonel", "e.g": "for example", "i.e": "that is", "a.m": "a m", "p.m": "p m", "ft": "feet",
}  # fmt: skip
_SHORT = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, _ABBREVIATIONS))})\.(?P<end>\s*$)?", re.IGNORECASE)
_INITIALS = re.compile(r"\b(?:[A-Za-z]\.){2,}")


def in_words(text: str) -> str:
    """English with its numbers, money, times, ordinals, signs and usual abbreviations as words, for who reads letters.

    >>> in_words("On the 3rd, at 5:30 p.m., Dr. Smith paid $2.50 in 1999.")
    'On the third, at five thirty p m, doctor Smith paid two dollars and fifty cents in nineteen ninety nine.'
    """
    text = unicodedata.normalize("NFKC", text.replace("…", "...")) if not text.isascii() else text
    text = _SHORT.sub(lambda found: _ABBREVIATIONS[found[1].lower()] + ("." if found["end"] is not None else ""), text)
    text = re.sub(r"\bno\.(?=\s?\d)", "number", text, flags=re.IGNORECASE)
    text = _INITIALS.sub(lambda found: " ".join(found[0].replace(".", " ").split()), text)
    text = re.sub(r"(?<=\d)[,\u202f](?=\d{3}(?!\d))", "", text)
    for pattern, worded in _NUMBERS:
        text = pattern.sub(worded, text)
    for sign, word in _SIGNS.items():
        text = text.replace(sign, f" {word} ")
    text = re.sub(r"(?<=[^\W\d_])\.(?=[^\W\d_])", " dot ", text)
    text = re.sub(r"[\"()\[\]{}<>*_/\\|~^`]", " ", text)
    return re.sub(r"\s+([,.;:!?])", r"\1", " ".join(text.split()))


def _cardinal(digits: str) -> str:
    from transformers.models.clvp.number_normalizer import EnglishNormalizer

    digits = "".join(str(unicodedata.digit(digit, 0)) for digit in digits)
    if len(digits) > 15 or (len(digits) > 1 and digits[0] == "0"):
        return " ".join(map(_cardinal, digits))  # a number of a card or a telephone
    return EnglishNormalizer().number_to_words(int(digits)).replace("-", " ").replace(",", "")


def _ordinal(found: re.Match[str]) -> str:
    *before, final = _cardinal(found[1]).split()
    ending = _ORDINALS.get(final, f"{final[:-1]}ieth" if final.endswith("y") else f"{final}th")
    return " ".join([*before, ending.replace("tth", "th")])


def _money(found: re.Match[str]) -> str:
    (unit, small), whole, part, scale = _MONEY[found[1]], found[2], found[3], found[4]
    if scale:
        return f"{_decimal(whole, part)} {scale} {_plural(unit)}"
    large = f"{_cardinal(whole)} {unit if int(whole) == 1 else _plural(unit)}"
    if not part or not int(part) or not small:
        return large
    few = f"{_cardinal(str(int(part)))} {small if int(part) == 1 else _plural(small)}"
    return few if not int(whole) else f"{large} and {few}"


def _plural(unit: str) -> str:
    return {"yen": "yen", "penny": "pence"}.get(unit, f"{unit}s")


def _time(found: re.Match[str]) -> str:
    minutes = int(found[2])
    small = "" if not minutes and found[3] else "o'clock" if not minutes else _cardinal(str(minutes))
    small = f"oh {small}" if 0 < minutes < 10 else small
    half = f"{found[3].lower()} m" if found[3] else ""
    return " ".join(filter(None, [_cardinal(str(int(found[1]))), small, half]))


def _year(found: re.Match[str]) -> str:
    century, rest = int(found[1][:2]), int(found[1][2:])
    if century == 20 and rest < 10:
        words = _cardinal(found[1])
    elif not rest:
        words = f"{_cardinal(str(century))} hundred"
    else:
        words = f"{_cardinal(str(century))} {'oh ' * (rest < 10)}{_cardinal(str(rest))}"
    return words if not found[2] else f"{words[:-1]}ies" if words.endswith("y") else f"{words}s"


def _range(found: re.Match[str]) -> str:
    if (len(found[1]), len(found[2])) == (3, 4):  # a telephone number
        return " ".join(found[1] + found[2])
    return f"{found[1]} {'to ' * (int(found[1]) < int(found[2]))}{found[2]}"


def _decimal(whole: str, part: str | None) -> str:
    return f"{_cardinal(whole)} point {' '.join(map(_cardinal, part))}" if part else _cardinal(whole)


_NUMBERS: list[tuple[re.Pattern[str], Callable[[re.Match[str]], str]]] = [
    (re.compile(r"\b(\d{1,2}):([0-5]\d)(?:\s?([ap])\.?\s?m\b\.?(?!\w))?", re.IGNORECASE), _time),
    (re.compile(r"([$£€¥])\s?(\d+)(?:\.(\d+))?" + _SCALES), _money),
    (re.compile(r"\b(\d+)(?:st|nd|rd|th)\b", re.IGNORECASE), _ordinal),
    (re.compile(r"(?<![\d-])(\d{1,4})\s?[-–]\s?(\d{1,4})(?![\d-])"), _range),
    (re.compile(r"(?<![\w.,$-])(1[1-9]\d\d|20\d\d)('?s)?(?![\w-]|[.,]\d)"), _year),
    (re.compile(r"(?<=\d)\s?[-–]\s?(?=\d)"), lambda _: " "),
    (re.compile(r"(?<![\w)])[-−](?=\d)"), lambda _: "minus "),
    (re.compile(r"(\d+)((?:\.\d+){2,})"), lambda found: " point ".join(map(_cardinal, found[0].split(".")))),
    (re.compile(r"(\d+)\.(\d+)"), lambda found: f" {_decimal(found[1], found[2])} "),
    (re.compile(r"\d+"), lambda found: f" {_cardinal(found[0])} "),
]
