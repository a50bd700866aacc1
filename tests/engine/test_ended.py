"""How a stream says that it has ended, and why."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import chatterbox_lab as lab
from chatterbox_lab.engine.t3 import eager
from chatterbox_lab.engine.t3.alignment import LAST_SOUND, Guard
from chatterbox_lab.engine.t3.rules import FORK, SAFE, Rules
from chatterbox_lab.engine.variants import encode

TEXT = "Hello there, this is a test."
FIXED = {"seed": 0, "chunk_size": 10}
GUARDED = FIXED | {"analyzer": "probe", "guard": True}


def last(stream: Any) -> lab.StreamMetrics:
    return [metrics for _, metrics in stream][-1]


def places(warned: Any) -> list[str]:
    """The files in which it was warned of a limit."""
    return [one.filename for one in warned if "max_new_tokens" in str(one.message)]


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """T3 samples the stop token where this list says, counted from 0, if the guard does not suppress it."""
    places, sample = [12], eager.sample

    def sampled(logits: torch.Tensor, seen: torch.Tensor, how: Any, generator: Any) -> torch.Tensor:
        token, stop = sample(logits, seen, how, generator), 6562
        place = int(getattr(seen, "steps", 0))
        seen.steps = place + 1
        if logits[0, stop] > 1000:
            return torch.full_like(token, stop)
        if place in places and logits[0, stop] > -1000:
            return torch.full_like(token, stop)
        return token if token.item() != stop else torch.full_like(token, 5)

    monkeypatch.setattr(eager, "sample", sampled)
    return places


def looking(monkeypatch: pytest.MonkeyPatch, places: Any) -> None:
    """T3 looks at these places of its text, one after the other."""

    def rows(self: Any) -> torch.Tensor:
        text, step = self.attend.text[1] - self.attend.text[0], getattr(self, "looked", 0)
        self.looked = step + 1
        row = torch.full((2 if step == 0 else 1, text), 0.001)
        row[:, places(step, text)] = 0.9
        return row

    monkeypatch.setattr(eager.EagerT3, "rows", property(rows, lambda self, value: None))


def test_a_stream_that_is_done_says_stop(tts: Any, stopping: list[int]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "max_new_tokens")
        stream = lab.generate_stream(tts, TEXT, max_new_tokens=40, **FIXED)
        assert next(stream)[1].ended is None
        assert last(stream).ended == "stop"


@pytest.mark.parametrize("most", [20, 25])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_stream_that_was_cut_says_so_and_warns_once(tts: Any, stopping: list[int], most: int, overlap: bool) -> None:
    stopping[:] = []
    with pytest.warns(UserWarning, match=f"max_new_tokens={most}: speech was cut there") as warned:
        metrics = last(lab.generate_stream(tts, TEXT, max_new_tokens=most, overlap=overlap, **FIXED))
    assert metrics.ended == "limit"
    assert places(warned) == [__file__]


def test_a_length_that_was_asked_for_is_no_cut(tts: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "max_new_tokens")
        assert last(lab.generate_stream(tts, TEXT, max_new_tokens=20, ignore_eos=True, **FIXED)).ended == "limit"


def test_a_whole_utterance_that_was_cut_warns(tts: Any, stopping: list[int]) -> None:
    with pytest.warns(UserWarning, match="max_new_tokens=8: speech was cut there") as warned:
        lab.generate(tts, TEXT, seed=0, max_new_tokens=8)
    assert places(warned) == [__file__]


@pytest.mark.parametrize("split", [False, True])
def test_the_line_that_called_is_warned_whoever_calls_for_it(tts: Any, stopping: list[int], split: bool) -> None:
    stopping[:] = []
    calls = (
        lambda: tts.generate(TEXT, seed=0, max_new_tokens=8),
        lambda: list(tts.generate_stream(TEXT, seed=0, max_new_tokens=8, print_metrics=True)),
        lambda: list(lab.generate_stream(tts, TEXT, seed=0, max_new_tokens=8)),
    )
    with lab.patch(tts, split=split):
        for call in calls:
            with pytest.warns(UserWarning, match="max_new_tokens=8: speech was cut") as warned:
                call()
            assert places(warned) == [__file__]


def test_pauses_alone_end_like_speech(tts: Any) -> None:
    assert last(lab.speak(tts, iter(["[pause:0.2]"]))).ended == "stop"


def test_a_stream_that_was_stopped_or_closed_has_not_ended(tts: Any, stopping: list[int]) -> None:
    stop = threading.Event()
    stream = lab.generate_stream(tts, TEXT, max_new_tokens=40, stop=stop, **FIXED)
    metrics = next(stream)[1]
    stop.set()
    assert list(stream) == []
    assert metrics.ended is None
    spoken = lab.speak(tts, "One here. Two there. Three now.", stop=(stop := threading.Event()), **FIXED)
    stopping[:] = [4]
    metrics = next(spoken)[1]
    stop.set()
    list(spoken)
    assert metrics.ended is None


def test_of_several_utterances_the_one_that_was_cut_counts(tts: Any, stopping: list[int]) -> None:
    def pieces() -> Iterator[str]:
        yield "One sentence here. And "
        stopping[:] = []
        yield "one that goes on. The "
        stopping[:] = [4]
        yield "end of it."

    with pytest.warns(UserWarning, match="max_new_tokens=30"):
        assert last(lab.speak(tts, pieces(), max_new_tokens=30, **FIXED)).ended == "limit"


def test_the_guard_caps_a_text_by_its_length(tts: Any, stopping: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    stopping[:] = []
    looking(monkeypatch, lambda step, text: min(step // 9, text // 2))  # never comes to the end
    rules = Rules(cap=1.0, cap_beside=3.0)
    most = int(rules.most(encode(tts, TEXT).shape[1]))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "max_new_tokens")
        metrics = last(lab.generate_stream(tts, TEXT, rules=rules, max_new_tokens=200, **GUARDED))
    assert (metrics.ended, metrics.tokens) == ("guard", most)
    uncapped = lab.speech_tokens(tts, TEXT, rules=rules, max_new_tokens=most + 9, ignore_eos=True, **GUARDED)
    assert len(uncapped) == most + 9


def test_the_guard_ends_what_says_its_text_again(
    tts: Any, stopping: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping[:] = []
    length = encode(tts, TEXT).shape[1]
    looking(monkeypatch, lambda step, text: min(step, text - 1) if step < text + 3 else (step - text) % 5)
    fixed = GUARDED | {"max_new_tokens": 200}
    trimmed = lab.speech_tokens(tts, TEXT, **fixed)
    untrimmed = lab.speech_tokens(tts, TEXT, rules=Rules(trims=False), **fixed)
    assert len(trimmed) == length + 3 + LAST_SOUND < len(untrimmed) < SAFE.most(length)
    assert torch.equal(trimmed, untrimmed[: len(trimmed)])
    assert last(lab.generate_stream(tts, TEXT, **fixed)).ended == "guard"


def test_a_stop_is_seen_while_the_guard_holds_back(
    tts: Any, stopping: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping[:] = []
    length, stop, asked = encode(tts, TEXT).shape[1], threading.Event(), []

    def place(step: int, text: int) -> int:
        asked.append(step)
        if step == text + 6:
            stop.set()
        return min(step, text - 1) if step < text + 3 else 2

    looking(monkeypatch, place)
    rules = Rules(repetition=1e9, long_tail=1e9)
    lab.speech_tokens(tts, TEXT, rules=rules, stop=stop, max_new_tokens=200, **GUARDED)
    assert asked[-1] == length + 6


def test_speech_that_looks_back_for_a_second_is_ended(
    tts: Any, stopping: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping[:] = []
    length = encode(tts, TEXT).shape[1]
    looking(monkeypatch, lambda step, text: min(step, text - 1) if step < text + 3 else 2)
    fixed = GUARDED | {"max_new_tokens": 200, "rules": Rules(repetition=1e9, long_tail=1e9)}
    stream = lab.generate_stream(tts, TEXT, **fixed)
    metrics = last(stream)
    assert (metrics.ended, metrics.tokens) == ("guard", length + 3 + LAST_SOUND)
    assert metrics.words[-1].end <= metrics.total_audio_duration
    assert metrics.words[-1].start <= metrics.words[-1].end


def test_what_was_held_back_is_said_where_the_speech_comes_back_to_its_end(
    tts: Any, stopping: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    length = encode(tts, TEXT).shape[1]
    stopping[:] = [length + 8]
    away = range(length + 2, length + 6)
    looking(monkeypatch, lambda step, text: 3 if step in away else min(step, text - 1))
    fixed = GUARDED | {"max_new_tokens": 200, "rules": Rules(long_tail=100.0)}
    assert len(lab.speech_tokens(tts, TEXT, **fixed)) == length + 8
    stopping[:] = [length + 5]  # it is still away
    assert len(lab.speech_tokens(tts, TEXT, **fixed)) == length + 2 + LAST_SOUND


def test_only_an_early_stop_is_suppressed(tts: Any, stopping: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    length = encode(tts, TEXT).shape[1]
    looking(monkeypatch, lambda step, text: 2)  # the alignment is lost
    stopping[:] = [3, 5, length + 4, length + 9]
    fixed = GUARDED | {"max_new_tokens": 200}
    assert len(lab.speech_tokens(tts, TEXT, rules=Rules(shortest=length - 1), **fixed)) == length + 4
    assert len(lab.speech_tokens(tts, TEXT, rules=Rules(shortest=length), **fixed)) == 3  # too short to align
    released = lab.speech_tokens(tts, TEXT, rules=FORK, **fixed)
    assert len(released) == 200  # as upstream's analyzer would have it
    assert len(lab.speech_tokens(tts, "A", **fixed)) == 3


def test_a_guard_that_looks_on_holds_nothing_back() -> None:
    guard, logits = Guard(10, SAFE, acts=False), torch.zeros(1, 9)
    for place in [*range(10), 2, 2, 2, 2]:
        row = torch.full((1, 10), 0.001)
        row[:, place] = 1.0
        assert guard.led(logits, row, 4, 8) is logits
    assert not guard.trailing
    assert guard.most == math.inf
