# ruff: noqa: RUF001 (characters that look alike are meant here)
from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatterbox_lab.speech.sentences import MOST_PAUSE, Pauses, Utterance, utterances
from chatterbox_lab.speech.spoken import has_words

WORD = "word " * 100
CASES: list[tuple[str, list[str]]] = [
    # abbreviations
    ("Dr. Smith met Mrs. Jones on Monday. They talked.", ["Dr. Smith met Mrs. Jones on Monday.", "They talked."]),
    ("We met at 5 p.m. on Monday. They talked.", ["We met at 5 p.m. on Monday.", "They talked."]),
    ("The U.S. Army is large. It grew.", ["The U.S. Army is large.", "It grew."]),
    ("See e.g. the first one. Or i.e. that one.", ["See e.g. the first one.", "Or i.e. that one."]),
    ("J. K. Rowling wrote it. I read it.", ["J. K. Rowling wrote it.", "I read it."]),
    ("St. Mary's Church is old. So is Mt. Everest.", ["St. Mary's Church is old.", "So is Mt. Everest."]),
    ("It rained, etc. and so on.", ["It rained, etc. and so on."]),
    ("Acme Inc. is very big. Vs. the others.", ["Acme Inc. is very big.", "Vs. the others."]),
    ("Prof. A. B. Miller, Ph.D., came. He spoke.", ["Prof. A. B. Miller, Ph.D., came.", "He spoke."]),
    ("See Fig. 3 and No. 5 here. Right.", ["See Fig. 3 and No. 5 here.", "Right."]),
    (
        "He drove a nice car. Birds fly. I think so. That is it.",
        ["He drove a nice car.", "Birds fly. I think so.", "That is it."],
    ),
    ("About approx. London time. See Dr. No.", ["About approx. London time.", "See Dr. No."]),
    ("We all saw Lt. Smith there. He slept.", ["We all saw Lt. Smith there.", "He slept."]),
    ("They met Lt. Col. Brown and Sgt. Pepper. So.", ["They met Lt. Col. Brown and Sgt. Pepper.", "So."]),
    ("Ask Capt. Cook or Gen. Lee. Or Rev. Green.", ["Ask Capt. Cook or Gen. Lee.", "Or Rev. Green."]),
    ("It was the Hon. James or Cmdr. Ann here. So.", ["It was the Hon. James or Cmdr. Ann here.", "So."]),
    ("She has a Ph.D. She works here.", ["She has a Ph.D.", "She works here."]),
    ("He works at Apple Inc. They pay well.", ["He works at Apple Inc.", "They pay well."]),
    ("J. R. R. Tolkien wrote it. J.R.R. did.", ["J. R. R. Tolkien wrote it.", "J.R.R. did."]),
    ("George W. Bush spoke here. We heard.", ["George W. Bush spoke here.", "We heard."]),
    ("He lives in the U.S. They live here.", ["He lives in the U.S.", "They live here."]),
    ("Bring e.g. Apples or pears. Thanks.", ["Bring e.g. Apples or pears.", "Thanks."]),
    ("The No. 1, cf. Smith et al. (2010), holds.", ["The No. 1, cf. Smith et al. (2010), holds."]),
    ("It is 5 a.m.? No, it is 6 a.m. now.", ["It is 5 a.m.?", "No, it is 6 a.m. now."]),
    ("Vino la Sra. López ayer. Y el Sr. García.", ["Vino la Sra. López ayer.", "Y el Sr. García."]),
    ("Voilà donc Mme. Curie ici. M. Dupont aussi.", ["Voilà donc Mme. Curie ici.", "M. Dupont aussi."]),
    ("Es kamen z.B. Herr Dr. Müller. Gut so.", ["Es kamen z.B. Herr Dr. Müller.", "Gut so."]),
    ("Er kommt am 3. Mai und am 13. Juni. Gut so.", ["Er kommt am 3. Mai und am 13. Juni.", "Gut so."]),
    ("There are just 3. Four are gone.", ["There are just 3.", "Four are gone."]),
    # numbers and names with full stops
    ("He paid $3.50 for it. Then he left.", ["He paid $3.50 for it.", "Then he left."]),
    ("Version 2.0.1 is out. Get it.", ["Version 2.0.1 is out.", "Get it."]),
    ("It ended in 1999. In 2000 it began.", ["It ended in 1999.", "In 2000 it began."]),
    ("Visit www.example.com today. Then call.", ["Visit www.example.com today.", "Then call."]),
    ("See https://a.b/c.d?e=f. Then go home.", ["See a.b.", "Then go home."]),
    ("Hello.This has no space.", ["Hello.This has no space."]),
    # signs that are no tags
    ("If a<b and c>d then stop. Or go on.", ["If a<b and c>d then stop.", "Or go on."]),
    ('A <b class="x">bold</b> claim was made. So there.', ["A bold claim was made.", "So there."]),
    # ellipses and several marks
    ("Well... I don't know. Maybe.", ["Well... I don't know.", "Maybe."]),
    ("Wait… what is that? No!", ["Wait… what is that?", "No!"]),
    ("What do you say?! No way!", ["What do you say?!", "No way!"]),
    # quotes and brackets
    ('"Hello!" he said. "Go away."', ['"Hello!" he said.', '"Go away."']),
    ('He said, "It is late." Then he slept.', ['He said, "It is late."', "Then he slept."]),
    ("He said, “It is late.” Then he slept.", ["He said, “It is late.”", "Then he slept."]),
    ("She asked 'Why?' and left. He stayed.", ["She asked 'Why?' and left.", "He stayed."]),
    ("(It was late that day.) We left.", ["(It was late that day.)", "We left."]),
    # other scripts
    ("今天天气很好！我们去公园吧。你来吗？", ["今天天气很好！", "我们去公园吧。", "你来吗？"]),
    ("他说：“你好吗？”然后走了。", ["他说：“你好吗？”", "然后走了。"]),
    ("今日はいい天気ですね。散歩に行きましょう。", ["今日はいい天気ですね。", "散歩に行きましょう。"]),
    ("圆周率是3.14左右。对吗？", ["圆周率是3.14左右。", "对吗？"]),
    ("यह एक वाक्य है। यह दूसरा है।", ["यह एक वाक्य है।", "यह दूसरा है।"]),
    ("هل أنت بخير؟ نعم أنا بخير.", ["هل أنت بخير؟", "نعم أنا بخير."]),
    ("안녕하세요. 오늘은 날씨가 좋네요.", ["안녕하세요.", "오늘은 날씨가 좋네요."]),
    ("Привет, как дела? Всё очень хорошо.", ["Привет, как дела?", "Всё очень хорошо."]),
    ("¿Cómo estás hoy? ¡Muy bien! Gracias.", ["¿Cómo estás hoy?", "¡Muy bien! Gracias."]),
    # lines
    ("A line that\nis wrapped here. Good day.", ["A line that is wrapped here.", "Good day."]),
    ("No full stop\n\nA paragraph", ["No full stop", "A paragraph"]),
    ("# A title\nSome text here.", ["A title", "Some text here."]),
    ("- apples\n- pears\n* figs", ["apples", "pears", "figs"]),
    ("1. First one here\n2. Second one", ["1. First one here", "2. Second one"]),
    ("One sentence.\r\n\r\n  Another one.", ["One sentence.", "Another one."]),
    # markup and what cannot be seen
    ("He was **very sure.** Then *he left.*", ["He was very sure.", "Then he left."]),
    ("<p>Hello <b>dear</b> world.</p><p>Next one.</p>", ["Hello dear world.", "Next one."]),
    ("He said so. <!-- a note: be brief. --> Then he left.", ["He said so. Then he left."]),
    ("It is very late. <!-- Is it? --> Good night.", ["It is very late.", "Good night."]),
    ("می\u200cخواهم بروم. a\u200db c\u200cd.", ["می\u200cخواهم بروم.", "ab cd."]),
    ("Is a < b, or b <c here? Yes.", ["Is a < b, or b <c here?", "Yes."]),
    ("See [the docs](https://a.b/c) &amp; more.", ["See the docs & more."]),
    ("Zero\u200bwidth \u202aand\x07 bells\ufeff.", ["Zerowidth and bells."]),
    ("Wait [laugh] for me. [sigh] I do.", ["Wait [laugh] for me.", "[sigh] I do."]),
    # short ones are joined to the next
    ("Yes. No. Why not? I think so.", ["Yes. No. Why not?", "I think so."]),
    ("Hi. How are you?", ["Hi. How are you?"]),
    # nothing to say
    ("Hello there. *** ... ", ["Hello there."]),
    (" \n ... --- \n", []),
]


