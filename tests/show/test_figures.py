from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from chatterbox_lab.engine.clock import Word
from chatterbox_lab.engine.schedule import Costs
from chatterbox_lab.engine.settings import StreamSettings
from chatterbox_lab.engine.t3.words import TextWord
from chatterbox_lab.show import colors, figures, player
from chatterbox_lab.show.figures import style as drawing_style
from chatterbox_lab.show.figures.chunks import buffer_levels
from chatterbox_lab.study import costs as study_costs
from chatterbox_lab.study import layers, word_times


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATTERBOX_LAB_OUTPUT", str(tmp_path))


@pytest.fixture(autouse=True)
def style() -> None:
    figures.set_style()  # titles stand on the left


def test_figures_carry_where_they_come_from(tmp_path: Path) -> None:
    figures.set_style()
    drawn, axes = plt.subplots()
    axes.plot([0, 1])
    shown = figures.show(drawn, "00_test", figures.provenance("tiny"))
    png, svg = (tmp_path / "figures" / f"00_test.{kind}" for kind in ("png", "svg"))
    assert shown.data == png.read_bytes()
    assert "model: tiny, T3 in float32" in Image.open(png).text["Description"]
    assert "model: tiny, T3 in float32 | machine:" in svg.read_text()
    assert not plt.fignum_exists(drawn.number)


def test_a_drawing_has_no_more_digits_than_one_sees() -> None:
    svg = '<svg>\n <g id="x.123">\n  <path d="M 1.23456 7.5 L 100 2.999"/>\n'
    svg += '  <text x="3.14159">0.12345</text>\n </g>\n</svg>\n'
    few = '<svg>\n<g id="x.123">\n<path d="M 1.23 7.5 L 100 2.99"/>\n<text x="3.14">0.12345</text>\n</g>\n</svg>\n'
    assert drawing_style.in_few_digits(svg) == few


def test_a_recorded_figure_says_what_was_recorded() -> None:
    facts = {"model": "random", "dtype": "bfloat16", "machine": "NVIDIA H200", "device": "cuda", "cores": 16}
    facts |= {"torch": "2.11.0", "transformers": "4.46.3", "commit": "abc", "date": "2026-01-01"}
    assert figures.origin(facts) == {
        "model": "random, T3 in bfloat16", "machine": "NVIDIA H200", "versions": "torch 2.11.0, transformers 4.46.3",
        "commit": "abc", "date": "2026-01-01",
    }  # fmt: skip


def test_small_print_is_not_cut_at_the_figures_edge() -> None:
    drawn = plt.figure(figsize=(6, 2))
    origin = {"machine": "AMD EPYC with AVX512 and bfloat16, 2 cores / " * 4, "date": "2026-01-01"}
    pixels = np.asarray(Image.open(figures.save(drawn, "00_long", origin)).convert("L"))
    assert pixels[:, :-8].min() < 128
    assert pixels[:, -8:].min() == 255


def test_the_player_has_the_colours_of_the_figures() -> None:
    css = Path(player.__file__).with_name("player.css").read_text()
    for name, color in {"t3": colors.BLUE, "s3gen": colors.AMBER, "watermark": colors.GREY}.items():
        assert f"--cbl-{name}: {color};" in css


def grey(color: str) -> float:
    red, green, blue = to_rgb(color)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_modes_and_parts_are_told_apart_without_colour() -> None:
    styles = figures.MODE_STYLES
    assert set(styles) == set(layers.MODES)
    assert len({style["marker"] for style in styles.values()}) == len(styles)
    shades = sorted(grey(style["color"]) for style in styles.values())
    assert min(b - a for a, b in pairwise(shades)) > 0.08
    parts = [grey(color) for color in figures.PART_COLORS.values()]
    assert min(abs(b - a) for a, b in pairwise(parts)) > 0.1  # neighbours in a bar


@pytest.fixture
def costs() -> pd.DataFrame:
    rows = [
        (phase, 64, mode, layer, part, 0.001 * (layer + 2))
        for phase in layers.PHASES
        for mode in ("stock", "off")
        for layer, parts in ((0, layers.PARTS), (1, layers.PARTS), (layers.WHOLE, figures.PART_COLORS))
        for part in parts
    ]
    return pd.DataFrame(rows, columns=["phase", "length", "mode", "layer", "part", "seconds"])


