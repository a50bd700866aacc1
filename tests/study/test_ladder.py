from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from chatterbox_lab.study import ladder
from chatterbox_lab.study.ladder import STOCK, Rung
from chatterbox_lab.study.records import Record

RUNGS = [Rung(STOCK, STOCK), Rung("hf", STOCK, {"backend": "hf"}), Rung("static", "hf", {"backend": "static"})]


class Clock:
    """A clock that only work moves on."""

    time = 0.0

    def __init__(self, device: str) -> None:
        pass

    def now(self) -> float:
        return Clock.time

    @staticmethod
    def work(*seconds: float) -> Callable[..., Any]:
        """Work that takes these seconds, the last of them each further time; returns what it is given."""
        left = list(seconds)

        def done(given: Any = None) -> Any:
            Clock.time += left.pop(0) if len(left) > 1 else left[0]
            return given

        return done


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[Clock]:
    monkeypatch.setattr(ladder, "StageClock", Clock)
    return Clock


def test_rungs_are_chosen_in_the_ladders_order() -> None:
    assert ladder.chosen(RUNGS, None) == RUNGS
    assert [rung.name for rung in ladder.chosen(RUNGS, ["static"])] == [STOCK, "static"]
    assert [rung.name for rung in ladder.chosen(RUNGS, ["static", "hf"], always=())] == ["hf", "static"]
    with pytest.raises(ValueError, match="rungs='sky': must be among stock, hf, static"):
        ladder.chosen(RUNGS, ["hf", "sky"])


def test_a_rung_is_settings_with_its_changes() -> None:
    settings = RUNGS[2].settings(chunk_size=7)
    assert (settings.chunk_size, settings.backend) == (7, "static")


def test_all_are_given_the_same_work_in_turn(clock: type[Clock]) -> None:
    makers = {"slow": clock.work(3.0), "fast": clock.work(1.0)}
    turns = list(ladder.side_by_side(makers, "abc", "cpu", "title", first=-1))
    assert [turn for turn, _ in turns] == [-1, 0, 1]
    assert [list(made) for _, made in turns] == [["fast", "slow"], ["slow", "fast"], ["fast", "slow"]]
    for letter, (_, made) in zip("abc", turns, strict=True):
        assert made == {"slow": (letter, 3.0), "fast": (letter, 1.0)}


def test_a_first_use_costs_what_the_second_does_not(clock: type[Clock], monkeypatch: pytest.MonkeyPatch) -> None:
    held = iter([100, 107])
    monkeypatch.setattr(ladder, "memory_in_use", lambda device: next(held))
    assert ladder.first_use(clock.work(5.0, 2.0), "cpu") == {"first_use_seconds": 3.0, "kept_bytes": 7}


def test_what_a_record_holds_is_not_measured_again(tmp_path: Path) -> None:
    measured: list[int] = []

    def rows(number: int) -> list[dict[str, Any]]:
        measured.append(number)
        return [{"seconds": 1.0, "round": number}]

    def parts(rounds: int) -> list[ladder.Part]:
        return [({"run": "short", "round": number}, lambda number=number: rows(number)) for number in range(rounds)]

    record, facts = Record(tmp_path / "record.csv"), {"machine": "this"}
    ladder.measure(parts(2), record, facts)
    record.finish()
    record = Record(tmp_path / "record.csv", resume=True)
    due = ladder.due(parts(3), record.rows)
    table = ladder.measure(due, record, facts)
    assert measured == [0, 1, 2]
    assert table.to_dict("list") == {
        "machine": ["this"] * 3, "seconds": [1.0] * 3, "round": [0, 1, 2], "run": ["short"] * 3
    }  # fmt: skip
    assert len(pd.read_csv(record.finish())) == 3


def test_a_part_that_is_interrupted_leaves_those_before_it(tmp_path: Path) -> None:
    def interrupted() -> list[dict[str, Any]]:
        raise KeyboardInterrupt

    record = Record(tmp_path / "record.csv")
    parts: list[ladder.Part] = [({"run": "about"}, lambda: [{"flop": 3}]), ({"run": "long"}, interrupted)]
    with pytest.raises(KeyboardInterrupt):
        ladder.measure(parts, record)
    assert [what["run"] for what, _ in ladder.due(parts, Record.continued(record.path).rows)] == ["long"]


def test_without_a_record_all_rows_come_back() -> None:
    assert ladder.measure([({"run": "about"}, lambda: [{"flop": 3}])]).to_dict("records") == [
        {"flop": 3, "run": "about"}
    ]


def test_rungs_are_compared_within_a_turn() -> None:
    times = pd.DataFrame({STOCK: [8.0, 80.0, 16.0], "hf": [4.0, 40.0, 4.0], "static": [1.0, 10.0, 4.0]})
    below = {rung.name: rung.below for rung in RUNGS}
    found = ladder.compared(times, below, spread=(0, 1))
    assert list(found.index) == [STOCK, "hf", "static"]
    assert found["to below"].to_list() == [1, 2, 4]
    assert found["to stock"].to_list() == [1, 2, 8]
    assert found["range"].to_list() == ["1.00 to 1.00", "2.00 to 4.00", "4.00 to 8.00"]
    alone = ladder.compared(times.drop(columns="hf"), below, spread=(0.5, 0.5))
    assert alone["to below"].isna().to_list() == [False, True]
    assert alone["range"].to_list() == ["1.00 to 1.00", "8.00 to 8.00"]


def test_late_is_compared_with_early() -> None:
    times = pd.DataFrame({"flat": 5.0, "double": [5.0] * 50 + [10.0] * 50}, index=range(1, 801, 8))
    assert ladder.late_over_early(times, early=80, late=700, around=40).to_dict() == {"flat": 1.0, "double": 2.0}
    assert ladder.late_over_early(times, early=80, late=7000, around=40).isna().all()


def test_two_ladders_are_as_far_apart_as_their_furthest_rung() -> None:
    board = pd.DataFrame({"to stock": [1.0, 2.0, 4.0]}, index=["stock", "a", "b"])
    other = pd.DataFrame({"to stock": [4.0, 1.0, 1.5]}, index=["b", "stock", "a"])
    assert ladder.apart(board, other) == 0.25