def texts(pieces: Any, **arguments: Any) -> list[str]:
    return [one.text for one in utterances(pieces, **arguments)]


@pytest.mark.parametrize(("text", "expected"), CASES)
def test_text_is_cut_where_sentences_end(text: str, expected: list[str]) -> None:
    assert texts(text) == expected
    assert texts(iter(text)) == expected


def test_a_long_sentence_is_cut_at_its_clauses_else_between_words_else_anywhere() -> None:
    clauses = texts("Here is one, and here is another; " * 4, longest=50)
    assert clauses == ["Here is one, and here is another;"] * 4
    assert (
        texts("One two, three four, five six, seven eight nine ten", longest=40)[0] == "One two, three four, five six,"
    )
    assert (
        texts("One two; three four, five six, seven eight nine ten", longest=40)[0] == "One two; three four, five six,"
    )
    assert texts("One two three; four five, six, seven eight nine ten", longest=40)[0] == "One two three;"
    assert texts("Oh, one two three four five six seven eight nine ten", longest=40)[0] == (
        "Oh, one two three four five six seven"
    )
    assert texts(WORD, longest=50) == ["word " * 9 + "word"] * 10
    assert texts("a" * 130, longest=50) == ["a" * 50, "a" * 50, "a" * 30]
    assert texts("很" * 40, longest=60) == ["很" * 20] * 2  # wide characters count three times
    assert texts("The price, 1,000,000 then, is a lot to pay here.", longest=40)[0] == "The price, 1,000,000 then,"


