# ruff: noqa: RUF001 (characters that look alike are meant here)
"""Subtitles of made-up words: when they are shown, how they are broken, and that nothing of them is lost."""

from __future__ import annotations

import itertools
import math
import re
from html import unescape
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

import chatterbox_lab as lab
from chatterbox_lab.engine.clock import Word
from chatterbox_lab.speech.subtitles import LINE, LONGEST, PAUSE, SHORTEST, srt, subtitles, vtt


class Shown(NamedTuple):
    """A subtitle as a player reads it: seconds, lines, and the seconds that stand before words."""

    start: float
    end: float
    lines: list[str]
    marks: list[float]


def read(text: str) -> list[Shown]:
    """The subtitles of a SubRip or WebVTT file."""
    web = text.startswith("WEBVTT\n")
    blocks = [block.split("\n") for block in text.strip("\n").split("\n\n") if block]
    found = []
    for number, block in enumerate(blocks[1:] if web else blocks, start=1):
        if not web:
            assert block.pop(0) == str(number)
        start, end = (seconds(stamp, "." if web else ",") for stamp in block[0].split(" --> "))
        marks = [seconds(stamp, ".") for line in block[1:] for stamp in re.findall("<(.*?)>", line)] if web else []
        lines = [unescape(re.sub("<.*?>", "", line)) for line in block[1:]] if web else block[1:]
        found.append(Shown(start, end, lines, marks))
    return found


def seconds(stamp: str, mark: str) -> float:
    hours, minutes, rest = re.fullmatch(rf"(\d\d+):(\d\d):(\d\d{re.escape(mark)}\d\d\d)", stamp).groups()
    assert int(minutes) < 60
    assert float(rest.replace(mark, ".")) < 60
    return int(hours) * 3600 + int(minutes) * 60 + float(rest.replace(mark, "."))


def spoken(text: str, pace: float = 0.08, pause: float = 0.2, begin: float = 0.0) -> list[Word]:
    """Words that take ``pace`` seconds a letter, and a pause after each sentence."""
    words = []
    for word in text.split():
        words.append(Word(word, begin, begin + pace * len(word)))
        begin = words[-1].end + pause * word.endswith((".", "!", "?"))
    return words


def lines(text: str, **how: Any) -> list[list[str]]:
    return [one.lines for one in read(srt(spoken(text, **how)))]


def test_subrip_has_numbers_commas_and_hours() -> None:
    words = [Word("Good", 3661.5, 3662.0), Word("morning.", 3662.0, 3662.75), Word("Bye.", 3700.0, 3702.0004)]
    assert srt(words) == ("1\n01:01:01,500 --> 01:01:02,750\nGood morning.\n\n2\n01:01:40,000 --> 01:01:42,000\nBye.\n")


def test_webvtt_has_a_header_dots_and_escapes() -> None:
    words = [Word("<b>", 0.0, 1.0), Word("AT&T", 1.0, 1.5), Word("-->", 359999.0, 359999.9996)]
    assert vtt(words) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\n&lt;b&gt; AT&amp;T\n\n99:59:59.000 --> 100:00:00.000\n--&gt;\n"
    )
    assert "<b> AT&T" in srt(words)  # which has no escapes


def test_words_are_marked_within_a_subtitle_where_it_may_say_so() -> None:
    words = [Word("It", 1.0, 1.2), Word("is", 1.2, 1.2), Word("<so>", 1.2, 2.0), Word("late.", 2.0, 2.5)]
    assert vtt(words, each_word=True) == (
        "WEBVTT\n\n00:00:01.000 --> 00:00:02.500\n"
        "It <00:00:01.200>is &lt;so&gt; <00:00:02.000>late.\n"  # none twice, and none where the subtitle begins
    )


def test_a_subtitle_ends_with_its_sentence() -> None:
    said = 'Mr. Brown came home late. "Who is there?" he asked. Nobody saw e.g. J. Smith in a car. What now? he said.'
    assert lines(said) == [
        ["Mr. Brown came home late."],
        ['"Who is there?" he asked.'],
        ["Nobody saw e.g. J. Smith in a car."],
        ["What now? he said."],
    ]


def test_a_sentence_that_is_over_too_soon_goes_with_the_next() -> None:
    assert lines("Yes. Oh yes. Never again will I do that.", pace=0.05, pause=0) == [
        ["Yes. Oh yes. Never again will I do that."]
    ]
    assert lines("Yes. Oh yes. Never again will I do that.", pace=0.05, pause=1) == [
        ["Yes."],
        ["Oh yes."],
        ["Never again will I do that."],
    ]


def test_a_long_sentence_is_cut_at_a_clause_and_its_lines_too() -> None:
    said = "When the rain had stopped at last, which was late in the day, we went out, and nobody else was to be seen."
    assert lines(said, pace=0.05) == [
        ["When the rain had stopped at last,", "which was late in the day,"],
        ["we went out,", "and nobody else was to be seen."],
    ]


def test_no_line_is_too_long_for_the_sake_of_a_clause() -> None:
    said = "The old man who lived by the well, had a dog that barked when anyone came near it."
    assert lines(said, pace=0.05) == [
        ["The old man who lived by the well, had a", "dog that barked when anyone came near it."]
    ]


def test_without_clauses_the_rest_is_shared_out_evenly() -> None:
    found = lines("word " * 20, pace=0.01)  # 99 characters, of which 84 would fit
    assert [len(" ".join(one)) for one in found] == [49, 49]


def test_no_subtitle_lasts_longer_than_seven_seconds_but_for_a_single_word() -> None:
    found = read(srt([Word("so", number, number + 1.0) for number in range(20)]))
    assert [len(one.lines[0].split()) for one in found] == [7, 7, 6]
    assert [one.end - one.start for one in read(srt([Word("Sooo.", 0, 9), Word("Yes.", 9, 10)]))] == [9, 1]


