"""What today's releases do to a process, and what they cost (notebook 07)."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..colors import AMBER, BLUE, RUST, SKY

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
    figure, axes = plt.subplots(1, len(variants), figsize=(8.5, 2.4), sharey=True, sharex=True)
    for ax, variant in zip(axes, variants, strict=True):
        rows = table.loc[variant]
        ax.barh(rows.index, rows["ms/token"], color=[WAY_COLORS[way] for way in rows.index])
        for place, (_, row) in enumerate(rows.iterrows()):
            ax.text(row["ms/token"], place, f" {row['faster']:.1f}x", va="center", fontsize=8)
        ax.set(title=variant, xlabel="ms a token (T3)")
        ax.margins(x=0.18)
    axes[0].invert_yaxis()
    return figure
