"""Speech of any length: utterances of a text that may still be arriving, as one stream."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from threading import Event
from typing import Any, NamedTuple

import torch
from chatterbox.tts import ChatterboxTTS

from ..engine.clock import Chunks, Measured, StageClock, measured, warn_of
from ..engine.overlap import overlapped
from ..engine.request import Request, checked
from ..engine.schedule import Growing
from ..engine.settings import BALANCED, StreamSettings, whole_number
from ..engine.stream import renderer_of, watermark
from ..engine.t3.decode import token_chunks, tokens
from ..engine.t3.words import Account, text_words
from ..engine.variants import encode
from ..host import apart, working_apart
from .sentences import LONGEST, Pauses, Utterance, utterances
from .spoken import Wording, has_words

ANY = "Hello."
"""Stands for a text that has not arrived yet while the other arguments are checked."""
_EDGE = 0.01
"""Seconds over which sound fades beside a pause: in its last 10 ms, which know no future, the vocoder clicks."""


def speak(
    tts: ChatterboxTTS,
    text: str | Iterable[str],
    settings: StreamSettings = BALANCED,
    *,
    seed: int | None = None,
    max_new_tokens: int = 1000,
    pauses: Pauses | None = None,
    longest: int = LONGEST,
    stop: Event | None = None,
    **overrides: Any,
) -> Measured:
    """Speaks a text of any length, which may still be arriving, as one stream.

    The text is cut into utterances (`sentences.utterances`), each decoded by T3 by itself, in which it neither strays
    nor meets its limit. One renderer makes all of them: a voice and a noise that go on, and no seam. An utterance is
    spoken as soon as no later text can change it; while it is heard the next is decoded. Memory does not grow, but for
    ``metrics.words``.

    With the same seed the audio is the same, however the text arrived: each utterance samples with a seed derived from
    ``seed`` and its number, the first with ``seed`` itself. Before a pause the renderer gives out what it held back for
    its cross-fade; its context stays, as it does within an utterance. A pause is exact silence, without a watermark.
    Turbo's and Nano's own silence of three tokens after an utterance stays, and the pause follows it.

    Everything but the text is checked, and the voice taken, when this is called; threads share a model as with
    `generate_stream`. What is waited for a text counts as time of the stream. An iterable runs as the caller has
    PyTorch set up; with ``overlap`` in a thread of its own, which closing the stream waits for up to a minute.

    Args:
        tts: a Chatterbox.
        text: a string, or an iterable of strings such as a language model's tokens. ``[pause:0.5]`` is a pause in
            seconds, at most 60; other tags, such as ``[laugh]``, are text. Markup is left out, and what the model's
            tokenizer does not know is, too, with a UserWarning; for a model that reads phones, as the lab voice does,
            numbers and usual abbreviations become words.
        settings: chunk size, context, sampling and analyzer. The growing schedule goes on over utterances, by what its
            costs say is left to be heard (of a text that is there in time); any other begins anew with each.
        seed: makes tokens and audio repeatable; None samples from PyTorch's default generator.
        max_new_tokens: the most speech tokens of an utterance (25 a second), at least 1.
        pauses: seconds of silence after utterances by their punctuation; None is `Pauses` as it is.
        longest: characters of an utterance at most, 40 to 400; longer sentences are cut at clauses, else words.
        stop: an event that any thread may set: the stream then ends with the token that it is at.
        **overrides: single fields of ``settings``.

    Yields:
        ``(audio, metrics)`` as `generate_stream` does; the metrics are of the whole. Audio has 960 samples for each
        speech token, and the pauses.

    Raises:
        TypeError: a model that is no Chatterbox, a text that is no string and no iterable, or, when it comes, a piece
            that is no string. As with any error of the iterable's own, what was complete is spoken first.
        ValueError: names the argument, its value and what is allowed; at its end, a text with nothing to say.
    """
    base = checked(tts, ANY, settings, seed=seed, max_new_tokens=max_new_tokens, stop=stop, **overrides)
    longest = whole_number("longest", longest, 40, 400)
    if not isinstance(pauses, (Pauses, type(None))):
        raise ValueError(f"pauses={pauses!r}: must be a Pauses, such as Pauses(sentence=0.3)")
    said = utterances(pieces_of(text), pauses, longest)
    clock = StageClock(tts.t3.device, whole=not base.settings.overlap)
    return measured(chunks(tts, base, said, clock), clock, tts.sr)


def pieces_of(text: Any) -> Iterable[str]:
    """The text as what is iterated over. Raises TypeError or ValueError for what cannot be."""
    if isinstance(text, str):
        if not has_words(text):
            raise ValueError(f"text={text!r:.80}: must be a string with something to say")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"text={text!r:.80}: must be Unicode, has half of a surrogate pair")
        return [text]
    if isinstance(text, (bytes, bytearray)) or not hasattr(text, "__iter__"):
        raise TypeError(f"text={text!r:.80}: must be a string or an iterable of strings, is a {type(text).__name__}")
    return text


class _Part(NamedTuple):
    """New speech tokens (n,). With ``silence`` nothing is held back after them, and so many seconds of it follow."""

    tokens: torch.Tensor
    silence: float | None = None


_NO_TOKENS = torch.zeros(0, dtype=torch.long)


def chunks(tts: ChatterboxTTS, base: Request, said: Iterator[Utterance], clock: StageClock) -> Chunks:
    """The audio (1, samples) of each chunk in turn, with ``t3``, ``s3gen`` and ``watermark`` on the clock."""
    with apart(tts.device):
        sound = _Sound(tts, base, clock)
    if base.settings.overlap:
        made = overlapped(lambda halted: _parts(tts, base, said, clock, halted), sound.rendered, sound.marked, clock)
        yield from working_apart(made, tts.device)
        return
    with closing(_parts(tts, base, said, clock)) as parts:
        for part in parts:
            with apart(tts.device):
                audio = sound.marked(sound.rendered(*part))
            clock.calls["token"] += len(part.tokens)
            if audio.shape[1]:
                yield audio


def whole(tts: ChatterboxTTS, base: Request, said: Iterator[Utterance]) -> torch.Tensor:
    """All of it at once, (1, samples), float32 on the CPU: each utterance is one chunk, rendered as one window.

    Once stopped, it ends with the token that it is at.
    """
    base, clock = replace(base, settings=base.settings.replace(flow="window")), StageClock(tts.t3.device)
    with apart(tts.device):
        sound, made = _Sound(tts, base, clock), []
    with closing(_parts(tts, base, said, clock, in_one=True)) as parts:
        for part in parts:
            with apart(tts.device):
                made.append(sound.marked(sound.rendered(*part)))
    if clock.limit:
        warn_of(clock.limit)
    return torch.cat(made, dim=1)


def _parts(
    tts: ChatterboxTTS,
    base: Request,
    said: Iterator[Utterance],
    clock: StageClock,
    halted: Event | None = None,
    in_one: bool = False,
) -> Generator[_Part, None, None]:
    """The tokens of all utterances; an error of the text comes after what it leaves complete was given out.

    The text is waited for as the caller has set PyTorch up, which is the caller's own code. With ``in_one`` each
    utterance is one part.
    """
    sizes = base.settings.chunk_sizes()
    plan = sizes if isinstance(sizes, Growing) else None
    wording, number, anything, stopped = Wording(tts, base.settings.language), 0, False, False
    with closing(said):
        try:
            for utterance in said:
                words = wording(utterance.text) if utterance.text else ""
                anything = anything or bool(words) or utterance.pause > 0
                if words:
                    request = _request(tts, base, words, number)
                    given = (tts, request, utterance)
                    spoken = _in_one(*given, clock) if in_one else _in_chunks(*given, clock, halted, plan)
                    yield from working_apart(spoken, tts.device)
                    number += 1
                elif utterance.pause:
                    if plan is not None:
                        plan.ended(0, utterance.pause)
                    clock.decoded += utterance.pause
                    yield _Part(_NO_TOKENS, utterance.pause)
                stopped = base.stop.is_set() or (halted is not None and halted.is_set())
                if stopped:
                    clock.ended = None
                    break
        except Exception:
            yield _Part(_NO_TOKENS, 0.0)
            raise
        yield _Part(_NO_TOKENS, 0.0)
    if stopped:
        return
    clock.ended = clock.ended or "stop"  # pauses alone
    if not anything:
        raise ValueError("text: held nothing to say")


def _request(tts: ChatterboxTTS, base: Request, words: str, number: int) -> Request:
    rows = base.text_tokens.shape[0]
    with apart(tts.device):
        text_tokens = encode(tts, words, base.settings.language, rows)
        found = text_words(tts, words, text_tokens) if base.words else ()  # the alignment is read
    return replace(base, text_tokens=text_tokens, seed=seed_of(base.seed, number), words=found)


def seed_of(seed: int | None, number: int) -> int | None:
    """The seed of an utterance by its number, the first's being ``seed`` itself; None stays None."""
    if seed is None or number == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest(), "big") >> 1


