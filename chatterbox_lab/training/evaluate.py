"""How well the voice speaks sentences it never saw: word errors and opinion_scores' scores, stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from ..engine.settings import BASELINE
from ..engine.stream import generate_stream, render
from ..files import written_whole
from ..study.hearing import opinion_scores, transcribe, word_error_rate, word_errors
from ..study.trials import HELD_OUT
from ..voices.build import LabTTS
from .corpus import Utterance, read_aloud, utterance
from .text import pronunciations, words
from .tokens import codes

PATHS = ("teacher", "vocoder", "tokens", "stream", "paragraph")
"""The teacher itself; its mel through the vocoder; its tokens through S3Gen, without T3; the whole voice, streamed; and
that on several sentences at once."""
PARAGRAPH = 3  # sentences

_SCORES = ("plcmos", "dnsmos")


def held_out(limit: int | None = None) -> list[str]:
    """The sentences that no training text holds."""
    return HELD_OUT.read_text().splitlines()[:limit]


def measure(tts: LabTTS, path: Path, sentences: list[str], seed: int = 0, scored: int = 20) -> pd.DataFrame:
    """Writes a row for each text and each of `PATHS`: what was understood, errors, scores, seconds of audio.

    Listeners' scores take as long as all the rest, and only the first ``scored`` sentences get them.
    """
    paragraphs = [" ".join(sentences[i : i + PARAGRAPH]) for i in range(0, len(sentences), PARAGRAPH)]
    lexicon = pronunciations(sorted({word for text in sentences for word in words(text)}))
    rows = []
    for number, text in enumerate(tqdm([*sentences, *paragraphs], desc="held out", unit="text")):
        single = number < len(sentences)
        paths = [("paragraph", partial(streamed, tts, text, seed))]
        for name, speak in _paths(tts, text, utterance(text, lexicon), seed) if single else paths:
            audio = speak()
            heard = transcribe(audio)
            row: dict[str, Any] = {"path": name, "text": text, "heard": heard, "seconds": audio.shape[-1] / tts.sr}
            rows.append(row | word_errors(text, heard) | (opinion_scores(audio) if number < scored else {}))
    table = pd.DataFrame(rows).assign(seed=seed)
    with written_whole(path) as part:
        table.to_csv(part, index=False, float_format="%.4f")
    return table


def _paths(
    tts: LabTTS, text: str, read: Utterance | None, seed: int
) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    yield "teacher", lambda: read_aloud(text)[0]
    if read is not None:  # else its phones could not be told apart into words, as in the corpus
        mel = torch.from_numpy(read.mel).float().T[None]
        yield "vocoder", lambda: tts.s3gen.hift_inference(mel)[0]
        yield "tokens", lambda: render(tts, torch.from_numpy(codes(read)), seed=seed)
    yield "stream", lambda: streamed(tts, text, seed)


def streamed(tts: LabTTS, text: str, seed: int) -> torch.Tensor:
    """The joined chunks of a stream at chunk 25, (1, samples)."""
    stream = generate_stream(tts, text, BASELINE, seed=seed, max_new_tokens=400)
    return torch.cat([audio for audio, _ in stream], dim=1)


def read(path: Path) -> pd.DataFrame:
    """What `measure` wrote; nothing understood stays an empty text, and a sentence without scores has none."""
    return pd.read_csv(path, keep_default_na=False, na_values={name: [""] for name in _SCORES})


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """WER and mean scores of each path, in the order of `PATHS`."""
    by_path = table.groupby("path")
    found = pd.DataFrame({"wer": by_path[["words", "errors"]].apply(word_error_rate), "texts": by_path.size()})
    means = [name for name in _SCORES if name in table]
    return found.join(by_path[means].mean()).loc[[path for path in PATHS if path in found.index]]


def markdown(table: pd.DataFrame) -> str:
    """The summary as a table for a card or README."""
    found = summary(table).rename_axis("")
    shown = found.astype(object).where(found.notna(), None)
    return shown.to_markdown(floatfmt=("", ".3f", ".0f", ".2f", ".2f"), missingval="")
