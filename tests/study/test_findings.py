"""What is said of a diagnosis: verdicts and sentences follow the rows, and none stands without its numbers."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest
from diagnosis import measured

from chatterbox_lab.study import claims, diagnosed, findings
from chatterbox_lab.study.diagnose import PARTS
from chatterbox_lab.study.diagnosed import NAMES, WHOLE, Numbers, Spread, duration, percent
from chatterbox_lab.study.findings import HERE, LEAST, NOT_HERE, NOT_MEASURED, Finding
from chatterbox_lab.study.records import load_results
from chatterbox_lab.study.subject import EXACT, FASTEST, TUNED, UPSTREAM

CALLS = 5
Rows = list[dict[str, Any]]


@pytest.fixture
def rows() -> Rows:
    """Those of a model on which upstream's generate ran five times; each test has copies."""
    return [dict(row) for row in measured(CALLS).rows]


def change(rows: Rows, part: str, name: str, where: dict[str, Any], **values: Any) -> None:
    """Overwrites values in the rows of this name, and fails where there is none."""
    found = [row for row in rows if ({"part": part, "name": name} | where).items() <= row.items()]
    assert found, (part, name, where)
    for row in found:
        row.update(values)


def about(rows: Rows, words: str) -> Finding:
    (one,) = [one for one in findings.findings(Numbers(rows)) if words in one.cause]
    return one


def told(rows: Rows) -> str:
    """Everything that is said."""
    n = Numbers(rows)
    found = findings.findings(n)
    return "\n".join(
        [*findings.summary(n, found), *(line for one in found for line in (*one.evidence, one.told_share))]
    )


def steps(rows: Rows, **seconds: float) -> None:
    """Sets what a step takes in each mode, in all rounds."""
    for mode, taken in seconds.items():
        change(rows, "step", "step", {"variant": mode.replace("_", " ")}, seconds=taken)


def calm(rows: Rows) -> Rows:
    """The same model on a machine where nothing costs anything: as quick with as without, in every chunk size."""
    steps(rows, released=0.01, stock=0.01, off=0.01, as_found=0.01)
    for name in ("cache_copy", "mask_add", "operator"):
        change(rows, "step", name, {}, seconds=1e-9)
    for row in rows:
        if row["name"] == "threads" and row["part"] == "step":
            row["seconds"] = 0.01
        if row["name"] == "window":
            row["seconds"] = 0.1
        if row["name"] == "stream":
            row.update(rtf=0.2, total_generation_time=0.4, total_audio_duration=2.0, t3_seconds=0.2, s3gen_seconds=0.15)
            row.update(watermark_seconds=0.001, latency_to_first_chunk=0.2)
    return rows


def test_every_cause_has_a_verdict_and_causes_come_first(rows: Rows) -> None:
    found = findings.findings(Numbers(rows))
    assert len(found) == len(findings.CAUSES) == len({one.cause for one in found})
    order = [(HERE, NOT_HERE, NOT_MEASURED).index(one.verdict) for one in found]
    assert order == sorted(order)
    for verdict in (HERE, NOT_HERE):
        shares = [one.share for one in found if one.verdict == verdict]
        assert shares == sorted(shares, reverse=True)
    assert all(one.evidence for one in found)


def test_a_verdict_is_by_the_share_and_the_noise() -> None:
    assert Finding("it", LEAST, ()).verdict == HERE
    assert Finding("it", LEAST - 0.001, ()).verdict == NOT_HERE
    assert Finding("it", math.nan, ()).verdict == NOT_MEASURED
    noisy = Finding("it", 0.3, (), sure=False)
    assert (noisy.verdict, noisy.told_share) == (NOT_MEASURED, "within the noise")
    assert Finding("it", -0.2, ()).told_share == "0% of upstream's stream"


def test_spies_are_named_with_their_layer(rows: Rows) -> None:
    one = about(rows, "Spies")
    assert "5 hooks and 5 wrapped forwards of earlier calls were on layer 9." in one.evidence
    assert "of its attention on tokens to come" in one.evidence[-1]
    assert "Earlier calls have left 5 spies on layer 9." in findings.summary(Numbers(rows), [])
    for name in ("hooks", "wrapped_forwards"):
        change(rows, "found", name, {}, value=0)
    clean = about(rows, "Spies")
    assert (clean.verdict, clean.share) == (NOT_HERE, 0)
    assert "spies" not in "".join(findings.summary(Numbers(rows), []))


