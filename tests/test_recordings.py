from __future__ import annotations

import copy
import gc
import io
import logging
import re
import shutil
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import psutil
import pytest
import soundfile
import torch
from chatterbox.tts import ChatterboxTTS, Conditionals
from conftest import TEXT

import chatterbox_lab as lab
from chatterbox_lab import recordings
from chatterbox_lab.voices import load as models

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
needs_flite = pytest.mark.skipif(shutil.which("flite") is None, reason="flite is not installed")


def speech(seconds: float = 6.0, rate: int = 24000, seed: int = 0) -> np.ndarray:
    """What has the looks of clean speech, float32 (n,): voiced and unvoiced sounds of 80 ms, a pause after nine."""
    random, time, parts = np.random.default_rng(seed), np.arange(round(0.08 * rate)) / rate, []
    for number in range(round(seconds / 0.08) + 1):
        if number % 10 == 9:
            parts.append(np.zeros(len(time)))
        elif number % 3 == 2:
            parts.append(0.05 * random.standard_normal(len(time)) * np.hanning(len(time)))
        else:
            pitch, formant = random.uniform(90, 180), random.uniform(300, 2500)
            waves = [
                np.sin(2 * np.pi * k * pitch * time) / (1 + ((k * pitch - formant) / 300) ** 2)
                for k in range(1, int(min(rate / 2, 5000) / pitch))
            ]
            parts.append(np.hanning(len(time)) * sum(waves))
    found = np.concatenate(parts)[: round(seconds * rate)]
    return (0.5 * found / np.abs(found).max()).astype(np.float32)


def noise(seconds: float = 2.0, seed: int = 0) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * 24000)).astype(np.float32)


def wav(samples: np.ndarray, rate: int = 24000, subtype: str = "FLOAT") -> io.BytesIO:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype=subtype)
    file.seek(0)
    return file


def plain(tts: Any) -> ChatterboxTTS:
    """The same model as an object of upstream's own class."""
    other = ChatterboxTTS.__new__(ChatterboxTTS)
    vars(other).update(vars(tts))
    return other


def of_upstream(tts: Any, source: Any, exaggeration: float = 0.5) -> Conditionals:
    other = plain(tts)
    ChatterboxTTS.prepare_conditionals(other, source, exaggeration)
    return other.conds


def tensors(conds: Conditionals) -> dict[str, torch.Tensor]:
    both = {f"t3.{name}": value for name, value in vars(conds.t3).items()} | {
        f"gen.{name}": value for name, value in conds.gen.items()
    }
    return {name: value for name, value in both.items() if torch.is_tensor(value)}


def same(one: Conditionals, other: Conditionals) -> bool:
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype for name in ours)
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def no_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model ran")

    monkeypatch.setattr(torch.nn.Module, "__call__", run)
    monkeypatch.setattr(recordings, "_prepare", run)


