"""What today's releases do to a process, and what they cost (notebook 07)."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ...study.living_streams import EXACT, FASTEST, PARTS, STOCK, WHOLE
from ..colors import AMBER, BLUE, GREY, RUST, SKY

WAY_COLORS = {"release": RUST, "hf": SKY, "static": BLUE, "int8": AMBER}
"""How each way to decode is drawn."""


def left_by_calls(table: pd.DataFrame) -> Figure:
    """A field a call: dark where all layers ran manual attention; the number is the hooks that are on the layers then.

    Args:
        table: from `study.living.after_calls`.
    """
    rows = table.assign(share=table["manual"] / (table["manual"] + table["sdpa"]))
    grids = {"columns": ["way", "call"], "index": ["release", "transformers", "variant"], "sort": False}
    shares, hooks = (rows.pivot_table(values=name, **grids) for name in ("share", "hooks"))
    figure, ax = plt.subplots(figsize=(8, 0.9 + 0.42 * len(shares)))
    ax.imshow(shares, cmap="Greys", vmin=-0.1, vmax=1.2, aspect="auto")
    for (row, column), count in np.ndenumerate(hooks.to_numpy()):
        dark = shares.iloc[row, column] > 0.5
        ax.text(column, row, int(count), ha="center", va="center", color="white" if dark else "black")
    names = [f"{release}, {variant}, transformers {version}" for release, version, variant in shares.index]
    ax.set_yticks(range(len(names)), names, fontsize=8)
    calls = [f"{'its own' if way == 'release' else 'ours'} {call}" for way, call in shares.columns]
    ax.set_xticks(range(len(calls)), calls, fontsize=8)
    ax.axvline(2.5, color="white", linewidth=4)
    ax.set(title="Manual attention (dark) or SDPA, and hooks left", xlabel="call")
    ax.tick_params(length=0)
    return figure


def decode_costs(table: pd.DataFrame) -> Figure:
    """Milliseconds a token of each way to decode, and how many times faster than the release it is.

    Args:
        table: from `study.living.costs`.
    """
    variants = table.index.unique("variant")
    figure, axes = plt.subplots(1, len(variants), figsize=(10, 2.4), sharey=True, sharex=True)
    for ax, variant in zip(axes, variants, strict=True):
        rows = table.loc[variant]
        ax.barh(rows.index, rows["ms/token"], color=[WAY_COLORS[way] for way in rows.index])
        for place, (_, row) in enumerate(rows.iterrows()):
            ax.text(row["ms/token"], place, f" {row['faster']:.1f}x", va="center", fontsize=8)
        ax.set(title=variant, xlabel="ms a token (T3)")
        ax.margins(x=0.18)
    axes[0].invert_yaxis()
    return figure


STREAMS = {
    (STOCK, 0): "its own call, whole",
    (EXACT, WHOLE): "ours, whole, same sound",
    (FASTEST, 50): "ours, fastest, chunks of 50",
    (FASTEST, 25): "ours, fastest, chunks of 25",
}
"""The ways of a board that `real_time` draws, and how it calls them."""


def real_time(board: pd.DataFrame) -> Figure:
    """Seconds a second of speech by part, a field a model, each with a scale of its own; the line is real time.

    Args:
        board: from `study.living_streams.board`.
    """
    variants = board.index.unique("variant")
    figure, axes = plt.subplots(1, len(variants), figsize=(10, 2.6), sharey=True)
    for ax, variant in zip(np.atleast_1d(axes), variants, strict=True):
        rows = board.loc[variant].loc[list(STREAMS)]
        left = np.zeros(len(rows))
        for part, color, name in zip(PARTS, (BLUE, AMBER, GREY), ("T3", "S3Gen", None), strict=True):
            ax.barh(range(len(rows)), rows[part], left=left, color=color, label=name)
            left += rows[part].to_numpy()
        ax.axvline(1, color="black", linewidth=1, linestyle="--", zorder=3)
        for place, rtf in enumerate(rows["RTF"]):
            behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            ax.text(rtf, place, f" {rtf:.2f}", va="center", fontsize=8, bbox=behind, zorder=4)
        ax.set(title=variant, xlabel="s a second of speech (RTF)")
        ax.margins(x=0.2)
    first = np.atleast_1d(axes)[0]
    first.set_yticks(range(len(STREAMS)), list(STREAMS.values()), fontsize=8)
    first.invert_yaxis()
    first.legend(fontsize=8, loc="lower right")
    return figure
