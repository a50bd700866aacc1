"""When words are told, against forced alignment: the aligner itself, the errors, the command."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
import torch

import chatterbox_lab as lab
from chatterbox_lab.__main__ import main
from chatterbox_lab.engine.clock import StreamMetrics, Word
from chatterbox_lab.study import records, word_times
from chatterbox_lab.voices import build

TEXT = "It was late."
TRUE = [Word("It", 0.0, 0.2), Word("was", 0.2, 0.5), Word("late.", 0.5, 1.0)]


@pytest.fixture(scope="module")
def spoken() -> tuple[str, torch.Tensor]:
    """A sentence of the lab voice, (1, samples)."""
    tts, text = lab.load("lab", device="cpu", watermark=False), "I left my umbrella on the bus this morning."
    return text, lab.generate(tts, text, lab.FAST, seed=0)


def test_the_aligner_finds_the_words_of_real_speech(spoken: tuple[str, torch.Tensor]) -> None:
    text, audio = spoken
    found = word_times.aligned(text, audio)
    assert [one.word for one in found] == text.split()
    assert all(one.start < one.end for one in found)
    assert all(after.start >= one.end for one, after in pairwise(found))
    assert 0 <= found[0].start < 0.1
    assert audio.shape[1] / 24000 - 0.3 < found[-1].end < audio.shape[1] / 24000 - 0.03  # it ends in silence


def test_words_are_found_where_the_audio_has_them(spoken: tuple[str, torch.Tensor]) -> None:
    text, audio = spoken
    before, after = (
        word_times.aligned(text, audio),
        word_times.aligned(text, torch.cat([torch.zeros(1, 24000), audio], 1)),
    )
    assert [one.start for one in after] == pytest.approx([1 + one.start for one in before], abs=0.05)


def test_a_word_that_the_dictionary_lacks_is_left_out_and_named(spoken: tuple[str, torch.Tensor]) -> None:
    text, audio = spoken
    odd = text.replace("umbrella", "Zyzzqvorp-7")
    assert word_times.unknown(odd) == ["Zyzzqvorp-7"]
    assert [one.word for one in word_times.aligned(odd, audio)] == odd.replace("Zyzzqvorp-7 ", "").split()
    assert word_times.unknown("12 ?!") == word_times.aligned("12 ?!", audio) == []


def test_audio_that_cannot_hold_the_words_has_none() -> None:
    assert word_times.aligned("I left my umbrella on the bus this morning.", torch.zeros(1, 2400)) == []


def test_errors_are_positive_where_the_stream_is_late_and_missing_where_it_is_silent() -> None:
    told = [Word("It", 0.04, 0.16), Word("late.", 0.52, 0.96)]
    rows = pd.DataFrame(word_times.compared(TEXT, TRUE, told, [0.4, 1.2]))
    assert rows["word"].tolist() == TEXT.split()
    assert rows["place"].tolist() == ["first", "within", "last"]
    assert rows["start_error"].dropna().tolist() == pytest.approx([0.04, 0.02])
    assert rows["end_error"].dropna().tolist() == pytest.approx([-0.04, -0.04])
    assert rows["known_after"].dropna().tolist() == pytest.approx([0.2, 0.2])
    assert rows.loc[1, ["told_start", "start_error", "known_at", "known_after"]].isna().all()
    assert rows.loc[1, "start"] == 0.2


def test_a_word_said_twice_is_taken_in_order() -> None:
    said = [Word("go", float(number), number + 0.5) for number in range(3)]
    rows = pd.DataFrame(word_times.compared("go on go go", said, said))
    assert rows["start"].isna().tolist() == [False, True, False, False]
    assert "known_at" not in rows


def test_every_sentence_has_a_first_and_a_last_word() -> None:
    rows = pd.DataFrame(word_times.compared("We went. It was late! Good", TRUE[:0], TRUE[:0]))
    assert rows["place"].tolist() == ["first", "last", "first", "within", "last", "first"]


def chunks(metrics: StreamMetrics) -> Iterator[tuple[torch.Tensor, StreamMetrics]]:
    """A stream of 50 tokens and a pause: its first chunk holds half a token back, its words come with lag."""
    for samples, tokens, words in ((24000 - 480, 25, 1), (24480 + 4800, 50, 1), (0, 50, 1)):
        metrics.tokens = tokens
        metrics.words += TRUE[len(metrics.words) :][:words]
        yield torch.zeros(1, samples), metrics
    metrics.words += [Word("more", 2.2, 2.4)]


def test_a_word_is_known_when_the_chunk_it_comes_with_has_been_decoded() -> None:
    told = word_times.listen(chunks(StreamMetrics()), 24000)
    assert told.audio.shape == (1, 52800)
    assert [one.word for one in told.words] == ["It", "was", "late.", "more"]
    assert told.known == pytest.approx([1.0, 2.2, 2.2, 2.2])


def errors(way: str, late: float) -> list[dict[str, object]]:
    told = [Word(one.word, one.start + late, one.end - late) for one in TRUE[:2]]
    return [row | {"way": way} for row in word_times.compared(TEXT, TRUE, told, [1.0, 1.0])]


def test_the_summary_is_in_milliseconds_and_counts_what_was_not_told() -> None:
    table = pd.DataFrame([row for way, late in (("a", 0.01), ("b", 0.05)) for row in errors(way, late)])
    found = word_times.summary(table, "way")
    assert found["words"].tolist() == [3, 3]
    assert found["missed"].tolist() == [1, 1]
    assert found["start median"].tolist() == pytest.approx([10, 50])
    assert found["end bias"].tolist() == pytest.approx([-10, -50])
    assert found["known after"].tolist() == pytest.approx([650, 650])
    assert word_times.summary(table).loc["all", "start 90%"] == pytest.approx(50)
    assert "known after" not in word_times.summary(table.drop(columns="known_after"))


def test_a_stream_tells_what_is_written_down_and_the_record_goes_on(
    tts: build.LabTTS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speaks = {way: lambda tts, text, settings, seed: chunks(StreamMetrics()) for way in word_times.WAYS}
    monkeypatch.setattr(word_times, "WAYS", speaks)
    monkeypatch.setattr(word_times, "aligned", lambda text, audio: TRUE)
    record = records.Record(tmp_path / "word_times.csv")
    word_times.measure(tts, {"generate_stream": [TEXT]}, record)
    record = records.Record(tmp_path / "word_times.csv", resume=True)
    rows = word_times.measure(tts, {"generate_stream": [TEXT], "speak": [TEXT]}, record, chunk_size=10)
    assert rows["way"].tolist() == ["generate_stream"] * 3 + ["speak"] * 3
    assert rows["chunk_size"].tolist() == [25] * 3 + [10] * 3
    assert rows["start_error"].eq(0).all()


@pytest.mark.filterwarnings("ignore:max_new_tokens")
def test_the_path_that_is_shown_is_the_one_that_the_words_are_told_by(tts: build.LabTTS) -> None:
    found = word_times.follow(tts, "It was late.", seed=1, max_new_tokens=40)
    assert found.audio.shape[1] == 960 * len(found.rows) == 960 * len(found.path)
    assert found.path == sorted(found.path)
    settings = lab.BASELINE.replace(backend="static", analyzer="probe")
    *_, (_, metrics) = lab.generate_stream(tts, "It was late.", settings, seed=1, max_new_tokens=40)
    assert found.words == metrics.words != []
    for word, (_, first, end) in zip(found.words, found.places, strict=False):
        assert all(first <= place for place in found.path[round(word.start / 0.04) :])
        assert all(place < end for place in found.path[: round(word.end / 0.04)])


@pytest.mark.filterwarnings("ignore:max_new_tokens")
def test_both_streams_of_the_package_can_be_listened_to(tts: build.LabTTS) -> None:
    settings = lab.BASELINE.replace(backend="static", analyzer="probe", chunk_size=5)
    for speaks in word_times.WAYS.values():
        told = word_times.listen(speaks(tts, "It was late. We went home.", settings, seed=0, max_new_tokens=20), tts.sr)
        assert told.audio.shape[1] >= 960 * 20
        assert len(told.words) == len(told.known)
        assert told.known == sorted(told.known)


def test_the_command_writes_its_record_and_says_the_summary(
    tts: build.LabTTS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, object]] = []
    monkeypatch.setenv("CHATTERBOX_LAB_OUTPUT", str(tmp_path))
    monkeypatch.setattr(word_times, "load", lambda model, **how: asked.append({"model": model} | how) or tts)
    monkeypatch.setattr(word_times, "listen", lambda *_: word_times.Told(torch.zeros(1, 24000), TRUE, [1.0] * 3))
    monkeypatch.setattr(word_times, "aligned", lambda text, _: [Word(text.split()[0], 0.0, 0.5)])
    assert main(["word-times", "--sentences", "2", "--paragraphs", "1", "--device", "cpu"]) == 0
    assert asked == [{"model": "lab", "device": "cpu", "watermark": False}]
    found = pd.read_csv(tmp_path / "data" / "word_times_lab.csv")
    assert f"{len(found)} rows are in word_times_lab.csv." in capsys.readouterr().out
    assert {"way", "known_after", "machine", "commit", "model", "dtype"} <= set(found.columns)
    for wrong in ("--sentences=-1", "--chunk-size=0"):
        with pytest.raises(SystemExit):
            main(["word-times", wrong])
