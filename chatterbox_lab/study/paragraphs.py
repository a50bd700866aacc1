"""Paragraphs spoken three ways: whole by T3, as upstream does; cut into utterances by `speak`; each sentence by itself.

What tells them apart is how much of a text T3 gets at once. A recogniser does worse on long audio by itself, so every
way is heard as one recording, and also cut at its silences, by one rule for all.
"""

from __future__ import annotations

import argparse
import hashlib
import random
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from chatterbox.models.s3gen import S3GEN_SR
from chatterbox.tts import ChatterboxTTS
from tqdm import tqdm

from ..engine.clock import StreamMetrics
from ..engine.settings import BASELINE, whole_number
from ..engine.stream import generate_stream
from ..files import DATA
from ..speech.sentences import Pauses, utterances
from ..speech.speak import seed_of, speak
from ..voices.load import load, pick_device
from . import command
from .hearing import repeats, silences, transcribe, word_errors
from .machine import machine_facts
from .records import Record
from .trials import MATTERS_WER

PARAGRAPHS = DATA / "paragraphs.txt"
"""Held-out sentences in paragraphs of 3 to 10, a line each; `composed` made it."""
LENGTHS = (3, 4, 5) * 4 + (6, 7, 8, 9) * 3 + (10,) * 6
"""Sentences of each paragraph."""
AT_ONCE, SPEAK, APART = WAYS = ("at once", "speak", "one by one")
FIRST = (1, 2, 3, 5, 7)
"""Of a paragraph of ten sentences, so many are also spoken without the rest."""
HEARD = {"cut": "errors", "whole": "whole_errors", "apart": "apart_errors"}
"""How a recording is heard, and the column of its word errors: cut at its silences, as one recording, and utterance by
utterance, which only `speak` and one by one have."""
_PAUSE_SAMPLES = round(Pauses().sentence * S3GEN_SR)
_TOKEN_SAMPLES = S3GEN_SR // 25
_MOST = 1000  # speech tokens of a call: 40 s, upstream's limit
_PAUSE, _SHORTEST = 0.15, 1.0  # seconds of a silence at which a recording is cut, and of a piece at least


