"""Listening trials: the same tokens in many ways, and what is concluded from them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import TEXT

import chatterbox_lab as lab
from chatterbox_lab.__main__ import main
from chatterbox_lab.engine.request import encode_text
from chatterbox_lab.engine.settings import BASELINE
from chatterbox_lab.engine.t3.rules import Rules
from chatterbox_lab.files import attribute
from chatterbox_lab.study import hearing, records, trials
from chatterbox_lab.study.fallback import count_spies, watch_layers
from chatterbox_lab.study.upstream import upstream_tokens
from chatterbox_lab.voices import build

SHORT = trials.TEXTS["short"]
CODES = torch.randint(0, 6561, (30,), generator=torch.Generator().manual_seed(0))


def way(how: str, **changes: object) -> trials.Way:
    return trials.Way(how, BASELINE.replace(chunk_size=10, context_window=10, **changes))


def table(errors: dict[str, list[int]], plcmos: dict[str, float] | None = None) -> pd.DataFrame:
    """Ten words a sentence; a way's PLCMOS is 4 unless said."""
    rows = [(str(i), way, count) for way, counts in errors.items() for i, count in enumerate(counts)]
    found = pd.DataFrame(rows, columns=["text", "way", "errors"])
    found["plcmos"] = found["way"].map(plcmos or {}).fillna(4.0).astype(float)
    measured = ["dip", "reference_dip", "flux", "reference_flux", "mel_distance"]
    return found.assign(words=10, wer=found["errors"] / 10, **dict.fromkeys(measured, 0.0))


@pytest.mark.parametrize("how", ["whole", "upstream", "ours"])
def test_every_way_makes_960_samples_of_a_token(tts: build.LabTTS, how: str) -> None:
    chunks = trials.spoken(tts, CODES, way(how), seed=0)
    assert len(chunks) == (1 if how == "whole" else 3)
    assert sum(chunk.shape[1] for chunk in chunks) == 30 * 960


def test_ours_is_what_a_stream_of_these_tokens_yields(tts: build.LabTTS) -> None:
    settings = way("ours").settings
    codes = lab.speech_tokens(tts, TEXT, settings, seed=3, max_new_tokens=25)
    with attribute(tts, "watermarker", build.NoWatermark()):
        stream = lab.generate_stream(tts, TEXT, settings, seed=3, max_new_tokens=25)
        streamed = torch.cat([audio for audio, _ in stream], dim=1)
    assert torch.equal(torch.cat(trials.spoken(tts, codes, trials.Way("ours", settings), seed=3), dim=1), streamed)


def test_upstreams_way_fades_each_chunk_in_from_silence(tts: build.LabTTS) -> None:
    theirs, ours = (trials.spoken(tts, CODES, way(how), seed=0) for how in ("upstream", "ours"))
    assert theirs[1][0, :24].abs().max() < 0.1 * theirs[1].abs().max()
    assert trials.seams(theirs) == [10 * 960, 20 * 960]
    assert trials.seams(ours) == [10 * 960 - 480, 20 * 960 - 480]  # the cross-fade waits for the next chunk


def test_the_half_fix_leaves_manual_attention_in_one_layer_and_nothing_behind(tts: build.LabTTS) -> None:
    sound = upstream_tokens(tts, TEXT, BASELINE, seed=1, max_new_tokens=4)
    with watch_layers(tts.t3.tfmr) as counts:
        assert len(trials.half_fixed_tokens(tts, TEXT, BASELINE, seed=1, max_new_tokens=4)) == 4
    assert [set(count) for count in counts] == [{"manual"} if layer == 9 else {"sdpa"} for layer in range(14)]
    assert not any(count_spies(tts.t3.tfmr).values())
    assert torch.equal(sound, upstream_tokens(tts, TEXT, BASELINE, seed=1, max_new_tokens=4))


