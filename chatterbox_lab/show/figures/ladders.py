"""What T3 and S3Gen take on each rung of their ladders, from the release to the fastest (notebook 04)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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


def t3_rungs(board: pd.DataFrame) -> Figure:
    """Milliseconds per token on each of T3's rungs, with the time to read its weights once.

    Args:
        board: from `study.t3_ladder.summary`, of one machine.
    """
    figure, ax = plt.subplots(figsize=(8.5, 0.42 * len(board) + 1.2))
    ax.barh(board.index, board["ms/token"], color=PALE, edgecolor=SKY, height=0.7)
    _mark_limits(ax, board["limit (ms)"], "reading the rung's weights once")
    ax.axvline(TOKEN_MS, **REAL_TIME, label="real time (25 tokens per second)")
    for row, (time, gain) in enumerate(zip(board["ms/token"], board["to stock"], strict=True)):
        label_bar(ax, row, time, f"{time:.3g} ms, {gain:.2g}x")
    ax.invert_yaxis()
    ax.set(
        xlabel="ms per token",
        title="T3, rung by rung: time per token and speed-up",
        xlim=(0, 1.22 * board["ms/token"].max()),
    )
    ax.legend(loc="lower right", **LEGEND)
    return figure


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


def t3_token_times(times: pd.DataFrame) -> Figure:
    """Time per token against how many were decoded before it, one line for each rung: a moving median over its points.

    Args:
        times: milliseconds, token index down, rungs across, from the long runs of T3's ladder.
    """
    figure, ax = plt.subplots(figsize=(8.5, 3.6))
    styles = zip(times, MARKERS, LINES * 2, strict=False)
    for (rung, marker, line), shade in zip(styles, sns.color_palette("cividis", len(times.columns)), strict=True):
        smooth = times[rung].rolling(9, center=True, min_periods=3).median()
        ax.plot(times.index, times[rung], ".", color=shade, markersize=2, alpha=0.5)
        ax.plot(times.index, smooth, line, color=shade, marker=marker, markevery=12, markersize=5, label=rung)
    ax.axhline(TOKEN_MS, **REAL_TIME)
    ax.annotate("real time", (times.index[-1], TOKEN_MS), (0, -11), textcoords="offset points", size=8, ha="right")
    ax.set(xlabel="tokens decoded before", ylabel="ms per token", title="Time per token as the stream gets longer")
    ax.set_ylim(bottom=0)
    ax.legend(ncols=2, **LEGEND)
    return figure


def s3gen_rungs(board: pd.DataFrame, chunk_size: int) -> Figure:
    """Seconds per chunk on each of S3Gen's rungs, shaded by what a listener could notice, with the chunk's own length.

    Args:
        board: from `study.s3gen_ladder.summary`, of one machine and shape, indexed by rung.
        chunk_size: new tokens per chunk.
    """
    figure, ax = plt.subplots(figsize=(8.5, 0.4 * len(board) + 1.4))
    handles: list[Artist] = [
        Patch(facecolor=color, hatch=hatch, edgecolor="0.35", linewidth=0.6, label=_SOUNDS[sound])
        for sound, (color, hatch) in SOUND_STYLES.items()
    ]
    for row, (sound, time) in enumerate(zip(board["sound"], board["s/chunk"], strict=True)):
        color, hatch = SOUND_STYLES[sound]
        ax.barh(row, time, color=color, hatch=hatch, edgecolor="0.35", linewidth=0.6, height=0.7)
    speech = chunk_size * TOKEN_MS / 1e3
    if speech < 3 * board["s/chunk"].max():
        handles.append(ax.axvline(speech, **REAL_TIME, label=f"real time ({speech:g} s of speech per chunk)"))
    for row, (time, gain) in enumerate(zip(board["s/chunk"], board["to stock"], strict=True)):
        label_bar(ax, row, time, f"{time:.3g} s, {gain:.2g}x")
    ax.set_yticks(range(len(board)), board.index)
    ax.invert_yaxis()
    ax.set(
        xlabel="seconds per chunk",
        title=f"S3Gen, rung by rung: time per chunk of {chunk_size} new tokens and speed-up",
        xlim=(0, 1.2 * board["s/chunk"].max()),
    )
    ax.legend(handles=handles, loc="lower right", **LEGEND)
    return figure


def chunk_costs(board: pd.DataFrame, rungs: Sequence[str]) -> Figure:
    """What S3Gen takes against how many tokens of a chunk are new: in seconds per chunk, and per second of speech.

    Args:
        board: from `study.s3gen_ladder.summary`, with several chunk sizes.
        rungs: one line for each, in order.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5))
    for rung, (shade, marker, line) in zip(rungs, RUNG_STYLES, strict=False):
        times = board.xs(rung, level="rung").reset_index()
        style = {"color": shade, "marker": marker, "linestyle": line, "markersize": 5, "label": rung}
        axes[0].plot(times["chunk size"], times["s/chunk"], **style)
        axes[1].plot(times["chunk size"], times["RTF"], **style)
    sizes = sorted(board.index.unique("chunk size"))
    for ax in axes:
        ax.set_xticks(sizes, sizes)
        ax.set_xlabel("new tokens in the chunk")
    axes[1].axhline(1, **REAL_TIME)
    axes[1].annotate("real time", (sizes[-1], 1), (0, -11), textcoords="offset points", size=8, ha="right")
    log_scale(axes[1].yaxis)
    axes[1].set_ylim(bottom=min(0.7, axes[1].get_ylim()[0]))
    axes[0].set(ylabel="seconds per chunk", ylim=(0, None), title="Per chunk")
    axes[1].set(ylabel="RTF of S3Gen alone", title="Per second of speech")
    legend_above(figure, axes[0])
    return figure
