"""The first sound in one line: a text of any length, which may still be arriving, spoken, played, told and written."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import NamedTuple

import soundfile
import torch

from .. import recordings
from ..engine.clock import Measured, StreamMetrics
from ..engine.settings import ADAPTIVE, BALANCED, BASELINE, BEST_RTF, FAST, StreamSettings, whole_number
from ..engine.stream import generate_stream, pcm16
from ..engine.warm import warm_up
from ..files import written_whole
from ..speech.speak import pieces_of, speak
from ..speech.subtitles import checked_path, subtitles
from ..study import command
from ..study.logs import quiet
from ..voices.kinds import KINDS, class_of
from ..voices.load import load, pick_device

PRESETS = {"baseline": BASELINE, "balanced": BALANCED, "best-rtf": BEST_RTF, "adaptive": ADAPTIVE, "fast": FAST}
PLAYERS = {
    "aplay": "aplay -q -t raw -f S16_LE -c 1 -r {rate}",
    "paplay": "paplay --raw --format=s16le --channels=1 --rate={rate}",
    "ffplay": "ffplay -loglevel error -nodisp -autoexit -f s16le -ar {rate} -i -",
    "play": "play -q -t raw -e signed -b 16 -c 1 -r {rate} -",
    "afplay": "",
}
"""Programs that play sound, in the order in which they are looked for, each with the command that plays 16-bit samples
from its standard input. ``afplay`` (macOS) plays files alone."""
_TOKENS_PER_SECOND = 25
_MOST_SECONDS = 40  # 1000 speech tokens, what upstream generates at most


class Player:
    """A program that plays what it is given, in its own process; leaving the context ends it.

    Args:
        command: as in `PLAYERS`.
        rate: samples a second.
    """

    def __init__(self, command: str, rate: int) -> None:
        self.process = subprocess.Popen(command.format(rate=rate).split(), stdin=subprocess.PIPE)
        self._chunks: SimpleQueue[bytes | None] = SimpleQueue()
        # Writing to a player blocks until it has played: a thread does that, so that the next chunk is made meanwhile.
        self._feeder = Thread(target=self._feed, daemon=True)
        self._feeder.start()

    def push(self, audio: torch.Tensor) -> None:
        """Plays audio (1, samples) after what was pushed before; returns at once."""
        self._chunks.put(pcm16(audio).tobytes())

    def finish(self) -> int:
        """Waits until all is played; returns the program's exit status."""
        self._chunks.put(None)
        self._feeder.join()
        return self.process.wait()

    def _feed(self) -> None:
        with suppress(BrokenPipeError), self.process.stdin as pipe:  # a program that has ended says why by its status
            while (chunk := self._chunks.get()) is not None:
                pipe.write(chunk)
                pipe.flush()

    def __enter__(self) -> Player:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.finish()


def find_player() -> str:
    """The first program of `PLAYERS` that is here. Raises ValueError naming them where there is none."""
    found = next(filter(shutil.which, PLAYERS), None)
    if found is None:
        raise ValueError(f"--play: needs one of {', '.join(PLAYERS)}, and none of them is installed")
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``chatterbox-lab speak``."""
    parser.add_argument("text", help="what is said; - reads it as it arrives at the standard input")
    parser.add_argument("-o", "--output", type=Path, metavar="X", help="WAV to write (default: speech.wav)")
    parser.add_argument(
        "--subtitles",
        type=Path,
        metavar="X",
        help="X.srt or X.vtt to write: when each word is said, not with turbo or nano",
    )
    parser.add_argument("--play", action="store_true", help=f"play it with {', '.join(PLAYERS)}, whichever is there")
    parser.add_argument("--stream", action="store_true", help="tell each chunk, and play it, as soon as it is made")
    command.add_model(parser, "lab")
    command.add_device(parser)
    parser.add_argument("--variant", choices=KINDS, default="english", help="%(choices)s (default: %(default)s)")
    parser.add_argument("--language", metavar="X", help="of a multilingual model, such as fr")
    parser.add_argument("--preset", choices=PRESETS, default="balanced", help="%(choices)s (default: %(default)s)")
    parser.add_argument("--chunk-size", type=int, metavar="X", help="speech tokens a chunk, 25 are a second")
    parser.add_argument("--seed", type=int, metavar="X", default=0, help="another seed, another reading (default: 0)")
    parser.add_argument(
        "--reference", type=Path, metavar="X", help="a recording whose voice is taken, if the model can"
    )
    most = f"an utterance, or with --whole the speech, ends there at the latest (default: {_MOST_SECONDS})"
    parser.add_argument("--most", type=float, metavar="SECONDS", default=_MOST_SECONDS, help=most)
    parser.add_argument(
        "--whole", action="store_true", help="hand the model the text in one piece, as upstream does, not in utterances"
    )


class _Plan(NamedTuple):
    """The text, how it is spoken, the WAV to write, and the most tokens of an utterance."""

    text: str | Iterator[str]
    settings: StreamSettings
    path: Path
    limit: int


def run(options: argparse.Namespace) -> int:
    """Speaks a text as the options say; returns 1 where nothing was said, no word found, or the player failed."""
    plan = _checked(options)
    program = find_player() if options.play else None
    device = pick_device(options.device)
    with quiet(), _told_here():
        start = time.perf_counter()
        tts = load(options.model, variant=options.variant, device=device)
        if options.reference is not None:
            tts.prepare_conditionals(options.reference, exaggeration=plan.settings.exaggeration)
        loaded, warmed = time.perf_counter() - start, warm_up(tts, plan.settings)
        spoken = generate_stream if options.whole else speak
        stream = spoken(tts, plan.text, plan.settings, seed=options.seed, max_new_tokens=plan.limit)
        with Player(PLAYERS[program], tts.sr) if program and PLAYERS[program] else nullcontext() as player:
            chunks, metrics = _chunks(stream, tts.sr, player, options.stream)
            if not chunks:
                print("The model said nothing.")
                return 1
            _write(plan.path, torch.cat(chunks, dim=1), tts.sr)
            print(_told(metrics, plan, options) + f"Once a process: {loaded:.1f} s to load, {warmed:.1f} s to warm up.")
            missing = options.subtitles is not None and not _subtitled(metrics, options.subtitles)
            status = player.finish() if player else 0
    if program == "afplay":
        status = subprocess.run([program, str(plan.path)]).returncode
    if status:
        print(f"--play: {program} ended with status {status}; is there a sound device?", file=sys.stderr)
    return int(status != 0 or missing)


@contextmanager
def _told_here() -> Iterator[None]:
    """The engine's warning that speech was cut is kept quiet: `_told` says so in the words of the options."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "max_new_tokens=", UserWarning)
        yield