@pytest.fixture(autouse=True)
def nothing_prepared(voice: Any) -> None:
    """Each test begins with a model that has prepared no recording."""
    lab.forget(voice)


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the recordings that are prepared."""
    names, inner = [], recordings._prepare
    monkeypatch.setattr(recordings, "_prepare", lambda tts, rec: names.append(rec.name) or inner(tts, rec))
    return names


# Without graph


def by_prepare(tts: Any, source: Any) -> None:
    tts.prepare_conditionals(source)


def by_generate(tts: Any, source: Any) -> None:
    tts.generate(TEXT, source, max_new_tokens=1)


def by_stream(tts: Any, source: Any) -> None:
    stream = tts.generate_stream(TEXT, source, chunk_size=1, max_new_tokens=1, print_metrics=False)
    for _ in stream:
        pass


WAYS = [by_prepare, by_generate, by_stream]


@pytest.mark.filterwarnings("ignore:the recording")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["as is", "inference"])
def test_a_voice_has_no_graph_and_can_be_copied(tts: Any, way: Callable[..., None], mode: str) -> None:
    for model in (plain(tts), tts):
        guard = torch.inference_mode() if mode == "inference" else torch.set_grad_enabled(True)
        with lab.patch(model), guard:
            way(model, (noise(), 24000))
        if model is tts and way is by_prepare:  # without the patch, too
            with torch.inference_mode(mode == "inference"):
                way(model, (noise(), 24000))
        assert model.conds is not None
        for name, value in tensors(model.conds).items():
            assert not value.requires_grad, name
            assert value.grad_fn is None, name
            assert not value.is_inference(), name
        assert same(copy.deepcopy(model.conds), model.conds)
        model.conds.gen["embedding"].mul_(1)
        assert same(model.conds, of_upstream(tts, wav(noise())))


@pytest.mark.filterwarnings("ignore:the recording")
def test_recordings_by_the_dozen_leave_little_in_memory(tts: Any) -> None:
    def used() -> int:
        gc.collect()
        return psutil.Process().memory_info().rss

    library = []
    for number in range(50):
        tts.prepare_conditionals((noise(seed=number), 24000))
        library.append(tts.conds)
        if number == 19:
            before = used()
    assert used() - before < 40 * 2**20  # upstream's graphs have 25 MB a recording of this length
    assert sum(value.numel() * value.element_size() for c in library for value in tensors(c).values()) < 50 * 2**17
    (kept,) = recordings.kept(tts.s3gen, ("recordings", ChatterboxTTS.prepare_conditionals), dict).values()
    assert len(kept._entries) == 16


# As upstream


FILES = {
    "24k.wav": (24000, 1, {}),
    "16k.wav": (16000, 1, {}),
    "44k_stereo.wav": (44100, 2, {}),
    "48k_float.wav": (48000, 2, {"subtype": "FLOAT"}),
    "8k_ulaw.wav": (8000, 1, {"subtype": "ULAW"}),
    "24bit.wav": (44100, 1, {"subtype": "PCM_24"}),
    "8bit.wav": (22050, 1, {"subtype": "PCM_U8"}),
    "speech.flac": (44100, 2, {}),
    "speech.ogg": (24000, 1, {}),
    "speech.mp3": (44100, 2, {}),
}


def written(folder: Path, name: str, seconds: float = 6.0) -> Path:
    rate, channels, options = FILES[name]
    one = speech(seconds, rate)
    soundfile.write(folder / name, np.stack([one, 0.5 * np.roll(one, 99)], 1)[:, :channels], rate, **options)
    return folder / name


def as_mp4(path: Path) -> Path:
    subprocess.run(["ffmpeg", "-v", "error", "-i", path, path.with_suffix(".m4a")], check=True)
    return path.with_suffix(".m4a")


@pytest.mark.parametrize("name", FILES)
def test_a_voice_is_upstreams_own_to_the_bit(tts: Any, tmp_path: Path, name: str) -> None:
    path = written(tmp_path, name, 6.01)
    tts.prepare_conditionals(path, exaggeration=0.7)
    assert same(tts.conds, of_upstream(tts, path, 0.7))
    other = plain(tts)
    with lab.patch(other):
        other.prepare_conditionals(str(path), 0.3)
    assert same(other.conds, of_upstream(tts, path, 0.3))


@needs_ffmpeg
@pytest.mark.filterwarnings("ignore:PySoundFile failed", "ignore:librosa.core.audio:FutureWarning")
def test_what_only_ffmpeg_decodes_is_upstreams_own_to_the_bit(tts: Any, tmp_path: Path) -> None:
    path = as_mp4(written(tmp_path, "44k_stereo.wav"))
    tts.prepare_conditionals(path)
    assert same(tts.conds, of_upstream(tts, path))


def test_a_class_with_its_own_way_to_prepare_a_voice_keeps_it(tts: Any) -> None:
    class Louder(ChatterboxTTS):
        def prepare_conditionals(self, wav_fpath: Any, exaggeration: float = 0.5) -> None:
            samples, rate = soundfile.read(wav_fpath, dtype="float32")
            super().prepare_conditionals(wav(2 * samples, rate), exaggeration)

    louder = Louder.__new__(Louder)
    vars(louder).update(vars(tts))
    tts.prepare_conditionals(wav(speech()))  # the same recording, prepared by another class
    with lab.patch(louder):
        louder.prepare_conditionals(wav(speech()))
    assert same(louder.conds, of_upstream(tts, wav(2 * speech())))

    class Own(type(tts)):
        def prepare_conditionals(self, wav_fpath: Any, exaggeration: float = 0.5) -> None:
            super().prepare_conditionals(wav_fpath, exaggeration)
            self.conds.gen["by"] = "own"

    own = Own.__new__(Own)
    vars(own).update(vars(tts))
    own.prepare_conditionals(wav(speech()))
    assert own.conds.gen["by"] == "own"


# What is taken


def at_end(file: io.BytesIO) -> io.BytesIO:
    file.seek(0, io.SEEK_END)
    return file


def in_the_midst(file: io.BytesIO) -> io.BytesIO:
    file.seek(1000)
    return file


class Pipe(io.RawIOBase):
    """Bytes that can be read once, such as those of a response."""

    def __init__(self, data: bytes) -> None:
        self.rest = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self.rest.read(size)


class PathLike:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


SOURCES: dict[str, Callable[[Path], Any]] = {
    "a str": str,
    "a Path": Path,
    "bytes of a path": lambda path: str(path).encode(),
    "what has __fspath__": PathLike,
    "a file": lambda path: path.open("rb"),
    "an unbuffered file": lambda path: path.open("rb", buffering=0),
    "bytes in memory": lambda path: io.BytesIO(path.read_bytes()),
    "bytes just written": lambda path: at_end(io.BytesIO(path.read_bytes())),
    "bytes from the midst": lambda path: in_the_midst(io.BytesIO(path.read_bytes())),
    "a pipe": lambda path: Pipe(path.read_bytes()),
    "a SoundFile": soundfile.SoundFile,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_what_librosa_reads_is_read(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path, "44k_stereo.wav")
    expected = librosa.load(path, sr=None)
    source = SOURCES[kind](path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = recordings.read(source)
    assert np.array_equal(found.samples, expected[0])
    assert (found.rate, found.samples.dtype, found.seconds) == (44100, np.float32, 6.0)
    if kind != "a pipe":
        assert recordings.read(source).content == found.content  # it can be given again
    if hasattr(source, "close"):
        source.close()


def test_a_file_is_left_as_it_was_and_read_from_where_it_stands() -> None:
    one, other = wav(speech(seed=1)).getvalue(), wav(speech(seed=2)).getvalue()
    file = io.BytesIO(one + other)
    file.seek(len(one))
    assert np.array_equal(recordings.read(file).samples, librosa.load(io.BytesIO(other), sr=None)[0])
    assert file.tell() == len(one)
    sound = soundfile.SoundFile(wav(speech(6)))
    sound.seek(2 * 24000)
    assert recordings.read(sound).seconds == 4.0
    assert sound.tell() == 2 * 24000
    assert not sound.closed


@needs_ffmpeg
@pytest.mark.filterwarnings("ignore:librosa.core.audio:FutureWarning")
def test_a_decoder_of_audioread_is_read(tmp_path: Path) -> None:
    import audioread

    path = as_mp4(written(tmp_path, "44k_stereo.wav"))
    with audioread.audio_open(path) as decoder:
        found = recordings.read(decoder)
    with audioread.audio_open(path) as decoder:
        assert np.array_equal(found.samples, librosa.load(decoder, sr=None)[0])


def in_integers(dtype: str) -> Callable[[np.ndarray], np.ndarray]:
    scale = 2.0 ** (8 * np.dtype(dtype).itemsize - 1)
    return lambda x: np.round(x * scale + (scale if dtype.startswith("u") else 0)).astype(dtype)


KINDS: dict[str, tuple[Callable[[np.ndarray], Any], float]] = {
    "float32": (np.float32, 0),
    "float64": (np.float64, 0),
    "float16": (np.float16, 1e-3),
    "big-endian": (lambda x: x.astype(">f4"), 0),
    "read-only": (lambda x: np.frombuffer(x.tobytes(), np.float32).reshape(x.shape), 0),
    "every second": (lambda x: np.repeat(x, 2, axis=0)[::2], 0),
    "int16": (in_integers("int16"), 2**-15),
    "int32": (in_integers("int32"), 2**-24),
    "uint8": (in_integers("uint8"), 2**-7),
    "uint16": (in_integers("uint16"), 2**-15),
    "torch": (torch.tensor, 0),
    "torch with gradients": (lambda x: torch.tensor(x, requires_grad=True), 0),
    "torch bfloat16": (lambda x: torch.tensor(x).bfloat16(), 4e-3),
    "torch int16": (lambda x: torch.tensor(in_integers("int16")(x)), 2**-15),
    "a list": (lambda x: x.tolist(), 0),
}


@pytest.mark.parametrize("channels", ["(n,)", "(n, 1)", "(1, n)", "(n, 2)", "(2, n)"])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_every_kind_are_taken(channels: str, kind: str, recwarn: pytest.WarningsRecorder) -> None:
    one = speech(1.5)
    make, tolerance = KINDS[kind]
    shaped = {
        "(n,)": one, "(n, 1)": one[:, None], "(1, n)": one[None],
        "(n, 2)": np.stack([one, one], 1), "(2, n)": np.stack([one, one]),
    }[channels]  # fmt: skip
    for rate in (24000, 24000.0, np.int64(24000), torch.tensor(24000)):
        found = recordings.read((make(shaped), rate))
        assert np.abs(found.samples - one).max() <= tolerance
        assert (found.samples.dtype, found.rate, type(found.rate)) == (np.float32, 24000, int)
    assert np.array_equal(recordings.read([make(shaped), 24000]).samples, found.samples)
    assert not list(recwarn)


def test_channels_are_mixed_as_librosa_mixes_them() -> None:
    stereo = np.stack([speech(2, seed=1), speech(2, seed=2)], 1)
    expected, _ = librosa.load(wav(stereo), sr=None)
    for samples in (stereo, stereo.T, torch.tensor(stereo.T)):
        assert np.allclose(recordings.read((samples, 24000)).samples, expected, atol=1e-7)


def test_a_recording_stays_as_it_was_when_it_was_read() -> None:
    buffer = speech()
    found = recordings.read((buffer, 24000))
    buffer[:] = 0
    assert np.array_equal(found.samples, speech())
    assert recordings.read(found) is found


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize("name", [*FILES, pytest.param("m4a", marks=needs_ffmpeg), "numbers"])
def test_a_good_recording_is_taken_in_silence(
    tts: Any,
    tmp_path: Path,
    name: str,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if name == "numbers":
        source: Any = (speech(6.02), 24000)
    else:
        source = as_mp4(written(tmp_path, "44k_stereo.wav", 6.02)) if name == "m4a" else written(tmp_path, name, 6.02)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # an application that has not set logging up yet
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "'(aifc|audioop|sunau)' is deprecated")
        warnings.filterwarnings("ignore", ".*sdp_kernel")
        tts.prepare_conditionals(source)
        assert not logging.getLogger().handlers
    assert [str(warning.message) for warning in found] == []
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


# What is refused


class BrokenFile(io.BytesIO):
    def read(self, size: int = -1) -> bytes:
        raise OSError("the disk is gone")


class AsyncFile:
    async def read(self, size: int = -1) -> bytes:
        return b""


GOOD = speech(2)
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "zeros": (lambda _: (np.zeros(48000), 24000), "is silent"),
    "zeros in a file": (lambda _: wav(np.zeros(48000)), "is silent"),
    "below -80 dB": (lambda _: (1e-4 * GOOD, 24000), "is silent"),
    "a constant": (lambda _: (np.full(48000, 0.5), 24000), "is silent"),
    "opposite channels": (lambda _: (np.stack([GOOD, -GOOD]), 24000), "is silent"),
    "NaN": (lambda _: (np.where(np.arange(48000) == 7, np.nan, GOOD), 24000), "NaN or infinite"),
    "infinite": (lambda _: (np.where(np.arange(48000) == 7, -np.inf, GOOD), 24000), "NaN or infinite"),
    "opposite infinities": (lambda _: (np.outer([np.inf, -np.inf], np.ones(48000)), 24000), "NaN or infinite"),
    "NaN in a file": (lambda _: wav(np.where(np.arange(48000) == 7, np.nan, GOOD)), "NaN or infinite"),
    "integers as floats": (lambda _: (32767 * GOOD, 24000), r"up to 1\d{4}.*within \[-1, 1\]"),
    "floats beyond float32": (lambda _: (1e300 * GOOD.astype(float), 24000), r"within \[-1, 1\]"),
    "an empty file": (lambda tmp: written_as(tmp, b""), "not readable as audio"),
    "a text": (lambda tmp: written_as(tmp, b"Hello there. " * 999), "not readable as audio"),
    "half a header": (lambda tmp: written_as(tmp, wav(GOOD).getvalue()[:30]), "not readable as audio"),
    "only a header": (lambda _: wav(np.zeros(0)), "holds no samples"),
    "a folder": (lambda tmp: tmp, "is a folder"),
    "nothing there": (lambda tmp: tmp / "voice.wav", "no such file"),
    "a URL": (lambda _: "https://example.org/voice.wav", "no such file"),
    "a NUL in a path": (lambda _: "voice\0.wav", "no such file"),
    "an endless path": (lambda _: "voice" * 9999, "audio"),
    "a file of text": (lambda tmp: written_as(tmp, b"RIFF").open(), "binary mode"),
    "a text in memory": (lambda _: io.StringIO("RIFF"), "binary mode"),
    "a closed file": (lambda tmp: closed(written_as(tmp, b"RIFF").open("rb")), "closed file"),
    "a broken file": (lambda _: BrokenFile(b"RIFF"), "the disk is gone"),
    "an asynchronous file": (lambda _: AsyncFile(), "coroutine"),
    "an empty file in memory": (lambda _: io.BytesIO(), "not readable as audio"),
    "an empty pipe": (lambda _: Pipe(b""), "not readable as audio"),
    "(rate, samples)": (lambda _: (24000, GOOD), "in this order"),
    "three items": (lambda _: (GOOD, 24000, 1), "in this order"),
    "one item": (lambda _: (GOOD,), "in this order"),
    "no items": (lambda _: (), "in this order"),
    "an empty list": (lambda _: [], "in this order"),
    "samples in a list": (lambda _: GOOD.tolist(), "in this order"),
    "two arrays": (lambda _: (GOOD, GOOD), "in this order"),
    "rate 0": (lambda _: (GOOD, 0), "at 0"),
    "rate below 0": (lambda _: (GOOD, -24000), "at -24000"),
    "rate NaN": (lambda _: (GOOD, float("nan")), "in this order"),
    "rate infinite": (lambda _: (GOOD, float("inf")), "in this order"),
    "rate None": (lambda _: (GOOD, None), "in this order"),
    "rate True": (lambda _: (GOOD, True), "at True"),
    "rate in kHz": (lambda _: (GOOD, 24), "at 24"),
    "rate with a fraction": (lambda _: (GOOD, 24000.5), "at 24000.5"),
    "rate in words": (lambda _: (GOOD, "24000"), "at '24000'"),
    "rate in an array": (lambda _: (GOOD, np.array([24000])), "in this order"),
    "samples alone": (lambda _: GOOD, "must be a path"),
    "samples of torch alone": (lambda _: torch.tensor(GOOD), "must be a path"),
    "None in a tuple": (lambda _: (None, 24000), "is object"),
    "texts": (lambda _: (["a", "b"], 24000), "floats or integers"),
    "bytes": (lambda _: (b"RIFF", 24000), "floats or integers"),
    "complex numbers": (lambda _: (GOOD + 1j, 24000), "is complex"),
    "complex numbers of torch": (lambda _: (torch.tensor(GOOD) + 1j, 24000), "is complex"),
    "objects": (lambda _: (GOOD.astype(object), 24000), "is object"),
    "booleans": (lambda _: (GOOD > 0, 24000), "is bool"),
    "64-bit integers": (lambda _: ((32767 * GOOD).astype(np.int64), 24000), "up to 32 bits"),
    "a batch": (lambda _: (GOOD[None, None], 24000), r"\(1, 1, 48000\)"),
    "ragged": (lambda _: ([[0.1, 0.2], [0.1]], 24000), "in this order"),
    "no samples": (lambda _: (np.zeros(0), 24000), "0.00 s long"),
    "no samples, two channels": (lambda _: (np.zeros((0, 2)), 24000), "0.00 s long"),
    "no channels": (lambda _: (np.zeros((48000, 0)), 24000), "0.00 s long"),
    "a moment": (lambda _: (GOOD[:23999], 24000), "1.00 s long, must be at least 1 s"),
    "a moment in a file": (lambda _: wav(GOOD[:12000]), "0.50 s long, must be at least 1 s"),
    "a dictionary": (lambda _: {"array": GOOD, "sampling_rate": 24000}, "must be a path"),
    "a number": (lambda _: 7, "must be a path"),
    "an object": (lambda _: object(), "must be a path"),
}  # fmt: skip


def written_as(folder: Path, content: bytes) -> Path:
    (folder / "bad.wav").write_bytes(content)
    return folder / "bad.wav"


def closed(file: Any) -> Any:
    file.close()
    return file


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # audioread leaves a bad file open
def test_what_is_no_recording_is_refused_before_a_model_runs(
    tts: Any, no_model_runs: None, tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    make, why = REFUSED[kind]
    other, before, source = plain(tts), tts.conds, make(tmp_path)
    with lab.patch(other):
        for call in (
            lambda: tts.prepare_conditionals(source),
            lambda: other.prepare_conditionals(source),
            lambda: other.generate(TEXT, source),
            lambda: other.generate_stream(TEXT, audio_prompt_path=source),
        ):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", "'(aifc|audioop|sunau)' is deprecated")
                with pytest.raises(ValueError, match=re.compile(f"^audio_prompt_path=.*({why})", re.DOTALL)):
                    call()
    if hasattr(source, "close"):
        source.close()
    assert tts.conds is before
    assert other.conds is before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), 1e39, None, "0.5", True, [0.5]])
def test_an_exaggeration_that_is_none_is_refused_before_a_model_runs(tts: Any, no_model_runs: None, value: Any) -> None:
    other = plain(tts)
    with lab.patch(other):
        for model in (tts, other):
            with pytest.raises(ValueError, match=r"^exaggeration="):
                model.prepare_conditionals((GOOD, 24000), value)


@pytest.mark.parametrize("none", [None, "", b"", False])
def test_where_upstream_sees_no_recording_the_voice_stays(tts: Any, none: Any) -> None:
    before = tts.conds
    with lab.patch(tts, ignore_eos=True):
        assert tts.generate(TEXT, none, max_new_tokens=1).shape == (1, 960)
    assert tts.conds is before


# What to expect


def warned(call: Callable[[], Any]) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    ours = [warning for warning in found if issubclass(warning.category, UserWarning)]
    return [warning for warning in ours if "max_new_tokens" not in str(warning.message)]  # a few tokens are enough


MEDIOCRE: dict[str, tuple[np.ndarray, list[str]]] = {
    "short": (speech(4.9), ["only 4.9 s"]),
    "noisy": (speech() + 0.05 * np.random.default_rng(0).standard_normal(6 * 24000), ["noise or music"]),
    "clipped": (np.clip(speech(), -0.15, 0.15), ["clipped"]),
    "all of it": (np.clip(speech(2) + noise(2), -0.1, 0.1), ["only 2.0 s", "clipped", "noise or music"]),
    "good": (speech(), []),
    "good and loud": (speech() * 2, []),
    "good and quiet": (speech() / 100, []),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", MEDIOCRE)
def test_one_warning_says_what_to_expect(tts: Any, kind: str, way: Callable[..., None]) -> None:
    samples, expected = MEDIOCRE[kind]
    other = plain(tts)
    with lab.patch(other):
        found = warned(lambda: way(other, (samples, 24000)))
        assert len(found) == bool(expected)
        assert all(part in str(found[0].message) for part in expected)
        parts = str(found[0].message).count(";") + 1 if found else 0
        assert parts == len(expected)
        assert all(warning.filename == __file__ for warning in found)  # the line of the application
        assert warned(lambda: way(other, (samples, 24000))) == []
        assert warned(lambda: tts.prepare_conditionals((samples, 24000))) == []


SENTENCES = (
    "The birch canoe slid on the smooth planks, and the sheet was glued to the dark blue background. "
    "It is easy to tell the depth of a well."
)
SPEAKERS = [*(pytest.param(name, marks=needs_flite) for name in ("kal", "kal16", "slt", "rms", "awb")), "lab"]


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[np.ndarray, int]]:
    """Real speech of six seconds and more, by the name of the speaker: flite's, or the lab voice."""
    folder, made = tmp_path_factory.mktemp("speech"), {}

    def speak(name: str) -> tuple[np.ndarray, int]:
        if name in made:
            return made[name]
        if name == "lab":
            tts = models.load("lab", device="cpu")
            audio = lab.generate(tts, SENTENCES, lab.FAST, seed=0, max_new_tokens=160)
            made[name] = audio[0].numpy(), tts.sr
        else:
            subprocess.run(["flite", "-voice", name, "-t", SENTENCES, "-o", folder / "speech.wav"], check=True)
            made[name] = soundfile.read(folder / "speech.wav", dtype="float32")
        return made[name]

    return speak