def composed(sentences: Sequence[str], lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[str]:
    """Paragraphs of such lengths. Neighbours are chosen at random; all sentences are used equally often, or nearly.

    Raises ValueError where a paragraph would need a sentence twice.
    """
    if max(lengths) > len(sentences):
        raise ValueError(f"lengths={max(lengths)}: must be at most the {len(sentences)} sentences")
    generator, deck, found = random.Random(seed), [], []
    for length in lengths:
        if len(deck) < length:  # what is left comes first, then all others
            others = [one for one in sentences if one not in deck]
            deck = deck + generator.sample(others, len(others)) + generator.sample(deck, len(deck))
        found.append(" ".join(deck[:length]))
        deck = deck[length:]
    return generator.sample(found, len(found))


def sentences_of(paragraph: str) -> list[str]:
    """The sentences, each as `speak` says it in one go."""
    return [utterance.text for utterance in utterances(paragraph)]


class Spoken(NamedTuple):
    """A recording (1, samples) without pauses at its ends, its utterances where known, tokens, end and seed."""

    audio: torch.Tensor
    pieces: list[torch.Tensor]
    tokens: int
    ended: str
    seed: int


def say(tts: ChatterboxTTS, sentences: Sequence[str], way: str, seed: int = 0) -> Spoken:
    """The sentences in one of `WAYS`, with upstream's settings; the seeds of `speak` and one by one are the same."""
    settings, text = BASELINE.replace(backend="static"), " ".join(sentences)
    if way == APART:
        said = [_taken(generate_stream(tts, one, settings, seed=seed_of(seed, number), max_new_tokens=_MOST))
                for number, one in enumerate(sentences)]  # fmt: skip
        pieces, tokens = [audio for audio, _ in said], sum(metrics.tokens for _, metrics in said)
        hows = {_ended(metrics) for _, metrics in said}
        ended = next((how for how in ("limit", "guard") if how in hows), "stop")
        return Spoken(_joined(pieces), pieces, tokens, ended, seed)
    speaks = generate_stream if way == AT_ONCE else speak
    audio, metrics = _taken(speaks(tts, text, settings, seed=seed, max_new_tokens=_MOST))
    pieces = pieces_between(audio, _PAUSE_SAMPLES) if way == SPEAK else []
    return Spoken(audio, pieces, metrics.tokens, _ended(metrics), seed)


def _joined(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    pause = torch.zeros(1, _PAUSE_SAMPLES)
    return torch.cat([part for piece in pieces for part in (piece, pause)][:-1], dim=1)


def _first(tts: ChatterboxTTS, sentences: Sequence[str], count: int, way: str, everything: Spoken) -> Spoken:
    """The first sentences alone: of known utterances no later one changes them, and only T3's one go is another."""
    if count == len(sentences):
        return everything
    if len(everything.pieces) != len(sentences):
        return say(tts, sentences[:count], way, everything.seed)
    pieces = everything.pieces[:count]
    tokens = sum(piece.shape[1] for piece in pieces) // _TOKEN_SAMPLES
    return everything._replace(audio=_joined(pieces), pieces=pieces, tokens=tokens)


def _taken(stream: Iterable[tuple[torch.Tensor, StreamMetrics]]) -> tuple[torch.Tensor, StreamMetrics]:
    chunks = list(stream)
    return torch.cat([audio for audio, _ in chunks], dim=1), chunks[-1][1]


def _ended(metrics: StreamMetrics) -> str:
    return metrics.ended or ("limit" if metrics.tokens >= _MOST else "stop")


def pieces_between(audio: torch.Tensor, silent: int) -> list[torch.Tensor]:
    """What sounds between stretches of at least ``silent`` samples that are exactly 0, as a pause of `speak` is."""
    gaps = [(start, end) for start, end in silences(audio, 0.0) if end - start >= silent]
    edges = [0, *(place for gap in gaps for place in gap), audio.shape[1]]
    return [audio[:, start:end] for start, end in zip(edges[::2], edges[1::2], strict=True) if end > start]


def cut(audio: torch.Tensor, rate: int) -> list[torch.Tensor]:
    """A recording in pieces of a second or more, each ending amid a silence (-50 dB) of 0.15 s or more."""
    middles = [(start + end) // 2 for start, end in silences(audio) if end - start >= _PAUSE * rate]
    places = [0]
    for place in middles:
        if min(place - places[-1], audio.shape[1] - place) >= _SHORTEST * rate:
            places.append(place)
    return [audio[:, start:end] for start, end in zip(places, [*places[1:], audio.shape[1]], strict=True)]


class Ears:
    """The recogniser, which does not hear a piece twice: what is understood of each is kept."""

    def __init__(self) -> None:
        self.known: dict[bytes, str] = {}

    def __call__(self, pieces: Iterable[torch.Tensor]) -> list[str]:
        """What is understood of each piece (1, samples)."""
        return [self._understood(piece) for piece in pieces]

    def _understood(self, piece: torch.Tensor) -> str:
        key = hashlib.blake2b(piece.contiguous().numpy()).digest()
        if key not in self.known:
            self.known[key] = transcribe(piece)
        return self.known[key]


def heard(sentences: Sequence[str], spoken: Spoken, rate: int, ears: Ears) -> dict[str, Any]:
    """What is understood of a recording, and the errors in it, for each way of `HEARD`; repeats are those of the cut.

    ``longest_silence`` is in seconds. Utterances that are not as many as the sentences have no errors of their own.
    """
    text, pieces = " ".join(sentences), cut(spoken.audio, rate)
    understood = " ".join(ears(pieces))
    (whole,) = ears([spoken.audio])
    found = word_errors(text, understood) | {"whole_errors": word_errors(text, whole)["errors"]}
    if len(spoken.pieces) == len(sentences):
        each = zip(sentences, ears(spoken.pieces), strict=True)
        found["apart_errors"] = sum(word_errors(said, words)["errors"] for said, words in each)
    quiet = max((end - start for start, end in silences(spoken.audio)), default=0)
    found |= {"repeats": repeats(text, understood), "pieces": len(pieces), "longest_silence": quiet / rate}
    return found | {"heard": understood, "whole_heard": whole}


def _prefixes(sentences: Sequence[str]) -> list[int]:
    """How many sentences of a paragraph are spoken, the whole paragraph last."""
    return [count for count in (FIRST if len(sentences) == max(LENGTHS) else ()) if count < len(sentences)] + [
        len(sentences)
    ]


def measure(
    tts: ChatterboxTTS,
    paragraphs: Sequence[str],
    record: Record | None = None,
    *,
    ways: Sequence[str] = WAYS,
    seed: int = 0,
    facts: dict[str, Any] | None = None,
) -> pd.DataFrame:
    """A row for each paragraph, way and number of its first sentences. Those ``record`` has are not made again."""
    rows = record.rows if record else []
    done, ears = {(row["paragraph"], row["way"]) for row in rows}, Ears()
    for paragraph in tqdm(paragraphs, desc="paragraphs", unit="paragraph"):
        sentences = sentences_of(paragraph)
        for way in (one for one in ways if (paragraph, one) not in done):
            made = []
            everything = say(tts, sentences, way, seed)
            for count in _prefixes(sentences):
                spoken = _first(tts, sentences, count, way, everything)
                about = {"paragraph": paragraph, "way": way, "sentences": count, "of": len(sentences), "seed": seed}
                about |= {"tokens": spoken.tokens, "seconds": spoken.audio.shape[1] / tts.sr, "ended": spoken.ended}
                made.append(about | heard(sentences[:count], spoken, tts.sr, ears) | (facts or {}))
            if record:
                record.add(made)
            else:
                rows += made
    return pd.DataFrame(rows)


def summary(table: pd.DataFrame, how: str = "cut", against: str = APART) -> pd.DataFrame:
    """Each way over whole paragraphs: WER, repeats per hundred words, and how surely they differ.

    ``wer_change`` and ``repeats_change`` are differences to the way ``against``; ``_low`` and ``_high`` bound them: the
    5th and 95th percentile over 1000 draws of the paragraphs with replacement, the same paragraphs for both ways.

    Args:
        table: what `measure` made.
        how: of `HEARD`.
        against: of `WAYS`.
    """
    whole = table[table["sentences"] == table["of"]].assign(errors=table[HEARD[how]])
    by = whole.pivot_table(["errors", "repeats", "words"], "paragraph", "way", "first", sort=False)
    by = by.dropna(axis=1, how="all").dropna()  # only what all ways have
    words, counts = by["words"][against], {"wer": by["errors"], "repeats": 100 * by["repeats"]}
    draws = np.random.default_rng(0).integers(0, len(words), (1000, len(words)))
    found = pd.DataFrame(index=[way for way in dict.fromkeys(whole["way"]) if way in by["errors"]])
    for name, values in counts.items():
        change = values.sub(values[against], axis=0)[found.index]
        drawn = change.to_numpy()[draws].sum(1) / words.to_numpy()[draws].sum(1)[:, None]
        found[name] = values.sum() / words.sum()
        found[f"{name}_change"] = change.sum() / words.sum()
        found[f"{name}_low"], found[f"{name}_high"] = np.quantile(drawn, [0.05, 0.95], axis=0)
    limits = whole[whole["ended"] == "limit"].groupby("way").size()
    return found.assign(limit=limits.reindex(found.index, fill_value=0), paragraphs=len(words))


def judged(row: pd.Series, matters: float = MATTERS_WER) -> bool | str:
    """Whether a row of `summary` is as good as what it is against: no more word errors than matter, for sure.

    False where it surely has more than none; else, in words, that so few paragraphs do not decide it.
    """
    if row["wer_high"] <= matters:
        return True
    return False if row["wer_low"] > 0 else f"undecided by {row['paragraphs']:.0f} paragraphs"


def told(row: pd.Series) -> str:
    """A row of `summary` in words: its WER, and how that changes, with bounds."""
    change, low, high = 100 * row[["wer_change", "wer_low", "wer_high"]]
    return f"WER {row['wer']:.1%}, {change:+.1f} points ({low:+.1f} to {high:+.1f})"


def by_sentences(table: pd.DataFrame, how: str = "cut", grown: bool = True) -> pd.DataFrame:
    """WER by number of sentences (rows) and way (columns).

    With ``grown`` of the first sentences of the same paragraphs, those of ten, so that one row differs from another by
    length alone; without, of all whole paragraphs.
    """
    chosen = table["of"] == max(LENGTHS) if grown else table["sentences"] == table["of"]
    known = table[chosen].dropna(subset=HEARD[how])
    counts = known.pivot_table([HEARD[how], "words"], "sentences", "way", "sum")
    rates = counts[HEARD[how]] / counts["words"]
    return rates[[way for way in WAYS if way in rates]]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``chatterbox-lab paragraphs``."""
    command.add_model(parser, "lab", "a model that speaks: lab, pretrained")
    command.add_device(parser)
    parser.add_argument("--paragraphs", type=int, metavar="X", default=30, help="of data/paragraphs.txt (default: 30)")
    parser.add_argument("--seed", type=int, metavar="X", default=0, help="of tokens and noise (default: 0)")
    parser.add_argument("--ways", nargs="+", metavar="X", default=list(WAYS), help=f"of {WAYS} (default: all)")
    command.add_record(parser, "paragraphs_MODEL.csv")


def run(options: argparse.Namespace) -> int:
    """Speaks the paragraphs in all `WAYS` and records what is understood."""
    count, seed = whole_number("paragraphs", options.paragraphs, 1), whole_number("seed", options.seed, 0, 2**63 - 1)
    if unknown := [way for way in options.ways if way not in WAYS]:
        raise ValueError(f"ways={unknown!r}: each must be one of {', '.join(map(repr, WAYS))}")
    device, name = pick_device(options.device), command.model_name(options)
    record = command.open_record(options, f"paragraphs_{name}.csv")
    facts = machine_facts(device) | {"model": name, "dtype": "float32"}
    record.check(facts)
    tts = load(options.model, device=device, watermark=False)
    texts = PARAGRAPHS.read_text().splitlines()[:count]
    table = measure(tts, texts, record, ways=options.ways, seed=seed, facts=facts)
    record.finish()
    if APART in options.ways:
        print(summary(table).to_markdown(floatfmt=".3f"))
    print(f"\n{len(record.rows)} rows are in {record.path.name}.")
    return 0