def test_maps_are_a_cause_where_steps_take_longer_with_them(rows: Rows) -> None:
    steps(rows, stock=0.030, off=0.010)
    one = about(rows, "Attention maps")
    share = Numbers(rows).share("t3_seconds") * 2 / 3
    assert one.verdict == HERE
    assert one.share == pytest.approx(share)
    assert "3.00x (3.00x to 3.00x) as long with maps, 30 ms against 10 ms; the report says about 3x." in one.evidence[2]
    assert one.evidence[0] == "14 of 14 layers run manual attention in upstream's call, 0 in ours."
    steps(rows, stock=0.0101)
    assert about(rows, "Attention maps").verdict == NOT_HERE


def test_a_difference_within_the_noise_is_no_verdict(rows: Rows) -> None:
    steps(rows, stock=0.03, off=0.01)
    change(rows, "step", "step", {"variant": "off", "round": 0}, seconds=0.09)
    one = about(rows, "Attention maps")
    assert (one.verdict, one.told_share) == (NOT_MEASURED, "within the noise")


def test_the_copy_of_the_spy_is_told_from_the_maps(rows: Rows) -> None:
    steps(rows, released=0.02, stock=0.01, off=0.01)
    assert about(rows, "analyzer itself").verdict == HERE
    assert about(rows, "Attention maps").share == 0


def test_small_chunks_are_judged_by_the_largest_that_was_measured(rows: Rows) -> None:
    for row in rows:
        if row["name"] == "stream" and row["variant"] == UPSTREAM:
            row["rtf"] = {0: 0.5, 25: 2.0, 50: 1.0}[row["chunk_size"]]
    one = about(rows, "Small chunks")
    assert one.share == pytest.approx(0.5)
    assert "RTF of 2.00 in chunks of 25 tokens, of 1.00 in chunks of 50." in one.evidence[0]
    assert one.evidence[1] == "Its call that does not stream has 0.50."


def test_the_windows_parts_are_told_apart(rows: Rows) -> None:
    for row in rows:
        if row["name"] == "window":  # 10 ms a token of the prompt, of 10; 100 ms the context; 50 ms the rest
            row["seconds"] = 0.05 + 0.01 * row["prompt_tokens"] + 0.1 * (row["context_tokens"] > 0)
    one = about(rows, "Window overlap")
    assert one.share == pytest.approx(Numbers(rows).share("s3gen_seconds") * 0.8)
    assert "a window of 85: 10 of the voice prompt (12%), 50 of context." in one.evidence[0]
    assert "That takes 250 ms, of which the prompt is 100 ms and the context 100 ms: 80%" in one.evidence[1]


def test_cache_mask_and_operators_are_shares_of_a_step(rows: Rows) -> None:
    steps(rows, released=0.01)
    change(rows, "step", "cache_copy", {}, seconds=0.005)
    change(rows, "step", "mask_add", {}, seconds=0.002)
    change(rows, "step", "operator", {}, seconds=1e-6)
    change(rows, "step", "operators", {"variant": "stock"}, value=1000)
    t3 = Numbers(rows).share("t3_seconds")
    shares = [about(rows, words).share / t3 for words in ("KV cache", "mask", "Operators")]
    assert shares == pytest.approx([0.5, 0.2, 0.1])
    assert "comes back as a tuple and grows by a copy: at 256 positions" in about(rows, "KV cache").evidence[0]
    assert "a mask of 1028 bytes, without maps of 0" in about(rows, "mask").evidence[0]


def test_the_first_call_of_a_used_model_is_not_judged(rows: Rows) -> None:
    assert about(rows, "Cold start").verdict == NOT_MEASURED
    change(rows, "found", "called_before", {}, value=0)
    change(rows, "first", "call", {"at": 0}, latency_to_first_chunk=4.0, watermark_seconds=2.5)
    change(rows, "first", "call", {"at": 1}, watermark_seconds=0.5)
    change(rows, "streams", "stream", {"variant": UPSTREAM, "chunk_size": 25}, latency_to_first_chunk=1.0)
    one = about(rows, "Cold start")
    assert (one.verdict, one.told_share) == (HERE, "75% of the first stream")
    assert one.evidence[0] == "Upstream's very first chunk came after 4.00 s, later ones after 1.00 s."
    assert one.evidence[1] == "Most of what the first adds is the watermark: 2 s."
    assert "Its first call took 2.5 s." in about(rows, "watermark").evidence