def test_heat_map_shows_milliseconds_by_layer_and_mode(costs: pd.DataFrame) -> None:
    drawn = figures.layer_heat_map(costs, 64)
    prefill, decode = drawn.axes[:2]
    assert [label.get_text() for label in decode.get_yticklabels()] == ["stock", "off"]
    assert prefill.collections[0].get_array().reshape(2, 2).tolist() == [[2.0, 3.0], [2.0, 3.0]]
    assert decode.get_xlabel() == "layer of T3"
    assert "decode at length 64" in decode.get_title(loc="left")
    plt.close(drawn)


def test_bars_stack_the_parts_of_a_step(costs: pd.DataFrame) -> None:
    drawn = figures.step_parts({"here": costs}, 64)
    for ax, phase in zip(drawn.axes, layers.PHASES, strict=True):
        assert ax.get_title(loc="left") == f"{phase} at length 64\nhere"
        assert ax.get_xlabel() == "ms per step"
        assert len(ax.patches) == 2 * len(figures.PART_COLORS)
        assert max(patch.get_x() + patch.get_width() for patch in ax.patches) == pytest.approx(5.0)
    plt.close(drawn)


RUNGS = ["stock", "static", "int8"]


def test_the_ladder_shows_times_limits_and_gains() -> None:
    board = pd.DataFrame(
        {"ms/token": [300.0, 150.0, 30.0], "limit (ms)": [60.0, 60.0, 15.0], "to stock": [1.0, 2.0, 10.0]}, index=RUNGS
    )
    drawn = figures.t3_rungs({"a CPU": board, "a GPU": board.assign(**{"ms/token": board["ms/token"] / 10})})
    ax, fast = drawn.axes
    assert [patch.get_width() for patch in ax.patches] == [300.0, 150.0, 30.0]
    assert [label.get_text() for label in ax.get_yticklabels()] == RUNGS
    assert {text.get_text() for text in ax.texts} == {"300 ms, 1x", "150 ms, 2x", "30 ms, 10x"}
    assert [line.get_xdata()[0] for line in ax.lines[:3]] == [60.0, 60.0, 15.0]
    assert [panel.get_title(loc="left") for panel in drawn.axes] == ["a CPU", "a GPU"]
    real_time = [sum(list(line.get_xdata()) == [40, 40] for line in panel.lines) for panel in drawn.axes]
    assert real_time == [1, 0]  # where all rungs are faster, the line would only make the bars small
    assert fast.get_xlim()[1] < 40
    assert ax.yaxis_inverted()
    plt.close(drawn)


def test_a_steps_parts_are_stacked_beside_the_limit() -> None:
    parts = pd.DataFrame({"products": 0.02, "attention": 0.01, "rest": 0.005, "limit_seconds": 0.015}, index=RUNGS)
    drawn = figures.t3_rung_parts(parts)
    (ax,) = drawn.axes
    assert len(ax.patches) == 9
    assert max(patch.get_x() + patch.get_width() for patch in ax.patches) == pytest.approx(35.0)
    assert ax.lines[0].get_xdata()[0] == pytest.approx(15.0)
    plt.close(drawn)


def test_token_times_are_drawn_from_zero_with_a_line_for_each_rung() -> None:
    times = pd.DataFrame({rung: [30.0 + number] * 40 for number, rung in enumerate(RUNGS)}, index=range(1, 321, 8))
    drawn = figures.t3_token_times({"a CPU": 10 * times, "a GPU": times / 10})
    slow, ax = drawn.axes
    assert ax.get_ylim()[0] == 0
    assert [panel.get_title(loc="left") for panel in drawn.axes] == ["a CPU", "a GPU"]
    assert [any(text.get_text() == "real time" for text in panel.texts) for panel in (slow, ax)] == [True, False]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == RUNGS
    assert "ms per token" in ax.get_ylabel()
    plt.close(drawn)


