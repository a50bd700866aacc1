"""The campaign of a machine: its parts are commands that exist, it goes on where it stopped, and says what to renew."""

from __future__ import annotations

import argparse
import signal
import sys
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest

from chatterbox_lab.__main__ import COMMANDS, main
from chatterbox_lab.files import REPOSITORY
from chatterbox_lab.study import campaign
from chatterbox_lab.study.campaign import CPU, GPU, Campaign, Part


@pytest.mark.parametrize("part", [*GPU, *CPU], ids=lambda part: part.name)
def test_every_part_is_a_command_line_that_its_command_takes(part: Part, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    import_module(f"chatterbox_lab.{COMMANDS[part.call[0]].module}").add_options(parser)
    line = Campaign("random", "cpu", tmp_path, "here", 8).command(part)
    options = parser.parse_args(line[4:])
    assert options.output == tmp_path / f"{part.name}_random_here.csv"
    assert options.model == "random"
    assert not options.resume


@pytest.mark.parametrize("part", [*GPU, *CPU], ids=lambda part: part.name)
def test_the_notebooks_that_a_part_names_read_its_record(part: Part) -> None:
    for number in part.read_by:
        (notebook,) = (REPOSITORY / "notebooks").glob(f"{number}_*.ipynb")
        assert part.name in notebook.read_text(), (part.name, number)


@pytest.mark.parametrize(
    ("machine", "device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "cuda", "h100_80gb_hbm3"),
        ("NVIDIA GeForce RTX 4090", "cuda", "rtx_4090"),
        ("Intel(R) Xeon(R) Processor", "cpu", "cpu_intel_xeon"),
        ("AMD Ryzen 9 7950X 16-Core Processor", "cpu", "cpu_amd_ryzen_9_7950x"),
    ],
)
def test_a_machine_has_a_name_for_files(machine: str, device: str, name: str) -> None:
    assert campaign.place({"machine": machine, "device": device}) == name


def test_a_campaign_runs_once_and_says_what_to_renew(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = ["measure", "--model", "tiny", "--device", "cpu", "--output", str(tmp_path), "--parts", "calls"]
    assert main([*line, "--machine", "here"]) == 0
    said = capfd.readouterr().out
    assert "=== calls: what upstream's calls do to later ones" in said
    assert "notebooks/run.py --in-place 06" in said
    assert len(pd.read_csv(tmp_path / "calls_tiny_here.csv")) == 3 * 4 * 4
    assert main([*line, "--machine", "here"]) == 0
    assert "calls      there already (0 s)" in capfd.readouterr().out


def test_what_is_unfinished_goes_on_and_what_fails_does_not_end_the_rest(tmp_path: Path) -> None:
    parts = [Part("broken", "fails", ("streams", "--rounds", "0")), Part("list", "", ("selftest", "--tokens", "20"))]
    here = Campaign("tiny", "cpu", tmp_path, "here", 8)
    assert [here.run(part, lambda line: None)[0] for part in parts] == [campaign.FAILED, campaign.FINISHED]
    here.record(parts[1]).rename(tmp_path / "list_tiny_here.unfinished.csv")
    assert here.command(parts[1])[-1] == "--resume"
    assert here.run(parts[1], lambda line: None)[0] == campaign.FINISHED
    assert not (tmp_path / "list_tiny_here.unfinished.csv").exists()


def test_a_part_that_failed_is_not_taken_for_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, part = Campaign("tiny", "cpu", tmp_path, "here", None), Part("selftest", "", ())
    path = here.record(part)
    write = f"import pathlib, sys; pathlib.Path({str(path)!r}).write_text('passed'); sys.exit(1)"
    monkeypatch.setattr(Campaign, "command", lambda self, part: [sys.executable, "-c", write])
    for _ in range(2):
        assert here.run(part, lambda line: None)[0] == campaign.FAILED
    assert not path.exists()
    assert path.with_suffix(".failed.csv").read_text() == "passed"


def test_a_folder_is_found_from_where_parts_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "voice").mkdir()
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path / "voice") in Campaign("voice", "cpu", tmp_path, "here", 8).command(CPU[0])


def test_launches_go_with_layers(tmp_path: Path) -> None:
    here = Campaign("tiny", "cuda", tmp_path, "here", 8)
    (layers,) = (part for part in GPU if part.name == "layers")
    here.record(layers).touch()
    assert "layers_tiny_here.csv launches_tiny_here.csv" in campaign.renewed(here, [layers])


def test_a_part_that_takes_too_long_is_stopped_as_by_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Campaign("tiny", "cpu", tmp_path, "here", 0.02)
    monkeypatch.setattr(Campaign, "command", lambda self, part: [sys.executable, "-c", "import time; time.sleep(60)"])
    how, seconds = here.run(Part("slow", "sleeps", ()), lambda line: None)
    assert how == campaign.STOPPED
    assert seconds < 30
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--parts", "everything"], "parts='everything': must be among selftest, ladder"),
        (["--minutes", "0"], "minutes=0.0: must be above 0"),
        (["--machine", "my gpu/1"], "machine='my gpu/1': must be of letters, digits"),
    ],
)
def test_bad_options_are_refused_by_name(
    wrong: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        main(["measure", "--device", "cpu", "--output", str(tmp_path / "none"), *wrong])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_campaign_can_be_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", "--device", "cpu", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [part.name for part in CPU]
