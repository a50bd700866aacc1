"""What upstream's calls do to later ones is measured through upstream's own classes, spies and all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import TEXT

import chatterbox_lab as lab
from chatterbox_lab.__main__ import main
from chatterbox_lab.engine.t3.spies import remove_spies
from chatterbox_lab.study import calls
from chatterbox_lab.study.fallback import count_spies, watch_layers
from chatterbox_lab.study.upstream import upstream_stream, upstream_whole


def hooks(tts: Any) -> int:
    return count_spies(tts.t3.tfmr)["hooks"]


@pytest.mark.parametrize("way", [upstream_whole, upstream_stream])
def test_spies_stay_in_a_calls_way_where_that_is_asked(tts: Any, way: Any) -> None:
    fixed = {"seed": 0, "max_new_tokens": 5, "ignore_eos": True, "chunk_size": 5}
    try:
        for _ in range(2):
            lab.upstream_tokens(tts, TEXT, seed=0, max_new_tokens=1, leave_spies=True)
        list(way(tts, TEXT, **fixed))
        assert hooks(tts) == 2  # they were lifted, and are back
        list(way(tts, TEXT, **fixed, leave_spies=True))
        assert hooks(tts) == 3
    finally:
        remove_spies(tts.t3.tfmr)


def test_a_stream_after_a_whole_call_runs_through_its_spy(tts: Any) -> None:
    """The spy of an earlier call copies its layer's maps to the CPU for every token of a later one."""
    layer, copied = tts.t3.tfmr.layers[9 % len(tts.t3.tfmr.layers)].self_attn, []
    try:
        lab.upstream_tokens(tts, TEXT, seed=0, max_new_tokens=1, leave_spies=True)
        key, spy = next(iter(layer._forward_hooks.items()))
        layer._forward_hooks[key] = lambda *given: (copied.append(1), spy(*given))[1]
        layer._forward_hooks[key].__qualname__ = spy.__qualname__
        fixed = {"seed": 0, "max_new_tokens": 5, "ignore_eos": True, "chunk_size": 5}
        list(upstream_stream(tts, TEXT, **fixed))
        assert not copied
        list(upstream_stream(tts, TEXT, **fixed, leave_spies=True))
        assert len(copied) >= 5
    finally:
        remove_spies(tts.t3.tfmr)


def test_a_record_has_every_call_with_and_without_what_was_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "calls.csv"
    line = ["calls", "--model", "tiny", "--device", "cpu", "--tokens", "5", "--chunk-size", "5", "--rounds", "1"]
    assert main([*line, "--after", "0", "3", "--output", str(path)]) == 0
    assert "the process's first call took" in capsys.readouterr().out
    table = pd.read_csv(path)
    assert len(table) == 2 * 2 * 4
    assert set(table.loc[table["after"] == 3, "spies"]) == {3}
    assert set(table.loc[table["after"] == 0, "spies"]) == {0}
    assert main([*line, "--after", "0", "3", "4", "--output", str(path), "--resume"]) == 0
    assert len(pd.read_csv(path)) == 3 * 2 * 4


def test_factors_are_of_pairs_within_a_round() -> None:
    rows = [
        {"after": 5, "way": "whole", "round": number, "left": left, "rtf": rtf, "t3_seconds": 1.0, "tokens": 50}
        for number, left, rtf in ((-1, True, 99), (0, True, 3), (0, False, 2), (1, True, 8), (1, False, 2))
    ]
    found = calls.factors(pd.DataFrame(rows)).loc[(5, "whole")]
    assert found[["factor", "least", "most"]].to_list() == [2.75, 1.5, 4.0]
    assert found["T3 (ms/token)"] == 20


@pytest.mark.parametrize(
    ("late", "chance", "holds"),
    [
        ((1.5, 1.6), (0.9, 1.1), True),
        ((1.2, 1.3), (0.9, 1.4), "undecided: within chance"),
        ((1.0, 1.02), (0.9, 1.1), False),
    ],
)
def test_a_factor_counts_where_it_is_above_chance(late: Any, chance: Any, holds: Any) -> None:
    rows = [
        {"after": after, "way": "stream", "round": number, "left": left, "rtf": rtf if left else 1.0}
        for after, ratios in ((0, chance), (50, late))
        for number, rtf in enumerate(ratios)
        for left in (True, False)
    ]
    table = pd.DataFrame(rows).assign(t3_seconds=1.0, tokens=50)
    found, told = calls.verdict(table, "stream")
    assert found == holds
    assert told.startswith(f"{sum(late) / 2:.2f}x after 50 calls")
    assert calls.verdict(table[table["after"] == 50], "stream") == ("not measured", "")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(["--after", "-1"], "after=-1"), (["--tokens", "0"], "tokens=0"), (["--rounds", "0"], "rounds=0")],
)
def test_bad_options_are_refused_by_name(wrong: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["calls", *wrong])
    assert message in capsys.readouterr().err


def test_the_layers_fall_back_with_and_without_spies(tts: Any) -> None:
    with watch_layers(tts.t3.tfmr) as counts:
        list(upstream_stream(tts, TEXT, seed=0, max_new_tokens=5, ignore_eos=True, chunk_size=5))
    assert all(count["manual"] for count in counts)