def test_windows_are_drawn_by_voice_prompt_with_their_lines() -> None:
    rows = pd.DataFrame(
        {
            "prompt_tokens": [250, 250, 50, 50],
            "window_tokens": [275, 475, 75, 275],
            "s3gen_seconds": [0.3, 0.5, 0.1, 0.3],
        }
    )
    _, ax = plt.subplots()
    figures.window_costs(ax, rows, pd.Series({"chunk": 0.05, "prompt_token": 0.0009, "window_token": 0.001}))
    lines = [line for line in ax.get_lines() if line.get_marker() == "None"]
    assert [tuple(round(y, 4) for y in line.get_ydata()) for line in lines] == [(0.3, 0.5), (0.12, 0.32)]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "voice prompt of 250 tokens", "voice prompt of 50 tokens",
    ]  # fmt: skip


def test_the_parts_of_an_rtf_add_up_to_it() -> None:
    costs = Costs(token=0.007, prefill=0.04, chunk=0.02, window_token=0.0005)
    settings = [StreamSettings(chunk_size=size, context_window=50) for size in (25, 100)]
    shares = study_costs.shares(costs, settings)
    assert shares.sum(axis=1).tolist() == pytest.approx([costs.rtf(size, 50, 500) for size in (25, 100)])
    ax = figures.rtf_shares({"here": shares}).axes[0]
    assert [bar.get_width() for bar in ax.patches] == pytest.approx(shares.T.to_numpy().ravel().tolist())
    greys = [grey(color) for color in figures.SHARE_COLORS.values()]
    assert min(abs(b - a) for a, b in pairwise(greys)) > 0.1


def points() -> pd.DataFrame:
    rows = [
        (size, context, 1 / size + context / 1000, size / 20, size > 20)
        for size in (10, 25, 50)
        for context in (50, 100)
    ]
    table = pd.DataFrame(rows, columns=["chunk_size", "context_window", "RTF", "first chunk (s)", "front"])
    return table.assign(**{"lowest RTF": table["RTF"] - 0.01, "highest RTF": table["RTF"] + 0.01})


def test_twice_the_chunk_is_outlined_in_the_heat_map() -> None:
    ax = figures.context_heat_map(points()).axes[0]
    outlined = [(round(patch.get_x()), round(patch.get_y())) for patch in ax.patches]
    assert outlined == [(1, 1), (2, 0)]  # 25 with 50 below, 50 with 100 above


def test_the_front_is_filled_and_growing_schedules_are_starred() -> None:
    ax = figures.latency_front(points(), points().head(1)).axes[0]
    filled = [line for line in ax.get_lines() if line.get_marker() == "o" and line.get_markerfacecolor() != "white"]
    assert [len(line.get_xdata()) for line in filled if len(line.get_xdata())] == [2]
    assert [len(line.get_xdata()) for line in ax.get_lines() if line.get_marker() == "*"] == [1]
    assert {text.get_text() for text in ax.texts} == {"10", "25", "50"}


def test_the_buffer_rises_with_a_chunk_and_falls_with_the_clock() -> None:
    times, levels = buffer_levels([1.0, 1.5, 4.0], [1.0, 1.0, 0.5])
    assert times == [0, 1, 1, 1.5, 1.5, 3.0, 4.0, 4.0, 4.5]
    assert levels == [0, 0, 1, 0.5, 1.5, 0, 0, 0.5, 0]
    chunks = pd.DataFrame({"arrival_seconds": [1.0, 1.5], "audio_seconds": [1.0, 1.0], "new_tokens": [25, 25]})
    figure = figures.buffers({"fixed": chunks, "growing": chunks}, until=3)
    assert figure.axes[0].get_title(loc="left") == "fixed: first chunk after 1.00 s; chunks of 25, 25 tokens"
    assert all(ax.get_ylabel() for ax in figure.axes)


