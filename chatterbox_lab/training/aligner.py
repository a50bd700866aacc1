"""How far the aligner of ``chatterbox-lab word-times`` is off, on speech whose times are known: the teacher's own.

flite says when each of its phones ends. They are matched with the words as for the corpus.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from chatterbox.models.s3gen.const import S3GEN_SR
from tqdm import tqdm

from ..engine.clock import Word
from ..engine.settings import whole_number
from ..study import command
from ..study.machine import machine_facts
from ..study.records import Record
from ..study.trials import HELD_OUT
from ..study.word_times import aligned, compared, summary
from .corpus import LEAD, TAIL, TEACHER, by_word, read_aloud
from .text import pronunciations, words


def timed(text: str, lexicon: dict[str, str]) -> tuple[torch.Tensor, list[Word]]:
    """The teacher's speech, (samples,) at 24 kHz, cut as for the corpus, and when each of the words sounds.

    The words are none where their phones cannot be told apart.
    """
    speech, phones = read_aloud(text)
    starts = [0.0, *(end for _, end in phones[:-1])]
    named = [(phone, start, end) for (phone, end), start in zip(phones, starts, strict=True)]
    spans = by_word(named, words(text), lexicon) or []
    said = [word for word in text.split() if words(word)]
    if len(spans) != len(said):
        return speech, []
    begin, end = max(0.0, spans[0][0][1] - LEAD), spans[-1][-1][2] + TAIL
    spoken = [(round(span[0][1] - begin, 3), round(span[-1][2] - begin, 3)) for span in spans]
    times = [Word(word, *span) for word, span in zip(said, spoken, strict=True)]
    return speech[round(begin * S3GEN_SR) : round(end * S3GEN_SR)], times


def measure(
    sentences: Sequence[str], record: Record | None = None, facts: dict[str, Any] | None = None
) -> pd.DataFrame:
    """A row for each word: when it sounds, and when the aligner says so; columns as in `word_times.compared`."""
    lexicon = pronunciations(sorted({word for text in sentences for word in words(text)}))
    rows = record.rows if record else []
    done = {row["text"] for row in rows}
    for text in tqdm([text for text in sentences if text not in done], desc="aligner", unit="sentence"):
        speech, truth = timed(text, lexicon)
        made = [row | (facts or {}) for row in compared(text, truth, aligned(text, speech))]
        if record:
            record.add(made)
        else:
            rows += made
    return pd.DataFrame(rows)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``chatterbox-lab aligner``."""
    parser.add_argument("--sentences", type=int, metavar="X", default=30, help="of data/heldout.txt (default: 30)")
    command.add_record(parser, f"aligner_{TEACHER}.csv")


def run(options: argparse.Namespace) -> int:
    """Aligns what flite reads and records how far each word is off."""
    count = whole_number("sentences", options.sentences, 1)
    record = command.open_record(options, f"aligner_{TEACHER}.csv")
    facts = machine_facts("cpu") | {"model": f"flite {TEACHER}", "dtype": "float32"}
    record.check(facts)
    table = measure(HELD_OUT.read_text().splitlines()[:count], record, facts)
    record.finish()
    print(summary(table).to_markdown(floatfmt=".0f"))
    print(f"\n{len(record.rows)} rows are in {record.path.name}.")
    return 0
