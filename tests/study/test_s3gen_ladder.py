from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import trace

from chatterbox_lab.__main__ import main
from chatterbox_lab.engine.clock import StageClock
from chatterbox_lab.engine.settings import BALANCED, FAST
from chatterbox_lab.study import s3gen_ladder
from chatterbox_lab.study.ladder import STOCK
from chatterbox_lab.study.records import Record

NAMES = ["5 Euler steps", "each frame once", "and a prompt of 3 s"]


@pytest.fixture(scope="module")
def climbed(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    path = tmp_path_factory.mktemp("prices") / "prices.csv"
    arguments = ["--rungs", *NAMES, "--chunk-size", "4", "8", "--rounds", "2", "--long", "6", "--device", "cpu"]
    assert main(["s3gen", *arguments, "--output", str(path)]) == 0
    return pd.read_csv(path)


def test_every_rung_renders_every_chunk(climbed: pd.DataFrame) -> None:
    chunks = climbed[climbed["run"] == "chunks"]
    counts = chunks.groupby(["chunk_size", "context_window", "rung"])["round"].apply(list)
    assert set(counts.index) == {(c, 2 * c, n) for c in (4, 8) for n in (STOCK, s3gen_ladder.EXACT, *NAMES)}
    assert all(sorted(rounds) == [-1, 0, 1] for rounds in counts)
    assert (chunks["seconds"] > 0).all()


def test_the_exact_rung_makes_the_released_mel_and_others_do_not(climbed: pd.DataFrame) -> None:
    decibels = climbed[climbed["run"] == "chunks"].groupby("rung")["mel_decibels"].agg(["min", "max"])
    assert decibels.loc[STOCK, "max"] < 1e-4
    assert (decibels.loc[NAMES, "min"] > 0.05).all()


def test_the_summary_pairs_rounds_and_points_upwards() -> None:
    rows = []
    for number, slow in ((-1, 9.0), (0, 1.0), (1, 4.0)):  # the last round fell into a slow spell
        for rung, seconds in ((STOCK, 12.0), (s3gen_ladder.EXACT, 6.0), ("each frame once", 2.0)):
            shape = {"run": "chunks", "chunk_size": 50, "context_window": 100, "mel_decibels": 0.0}
            rows.append(shape | {"rung": rung, "round": number, "seconds": seconds * slow})
    rows.append({"run": "about", "rung": "each frame once", "first_use_seconds": 3.0, "round": 0})
    flops = {"flop": 3e12, "flops_float32": 1e12, "flops_bfloat16": 3e12}
    rows.append({"run": "about", "rung": STOCK, "chunk_size": 50, "context_window": 100, "round": 0} | flops)
    table = pd.DataFrame(rows)
    board = s3gen_ladder.summary(table).loc[50, 100]
    assert board["to stock"].to_list() == pytest.approx([1, 2, 6])
    assert board["to below"].to_list() == pytest.approx([1, 2, 3])
    assert board.loc["each frame once", "first use (s)"] == 3
    assert board.loc["each frame once", "RTF"] == pytest.approx(2.5)
    floor = s3gen_ladder.floor(table).loc[50, 100]
    assert floor.loc[s3gen_ladder.EXACT, "at that speed (s)"] == pytest.approx(3)
    assert floor.loc[s3gen_ladder.EXACT, "share of the limit"] == pytest.approx(3 / 15)


def test_rows_of_what_is_no_rung_any_more_are_left_out() -> None:
    row = {"run": "chunks", "chunk_size": 50, "context_window": 100, "round": 0, "seconds": 2.0, "mel_decibels": 0.0}
    rows = [row | {"rung": name} for name in (STOCK, "mel continued", s3gen_ladder.EXACT)]
    rows.append({"run": "about", "rung": STOCK, "round": 0, "first_use_seconds": 0.0})
    assert list(s3gen_ladder.summary(pd.DataFrame(rows)).loc[50, 100].index) == [STOCK, s3gen_ladder.EXACT]


def test_arithmetic_is_counted(climbed: pd.DataFrame) -> None:
    about = climbed[(climbed["run"] == "about") & climbed["flop"].notna()].set_index("chunk_size")
    assert about.loc[8, "flop"] > about.loc[4, "flop"] > 1e8
    assert (about[["flops_float32", "flops_bfloat16"]] > 0).all(axis=None)


def test_the_speed_of_products_is_operations_over_the_best_time(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([*[3.0] * 5, 2.0, *[3.0] * 14])

    class Clock(StageClock):
        @contextmanager
        def stage(self, name: str) -> Iterator[None]:
            yield
            self.seconds[name] += next(times)

    monkeypatch.setattr(s3gen_ladder, "StageClock", Clock)
    rows, width = 6, 8
    assert s3gen_ladder.product_flops(rows, width, torch.float32, "cpu") == rows * width * 4 * width  # a sum is two


def test_a_long_speech_is_told_chunk_by_chunk(climbed: pd.DataFrame) -> None:
    long = climbed[climbed["run"] == "long"]
    assert long.groupby("round")["chunk"].apply(list).to_list() == [list(range(6))] * 3
    assert len(s3gen_ladder.late_over_early(climbed)) == 3


def test_late_chunks_over_early_ones() -> None:
    rows = [{"run": "long", "round": 0, "chunk": n, "seconds": 1.0 if n < 20 else 1.5} for n in range(40)]
    assert s3gen_ladder.late_over_early(pd.DataFrame(rows)).to_list() == [1.5]


def test_the_released_code_gets_its_own_noise_back(tts: Any) -> None:
    before, noise = trace(tts), tts.s3gen.flow.decoder.rand_noise
    list(s3gen_ladder.climb(tts, s3gen_ladder.chosen([s3gen_ladder.EXACT]), 3, 4, 1))
    assert tts.s3gen.flow.decoder.rand_noise is noise
    assert trace(tts) == before


def test_an_interrupted_measurement_goes_on(tts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3gen_ladder, "load", lambda *_, **__: tts)
    arguments = ["--rungs", NAMES[0], "--chunk-size", "3", "5", "--rounds", "1", "--output", str(tmp_path / "p.csv")]
    climb, calls = s3gen_ladder.climb, []

    def interrupted(*args: Any) -> Any:
        calls.append(args[2])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return climb(*args)

    monkeypatch.setattr(s3gen_ladder, "climb", interrupted)
    assert main(["s3gen", *arguments]) == 130
    assert not (tmp_path / "p.csv").exists()
    assert main(["s3gen", *arguments, "--resume"]) == 0
    assert calls == [3, 5, 5]  # what was done is not done again
    table = Record.continued(tmp_path / "p.csv").table()
    assert not table.duplicated(["run", "rung", "chunk_size", "round"]).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rungs", "faster"], "rungs='faster': must be among stock, plain operations"),
        (["--chunk-size", "0"], "chunk-size=0: must be a whole number, at least 1 and at most 250"),
        (["--rounds", "0"], "rounds=0"),
        (["--model", "nowhere"], "model='nowhere'"),
    ],
)
def test_what_is_wrong_is_said(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["s3gen", *arguments, "--device", "cpu", "--output", str(tmp_path / "p.csv")])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_last_rung_is_the_preset() -> None:
    last = s3gen_ladder.RUNGS[-1].changes
    assert s3gen_ladder.SOUNDS["fast"] | {"flow_dtype": "bfloat16", "vocoder_dtype": "bfloat16"} == last
    assert BALANCED.replace(**s3gen_ladder.SOUNDS["fast"]) == FAST.replace(context_window=BALANCED.context_window)


def test_every_rung_changes_the_rung_below_it_in_one_thing() -> None:
    known = {rung.name: rung for rung in s3gen_ladder.RUNGS}
    for rung in s3gen_ladder.RUNGS[2:]:
        before, after = (known[name].settings() for name in (rung.below, rung.name))
        assert sum(getattr(before, field) != getattr(after, field) for field in vars(before)) == 1