def test_the_rungs_of_s3gen_are_drawn_as_they_are() -> None:
    names = ["stock", "bfloat16", "each frame once"]
    shape = {"chunk size": [25] * 3 + [50] * 3, "context": [50] * 3 + [100] * 3, "rung": names * 2}
    costs = {"s/chunk": [20, 12, 2, 26, 14, 4.0], "RTF": [20, 12, 2, 13, 7, 2.0], "to stock": [1, 1.7, 10, 1, 1.9, 6.5]}
    board = pd.DataFrame(shape | costs | {"sound": ["same", "rounding", "other"] * 2}).set_index(list(shape))
    quick = board.loc[50, 100].assign(**{"s/chunk": [0.26, 0.14, 0.04]})
    figure = figures.s3gen_rungs({"a CPU": board.loc[50, 100], "a GPU": quick}, 50)
    ax, fast = figure.axes
    assert [bar.get_width() for bar in ax.patches[:3]] == [26, 14, 4]
    assert [label.get_text() for label in ax.get_yticklabels()] == names
    assert ax.get_xlim()[1] > 26
    assert len({bar.get_hatch() for bar in ax.patches[:3]}) == 3  # what a listener could notice, without colour
    assert [[line.get_xdata()[0] for line in panel.lines] for panel in (ax, fast)] == [[2], []]  # of speech a chunk
    assert "real time (2 s of speech per chunk)" in [text.get_text() for text in figure.legends[0].get_texts()]
    before, after = figures.chunk_costs({"a CPU": board}, ["stock", "each frame once"]).axes
    assert before.lines[0].get_ydata().tolist() == [20, 26]
    assert after.lines[1].get_ydata().tolist() == [2, 2]
    assert before.get_ylim()[0] == 0


def test_a_seam_is_drawn_at_zero_in_every_row() -> None:
    waves = {name: np.sin(np.arange(9600) / 30) for name in ("whole", "ours")}
    figure = figures.seam_close_up(waves, 4800, 24000)
    for ax in figure.axes:
        wave, seam = ax.lines
        assert seam.get_xdata()[0] == 0
        assert wave.get_xdata()[[0, -1]] == pytest.approx([-60, 60], abs=0.1)
    assert [ax.get_title(loc="left") or ax.get_title() for ax in figure.axes] == ["whole", "ours"]


PARTS = ("change", "low", "high")


def test_the_trials_are_drawn_against_the_whole_decode() -> None:
    board = pd.DataFrame(
        {f"{name}_{part}": [0.0, value] for name, value in (("wer", 0.2), ("plcmos", -1.0)) for part in PARTS}
        | {"dip": [0.0, -9.0]},
        index=["whole", "upstream"],
    ).assign(reference_dip=-1.0)
    figure = figures.trials_board(board)
    points = [float(ax.lines[0].get_xdata()[0]) for ax in figure.axes]
    assert points == pytest.approx([20, -1, -8])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["upstream"]


def test_training_is_drawn_over_minutes_with_held_out_losses_marked() -> None:
    log = pd.DataFrame({"step": [1, 2], "seconds": [60, 120], "entropy": [3.0, 2.0], "held_out": [3.5, 2.5]})
    ax = figures.training_curves({"t3": log}).axes[0]
    assert [list(line.get_xdata()) for line in ax.lines] == [[1, 2], [1, 2]]
    assert {line.get_label(): line.get_linestyle() for line in ax.lines} == {"entropy": ":", "held out": "-"}


def test_published_figures_stand_apart_from_our_records() -> None:
    point = {"model": "fork", "kind": "as released", "streaming": True, "upper": np.nan}
    points = [
        point | {"who": "our record", "machine": "H100", "RTF": 0.2},
        point | {"who": "others", "machine": "RTX 4090", "RTF": 0.5},
        point | {"who": "the report", "machine": "RTX 4090", "RTF": 1.7, "streaming": False},
        point | {"who": "others", "machine": "unknown", "RTF": 1.2, "upper": 1.4, "model": "turbo"},
    ]
    drawn = figures.published_rtfs(pd.DataFrame(points))
    large, small = drawn.axes
    rows = [label.get_text() for label in large.get_yticklabels()]
    assert rows == ["RTX 4090", "RTX 4090 (the report)", "H100 (our record)"]  # ours below the line, though fastest
    assert [label.get_text() for label in small.get_yticklabels()] == ["machine not said"]
    marks = {line.get_ydata()[0]: line for line in large.lines if line.get_marker() == "o"}
    assert [marks[row].get_xdata()[0] for row in range(3)] == [0.5, 1.7, 0.2]
    assert marks[1].get_markerfacecolor() == "white"  # it did not stream
    assert len({marks[row].get_markerfacecolor() for row in range(3)}) == 3
    assert [1.2, 1.4] in [list(line.get_xdata()) for line in small.lines]  # a range
    words = {text.get_text() for text in drawn.legends[0].get_texts()}
    assert {"published by others", "published: the report", "measured here: our records"} <= words
    plt.close(drawn)


