"""What a GPU would do: predicted ranges, and what others and we have measured, beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ..colors import AMBER, PALE, RUST, SKY
from .style import LEGEND, REAL_TIME, log_scale

_RANGE: dict[str, Any] = {"facecolor": PALE, "edgecolor": SKY, "linewidth": 0.8}
_MARKS: dict[str, dict[str, Any]] = {
    "published by others": {"marker": "D", "markerfacecolor": AMBER, "markeredgecolor": "black", "markersize": 6},
    "our record of that card": {"marker": "o", "markerfacecolor": RUST, "markeredgecolor": "white", "markersize": 7},
}
_AXES = {"RTF": "RTF: seconds a second of speech", "first chunk (s)": "first chunk after (s)"}
_WORDS = {
    "upstream, off": "upstream without attention maps",
    "upstream, graph": "upstream, T3 as CUDA graphs",
    "ours, off, graph, fast": "ours, CUDA graphs, fast",
    "ours, off, graph": "ours, CUDA graphs",
    "ours, off, static": "ours, static cache",
    "ours, off": "ours, exact",
    "ours, stock": "ours, exact, with attention maps",
}
"""Ways in plain words; where a name begins with another, the longer comes first."""


def predictions(predicted: pd.DataFrame, published: pd.DataFrame, records: pd.DataFrame) -> Figure:
    """A panel a card and measure: predicted ranges as bars, and figures that were measured as marks on them.

    Args:
        predicted: from `study.predict.table`.
        published: from `study.predict.against_published`; those without a prediction are left out.
        records: from `study.predict.against_records`, or some of its rows; likewise.
    """
    measured = dict(zip(_MARKS, (published[published["low"].notna()], records[records["low"].notna()]), strict=True))
    rows = _rows(predicted, measured)
    heights = [len(labels) for labels in rows.values()]
    size = (10, 0.27 * sum(heights) + 0.55 * len(rows) + 0.9)
    figure, grid = plt.subplots(len(rows), len(_AXES), figsize=size, height_ratios=heights, sharex="col", squeeze=False)
    for pair, (card, labels) in zip(grid, rows.items(), strict=True):
        for ax, measure in zip(pair, _AXES, strict=True):
            _panel(ax, labels, measure, {kind: found[found["card"] == card] for kind, found in measured.items()})
        pair[0].set_title(card)
        pair[1].set_yticklabels([])
    for ax, text in zip(grid[-1], _AXES.values(), strict=True):
        log_scale(ax.xaxis)
        ax.set_xlabel(f"{text}\nless is better")
    handles: list[Artist] = [Patch(**_RANGE, label="prediction: range from counts and constants, not measured")]
    handles += [Line2D([], [], linestyle="", label=f"measured: {kind}", **style) for kind, style in _MARKS.items()]
    handles.append(Line2D([], [], **REAL_TIME, label="real time"))
    figure.legend(handles=handles, ncols=len(handles), loc="outside upper center", **LEGEND)
    return figure


def _rows(predicted: pd.DataFrame, measured: Mapping[str, pd.DataFrame]) -> dict[str, dict[str, dict[str, tuple]]]:
    """By card and by what runs, the range of each measure; first what was predicted, then what only others ran."""
    rows: dict[str, dict[str, dict[str, tuple]]] = {}
    for (card, label), row in predicted.iterrows():
        rows.setdefault(card, {})[label] = {measure: (row[measure, "low"], row[measure, "high"]) for measure in _AXES}
    for found in measured.values():
        for row in found[found["measure"].isin(list(_AXES))].itertuples():
            rows.setdefault(row.card, {}).setdefault(row.label, {}).setdefault(row.measure, (row.low, row.high))
    return rows


def _panel(
    ax: Axes, labels: Mapping[str, Mapping[str, tuple]], measure: str, marks: Mapping[str, pd.DataFrame]
) -> None:
    places = {label: place for place, label in enumerate(labels)}
    ax.use_sticky_edges = False  # room beside the shortest bar
    for label, ranges in labels.items():
        if measure in ranges:
            low, high = ranges[measure]
            ax.barh(places[label], high - low, left=low, height=0.66, **_RANGE)
    for kind, found in marks.items():
        for row in found[found["measure"] == measure].itertuples():
            upper = row.measured if row.upper != row.upper else row.upper
            ax.plot([row.measured, upper], [places[row.label]] * 2, color="black", linewidth=1, zorder=3)
            ax.plot(row.measured, places[row.label], zorder=4, **_MARKS[kind])
    if measure == "RTF":
        ax.axvline(1, **REAL_TIME)
    ax.set_yticks(list(places.values()), [_in_words(label) for label in places])
    ax.set_ylim(len(places) - 0.4, -0.6)


def _in_words(label: str) -> str:
    begin = next((name for name in _WORDS if label == name or label.startswith(f"{name}, ")), None)
    return label if begin is None else _WORDS[begin] + label.removeprefix(begin)
