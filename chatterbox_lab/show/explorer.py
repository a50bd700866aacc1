"""The widgets of notebook 03: type, choose, hear it while it is made, and compare the last runs by ear.

Whatever is slow runs in a thread; whatever is wrong with a value is said beside its field, in the package's own words.
"""

from __future__ import annotations

import html
import re
import threading
import weakref
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import ipywidgets as widgets
from chatterbox.tts import ChatterboxTTS

from ..engine.clock import Measured
from ..engine.settings import ANALYZERS, BACKENDS, FLOW_DTYPES, FLOWS, SCHEDULES, WEIGHTS, StreamSettings
from ..engine.stream import checked, generate_stream
from ..voices.load import MODELS, load
from .player import Player, front_end

GIVEN = "as given"
"""The name of the voice that `Explorer` was given."""
KEPT = 4
TARGETS = ("balanced", "latency", "rtf")
_TEXT = "The quick brown fox reads a long sentence to the lazy dog."
_STANDARD = StreamSettings(chunk_size=25, context_window=50, backend="static")
_TOKEN = "speech tokens; 25 are one second"
_LABEL = {"description_width": "136px"}
_COLUMN = widgets.Layout(min_width="400px", flex="1 1 400px")


class Explorer(widgets.VBox):
    """Text, voice and every setting of a stream, with a `Player`; display it as the last expression of a cell.

    Tests and notebooks reach the same things as the mouse: ``controls`` and ``errors`` by the name of the setting,
    ``status``, ``player`` (the newest run), ``kept`` (earlier ones), and the methods of the buttons.

    Args:
        tts: the first voice; None begins with the name ``voice``, loaded at the first run.
        voice: a name that `load` takes, chosen at the beginning if no ``tts`` is given.
        device: where voices are loaded, as for `load`.
    """

    _generation = threading.Lock()  # of the process: a model runs one stream at a time, whoever asks
    _newest: weakref.ref[Explorer] | None = None

    def __init__(self, tts: ChatterboxTTS | None = None, *, voice: str = "lab", device: str = "auto") -> None:
        if Explorer._newest is not None and Explorer._newest() is not None:
            Explorer._newest().stop()  # its cell was run again, and its Stop button is gone
        Explorer._newest = weakref.ref(self)
        self.tts, self.voice, self.device = tts, None if tts is None else GIVEN, device
        self._given = tts
        self._thread: threading.Thread | None = None
        self._hidden: dict[str, Any] = {}  # settings without a control that a recommendation brought
        self.controls: dict[str, Any] = {}
        self.errors: dict[str, widgets.HTML] = {}
        self.status = widgets.HTML(layout=widgets.Layout(margin="4px 0"))
        self.player = Player(on_end=self._ended)
        self._stage, self._shelf = widgets.VBox([self.player]), widgets.VBox()
        self._stage.add_class("cbl-newest")
        form = widgets.HBox(
            [self._speech(voice), self._streaming()], layout=widgets.Layout(flex_flow="row wrap", grid_gap="0 16px")
        )
        super().__init__([form, self._buttons(), self.status, self._stage, self._shelf])
        self.layout = widgets.Layout(max_width="960px")
        for control in self.controls.values():
            control.observe(lambda _: self.check(), "value")
        self.check()

    def __repr__(self) -> str:
        return "Explorer: sliders and a player; open this notebook with `make lab` to use them."

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        if front_end():
            return super()._repr_mimebundle_(**kwargs)
        return {"text/plain": repr(self)}

    @property
    def kept(self) -> list[Player]:
        """Earlier runs, the newest first."""
        return [row.children[0] for row in self._shelf.children]

    # What is on the page.

    def _speech(self, voice: str) -> widgets.VBox:
        voices = [*([GIVEN] if self.tts is not None else []), *(name for name in MODELS if _present(name))]
        return widgets.VBox([
            self._field("text", widgets.Textarea(_TEXT, rows=3, continuous_update=False), "Text", "What to say"),
            self._field(
                "voice",
                widgets.Combobox(value=self.voice or voice, options=voices, continuous_update=False),
                "Voice", "A name from the list or the path of a voice folder; loaded when it is first used",
            ),
            self._number("seed", 0, (0, 99, 1), "Seed", "The same seed and settings give the same tokens and audio"),
            self._number(
                "max_new_tokens", 150, (25, 1000, 25), "Length (tokens)",
                "The most speech tokens, 25 a second: 150 are 6 s. Random weights never stop by themselves.",
            ),
            self._number("temperature", 0.8, (0, 2, 0.05), "Temperature", "Of the sampling: 0 is greedy"),
            self._number("cfg_weight", 0.5, (0, 2, 0.05), "CFG weight", "Classifier-free guidance: 0 is none"),
            self._number("exaggeration", 0.5, (0, 2, 0.05), "Exaggeration", "Of the emotion: 0.5 is neutral"),
            self._number("flow_steps", None, (1, 20, 1), "Euler steps", "Of S3Gen, from noise to mel; stock: 10"),
            self._number("prompt_tokens", None, (0, 250, 5), "Voice prompt", f"Its last ones, for S3Gen, in {_TOKEN}"),
        ], layout=_COLUMN)  # fmt: skip

    def _streaming(self) -> widgets.VBox:
        return widgets.VBox([
            self._number("chunk_size", None, (1, 200, 1), "Chunk (tokens)", f"New in each chunk, in {_TOKEN}"),
            self._number("context_window", None, (0, 400, 1), "Context (tokens)", f"Synthesised again, in {_TOKEN}"),
            self._choice("schedule", SCHEDULES, "Schedule", "How chunk sizes follow one another"),
            self._number("max_chunk_size", None, (1, 500, 1), "Largest (tokens)", f"Of 'grow', in {_TOKEN}"),
            self._choice("backend", BACKENDS, "Backend", "What runs T3"),
            self._choice("weights", WEIGHTS, "T3 weights", "Of the decode steps; int8 needs 'static' on a CPU"),
            self._choice("flow", FLOWS, "S3Gen", "What it does about the past: 'cached' computes each frame once"),
            self._choice("flow_dtype", FLOW_DTYPES, "S3Gen in", "Of its products; bfloat16 rounds otherwise"),
            self._choice("analyzer", ANALYZERS, "Analyzer", "How T3's alignment is read; maps need backend 'hf'"),
        ], layout=_COLUMN)  # fmt: skip

    def _buttons(self) -> widgets.HBox:
        def button(text: str, action: Callable[[], object], tip: str, **style: Any) -> widgets.Button:
            made = widgets.Button(description=text, tooltip=tip, layout=widgets.Layout(width="120px"), **style)
            made.on_click(lambda _: action())
            return made

        self.target = widgets.Dropdown(
            options=TARGETS, tooltip="What the recommendation is for", layout=widgets.Layout(width="110px")
        )
        gap = widgets.Box(layout=widgets.Layout(flex="1 1 auto"))
        return widgets.HBox([
            button("Generate", self.generate, "Speak the text with these settings", button_style="primary"),
            button("Stop", self.stop, "End the sound at once and generation at the end of its chunk"), gap,
            button("Recommend", self.recommend, "Measure this machine for some seconds and fill in what suits it"),
            widgets.Label("for"), self.target,
        ], layout=widgets.Layout(margin="8px 0 0 0", flex_flow="row wrap"))  # fmt: skip

    def _field(self, name: str, control: Any, label: str, tip: str, *more: Any) -> widgets.VBox:
        control.description, control.tooltip, control.style = label, tip, _LABEL
        self.controls.setdefault(name, control)
        self.errors[name] = widgets.HTML(layout=widgets.Layout(display="none", margin="0 0 6px 146px"))
        control.layout = widgets.Layout(width="auto", flex="1 1 auto", margin="2px 0")
        field = widgets.VBox([widgets.HBox([control, *more]), self.errors[name]])
        field.add_class(f"cbl-field-{name}")
        return field

    def _number(self, name: str, value: Any, span: tuple, label: str, tip: str) -> widgets.VBox:
        """A slider for the usual values, and a box that takes any number and is the one that counts."""
        value = getattr(_STANDARD, name) if value is None else value
        whole = isinstance(value, int)
        box = (widgets.IntText if whole else widgets.FloatText)(value, tooltip=tip, layout={"width": "72px"})
        least, most, step = span
        clipped = max(least, min(most, value))
        kind = widgets.IntSlider if whole else widgets.FloatSlider
        slider = kind(value=clipped, min=least, max=most, step=step, readout=False)

        def from_box(change: Any) -> None:
            slider.value = max(least, min(most, change.new))

        def from_slider(change: Any) -> None:
            # The page moves a slider to its nearest step and reports that, too: only a whole step is the user's.
            if abs(change.new - max(least, min(most, box.value))) > 0.6 * step:
                box.value = round(change.new, 6)  # steps add up to 0.6000000000000001

        box.observe(from_box, "value")
        slider.observe(from_slider, "value")
        self.controls[name] = box
        return self._field(name, slider, label, tip, box)

    def _choice(self, name: str, options: tuple[str, ...], label: str, tip: str) -> widgets.VBox:
        return self._field(name, widgets.Dropdown(options=options, value=getattr(_STANDARD, name)), label, tip)

    # What the buttons do.

    def check(self) -> bool:
        """Whether all values are allowed; what is wrong is said beside its field."""
        for error in self.errors.values():
            error.value, error.layout.display = "", "none"
        settings, right, value = _STANDARD, True, self._value
        try:
            settings = self.settings()
        except ValueError as error:
            right = self._complain(error)
        try:
            if self.tts is not None:
                checked(self.tts, value("text"), settings, {}, value("seed"), value("max_new_tokens"))
        except ValueError as error:
            right = self._complain(error)
        return right

    def settings(self) -> StreamSettings:
        """What the fields say. Raises ValueError, naming the field."""
        names = {field.name for field in fields(StreamSettings)}
        chosen = {name: control.value for name, control in self.controls.items() if name in names}
        return StreamSettings(**self._hidden | chosen)

    def generate(self) -> None:
        """Starts a run in the player's thread, unless a value is wrong or something runs already; the last is kept."""
        if not self.check():
            return self._say("Nothing was started: a value needs another look.")
        if not self._claim():
            return None
        try:
            settings, value = self.settings(), self._value
            self._make_room()
            self.player.title = _title(value("voice"), settings, value("seed"))
            self.player.start(
                self._speak(value("voice"), value("text"), settings, value("seed"), value("max_new_tokens"))
            )
        except BaseException:  # an interrupt, too: the next click has to find everything usable
            self._generation.release()
            raise
        return None

    def stop(self) -> None:
        """Ends the sound at once and generation at the end of its chunk; harmless when nothing runs."""
        self.player.stop()

    def recommend(self) -> None:
        """Measures, in a thread, what suits this machine and the chosen target, and fills it in."""
        if self.check() and self._claim():
            self._say(f"Measuring this machine for {self.target.value!r}; this takes some seconds.")
            arguments = (self._value("voice"), self.target.value, self.settings())
            self._thread = threading.Thread(target=self._advise, args=arguments, daemon=True)
            self._thread.start()

    def remove(self, player: Player) -> None:
        """Takes a kept run off the page."""
        row = next(row for row in self._shelf.children if row.children[0] is player)
        self._shelf.children = [other for other in self._shelf.children if other is not row]
        for part in (*row.children, row):  # an open row with a closed player would break a reloaded page
            part.close()

    def _claim(self) -> bool:
        free = self._generation.acquire(blocking=False)
        if not free:
            self._say(f"Still at work: wait until it is done{', or click Stop' * self.player.generating}.")
        return free

    def _speak(self, voice: str, text: str, settings: StreamSettings, seed: int, max_new_tokens: int) -> Measured:
        try:
            tts = self._load(voice)
            self._say("Generating.")
            trained = getattr(getattr(tts, "config", None), "trained", True)
            settings = settings.replace(ignore_eos=not trained)  # random weights stop anywhere
            yield from generate_stream(tts, text, settings, seed=seed, max_new_tokens=max_new_tokens)
        finally:
            self._generation.release()

    def _advise(self, voice: str, target: str, settings: StreamSettings) -> None:
        try:
            from ..study.costs import recommend  # it measures, and so imports what nobody needs for listening

            advice = recommend(self._load(voice), target, settings=settings)
            self._fill(advice)
            self._say(advice.reason)
        except Exception as error:  # nobody would see it raised in a thread
            self._complain(error)
        finally:
            self._generation.release()

    def _fill(self, settings: StreamSettings) -> None:
        for name in {field.name for field in fields(StreamSettings)}:
            if name in self.controls:
                self.controls[name].value = getattr(settings, name)
            else:
                self._hidden[name] = getattr(settings, name)

    def _load(self, name: str) -> ChatterboxTTS:
        if self.tts is None or name != self.voice:
            self._say(f"Loading the voice {name!r}.")
            try:
                tts = self._given if name == GIVEN and self._given is not None else load(name, device=self.device)
            except Exception as error:  # files of a voice fail in as many ways as there are formats
                raise ValueError(f"voice={name!r}: {str(error).removeprefix(f'model={name!r}: ')}") from error
            self.tts, self.voice = tts, name  # only now: a voice that fails leaves the old one
        return self.tts

    def _ended(self, player: Player) -> None:
        if player.error is not None:
            self._complain(player.error)
        elif player.chunks:
            self._say(f"{player.state.capitalize()}: {_outcome(player)}.")
        else:
            self._say(f"{player.state.capitalize()}: no audio.")

    # Runs that stay, and messages.

    def _make_room(self) -> None:
        last, self.player = self.player, Player(on_end=self._ended)
        self._stage.children = [self.player]
        if last.chunks:
            underruns = f"{last.underruns} underrun{'s' * (last.underruns != 1)}"
            last.title, last.compact = f"{last.title}\n{_outcome(last)}, {underruns}", True
            self._keep(last)
        else:
            last.close()

    def _keep(self, player: Player) -> None:
        player.layout = widgets.Layout(flex="1 1 auto", width="auto")
        layout = widgets.Layout(width="84px", margin="0 0 0 8px")
        button = widgets.Button(description="Remove", tooltip="Take this run off the page", layout=layout)
        button.on_click(lambda _: self.remove(player))
        row = widgets.HBox([player, button], layout=widgets.Layout(align_items="center", margin="8px 0 0 0"))
        self._shelf.children = [row, *self._shelf.children]
        for old in self.kept[KEPT:]:
            self.remove(old)

    def _value(self, name: str) -> Any:
        return self.controls[name].value

    def _say(self, text: str) -> None:
        self.status.value = f'<div role="status" style="line-height: 1.4">{html.escape(text)}</div>'

    def _complain(self, error: BaseException) -> bool:
        """Says what is wrong beside the field that the message names, else in the status line; False."""
        text = str(error) or type(error).__name__
        named = re.match(r"(\w+)(?:=| of )", text)
        if named is None or named[1] not in self.errors:
            self._say(text)
            return False
        beside = self.errors[named[1]]
        style = "color: var(--jp-error-color1, #b00020); line-height: 1.35"
        beside.value = f'<div role="alert" style="{style}">{html.escape(text)}</div>'
        beside.layout.display = ""
        return False


