from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import chatterbox_lab as lab
from chatterbox_lab import kept
from chatterbox_lab.__main__ import main
from chatterbox_lab.engine import linears
from chatterbox_lab.study import t3_ladder
from chatterbox_lab.study.ladder import STOCK

NAMES = ["static KV cache", "two-row products", "int8"]


@pytest.fixture(scope="module")
def climbed(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    path = tmp_path_factory.mktemp("ladder") / "ladder.csv"
    arguments = ["--rungs", *NAMES, "--tokens", "17", "--rounds", "1", "--long", "25", "--long-rungs", *NAMES[1:]]
    assert main(["t3", *arguments, "--output", str(path)]) == 0
    return pd.read_csv(path)


@pytest.fixture(scope="module")
def climb() -> t3_ladder.Ladder:
    return t3_ladder.Ladder("tiny", "cpu", NAMES[:2])


def test_every_rung_is_timed_in_every_round(climbed: pd.DataFrame) -> None:
    short = climbed[climbed["run"] == "short"]
    assert short.groupby(["rung", "round", "phase"])["tokens"].sum().xs("step", level="phase").eq(16).all()
    assert set(short["round"]) == {-1, 0}
    assert set(climbed[climbed["run"] == "long"]["rung"]) == set(NAMES[1:])
    assert set(climbed["rung"]) == {STOCK, *NAMES}
    assert (climbed["seconds"].dropna() > 0).all()


def test_the_summary_compares_within_groups(climbed: pd.DataFrame) -> None:
    found = t3_ladder.summary(climbed)
    assert list(found.index) == [STOCK, *NAMES]
    assert found.loc[STOCK, "to stock"] == 1
    assert found["logits error"].drop(STOCK).lt([1e-4, 1e-4, 0.1]).all()
    assert found.loc["int8", "logits error"] > 1e-4
    assert found.loc[NAMES[:2], "same tokens"].eq("17 of 17").all()
    limits = climbed.dropna(subset=["limit_seconds"]).set_index("rung")["limit_seconds"]
    assert (found["limit (ms)"] == 1e3 * limits[found.index]).all()
    assert (limits > 0).all()
    steps = climbed[(climbed["run"] == "short") & (climbed["round"] >= 0) & (climbed["phase"] == "step")]
    own = steps[steps["rung"] == "int8"]
    assert found.loc["int8", "ms/token"] == pytest.approx(1e3 * (own["seconds"] / own["tokens"]).median())


def test_ratios_are_paired_and_point_upwards() -> None:
    rows = []
    for number, slow in ((0, 1.0), (1, 4.0)):  # the second round fell into a slow spell
        for rung, ms in (("stock", 300.0), ("two-row products", 100.0), ("int8", 20.0)):
            common = {"run": "short", "rung": rung, "round": number, "asked_tokens": 9}
            rows.append(common | {"phase": "prefill", "first": 0, "tokens": 1, "seconds": 2.0, "same_tokens": 9})
            rows.append(common | {"phase": "step", "first": 1, "tokens": 8, "seconds": 8 * ms * slow / 1e3})
    for rung, below in (("stock", "stock"), ("two-row products", "stock"), ("int8", "two-row products")):
        about = {"below": below, "limit_seconds": 0.01, "logits_error": 0.0, "first_use_seconds": 0.0}
        rows.append({"run": "about", "rung": rung, "round": 0} | about)
    found = t3_ladder.summary(pd.DataFrame(rows))
    assert found["to stock"].to_list() == pytest.approx([1, 3, 15])
    assert found["to below"].to_list() == pytest.approx([1, 3, 5])
    assert found.loc["int8", "ms/token"] == pytest.approx(50)
    assert found.loc["int8", "share of limit"] == pytest.approx(0.2)


def test_neighbours_change_from_turn_to_turn(climb: t3_ladder.Ladder, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def tokens(rung: t3_ladder.Rung, count: int) -> Any:
        for _ in range(count):
            order.append(rung.name)
            yield torch.tensor([1])

    monkeypatch.setattr(climb, "tokens", tokens)
    climb.climb(25, names=[STOCK, NAMES[1]])
    turns = [rung for number, rung in enumerate(order) if number == 0 or order[number - 1] != rung]
    assert turns == [STOCK, NAMES[1], STOCK, NAMES[1], STOCK]  # a turn ends with who begins next


def test_the_step_is_taken_apart(climbed: pd.DataFrame) -> None:
    about = climbed[climbed["run"] == "about"].set_index("rung")
    for name in NAMES:
        assert about.loc[name, ["products", "attention", "rest"]].gt(0).all()


def test_growth_is_read_from_the_long_run(climbed: pd.DataFrame) -> None:
    assert list(t3_ladder.growth(climbed).index) == [1, 9, 17]
    assert t3_ladder.late_over_early(climbed).isna().all()  # it has no 800th token
    long = {"run": "long", "phase": "step", "rung": "int8", "tokens": 8}
    rows = [long | {"first": first, "seconds": 1.0 if first < 400 else 2.0} for first in range(1, 881, 8)]
    assert t3_ladder.late_over_early(pd.DataFrame(rows)).to_dict() == {"int8": 2.0}


def test_a_plain_rung_is_the_static_cache_alone(climb: t3_ladder.Ladder, monkeypatch: pytest.MonkeyPatch) -> None:
    columns, running, used = linears._columns, "", set()
    monkeypatch.setattr(linears, "columns_are_faster", lambda threads: True)  # as on AMD
    monkeypatch.setattr(linears, "_columns", lambda *given: used.add(running) or columns(*given))
    kept._kept.clear()
    for rung in climb.rungs[1:]:
        running = rung.name
        climb.shares(rung)
        climb.climb(3, names=[rung.name])
    assert used == {"two-row products"}  # the plain rung came first: afterwards all is as before


def test_what_a_ladder_on_a_gpu_would_climb_exists() -> None:
    for device in ("cpu", "cuda", "mps"):
        there = t3_ladder.rungs(device)
        names = [rung.name for rung in there]
        assert names[0] == STOCK
        assert len(set(names)) == len(names)
        for rung in there:
            assert rung.below in names
            assert lab.StreamSettings(**rung.changes)


def test_the_rungs_speak_like_upstream_in_lockstep(climb: t3_ladder.Ladder) -> None:
    rows = climb.climb(25)
    same = {row["rung"]: row["same_tokens"] for row in rows if "same_tokens" in row}
    assert same == {STOCK: 25} | dict.fromkeys(NAMES[:2], 25)
    assert not torch.is_inference_mode_enabled()
    assert not any(module._forward_hooks for module in climb.models["float32"].t3.modules())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rungs", "sky"], "rungs='sky': must be among stock, no attention maps"),
        (["--rungs", "int8", "--long-rungs", "compiled"], "rungs='compiled': must be among stock, int8"),
        (["--tokens", "3"], "tokens=3: must be a whole number, at least 17"),
        (["--rounds", "0"], "rounds=0"),
        (["--long", "-1"], "long=-1"),
        (["--device", "abacus"], "device='abacus': not available"),
        (["--model", "nowhere"], "model='nowhere'"),
        (["--text", " "], "text=' ': must be a string with something to say"),
    ],
)
def test_bad_requests_are_refused(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["t3", *arguments, "--output", str(tmp_path / "x.csv")])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_interrupted_ladder_is_gone_on_with(
    climb: t3_ladder.Ladder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(t3_ladder, "load", lambda *_, **__: climb.models["float32"])
    path, whole = tmp_path / "ladder.csv", t3_ladder.Ladder.climb
    climbed: list[int] = []
    resumed = False

    def interrupted(self: t3_ladder.Ladder, count: int, number: int = 0, names: Any = None) -> list[dict[str, Any]]:
        if len(climbed) == 2 and not resumed:
            raise KeyboardInterrupt
        climbed.append(number)
        return whole(self, count, number)

    command = ["t3", "--rungs", "int8", "--tokens", "17", "--rounds", "2", "--output", str(path)]
    monkeypatch.setattr(t3_ladder.Ladder, "climb", interrupted)
    assert main(command) == 130
    assert "--resume goes on" in capsys.readouterr().out
    assert not path.exists()
    before = pd.read_csv(path.with_suffix(".unfinished.csv"))
    with pytest.raises(SystemExit):
        main(command)
    resumed = True
    assert main([*command, "--resume"]) == 0
    assert climbed == [-1, 0, 0, 1]  # the third warms up the new process
    after = pd.read_csv(path)
    pd.testing.assert_frame_equal(after.head(len(before)), before)
    assert set(after[after["run"] == "short"]["round"]) == {-1, 0, 1}
