from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest

from chatterbox_lab.files import REPOSITORY
from chatterbox_lab.study import published, records

PRESENT = "not streaming before over streaming after"


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return published.load()


@pytest.fixture(scope="module")
def report() -> pd.DataFrame:
    return records.load_results("report")


def test_every_figure_has_its_document_its_day_and_its_unit(table: pd.DataFrame) -> None:
    asked = ["source", "document", "date", "machine", "software", "model", "setting", "measure", "unit", "how"]
    assert (table[asked] != "").all(axis=None)
    assert table["value"].gt(0).all()
    assert not table.duplicated(["source", "document", "machine", "software", "setting", "measure", "value"]).any()
    assert table.loc[table["looked_up"] == "", "how"].str.startswith("cited: ").all()


def test_enough_of_them_are_of_a_known_gpu_and_can_be_predicted(table: pd.DataFrame) -> None:
    known = table[(table["machine"] != published.UNKNOWN) & table["measure"].isin(["RTF", "first chunk"])]
    kinds = known["software"].map(published.kind)
    assert (known["machine"].str.startswith(("RTX", "A100")) & ~kinds.str.startswith("another engine")).sum() >= 8


WRONG = {
    "source": ("somebody", "owner/repository"),
    "document": ("", "given"),
    "date": ("2025-13-01", "a day as 2025-08-06"),
    "model": ("kokoro", "one of fork, english"),
    "measure": ("speed", "one of RTF, first chunk"),
    "unit": ("ms", "one of ('s/s',)"),
    "value": (0.0, "a positive number"),
    "upper": (0.1, "empty or above value"),
    "claim": ("the maps", "empty or a measure of report.csv"),
    "looked_up": ("yesterday", "a day, and empty for what is cited"),
    "how": ("hearsay", "document, excerpt, or cited"),
}


@pytest.mark.parametrize("column", WRONG)
def test_a_row_that_lacks_something_is_named(column: str, table: pd.DataFrame, report: pd.DataFrame) -> None:
    value, allowed = WRONG[column]
    wrong = table.copy()
    assert wrong.loc[0, "measure"] == "RTF"
    wrong.loc[0, column] = value
    text = rf"line 2: {column}={re.escape(repr(value))}: must be {re.escape(allowed)}"
    with pytest.raises(ValueError, match=text):
        published.checked(wrong, report["measure"])


def test_another_column_is_refused(table: pd.DataFrame, report: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match=r"columns .*'record'.*must be"):
        published.checked(table.assign(record="ours"), report["measure"])


def test_nothing_that_reads_records_reads_a_published_figure(table: pd.DataFrame) -> None:
    kinds = {file.stem.split("_")[0] for file in (REPOSITORY / "data").glob("*_*.csv")}
    assert {"bench", "streams", "ladder"} <= kinds
    for kind in kinds - {"counts"}:
        ours = records.recorded(kind) if kind.isalpha() else pd.concat(map(pd.read_csv, _files(kind)))
        assert not {"source", "looked_up"} & set(ours), kind
    assert not {"record", "variant", "rtf", "state", "device"} & set(table)
    assert "published" not in kinds


def _files(kind: str) -> list[str]:
    return [str(file) for file in (REPOSITORY / "data").glob(f"{kind}_*.csv")]


def test_every_heading_of_the_report_has_its_place(report: pd.DataFrame) -> None:
    assert set(report["heading"]) == set(published.HEADINGS)
    assert set(published.ANSWERS.values()) <= set(published.HEADINGS)
    assert not report["measure"].duplicated().any()


NUMBERS = (1.3, 1.7, 0.5, 3, 83, 25, 309, 312, 100, 50, 1.4, 1.5, 0.716, 2.03, 75, 150, 2, 0.8, 11)
"""In the report's order, each where it is first said."""


def test_every_number_of_the_report_is_in_its_table(report: pd.DataFrame) -> None:
    there = set(report["reported"]) | set(report["upper"])
    assert not [number for number in NUMBERS if number not in there]


def test_the_reports_own_figures_are_the_same_in_both_tables(table: pd.DataFrame, report: pd.DataFrame) -> None:
    mine = table[table["document"] == published.REPORT]
    assert len(mine) >= 7
    assert set(mine["value"]) <= set(report["reported"])


def test_a_claim_is_judged_by_its_author_apart_from_others(table: pd.DataFrame, report: pd.DataFrame) -> None:
    ours = {"factor, attention maps on over off": {"a": 1.0, "b": 2.9}, "RTF, streaming, before": {"c": 1.6}}
    judged = published.judged(report, table, ours).set_index("claim")
    maps = judged.loc["attention maps on over off: 3x"]
    assert (maps["by ours"], maps["our records"]) == ("in part", "1x to 2.9x")
    assert (maps["by its author"], maps["its author"]) == ("not reproduced", "1.28x to 1.37x")
    assert judged.loc["RTF before over after: 2x", "by its author"] == "not reproduced"
    assert judged.loc["RTF, streaming, before: 1.7", "by ours"] == "another machine"
    assert published.judged(report, table, ours, same=["c"]).set_index("claim")["by ours"].iloc[1] == "reproduced"
    assert "RTX 4090: 0.499" in judged.loc["RTF, streaming, before: 1.7", "others"]
    assert judged.loc["GPU memory, peak: 11 GB", "by its author"].startswith("undecided")
    assert judged.loc["GPU memory, peak: 11 GB", "its author"] == "4.58 GB to 5.04 GB"
    assert PRESENT not in " ".join(judged.index)  # nothing bears on it here


