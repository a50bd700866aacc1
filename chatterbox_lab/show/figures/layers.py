"""What T3's layers take: by layer, by part of a step, and against sequence length (notebook 02)."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ..colors import AMBER, BLUE, PALE, RUST, SKY
from .style import legend_above

MODE_STYLES = {
    "released": {"color": "#111111", "marker": "P", "linestyle": ":"},
    "stock": {"color": RUST, "marker": "s", "linestyle": "-"},
    "layer": {"color": "#d9a520", "marker": "^", "linestyle": "-."},
    "off": {"color": SKY, "marker": "o", "linestyle": "-"},
    "probe": {"color": PALE, "marker": "D", "linestyle": "--"},
}
"""How each way to read the alignment is drawn, in every figure: they differ in hue, lightness and marker."""

PART_COLORS = {"attention": BLUE, "mlp": AMBER, "rest": "0.35", "model": "0.6", "sampling": "0.85"}
"""How the parts of a step are drawn: those of a layer (`study.layers.PARTS`), and what runs around the layers."""


def layer_heat_map(costs: pd.DataFrame, length: int, part: str = "attention") -> Figure:
    """Milliseconds of one part of each of T3's layers (across) in each mode (down), for both phases.

    Args:
        costs: from `study.layers.summary`, of one machine.
        length: one of its sequence lengths.
        part: ``attention``, ``mlp`` or ``rest``.
    """
    chosen = costs[(costs["layer"] >= 0) & (costs["part"] == part) & (costs["length"] == length)]
    modes = [mode for mode in MODE_STYLES if mode in set(chosen["mode"])]
    figure, axes = plt.subplots(2, 1, figsize=(8.5, 4.6), sharex=True)
    for ax, phase in zip(axes, ("prefill", "decode"), strict=True):
        rows = chosen[chosen["phase"] == phase]
        grid = 1e3 * rows.pivot_table(index="mode", columns="layer", values="seconds").loc[modes]
        label = {"label": "ms per layer"}
        sns.heatmap(grid, ax=ax, cmap="cividis_r", vmin=0, linewidths=0.5, cbar_kws=label, xticklabels=2)
        ax.set(title=f"{phase} at length {length}: {part} of each layer", xlabel="", ylabel="analyzer")
        ax.tick_params(axis="y", rotation=0)
    axes[-1].set_xlabel("layer of T3")
    return figure


def over_length(
    ax: Axes, values: pd.DataFrame, low: pd.DataFrame | None = None, high: pd.DataFrame | None = None
) -> None:
    """Draws values against sequence length, one line for each mode, on a logarithmic axis with a tick at each length.

    Args:
        ax: where to draw.
        values: from `study.layers.steps`, of one phase: lengths down, modes across.
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


def step_parts(machines: Mapping[str, pd.DataFrame], length: int) -> Figure:
    """Milliseconds of a whole step by part, stacked, for each mode and phase; two panels a machine.

    Args:
        machines: by name, from `study.layers.summary`.
        length: one of their sequence lengths.
    """
    size = (8.5, 2.4 * len(machines) + 0.8)
    figure, axes = plt.subplots(len(machines), 2, figsize=size, sharey="row", squeeze=False)
    for pair, (machine, costs) in zip(axes, machines.items(), strict=True):
        whole = costs[(costs["layer"] < 0) & (costs["length"] == length)]
        modes = [mode for mode in MODE_STYLES if mode in set(whole["mode"])]
        for ax, phase in zip(pair, ("prefill", "decode"), strict=True):
            rows = whole[whole["phase"] == phase]
            bars = 1e3 * rows.pivot_table(index="mode", columns="part", values="seconds").loc[modes, list(PART_COLORS)]
            bars.plot.barh(stacked=True, ax=ax, color=PART_COLORS, legend=False, edgecolor="white", width=0.75)
            ax.set(xlabel="ms per step", ylabel="analyzer")
            ax.set_title(f"{phase} at length {length}\n{machine}", fontsize=8)
        pair[0].invert_yaxis()
    legend_above(figure, axes[0, 0])
    return figure
