"""One style for every figure, readable in black and white, with what it was measured on inside the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import Image
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ...files import written_whole
from ...study.machine import machine_facts
from ...study.records import output_folder

_RC = {
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "svg.hashsalt": "chatterbox-lab",  # the same drawing gives the same file
    "svg.fonttype": "none",
}


def set_style() -> None:
    """Gives every figure drawn from now on in this process the lab's look."""
    sns.set_theme(context="notebook", style="ticks", font_scale=0.9, rc=_RC)


def provenance(model: str, device: str = "cpu", dtype: str = "float32") -> dict[str, str]:
    """What a figure was measured on just now, as it stands in the small print."""
    return origin(machine_facts(device) | {"model": model, "dtype": dtype})


def origin(*records: Mapping[str, Any]) -> dict[str, str]:
    """The same from rows of records, one for each machine that the figure shows."""
    texts = [
        {
            "model": f"{facts['model']}, T3 in {facts['dtype']}",
            "machine": facts["machine"] + (f", {facts['cores']} cores" if facts["device"] == "cpu" else ""),
            "versions": f"torch {facts['torch']}, transformers {facts['transformers']}",
            "commit": facts["commit"],
            "date": facts["date"],
        }
        for facts in records
    ]
    return {key: " / ".join(dict.fromkeys(text[key] for text in texts)) for key in texts[0]}


def save(figure: Figure, name: str, origin: dict[str, str]) -> Path:
    """Writes ``figures/name.png`` and ``.svg``, whole or not at all, with their origin in small print and metadata.

    Args:
        figure: what was drawn.
        name: starts with the notebook's number and says what is seen, such as ``01_layers``.
        origin: from `provenance`.

    Returns:
        The path of the PNG.
    """
    line = " | ".join(f"{key}: {value}" for key, value in origin.items())
    figure.supxlabel(line, fontsize=6, color="0.35", x=0.01, ha="left")
    folder = output_folder("figures")
    for kind, metadata in (("svg", {"Description": line, "Date": None}), ("png", {"Description": line})):
        with written_whole(folder / f"{name}.{kind}") as part:
            figure.savefig(part, format=kind, metadata=metadata)
    plt.close(figure)
    return folder / f"{name}.png"


def show(figure: Figure, name: str, origin: dict[str, str]) -> Image:
    """Saves a figure (see `save`) and returns the picture that was written, for the end of a cell."""
    width = int(figure.get_figwidth() * 100)
    return Image(filename=str(save(figure, name, origin)), width=width)


MODE_STYLES = {
    "released": {"color": "#111111", "marker": "P", "linestyle": ":"},
    "stock": {"color": "#7a2e12", "marker": "s", "linestyle": "-"},
    "layer": {"color": "#d9a520", "marker": "^", "linestyle": "-."},
    "off": {"color": "#2a86bd", "marker": "o", "linestyle": "-"},
    "probe": {"color": "#9fcbe3", "marker": "D", "linestyle": "--"},
}
"""How each way to read the alignment is drawn, in every figure: told apart by hue, by lightness and by marker."""


def layer_heat_map(costs: pd.DataFrame, length: int, part: str = "attention") -> Figure:
    """Milliseconds of one part of each of T3's layers (across) in each mode (down), for both phases.

    Args:
        costs: from `profiler.summary`, of one machine.
        length: one of its sequence lengths.
        part: ``attention``, ``mlp`` or ``rest``.
    """
    chosen = costs[(costs["layer"] >= 0) & (costs["part"] == part) & (costs["length"] == length)]
    modes = [mode for mode in MODE_STYLES if mode in set(chosen["mode"])]
    figure, axes = plt.subplots(2, 1, figsize=(8.5, 4.6), sharex=True)
    for ax, phase in zip(axes, ("prefill", "decode"), strict=True):
        rows = chosen[chosen["phase"] == phase]
        grid = 1e3 * rows.pivot_table(index="mode", columns="layer", values="seconds").loc[modes]
        label = {"label": "ms"}
        sns.heatmap(grid, ax=ax, cmap="cividis_r", vmin=0, linewidths=0.5, cbar_kws=label, xticklabels=2)
        ax.set(title=f"{phase} at length {length}: {part} of each layer", xlabel="", ylabel="")
        ax.tick_params(axis="y", rotation=0)
    axes[-1].set_xlabel("layer of T3")
    return figure