def test_flags_are_judged_on_a_gpu_alone(rows: Rows) -> None:
    assert "this model is on cpu" in about(rows, "flags").evidence[-1]
    (stock,) = [
        row for row in rows if row["name"] == "stream" and (row["variant"], row["chunk_size"]) == (UPSTREAM, 25)
    ]
    rows.append(stock | {"variant": TUNED, "rtf": stock["rtf"] / 2})
    for row in rows:
        row["device"] = "cuda"
    one = about(rows, "flags")
    assert (one.verdict, one.share) == (HERE, pytest.approx(0.5))
    assert "allow_tf32 False" in one.evidence[0]
    rows.append({**rows[0], "part": "step", "name": "busy_share", "variant": "stock", "value": 0.25})
    rows.append({**rows[0], "part": "step", "name": "kernels", "variant": "stock", "value": 900})
    launches = about(rows, "launches")
    assert "launches 900 kernels; the GPU works for 25% of it" in launches.evidence[0]
    assert launches.share == pytest.approx(0.75 * Numbers(rows).share("t3_seconds"))


def test_more_threads_than_cores_are_oversubscribed(rows: Rows) -> None:
    rows = [row for row in rows if (row["part"], row["name"]) != ("step", "threads")]
    change(rows, "machine", "threads", {}, value=8)
    change(rows, "machine", "cores", {}, value=2)
    for threads, seconds in ((8, 0.04), (2, 0.01)):
        rows.append({**rows[0], "part": "step", "name": "threads", "at": threads, "round": 0, "seconds": seconds})
    one = about(rows, "Threads")
    assert (one.verdict, one.told_share) == (HERE, "75% of a step of T3")
    assert one.evidence[0] == "Threads of PyTorch: 8; cores: 2."
    assert "oversubscribed" in one.evidence[-1]
    change(rows, "machine", "threads", {}, value=2)
    assert about(rows, "Threads").evidence == ("Threads of PyTorch: 2; cores: 2.",)


@pytest.mark.parametrize("part", PARTS)
def test_no_sentence_stands_without_its_numbers(rows: Rows, part: str) -> None:
    fewer = [row for row in rows if row["part"] != part]
    said = told(fewer)
    assert "nan" not in said
    assert "None" not in said
    assert not said.count("not measured")
    n = Numbers(fewer)
    for table in (diagnosed.before_after, diagnosed.chunk_sizes, diagnosed.gap):
        assert isinstance(table(n), pd.DataFrame)


def test_a_machine_with_nothing_to_complain_about_is_told_so(rows: Rows) -> None:
    found = findings.findings(Numbers(calm(rows)))
    assert findings.clean(found)
    said = findings.summary(Numbers(rows), found)
    judged = sum(one.verdict == NOT_HERE for one in found)
    assert said[-1] == f"There is nothing to complain about: none of {judged} possible causes takes 5% of the time."
    steps(rows, stock=0.03)
    busy = findings.findings(Numbers(rows))
    assert not findings.clean(busy)
    assert "What makes it slow here: attention maps" in findings.summary(Numbers(rows), busy)[-1]


def test_the_summary_has_the_streams_with_their_ratios(rows: Rows) -> None:
    for row in rows:
        if row["part"] == "streams" and row["name"] == "stream" and row["chunk_size"]:
            row["rtf"] = {UPSTREAM: 1.8, EXACT: 0.9, FASTEST: 0.3}[row["variant"]]
            row["latency_to_first_chunk"] = 2 * row["rtf"]
    said = findings.summary(Numbers(rows), findings.findings(Numbers(rows)))
    assert said[0] == "Upstream's stream has an RTF of 1.80, slower than real time, and a first chunk after 3.60 s."
    assert said[1] == "Our exact stream has 0.90 (2.0x faster, 2.0x to 2.0x), its first chunk after 1.80 s."
    change(rows, "streams", "stream", {"variant": UPSTREAM, "chunk_size": 25}, rtf=0.5)
    assert "an RTF of 0.50, faster than real time" in findings.summary(Numbers(rows), [])[0]
    assert said[2] == "Our fastest has 0.30 (6.0x faster, 6.0x to 6.0x), its first chunk after 0.60 s."


def test_ratios_are_within_rounds(rows: Rows) -> None:
    streams = [row for row in rows if row["part"] == "streams"]
    (theirs,) = [row for row in streams if (row["variant"], row["chunk_size"]) == (UPSTREAM, 25)]
    (ours,) = [row for row in streams if row["variant"] == EXACT]
    theirs["rtf"], ours["rtf"] = 1.0, 0.5
    rows += [theirs | {"round": 1, "rtf": 3.0}, ours | {"round": 1, "rtf": 0.5}]
    board = diagnosed.before_after(Numbers(rows))
    assert list(board.index) == list(NAMES)
    assert board.loc[EXACT, ["faster", "least", "most"]].tolist() == [4.0, 2.0, 6.0]
    assert WHOLE in board.index


