"""Paragraphs spoken three ways: what is said, how it is cut and heard, what is concluded."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch

import chatterbox_lab as lab
from chatterbox_lab.__main__ import main
from chatterbox_lab.files import attribute
from chatterbox_lab.speech.speak import seed_of
from chatterbox_lab.study import paragraphs, records, trials
from chatterbox_lab.voices import build

LINES = paragraphs.PARAGRAPHS.read_text().splitlines()
SAID = ["We went home.", "It was very late.", "The dog slept."]
RATE = 24000


def sound(seconds: float) -> torch.Tensor:
    return 0.3 * torch.sin(torch.arange(round(seconds * RATE)) / 30)[None]


def silence(seconds: float, level: float = 0.0) -> torch.Tensor:
    return torch.full((1, round(seconds * RATE)), level)


def test_the_paragraphs_are_held_out_sentences_as_speak_cuts_them() -> None:
    held_out = trials.HELD_OUT.read_text().splitlines()
    assert paragraphs.composed(held_out) == LINES
    parts = [paragraphs.sentences_of(line) for line in LINES]
    assert [" ".join(part) for part in parts] == LINES
    assert {one for part in parts for one in part} <= set(held_out)


def test_there_are_thirty_paragraphs_of_three_to_ten_different_sentences() -> None:
    parts = [paragraphs.sentences_of(line) for line in LINES]
    assert Counter(map(len, parts)) == Counter(paragraphs.LENGTHS)
    assert set(paragraphs.LENGTHS) == set(range(3, 11))
    assert len(parts) == 30
    assert all(len(set(part)) == len(part) for part in parts)
    assert max(Counter(one for part in parts for one in part).values()) <= 2
    with pytest.raises(ValueError, match="lengths=4: must be at most the 3"):
        paragraphs.composed(SAID, [2, 4])


def test_a_recording_is_cut_amid_its_silences_into_pieces_of_a_second() -> None:
    audio = torch.cat([sound(1.5), silence(0.2, 0.001), sound(0.5), silence(0.2), sound(2), silence(0.1), sound(1)], 1)
    found = paragraphs.cut(audio, RATE)
    assert [piece.shape[1] / RATE for piece in found] == pytest.approx([1.6, 5.5 - 1.6], abs=0.01)
    assert torch.equal(torch.cat(found, dim=1), audio)


def test_only_exact_silence_is_a_pause_between_utterances() -> None:
    audio = torch.cat([sound(1), silence(0.2), sound(1), silence(0.2, 1e-5), sound(0.5), silence(0.1), sound(0.5)], 1)
    found = paragraphs.pieces_between(audio, round(0.2 * RATE))
    assert [piece.shape[1] / RATE for piece in found] == pytest.approx([1, 2.3], abs=1e-3)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without sense is given little time."""
    monkeypatch.setattr(paragraphs, "_MOST", 12)


