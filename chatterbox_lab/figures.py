"""One style for every figure, readable in black and white, with what it was measured on inside the file."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import seaborn as sns
from IPython.display import Image
from matplotlib.figure import Figure

from .measure import machine_facts, output_folder, written_whole

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
