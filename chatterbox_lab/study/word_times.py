"""When a stream says that each word sounds, against forced alignment of its audio, and how long after it says so.

The aligner is pocketsphinx: told the words, it finds where each begins and ends. Its own error, on speech whose times
are known, is what ``chatterbox-lab aligner`` measures.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from chatterbox.tts import ChatterboxTTS
from tqdm import tqdm

from ..engine.clock import StreamMetrics, Word
from ..engine.request import checked
from ..engine.schedule import TOKEN_SECONDS
from ..engine.settings import BASELINE, whole_number
from ..engine.stream import generate_stream, render
from ..engine.t3.decode import tokens
from ..engine.t3.words import Account, Path, TextWord
from ..host import apart
from ..speech.speak import speak
from ..voices.load import load, pick_device
from . import command
from .hearing import RATE, recogniser, sixteen_bits
from .machine import machine_facts
from .paragraphs import PARAGRAPHS
from .records import Record
from .trials import HELD_OUT

WAYS = {"generate_stream": generate_stream, "speak": speak}
"""What speaks the sentences, and what speaks the paragraphs."""
EDGES = ("start", "end")
PLACES = ("first", "within", "last")
"""Where a word stands in its sentence."""
_FRAME = 0.01  # seconds of the aligner's frames
_NAMED = 80
_BESIDE = 0.1  # seconds of silence put beside the audio: without it, the last word goes on to the audio's end


def aligned(text: str, audio: torch.Tensor) -> list[Word]:
    """When each word of a text sounds in its audio (samples,) or (1, samples) at 24 kHz, to 10 ms, in their order.

    Words that the aligner's dictionary lacks are left out, and their sound counts as their neighbours' or as silence:
    `unknown` names them. Empty where the audio does not hold the words.
    """
    decoder = recogniser(lm=None)
    words = [word for word in text.split() if plain(word) and decoder.lookup_word(plain(word))]
    if not words:
        return []
    decoder.set_align_text(" ".join(map(plain, words)))
    beside = 2 * round(_BESIDE * RATE)  # bytes
    try:
        decoder.start_utt()
        decoder.process_raw(bytes(beside) + sixteen_bits(audio) + bytes(beside), full_utt=True)
        decoder.end_utt()
    except RuntimeError:  # "Failed to stop utterance processing": no way through the words
        return []
    spans = [(one.word, one.start_frame, one.end_frame + 1) for one in decoder.seg() or ()]
    spans = [span for span in spans if span[0][0] not in "<["]  # silence and the edges
    if [re.sub(r"\(\d+\)$", "", name) for name, _, _ in spans] != list(map(plain, words)):
        return []
    return [
        Word(word, round(max(0.0, first * _FRAME - _BESIDE), 2), round(end * _FRAME - _BESIDE, 2))
        for word, (_, first, end) in zip(words, spans, strict=True)
    ]


def unknown(text: str) -> list[str]:
    """The words of a text that `aligned` leaves out."""
    decoder = recogniser(lm=None)
    return [word for word in text.split() if plain(word) and not decoder.lookup_word(plain(word))]


def plain(word: str) -> str:
    """A word as the aligner's dictionary has it: small letters and apostrophes; empty for none."""
    return re.sub(r"[^a-z']", "", word.lower()).strip("'")


class Told(NamedTuple):
    """What a stream said: its audio (1, samples), its words, and at which of its seconds each word was there."""

    audio: torch.Tensor
    words: list[Word]
    known: list[float]


def listen(stream: Iterable[tuple[torch.Tensor, StreamMetrics]], rate: int) -> Told:
    """Takes a stream to its end. Its seconds are those of the audio that T3 has decoded, a chunk at a time."""
    chunks: list[torch.Tensor] = []
    known: list[float] = []
    words: list[Word] = []
    silent = 0  # samples of pauses: what is neither a token's nor held back
    for audio, metrics in stream:
        chunks.append(audio)
        words, samples = metrics.words, sum(chunk.shape[1] for chunk in chunks)
        silent = max(silent, samples - round(metrics.tokens * TOKEN_SECONDS * rate))
        known += [metrics.tokens * TOKEN_SECONDS + silent / rate] * (len(words) - len(known))
    audio = torch.cat(chunks, dim=1)
    return Told(audio, list(words), known + [audio.shape[1] / rate] * (len(words) - len(known)))


