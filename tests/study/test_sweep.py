from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import joblib
import pandas as pd
import pytest
import torch
from dask.distributed import Client, LocalCluster

from chatterbox_lab.__main__ import main
from chatterbox_lab.engine.clock import StreamMetrics
from chatterbox_lab.engine.s3gen.encoder import Encoder
from chatterbox_lab.engine.s3gen.vocoder import Vocoder
from chatterbox_lab.engine.schedule import Costs
from chatterbox_lab.engine.settings import StreamSettings
from chatterbox_lab.study import chunks, machine, sweep
from chatterbox_lab.study.chunks import chunks_of, measured_chunks
from chatterbox_lab.study.records import Record
from chatterbox_lab.voices.build import LabTTS

QUIET = {"progress": False}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATTERBOX_LAB_OUTPUT", str(tmp_path))
    monkeypatch.setitem(chunks.PROMPTS, "word", "Hello.")


@pytest.fixture
def here(tts: LabTTS, monkeypatch: pytest.MonkeyPatch) -> Iterator[sweep.Sweep]:
    """Points run on the shared model; nothing is kept between tests."""
    monkeypatch.setattr(sweep, "load", lambda *_, **__: tts)
    yield sweep.Sweep(device="cpu")
    for kept in (sweep._model, sweep._facts):
        kept.cache_clear()
    sweep._WARM.clear()


def small() -> list[sweep.Point]:
    return sweep.grid([2, 4], [0, 3], prompts=["word"], backend=["static"])


def keys(table: pd.DataFrame) -> list[tuple]:
    return sorted(map(tuple, table[[*sweep.RUN, "chunk"]].to_numpy().tolist()))


def test_a_grid_is_every_combination_checked() -> None:
    points = sweep.grid([25, 50], prompts=["short", "long"], backend=["hf", "static"], schedule=["fixed", "grow"])
    assert len(points) == 2 * 2 * 2 * 2
    assert {(point.settings.chunk_size, point.settings.context_window) for point in points} == {(25, 50), (50, 100)}
    assert len(sweep.grid([25, 25], [0])) == 1
    texts = [sweep.Point(name, StreamSettings()).tokens for name in ("short", "medium", "long")]
    assert texts == sorted(texts)
    assert texts[0] >= 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(([0],), "chunk_size=0"), (([25], [-1]), "context_window=-1"), (([],), "at least one value")],
)
def test_what_no_grid_can_hold_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep.grid(*arguments)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="prompt='epic'"):
        sweep.grid([25], prompts=["epic"])
    with pytest.raises(ValueError, match="speed="):
        sweep.grid([25], speed=[1])
    with pytest.raises(ValueError, match="analyzer='stock' with backend='static'"):
        sweep.grid([25], analyzer=["stock"], backend=["static"])


def test_every_chunk_is_a_row_and_the_rows_add_up(here: sweep.Sweep, tmp_path: Path) -> None:
    points = small()
    table = sweep.measure(points, here, Record(tmp_path / "sweep.csv"), rounds=2, **QUIET)
    assert table["error"].isna().all()
    for _, run in table.groupby(sweep.RUN):
        assert run["new_tokens"].sum() == points[0].tokens
        assert run["audio_seconds"].sum() == pytest.approx(points[0].tokens * 0.04)
        assert run["arrival_seconds"].is_monotonic_increasing
        said = run["new_tokens"].cumsum().shift(fill_value=0)
        context = said.clip(upper=max(1, run["context_window"].iloc[0]))  # a cross-fade needs a token
        assert run["window_tokens"].tolist() == (10 + context + run["new_tokens"]).tolist()
        stages = run[["t3_seconds", "s3gen_seconds", "watermark_seconds"]].sum().sum()
        assert 0 < stages <= run["arrival_seconds"].iloc[-1]
    saved = pd.read_csv(tmp_path / "sweep.csv")
    assert keys(saved) == keys(table)
    assert set(saved["machine"]) == set(table["machine"])
    assert not list(tmp_path.glob("*unfinished*"))
    summed = sweep.summary(table)
    assert len(summed) == len(points)
    assert summed["front"].any()
    assert (summed["lowest RTF"] <= summed["RTF"]).all()
    assert sweep.report(table).count("\n") > len(points)


