"""What T3 and S3Gen take on each rung of their ladders, from the release to the fastest (notebook 04)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..colors import AMBER, BLUE, PALE, RUST, SAND, SKY
from .style import LEGEND, LINES, MARKERS, REAL_TIME, TOKEN_MS, label_bar, legend_above, log_scale

RUNG_STYLES = tuple(zip((RUST, BLUE, AMBER, "0.25", "0.6"), MARKERS, (*LINES, "-"), strict=False))
"""Colour, marker and line of rungs that are drawn as lines, in order."""

SOUND_STYLES = {"same": (PALE, ""), "rounding": (PALE, ".."), "other": (SAND, "///")}
"""Colour and hatch of S3Gen's rungs by what a listener could notice."""
_SOUNDS = {"same": "the same sound", "rounding": "other rounding", "other": "another sound"}


def t3_rungs(boards: Mapping[str, pd.DataFrame]) -> Figure:
    """Milliseconds per token on each of T3's rungs, with the time to read its weights once; a panel a machine.

    Args:
        boards: by the machine's name, from `study.t3_ladder.summary`.
    """
    figure, axes = _panels(boards, 0.4)
    for ax, (machine, board) in zip(axes, boards.items(), strict=True):
        ax.barh(board.index, board["ms/token"], color=PALE, edgecolor=SKY, height=0.7)
        _mark_limits(ax, board["limit (ms)"], "reading the rung's weights once")
        if board["ms/token"].max() > TOKEN_MS:
            ax.axvline(TOKEN_MS, **REAL_TIME, label="real time (25 tokens per second)")
        for row, (time, gain) in enumerate(zip(board["ms/token"], board["to stock"], strict=True)):
            label_bar(ax, row, time, f"{time:.3g} ms, {gain:.2g}x")
        ax.invert_yaxis()
        ax.set(title=machine, xlim=(0, 1.22 * board["ms/token"].max()))
        ax.legend(loc="lower right", **LEGEND)
    axes[-1].set_xlabel("ms per token, and how many times faster than stock")
    return figure


def _panels(boards: Mapping[str, pd.DataFrame], row: float) -> tuple[Figure, list[Axes]]:
    """A panel of bars for each machine, below one another, as high as it has rows."""
    heights = [len(board) for board in boards.values()]
    size = (8.5, row * sum(heights) + 0.8 * len(boards) + 0.4)
    figure, axes = plt.subplots(len(boards), 1, figsize=size, height_ratios=heights, squeeze=False)
    return figure, list(axes[:, 0])


def _mark_limits(ax: Axes, limits: Iterable[float], label: str) -> None:
    for row, limit in enumerate(limits):
        ax.plot([limit, limit], [row - 0.37, row + 0.37], color="black", linewidth=2.5)
    ax.plot([], [], color="black", linewidth=2.5, label=label)


def t3_rung_parts(about: pd.DataFrame) -> Figure:
    """Where a decode step of each of T3's rungs spends its time, stacked, with the time to read its weights once.

    Args:
        about: indexed by rung: ``products``, ``attention``, ``rest`` and ``limit_seconds``, in seconds.
    """
    figure, ax = plt.subplots(figsize=(8.5, 0.45 * len(about) + 1.4))
    colors = {"products": AMBER, "attention": BLUE, "rest": "0.75"}
    (1e3 * about[list(colors)]).plot.barh(stacked=True, ax=ax, color=colors, edgecolor="white", width=0.7)
    _mark_limits(ax, 1e3 * about["limit_seconds"], "reading the weights once")
    ax.invert_yaxis()
    ax.set(xlabel="ms per decode step, under the profiler", ylabel="", title="Where a decode step spends its time")
    ax.legend(loc="lower right", **LEGEND)
    return figure


def t3_token_times(machines: Mapping[str, pd.DataFrame]) -> Figure:
    """Time per token against how many were decoded before it, one line for each rung: a moving median over its points.

    Args:
        machines: by name, a panel each: milliseconds, token index down, rungs across, from `study.t3_ladder.growth`.
    """
    figure, axes = plt.subplots(len(machines), 1, figsize=(8.5, 2.6 * len(machines) + 0.8), squeeze=False)
    for ax, (machine, times) in zip(axes[:, 0], machines.items(), strict=True):
        styles = zip(times, MARKERS, LINES * 2, strict=False)
        for (rung, marker, line), shade in zip(styles, sns.color_palette("cividis", len(times.columns)), strict=True):
            smooth = times[rung].rolling(9, center=True, min_periods=3).median()
            ax.plot(times.index, times[rung], ".", color=shade, markersize=2, alpha=0.5)
            ax.plot(times.index, smooth, line, color=shade, marker=marker, markevery=12, markersize=5, label=rung)
        ax.set(title=machine, ylabel="ms per token", ylim=(0, 1.2 * times.max(axis=None)))
        if ax.get_ylim()[1] > TOKEN_MS:
            ax.axhline(TOKEN_MS, **REAL_TIME)
            end = (times.index[-1], TOKEN_MS)
            ax.annotate("real time", end, (0, -11), textcoords="offset points", size=8, ha="right")
        ax.legend(ncols=3, loc="lower right", **LEGEND)
    axes[-1, 0].set_xlabel("tokens decoded before")
    return figure


