"""The title figure: upstream's stream and ours on the same machine, against real time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib import patheffects
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from .ladders import SOUND_STYLES
from .style import LEGEND, REAL_TIME, label_bar

STREAM_STYLES = {"released": ("0.25", ""), **SOUND_STYLES}
"""Colour and hatch of a stream: as released, or by what a listener could notice in ours."""
_LABELS = {
    "released": "upstream",
    "same": "ours: same mel from same noise",
    "rounding": "ours: other rounding",
    "other": "ours: another sound",
}
_LINE = REAL_TIME | {"color": "black", "linewidth": 2}


def stream_bars(boards: Mapping[str, pd.DataFrame]) -> Figure:
    """A panel a model: the RTF of each stream as a bar, its first chunk in words, a line where RTF is 1.

    Args:
        boards: by the panel's title, one row a stream: ``RTF``, ``first chunk (s)``, and ``sound``, a key of
            ``STREAM_STYLES``.
    """
    heights = [len(board) for board in boards.values()]
    size = (8.5, 0.5 * sum(heights) + 0.9 * len(boards) + 0.5)
    figure, axes = plt.subplots(len(boards), 1, figsize=size, height_ratios=heights, squeeze=False)
    for ax, (title, board) in zip(axes[:, 0], boards.items(), strict=True):
        _panel(ax, board)
        ax.set_title(title)
    axes[-1, 0].set_xlabel("RTF: seconds of computing for a second of speech (less is better)")
    shown = [sound for sound in STREAM_STYLES if any(sound in set(board["sound"]) for board in boards.values())]
    handles: list[Artist] = [Patch(**_fill(sound), label=_LABELS[sound]) for sound in shown]
    handles.append(Line2D([], [], **_LINE, label="real time: right of it, playback waits"))
    figure.legend(handles=handles, **LEGEND, ncols=len(handles), loc="outside upper center")
    return figure


def _panel(ax: Axes, board: pd.DataFrame) -> None:
    for row, (time, sound) in enumerate(zip(board["RTF"], board["sound"], strict=True)):
        ax.barh(row, time, height=0.7, **_fill(sound))
    line = ax.axvline(1, **_LINE)
    line.set_path_effects([patheffects.withStroke(linewidth=4, foreground="white")])  # seen on dark bars, too
    for row, (time, first) in enumerate(zip(board["RTF"], board["first chunk (s)"], strict=True)):
        label_bar(ax, row, time, f"RTF {time:.2f}, first chunk after {first:.2f} s")
    ax.set_yticks(range(len(board)), board.index)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.55 * max(1, board["RTF"].max()))


def _fill(sound: str) -> dict[str, Any]:
    color, hatch = STREAM_STYLES[sound]
    return {"facecolor": color, "hatch": hatch, "edgecolor": "0.35", "linewidth": 0.6}