def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the windows that S3Gen's encoder gets from now on."""
    seen: list[int] = []
    encode = Encoder.__call__

    def spy(self: Encoder, tokens: torch.Tensor) -> torch.Tensor:
        seen.append(tokens.shape[1])
        return encode(self, tokens)

    monkeypatch.setattr(Encoder, "__call__", spy)
    return seen


def test_the_windows_that_are_reported_are_those_that_s3gen_works_on(
    tts: LabTTS, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watched(monkeypatch)
    chosen = StreamSettings(chunk_size=2, context_window=4, schedule="grow", costs=Costs(), max_chunk_size=9)
    rows = list(measured_chunks(tts, "Hello.", chosen, seed=0, tokens=30))
    assert [row["window_tokens"] for row in rows] == seen
    assert [row["new_tokens"] for row in rows] == [2, 3, 6, 9, 9, 1]


def test_windows_are_made_of_the_parts_they_are_asked_for(tts: LabTTS, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(monkeypatch)
    parts = [(1, 0, 4), (2, 3, 6)]
    rows = pd.DataFrame(sweep.windows(tts, parts, rounds=2))
    assert rows["window_tokens"].tolist() == [14, 14, 14, 14]
    assert rows["prompt_tokens"].tolist() == [10, 5, 5, 10]  # to and fro
    turn = [5 + 3, 14, 14]  # the second window's context first
    assert sorted(seen) == sorted(turn * 3)
    assert (rows["s3gen_seconds"] > 0).all()
    assert tts.conds.gen["prompt_token"].shape[1] == 10


def test_the_command_line_records_windows(
    here: sweep.Sweep, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep, "WINDOWS", ((1, 0, 4), (2, 3, 6)))
    monkeypatch.setattr(sweep.windows, "__defaults__", (sweep.WINDOWS,))
    assert main(["sweep", "--device", "cpu", "--windows", "--rounds", "1"]) == 0
    assert len(pd.read_csv(tmp_path / "data" / "windows_tiny.csv")) == 2
    assert "window_tokens" in capsys.readouterr().out


def test_rounds_run_to_and_fro(here: sweep.Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[int, int]] = []

    def note(self: sweep.Sweep, point: sweep.Point, number: int) -> list[dict[str, Any]]:
        order.append((point.settings.chunk_size, number))
        return []

    monkeypatch.setattr(sweep.Sweep, "once", note)
    sweep.measure(sweep.grid([1, 2], [0], prompts=["word"]), here, Record(tmp_path / "sweep.csv"), rounds=3, **QUIET)
    assert order == [(1, 0), (2, 0), (2, 1), (1, 1), (1, 2), (2, 2)]


def interrupted(after: int, error: Callable[[], BaseException]) -> Callable[..., list[dict[str, Any]]]:
    calls: list[int] = []
    once = sweep.Sweep.once

    def stop(self: sweep.Sweep, point: sweep.Point, number: int) -> list[dict[str, Any]]:
        calls.append(number)
        if len(calls) > after:
            raise error()
        return once(self, point, number)

    return stop


@pytest.mark.parametrize("after", [0, 1, 5])
def test_an_interrupted_sweep_keeps_what_was_done_and_goes_on(
    here: sweep.Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    path = tmp_path / "sweep.csv"
    with monkeypatch.context() as patched:
        patched.setattr(sweep.Sweep, "once", interrupted(after, KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sweep.measure(small(), here, Record(path), rounds=2, **QUIET)
    assert not path.exists()
    if after:
        kept = pd.read_csv(path.with_suffix(".unfinished.csv"))
        assert len(sweep.by_run(kept.assign(error=None))) == after
        with pytest.raises(ValueError, match="resume"):
            Record(path)
    table = sweep.measure(small(), here, Record(path, resume=True), rounds=2, **QUIET)
    assert len(set(keys(table))) == len(table)
    assert len(sweep.by_run(table)) == 2 * len(small())
    again = sweep.measure(small(), here, Record(path, resume=True), rounds=2, **QUIET)
    assert keys(again) == keys(table)


def test_a_record_of_something_else_is_not_gone_on_with(here: sweep.Sweep, tmp_path: Path) -> None:
    path = tmp_path / "sweep.csv"
    sweep.measure(small()[:1], here, Record(path), rounds=1, **QUIET)
    with pytest.raises(ValueError, match="measured with seed 0, here it is 1"):
        sweep.measure(small(), sweep.Sweep(device="cpu", seed=1), Record(path, resume=True), **QUIET)


def test_a_point_that_fails_is_a_row_and_runs_again_when_resumed(
    here: sweep.Sweep, tts: LabTTS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sweep.csv"
    with monkeypatch.context() as patched:
        patched.setattr(Vocoder, "__call__", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
        failed = sweep.measure(small()[:1], here, Record(path), rounds=1, **QUIET)
    assert failed["error"].tolist() == ["RuntimeError: out of memory"]
    table = sweep.measure(small()[:1], here, Record(path, resume=True), rounds=1, **QUIET)
    assert table["error"].isna().all()


def stream(times: list[float]) -> Any:
    for number, time in enumerate(times, 1):
        yield (
            torch.zeros(1, 1),
            StreamMetrics(
                total_generation_time=time, total_audio_duration=float(number), tokens=25 * number, t3_seconds=time / 2
            ),
        )


def rows_of(times: list[float], chunk_size: int) -> list[dict[str, Any]]:
    key = sweep.Point("short", StreamSettings(chunk_size=chunk_size)).key
    facts = {"machine": "here", "cores": 2, "device": "cpu", "dtype": "float32", "round": 0, "error": None}
    return [facts | key | row for row in chunks_of(stream(times))]


def test_runs_say_what_a_listener_gets() -> None:
    table = pd.DataFrame(rows_of([1.0, 1.5, 4.0], 25) + rows_of([0.5, 1.0, 1.5], 50) + rows_of([2.0, 2.5, 3.0], 75))
    found = sweep.summary(table).set_index("chunk_size")
    assert found.loc[25, "underruns"] == 1
    assert found.loc[25, "silence (s)"] == 1.0
    assert found.loc[50, "RTF"] == 0.5
    assert found["front"].to_dict() == {25: False, 50: True, 75: False}
    assert table["t3_seconds"].tolist()[:3] == [0.5, 0.25, 1.25]


AVX512 = {"cpu_family": 25, "cpu_model": 17, "cpu_capability": "AVX512", "bfloat16": True}
AVX2 = {"cpu_family": 25, "cpu_model": 1, "cpu_capability": "AVX2", "bfloat16": False}


@pytest.mark.parametrize("other", [AVX2, AVX512 | {"cpu_model": 2}, AVX512 | {"cores": 8}, {}, {"machine": "there"}])
def test_a_summary_mixes_no_kinds_of_cpu(other: dict[str, Any], tmp_path: Path) -> None:
    fast, slow = rows_of([0.5, 1.0, 1.5], 50), rows_of([2.0, 4.0, 6.0], 50)
    record = Record(tmp_path / "sweep.csv")
    record.add([row | AVX512 for row in fast] + [row | other | {"round": 1} for row in slow])
    for table in (record.table(), Record(tmp_path / "sweep.csv", resume=True).table()):
        found = sweep.summary(table)
        assert found["RTF"].tolist() == [0.5, 2.0]
        assert found["front"].tolist() == [True, True]  # each is the best of its machine
        assert found["on"].is_unique
        assert "here with AVX512 and bfloat16, 2 cores, family 25, model 17" in set(found["on"])
        assert sweep.by_run(table)["on"].tolist() == found["on"].tolist()
        assert all(f"{on}, cpu, T3 in float32, short:" in sweep.report(table) for on in found["on"])


def test_one_kind_of_cpu_is_summed_up_as_one_also_where_a_file_has_made_its_numbers_floats(tmp_path: Path) -> None:
    record = Record(tmp_path / "sweep.csv")
    record.add([row | AVX512 for row in rows_of([0.5, 1.0], 50)])
    read = Record(tmp_path / "sweep.csv", resume=True).table().astype({"cpu_family": float, "cpu_model": float})
    table = pd.concat([read, pd.DataFrame([row | AVX512 | {"round": 1} for row in rows_of([1.5, 3.0], 50)])])
    assert "on" not in sweep.by_run(table)
    assert sweep.summary(table)["RTF"].tolist() == [1.0]
    assert sweep.report(table).startswith("cpu, T3 in float32, short:")


def test_a_sweep_goes_on_with_what_another_kind_of_cpu_has_measured(
    here: sweep.Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, facts = tmp_path / "sweep.csv", sweep.machine_facts("cpu")
    points = small()[:2]
    with monkeypatch.context() as patched:
        patched.setattr(sweep, "machine_facts", lambda device: facts | AVX2 | {"cpu_family": 0})
        sweep.measure(points[:1], here, Record(path), rounds=1, **QUIET)
    sweep._facts.cache_clear()
    table = sweep.measure(points, here, Record(path, resume=True), rounds=1, **QUIET)
    assert set(sweep.summary(table)["on"]) == {
        machine.kind_in_words(facts), machine.kind_in_words(facts | AVX2 | {"cpu_family": 0}),
    }  # fmt: skip


def test_windows_of_another_kind_of_cpu_are_not_gone_on_with(
    here: sweep.Sweep, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = sweep.machine_facts("cpu") | AVX2 | {"cpu_family": 0}
    path = tmp_path / "data" / "windows_tiny.csv"
    path.parent.mkdir()
    pd.DataFrame([facts | {"model": "tiny", "dtype": "float32", "seed": 0, "watermark": True}]).to_csv(path)
    with pytest.raises(SystemExit):
        main(["sweep", "--device", "cpu", "--windows", "--rounds", "1", "--resume"])
    assert "windows_tiny.csv was measured with cpu_" in capsys.readouterr().err


def test_a_sweep_of_which_nothing_worked_says_so() -> None:
    failed = [row | {"error": "RuntimeError: out of memory"} for row in rows_of([1.0], 25)]
    assert sweep.report(pd.DataFrame(failed)) == "FAILED short, chunk 25, auto: RuntimeError: out of memory"


def test_the_command_line_runs_over_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--chunk-size", "40", "80", "--prompt", "short", "--rounds", "1", "--jobs", "2"]
    assert main(["sweep", *arguments, "--no-watermark"]) == 0
    said = capsys.readouterr().out
    table = pd.read_csv(tmp_path / "data" / "sweep_tiny.csv")
    assert len(sweep.by_run(table)) == 2
    assert f"{len(table)} rows are in sweep_tiny.csv" in said


def test_the_same_call_runs_on_a_dask_cluster(tmp_path: Path) -> None:
    points = sweep.grid([40, 80], prompts=["short"])
    patient = dict.fromkeys(("distributed.comm.timeouts.connect", "distributed.comm.timeouts.tcp"), "600s")
    with (
        dask.config.set(patient),  # on a busy machine a worker takes minutes to import PyTorch
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        table = sweep.measure(points, sweep.Sweep(device="cpu"), Record(tmp_path / "sweep.csv"), rounds=1, **QUIET)
    assert table["error"].isna().all()
    assert len(sweep.by_run(table)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chunk-size", "0"], "chunk_size=0"),
        (["--rounds", "0"], "rounds=0"),
        (["--jobs", "0"], "jobs=0"),
        (["--seed", "-1"], "seed=-1"),
        (["--device", "tpu"], "device='tpu'"),
        (["--analyzer", "stock"], "analyzer='stock'"),
    ],
)
def test_the_command_line_says_what_is_wrong(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["sweep", *arguments])
    assert message in capsys.readouterr().err


def test_an_interrupt_at_the_command_line_says_how_to_go_on(
    here: sweep.Sweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep.Sweep, "once", interrupted(1, KeyboardInterrupt))
    assert main(["sweep", "--device", "cpu", "--chunk-size", "20", "30", "--prompt", "short", "--rounds", "1"]) == 130
    assert "--resume goes on" in capsys.readouterr().out