def compared(
    text: str, truth: Sequence[Word], told: Sequence[Word], known: Sequence[float] | None = None
) -> list[dict[str, Any]]:
    """A row for each word of a text, with errors against the truth in seconds; missing where either is silent on it.

    ``start_error`` and ``end_error`` are above 0 where what was told is late. With ``known``, at which second of the
    stream each word was told, ``known_after`` is how long that is after the word's true end.
    """
    words, rows = text.split(), []
    true, said = _by_place(words, truth), _by_place(words, told)
    when = dict(zip(said, known or [], strict=False))
    for number, word in enumerate(words):
        row: dict[str, Any] = {"text": text, "number": number, "words": len(words), "word": word}
        row["place"] = _place(words, number)
        for edge in EDGES:
            row[edge], row[f"told_{edge}"] = (getattr(of.get(number), edge, None) for of in (true, said))
            row[f"{edge}_error"] = _difference(row[f"told_{edge}"], row[edge])
        if known is not None:
            row |= {"known_at": when.get(number), "known_after": _difference(when.get(number), row["end"])}
        rows.append(row)
    return rows


def _difference(told: float | None, true: float | None) -> float | None:
    return None if told is None or true is None else round(told - true, 4)


class Followed(NamedTuple):
    """How T3 goes through a text: its audio (1, samples), attention (speech tokens, text tokens) and path.

    ``path`` has the text token that each speech token is at, ``places`` those of the words, ``words`` their times.
    """

    audio: torch.Tensor
    rows: np.ndarray
    path: list[int]
    places: tuple[TextWord, ...]
    words: list[Word]


class _Watched(Account):
    """An account that keeps the attention it is told of."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.rows: list[np.ndarray] = []

    def heard(self, row: torch.Tensor, tokens: int) -> None:
        self.rows.append(row.float().numpy())
        super().heard(row, tokens)


def follow(tts: ChatterboxTTS, text: str, *, seed: int = 0, max_new_tokens: int = 1000) -> Followed:
    """Speaks a text, and keeps what its words' times are made from."""
    settings = BASELINE.replace(backend="static", analyzer="probe")
    request = checked(tts, text, settings, seed=seed, max_new_tokens=max_new_tokens)
    account = _Watched(request.words, request.text_tokens.shape[1], [])
    with apart(tts.device):
        codes = torch.cat(list(tokens(tts, request, account))).cpu()
    account.end("limit", len(codes))  # where that is how it ended
    path = Path(request.text_tokens.shape[1])
    settled = [path.update(row) for row in account.rows]
    steps = [*settled[len(path.leaps) :], *(max(place, path.place) for place in path.back()[1:])]
    rows = np.stack(account.rows)[: len(codes)]  # the last step gives the stop token
    return Followed(render(tts, codes, settings, seed=seed), rows, steps[: len(codes)], request.words, account.told)


def _by_place(words: Sequence[str], found: Sequence[Word]) -> dict[int, Word]:
    """Which of the words each of those found is: they come in order, and some may be missing."""
    placed, number = {}, 0
    for one in found:
        while number < len(words) and words[number] != one.word:
            number += 1
        if number < len(words):
            placed[number] = one
            number += 1
    return placed


def _place(words: Sequence[str], number: int) -> str:
    ends = [index for index, word in enumerate(words) if word[-1] in ".?!"] or [len(words) - 1]
    return "last" if number in ends else "first" if number == 0 or number - 1 in ends else "within"


