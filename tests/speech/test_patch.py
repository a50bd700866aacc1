from __future__ import annotations

import copy
import inspect
import itertools
import warnings
from collections.abc import Iterator
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from chatterbox.tts import ChatterboxTTS

import chatterbox_lab as lab
from chatterbox_lab.engine.patch import patch as engines
from chatterbox_lab.engine.s3gen.render import Renderer
from chatterbox_lab.speech import speak as speaking

TEXT = "Hello there, you. This is it now! Well? It is so."
ONE = "Hello there, you."
QUICK = {"ignore_eos": True, "flow_steps": 1}
FIXED = {"seed": 0, "max_new_tokens": 6}
RECORDING = (0.1 * np.random.default_rng(0).standard_normal(48000).astype(np.float32), 24000)
METHODS = ("generate", "generate_stream")
pytestmark = pytest.mark.filterwarnings("ignore:the recording")


@pytest.fixture(params=["lab's class", "upstream's class", "an application's class"])
def model(request: pytest.FixtureRequest, tts: Any) -> Any:
    class Passing(ChatterboxTTS):
        def generate(self, text: str, **given: Any) -> Any:
            return super().generate(text, **given)

    kind = {"lab's class": type(tts), "upstream's class": ChatterboxTTS}.get(request.param, Passing)
    other = kind.__new__(kind)
    vars(other).update(vars(tts))
    return other


def joined(chunks: Iterator[tuple[torch.Tensor, Any]]) -> torch.Tensor:
    return torch.cat([audio for audio, _ in chunks], dim=1)


def run(model: Any, name: str, *args: Any, **given: Any) -> torch.Tensor:
    if name == "generate":
        return model.generate(*args, **given)
    return joined(model.generate_stream(*args, print_metrics=False, **given))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("text", [ONE, "hello", "", "  ", "?!"])
def test_one_sentence_is_what_it_is_without_split(model: Any, name: str, text: str) -> None:
    with lab.patch(model, **QUICK):
        expected = run(model, name, text, **FIXED)
    with lab.patch(model, split=True, **QUICK):
        assert torch.equal(run(model, name, text, **FIXED), expected)


@pytest.mark.parametrize("pieces", [str, iter], ids=["whole", "by the character"])
def test_a_stream_of_sentences_is_what_speak_says(model: Any, pieces: Any) -> None:
    expected = list(lab.speak(model, TEXT, lab.BASELINE, **QUICK, **FIXED, chunk_size=4))
    with lab.patch(model, split=True, **QUICK):
        found = list(model.generate_stream(pieces(TEXT), chunk_size=4, print_metrics=False, **FIXED))
    assert all(torch.equal(ours, theirs) for (ours, _), (theirs, _) in zip(found, expected, strict=True))
    assert found[-1][1].tokens == 18
    other = joined(lab.speak(model, TEXT, lab.BASELINE, **QUICK, **FIXED | {"seed": 1}, chunk_size=4))
    assert not torch.equal(joined(iter(found)), other)


@pytest.mark.parametrize("pieces", [str, iter], ids=["whole", "by the character"])
def test_the_whole_of_sentences_is_each_as_one_window(model: Any, pieces: Any) -> None:
    quiet = lab.Pauses(0.1)
    large = {"chunk_size": 100, "pauses": quiet}
    expected = joined(lab.speak(model, TEXT, lab.BASELINE, **QUICK, **FIXED, **large))
    for way in ({}, {"flow": "cached", "overlap": True, "schedule": "grow"}):
        with lab.patch(model, split=quiet, **QUICK, **way):
            found = model.generate(pieces(TEXT), **FIXED)
        assert found.shape == (1, 3 * 6 * 960 + 2 * 2400)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", METHODS)
def test_pauses_and_the_longest_utterance_are_as_asked_for(tts: Any, name: str) -> None:
    with lab.patch(tts, split=lab.Pauses(0.5, 0, 0), longest=40, **QUICK):
        assert run(tts, name, TEXT, **FIXED).shape == (1, 3 * 6 * 960 + 2 * 12000)
        assert run(tts, name, "on and on, " * 12, **FIXED).shape == (1, 4 * 6 * 960)
        assert run(tts, name, ONE + "[pause:1]" + ONE, **FIXED).shape == (1, 2 * 6 * 960 + 24000)


@pytest.mark.parametrize("name", METHODS)
def test_a_recordings_voice_speaks_all_of_it_and_stays(model: Any, name: str) -> None:
    own = model.conds
    with lab.patch(model, split=True, **QUICK):
        found = run(model, name, TEXT, audio_prompt_path=RECORDING, exaggeration=0.9, **FIXED)
        voice = model.conds
        assert voice is not own
        assert voice.t3.emotion_adv.item() == pytest.approx(0.9)
        assert torch.equal(run(model, name, TEXT, exaggeration=0.9, **FIXED), found)
        model.conds = own
        assert not torch.equal(run(model, name, TEXT, exaggeration=0.9, **FIXED), found)
        other = copy.copy(model)
        other.conds = voice
        assert torch.equal(run(other, name, TEXT, exaggeration=0.9, **FIXED), found)