def test_a_pause_ends_a_subtitle_and_a_gap_that_would_flicker_is_filled() -> None:
    def of(silence: float) -> list[tuple[float, float]]:
        words = [Word("Wait", 0, 2), Word("here.", 2 + silence, 4)]
        return [(one.start, one.end) for one in read(srt(words))]

    assert of(PAUSE - 0.01) == [(0, 4)]
    assert of(0.9) == [(0, 2.9), (2.9, 4)]
    assert of(1.5) == [(0, 2), (3.5, 4.333)]  # and the last is shown as long as it takes to read


def test_a_chinese_character_takes_two_places() -> None:
    words = [Word("早上好，", number, number + 1.0) for number in range(6)]
    assert [len(line) for one in read(srt(words)) for line in one.lines] == [14, 14]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([Word("a", -0.1, 1)], r"words\[0\]=\('a', -0.1, 1\): must begin at 0 s or later"),
        ([Word("a", 1, 2), Word("b", 0.5, 2)], r"words\[1\]=\('b', 0.5, 2\): must begin at 1 s or later"),
        ([Word("a", 1, 0.5)], r"words\[0\]="),
        ([Word("a", math.nan, 1)], r"words\[0\]="),
        ([Word("a", 0, math.inf)], r"words\[0\]="),
    ],
)
def test_words_out_of_turn_are_refused(words: list[Word], message: str) -> None:
    for write in (srt, vtt):
        with pytest.raises(ValueError, match=message):
            write(words)


@pytest.mark.parametrize("line", [9, 201, 42.5, True])
def test_a_line_that_nobody_can_read_is_refused(line: Any) -> None:
    with pytest.raises(ValueError, match="line="):
        srt([], line=line)


def test_no_words_are_no_subtitles() -> None:
    assert srt([]) == ""
    assert vtt([Word(" ", 0, 1)]) == "WEBVTT\n"


def test_a_file_is_written_by_its_suffix_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = spoken("“Où est-il?” <he> asked.")
    lab.subtitles(iter(words), str(tmp_path / "a.srt"))
    lab.subtitles(words, tmp_path / "a.VTT", each_word=True, line=20)
    assert (tmp_path / "a.srt").read_bytes().decode() == srt(words)
    assert (tmp_path / "a.VTT").read_bytes().decode() == vtt(words, each_word=True, line=20)

    def full(self: Path, text: str, **_: Any) -> None:
        self.write_bytes(b"1")
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="full"):
        subtitles(words[:1], tmp_path / "a.srt")
    assert (tmp_path / "a.srt").read_bytes().decode() == srt(words)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.VTT", "a.srt"]


@pytest.mark.parametrize(
    ("words", "name", "how", "message"),
    [
        (["a"], "a.ass", {}, r"path='a.ass': must end in .srt or .vtt"),
        (["a"], "no/a.srt", {}, "path='no/a.srt': there is no folder 'no'"),
        ([], "a.srt", {}, "words=.*analyzer='probe'"),
        (["a"], "a.srt", {"each_word": True}, "each_word=True: must be False for 'a.srt'"),
    ],
)
def test_what_cannot_be_written_is_refused(
    words: list[str], name: str, how: dict[str, bool], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        subtitles([Word(word, 0, 1) for word in words], name, **how)
    assert not list(tmp_path.iterdir())


LETTERS = "aBé.,?!;-&<>'\"1早。"
WORDS = st.text(st.sampled_from(LETTERS), min_size=1, max_size=60)
TIMES = st.floats(0, 3, allow_nan=False)


@st.composite
def streams(draw: st.DrawFn) -> list[Word]:
    """Words in turn, some without length, some silence between some."""
    now, words = draw(st.floats(0, 5000)), []
    for word, silence, length in draw(
        st.lists(st.tuples(WORDS, TIMES | st.just(0.0), TIMES | st.just(0.0)), max_size=40)
    ):
        words.append(Word(word, now + silence, now + silence + length))
        now = words[-1].end
    return words


@given(streams(), st.integers(10, 80), st.sampled_from(["srt", "vtt", "each"]))
def test_every_word_is_shown_once_in_turn_and_when_it_sounds(words: list[Word], line: int, kind: str) -> None:
    text = srt(words, line=line) if kind == "srt" else vtt(words, line=line, each_word=kind == "each")
    found = read(text)
    assert " ".join(text for one in found for text in one.lines) == " ".join(word.word for word in words)
    for one, after in itertools.pairwise(found):
        assert one.end <= after.start
    number = 0
    for one in found:
        mine = words[number : number + sum(len(text.split()) for text in one.lines)]
        number += len(mine)
        assert one.start < one.end
        assert one.start >= mine[0].start - 0.001
        assert len(one.lines) <= 2
        alone = len(mine) == 1
        assert alone or all(columns(text) <= line for text in one.lines)
        assert alone or one.end - one.start <= LONGEST + 0.002
        assert all(one.start < mark < one.end for mark in one.marks)
        assert one.marks == sorted(set(one.marks))
        assert not any(b.start - a.end > PAUSE for a, b in itertools.pairwise(mine))


def columns(text: str) -> int:
    return sum(2 if letter in "早。" else 1 for letter in text)


@given(streams())
def test_what_there_is_time_for_can_be_read(words: list[Word]) -> None:
    found = read(srt(words))
    for one, after in itertools.zip_longest(found, found[1:]):
        room = after.start - one.start if after else math.inf
        assert one.end - one.start >= min(room, SHORTEST) - 0.002
        assert after is None or after.start - one.end < 0.0005 or after.start - one.end >= 0.998 or room > LONGEST
    assert LINE == 42
