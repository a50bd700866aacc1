from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from conftest import TEXT

import chatterbox_lab as lab
from chatterbox_lab.voices import config

BAD_SETTINGS: list[tuple[str, Any]] = [
    ("chunk_size", 0),
    ("chunk_size", -25),
    ("chunk_size", 2.5),
    ("chunk_size", "25"),
    ("chunk_size", True),
    ("context_window", -1),
    ("context_window", 1.0),
    ("context_window", None),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", "0.8"),
    ("temperature", 1e-40),
    ("exaggeration", 1e39),
    ("fade_duration", 1e305),
    ("cfg_weight", -1),
    ("cfg_weight", math.inf),
    ("exaggeration", -0.5),
    ("exaggeration", math.nan),
    ("fade_duration", -0.02),
    ("fade_duration", math.inf),
    ("fade_duration", None),
    ("analyzer", "on"),
    ("analyzer", None),
    ("backend", "tensorrt"),
    ("weights", "int4"),
    ("weights", None),
    ("schedule", "random"),
    ("costs", {"token": 0.01}),
    ("max_chunk_size", 0),
    ("guard", 1),
    ("guard", True),  # with analyzer="off"
    ("overlap", 1),
    ("ignore_eos", "no"),
    ("chunksize", 25),
]
BAD_CALLS: list[tuple[str, dict[str, Any]]] = [
    ("text", {"text": ""}),
    ("text", {"text": " \n\t"}),
    ("text", {"text": None}),
    ("text", {"text": b"Hello."}),
    ("2048", {"text": "word " * 500}),
    ("max_new_tokens", {"max_new_tokens": 0}),
    ("max_new_tokens", {"max_new_tokens": 4097}),
    ("max_new_tokens", {"max_new_tokens": 10.0}),
    ("seed", {"seed": -1}),
    ("seed", {"seed": "0"}),
    ("settings", {"settings": 25}),
    ("backend", {"backend": "graph"}),
]
BAD_LOADS: list[tuple[str, dict[str, Any]]] = [
    ("model", {"model": "huge"}),
    ("model", {"model": "no/such/folder"}),
    ("device", {"device": "tpu"}),
    ("device", {"device": "cuda:99"}),
    ("dtype", {"dtype": "int8"}),
    ("dtype", {"dtype": torch.float64}),
    ("model", {"model": None}),
    ("model", {"model": []}),
    ("seed", {"seed": -1}),
    ("seed", {"seed": None}),
]


@pytest.fixture
def no_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model ran")

    monkeypatch.setattr(torch.nn.Module, "__call__", run)


