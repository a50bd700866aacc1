"""Recordings whose voice a model takes: read and checked at once, prepared once."""

from __future__ import annotations

import copy
import hashlib
import io
import math
import os
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from .host import apart, building
from .kept import Recent, drop, kept, notice

_SHORTEST = 1.0
_COMFORTABLE = 5.0
"""Seconds. Later releases of Chatterbox refuse less (`ChatterboxTurboTTS.prepare_conditionals`)."""
_SILENCE = 1e-4
"""Of full scale: -80 dB, below the noise of a quiet room."""
_LOUDEST = 16.0
"""Of full scale: more are integers in the clothes of floats; mixing goes a few times over full scale, not further."""
_FULL, _NEARLY, _CLIPPED = 0.999, 0.95, 3e-3
"""Shares of the peak, and how many samples at it are a flat top. Measured on speech of flite and the lab voice: uncut,
it has under 0.0003 there, also with 4 bits a sample; cut at a share of its samples, just that share."""
_NOISE = 20.0
"""Decibels of `_noise_below`. Measured on the same speech, with and without pauses, at 8 to 48 kHz, as MP3, quiet and
compressed: 29 and more for 5 s and longer, 21 and more for 1.5 s; with white or pink noise, a hum, a tone or a chord
10 dB below it 11 to 18, 20 dB below it 20 to 27."""
_HEARD = 10.0
"""Seconds of a recording that S3Gen takes as its prompt, the first ones (``ChatterboxTTS.DEC_COND_LEN``)."""
_KEPT = 16
_one_at_a_time = threading.Lock()  # upstream fills tables of the whole process while it prepares a voice


@dataclass(frozen=True, eq=False)
class Recording:
    """Samples that were read: float32 (n,), mono, and their rate in Hz; what tells them from others; their name.

    ``norm_loudness`` says whether Turbo and Nano bring them to -27 LUFS.
    """

    samples: np.ndarray
    rate: int
    content: bytes
    name: str
    norm_loudness: bool = True

    @property
    def seconds(self) -> float:
        """How long it is."""
        return len(self.samples) / self.rate


def asked(tts: Any, source: Any, norm_loudness: Any = True) -> Recording | None:
    """The recording that a call's ``audio_prompt_path`` asks for; None where upstream takes it for none.

    Raises:
        ValueError: as `taken`.
    """
    if source is None or (isinstance(source, (str, bytes, bool)) and not source):
        _flag(norm_loudness)
        return None
    return taken(tts, source, norm_loudness)


def taken(tts: Any, source: Any, norm_loudness: Any = True) -> Recording:
    """A recording that this model can take the voice of.

    Args:
        tts: a Chatterbox.
        source: as for `read`.
        norm_loudness: whether Turbo and Nano bring it to -27 LUFS first; others leave it as it is.

    Raises:
        ValueError: as `read` and `long_enough`, ``norm_loudness`` is neither True nor False, or the model has no
            speaker encoder.
    """
    _flag(norm_loudness)
    check_clones(tts)
    return replace(long_enough(read(source), type(tts)), norm_loudness=norm_loudness)


def _flag(norm_loudness: Any) -> None:
    if not isinstance(norm_loudness, bool):
        raise ValueError(f"norm_loudness={norm_loudness!r}: must be True or False")


def long_enough(recording: Recording, kind: type) -> Recording:
    """The recording, if a model of this class takes one of its length. Raises ValueError."""
    if _levels(kind) and recording.seconds <= _COMFORTABLE:
        text = f"{recording.seconds:.2f} s long, must be longer than {_COMFORTABLE:g} s for Turbo and Nano"
        raise _refused(recording.name, text)
    return recording


def _levels(kind: type) -> bool:
    """Whether models of this class bring a recording to one loudness, and refuse short ones: Turbo and Nano do."""
    return hasattr(kind, "norm_loudness")


