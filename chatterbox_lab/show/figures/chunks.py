"""What chunk size, context window and schedule do to RTF, first chunk and play-out (notebook 03)."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..colors import AMBER, BLUE, PALE, RUST, SEAM, SKY
from .style import LEGEND, MARKERS, label_bar, legend_above, log_scale

PROMPT_STYLES = (("o", BLUE), ("s", AMBER), ("^", RUST), ("D", "0.5"))
"""Marker and colour of voice prompts, the longest first."""

SHARE_COLORS = {"T3": BLUE, "new speech": PALE, "context": "0.92", "every chunk": AMBER}
"""How the parts of an RTF are drawn; ``every chunk`` is what a chunk costs whatever its size."""
_SHARES = {
    "new speech": "S3Gen: new speech",
    "context": "S3Gen: context again",
    "every chunk": "S3Gen: per chunk, mostly the voice prompt",
}


def window_costs(ax: Axes, rows: pd.DataFrame, coefficients: pd.Series) -> None:
    """Seconds of S3Gen against the tokens of its window, for each length of voice prompt, with the fitted lines.

    Args:
        ax: where to draw.
        rows: from `study.sweep.windows`, of one machine.
        coefficients: ``chunk``, ``prompt_token`` and ``window_token`` in seconds, from `study.costs.fit_windows`.
    """
    groups = sorted(rows.groupby("prompt_tokens"), reverse=True)
    for (prompt, group), (marker, color) in zip(groups, PROMPT_STYLES, strict=False):
        label = f"voice prompt of {prompt} tokens"
        x, y = group["window_tokens"], group["s3gen_seconds"]
        ax.plot(x, y, marker, color=color, markersize=5, label=label, alpha=0.7)
        ends = [x.min(), x.max()]
        base = coefficients["chunk"] + coefficients["prompt_token"] * prompt
        ax.plot(ends, [base + coefficients["window_token"] * (end - prompt) for end in ends], color=color, linewidth=1)
    ax.set(xlabel="window: voice prompt + context + new (tokens)", ylabel="S3Gen (seconds per chunk)", xlim=(0, None))
    ax.set_ylim(bottom=0)
    ax.legend(**LEGEND)


def rtf_shares(machines: Mapping[str, pd.DataFrame]) -> Figure:
    """What each setting's RTF is made of, stacked, one panel for each machine.

    Args:
        machines: by name, from `study.costs.shares`: settings down, parts across, seconds per second of speech.
    """
    rows = sum(len(shares) for shares in machines.values())
    figure, axes = plt.subplots(len(machines), 1, figsize=(8.5, 0.42 * rows + 1.1 * len(machines)), squeeze=False)
    for ax, (name, shares) in zip(axes.flat, machines.items(), strict=True):
        style = {"color": SHARE_COLORS, "edgecolor": "0.4", "linewidth": 0.5, "width": 0.72, "legend": False}
        shares[list(SHARE_COLORS)].plot.barh(stacked=True, ax=ax, **style)
        for row, total in enumerate(shares.sum(axis=1)):
            label_bar(ax, row, total, f"{total:.3g}")
        ax.invert_yaxis()
        ax.set(title=name, ylabel="", xlim=(0, 1.1 * shares.sum(axis=1).max()))
    axes[-1, 0].set_xlabel("RTF (seconds of work per second of speech)")
    legend_above(figure, axes[0, 0], _SHARES)
    return figure


def latency_front(points: pd.DataFrame, grown: pd.DataFrame | None = None) -> Figure:
    """RTF against first chunk: one line for each context window, one marker for each chunk size.

    Markers are filled on the Pareto front, where no other setting is better in both.

    Args:
        points: from `study.sweep.summary`, of one machine and prompt, with the schedule ``"fixed"``.
        grown: the same with the schedule ``"grow"``.
    """
    figure, ax = plt.subplots(figsize=(8.5, 4.6))
    contexts = points.groupby("context_window", sort=True)
    shades = sns.color_palette("cividis", len(contexts) + 1)
    for (context, rows), shade, marker in zip(contexts, shades, MARKERS, strict=False):
        rows = rows.sort_values("chunk_size")
        x, y = rows["first chunk (s)"], rows["RTF"]
        spread = [y - rows["lowest RTF"], rows["highest RTF"] - y]
        ax.errorbar(x, y, spread, color=shade, linewidth=1, capsize=2, elinewidth=0.7)
        for front, filled in ((True, shade), (False, "white")):
            here = rows["front"] == front
            ax.plot(x[here], y[here], marker, color=shade, markerfacecolor=filled, markersize=7)
        ax.plot([], [], marker, color=shade, label=f"context {context}")
    last = points[points["context_window"] == points["context_window"].max()]
    for row in last.to_dict("records"):
        top = (row["first chunk (s)"], row["highest RTF"])
        ax.annotate(f"{row['chunk_size']}", top, (0, 5), textcoords="offset points", size=8, ha="center")
    if grown is not None:
        ax.plot(grown["first chunk (s)"], grown["RTF"], "*", color=SEAM, markersize=14, label="growing schedule")
    log_scale(ax.xaxis)
    ax.set(
        xlabel="first chunk after (s)",
        ylabel="RTF",
        title="RTF against first chunk, by chunk size (numbers) and context window",
    )
    ax.legend(**LEGEND, title="filled: on the Pareto front", title_fontsize=8)
    return figure


def context_heat_map(points: pd.DataFrame) -> Figure:
    """RTF over chunk size and context window, the report's "twice the chunk" outlined where it was measured.

    Args:
        points: from `study.sweep.summary`, of one machine and prompt.
    """
    grid = points.pivot_table(index="context_window", columns="chunk_size", values="RTF").sort_index(ascending=False)
    figure, ax = plt.subplots(figsize=(8.5, 0.55 * len(grid) + 1.8))
    sns.heatmap(grid, ax=ax, annot=True, fmt=".2f", cmap="cividis_r", linewidths=0.5, cbar_kws={"label": "RTF"})
    for column, size in enumerate(grid.columns):
        for row, context in enumerate(grid.index):
            if context == 2 * size:
                corner = (column + 0.04, row + 0.04)
                ax.add_patch(plt.Rectangle(corner, 0.92, 0.92, fill=False, edgecolor=SEAM, linewidth=2))
    ax.set(
        xlabel="chunk size (tokens)",
        ylabel="context window (tokens)",
        title="RTF by chunk size and context window; outlined: a context of twice the chunk",
    )
    ax.tick_params(axis="y", rotation=0)
    return figure


def buffers(streams: Mapping[str, pd.DataFrame], until: float) -> Figure:
    """Seconds that are made and not heard yet, over time, one panel for each stream; at 0 the listener hears nothing.

    Args:
        streams: by name, one row for each chunk: ``arrival_seconds``, ``audio_seconds`` and ``new_tokens``.
        until: the seconds that the axis shows.
    """
    figure, axes = plt.subplots(len(streams), 1, figsize=(8.5, 1.55 * len(streams) + 0.8), sharex=True, sharey=True)
    for ax, (name, chunks) in zip(axes, streams.items(), strict=True):
        times, levels = buffer_levels(chunks["arrival_seconds"].tolist(), chunks["audio_seconds"].tolist())
        ax.fill_between(times, levels, color=PALE, linewidth=0)
        ax.plot(times, levels, color=SKY, linewidth=1.2)
        for arrival in chunks["arrival_seconds"]:
            ax.axvline(arrival, color="0.55", linewidth=0.7, linestyle=":")
        ax.axvspan(0, chunks["arrival_seconds"].iloc[0], color=AMBER, alpha=0.35, linewidth=0)
        sizes = [str(int(size)) for size in chunks["new_tokens"]]
        shown = ", ".join(sizes[:7] + ["..."] * (len(sizes) > 7))
        first = chunks["arrival_seconds"].iloc[0]
        ax.set_title(f"{name}: first chunk after {first:.2f} s; chunks of {shown} tokens", fontsize=9, loc="left")
        ax.set(xlim=(0, until), ylabel="buffer (s)")
    axes[-1].set_xlabel("time since the request (s); shaded: waiting for the first chunk; dotted: a chunk arrives")
    return figure


def buffer_levels(arrivals: list[float], seconds: list[float]) -> tuple[list[float], list[float]]:
    """Corners of the buffer's line, times and levels in seconds: it falls as audio is heard, a chunk lifts it."""
    times, levels, end = [0.0], [0.0], 0.0
    for arrival, length in zip(arrivals, seconds, strict=True):
        if end and end < arrival:  # an underrun
            times, levels = [*times, end], [*levels, 0.0]
        before = max(0.0, end - arrival)
        end = max(end, arrival) + length
        times, levels = [*times, arrival, arrival], [*levels, before, end - arrival]
    return [*times, end], [*levels, 0.0]
