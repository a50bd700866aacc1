"""What a GPU would do: counts are of the real classes, ranges are ranges, and figures stand beside predictions."""

from __future__ import annotations

import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from chatterbox_lab.__main__ import main
from chatterbox_lab.engine.s3gen.vocoder import folded
from chatterbox_lab.engine.settings import BALANCED
from chatterbox_lab.engine.stream import renderer_of
from chatterbox_lab.show import figures
from chatterbox_lab.study import cards, predict, records
from chatterbox_lab.study.cards import RELEASED, Counts, Launches, Work
from chatterbox_lab.study.machine import machine_facts, step_bytes
from chatterbox_lab.study.predict import Setting
from chatterbox_lab.study.s3gen_ladder import SOUNDS
from chatterbox_lab.voices.build import LabTTS
from chatterbox_lab.voices.config import TINY


def test_what_launches_nothing_is_not_counted() -> None:
    states, weight = torch.ones(2, 3, 4), torch.ones(4, 4)
    with torch.inference_mode(), Launches() as launches:
        room = torch.empty(2, 3, 4)
        room.copy_(states.transpose(0, 1).transpose(0, 1))  # one
        (room.view(6, 4) @ weight)[:, :2].softmax(-1).unsqueeze(0)  # two
        torch.nn.functional.dropout(room.float(), training=False).reshape(-1)
    assert launches.count == 3


def recorded_launches(part: str) -> dict[str, Any]:
    """The recorded counts; another PyTorch or transformers launches somewhat more or less."""
    table = records.load_results("counts_random_cpu").query("part == @part").dropna(subset="launches")
    facts = machine_facts()
    same = all(str(facts[name]) == str(table[name].iloc[0]) for name in ("torch", "transformers"))
    found = table[table["dtype"] != "bfloat16"].set_index("way")["launches"].to_dict()
    return found if same else {way: pytest.approx(count, rel=0.3) for way, count in found.items()}


def test_the_recorded_launches_are_those_of_the_classes_here() -> None:
    model = cards.narrow_model()
    with cards.on_a_gpu():
        assert cards.step_launches(model) == recorded_launches("step")


def test_the_launches_of_a_step_are_the_kernels_that_a_gpu_was_seen_to_run() -> None:
    seen = records.load_results("launches_random_h100_float32").query("phase == 'decode'").set_index("mode")["kernels"]
    counts = Counts()
    for mode, kernels in seen.items():
        assert counts.step(mode, 256).launches == pytest.approx(kernels, rel=0.02), mode


def test_rendering_launches_less_where_it_does_less() -> None:
    model = cards.narrow_model()
    with cards.on_a_gpu():
        found = cards.chunk_launches(model)
    assert found == recorded_launches("chunk")
    assert found["fast"] < found["exact"] < found["once"] < found[RELEASED]


@pytest.mark.parametrize("name", ["prices_random_cpu", "prices_random_h200"])
def test_the_flop_of_a_window_are_those_counted_of_the_whole(name: str) -> None:
    counted = records.load_results(name).query("flop == flop")
    assert len(counted) >= 2
    for row in counted.itertuples():
        work = Counts().chunk(RELEASED, 250, int(row.context_window), int(row.chunk_size))
        assert work.products + work.convolutions == pytest.approx(row.flop, rel=1e-5)


def test_parts_of_a_small_s3gen_add_up_at_a_length_that_was_not_counted(tts: LabTTS) -> None:
    parts = pd.DataFrame(cards.chunk_flop(replace(TINY, clone=False)))
    known = records.load_results("counts_random_cpu")
    counts = Counts(pd.concat([known[~known["part"].isin(parts["part"])], parts]))
    codes = torch.zeros(13, dtype=torch.long)
    mel, vocoder = torch.zeros(1, 80, 26), folded(tts.s3gen.mel2wav)
    whole = cards.flop(lambda: tts.s3gen.flow_inference(codes, ref_dict=tts.conds.gen, finalize=True))
    wave = cards.flop(lambda: vocoder.inference(speech_feat=mel))
    work = counts.chunk(RELEASED, 10, 4, 9)
    for kind in ("products", "convolutions"):
        assert getattr(work, kind) == pytest.approx(whole[kind] + wave[kind], rel=0.01), kind


@pytest.mark.parametrize("sound", ["exact", "once"])
def test_a_chunk_of_ours_has_the_flop_that_its_renderer_has(sound: str) -> None:
    model, parts = cards.narrow_model(), pd.DataFrame(cards.chunk_flop(cards._NARROW))
    known = records.load_results("counts_random_cpu")
    counts = Counts(pd.concat([known[~known["part"].isin(parts["part"])], parts]))
    with cards.on_a_gpu():
        renderer = renderer_of(model, BALANCED.replace(chunk_size=9, context_window=20, **SOUNDS[sound]), seed=0)
        renderer.vocoder.decode = renderer.vocoder.hift.decode
        codes = torch.zeros(9, dtype=torch.long)
        for _ in range(3):
            renderer.push(codes)
        found = cards.flop(lambda: renderer.push(codes))
    work = counts.chunk(sound, 10, 20, 9)  # of the release, which has convolutions one wide where ours has products
    assert work.products + work.convolutions == pytest.approx(sum(found.values()), rel=0.03)


