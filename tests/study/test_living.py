from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from chatterbox_lab.__main__ import main
from chatterbox_lab.show import figures
from chatterbox_lab.study import living, living_streams, records


def test_a_release_is_measured_in_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "living.csv"
    command = ["living", "--model", "tiny", "--variants", "english", "--releases", "light", "--output", str(path)]
    assert main(command) == 0
    assert "7 rows are in living.csv" in capsys.readouterr().out
    table = pd.read_csv(path)
    assert set(table["release"]) == {"chatterbox-light 1.0.2"}  # and not this environment's
    calls = living.after_calls(table)
    assert list(calls["sdpa"]) == [14] * 6
    assert not calls["hooks"].any()
    with pytest.raises(SystemExit):
        main([*command[:-2], "--rounds", "0"])


def timed() -> pd.DataFrame:
    """Two rounds after one to warm up: ours is twice and four times as fast."""
    rows = [
        {"part": part, "variant": "english", "way": way, "round": number, "seconds": seconds / (number + 2)}
        | {"tokens": 10, "same_tokens": 10 - number * (way == "static"), "audio_seconds": 2.0}
        for part in ("t3",)
        for number in (-1, 0, 1)
        for way, seconds in ((living.STOCK, 8.0), ("static", 4.0 if number == 0 else 2.0))
    ]
    return pd.DataFrame(rows)


def test_costs_are_medians_and_ratios_within_rounds() -> None:
    costs = living.costs(timed()).loc["english"]
    assert costs.loc["static", ["faster", "least", "most"]].tolist() == [3.0, 2.0, 4.0]
    assert costs["same tokens"].to_dict() == {living.STOCK: 10, "static": 9}


def test_the_record_is_drawn_whole() -> None:
    table = records.load_results("living_random_cpu")
    drawn = figures.left_by_calls(living.after_calls(table))
    called = table[table["part"] == "calls"]
    assert len(drawn.axes[0].get_yticks()) == called.groupby(["release", "transformers", "variant"]).ngroups
    assert {"0", "3", "6", "9"} == {text.get_text() for text in drawn.axes[0].texts}
    drawn = figures.decode_costs(living.costs(table))
    assert [ax.get_title() for ax in drawn.axes] == list(living.costs(table).index.unique("variant"))
    board = living_streams.board(table)
    drawn = figures.real_time(board)
    assert [ax.get_title() for ax in drawn.axes] == list(living.STREAMED)
    for variant, ax in zip(living.STREAMED, drawn.axes, strict=True):
        rtfs = board.loc[variant].loc[list(figures.STREAMS), "RTF"]
        assert [text.get_text() for text in ax.texts] == [f" {rtf:.2f}" for rtf in rtfs]
        widths = [sum(bar[row].get_width() for bar in ax.containers) for row in range(len(rtfs))]
        assert widths == pytest.approx(rtfs.tolist(), rel=0.05)  # medians of parts do not add up exactly
    plt.close("all")
