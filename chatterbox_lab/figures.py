"""One style for every figure, readable in black and white, with what it was measured on inside the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .measure import machine_facts, output_folder, written_whole

COLORS = sns.color_palette("colorblind")
STOCK, OURS, OTHER = COLORS[3], COLORS[0], COLORS[7]
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


@contextmanager
def style() -> Iterator[None]:
    """The lab's look for figures made inside."""
    with sns.axes_style("ticks"), sns.plotting_context("notebook", font_scale=0.9), plt.rc_context(_RC):
        yield


def subplots(rows: int = 1, columns: int = 1, **kwargs: Any) -> tuple[Figure, Any]:
    """``plt.subplots`` in the lab's style."""
    with style():
        return plt.subplots(rows, columns, **kwargs)


def provenance(model: str, device: str = "cpu") -> dict[str, str]:
    """What a figure was measured on, as it stands in the small print: model, machine, versions, commit, date."""
    facts = machine_facts(device)
    return {
        "model": model,
        "machine": f"{facts['machine']}, {facts['cores']} cores" if facts["device"] == "cpu" else facts["machine"],
        "versions": f"torch {facts['torch']}, transformers {facts['transformers']}",
        "commit": facts["commit"],
        "date": facts["date"],
    }


def save(figure: Figure, name: str, origin: dict[str, str]) -> list[Path]:
    """Writes ``figures/name.png`` and ``.svg``, whole or not at all, with their origin in small print and metadata.

    Args:
        figure: what was drawn.
        name: starts with the notebook's number and says what is seen, such as ``01_spies``.
        origin: from `provenance`.
    """
    line = " | ".join(f"{key}: {value}" for key, value in origin.items())
    figure.supxlabel(line, fontsize=6, color="0.35", x=0.01, ha="left")
    paths = []
    with style():
        for kind, metadata in (("png", {"Description": line}), ("svg", {"Description": line, "Date": None})):
            path = output_folder("figures") / f"{name}.{kind}"
            with written_whole(path) as part:
                figure.savefig(part, format=kind, metadata=metadata)
            paths.append(path)
    return paths


def label_bars(axes: Axes, form: str = "{:.2f}") -> None:
    """Writes its value at the end of every bar, so that no reader needs the grid."""
    for container in axes.containers:
        if hasattr(container, "patches"):
            axes.bar_label(container, fmt=form, padding=3, fontsize=8)