def test_a_step_of_t3_multiplies_each_weight_with_both_rows(tts: LabTTS) -> None:
    t3, counts = tts.t3, Counts()
    embeds = torch.zeros(2, 3, t3.dim)
    counts.weights = step_bytes(t3)
    found = cards.flop(lambda: t3.speech_head(t3.tfmr(inputs_embeds=embeds).last_hidden_state))
    assert counts.prefill("hf", 3).products == pytest.approx(found["products"], rel=0.01)
    assert counts.step("off", 0).products == pytest.approx(found["products"] / 3, rel=0.01)
    assert counts.step("off", 0).bytes == 2 * counts.step("off", 0, "bfloat16").bytes == step_bytes(t3)


def test_the_fast_end_of_a_card_has_the_better_end_of_every_constant() -> None:
    for name in cards.known():
        fast, slow = cards.card(name)
        for field in fields(fast)[1:]:
            ends = getattr(fast, field.name), getattr(slow, field.name)
            less = field.name in ("launch", "node", "watermark")
            assert ends == tuple(sorted(ends, reverse=not less)), field.name


@pytest.mark.parametrize(
    ("setting", "asked"),
    [
        ("streaming; chunk size not known", (25, predict.LENGTHS, "float32")),
        ("not streaming, bfloat16; 3.154 s for 6.4 s of audio", (0, (160,), "bfloat16")),
        ("streaming, attention maps on, 8 chunks of about 25", (25, (176, 200), "float32")),
        ("streaming, chunks of 100, attention maps off", (100, predict.LENGTHS, "float32")),
        ("streaming, chunks of 25; 5.84 s of audio in 6 chunks", (25, (146,), "float32")),
        ("not streaming, as released; a clip of 6.5 s", (0, (162,), "float32")),
    ],
)
def test_a_published_setting_is_read(setting: str, asked: tuple[Any, ...]) -> None:
    assert predict._asked(setting) == asked


def test_every_constant_has_a_range_a_source_and_a_unit() -> None:
    table = cards.constants()
    assert (table["low"] <= table["high"]).all()
    assert table[["unit", "source"]].notna().all(axis=None)
    assert set(table["unit"]) <= set(cards._UNITS)
    for name in cards.known():
        for end in cards.card(name):
            assert all(getattr(end, field.name) for field in fields(end)), name


@pytest.mark.parametrize("name", ["bandwidth", "float32", "tf32", "bfloat16", "bandwidth_share", "flop_share"])
@pytest.mark.parametrize("one", [*predict.WAYS, "upstream, off", "upstream, graph", "ours, probe"])
def test_a_better_card_is_not_slower(name: str, one: str) -> None:
    counts, setting = Counts(), Setting(dtype="bfloat16")
    for end in cards.card("RTX 3090"):
        before = predict.seconds(end, predict.way(one), setting, counts)
        after = predict.seconds(replace(end, **{name: 2 * getattr(end, name)}), predict.way(one), setting, counts)
        assert all(after[measure] <= before[measure] for measure in predict.MEASURES)


def test_a_step_in_a_graph_waits_for_memory_and_any_other_for_its_host() -> None:
    counts, (fast, slow) = Counts(), cards.card("H100")
    for end in (fast, slow):
        launched, graph = counts.step("off", 300), counts.step("graph", 300)
        assert end.seconds(launched) == launched.launches * end.launch
        assert end.seconds(graph, graph=True) < graph.launches * end.launch
        halved = replace(graph, bytes=graph.bytes / 2)
        saved = graph.bytes / 2 / (end.bandwidth * end.bandwidth_share)
        assert end.seconds(graph, graph=True) - end.seconds(halved, graph=True) == pytest.approx(saved)
    assert (Work(1, 2, 3, 4) + Work(1, 1, 1, 1)) * 2 == Work(4, 6, 8, 10)


@pytest.mark.parametrize("size", [0, 25, 40])
def test_ranges_are_ordered_on_every_card_and_way(size: int) -> None:
    table = predict.table(cards.known(), setting=Setting(size, 50, 100))
    low, high = (table.xs(end, axis=1, level=1) for end in predict.ENDS)
    assert len(table) == len(cards.known()) * len(predict.WAYS)
    assert (low > 0).all(axis=None)
    assert (low < high).all(axis=None)
    whole = table["first chunk (s)"] / (table["RTF"] * 4)
    assert ((whole - 1).abs() < 1e-9 if size == 0 else whole < 0.9).all(axis=None)