def without_pauses(samples: np.ndarray, rate: int) -> np.ndarray:
    frames = samples[: len(samples) // (rate // 50) * (rate // 50)].reshape(-1, rate // 50)
    level = 10 * np.log10(np.square(frames).mean(1) + 1e-12)
    return frames[level > np.percentile(level, 95) - 30].ravel()


def with_noise(kind: str, decibels: float) -> Callable[..., np.ndarray]:
    def mixed(samples: np.ndarray, rate: int) -> np.ndarray:
        time = np.arange(len(samples)) / rate
        added = {
            "white": np.random.default_rng(0).standard_normal(len(samples)),
            "tone": np.sin(2 * np.pi * 440 * time),
            "hum": sum(np.sin(2 * np.pi * 50 * k * time) / k for k in (1, 2, 3, 4)),
            "chord": sum(np.sin(2 * np.pi * pitch * time) for pitch in (220, 277.2, 329.6)),
        }[kind]
        return samples + added * (samples.std() / added.std() * 10 ** (-decibels / 20))

    return mixed


def clipped(share: float, *, sides: int = 2) -> Callable[..., np.ndarray]:
    def cut(samples: np.ndarray, rate: int) -> np.ndarray:
        if sides == 1:
            return np.minimum(samples, np.quantile(samples, 1 - share))
        most = np.quantile(np.abs(samples), 1 - share)
        return np.clip(samples, -most, most)

    return cut


Change = Callable[[np.ndarray, int], np.ndarray]
CLEAN: dict[str, Change] = {
    "as it is": lambda x, _: x,
    "without pauses": without_pauses,
    "at full scale": lambda x, _: x / np.abs(x).max(),
    "at -40 dB": lambda x, _: 0.01 * x / np.abs(x).max(),
    "of few bits": lambda x, _: np.round(16 * x / np.abs(x).max()) / 128,
    "compressed": lambda x, _: np.tanh(0.7 * x / x.std()),
    "with noise 30 dB below": with_noise("white", 30),
    "with a tone 30 dB below": with_noise("tone", 30),
}
NOISY: dict[str, Change] = {
    f"{kind} {db} dB": with_noise(kind, db) for kind in ("white", "tone", "hum") for db in (0, 10)
}
NOISY |= {
    "a chord 10 dB": with_noise("chord", 10),
    "without pauses": lambda x, rate: with_noise("white", 10)(without_pauses(x, rate), rate),
    "amid digital silence": lambda x, rate: np.pad(with_noise("white", 10)(x, rate), rate),
}
CLIPPED: dict[str, Change] = {f"{share:.0%} clipped": clipped(share) for share in (0.01, 0.05, 0.2)}
CLIPPED |= {"1% clipped on one side": clipped(0.01, sides=1)}


def expected_of(samples: np.ndarray, rate: int) -> list[str]:
    return recordings.expectations(recordings.read((samples, rate)))


@pytest.mark.parametrize("name", SPEAKERS)
def test_clean_speech_is_not_warned_of(spoken: Any, name: str) -> None:
    speech, rate = spoken(name)
    found = {kind: expected_of(change(speech, rate), rate) for kind, change in CLEAN.items()}
    found |= {
        f"at {other} Hz": expected_of(librosa.resample(speech, orig_sr=rate, target_sr=other), other)
        for other in (8000, 16000, 44100, 48000)
    }
    assert {kind: texts for kind, texts in found.items() if any("only" not in text for text in texts)} == {}
    assert all(texts == [] for kind, texts in found.items() if kind != "without pauses")  # it may be short


@pytest.mark.parametrize("name", SPEAKERS)
def test_noise_and_clipping_are_warned_of(spoken: Any, name: str) -> None:
    speech, rate = spoken(name)
    for kinds, word in ((NOISY, "noise or music"), (CLIPPED, "clipped")):
        found = {kind: " ".join(expected_of(change(speech, rate), rate)) for kind, change in kinds.items()}
        assert {kind: text for kind, text in found.items() if word not in text} == {}
    assert "only 4.5 s" in expected_of(speech[: round(4.5 * rate)], rate)[0]


# Once


def test_the_same_content_is_prepared_once(tts: Any, tmp_path: Path, prepared: list[str]) -> None:
    samples = (np.round(speech() * 2**15) / 2**15).astype(np.float32)
    for name in ("one.wav", "other.wav", "one.flac"):
        soundfile.write(tmp_path / name, samples, 24000)
    for number, source in enumerate(
        [tmp_path / "one.wav", tmp_path / "other.wav", str(tmp_path / "one.flac"), wav(samples), (samples, 24000)]
    ):
        tts.prepare_conditionals(source, exaggeration=number / 10)
        assert tts.conds.t3.emotion_adv.item() == pytest.approx(number / 10)
    with lab.patch(tts, ignore_eos=True):
        tts.generate(TEXT, tmp_path / "one.flac", exaggeration=0.9, max_new_tokens=1)
    assert tts.conds.t3.emotion_adv.item() == pytest.approx(0.9)
    assert prepared == [str(tmp_path / "one.wav")]
    tts.prepare_conditionals((samples, 23999))  # the same samples, another sound
    assert len(prepared) == 2


@pytest.mark.filterwarnings("ignore:the recording")
def test_sixteen_are_kept_and_the_oldest_goes(tts: Any, prepared: list[str]) -> None:
    for number in [*range(16), 0, 16]:  # 0 is used again, so 1 is the oldest when 16 comes
        tts.prepare_conditionals((noise(seed=number), 24000))
    assert len(prepared) == 17
    for number in (0, *range(2, 17)):
        tts.prepare_conditionals((noise(seed=number), 24000))
    assert len(prepared) == 17
    tts.prepare_conditionals((noise(seed=1), 24000))
    assert len(prepared) == 18


def test_a_voice_is_the_callers_own(tts: Any, prepared: list[str]) -> None:
    tts.prepare_conditionals((speech(), 24000))
    first, untouched = tts.conds, copy.deepcopy(tts.conds)
    for value in tensors(first).values():
        value.zero_()
    first.gen.clear()
    tts.prepare_conditionals((speech(), 24000))
    assert same(tts.conds, untouched)
    assert len(prepared) == 1


@pytest.mark.parametrize("part", ["s3gen", "ve"])
@pytest.mark.parametrize("behind", [False, True])
def test_other_weights_prepare_anew(tts: Any, prepared: list[str], part: str, behind: bool) -> None:
    module = getattr(tts, part)
    tts.prepare_conditionals((speech(), 24000))
    before, state = tts.conds, {name: value.clone() for name, value in module.state_dict().items()}
    try:
        if behind:  # as a merged adapter may, which PyTorch does not count
            for weight in module.parameters():
                weight.data.mul_(1.5)
        else:
            module.load_state_dict({k: 1.5 * v if v.is_floating_point() else v for k, v in state.items()})
        tts.prepare_conditionals((speech(), 24000))
        assert len(prepared) == 2
        assert not same(tts.conds, before)
        assert same(tts.conds, of_upstream(tts, wav(speech())))
    finally:
        module.load_state_dict(state)
    tts.prepare_conditionals((speech(), 24000))
    assert same(tts.conds, before)


def test_a_voice_follows_the_dtype_of_t3(tts: Any, prepared: list[str]) -> None:
    tts.prepare_conditionals((speech(), 24000))
    other = plain(tts)
    other.t3 = copy.deepcopy(tts.t3).to(torch.bfloat16)
    with lab.patch(other, ignore_eos=True):
        other.prepare_conditionals((speech(), 24000))
        assert other.conds.t3.speaker_emb.dtype == torch.bfloat16
        assert other.generate(TEXT, (speech(), 24000), max_new_tokens=1).shape == (1, 960)
    assert len(prepared) == 1
    assert tts.conds.t3.speaker_emb.dtype == torch.float32


@pytest.fixture
def encoded(tts: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The encoders of recordings that run."""
    ran: list[str] = []

    def noting(owner: Any, name: str) -> None:
        inner = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: ran.append(name) or inner(*args, **kwargs))

    for owner, name in (
        (tts.s3gen, "embed_ref"), (tts.s3gen.tokenizer, "forward"), (tts.s3gen.speaker_encoder, "forward"),
        (tts.ve, "embeds_from_wavs"),
    ):  # fmt: skip
        noting(owner, name)
    return ran


def test_a_known_recording_costs_a_call_nothing(tts: Any, encoded: list[str]) -> None:
    with lab.patch(tts, ignore_eos=True):
        by_stream(tts, (speech(), 24000))
        assert set(encoded) == {"embed_ref", "forward", "embeds_from_wavs"}
        del encoded[:]
        for way in WAYS:
            way(tts, wav(speech()))
    assert encoded == []


@pytest.mark.filterwarnings("ignore:the recording")
def test_a_stream_prepares_its_voice_with_its_first_chunk(tts: Any, encoded: list[str]) -> None:
    before, buffer = tts.conds, noise()
    with lab.patch(tts, ignore_eos=True):
        stream = tts.generate_stream(TEXT, (buffer, 24000), chunk_size=2, max_new_tokens=2, print_metrics=False)
        assert (encoded, tts.conds) == ([], before)
        buffer[:] = 0  # the application's next recording
        next(stream)
    assert encoded
    assert same(tts.conds, of_upstream(tts, wav(noise())))


# Failures


class PreparationError(Exception):
    pass


@pytest.mark.filterwarnings("ignore:the recording")
@pytest.mark.parametrize("way", WAYS)
def test_a_preparation_that_fails_leaves_all_as_it_was(
    tts: Any, way: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise PreparationError

    before, root = tts.conds, logging.getLogger().handlers[:]
    with lab.patch(tts, ignore_eos=True):
        monkeypatch.setattr(tts.ve, "embeds_from_wavs", fail)
        with pytest.raises(PreparationError):
            way(tts, (noise(), 24000))
        assert tts.conds is before
        monkeypatch.undo()
        way(tts, (noise(), 24000))  # nothing is locked, nothing half-made is kept
    assert same(tts.conds, of_upstream(tts, wav(noise())))
    assert logging.getLogger().handlers == root
    from chatterbox.models.s3gen import s3gen

    assert s3gen.logging is logging


def test_a_warning_made_an_error_leaves_the_voice(tts: Any) -> None:
    before = tts.conds
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(UserWarning, match=r"only 2\.0 s"):
            tts.prepare_conditionals((speech(2), 24000))
    assert tts.conds is before


@pytest.mark.filterwarnings("ignore:the recording")
def test_threads_may_clone_at_once_and_upstream_works_for_one_at_a_time(
    tts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [of_upstream(tts, wav(noise(seed=number))) for number in range(4)]
    models = [plain(tts) for _ in range(8)]
    failures: list[BaseException] = []
    inside: list[int] = []
    most, inner = [], tts.ve.embeds_from_wavs

    def slowly(*args: Any, **kwargs: Any) -> Any:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)  # long enough for the others to come
        inside.pop()
        return inner(*args, **kwargs)

    monkeypatch.setattr(tts.ve, "embeds_from_wavs", slowly)

    def work(model: Any, number: int) -> None:
        try:
            model.prepare_conditionals((noise(seed=number), 24000))
        except BaseException as error:
            failures.append(error)

    patches = [lab.patch(model) for model in models]
    threads = [threading.Thread(target=work, args=(model, i % 4)) for i, model in enumerate(models)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert max(most) == 1
    assert all(same(model.conds, expected[i % 4]) for i, model in enumerate(models))
    for patch in patches:
        patch.undo()


@pytest.fixture
def odd_pytorch() -> Iterator[None]:
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        yield


@pytest.mark.filterwarnings("ignore:the recording")
def test_a_voice_is_the_same_however_pytorch_is_set_up(tts: Any, odd_pytorch: None) -> None:
    tts.prepare_conditionals((noise(), 24000))
    with torch.device("cpu"), torch.autocast("cpu", enabled=False):
        assert same(tts.conds, of_upstream(tts, wav(noise())))


def test_a_click_in_silence_and_other_odd_sounds_are_taken(tts: Any) -> None:
    click = np.zeros(3 * 24000, np.float32)
    click[30000:30003] = 0.9
    odd = {
        "click": (click, 24000),
        "just not silent": (2.1e-4 * speech(2) / 0.5, 24000),
        "exactly a second": (speech(1), 24000),
        "1000 Hz": (speech(6, 1000), 1000),
        "a million Hz": (np.repeat(speech(2, 50000), 20), 1_000_000),
        "offset": (0.3 + 0.2 * speech(), 24000),
        "square": (np.sign(speech(2)), 24000),
        "minutes": (np.tile(speech(30), 10), 24000),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, source in odd.items():
            tts.prepare_conditionals(source)
            assert all(value.isfinite().all() for value in tensors(tts.conds).values()), name