def test_word_errors_are_drawn_over_the_number_of_sentences() -> None:
    rates = pd.DataFrame({"at once": [0.1, 0.9], "speak": [0.1, 0.08]}, index=[1, 10])
    bounds = {"at once": pd.DataFrame({"low": [0.05, 0.8], "high": [0.2, 0.95]}, index=[1, 10])}
    ax = figures.errors_by_sentences(rates, bounds).axes[0]
    assert [(line.get_label(), line.get_ydata()[-1]) for line in ax.lines] == [("at once", 0.9), ("speak", 0.08)]
    assert ax.get_xticks().tolist() == [1, 10]
    assert ax.get_ylim()[0] == 0
    assert len(ax.collections) == 1


def test_the_path_of_an_alignment_lies_on_its_attention() -> None:
    places = (TextWord("One", 1, 2), TextWord("two", 3, 5))
    words = [Word("One", 0.0, 0.08), Word("two", 0.08, 0.2)]
    followed = word_times.Followed(torch.zeros(1, 4800) + 0.1, np.eye(5, 6, 1), [1, 2, 3, 4, 5], places, words)
    sound, ax, _ = figures.alignment_path(followed, 24000).axes
    (image,) = ax.images
    assert image.get_array().shape == (6, 5)
    assert image.get_extent() == pytest.approx([0, 0.2, 5.5, -0.5])
    path = next(line for line in ax.lines if line.get_label() == "the path")
    assert path.get_xdata()[[0, -1]] == pytest.approx([0, 0.2])
    assert path.get_ydata().tolist() == [1, 2, 3, 4, 5, 5]
    assert [text.get_text() for text in sound.texts] == ["One", "two"]
    assert [(tick, label.get_text()) for tick, label in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True)] == [
        (1, "One"), (3, "two"),
    ]  # fmt: skip


def test_errors_of_words_are_shown_as_the_share_that_is_off_by_less() -> None:
    rows = pd.DataFrame({"start_error": [0.01, -0.03, 0.02, np.nan], "end_error": [0.1, -0.1, 0.1, 0.1]})
    start, end = figures.time_errors({"the stream": rows, "the aligner": rows / 2}).axes
    assert [line.get_label() for line in end.lines[:2]] == ["the stream", "the aligner"]
    assert start.lines[0].get_xdata().tolist() == pytest.approx([10, 20, 30])
    assert start.lines[0].get_ydata().tolist() == pytest.approx([1 / 3, 2 / 3, 1])
    assert end.lines[1].get_xdata().tolist() == pytest.approx([50] * 4)


def test_speech_that_the_guard_cuts_lies_below_the_line() -> None:
    rows = pd.DataFrame({"text": list("abc") * 2, "seed": 0, "rules": ["none"] * 3 + ["own"] * 3})
    rows = rows.assign(tokens=[10, 100, 20, 10, 50, 10], errors=[0, 5, 0, 0, 1, 1], ended="stop", heard="")
    (ax,) = figures.guarded(rows, {"own": "the lab's"}).axes
    points = {line.get_label(): (line.get_xdata().tolist(), line.get_ydata().tolist()) for line in ax.lines[:3]}
    assert points == {
        "as many word errors: 1": ([pytest.approx(0.4)], [pytest.approx(0.4)]),
        "fewer: 1": ([pytest.approx(4)], [pytest.approx(2)]),
        "more: 1": ([pytest.approx(0.8)], [pytest.approx(0.4)]),
    }
    line = ax.lines[3]
    assert list(line.get_xdata()) == list(line.get_ydata())
