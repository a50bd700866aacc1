"""The title figure: upstream's stream and ours on the same machine, against real time."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

SOUND_STYLES = {
    "released": {"facecolor": "0.25", "hatch": ""},
    "same": {"facecolor": "#9fcbe3", "hatch": ""},
    "other": {"facecolor": "#f2d39a", "hatch": "///"},
}
"""How a stream's bar is filled: as released, ours with its tokens and mel, ours with another sound."""
_EDGE = {"edgecolor": "0.25", "linewidth": 0.8}
_REAL_TIME = {"color": "black", "linestyle": ":", "linewidth": 2}
_LABELS = {"released": "upstream", "same": "ours: upstream's tokens and mel", "other": "ours: another sound"}


def stream_bars(boards: Mapping[str, pd.DataFrame]) -> Figure:
    """A panel a model: the RTF of each stream as a bar, its first chunk in words, a line where RTF is 1.

    Args:
        boards: by the panel's title, one row a stream: ``RTF``, ``first chunk (s)``, and ``sound``, a key of
            ``SOUND_STYLES``.
    """
    heights = [len(board) for board in boards.values()]
    size = (8.5, 0.5 * sum(heights) + 0.9 * len(boards) + 0.5)
    figure, axes = plt.subplots(len(boards), 1, figsize=size, height_ratios=heights, squeeze=False)
    for ax, (title, board) in zip(axes[:, 0], boards.items(), strict=True):
        _panel(ax, board)
        ax.set_title(title)
    axes[-1, 0].set_xlabel("RTF: seconds of computing for a second of speech (less is better)")
    shown = [sound for sound in SOUND_STYLES if any(sound in set(board["sound"]) for board in boards.values())]
    handles = [Patch(**SOUND_STYLES[sound], **_EDGE, label=_LABELS[sound]) for sound in shown]
    handles.append(Line2D([], [], **_REAL_TIME, label="real time: right of it, playback waits"))
    figure.legend(handles=handles, frameon=False, fontsize=8, ncols=len(handles), loc="outside upper center")
    return figure


def _panel(ax: Axes, board: pd.DataFrame) -> None:
    for row, stream in enumerate(board.to_dict("records")):
        ax.barh(row, stream["RTF"], height=0.7, **SOUND_STYLES[stream["sound"]], **_EDGE)
        words = f"RTF {stream['RTF']:.2f}, first chunk after {stream['first chunk (s)']:.2f} s"
        ax.annotate(words, (stream["RTF"], row), (6, 0), textcoords="offset points", va="center", size=9)
    line = ax.axvline(1, **_REAL_TIME)
    line.set_path_effects([patheffects.withStroke(linewidth=4, foreground="white")])  # seen on dark bars, too
    ax.set_yticks(range(len(board)), board.index)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.55 * max(1, board["RTF"].max()))
