"""The teacher reads the sentences: speech, mel, phones and pitch of each, in shards that can be made one by one."""

from __future__ import annotations

import difflib
import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import joblib
import librosa
import numpy as np
import soundfile
import torch
import torchaudio
from chatterbox.models.s3gen.const import S3GEN_SR
from chatterbox.models.s3gen.utils.mel import mel_spectrogram
from tqdm import tqdm

from ..files import written_whole
from .phones import PAUSE, PHONES, VOICED
from .text import words

TEACHER = "rms"
HOP = S3GEN_SR // 50  # a mel frame is 20 ms, a speech token two of them
LEAD, TAIL = 0.04, 0.12  # seconds of the silence around the speech that are kept
SHARD = 200  # sentences
PITCH_RANGE = (50.0, 260.0)  # Hz: a man's voice
LIKELY = (68.0, 150.0)  # Hz: what this one speaks at
Time = TypeVar("Time", int, float)  # frames, or seconds


@dataclass
class Utterance:
    """A sentence as the teacher read it.

    ``speech`` is float32 at 24 kHz, ``frames`` x 480 samples; ``mel`` (frames, 80); ``phones`` (frames,) indices into
    `PHONES`; ``pitch`` (frames,) in Hz, 0 where unvoiced; ``spans`` a word each: its phones' (name, first frame, end).
    """

    text: str
    speech: np.ndarray
    mel: np.ndarray
    phones: np.ndarray
    pitch: np.ndarray
    spans: list[list[tuple[str, int, int]]]


