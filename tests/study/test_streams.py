from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from chatterbox_lab.__main__ import main
from chatterbox_lab.engine.clock import StreamMetrics
from chatterbox_lab.engine.stream import speech_tokens
from chatterbox_lab.files import REPOSITORY
from chatterbox_lab.study import benchmark, machine, streams
from chatterbox_lab.voices.build import LabTTS

SHORT = ["--model", "tiny", "--device", "cpu", "--chunk-size", "3", "--tokens", "3", "--rounds", "2"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATTERBOX_LAB_OUTPUT", str(tmp_path))


@pytest.fixture
def loaded(tts: LabTTS, monkeypatch: pytest.MonkeyPatch) -> LabTTS:
    """The command line measures the shared model instead of loading one."""
    monkeypatch.setattr(benchmark, "load", lambda *_, **__: tts)
    return tts


def keys(path: Path) -> list[tuple]:
    return sorted(map(tuple, pd.read_csv(path)[benchmark.KEY].to_numpy().tolist()))


def stream(rtf: float, chunks: int = 2) -> Any:
    metrics = StreamMetrics(rtf=rtf, latency_to_first_chunk=rtf, tokens=5, chunk_count=chunks, total_audio_duration=1.0)
    return iter([(torch.zeros(1, 1), metrics)] * chunks)


def test_variants_take_turns_and_ratios_are_within_rounds() -> None:
    order: list[str] = []
    clock = {"slow": iter([9.0, 2.0, 4.0, 8.0]), "fast": iter([9.0, 1.0, 2.0, 2.0])}

    def start(name: str) -> Any:
        order.append(name)
        return stream(next(clock[name]))

    runs = streams.interleaved({name: lambda name=name: start(name) for name in clock}, rounds=3)
    assert order == ["slow", "fast"] * 2 + ["fast", "slow"] + ["slow", "fast"]  # to and fro
    assert runs["state"].tolist() == ["warm-up"] * 2 + ["warm"] * 6
    table = streams.summary(runs, against="slow")
    assert table.loc["fast", "RTF"] == 2.0
    assert table.loc["fast", "RTF ratio"] == 0.5
    assert table.loc["fast", "ratio range"] == "0.25 to 0.50"
    with pytest.raises(ValueError, match="against='medium'"):
        streams.summary(runs, against="medium")
    with pytest.raises(ValueError, match="rounds=0"):
        streams.interleaved({}, rounds=0)


def test_every_backend_is_a_variant_of_ours_where_it_can_be() -> None:
    ours = dict(streams.ours(("stock", "off"), ("hf", "static", "static-int8")))
    assert ours == {
        "ours, stock": {"analyzer": "stock", "backend": "hf"},
        "ours, off": {"analyzer": "off", "backend": "hf"},
        "ours, off, static": {"analyzer": "off", "backend": "static"},
        "ours, off, static-int8": {"analyzer": "off", "backend": "static", "weights": "int8"},
    }


def test_a_variant_that_fails_is_a_row_and_the_others_go_on() -> None:
    calls: list[str] = []

    def broken() -> Any:
        calls.append("broken")
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return stream(1.0)

    rows = list(streams.runs({"broken": broken, "whole": lambda: stream(0.5)}, rounds=3))
    assert calls == ["broken"] * 2
    assert [(row["variant"], row["state"], row["error"]) for row in rows] == [
        ("broken", "warm-up", None),
        ("whole", "warm-up", None),
        ("broken", "warm", "OutOfMemoryError: CUDA out of memory."),
        *[("whole", "warm", None)] * 3,
    ]
    assert rows[2].keys() == rows[3].keys()


def test_a_variant_that_says_nothing_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"'silent'.*yielded nothing"):
        streams.interleaved({"silent": lambda: iter([])}, rounds=1)