def measure(
    tts: ChatterboxTTS,
    texts: dict[str, Sequence[str]],
    record: Record | None = None,
    *,
    chunk_size: int = 25,
    seed: int = 0,
    facts: dict[str, Any] | None = None,
) -> pd.DataFrame:
    """A row for each word of the texts, which are by what speaks them (`WAYS`). Texts in ``record`` are left out.

    ``text`` has a text's first 80 characters: they tell one from another.
    """
    rows = record.rows if record else []
    done = {(row["way"], row["text"]) for row in rows}
    settings = BASELINE.replace(backend="static", analyzer="probe", chunk_size=chunk_size)
    todo = [(way, text) for way, some in texts.items() for text in some if (way, text[:_NAMED]) not in done]
    for way, text in tqdm(todo, desc="word times", unit="text"):
        told = listen(WAYS[way](tts, text, settings, seed=seed), tts.sr)
        about = {"text": text[:_NAMED], "way": way, "seed": seed, "chunk_size": chunk_size} | (facts or {})
        truth = aligned(text, told.audio)
        made = [row | about for row in compared(text, truth, told.words, told.known)]
        if record:
            record.add(made)
        else:
            rows += made
    return pd.DataFrame(rows)


def summary(table: pd.DataFrame, by: str | None = None) -> pd.DataFrame:
    """Errors in milliseconds: median and 90th percentile of their size, and their median with its sign (``bias``).

    ``words`` are those of the truth, ``missed`` how many of them the stream did not tell.

    Args:
        table: from `measure`, or of `chatterbox-lab aligner`, which has no ``known_after``.
        by: a column, such as ``place`` or ``way``; None is one row, ``all``.
    """
    groups = [("all", table)] if by is None else table.groupby(by, sort=False)
    rows = {}
    for name, group in groups:
        true = group.dropna(subset="start")
        row = {"words": len(true), "missed": int(true["start_error"].isna().sum())}
        for edge in EDGES:
            errors = 1e3 * true[f"{edge}_error"].dropna()
            row |= {f"{edge} median": errors.abs().median(), f"{edge} 90%": errors.abs().quantile(0.9)}
            row |= {f"{edge} bias": errors.median()}
        if "known_after" in group:
            row |= {
                "known after": 1e3 * true["known_after"].median(),
                "known 90%": 1e3 * true["known_after"].quantile(0.9),
            }
        rows[name] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``chatterbox-lab word-times``."""
    command.add_model(parser, "lab", "a model that speaks: lab, pretrained")
    command.add_device(parser)
    parser.add_argument("--sentences", type=int, metavar="X", default=60, help="of data/heldout.txt (default: 60)")
    parser.add_argument("--paragraphs", type=int, metavar="X", default=10, help="of data/paragraphs.txt (default: 10)")
    parser.add_argument("--chunk-size", type=int, metavar="X", default=25, help="tokens of a chunk (default: 25)")
    parser.add_argument("--seed", type=int, metavar="X", default=0, help="of tokens and noise (default: 0)")
    command.add_record(parser, "word_times_MODEL.csv")


def run(options: argparse.Namespace) -> int:
    """Speaks sentences by `generate_stream` and paragraphs by `speak`, and records when which word was told."""
    sentences = whole_number("sentences", options.sentences, 0)
    paragraphs, seed = whole_number("paragraphs", options.paragraphs, 0), whole_number("seed", options.seed, 0)
    size = whole_number("chunk_size", options.chunk_size, 1)
    device, name = pick_device(options.device), command.model_name(options)
    record = command.open_record(options, f"word_times_{name}.csv")
    facts = machine_facts(device) | {"model": name, "dtype": "float32"}
    record.check(facts)
    tts = load(options.model, device=device, watermark=False)
    texts = {
        way: file.read_text().splitlines()[:count]
        for way, file, count in zip(WAYS, (HELD_OUT, PARAGRAPHS), (sentences, paragraphs), strict=True)
    }
    table = measure(tts, texts, record, chunk_size=size, seed=seed, facts=facts)
    record.finish()
    print(summary(table, "way").to_markdown(floatfmt=".0f"))
    print(f"\n{len(record.rows)} rows are in {record.path.name}.")
    return 0