def read_aloud(text: str, voice: str = TEACHER) -> tuple[torch.Tensor, list[tuple[str, float]]]:
    """The teacher's speech, (samples,) at 24 kHz, and its phones with the times in seconds at which they end.

    Raises:
        FileNotFoundError: flite is not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = ["flite", "-voice", voice, "-t", text, "-o", f"{folder}/speech.wav", "-psdur"]
        try:
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except FileNotFoundError as error:
            raise FileNotFoundError("flite: not installed; on Debian: apt install flite") from error
        speech, rate = soundfile.read(f"{folder}/speech.wav", dtype="float32")
    timed = [(phone, float(end)) for phone, end in (item.split(":") for item in said.split())]
    return torchaudio.functional.resample(torch.from_numpy(speech), rate, S3GEN_SR), timed


def utterance(text: str, lexicon: dict[str, str]) -> Utterance | None:
    """The sentence read, trimmed and described; None where its phones cannot be told apart into words."""
    speech, timed = read_aloud(text)
    spoken = [index for index, (phone, _) in enumerate(timed) if phone != PAUSE]
    if not spoken or any(word not in lexicon for word in words(text)):
        return None
    start = max(0.0, (timed[spoken[0] - 1][1] if spoken[0] else 0.0) - LEAD)
    frames = 2 * round((timed[spoken[-1]][1] + TAIL - start) * 25)
    cut = torch.nn.functional.pad(speech[round(start * S3GEN_SR) :], (0, frames * HOP))[: frames * HOP]
    ends = np.array([0.0] + [end - start for _, end in timed]) * 50
    edges = np.clip(np.round(ends), 0, frames).astype(int)
    edges[-1] = frames
    names = [phone for phone, _ in timed]
    labels = np.repeat([PHONES.index(name) for name in names], np.diff(edges)).astype(np.uint8)
    spans = by_word(list(zip(names, edges[:-1].tolist(), edges[1:].tolist(), strict=True)), words(text), lexicon)
    if spans is None:
        return None
    mel = mel_spectrogram(cut[None])[0].T.numpy()
    return Utterance(text, cut.numpy(), mel.astype(np.float16), labels, _pitch(cut.numpy(), labels), spans)


def by_word(
    timed: list[tuple[str, Time, Time]], spoken: list[str], lexicon: dict[str, str]
) -> list[list[tuple[str, Time, Time]]] | None:
    """The phones (name, start, end) of each word, matched with those that the lexicon expects; None if they do not."""
    timed = [item for item in timed if item[0] != PAUSE]
    expected = [(word, phone.rstrip("1")) for word, name in enumerate(spoken) for phone in lexicon[name].split()]
    match = difflib.SequenceMatcher(None, [phone for _, phone in expected], [item[0] for item in timed], autojunk=False)
    if match.ratio() < 0.7:
        return None
    owner: list[int | None] = [None] * len(timed)
    for kind, a, a_end, b, b_end in match.get_opcodes():
        if kind in ("equal", "replace"):
            for i in range(b, b_end):
                owner[i] = expected[a + (i - b) * (a_end - a) // (b_end - b)][0]
    for i in range(1, len(owner)):  # an inserted phone belongs to the word before it
        owner[i] = owner[i - 1] if owner[i] is None else owner[i]
    spans: list[list[tuple[str, Time, Time]]] = [[] for _ in spoken]
    for word, item in zip(owner, timed, strict=True):
        spans[word or 0].append(item)
    return spans if all(spans) else None


def _pitch(speech: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """F0 in Hz per frame by YIN, 0 where the phone has no voice."""
    low, high = PITCH_RANGE
    f0 = librosa.yin(speech, fmin=low, fmax=high, sr=S3GEN_SR, frame_length=2048, hop_length=HOP)[: len(labels)]
    voiced = np.isin(labels, [PHONES.index(phone) for phone in VOICED]) & (f0 < 0.95 * high)
    return np.where(voiced, f0, 0).astype(np.float16)


def steady(pitch: np.ndarray) -> np.ndarray:
    """Pitch without the frames in which YIN took a multiple or a part of it: those count as unvoiced."""
    pitch = pitch.astype(np.float32)
    return np.where((pitch > LIKELY[0]) & (pitch < LIKELY[1]), pitch, 0).astype(np.float32)


def make(folder: Path, jobs: int = 2, limit: int | None = None) -> None:
    """Reads ``sentences.json`` aloud into ``shard_*.npz`` and ``.json``; shards that are there are kept."""
    sentences = json.loads((folder / "sentences.json").read_text())[:limit]
    lexicon = json.loads((folder / "lexicon.json").read_text())
    starts = [start for start in range(0, len(sentences), SHARD) if not _shard(folder, start).exists()]
    tasks = (joblib.delayed(_write)(folder, start, sentences[start : start + SHARD], lexicon) for start in starts)
    done = joblib.Parallel(jobs, return_as="generator_unordered")(tasks)
    for _ in tqdm(done, total=len(starts), desc="corpus", unit="shard"):
        pass


def _shard(folder: Path, start: int) -> Path:
    return folder / f"shard_{start // SHARD:04d}.npz"


def _write(folder: Path, start: int, texts: list[str], lexicon: dict[str, str]) -> None:
    torch.set_num_threads(1)
    read = [item for text in texts if (item := utterance(text, lexicon)) is not None]
    described = [{"text": item.text, "frames": len(item.mel), "spans": item.spans} for item in read]
    path = _shard(folder, start)
    with written_whole(path.with_suffix(".json")) as part:
        part.write_text(json.dumps(described))
    with written_whole(path) as part:
        np.savez(
            part,
            speech=np.concatenate([(item.speech * 32767).astype(np.int16) for item in read]),
            **{name: np.concatenate([getattr(item, name) for item in read]) for name in ("mel", "phones", "pitch")},
        )


def load(folder: Path, *, speech: bool = True, limit: int | None = None) -> list[Utterance]:
    """The corpus, ``limit`` shards of it. Without ``speech`` that field is empty. Raises FileNotFoundError."""
    shards = sorted(folder.glob("shard_*.npz"))[:limit]
    if not shards:
        raise FileNotFoundError(f"{folder}: no corpus there; make it with python -m chatterbox_lab.training corpus")
    found = []
    for path in tqdm(shards, desc="loading", unit="shard"):
        held = np.load(path)
        arrays: dict[str, Any] = {name: held[name] for name in ("mel", "phones", "pitch")}
        samples = held["speech"] if speech else np.zeros(0, np.int16)
        start = 0
        for item in json.loads(path.with_suffix(".json").read_text()):
            part = slice(start, start + item["frames"])
            cut = samples[part.start * HOP : part.stop * HOP]
            found.append(
                Utterance(
                    item["text"], cut, *(arrays[name][part] for name in ("mel", "phones", "pitch")), item["spans"]
                )
            )
            start = part.stop
    return found
