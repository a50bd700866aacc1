from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import chatterbox_lab as lab
from chatterbox_lab.engine import clock as measure
from chatterbox_lab.study import machine


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATTERBOX_LAB_OUTPUT", str(tmp_path))


def flags() -> tuple[str, bool, bool]:
    backends = torch.backends
    return torch.get_float32_matmul_precision(), backends.cudnn.benchmark, backends.cuda.matmul.allow_tf32


def test_the_reports_flags_are_set_and_restored() -> None:
    before = flags()
    restored = lab.tune_torch()
    assert flags() == ("high", True, True)
    restored.restore()
    assert flags() == before
    with pytest.raises(RuntimeError), lab.tune_torch():
        raise RuntimeError
    assert flags() == before


def test_the_clock_waits_for_the_device_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[Any] = []
    monkeypatch.setattr(measure, "synchronize", waited.append)
    clock = measure.StageClock("cuda")
    with clock.stage("t3"):
        assert waited == ["cuda"]
    assert waited == ["cuda"] * 2


def test_a_stage_that_fails_is_still_counted() -> None:
    clock = measure.StageClock("cpu")
    with pytest.raises(KeyError), clock.stage("t3"):
        raise KeyError
    assert clock.calls["t3"] == 1
    assert clock.seconds["t3"] > 0


def test_a_closed_measurement_closes_its_chunks() -> None:
    closed = []

    def chunks() -> Any:
        try:
            yield torch.zeros(1, 960)
            yield torch.zeros(1, 960)
        finally:
            closed.append(True)

    running = measure.measured(chunks(), measure.StageClock("cpu"), 24000)
    _, metrics = next(running)
    running.close()
    assert closed == [True]
    assert metrics.total_audio_duration == 0.04


def test_reading_more_takes_longer() -> None:
    assert machine.read_seconds(2**28, "cpu") > machine.read_seconds(2**20, "cpu") > 0