def read(source: Any) -> Recording:
    """A recording of at least a second, out of what librosa reads, or out of numbers.

    Args:
        source: a path, an open file or bytes in memory, of any format that libsndfile or, for paths, ffmpeg decodes; or
            ``(samples, rate)``: numbers (n,) or with channels in either order, floats within [-1, 1] or integers of up
            to 32 bits. A file is read from where it stands, or from its start where no recording begins there, and
            stands there again afterwards; numbers are copied.

    Raises:
        ValueError: names the argument, and why it cannot be used: missing, not readable as audio, shorter than a
            second, silent, or with samples that are no numbers.
    """
    if isinstance(source, Recording):
        return source
    path = isinstance(source, (str, bytes, os.PathLike))
    name = os.fsdecode(source) if path else f"<{type(source).__name__}>"
    samples, rate = _numbers(source, name) if isinstance(source, (tuple, list)) else _decoded(source, name)
    seconds = samples.shape[1] / rate if len(samples) else 0.0
    if seconds < _SHORTEST:
        raise _refused(name, f"{seconds:.2f} s long, must be at least {_SHORTEST:g} s")
    if not np.isfinite(samples).all():
        raise _refused(name, "has samples that are NaN or infinite, must be numbers")
    if (peak := float(np.abs(samples).max())) > _LOUDEST:
        raise _refused(name, f"has samples of up to {peak:g}, must be within [-1, 1]")
    mono = np.array(samples.mean(axis=0), dtype=np.float32)
    if np.ptp(mono) < 2 * _SILENCE:
        raise _refused(name, "is silent, must hold a voice")
    content = hashlib.sha256(mono.tobytes() + rate.to_bytes(8, "little")).digest()
    return Recording(mono, rate, content, name)


def _refused(name: str, why: str) -> ValueError:
    return ValueError(f"audio_prompt_path={name!r}: {why}")


class _UnreadableError(Exception):
    """Why a source holds no recording."""


def _decoded(source: Any, name: str) -> tuple[np.ndarray, int]:
    """Samples (channels, n) and rate of what holds encoded sound."""
    import soundfile

    try:
        if isinstance(source, (str, bytes, os.PathLike)):
            return _of_path(os.fsdecode(source))
        if isinstance(source, soundfile.SoundFile):
            return _of_places(source, lambda: _of_soundfile(source))
        if callable(getattr(source, "read", None)):
            return _of_places(source, lambda: _of_bytes(source.read()))
        if hasattr(source, "samplerate") and hasattr(source, "channels"):  # one of audioread's decoders
            return _of_audioread(source)
    except _UnreadableError as error:
        raise _refused(name, str(error)) from error
    except Exception as error:  # each decoder, and each kind of file, has its own
        why = str(error) or type(error).__name__
        raise _refused(name, f"not readable as audio ({why})") from error
    raise _refused(name, "must be a path, an open file or (samples, rate)")


def _of_path(path: str) -> tuple[np.ndarray, int]:
    import soundfile

    if not Path(path).is_file():
        raise _UnreadableError("is a folder, must be a file" if Path(path).is_dir() else "no such file")
    try:
        with soundfile.SoundFile(path) as file:
            return _of_soundfile(file)
    except soundfile.SoundFileRuntimeError as error:
        import audioread  # what librosa falls back to, for MP4 and the like

        try:
            with audioread.audio_open(path) as reader:
                return _of_audioread(reader)
        except audioread.NoBackendError:
            raise error from None


def _of_places(file: Any, decode: Callable[[], tuple[np.ndarray, int]]) -> tuple[np.ndarray, int]:
    """What begins where a file stands, else what begins at its start; it stands there again afterwards."""
    try:
        here = file.tell()
        file.seek(here)
    except (AttributeError, OSError, ValueError):  # a pipe, or what comes over a network
        return decode()
    try:
        return decode()
    except Exception:
        if here == 0:
            raise
        file.seek(0)  # it stands at the end of what was just written to it
        return decode()
    finally:
        file.seek(here)