def over_length(
    ax: Axes, values: pd.DataFrame, low: pd.DataFrame | None = None, high: pd.DataFrame | None = None
) -> None:
    """Draws values against sequence length, a line a mode, on a logarithmic axis with a tick for each length.

    Args:
        ax: where to draw.
        values: from `profiler.steps`, of one phase: lengths down, modes across.
        low: the same shape: the lower ends of error bars.
        high: their upper ends.
    """
    for mode in (mode for mode in MODE_STYLES if mode in values and values[mode].notna().any()):
        error = None if low is None else [values[mode] - low[mode], high[mode] - values[mode]]
        style = {"label": mode, "capsize": 2, "elinewidth": 0.8} | MODE_STYLES[mode]
        ax.errorbar(values.index, values[mode], error, **style)
    ax.set(xscale="log", xlabel="sequence length (positions)")
    ax.set_xticks(values.index, values.index)
    ax.xaxis.set_minor_locator(NullLocator())


def log_scale(axis: Axis) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


PART_COLORS = {"attention": "#0b6fa4", "mlp": "#c58b00", "rest": "0.35", "model": "0.6", "sampling": "0.85"}
"""How the parts of a step are drawn: `profiler.PARTS`, and what runs around the layers."""


def step_parts(costs: pd.DataFrame, length: int) -> Figure:
    """Milliseconds of a whole step by part, stacked, for each mode and phase.

    Args:
        costs: from `profiler.summary`, of one machine.
        length: one of its sequence lengths.
    """
    whole = costs[(costs["layer"] < 0) & (costs["length"] == length)]
    modes = [mode for mode in MODE_STYLES if mode in set(whole["mode"])]
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.2), sharey=True)
    for ax, phase in zip(axes, ("prefill", "decode"), strict=True):
        rows = whole[whole["phase"] == phase]
        bars = 1e3 * rows.pivot_table(index="mode", columns="part", values="seconds").loc[modes, list(PART_COLORS)]
        bars.plot.barh(stacked=True, ax=ax, color=PART_COLORS, legend=False, edgecolor="white", width=0.75)
        ax.set(title=f"{phase} at length {length}", xlabel="ms a step", ylabel="")
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=5, loc="outside upper center", fontsize=8)
    return figure


def ladder_bars(board: pd.DataFrame) -> Figure:
    """Milliseconds a token of each rung, with the time to read its weights once.

    Args:
        board: from `ladder.summary`, of one machine.
    """
    figure, ax = plt.subplots(figsize=(8.5, 0.42 * len(board) + 1.2))
    ax.barh(board.index, board["ms/token"], color="#9fcbe3", edgecolor="#2a86bd", height=0.7)
    for row, (time, limit, gain) in enumerate(
        zip(board["ms/token"], board["limit (ms)"], board["to stock"], strict=True)
    ):
        ax.plot([limit, limit], [row - 0.35, row + 0.35], color="black", linewidth=2.5)
        ax.annotate(f"{time:.3g} ms, {gain:.2g}x", (time, row), (4, 0), textcoords="offset points", va="center", size=8)
    ax.plot([], [], color="black", linewidth=2.5, label="reading the rung's weights once")
    ax.axvline(_REAL_TIME, color="0.4", linestyle=":", label="real time (25 tokens a second)")
    ax.invert_yaxis()
    ax.set(xlabel="ms a token", title="T3, rung by rung", xlim=(0, 1.22 * board["ms/token"].max()))
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


_REAL_TIME = 40.0  # ms of speech in a token


