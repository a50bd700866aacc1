"""The command that measures a finished voice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from chatterbox_lab.__main__ import main
from chatterbox_lab.training import evaluate, measure
from chatterbox_lab.voices import build


@pytest.fixture
def asked(tts: build.LabTTS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Nobody reads or listens; which model the command loads, and how."""
    calls: list[Any] = []
    monkeypatch.setenv("CHATTERBOX_LAB_OUTPUT", str(tmp_path))
    monkeypatch.setattr(measure, "load", lambda model, **how: calls.append((model, how)) or tts)
    monkeypatch.setattr(evaluate, "pronunciations", lambda words: {})
    monkeypatch.setattr(evaluate, "utterance", lambda text, lexicon: None)
    monkeypatch.setattr(evaluate, "read_aloud", lambda text: (torch.zeros(1, 960),))
    monkeypatch.setattr(evaluate, "streamed", lambda *_: torch.zeros(1, 960))
    monkeypatch.setattr(evaluate, "transcribe", lambda audio: "nothing")
    return calls


def test_a_voice_is_measured_and_its_folder_left_alone(
    asked: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["words", "--sentences", "2", "--scored", "0", "--device", "cpu"]) == 0
    assert asked == [("lab", {"device": "cpu", "watermark": False})]
    found = pd.read_csv(tmp_path / "data" / "quality_lab.csv")
    assert found["path"].tolist() == ["teacher", "stream", "teacher", "stream", "paragraph"]
    assert (found["wer"] == 1).all()
    printed = capsys.readouterr().out
    assert "5 rows are in quality_lab.csv." in printed
    assert "| stream" in printed
    elsewhere = tmp_path / "new" / "mine.csv"
    assert main(["words", "--sentences", "1", "--scored", "0", "--output", str(elsewhere)]) == 0
    assert len(pd.read_csv(elsewhere)) == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--sentences", "0"], "sentences=0: must be"),
        (["--scored", "-1"], "scored=-1: must be"),
        (["--device", "cuda:99"], "device='cuda:99'"),
    ],
)
def test_what_is_wrong_is_named_before_a_voice_is_loaded(
    wrong: list[str], message: str, asked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["words", *wrong])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert asked == []