@pytest.mark.parametrize(("name", "value"), BAD_SETTINGS)
def test_a_bad_setting_is_refused_before_a_model_runs(tts: Any, no_model_runs: None, name: str, value: Any) -> None:
    for call in (lab.generate_stream, lab.generate, lab.speech_tokens, lab.upstream_stream):
        with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}")):
            call(tts, TEXT, **{name: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"backend": "hf", "weights": "int8"},
            "weights='int8' with backend='hf': only 'static' can; choose one of 'loaded'",
        ),
        (
            {"backend": "static", "analyzer": "stock"},
            "analyzer='stock' with backend='static': only 'hf' can; choose one of 'off'",
        ),
        (
            {"weights": "int8", "analyzer": "layer"},
            "analyzer='layer' with backend='auto' and weights='int8': only 'hf' can",
        ),
    ],
)
def test_what_a_backend_cannot_do_is_refused(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        lab.StreamSettings(**fields)


@pytest.mark.parametrize(("name", "arguments"), BAD_CALLS)
def test_a_bad_argument_is_refused_before_a_model_runs(
    tts: Any, no_model_runs: None, name: str, arguments: dict[str, Any]
) -> None:
    for call in (lab.generate_stream, lab.generate, lab.speech_tokens, lab.upstream_stream):
        with pytest.raises(ValueError, match=name):
            call(tts, **{"text": TEXT} | arguments)


@pytest.mark.parametrize(("name", "arguments"), BAD_LOADS)
def test_a_bad_load_is_refused(name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=f"{name}="):
        lab.load(**arguments)


@pytest.mark.parametrize("content", [None, b"", b"not audio at all"])
def test_a_bad_reference_is_refused(tts: Any, no_model_runs: None, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "voice.wav"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"audio_prompt_path=.*voice\.wav"):
        tts.prepare_conditionals(path)
    with lab.patch(tts), pytest.raises(ValueError, match="audio_prompt_path"):
        tts.generate_stream(TEXT, audio_prompt_path=path)


def test_a_recording_that_is_too_short_is_refused(tts: Any, no_model_runs: None, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "voice.wav", torch.zeros(100).numpy(), 24000)
    with pytest.raises(ValueError, match="at least 1 s"):
        tts.prepare_conditionals(tmp_path / "voice.wav")


@pytest.mark.parametrize(("name", "value"), [("analyser", "off"), ("chunk_size", 75), ("temperature", 0.5)])
def test_a_patch_refuses_what_it_would_ignore(tts: Any, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}="):
        lab.patch(tts, **{name: value})


def test_a_refused_patched_call_leaves_the_voice(tts: Any, no_model_runs: None, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "voice.wav", torch.rand(24000).numpy(), 24000)
    with lab.patch(tts):
        for call in (tts.generate_stream, tts.generate):
            with pytest.raises(ValueError, match="text="):
                call(None, audio_prompt_path=tmp_path / "voice.wav")


def test_upstream_has_no_greedy(tts: Any, no_model_runs: None) -> None:
    for call in (lab.upstream_stream, lab.upstream_tokens):
        with pytest.raises(ValueError, match="temperature=0"):
            call(tts, TEXT, temperature=0)


def test_a_model_without_a_voice_says_so(tts: Any) -> None:
    tts.conds = None
    with pytest.raises(ValueError, match="prepare_conditionals"):
        lab.generate_stream(tts, TEXT)


def test_presets_are_the_reports() -> None:
    sizes = [(preset.chunk_size, preset.context_window) for preset in (lab.BASELINE, lab.BALANCED, lab.BEST_RTF)]
    assert sizes == [(25, 50), (50, 100), (75, 150)]


def test_numbers_of_other_kinds_are_taken_as_numbers() -> None:
    assert lab.StreamSettings(chunk_size=torch.tensor(30), temperature=1).chunk_size == 30


def test_settings_are_frozen_and_hashable() -> None:
    with pytest.raises(AttributeError):
        lab.BALANCED.chunk_size = 1
    assert lab.BALANCED.replace(chunk_size=25, context_window=50) == lab.BASELINE
    assert len({lab.BALANCED, lab.BASELINE, lab.BASELINE.replace()}) == 2


def test_the_tiny_voice_stays_small() -> None:
    assert config.TINY.t3_layers >= 14
    assert config.TINY.t3_heads >= 16


def test_a_growing_chunk_needs_room_to_grow() -> None:
    with pytest.raises(ValueError, match="max_chunk_size=10"):
        lab.BALANCED.replace(schedule="grow", chunk_size=20, max_chunk_size=10)
    assert lab.BALANCED.replace(chunk_size=300).chunk_size == 300  # a fixed one needs none


def test_schedules_are_endless_and_the_fade_is_at_most_half_a_chunk() -> None:
    assert list(itertools.islice(lab.BASELINE.chunk_sizes(), 3)) == [25, 25, 25]
    assert list(itertools.islice(lab.ADAPTIVE.chunk_sizes(), 6)) == [25, 49, 98, 196, 250, 250]
    assert lab.BASELINE.replace(chunk_size=2, fade_duration=5).fade == 0.04
    assert [lab.BASELINE.replace(context_window=size).context for size in (0, 1, 50)] == [1, 1, 50]
    assert lab.BASELINE.replace(context_window=0, fade_duration=0).context == 0