def test_a_run_has_a_row_for_each_sentence_and_way_and_can_be_gone_on_with(
    tts: build.LabTTS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "speech_tokens", lambda *_, **__: CODES)
    ways = {"whole": trials.Way("whole"), "ours": way("ours")}
    record = records.Record(tmp_path / "trials.csv")
    trials.measure(tts, ["One."], ways, record, scores=False, facts={"device": "cpu"})
    record = records.Record(tmp_path / "trials.csv", resume=True)
    rows = trials.measure(tts, ["One.", "Two."], ways, record, scores=False, facts={"device": "cpu"})
    assert list(zip(rows["text"], rows["way"], strict=True)) == [(t, w) for t in ("One.", "Two.") for w in ways]
    assert rows.loc[rows["way"] == "whole", "mel_distance"].eq(0).all()
    assert rows.loc[rows["way"] == "ours", "mel_distance"].gt(0).all()


@pytest.fixture
def deaf(tts: build.LabTTS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """The command finds the shared model and two ways, and nobody listens; how the model was asked for."""
    asked: list[dict[str, object]] = []
    monkeypatch.setenv("CHATTERBOX_LAB_OUTPUT", str(tmp_path))
    monkeypatch.setattr(trials, "load", lambda model, **how: asked.append({"model": model} | how) or tts)
    monkeypatch.setattr(trials, "WAYS", {"whole": trials.Way("whole"), "ours": way("ours")})
    monkeypatch.setattr(trials, "speech_tokens", lambda *_, **__: CODES)
    monkeypatch.setattr(trials, "heard", lambda text, chunks, *_: {"seams": len(chunks) - 1})
    return asked


def test_the_command_writes_to_build_and_says_how_it_ended(
    deaf: list[dict[str, object]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trials", "--sentences", "2", "--device", "cpu"]) == 0
    assert deaf == [{"model": "lab", "device": "cpu", "watermark": False}]
    assert "4 rows are in trials_lab.csv." in capsys.readouterr().out
    found = pd.read_csv(tmp_path / "data" / "trials_lab.csv")
    assert found["seams"].tolist() == [0, 2, 0, 2]
    assert {"machine", "commit", "model", "dtype", "seed"} <= set(found.columns)
    assert main(["trials", "--sentences", "3", "--device", "cpu", "--resume"]) == 0
    assert "6 rows are in" in capsys.readouterr().out


def test_the_command_looks_for_the_device_it_is_given(
    deaf: list[dict[str, object]], capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong, message in (
        (["--guard", "--texts", "long"], "texts=['long']"),
        (["--guard", "--rules", "none"], "rules=['none']"),
        (["--guard", "--seeds", "0"], "seeds=0"),
        (["--device", "cuda:99"], "device='cuda:99'"),
        (["--sentences", "0"], "sentences=0"),
        (["--ways", "loud"], "ways=['loud']"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(["trials", *wrong])
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err
    assert deaf == []


def test_an_interrupted_trial_says_how_to_go_on(
    deaf: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []

    def stop(text: str, *_: object) -> dict[str, object]:
        texts.append(text)
        if len(texts) == 3:
            raise KeyboardInterrupt
        return {}

    monkeypatch.setattr(trials, "heard", stop)
    assert main(["trials", "--device", "cpu"]) == 130
    assert "trials_lab.unfinished.csv has 2 rows" in capsys.readouterr().out


def test_the_board_counts_words_and_bounds_the_change() -> None:
    found = trials.board(table({"whole": [0, 1, 0, 1] * 5, "more": [3, 4, 3, 4] * 5, "other": [1, 0, 1, 0] * 5}))
    assert found["wer"].to_dict() == pytest.approx({"whole": 0.05, "more": 0.35, "other": 0.05})
    assert found.loc["more", ["wer_change", "wer_low", "wer_high"]].tolist() == pytest.approx([0.3] * 3)
    assert found.loc["other", "wer_low"] < 0 < found.loc["other", "wer_high"]


def test_long_sentences_count_for_more() -> None:
    rows = table({"whole": [0, 0], "worse": [1, 0]})
    rows.loc[rows["text"] == "1", "words"] = 90
    assert trials.board(rows).loc["worse", "wer"] == pytest.approx(0.01)  # one error in a hundred words


def test_the_board_can_be_read_against_any_way() -> None:
    rows = table({"whole": [0] * 4, "ours": [2] * 4, "theirs": [3] * 4}, {"theirs": 3.5})
    found = trials.board(rows, "ours")
    assert found["wer_change"].to_dict() == pytest.approx({"whole": -0.2, "ours": 0, "theirs": 0.1})
    assert found.loc["theirs", "plcmos_change"] == -0.5
    assert trials.told(found.loc["theirs"]) == "WER +10.0 points (+10.0 to +10.0), PLCMOS -0.50 (-0.50 to -0.50)"


@pytest.mark.parametrize(
    ("errors", "plcmos", "judgement"),
    [
        ([0] * 8, 4.0, "as good"),
        ([0] * 8, 3.95, "as good"),  # lower for sure, and too little to matter
        ([0] * 8, 3.85, "worse"),
        ([1] * 8, 4.0, "worse"),
        ([0, 1] * 4, 4.0, "worse"),
        ([0] * 7 + [1], 4.0, "undecided"),
    ],
)
def test_a_way_is_worse_or_as_good_only_where_that_is_sure(errors: list[int], plcmos: float, judgement: str) -> None:
    found = trials.board(table({"whole": [0] * 8, "way": errors}, {"way": plcmos}))
    assert trials.judged(found.loc["way"]) == judgement


def test_faults_are_counted_with_and_without_the_guard() -> None:
    rows = pd.DataFrame(
        {
            "guard": [False, False, False, True],
            "text_tokens": 10,
            "tokens": [4, 20, 60, 20],
            "ended": [True, True, False, True],
            "tail": [0.0, 2.0, 0.1, 0.0],
            "repeats": [0, 0, 1, 0],
            "errors": [3, 0, 3, 0],
            "words": 3,
        }
    )
    found = trials.faults(rows, usual=2)
    assert found.loc[False, trials.FAULTS].tolist() == [1, 1, 1, 1]
    assert found.loc[True, trials.FAULTS].tolist() == [0, 0, 0, 0]
    assert found["wer"].tolist() == [6 / 9, 0]


def test_older_records_say_only_whether_it_ended() -> None:
    rows = pd.DataFrame({"guard": False, "text_tokens": 10, "tokens": 20, "tail": 0.0, "repeats": 0}, index=range(4))
    rows = rows.assign(errors=0, words=1, ended=[True, False, "stop", "limit"])
    assert trials.faults(rows, usual=2).loc[False, "runs_on"] == 2


def test_provoked_speech_ends_at_its_limit(tts: build.LabTTS, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "_USUAL", 0)
    monkeypatch.setattr(trials, "said", lambda *given: (CODES.repeat(4)[: given[-1]], "limit"))
    rows = trials.provoke(tts, ["Yes."])
    assert rows["guard"].tolist() == [False, True]
    assert rows["tokens"].tolist() == [100, 100]
    assert rows["ended"].eq("limit").all()


def test_a_model_without_sense_is_ended_by_its_limit_or_by_the_guards_cap(tts: build.LabTTS) -> None:
    capped = BASELINE.replace(backend="static", analyzer="probe", guard=True, rules=Rules(cap=1.0, cap_beside=3.0))
    length = encode_text(tts, "Yes.").shape[1]
    found = [trials.said(tts, "Yes.", settings, 1, 20) for settings in (BASELINE.replace(backend="static"), capped)]
    assert [ended for _, ended in found] == ["limit", "guard"]
    assert len(found[0][0]) == 20
    assert 0 < len(found[1][0]) <= capped.rules.most(length) == 3 + length - 2


def test_every_text_and_seed_is_said_without_the_guard_and_by_all_rules(
    tts: build.LabTTS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[int] = []
    monkeypatch.setattr(trials, "said", lambda _, text, settings, seed, limit: (CODES[: 9 + seed], "stop"))
    monkeypatch.setattr(trials, "transcribe", lambda audio: heard.append(audio.shape[1] // 960) or "two")
    record = records.Record(tmp_path / "short.csv")
    trials.provoke(tts, ["2", "?"], record, seeds=[0, 1], rules=["own", "safe"])
    again = records.Record(tmp_path / "short.csv", resume=True)
    rows = trials.provoke(tts, ["2", "?", "go"], again, seeds=[0, 1], rules=["own", "safe"])
    assert heard == [9, 10] * 3  # the guard changed nothing, and nothing was heard twice
    kinds = rows[["text", "seed", "rules"]].itertuples(index=False, name=None)
    assert list(kinds) == [(t, s, r) for t in ("2", "?", "go") for s in (0, 1) for r in ("none", "own", "safe")]
    assert rows["cap"].isna().tolist() == [True, False, False] * 6
    assert rows.groupby("text", sort=False)["errors"].first().to_dict() == {"2": 0, "?": 1, "go": 1}
    assert rows.loc[rows["text"] == "?", ["words", "wer"]].iloc[0].isna().tolist() == [False, True]


def test_a_text_of_which_the_tokenizer_knows_nothing_is_a_row_that_says_so(tts: build.LabTTS) -> None:
    rows = trials.provoke(tts, ["\u4f60\u597d", "\U0001f642"])
    assert rows["skipped"].str.contains("tokenizer").tolist() == [True, True]
    assert trials.pairs(rows.assign(rules=None)).empty


def test_the_guard_is_judged_by_pairs_of_the_same_text_and_seed() -> None:
    plain = pd.DataFrame({"text": list("abcd"), "seed": 0, "tokens": [3, 50, 20, 20], "errors": [0, 4, 1, 1]})
    plain = plain.assign(guard=False, rules="none", heard=["w", "x", None, "z"], ended="stop")
    plain.loc[1, "ended"] = "limit"
    guarded = plain.assign(guard=True, rules="own", tokens=[10, 20, 15, 20], errors=[0, 1, 2, 1], ended="guard")
    odd = pd.DataFrame({"text": ["?"], "seed": 0, "skipped": "the tokenizer knows nothing of it"})
    found = trials.pairs(pd.concat([guarded.iloc[::-1], plain, odd], ignore_index=True)).loc["own"]
    assert found[["pairs", "shorter", "longer", "better", "worse", "errors"]].tolist() == [4, 2, 1, 1, 1, -2]
    assert found[["limit_before", "limit", "mute_before", "mute"]].tolist() == [1, 0, 1, 0]
    assert found[["longest_before", "longest"]].tolist() == pytest.approx([2.0, 0.8])


def test_the_command_tries_the_guard_on_short_texts(deaf: list[dict[str, object]], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "said", lambda *_: (CODES[:5], "stop"))
        patch.setattr(trials, "transcribe", lambda _: "no")
        (tmp_path / "short.txt").write_text("No.\nA\n")
        patch.setitem(trials.TEXTS, "short", tmp_path / "short.txt")
        command = ["trials", "--guard", "--texts", "short", "--seeds", "2", "--seed", "3", "--device", "cpu"]
        assert main([*command, "--rules", "own", "fork"]) == 0
    found = pd.read_csv(tmp_path / "data" / "short_lab.csv", keep_default_na=False)
    assert found["seed"].tolist() == [3] * 3 + [4] * 3 + [3] * 3 + [4] * 3
    assert found["rules"].tolist() == ["none", "own", "fork"] * 4


def test_the_silence_at_an_end_is_counted_in_seconds() -> None:
    audio = torch.zeros(1, 24000)
    audio[0, :12000] = 0.1
    assert hearing.silent_end(audio) == 0.5
    assert hearing.silent_end(torch.zeros(1, 2400)) == 0.1


@pytest.mark.parametrize(("file", "count"), [(trials.PROVOKING, 100), (trials.HELD_OUT, 100), (SHORT, 200)])
def test_the_texts_are_as_many_as_is_said_and_all_different(file: Path, count: int) -> None:
    lines = file.read_text().splitlines()
    assert len(set(lines)) == len(lines) == count
    assert all(line.strip() == line != "" for line in lines)


def test_short_texts_are_short() -> None:
    assert max(map(len, SHORT.read_text().splitlines())) <= 45


def test_recorded_ways_that_were_given_up_are_still_on_the_board() -> None:
    found, later = (set(trials.board(records.load_results(name)).index) for name in ("trials_lab", "vocoder_lab"))
    assert set(trials.WAYS) == (found | later) - {"mel continued", "guided 5 of 10"}
