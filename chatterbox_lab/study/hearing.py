"""How a stream sounds, as programs judge it: a recogniser, two models of listeners, and measures of the seams.

Audio is float32 at 24 kHz, (samples,) or (1, samples), as `generate_stream` yields it. A seam is the sample at which
a chunk begins.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
import torchaudio
from chatterbox.models.s3gen.const import S3GEN_SR
from chatterbox.models.s3gen.utils.mel import mel_spectrogram

if TYPE_CHECKING:
    from pocketsphinx import Decoder

RATE = 16000  # Hz, what recogniser and listeners take
_LEVEL, _NEAR, _SIDE = S3GEN_SR // 100, S3GEN_SR // 50, S3GEN_SR // 25  # 10 ms within 20 ms, and 40 ms beside them
_QUIET = 10 ** (-50 / 20)  # amplitude below which a place counts as silence
DECIBELS = 20 / math.log(10)
"""Decibels in one unit of a natural logarithm of amplitudes, such as a mel is here."""


def transcribe(audio: torch.Tensor) -> str:
    """What pocketsphinx understands with its general US English models, in lower case. Raises ValueError."""
    if np.abs(_resampled(audio)).max() < _QUIET:
        return ""  # the recogniser hears a word in digital silence
    decoder = recogniser()
    decoder.start_utt()
    decoder.process_raw(sixteen_bits(audio), full_utt=True)
    decoder.end_utt()
    return decoder.hyp().hypstr if decoder.hyp() else ""


def recogniser(**options: Any) -> Decoder:
    """A new pocketsphinx, since one adapts to what it has heard, with its general US English models; it takes `RATE`.

    ``lm=None`` leaves out the language model, which aligning a known text does not need.
    """
    from pocketsphinx import Decoder

    return Decoder(samprate=RATE, loglevel="FATAL", **options)


def sixteen_bits(audio: torch.Tensor) -> bytes:
    """Audio as the recogniser takes it: 16-bit samples at `RATE`."""
    return (_resampled(audio).clip(-1, 1) * 32767).astype(np.int16).tobytes()


def word_errors(said: str, understood: str) -> dict[str, float]:
    """Word errors of one sentence: ``words`` said, ``errors`` among them, ``wer`` their ratio (may exceed 1).

    Case and punctuation do not count. Raises ValueError where nothing was said.
    """
    import jiwer

    reference = _plain(said)
    if not reference:
        raise ValueError(f"said={said!r}: must hold at least one word")
    counted = jiwer.process_words(reference, _plain(understood))
    errors = counted.substitutions + counted.deletions + counted.insertions
    count = len(reference.split())
    return {"words": count, "errors": errors, "wer": errors / count}


def repeats(said: str, understood: str) -> int:
    """How often one to three words in a row were understood twice, beyond the repetitions in the text itself."""
    return max(0, _twice(_plain(understood).split()) - _twice(_plain(said).split()))


def _twice(words: list[str]) -> int:
    return sum(words[i : i + n] == words[i + n : i + 2 * n] for n in (1, 2, 3) for i in range(len(words) - 2 * n + 1))


def word_error_rate(table: pd.DataFrame) -> float:
    """Errors per word said over all rows of `word_errors`: long sentences count for more than short ones."""
    return float(table.errors.sum() / table.words.sum())


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))


def opinion_scores(audio: torch.Tensor, *, noise: bool = True) -> dict[str, float]:
    """Mean opinion scores, 1 to 5, as models of listeners predict them: ``plcmos``, and with ``noise`` ``dnsmos``.

    PLCMOS (Diener et al. 2023) is trained on lost and concealed packets, so it hears breaks. DNSMOS P.835 (Reddy et
    al. 2022) hears noise and distortion; this is its overall score, and it takes several times as long. Both come with
    ``speechmos``.
    """
    from speechmos import plcmos  # it loads onnxruntime, which takes a second

    samples = _resampled(audio).clip(-1, 1)
    found = {"plcmos": float(plcmos.run(samples, sr=RATE)["plcmos"])}
    if noise:
        from speechmos import dnsmos

        found["dnsmos"] = float(dnsmos.run(samples, sr=RATE)["ovrl_mos"])
    return found


def seam_dips(audio: torch.Tensor, seams: Sequence[int]) -> np.ndarray:
    """The lowest level of 10 ms within 20 ms of each seam against the 40 ms on either side, in dB; nan in silence.

    Negative is a dip. Voiced speech has one or two pitch periods in 10 ms, so its own ripple stays small.
    """
    samples = _samples(audio)
    return np.array([_dip(samples, seam) for seam in _checked(seams, len(samples))])


def _dip(samples: np.ndarray, seam: int) -> float:
    first, end = max(0, seam - _NEAR), min(len(samples), seam + _NEAR)
    beside = _level(np.concatenate([samples[max(0, first - _SIDE) : first], samples[end : end + _SIDE]]))
    if beside < _QUIET:
        return float("nan")
    starts = range(first, max(first + 1, end - _LEVEL + 1), _LEVEL // 4)
    lowest = min(_level(samples[start : start + _LEVEL]) for start in starts)
    return 20 * float(np.log10(max(lowest, 1e-6) / beside))


def _level(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(samples)))) if len(samples) else 0.0


def seam_flux(audio: torch.Tensor, seams: Sequence[int]) -> np.ndarray:
    """Spectral flux at each seam in dB: the mean change of the log spectrum (0 to 8 kHz) from 20 ms before to after."""
    samples, size = _samples(audio), S3GEN_SR // 50
    window, top = np.hanning(size), round(8000 * size / S3GEN_SR)

    def spectrum(start: int) -> np.ndarray:
        part = np.zeros(size)
        cut = samples[max(0, start) : start + size]
        part[: len(cut)] = cut
        return np.log(np.maximum(np.abs(np.fft.rfft(part * window))[:top], 1e-3))

    found = [DECIBELS * np.abs(spectrum(seam) - spectrum(seam - size)).mean() for seam in _checked(seams, len(samples))]
    return np.array(found)


def mel_distance(audio: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean distance of two log-mels of the same length, in dB. Raises ValueError for different lengths."""
    ours, theirs = (torch.from_numpy(_samples(item))[None] for item in (audio, reference))
    if ours.shape != theirs.shape:
        raise ValueError(f"audio={ours.shape[1]} samples: must be as long as the reference, {theirs.shape[1]}")
    return DECIBELS * float((mel_spectrogram(ours) - mel_spectrogram(theirs)).abs().mean())