@pytest.mark.filterwarnings("ignore:max_new_tokens")
def test_one_by_one_says_what_speak_says(tts: build.LabTTS, short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    split, seeds = paragraphs.say(tts, SAID, paragraphs.SPEAK, 3), []
    stream = paragraphs.generate_stream
    monkeypatch.setattr(paragraphs, "generate_stream", lambda *a, **k: seeds.append(k["seed"]) or stream(*a, **k))
    apart = paragraphs.say(tts, SAID, paragraphs.APART, 3)
    assert seeds == [3, seed_of(3, 1), seed_of(3, 2)]
    assert len(split.pieces) == len(apart.pieces) == 3
    assert split.tokens == apart.tokens == sum(piece.shape[1] for piece in split.pieces) / 960
    assert [piece.shape for piece in split.pieces] == [piece.shape for piece in apart.pieces]
    assert split.audio.shape == apart.audio.shape
    assert split.ended == apart.ended == "limit"


@pytest.mark.filterwarnings("ignore:max_new_tokens")
def test_at_once_is_upstreams_way_with_upstreams_settings(tts: build.LabTTS, short: None) -> None:
    once = paragraphs.say(tts, SAID, paragraphs.AT_ONCE, 3)
    settings = lab.BASELINE.replace(backend="static")
    stream = lab.generate_stream(tts, " ".join(SAID), settings, seed=3, max_new_tokens=12)
    assert torch.equal(once.audio, torch.cat([audio for audio, _ in stream], dim=1))
    assert (once.pieces, once.ended) == ([], "limit")


@pytest.mark.filterwarnings("ignore:max_new_tokens")
@pytest.mark.parametrize("way", [paragraphs.SPEAK, paragraphs.APART])
def test_the_first_sentences_of_a_paragraph_are_not_made_again(tts: build.LabTTS, short: None, way: str) -> None:
    with attribute(tts, "watermarker", build.NoWatermark()):
        everything, two = paragraphs.say(tts, SAID, way, 3), paragraphs.say(tts, SAID[:2], way, 3)
    first = paragraphs._first(tts, SAID, 2, way, everything)
    assert first.tokens == two.tokens
    until = -RATE // 100  # a pause after it fades its last 10 ms
    assert torch.equal(first.audio[:, :until], two.audio[:, :until])


def test_nothing_is_heard_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        paragraphs, "transcribe", lambda piece: asked.append(piece.shape[1]) or f"heard {piece.shape[1]}"
    )
    ears = paragraphs.Ears()
    assert ears([sound(1), sound(2), sound(1)]) == ears([sound(1), sound(2), sound(1)])
    assert asked == [RATE, 2 * RATE]