def test_what_is_not_known_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"card='GTX 9': must be one of RTX 4090, RTX 3090, H100"):
        predict.table(["GTX 9"])
    for name in ("ours, off, compile", "ours", "upstream, fast", "theirs", "ours, off, static, graph"):
        with pytest.raises(ValueError, match=rf"way='{name}': must be upstream"):
            predict.way(name)
    for wrong, message in (
        ({"tokens": 0}, "tokens=0"),
        ({"chunk_size": -1}, "chunk_size=-1"),
        ({"dtype": "x"}, "dtype='x'"),
    ):
        with pytest.raises(ValueError, match=message):
            Setting(**wrong)
    with pytest.raises(SystemExit, match="2"):
        main(["predict", "--card", "GTX 9"])
    assert "card='GTX 9': must be one of RTX 4090" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti Super"),
        ("Tesla T4", "T4"),
        ("RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 PCIe", None),
        ("AMD EPYC", None),
    ],
)
def test_a_card_is_known_by_its_name_and_not_by_a_part_of_another(machine: str, name: str | None) -> None:
    assert predict.card_of(machine) == name


@pytest.mark.parametrize(
    ("value", "upper", "said"),
    [
        (1, None, "inside"),
        (0.4, None, "below"),
        (2.1, None, "above"),
        (0.4, 0.6, "partly"),
        (0.6, 1.9, "inside"),
        (0.1, 0.2, "below"),
    ],
)
def test_a_verdict_says_on_which_side_a_figure_is(value: float, upper: float | None, said: str) -> None:
    assert predict.verdict(value, 0.5, 2.0, upper) == said


def elsewhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with nothing but what predictions are made from and what others published."""
    data = folder / "data"
    data.mkdir()
    for name in ("cards", "counts_random_cpu", "published"):
        shutil.copy(records.REPOSITORY / "data" / f"{name}.csv", data)
    monkeypatch.setattr(records, "REPOSITORY", folder)
    return data


def test_a_record_in_the_data_folder_stands_beside_its_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = records.load_results("bench_random_h100").query("state == 'warm' and chunk_size == 25")
    data = elsewhere(tmp_path, monkeypatch)
    assert predict.against_records().empty
    mine = stream.assign(machine="NVIDIA GeForce RTX 4090")
    slow = mine[mine["variant"] == "upstream"]
    pd.concat([mine[mine["variant"] != "upstream"], slow.assign(rtf=9.0)]).to_csv(data / "bench_random_mine.csv")
    stream.assign(machine="NVIDIA A100-SXM4-80GB").to_csv(data / "streams_random_a100.csv")
    found = predict.against_records().set_index(["card", "variant", "measure"])
    assert found.loc[("RTX 4090", "upstream", "RTF"), "verdict"] == "above"
    beside = found.loc[("RTX 4090", "ours, off", "RTF")]
    assert (beside["low"], beside["high"]) == predict.ranges("RTX 4090", "ours, off", Setting())["RTF"]
    assert beside["verdict"] == "inside"
    unknown = found[found["machine"] == "NVIDIA A100-SXM4-80GB"]
    assert set(unknown["verdict"]) == {"not predicted: no constants of NVIDIA A100-SXM4-80GB"}


def test_the_cards_that_we_measured_stand_beside_their_predictions() -> None:
    found = predict.against_records()
    assert {"H100", "H200"} <= set(found["card"])
    there = found[found["low"].notna()]
    assert len(there) >= 96
    right = [predict.verdict(*row) for row in there[["measured", "low", "high"]].itertuples(index=False)]
    assert list(there["verdict"]) == right
    assert f"{right.count('inside')} of {len(there)} inside" in predict.inside(found)


def test_no_published_figure_is_left_out() -> None:
    published, found = records.load_results("published"), predict.against_published()
    assert list(found["value"]) == list(published["value"])
    predicted = found[found["low"].notna()]
    assert len(predicted) >= 8
    assert predicted["card"].notna().all()
    reasons = found.loc[found["low"].isna(), "verdict"]
    assert reasons.str.startswith("not predicted: ").all()
    assert set(predicted["verdict"]) <= {"inside", "above", "below", "partly"}


def test_the_figure_says_that_ranges_are_predictions_and_marks_what_was_measured() -> None:
    figures.set_style()
    found = predict.against_records().query("chunk_size == 25 and dtype == 'float32'")
    drawn = figures.predictions(predict.table(), predict.against_published(), found)
    (legend,) = drawn.legends
    words = " ".join(text.get_text() for text in legend.get_texts())
    assert "prediction" in words
    assert "measured: published by others" in words
    axes = drawn.axes
    assert {ax.get_title(loc="left") for ax in axes} >= set(predict.CARDS)
    h100 = next(ax for ax in axes if ax.get_title(loc="left") == "H100")
    dots = {line.get_xdata()[0] for line in h100.lines if line.get_marker() == "o"}
    assert dots == set(found.query("card == 'H100' and measure == 'RTF'")["measured"])
    assert all("less is better" in ax.get_xlabel() for ax in axes[-2:])
    plt.close(drawn)


def test_help_needs_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "REPOSITORY", tmp_path)
    with pytest.raises(SystemExit, match="0"):
        main(["predict", "--help"])


def test_the_command_prints_predictions_and_what_stands_beside_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--card", "RTX 4090", "--way", "upstream", "--chunk-size", "50"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Predictions, none of them measured:")
    assert "Published figures beside their predictions" in said
    assert "bench_random_h100" in said