def joins(audio: torch.Tensor, seams: Sequence[int], reference: torch.Tensor | None = None) -> dict[str, float]:
    """The mean dip and the mean flux at an utterance's seams, and what a whole decode of the same tokens has there.

    Speech dips and changes by itself, so compare ``dip`` and ``flux`` with ``reference_dip`` and ``reference_flux``.
    All are nan where there is no seam; dips are nan where every seam is in silence.
    """
    found = {"dip": _mean(seam_dips(audio, seams)), "flux": _mean(seam_flux(audio, seams))}
    if reference is not None:
        found |= {
            "reference_dip": _mean(seam_dips(reference, seams)),
            "reference_flux": _mean(seam_flux(reference, seams)),
            "mel_distance": mel_distance(audio, reference),
        }
    return found


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def silent_end(audio: torch.Tensor) -> float:
    """Seconds at the end that are below -50 dB of full scale."""
    samples = _samples(audio)
    loud = np.flatnonzero(np.abs(samples) > _QUIET)
    return (len(samples) - (int(loud[-1]) + 1 if len(loud) else 0)) / S3GEN_SR


def silences(audio: torch.Tensor, level: float = _QUIET) -> list[tuple[int, int]]:
    """The stretches of samples (first, end) whose amplitude is at most ``level``, -50 dB of full scale if not given.

    Sound passes zero as well, so single samples are among them: choose by length.
    """
    quiet = np.concatenate([[False], np.abs(_samples(audio)) <= level, [False]])
    edges = np.flatnonzero(quiet[1:] != quiet[:-1])
    return [(int(start), int(end)) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def _checked(seams: Sequence[int], length: int) -> Sequence[int]:
    wrong = [seam for seam in seams if not 0 < seam < length]
    if wrong:
        raise ValueError(f"seams={wrong[0]}: must lie within the audio's {length} samples")
    return seams


def _samples(audio: torch.Tensor) -> np.ndarray:
    samples = torch.as_tensor(audio).detach().cpu().float()
    samples = samples[0] if samples.ndim == 2 and len(samples) == 1 else samples
    if samples.ndim != 1 or not len(samples) or not samples.isfinite().all():
        raise ValueError(f"audio={tuple(samples.shape)}: must be (samples,) or (1, samples), finite and not empty")
    return samples.numpy()


def _resampled(audio: torch.Tensor) -> np.ndarray:
    return torchaudio.functional.resample(torch.from_numpy(_samples(audio)), S3GEN_SR, RATE).numpy()