def test_pauses_follow_the_punctuation() -> None:
    text = f"A sentence here. {'And a clause, ' * 4}here.\n\nA paragraph here."
    found = list(utterances(text, Pauses(sentence=1, clause=2, paragraph=3), longest=40))
    assert [one.pause for one in found] == [1, 2, 3, 0]
    assert [one.last for one in found] == [False] * 3 + [True]
    assert [one.pause for one in utterances(WORD, longest=200)][:-1] == [0, 0]


@pytest.mark.parametrize(
    "text", ["Hello.[pause:0.5]You there.", "Hello. [pause:.5] You there.", "Hello. [PAUSE:0.5s] You there."]
)
def test_a_pause_in_the_text_takes_the_place_of_the_punctuations(text: str) -> None:
    assert list(utterances(iter(text))) == [Utterance("Hello.", 0.5), Utterance("You there.", 0, True)]


def test_a_pause_follows_a_sentence_without_spaces() -> None:
    found = list(utterances(iter("今天天气很好。[pause:1]我们去公园吧。 [pause:2]")))
    assert found == [Utterance("今天天气很好。", 1), Utterance("我们去公园吧。", 2)]
    full = "今" * 12 + "。"  # and the tag is beyond the longest
    assert list(utterances(full + "[pause:1]", longest=40)) == [Utterance(full, 1)]


def test_a_pause_may_stand_anywhere() -> None:
    found = list(utterances("[pause:1]I think[pause:2][pause:3]\n\n[pause:4] so.[pause:5]"))
    assert found == [Utterance("", 1), Utterance("I think", 2), Utterance("", 3), Utterance("", 4), Utterance("so.", 5)]
    assert texts("[pause:x] [pause] here") == ["[pause:x] [pause] here"]


