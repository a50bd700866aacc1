from __future__ import annotations

from chatterbox_lab.study.turns import to_and_fro


def test_variants_are_as_often_early_as_late() -> None:
    orders = [to_and_fro({"stock": 1, "ours": 2, "fast": 3}, turn) for turn in range(-1, 3)]
    assert orders[1::2] == [["stock", "ours", "fast"]] * 2
    assert orders[::2] == [["fast", "ours", "stock"]] * 2


def test_a_machine_that_slows_down_steadily_favours_nobody() -> None:
    spent = dict.fromkeys("abc", 0.0)
    clock = 0
    for turn in range(4):
        for variant in to_and_fro(spent, turn):
            clock += 1
            spent[variant] += clock
    assert len(set(spent.values())) == 1
