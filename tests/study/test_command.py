"""The one command line: what all commands share."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chatterbox_lab import __main__ as commands
from chatterbox_lab.__main__ import COMMANDS, main
from chatterbox_lab.files import REPOSITORY
from chatterbox_lab.study import command

NAMES = [
    "speak",
    "diagnose",
    "measure",
    "selftest",
    "streams",
    "layers",
    "t3",
    "s3gen",
    "parts",
    "sweep",
    "calls",
    "trials",
    "paragraphs",
    "word-times",
    "aligner",
    "words",
    "releases",
    "living",
    "predict",
    "train",
]
MODELS = ("lab", "tiny", "random", "pretrained")


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main([*arguments, "--help"])
    assert exit_.value.code == 0
    return re.sub(r"\s+", " ", capsys.readouterr().out)


def test_the_list_of_commands_says_what_each_does_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    said = help_of(capsys)
    assert list(COMMANDS) == NAMES
    assert all(f" {name} {re.sub(r'  +', ' ', one.does)}" in said for name, one in COMMANDS.items())
    assert 'example: chatterbox-lab speak "Hello there." --play' in said


def test_the_list_of_commands_is_there_at_once() -> None:
    code = (
        "import sys; from chatterbox_lab.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'numpy', 'pandas', 'chatterbox', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_every_command_explains_itself_and_its_example_is_one(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = help_of(capsys, name)
    assert said.startswith(f"usage: chatterbox-lab {name} ")
    assert f"example: chatterbox-lab {name} {COMMANDS[name].example}" in said
    parser = argparse.ArgumentParser()
    import_module(f"chatterbox_lab.{COMMANDS[name].module}").add_options(parser)
    parser.parse_args(re.findall(r'"[^"]*"|\S+', COMMANDS[name].example))


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name not in ("releases", "living", "predict", "train", "aligner")]
)
def test_the_model_and_the_device_are_told_alike(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = help_of(capsys, name)
    known = dict.fromkeys(("trials", "paragraphs", "word-times"), ("lab", "pretrained")) | {"words": ("lab",)}
    known = known.get(name, MODELS)
    speaking = ("speak", "trials", "paragraphs", "word-times", "words", "diagnose")
    default = {"measure": "random"} | dict.fromkeys(speaking, "lab")
    default = default.get(name, "tiny")
    assert f"{', '.join(known)} or a model's folder (default: {default})" in said
    assert "auto, cuda, mps" in said


@pytest.mark.parametrize("arguments", [[], ["fly"], ["--fast"], ["sweep", "--fast"]])
def test_a_command_that_is_none_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: chatterbox-lab" in capsys.readouterr().err


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A command ``count`` that records rows until it is told to do something else."""

    def add_options(parser: argparse.ArgumentParser) -> None:
        command.add_record(parser, "count_MODEL.csv")

    def run(options: argparse.Namespace) -> int:
        record = command.open_record(options, "count_tiny.csv")
        record.add([{"row": len(record.rows)}])
        return module.then(record)

    module = SimpleNamespace(add_options=add_options, run=run, then=lambda record: record.finish() and 0)
    monkeypatch.setenv("CHATTERBOX_LAB_OUTPUT", str(tmp_path))
    monkeypatch.setitem(COMMANDS, "count", commands.Command("study.count", "counts", ""))
    monkeypatch.setattr(commands, "import_module", lambda name: module)
    return module


def raising(error: BaseException) -> Any:
    def then(record: Any) -> int:
        raise error

    return then


def test_the_status_is_what_a_command_says(measured: Any, tmp_path: Path) -> None:
    assert main(["count"]) == 0
    assert (tmp_path / "data" / "count_tiny.csv").exists()
    measured.then = lambda record: 1
    assert main(["count", "--output", str(tmp_path / "elsewhere.csv")]) == 1
    assert (tmp_path / "elsewhere.unfinished.csv").exists()


def test_ctrl_c_says_how_to_go_on(measured: Any, capsys: pytest.CaptureFixture[str]) -> None:
    measured.then = raising(KeyboardInterrupt())
    assert main(["count"]) == 130
    said = "Stopped. count_tiny.unfinished.csv has 1 rows; the same command with --resume goes on."
    assert said in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        main(["count"])
    assert exit_.value.code == 2
    assert "resume it, or delete the file" in capsys.readouterr().err
    measured.then = lambda record: record.finish() and len(record.rows)
    assert main(["count", "--resume"]) == 2


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, ModuleNotFoundError])
def test_what_a_user_can_mend_is_told_without_a_traceback(
    measured: Any, error: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    measured.then = raising(error("mend this"))
    with pytest.raises(SystemExit) as exit_:
        main(["count"])
    assert exit_.value.code == 2
    assert "chatterbox-lab count: error: mend this" in capsys.readouterr().err


def test_other_errors_are_not_hidden(measured: Any) -> None:
    measured.then = raising(RuntimeError("a fault of ours"))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(["count"])


@pytest.mark.parametrize("how", [["-m", "chatterbox_lab"], ["-m", "chatterbox_lab.training"]])
def test_both_doors_are_open(how: list[str]) -> None:
    done = subprocess.run([sys.executable, *how, "--help"], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0
    assert "usage: " in done.stdout


def test_the_console_script_is_the_same_command_line() -> None:
    script = Path(sys.executable).parent / "chatterbox-lab"
    assert os.access(script, os.X_OK), "the environment is older than the script: rm .venv/.complete; make .venv"
    done = subprocess.run([script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "speak" in done.stdout