@pytest.mark.parametrize(
    ("unit", "said", "values", "expected"),
    [
        ("x", 3.0, [2.41], "reproduced"),
        ("x", 3.0, [2.39], "not reproduced"),
        ("x", np.nan, [1.05], "reproduced"),
        ("x", np.nan, [1.04, 1.06], "in part"),
        ("s", 1.5, [1.2, 1.8], "reproduced"),
        ("s", 1.5, [0.5], "not reproduced"),
        ("s", 1.5, [], ""),
    ],
)
def test_what_a_measurement_says_of_a_claim(unit: str, said: float, values: list[float], expected: str) -> None:
    assert published.verdict({"unit": unit, "reported": said}, values) == expected


def stream(rtfs: dict[tuple[int, str], float]) -> pd.DataFrame:
    index = pd.MultiIndex.from_tuples(rtfs, names=["chunk_size", "variant"])
    return pd.DataFrame({"RTF": list(rtfs.values()), "peak memory (GiB)": 5.0, "first chunk (s)": 1.0}, index=index)


SHAPES = {(25, "upstream"): 0.8, (25, "ours, stock"): 0.6, (25, "ours, off"): 0.5, (50, "ours, off"): 0.4}


def test_our_factors_are_ratios_within_one_record() -> None:
    board = pd.DataFrame({"ms/token": {"stock": 20.0, "compiled": 10.0}, "to below": {"static KV cache": 1.5}})
    found = published.factors({"gpu": stream(SHAPES)}, {"cpu": board})
    assert found["factor, attention maps on over off"] == {"gpu": pytest.approx(1.2)}
    assert found["factor, RTF before over after"] == {"gpu": pytest.approx(1.5)}
    assert "factor, not streaming before over streaming after" not in found  # upstream's whole was not measured
    assert found["factor, KV cache before over after"] == {"cpu": 1.5}
    assert found["factor, before over after compilation"] == {"cpu": 2.0}


def test_what_a_machine_did_not_measure_is_missing_beside_the_report(report: pd.DataFrame) -> None:
    board = published.beside(report, {"gpu": stream(SHAPES), "cpu": stream(SHAPES)}, ["gpu"])
    assert list(board.index) == list(report.dropna(subset="column")["measure"])
    assert board.loc["RTF, streaming, before", "gpu"] == 0.8
    assert np.isnan(board.loc["RTF, streaming, after", "gpu"])
    assert board.loc["GPU memory, peak", "gpu"] == pytest.approx(5 * 2**30 / 1e9)
    assert np.isnan(board.loc["GPU memory, peak", "cpu"])


def test_points_say_who_measured(table: pd.DataFrame) -> None:
    points = published.rtfs(table, {"gpu": stream(SHAPES)})
    ours = points[points["who"] == "our record"]
    assert list(ours["RTF"]) == [0.8, 0.5, 0.4]  # with maps, ours is no kind that others have
    assert set(ours["machine"]) == {"gpu"}
    assert set(points["who"]) == {"the report", "the report's author, elsewhere", "others", "our record"}
    assert points["machine"].str.endswith("(cited)").sum() == 1


def test_software_of_no_kind_is_refused() -> None:
    assert published.kind("chatterbox-vllm, batches") == "another engine, many texts at once"
    assert published.kind("chatterbox-streaming, maps off") == "attention maps off"
    assert published.kind("chatterbox-streaming") == "as released"
    with pytest.raises(ValueError, match="software='kokoro'"):
        published.kind("kokoro")


def test_a_document_has_a_link_where_its_place_is_known() -> None:
    base = {"source": "a/b", "commit": "c"}
    assert published.link(base | {"document": "x/y.md"}) == "[a/b, y.md](https://github.com/a/b/blob/c/x/y.md)"
    assert published.link(base | {"document": "issue 7"}) == "[a/b, issue 7](https://github.com/a/b/issues/7)"
    assert published.link(base | {"document": "pull request 8"}).endswith("/pull/8)")
    assert published.link({"source": "a/b", "commit": "", "document": "not found"}) == "a/b, not found"


def test_a_verdict_stands_under_the_heading_that_it_answers(report: pd.DataFrame) -> None:
    assert published.heading("maps make a step 3x slower: decode", report) == published.HEADINGS[1]
    assert published.heading("attention maps on over off: 3x", report) == published.HEADINGS[1]
    assert published.heading("T3 is 8x faster than stock: int8", report) == ""
