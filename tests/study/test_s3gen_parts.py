from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from chatterbox_lab.__main__ import main
from chatterbox_lab.study import s3gen_parts
from chatterbox_lab.study.ladder import STOCK
from chatterbox_lab.study.s3gen_parts import PLAIN, ROUNDED, TOKENS, WAYS


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    path = tmp_path_factory.mktemp("parts") / "parts.csv"
    assert main(["parts", "--model", "tiny", "--device", "cpu", "--rounds", "2", "--output", str(path)]) == 0
    return pd.read_csv(path)


def test_every_way_takes_its_turn(measured: pd.DataFrame) -> None:
    rows = measured[measured["part"] != "limits"]
    counts = rows.groupby(["part", "tokens", "way"])["round"].apply(sorted)
    wanted = {("vocoder", n, way) for n in TOKENS["vocoder"] for way in WAYS}
    wanted |= {("encoder", n, way) for n in TOKENS["encoder"] for way in (STOCK, PLAIN, ROUNDED)}
    assert set(counts.index) == wanted
    assert all(rounds == [-2, -1, 0, 1] for rounds in counts)
    flop = rows.groupby(["part", "tokens"])["flop"].first()
    assert 1.9 < flop["vocoder", 62] / flop["vocoder", 31] < 2.1
    assert flop["encoder", 300] > 2 * flop["encoder", 150]  # attention


def test_only_bfloat16_moves_the_result(measured: pd.DataFrame) -> None:
    moved = measured.groupby("way")["moved"].max()
    assert moved[PLAIN] < 1e-4 < moved[ROUNDED] < 0.1
    assert moved[STOCK] == 0


def test_the_summary_is_of_medians_ratios_and_limits() -> None:
    rows = [
        {
            "part": "vocoder",
            "tokens": 25,
            "way": way,
            "round": number,
            "seconds": seconds * slow,
            "flop": 1e9,
            "moved": 0,
        }
        for number, slow in ((-1, 9.0), (0, 1.0), (1, 4.0))
        for way, seconds in ((STOCK, 0.2), (PLAIN, 0.1), (ROUNDED, 0.05))
    ]
    rows.append({"part": "limits", "flops_float32": 2e10, "flops_bfloat16": 8e10})
    board = s3gen_parts.summary(pd.DataFrame(rows)).loc["vocoder", 25]
    assert board["s a second"].tolist() == pytest.approx([0.5, 0.25, 0.125])
    assert board["to stock"].tolist() == pytest.approx([1, 2, 4])
    assert board["share of the limit"].tolist() == pytest.approx([0.1, 0.2, 0.1])


def test_rounds_are_checked(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["parts", "--model", "tiny", "--rounds", "0", "--output", str(tmp_path / "x.csv")])