def test_a_recording_is_heard_whole_cut_and_by_its_utterances(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {1.0: "we went home", 2.0: "it was late", 3.2: "we went home it late"}
    pieces = [sound(1), sound(2)]
    spoken = paragraphs.Spoken(paragraphs._joined(pieces), pieces, 75, "stop", 0)
    cuts = {1.1: "we went went home", 2.1: "it was very late"}
    monkeypatch.setattr(paragraphs, "transcribe", lambda piece: (answers | cuts)[round(piece.shape[1] / RATE, 1)])
    found = paragraphs.heard(SAID[:2], spoken, RATE, paragraphs.Ears())
    assert (found["errors"], found["whole_errors"], found["apart_errors"]) == (1, 2, 1)
    assert (found["words"], found["repeats"], found["pieces"]) == (7, 1, 2)
    assert found["longest_silence"] == pytest.approx(0.2, abs=1e-3)
    assert "apart_errors" not in paragraphs.heard(SAID[:2], spoken._replace(pieces=[]), RATE, paragraphs.Ears())


@pytest.mark.filterwarnings("ignore:max_new_tokens")
def test_a_run_has_its_rows_and_can_be_gone_on_with(
    tts: build.LabTTS, short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paragraphs, "FIRST", (1,))
    monkeypatch.setattr(paragraphs, "LENGTHS", (2,))
    monkeypatch.setattr(paragraphs, "transcribe", lambda _: "we went home")
    record = records.Record(tmp_path / "paragraphs.csv")
    paragraphs.measure(tts, ["We went home. It was very late."], record, ways=paragraphs.WAYS[:2])
    again = records.Record(tmp_path / "paragraphs.csv", resume=True)
    rows = paragraphs.measure(tts, ["We went home. It was very late."], again)
    kinds = rows[["way", "sentences", "of"]].itertuples(index=False, name=None)
    assert list(kinds) == [(way, count, 2) for way in paragraphs.WAYS for count in (1, 2)]
    assert rows.groupby("sentences")["words"].unique().map(list).to_dict() == {1: [3], 2: [7]}
    assert rows["apart_errors"].isna().tolist() == [True, True, False, False, False, False]


def table(errors: dict[str, list[int]], sentences: int = 10) -> pd.DataFrame:
    """Fifty words a paragraph; at half of its sentences, half of the words and errors."""
    rows = [
        (str(number), way, part, 50 * part // sentences, count * part // sentences)
        for way, counts in errors.items()
        for number, count in enumerate(counts)
        for part in (sentences // 2, sentences)
    ]
    found = pd.DataFrame(rows, columns=["paragraph", "way", "sentences", "words", "errors"])
    heard = {"whole_errors": found["errors"] + 1, "apart_errors": found["errors"].where(found["way"] != "at once")}
    return found.assign(**heard, of=sentences, repeats=found["errors"] // 10, ended="stop")


def test_the_summary_counts_whole_paragraphs_against_one_by_one() -> None:
    rows = table({"at once": [20, 30] * 8, "speak": [0, 4] * 8, "one by one": [2, 2] * 8})
    rows.loc[(rows["way"] == "at once") & (rows["paragraph"] == "3"), "ended"] = "limit"
    found = paragraphs.summary(rows)
    assert found["wer"].to_dict() == pytest.approx({"at once": 0.5, "speak": 0.04, "one by one": 0.04})
    assert found.loc["speak", "wer_low"] < 0 == found.loc["speak", "wer_change"] < found.loc["speak", "wer_high"]
    assert 0.36 < found.loc["at once", "wer_low"] < 0.46 < found.loc["at once", "wer_high"] < 0.56
    assert found["repeats"].to_dict() == pytest.approx({"at once": 5, "speak": 0, "one by one": 0})
    assert found["limit"].tolist() == [1, 0, 0]
    assert found["paragraphs"].tolist() == [16] * 3
    assert paragraphs.summary(rows, "whole")["wer"]["speak"] == pytest.approx(0.06)
    assert paragraphs.summary(rows, "apart").index.tolist() == ["speak", "one by one"]


@pytest.mark.parametrize(
    ("errors", "judgement"),
    [([2] * 16, True), ([3] * 15 + [2], True), ([4] * 16, False), ([0, 5] * 8, "undecided by 16 paragraphs")],
)
def test_a_way_is_as_good_or_not_only_where_that_is_sure(errors: list[int], judgement: bool | str) -> None:
    found = paragraphs.summary(table({"speak": errors, "one by one": [2] * 16}))
    assert paragraphs.judged(found.loc["speak"]) == judgement
    assert paragraphs.told(found.loc["one by one"]) == "WER 4.0%, +0.0 points (+0.0 to +0.0)"


def test_the_curve_is_of_the_same_paragraphs_at_every_length() -> None:
    rows = pd.concat([table({"at once": [20], "speak": [10]}), table({"at once": [50], "speak": [50]}, sentences=4)])
    found = paragraphs.by_sentences(rows)
    assert found.columns.tolist() == ["at once", "speak"]
    assert found.loc[10].tolist() == pytest.approx([0.4, 0.2])
    assert found.index.tolist() == [5, 10]
    assert paragraphs.by_sentences(rows, grown=False).index.tolist() == [4, 10]
    assert paragraphs.by_sentences(rows, "apart").columns.tolist() == ["speak"]


def test_the_command_writes_its_record_and_says_the_summary(
    tts: build.LabTTS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "some.txt").write_text("We went home. It was very late.\nThe dog slept. The cat sat here.\n")
    monkeypatch.setenv("CHATTERBOX_LAB_OUTPUT", str(tmp_path))
    monkeypatch.setattr(paragraphs, "load", lambda *_, **__: tts)
    monkeypatch.setattr(paragraphs, "PARAGRAPHS", tmp_path / "some.txt")
    monkeypatch.setattr(paragraphs, "say", lambda *_: paragraphs.Spoken(sound(1), [sound(1)] * 2, 25, "stop", 0))
    monkeypatch.setattr(paragraphs, "transcribe", lambda _: "the dog slept")
    assert main(["paragraphs", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "one by one" in said
    assert "6 rows are in paragraphs_lab.csv." in said
    assert len(pd.read_csv(tmp_path / "data" / "paragraphs_lab.csv")) == 6
    for wrong, message in ((["--paragraphs", "0"], "paragraphs=0"), (["--ways", "loud"], "ways=['loud']")):
        with pytest.raises(SystemExit):
            main(["paragraphs", *wrong])
        assert message in capsys.readouterr().err