def _of_bytes(data: Any) -> tuple[np.ndarray, int]:
    import soundfile

    if not isinstance(data, (bytes, bytearray, memoryview)):
        if hasattr(data, "close"):
            data.close()  # a coroutine would complain that nobody waited for it
        raise _UnreadableError(f"its read() gives {type(data).__name__}, must give bytes: open it in binary mode")
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        return _of_soundfile(file)


def _of_soundfile(file: Any) -> tuple[np.ndarray, int]:
    samples = file.read(dtype="float32", always_2d=True).T
    if not samples.size:
        raise _UnreadableError("holds no samples")
    return samples, file.samplerate


def _of_audioread(reader: Any) -> tuple[np.ndarray, int]:
    samples = np.frombuffer(b"".join(reader), dtype="<i2").astype(np.float32) / 2**15
    return samples.reshape(-1, reader.channels).T, reader.samplerate


def _numbers(source: Any, name: str) -> tuple[np.ndarray, int]:
    """Samples (channels, n), floats, and rate of ``(samples, rate)``."""
    try:
        samples, rate = source
        if torch.is_tensor(samples):
            samples = samples.detach().cpu()
            samples = samples.double() if samples.is_floating_point() else samples
        samples, hertz = np.asarray(samples), int(rate) if np.ndim(rate) == 0 else 0
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise _refused(name, f"must be (samples, rate), in this order ({error})") from error
    kind, size = samples.dtype.kind, samples.dtype.itemsize
    numbers = kind == "f" or (kind in "iu" and size <= 4)
    if samples.ndim not in (1, 2) or not numbers or hertz == 0 or hertz != rate or not 1000 <= hertz <= 1_000_000:
        shape = f"{samples.dtype} {samples.shape}" + (f" at {rate!r}" if np.ndim(rate) == 0 else "")
        allowed = "(n,) or (n, channels), floats or integers of up to 32 bits, at 1000 Hz or more"
        raise _refused(name, f"is {shape}; must be (samples, rate), in this order: {allowed}")
    samples = np.atleast_2d(samples if samples.ndim == 1 or len(samples) <= samples.shape[1] else samples.T)
    if kind == "f":
        return samples.astype(np.promote_types(samples.dtype, np.float32)), hertz
    half = 2.0 ** (8 * size - 1)
    return samples / half - (kind == "u"), hertz


def check_clones(tts: Any) -> None:
    """Raises ValueError for a model that cannot take the voice of a recording."""
    if tts.ve is None:
        raise ValueError("this voice cannot clone: its folder holds no speaker encoder and speech tokenizer")


def expectations(recording: Recording) -> list[str]:
    """What to expect of a recording that is usable but not good; nothing of one that is."""
    samples, found = recording.samples, []
    if recording.seconds < _COMFORTABLE:
        found.append(f"only {recording.seconds:.1f} s: the voice may be unlike and unsteady, give 6 to 10 s")
    clipped = _flat_tops(samples)
    if clipped > _CLIPPED:
        found.append(f"{clipped:.1%} of its samples are clipped: the voice will sound distorted, too")
    if _noise_below(samples[: round(_HEARD * recording.rate)], recording.rate) < _NOISE:
        found.append("noise or music close below the voice: it will be heard with it")
    return found


def _flat_tops(samples: np.ndarray) -> float:
    """The share of samples that are cut off at the top or the bottom; 0 where the peaks are rounded."""
    share = 0.0
    for side in (samples, -samples):
        peak = side.max()
        at, below = (float((side >= part * peak).mean()) for part in (_FULL, _NEARLY))
        share += at if at > below - at else 0.0  # few levels, or a pure tone, have many at the peak, more below it
    return share


