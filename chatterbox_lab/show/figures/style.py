"""The look of every figure, and the way it is saved: with what it was measured on in small print and metadata."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import PIL.Image
import seaborn as sns
from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from PIL.PngImagePlugin import PngInfo

from ...engine.schedule import TOKEN_SECONDS
from ...files import written_whole
from ...study.machine import in_words, machine_facts
from ...study.records import output_folder

MARKERS = "osD^vPX"
LINES = ("-", "--", "-.", ":")
LEGEND = {"frameon": False, "fontsize": 8}
REAL_TIME = {"color": "0.4", "linestyle": ":"}
"""How the line is drawn at which work takes as long as its speech lasts."""
TOKEN_MS = 1e3 * TOKEN_SECONDS
"""Milliseconds of speech in a token."""

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
            "machine": in_words(facts),
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
        origin: from `provenance` or `origin`.

    Returns:
        The path of the PNG.
    """
    line = " | ".join(f"{key}: {value}" for key, value in origin.items())
    small_print = textwrap.fill(line, int(22 * figure.get_figwidth()))  # characters of 6 points in an inch
    figure.supxlabel(small_print, fontsize=6, color="0.35", x=0.01, ha="left")
    folder = output_folder("figures")
    with written_whole(folder / f"{name}.svg") as part, StringIO() as drawn:
        figure.savefig(drawn, format="svg", metadata={"Description": line, "Date": None})
        part.write_text(in_few_digits(drawn.getvalue()), encoding="utf-8")
    with written_whole(folder / f"{name}.png") as part, BytesIO() as drawn:
        figure.savefig(drawn, format="png")
        _in_few_colours(PIL.Image.open(drawn), part, line)
    plt.close(figure)
    return folder / f"{name}.png"


def in_few_digits(svg: str) -> str:
    """An SVG with places to a hundredth of a point, without indents: half as large, and nothing moves that one sees."""
    places = r'\b(?:d|x|y|transform)="[^"]*"'
    rounded = re.sub(places, lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), svg)
    return re.sub(r"^ +", "", rounded, flags=re.MULTILINE)


def _in_few_colours(picture: PIL.Image.Image, path: Path, description: str) -> None:
    """Writes a PNG with a palette of 256 colours, a third as large: notebooks carry it, too."""
    about = PngInfo()
    about.add_text("Description", description)
    few = picture.convert("RGB").quantize(256, dither=PIL.Image.Dither.NONE)
    few.save(path, format="png", optimize=True, dpi=picture.info["dpi"], pnginfo=about)


def show(figure: Figure, name: str, origin: dict[str, str]) -> Image:
    """Saves a figure (see `save`) and returns the picture that was written, for the end of a cell."""
    width = int(figure.get_figwidth() * 100)
    return Image(filename=str(save(figure, name, origin)), width=width)


def log_scale(axis: Axis) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def label_bar(ax: Axes, row: int, end: float, text: str) -> None:
    """Writes text beside the end of a horizontal bar, readable where a line crosses it."""
    plain = {"boxstyle": "square,pad=0.1", "facecolor": "white", "linewidth": 0}
    ax.annotate(text, (end, row), (4, 0), textcoords="offset points", va="center", size=8, bbox=plain)


def legend_above(figure: Figure, ax: Axes, names: Mapping[str, str] | None = None) -> None:
    """One legend for all panels, in a line above them; ``names`` replaces labels."""
    handles, labels = ax.get_legend_handles_labels()
    shown = [(names or {}).get(label, label) for label in labels]
    figure.legend(handles, shown, ncols=len(shown), loc="outside upper center", **LEGEND)
