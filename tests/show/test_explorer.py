from __future__ import annotations

import html
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ipywidgets.widgets import widget as widget_module

import chatterbox_lab as lab
from chatterbox_lab.engine import stream
from chatterbox_lab.engine.schedule import SCHEDULES
from chatterbox_lab.engine.settings import FLOW_DTYPES, FLOWS, WEIGHTS
from chatterbox_lab.engine.t3.backends import ANALYZERS, BACKENDS
from chatterbox_lab.show import explorer, form, player
from chatterbox_lab.show.explorer import Explorer
from chatterbox_lab.study import costs

SHORT = {"chunk_size": 3, "context_window": 3, "max_new_tokens": 9}


@pytest.fixture
def lab_explorer(tts: Any) -> Iterator[Explorer]:
    made = made_with(tts)
    yield made
    made.stop()
    free(made)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Holds every stream after its first chunk until it is set."""
    spoken, gate = explorer.generate_stream, threading.Event()

    def held(*arguments: Any, **named: Any) -> Iterator[Any]:
        for chunk in spoken(*arguments, **named):
            yield chunk
            assert gate.wait(60)

    monkeypatch.setattr(explorer, "generate_stream", held)
    return gate


def made_with(tts: Any, **arguments: Any) -> Explorer:
    made = Explorer(tts, **arguments)
    enter(made, **SHORT)
    return made


def enter(made: Explorer, **values: Any) -> None:
    for name, value in values.items():
        made.controls[name].value = value


def said(made: Explorer) -> str:
    return plain(made.status)


def beside(made: Explorer) -> dict[str, str]:
    """The messages that are to be seen, by field."""
    shown = {name: error for name, error in made.errors.items() if error.layout.display != "none"}
    return {name: plain(error) for name, error in shown.items()}


def plain(widget: Any) -> str:
    return html.unescape(re.sub("<.*?>", "", widget.value))


def free(made: Explorer) -> None:
    """Waits until nothing works in a thread any more."""
    for thread in (made.player._thread, made._thread):
        if thread is not None:
            thread.join(60)
    assert not made._generation.locked()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def finished(made: Explorer, **values: Any) -> None:
    enter(made, **values)
    made.generate()
    made.player.wait()


def test_what_is_heard_is_what_the_fields_say(lab_explorer: Explorer, tts: Any) -> None:
    finished(lab_explorer, text="Good morning.", seed=3, temperature=0.5)
    settings = {"temperature": 0.5, "ignore_eos": True, "chunk_size": 3, "context_window": 3}
    expected = list(lab.generate_stream(tts, "Good morning.", seed=3, max_new_tokens=9, **settings))
    assert torch.equal(lab_explorer.player.audio, torch.cat([audio for audio, _ in expected], dim=1))
    assert lab_explorer.player.state == "done"
    assert "3 chunks, 0.36 s of audio" in said(lab_explorer)


def test_choices_are_the_packages_own(lab_explorer: Explorer) -> None:
    backends, flows = ("auto", *BACKENDS), {"flow": FLOWS, "flow_dtype": FLOW_DTYPES, "vocoder_dtype": FLOW_DTYPES}
    choices = {"analyzer": ANALYZERS, "backend": backends, "schedule": SCHEDULES, "weights": WEIGHTS} | flows
    for name, allowed in choices.items():
        assert lab_explorer.controls[name].options == tuple(allowed)
    assert lab_explorer.target.options == costs.TARGETS
    without = {field.name for field in fields(lab.StreamSettings)} - lab_explorer.controls.keys()
    of_the_release = {"repetition_penalty", "top_p", "min_p", "top_k", "language", "rules"}
    assert without == {"fade_duration", "guard", "costs", "ignore_eos", "overlap"} | of_the_release


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("text", "  ", "text='  ': must be a string with something to say"),
        ("text", "word " * 3000, "is 15000 text tokens"),
        ("seed", -1, "seed=-1: must be a whole number, at least 0"),
        ("max_new_tokens", 0, "max_new_tokens=0: must be a whole number, at least 1"),
        ("temperature", 0.0005, "temperature=0.0005: must be 0 (greedy) or at least 0.001"),
        ("cfg_weight", -0.5, "cfg_weight=-0.5: must be a number from 0 to 100"),
        ("exaggeration", 101, "exaggeration=101.0: must be a number from 0 to 100"),
        ("chunk_size", 0, "chunk_size=0: must be a whole number, at least 1"),
        ("context_window", -1, "context_window=-1: must be a whole number, at least 0"),
        ("max_chunk_size", 0, "max_chunk_size=0: must be a whole number, at least 1"),
        ("backend", "graph", "backend='graph'"),
    ],
)
def test_a_bad_value_is_named_beside_its_field_and_nothing_runs(
    lab_explorer: Explorer, name: str, value: Any, message: str
) -> None:
    before, player = lab_explorer.controls[name].value, lab_explorer.player
    enter(lab_explorer, **{name: value})
    assert list(beside(lab_explorer)) == [name]
    assert message in beside(lab_explorer)[name]
    lab_explorer.generate()
    assert (lab_explorer.player, player.state) == (player, "idle")
    assert said(lab_explorer).startswith("Nothing was started")
    enter(lab_explorer, **{name: before})
    assert beside(lab_explorer) == {}


def test_an_analyzer_that_a_backend_cannot_read_is_named(lab_explorer: Explorer) -> None:
    enter(lab_explorer, analyzer="stock")
    assert beside(lab_explorer) == {}  # "auto" then takes the backend that returns attention maps
    enter(lab_explorer, backend="static")
    assert "analyzer='stock' with backend='static'" in beside(lab_explorer)["analyzer"]


def test_every_setting_has_its_usual_value_at_first(tts: Any) -> None:
    made = Explorer(tts)
    assert made.settings() == form.STANDARD
    assert made.settings() == lab.StreamSettings(chunk_size=25, context_window=50)
    assert beside(made) == {}


def test_two_bad_values_are_both_named(lab_explorer: Explorer) -> None:
    enter(lab_explorer, chunk_size=0, text="")
    assert list(beside(lab_explorer)) == ["text", "chunk_size"]


def test_markup_in_a_value_is_shown_and_not_obeyed(lab_explorer: Explorer) -> None:
    enter(lab_explorer, model="<img src=x onerror=alert(1)>")
    finished_badly(lab_explorer)
    assert "<img" not in lab_explorer.errors["model"].value
    assert "<img" in html.unescape(lab_explorer.errors["model"].value)


def finished_badly(made: Explorer) -> None:
    made.generate()
    with pytest.raises(ValueError, match="model="):
        made.player.wait()


def test_sliders_and_boxes_follow_each_other(lab_explorer: Explorer) -> None:
    slider = sliders(lab_explorer)["Temperature"]
    slider.value = 0.35
    assert lab_explorer.controls["temperature"].value == 0.35
    enter(lab_explorer, temperature=1.5)
    assert slider.value == 1.5
    enter(lab_explorer, temperature=7.0)  # more than the slider shows
    assert (slider.value, lab_explorer.controls["temperature"].value) == (2, 7.0)
    enter(lab_explorer, temperature=0.83)
    slider.value = 0.85  # the page moves it to its nearest step
    assert lab_explorer.controls["temperature"].value == 0.83


def sliders(made: Explorer) -> dict[str, Any]:
    rows = [field.children[0] for column in made.children[0].children for field in column.children]
    return {row.children[0].description: row.children[0] for row in rows}


def test_a_second_click_is_refused_kindly_and_stop_ends_the_run(lab_explorer: Explorer, gate: threading.Event) -> None:
    lab_explorer.generate()
    player = lab_explorer.player
    until(lambda: len(player.chunks) == 1)
    lab_explorer.generate()
    assert lab_explorer.player is player
    assert said(lab_explorer) == "Still at work: wait until it is done, or click Stop."
    lab_explorer.stop()
    gate.set()
    player.wait()
    assert (player.state, len(player.chunks)) == ("stopped", 1)
    assert said(lab_explorer).startswith("Stopped: RTF ")
    finished(lab_explorer, max_new_tokens=3)
    assert lab_explorer.player.state == "done"


def test_buttons_do_what_they_say(lab_explorer: Explorer, gate: threading.Event) -> None:
    buttons = {child.description: child for child in lab_explorer.children[1].children if hasattr(child, "click")}
    buttons["Generate"].click()
    assert lab_explorer.player.state == "streaming"
    buttons["Stop"].click()
    gate.set()
    free(lab_explorer)
    assert lab_explorer.player.state == "stopped"


def test_the_last_runs_stay_as_they_were(lab_explorer: Explorer) -> None:
    for seed in range(6):
        finished(lab_explorer, seed=seed, max_new_tokens=3)
    assert [player.title.split("seed ")[1][0] for player in lab_explorer.kept] == ["4", "3", "2", "1"]
    kept = lab_explorer.kept[0]
    assert re.fullmatch(
        r"chunk 3, context 3, seed 4\n"
        r"RTF [\d.]+, first chunk after [\d.]+ s, 1 chunk, 0\.12 s of audio, cut at max_new_tokens after 3 tokens, "
        r"0 underruns",
        kept.title,
    )
    assert kept.compact
    assert kept.audio.shape == (1, 3 * 960)
    lab_explorer._shelf.children[1].children[1].click()
    assert [player.title.split("seed ")[1][0] for player in lab_explorer.kept] == ["4", "2", "1"]
    assert lost() == []


def lost() -> list[str]:
    """Closed widgets that open ones still show: a reloaded page would look for them in vain and show nothing."""
    opened = widget_module._instances.values()
    shown = [child for widget in opened for child in getattr(widget, "children", ())]
    return [type(child).__name__ for child in shown if child.comm is None]


def test_a_title_names_what_differs_from_the_usual(lab_explorer: Explorer) -> None:
    finished(lab_explorer, schedule="grow", max_chunk_size=7, temperature=0.5, backend="hf", max_new_tokens=3)
    assert lab_explorer.player.title == "chunk 3 to 7, context 3, temperature 0.5, backend hf, seed 0"


def test_a_model_that_cannot_be_loaded_leaves_the_old_one(lab_explorer: Explorer, tts: Any) -> None:
    enter(lab_explorer, model="no/such/folder")
    finished_badly(lab_explorer)
    assert "existing voice folder" in beside(lab_explorer)["model"]
    assert lab_explorer.tts is tts
    finished(lab_explorer, model=form.GIVEN)
    assert lab_explorer.player.state == "done"
    assert lab_explorer.kept == []  # a run without audio is not kept


def test_a_model_is_loaded_where_it_is_first_used(tts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []

    def load(name: str, variant: str, device: str) -> Any:
        loaded.append((name, variant, device, threading.current_thread().name))
        return tts

    monkeypatch.setattr(explorer, "load", load)
    made = made_with(None, model="tiny", device="cpu")
    assert loaded == []
    for _ in range(2):
        finished(made)
    assert loaded == [("tiny", "english", "cpu", "chatterbox-player")]
    enter(made, text="")  # with a model the text can be looked at
    assert list(beside(made)) == ["text"]


def test_what_fails_while_running_is_said_in_the_status_line(
    lab_explorer: Explorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(stream, "watermark", broken)
    lab_explorer.generate()
    with pytest.raises(RuntimeError):
        lab_explorer.player.wait()
    assert said(lab_explorer) == "out of memory"
    monkeypatch.undo()
    finished(lab_explorer)
    assert lab_explorer.player.state == "done"


def test_an_interrupt_leaves_everything_usable(lab_explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(player.Player, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lab_explorer.generate()
    monkeypatch.undo()
    finished(lab_explorer)
    assert lab_explorer.player.state == "done"


def test_two_explorers_never_run_a_model_at_once(lab_explorer: Explorer, tts: Any, gate: threading.Event) -> None:
    lab_explorer.generate()
    until(lambda: len(lab_explorer.player.chunks) == 1)
    other = made_with(tts)  # its cell, run again
    other.generate()
    assert (other.player.state, lab_explorer.player.state) == ("idle", "streaming")
    gate.set()
    free(lab_explorer)
    assert lab_explorer.player.state == "stopped"
    finished(other)
    assert other.player.state == "done"


def test_a_recommendation_fills_the_fields(lab_explorer: Explorer, tts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    gate = threading.Event()
    measured = lab.Costs()
    values = {"chunk_size": 4, "max_chunk_size": 8, "schedule": "grow", "costs": measured, "fade_duration": 0.01}

    def recommend(model: Any, target: str, *, settings: lab.StreamSettings) -> Any:
        asked.append((model, target, settings.temperature))
        gate.wait(60)
        return costs.Recommendation(**vars(settings) | values, reason="Because <it> fits.")

    monkeypatch.setattr(costs, "recommend", recommend)
    enter(lab_explorer, temperature=0.6)
    lab_explorer.target.value = "latency"
    lab_explorer.recommend()
    lab_explorer.generate()
    assert said(lab_explorer) == "Still at work: wait until it is done."
    gate.set()
    free(lab_explorer)
    assert asked == [(tts, "latency", 0.6)]
    assert said(lab_explorer) == "Because <it> fits."
    settings = lab_explorer.settings()
    assert {name: getattr(settings, name) for name in values} == values
    assert settings.costs is measured
    assert settings.temperature == 0.6
    finished(lab_explorer)
    assert lab_explorer.player.chunks[0].samples == 4 * 960 - 240  # a cross-fade of 10 ms is held back


def test_a_recommendation_that_fails_is_said(lab_explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    def recommend(*_: Any, **__: Any) -> None:
        raise ValueError("backend='static': does not fit")

    monkeypatch.setattr(costs, "recommend", recommend)
    lab_explorer.recommend()
    free(lab_explorer)
    assert beside(lab_explorer) == {"backend": "backend='static': does not fit"}
    finished(lab_explorer)


def test_random_weights_speak_until_the_limit_and_trained_ones_may_stop(
    lab_explorer: Explorer, tts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def generate_stream(tts: Any, text: str, settings: lab.StreamSettings, **_: Any) -> Iterator[Any]:
        asked.append(settings.ignore_eos)
        return iter(())

    monkeypatch.setattr(explorer, "generate_stream", generate_stream)
    finished(lab_explorer)
    monkeypatch.setattr(tts, "config", SimpleNamespace(trained=True))
    finished(lab_explorer)
    assert asked == [True, False]
    assert said(lab_explorer) == "Done: no audio."


def test_how_it_ended_is_said_if_not_by_itself(lab_explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    for ended, said_of in (
        ("stop", "."),
        ("limit", ", cut at max_new_tokens after 7 tokens."),
        ("guard", ", ended by"),
    ):
        metrics = lab.StreamMetrics(tokens=7, rtf=0.5, latency_to_first_chunk=0.1, ended=ended)
        chunks = [(torch.zeros(1, 240), metrics)]
        monkeypatch.setattr(explorer, "generate_stream", lambda *_, made=chunks, **__: iter(made))
        finished(lab_explorer)
        assert f"1 chunk, 0.01 s of audio{said_of}" in said(lab_explorer)


def test_an_analyzer_gives_the_player_words(lab_explorer: Explorer) -> None:
    finished(lab_explorer, text="Hello there, you.", analyzer="probe", max_new_tokens=60)
    assert [word for word, _, _ in lab_explorer.player.words] == ["Hello", "there,", "you."][
        : len(lab_explorer.player.words)
    ]
    assert lab_explorer.player.words
    finished(lab_explorer, analyzer="off", max_new_tokens=3)
    assert lab_explorer.player.words == []


def test_without_a_front_end_it_is_one_line(lab_explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATTERBOX_LAB_WIDGETS", "0")
    assert lab_explorer._repr_mimebundle_() == {"text/plain": repr(lab_explorer)}
    assert "make lab" in repr(lab_explorer)
    assert "\n" not in repr(lab_explorer)
    monkeypatch.setenv("CHATTERBOX_LAB_WIDGETS", "1")
    bundle = lab_explorer._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == lab_explorer.model_id
    assert bundle["text/plain"] == repr(lab_explorer)