def ladder_parts(about: pd.DataFrame) -> Figure:
    """Where a decode step of each rung spends its time, stacked, with the time to read its weights once.

    Args:
        about: indexed by rung: ``products``, ``attention``, ``rest`` and ``limit_seconds``, in seconds.
    """
    figure, ax = plt.subplots(figsize=(8.5, 0.45 * len(about) + 1.4))
    colors = {"products": "#c58b00", "attention": "#0b6fa4", "rest": "0.75"}
    (1e3 * about[list(colors)]).plot.barh(stacked=True, ax=ax, color=colors, edgecolor="white", width=0.7)
    for row, limit in enumerate(1e3 * about["limit_seconds"]):
        ax.plot([limit, limit], [row - 0.4, row + 0.4], color="black", linewidth=2.5)
    ax.plot([], [], color="black", linewidth=2.5, label="reading the weights once")
    ax.invert_yaxis()
    ax.set(xlabel="ms a decode step, under the profiler", ylabel="", title="Where a step spends its time")
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def growth(times: pd.DataFrame) -> Figure:
    """What a token costs against how many were said before it, a line a rung.

    Args:
        times: from `ladder.growth`: milliseconds, token index down, rungs across.
    """
    figure, ax = plt.subplots(figsize=(8.5, 3.6))
    styles = zip(times, "osD^vPX", ("-", "--", "-.", ":") * 2, strict=False)
    for (rung, marker, line), shade in zip(styles, sns.color_palette("cividis", len(times.columns)), strict=True):
        smooth = times[rung].rolling(9, center=True, min_periods=3).median()
        ax.plot(times.index, times[rung], ".", color=shade, markersize=2, alpha=0.5)
        ax.plot(times.index, smooth, line, color=shade, marker=marker, markevery=12, markersize=5, label=rung)
    ax.axhline(_REAL_TIME, color="0.4", linestyle=":")
    ax.annotate("real time", (times.index[-1], _REAL_TIME), (0, -11), textcoords="offset points", size=8, ha="right")
    ax.set(xlabel="tokens said before", ylabel="ms a token", title="A token's price as the text gets longer")
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False, fontsize=8, ncols=2)
    return figure


_SOUND_STYLES = {"same": ("#9fcbe3", ""), "rounding": ("#9fcbe3", "///"), "other": ("#f2d39a", "")}


def price_bars(board: pd.DataFrame, chunk_size: int) -> Figure:
    """Seconds a chunk of each rung of S3Gen, shaded by what a listener could notice, with the chunk's own length.

    Args:
        board: from `prices.summary`, of one machine and shape, indexed by rung.
        chunk_size: new tokens a chunk.
    """
    figure, ax = plt.subplots(figsize=(8.5, 0.4 * len(board) + 1.4))
    for row, (sound, time, gain) in enumerate(zip(board["sound"], board["s/chunk"], board["to stock"], strict=True)):
        color, hatch = _SOUND_STYLES[sound]
        ax.barh(row, time, color=color, hatch=hatch, edgecolor="0.35", linewidth=0.6, height=0.7)
        ax.annotate(f"{time:.3g} s, {gain:.2g}x", (time, row), (4, 0), textcoords="offset points", va="center", size=8)
    words = {"same": "the same sound", "rounding": "other rounding", "other": "another sound"}
    handles: list[Artist] = [
        Patch(facecolor=color, hatch=hatch, edgecolor="0.35", linewidth=0.6, label=words[sound])
        for sound, (color, hatch) in _SOUND_STYLES.items()
    ]
    speech = chunk_size * _REAL_TIME / 1e3
    if speech < 3 * board["s/chunk"].max():
        handles.append(ax.axvline(speech, color="0.4", linestyle=":", label=f"length of the chunk ({speech:g} s)"))
    ax.set_yticks(range(len(board)), board.index)
    ax.invert_yaxis()
    ax.set(
        xlabel="s a chunk",
        title=f"S3Gen, rung by rung: {chunk_size} new tokens",
        xlim=(0, 1.2 * board["s/chunk"].max()),
    )
    ax.legend(handles=handles, frameon=False, fontsize=8, loc="lower right")
    return figure