def test_the_report_is_of_the_whole(tts: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with lab.patch(tts, split=True, **QUICK):
        found = list(tts.generate_stream(TEXT, chunk_size=4, **FIXED))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 5
    assert said[-1] == f"Total chunks yielded: {len(found)}"
    assert len({id(metrics) for _, metrics in found}) == 1


@pytest.mark.parametrize("name", METHODS)
def test_a_stop_ends_it_with_the_token_that_it_is_at(tts: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, seen, inner = Event(), [], speaking._request

    def second(tts: Any, base: Any, words: str, number: int) -> Any:
        seen.append(words)
        if len(seen) == 2:
            stop.set()
        return inner(tts, base, words, number)

    monkeypatch.setattr(speaking, "_request", second)
    with lab.patch(tts, split=lab.Pauses(0, 0, 0), **QUICK):
        assert run(tts, name, TEXT, stop=stop, **FIXED).shape == (1, 6 * 960)
    assert seen == [ONE, "This is it now!"]


def test_the_tokens_of_a_stopped_whole_are_spoken(tts: Any) -> None:
    stop, steps = Event(), itertools.count()
    handle = tts.t3.speech_head.register_forward_hook(lambda *_: stop.set() if next(steps) == 8 else None)
    try:
        with lab.patch(tts, split=lab.Pauses(0, 0, 0), **QUICK):
            audio = tts.generate(TEXT, stop=stop, **FIXED)
    finally:
        handle.remove()
    assert 6 * 960 < audio.shape[1] < 12 * 960


class StageError(Exception):
    pass


@pytest.mark.parametrize("name", METHODS)
def test_it_is_undone_on_every_way_out(model: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, kind = dict(vars(model)), type(model)
    with monkeypatch.context() as broken:
        broken.setattr(Renderer, "push", lambda *_, **__: (_ for _ in ()).throw(StageError()))
        with pytest.raises(StageError), lab.patch(model, split=True, **QUICK):
            run(model, name, TEXT, **FIXED)
    assert (vars(model), type(model)) == (before, kind)
    with lab.patch(model, split=True, **QUICK):
        begun = model.generate_stream(TEXT, chunk_size=4, print_metrics=False, **FIXED)
        next(begun)
    assert len(list(begun)) == 5
    patch = lab.patch(model, split=True, **QUICK)
    assert model.generate_stream.patch is patch
    patch.undo()
    assert (vars(model), type(model)) == (before, kind)


@pytest.mark.parametrize("name", METHODS)
def test_a_call_that_is_wrong_is_refused_when_it_is_made_and_leaves_the_voice(model: Any, name: str) -> None:
    own = model.conds
    wrong = [({"seed": -1}, ValueError), ({"temperature": -1}, ValueError), ({"stop": True}, ValueError)]
    with lab.patch(model, split=True):
        for given, error in wrong:
            with pytest.raises(error, match=f"{next(iter(given))}="):
                getattr(model, name)(TEXT, audio_prompt_path=RECORDING, **given)
        for text in (None, 7, b"Hello.", "Half \ud800"):
            with pytest.raises((TypeError, ValueError), match="text="):
                getattr(model, name)(text, audio_prompt_path=RECORDING)
        with pytest.raises(TypeError):
            getattr(model, name)(TEXT, chunksize=3)
        model.conds = None
        with pytest.raises(ValueError, match="no voice"):
            getattr(model, name)(TEXT)
        model.conds = own
    assert model.conds is own


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"split": 1}, "split=1: must be True, False or a Pauses"),
        ({"split": None}, "split=None"),
        ({"split": True, "longest": 5}, "longest=5: must be a whole number, at least 40 and at most 400"),
        ({"longest": 80}, "longest=80: only goes with split"),
        ({"split": True, "chunk_size": 5}, "chunk_size=5: belongs to generate_stream's own arguments"),
        ({"split": True, "colour": 5}, "colour=5: no such setting"),
    ],
)
def test_a_wrong_patch_is_refused_and_nothing_touched(model: Any, given: dict[str, Any], message: str) -> None:
    before, kind = dict(vars(model)), type(model)
    with pytest.raises(ValueError, match=message):
        lab.patch(model, **given)
    assert (vars(model), type(model)) == (before, kind)


def test_a_second_patch_and_what_is_no_chatterbox_are_refused(tts: Any) -> None:
    with lab.patch(tts, split=True), pytest.raises(ValueError, match="already patched"):
        lab.patch(tts)
    with lab.patch(tts), pytest.raises(ValueError, match="already patched"):
        lab.patch(tts, split=True)
    with pytest.raises(TypeError, match="tts: must be a ChatterboxTTS"):
        lab.patch(object(), split=True)


@pytest.mark.parametrize("name", [*METHODS, "prepare_conditionals"])
def test_signatures_are_those_without_split(model: Any, name: str) -> None:
    found = []
    for patch in (lambda: engines(model), lambda: lab.patch(model), lambda: lab.patch(model, split=True)):
        with patch():
            method = getattr(model, name)
            found.append((inspect.signature(method), method.__name__, method.__doc__))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("name", METHODS)
def test_what_a_tokenizer_does_not_know_is_named(tts: Any, name: str) -> None:
    with lab.patch(tts, split=True, **QUICK), pytest.warns(UserWarning, match="does not know"):
        run(tts, name, "Hello \u4f60 there.", **FIXED)
    with warnings.catch_warnings(), lab.patch(tts, split=True, **QUICK):
        warnings.simplefilter("error")
        run(tts, name, ONE, **FIXED)


def test_an_iterable_of_a_whole_runs_as_its_caller_has_set_pytorch_up(tts: Any) -> None:
    seen = set()

    def pieces() -> Iterator[str]:
        for piece in TEXT:
            seen.add(torch.is_autocast_enabled("cpu"))
            yield piece

    with lab.patch(tts, split=True, **QUICK):
        plain = tts.generate(TEXT, **FIXED)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(tts.generate(pieces(), **FIXED), plain)
    assert seen == {True}
