"""The explorer's form: a table of fields, and the controls that are made from it."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import ipywidgets as widgets

from ..engine.schedule import SCHEDULES
from ..engine.settings import FLOW_DTYPES, FLOWS, WEIGHTS, StreamSettings
from ..engine.t3.backends import ANALYZERS, AUTO, BACKENDS
from ..files import LAB_VOICE
from ..voices.load import MODELS

GIVEN = "as given"
"""The name of the model that `Explorer` was given."""
STANDARD = StreamSettings(chunk_size=25, context_window=50)
"""What the fields say at first."""
TEXT = "The quick brown fox reads a long sentence to the lazy dog."

_NAMES = [field.name for field in fields(StreamSettings)]
_TOKEN = "speech tokens; 25 are one second"
_COLUMN = widgets.Layout(min_width="400px", flex="1 1 400px")


@dataclass(frozen=True)
class Field:
    """One field of the form.

    Args:
        name: of the setting, or of an argument of `generate_stream`.
        kind: ``number`` (a slider and a box), ``choice`` (a list), ``lines`` (a text) or ``name`` (a list, or typed).
        allowed: least, most and step of a slider, whose box takes any number; the choices of a list.
        label: what stands before the control.
        tip: what it says when the mouse rests on it.
        value: at first; None is that of `STANDARD`.
    """

    name: str
    kind: str
    allowed: tuple[Any, ...]
    label: str
    tip: str
    value: Any = None


SPEECH = (
    Field("text", "lines", (), "Text", "What to say", TEXT),
    Field("model", "name", MODELS, "Model", "A name from the list or the path of a folder; loaded at first use", "lab"),
    Field("seed", "number", (0, 99, 1), "Seed", "The same seed and settings give the same tokens and audio", 0),
    Field("max_new_tokens", "number", (25, 1000, 25), "Length (tokens)", f"The most {_TOKEN}", 150),
    Field("temperature", "number", (0, 2, 0.05), "Temperature", "Of the sampling: 0 is greedy"),
    Field("cfg_weight", "number", (0, 2, 0.05), "CFG weight", "Classifier-free guidance: 0 is none"),
    Field("exaggeration", "number", (0, 2, 0.05), "Exaggeration", "Of the emotion: 0.5 is neutral"),
    Field("flow_steps", "number", (1, 20, 1), "Euler steps", "Of S3Gen, from noise to mel; upstream takes 10"),
    Field("prompt_tokens", "number", (0, 250, 5), "Voice prompt", f"The last of it that S3Gen gets, in {_TOKEN}"),
)  # fmt: skip
STREAMING = (
    Field("chunk_size", "number", (1, 200, 1), "Chunk (tokens)", f"New in each chunk, in {_TOKEN}"),
    Field("context_window", "number", (0, 400, 1), "Context (tokens)", f"Rendered again before the chunk, in {_TOKEN}"),
    Field("schedule", "choice", tuple(SCHEDULES), "Schedule", "How chunk sizes follow one another"),
    Field("max_chunk_size", "number", (1, 500, 1), "Largest (tokens)", f"Chunk of the schedule 'grow', in {_TOKEN}"),
    Field("backend", "choice", (AUTO, *BACKENDS), "Backend", "What runs T3; 'auto' takes the fastest exact one"),
    Field("weights", "choice", WEIGHTS, "T3 weights", "Of the decode steps; int8 needs the backend 'static' on a CPU"),
    Field("flow", "choice", FLOWS, "S3Gen", "'window' renders the context again, 'cached' computes each frame once"),
    Field("flow_dtype", "choice", FLOW_DTYPES, "S3Gen in", "The dtype of its products; bfloat16 rounds differently"),
    Field("vocoder_dtype", "choice", FLOW_DTYPES, "Vocoder in", "On a CPU: its residual blocks, most of its work"),
    Field("analyzer", "choice", tuple(ANALYZERS), "Analyzer", "How T3's alignment is read"),
)  # fmt: skip


class Form(widgets.HBox):
    """Two columns of controls; below each is room for what is wrong with its value.

    ``controls`` and ``errors`` hold widgets by the name of the field.

    Args:
        model: the name that is chosen at first; `GIVEN` is added to the list for it.
        on_change: called after any value has changed.
    """

    def __init__(self, model: str, on_change: Callable[[], object]) -> None:
        self.controls: dict[str, Any] = {}
        self.errors: dict[str, widgets.HTML] = {}
        self._hidden: dict[str, Any] = {}  # settings without a control, which a recommendation brought
        columns = [
            widgets.VBox([self._made(field) for field in column], layout=_COLUMN) for column in (SPEECH, STREAMING)
        ]
        super().__init__(columns, layout=widgets.Layout(flex_flow="row wrap", grid_gap="0 16px"))
        names = [name for name in MODELS if name != "lab" or LAB_VOICE.is_dir()]
        self.controls["model"].options = [*([GIVEN] if model == GIVEN else []), *names]
        self.controls["model"].value = model
        for control in self.controls.values():
            control.observe(lambda _: on_change(), "value")

    def __getitem__(self, name: str) -> Any:
        """The value of a field."""
        return self.controls[name].value

    def settings(self) -> StreamSettings:
        """What the fields say. Raises ValueError, naming the field."""
        return StreamSettings(**self._hidden | {name: self[name] for name in self.controls if name in _NAMES})

    def fill(self, settings: StreamSettings) -> None:
        """Puts settings into the fields, and keeps those that have none."""
        for name in _NAMES:
            if name in self.controls:
                self.controls[name].value = getattr(settings, name)
            else:
                self._hidden[name] = getattr(settings, name)

    def clear_errors(self) -> None:
        """Takes all messages away."""
        for error in self.errors.values():
            error.value, error.layout.display = "", "none"

    def complain(self, message: str) -> bool:
        """Says what is wrong below the field that the message names; whether it names one."""
        named = re.match(r"(\w+)(?:=| of )", message)
        if named is None or named[1] not in self.errors:
            return False
        below = self.errors[named[1]]
        style = "color: var(--jp-error-color1, #b00020); line-height: 1.35"
        below.value = f'<div role="alert" style="{style}">{html.escape(message)}</div>'
        below.layout.display = ""
        return True

    def _made(self, field: Field) -> widgets.VBox:
        value = getattr(STANDARD, field.name) if field.value is None else field.value
        parts = _MAKERS[field.kind](value, field)
        self.controls[field.name] = parts[-1]  # of slider and box, the box counts
        parts[0].description, parts[0].style = field.label, {"description_width": "136px"}
        parts[0].layout = widgets.Layout(width="auto", flex="1 1 auto", margin="2px 0")
        for part in parts:
            part.tooltip = field.tip
        error = widgets.HTML(layout=widgets.Layout(display="none", margin="0 0 6px 146px"))
        self.errors[field.name] = error
        made = widgets.VBox([widgets.HBox(parts), error])
        made.add_class(f"cbl-field-{field.name}")
        return made


def _number(value: float, field: Field) -> Sequence[Any]:
    """A slider for the usual values, and a box that takes any number and is the one that counts."""
    least, most, step = field.allowed
    whole = isinstance(value, int)
    box = (widgets.IntText if whole else widgets.FloatText)(value, layout={"width": "72px"})

    def within(number: float) -> float:
        return max(least, min(most, number))

    kind = widgets.IntSlider if whole else widgets.FloatSlider
    slider = kind(value=within(value), min=least, max=most, step=step, readout=False)

    def from_box(change: Any) -> None:
        slider.value = within(change.new)

    def from_slider(change: Any) -> None:
        # The page moves a slider to its nearest step and reports that, too: only a whole step is the user's.
        if abs(change.new - within(box.value)) > 0.6 * step:
            box.value = round(change.new, 6)  # steps add up to 0.6000000000000001

    box.observe(from_box, "value")
    slider.observe(from_slider, "value")
    return slider, box


_MAKERS: dict[str, Callable[[Any, Field], Sequence[Any]]] = {
    "number": _number,
    "choice": lambda value, field: (widgets.Dropdown(options=field.allowed, value=value),),
    "lines": lambda value, _: (widgets.Textarea(value, rows=3, continuous_update=False),),
    "name": lambda value, field: (widgets.Combobox(value=value, options=field.allowed, continuous_update=False),),
}
