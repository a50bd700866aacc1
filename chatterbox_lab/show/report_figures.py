"""The figures of a diagnosis: where each stream's time goes, chunk sizes, and which attention each layer runs."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from io import BytesIO

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..study.diagnosed import NAMES, WHOLE, Numbers, chunk_sizes
from ..study.subject import EXACT, FASTEST, UPSTREAM
from .colors import AMBER, BLUE, GREY, PALE, RUST
from .figures.style import LEGEND, REAL_TIME, label_bar, log_scale, set_style

_PARTS = {"T3": BLUE, "S3Gen": AMBER, "watermark": GREY, "rest": "0.85"}
_LINES = {UPSTREAM: (RUST, "s", ":"), EXACT: (BLUE, "o", "-"), FASTEST: (AMBER, "^", "--")}


def pictures(n: Numbers, origin: str) -> dict[str, bytes]:
    """PNG files by name, of those figures that the rows bear, with their origin in small print."""
    found = {}
    with plt.rc_context():
        set_style()
        for name, draw in DRAWN.items():
            if (figure := draw(n)) is not None:
                small = textwrap.fill(origin, int(22 * figure.get_figwidth()))  # characters of 6 points in an inch
                figure.supxlabel(small, fontsize=6, color="0.35", x=0.01, ha="left")
                buffer = BytesIO()
                figure.savefig(buffer, format="png", dpi=120, metadata={"Description": origin})
                plt.close(figure)
                found[name] = buffer.getvalue()
    return found


def streams(n: Numbers) -> Figure | None:
    """Seconds of computing for a second of speech of each stream, by stage."""
    rows = n.rows("streams", "stream")
    rows = rows[rows["rtf"].notna()]
    if rows.empty:
        return None
    rows = rows.assign(variant=rows["variant"].mask(rows["chunk_size"] == 0, WHOLE))
    stages = {name: rows[f"{name.lower()}_seconds"] / rows["total_audio_duration"] for name in list(_PARTS)[:3]}
    parts = pd.DataFrame(stages).assign(rest=rows["rtf"] - sum(stages.values()), RTF=rows["rtf"])
    board = parts.groupby(rows["variant"]).median().reindex([name for name in NAMES if name in set(rows["variant"])])
    figure, ax = plt.subplots(figsize=(8.5, 0.5 * len(board) + 1.3))
    left = pd.Series(0.0, index=board.index)
    for part, color in _PARTS.items():
        width = board[part].clip(lower=0)
        ax.barh(range(len(board)), width, left=left, color=color, edgecolor="white", height=0.7, label=part)
        left += width
    if left.max() > 0.9:
        ax.axvline(1, **REAL_TIME, label="real time")
    for row, (rtf, end) in enumerate(zip(board["RTF"], left, strict=True)):
        label_bar(ax, row, end, f"{rtf:.2f}")
    ax.set_yticks(range(len(board)), [NAMES[name] for name in board.index])
    ax.invert_yaxis()
    ax.set(xlabel="RTF: seconds of computing for a second of speech", xlim=(0, 1.1 * left.max()))
    figure.legend(*ax.get_legend_handles_labels(), ncols=5, loc="outside upper center", **LEGEND)
    return figure


def sizes(n: Numbers) -> Figure | None:
    """RTF and first chunk against the chunk size; a hollow mark is a stream that underruns."""
    board = chunk_sizes(n)
    if board.empty:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.2))
    for ax, column in zip(axes, ("RTF", "first chunk (s)"), strict=True):
        for name, (color, marker, line) in _LINES.items():
            if name not in board.index.unique("stream"):
                continue
            mine = board.xs(name, level="stream").sort_index()
            ax.plot(mine.index, mine[column], color=color, linestyle=line, marker=marker, label=NAMES[name])
            late = mine[mine["underruns"] > 0]
            ax.plot(late.index, late[column], marker, color=color, markerfacecolor="white")
        log_scale(ax.xaxis)
        ticks = sorted(board.index.unique("chunk size"))
        ax.set_xticks(ticks, ticks)
        ax.set(xlabel="chunk size (tokens)", ylabel=column, ylim=(0, None))
    if axes[0].get_ylim()[1] > 0.8:
        axes[0].axhline(1, **REAL_TIME)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=3, loc="outside upper center", **LEGEND)
    return figure


def layers(n: Numbers) -> Figure | None:
    """Which attention each layer of T3 runs, in upstream's call and in ours; a number counts spies."""
    table = n.table[(n.table["part"] == "attention") & (n.table["name"] == "layer")]
    if table.empty:
        return None
    figure, ax = plt.subplots(figsize=(8.5, 1.9))
    rows = {UPSTREAM: "upstream's call", EXACT: "ours"}
    for row, name in enumerate(rows):
        for one in table[table["variant"] == name].to_dict("records"):
            color, hatch = (RUST, "") if one["manual"] else (PALE, "///")
            ax.add_patch(
                plt.Rectangle(
                    (one["layer"] + 0.04, row + 0.08), 0.92, 0.84, facecolor=color, hatch=hatch, edgecolor="white"
                )
            )
    for spied in n.rows("found", "spied_layer").to_dict("records"):
        ax.text(
            spied["layer"] + 0.5, 0.5, f"{spied['value']:.0f}", color="white", ha="center", va="center", weight="bold"
        )
    count = int(table["layer"].max()) + 1
    ax.set(xlim=(0, count), ylim=(2, 0), xlabel="layer of T3")
    ax.set_xticks([0.5 + layer for layer in range(0, count, 2)], range(0, count, 2))
    ax.set_yticks([0.5, 1.5], rows.values())
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    kinds = [
        Patch(facecolor=RUST, label="manual attention"),
        Patch(facecolor=PALE, hatch="///", edgecolor="white", label="SDPA"),
    ]
    told = "; a number: spies that earlier calls have left" if len(n.rows("found", "spied_layer")) else ""
    figure.legend(
        handles=kinds,
        ncols=2,
        loc="outside upper center",
        title=f"Which attention runs{told}",
        title_fontsize=8,
        **LEGEND,
    )
    return figure


DRAWN: dict[str, Callable[[Numbers], Figure | None]] = {"streams": streams, "layers": layers, "sizes": sizes}
"""The figures by their file's name without the ending."""