def chunk_costs(board: pd.DataFrame, rungs: Sequence[str]) -> Figure:
    """What a chunk costs S3Gen against how much is new in it, before and after: in seconds, and by second of speech.

    Args:
        board: from `prices.summary`, with several chunk sizes.
        rungs: the lines, in order.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5))
    for rung, marker, line, shade in zip(rungs, "osD^v", ("-", "--", "-.", ":", "-"), _SHADES, strict=False):
        times = board.xs(rung, level="rung").reset_index()
        style = {"color": shade, "marker": marker, "linestyle": line, "markersize": 5, "label": rung}
        axes[0].plot(times["chunk size"], times["s/chunk"], **style)
        axes[1].plot(times["chunk size"], times["RTF"], **style)
    axes[1].axhline(1, color="0.4", linestyle=":")
    axes[1].set_yscale("log")
    log_scale(axes[1].yaxis)
    axes[0].set(xlabel="new tokens in the chunk", ylabel="s a chunk", ylim=(0, None), title="A chunk")
    axes[1].set(xlabel="new tokens in the chunk", ylabel="S3Gen's RTF", title="A second of speech")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, ncols=5, loc="outside upper center")
    return figure


_SHADES = ("#7a2e12", "#0b6fa4", "#c58b00", "0.25", "0.6")


PROMPT_STYLES = (("o", "#0b6fa4"), ("s", "#c58b00"), ("^", "#7a2e12"), ("D", "0.5"))


def window_costs(ax: Axes, rows: pd.DataFrame, coefficients: pd.Series) -> None:
    """Seconds of S3Gen against the tokens of its window, for each length of voice prompt, with the fitted lines.

    Args:
        ax: where to draw.
        rows: from `sweep.windows`, of one machine.
        coefficients: ``chunk``, ``prompt_token`` and ``window_token`` in seconds, from `advice.fit_windows`.
    """
    groups = sorted(rows.groupby("prompt_tokens"), reverse=True)
    for (prompt, group), (marker, color) in zip(groups, PROMPT_STYLES, strict=False):
        label = f"voice prompt of {prompt} tokens"
        x, y = group["window_tokens"], group["s3gen_seconds"]
        ax.plot(x, y, marker, color=color, markersize=5, label=label, alpha=0.7)
        ends = [x.min(), x.max()]
        base = coefficients["chunk"] + coefficients["prompt_token"] * prompt
        ax.plot(ends, [base + coefficients["window_token"] * (end - prompt) for end in ends], color=color, linewidth=1)
    ax.set(xlabel="window: voice prompt + context + new (tokens)", ylabel="S3Gen (s a chunk)", xlim=(0, None))
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False, fontsize=8)


SHARE_COLORS = {"T3": "#0b6fa4", "new speech": "#9fcbe3", "context": "0.92", "every chunk": "#c58b00"}
"""How the parts of an RTF are drawn; ``every chunk`` is what a chunk costs whatever its size."""


def rtf_shares(machines: Mapping[str, pd.DataFrame]) -> Figure:
    """What each setting's RTF is made of, stacked: a panel a machine.

    Args:
        machines: by name, from `advice.shares`: settings down, parts across, seconds per second of speech.
    """
    rows = sum(len(shares) for shares in machines.values())
    figure, axes = plt.subplots(len(machines), 1, figsize=(8.5, 0.42 * rows + 1.1 * len(machines)), squeeze=False)
    for ax, (name, shares) in zip(axes.flat, machines.items(), strict=True):
        bars = shares[list(SHARE_COLORS)]
        bars.plot.barh(
            stacked=True, ax=ax, color=SHARE_COLORS, edgecolor="0.4", linewidth=0.5, width=0.72, legend=False
        )
        for row, total in enumerate(shares.sum(axis=1)):
            ax.annotate(f"{total:.3g}", (total, row), (4, 0), textcoords="offset points", va="center", size=8)
        ax.invert_yaxis()
        ax.set(title=name, ylabel="", xlim=(0, 1.1 * shares.sum(axis=1).max()))
    axes[-1, 0].set_xlabel("RTF (seconds per second of speech)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=len(labels), loc="outside upper center", fontsize=8)
    return figure


def latency_front(points: pd.DataFrame, grown: pd.DataFrame | None = None) -> Figure:
    """RTF against first chunk, a line a context window with its chunk sizes; the Pareto front is filled.

    Args:
        points: from `sweep.summary`, of one machine and prompt, with the schedule ``"fixed"``.
        grown: the same of growing schedules.
    """
    figure, ax = plt.subplots(figsize=(8.5, 4.6))
    contexts = points.groupby("context_window", sort=True)
    shades = sns.color_palette("cividis", len(contexts) + 1)
    for (context, rows), shade, marker in zip(contexts, shades, "osD^vPX", strict=False):
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
        where = (row["first chunk (s)"], row["RTF"])
        ax.annotate(f"{row['chunk_size']}", where, (3, 8), textcoords="offset points", size=8)
    if grown is not None:
        ax.plot(grown["first chunk (s)"], grown["RTF"], "*", color="#c0392b", markersize=14, label="growing schedule")
    log_scale(ax.xaxis)
    ax.set(xlabel="first chunk (s)", ylabel="RTF", title="Early or cheap: chunk sizes (numbers) and context windows")
    ax.legend(frameon=False, fontsize=8, title="filled: on the Pareto front", title_fontsize=8)
    return figure


def context_heat_map(points: pd.DataFrame) -> Figure:
    """RTF over chunk size and context window, the report's "twice the chunk" outlined where it was measured.

    Args:
        points: from `sweep.summary`, of one machine and prompt.
    """
    grid = points.pivot_table(index="context_window", columns="chunk_size", values="RTF").sort_index(ascending=False)
    figure, ax = plt.subplots(figsize=(8.5, 0.55 * len(grid) + 1.8))
    sns.heatmap(grid, ax=ax, annot=True, fmt=".2f", cmap="cividis_r", linewidths=0.5, cbar_kws={"label": "RTF"})
    for column, size in enumerate(grid.columns):
        for row, context in enumerate(grid.index):
            if context == 2 * size:
                ax.add_patch(
                    plt.Rectangle((column + 0.04, row + 0.04), 0.92, 0.92, fill=False, edgecolor="#c0392b", lw=2)
                )
    ax.set(
        xlabel="chunk size (tokens)",
        ylabel="context window (tokens)",
        title="RTF; outlined: context of twice the chunk",
    )
    ax.tick_params(axis="y", rotation=0)
    return figure


def buffers(streams: Mapping[str, pd.DataFrame], until: float) -> Figure:
    """Seconds that the listener has still to hear, as chunks arrive: a panel a stream; below 0 there is silence.

    Args:
        streams: by name, rows of one run of `sweep.chunks_of`: ``arrival_seconds`` and ``audio_seconds``.
        until: the seconds of speech that the axis shows.
    """
    figure, axes = plt.subplots(len(streams), 1, figsize=(8.5, 1.55 * len(streams) + 0.8), sharex=True, sharey=True)
    for ax, (name, chunks) in zip(axes, streams.items(), strict=True):
        times, levels = _levels(chunks["arrival_seconds"].tolist(), chunks["audio_seconds"].tolist())
        ax.fill_between(times, levels, step=None, color="#9fcbe3", linewidth=0)
        ax.plot(times, levels, color="#2a86bd", linewidth=1.2)
        for arrival in chunks["arrival_seconds"]:
            ax.axvline(arrival, color="0.55", linewidth=0.7, linestyle=":")
        ax.axvspan(0, chunks["arrival_seconds"].iloc[0], color="#c58b00", alpha=0.35, linewidth=0)
        sizes = [str(int(size)) for size in chunks["new_tokens"]]
        shown = ", ".join(sizes[:7] + ["..."] * (len(sizes) > 7))
        first = chunks["arrival_seconds"].iloc[0]
        ax.set_title(f"{name}: first chunk after {first:.2f} s; chunks of {shown} tokens", fontsize=9, loc="left")
        ax.set(xlim=(0, until), ylabel="s ahead")
    axes[-1].set_xlabel("seconds since the request (shaded: waiting for the first chunk; dotted: a chunk arrives)")
    return figure


def _levels(arrivals: list[float], seconds: list[float]) -> tuple[list[float], list[float]]:
    """Corners of the buffer's saw-tooth: it empties at the pace of the clock and rises when a chunk arrives."""
    times, levels, end = [0.0], [0.0], 0.0
    for arrival, length in zip(arrivals, seconds, strict=True):
        if end and end < arrival:  # it ran out
            times, levels = [*times, end], [*levels, 0.0]
        before = max(0.0, end - arrival)
        end = max(end, arrival) + length
        times, levels = [*times, arrival, arrival], [*levels, before, end - arrival]
    return [*times, end], [*levels, 0.0]


