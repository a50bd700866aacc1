"""The drop-in for texts of any length: `speak` behind a model's own ``generate_stream`` and ``generate``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from chatterbox.tts import ChatterboxTTS

from ..engine import patch as engine
from ..engine.clock import Chunks, Measured, StageClock, measured
from ..engine.settings import StreamSettings, whole_number
from ..host import apart
from .sentences import LONGEST, Pauses, utterances
from .speak import ANY, chunks, pieces_of, whole
from .spoken import has_words


def patch(
    tts: ChatterboxTTS, *, split: bool | Pauses = False, longest: int | None = None, **overrides: Any
) -> engine.Patch:
    """Puts this package behind a model's own methods, with upstream's signatures: see `engine.patch.patch`.

    With ``split`` their texts may be of any length, also iterables of strings, and are spoken sentence by sentence as
    `speak` does it: ``generate_stream`` as a stream, ``generate`` each utterance as one window. ``max_new_tokens`` is
    then of each utterance. A text of one sentence, without markup, is spoken as it is without ``split``.

    Args:
        tts: a Chatterbox that is not patched yet.
        split: True, or the seconds of silence between utterances.
        longest: characters of an utterance at most, 40 to 400, for ``split``; None is 240.
        **overrides: fields of `StreamSettings` that upstream's signature does not have, such as ``analyzer="probe"``.

    Raises:
        TypeError: a model that is no Chatterbox that this package runs; nothing of it has been touched then.
        ValueError: an unknown field, a value that is not allowed, a field that belongs to the call, a second patch.
    """
    if not isinstance(split, (bool, Pauses)):
        raise ValueError(f"split={split!r}: must be True, False or a Pauses, such as Pauses(sentence=0.3)")
    if split is False:
        if longest is not None:
            raise ValueError(f"longest={longest!r}: only goes with split")
        return engine.patch(tts, **overrides)
    pauses = Pauses() if split is True else split
    most = whole_number("longest", LONGEST if longest is None else longest, 40, 400)
    return engine.patch(tts, kind=partial(_Split, pauses=pauses, longest=most), **overrides)


class _Split(engine.Patch):
    """Speaks a text utterance by utterance; what has no words goes the usual way, where upstream has an answer."""

    def __init__(self, tts: ChatterboxTTS, settings: StreamSettings, pauses: Pauses, longest: int) -> None:
        self.pauses, self.longest = pauses, longest
        super().__init__(tts, settings)

    def streamed(self, tts: ChatterboxTTS, text: Any, **wanted: Any) -> Measured:
        if isinstance(text, str) and not has_words(text):
            return super().streamed(tts, text, **wanted)
        said = utterances(pieces_of(text), self.pauses, self.longest)
        request, recording = self.asked(tts, ANY, **wanted)
        clock = StageClock(tts.t3.device, whole=not request.settings.overlap)

        def made() -> Chunks:
            with apart(tts.device):
                own = engine.voiced(tts, request, recording)
            yield from chunks(tts, own, said, clock)

        return measured(made(), clock, tts.sr)

    def whole(self, tts: ChatterboxTTS, text: Any, **wanted: Any) -> torch.Tensor:
        if isinstance(text, str) and not has_words(text):
            return super().whole(tts, text, **wanted)
        said = utterances(pieces_of(text), self.pauses, self.longest)
        request, recording = self.asked(tts, ANY, **wanted)
        return whole(tts, engine.voiced(tts, request, recording), said)