def test_what_is_done_is_not_run_again_but_warmed_up_where_something_is_left() -> None:
    done = {("a", "warm-up", -1), ("a", "warm", 0), ("a", "warm", 1), ("b", "warm-up", -1), ("b", "warm", 0)}
    rows = streams.runs({"a": lambda: stream(1.0), "b": lambda: stream(1.0)}, rounds=2, done=done)
    assert [(row["variant"], row["round"]) for row in rows] == [("b", -1), ("b", 1)]


def test_the_command_line_measures_a_grid(loaded: LabTTS, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "runs.csv"
    grid = ["--chunk-size", "0", "2", "3", "--context-window", "4", "--dtype", "float32", "--analyzers", "off"]
    assert main(["streams", *SHORT, *grid, "--check", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "RTF ratio" in printed
    assert "same tokens as upstream, ours, off: 3 of 3 seeds (at least 3 tokens)" in printed
    assert "MB of weights once takes" in printed
    runs = pd.read_csv(output)
    measured = runs[runs["state"] != "check"]
    for shape, rows in measured.groupby(streams.SHAPE):
        assert rows["variant"].tolist() == ["upstream", "ours, off"] * 2 + ["ours, off", "upstream"], shape
        assert rows["round"].tolist() == [-1, -1, 0, 0, 1, 1]
    assert dict(zip(measured["chunk_size"], measured["tokens"], strict=True)) == {0: 3, 2: 4, 3: 3}
    assert dict(zip(measured["chunk_size"], measured["chunk_count"], strict=True)) == {0: 1, 2: 2, 3: 1}
    assert {"torch", "commit", "machine", "model", "dtype", "text", "seed", "step_limit_seconds"} <= set(runs.columns)
    assert (runs["step_bytes"] == machine.step_bytes(loaded.t3)).all()


def test_other_tokens_are_found_out(
    loaded: LabTTS, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = speech_tokens

    def wrong(*args: Any, seed: int, **kwargs: Any) -> torch.Tensor:
        tokens = said(*args, seed=seed, **kwargs)
        tokens[2] += seed == 1
        return tokens

    monkeypatch.setattr(streams, "speech_tokens", wrong)
    assert main(["streams", *SHORT, "--analyzers", "off", "--rounds", "1", "--check"]) == 1
    assert "ours, off: 2 of 3 seeds (at least 2 tokens)" in capsys.readouterr().out


def test_a_failure_is_in_the_table_and_runs_again_on_resuming(
    loaded: LabTTS, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such kernel")

    output = tmp_path / "runs.csv"
    command = ["streams", *SHORT, "--analyzers", "off", "--output", str(output)]
    with monkeypatch.context() as patch:
        patch.setattr(streams, "generate_stream", broken)
        assert main(command) == 1
    assert "FAILED cpu, float32, chunk 3, ours, off: RuntimeError: no such kernel" in capsys.readouterr().out
    assert pd.read_csv(output)["variant"].tolist() == ["upstream", "ours, off", "upstream", "upstream"]
    assert main([*command, "--resume"]) == 0
    runs = pd.read_csv(output)
    assert runs["error"].isna().all()
    assert runs["variant"].value_counts().to_dict() == {"upstream": 3, "ours, off": 3}


def test_an_interrupt_at_any_run_loses_nothing(
    loaded: LabTTS, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, measured = tmp_path / "runs.csv", streams.metrics_of
    command = ["streams", *SHORT, "--analyzers", "off", "--check", "--output", str(output)]
    assert main(command) == 0
    complete, expected = output.read_bytes(), keys(output)
    for calls in range(6):

        def interrupted(start: Any, left: list[None] = [None] * calls) -> Any:
            if not left:
                raise KeyboardInterrupt
            left.pop()
            return measured(start)

        with monkeypatch.context() as patch:
            patch.setattr(streams, "metrics_of", interrupted)
            assert main(command) == 130
        assert output.read_bytes() == complete
        if calls:
            with pytest.raises(SystemExit):
                main(command)
            assert "resume it, or delete the file" in capsys.readouterr().err
        assert main([*command, "--resume"]) == 0
        assert keys(output) == expected
        output.write_bytes(complete)
        assert [file.name for file in tmp_path.glob("*.csv")] == ["runs.csv"]


KILLED = """
import os, signal, sys
from chatterbox_lab.__main__ import main
from chatterbox_lab.study import streams

measured, left = streams.metrics_of, [None] * 4

def metrics_of(start):
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    left.pop()
    return measured(start)

streams.metrics_of = metrics_of
main(sys.argv[1:])
"""


def test_a_killed_benchmark_leaves_the_last_file_and_goes_on(loaded: LabTTS, tmp_path: Path) -> None:
    output, unfinished = tmp_path / "runs.csv", tmp_path / "runs.unfinished.csv"
    output.write_text("the last complete one\n")
    command = ["streams", *SHORT, "--analyzers", "off", "--output", str(output)]
    killed = subprocess.run([sys.executable, "-c", KILLED, *command], capture_output=True, cwd=REPOSITORY)
    assert killed.returncode == -signal.SIGKILL
    assert output.read_text() == "the last complete one\n"
    assert len(pd.read_csv(unfinished)) == 4
    assert main([*command, "--resume"]) == 0
    states = [("warm", 0), ("warm", 1), ("warm-up", -1)]
    expected = [(variant, *state) for variant in ("ours, off", "upstream") for state in states]
    assert [key[4:] for key in keys(output)] == expected


def test_first_calls_have_a_process_of_their_own(loaded: LabTTS, tmp_path: Path) -> None:
    output = tmp_path / "runs.csv"
    common = ["streams", *SHORT, "--analyzers", "off", "--no-watermark", "--output", str(output)]
    assert main([*common, "--rounds", "1", "--cold"]) == 0
    cold = pd.read_csv(output).query("state == 'cold'")
    assert cold["variant"].tolist() == ["upstream", "ours, off"]
    assert (cold["tokens"] == 3).all()
    warmed = pd.read_csv(output).query("state == 'warmed'")
    assert warmed["variant"].tolist() == ["ours, off"]
    assert (warmed["warm_up_seconds"] > 0).all()


def test_a_first_call_loads_what_was_asked_for(loaded: LabTTS, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(benchmark, "load", lambda *model, **how: asked.append((*model, how)) or loaded)
    parser = argparse.ArgumentParser()
    benchmark.add_options(parser)
    grid = benchmark.grid_of(parser.parse_args([*SHORT, "--analyzers", "off", "--no-watermark"]))
    assert benchmark._first_call(grid, "cpu", "float32", "upstream", warmed=False)["tokens"] == 3
    assert asked == [("tiny", {"device": "cpu", "dtype": "float32", "watermark": False})]


def test_a_check_that_fails_is_a_row(
    loaded: LabTTS, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no maps here")

    monkeypatch.setattr(streams, "speech_tokens", broken)
    assert main(["streams", *SHORT, "--analyzers", "off", "--rounds", "1", "--check"]) == 1
    assert capsys.readouterr().out.count("RuntimeError: no maps here") == len(streams.CHECK_SEEDS)


def test_a_model_that_does_not_fit_is_a_row(
    loaded: LabTTS, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: Any, dtype: str, **__: Any) -> LabTTS:
        if dtype == "float16":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loaded

    monkeypatch.setattr(benchmark, "load", load)
    output = tmp_path / "runs.csv"
    command = [
        "streams",
        *SHORT,
        "--dtype",
        "float16",
        "float32",
        "--analyzers",
        "off",
        "--rounds",
        "1",
        "--output",
        str(output),
    ]
    assert main(command) == 1
    assert "FAILED cpu, float16, chunk 3, loading: OutOfMemoryError: CUDA out of memory." in capsys.readouterr().out
    assert pd.read_csv(output)["dtype"].tolist() == ["float16"] + ["float32"] * 4


def test_resuming_compares_like_with_like(loaded: LabTTS, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "runs.csv"
    command = ["streams", *SHORT, "--rounds", "1", "--output", str(output), "--resume", "--analyzers"]
    assert main([*command, "off"]) == 0
    with pytest.raises(SystemExit):
        main([*command, "off", "--tokens", "6"])
    assert "was measured with asked_tokens 3, here it is 6" in capsys.readouterr().err
    before = pd.read_csv(output)
    assert main([*command, "off"]) == 0
    assert pd.read_csv(output)["rtf"].tolist() == before["rtf"].tolist()
    assert main([*command, "off", "probe"]) == 0  # a new variant: its round runs anew with all of them
    after = pd.read_csv(output).query("state == 'warm'")
    assert sorted(after["variant"]) == ["ours, off", "ours, probe", "upstream"]
    assert not set(after["rtf"]) & set(before["rtf"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--device", "cuda:99"], "device='cuda:99': not available here"),
        (["--rounds", "0"], "rounds=0: must be a whole number, at least 1"),
        (["--chunk-size", "-1"], "chunk-size=-1: must be a whole number, at least 0 and at most 1000"),
        (["--tokens", "1001"], "tokens=1001: must be a whole number, at least 1 and at most 1000"),
        (["--context-window", "-1"], "context-window=-1: must be a whole number, at least 0"),
        (["--seed", str(2**63)], f"seed={2**63}: must be"),
        (["--text", " "], "text=' ': must have something to say"),
        (["--analyzers", "fast"], "argument --analyzers: invalid choice: 'fast'"),
        (["--backend", "fast"], "argument --backend: invalid choice: 'fast'"),
    ],
)
def test_the_command_line_names_what_is_wrong_before_it_loads(
    wrong: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "load", None)
    with pytest.raises(SystemExit) as exit_:
        main(["streams", *wrong])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_an_unknown_model_and_a_long_text_are_refused(capsys: pytest.CaptureFixture[str], loaded: LabTTS) -> None:
    with pytest.raises(SystemExit):
        main(["streams", *SHORT, "--text", "word " * 3000])
    assert "text of 15000 characters" in capsys.readouterr().err


def test_a_missing_model_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["streams", *SHORT, "--model", "nowhere"])
    assert "model='nowhere': must be one of lab, tiny, random, pretrained" in capsys.readouterr().err


HIDDEN = ("perth", "resemble_perth", "ipython", "IPython", "ipywidgets", "ipykernel", "jupyter", "nb", "papermill")
HIDDEN += ("notebook", "matplotlib", "seaborn", "tabulate")


@pytest.fixture(scope="module")
def bare_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed packages without the watermarker, Jupyter and what draws."""
    folder = tmp_path_factory.mktemp("packages")
    places = [Path(path) for path in sys.path if any((Path(path) / name).is_dir() for name in ("torch", "chatterbox"))]
    for place in places:
        for entry in place.iterdir():
            hidden = entry.name.startswith(HIDDEN) or entry.suffix == ".pth"
            if not hidden and not (folder / entry.name).exists():  # as for Python, the first place wins
                (folder / entry.name).symlink_to(entry)
    return folder


def run_bare(packages: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{packages}{os.pathsep}{REPOSITORY}"}
    arguments = [sys.executable, "-S", *command]
    return subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=packages)


def test_the_benchmark_needs_no_watermarker_and_no_jupyter(bare_packages: Path, tmp_path: Path) -> None:
    found = run_bare(bare_packages, "-c", "import perth")
    assert "ModuleNotFoundError" in found.stderr
    output = str(tmp_path / "bare.csv")
    command = ["-m", "chatterbox_lab", "streams", "--device", "cpu", "--quick", "--output", output]
    refused = run_bare(bare_packages, *command)
    assert refused.returncode == 2
    assert "pip install resemble-perth" in refused.stderr
    ended = run_bare(bare_packages, *command, "--no-watermark")
    assert ended.returncode == 0, ended.stderr
    assert "ours, probe" in ended.stdout
    assert len(pd.read_csv(output)) == 9