def seam_close_up(waves: Mapping[str, np.ndarray], seam: int, rate: int, around: float = 0.06) -> Figure:
    """The waveform around one seam, a row for each way of making it.

    Args:
        waves: audio (samples,) by name, sample by sample the same speech.
        seam: the sample at which a chunk begins.
        rate: samples a second.
        around: seconds that are shown on either side.
    """
    figure, axes = plt.subplots(len(waves), 1, figsize=(8.5, 1.4 * len(waves)), sharex=True, sharey=True)
    reach = round(around * rate)
    for ax, (name, wave) in zip(axes, waves.items(), strict=True):
        part = wave[max(0, seam - reach) : seam + reach]
        ax.plot((np.arange(len(part)) - min(seam, reach)) / rate * 1e3, part, color="0.2", linewidth=0.8)
        ax.axvline(0, color="#b3400e", linestyle=":", linewidth=1.2)
        ax.set_title(name, fontsize=9)
        ax.set(yticks=[])
    axes[-1].set_xlabel("time from the seam (ms)")
    return figure


def trials_board(board: pd.DataFrame) -> Figure:
    """What each way of making speech audible costs the ear, against the whole decode.

    Args:
        board: from `trials.board`, ``whole`` among its rows.
    """
    rows = board.drop(index="whole").iloc[::-1]
    places = range(len(rows))
    figure, axes = plt.subplots(1, 3, figsize=(10, 0.32 * len(rows) + 1.4), sharey=True)
    for ax, name, scale in zip(axes[:2], ("wer", "plcmos"), (100, 1), strict=True):
        change, low, high = (scale * rows[f"{name}_{part}"] for part in ("change", "low", "high"))
        spread = np.clip([change - low, high - change], 0, None)
        ax.errorbar(change, places, xerr=spread, fmt="o", color="0.15", capsize=2, markersize=4)
    axes[2].plot(rows["dip"] - rows["reference_dip"], places, "D", color="0.15", markersize=4)
    titles = (
        "word error rate, change\n(percentage points)",
        "PLCMOS, change",
        "dip at the seams\nbeyond the speech's own (dB)",
    )
    for ax, title in zip(axes, titles, strict=True):
        ax.axvline(0, color="0.6", linewidth=0.8)
        ax.set_xlabel(title)
        ax.grid(axis="y", color="0.9")
    axes[0].set_yticks(places, rows.index)
    return figure


def training_curves(logs: Mapping[str, pd.DataFrame]) -> Figure:
    """What each stage of a voice's training logged over its minutes, on logarithmic axes.

    Args:
        logs: by stage, rows with ``seconds`` and losses; those on held-out sentences begin with ``held_out``.
    """
    figure, axes = plt.subplots(1, len(logs), figsize=(10, 3.2), squeeze=False)
    for ax, (stage, log) in zip(axes[0], logs.items(), strict=True):
        for number, name in enumerate(name for name in log if name not in ("step", "seconds")):
            unseen = name.startswith("held_out")
            style = {"color": f"C{number}", "linestyle": "-" if unseen else ":", "linewidth": 1.6 if unseen else 1.1}
            ax.plot(log["seconds"] / 60, log[name], label=name.replace("_", " "), **style)
        ax.set(title=stage, xlabel="minutes of training", ylabel="loss")
        log_scale(ax.yaxis)
        ax.legend(frameon=False, fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.22))
    return figure