def _in_chunks(
    tts: ChatterboxTTS,
    request: Request,
    utterance: Utterance,
    clock: StageClock,
    halted: Event | None,
    plan: Growing | None,
) -> Generator[_Part, None, None]:
    with closing(token_chunks(tts, request, clock, halted, plan)) as chunks:
        for new, ended in chunks:
            silence = _silence(utterance) if ended else None
            if ended and plan is not None:
                plan.ended(len(new), silence)
            clock.decoded += silence or 0.0
            yield _Part(new, silence)


def _in_one(
    tts: ChatterboxTTS, request: Request, utterance: Utterance, clock: StageClock
) -> Generator[_Part, None, None]:
    account = Account((), request.text_tokens.shape[1], [])
    with closing(tokens(tts, request, account)) as stream:
        said = list(stream)
    if account.ended is not None:
        clock.tell_end(account.ended, 0 if request.settings.ignore_eos else request.max_new_tokens)
    yield _Part(request.variant.ended(torch.cat([_NO_TOKENS.to(tts.device), *said])), _silence(utterance))


def _silence(utterance: Utterance) -> float | None:
    """Seconds after an utterance; None where the next goes on with a cross-fade."""
    return utterance.pause if utterance.pause or utterance.last else None


class _Sound:
    """The one renderer and the one watermark of all utterances.

    The context goes on across a pause: the lab voice with a renderer begun anew after each was understood no better, 70
    word errors by pocketsphinx against 71 in 536 words of 20 paragraphs.
    """

    def __init__(self, tts: ChatterboxTTS, base: Request, clock: StageClock) -> None:
        self.tts, self.clock, self.edge = tts, clock, round(_EDGE * tts.sr)
        with clock.stage("s3gen"):
            self.renderer = renderer_of(tts, base.settings, base.seed, base.voice.gen)
        self.after_silence = False

    def rendered(self, tokens: torch.Tensor, silence: float | None) -> tuple[torch.Tensor, float]:
        """The audio (1, samples) of a part, without its silence, and the silence."""
        with self.clock.stage("s3gen"):
            audio = self.renderer.push(tokens, last=silence is not None)
        if audio.shape[1] and self.after_silence:
            audio, self.after_silence = faded(audio, self.edge), False
        if silence:
            audio, self.after_silence = faded(audio.flip(1), self.edge).flip(1), True
        return audio, silence or 0.0

    def marked(self, made: tuple[torch.Tensor, float]) -> torch.Tensor:
        """The same with its watermark, and with its silence, which has none."""
        audio, silence = made
        with self.clock.stage("watermark"):
            audio = watermark(self.tts, audio)
        return torch.cat([audio, torch.zeros(1, round(silence * self.tts.sr))], dim=1) if silence else audio


def faded(audio: torch.Tensor, samples: int) -> torch.Tensor:
    """Audio (1, n) that rises from silence within its first samples, by a raised cosine."""
    rise = (1 - torch.cos(torch.pi * (torch.arange(samples, dtype=torch.float32) + 0.5) / samples)) / 2
    most = min(samples, audio.shape[1])
    return torch.cat([audio[:, :most] * rise[:most], audio[:, most:]], dim=1)
