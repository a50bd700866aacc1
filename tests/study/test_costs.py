from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

import chatterbox_lab as lab
from chatterbox_lab.engine.schedule import Costs
from chatterbox_lab.engine.settings import BASELINE, StreamSettings
from chatterbox_lab.engine.t3.backends import BACKENDS
from chatterbox_lab.study import costs
from chatterbox_lab.study.playout import Playout, expected, play
from chatterbox_lab.study.sweep import WINDOWS
from chatterbox_lab.voices.build import LabTTS

TRUE = Costs(token=0.007, prefill=0.04, chunk=0.02, window_token=0.0005)


def chunks(machine: Costs, noise: float = 0.0, seed: int = 0) -> pd.DataFrame:
    """What `measured_chunks` says of a machine with these costs, each time off by at most ``noise``."""
    draw = np.random.default_rng(seed)
    settings = StreamSettings(chunk_size=5, context_window=50, schedule="grow")
    rows = []
    for _ in range(4):
        for number, chunk in enumerate(expected(machine, settings.chunk_sizes(), 300, settings.context)):
            factor = 1 + draw.uniform(-noise, noise, 2)
            rows.append(
                {
                    "chunk": number,
                    "new_tokens": chunk.new,
                    "context_tokens": chunk.before,
                    "prompt_tokens": machine.prompt_tokens,
                    "window_tokens": machine.prompt_tokens + chunk.before + chunk.new,
                    "t3_seconds": factor[0] * (machine.token * chunk.new + machine.prefill * (number == 0)),
                    "s3gen_seconds": factor[1] * machine.render_seconds(chunk.new, chunk.before) * 0.9,
                    "watermark_seconds": factor[1] * machine.render_seconds(chunk.new, chunk.before) * 0.1,
                }
            )
    return pd.DataFrame(rows)


def test_the_fit_finds_the_costs_that_made_the_times() -> None:
    found = costs.fit(chunks(TRUE))
    for name in ("token", "prefill", "chunk", "window_token"):
        assert getattr(found.costs, name) == pytest.approx(getattr(TRUE, name), rel=1e-3)
    assert found.costs.prompt_tokens == 250
    assert found.costs.error == pytest.approx(0, abs=1e-3)
    assert min(found.explained.values()) == pytest.approx(1)


def test_the_fits_error_is_that_of_the_measurements() -> None:
    times = chunks(TRUE, noise=0.1)
    found = costs.fit(times)
    off = (found.coefficients["value"] - pd.Series(vars(TRUE))[found.coefficients.index]).abs()
    assert (off < 3 * found.coefficients["error"]).all()
    took = times["t3_seconds"] + times["s3gen_seconds"] + times["watermark_seconds"]
    within = took <= costs.predicted(found.costs, times) * (1 + found.costs.error)
    assert 0.85 <= within.mean() <= 0.95
    assert 0.02 < found.costs.error < 0.1


def test_too_few_chunks_are_refused() -> None:
    with pytest.raises(ValueError, match="not 2"):
        costs.fit(chunks(TRUE).head(2))
    with pytest.raises(ValueError, match="of different sizes"):
        costs.fit(pd.concat([chunks(TRUE).head(1)] * 5))


def test_a_window_fit_tells_the_prompt_from_the_rest_and_gives_the_same_costs() -> None:
    rows = pd.DataFrame(WINDOWS, columns=["prompt_tokens", "context_tokens", "new_tokens"])
    inside = rows["context_tokens"] + rows["new_tokens"]
    rows["s3gen_seconds"] = 0.01 + 0.0004 * rows["prompt_tokens"] + 0.0006 * inside
    found = costs.fit_windows(rows)
    assert found.coefficients["value"].to_dict() == pytest.approx(
        {"chunk": 0.01, "prompt_token": 0.0004, "window_token": 0.0006}
    )
    for prompt, context, new in WINDOWS:
        if prompt == found.costs.prompt_tokens:
            cost = 0.01 + 0.0004 * prompt + 0.0006 * (context + new)
            assert found.costs.render_seconds(new, context) == pytest.approx(cost)


@pytest.mark.parametrize("target", costs.TARGETS)
def test_advice_says_why_and_is_a_setting(target: str) -> None:
    said = costs.advise(TRUE, target, BASELINE.replace(backend="static"))
    assert isinstance(said, StreamSettings)
    assert said.backend == "static"
    assert str(said.chunk_size) in said.reason
    assert "7 ms a token" in said.reason
    pasted = eval(said.call, {"StreamSettings": StreamSettings, "Costs": Costs})
    assert pasted == StreamSettings(**{name: getattr(said, name) for name in vars(pasted)})
    assert said.replace(temperature=0.5).temperature == 0.5


def heard(settings: StreamSettings, machine: Costs) -> Playout:
    found = expected(machine, settings.chunk_sizes(), 1000, settings.context, settings.fade)
    return play([chunk.arrival for chunk in found], [chunk.seconds for chunk in found])