def test_a_pause_without_end_is_refused_after_what_was_complete() -> None:
    found = utterances("It is so. But[pause:61] now")
    assert next(found).text == "It is so."
    with pytest.raises(ValueError, match=r"\[pause:61\]: must be at most 60 seconds"):
        next(found)


@pytest.mark.parametrize("value", [-0.1, MOST_PAUSE + 1, float("nan"), "1", True, None])
def test_a_wrong_pause_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match=r"clause=.*must be a number of seconds from 0 to 60"):
        Pauses(clause=value)


def drawn(text: str, counted: list[str]) -> Iterator[str]:
    for character in text:
        counted.append(character)
        yield character


@pytest.mark.parametrize("text", ["Hello there. How are", "Hello there.\n\nHow ", "你好吗今天？好"])
def test_an_utterance_is_given_once_the_next_has_begun(text: str) -> None:
    counted: list[str] = []
    next(utterances(drawn(text + " are you now? " * 9, counted)))
    assert len(counted) <= len(text)


def test_endless_text_is_drawn_as_needed() -> None:
    for endless in (itertools.repeat("and so on "), itertools.repeat("x"), itertools.repeat("so, ")):
        counted: list[str] = []
        found = utterances(counted.append(piece) or piece for piece in endless)
        for number in range(1, 20):
            assert 0 < len(next(found).text) <= 240
            assert len("".join(counted)) <= 260 * number
    blank: list[str] = []
    found = utterances(blank.append(" ") or " \n" if len(blank) < 10**5 else "Hi. " for _ in itertools.count())
    assert next(found).text.startswith("Hi. Hi.")


def test_a_piece_that_is_no_string_is_refused_when_it_comes() -> None:
    found = utterances(["It is so. ", "But ", 7])
    assert next(found).text == "It is so."
    with pytest.raises(TypeError, match=r"piece 2 is 7, a int: must be a string"):
        next(found)


def test_what_was_complete_is_given_before_an_error() -> None:
    def failing(text: str) -> Iterator[str]:
        yield text
        raise OSError("gone")

    for text, complete in (
        ("It was so. That is it.", 1),
        ("It is all here. Is it?", 2),
        ("It is so. That is", 1),
        ("It is", 0),
    ):
        got: list[Any] = []
        with pytest.raises(OSError, match="gone"):
            got.extend(utterances(failing(text)))
        assert len(got) == complete


PARTS = st.sampled_from(
    [
        *"Ab3.,;:!?…\"'()-*_<>/[]# \n\t",
        "。",
        "你",
        "।",
        "Dr. ",
        "e.g. ",
        "3.5",
        "[pause:1]",
        "[laugh]",
        "<p>",
        "word ",
        "\u200b",
    ]
)


@given(st.lists(PARTS, max_size=120), st.randoms(use_true_random=False))
def test_pieces_of_any_size_give_the_same(parts: list[str], random: Any) -> None:
    text = "".join(parts)
    cuts = sorted(random.choices(range(len(text) + 1), k=5))
    pieces = [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]
    expected = list(utterances(text, longest=40))
    assert list(utterances(pieces, longest=40)) == expected == list(utterances(iter(text), longest=40))


SAID = st.text(st.sampled_from("abcXYZ019äé你。.,;!?…'\n "), min_size=1, max_size=300)


@given(SAID, st.integers(40, 120))
def test_no_letter_is_lost_or_said_twice_and_none_is_too_long(text: str, longest: int) -> None:
    found = texts(text, longest=longest)
    letters = [[letter for letter in one if letter.isalnum()] for one in ("".join(found), text)]
    assert letters[0] == letters[1]
    assert all(has_words(one) and len(one) <= longest for one in found)


@given(st.lists(st.sampled_from(["and", "Then", "so.", "Why?", "yes,", "3.5", "Dr.", "\n\n", "it;"]), max_size=80))
def test_all_words_are_there_in_order(words: list[str]) -> None:
    text = " ".join(words)
    assert " ".join(texts(text, longest=40)).split() == text.split()