def _chunks(
    stream: Measured, rate: int, player: Player | None, live: bool
) -> tuple[list[torch.Tensor], StreamMetrics | None]:
    """All chunks and the last metrics of a stream; ``live`` tells each chunk, and plays it, as soon as it is made."""
    chunks, metrics = [], None
    for audio, metrics in stream:
        chunks.append(audio)
        if live:
            seconds = audio.shape[1] / rate
            arrived = metrics.total_generation_time
            print(f"chunk {len(chunks)} after {arrived:.2f} s: {seconds:.2f} s of speech", flush=True)
        if live and player:
            player.push(audio)
    if player and chunks and not live:
        player.push(torch.cat(chunks, dim=1))
    return chunks, metrics


def _write(path: Path, audio: torch.Tensor, rate: int) -> None:
    with written_whole(path) as part:
        soundfile.write(part, pcm16(audio), rate)


def _subtitled(metrics: StreamMetrics, path: Path) -> bool:
    """Writes the subtitles; False, and says so, where T3 told no word."""
    if metrics.words:
        subtitles(metrics.words, path)
        print(f"{path}: {len(metrics.words)} words.")
    else:
        print(f"--subtitles: no word was found in the speech, so {path} was not written", file=sys.stderr)
    return bool(metrics.words)


def _told(metrics: StreamMetrics, plan: _Plan, options: argparse.Namespace) -> str:
    """What was made, how it ended if not by itself, and how fast."""
    pace = "faster" if metrics.rtf < 1 else "slower"
    waited = "" if isinstance(plan.text, str) else ", waiting for the text included"
    first = f"First chunk after {metrics.latency_to_first_chunk:.2f} s"
    return (
        f"{plan.path}: {metrics.total_audio_duration:.2f} s of speech.{_ended(metrics, options)}\n"
        f"{first}, RTF {metrics.rtf:.2f}: {pace} than real time{waited}.\n"
    )


def _ended(metrics: StreamMetrics, options: argparse.Namespace) -> str:
    """Why speech may be incomplete, and which option changes that; empty where the model was done."""
    if metrics.ended == "guard":
        return " The guard ended it, as it strayed from the text: try another --seed."
    if metrics.ended != "limit":
        return ""
    what = "It" if options.whole else "An utterance"
    cure = (
        "raise --most"
        if options.most < _MOST_SECONDS
        else "leave out --whole"
        if options.whole
        else "try another --seed"
    )
    return f" {what} was cut at the {options.most:g} s of --most: {cure}."


def _checked(options: argparse.Namespace) -> _Plan:
    """What the options ask for. Raises ValueError before a model is loaded."""
    settings = PRESETS[options.preset].replace(language=options.language)
    if options.chunk_size is not None:
        settings = settings.replace(chunk_size=options.chunk_size)
    if options.subtitles is not None:
        checked_path(options.subtitles, "subtitles")
        if KINDS[options.variant].turbo:
            raise ValueError(
                f"subtitles={str(options.subtitles)!r}: cannot be written with --variant {options.variant}, "
                "since no head of its T3 is known to follow the text"
            )
        settings = settings.replace(analyzer="probe") if settings.analyzer == "off" else settings
    whole_number("seed", options.seed, 0, 2**63 - 1)
    if not 1 / _TOKENS_PER_SECOND <= options.most <= _MOST_SECONDS:
        raise ValueError(f"most={options.most:g}: must be 0.04 to {_MOST_SECONDS} seconds")
    path = options.output or Path("speech.wav")
    if path.suffix.lower() != ".wav":
        raise ValueError(f"output={str(path)!r}: must end in .wav")
    if not path.parent.is_dir():
        raise ValueError(f"output={str(path)!r}: there is no folder {str(path.parent)!r}")
    if options.reference is not None:
        recordings.long_enough(recordings.read(options.reference), class_of(options.variant))
    return _Plan(_text(options), settings, path, round(options.most * _TOKENS_PER_SECOND))


def _text(options: argparse.Namespace) -> str | Iterator[str]:
    """The text, or its characters as they arrive. Raises ValueError where there is nothing to say."""
    if options.text == "-" and not options.whole:
        return iter(lambda: sys.stdin.read(1), "")
    text = sys.stdin.read() if options.text == "-" else options.text
    if not text.strip():
        raise ValueError(f"text={text!r}: must be a string with something to say")
    if not options.whole:
        pieces_of(text)
    return text