def s3gen_rungs(boards: Mapping[str, pd.DataFrame], chunk_size: int) -> Figure:
    """Seconds per chunk on each of S3Gen's rungs, shaded by what a listener could notice, with the chunk's own length.

    Args:
        boards: by the machine's name, a panel each, from `study.s3gen_ladder.summary`: one shape, indexed by rung.
        chunk_size: new tokens per chunk.
    """
    figure, axes = _panels(boards, 0.38)
    handles: list[Artist] = [
        Patch(facecolor=color, hatch=hatch, edgecolor="0.35", linewidth=0.6, label=_SOUNDS[sound])
        for sound, (color, hatch) in SOUND_STYLES.items()
    ]
    speech = chunk_size * TOKEN_MS / 1e3
    for ax, (machine, board) in zip(axes, boards.items(), strict=True):
        for row, (sound, time) in enumerate(zip(board["sound"], board["s/chunk"], strict=True)):
            color, hatch = SOUND_STYLES[sound]
            ax.barh(row, time, color=color, hatch=hatch, edgecolor="0.35", linewidth=0.6, height=0.7)
        if speech < 3 * board["s/chunk"].max():
            handles[3:] = [ax.axvline(speech, **REAL_TIME, label=f"real time ({speech:g} s of speech per chunk)")]
        for row, (time, gain) in enumerate(zip(board["s/chunk"], board["to stock"], strict=True)):
            label_bar(ax, row, time, f"{time:.3g} s, {gain:.2g}x")
        ax.set_yticks(range(len(board)), board.index)
        ax.invert_yaxis()
        ax.set(title=machine, xlim=(0, 1.2 * board["s/chunk"].max()))
    axes[-1].set_xlabel(f"seconds per chunk of {chunk_size} new tokens, and how many times faster than stock")
    figure.legend(handles=handles, ncols=len(handles), loc="outside upper center", **LEGEND)
    return figure


def chunk_costs(boards: Mapping[str, pd.DataFrame], rungs: Sequence[str]) -> Figure:
    """What S3Gen takes against how many tokens of a chunk are new: in seconds per chunk, and per second of speech.

    Args:
        boards: by the machine's name, a row of two panels each, from `study.s3gen_ladder.summary`, with several sizes.
        rungs: one line for each, in order.
    """
    figure, axes = plt.subplots(len(boards), 2, figsize=(9, 2.7 * len(boards) + 0.8), squeeze=False)
    for pair, (machine, board) in zip(axes, boards.items(), strict=True):
        for rung, (shade, marker, line) in zip(rungs, RUNG_STYLES, strict=False):
            times = board.xs(rung, level="rung").reset_index()
            style = {"color": shade, "marker": marker, "linestyle": line, "markersize": 5, "label": rung}
            pair[0].plot(times["chunk size"], times["s/chunk"], **style)
            pair[1].plot(times["chunk size"], times["RTF"], **style)
        _label_costs(pair, machine, sorted(board.index.unique("chunk size")))
    for ax in axes[-1]:
        ax.set_xlabel("new tokens in the chunk")
    legend_above(figure, axes[0, 0])
    return figure


def _label_costs(pair: Sequence[Axes], machine: str, sizes: Sequence[int]) -> None:
    for ax in pair:
        ax.set_xticks(sizes, sizes)
    pair[0].set(ylabel="seconds per chunk", ylim=(0, None), title=machine)
    pair[1].set(ylabel="RTF of S3Gen alone")
    if pair[1].get_ylim()[1] < 1:
        pair[1].set_ylim(bottom=0)
        return
    log_scale(pair[1].yaxis)
    pair[1].axhline(1, **REAL_TIME)
    pair[1].annotate("real time", (sizes[-1], 1), (0, -11), textcoords="offset points", size=8, ha="right")
    pair[1].set_ylim(bottom=min(0.7, pair[1].get_ylim()[0]))