def _present(name: str) -> bool:
    return name != "lab" or (Path(__file__).parents[2] / "data" / "lab").is_dir()


def _title(voice: str, settings: StreamSettings, seed: int) -> str:
    sizes = f"chunk {settings.chunk_size}"
    if settings.schedule == "grow":
        sizes += f" to {settings.max_chunk_size}"
    shown = ("chunk_size", "max_chunk_size", "context_window", "schedule", "backend", "analyzer", "costs", "ignore_eos")
    others = {field.name: getattr(settings, field.name) for field in fields(StreamSettings) if field.name not in shown}
    changed = [f"{name} {value}" for name, value in others.items() if value != getattr(_STANDARD, name)]
    words = [sizes, f"context {settings.context_window}", settings.schedule, settings.backend]
    name = [] if voice == GIVEN else [f"voice {voice}"]
    return ", ".join([*name, *words, f"analyzer {settings.analyzer}", *changed, f"seed {seed}"])


def _outcome(player: Player) -> str:
    rtf, first, count = player.metrics["rtf"], player.metrics["first_chunk"], len(player.chunks)
    return (
        f"RTF {rtf:.2f}, first chunk after {first:.2f} s, "
        f"{count} chunk{'s' * (count != 1)}, {player.seconds:.2f} s of audio"
    )
