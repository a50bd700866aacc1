# ruff: noqa: RUF001, E501 (characters that look alike are meant here, tables are wide)
from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import chatterbox_lab as lab
from chatterbox_lab.engine.variants import encode
from chatterbox_lab.speech.spoken import Wording, cleaned, in_words, reads_phones


@pytest.fixture(scope="module")
def trained() -> Any:
    return lab.load("lab", device="cpu")


WORDS = [
    ("3 dogs and 21 cats.", "three dogs and twenty one cats."),
    ("It is 1,234,567 now", "it is one million two hundred thirty four thousand five hundred sixty seven now"),
    ("$2.50, $1, £1.01 and €3 million", "two dollars and fifty cents, one dollar, one pound and one penny and three million euros"),
    ("On the 1st, 2nd, 3rd, 12th, 20th and 101st", "on the first, second, third, twelfth, twentieth and one hundred first"),
    ("at 5:30 p.m. or 7:05 or 9:00", "at five thirty p m or seven oh five or nine o'clock"),
    ("in 1999, 2004, 1905, 2024 and the 1980s", "in nineteen ninety nine, two thousand four, nineteen oh five, twenty twenty four and the nineteen eighties"),
    ("1914-1918, 5 - 10 or 555-1234", "nineteen fourteen to nineteen eighteen, five to ten or five five five one two three four"),
    ("Dr. Smith, Mrs. Jones, e.g. you, etc.", "doctor smith, missis jones, for example you, et cetera."),
    ("No. 5 in the U.S. is 007", "number five in the u s is zero zero seven"),
    ("pi is 3.14, it is 2.0.1", "pi is three point one four, it is two point zero point one"),
    ("5% & -3° @ A4", "five percent and minus three degrees at a four"),
    ("example.com (see it)", "example dot com see it"),
    ("Lt. Smith, Col. Brown and Gen. Lee", "lieutenant smith, colonel brown and general lee"),
    ("¥1, ¥50, £0.01 and £0.20", "one yen, fifty yen, one penny and twenty pence"),
    ("1234567890123456", "one two three four five six seven eight nine zero one two three four five six"),
    ("½ x² ３", "one over two x two three"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), WORDS)
def test_numbers_and_the_like_become_words(text: str, expected: str) -> None:
    assert in_words(text).lower() == expected


@given(st.text(st.sampled_from("0123456789.,:-$£%stndh apm½٣"), max_size=30))
def test_no_digit_is_left(text: str) -> None:
    assert not re.search(r"\d", in_words(text))


CLEAN = [
    ("**Hello** _there_ `code` snake_case 5 * 3", "Hello there code snake_case 5 * 3"),
    ("## A title", "A title"),
    ("- [x](http://a.b) ![pic](c.png)", "x pic"),
    ("at https://www.example.com/a/b?c=d#e, or (http://x.y/).", "at example.com, or (x.y)."),
    ("https://me:secret@example.com/x", "example.com"),
    ("```python\nx = 1\n```", "x = 1"),
    ("> quoted &quot;text&quot;\n> more", 'quoted "text" more'),
    ("[laugh] ~~no~~ __yes__.", "[laugh] no yes."),
]


@pytest.mark.parametrize(("text", "expected"), CLEAN)
def test_markup_is_left_out(text: str, expected: str) -> None:
    assert cleaned(text) == expected


def test_only_a_model_of_phones_gets_numbers_as_words(trained: Any, tts: Any) -> None:
    assert (reads_phones(trained), reads_phones(tts)) == (True, False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Wording(trained)("I have 3.") == "I have three."
        assert Wording(tts)("I have 3.") == "I have 3."


@pytest.mark.parametrize("text", [text for text, _ in WORDS])
def test_nothing_unknown_is_sent_to_the_lab_voice(trained: Any, text: str) -> None:
    inner = trained.tokenizer.tokenizer
    sent = encode(trained, Wording(trained)(text), None, 1)[0, 1:-1].tolist()
    names = [inner.id_to_token(token) for token in sent]
    assert "[UNK]" not in names
    assert not set(names) & set("0123456789")


def test_what_a_tokenizer_does_not_know_is_named_once_and_dropped(tts: Any) -> None:
    wording, unknown = Wording(tts), tts.tokenizer.tokenizer.token_to_id("[UNK]")
    with pytest.warns(UserWarning, match="does not know '你', '好'; dropped") as caught:
        said = wording("Hello 你好, dear 你.")
    assert len(caught) == 1
    assert said == "Hello , dear ."
    assert unknown not in encode(tts, said, None, 1)[0].tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert wording("你 again") == "again"
        assert wording("好 你") == wording("你!") == ""


def test_a_word_that_is_unknown_only_as_a_whole_is_dropped(tts: Any) -> None:
    """A long s by itself is the S that upstream begins every text with."""
    with pytest.warns(UserWarning, match="does not know 'waſ'; dropped"):
        assert Wording(tts)("It waſ so.") == "It so."
