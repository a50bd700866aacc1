"""How a voice learned (notebook 05)."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from .style import LEGEND, MARKERS, log_scale


def training_curves(logs: Mapping[str, pd.DataFrame]) -> Figure:
    """What each stage of a voice's training logged over its minutes, on logarithmic axes.

    Args:
        logs: by stage, rows with ``seconds`` and losses; the losses of held-out sentences begin with ``held_out``.
    """
    figure, axes = plt.subplots(1, len(logs), figsize=(10, 3.4), squeeze=False)
    for ax, (stage, log) in zip(axes[0], logs.items(), strict=True):
        names = [name for name in log if name not in ("step", "seconds")]
        for name, shade, marker in zip(names, sns.color_palette("cividis", len(names)), MARKERS, strict=False):
            held_out = name.startswith("held_out")
            line, width = ("-", 1.6) if held_out else (":", 1.1)
            places = {"marker": marker, "markersize": 4, "markevery": max(1, len(log) // 6)}
            label = name.replace("_", " ")
            ax.plot(log["seconds"] / 60, log[name], line, color=shade, linewidth=width, label=label, **places)
        ax.set(title=stage, xlabel="minutes of training", ylabel="loss")
        log_scale(ax.yaxis)
        ax.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.25), **LEGEND)
    return figure
