"""What a listener could notice: the waveform around a seam, and what each way of rendering costs (notebook 05)."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..colors import SEAM


def seam_close_up(waves: Mapping[str, np.ndarray], seam: int, rate: int, around: float = 0.06) -> Figure:
    """The waveform around one seam, a row for each way of rendering, all to one scale.

    Args:
        waves: audio (samples,) by name, sample by sample the same speech.
        seam: the sample at which a chunk begins.
        rate: samples per second.
        around: seconds that are shown on either side.
    """
    figure, axes = plt.subplots(len(waves), 1, figsize=(8.5, 1.4 * len(waves)), sharex=True, sharey=True)
    reach = round(around * rate)
    for ax, (name, wave) in zip(axes, waves.items(), strict=True):
        part = wave[max(0, seam - reach) : seam + reach]
        ax.plot((np.arange(len(part)) - min(seam, reach)) / rate * 1e3, part, color="0.2", linewidth=0.8)
        ax.axvline(0, color=SEAM, linestyle=":", linewidth=1.2)
        ax.set_title(name, fontsize=9)
    figure.supylabel("amplitude (1 is full scale)", fontsize=9)
    axes[-1].set_xlabel("time from the seam (ms)")
    return figure


def trials_board(board: pd.DataFrame) -> Figure:
    """How each way of rendering changes what a recogniser and a quality model say, and how deep its seams dip.

    Args:
        board: from `study.trials.board`, which has the row ``whole``, the decode of the whole utterance that all
            others are compared with. Lines span the 5th to the 95th percentile.
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
        "word error rate, change\n(percentage points; less is better)",
        "PLCMOS, change\n(points of 1 to 5; more is better)",
        "level at the seams, change\n(dB; below 0 it dips)",
    )
    for ax, title in zip(axes, titles, strict=True):
        ax.axvline(0, color="0.6", linewidth=0.8)
        ax.set_xlabel(title)
        ax.grid(axis="y", color="0.9")
    axes[0].set_yticks(places, rows.index)
    return figure
