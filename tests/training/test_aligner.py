"""The judge of word times, judged by speech whose times are known."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

from chatterbox_lab.__main__ import main
from chatterbox_lab.engine.clock import Word
from chatterbox_lab.study import word_times
from chatterbox_lab.training import aligner

TEXT = "Dog, sit."
LEXICON = {"dog": "d ao1 g", "sit": "s ih1 t"}
PHONES = [
    ("pau", 0.2), ("d", 0.3), ("ao", 0.4), ("g", 0.5), ("pau", 0.7), ("s", 0.8), ("ih", 0.9), ("t", 1.0), ("pau", 1.5),
]  # fmt: skip


def test_a_words_time_is_from_its_first_phone_to_its_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aligner, "read_aloud", lambda _: (torch.arange(36000.0), PHONES))
    speech, found = aligner.timed(TEXT, LEXICON)
    assert [one.word for one in found] == ["Dog,", "sit."]
    assert [(one.start, one.end) for one in found] == [pytest.approx(times) for times in ((0.04, 0.34), (0.54, 0.84))]
    assert speech[[0, -1]].tolist() == [3840, 26879]  # 0.16 s to 1.12 s


def test_speech_whose_phones_are_other_ones_has_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aligner, "read_aloud", lambda _: (torch.zeros(36000), [("zh", 0.5), ("oy", 1.0)]))
    assert aligner.timed(TEXT, LEXICON)[1] == []


def test_the_command_records_how_far_the_aligner_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CHATTERBOX_LAB_OUTPUT", str(tmp_path))
    monkeypatch.setattr(aligner, "pronunciations", lambda _: LEXICON)
    (tmp_path / "texts.txt").write_text("Dog, sit.\nSit, dog.\n")
    monkeypatch.setattr(aligner, "HELD_OUT", tmp_path / "texts.txt")
    true = [Word("Dog,", 0.0, 0.3), Word("sit.", 0.5, 0.8)]
    monkeypatch.setattr(aligner, "timed", lambda *_: (torch.zeros(24000), true))
    monkeypatch.setattr(aligner, "aligned", lambda *_: [Word("Dog,", 0.02, 0.3), Word("sit.", 0.5, 0.79)])
    assert main(["aligner", "--sentences", "1"]) == 0
    found = pd.read_csv(tmp_path / "data" / "aligner_rms.csv")
    assert found["start_error"].tolist() == [0.02, 0.0]
    assert found["end_error"].tolist() == [0.0, -0.01]
    assert "2 rows are in aligner_rms.csv." in capsys.readouterr().out
    assert word_times.summary(found).loc["all", "start 90%"] == pytest.approx(18)
