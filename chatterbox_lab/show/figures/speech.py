"""Speech of any length: what long texts cost, where in its text the speech is, how true the words' times are, and what
the guard does (notebook 08)."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ...engine.schedule import TOKEN_SECONDS
from ...study.trials import beside
from ...study.word_times import Followed
from ..colors import SEAM
from .style import LEGEND, LINES, TOKEN_MS, log_scale

_WAYS = {"at once": ("0.1", "-", "o"), "speak": ("0.45", "--", "s"), "one by one": ("0.7", ":", "D")}
_CHANGES = {"as many word errors": ("0.7", "."), "fewer": ("0.1", "v"), "more": ("0.1", "x")}


def errors_by_sentences(rates: pd.DataFrame, bounds: Mapping[str, pd.DataFrame] | None = None) -> Figure:
    """Word error rate over the number of sentences, a line for each way of speaking.

    Args:
        rates: from `study.paragraphs.by_sentences`: sentences by way.
        bounds: of a way, ``low`` and ``high`` by sentences, drawn as a band.
    """
    figure, ax = plt.subplots(figsize=(7, 3.6))
    for way in rates:
        shade, line, marker = _WAYS[way]
        ax.plot(rates.index, rates[way], line, color=shade, marker=marker, markersize=5, label=way)
        if bounds and way in bounds:
            ax.fill_between(bounds[way].index, bounds[way]["low"], bounds[way]["high"], color=shade, alpha=0.15)
    ax.set(xlabel="sentences of the text", ylabel="word error rate", ylim=(0, None), xticks=rates.index)
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.grid(axis="y", color="0.9")
    ax.legend(**LEGEND)
    return figure


def alignment_path(followed: Followed, rate: int) -> Figure:
    """Where the speech is in its text: the waveform with its words, and under it T3's attention with the path on it.

    Args:
        followed: from `study.word_times.follow`.
        rate: samples per second of its audio.
    """
    figure, (sound, ax) = plt.subplots(2, 1, figsize=(9, 5.2), sharex=True, height_ratios=[1, 2.4])
    wave, seconds = followed.audio[0].numpy(), len(followed.rows) * TOKEN_SECONDS
    sound.plot(np.arange(len(wave)) / rate, wave, color="0.55", linewidth=0.4, rasterized=True)
    top = np.abs(wave).max()
    for number, word in enumerate(followed.words):
        for panel in (sound, ax):
            panel.axvline(word.start, color=SEAM, linestyle=":", linewidth=0.8)
        place = (word.start + word.end) / 2, top * (1.15 + 0.4 * (number % 2))
        sound.text(*place, word.word, ha="center", size=8)
    sound.set(ylim=(-1.1 * top, 1.9 * top), ylabel="amplitude\n(1 is full scale)")
    length = followed.rows.shape[1]
    extent = (0, seconds, length - 0.5, -0.5)
    shown = ax.imshow(followed.rows.T, aspect="auto", cmap="Greys", extent=extent, vmin=0, vmax=1, interpolation="none")
    path, steps = followed.path, np.arange(len(followed.path) + 1) * TOKEN_SECONDS
    ax.step(steps, [*path, path[-1]], where="post", color=SEAM, label="the path")
    ax.set_yticks([word.first for word in followed.places], [word.word for word in followed.places], fontsize=8)
    ax.set(xlabel=f"time in the speech (s; a token is {TOKEN_MS:.0f} ms)", ylabel="text, token by token")
    ax.legend(loc="upper right", **LEGEND)
    figure.colorbar(shown, ax=[sound, ax], label="attention", fraction=0.03, pad=0.01)
    return figure


def time_errors(errors: Mapping[str, pd.DataFrame], most: float = 200.0) -> Figure:
    """How many words' times are off by how little, a panel for starts and one for ends.

    Args:
        errors: by name, rows with ``start_error`` and ``end_error`` in seconds.
        most: milliseconds at the right edge.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for ax, edge in zip(axes, ("start", "end"), strict=True):
        for (name, rows), line, shade in zip(errors.items(), LINES, ("0.1", "0.4", "0.65", "0.75"), strict=False):
            off = np.sort(1e3 * rows[f"{edge}_error"].dropna().abs())
            ax.step(off, np.arange(1, len(off) + 1) / len(off), line, where="post", color=shade, label=name)
        ax.axvline(TOKEN_MS, color=SEAM, linestyle=":", linewidth=1)
        ax.text(TOKEN_MS, 0.03, " a speech token", size=8, color=SEAM)
        ax.set(title=f"{edge} of a word", xlabel="off by at most (ms)", xlim=(0, most), ylim=(0, 1))
        ax.grid(color="0.92")
    axes[0].set_ylabel("share of words")
    axes[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes[1].legend(loc="lower right", **LEGEND)
    return figure


def guarded(table: pd.DataFrame, rules: Mapping[str, str]) -> Figure:
    """How long each text is spoken without the guard and with it, a panel for each of its rules.

    Below the line the guard has ended the speech, above it the speech was held back from ending; the mark says whether
    fewer or more word errors came of it.

    Args:
        table: rows of `study.trials.provoke`.
        rules: their titles, by the name in the table.
    """
    figure, axes = plt.subplots(1, len(rules), figsize=(4.5 * len(rules), 4), squeeze=False, sharex=True, sharey=True)
    both = {name: beside(table, name) for name in rules}
    lengths = TOKEN_SECONDS * pd.concat([some[["tokens", "tokens_before"]].clip(lower=1) for some in both.values()])
    ends = [0.8 * lengths.min().min(), 1.2 * lengths.max().max()]
    for ax, (name, title) in zip(axes[0], rules.items(), strict=True):
        _pairs(ax, both[name])
        ax.plot(ends, ends, color="0.5", linewidth=0.8, linestyle=":")
        for axis in (ax.xaxis, ax.yaxis):
            log_scale(axis)
        ax.set(title=title, xlabel="speech without the guard (s)", xlim=ends, ylim=ends)
        ax.legend(loc="lower right", **LEGEND)
    axes[0][0].set_ylabel("with the guard (s)")
    return figure


def _pairs(ax: Axes, both: pd.DataFrame) -> None:
    before, after = (TOKEN_SECONDS * both[name].clip(lower=1) for name in ("tokens_before", "tokens"))
    change = (both["errors"] - both["errors_before"]).to_numpy()
    for (name, (shade, marker)), chosen in zip(_CHANGES.items(), (change == 0, change < 0, change > 0), strict=True):
        label = f"{name}: {chosen.sum()}"
        places = pd.concat([before, after], axis=1)[chosen].drop_duplicates().to_numpy().T
        ax.plot(*places, marker, color=shade, markersize=5, label=label)
