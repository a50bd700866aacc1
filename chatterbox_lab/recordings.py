"""Recordings whose voice a model takes: read and checked at once, prepared once."""

from __future__ import annotations

import copy
import hashlib
import io
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .host import apart
from .kept import Recent, kept

_SHORTEST = 1.0
_COMFORTABLE = 5.0
"""Seconds. Later releases of Chatterbox refuse less (`ChatterboxTurboTTS.prepare_conditionals`)."""
_SILENCE = 1e-4
"""Of full scale: -80 dB, below the noise of a quiet room."""
_FULL, _CLIPPED = 0.999, 5e-4
"""A sample at this share of the peak is cut off where so many are: an uncut voice has a few in 100,000."""
_PAUSES = 15.0
"""Decibels between loud and quiet frames, below which no pauses are left; a clean recording has 30 to 60."""
_KEPT = 16
_one_at_a_time = threading.Lock()  # upstream fills tables of the whole process while it prepares a voice


@dataclass(frozen=True)
class Recording:
    """Samples that were read: float32 (n,), mono, and their rate in Hz; what tells them from others; their name."""

    samples: np.ndarray
    rate: int
    content: bytes
    name: str

    @property
    def seconds(self) -> float:
        """How long it is."""
        return len(self.samples) / self.rate


def read(source: Any) -> Recording:
    """A recording of at least a second, out of what librosa reads, or out of numbers.

    Args:
        source: a path, an open file or bytes in memory, of any format that libsndfile or, for paths, ffmpeg decodes; or
            ``(samples, rate)``: numbers (n,) or with channels in either order, floats within [-1, 1] or integers.

    Raises:
        ValueError: names the argument, and why it cannot be used: missing, not readable as audio, shorter than a
            second, silent, or with samples that are no numbers.
    """
    if isinstance(source, Recording):
        return source
    name = f"{source!s}" if isinstance(source, (str, Path)) else f"<{type(source).__name__}>"
    samples, rate = _numbers(source, name) if isinstance(source, (tuple, list)) else _decoded(source, name)
    if samples.ndim > 1 and samples.size:
        samples = samples.mean(axis=int(np.argmin(samples.shape)))
    samples = np.ascontiguousarray(samples, dtype=np.float32)
    if len(samples) < _SHORTEST * rate:
        raise _refused(name, f"{len(samples) / rate:.2f} s long, must be at least {_SHORTEST:g} s")
    if not np.isfinite(samples).all():
        raise _refused(name, "has samples that are NaN or infinite, must be numbers")
    if np.abs(samples).max() < _SILENCE:
        raise _refused(name, "is silent, must hold a voice")
    content = hashlib.sha256(samples.tobytes() + rate.to_bytes(8, "little")).digest()
    return Recording(samples, rate, content, name)


def _refused(name: str, why: str) -> ValueError:
    return ValueError(f"audio_prompt_path={name!r}: {why}")


def _decoded(source: Any, name: str) -> tuple[np.ndarray, int]:
    import librosa  # a second to import, for the few who clone a voice

    if isinstance(source, (str, Path)):
        if not Path(source).is_file():
            raise _refused(name, "no such file")
    elif not hasattr(source, "read"):
        raise _refused(name, "must be a path, an open file or (samples, rate)")
    try:
        samples, rate = librosa.load(source, sr=None, mono=False)
    except Exception as error:  # each decoder has its own
        why = str(error) or type(error).__name__
        raise _refused(name, f"not readable as audio ({why})") from error
    return samples, int(rate)


def _numbers(source: Any, name: str) -> tuple[np.ndarray, int]:
    try:
        samples, rate = source
        samples, hertz = np.asarray(samples), int(rate)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _refused(name, f"must be (samples, rate) ({error})") from error
    if samples.ndim not in (1, 2) or samples.dtype.kind not in "fiu" or hertz != rate or not 1000 <= hertz <= 1_000_000:
        shape = f"{samples.dtype} {samples.shape} at {rate!r}"
        raise _refused(name, f"is {shape}; must be numbers (n,) or (n, channels) and a rate of 1000 Hz or more")
    if samples.dtype.kind in "iu":
        half = 2.0 ** (8 * samples.dtype.itemsize - 1)
        samples = samples / half - (samples.dtype.kind == "u")
    return samples, hertz


def expectations(recording: Recording) -> list[str]:
    """What to expect of a recording that is usable but not good; nothing of one that is."""
    samples, found = np.abs(recording.samples), []
    if recording.seconds < _COMFORTABLE:
        found.append(f"only {recording.seconds:.1f} s: the voice may be unlike and unsteady, give 6 to 10 s")
    clipped = float((samples >= _FULL * samples.max()).mean())
    if clipped > _CLIPPED:
        found.append(f"{clipped:.1%} of its samples are clipped: the voice will sound distorted, too")
    size = recording.rate // 40  # 25 ms
    frames = samples[: len(samples) // size * size].reshape(-1, size)
    quiet, loud = np.percentile(10 * np.log10(np.square(frames).mean(1) + 1e-12), [10, 95])
    if loud - quiet < _PAUSES:
        found.append(f"noise or music only {loud - quiet:.0f} dB below the voice: it will be heard with it")
    return found


def prepared(tts: Any, recording: Recording, exaggeration: float = 0.5) -> Any:
    """Upstream's ``Conditionals`` of a recording, the caller's own: what the model's class makes of it, without graph.

    The last 16 recordings, told apart by their content, are kept with the model.

    Raises:
        ValueError: the model has no speaker encoder.
    """
    check_clones(tts)
    with apart(tts.device), torch.no_grad():
        recent: Recent = kept(tts.s3gen, "recordings", lambda: Recent(_KEPT))
        content = torch.frombuffer(bytearray(recording.content), dtype=torch.uint8)
        conds = copy.deepcopy(recent.value({"content": content}, lambda: _prepare(tts, recording)))
        conds.t3.emotion_adv = torch.full_like(conds.t3.emotion_adv, exaggeration)
    return conds


def check_clones(tts: Any) -> None:
    """Raises ValueError for a model that cannot take the voice of a recording."""
    if tts.ve is None:
        raise ValueError("this voice cannot clone: its folder holds no speaker encoder and speech tokenizer")


def _prepare(tts: Any, recording: Recording) -> Any:
    import librosa
    import soundfile
    from chatterbox.models.s3gen import S3GEN_SR

    if found := expectations(recording):
        warnings.warn(f"the recording {recording.name!r} is usable, but {'; '.join(found)}", stacklevel=2)
    samples = recording.samples
    if recording.rate != S3GEN_SR:  # as librosa.load would
        samples = librosa.resample(samples, orig_sr=recording.rate, target_sr=S3GEN_SR)
    file = io.BytesIO()
    soundfile.write(file, samples, S3GEN_SR, format="WAV", subtype="FLOAT")
    file.seek(0)
    twin = copy.copy(tts)  # upstream's method writes to the object that it is called on
    with _one_at_a_time:
        _released(type(tts))(twin, file)
    twin.conds.t3.to(dtype=tts.t3.speech_head.weight.dtype)
    return twin.conds


def _released(kind: type) -> Any:
    """``prepare_conditionals`` as the model's class has it, without what this package has put before it."""
    methods = (vars(base).get("prepare_conditionals") for base in kind.__mro__ if not _is_ours(base))
    return next(method for method in methods if method is not None)


def _is_ours(kind: type) -> bool:
    return kind.__module__.split(".")[0] == __package__
