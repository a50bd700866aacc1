"""The widgets of notebook 03: type, choose, hear it while it is made, and compare the last runs by ear.

Whatever is slow runs in a thread; whatever is wrong with a value is said below its field, in the package's own words.
"""

from __future__ import annotations

import html
import threading
import weakref
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import ipywidgets as widgets
from chatterbox.tts import ChatterboxTTS

from ..engine.clock import Measured
from ..engine.request import checked
from ..engine.settings import StreamSettings
from ..engine.stream import generate_stream
from ..study import costs
from ..voices.load import load
from .form import GIVEN, STANDARD, Form
from .player import Player, front_end

KEPT = 4
"""How many earlier runs stay on the page."""


class Explorer(widgets.VBox):
    """Text, model and every setting of a stream, with a `Player`; display it as the last expression of a cell.

    Tests and notebooks reach the same things as the mouse: ``controls`` and ``errors`` by the name of the setting,
    ``status``, ``player`` (the newest run), ``kept`` (earlier ones), and the methods of the buttons.

    Args:
        tts: the first model; None begins with the name ``model``, loaded at the first run.
        model: a name that `load` takes, chosen at the beginning if no ``tts`` is given.
        device: where models are loaded, as for `load`.
        variant: of the models that it loads, as for `load`.
    """

    _generation = threading.Lock()  # of the process: a model runs one stream at a time, whoever asks
    _newest: weakref.ref[Explorer] | None = None

    def __init__(
        self, tts: ChatterboxTTS | None = None, *, model: str = "lab", device: str = "auto", variant: str = "english"
    ) -> None:
        if Explorer._newest is not None and Explorer._newest() is not None:
            Explorer._newest().stop()  # its cell was run again, and its Stop button is gone
        Explorer._newest = weakref.ref(self)
        self.tts, self.model, self.device = tts, None if tts is None else GIVEN, device
        self._given, self.variant = tts, variant
        self._thread: threading.Thread | None = None
        self.form = Form(self.model or model, self.check)
        self.controls, self.errors = self.form.controls, self.form.errors
        self.target = widgets.Dropdown(
            options=costs.TARGETS, value="balanced", tooltip="What the recommendation is for", layout={"width": "110px"}
        )
        self.status = widgets.HTML(layout=widgets.Layout(margin="4px 0"))
        self.player = Player(on_end=self._ended)
        self._stage, self._shelf = widgets.VBox([self.player]), widgets.VBox()
        self._stage.add_class("cbl-newest")
        super().__init__([self.form, self._buttons(), self.status, self._stage, self._shelf])
        self.layout = widgets.Layout(max_width="960px")
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

    def _buttons(self) -> widgets.HBox:
        gap = widgets.Box(layout=widgets.Layout(flex="1 1 auto"))
        return widgets.HBox([
            _button("Generate", self.generate, "Speak the text with these settings", button_style="primary"),
            _button("Stop", self.stop, "End the sound at once and generation at the end of its chunk"), gap,
            _button("Recommend", self.recommend, "Measure this machine for some seconds and fill in what suits it"),
            widgets.Label("for"), self.target,
        ], layout=widgets.Layout(margin="8px 0 0 0", flex_flow="row wrap"))  # fmt: skip

    # What the buttons do.

    def check(self) -> bool:
        """Whether all values are allowed; what is wrong is said below its field."""
        self.form.clear_errors()
        settings, right = STANDARD, True
        try:
            settings = self.settings()
        except ValueError as error:
            right = self._complain(error)
        try:
            if self.tts is not None:
                checked(self.tts, self.form["text"], settings, **self._limits())
        except ValueError as error:
            right = self._complain(error)
        return right

    def settings(self) -> StreamSettings:
        """What the fields say. Raises ValueError, naming the field."""
        return self.form.settings()

    def generate(self) -> None:
        """Starts a run in the player's thread, unless a value is wrong or something runs already; the last is kept."""
        if not self.check():
            return self._say("Nothing was started: a value needs another look.")
        if not self._claim():
            return None
        try:
            model, settings, limits = self.form["model"], self.settings(), self._limits()
            self._make_room()
            self.player.title = _title(model, settings, limits["seed"])
            self.player.start(self._speak(model, self.form["text"], settings, limits))
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
            arguments = (self.form["model"], self.target.value, self.settings())
            self._thread = threading.Thread(target=self._advise, args=arguments, daemon=True)
            self._thread.start()

    def remove(self, player: Player) -> None:
        """Takes a kept run off the page."""
        row = next(row for row in self._shelf.children if row.children[0] is player)
        self._shelf.children = [other for other in self._shelf.children if other is not row]
        for part in (*row.children, row):  # an open row with a closed player would break a reloaded page
            part.close()

    # What runs in threads.

    def _claim(self) -> bool:
        free = self._generation.acquire(blocking=False)
        if not free:
            self._say(f"Still at work: wait until it is done{', or click Stop' * self.player.generating}.")
        return free

    def _speak(self, model: str, text: str, settings: StreamSettings, limits: dict[str, int]) -> Measured:
        try:
            tts = self._load(model)
            self._say("Generating.")
            trained = getattr(getattr(tts, "config", None), "trained", True)
            settings = settings.replace(ignore_eos=not trained)  # random weights stop anywhere
            yield from generate_stream(tts, text, settings, **limits)
        finally:
            self._generation.release()

    def _advise(self, model: str, target: str, settings: StreamSettings) -> None:
        try:
            advice = costs.recommend(self._load(model), target, settings=settings)
            self.form.fill(advice)
            self._say(advice.reason)
        except Exception as error:  # nobody would see it raised in a thread
            self._complain(error)
        finally:
            self._generation.release()

    def _load(self, name: str) -> ChatterboxTTS:
        if self.tts is None or name != self.model:
            self._say(f"Loading the model {name!r}.")
            try:
                given = self._given if name == GIVEN else None
                tts = load(name, variant=self.variant, device=self.device) if given is None else given
            except Exception as error:  # files of a model fail in as many ways as there are formats
                raise ValueError(f"model={name!r}: {str(error).removeprefix(f'model={name!r}: ')}") from error
            self.tts, self.model = tts, name  # only now: a model that fails leaves the old one
        return self.tts

    def _ended(self, player: Player) -> None:
        if player.error is not None:
            self._complain(player.error)
        else:
            self._say(f"{player.state.capitalize()}: {_outcome(player)}.")

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
        button = _button("Remove", lambda: self.remove(player), "Take this run off the page")
        button.layout = widgets.Layout(width="84px", margin="0 0 0 8px")
        row = widgets.HBox([player, button], layout=widgets.Layout(align_items="center", margin="8px 0 0 0"))
        self._shelf.children = [row, *self._shelf.children]
        for old in self.kept[KEPT:]:
            self.remove(old)

    def _limits(self) -> dict[str, int]:
        return {name: self.form[name] for name in ("seed", "max_new_tokens")}

    def _say(self, text: str) -> None:
        self.status.value = f'<div role="status" style="line-height: 1.4">{html.escape(text)}</div>'

    def _complain(self, error: BaseException) -> bool:
        """Says what is wrong below the field that the message names, else in the status line; False."""
        text = str(error) or type(error).__name__
        if not self.form.complain(text):
            self._say(text)
        return False