def _noise_below(samples: np.ndarray, rate: int) -> float:
    """How many decibels lower than the whole is what never falls silent in it.

    That is, per frequency, what 95% of the stretches of 48 ms exceed. Digital silence is left out: noise may go on
    around it.
    """
    size = max(round(0.032 * rate), 16)
    frames = np.lib.stride_tricks.sliding_window_view(samples, size)[:: size // 2]
    power = np.square(np.abs(np.fft.rfft(frames * np.hanning(size).astype(np.float32))))
    power = power[: len(power) // 2 * 2].reshape(-1, 2, power.shape[1]).mean(axis=1)
    total = power.sum(axis=1)
    power = power[total > 1e-6 * total.max()]
    steady = np.percentile(power, 5, axis=0).sum()
    return float(10 * np.log10(power.mean(axis=0).sum() / max(steady, 1e-20)))


def prepared(tts: Any, recording: Recording, exaggeration: float = 0.5) -> Any:
    """Upstream's ``Conditionals`` of a recording, the caller's own: what the model's class makes of it, without graph.

    The last 16 recordings, told apart by their content, are kept with the model until its weights change.

    Raises:
        ValueError: the model has no speaker encoder, or the exaggeration is no number from 0.
    """
    check_clones(tts)
    strength = _strength(exaggeration)
    how = bytes([_levels(type(tts)) and recording.norm_loudness])
    with apart(tts.device), torch.inference_mode(False), torch.no_grad():
        content = torch.frombuffer(bytearray(recording.content + how), dtype=torch.uint8)
        conds = copy.deepcopy(_recent(tts).value({"content": content}, lambda: _prepare(tts, recording)))
        conds.t3.emotion_adv = torch.full_like(conds.t3.emotion_adv, strength)
        conds.t3.to(dtype=tts.t3.speech_head.weight.dtype)
    return conds


def _strength(exaggeration: Any) -> float:
    try:
        strength = math.nan if isinstance(exaggeration, (str, bytes, bool)) else float(exaggeration)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        strength = math.nan
    if not 0 <= strength <= torch.finfo(torch.float32).max:
        raise ValueError(f"exaggeration={exaggeration!r}: must be a number, at least 0")
    return strength


class _Encoder:
    """Stands for the weights of a voice encoder: kept with it, and another one once they change."""


def _recent(tts: Any) -> Recent:
    """What this class of model has prepared last with these encoders, as long as their weights stay."""
    changed = [notice(part) for part in (tts.ve, tts.s3gen.tokenizer, tts.s3gen.speaker_encoder)]
    if any(changed):
        drop(tts.s3gen)
    encoder = kept(tts.ve, "recordings", _Encoder)
    return kept(tts.s3gen, ("recordings", _released(type(tts))), WeakKeyDictionary).setdefault(encoder, Recent(_KEPT))


def _prepare(tts: Any, recording: Recording) -> Any:
    import soundfile
    from chatterbox.models.s3gen import s3gen as s3gen_module

    if found := expectations(recording):
        text = f"the recording {recording.name!r} is usable, but {'; '.join(found)}"
        warnings.warn(text, stacklevel=_level_of_the_caller())
    file = io.BytesIO()  # each release resamples in its own way
    soundfile.write(file, recording.samples, recording.rate, format="WAV", subtype="FLOAT")
    file.seek(0)
    how = {"norm_loudness": recording.norm_loudness} if _levels(type(tts)) else {}
    twin = copy.copy(tts)  # upstream's method writes to the object that it is called on
    with _one_at_a_time, building():
        loud, s3gen_module.logging = s3gen_module.logging, _QUIET
        try:
            _released(type(tts))(twin, file, **how)
        finally:
            s3gen_module.logging = loud
    return twin.conds


_QUIET = SimpleNamespace(warning=lambda *_: None)
"""In place of ``logging``, which upstream calls for every recording that is no multiple of 40 ms, about which nothing
needs to be done; its first call would set up the application's logging."""


def _level_of_the_caller() -> int:
    """The ``stacklevel`` of a warning, given where this is called, that names the line outside of this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    return level


def _released(kind: type) -> Any:
    """``prepare_conditionals`` as the model's class has it, without what this package has put before it."""
    bases = list(kind.__mro__)
    ours = [number for number, base in enumerate(bases) if _is_ours(base.__module__)]
    methods = (vars(base).get("prepare_conditionals") for base in bases[max(ours, default=-1) + 1 :])
    return next(method for method in methods if method is not None)


def _is_ours(module: str) -> bool:
    return module.split(".")[0] == __package__
