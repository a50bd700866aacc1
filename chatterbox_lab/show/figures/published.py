"""What others measured, beside our own records: real-time factors by machine and software, and who says so."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ...study.published import KINDS, UNKNOWN
from ..colors import AMBER, BLUE, RUST
from .style import LEGEND, REAL_TIME, log_scale

WHO = {"the report": RUST, "the report's author, elsewhere": "0.45", "others": AMBER, "our record": BLUE}
"""Who measured, by colour. Each has rows of its own, so that the picture can be read without colour."""
_SHAPES = dict(zip(KINDS, "osD^v", strict=True))
_SMALL = ("turbo", "nano")
_NAMES = {UNKNOWN: "machine not said"}
_LABELS = {"others": "published by others", "our record": "measured here: our records"}
_LABELS |= {who: f"published: {who}" for who in WHO if who not in _LABELS}


def published_rtfs(points: pd.DataFrame) -> Figure:
    """A row a machine: each RTF as a mark, by who measured it, what ran, and whether it streamed.

    Chatterbox of 0.5 billion weights stands above Turbo and Nano; in each panel, what others measured stands above our
    records. A line leads to the end of a range.

    Args:
        points: from `study.published.rtfs`.
    """
    small = points["model"].isin(_SMALL)
    panels = {"Chatterbox, of any language": points[~small], "Chatterbox-Turbo and Nano": points[small]}
    panels = {title: _rows(rows) for title, rows in panels.items() if len(rows)}
    heights = [rows["row"].nunique() + 1 for rows in panels.values()]
    size = (9.5, 0.27 * sum(heights) + 1.5)
    figure, axes = plt.subplots(len(panels), 1, figsize=size, height_ratios=heights, sharex=True, squeeze=False)
    for ax, (title, rows) in zip(axes[:, 0], panels.items(), strict=True):
        _panel(ax, rows)
        ax.set_title(title)
    log_scale(axes[-1, 0].xaxis)
    axes[-1, 0].set_xlabel("RTF: seconds of computing for a second of speech (less is better)")
    figure.legend(handles=_handles(points), ncols=3, loc="outside upper center", **LEGEND)
    return figure


def _rows(points: pd.DataFrame) -> pd.DataFrame:
    """The points with their ``row``: others by their least RTF, then ours."""
    mine = points["who"] == "our record"
    name = points["machine"].replace(_NAMES) + points["who"].map(lambda who: "" if who == "others" else f" ({who})")
    return (
        points.assign(row=name, mine=mine, least=points.groupby(name)["RTF"].transform("min"))
        .sort_values(["mine", "least", "row"], kind="stable")
        .drop(columns=["mine", "least"])
    )


def _panel(ax: Axes, points: pd.DataFrame) -> None:
    places = {name: place for place, name in enumerate(points["row"].unique())}
    ax.axvline(1, **REAL_TIME)
    for point in points.to_dict("records"):
        place = places[point["row"]]
        if point["upper"] == point["upper"]:
            ax.plot([point["RTF"], point["upper"]], [place, place], color=WHO[point["who"]], linewidth=2, zorder=2)
        ax.plot(point["RTF"], place, **_mark(point["who"], point["kind"], point["streaming"]), zorder=3)
    ours = [place for name, place in places.items() if name.endswith("(our record)")]
    if ours and min(ours):
        ax.axhline(min(ours) - 0.5, color="0.5", linewidth=0.8)
    ax.set_yticks(list(places.values()), list(places))
    ax.set_ylim(len(places) - 0.4, -0.6)
    ax.grid(axis="y", color="0.92")
    ax.set_axisbelow(True)


def _mark(who: str, kind: str, streaming: bool) -> dict[str, Any]:
    """Filled if it streamed, else hollow."""
    edge = "black" if streaming else WHO[who]
    fill = WHO[who] if streaming else "white"
    wide = 0.7 if streaming else 1.8
    return {"marker": _SHAPES[kind], "markersize": 7, "linestyle": "", "markerfacecolor": fill,
            "markeredgecolor": edge, "markeredgewidth": wide}  # fmt: skip


def _handles(points: pd.DataFrame) -> list[Artist]:
    there = {column: set(points[column]) for column in ("who", "kind")}
    seen = [who for who in WHO if who in there["who"]]
    first = next(iter(_SHAPES))
    handles: list[Artist] = [Line2D([], [], **_mark(who, first, True), label=_LABELS.get(who, who)) for who in seen]
    grey = {"color": "0.4", "markersize": 7, "linestyle": ""}
    handles += [Line2D([], [], marker=_SHAPES[kind], **grey, label=kind) for kind in _SHAPES if kind in there["kind"]]
    handles.append(Line2D([], [], marker="o", **grey, label="filled: streaming"))
    handles.append(Line2D([], [], marker="o", **grey, markerfacecolor="white", label="hollow: not streaming"))
    handles.append(Line2D([], [], **REAL_TIME, label="real time: right of it, playback waits"))
    return handles