def test_targets_are_what_they_say() -> None:
    latency, balanced, rtf = (costs.advise(TRUE, target) for target in costs.TARGETS)
    assert latency.chunk_size < balanced.chunk_size < rtf.chunk_size
    assert (latency.schedule, balanced.schedule, rtf.schedule) == ("grow", "grow", "fixed")
    slow = TRUE.slower(costs.HEADROOM)
    assert heard(latency, TRUE).underruns == heard(balanced, TRUE).underruns == heard(balanced, slow).underruns == 0
    assert heard(latency, slow).underruns > 0
    lowest = TRUE.rtf(rtf.max_chunk_size, rtf.context, 500)
    assert TRUE.rtf(rtf.chunk_size, rtf.context, 500) <= costs.NEAR * lowest
    assert TRUE.rtf(rtf.chunk_size - 1, rtf.context, 500) > costs.NEAR * lowest


@pytest.mark.parametrize("machine", [Costs(token=0.3, chunk=1, window_token=0.08), Costs(token=0.035, chunk=3)])
def test_a_machine_that_cannot_keep_up_is_told_so(machine: Costs) -> None:
    said = costs.advise(machine, "latency")
    assert "does not keep up" in said.reason
    assert said.schedule == "fixed"


def test_balanced_gives_up_its_headroom_before_the_growing_schedule() -> None:
    tight = Costs(token=0.028, window_token=0.0005)
    said = costs.advise(tight, "balanced")
    assert said.costs == tight
    assert said.schedule == "grow"
    assert "by these costs" in said.reason


def test_a_busy_machine_is_told_from_a_slow_one() -> None:
    busy = costs.advise(replace(TRUE, error=10.0), "balanced")
    assert "would keep up, but not with times that vary by 1000%" in busy.reason
    assert busy.schedule == "fixed"


def test_a_model_is_measured(tts: LabTTS) -> None:
    found = costs.calibrate(tts, BASELINE.replace(backend="static"), tokens=40, seconds=0.1)
    assert found.chunks >= 3
    assert found.costs.token > 0
    assert found.costs.prompt_tokens == 10  # of the test's voice


def test_lab_recommend_measures_and_chooses_a_backend(tts: LabTTS, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "calibrate", lambda *_, **__: costs.Fit(TRUE, pd.DataFrame(), {}, 5))
    said = lab.recommend(tts, "latency")
    assert said.backend in ("hf", "static")
    assert said.costs == TRUE
    assert "'hf'" in said.reason
    assert "'static'" in said.reason
    audio = [chunk for chunk, _ in lab.generate_stream(tts, "Hello.", said, seed=0, max_new_tokens=30, ignore_eos=True)]
    assert sum(chunk.shape[1] for chunk in audio) == 30 * 960


def test_every_exact_backend_that_fits_is_a_candidate(tts: LabTTS, monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = costs.exact_backends
    assert candidates(tts.t3, BASELINE) == ["hf", "static"]  # to compile takes longer than a recommendation may
    for analyzer in ("stock", "layer"):  # they need attention maps
        assert candidates(tts.t3, BASELINE.replace(analyzer=analyzer)) == ["hf"]
    assert candidates(tts.t3, BASELINE.replace(weights="int8")) == ["static"]
    monkeypatch.setitem(BACKENDS, "mine", BACKENDS["static"])
    assert candidates(tts.t3, BASELINE) == ["hf", "static", "mine"]
    for other in ({"exact": False}, {"devices": ("cuda",)}, {"analyzers": ("probe",)}):
        monkeypatch.setitem(BACKENDS, "mine", replace(BACKENDS["static"], **other))
        assert "mine" not in candidates(tts.t3, BASELINE)


def test_a_model_that_is_hooked_into_runs_as_transformers_has_it(tts: LabTTS) -> None:
    hook = tts.t3.tfmr.layers[0].mlp.register_forward_hook(lambda *_: None)
    try:
        assert costs.exact_backends(tts.t3, BASELINE) == ["hf"]
    finally:
        hook.remove()


def test_backends_take_turns_and_the_first_turn_does_not_count(tts: LabTTS, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(costs, "speech_tokens", lambda tts, text, settings, **_: said.append(settings.backend))
    assert set(costs.token_seconds(tts, BASELINE, ["hf", "static"])) == {"hf", "static"}
    assert said == ["static", "hf", "hf", "static", "static", "hf", "hf", "static"]


def test_wrong_arguments_are_refused_before_a_model_runs(tts: LabTTS, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Iterator[Any]:
        raise AssertionError("ran")

    monkeypatch.setattr(costs, "measured_chunks", never)
    monkeypatch.setattr(costs, "speech_tokens", never)
    with pytest.raises(ValueError, match="target='fast'"):
        lab.recommend(tts, "fast")
    with pytest.raises(ValueError, match="backends="):
        lab.recommend(tts, backends=())
    with pytest.raises(ValueError, match="backend='graph'"):
        lab.recommend(tts, backends=("static", "graph"))
    with pytest.raises(ValueError, match="tokens=5"):
        costs.calibrate(tts, tokens=5)