def test_spreads_are_quartiles_of_four_or_the_range_of_fewer() -> None:
    assert Spread.of(pd.Series([1.0, 2.0, 3.0])) == Spread(2.0, 1.0, 3.0)
    assert Spread.of(pd.Series([1.0, 2.0, 3.0, 4.0, 100.0])) == Spread(3.0, 2.0, 4.0)
    assert math.isnan(Spread.of(pd.Series(dtype=float)).median)


def test_the_gap_is_against_what_the_hardware_allows(rows: Rows) -> None:
    change(rows, "step", "limit", {"variant": "loaded"}, seconds=0.002)
    change(rows, "step", "limit", {"variant": "int8"}, seconds=0.0005)
    change(rows, "s3gen", "limit", {}, seconds=0.1)
    change(rows, "streams", "stream", {"variant": EXACT}, t3_seconds=0.4, total_audio_duration=2.0)
    board = diagnosed.gap(Numbers(rows))
    assert board.loc[(EXACT, "T3"), ["now", "limit"]].tolist() == pytest.approx([0.2, 0.05])
    assert board.loc[(FASTEST, "T3"), "limit"] == pytest.approx(0.0125)
    assert board.loc[(EXACT, "S3Gen"), "limit"] == pytest.approx(0.1)
    assert math.isnan(board.loc[(FASTEST, "S3Gen"), "limit"])


def test_every_claim_of_the_report_has_its_place(rows: Rows) -> None:
    recorded = load_results("report")
    change(rows, "streams", "stream", {"variant": UPSTREAM, "chunk_size": 0}, rtf=1.25)
    change(rows, "sizes", "stream", {"variant": EXACT, "chunk_size": 0}, rtf=0.75)
    board = claims.reported(Numbers(rows))
    assert board["measure"].tolist() == recorded["measure"].tolist()
    assert board["heading"].tolist() == recorded["heading"].tolist()
    assert (board != "").all(axis=None)
    here = board.set_index("measure")["here"]
    assert here["RTF, not streaming, before"] == "1.25"
    assert here["RTF, not streaming, after"] == "0.75"
    before = diagnosed.before_after(Numbers(rows))["RTF"]
    assert here["RTF, streaming, before"] == here["RTF, as first noticed"] == f"{before[UPSTREAM]:.2f}"
    assert here["RTF, target"].startswith(f"{before.min():.2f}, ")
    assert here["GPU memory, peak"] == NOT_MEASURED  # a process is not a GPU
    for row in rows:
        row["device"] = "cuda"
    change(rows, "streams", "stream", {"variant": UPSTREAM, "chunk_size": 25}, peak_memory_bytes=3e9)
    assert claims.reported(Numbers(rows)).set_index("measure")["here"]["GPU memory, peak"] == "3.00 GB"


def test_claims_are_answered_from_the_rows(rows: Rows) -> None:
    steps(rows, stock=0.03, off=0.01, released=0.02)
    change(rows, "step", "cache_copy", {}, seconds=0.01)
    for variant, seconds in ((UPSTREAM, 0.04), (EXACT, 0.02)):
        change(rows, "t3", "token", {"variant": variant}, seconds=seconds)
    board = claims.reported(Numbers(rows)).set_index("measure")
    here = board["here"]
    assert board["reported"]["factor, attention maps on over off"] == "3x"
    assert board["reported"]["chunk size, after"] == "50 to 100 tokens"
    assert here["factor, attention maps on over off"] == "3.00x (3.00x to 3.00x)"
    assert here["manual attention in place of SDPA"] == "14 of 14 layers"
    assert here["factor, KV cache before over after"] == "2.00x, without the copy"
    assert here["factor, before over after compilation"] == "2.00x (2.00x to 2.00x), backend 'static'"
    assert here["TF32 and cuDNN's benchmark mode help"] == NOT_HERE
    assert here["temperature, best RTF"] == claims.NO_MEASUREMENT
    assert set(claims._ANSWERS) <= set(here.index)  # no answer without its claim


@pytest.mark.parametrize("part", PARTS)
def test_a_claim_is_not_measured_without_its_rows(rows: Rows, part: str) -> None:
    board = claims.reported(Numbers([row for row in rows if row["part"] != part]))
    assert not board["here"].str.contains("nan").any()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(1.234, "1.23 s"), (0.0123, "12.3 ms"), (4.5e-5, "45 \N{MICRO SIGN}s"), (373e-6, "373 \N{MICRO SIGN}s")],
)
def test_durations_have_the_unit_that_fits(seconds: float, words: str) -> None:
    assert duration(seconds) == words
    assert duration(math.nan) is None


def test_small_shares_keep_a_decimal() -> None:
    assert [percent(share) for share in (0.0, 0.004, 0.05, 0.25)] == ["0%", "0.4%", "5.0%", "25%"]
    assert percent(math.nan) is None
