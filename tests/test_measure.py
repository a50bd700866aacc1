from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from PIL import Image

import chatterbox_lab as lab
from chatterbox_lab import bench, figures, measure


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


def test_every_measurement_knows_its_machine() -> None:
    facts = measure.machine_facts("cpu")
    assert facts["device"] == "cpu"
    assert facts["cores"] >= 1
    assert facts["torch"] == torch.__version__.split("+")[0]
    assert facts["transformers"] == "4.46.3"
    assert facts["chatterbox-streaming"] == "0.1.2"
    assert not any(isinstance(value, str) and "/" in value for value in facts.values())


def test_results_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pd.DataFrame({"rtf": [0.5, 0.6]})
    path = measure.save_results(table, "runs", {"machine": "here"})
    assert path == tmp_path / "data" / "runs.csv"
    before = path.read_bytes()

    def half(self: pd.DataFrame, target: Path, **_: Any) -> None:
        target.write_text("rtf\n0.")
        raise KeyboardInterrupt

    monkeypatch.setattr(pd.DataFrame, "to_csv", half)
    with pytest.raises(KeyboardInterrupt):
        measure.save_results(table, "runs", {})
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["runs.csv"]


def test_a_missing_record_names_what_there_is() -> None:
    assert "4.46.3" in set(measure.load_results("transformers")["transformers"])
    with pytest.raises(FileNotFoundError, match=r"'nothing'.*transformers"):
        measure.load_results("nothing")


def test_figures_carry_where_they_come_from(tmp_path: Path) -> None:
    figures.set_style()
    drawn, axes = plt.subplots()
    axes.plot([0, 1])
    shown = figures.show(drawn, "00_test", figures.provenance("tiny"))
    png, svg = (tmp_path / "figures" / f"00_test.{kind}" for kind in ("png", "svg"))
    assert shown.data == png.read_bytes()
    assert "model: tiny" in Image.open(png).text["Description"]
    assert "model: tiny | machine:" in svg.read_text()
    assert not plt.fignum_exists(drawn.number)


def stream(rtf: float, chunks: int = 2) -> Any:
    metrics = measure.StreamMetrics(rtf=rtf, latency_to_first_chunk=rtf, tokens=5)
    return iter([(torch.zeros(1, 1), metrics)] * chunks)


def test_variants_take_turns_and_ratios_are_within_rounds() -> None:
    order: list[str] = []
    clock = {"slow": iter([9.0, 2.0, 4.0, 8.0]), "fast": iter([9.0, 1.0, 2.0, 2.0])}

    def start(name: str) -> Any:
        order.append(name)
        return stream(next(clock[name]))

    runs = bench.interleaved({name: lambda name=name: start(name) for name in clock}, rounds=3)
    assert order == ["slow", "fast"] * 4
    assert runs["warm"].tolist() == [False, False] + [True] * 6
    table = bench.summary(runs, against="slow")
    assert table.loc["fast", "RTF"] == 2.0
    assert table.loc["fast", "RTF ratio"] == 0.5
    assert table.loc["fast", "ratio range"] == "0.25 to 0.50"
    with pytest.raises(ValueError, match="against='medium'"):
        bench.summary(runs, against="medium")
    with pytest.raises(ValueError, match="rounds=0"):
        bench.interleaved({}, rounds=0)


def test_the_clock_waits_for_the_device_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[Any] = []
    monkeypatch.setattr(measure, "synchronize", waited.append)
    clock = measure.StageClock("cuda")
    with clock.stage("t3"):
        assert waited == ["cuda"]
    assert waited == ["cuda"] * 2


def test_a_variant_that_says_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="'silent'"):
        bench.interleaved({"silent": lambda: iter([])}, rounds=1)


def test_the_command_line_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "runs.csv"
    common = ["--model", "tiny", "--device", "cpu", "--chunk-size", "3", "--chunks", "1"]
    assert bench.main([*common, "--rounds", "1", "--analyzers", "off", "--output", str(output)]) == 0
    assert "RTF ratio" in capsys.readouterr().out
    runs = pd.read_csv(output)
    assert runs["variant"].tolist() == ["upstream", "ours, off"] * 2
    assert set(runs["tokens"]) == {3}
    assert {"torch", "commit", "machine", "model", "chunk_size"} <= set(runs.columns)


@pytest.mark.parametrize("wrong", [["--device", "cuda:99"], ["--rounds", "0"], ["--chunk-size", "0"], ["--model", "x"]])
def test_the_command_line_names_what_is_wrong(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(wrong)
    assert wrong[1] in capsys.readouterr().err


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
