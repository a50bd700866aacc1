"""A diagnosis of the tiny model through upstream's own classes: what its rows hold, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diagnosis import little, measured, state, tiny

from chatterbox_lab.engine.schedule import Costs
from chatterbox_lab.engine.settings import FAST
from chatterbox_lab.engine.variants import ENGLISH
from chatterbox_lab.study import diagnose, diagnose_advice, diagnose_t3, machine, subject
from chatterbox_lab.study.records import Record
from chatterbox_lab.study.subject import EXACT, FASTEST, FULL, LARGE, QUICK, UPSTREAM, Subject, as_found

CALLS = 5
LAYERS = 14


@pytest.fixture
def patch(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    little(monkeypatch)
    return monkeypatch


def of(rows: list[dict[str, Any]], part: str, name: str, **where: Any) -> list[dict[str, Any]]:
    wanted = {"part": part, "name": name} | where
    return [row for row in rows if wanted.items() <= row.items()]


def test_every_part_leaves_rows_that_name_the_machine() -> None:
    rows, audio = measured(CALLS).rows, measured(CALLS).audio
    assert list(dict.fromkeys(row["part"] for row in rows)) == list(diagnose.PARTS)
    assert {row["model"] for row in rows} == {"tiny"}
    assert all(torch.__version__.startswith(row["torch"]) for row in rows)
    assert not [row["error"] for row in rows if row.get("error")]
    assert set(audio) == {UPSTREAM, EXACT, FASTEST}
    assert audio[EXACT].shape == (1, 50 * 960)


def test_the_model_is_as_it_was_found() -> None:
    before, after = measured(CALLS).before, measured(CALLS).after
    assert before == after
    assert before["hooks"][9] == CALLS


def test_a_failed_call_inside_is_undone_too(tts: Any) -> None:
    before = state(tts)

    def fail() -> None:
        with as_found(tts):
            diagnose.use(tts, 1)
            tts.t3.tfmr.config.output_attentions = True
            torch.random.set_rng_state(torch.tensor(before["random"], dtype=torch.uint8))
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert state(tts) == before


def test_spies_are_counted_where_earlier_calls_left_them() -> None:
    rows = measured(CALLS).rows
    (hooks,), (wrapped,) = of(rows, "found", "hooks"), of(rows, "found", "wrapped_forwards")
    assert hooks["value"] == wrapped["value"] == CALLS
    assert [(row["layer"], row["value"]) for row in of(rows, "found", "spied_layer")] == [(9, CALLS)]
    assert of(rows, "found", "called_before")[0]["value"] == 1
    assert of(rows, "attention", "half_fix_future_mass")[0]["value"] > 0.1
    for part, name in (("step", "step"), ("t3", "token")):
        assert of(rows, part, name, variant="as found")


def test_every_layer_falls_back_in_upstreams_call_and_none_in_ours() -> None:
    rows = measured(CALLS).rows
    theirs, ours = (of(rows, "attention", "layer", variant=name) for name in (UPSTREAM, EXACT))
    assert [row["manual"] > 0 for row in theirs] == [True] * LAYERS
    assert [(row["manual"], row["sdpa"] > 0) for row in ours] == [(0, True)] * LAYERS
    asked = [row["text"] for row in of(rows, "attention", "asked")]
    assert all(who.startswith("t3_hf_backend.py:") and " < t3.py:" in who for who in asked)
    assert {row["variant"] for row in of(rows, "attention", "asked")} == {UPSTREAM}
    assert of(rows, "attention", "cache")[0]["text"] == "tuple"


def test_a_step_is_taken_apart() -> None:
    rows = measured(CALLS).rows
    assert of(rows, "step", "mask_bytes", variant="stock")[0]["value"] == 4 * (diagnose_t3.LENGTH + 1)
    assert of(rows, "step", "mask_bytes", variant="off")[0]["value"] == 0
    (loaded,), (small,) = (of(rows, "step", "limit", variant=name) for name in ("loaded", "int8"))
    assert loaded["value"] == 4 * small["value"]
    width = tiny().t3.dim
    assert of(rows, "step", "cache_bytes")[0]["value"] == 2 * 2 * LAYERS * width * diagnose_t3.LENGTH * 4
    operators = {row["variant"]: row["value"] for row in of(rows, "step", "operators")}
    assert operators["stock"] > operators["off"] > 100


def test_a_thread_more_is_measured_beside_one_a_core(tts: Any) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        cores = diagnose.machine_facts("cpu")["cores"]
        with as_found(tts):
            rows = list(diagnose_t3.step(Subject(tts, quick=True)))
            stopped = diagnose_t3.step(Subject(tts, quick=True))  # in the midst, with one a core
            while cores != 3 and next(stopped)["name"] != "threads":
                pass
            stopped.close()
        assert torch.get_num_threads() == 3
        taken = {row["at"] for row in rows if row["name"] == "threads"}
        assert taken == ({3, cores} if cores != 3 else set())
    finally:
        torch.set_num_threads(threads)


def test_s3gens_windows_have_the_prompt_whole_and_cut() -> None:
    rows = measured(CALLS).rows
    windows = {(row["prompt_tokens"], row["context_tokens"]) for row in of(rows, "s3gen", "window")}
    assert windows == {(10, 0), (10, 50), (2, 0)}
    assert of(rows, "s3gen", "limit")[0]["value"] > 1e8


def test_streams_say_all_their_tokens_whatever_the_chunk() -> None:
    rows = measured(CALLS).rows
    asked = {
        (row["variant"], row["chunk_size"]): row for part in ("streams", "sizes") for row in of(rows, part, "stream")
    }
    assert set(asked) == {
        (UPSTREAM, 25), (EXACT, 25), (FASTEST, 25), (UPSTREAM, 0), (UPSTREAM, 50), (EXACT, 0), (FASTEST, 10),
    }  # fmt: skip
    for (_, size), row in asked.items():
        assert row["tokens"] == 50
        assert row["chunk_count"] == (50 / size if size else 1)
        assert row["t3_seconds"] + row["s3gen_seconds"] <= row["total_generation_time"]
        assert row["underruns"] < row["chunk_count"]


def test_advice_is_an_expression_to_paste() -> None:
    import chatterbox_lab as lab

    rows = measured(CALLS).rows
    (call,) = of(rows, "advice", "call")
    settings = eval(call["text"], {"StreamSettings": lab.StreamSettings, "Costs": lab.Costs})
    assert settings.schedule in ("fixed", "grow")
    assert max(len(number) for number in call["text"].replace(")", " ").replace("=", " ").split(",")) < 40


def test_a_fresh_model_is_told_from_one_that_spoke(tts: Any) -> None:
    rows = {row["name"]: row for row in diagnose.found(Subject(tts))}
    assert rows["called_before"]["value"] == rows["hooks"]["value"] == 0
    assert "spied_layer" not in rows
    with as_found(tts):
        diagnose.use(tts, 1)
        rows = {row["name"]: row for row in diagnose.found(Subject(tts))}
    assert rows["called_before"]["value"] == rows["spied_layer"]["value"] == 1


def test_less_is_measured_where_the_first_chunk_took_long(tts: Any) -> None:
    def after(seconds: float, quick: bool = False) -> Any:
        return Subject(
            tts, quick, rows=[{"part": "first", "total_generation_time": seconds, "total_audio_duration": 1.0}]
        )

    assert Subject(tts).plan is after(1.0).plan is FULL
    assert after(1.0, quick=True).plan is QUICK
    assert after(1.1 * subject.SLOW).plan is LARGE


def test_what_fails_is_a_row_and_the_rest_is_measured(tts: Any, patch: pytest.MonkeyPatch) -> None:
    graph = FAST.replace(backend="graph")  # for GPUs alone
    patch.setattr(diagnose, "fastest", lambda device: graph)
    with as_found(tts):
        rows = list(diagnose.streams(Subject(tts)))
    errors = {row["variant"]: row["error"] for row in rows if row["chunk_size"] == 25}
    assert errors[UPSTREAM] is None
    assert errors[EXACT] is None
    assert "graph" in errors[FASTEST]


def test_an_interrupt_keeps_what_is_there_and_resuming_goes_on(
    tts: Any, patch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    called: list[str] = []
    patch.setattr(machine, "commit", lambda: "abc")  # one that others do not move meanwhile

    def part(name: str, stops: bool = False) -> Any:
        def measured(given: Subject) -> Any:
            called.append(name)
            if stops:
                raise KeyboardInterrupt
            assert [row["part"] for row in given.rows] == list("abc")[: "abc".index(name)]
            yield {"name": name, "value": 1.0}

        return measured

    patch.setattr(diagnose, "PARTS", {"a": part("a"), "b": part("b", stops=True), "c": part("c")})
    path = tmp_path / "report.csv"
    with pytest.raises(KeyboardInterrupt):
        diagnose.measure(tts, Record(path))
    patch.setattr(diagnose, "PARTS", {name: part(name) for name in "abc"})
    with pytest.raises(ValueError, match="measured with seed 0, here it is 1"):
        diagnose.measure(tts, Record(path, resume=True), seed=1)
    rows = diagnose.measure(tts, Record(path, resume=True))
    assert called == ["a", "b", "b", "c"]
    assert [row["part"] for row in rows] == ["a", "b", "c"]


def test_bad_arguments_are_named_before_the_model_runs(tts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="tts: must be a ChatterboxTTS"):
        diagnose.measure(object())
    with pytest.raises(ValueError, match="quick=1: must be True or False"):
        diagnose.measure(tts, quick=1)
    with pytest.raises(ValueError, match="seed=-1: must be a whole number, at least 0"):
        diagnose.measure(tts, seed=-1)
    tts.conds = None
    with pytest.raises(ValueError, match="no voice"):
        diagnose.measure(tts)
    monkeypatch.setattr(diagnose, "variant_of", lambda tts: ENGLISH)
    with pytest.raises(ValueError, match=r"English has no stream of its own.*chatterbox-lab living --costs"):
        diagnose.measure(tts)


def test_another_models_rows_are_not_gone_on_with(tts: Any, patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = Record(tmp_path / "report.csv")
    record.add([row for row in measured(CALLS).rows if row["part"] == "found"])
    with pytest.raises(ValueError, match="begun with 5 spies of earlier calls on the model, here it is 0"):
        diagnose._same_model(tts, record.rows, record)


@pytest.mark.parametrize(
    ("costs", "measured_rtf", "agree"),
    [
        (Costs(token=0.01, chunk=0.1, window_token=0.001, prompt_tokens=50, error=0.1), 0.5, True),
        (Costs(token=0.01, chunk=0.1, window_token=0.001, prompt_tokens=50, error=0.1), 2.0, False),
        (Costs(token=0.01, chunk=0.1, window_token=0.001, prompt_tokens=50, error=0.5), 0.5, False),
        (Costs(token=0.01, chunk=0.1, window_token=0.001, prompt_tokens=50, error=0.1), float("nan"), True),
    ],
)
def test_advice_must_agree_with_what_was_measured(costs: Costs, measured_rtf: float, agree: bool) -> None:
    assert diagnose_advice.bears(costs, 50, measured_rtf) is agree


def test_advice_that_contradicts_its_page_gives_way_to_what_was_measured(tts: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(diagnose_advice, "bears", lambda *_: False)
    rows = [{**row, "chunk_size": 25} for row in measured(CALLS).rows if row["part"] in ("first", "streams", "sizes")]
    call, reason = (row["text"] for row in diagnose_advice.advice(Subject(tts, True, 0, lambda *_: None, rows)))
    assert "backend='static'" in call
    assert "Of the measured chunk sizes (25), 25 " in reason
