"""When each word is said, as T3's attention to the text tells it."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import chatterbox_lab as lab
from chatterbox_lab.engine.t3 import eager
from chatterbox_lab.engine.t3.words import _LAG, Account, Path, TextWord, text_words
from chatterbox_lab.engine.variants import encode

SAID = "Well, the old man - he slowly walked home."
PROBE = {"analyzer": "probe", "seed": 3, "max_new_tokens": 40, "ignore_eos": True, "chunk_size": 10}


def walk(durations: list[int], noise: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows (steps, text tokens) of attention that stays so many steps on each token, and where it is."""
    places = np.repeat(np.arange(len(durations)), durations)
    rows = (
        np.full((len(places), len(durations)), 0.02)
        + np.random.default_rng(seed).random((len(places), len(durations))) * noise
    )
    rows[np.arange(len(places)), places] += 1.0
    return rows / rows.sum(1, keepdims=True), places


def settled(rows: np.ndarray) -> list[int]:
    """The place of every step, as it is settled."""
    path = Path(rows.shape[1])
    found = [path.update(row) for row in rows][_LAG:]
    return found + [max(place, path.place) for place in path.back()][-min(_LAG, len(rows)) :]


@given(st.lists(st.integers(1, 6), min_size=2, max_size=12), st.integers(0, 5))
def test_the_path_is_where_the_attention_is(durations: list[int], seed: int) -> None:
    rows, places = walk(durations, noise=0.3, seed=seed)
    assert settled(rows) == places.tolist()


@given(st.integers(2, 9), st.integers(1, 40), st.integers(0, 2**31))
def test_the_path_never_goes_back_and_has_a_place_for_every_step(text: int, steps: int, seed: int) -> None:
    rows = np.random.default_rng(seed).dirichlet(np.ones(text), steps)
    found = settled(rows)
    assert len(found) == steps
    assert found == sorted(found)
    assert found[0] >= 0
    assert found[-1] < text


def test_a_glance_elsewhere_moves_nothing() -> None:
    rows, places = walk([4, 4, 4, 4, 4])
    rows[9] = rows[0]  # back to the beginning, for one step
    rows[6] = rows[-1]  # and ahead to the end
    assert settled(rows) == places.tolist()


@pytest.mark.parametrize("text", [SAID, "One.", "Two  words\nhere"])
def test_words_are_found_among_the_text_tokens(tts: Any, text: str) -> None:
    tokens = encode(tts, text)
    words = text_words(tts, text, tokens)
    spelled = ["".join(map(tts.tokenizer.tokenizer.id_to_token, tokens[0, w.first : w.end].tolist())) for w in words]
    assert [word.word.strip(",.").lower() for word in words] == [text.lower() for text in spelled]
    assert all(any(map(str.isalnum, word.word)) for word in words)


def test_punctuation_and_the_tokenizers_own_tokens_are_not_of_a_word(tts: Any) -> None:
    text = '"Quiet" « said she.'  # this tokenizer does not know the guillemet
    words = text_words(tts, text, encode(tts, text))
    assert [word.word for word in words] == ['"Quiet"', "said", "she."]
    assert (words[0].first, words[0].end) == (2, 7)


def test_a_tokenizer_without_spaces_has_no_words(tts: Any) -> None:
    assert text_words(tts, "Two words", encode(tts, "One")) == ()  # as many groups as words, or none at all


def told(durations: list[int], words: list[TextWord], begun: float = 0.0) -> tuple[Account, list[lab.Word], list[int]]:
    """What an account has told after such a walk, not ended yet, and how many words after each step."""
    rows, _ = walk(durations)
    heard: list[lab.Word] = []
    account, counts = Account(words, len(durations), heard, begun), []
    for number, row in enumerate(rows):
        account.heard(torch.from_numpy(row), number)
        counts.append(len(heard))
    return account, heard, counts