def _button(text: str, action: Callable[[], object], tip: str, **style: Any) -> widgets.Button:
    made = widgets.Button(description=text, tooltip=tip, layout=widgets.Layout(width="120px"), **style)
    made.on_click(lambda _: action())
    return made


def _title(model: str, settings: StreamSettings, seed: int) -> str:
    """Chunk, context and seed of a run, and whatever differs from the usual."""
    growing = settings.schedule == "grow"
    sizes = f"chunk {settings.chunk_size}" + f" to {settings.max_chunk_size}" * growing
    said = ("chunk_size", "max_chunk_size", "context_window", "schedule", "costs", "ignore_eos")
    others = {field.name: getattr(settings, field.name) for field in fields(StreamSettings) if field.name not in said}
    changed = [f"{name} {value}" for name, value in others.items() if value != getattr(STANDARD, name)]
    name = [] if model == GIVEN else [f"model {model}"]
    return ", ".join([*name, sizes, f"context {settings.context_window}", *changed, f"seed {seed}"])


def _outcome(player: Player) -> str:
    if not player.chunks:
        return "no audio"
    rtf, first, count = player.metrics["rtf"], player.metrics["first_chunk"], len(player.chunks)
    note = player.metrics["note"] and f", {player.metrics['note']}"
    return (
        f"RTF {rtf:.2f}, first chunk after {first:.2f} s, "
        f"{count} chunk{'s' * (count != 1)}, {player.seconds:.2f} s of audio{note}"
    )