def test_a_word_begins_and_ends_with_its_sounds_and_is_told_soon() -> None:
    words = [TextWord("ab", 1, 3), TextWord("c,", 4, 5), TextWord("d", 7, 8)]
    durations = [1, 2, 3, 1, 4, 2, 1, 2, 3]  # start a b space c , space d stop
    ends = list(accumulate(durations))
    account, heard, counts = told(durations, words, begun=10.0)
    expected = [lab.Word("ab", 10.04, 10.24), lab.Word("c,", 10.28, 10.44), lab.Word("d", 10.56, 10.64)]
    assert [counts[end + _LAG - 1] - counts[end + _LAG - 2 if end + _LAG > 1 else 0] for end in ends[2:3]] == [0]
    assert (counts[ends[2] + _LAG - 1], counts[ends[2] + _LAG]) == (0, 1)
    assert _LAG == 4
    account.end("stop", sum(durations))
    assert heard == expected
    account.end("limit", 0)
    assert (account.ended, heard) == ("stop", expected)


def test_a_word_that_is_cut_ends_with_the_audio_and_one_not_reached_is_not_told() -> None:
    words = [TextWord("a", 1, 2), TextWord("b", 3, 4), TextWord("c", 5, 6)]
    rows, _ = walk([1, 3, 1, 6, 1, 6])
    heard: list[lab.Word] = []
    account = Account(words, 6, heard)
    for number, row in enumerate(rows[:9]):
        account.heard(torch.from_numpy(row), number)
    account.end("limit", 9)
    assert heard == [lab.Word("a", 0.04, 0.16), lab.Word("b", 0.2, 0.36)]


@pytest.fixture
def walking(tts: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """T3 that looks at its text a token after the other, two steps each, whatever it says."""

    def rows(self: Any) -> torch.Tensor:
        text, step = self.attend.text[1] - self.attend.text[0], getattr(self, "looked", 0)
        self.looked = step + 1
        row = torch.full((2 if step == 0 else 1, text), 0.01)
        row[:, min(step // 2, text - 1)] = 1.0
        return row

    monkeypatch.setattr(eager.EagerT3, "rows", property(rows, lambda self, value: None))
    return tts


@pytest.mark.parametrize(
    "changes", [{}, {"backend": "hf"}, {"overlap": True}, {"chunk_size": 25}, {"backend": "static"}]
)
def test_words_come_with_the_stream_and_none_is_taken_back(
    walking: Any, changes: dict[str, Any], one_thread_each: None
) -> None:
    words = [word.word for word in text_words(walking, SAID, encode(walking, SAID))]
    seen, metrics = [], None
    for _, metrics in lab.generate_stream(walking, SAID, **PROBE | {"max_new_tokens": 120} | changes):
        seen.append(list(metrics.words))
        assert metrics.ended is None
    assert metrics.ended == "limit"
    assert [word.word for word in metrics.words] == words
    assert all(later[: len(earlier)] == earlier for earlier, later in pairwise(seen))
    assert len({len(words) for words in seen}) > 2
    times = [time for word in metrics.words for time in word[1:]]
    assert times == sorted(times)
    assert times[-1] <= metrics.total_audio_duration
    assert metrics.words[1].start == pytest.approx(0.04 * 2 * text_words(walking, SAID, encode(walking, SAID))[1].first)


def test_without_a_reading_there_are_no_words(tts: Any) -> None:
    *_, (_, metrics) = lab.generate_stream(tts, SAID, **PROBE | {"analyzer": "off"})
    assert metrics.words == []


def test_reading_words_changes_no_token(tts: Any) -> None:
    heard = [
        torch.cat([a for a, _ in lab.generate_stream(tts, SAID, **PROBE | {"analyzer": m})], 1)
        for m in ("off", "probe")
    ]
    assert torch.equal(*heard)


def test_words_of_later_utterances_count_from_the_streams_beginning(walking: Any) -> None:
    pauses = lab.Pauses(sentence=0.4)
    fixed = PROBE | {"max_new_tokens": 60, "pauses": pauses}
    runs = [
        [m for _, m in lab.speak(walking, text, **fixed)][-1] for text in (SAID + " One more.", [*SAID, *" One more."])
    ]
    assert runs[0].words == runs[1].words
    one, more = runs[0].words[-2:]
    assert (one.word, more.word) == ("One", "more.")
    assert one.start == pytest.approx(60 * 0.04 + 0.4 + 2 * 0.04)
    assert runs[0].ended == "limit"
